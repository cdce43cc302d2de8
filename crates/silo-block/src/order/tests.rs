use super::{touch::*, *};
use crate::block::{BlockIndex, BlockRange};
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

fn order(blocks: u64) -> Order {
    Order::new(blocks, Heat::new(blocks))
}

#[test]
fn check_13_static_blocks_go_first_then_the_least_volatile() {
    let blocks = 64 * 10;
    let mut queue = order(blocks);
    // Chunk 3 was written long ago, 5 often, 7 once just now; the others never.
    queue.wrote(BlockRange::new(3 * 64, 64));
    for _ in 0..12 {
        queue.tick();
    }
    for _ in 0..4 {
        queue.wrote(BlockRange::new(5 * 64, 64));
        queue.tick();
    }
    queue.wrote(BlockRange::new(7 * 64, 1));
    queue.insert(Class::Bulk, BlockRange::new(0, blocks));
    let mut chunks = Vec::new();
    while let Some((class, range)) = queue.next(64) {
        assert_eq!(class, Class::Bulk);
        chunks.push(range.start.0 / 64);
    }
    assert_eq!(chunks, [0, 1, 2, 4, 6, 8, 9, 3, 7, 5]);
}

#[test]
fn check_13_what_cools_down_is_static_again() {
    let mut queue = order(64 * 3);
    queue.wrote(BlockRange::new(0, 64));
    queue.insert(Class::Bulk, BlockRange::new(0, 64 * 3));
    assert_eq!(queue.next(1).unwrap().1.start.0, 64, "chunk 0 is hot");
    for _ in 0..40 {
        queue.tick();
    }
    queue.wrote(BlockRange::new(64, 64));
    queue.wrote(BlockRange::new(128, 1));
    assert_eq!(queue.next(64).unwrap().1, BlockRange::new(0, 64), "chunk 0 has cooled down");
    assert_eq!(queue.next(64).unwrap().1, BlockRange::new(128, 64));
}

#[test]
fn check_11_a_demand_passes_everything_and_demands_keep_their_turn() {
    let mut queue = order(1000);
    queue.insert(Class::Bulk, BlockRange::new(0, 1000));
    queue.insert(Class::Dirty, BlockRange::new(500, 10));
    queue.insert(Class::Prefetch, BlockRange::new(700, 4));
    queue.insert(Class::Demand, BlockRange::new(900, 1));
    queue.insert(Class::Demand, BlockRange::new(3, 1));
    queue.insert(Class::Demand, BlockRange::new(900, 1));
    queue.insert(Class::Demand, BlockRange::new(701, 1));
    let first: Vec<_> = (0..6).map(|_| queue.next(256).unwrap()).collect();
    let at = |class, start, count| (class, BlockRange::new(start, count));
    assert_eq!(
        first,
        [
            at(Class::Demand, 900, 1),
            at(Class::Demand, 3, 1),
            at(Class::Demand, 701, 1),
            at(Class::Prefetch, 700, 1),
            at(Class::Prefetch, 702, 2),
            at(Class::Dirty, 500, 10),
        ]
    );
    assert_eq!(queue.len(), 1000 - 1 - 1 - 4 - 10);
}

/// The same access pattern on devices of 1 GiB and 1 TiB of 4 KiB blocks: the steps of a choice
/// are counted, not timed.
#[test]
fn check_13_the_choice_costs_the_same_on_1_gib_and_on_1_tib() {
    let steps = |blocks: u64| {
        let mut queue = order(blocks);
        let begun = Instant::now();
        let (mut random, mut worst) = (7u64, 0);
        for _ in 0..64 {
            for _ in 0..200 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                queue.wrote(BlockRange::new((random >> 20) % (blocks - 64), 1 + (random >> 60)));
            }
            queue.tick();
        }
        queue.insert(Class::Bulk, BlockRange::new(0, blocks));
        for turn in 0..20_000 {
            let before = queue.steps();
            let (_, range) = queue.next(8).unwrap();
            worst = worst.max(queue.steps() - before);
            if turn % 16 == 0 {
                queue.insert(Class::Dirty, range);
                queue.wrote(range);
            }
            if turn % 999 == 0 {
                queue.tick();
            }
        }
        // A scan of the device hidden in one step would take minutes; this takes well under a second.
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
        worst
    };
    let (small, large) = (steps((1 << 30) / 4096), steps((1 << 40) / 4096));
    assert!(small <= 70 && large <= 70, "{small} and {large} steps at worst");
}

#[test]
fn check_36_devices_share_the_line_by_what_they_have_left_and_end_together() {
    let total = [1_000_000u64, 100_000, 10_000];
    let mut left = total;
    let mut fair = Fair::new(3);
    let mut sent = [0u64; 3];
    for turn in 1.. {
        let Some(device) = fair.next(left) else { break };
        let bytes = 1000.min(left[device]);
        fair.took(device, bytes, left[device]);
        left[device] -= bytes;
        sent[device] += bytes;
        if turn % 100 == 0 {
            for device in 0..3 {
                let share = sent[device] as f64 / total[device] as f64;
                let all = sent.iter().sum::<u64>() as f64 / total.iter().sum::<u64>() as f64;
                assert!(
                    (share - all).abs() < 0.12,
                    "device {device}: {share} of its part at {all}"
                );
            }
        }
    }
    assert_eq!(sent, total);
}

#[test]
fn check_36_a_device_that_was_idle_neither_saves_up_turns_nor_is_starved() {
    let mut fair = Fair::new(2);
    for _ in 0..10_000 {
        assert_eq!(fair.next([1000, 0]), Some(0));
        fair.took(0, 10, 1000);
    }
    let mut turns = [0; 2];
    for _ in 0..400 {
        let device = fair.next([1000, 1000]).unwrap();
        fair.took(device, 10, 1000);
        turns[device] += 1;
    }
    assert!(turns[0] >= 100 && turns[1] >= 100, "{turns:?}");
}

#[test]
fn prefetch_follows_runs_strides_and_several_streams_at_once() {
    let mut prefetch = Prefetch::new(100_000, 256);
    let asked = |ranges: Vec<BlockRange>| -> Vec<u64> {
        ranges.iter().flat_map(|r| r.start.0..r.end()).collect()
    };
    assert_eq!(
        asked(prefetch.fault(BlockIndex(100))),
        (101..128).chain(96..100).collect::<Vec<_>>()
    );
    prefetch.fault(BlockIndex(50_000));
    assert!(prefetch.fault(BlockIndex(101)).is_empty());
    prefetch.fault(BlockIndex(49_993));
    let up = asked(prefetch.fault(BlockIndex(102)));
    assert_eq!(up, (103..111).collect::<Vec<_>>());
    let down = asked(prefetch.fault(BlockIndex(49_986)));
    assert_eq!(down[..3], [49_979, 49_972, 49_965], "a stride of -7");
    let more = asked(prefetch.fault(BlockIndex(103)));
    assert_eq!(more, (111..120).collect::<Vec<_>>(), "nothing twice");
    for block in [99_998, 99_999] {
        assert!(asked(prefetch.fault(BlockIndex(block))).iter().all(|b| *b < 100_000));
    }
}

#[test]
fn a_first_touch_manifest_has_fixed_bytes_and_refuses_others() {
    let mut touch = FirstTouch::new(1000);
    for (start, count) in [(500, 3), (502, 2), (10, 1), (999, 5)] {
        touch.touched(BlockRange::new(start, count));
    }
    let manifest = touch.manifest();
    let runs: Vec<_> = manifest.order.iter().map(|r| (r.start.0, r.count)).collect();
    assert_eq!(runs, [(500, 4), (10, 1), (999, 1)]);
    let bytes = manifest.encode();
    assert_eq!(bytes, *b"SLFT\x01\xe8\x07\x03\xe8\x07\x04\xdb\x07\x01\xb8\x0f\x01");
    assert_eq!(Manifest::decode(&bytes).unwrap(), manifest);
    for cut in 0..bytes.len() {
        assert!(Manifest::decode(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    let mut newer = bytes.clone();
    newer[4] = 2;
    assert_eq!(Manifest::decode(&newer), Err(ManifestError::Version(2)));
}

proptest! {
    #[test]
    fn a_manifest_survives_and_garbage_is_refused_without_harm(
        touches in proptest::collection::vec((0u64..5000, 1u64..40), 0..60),
        garbage in proptest::collection::vec(any::<u8>(), 0..60), at in 0usize..200, flip in 1u8..,
    ) {
        let mut record = FirstTouch::new(5000);
        for (start, count) in touches { record.touched(BlockRange::new(start, count)); }
        let mut bytes = record.manifest().encode();
        prop_assert_eq!(Manifest::decode(&bytes).unwrap(), record.manifest());
        if let Some(byte) = bytes.get_mut(at) { *byte ^= flip; }
        let _ = Manifest::decode(&bytes);
        let _ = Manifest::decode(&[b"SLFT\x01", &garbage[..]].concat());
    }

    /// Against a map of block to class.
    #[test]
    fn check_13_the_queue_gives_each_block_once_in_the_order_of_classes_and_never_a_removed_one(
        ops in proptest::collection::vec((0u8..8, 0u64..300, 1u64..90), 1..80),
    ) {
        const BLOCKS: u64 = 300;
        let mut queue = order(BLOCKS);
        let mut model: BTreeMap<u64, Class> = BTreeMap::new();
        for (op, start, count) in ops {
            let range = BlockRange::new(start, count);
            let inside = start..(start + count).min(BLOCKS);
            match op {
                0..=3 => {
                    let class = Class::ALL[op as usize];
                    queue.insert(class, range);
                    for block in inside {
                        let entry = model.entry(block).or_insert(class);
                        *entry = (*entry).min(class);
                    }
                }
                4 => { queue.remove(range); for block in inside { model.remove(&block); } }
                5 => queue.wrote(range),
                6 => queue.tick(),
                _ => {
                    let next = queue.next(count);
                    prop_assert_eq!(next.is_none(), model.is_empty());
                    if let Some((class, range)) = next {
                        prop_assert!(range.count <= count && range.count > 0);
                        prop_assert_eq!(Some(&class), model.values().min());
                        for block in range.start.0..range.end() {
                            prop_assert_eq!(model.remove(&block), Some(class));
                        }
                    }
                }
            }
            prop_assert_eq!(queue.len(), model.len() as u64);
            for block in (0..BLOCKS).step_by(17) {
                prop_assert_eq!(queue.class_of(BlockIndex(block)), model.get(&block).copied());
            }
        }
    }

    #[test]
    fn prefetch_never_asks_past_the_device_or_without_bound(faults in proptest::collection::vec(0u64..500, 1..60)) {
        let mut prefetch = Prefetch::new(500, 64);
        for block in faults {
            let ranges = prefetch.fault(BlockIndex(block));
            let total: u64 = ranges.iter().map(|r| r.count).sum();
            prop_assert!(total <= 64);
            prop_assert!(ranges.iter().all(|r| r.end() <= 500 && r.count > 0));
        }
    }
}
