//! Which blocks are here, for readers and writers that must not take a lock to know.

use silo_block::block::{BlockRange, BlockSet};
use std::sync::atomic::{AtomicU64, Ordering};

/// A bit a block, and how many are absent.
pub(super) struct Here {
    words: Box<[AtomicU64]>,
    blocks: u64,
    absent: AtomicU64,
}

impl Here {
    pub(super) fn new(blocks: u64, absent: &BlockSet) -> Self {
        let words = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(u64::MAX)).collect();
        let here = Self { words, blocks, absent: AtomicU64::new(0) };
        absent.ranges().for_each(|range| here.remove(range));
        here
    }

    /// Whether all blocks of `range` are here. What was stored before they came is seen by whoever
    /// gets a yes.
    pub(super) fn has(&self, range: BlockRange) -> bool {
        if self.absent.load(Ordering::Acquire) == 0 {
            return true;
        }
        parts(range, self.blocks)
            .all(|(word, mask)| self.words[word].load(Ordering::Acquire) & mask == mask)
    }

    /// How many blocks are absent.
    pub(super) fn absent(&self) -> u64 {
        self.absent.load(Ordering::Acquire)
    }

    /// These are here now.
    pub(super) fn insert(&self, range: BlockRange) {
        for (word, mask) in parts(range, self.blocks) {
            let before = self.words[word].fetch_or(mask, Ordering::AcqRel);
            self.absent.fetch_sub(u64::from((mask & !before).count_ones()), Ordering::AcqRel);
        }
    }

    /// These are absent now.
    pub(super) fn remove(&self, range: BlockRange) {
        for (word, mask) in parts(range, self.blocks) {
            // Counted before the bit is gone, so that a count of 0 is never too early.
            self.absent.fetch_add(u64::from(mask.count_ones()), Ordering::AcqRel);
            let before = self.words[word].fetch_and(!mask, Ordering::AcqRel);
            self.absent.fetch_sub(u64::from((mask & !before).count_ones()), Ordering::AcqRel);
        }
    }
}

/// The words of a range, with its bits in them.
fn parts(range: BlockRange, blocks: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = range.end().min(blocks);
    let mut at = range.start.0;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let stop = (at / 64 * 64 + 64).min(end);
        let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
        let word = (at / 64) as usize;
        at = stop;
        Some((word, mask))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bits_and_count_agree_with_a_set(
            blocks in 1u64..300,
            ops in proptest::collection::vec((any::<bool>(), 0u64..300, 1u64..200), 0..40),
        ) {
            let mut absent = BlockSet::new(blocks);
            let here = Here::new(blocks, &absent);
            for (add, start, count) in ops {
                let range = BlockRange::new(start, count);
                if add { here.insert(range); absent.remove_range(range); }
                else { here.remove(range); absent.insert_range(range); }
                prop_assert_eq!(here.absent(), absent.len());
                prop_assert_eq!(here.has(range), absent.ranges_in(range).next().is_none());
            }
        }
    }
}
