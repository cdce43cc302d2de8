//! Blocks that have not arrived: who waits, who does not, and who wins.

use super::*;
use crate::{
    block::{BlockIndex, BlockRange, BlockSet},
    device::Device,
    disk::DiskStatus,
};
use std::{
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

const SOON: Duration = Duration::from_millis(60);
const LATE: Duration = Duration::from_secs(20);

type Asked = Arc<Mutex<Vec<BlockRange>>>;

/// A disk of 16 blocks, armed, of which `missing` are missing, and what it asks for.
fn armed(rig: &Rig, missing: &[BlockRange]) -> (Disk, Asked) {
    let (disk, _) = rig.create(16);
    disk.reset().unwrap();
    let asked = arm(&disk, missing);
    (disk, asked)
}

fn arm(disk: &Disk, missing: &[BlockRange]) -> Asked {
    let mut set = BlockSet::new(disk.blocks());
    set.extend(missing.iter().copied());
    let asked = Asked::default();
    let record = asked.clone();
    disk.arm(&set, Box::new(move |range| record.lock().unwrap().push(range))).unwrap();
    asked
}

#[test]
fn a_read_of_a_missing_block_asks_once_and_waits_while_others_go_on() {
    let rig = Rig::new(16 * BLOCK_SIZE);
    let (disk, asked) = armed(&rig, &[BlockRange::new(2, 3), BlockRange::new(8, 1)]);
    let disk = &disk;
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for _ in 0..3 {
            let sender = sender.clone();
            // Blocks 1 to 9: both gaps in one request.
            scope.spawn(move || sender.send(read(disk, BLOCK, 8 * BLOCK_SIZE)).unwrap());
        }
        assert!(receiver.recv_timeout(SOON).is_err());
        assert_eq!(*asked.lock().unwrap(), [BlockRange::new(2, 3), BlockRange::new(8, 1)]);
        assert_eq!(read(disk, 0, BLOCK_SIZE), rig.base[..BLOCK_SIZE], "another block");

        let arrived = pattern(5, 4 * BLOCK_SIZE);
        // Wider than what is missing: block 5 is here already and stays.
        assert_eq!(disk.fill(BlockIndex(2), &arrived).unwrap(), 3);
        assert!(receiver.recv_timeout(SOON).is_err(), "one gap is left");
        assert_eq!(disk.fill_zero(BlockRange::new(8, 1)).unwrap(), 1);
        let mut expected = rig.base[BLOCK_SIZE..9 * BLOCK_SIZE].to_vec();
        expected[BLOCK_SIZE..4 * BLOCK_SIZE].copy_from_slice(&arrived[..3 * BLOCK_SIZE]);
        expected[7 * BLOCK_SIZE..].fill(0);
        for _ in 0..3 {
            assert!(receiver.recv_timeout(LATE).unwrap() == expected);
        }
    });
    assert_eq!(asked.lock().unwrap().len(), 2, "nothing was asked for twice");
    assert!(disk.missing().is_empty());
    assert_eq!(disk.fill(BlockIndex(2), &pattern(6, BLOCK_SIZE)).unwrap(), 0, "too late");
    assert!(disk.take_dirty().unwrap().is_empty(), "arrivals are not the guest's writes");
}

#[test]
fn what_the_guest_writes_wins_over_what_arrives_later() {
    let rig = Rig::new(16 * BLOCK_SIZE);
    let (disk, asked) = armed(&rig, &[BlockRange::new(0, 16)]);
    let (mine, zeros) = (pattern(1, 2 * BLOCK_SIZE), vec![0; 3 * BLOCK_SIZE]);
    disk.write_at(4 * BLOCK, &mine).unwrap();
    disk.trim(8 * BLOCK, BLOCK).unwrap();
    disk.zero(9 * BLOCK, 2 * BLOCK, false).unwrap();
    assert!(asked.lock().unwrap().is_empty(), "whole blocks need nothing from elsewhere");
    let theirs = pattern(2, 16 * BLOCK_SIZE);
    assert_eq!(disk.fill(BlockIndex(0), &theirs).unwrap(), 11);
    let mut expected = theirs;
    expected[4 * BLOCK_SIZE..6 * BLOCK_SIZE].copy_from_slice(&mine);
    expected[8 * BLOCK_SIZE..11 * BLOCK_SIZE].copy_from_slice(&zeros);
    assert!(content_of(&disk) == expected);
    let dirty: Vec<u64> =
        disk.take_dirty().unwrap().ranges().flat_map(|r| r.start.0..r.end()).collect();
    assert_eq!(dirty, [4, 5, 8, 9, 10]);
}

#[test]
fn a_partial_write_to_a_missing_block_is_merged_with_what_arrives() {
    let rig = Rig::new(16 * BLOCK_SIZE);
    let (disk, asked) = armed(&rig, &[BlockRange::new(0, 8)]);
    let disk = &disk;
    let theirs = pattern(2, 8 * BLOCK_SIZE);
    let mut expected = theirs.clone();
    thread::scope(|scope| {
        // From the middle of block 1 to the middle of block 4: 2 and 3 are whole.
        let mine = pattern(3, 3 * BLOCK_SIZE);
        expected[BLOCK_SIZE + 2048..4 * BLOCK_SIZE + 2048].copy_from_slice(&mine);
        let writer = scope.spawn(move || disk.write_at(BLOCK + 2048, &mine).unwrap());
        thread::sleep(SOON);
        assert!(!writer.is_finished());
        let first = asked.lock().unwrap().clone();
        assert_eq!(first, [BlockRange::new(1, 1)]);
        disk.fill(BlockIndex(1), &theirs[BLOCK_SIZE..2 * BLOCK_SIZE]).unwrap();
        thread::sleep(SOON);
        assert!(!writer.is_finished());
        disk.fill(BlockIndex(0), &theirs).unwrap();
    });
    assert!(read(disk, 0, 8 * BLOCK_SIZE) != theirs, "the write is there");
    // Blocks 2 and 3 arrived before the write could be done, and the write came after.
    assert!(read(disk, 0, 8 * BLOCK_SIZE) == expected);
}

#[test]
fn fills_and_writes_that_race_leave_every_sector_right() {
    const SECTOR: usize = 512;
    for round in 0..12u64 {
        let rig = Rig::new(16 * BLOCK_SIZE);
        let (disk, _) = armed(&rig, &[BlockRange::new(0, 16)]);
        let disk = &disk;
        let theirs = pattern(100 + round, 16 * BLOCK_SIZE);
        let mine = pattern(200 + round, 16 * BLOCK_SIZE);
        // Each thread writes every fourth sector; sectors 0 of each fourth are nobody's.
        let writes = |sector: usize| !sector.is_multiple_of(4);
        thread::scope(|scope| {
            for thread in 1..4 {
                let mine = &mine;
                scope.spawn(move || {
                    for sector in (thread..16 * 8).step_by(4) {
                        let at = sector * SECTOR;
                        disk.write_at(at as u64, &mine[at..at + SECTOR]).unwrap();
                    }
                });
            }
            // Blocks arrive in two orders, some of them twice, from two connections.
            for reverse in [false, true] {
                let theirs = &theirs;
                scope.spawn(move || {
                    for step in 0..16usize {
                        let block = if reverse { 15 - step } else { step };
                        let at = block * BLOCK_SIZE;
                        disk.fill(BlockIndex(block as u64), &theirs[at..at + BLOCK_SIZE]).unwrap();
                        if (step as u64).is_multiple_of(round + 1) {
                            thread::sleep(Duration::from_micros(200));
                        }
                    }
                });
            }
        });
        let found = content_of(disk);
        for sector in 0..16 * 8 {
            let at = sector * SECTOR..(sector + 1) * SECTOR;
            let expected = if writes(sector) { &mine } else { &theirs };
            assert!(found[at.clone()] == expected[at], "round {round}, sector {sector}");
        }
        assert!(disk.missing().is_empty());
    }
}

#[test]
fn a_wait_ends_by_its_deadline_by_an_interrupt_and_by_a_reset() {
    let rig = Rig::new(16 * BLOCK_SIZE);
    let options = DiskOptions { arrival_limit: SOON, ..rig.options() };
    let disk = Disk::create(&rig.overlay(), Some(&rig.base()), 0, &options).unwrap();
    disk.reset().unwrap();
    arm(&disk, &[BlockRange::new(0, 1)]);
    let mut buf = [0; 10];
    assert!(matches!(disk.read_at(0, &mut buf), Err(DiskError::ArrivalTimeout { .. })));
    assert!(matches!(disk.write_at(0, &buf), Err(DiskError::ArrivalTimeout { .. })));
    drop(disk);

    for end in [Disk::interrupt, |disk: &Disk| disk.reset().unwrap()] {
        let rig = Rig::new(16 * BLOCK_SIZE);
        let (disk, asked) = armed(&rig, &[BlockRange::new(0, 1)]);
        thread::scope(|scope| {
            let reader = scope.spawn(|| disk.read_at(0, &mut [0; 10]));
            until("the read asks", || !asked.lock().unwrap().is_empty());
            thread::sleep(SOON);
            end(&disk);
            let result = reader.join().unwrap();
            assert!(matches!(
                result,
                Err(DiskError::Interrupted | DiskError::NotArrived { .. }) | Ok(())
            ));
        });
    }
}

#[test]
fn a_disk_that_is_armed_again_asks_again_and_keeps_what_the_guest_wrote() {
    let rig = Rig::new(16 * BLOCK_SIZE);
    let (disk, _) = armed(&rig, &[BlockRange::new(0, 4)]);
    disk.write_at(0, &pattern(1, BLOCK_SIZE)).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let disk = rig.open_incomplete();
    assert_eq!(disk.status(), DiskStatus::Armed);
    let error = disk.read_at(BLOCK, &mut [0; 1]).unwrap_err();
    assert!(matches!(error, DiskError::NotArrived { .. }), "nobody to ask: {error}");

    let all = BlockSet::full(16);
    assert!(disk.arm(&all, Box::new(|_| {})).is_err(), "that would drop what the guest wrote");
    let asked = arm(&disk, &[BlockRange::new(1, 3)]);
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(&disk, 0, 2 * BLOCK_SIZE));
        until("the read asks", || !asked.lock().unwrap().is_empty());
        disk.fill(BlockIndex(0), &pattern(9, 4 * BLOCK_SIZE)).unwrap();
        let found = reader.join().unwrap();
        assert!(found[..BLOCK_SIZE] == pattern(1, BLOCK_SIZE));
        assert!(found[BLOCK_SIZE..] == pattern(9, 4 * BLOCK_SIZE)[BLOCK_SIZE..2 * BLOCK_SIZE]);
    });
    disk.complete().unwrap();
    drop(disk);
    assert!(rig.open().unwrap().is_complete());
}
