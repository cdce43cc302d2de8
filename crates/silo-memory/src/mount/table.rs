//! What a mount knows of each block. A block is in one of five states:
//!
//! ```text
//!   idle ──want──> requested ──begin──> busy ──landed──> here
//!    ^ <──give_up──────┘                 ^                 │
//!    └────────────claim (a local write of the whole block)─┘ stays here for good
//! ```
//!
//! *Busy* means that somebody is putting the content in place: a fetch that has its data, or a local
//! write of whole blocks. Whoever makes a block busy is the only one to end that, so late data never
//! lands on a local write and a local write never lands on half a fetch.
//!
//! No I/O and no clock. Called under the mount's lock.

use silo_block::block::{BlockIndex, BlockRange, BlockSet};
use std::{collections::BTreeMap, time::Instant};

pub(super) struct Table {
    /// Content is not here: idle, requested or busy.
    absent: BlockSet,
    /// Absent, and nobody brings it.
    idle: BlockSet,
    /// Absent, and being put in place.
    busy: BlockSet,
    /// The last attempt to get it failed for good; asking again clears this.
    failed: BlockSet,
    /// Newer here than in the backend.
    dirty: BlockSet,
    /// Given to the backend since it was last made durable.
    unflushed: BlockSet,
    /// Written here since a capture last asked, where one is interested.
    changed: Option<BlockSet>,
    /// Blocks that mapped accesses wait for, since when.
    waiting: BTreeMap<u64, Instant>,
}

impl Table {
    pub(super) fn new(blocks: u64) -> Self {
        Self {
            absent: BlockSet::full(blocks),
            idle: BlockSet::full(blocks),
            busy: BlockSet::new(blocks),
            failed: BlockSet::new(blocks),
            dirty: BlockSet::new(blocks),
            unflushed: BlockSet::new(blocks),
            changed: None,
            waiting: BTreeMap::new(),
        }
    }

    pub(super) fn blocks(&self) -> u64 {
        self.absent.device_blocks()
    }

    pub(super) fn absent(&self) -> &BlockSet {
        &self.absent
    }

    pub(super) fn idle(&self) -> &BlockSet {
        &self.idle
    }

    pub(super) fn failed(&self) -> &BlockSet {
        &self.failed
    }

    pub(super) fn is_here(&self, range: BlockRange) -> bool {
        !self.absent.intersects(range)
    }

    // ---- getting content

    /// The blocks of `range` that nobody brings yet; the caller does from now on.
    pub(super) fn want(&mut self, range: BlockRange) -> Vec<BlockRange> {
        let wanted: Vec<_> = self.idle.ranges_in(range).collect();
        for piece in &wanted {
            self.idle.remove_range(*piece);
            self.failed.remove_range(*piece);
        }
        wanted
    }

    /// The content of requested blocks could not be had: somebody else may ask for them.
    pub(super) fn give_up(&mut self, range: BlockRange) {
        let absent: Vec<_> = self.absent.ranges_in(range).collect();
        for piece in absent {
            self.idle.insert_range(piece);
            let busy: Vec<_> = self.busy.ranges_in(piece).collect();
            busy.into_iter().for_each(|piece| self.idle.remove_range(piece));
        }
    }

    /// The blocks of `range` that its content may be put into, busy from now on.
    pub(super) fn begin(&mut self, range: BlockRange) -> Vec<BlockRange> {
        let mut open = BlockSet::new(0);
        std::mem::swap(&mut open, &mut self.busy);
        let mut pieces = Vec::new();
        for absent in self.absent.ranges_in(range) {
            let mut at = absent.start.0;
            for busy in open.ranges_in(absent) {
                if busy.start.0 > at {
                    pieces.push(BlockRange::new(at, busy.start.0 - at));
                }
                at = busy.end();
            }
            if absent.end() > at {
                pieces.push(BlockRange::new(at, absent.end() - at));
            }
        }
        for piece in &pieces {
            open.insert_range(*piece);
            self.idle.remove_range(*piece);
        }
        self.busy = open;
        pieces
    }

    /// Busy blocks are in place. Returns since when each was waited for.
    pub(super) fn landed(&mut self, range: BlockRange) -> Vec<Instant> {
        self.busy.remove_range(range);
        self.absent.remove_range(range);
        self.failed.remove_range(range);
        self.take_waits(range).into_iter().map(|(_, since)| since).collect()
    }

    /// Busy blocks could not be put in place.
    pub(super) fn not_landed(&mut self, range: BlockRange) {
        self.busy.remove_range(range);
        self.idle.insert_range(range);
    }

    /// A local write covers these whole blocks: those that are absent become busy and are returned;
    /// the others are here already. `None` if some are busy: wait and try again.
    pub(super) fn claim(&mut self, range: BlockRange) -> Option<Vec<BlockRange>> {
        if self.busy.intersects(range) {
            return None;
        }
        Some(self.begin(range))
    }

    // ---- waiting

    /// A mapped access waits for an absent block.
    pub(super) fn wait(&mut self, block: BlockIndex, now: Instant) {
        self.waiting.entry(block.0).or_insert(now);
    }

    pub(super) fn is_waited_for(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The blocks of `range` that are waited for.
    pub(super) fn waited(&self, range: BlockRange) -> Vec<u64> {
        self.waiting.range(range.start.0..range.end()).map(|(block, _)| *block).collect()
    }

    /// Blocks waited for since before `limit`.
    pub(super) fn overdue(&self, limit: Instant) -> Vec<BlockRange> {
        let late = self.waiting.iter().filter(|(_, since)| **since <= limit);
        late.map(|(block, _)| BlockRange::new(*block, 1)).collect()
    }

    /// Nobody will bring these: they count as failed, and the waits on them end. Returns the blocks
    /// that were waited for.
    pub(super) fn fail(&mut self, range: BlockRange) -> Vec<u64> {
        let absent: Vec<_> = self.absent.ranges_in(range).collect();
        absent.into_iter().for_each(|piece| self.failed.insert_range(piece));
        self.take_waits(range).into_iter().map(|(block, _)| block).collect()
    }

    /// Somebody asks again: earlier failures do not count, also of requests that are still out.
    pub(super) fn forgive(&mut self, range: BlockRange) {
        self.failed.remove_range(range);
    }

    fn take_waits(&mut self, range: BlockRange) -> Vec<(u64, Instant)> {
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let taken: Vec<_> =
            self.waiting.range(range.start.0..range.end()).map(|(b, s)| (*b, *s)).collect();
        for (block, _) in &taken {
            self.waiting.remove(block);
        }
        taken
    }

    // ---- writing

    /// Blocks were written here.
    pub(super) fn written(&mut self, range: BlockRange) {
        self.dirty.insert_range(range);
        if let Some(changed) = &mut self.changed {
            changed.insert_range(range);
        }
    }

    /// A scan found these written, or not mapped: what cannot have been written is left out. A block
    /// that has not landed yet may be mapped already and written.
    pub(super) fn scanned(&mut self, range: BlockRange, mapped: bool) {
        if !self.absent.intersects(range) {
            return self.written(range);
        }
        let mut at = range.start.0;
        let absent: Vec<_> = self.absent.ranges_in(range).collect();
        for hole in absent {
            self.written(BlockRange::new(at, hole.start.0 - at));
            if mapped {
                let busy: Vec<_> = self.busy.ranges_in(hole).collect();
                busy.into_iter().for_each(|piece| self.written(piece));
            }
            at = hole.end();
        }
        self.written(BlockRange::new(at, range.end() - at));
    }

    pub(super) fn dirty(&self) -> &BlockSet {
        &self.dirty
    }

    /// Whether something was written through a mapping into a block that is just being put in place:
    /// a round that is to cover it waits for that.
    pub(super) fn is_dirty_landing(&self) -> bool {
        !self.busy.is_empty() && self.busy.ranges().any(|range| self.dirty.intersects(range))
    }

    /// Whether no content is asked for, on its way, or just being put in place.
    #[cfg(test)]
    pub(super) fn is_at_rest(&self) -> bool {
        self.busy.is_empty() && self.idle == self.absent
    }

    /// Takes what a round of writing back has to write: dirty blocks whose content is here.
    pub(super) fn take_dirty(&mut self) -> BlockSet {
        let mut taken = self.dirty.clone();
        taken.subtract(&self.absent);
        self.dirty.subtract(&taken);
        taken
    }

    /// Blocks were not written back.
    pub(super) fn put_back(&mut self, range: BlockRange) {
        self.dirty.insert_range(range);
    }

    /// The backend took these, and has not made them durable yet.
    pub(super) fn given(&mut self, range: BlockRange) {
        self.unflushed.insert_range(range);
    }

    /// The backend is about to be flushed: what that covers.
    pub(super) fn take_unflushed(&mut self) -> BlockSet {
        let none = BlockSet::new(self.blocks());
        std::mem::replace(&mut self.unflushed, none)
    }

    /// A flush failed: nothing is known about these, so they are written again.
    pub(super) fn flush_failed(&mut self, blocks: &BlockSet) {
        self.dirty.union_with(blocks);
    }

    // ---- capture

    /// Notes writes for a capture from now on, anew.
    pub(super) fn note_changes(&mut self) {
        self.changed = Some(BlockSet::new(self.blocks()));
    }

    /// What was written since [`Table::note_changes`] or the last call.
    pub(super) fn take_changes(&mut self) -> BlockSet {
        let blocks = self.blocks();
        match &mut self.changed {
            Some(changed) => std::mem::replace(changed, BlockSet::new(blocks)),
            None => BlockSet::new(blocks),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, count: u64) -> BlockRange {
        BlockRange::new(start, count)
    }

    #[test]
    fn a_block_is_requested_once_until_it_is_given_up() {
        let mut table = Table::new(100);
        assert_eq!(table.want(range(10, 10)), [range(10, 10)]);
        assert_eq!(table.want(range(5, 20)), [range(5, 5), range(20, 5)]);
        table.give_up(range(10, 10));
        assert_eq!(table.want(range(0, 100)), [range(0, 5), range(10, 10), range(25, 75)]);
    }

    #[test]
    fn late_data_never_lands_on_a_local_write() {
        let mut table = Table::new(100);
        table.want(range(0, 10));
        assert_eq!(table.claim(range(4, 2)), Some(vec![range(4, 2)]));
        assert_eq!(table.begin(range(0, 10)), [range(0, 4), range(6, 4)], "the write is under way");
        assert_eq!(table.claim(range(0, 1)), None, "a fetch is putting it in place");
        table.landed(range(4, 2));
        table.landed(range(0, 4));
        assert_eq!(table.begin(range(0, 6)), [], "all here");
        table.give_up(range(0, 10));
        assert_eq!(table.want(range(0, 10)), [], "busy blocks are not given up by others");
        assert!(table.is_here(range(0, 6)) && !table.is_here(range(6, 1)));
    }

    #[test]
    fn a_scan_counts_what_is_here_and_what_is_just_landing() {
        let mut table = Table::new(100);
        table.want(range(0, 20));
        table.begin(range(0, 10));
        table.landed(range(0, 5));
        table.scanned(range(0, 100), false);
        assert_eq!(table.dirty().ranges().collect::<Vec<_>>(), [range(0, 5)]);
        table.scanned(range(0, 100), true);
        assert_eq!(table.dirty().ranges().collect::<Vec<_>>(), [range(0, 10)]);
        let taken = table.take_dirty();
        assert_eq!(taken.ranges().collect::<Vec<_>>(), [range(0, 5)], "what is here");
        table.landed(range(5, 5));
        assert_eq!(table.take_dirty().ranges().collect::<Vec<_>>(), [range(5, 5)]);
    }

    #[test]
    fn what_a_failed_flush_covered_is_dirty_again() {
        let mut table = Table::new(10);
        table.claim(range(0, 4));
        table.landed(range(0, 4));
        table.written(range(0, 4));
        let taken = table.take_dirty();
        taken.ranges().for_each(|piece| table.given(piece));
        let covered = table.take_unflushed();
        table.flush_failed(&covered);
        assert_eq!(table.take_dirty(), taken);
        assert!(table.take_unflushed().is_empty());
    }

    proptest! {
        /// Whatever happens in whatever order, a block is in exactly one state, and only its owner
        /// takes it out of being busy.
        #[test]
        fn the_states_exclude_each_other(
            steps in proptest::collection::vec((0u8..5, 0u64..40, 1u64..12), 1..200),
        ) {
            let mut table = Table::new(40);
            let mut owned: Vec<BlockRange> = Vec::new();
            let now = Instant::now();
            for (step, start, count) in steps {
                let range = BlockRange::new(start, count.min(40 - start));
                match step {
                    0 => { table.want(range); }
                    1 => table.give_up(range),
                    2 => owned.extend(table.begin(range)),
                    3 => if let Some(pieces) = table.claim(range) { owned.extend(pieces); },
                    _ => if let Some(piece) = owned.pop() {
                        table.wait(piece.start, now);
                        let waits = table.landed(piece);
                        prop_assert_eq!(waits.len(), 1);
                    },
                }
                for block in 0..40 {
                    let at = BlockIndex(block);
                    let held = owned.iter().filter(|r| r.start.0 <= block && block < r.end()).count();
                    prop_assert_eq!(table.busy.contains(at), held == 1, "owned once, or not");
                    prop_assert!(held <= 1);
                    prop_assert!(!table.idle.contains(at) || table.absent.contains(at));
                    prop_assert!(!table.busy.contains(at) || table.absent.contains(at));
                    prop_assert!(!(table.busy.contains(at) && table.idle.contains(at)));
                }
            }
        }
    }
}
