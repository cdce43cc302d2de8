//! Whole moves with a real object store beside them: an S3 server over TCP, and a folder. Most blocks
//! come from the store; whatever that does wrong, and whenever, the content is right.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "../../../silo-move/tests/common/mod.rs"]
mod common;
mod faults;
mod peers;
#[allow(dead_code, reason = "the kill matrix uses the rest")]
mod site;

use common::{MIB, Random, WAIT, rig::*, until};
use silo::{io::BlockDevice, moving::source::Stored};
use silo_block::{block::BlockIndex, device::DeviceName, session::Policy};
use site::{Kind, Move, Plan, Site};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

#[test]
fn most_blocks_come_from_the_store_and_both_ends_count_what_came_from_where() {
    for kind in [Kind::S3, Kind::Folder] {
        let site = Site::new(kind, 16 * MIB, 1);
        // A generation is never quite what the device is by now.
        for at in 0..40 {
            site.volume.write_at(at * 300_000, &[at as u8 + 1; 5000]).unwrap();
        }
        let Move { outbound, receiver, .. } = site.start(Plan::default());
        let report = outbound.wait().unwrap();
        let arrived = receiver.session(1).wait().unwrap();
        same(&*site.device, &*site.target);
        let blocks = 16 * MIB / 4096;
        let counters = arrived.counters;
        assert!(counters.from_store > blocks / 2, "{kind:?}: {counters:?}");
        assert_eq!(counters.from_store + counters.from_peer, blocks, "{counters:?}");
        assert!(report.spared > 0 && report.spared <= counters.from_store, "{report:?}");
        assert!(report.wire.data < 8 * MIB, "{kind:?}: {:?}", report.wire);
        let (place, counts) = &arrived.by_place[0];
        assert_eq!(place, "store");
        assert!(counts.fetched >= counters.from_store, "{counts:?}, {counters:?}");
        assert_eq!((counts.wrong, arrived.places.given_up), (0, 0), "{counts:?}");
        // What was written since the generation was promised by nobody.
        assert!(counters.from_peer >= 40, "{counters:?}");
    }
}

#[test]
fn check_03_writers_beside_a_move_that_a_store_assists_lose_nothing() {
    for seed in 0..4 {
        let site = Site::new(Kind::S3, 8 * MIB + 777, seed);
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..2)
            .map(|n| {
                let (volume, stop) = (site.volume.clone(), stop.clone());
                thread::spawn(move || {
                    let mut random = Random(seed * 10 + n);
                    while !stop.load(Ordering::Relaxed) {
                        let mut data = vec![0; random.below(9000) as usize + 1];
                        random.fill(&mut data);
                        let at = random.below(volume.size() - data.len() as u64);
                        match volume.write_at(at, &data) {
                            Ok(()) => thread::sleep(Duration::from_micros(500)),
                            Err(error) if error.kind() == io::ErrorKind::NotConnected => break,
                            Err(error) => panic!("{error}"),
                        }
                    }
                })
            })
            .collect();
        let policy = Policy { max_rounds: 4, ..Policy::default() };
        let plan = Plan { rate: 6_000_000, policy, early: seed % 2 == 0, ..Plan::default() };
        let Move { outbound, receiver, .. } = site.start(plan);
        outbound.wait().unwrap();
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        let arrived = receiver.session(1).wait().unwrap();
        assert!(arrived.counters.from_store > 0, "{:?}", arrived.counters);
        same(&*site.device, &*site.target);
    }
}

#[test]
fn check_12_a_demanded_block_that_the_store_has_passes_all_others_there() {
    let site = Site::new(Kind::S3, 16 * MIB, 2);
    site.slow(Duration::from_millis(15));
    let plan = Plan { rate: 1, switch: true, ..Plan::default() };
    let Move { outbound, receiver, there, .. } = site.start(plan);
    let session = receiver.session(1);
    receiver.host.wait_for(|seen| matches!(seen, Seen::Run(..)));
    until("promises", || session.lacking().iter().any(|device| !device.in_store.is_empty()));
    let mut random = Random(5);
    for _ in 0..10 {
        let block = random.below(there.size() / 4096);
        let (mut got, mut expected) = ([0; 4096], [0; 4096]);
        let before = there.absent();
        there.read_at(block * 4096, &mut got).unwrap();
        let came = before - there.absent();
        site.device.read_at(block * 4096, &mut expected).unwrap();
        assert_eq!(got, expected);
        // Its chunk and what the threads had in hand, not all that was asked for before.
        assert!(came < 1024, "{came} blocks came before it");
    }
    outbound.set_bandwidth(None);
    outbound.wait().unwrap();
    session.wait().unwrap();
    same(&*site.device, &*site.target);
}

#[test]
fn when_the_source_dies_after_the_token_the_store_brings_what_it_has_and_the_rest_is_named() {
    let site = Site::new(Kind::S3, 8 * MIB, 3);
    // Only the source has these.
    site.volume.write_at(MIB, &[7; 3 * 4096]).unwrap();
    site.volume.write_at(5 * MIB, &[8; 100]).unwrap();
    site.slow(Duration::from_millis(2));
    let plan = Plan { rate: 1, switch: true, patience: 1500, ..Plan::default() };
    let Move { outbound, receiver, there, tap, .. } = site.start(plan);
    let session = receiver.session(1);
    receiver.host.wait_for(|seen| matches!(seen, Seen::Run(..)));
    // All that it can promise; what is on its way over the line is not in it.
    until("promises", || site.promises() >= 1500);
    let blocks = || -> u64 {
        let lacking = session.lacking();
        lacking.iter().flat_map(|device| &device.at_source).map(|range| range.count).sum()
    };
    until("the promises there", || blocks() < 500);
    tap.cut();
    let device = |name: &str| session.lacking().into_iter().find(|d| d.device.as_str() == name);
    until("all that the store has", || device("disk").is_some_and(|d| d.in_store.is_empty()));
    let lacking = device("disk").unwrap();
    let has = |block: u64| lacking.at_source.iter().any(|r| r.start.0 <= block && block < r.end());
    assert!(has(256) && has(257) && has(258) && has(1280), "{lacking}");
    // Reads of what came work, also now; those of the rest say which blocks of which device.
    let mut came = 0;
    for block in 0..8 * MIB / 4096 {
        let mut got = vec![0; 4096];
        if has(block) {
            continue;
        }
        there.read_at(block * 4096, &mut got).unwrap();
        let mut expected = vec![0; 4096];
        site.device.read_at(block * 4096, &mut expected).unwrap();
        assert!(got == expected, "block {block}");
        came += 1;
    }
    assert!(came > 1500, "{came} blocks came");
    let error = there.read_at(MIB, &mut [0; 4096]).unwrap_err().to_string();
    assert!(error.contains("device \"disk\": 1 blocks, 256 to 256, are not here"), "{error}");
    let told = receiver.host.wait_for(
        |seen| matches!(seen, Seen::Overdue(text) if text.contains("that only the source has")),
    );
    let Seen::Overdue(text) = told else { unreachable!() };
    assert!(text.contains("device \"disk\" lacks"), "{text}");
    // It comes back: nothing was given up.
    tap.mend();
    outbound.set_bandwidth(None);
    outbound.wait().unwrap();
    session.wait().unwrap();
    same(&*site.device, &*site.target);
}

/// Says that the store has everything, whatever it has.
struct Braggart;

impl Stored for Braggart {
    fn has(&self, _: &DeviceName, _: BlockIndex, _: &[u8]) -> io::Result<bool> {
        Ok(true)
    }
}

#[test]
fn check_07_and_14_content_that_the_store_has_of_another_time_is_never_taken() {
    let site = Site::new(Kind::S3, 4 * MIB, 4);
    let mut random = Random(9);
    for at in 0..200 {
        site.volume.write_at(random.below(1023) * 4096 + at, &[at as u8; 64]).unwrap();
    }
    let plan = Plan { rate: 2_000_000, stored: Some(Arc::new(Braggart)), ..Plan::default() };
    let Move { outbound, receiver, .. } = site.start(plan);
    outbound.wait().unwrap();
    let arrived = receiver.session(1).wait().unwrap();
    same(&*site.device, &*site.target);
    assert!(arrived.counters.from_store > 0, "{:?}", arrived.counters);
    assert!(arrived.places.wrong > 0 && arrived.places.given_up > 0, "{:?}", arrived.places);
}

#[test]
fn the_source_may_go_as_soon_as_the_store_has_what_is_missing_and_a_note_knows_where() {
    let site = Site::new(Kind::S3, 16 * MIB, 6);
    site.slow(Duration::from_millis(30));
    let note = tempfile::tempdir().unwrap();
    let plan = Plan {
        rate: 3_000_000,
        switch: true,
        early: true,
        note: Some(note.path().join("note")),
        ..Plan::default()
    };
    let Move { outbound, receiver, there, .. } = site.start(plan);
    outbound.wait().unwrap();
    let absent = there.absent();
    assert!(absent > 0, "all had come before the source was let go");
    let noted = site::load(&note.path().join("note"));
    let promised = noted.devices[0].promised.len() as u64;
    // What a crash would leave: every block that is absent there has its hash.
    let missing: u64 = noted.devices[0].record.absent.iter().map(|range| range.count).sum();
    assert_eq!(missing, promised);
    let begin = Instant::now();
    receiver.session(1).wait().unwrap();
    assert!(begin.elapsed() < WAIT);
    same(&*site.device, &*site.target);
    let noted = site::load(&note.path().join("note"));
    assert!(noted.devices[0].promised.is_empty() && noted.devices[0].record.absent.is_empty());
}
