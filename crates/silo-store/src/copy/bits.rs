//! A set of blocks that many threads add to at once.

use silo_block::block::{BlockRange, BlockSet};
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) struct Bits {
    words: Box<[AtomicU64]>,
    blocks: u64,
    count: AtomicU64,
}

impl Bits {
    pub(super) fn new(blocks: u64) -> Self {
        let words = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, blocks, count: AtomicU64::new(0) }
    }

    pub(super) fn len(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Words that a range touches, each with the bits of it.
    fn words_of(&self, range: BlockRange) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (mut at, end) = (range.start.0, range.end().min(self.blocks));
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let stop = (at / 64 * 64 + 64).min(end);
            let bits = stop - at;
            let mask = if bits == 64 { u64::MAX } else { ((1 << bits) - 1) << (at % 64) };
            let word = &self.words[(at / 64) as usize];
            at = stop;
            Some((word, mask))
        })
    }

    pub(super) fn insert(&self, range: BlockRange) {
        let mut new = 0;
        for (word, mask) in self.words_of(range) {
            if word.load(Ordering::Relaxed) & mask != mask {
                let before = word.fetch_or(mask, Ordering::Release);
                new += u64::from((mask & !before).count_ones());
            }
        }
        if new > 0 {
            self.count.fetch_add(new, Ordering::Relaxed);
        }
    }

    pub(super) fn contains(&self, block: u64) -> bool {
        let word = self.words.get((block / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (block % 64) & 1 == 1)
    }

    /// Whether a block of the range is in this and not in `less`.
    pub(super) fn any_without(&self, range: BlockRange, less: &Self) -> bool {
        self.words_of(range).zip(less.words_of(range)).any(|((word, mask), (less, _))| {
            word.load(Ordering::Acquire) & mask & !less.load(Ordering::Acquire) != 0
        })
    }

    /// Adds all of `other`.
    pub(super) fn add(&self, other: &Self) {
        let mut new = 0;
        for (word, other) in self.words.iter().zip(&other.words) {
            let bits = other.load(Ordering::Relaxed);
            if bits != 0 {
                let before = word.fetch_or(bits, Ordering::Release);
                new += u64::from((bits & !before).count_ones());
            }
        }
        self.count.fetch_add(new, Ordering::Relaxed);
    }

    pub(super) fn to_set(&self) -> BlockSet {
        let mut set = BlockSet::new(self.blocks);
        for (at, word) in self.words.iter().enumerate() {
            let mut bits = word.load(Ordering::Acquire);
            while bits != 0 {
                let start = bits.trailing_zeros();
                let count = (!(bits >> start)).trailing_zeros();
                set.insert_range(BlockRange::new(
                    at as u64 * 64 + u64::from(start),
                    u64::from(count),
                ));
                bits = if start + count == 64 {
                    0
                } else {
                    bits >> (start + count) << (start + count)
                };
            }
        }
        set
    }

    /// Most blocks of the set in any group of `1 << shift` neighbours.
    pub(super) fn fullest(&self, shift: u32) -> u64 {
        if self.len() == 0 {
            return 0;
        }
        let count = |words: &[AtomicU64]| -> u64 {
            words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
        };
        if shift >= 6 {
            let words = 1usize << (shift - 6).min(40);
            return self.words.chunks(words).map(count).max().unwrap_or(0);
        }
        let (size, mask) = (1 << shift, (1u64 << (1 << shift)) - 1);
        let groups = |word: &AtomicU64| {
            let word = word.load(Ordering::Relaxed);
            (0..64).step_by(size).map(|at| u64::from((word >> at & mask).count_ones())).max()
        };
        self.words.iter().filter_map(groups).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bits_are_a_set_of_blocks(
            blocks in 1u64..400,
            parts in proptest::collection::vec((0u64..420, 1u64..150), 0..12),
            shift in 0u32..9,
        ) {
            let (bits, mut set) = (Bits::new(blocks), BlockSet::new(blocks));
            for (start, count) in parts {
                bits.insert(BlockRange::new(start, count));
                set.insert_range(BlockRange::new(start, count));
                prop_assert_eq!(bits.len(), set.len());
            }
            prop_assert_eq!(&bits.to_set(), &set);
            let fullest = (0..blocks.div_ceil(1 << shift)).map(|group| {
                (group << shift..(group + 1) << shift)
                    .filter(|b| set.contains(silo_block::block::BlockIndex(*b))).count() as u64
            }).max().unwrap_or(0);
            prop_assert_eq!(bits.fullest(shift), fullest);
        }
    }
}
