//! What one side knows of each block of a device, and the rules by which that changes.
//!
//! Used by both ends of a move ([`session`](crate::session)); a device keeps its [`Replica`] for
//! life, whatever role it has. Per block: its newest known epoch ([`Rounds`]), whether the content
//! of that epoch is here, and whether content for it is being stored right now.
//!
//! ```text
//!             list ≥ epoch                     list > epoch
//!        ┌──────────────────────┐         ┌────────────────────┐
//!        ▼                      │         ▼                    │
//!     ABSENT ── offer, taken ─► ARRIVING ── stored, still valid ─► HERE
//!        │                          │ a local write waits        ▲
//!        └── whole-block write here: claimed ── written ─────────┘
//! ```
//!
//! What must hold:
//! - A block is here only with the content of its newest known epoch, or of a write of this side.
//! - Content that was read "as of round `e`" counts for a block whose known epoch is `k` if
//!   `k <= e <= clock`: lists up to `clock` are applied, so none between `k` and `e` has the block,
//!   and the content of `e` is that of `k`. Older content is late, newer content is early: it would
//!   come before its list.
//! - Content never goes over a block that is here, being stored, or being written by this side.
//! - A block that content came for has the epoch that it came as, not the one of its list: the
//!   bytes may hold parts of later writes, and an owner that is set back by a crash asks for
//!   everything that was shared since (see [`History::restart`]).

mod history;

use crate::{
    block::{BlockIndex, BlockRange, BlockSet},
    geometry::Geometry,
    rounds::{Epoch, RoundError, Rounds},
    session::messages::{SessionId, Term},
};
pub use history::History;
use std::{sync::Arc, time::Duration};

/// Which side may make new epochs of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// This side.
    Here,
    /// Another; lists and content come from it.
    Elsewhere,
}

/// What is to be done with content that was offered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Store these parts, then say so with [`Replica::stored`].
    pub store: Vec<BlockRange>,
    /// These parts cannot be taken now, but are needed: ask for them again.
    pub again: Vec<BlockRange>,
    /// How many blocks are not needed: late, doubled, or written here.
    pub late: u64,
}

/// What has to survive a restart of a device, beside its content. The bytes are made by whoever
/// stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who may write.
    pub owner: Owner,
    /// Who owned it when.
    pub history: History,
    /// Lists are applied up to here.
    pub clock: Epoch,
    /// The round that was open.
    pub open: Epoch,
    /// Epochs of blocks, where not [`Epoch::BASE`].
    pub epochs: Vec<(BlockRange, Epoch)>,
    /// Blocks that are not here.
    pub absent: Vec<BlockRange>,
}

/// A device as one side knows it.
#[derive(Debug)]
pub struct Replica {
    geometry: Geometry,
    rounds: Arc<Rounds>,
    owner: Owner,
    history: History,
    /// Lists of the owner are applied up to here; of the own rounds, the last one given away.
    clock: Epoch,
    absent: BlockSet,
    arriving: BlockSet,
    /// Here, but not durably: after a crash they count as absent.
    fresh: BlockSet,
    /// Those of them that a sync under way covers.
    syncing: BlockSet,
    /// Whole blocks that this side writes before their content has come.
    claims: Vec<BlockRange>,
}

impl Replica {
    /// A device that this side owns, all of it here, at [`Epoch::BASE`] (its base, or zeros).
    #[must_use]
    pub fn owned(geometry: Geometry, term: Term) -> Self {
        let mut replica = Self::untouched(geometry);
        replica.owner = Owner::Here;
        replica.history.push(term);
        replica
    }

    /// A device that nobody has used here yet; it has its base, or zeros.
    #[must_use]
    pub fn untouched(geometry: Geometry) -> Self {
        let blocks = geometry.blocks();
        Self {
            geometry,
            rounds: Arc::new(Rounds::new(blocks)),
            owner: Owner::Elsewhere,
            history: History::default(),
            clock: Epoch::BASE,
            absent: BlockSet::new(blocks),
            arriving: BlockSet::new(blocks),
            fresh: BlockSet::new(blocks),
            syncing: BlockSet::new(blocks),
            claims: Vec::new(),
        }
    }

    /// A device from its durable record.
    ///
    /// # Errors
    /// If the record's epochs are used up.
    pub fn restored(geometry: Geometry, record: &Record) -> Result<Self, RoundError> {
        let mut replica = Self::untouched(geometry);
        for (range, epoch) in &record.epochs {
            replica.rounds.set(*range, *epoch);
        }
        let last = Epoch(record.open.0.saturating_sub(1));
        replica.rounds.continue_after(last, Duration::ZERO)?;
        replica.absent.extend(record.absent.iter().copied());
        replica.owner = record.owner;
        replica.history = record.history.clone();
        replica.clock = record.clock;
        Ok(replica)
    }

    /// What is to be noted durably, beside the content. Blocks whose content has come but is not
    /// certainly durable count as absent: a crash may have lost it, and the peer still has it.
    #[must_use]
    pub fn record(&self) -> Record {
        let mut absent = self.absent.clone();
        absent.union_with(&self.fresh);
        absent.union_with(&self.syncing);
        let mut epochs: Vec<(BlockRange, Epoch)> = Vec::new();
        for range in self.rounds.newer_than(Epoch::BASE).ranges() {
            for block in range.chunks(1) {
                let mut epoch = self.rounds.epoch(block.start);
                if absent.contains(block.start) {
                    // Written here before it came: without that, what the peer has is the newest.
                    epoch = epoch.min(self.clock);
                }
                match epochs.last_mut() {
                    Some((last, of)) if *of == epoch && last.end() == block.start.0 => {
                        last.count += 1;
                    }
                    _ => epochs.push((block, epoch)),
                }
            }
        }
        Record {
            owner: self.owner,
            history: self.history.clone(),
            clock: self.clock,
            open: self.rounds.clock(),
            epochs,
            absent: absent.ranges().collect(),
        }
    }

    /// The content of the device is about to be made durable: what is here now will be.
    pub fn sync_begins(&mut self) {
        let blocks = self.geometry.blocks();
        let fresh = std::mem::replace(&mut self.fresh, BlockSet::new(blocks));
        self.syncing.union_with(&fresh);
    }

    /// The sync is over; if it went well, a record made from now on has those blocks.
    pub fn sync_ends(&mut self, well: bool) {
        let blocks = self.geometry.blocks();
        let synced = std::mem::replace(&mut self.syncing, BlockSet::new(blocks));
        if !well {
            self.fresh.union_with(&synced);
        }
    }

    /// Size and blocks.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Clock and epochs, for writers and for whoever takes rounds.
    #[must_use]
    pub fn rounds(&self) -> &Arc<Rounds> {
        &self.rounds
    }

    /// Who may write.
    #[must_use]
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Who owned it when.
    #[must_use]
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Lists are applied up to here; at an owner, the last round that was given away.
    #[must_use]
    pub fn clock(&self) -> Epoch {
        self.clock
    }

    /// The blocks that are not here.
    #[must_use]
    pub fn absent(&self) -> &BlockSet {
        &self.absent
    }

    /// Whether all of `range` is here, so that it can be read.
    #[must_use]
    pub fn is_here(&self, range: BlockRange) -> bool {
        !self.absent.intersects(range)
    }

    /// Nothing is being stored or written any more: what was has ended, or will never be.
    pub fn abandon(&mut self) {
        self.arriving = BlockSet::new(self.geometry.blocks());
        self.claims.clear();
    }

    // ---- as a destination

    /// The owner says who it is and up to where it has counted; this side compares that with what
    /// it has and gives up all that the owner's history does not know. `same_base` says whether
    /// blocks at [`Epoch::BASE`] are the same on both sides. Afterwards [`Replica::clock`] and
    /// [`Replica::absent`] say what is held here.
    pub fn follow(&mut self, history: &History, clock: Epoch, same_base: bool) {
        debug_assert_eq!(self.owner, Owner::Elsewhere, "an owner follows nobody");
        let whole = BlockRange::new(0, self.geometry.blocks());
        let common = self.history.common(self.clock, history, clock);
        if !same_base {
            // Nothing is certain: a block at an old epoch may rest on the base that differs.
            self.rounds.set(whole, Epoch::BASE);
            self.absent.insert_range(whole);
            self.clock = Epoch::BASE;
        } else {
            for range in self.rounds.newer_than(common).ranges() {
                self.rounds.set(range, common);
                self.absent.insert_range(range);
            }
            self.clock = self.clock.min(common);
        }
        self.history = history.clone();
    }

    /// A dirty list of round `epoch`, or a part of it; `last` says that it is complete. Lists that
    /// were applied before change nothing. True if the list counts.
    pub fn apply(&mut self, epoch: Epoch, blocks: &[BlockRange], last: bool) -> bool {
        if self.owner == Owner::Here || epoch <= self.clock {
            return false;
        }
        for range in blocks {
            self.rounds.set(*range, epoch);
            self.absent.insert_range(*range);
        }
        if last {
            self.clock = epoch;
        }
        true
    }

    /// Content of `range` as of round `epoch` is offered, by a peer or a store.
    pub fn offer(&mut self, range: BlockRange, epoch: Epoch) -> Verdict {
        let mut verdict = Verdict::default();
        let inside = range.end() <= self.geometry.blocks();
        let simple = inside
            && epoch <= self.clock
            && self.absent.contains_range(range)
            && !self.arriving.intersects(range)
            && !self.rounds.any_newer(range, epoch)
            && !self.claimed(range);
        if simple {
            self.arriving.insert_range(range);
            verdict.store.push(range);
            return verdict;
        }
        for block in range.chunks(1) {
            match self.judge(block, epoch) {
                Judged::Take => {
                    self.arriving.insert_range(block);
                    extend(&mut verdict.store, block);
                }
                Judged::Again => extend(&mut verdict.again, block),
                Judged::Late => verdict.late += 1,
            }
        }
        verdict
    }

    fn judge(&self, block: BlockRange, epoch: Epoch) -> Judged {
        let known = self.rounds.epoch(block.start);
        let outside = block.end() > self.geometry.blocks();
        if outside || known > epoch || self.claimed(block) {
            return Judged::Late;
        }
        if epoch > self.clock {
            // Its list has not come yet: whether the block is here says nothing.
            return if self.owner == Owner::Here { Judged::Late } else { Judged::Again };
        }
        match (self.absent.contains(block.start), self.arriving.contains(block.start)) {
            (false, _) => Judged::Late,
            (true, false) => Judged::Take,
            // What is being stored now may be older, and two stores of a block must not overlap.
            (true, true) => Judged::Again,
        }
    }

    /// Content that was taken is stored (`Ok`), or could not be. Gives the parts that are here now.
    pub fn stored(&mut self, range: BlockRange, epoch: Epoch, well: bool) -> Vec<BlockRange> {
        self.arriving.remove_range(range);
        if !well {
            return Vec::new();
        }
        if !self.rounds.any_newer(range, epoch) && self.absent.contains_range(range) {
            self.rounds.set(range, epoch);
            self.absent.remove_range(range);
            self.fresh.insert_range(range);
            return vec![range];
        }
        let mut here = Vec::new();
        for block in range.chunks(1) {
            // A newer list came while it was being stored: then it is absent still.
            if !self.rounds.any_newer(block, epoch) && self.absent.remove(block.start) {
                self.rounds.set(block, epoch);
                self.fresh.insert_range(block);
                extend(&mut here, block);
            }
        }
        here
    }

    /// Blocks of `range` have not changed since `since`, although they came as of up to `upto`. Only
    /// what is here counts: its content is that of the newest known epoch.
    pub fn kept(&mut self, range: BlockRange, upto: Epoch, since: Epoch) {
        let mut at = range.start.0;
        let absent: Vec<BlockRange> = self.absent.ranges_in(range).collect();
        for gap in absent.into_iter().chain([BlockRange::new(range.end(), 0)]) {
            if gap.start.0 > at {
                self.rounds.lower(BlockRange::new(at, gap.start.0 - at), upto, since);
            }
            at = gap.end();
        }
    }

    /// Whether content for a block of `range` is being stored now.
    #[must_use]
    pub fn is_arriving(&self, range: BlockRange) -> bool {
        self.arriving.intersects(range)
    }

    /// The owner's last lists are applied and this side owns the device from here on.
    ///
    /// # Errors
    /// If epochs are used up.
    pub fn take_over(&mut self, term: Term, wait: Duration) -> Result<Epoch, RoundError> {
        let first = self.rounds.continue_after(self.clock, wait)?;
        self.history.push(Term { id: term.id, first });
        self.owner = Owner::Here;
        Ok(first)
    }

    /// This side has given the device away after its round `last`.
    pub fn give_away(&mut self, last: Epoch) {
        self.owner = Owner::Elsewhere;
        self.clock = last;
    }

    /// This side, the owner, was restarted from its record without having ended cleanly.
    ///
    /// `written` are the blocks whose bytes may have changed since the record was made: their writes
    /// may have survived although the record does not know them, so they count as written now. A
    /// device that writes in place has to note them before (a write-intent log); else all are.
    /// `shared` is the round that was open when somebody last began to share the device with others,
    /// who may hold writes that are lost here.
    pub fn restarted(&mut self, term: SessionId, shared: Option<Epoch>, written: &BlockSet) {
        if let Some(shared) = shared {
            self.history.restart(term, shared);
        }
        self.rounds.mark(written);
    }

    /// This side has proof that nobody else owns the device, although it was given away: a new term
    /// begins here.
    ///
    /// # Errors
    /// If epochs are used up.
    pub fn reclaim(&mut self, term: Term, wait: Duration) -> Result<Epoch, RoundError> {
        self.take_over(term, wait)
    }

    // ---- as an owner

    /// A write of this side to whole blocks that are not here begins. From now on their content is
    /// not taken from anybody.
    pub fn claim(&mut self, range: BlockRange) {
        self.claims.push(range);
    }

    /// The write that was claimed is over. If it went well, its blocks are here; give their epochs
    /// with [`Rounds::write`] before. Gives the parts that were absent before.
    pub fn written(&mut self, range: BlockRange, well: bool) -> Vec<BlockRange> {
        if let Some(at) = self.claims.iter().position(|claim| *claim == range) {
            self.claims.swap_remove(at);
        }
        if !well {
            return Vec::new();
        }
        let here: Vec<BlockRange> = self.absent.ranges_in(range).collect();
        self.absent.remove_range(range);
        self.fresh.extend(here.iter().copied());
        here
    }

    /// Whether this side is writing to a block of `range` that was absent.
    #[must_use]
    pub fn claimed(&self, range: BlockRange) -> bool {
        let meets = |claim: &BlockRange| claim.start.0 < range.end() && range.start.0 < claim.end();
        self.claims.iter().any(meets)
    }

    /// The newest known epoch of a block.
    #[must_use]
    pub fn epoch(&self, block: BlockIndex) -> Epoch {
        self.rounds.epoch(block)
    }
}

enum Judged {
    Take,
    Again,
    Late,
}

/// Adds a block to runs in ascending order.
fn extend(runs: &mut Vec<BlockRange>, block: BlockRange) {
    match runs.last_mut() {
        Some(last) if last.end() == block.start.0 => last.count += block.count,
        _ => runs.push(block),
    }
}
