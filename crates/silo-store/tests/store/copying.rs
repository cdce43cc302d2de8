//! Freezing a group while it is written.

use crate::support::*;
use proptest::prelude::*;
use silo_block::{block::BlockRange, io::BlockDevice};
use silo_store::{
    CopyGroup, ScratchOptions,
    capture::{Capture, CaptureError, Frozen, Want},
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

const BLOCK: usize = 512;
const SIZE: usize = 40 * BLOCK + 100;

fn check(frozen: &dyn Frozen, device: usize, before: &[u8], now: &[u8], last: &[u8]) {
    for block in 0..before.len().div_ceil(BLOCK) {
        let range = block * BLOCK..((block + 1) * BLOCK).min(before.len());
        if !frozen.changed(device).contains(silo_block::block::BlockIndex(block as u64)) {
            assert_eq!(before[range.clone()], last[range], "block {block} is not listed");
            continue;
        }
        let mut buf = vec![0; range.len()];
        frozen.read(device, BlockRange::new(block as u64, 1), &mut buf).unwrap();
        assert_eq!(buf, before[range.clone()], "block {block}; now {:?}", &now[range][..4]);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Freeze,
    ReadAndRelease,
    PutBack,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..SIZE, 1..3000usize, any::<u8>()).prop_map(|(at, n, b)| Step::Write(at, n.min(SIZE - at), b)),
        1 => (0..SIZE, 1..3000usize).prop_map(|(at, n)| Step::Zero(at, n.min(SIZE - at))),
        2 => Just(Step::Freeze),
        2 => Just(Step::ReadAndRelease),
        1 => Just(Step::PutBack),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn a_frozen_group_is_what_it_was_and_lists_what_differs_from_the_last_stored_round(
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let disk = Disk::new(noise(1, SIZE));
        // Room for two blocks in memory: most copies go through the file.
        let scratch = ScratchOptions { memory: 1024, file: 1 << 20, folder: std::env::temp_dir() };
        let devices = vec![("disk".to_owned(), BLOCK as u32, disk.clone() as Arc<dyn BlockDevice>)];
        let group = CopyGroup::new(devices, scratch).unwrap();
        let device = group.device(0);
        // What the last released round had; nothing is known at first.
        let mut last = vec![0xaa; SIZE];
        let mut frozen: Option<(Box<dyn Frozen>, Vec<u8>)> = None;
        for step in steps {
            match step {
                Step::Write(at, length, byte) => device.write_at(at as u64, &vec![byte; length]).unwrap(),
                Step::Zero(at, length) => device.zero(at as u64, length as u64, false).unwrap(),
                Step::Freeze => match group.freeze(Want::Changed) {
                    Ok(round) => {
                        prop_assert!(frozen.is_none());
                        frozen = Some((round, disk.content()));
                    }
                    Err(CaptureError::Frozen) => prop_assert!(frozen.is_some()),
                    Err(error) => panic!("{error}"),
                },
                Step::ReadAndRelease => if let Some((round, before)) = frozen.take() {
                    check(round.as_ref(), 0, &before, &disk.content(), &last);
                    round.release();
                    last = before;
                },
                Step::PutBack => if let Some((round, _)) = frozen.take() {
                    round.put_back();
                },
            }
        }
    }
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn one_instant_holds_for_all_devices_of_a_group_while_many_threads_write() {
    let disks = [Disk::new(vec![0; 1 << 20]), Disk::new(vec![0; 1 << 20])];
    let group = group(&[("a", 4096, &disks[0]), ("b", 4096, &disks[1])]);
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for writer in 0..3u64 {
            let (group, stop) = (&group, &stop);
            scope.spawn(move || {
                let devices = [group.device(0), group.device(1)];
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    // First on one device, and when that is acknowledged on the other.
                    devices[0].write_at(writer * 8192 + 8, &n.to_le_bytes()).unwrap();
                    devices[1].write_at(writer * 8192 + 8, &n.to_le_bytes()).unwrap();
                    // And something that takes copies.
                    devices[(n % 2) as usize]
                        .write_at(65536 + n * 4096 % 900_000, &[n as u8; 5000])
                        .unwrap();
                }
            });
        }
        // Ends the writers also when an assertion does not hold.
        let _stop = StopAtEnd(&stop);
        let mut known = [[0u64; 3]; 2];
        for _ in 0..200 {
            let frozen = group.freeze(Want::Changed).unwrap();
            for (device, values) in known.iter_mut().enumerate() {
                for (writer, value) in values.iter_mut().enumerate() {
                    let block = BlockRange::new(writer as u64 * 2, 1);
                    if frozen.changed(device).contains(block.start) {
                        let mut buf = vec![0; 4096];
                        frozen.read(device, block, &mut buf).unwrap();
                        *value = u64::from_le_bytes(buf[8..16].try_into().unwrap());
                    }
                }
            }
            for (a, b) in known[0].iter().zip(&known[1]) {
                assert!(*a == *b || *a == *b + 1, "{known:?}");
            }
            rounds.fetch_add(1, Ordering::Relaxed);
            frozen.release();
        }
    });
    assert_eq!(rounds.into_inner(), 200);
}

/// A disk whose writes to block 0 do not end before the lock is free.
struct Stuck(Arc<Disk>, Mutex<()>);

impl BlockDevice for Stuck {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        let _free = (offset == 0).then(|| self.1.lock().unwrap());
        self.0.write_at(offset, data)
    }

    fn flush(&self) -> std::io::Result<()> {
        self.0.flush()
    }

    fn trim(&self, offset: u64, length: u64) -> std::io::Result<()> {
        self.0.trim(offset, length)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> std::io::Result<()> {
        self.0.zero(offset, length, allocate)
    }
}

/// Else two writers wait for each other once the next round begins.
#[test]
fn a_writer_that_waits_for_writes_from_before_a_freeze_goes_on_when_it_is_over() {
    for put_back in [false, true] {
        let stuck = Arc::new(Stuck(Disk::new(vec![0; 1 << 20]), Mutex::new(())));
        let scratch = ScratchOptions::in_folder(&std::env::temp_dir());
        let inner = stuck.clone() as Arc<dyn BlockDevice>;
        let group = CopyGroup::new(vec![("disk".to_owned(), 4096, inner)], scratch).unwrap();
        group.set_known();
        let noted = |blocks| {
            let begun = Instant::now();
            while group.changes(0).blocks != blocks {
                assert!(begun.elapsed() < Duration::from_secs(20));
                std::thread::yield_now();
            }
        };
        let held = stuck.1.lock().unwrap();
        std::thread::scope(|scope| {
            let first = group.device(0);
            scope.spawn(move || first.write_at(0, &[1; 4096]).unwrap());
            noted(1);
            let frozen = group.freeze(Want::Everything).unwrap();
            let (done, end) = std::sync::mpsc::channel();
            for writer in 1..=8 {
                let (device, done) = (group.device(0), done.clone());
                scope.spawn(move || {
                    device.write_at(writer * 65536, &[2; 4096]).unwrap();
                    done.send(()).unwrap();
                });
            }
            noted(8);
            if put_back {
                frozen.put_back();
            } else {
                frozen.release();
            }
            // The first write is still under way.
            let ends = (0..8).map(|_| end.recv_timeout(Duration::from_secs(10)).is_ok());
            let ends = ends.collect::<Vec<_>>();
            drop(held);
            assert_eq!(ends, [true; 8]);
        });
    }
}

#[test]
fn when_there_is_no_room_for_copies_the_round_fails_and_the_writer_goes_on() {
    let disk = Disk::new(noise(1, 1 << 20));
    let scratch = ScratchOptions { memory: 8192, file: 8192, folder: std::env::temp_dir() };
    let devices = vec![("disk".to_owned(), 4096, disk.clone() as Arc<dyn BlockDevice>)];
    let group = CopyGroup::new(devices, scratch).unwrap();
    let frozen = group.freeze(Want::Changed).unwrap();
    group.device(0).write_at(0, &noise(2, 1 << 20)).unwrap();
    assert_eq!(disk.content(), noise(2, 1 << 20), "the write was not held up");
    let error = frozen.read(0, BlockRange::new(200, 1), &mut [0; 4096]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    assert!(error.to_string().contains("more room or bandwidth"), "{error}");
    drop(frozen);
    assert_eq!(group.changes(0).blocks, 256);
    assert!(group.freeze(Want::Changed).is_ok());
}

#[test]
fn a_writer_is_not_held_by_a_slow_upload() {
    let disk = Disk::new(noise(1, 8 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    let frozen = group.freeze(Want::Changed).unwrap();
    // Nobody reads the frozen content; writers go on.
    let device = group.device(0);
    for i in 0..2048u64 {
        device.write_at(i * 4096, &[i as u8; 4096]).unwrap();
    }
    assert!(frozen.held() < Duration::from_secs(20), "{:?}", frozen.held());
    let mut buf = vec![0; 8 << 20];
    frozen.read(0, BlockRange::new(0, 2048), &mut buf).unwrap();
    assert_eq!(buf, noise(1, 8 << 20));
}
