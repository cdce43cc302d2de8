//! Moves that fail, and lines that are cut: what it costs, and who owns the devices.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{
    MIB, Random,
    content::noise,
    file::{Faulty, Op},
    memory::Memory,
    rig::*,
    tap::{Tap, Way, kind::BLOCKS},
    until,
};
use silo_block::{
    io::BlockDevice,
    session::{Policy, source::Config},
};
use silo_move::source;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

#[test]
fn check_18_a_destination_lost_in_any_phase_costs_nothing_and_a_second_move_succeeds() {
    let (hello, round, blocks) = (32, 34, BLOCKS);
    // Cut for good when the first frame of a kind passes; the last is in the middle of the bulk.
    for (way, kind, after) in [
        (Way::Out, hello, 0),
        (Way::Back, 66, 0),
        (Way::Out, round, 0),
        (Way::Out, blocks, 0),
        (Way::Out, blocks, 9),
    ] {
        let device = noise(16 * MIB, 5);
        let volume = owned("memory", device.clone(), 4096);
        let receiver =
            Receiver::new(vec![empty("memory", Arc::new(Memory::new(16 * MIB)), 4096)], quick());
        let server = serve(&receiver);
        let tap = Tap::new(Some(server.address()));
        let seen = AtomicU64::new(0);
        tap.at_each_frame(move |_, of, frame| {
            let hit = of == way && frame[0] == kind;
            !(hit && seen.fetch_add(1, Ordering::SeqCst) >= after)
        });
        let config = Config { patience: patience(700), ..Config::default() };
        let host = Arc::new(Host::default());
        let begin = Instant::now();
        let outbound =
            start(std::slice::from_ref(&volume), tap.address, &host, source_options(config));
        let error = outbound.wait().unwrap_err();
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        assert!(error.owned, "{error}");
        assert!(error.to_string().contains("host b"), "{error}");
        // Writers never noticed.
        volume.write_at(123, b"still here").unwrap();
        drop(server);
        let target = Arc::new(Memory::new(16 * MIB));
        let second = Receiver::new(vec![empty("memory", target.clone(), 4096)], quick());
        let server = serve(&second);
        start(std::slice::from_ref(&volume), server.address(), &host, source::Options::default())
            .wait()
            .unwrap();
        second.session(1).wait().unwrap();
        same(&*device, &*target);
    }
}

#[test]
fn check_19_after_a_cut_only_what_is_missing_or_dirty_is_sent() {
    let size = 48 * MIB;
    let device = noise(size, 6);
    let volume = owned("memory", device.clone(), 4096);
    let target = Arc::new(Memory::new(size));
    let receiver = Receiver::new(vec![empty("memory", target.clone(), 4096)], quick());
    let server = serve(&receiver);
    let tap = Tap::new(Some(server.address()));
    // Three cuts, at a quarter, the half and three quarters of the bytes, of a second each.
    let next = AtomicU64::new(1);
    let line = tap.clone();
    let passed = Arc::new(AtomicU64::new(0));
    let count = passed.clone();
    tap.at_each_frame(move |_, way, frame| {
        if way == Way::Back || frame[0] != BLOCKS {
            return true;
        }
        let bytes = count.fetch_add(frame.len() as u64, Ordering::SeqCst);
        let number = next.load(Ordering::SeqCst);
        if number < 4 && bytes >= number * size / 4 {
            next.store(number + 1, Ordering::SeqCst);
            let line = line.clone();
            thread::spawn(move || {
                thread::sleep(Duration::from_secs(1));
                line.mend();
            });
            return false;
        }
        true
    });
    let config = Config { window: 4 << 20, ..Config::default() };
    let host = Arc::new(Host::default());
    let outbound = start(std::slice::from_ref(&volume), tap.address, &host, source_options(config));
    // Somebody writes before, between and after the cuts.
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (volume, stop) = (volume.clone(), stop.clone());
        thread::spawn(move || {
            let mut random = Random(1);
            while !stop.load(Ordering::Relaxed) {
                if volume.write_at(random.below(64) * 4096, &random.next().to_le_bytes()).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(5));
            }
        })
    };
    let report = outbound.wait().unwrap();
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    receiver.session(1).wait().unwrap();
    same(&*device, &*target);
    assert_eq!(report.links, 4);
    // All once, a window for each cut, and 64 blocks for each round.
    let most = size + 3 * (5 << 20) + u64::from(report.rounds) * 64 * 4096;
    assert!(report.paths.content <= most, "{} of {most}", report.paths.content);
}

#[test]
fn check_20_a_full_disk_a_short_write_or_an_error_fails_the_move_and_authority_stays() {
    let errors: [fn() -> std::io::Error; 3] = [
        || std::io::Error::from_raw_os_error(libc::ENOSPC),
        || std::io::ErrorKind::WriteZero.into(),
        || std::io::Error::from_raw_os_error(libc::EIO),
    ];
    for (number, error) in errors.into_iter().enumerate() {
        for dirty in [false, true] {
            let device = noise(4 * MIB, 9);
            let volume = owned("root", device.clone(), 4096);
            let target = Arc::new(Faulty::new(Memory::new(4 * MIB)));
            let place = MIB + 4096 * 3;
            let touched =
                move |offset: u64, length: u64| offset <= place && place < offset + length;
            let writes = AtomicU64::new(0);
            target.set(move |op, offset, length| {
                let hit = op == Op::Write && touched(offset, length);
                // In the dirty phase: the first copy goes well, the next does not.
                let nth = if hit { writes.fetch_add(1, Ordering::SeqCst) } else { 0 };
                (hit && nth >= u64::from(dirty)).then(error)
            });
            let receiver = Receiver::new(vec![empty("root", target.clone(), 4096)], quick());
            let server = serve(&receiver);
            let policy = Policy { hold: true, ..Policy::default() };
            let host = Arc::new(Host::default());
            let options = source_options(Config { policy, ..Config::default() });
            let outbound = start(std::slice::from_ref(&volume), server.address(), &host, options);
            if dirty {
                until("the first copy", || outbound.progress().rounds >= 3);
                volume.write_at(place, b"again").unwrap();
            }
            let failure = outbound.wait().unwrap_err();
            let text = failure.to_string();
            assert!(failure.owned && text.contains("device \"root\""), "{number}: {text}");
            assert!(text.contains("could not store"), "{text}");
            assert!(receiver.session(1).wait().is_err());
            assert!(!receiver.host.seen().iter().any(|seen| matches!(seen, Seen::Run(..))));
            volume.write_at(place, b"goes on").unwrap();
        }
    }
}
