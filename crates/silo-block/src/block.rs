//! Blocks, ranges of blocks and sets of blocks: the units that everything above counts in.

use std::fmt;

/// Bytes in a block. One page of x86-64, and the unit of tracking, of faults and of overlays.
pub const BLOCK_SIZE: usize = 4096;

/// The position of a block in its device: byte offset divided by [`BLOCK_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

impl BlockIndex {
    /// The block that holds byte `offset`.
    #[must_use]
    pub const fn containing(offset: u64) -> Self {
        Self(offset / BLOCK_SIZE as u64)
    }

    /// Where the block starts, in bytes.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.0 * BLOCK_SIZE as u64
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}", self.0)
    }
}

/// A run of neighbouring blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRange {
    /// The first block.
    pub start: BlockIndex,
    /// How many blocks; never 0 in a range that a [`BlockSet`] yields.
    pub count: u64,
}

impl BlockRange {
    /// `count` blocks from `start`.
    #[must_use]
    pub const fn new(start: u64, count: u64) -> Self {
        Self { start: BlockIndex(start), count }
    }

    /// The index after the last block.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start.0 + self.count
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.count * BLOCK_SIZE as u64
    }

    /// The range cut into pieces of at most `max` blocks.
    pub fn chunks(self, max: u64) -> impl Iterator<Item = BlockRange> {
        debug_assert!(max > 0);
        let end = self.end();
        (self.start.0..end).step_by(max as usize).map(move |s| BlockRange::new(s, max.min(end - s)))
    }
}

/// A set of blocks of one device: a dense bitmap (4 GiB of device cost 128 KiB).
#[derive(Clone, PartialEq, Eq)]
pub struct BlockSet {
    words: Vec<u64>,
    blocks: u64,
    count: u64,
}

impl fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockSet({} of {}:", self.count, self.blocks)?;
        for range in self.ranges().take(8) {
            write!(f, " {}+{}", range.start.0, range.count)?;
        }
        f.write_str(if self.ranges().nth(8).is_some() { " …)" } else { ")" })
    }
}

impl BlockSet {
    /// An empty set over a device of `blocks` blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self { words: vec![0; blocks.div_ceil(64) as usize], blocks, count: 0 }
    }

    /// All blocks of a device.
    #[must_use]
    pub fn full(blocks: u64) -> Self {
        let mut set = Self::new(blocks);
        set.insert_range(BlockRange::new(0, blocks));
        set
    }

    /// Size of the device in blocks, not of the set.
    #[must_use]
    pub fn device_blocks(&self) -> u64 {
        self.blocks
    }

    /// How many blocks are in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether no block is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes that the blocks of the set hold.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count * BLOCK_SIZE as u64
    }

    /// Whether `block` is in the set; a block outside the device is not.
    #[must_use]
    pub fn contains(&self, block: BlockIndex) -> bool {
        block.0 < self.blocks && self.words[(block.0 / 64) as usize] >> (block.0 % 64) & 1 == 1
    }

    /// Adds a block; true if it was not in the set. A block outside the device is ignored.
    pub fn insert(&mut self, block: BlockIndex) -> bool {
        if block.0 >= self.blocks {
            return false;
        }
        let word = &mut self.words[(block.0 / 64) as usize];
        let bit = 1 << (block.0 % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.count += u64::from(new);
        new
    }

    /// Removes a block; true if it was in the set.
    pub fn remove(&mut self, block: BlockIndex) -> bool {
        if !self.contains(block) {
            return false;
        }
        self.words[(block.0 / 64) as usize] &= !(1 << (block.0 % 64));
        self.count -= 1;
        true
    }

    /// Adds a range, cut at the end of the device.
    pub fn insert_range(&mut self, range: BlockRange) {
        self.for_words(range, |word, mask| word | mask);
    }

    /// Removes a range.
    pub fn remove_range(&mut self, range: BlockRange) {
        self.for_words(range, |word, mask| word & !mask);
    }

    fn for_words(&mut self, range: BlockRange, op: impl Fn(u64, u64) -> u64) {
        let end = range.end().min(self.blocks);
        let mut at = range.start.0;
        while at < end {
            let stop = (at / 64 * 64 + 64).min(end);
            let bits = stop - at;
            let mask = if bits == 64 { u64::MAX } else { ((1 << bits) - 1) << (at % 64) };
            let word = &mut self.words[(at / 64) as usize];
            let after = op(*word, mask);
            self.count = self.count + u64::from(after.count_ones()) - u64::from(word.count_ones());
            *word = after;
            at = stop;
        }
    }

    /// Adds the blocks whose bits are set in `bits`, which stand for the 64 blocks from `word * 64`.
    pub(crate) fn insert_word(&mut self, word: usize, bits: u64) {
        if bits == 0 || word >= self.words.len() {
            return;
        }
        let left = self.blocks - word as u64 * 64;
        let inside = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
        let before = self.words[word];
        self.words[word] |= bits & inside;
        self.count += u64::from((self.words[word] ^ before).count_ones());
    }

    /// How many blocks of `range` are in the set.
    #[must_use]
    pub fn count_in(&self, range: BlockRange) -> u64 {
        self.parts(range).map(|(word, mask)| u64::from((word & mask).count_ones())).sum()
    }

    /// Whether a block of `range` is in the set.
    #[must_use]
    pub fn intersects(&self, range: BlockRange) -> bool {
        self.parts(range).any(|(word, mask)| word & mask != 0)
    }

    /// Whether all blocks of `range` are in the set; false if it reaches past the device.
    #[must_use]
    pub fn contains_range(&self, range: BlockRange) -> bool {
        range.end() <= self.blocks && self.parts(range).all(|(word, mask)| word & mask == mask)
    }

    /// The blocks of `range` that are in the set, as runs in ascending order.
    pub fn ranges_in(&self, range: BlockRange) -> impl Iterator<Item = BlockRange> + '_ {
        let (mut at, stop) = (range.start.0, range.end().min(self.blocks));
        std::iter::from_fn(move || {
            if at >= stop {
                return None;
            }
            let start = self.find(at, stop, true)?;
            let end = self.find(start, stop, false).unwrap_or(stop);
            at = end;
            Some(BlockRange::new(start, end - start))
        })
    }

    /// The words that `range` touches, each with the mask of the range in it.
    fn parts(&self, range: BlockRange) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (mut at, end) = (range.start.0, range.end().min(self.blocks));
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let stop = (at / 64 * 64 + 64).min(end);
            let bits = stop - at;
            let mask = if bits == 64 { u64::MAX } else { ((1 << bits) - 1) << (at % 64) };
            let word = self.words[(at / 64) as usize];
            at = stop;
            Some((word, mask))
        })
    }

    /// Adds all blocks of `other`, a set over a device of the same size.
    pub fn union_with(&mut self, other: &Self) {
        self.zip(other, |a, b| a | b);
    }

    /// Removes all blocks of `other`.
    pub fn subtract(&mut self, other: &Self) {
        self.zip(other, |a, b| a & !b);
    }

    /// Keeps only the blocks that are in `other` too.
    pub fn intersect_with(&mut self, other: &Self) {
        self.zip(other, |a, b| a & b);
    }

    fn zip(&mut self, other: &Self, op: impl Fn(u64, u64) -> u64) {
        debug_assert_eq!(self.blocks, other.blocks, "sets over devices of different sizes");
        self.count = 0;
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a = op(*a, *b);
            self.count += u64::from(a.count_ones());
        }
    }

    /// The set as runs of neighbouring blocks, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = BlockRange> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.find(at, self.blocks, true)?;
            let end = self.find(start, self.blocks, false).unwrap_or(self.blocks);
            at = end;
            Some(BlockRange::new(start, end - start))
        })
    }

    /// The first range at or after `from`, at most `max` blocks long.
    #[must_use]
    pub fn next_range(&self, from: BlockIndex, max: u64) -> Option<BlockRange> {
        let start = self.find(from.0, self.blocks, true)?;
        let stop = start.saturating_add(max).min(self.blocks);
        let end = self.find(start, stop, false).unwrap_or(stop);
        Some(BlockRange::new(start, end - start))
    }

    /// The first index at or after `from` and before `stop` whose membership is `member`.
    fn find(&self, from: u64, stop: u64, member: bool) -> Option<u64> {
        let mut index = (from / 64) as usize;
        let mut mask = u64::MAX << (from % 64);
        let last = self.words.len().min(stop.div_ceil(64) as usize);
        while index < last {
            let word = if member { self.words[index] } else { !self.words[index] };
            let hit = word & mask;
            if hit != 0 {
                let found = index as u64 * 64 + u64::from(hit.trailing_zeros());
                return (found < stop.min(self.blocks)).then_some(found);
            }
            index += 1;
            mask = u64::MAX;
        }
        None
    }
}

impl Extend<BlockRange> for BlockSet {
    fn extend<T: IntoIterator<Item = BlockRange>>(&mut self, ranges: T) {
        for range in ranges {
            self.insert_range(range);
        }
    }
}

/// Whether all bytes of `data` are zero.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    // Whole words at a time: LLVM turns the inner loop into vector compares.
    data.chunks(256).all(|chunk| chunk.iter().fold(0u8, |acc, byte| acc | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_block_set_behaves_like_a_set_of_integers(
            blocks in 1u64..300,
            ops in proptest::collection::vec((0u8..4, 0u64..320, 1u64..100), 0..40),
        ) {
            let mut set = BlockSet::new(blocks);
            let mut model = BTreeSet::new();
            for (op, start, count) in ops {
                let inside = (start..start + count).filter(|b| *b < blocks);
                match op {
                    0 => { set.insert_range(BlockRange::new(start, count)); model.extend(inside); }
                    1 => { set.remove_range(BlockRange::new(start, count)); for b in inside { model.remove(&b); } }
                    2 => { let new = set.insert(BlockIndex(start)); prop_assert_eq!(new, start < blocks && model.insert(start)); }
                    _ => { let had = set.remove(BlockIndex(start)); prop_assert_eq!(had, model.remove(&start)); }
                }
                prop_assert_eq!(set.len(), model.len() as u64);
            }
            let listed: Vec<u64> = set.ranges().flat_map(|r| r.start.0..r.end()).collect();
            prop_assert_eq!(listed, model.iter().copied().collect::<Vec<_>>());
            for (from, count) in [(0, 64), (63, 2), (10, 200), (64, 64), (299, 5), (0, blocks)] {
                let window = BlockRange::new(from, count);
                let inside: Vec<u64> = (from..from + count).filter(|b| model.contains(b)).collect();
                let found: Vec<u64> = set.ranges_in(window).flat_map(|r| r.start.0..r.end()).collect();
                prop_assert_eq!(set.count_in(window), inside.len() as u64);
                prop_assert_eq!(set.intersects(window), !inside.is_empty());
                prop_assert_eq!(set.contains_range(window), inside.len() as u64 == count);
                prop_assert_eq!(found, inside);
            }
            let mut last = None;
            for range in set.ranges() {
                prop_assert!(range.count > 0);
                prop_assert!(last.is_none_or(|end| end < range.start.0), "ranges are maximal");
                last = Some(range.end());
            }
        }
    }

    #[test]
    fn zero_is_told_from_one_bit_anywhere() {
        let mut page = vec![0u8; BLOCK_SIZE];
        assert!(is_zero(&page));
        for at in [0, 1, 255, 256, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }
}
