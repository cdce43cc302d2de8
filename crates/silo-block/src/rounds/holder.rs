//! What somebody else has of a device: a peer, a generation in a store, the base.

use super::{Epoch, Rounds};
use crate::block::{BlockRange, BlockSet};

/// A holder has every block whose epoch is at or below its clock, less the exceptions. Each holder
/// is independent of the others: a move and a backup do not disturb each other's dirty sets.
///
/// A round towards a holder, from the side that owns the device:
///
/// ```text
///  let round = rounds.advance(deadline)?;     nobody writes under `round` any more
///  let list = holder.begin(&rounds, round);   all of it is an exception now
///  … send or upload `list` as epoch `round` …
///  holder.settle(&rounds, range, round);      the holder says that it has the range
/// ```
///
/// What is never settled stays an exception, so a failed send or upload, an abort or a crash loses
/// nothing: the next round has it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    clock: Epoch,
    exceptions: BlockSet,
}

impl Holder {
    /// Somebody who has what the device started with: its base, or zeros.
    #[must_use]
    pub fn of_base(blocks: u64) -> Self {
        Self { clock: Epoch::BASE, exceptions: BlockSet::new(blocks) }
    }

    /// Somebody who has nothing.
    #[must_use]
    pub fn of_nothing(blocks: u64) -> Self {
        Self { clock: Epoch::BASE, exceptions: BlockSet::full(blocks) }
    }

    /// Somebody who has all up to `clock` except `exceptions`, by their own word.
    #[must_use]
    pub fn new(clock: Epoch, exceptions: BlockSet) -> Self {
        Self { clock, exceptions }
    }

    /// All up to here is held, less the exceptions.
    #[must_use]
    pub fn clock(&self) -> Epoch {
        self.clock
    }

    /// Blocks that are not held although their epoch is not newer than the clock.
    #[must_use]
    pub fn exceptions(&self) -> &BlockSet {
        &self.exceptions
    }

    /// What this holder lacks now: "dirty towards" it. Exact when nobody writes, else as of some
    /// moment during the call.
    #[must_use]
    pub fn dirty(&self, rounds: &Rounds) -> BlockSet {
        let mut dirty = rounds.newer_than(self.clock);
        dirty.union_with(&self.exceptions);
        dirty
    }

    /// Whether the holder has all blocks of `range` as they are now.
    #[must_use]
    pub fn has(&self, rounds: &Rounds, range: BlockRange) -> bool {
        !self.exceptions.intersects(range) && !rounds.any_newer(range, self.clock)
    }

    /// A round towards this holder: everything that it lacks up to `round`, which
    /// [`Rounds::advance`] has closed. All of it is an exception until it is settled.
    pub fn begin(&mut self, rounds: &Rounds, round: Epoch) -> BlockSet {
        let written = rounds.between(self.clock, round);
        self.exceptions.union_with(&written);
        self.clock = self.clock.max(round);
        self.exceptions.clone()
    }

    /// As [`Holder::begin`], but gives only what was written since the round before: what is to be
    /// told in a dirty list when the rest is still on its way.
    pub fn begin_new(&mut self, rounds: &Rounds, round: Epoch) -> BlockSet {
        let written = rounds.between(self.clock, round);
        self.exceptions.union_with(&written);
        self.clock = self.clock.max(round);
        written
    }

    /// The holder has `range` as it was at `round`, where that is still its newest: a block that
    /// was written since stays an exception.
    pub fn settle(&mut self, rounds: &Rounds, range: BlockRange, round: Epoch) {
        if !rounds.any_newer(range, round) {
            self.exceptions.remove_range(range);
            return;
        }
        for block in range.chunks(1).filter(|block| !rounds.any_newer(*block, round)) {
            self.exceptions.remove_range(block);
        }
    }

    /// The holder does not have `range` after all.
    pub fn put_back(&mut self, range: BlockRange) {
        self.exceptions.insert_range(range);
    }
}
