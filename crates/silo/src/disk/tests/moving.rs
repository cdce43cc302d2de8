//! Two disks, as a move uses them.

use super::*;
use crate::{
    block::{BlockIndex, BlockRange, BlockSet},
    device::Device,
    disk::DiskStatus,
    hash::hash_device,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

const LIMIT: Duration = Duration::from_secs(20);

fn copy(from: &Disk, to: &Disk, blocks: &BlockSet) {
    for range in blocks.ranges().flat_map(|range| range.chunks(16)) {
        let mut buf = vec![0; range.bytes() as usize];
        from.read(range.start, &mut buf).unwrap();
        if crate::block::is_zero(&buf) {
            to.store_zero(range).unwrap();
        } else {
            to.store(range.start, &buf).unwrap();
        }
    }
}

#[test]
fn a_disk_that_is_written_all_the_time_arrives_whole() {
    let (source_rig, target_rig) = (Rig::new(200 * BLOCK_SIZE), Rig::new(200 * BLOCK_SIZE));
    let (source, _) = source_rig.create(256);
    let (target, _) = target_rig.create(256);
    source.write_at(10 * BLOCK, &pattern(3, 20 * BLOCK_SIZE)).unwrap();
    source.trim(50 * BLOCK, 30 * BLOCK).unwrap();
    let (running, writes) = (AtomicBool::new(true), AtomicU64::new(0));
    thread::scope(|scope| {
        for seed in 1..3u64 {
            let (source, running, writes) = (&source, &running, &writes);
            scope.spawn(move || {
                let mut state = seed;
                while running.load(Ordering::Relaxed) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed);
                    let at = (state >> 20) % (source.size() - 9000);
                    let length = (state >> 50) % 9000;
                    match state >> 40 & 7 {
                        0 => source.trim(at, length).unwrap(),
                        1 => source.zero(at, length, false).unwrap(),
                        _ => source.write_at(at, &pattern(state, length as usize)).unwrap(),
                    }
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        target.reset().unwrap();
        source.start_tracking().unwrap();
        copy(&source, &target, &source.allocated().unwrap());
        for round in 0..4 {
            until("the guest writes", || writes.load(Ordering::Relaxed) >= round * 200);
            copy(&source, &target, &source.take_dirty().unwrap());
        }
        running.store(false, Ordering::Relaxed);
    });
    source.freeze(LIMIT).unwrap();
    let missing = source.take_dirty().unwrap();
    assert!(!missing.is_empty(), "the test would show nothing");
    let expected = content_of(&source);

    let (sender, requests) = mpsc::channel::<BlockRange>();
    target.arm(&missing, Box::new(move |range| sender.send(range).unwrap())).unwrap();
    assert_eq!(target.status(), DiskStatus::Armed);
    thread::scope(|scope| {
        let guest = scope.spawn(|| content_of(&target));
        let mut served = 0;
        while served < missing.len() {
            let range = requests.recv_timeout(LIMIT).unwrap();
            let mut buf = vec![0; range.bytes() as usize];
            source.read(range.start, &mut buf).unwrap();
            served += target.fill(range.start, &buf).unwrap();
        }
        assert!(guest.join().unwrap() == expected);
    });
    target.complete().unwrap();
    assert_eq!(hash_device(&target).unwrap(), hash_device(&source).unwrap());
    let mut rig = target_rig;
    drop(target);
    rig.crash_host();
    assert!(content_of(&rig.open().unwrap()) == expected, "durable when complete");
}

#[test]
fn the_final_dirty_set_has_every_block_that_was_written_and_no_other() {
    let rig = Rig::new(16 * BLOCK_SIZE);
    let (disk, _) = rig.create(16);
    disk.write_at(0, b"before").unwrap();
    disk.start_tracking().unwrap();
    disk.write_at(3 * BLOCK - 1, b"xy").unwrap();
    disk.trim(5 * BLOCK, 2 * BLOCK + 5).unwrap();
    disk.zero(9 * BLOCK + 1, BLOCK, false).unwrap();
    let blocks = |set: &BlockSet| -> Vec<u64> {
        set.ranges().flat_map(|range| range.start.0..range.end()).collect()
    };
    let taken = disk.take_dirty().unwrap();
    assert_eq!(blocks(&taken), [2, 3, 5, 6, 9, 10]);
    assert!(disk.take_dirty().unwrap().is_empty());
    disk.write_at(0, b"again").unwrap();
    disk.put_back(&taken);
    assert_eq!(blocks(&disk.take_dirty().unwrap()), [0, 2, 3, 5, 6, 9, 10]);
    assert_eq!(blocks(&disk.allocated().unwrap()), [0, 2, 3, 5, 6, 9, 10]);
}

#[test]
fn a_disk_that_was_not_received_to_the_end_says_so_after_a_kill_and_after_a_crash() {
    type Step = fn(&Disk);
    let steps: [(&str, Step); 4] = [
        ("reset", |disk| disk.reset().unwrap()),
        ("store", |disk| disk.store(BlockIndex(1), &pattern(1, BLOCK_SIZE)).unwrap()),
        ("arm without reset", |disk| {
            disk.arm(&BlockSet::full(disk.blocks()), Box::new(|_| {})).unwrap();
        }),
        ("arm, fill, flush", |disk| {
            disk.reset().unwrap();
            disk.arm(&BlockSet::full(disk.blocks()), Box::new(|_| {})).unwrap();
            disk.fill(BlockIndex(0), &pattern(1, 3 * BLOCK_SIZE)).unwrap();
            disk.flush().unwrap();
        }),
    ];
    for (name, step) in steps {
        for crash in [false, true] {
            let mut rig = Rig::new(8 * BLOCK_SIZE);
            let (disk, _) = rig.create(8);
            step(&disk);
            assert!(!disk.is_complete());
            drop(disk);
            if crash {
                rig.crash_host();
            }
            let error = rig.open().unwrap_err();
            assert!(matches!(error, DiskError::Incomplete { .. }), "{name}: {error}");
            let disk = rig.open_incomplete();
            assert!(disk.complete().is_err(), "{name}: it is not complete");
            if disk.status() == DiskStatus::Armed {
                let missing = disk.missing_blocks();
                assert!(missing >= 5, "{name}: {missing}");
                let last = disk.read_at(7 * BLOCK, &mut [0; 1]);
                assert!(matches!(last, Err(DiskError::NotArrived { .. })), "{name}");
            } else {
                assert!(matches!(disk.write_at(0, b"x"), Err(DiskError::NotRunningHere)));
            }
            disk.reset().unwrap();
            assert!(content_of(&disk) == rig.base, "{name}: ready for another try");
        }
    }
}

#[test]
fn calls_that_do_not_fit_the_state_are_refused() {
    let rig = Rig::new(8 * BLOCK_SIZE);
    let (disk, _) = rig.create(8);
    let data = pattern(1, 2 * BLOCK_SIZE);
    assert!(disk.store(BlockIndex(7), &data).is_err(), "past the end");
    assert!(disk.store(BlockIndex(u64::MAX), &data).is_err());
    assert!(disk.store(BlockIndex(0), &data[1..]).is_err(), "not whole blocks");
    assert!(disk.fill_zero(BlockRange::new(1, u64::MAX)).is_err());
    assert!(disk.fill_zero(BlockRange::new(u64::MAX, 1)).is_err());
    assert!(disk.store_zero(BlockRange::new(8, 1)).is_err());
    assert!(disk.read(BlockIndex(8), &mut [0; BLOCK_SIZE]).is_err());
    assert!(disk.arm(&BlockSet::new(9), Box::new(|_| {})).is_err(), "a set of another device");
    assert_eq!(disk.status(), DiskStatus::Whole, "nothing of that changed it");
    assert_eq!(disk.fill(BlockIndex(0), &data).unwrap(), 0, "nothing is missing");
    let mut missing = BlockSet::new(8);
    missing.insert(BlockIndex(2));
    disk.arm(&missing, Box::new(|_| {})).unwrap();
    let error = disk.store(BlockIndex(0), &data).unwrap_err().to_string();
    assert!(error.contains("device \"root\": store failed at block 0"), "{error}");
    assert!(disk.complete().is_err());
    assert!(disk.read(BlockIndex(1), &mut vec![0; 2 * BLOCK_SIZE]).is_err(), "never waits");
    disk.fill_zero(BlockRange::new(2, 1)).unwrap();
    disk.complete().unwrap();
    disk.complete().unwrap();
}

#[test]
fn a_machine_that_comes_back_needs_only_what_changed() {
    let rig = Rig::new(8 * BLOCK_SIZE);
    let (disk, _) = rig.create(8);
    disk.write_at(0, &pattern(1, 4 * BLOCK_SIZE)).unwrap();
    disk.freeze(LIMIT).unwrap();
    // It ran elsewhere and wrote block 1; the rest of this copy is still right.
    disk.store(BlockIndex(1), &pattern(2, BLOCK_SIZE)).unwrap();
    disk.arm(&BlockSet::new(8), Box::new(|_| {})).unwrap();
    disk.write_at(5 * BLOCK, b"runs here again").unwrap();
    disk.complete().unwrap();
    let mut expected = rig.base.clone();
    expected[..4 * BLOCK_SIZE].copy_from_slice(&pattern(1, 4 * BLOCK_SIZE));
    expected[BLOCK_SIZE..2 * BLOCK_SIZE].copy_from_slice(&pattern(2, BLOCK_SIZE));
    expected[5 * BLOCK_SIZE..5 * BLOCK_SIZE + 15].copy_from_slice(b"runs here again");
    assert!(content_of(&disk) == expected);
    let shared: Arc<dyn Device> = Arc::new(disk);
    assert_eq!(shared.name().as_str(), "root");
}
