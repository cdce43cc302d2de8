//! What the server promises, tried from outside: durability, no stall of one device by another, a
//! stop in time, the exchange of a device under its clients.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod nbd_support;

use nbd_support::{LIMIT, Ram, Random, Rig, have, noise, tool, wait_for};
use silo_block::io::BlockDevice;
use silo_expose::nbd::{ExportOptions, Exports, NbdClient, NbdClientOptions, NbdError, NbdOptions};
use std::{
    collections::HashMap,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const MIB: usize = 1 << 20;

fn defaults() -> NbdClientOptions {
    NbdClientOptions::default()
}

#[test]
fn check_25_a_flush_and_fua_reach_the_device_before_the_answer() {
    let ram = Arc::new(Ram::new(MIB));
    let rig = Rig::new(ram.clone());
    let (one, two) = (rig.client(defaults()), rig.client(defaults()));
    one.write_at(0, &[1; 4096]).unwrap();
    assert_eq!(ram.durable()[0], 0, "a write alone promises nothing");
    // A flush on another connection covers it.
    two.flush().unwrap();
    assert_eq!(ram.durable()[0], 1);
    let before = ram.flushes.load(Ordering::SeqCst);
    two.flush().unwrap();
    assert_eq!(ram.flushes.load(Ordering::SeqCst), before + 1, "each flush goes to the device");
    drop((one, two));

    // The client of QEMU: -f is FUA; and that of libnbd.
    if have("qemu-io", "qemu-utils") {
        let url = rig.uri("");
        for (command, offset) in [("write -f -P 7 64k 4k", 64 << 10), ("write -z -f 0 4k", 0)] {
            tool("qemu-io", &["-f", "raw", &url, "-c", command]);
            let expected = if offset == 0 { 0 } else { 7 };
            assert_eq!(ram.durable()[offset..offset + 4096], [expected; 4096]);
        }
    }
    if have("nbdsh", "python3-libnbd") {
        let script = "h.pwrite(b'x' * 512, 8192, nbd.CMD_FLAG_FUA)";
        tool("nbdsh", &["-u", &rig.uri(""), "-c", script]);
        assert_eq!(ram.durable()[8192..8704], [b'x'; 512]);
        let script = "h.pwrite(b'y' * 512, 12288); h.flush()";
        tool("nbdsh", &["-u", &rig.uri(""), "-c", script]);
        assert_eq!(ram.durable()[12288..12800], [b'y'; 512]);
    }
}

#[test]
fn check_31_a_device_that_is_stuck_stalls_no_other_of_the_same_server() {
    let (slow, quick) = (Arc::new(Ram::new(MIB)), Arc::new(Ram::new(MIB)));
    let exports = Arc::new(Exports::new());
    exports.add("slow", slow.clone(), ExportOptions::default()).unwrap();
    exports.add("quick", quick, ExportOptions::default()).unwrap();
    let rig = Rig::serving(exports, NbdOptions::default());
    let client =
        |export: &str| rig.client(NbdClientOptions { export: export.to_owned(), ..defaults() });
    let (stuck, other) = (client("slow"), client("quick"));
    slow.stick(true);
    thread::scope(|scope| {
        // More than one connection has workers for.
        let waiting: Vec<_> = (0..64)
            .map(|at| {
                let stuck = &stuck;
                scope.spawn(move || stuck.read_at(at * 4096, &mut [0; 4096]))
            })
            .collect();
        thread::sleep(Duration::from_millis(50));
        let mut times: Vec<_> = (0..200)
            .map(|at| {
                let start = Instant::now();
                other.write_at(at * 4096, &[1; 4096]).unwrap();
                other.read_at(at * 4096, &mut [0; 4096]).unwrap();
                start.elapsed()
            })
            .collect();
        times.sort_unstable();
        assert!(waiting.iter().all(|thread| !thread.is_finished()));
        assert!(times[100] < Duration::from_secs(1), "median of {:?}", times[100]);
        slow.free();
        for thread in waiting {
            thread.join().unwrap().unwrap();
        }
    });
}

#[test]
fn check_39_a_stop_ends_what_waits_within_a_second_and_then_flushes() {
    for interruptible in [true, false] {
        let ram = Arc::new(Ram::new(MIB));
        let mut rig = Rig::new(ram.clone());
        let client = rig.client(NbdClientOptions { reconnect: Duration::ZERO, ..defaults() });
        client.write_at(0, &[5; 4096]).unwrap();
        ram.stick(interruptible);
        thread::scope(|scope| {
            let waiting: Vec<_> = (0..8)
                .map(|at| {
                    let client = &client;
                    scope.spawn(move || client.read_at(at * 512, &mut [0; 512]))
                })
                .collect();
            thread::sleep(Duration::from_millis(50));
            let start = Instant::now();
            let stopped = rig.server.take().unwrap();
            let stopping = scope.spawn(move || stopped.stop(LIMIT * 2));
            for thread in waiting {
                assert!(thread.join().unwrap().is_err());
            }
            assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
            ram.free();
            stopping.join().unwrap().unwrap();
        });
        assert_eq!(Arc::strong_count(&ram), 2, "only the export and this test have the device");
        assert_eq!(ram.durable()[0], 0, "a plain stop promises nothing");
    }

    // Requests that can still be answered are, and then the device is flushed.
    let ram = Arc::new(Ram::new(MIB));
    let mut rig = Rig::new(ram.clone());
    let client = rig.client(NbdClientOptions { reconnect: Duration::ZERO, ..defaults() });
    let written = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for at in 0.. {
                let place = at % 256 * 4096;
                if client.write_at(place, &(at + 1).to_le_bytes()).is_err() {
                    return;
                }
                written.store(at + 1, Ordering::SeqCst);
            }
        });
        wait_for("the first writes", || written.load(Ordering::SeqCst) > 100);
        rig.server.take().unwrap().stop_and_flush(Duration::from_secs(5)).unwrap();
    });
    let (written, durable) = (written.load(Ordering::SeqCst), ram.durable());
    for at in written.saturating_sub(200)..written {
        let place = (at % 256 * 4096) as usize;
        let found = u64::from_le_bytes(durable[place..place + 8].try_into().unwrap());
        assert!(found > at, "write {at} was answered; found {found}");
    }
}

#[test]
fn a_device_that_does_not_end_is_reported_with_the_time() {
    let ram = Arc::new(Ram::new(MIB));
    let mut rig = Rig::new(ram.clone());
    let client = rig.client(NbdClientOptions { reconnect: Duration::ZERO, ..defaults() });
    ram.stick(false);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| client.read_at(0, &mut [0; 512]));
        ram.await_waiting();
        let stopped = rig.server.take().unwrap().stop(Duration::from_millis(200));
        assert!(matches!(stopped, Err(NbdError::StillWorking { .. })), "{stopped:?}");
        assert!(waiting.join().unwrap().is_err());
        ram.free();
    });
}

#[test]
fn a_device_is_exchanged_only_for_one_that_fits_and_when_nobody_is_inside() {
    let ram = Arc::new(Ram::new(MIB));
    let rig = Rig::new(ram.clone());
    let export = rig.exports.all().remove(0);
    let client = rig.client(defaults());
    client.write_at(0, &[1; 512]).unwrap();
    let swap = |next: Arc<dyn BlockDevice>| export.swap(LIMIT, |_| Ok(next)).map(drop);
    let smaller = swap(Arc::new(Ram::new(4096)));
    assert!(matches!(smaller, Err(NbdError::Size { .. })), "{smaller:?}");
    let frozen = swap(Arc::new(Ram::read_only(vec![0; MIB])));
    assert!(matches!(frozen, Err(NbdError::Swap { .. })), "{frozen:?}");
    let failed = export.swap(LIMIT, |_| Err(std::io::Error::other("no"))).map(drop);
    assert!(matches!(failed, Err(NbdError::Swap { .. })), "{failed:?}");
    assert_eq!(ram.durable()[0], 1, "the old device is flushed first");
    thread::scope(|scope| {
        ram.stick(false);
        let waiting = scope.spawn(|| client.read_at(0, &mut [0; 512]));
        ram.await_waiting();
        // Freed after the flush has begun to wait too: then only the read is in hand.
        let freer = scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            ram.free();
        });
        swap(Arc::new(Ram::new(MIB))).unwrap();
        waiting.join().unwrap().unwrap();
        freer.join().unwrap();
    });
    let mut byte = [0xee];
    client.read_at(0, &mut byte).unwrap();
    assert_eq!(byte, [0], "it is the other device");
}

/// Histories of single sectors. Every write has its own value, so a read names the write it saw.
/// Checked per sector: a register is linearizable if reads and writes can be ordered within their
/// times; with unique values that is so exactly if no read sees a value that a later finished write
/// had replaced before the read began, nor one that was not begun, and no two reads that do not
/// overlap see two writes in the wrong order.
#[derive(Clone, Copy)]
struct Event {
    start: u64,
    end: u64,
    value: u64,
    is_write: bool,
}

fn check_register(events: &[Event]) -> Result<(), String> {
    let mut writes: HashMap<u64, Event> = HashMap::new();
    writes.insert(0, Event { start: 0, end: 0, value: 0, is_write: true });
    for event in events.iter().filter(|event| event.is_write) {
        writes.insert(event.value, *event);
    }
    // For each value: the time by which it is surely there (the earliest end of its write or of a
    // read that saw it), and the time until which it surely was (the latest start of any of them).
    let mut seen: HashMap<u64, (u64, u64)> = HashMap::new();
    for event in events.iter().chain(writes.get(&0)) {
        let write = writes.get(&event.value).ok_or("a value that nobody wrote")?;
        if event.end < write.start {
            return Err(format!("value {} was read before it was written", event.value));
        }
        let (by, until) = seen.entry(event.value).or_insert((event.end, event.start));
        *by = (*by).min(event.end);
        *until = (*until).max(event.start);
    }
    // Values' zones [by, until] must not contradict: sorted, forward zones (by < until) may not
    // overlap, and no backward zone may lie inside a forward one (Gibbons and Korach, 1997).
    let mut forward: Vec<_> = seen.iter().filter(|(_, (by, until))| by < until).collect();
    forward.sort_by_key(|(_, (by, _))| *by);
    for pair in forward.windows(2) {
        if pair[1].1.0 < pair[0].1.1 {
            return Err(format!("values {} and {} come and go", pair[0].0, pair[1].0));
        }
    }
    for (value, (by, until)) in &seen {
        let inside = |zone: &&(&u64, &(u64, u64))| {
            by > until && zone.1.0 < *until && *by < zone.1.1 && zone.0 != value
        };
        if let Some(around) = forward.iter().find(inside) {
            return Err(format!("value {value} within the time of {}", around.0));
        }
    }
    Ok(())
}

#[test]
fn the_checker_of_histories_finds_what_it_is_for() {
    let write = |start, end, value| Event { start, end, value, is_write: true };
    let read = |start, end, value| Event { start, end, value, is_write: false };
    for (history, fine) in [
        (vec![write(1, 2, 1), read(3, 4, 1), write(5, 6, 2), read(7, 8, 2)], true),
        (vec![write(1, 4, 1), write(2, 3, 2), read(5, 6, 1)], true),
        (vec![write(1, 4, 1), write(2, 3, 2), read(5, 6, 2)], true),
        (vec![write(1, 9, 1), read(2, 3, 1), read(4, 5, 0)], false),
        (vec![write(1, 2, 1), write(3, 4, 2), read(5, 6, 1)], false),
        (vec![write(1, 2, 1), read(3, 4, 0)], false),
        (vec![write(1, 8, 1), write(2, 9, 2), read(3, 4, 2), read(5, 6, 1), read(7, 8, 2)], false),
        (vec![read(1, 2, 1), write(3, 4, 1)], false),
        (vec![write(1, 2, 1), read(1, 3, 0), read(4, 5, 1)], true),
    ] {
        assert_eq!(check_register(&history).is_ok(), fine, "{:?}", check_register(&history));
    }
}

/// Who may write to a sector.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writers {
    All,
    One,
}

/// Reads and writes sectors from six threads while `disturb` does what it does to the server, for a
/// second and until there was enough of both, and checks the history of each sector.
fn check_under_load(clients: &[NbdClient], writers: Writers, mut disturb: impl FnMut()) {
    const SECTORS: u64 = 8;
    const WORKERS: u64 = 6;
    let (clock, values) = (AtomicU64::new(1), AtomicU64::new(1));
    let done = AtomicU64::new(0);
    let histories = Mutex::new(vec![Vec::new(); SECTORS as usize]);
    let stop = AtomicBool::new(false);
    let begin = Barrier::new(WORKERS as usize + 1);
    let work = |worker: u64| {
        let client = &clients[worker as usize % clients.len()];
        let (mut random, mut mine) = (Random(worker + 1), Vec::new());
        begin.wait();
        while !stop.load(Ordering::Relaxed) {
            let sector = random.below(SECTORS);
            let may_write = writers == Writers::All || sector % WORKERS == worker;
            let is_write = may_write && random.below(2) == 0;
            let start = clock.fetch_add(1, Ordering::SeqCst);
            let mut data = [0; 512];
            if is_write {
                let value = values.fetch_add(1, Ordering::SeqCst);
                data.as_chunks_mut().0.fill(value.to_le_bytes());
                client.write_at(sector * 512, &data).unwrap();
            } else {
                client.read_at(sector * 512, &mut data).unwrap();
            }
            let end = clock.fetch_add(1, Ordering::SeqCst);
            done.fetch_add(1, Ordering::Relaxed);
            let words: &[[u8; 8]] = data.as_chunks().0;
            assert!(words.iter().all(|word| word == &words[0]), "a torn sector");
            let value = u64::from_le_bytes(words[0]);
            mine.push((sector, Event { start, end, value, is_write }));
        }
        let mut all = histories.lock().unwrap();
        for (sector, event) in mine {
            all[sector as usize].push(event);
        }
    };
    thread::scope(|scope| {
        for worker in 0..WORKERS {
            let work = &work;
            scope.spawn(move || work(worker));
        }
        begin.wait();
        let (start, mut disturbed) = (Instant::now(), 0);
        let enough = |disturbed| disturbed > 5 && done.load(Ordering::Relaxed) > 1000;
        while start.elapsed() < Duration::from_secs(1) || !enough(disturbed) {
            if start.elapsed() > LIMIT * 2 {
                break;
            }
            disturb();
            disturbed += 1;
        }
        stop.store(true, Ordering::Relaxed);
        assert!(enough(disturbed), "{disturbed} and {done:?} requests show little");
    });
    let histories = histories.into_inner().unwrap();
    for (sector, history) in histories.iter().enumerate() {
        check_register(history).unwrap_or_else(|error| panic!("sector {sector}: {error}"));
    }
}

#[test]
fn a_device_is_linearizable_under_load_while_it_is_exchanged() {
    let first: Arc<dyn BlockDevice> = Arc::new(Ram::new(64 << 10));
    let rig = Rig::new(first);
    let export = rig.exports.all().remove(0);
    let clients: Vec<NbdClient> = (0..3)
        .map(|number| rig.client(NbdClientOptions { connections: 1 + number % 2, ..defaults() }))
        .collect();
    check_under_load(&clients, Writers::All, || {
        // A copy of what is there takes over; a write that slipped in between would be lost.
        let swapped = export.swap(LIMIT, |old| {
            let next = Ram::new(64 << 10);
            let mut bytes = vec![0; 64 << 10];
            old.read_at(0, &mut bytes)?;
            next.write_at(0, &bytes)?;
            Ok(Arc::new(next))
        });
        swapped.unwrap();
        thread::sleep(Duration::from_millis(2));
    });
}

#[test]
fn a_device_is_linearizable_for_one_writer_a_sector_while_its_server_restarts() {
    let mut rig = Rig::new(Arc::new(Ram::new(64 << 10)));
    let clients = [rig.client(NbdClientOptions { connections: 3, ..defaults() })];
    check_under_load(&clients, Writers::One, || {
        // Each time until the client has met the loss: otherwise nothing is proved.
        let before = clients[0].reconnects();
        rig.kill();
        rig.start();
        let start = Instant::now();
        while clients[0].reconnects() == before {
            assert!(start.elapsed() < LIMIT, "it does not connect again");
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(60));
    });
}

/// A file that says where its bytes lie, a part of a longer one.
struct Part(std::fs::File);

const PART_AT: u64 = 10_000;

impl BlockDevice for Part {
    fn size(&self) -> u64 {
        4 * MIB as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(buf, PART_AT + offset)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<bool> {
        self.read_at(offset, buf).map(|()| true)
    }

    fn file_range(&self, offset: u64, _: u64, write: bool) -> Option<(BorrowedFd<'_>, u64)> {
        (!write).then(|| (self.0.as_fd(), PART_AT + offset))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.0.write_all_at(data, PART_AT + offset)
    }

    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }

    fn trim(&self, _offset: u64, _length: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _allocate: bool) -> std::io::Result<()> {
        self.write_at(offset, &vec![0; length as usize])
    }
}

#[test]
fn long_reads_go_from_the_file_to_the_socket_and_are_the_right_bytes() {
    // Not in /tmp, which may be in memory: there nothing goes this way.
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let content = noise(3, 4 * MIB);
    file.write_all_at(&content, PART_AT).unwrap();
    let cut = file.try_clone().unwrap();
    let rig = Rig::new(Arc::new(Part(file)));
    let client = rig.client(NbdClientOptions { connections: 2, ..defaults() });
    thread::scope(|scope| {
        for number in 0..3 {
            let (client, content) = (&client, &content);
            scope.spawn(move || {
                let mut random = Random(number + 1);
                for _ in 0..150 {
                    let length = random.below(3 * MIB as u64) as usize;
                    let offset = random.below((4 * MIB - length) as u64 + 1);
                    let mut data = vec![0; length];
                    client.read_at(offset, &mut data).unwrap();
                    let at = offset as usize;
                    assert!(data == content[at..at + length], "{length} at {offset}");
                }
            });
        }
    });
    // A file that is cut under the server is an error, and no bytes that are not there.
    cut.set_len(PART_AT + MIB as u64).unwrap();
    let quick = NbdClientOptions { reconnect: Duration::from_millis(300), ..defaults() };
    let mut data = vec![0; MIB];
    assert!(rig.client(quick).read_at(MIB as u64 / 2, &mut data).is_err());
    rig.client(defaults()).read_at(0, &mut data[..4096]).unwrap();
}

#[test]
fn exports_come_and_go_while_the_server_runs() {
    let exports = Arc::new(Exports::new());
    let rig = Rig::serving(exports.clone(), NbdOptions::default());
    let nothing = NbdClient::connect(&rig.endpoint(), defaults());
    assert!(nothing.is_err());
    let ram = Arc::new(Ram::new(MIB));
    exports.add("a", ram.clone(), ExportOptions::default()).unwrap();
    let taken = exports.add("a", ram.clone(), ExportOptions::default()).map(drop);
    assert!(matches!(taken, Err(NbdError::NameTaken { .. })));
    let long = exports.add(&"x".repeat(5000), ram, ExportOptions::default()).map(drop);
    assert!(matches!(long, Err(NbdError::LongName { .. })));
    let only = rig.client(defaults());
    only.write_at(0, &noise(1, 100)).unwrap();
    exports.remove("a").unwrap();
    only.read_at(0, &mut [0; 100]).unwrap();
    assert!(NbdClient::connect(&rig.endpoint(), defaults()).is_err());
}
