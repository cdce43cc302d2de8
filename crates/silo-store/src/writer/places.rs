//! Where the writer knows each block of a device to be: 8 bytes a block, in leaves that are only
//! there once something is stored in them.

use crate::format::{
    map::LEAF_BLOCKS,
    runs::{Collector, Content, Run},
};
use silo_block::{
    block::{BlockRange, BlockSet},
    geometry::Geometry,
};
use std::ops::Range;

/// A content as one word: 0, or the pack's number + 1 in the upper half and the slot in the lower.
pub(crate) fn to_word(content: Content) -> u64 {
    match content {
        Content::Zero => 0,
        Content::At { pack, slot } => (u64::from(pack) + 1) << 32 | u64::from(slot),
    }
}

pub(crate) fn from_word(word: u64) -> Content {
    match word >> 32 {
        0 => Content::Zero,
        pack => Content::At { pack: (pack - 1) as u32, slot: word as u32 },
    }
}

/// The same content `by` blocks further on.
fn advance(content: Content, by: u64) -> Content {
    match content {
        Content::Zero => Content::Zero,
        Content::At { pack, slot } => Content::At { pack, slot: slot + by as u32 },
    }
}

/// One device's blocks.
pub(crate) struct Places {
    geometry: Geometry,
    leaves: Vec<Option<Box<[u64]>>>,
    /// Blocks that differ from the map that was written last.
    pub(crate) differs: BlockSet,
}

impl Places {
    pub(crate) fn new(geometry: Geometry) -> Self {
        let leaves = geometry.blocks().div_ceil(LEAF_BLOCKS) as usize;
        Self {
            geometry,
            leaves: (0..leaves).map(|_| None).collect(),
            differs: BlockSet::new(geometry.blocks()),
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(crate) fn get(&self, block: u64) -> Content {
        let leaf = self.leaves.get((block / LEAF_BLOCKS) as usize).and_then(Option::as_ref);
        leaf.map_or(Content::Zero, |leaf| from_word(leaf[(block % LEAF_BLOCKS) as usize]))
    }

    fn put(&mut self, block: u64, content: Content) {
        let leaf = &mut self.leaves[(block / LEAF_BLOCKS) as usize];
        if leaf.is_none() && content == Content::Zero {
            return;
        }
        let leaf = leaf.get_or_insert_with(|| vec![0; LEAF_BLOCKS as usize].into_boxed_slice());
        leaf[(block % LEAF_BLOCKS) as usize] = to_word(content);
    }

    /// Takes runs as what the last map says.
    pub(crate) fn load(&mut self, run: &Run) {
        for by in 0..run.count {
            self.put(run.start + by, advance(run.content, by));
        }
    }

    /// Takes runs as a change; gives what was there, to take it back.
    pub(crate) fn apply(&mut self, runs: &[Run]) -> Vec<Run> {
        let mut before = Collector::default();
        for run in runs {
            for block in run.start..run.end() {
                before.push(block, self.get(block));
                self.put(block, advance(run.content, block - run.start));
            }
            self.differs.insert_range(BlockRange::new(run.start, run.count));
        }
        before.runs
    }

    /// Runs of the blocks in `blocks`, zeros left out unless asked for.
    pub(crate) fn runs(&self, blocks: Range<u64>, with_zeros: bool) -> Vec<Run> {
        let mut collector = Collector::default();
        for block in blocks {
            let content = self.get(block);
            if with_zeros || content != Content::Zero {
                collector.push(block, content);
            }
        }
        collector.runs
    }

    /// Runs of what differs from the map.
    pub(crate) fn difference(&self) -> Vec<Run> {
        let mut collector = Collector::default();
        for range in self.differs.ranges() {
            for block in range.start.0..range.end() {
                collector.push(block, self.get(block));
            }
        }
        collector.runs
    }

    /// The range of each leaf, and whether it holds anything.
    pub(crate) fn leaf_ranges(&self) -> impl Iterator<Item = (Range<u64>, bool)> + '_ {
        let blocks = self.geometry.blocks();
        self.leaves.iter().enumerate().map(move |(number, leaf)| {
            let start = number as u64 * LEAF_BLOCKS;
            (start..(start + LEAF_BLOCKS).min(blocks), leaf.is_some())
        })
    }

    /// Calls `each` with the pack of every block that is in one.
    pub(crate) fn for_packs(&self, mut each: impl FnMut(u32)) {
        for word in self.leaves.iter().flatten().flat_map(|leaf| leaf.iter()) {
            if let Content::At { pack, .. } = from_word(*word) {
                each(pack);
            }
        }
    }

    /// The device has another size now. Returns false if its blocks have another size.
    pub(crate) fn resize(&mut self, geometry: Geometry) -> bool {
        if geometry.block() != self.geometry.block() {
            return false;
        }
        if geometry.bytes() == self.geometry.bytes() {
            return true;
        }
        let mut next = Self::new(geometry);
        for block in 0..geometry.blocks().min(self.geometry.blocks()) {
            next.put(block, self.get(block));
        }
        next.differs.insert_range(BlockRange::new(0, geometry.blocks()));
        *self = next;
        true
    }

    /// Bytes of memory that this takes.
    pub(crate) fn memory(&self) -> usize {
        self.leaves.iter().flatten().count() * LEAF_BLOCKS as usize * 8
    }
}
