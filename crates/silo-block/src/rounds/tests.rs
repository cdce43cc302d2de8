use super::*;
use crate::block::BlockRange;
use proptest::prelude::*;
use std::{
    sync::atomic::{AtomicBool, AtomicU64},
    thread,
};

const WAIT: Duration = Duration::from_secs(60);

fn listed(set: &BlockSet) -> Vec<u64> {
    set.ranges().flat_map(|r| r.start.0..r.end()).collect()
}

/// Writers on real threads add to counters, one a block; a round's copy is what was read after the
/// round had closed, beside writers of later rounds. What each writer did in each round is known
/// from its guards.
#[test]
fn check_05_each_write_is_in_exactly_one_round() {
    const BLOCKS: u64 = 96;
    const THREADS: usize = 4;
    const ROUNDS: usize = 300;
    let rounds = Rounds::new(BLOCKS);
    let content: Vec<AtomicU64> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let (mut lists, mut writes) = (Vec::new(), Vec::new());
    thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (rounds, content, stop) = (&rounds, &content, &stop);
                scope.spawn(move || {
                    let mut random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(thread as u64 + 1);
                    let mut done = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let block = random % BLOCKS;
                        let guard = rounds.write(BlockRange::new(block, 1));
                        content[block as usize].fetch_add(1, Ordering::Relaxed);
                        done.push((guard.epoch(), block));
                        drop(guard);
                        if done.len() % 16 == 0 {
                            thread::yield_now();
                        }
                    }
                    done
                })
            })
            .collect();
        let mut last = Epoch::BASE;
        for turn in 0..ROUNDS {
            let begun = Instant::now();
            let written = || content.iter().map(|c| c.load(Ordering::Relaxed)).sum::<u64>();
            while written() < turn as u64 * 20 {
                assert!(begun.elapsed() < WAIT, "writers do not get on");
                thread::yield_now();
            }
            let round = rounds.advance(WAIT).unwrap();
            let list = rounds.between(last, round);
            let copy: Vec<u64> = content.iter().map(|c| c.load(Ordering::Relaxed)).collect();
            lists.push((round, list, copy));
            last = round;
        }
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writes.extend(writer.join().unwrap());
        }
    });
    let end = rounds.advance(WAIT).unwrap();
    let last = lists.last().unwrap().0;
    let copy = content.iter().map(|c| c.load(Ordering::Relaxed)).collect();
    lists.push((end, rounds.between(last, end), copy));

    let mut counts = vec![vec![0u64; BLOCKS as usize]; end.0 as usize + 1];
    for (epoch, block) in &writes {
        counts[epoch.0 as usize][*block as usize] += 1;
    }
    assert!(writes.len() > ROUNDS, "writers ran");
    let (mut replica, mut so_far) = (vec![0u64; BLOCKS as usize], vec![0u64; BLOCKS as usize]);
    for (round, list, copy) in &lists {
        for block in 0..BLOCKS as usize {
            let written = counts[round.0 as usize][block];
            so_far[block] += written;
            let inside = list.contains(BlockIndex(block as u64));
            assert!(!inside || written > 0, "{round}: block {block} listed without a write");
            assert!(copy[block] >= so_far[block], "{round}: the copy misses a write of its round");
            if inside {
                replica[block] = copy[block];
            }
        }
    }
    let total: Vec<u64> = content.iter().map(|c| c.load(Ordering::Relaxed)).collect();
    assert_eq!(so_far, total, "every write is in one round");
    assert_eq!(replica, total, "blocks of all lists, copied beside writers, make the device");
}

#[test]
fn check_04_a_write_racing_the_copy_comes_again_and_one_before_the_round_is_not_dirty() {
    let rounds = Rounds::new(8);
    let mut peer = Holder::of_base(8);
    drop(rounds.write(BlockRange::new(1, 1)));
    let first = rounds.advance(WAIT).unwrap();
    assert_eq!(listed(&peer.begin(&rounds, first)), [1]);
    // The copy of block 1 is on its way; a writer changes it again.
    drop(rounds.write(BlockRange::new(1, 1)));
    peer.settle(&rounds, BlockRange::new(1, 1), first);
    assert_eq!(listed(&peer.dirty(&rounds)), [1], "the race is dirty although it was settled");
    let second = rounds.advance(WAIT).unwrap();
    assert_eq!(listed(&peer.begin(&rounds, second)), [1]);
    peer.settle(&rounds, BlockRange::new(1, 1), second);
    assert!(peer.dirty(&rounds).is_empty(), "nothing written since: nothing dirty");
    let third = rounds.advance(WAIT).unwrap();
    assert!(peer.begin(&rounds, third).is_empty());
}

#[test]
fn a_round_that_does_not_end_says_so_and_the_next_call_still_has_its_writes() {
    let rounds = Rounds::new(4);
    let slow = rounds.write(BlockRange::new(2, 1));
    let error = rounds.advance(Duration::from_millis(5)).unwrap_err();
    assert!(matches!(error, RoundError::StillWriting { round: Epoch(1), writers: 1, .. }));
    drop(rounds.write(BlockRange::new(3, 1)));
    assert!(rounds.advance(Duration::from_millis(5)).is_err(), "still inside");
    drop(slow);
    let round = rounds.advance(WAIT).unwrap();
    assert_eq!(listed(&rounds.between(Epoch::BASE, round)), [2, 3]);
}

#[test]
fn the_owner_of_a_device_that_moved_goes_on_counting() {
    let rounds = Rounds::new(4);
    rounds.set(BlockRange::new(0, 2), Epoch(41));
    assert_eq!(rounds.continue_after(Epoch(41), WAIT).unwrap(), Epoch(42));
    assert_eq!(rounds.continue_after(Epoch(7), WAIT).unwrap(), Epoch(42), "never back");
    assert_eq!(rounds.write(BlockRange::new(3, 1)).epoch(), Epoch(42));
    assert_eq!(rounds.advance(WAIT).unwrap(), Epoch(42));
    assert_eq!(listed(&rounds.newer_than(Epoch(41))), [3]);
    assert_eq!(rounds.continue_after(Epoch(u32::MAX), WAIT), Err(RoundError::UsedUp));
}

#[test]
fn epochs_take_a_tenth_of_a_percent_of_a_device() {
    let blocks = (1u64 << 30) / 4096;
    let share = Rounds::new(blocks).memory() as f64 / (1u64 << 30) as f64;
    assert!(share < 0.0015, "{share}");
}

proptest! {
    /// Several holders of one device, with writes, rounds, acknowledgements out of order, losses.
    #[test]
    fn holders_do_not_disturb_each_other_and_lose_nothing(
        ops in proptest::collection::vec((0u8..6, 0usize..2, 0u64..70, 1u64..9), 1..120),
    ) {
        const BLOCKS: u64 = 70;
        let rounds = Rounds::new(BLOCKS);
        let mut content = vec![0u32; BLOCKS as usize];
        let mut holders = vec![Holder::of_base(BLOCKS); 2];
        let mut copies = vec![vec![0u32; BLOCKS as usize]; 2];
        // Copies under way: holder, range, epoch, bytes.
        let mut flying: Vec<(usize, BlockRange, Epoch, Vec<u32>)> = Vec::new();
        for (op, who, at, count) in ops {
            let range = BlockRange::new(at, count.min(BLOCKS - at));
            match op {
                0 | 1 => {
                    let guard = rounds.write(range);
                    for block in range.start.0..range.end() { content[block as usize] += 1; }
                    drop(guard);
                }
                2 => {
                    let round = rounds.advance(WAIT).unwrap();
                    let list = holders[who].begin(&rounds, round);
                    for range in list.ranges() {
                        let bytes = content[range.start.0 as usize..range.end() as usize].to_vec();
                        flying.push((who, range, round, bytes));
                    }
                }
                3 if !flying.is_empty() => {
                    // The oldest of a holder arrives first, as on one connection.
                    let (who, range, round, bytes) = flying.remove(0);
                    copies[who][range.start.0 as usize..range.end() as usize].copy_from_slice(&bytes);
                    holders[who].settle(&rounds, range, round);
                }
                4 if !flying.is_empty() => { flying.remove(at as usize % flying.len()); }
                5 => { copies[who][range.start.0 as usize..range.end() as usize].fill(u32::MAX);
                       holders[who].put_back(range); }
                _ => {}
            }
            for (holder, copy) in holders.iter().zip(&copies) {
                let dirty = holder.dirty(&rounds);
                for block in 0..BLOCKS {
                    let same = copy[block as usize] == content[block as usize];
                    prop_assert!(same || dirty.contains(BlockIndex(block)), "block {} lost", block);
                }
            }
        }
    }
}

#[test]
fn a_write_that_may_not_be_done_leaves_no_mark_and_holds_up_no_round() {
    let rounds = Rounds::new(8);
    let range = BlockRange::new(2, 3);
    assert!(rounds.write_if(range, || false).is_none());
    assert_eq!(rounds.epoch(BlockIndex(2)), Epoch::BASE);
    let guard = rounds.write_if(range, || true).unwrap();
    assert_eq!((guard.epoch(), rounds.epoch(BlockIndex(4))), (Epoch(1), Epoch(1)));
    assert!(rounds.advance(Duration::ZERO).is_err(), "the write is under way");
    drop(guard);
    assert_eq!(
        rounds.advance(Duration::ZERO),
        Ok(Epoch(2)),
        "the call before has closed the first"
    );
}
