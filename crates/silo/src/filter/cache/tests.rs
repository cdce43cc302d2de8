//! The cache against a buffer, against slow and failing devices, and with many threads at once.

use super::*;
use crate::{
    filter::{Delayed, Delays, Fault, Faulty, Op},
    source::{
        MemoryDevice,
        tests::{compare, exercise},
    },
    tests::random::Random,
};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

fn memory(bytes: u64) -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new("behind", bytes).unwrap())
}

/// Writes back all the time.
fn eager() -> CacheOptions {
    CacheOptions { age: Duration::ZERO, writers: 3, ..CacheOptions::with_budget(4 << 20) }
}

#[test]
fn check_26_what_was_written_is_read_whatever_is_written_back_meanwhile() {
    for (seed, size) in [(1, 1u64), (2, 511), (3, 513), (4, 5 << 20), (5, (3 << 20) + 78)] {
        for options in [eager(), CacheOptions::with_budget(64 << 20)] {
            let behind = memory(size);
            let slow = Delays::round_trip(Duration::from_micros(200));
            let far = Arc::new(Delayed::new(behind.clone(), slow));
            let cache = WriteCache::new(far, options).unwrap();
            let (mut model, mut random) = (vec![0; size as usize], Random(seed));
            let context = format!("{size} bytes");
            for _ in 0..4 {
                exercise(&cache, &mut model, &mut random, 60, &context);
                compare(&cache, &model, &context);
                cache.flush().unwrap();
                assert_eq!(cache.status().held, 0);
                compare(&*behind, &model, &context);
            }
        }
    }
}

#[test]
fn long_zeros_go_to_the_device_and_hide_what_was_written_before() {
    let behind = memory(64 << 20);
    let cache = WriteCache::new(behind.clone(), CacheOptions::with_budget(16 << 20)).unwrap();
    let mut model = vec![0; 64 << 20];
    for at in (0..64u64).map(|mib| mib << 20) {
        cache.write_at(at + 1000, &[1; 5000]).unwrap();
        model[at as usize + 1000..][..5000].fill(1);
    }
    cache.zero(3_000_000, 50 << 20, false).unwrap();
    model[3_000_000..][..50 << 20].fill(0);
    compare(&cache, &model, "before the flush");
    cache.flush().unwrap();
    compare(&*behind, &model, "after");
}

#[test]
fn check_26_an_error_behind_fails_the_flush_and_nothing_is_lost() {
    let behind = memory(8 << 20);
    let faulty = Arc::new(Faulty::new(behind.clone()));
    let cache = WriteCache::new(faulty.clone(), eager()).unwrap();
    faulty.set(|op, offset, _| {
        (op == Op::Write && offset >= 2 << 20)
            .then_some(Fault::Torn { bytes: 100, error: io::ErrorKind::StorageFull })
    });
    let data = Random(9).bytes(3 << 20);
    cache.write_at(0, &data).unwrap();
    let error = cache.flush().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert!(cache.flush().is_err(), "still");
    let mut back = vec![0; data.len()];
    cache.read_at(0, &mut back).unwrap();
    assert!(back == data, "what is not behind is still here");
    faulty.heal();
    cache.flush().unwrap();
    behind.read_at(0, &mut back).unwrap();
    assert!(back == data);
    // A flush that fails behind is not answered either.
    faulty.set(|op, _, _| (op == Op::Flush).then_some(Fault::Error(io::ErrorKind::Other)));
    cache.write_at(0, &[1]).unwrap();
    assert!(cache.flush().is_err());
}

#[test]
fn beyond_the_budget_a_writer_is_slowed_and_not_failed_and_memory_stays_bounded() {
    let behind = memory(64 << 20);
    let narrow = Delays { bandwidth: 400 << 20, ..Delays::round_trip(Duration::from_millis(5)) };
    let far = Arc::new(Delayed::new(behind.clone(), narrow));
    let budget = 8 << 20;
    let cache = WriteCache::new(far, CacheOptions::with_budget(budget)).unwrap();
    let data = Random(3).bytes(64 << 20);
    let start = Instant::now();
    let most = AtomicU64::new(0);
    for (index, part) in data.chunks(1 << 20).enumerate() {
        cache.write_at((index as u64) << 20, part).unwrap();
        most.fetch_max(cache.status().held, Ordering::Relaxed);
    }
    assert!(start.elapsed() >= Duration::from_millis(56 * 1000 / 400), "not slowed");
    assert!(most.into_inner() <= budget + (1 << 20));
    assert!(cache.shared.pool.waiting() <= budget);
    // Buffers that wait make room for small pieces.
    for at in 0..7000u64 {
        cache.write_at(at * 1024, &[5; 512]).unwrap();
        // In this order: a buffer that goes back meanwhile is not counted twice.
        let waiting = cache.shared.pool.waiting();
        let held = cache.status().held;
        assert!(held + waiting <= budget + 8192, "{held} and {waiting}");
    }
    cache.flush().unwrap();
    cache.write_at(0, &data[..8 << 20]).unwrap();
    cache.flush().unwrap();
    let mut back = vec![0; data.len()];
    behind.read_at(0, &mut back).unwrap();
    assert!(back == data);
}

#[test]
fn a_device_that_takes_nothing_fails_the_writer_in_the_end_with_the_reason() {
    let faulty = Arc::new(Faulty::new(memory(64 << 20)));
    faulty.set(|op, _, _| (op == Op::Write).then_some(Fault::Error(io::ErrorKind::StorageFull)));
    let patience = Duration::from_millis(60);
    let options = CacheOptions { patience, ..CacheOptions::with_budget(4 << 20) };
    let cache = WriteCache::new(faulty, options).unwrap();
    let error = (0..8u64)
        .find_map(|index| cache.write_at(index << 20, &vec![1; 1 << 20]).err())
        .expect("the budget is smaller");
    assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
}

#[test]
fn what_is_old_is_written_back_without_a_flush() {
    let behind = memory(1 << 20);
    let options =
        CacheOptions { age: Duration::from_millis(20), ..CacheOptions::with_budget(4 << 20) };
    let cache = WriteCache::new(behind.clone(), options).unwrap();
    cache.write_at(5000, b"hello").unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while cache.status().held > 0 {
        assert!(Instant::now() < until, "it was never written back");
        thread::yield_now();
    }
    let mut buf = [0; 5];
    behind.read_at(5000, &mut buf).unwrap();
    assert_eq!(&buf, b"hello");
}

#[test]
fn many_small_writes_to_a_region_become_one_span() {
    let behind = memory(1 << 20);
    let content = Random(5).bytes(1 << 20);
    behind.write_at(0, &content).unwrap();
    let writes = Arc::new(AtomicU64::new(0));
    let faulty = Arc::new(Faulty::new(behind.clone()));
    let count = writes.clone();
    faulty.set(move |op, _, _| {
        if op == Op::Write {
            count.fetch_add(1, Ordering::Relaxed);
        }
        None
    });
    let cache = WriteCache::new(faulty, CacheOptions::with_budget(8 << 20)).unwrap();
    let mut model = content;
    for sector in (10..100).step_by(2) {
        cache.write_at(sector * 512, &[7; 512]).unwrap();
        model[sector as usize * 512..][..512].fill(7);
    }
    cache.flush().unwrap();
    assert_eq!(writes.load(Ordering::Relaxed), 1);
    compare(&*behind, &model, "span");
}

#[test]
fn check_26_a_flush_waits_for_what_replaced_the_writes_that_it_is_for() {
    // A write is covered by a newer one before it was written back: the flush that came between
    // must not count it as done.
    let behind = memory(1 << 20);
    let faulty = Arc::new(Faulty::new(behind.clone()));
    let (hold, held) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let (holding, reached) = (hold.clone(), held.clone());
    faulty.set(move |op, _, _| {
        if op == Op::Write {
            reached.store(true, Ordering::SeqCst);
            let until = Instant::now() + Duration::from_secs(20);
            while holding.load(Ordering::SeqCst) && Instant::now() < until {
                thread::yield_now();
            }
        }
        None
    });
    let cache = WriteCache::new(faulty, eager()).unwrap();
    cache.write_at(0, &[1; 512]).unwrap();
    thread::scope(|scope| {
        let flush = scope.spawn(|| cache.flush());
        let until = Instant::now() + Duration::from_secs(20);
        while !held.load(Ordering::SeqCst) {
            assert!(Instant::now() < until);
            thread::yield_now();
        }
        cache.write_at(0, &[2; 512]).unwrap();
        // Nothing is behind yet, so no flush may have been answered.
        thread::sleep(Duration::from_millis(30));
        assert!(!flush.is_finished());
        hold.store(false, Ordering::SeqCst);
        flush.join().unwrap().unwrap();
    });
    let mut buf = [0; 512];
    behind.read_at(0, &mut buf).unwrap();
    assert!(buf == [1; 512] || buf == [2; 512]);
}

/// One thread's access to a sector: when it began and ended, and which number it wrote or saw.
#[derive(Clone, Copy, Debug)]
struct Access {
    began: u64,
    ended: u64,
    number: u64,
    write: bool,
}

#[test]
fn check_26_overlapping_accesses_are_linearisable_sector_by_sector() {
    const SECTORS: u64 = 24;
    let size = SECTORS * 512;
    // Reordered and slow behind: writes take turns of different length.
    let slow = Arc::new(Faulty::new(memory(size)));
    let turns = AtomicU64::new(0);
    slow.set(move |_, _, _| {
        if turns.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) {
            thread::yield_now();
        }
        None
    });
    let cache = WriteCache::new(slow, eager()).unwrap();
    let clock = AtomicU64::new(1);
    let numbers = AtomicU64::new(1);
    let history: Vec<Mutex<Vec<Access>>> = (0..SECTORS).map(|_| Mutex::default()).collect();
    let (stop, looks) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for thread in 0..6u64 {
            let (cache, clock, numbers, history) = (&cache, &clock, &numbers, &history);
            let (stop, looks) = (&stop, &looks);
            scope.spawn(move || {
                let mut random = Random(thread);
                while !stop.load(Ordering::Relaxed) {
                    let first = random.below(SECTORS);
                    let count = 1 + random.below((SECTORS - first).min(6));
                    let mut buf = vec![0; (count * 512) as usize];
                    let write = thread < 3;
                    let number = if write { numbers.fetch_add(1, Ordering::SeqCst) } else { 0 };
                    let began = clock.fetch_add(1, Ordering::SeqCst);
                    if write {
                        for word in buf.chunks_mut(8) {
                            word.copy_from_slice(&number.to_le_bytes());
                        }
                        if thread == 0 && count > 2 {
                            // Odd bytes inside the first and last sector too.
                            let from = 8 * random.below(64) as usize;
                            let to = buf.len() - 8 * random.below(64) as usize;
                            // Only whole sectors are noted below, so write them whole again.
                            cache.write_at(first * 512 + from as u64, &buf[from..to]).unwrap();
                        }
                        cache.write_at(first * 512, &buf).unwrap();
                    } else {
                        cache.read_at(first * 512, &mut buf).unwrap();
                        looks.fetch_add(1, Ordering::Relaxed);
                    }
                    let ended = clock.fetch_add(1, Ordering::SeqCst);
                    for (index, sector) in buf.chunks(512).enumerate() {
                        let found = u64::from_le_bytes(sector[..8].try_into().unwrap());
                        let last = u64::from_le_bytes(sector[504..].try_into().unwrap());
                        if thread >= 3 && found != last {
                            // Torn only by a write of part of a sector, which thread 0 makes.
                            continue;
                        }
                        let access = Access { began, ended, number: found, write };
                        history[first as usize + index].lock().unwrap().push(access);
                    }
                }
            });
        }
        scope.spawn(|| {
            // However few turns the readers get on a busy computer: until they have seen enough.
            let until = Instant::now() + Duration::from_secs(60);
            let mut flushes = 0;
            while flushes < 40 || (looks.load(Ordering::Relaxed) < 2000 && Instant::now() < until) {
                cache.flush().unwrap();
                flushes += 1;
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
    let mut reads = 0;
    for (sector, history) in history.iter().enumerate() {
        let history = history.lock().unwrap();
        let writes: Vec<_> = history.iter().filter(|access| access.write).collect();
        for read in history.iter().filter(|access| !access.write && access.number > 0) {
            reads += 1;
            let Some(source) = writes.iter().find(|write| write.number == read.number) else {
                panic!("sector {sector}: {read:?} saw what nobody wrote");
            };
            assert!(source.began < read.ended, "sector {sector}: {read:?} saw the future");
            let between =
                writes.iter().find(|other| source.ended < other.began && other.ended < read.began);
            assert!(
                between.is_none(),
                "sector {sector}: {read:?} saw {source:?}, which {between:?} had replaced"
            );
        }
    }
    assert!(reads > 1000, "{reads}");
}
