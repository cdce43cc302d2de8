//! What is known of every block: where its content is, and sets of blocks that many threads mark.

use crate::block::{BlockIndex, BlockRange, BlockSet};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Where the content of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BlockState {
    /// In the base (zeros where the base ends before it).
    Base = 0,
    /// In the overlay's data file.
    Data = 1,
    /// Nowhere: it is zero, whatever the base says.
    Zero = 2,
    /// Not on this host yet.
    Missing = 3,
}

impl BlockState {
    /// From the byte that files hold; `None` for a value that no version ever wrote.
    pub(crate) const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Base),
            1 => Some(Self::Data),
            2 => Some(Self::Zero),
            3 => Some(Self::Missing),
            _ => None,
        }
    }

    /// As [`BlockState::from_byte`], of a byte that was checked when it came in.
    const fn trusted(byte: u8) -> Self {
        match byte {
            1 => Self::Data,
            2 => Self::Zero,
            3 => Self::Missing,
            _ => Self::Base,
        }
    }
}

/// How far a disk is from being usable on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum DiskStatus {
    /// Everything is here.
    Whole = 0,
    /// Blocks are being stored, the machine has not run here. Which of them are stale is known to
    /// the sender only.
    Receiving = 1,
    /// The machine runs here, some blocks are missing, and the map says which.
    Armed = 2,
}

impl DiskStatus {
    /// From the byte that files hold.
    pub(crate) const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Whole),
            1 => Some(Self::Receiving),
            2 => Some(Self::Armed),
            _ => None,
        }
    }
}

/// The state of every block; readers take no lock.
///
/// Whoever changes a state has made the content that it promises readable first (`Release`), so
/// whoever sees the state may read the content (`Acquire`).
pub(crate) struct StateMap {
    states: Box<[AtomicU8]>,
}

impl StateMap {
    /// From bytes that were all checked by [`BlockState::from_byte`].
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        debug_assert!(bytes.iter().all(|byte| BlockState::from_byte(*byte).is_some()));
        Self { states: bytes.into_iter().map(AtomicU8::new).collect() }
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.states.len() as u64
    }

    pub(crate) fn get(&self, block: u64) -> BlockState {
        BlockState::trusted(self.states[block as usize].load(Ordering::Acquire))
    }

    pub(crate) fn set(&self, range: BlockRange, state: BlockState) {
        for slot in &self.states[range.start.0 as usize..range.end() as usize] {
            slot.store(state as u8, Ordering::Release);
        }
    }

    /// The state of `from` and the end of the run of blocks that share it, at most `limit`.
    pub(crate) fn run(&self, from: u64, limit: u64) -> (BlockState, u64) {
        let state = self.get(from);
        let mut end = from + 1;
        while end < limit && self.get(end) == state {
            end += 1;
        }
        (state, end)
    }

    /// The runs of equal state inside `range`.
    pub(crate) fn runs(
        &self,
        range: BlockRange,
    ) -> impl Iterator<Item = (BlockRange, BlockState)> + '_ {
        let mut at = range.start.0;
        std::iter::from_fn(move || {
            if at >= range.end() {
                return None;
            }
            let (state, end) = self.run(at, range.end());
            let run = BlockRange::new(at, end - at);
            at = end;
            Some((run, state))
        })
    }

    /// Whether any block of `range` has `state`.
    pub(crate) fn any(&self, range: BlockRange, state: BlockState) -> bool {
        self.states[range.start.0 as usize..range.end() as usize]
            .iter()
            .any(|slot| slot.load(Ordering::Acquire) == state as u8)
    }

    /// How many blocks have `state`.
    pub(crate) fn count(&self, state: BlockState) -> u64 {
        let wanted = state as u8;
        self.states.iter().filter(|slot| slot.load(Ordering::Acquire) == wanted).count() as u64
    }

    /// The blocks in one of `wanted`.
    pub(crate) fn select(&self, wanted: &[BlockState]) -> BlockSet {
        let mut set = BlockSet::new(self.blocks());
        for (run, state) in self.runs(BlockRange::new(0, self.blocks())) {
            if wanted.contains(&state) {
                set.insert_range(run);
            }
        }
        set
    }

    /// A copy of all states, for a file.
    pub(crate) fn to_bytes(&self, range: BlockRange) -> Vec<u8> {
        self.states[range.start.0 as usize..range.end() as usize]
            .iter()
            .map(|slot| slot.load(Ordering::Acquire))
            .collect()
    }
}

/// A set of blocks that threads add to without a lock.
///
/// Adding is `Release` and taking is `Acquire`: what a thread wrote before it marked a block is
/// visible to the thread that takes the mark.
pub(crate) struct AtomicBits {
    words: Box<[AtomicU64]>,
    blocks: u64,
}

impl AtomicBits {
    pub(crate) fn new(blocks: u64) -> Self {
        let words = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, blocks }
    }

    pub(crate) fn insert(&self, range: BlockRange) {
        self.for_words(range, |word, mask| {
            word.fetch_or(mask, Ordering::AcqRel);
        });
    }

    /// Adds one block; true if it was not in the set.
    pub(crate) fn insert_one(&self, block: BlockIndex) -> bool {
        let mask = 1 << (block.0 % 64);
        self.words[(block.0 / 64) as usize].fetch_or(mask, Ordering::AcqRel) & mask == 0
    }

    pub(crate) fn insert_set(&self, set: &BlockSet) {
        for range in set.ranges() {
            self.insert(range);
        }
    }

    /// Takes all blocks out.
    pub(crate) fn take(&self) -> BlockSet {
        let mut set = BlockSet::new(self.blocks);
        for (index, word) in self.words.iter().enumerate() {
            // Most words are empty: do not write to their cache lines.
            if word.load(Ordering::Acquire) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::AcqRel);
            let mut at = index as u64 * 64;
            while bits != 0 {
                let skip = bits.trailing_zeros();
                bits >>= skip;
                at += u64::from(skip);
                let run = bits.trailing_ones();
                set.insert_range(BlockRange::new(at, u64::from(run)));
                bits = bits.checked_shr(run).unwrap_or(0);
                at += u64::from(run);
            }
        }
        set
    }

    pub(crate) fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }

    fn for_words(&self, range: BlockRange, op: impl Fn(&AtomicU64, u64)) {
        let end = range.end().min(self.blocks);
        let mut at = range.start.0;
        while at < end {
            let stop = (at / 64 * 64 + 64).min(end);
            let bits = stop - at;
            let mask = if bits == 64 { u64::MAX } else { ((1 << bits) - 1) << (at % 64) };
            op(&self.words[(at / 64) as usize], mask);
            at = stop;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn atomic_bits_give_back_exactly_what_was_put_in(
            blocks in 1u64..400,
            ops in proptest::collection::vec((0u64..400, 1u64..150), 0..30),
        ) {
            let bits = AtomicBits::new(blocks);
            let mut model = BlockSet::new(blocks);
            for (start, count) in ops {
                let range = BlockRange::new(start, count);
                bits.insert(range);
                model.insert_range(range);
            }
            prop_assert_eq!(bits.take(), model);
            prop_assert!(bits.take().is_empty());
        }

        #[test]
        fn runs_of_a_state_map_cover_a_range_once_and_in_order(
            bytes in proptest::collection::vec(0u8..4, 1..200),
        ) {
            let map = StateMap::new(bytes.clone());
            let mut back = Vec::new();
            for (run, state) in map.runs(BlockRange::new(0, bytes.len() as u64)) {
                prop_assert_eq!(run.start.0, back.len() as u64);
                back.extend(std::iter::repeat_n(state as u8, run.count as usize));
            }
            prop_assert_eq!(&back, &bytes);
            let zeros = map.select(&[BlockState::Zero]).len();
            prop_assert_eq!(zeros, map.count(BlockState::Zero));
            prop_assert_eq!(zeros, bytes.iter().filter(|b| **b == 2).count() as u64);
        }
    }
}
