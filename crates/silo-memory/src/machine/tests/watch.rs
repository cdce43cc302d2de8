//! A move and a backup that both want to know what was written.

use super::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[test]
fn a_move_and_watchers_each_hear_of_every_write_once_whoever_looks_first() {
    let guest = Guest::start(false);
    guest.memory.start_tracking().unwrap();
    let watchers = [guest.memory.watch().unwrap(), guest.memory.watch().unwrap()];
    let mut owed = [set([]), set([]), set([])];
    let mut random = 9u64;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % below
    };
    for _ in 0..300 {
        for _ in 0..next(40) {
            let block = next(BLOCKS);
            if next(2) == 0 {
                guest.write(block, 1);
            } else {
                guest.memory.note_written(BlockRange::new(block, 1));
            }
            owed.iter_mut().for_each(|set| _ = set.insert(BlockIndex(block)));
        }
        let who = next(3) as usize;
        let heard = match who {
            0 => guest.memory.take_dirty().unwrap(),
            other => watchers[other - 1].take().unwrap(),
        };
        assert_eq!(heard, owed[who], "number {who}");
        owed[who] = set([]);
    }
}

#[test]
fn a_watcher_takes_nothing_from_a_move_that_tracks_already_and_a_move_that_begins_nothing_from_it()
{
    let guest = Guest::start(true);
    guest.memory.arm(&set([]), no_demand()).unwrap();
    // Since its arrival the memory is tracked, for the difference that a move back would send.
    guest.write(1, 1);
    let watcher = guest.memory.watch().unwrap();
    guest.write(2, 1);
    assert_eq!(watcher.take().unwrap(), set([2]), "from its beginning on");
    assert_eq!(guest.memory.take_dirty().unwrap(), set([1, 2]));
    guest.write(3, 1);
    guest.memory.start_tracking().unwrap();
    guest.write(4, 1);
    assert_eq!(guest.memory.take_dirty().unwrap(), set([4]), "a move that begins anew");
    assert_eq!(watcher.take().unwrap(), set([3, 4]));
    drop(watcher);
    guest.write(5, 1);
    guest.memory.start_tracking().unwrap();
    assert_eq!(guest.memory.take_dirty().unwrap(), set([]));
}

#[test]
fn looking_how_much_takes_nothing_away() {
    let guest = Guest::start(false);
    let watcher = guest.memory.watch().unwrap();
    assert_eq!(watcher.count().unwrap(), 0);
    guest.write(7, 1);
    assert_eq!((watcher.count().unwrap(), watcher.count().unwrap()), (1, 1));
    assert_eq!(watcher.take().unwrap(), set([7]));
    assert_eq!(watcher.count().unwrap(), 0);
}

#[test]
fn a_watcher_of_an_earlier_stay_says_so() {
    let guest = Guest::start(true);
    guest.memory.arm(&set([]), no_demand()).unwrap();
    let watcher = guest.memory.watch().unwrap();
    let memory = Arc::clone(&guest.memory);
    drop(guest);
    assert!(watcher.take().is_err());
    let _again = Guest::over(memory, true);
    let said = watcher.take().unwrap_err();
    assert!(said.source.to_string().contains("has left"), "{}", said.source);
}

/// Ends a writer, also when a check fails.
struct EndWriter<'a>(&'a AtomicBool);

impl Drop for EndWriter<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn two_who_look_at_once_lose_no_write() {
    let guest = Guest::start(false);
    guest.memory.start_tracking().unwrap();
    let watcher = guest.memory.watch().unwrap();
    // The guest writes block after block; `done` is the last that it has written for sure.
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let check = |take: &dyn Fn() -> BlockSet| {
        let mut before = done.load(Ordering::SeqCst);
        for _ in 0..200 {
            let mut now = before;
            while now < before + 50 {
                thread::yield_now();
                now = done.load(Ordering::SeqCst);
            }
            let heard = take();
            let written = (before + 2..=now).take(BLOCKS as usize);
            for count in written {
                let block = count % BLOCKS;
                assert!(heard.contains(BlockIndex(block)), "write {count} was lost");
            }
            // What was written until here may have been heard of already, and one more, which is
            // counted just after it was written.
            before = done.load(Ordering::SeqCst);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for count in 1u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                guest.write(count % BLOCKS, count as u8);
                done.store(count, Ordering::SeqCst);
            }
        });
        let _end = EndWriter(&stop);
        let other = scope.spawn(|| check(&|| watcher.take().unwrap()));
        check(&|| guest.memory.take_dirty().unwrap());
        other.join().unwrap();
    });
}

#[test]
fn a_watcher_that_reads_has_missing_blocks_brought_a_few_at_a_time_and_makes_no_page_of_zeros() {
    let guest = Guest::start(true);
    let (ask, asked) = mpsc::channel::<BlockRange>();
    let demand = Box::new(move |range| {
        // It fails when the test is over.
        let _ = ask.send(range);
    });
    guest.memory.arm(&set(100..130), demand).unwrap();
    let watcher = guest.memory.watch().unwrap();
    let memory = Arc::downgrade(&guest.memory);
    let peer = thread::spawn(move || {
        let mut largest = 0;
        for range in asked {
            largest = largest.max(range.count);
            let Some(memory) = memory.upgrade() else { break };
            let bytes = vec![range.start.0 as u8 | 1; range.bytes() as usize];
            memory.fill(range.start, &bytes).unwrap();
            if memory.missing_blocks() == 0 {
                break;
            }
        }
        largest
    });
    let mut buffer = vec![9; 64 * BLOCK_SIZE];
    crate::staging::Tracked::read_present(&watcher, BlockRange::new(80, 64), &mut buffer).unwrap();
    assert!(buffer[..20 * BLOCK_SIZE].iter().all(|byte| *byte == 0));
    assert!(buffer[20 * BLOCK_SIZE..50 * BLOCK_SIZE].iter().all(|byte| *byte != 0));
    assert!(peer.join().unwrap() <= 8, "a guest's fault would wait behind that");
    assert_eq!(guest.memory.allocated().unwrap(), set(100..130));
    assert_eq!(watcher.take().unwrap(), set([]), "what arrived was not written");
}
