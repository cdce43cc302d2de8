//! Moves of device groups in one process, over real connections.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{
    MIB, Random, WAIT,
    content::{filled, noise},
    file::{Faulty, Op},
    memory::Memory,
    rig::*,
    tap::{
        Tap, Way,
        kind::{BLOCKS, TOKEN},
    },
    until,
};
use silo_block::{
    hash::RootHash,
    io::BlockDevice,
    session::{Finish, Policy, messages::SessionId, source::Config},
};
use silo_move::{
    Content, Outbound, Volume, destination,
    peer::{Dial, Limits},
    source,
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Writes at random until told to stop, and counts what was answered.
fn write_until(volume: &Volume, stop: &AtomicBool, count: &AtomicU64, seed: u64) {
    let mut random = Random(seed);
    let size = volume.size();
    while !stop.load(Ordering::Relaxed) {
        let mut data = vec![0; random.below(9000) as usize + 1];
        random.fill(&mut data);
        let at = random.below(size - data.len() as u64);
        match volume.write_at(at, &data) {
            Ok(()) => _ = count.fetch_add(1, Ordering::Relaxed),
            // Handed over in the middle of a write: that one was never acknowledged.
            Err(error) if error.kind() == std::io::ErrorKind::NotConnected => break,
            Err(error) => panic!("{error}"),
        }
        if count.load(Ordering::Relaxed).is_multiple_of(8) {
            thread::sleep(Duration::from_micros(200));
        }
    }
}

#[test]
fn a_group_of_devices_moves_and_both_ends_say_so() {
    let devices = [filled(8 * MIB, 1), filled(3 * MIB + 78, 2)];
    let targets = [Arc::new(Memory::new(8 * MIB)), Arc::new(Memory::new(3 * MIB + 78))];
    let names = ["memory", "root"];
    let volumes: Vec<Arc<Volume>> =
        (0..2).map(|at| owned(names[at], devices[at].clone(), 4096)).collect();
    let there: Vec<Arc<Volume>> =
        (0..2).rev().map(|at| empty(names[at], targets[at].clone(), 4096)).collect();
    let receiver = Receiver::new(there.clone(), destination::Options::default());
    let server = serve(&receiver);
    let host = Arc::new(Host::default());
    host.handover.lock().unwrap().state = b"registers".to_vec();
    let outbound = start(&volumes, server.address(), &host, source::Options::default());
    outbound.custom(7, b"hello".to_vec());
    let report = outbound.wait().unwrap();
    let session = receiver.session(1);
    let arrived = session.wait().unwrap();
    eprintln!("{}\n{}", report.timings, arrived.timings);
    assert_eq!(report.session, arrived.session);
    assert_eq!(
        receiver.host.wait_for(|seen| matches!(seen, Seen::Run(..))),
        Seen::Run(1, b"registers".to_vec(), vec![vec![], vec![]])
    );
    assert!(receiver.host.seen().contains(&Seen::Custom(7, b"hello".to_vec())));
    assert!(host.seen().contains(&Seen::HandedOver));
    for at in 0..2 {
        same(&*devices[at], &*targets[at]);
    }
    // The source's volumes are gone, the destination's are in use.
    assert!(volumes[0].write_at(0, &[1]).is_err());
    there[0].write_at(0, &[1]).unwrap();
    assert_eq!(report.links, 1);
    assert!(report.paths.fill > 0 && report.paths.plain + report.paths.packed > 0);
}

#[test]
fn check_01_any_size_in_any_block_size_arrives_byte_for_byte() {
    for block in [512u64, 4096, 64 << 10, 1 << 20] {
        let sizes = [1, 511, 512, 4095, 4096, block - 1, block, block + 1, 3 * block + 78];
        let devices: Vec<_> = sizes.iter().map(|size| noise(*size, *size)).collect();
        let targets: Vec<_> = sizes.iter().map(|size| Arc::new(Memory::new(*size))).collect();
        let device = |at: usize| format!("d{at}");
        let volumes: Vec<_> = (0..sizes.len())
            .map(|at| owned(&device(at), devices[at].clone(), block as u32))
            .collect();
        let there = (0..sizes.len())
            .map(|at| empty(&device(at), targets[at].clone(), block as u32))
            .collect();
        let receiver = Receiver::new(there, destination::Options::default());
        let server = serve(&receiver);
        let host = Arc::new(Host::default());
        start(&volumes, server.address(), &host, source::Options::default()).wait().unwrap();
        receiver.session(1).wait().unwrap();
        for (device, target) in devices.iter().zip(&targets) {
            same(&**device, &**target);
        }
    }
}

#[test]
fn check_02_a_device_of_zeros_sends_no_payload() {
    let size = 64 * MIB;
    let device = Arc::new(Memory::new(size));
    // Written, so that nothing but its content says that it is zero.
    (0..64).for_each(|at| device.write_at(at * MIB, &vec![0; MIB as usize]).unwrap());
    let target = Arc::new(Memory::new(size));
    let receiver = Receiver::new(vec![empty("m", target.clone(), 4096)], quick());
    let server = serve(&receiver);
    let volumes = [owned("m", device, 4096)];
    let host = Arc::new(Host::default());
    let report =
        start(&volumes, server.address(), &host, source::Options::default()).wait().unwrap();
    assert_eq!(report.paths.zero, size / 4096);
    assert_eq!(report.paths.plain + report.paths.packed + report.paths.fill, 0);
    assert!(report.wire.total() < size / 4096, "{:?}", report.wire);
    assert_eq!(target.written.load(Ordering::Relaxed), 0, "zeros over zeros cost no write");
}

#[test]
fn check_32_writers_and_any_order_across_connections_leave_the_same_bytes() {
    for seed in 0..6 {
        let size = 6 * MIB + 777;
        let device = filled(size, seed);
        let volume = owned("memory", device.clone(), 4096);
        let target = Arc::new(Memory::new(size));
        let there = empty("memory", target.clone(), 4096);
        let receiver = Receiver::new(vec![there.clone()], destination::Options::default());
        let server = serve(&receiver);
        let tap = Tap::new(Some(server.address()));
        tap.jitter(Duration::from_micros(1500));
        let stop = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let writers: Vec<_> = (0..2)
            .map(|n| {
                let (volume, stop, writes) = (volume.clone(), stop.clone(), writes.clone());
                thread::spawn(move || write_until(&volume, &stop, &writes, seed * 10 + n))
            })
            .collect();
        let finish = if seed % 2 == 0 { Finish::Hybrid } else { Finish::Whole };
        let pause = Duration::from_millis(5);
        let policy = Policy { finish, max_rounds: 6, hold: true, pause, ..Policy::default() };
        let options = source_options(Config { policy, ..Config::default() });
        let host = Arc::new(Host::default());
        let dial = Dial::new(
            tap.address,
            identity::HostName::new("b").unwrap(),
            identity::Security::Plaintext,
            Limits { data: 4, ..limits() },
        );
        let outbound = Outbound::start(vec![volume.clone()], dial, host, options).unwrap();
        until("rounds among writes", || {
            outbound.progress().rounds > 1 && writes.load(Ordering::Relaxed) > 10
        });
        outbound.switch();
        outbound.wait().unwrap();
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().for_each(|thread| thread.join().unwrap());
        receiver.session(1).wait().unwrap();
        same(&*device, &*target);
    }
}

#[test]
fn a_block_that_changes_a_little_in_every_round_travels_as_a_difference() {
    let size = 4 * MIB;
    let device = noise(size, 8);
    let volume = owned("memory", device.clone(), 4096);
    let target = Arc::new(Memory::new(size));
    let receiver = Receiver::new(vec![empty("memory", target.clone(), 4096)], quick());
    let server = serve(&receiver);
    let policy = Policy { hold: true, pause: Duration::from_millis(5), ..Policy::default() };
    let host = Arc::new(Host::default());
    let options = source_options(Config { policy, ..Config::default() });
    let outbound = start(std::slice::from_ref(&volume), server.address(), &host, options);
    for round in 0..30u8 {
        for block in 0..16 {
            volume.write_at(block * 4096 + 100, &[round; 8]).unwrap();
        }
        let begun = outbound.progress().rounds;
        until("two rounds", || outbound.progress().rounds >= begun + 2);
    }
    outbound.switch();
    let report = outbound.wait().unwrap();
    receiver.session(1).wait().unwrap();
    same(&*device, &*target);
    assert!(report.paths.delta > 200, "{:?}", report.paths);
    assert!(report.wire.total() < size + size / 5, "{:?}", report.wire);
}

#[test]
fn check_22_blocks_of_a_base_are_trusted_only_if_its_root_is_the_same() {
    let size = 8 * MIB;
    let base = noise(size, 10);
    let root = RootHash::from(*blake3::hash(&bytes(&*base)).as_bytes());
    let other = noise(size, 11);
    let wrong = RootHash::from(*blake3::hash(&bytes(&*other)).as_bytes());
    for (there, content, same_base) in [(&base, root, true), (&other, wrong, false)] {
        // The source: a copy of the base with one block written.
        let device = Arc::new(Memory::new(size));
        device.write_at(0, &bytes(&*base)).unwrap();
        let id = SessionId([1; 16]);
        let volume = Volume::owned(name("root"), device.clone(), 4096, Content::Base(root), id);
        let volume = Arc::new(volume.unwrap());
        volume.write_at(MIB, b"changed").unwrap();
        let target = Arc::new(Memory::new(size));
        target.write_at(0, &bytes(&**there)).unwrap();
        let untouched =
            Volume::untouched(name("root"), target.clone(), 4096, Content::Base(content)).unwrap();
        let receiver = Receiver::new(vec![Arc::new(untouched)], quick());
        let server = serve(&receiver);
        let host = Arc::new(Host::default());
        let report =
            start(&[volume], server.address(), &host, source::Options::default()).wait().unwrap();
        receiver.session(1).wait().unwrap();
        let expected = if same_base { 4096 } else { size };
        assert_eq!(report.paths.content, expected);
        same(&*device, &*target);
    }
}

#[test]
fn check_31_a_device_that_stores_slowly_does_not_hold_the_others() {
    let (slow, fast) = (noise(8 * MIB, 12), noise(8 * MIB, 13));
    let target = Arc::new(Faulty::new(Memory::new(8 * MIB)));
    let release = Arc::new(AtomicBool::new(false));
    let gate = release.clone();
    let done = Arc::new(AtomicU64::new(0));
    target.set(move |op, _, _| {
        let begin = Instant::now();
        // Each store takes seconds until the other device is done.
        while op == Op::Write && !gate.load(Ordering::Relaxed) && begin.elapsed() < WAIT / 30 {
            thread::sleep(Duration::from_millis(5));
        }
        None
    });
    let other = Arc::new(Memory::new(8 * MIB));
    let there = vec![empty("slow", target.clone(), 4096), empty("fast", other.clone(), 4096)];
    let receiver = Receiver::new(there, quick());
    let server = serve(&receiver);
    let volumes = [owned("slow", slow.clone(), 4096), owned("fast", fast.clone(), 4096)];
    let host = Arc::new(Host::default());
    let outbound = start(&volumes, server.address(), &host, source::Options::default());
    until("the fast device is there", || {
        done.store(other.written.load(Ordering::Relaxed), Ordering::Relaxed);
        done.load(Ordering::Relaxed) >= 8 * MIB
    });
    release.store(true, Ordering::Relaxed);
    outbound.wait().unwrap();
    receiver.session(1).wait().unwrap();
    same(&*fast, &*other);
    same(&*slow, &*target);
}

/// Closed until it is opened.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    /// Whether it was opened in time.
    fn pass(&self) -> bool {
        let closed = self.0.lock().unwrap();
        !self.1.wait_timeout_while(closed, 2 * WAIT, |open| !*open).unwrap().1.timed_out()
    }
}

#[test]
fn check_31_a_device_that_is_stuck_uses_up_neither_window_nor_connections() {
    // More of each than may be on its way.
    let (stuck, other) = (noise(96 * MIB, 22), noise(48 * MIB, 23));
    let target = Arc::new(Faulty::new(Memory::new(96 * MIB)));
    let (gate, writes) = (Arc::new(Gate::default()), Arc::new(AtomicU64::new(0)));
    let (closed, begun) = (gate.clone(), writes.clone());
    target.set(move |op, _, _| {
        if op != Op::Write {
            return None;
        }
        begun.fetch_add(1, Ordering::SeqCst);
        (!closed.pass()).then(|| std::io::ErrorKind::TimedOut.into())
    });
    let free = Arc::new(Memory::new(48 * MIB));
    let there = vec![empty("stuck", target.clone(), 4096), empty("other", free.clone(), 4096)];
    let receiver = Receiver::new(there, quick());
    let server = serve(&receiver);
    let volumes = vec![owned("stuck", stuck.clone(), 4096), owned("other", other.clone(), 4096)];
    // One connection for blocks: the stuck device holds who reads it.
    let limits = Limits { data: 1, ..limits() };
    let name = identity::HostName::new("b").unwrap();
    let dial = Dial::new(server.address(), name, identity::Security::Plaintext, limits);
    let host = Arc::new(Host::default());
    let outbound = Outbound::start(volumes, dial, host, source::Options::default()).unwrap();
    until("all of the other device", || free.written.load(Ordering::SeqCst) >= 48 * MIB);
    // It holds a lock meanwhile: whoever else wants to store there waits too.
    assert_eq!(writes.load(Ordering::SeqCst), 1, "the first write there has not ended");
    gate.open();
    outbound.wait().unwrap();
    receiver.session(1).wait().unwrap();
    same(&*other, &*free);
    same(&*stuck, &*target);
}

#[test]
fn check_36_devices_of_a_group_share_the_line_by_what_is_left_and_change_hands_at_one_point() {
    let sizes = [24 * MIB, 12 * MIB, 4 * MIB];
    let names = ["large", "middle", "small"];
    let devices: Vec<_> = sizes.iter().map(|size| noise(*size, *size)).collect();
    let volumes: Vec<_> = (0..3).map(|at| owned(names[at], devices[at].clone(), 4096)).collect();
    let targets: Vec<_> = sizes.iter().map(|size| Arc::new(Memory::new(*size))).collect();
    let there = (0..3).map(|at| empty(names[at], targets[at].clone(), 4096)).collect();
    let receiver = Receiver::new(there, quick());
    let server = serve(&receiver);
    let tap = Tap::new(Some(server.address()));
    let shares = Arc::new(Mutex::new((BTreeMap::<u16, u64>::new(), Vec::new(), 0)));
    let noted = shares.clone();
    tap.at_each_frame(move |_, way, frame| {
        let mut noted = noted.lock().unwrap();
        if way == Way::Out && frame[0] == TOKEN {
            noted.2 += 1;
        }
        if way == Way::Out && frame[0] == BLOCKS {
            let device = u16::from_le_bytes([frame[2], frame[3]]);
            *noted.0.entry(device).or_default() += frame.len() as u64;
            // At three tenths of it all.
            if noted.1.is_empty() && noted.0.values().sum::<u64>() >= 12 * MIB {
                noted.1 = noted.0.values().copied().collect();
            }
        }
        true
    });
    let host = Arc::new(Host::default());
    let options = source_options(Config { window: 4 << 20, ..Config::default() });
    start(&volumes, tap.address, &host, options).wait().unwrap();
    receiver.session(1).wait().unwrap();
    let noted = shares.lock().unwrap();
    let then = &noted.1;
    for at in 0..3 {
        let share = then[at] as f64 / sizes[at] as f64;
        assert!((0.15..0.8).contains(&share), "device {at} is at {share:.2} of its size: {then:?}");
        same(&*devices[at], &*targets[at]);
    }
    assert_eq!(noted.2, 1, "one token for all");
    let runs = receiver.host.seen().iter().filter(|s| matches!(s, Seen::Run(..))).count();
    assert_eq!(runs, 1);
}

#[test]
fn of_two_moves_of_one_volume_only_one_gives_it_away() {
    let device = filled(4 << 20, 3);
    let volume = owned("disk", device.clone(), 4096);
    let receivers: Vec<_> = (0..2)
        .map(|_| Receiver::new(vec![empty("disk", Arc::new(Memory::new(4 << 20)), 4096)], quick()))
        .collect();
    let servers: Vec<_> = receivers.iter().map(serve).collect();
    let policy = Policy { hold: true, ..Policy::default() };
    let mut outbounds: Vec<_> = servers
        .iter()
        .map(|server| {
            let config = Config { policy, patience: patience(20_000), ..Config::default() };
            start(
                std::slice::from_ref(&volume),
                server.address(),
                &Arc::default(),
                source_options(config),
            )
        })
        .collect();
    outbounds.iter().for_each(|outbound| until("both copies", || outbound.progress().rounds > 1));
    let (second, first) = (outbounds.pop().unwrap(), outbounds.pop().unwrap());
    first.switch();
    first.wait().unwrap();
    second.switch();
    let error = second.wait().unwrap_err();
    assert!(!error.owned, "{error}");
    assert!(error.to_string().contains("given away by another session"), "{error}");
    assert!(!receivers[1].host.seen().iter().any(|seen| matches!(seen, Seen::Run(..))));
    same(&*device, &*receivers[0].volumes.lock().unwrap()[0]);
}

#[test]
fn a_peer_that_was_turned_away_and_goes_on_talking_is_cut_off() {
    let receiver = Receiver::new(Vec::new(), quick());
    let server = serve(&receiver);
    let mut link = dial(server.address()).link(SessionId([9; 16]), 1).unwrap();
    let begin = Instant::now();
    // It does not even greet.
    while begin.elapsed() < WAIT / 2 {
        let said = silo_move::wire::write_to_destination(
            &mut link.control.outgoing,
            &silo_block::session::messages::ToDestination::Alive,
        );
        if said.and_then(|()| link.control.outgoing.flush()).is_err() {
            return;
        }
        thread::park_timeout(Duration::from_millis(20));
    }
    panic!("still listened to after {:?}", begin.elapsed());
}

#[test]
fn check_38_the_way_back_costs_what_was_written_since() {
    let device = noise(8 * MIB, 20);
    let home = owned("memory", device.clone(), 4096);
    let target = Arc::new(Memory::new(8 * MIB));
    let away = empty("memory", target.clone(), 4096);
    let host = Arc::new(Host::default());
    let (here, there) =
        (Receiver::new(vec![home.clone()], quick()), Receiver::new(vec![away.clone()], quick()));
    let (to_here, to_there) = (serve(&here), serve(&there));
    // Forth and back, three times.
    for turn in 0..3u64 {
        let forth = start(
            std::slice::from_ref(&home),
            to_there.address(),
            &host,
            source::Options::default(),
        );
        let forth = forth.wait().unwrap();
        there.session(turn as usize + 1).wait().unwrap();
        let most = if turn == 0 { 8 * MIB } else { 2 * 4096 };
        assert!(forth.paths.content <= most, "turn {turn}: {} bytes", forth.paths.content);
        away.write_at(turn * MIB + 99, b"written there").unwrap();
        let back = start(
            std::slice::from_ref(&away),
            to_here.address(),
            &host,
            source::Options::default(),
        );
        let back = back.wait().unwrap();
        here.session(turn as usize + 1).wait().unwrap();
        assert_eq!(back.paths.content, 4096, "turn {turn}");
        same(&*device, &*target);
        home.write_at(turn * MIB + 500_000, b"written here").unwrap();
    }
}

#[test]
fn check_41_no_path_and_no_secret_leaves_and_none_that_comes_is_obeyed() {
    let dir = tempfile::Builder::new().prefix("SECRET-PATH").tempdir().unwrap();
    let path = dir.path().join("SECRET-FILE.img");
    let file = common::file::FileDevice::open(&path, MIB).unwrap();
    let volume = owned("root", Arc::new(file), 4096);
    volume.write_at(0, b"content").unwrap();
    let target = Arc::new(Memory::new(MIB));
    let receiver = Receiver::new(vec![empty("root", target, 4096)], quick());
    let server = serve(&receiver);
    let tap = Tap::new(Some(server.address()));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = seen.clone();
    tap.at_each_frame(move |_, _, frame| {
        noted.lock().unwrap().extend_from_slice(frame);
        true
    });
    let ledger = silo_move::ledger::FileLedger::new(dir.path().join("SECRET-NOTE"));
    let key = *b"SECRET-KEY-0123456789-0123456789";
    let options = source::Options {
        ledger: Some(Arc::new(ledger)),
        naming: silo_move::codec::Naming::Keyed(key),
        ..source::Options::default()
    };
    let host = Arc::new(Host::default());
    start(&[volume], tap.address, &host, options).wait().unwrap();
    receiver.session(1).wait().unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.windows(4).any(|part| part == b"root"), "the tap sees the bytes");
    assert!(!seen.windows(6).any(|part| part == b"SECRET"), "a secret is on the wire");
    drop(seen);
    // Names that could be paths cannot be made, and names that this host does not know are refused.
    assert!(silo_block::device::DeviceName::new("../../etc/passwd").is_none());
    let stranger = owned("shadow", Arc::new(Memory::new(MIB)), 4096);
    let error =
        start(std::slice::from_ref(&stranger), server.address(), &host, source::Options::default())
            .wait()
            .unwrap_err();
    assert!(error.to_string().contains("no such device"), "{error}");
    stranger.write_at(0, &[1]).unwrap();
}

#[test]
fn check_38_a_round_trip_over_a_third_host_costs_what_was_written_since() {
    let size = 8 * MIB;
    let devices: Vec<_> = (0..3).map(|_| Arc::new(Memory::new(size))).collect();
    devices[0].write_at(0, &bytes(&*noise(size, 21))).unwrap();
    let mut volumes = vec![owned("memory", devices[0].clone(), 4096)];
    volumes.extend(devices[1..].iter().map(|device| empty("memory", device.clone(), 4096)));
    let receivers: Vec<_> =
        volumes.iter().map(|volume| Receiver::new(vec![volume.clone()], quick())).collect();
    let servers: Vec<_> = receivers.iter().map(serve).collect();
    for turn in 0..6usize {
        let (from, to) = (turn % 3, (turn + 1) % 3);
        volumes[from].write_at(turn as u64 * MIB + 99, b"written on the way").unwrap();
        let outbound = start(
            std::slice::from_ref(&volumes[from]),
            servers[to].address(),
            &Arc::default(),
            source::Options::default(),
        );
        let report = outbound.wait().unwrap();
        receivers[to].session(turn / 3 + 1).wait().unwrap();
        same(&*devices[from], &*devices[to]);
        // Each host has had it two moves ago, but for the first time round.
        let most = if turn < 2 { size } else { 3 * 4096 };
        assert!(report.paths.content <= most, "turn {turn}: {} bytes", report.paths.content);
    }
}
