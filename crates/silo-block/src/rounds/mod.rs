//! Exact rounds of writes, without a lock on the way of writers.
//!
//! Called by everything that writes to a device (front ends, the pager, a scan of mapped memory)
//! and by everybody who takes rounds from it: moves, backups, peers. What must hold:
//!
//! - each write is in exactly one round: the one whose number its guard says;
//! - when [`Rounds::advance`] returns `e`, all writes of rounds up to `e` are done and their bytes
//!   are seen by the caller; every later write has a newer epoch;
//! - so whoever copies a block *after* `advance` returned `e`, and calls the copy "epoch `e`", may
//!   copy beside writers: a write that the copy missed or tore is in a later round and comes again;
//! - a write that begins after another has ended is never in an earlier round.
//!
//! Cost: two locked instructions a write and one load a block; 4 bytes a block and 4 bytes per
//! 4096 blocks (0.1 % of a device at 4 KiB blocks).

mod gate;
mod holder;
#[cfg(test)]
mod loom_tests;
#[cfg(test)]
mod tests;

pub use holder::Holder;

use crate::block::{BlockIndex, BlockRange, BlockSet};
use gate::{Gate, Word};
use std::{
    cell::Cell,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// The version of a block, or the number of a round. 0 is what the device started with: zeros, or
/// its base. A device that closes a round every second uses them up in 136 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u32);

impl Epoch {
    /// What the device started with.
    pub const BASE: Self = Self(0);

    /// The next one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}

/// Why a round did not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoundError {
    /// Writers of the round are still inside. Nothing is lost: the next call waits for them first.
    #[error(
        "{writers} writes of {round} have not ended in {waited:?}; look at what the device writes to"
    )]
    StillWriting {
        /// The round that does not end.
        round: Epoch,
        /// How many are inside.
        writers: u32,
        /// How long was waited.
        waited: Duration,
    },
    /// All numbers are used.
    #[error("the device has closed 2^32 rounds; copy it to a new device")]
    UsedUp,
}

/// Blocks per entry of the summary.
const SUMMARY: u64 = 4096;

/// Shards of the gate: more than the threads that write at once on common hosts.
const SHARDS: usize = 16;

/// Clock and epochs of a device. Shared by reference between threads.
pub struct Rounds {
    core: Core<AtomicU32>,
    /// The newest round that is known to be idle; held by whoever closes one.
    idle: Mutex<u32>,
}

/// A write under way. The round that it is in does not end before this is dropped: keep it for as
/// long as bytes are being written, and no longer.
#[must_use = "the write is over when the guard is dropped"]
pub struct WriteGuard<'a> {
    rounds: &'a Rounds,
    epoch: u32,
    place: usize,
}

impl WriteGuard<'_> {
    /// The round that the write is in.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        self.rounds.core.gate.leave(self.epoch, self.place);
    }
}

/// A [`WriteGuard`] that keeps its device alive: for writes that end on another thread or later.
#[must_use = "the write is over when the guard is dropped"]
pub struct OwnedWriteGuard {
    rounds: Arc<Rounds>,
    epoch: u32,
    place: usize,
}

impl OwnedWriteGuard {
    /// The round that the write is in.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }
}

impl Drop for OwnedWriteGuard {
    fn drop(&mut self) {
        self.rounds.core.gate.leave(self.epoch, self.place);
    }
}

impl Rounds {
    /// A device of `blocks` blocks, all at [`Epoch::BASE`]; the first round is number 1.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self { core: Core::new(blocks, SHARDS), idle: Mutex::new(0) }
    }

    /// Size of the device in blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.core.blocks()
    }

    /// The round that is open now: what a write that begins now would be in.
    #[must_use]
    pub fn clock(&self) -> Epoch {
        Epoch(self.core.gate.clock())
    }

    /// Begins a write to `range`, which is cut at the end of the device: the blocks have the epoch
    /// of the open round from here on, and the round does not end before the guard is dropped.
    #[inline]
    pub fn write(&self, range: BlockRange) -> WriteGuard<'_> {
        let (epoch, place) = self.core.gate.enter(thread_number());
        self.core.stamp(range, epoch);
        WriteGuard { rounds: self, epoch, place }
    }

    /// As [`Rounds::write`], if `may` says inside the round that the write may be done. If not, the
    /// blocks keep their epochs: whoever stops writers (by what `may` looks at) and then ends the round
    /// finds every write in it, and finds no block newer than that round.
    ///
    /// A look before [`Rounds::write`] would not do: the round can end in between, the block would get an
    /// epoch without a write, and a list of rounds up to the last one would leave it out, for the
    /// sake of a newer round that never comes.
    #[inline]
    pub fn write_if(
        &self,
        range: BlockRange,
        may: impl FnOnce() -> bool,
    ) -> Option<WriteGuard<'_>> {
        let (epoch, place) = self.core.gate.enter(thread_number());
        // From here on the guard leaves the gate, also if `may` panics.
        let guard = WriteGuard { rounds: self, epoch, place };
        may().then(|| {
            self.core.stamp(range, epoch);
            guard
        })
    }

    /// As [`Rounds::write`], with a guard that can be kept anywhere.
    pub fn write_owned(self: &Arc<Self>, range: BlockRange) -> OwnedWriteGuard {
        let (epoch, place) = self.core.gate.enter(thread_number());
        self.core.stamp(range, epoch);
        OwnedWriteGuard { rounds: Arc::clone(self), epoch, place }
    }

    /// Blocks that were found written after the fact, by a scan of mapped memory: they are in the
    /// open round.
    pub fn mark(&self, blocks: &BlockSet) {
        let (epoch, place) = self.core.gate.enter(thread_number());
        blocks.ranges().for_each(|range| self.core.stamp(range, epoch));
        self.core.gate.leave(epoch, place);
    }

    /// Ends the open round and opens the next; waits up to `wait` for writers of the ended one.
    /// Gives the number of the round that ended.
    ///
    /// # Errors
    /// Writers that do not end in time. Then the next call waits for them first, and what they
    /// write is in the round that this call began to close.
    pub fn advance(&self, wait: Duration) -> Result<Epoch, RoundError> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        let mut open = self.core.gate.clock();
        if *idle + 1 != open {
            // An earlier call gave up on its writers. Counts of this round and the next share a
            // place, so they must be gone before the clock moves on.
            *idle = self.drain(open - 1, begun, wait)?;
            open = self.core.gate.clock();
        }
        if open == u32::MAX {
            return Err(RoundError::UsedUp);
        }
        self.core.gate.open(open + 1);
        *idle = self.drain(open, begun, wait)?;
        Ok(Epoch(open))
    }

    /// Waits until nobody writes under `round`.
    fn drain(&self, round: u32, begun: Instant, wait: Duration) -> Result<u32, RoundError> {
        let mut pause = Duration::from_micros(2);
        for turn in 0u32.. {
            let writers = self.core.gate.writers(round);
            if writers == 0 {
                break;
            }
            let waited = begun.elapsed();
            if waited >= wait {
                return Err(RoundError::StillWriting { round: Epoch(round), writers, waited });
            }
            // A write is mostly a copy of a few KiB: look again at once, then let others run, then
            // look ever less often, because a write to a slow file takes as long as it takes.
            match turn {
                0..64 => std::hint::spin_loop(),
                64..96 => std::thread::yield_now(),
                _ => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_micros(500));
                }
            }
        }
        Ok(round)
    }

    /// The newest epoch of a block; [`Epoch::BASE`] past the end.
    #[must_use]
    pub fn epoch(&self, block: BlockIndex) -> Epoch {
        Epoch(self.core.epoch(block))
    }

    /// The blocks whose epoch is newer than `after`: what a holder at that clock does not have.
    /// Costs one look per 4096 blocks where nothing is newer.
    #[must_use]
    pub fn newer_than(&self, after: Epoch) -> BlockSet {
        self.between(after, Epoch(u32::MAX))
    }

    /// The blocks whose epoch is newer than `after` and not newer than `upto`. A block that is being
    /// written again after `upto` is left to the round that this write is in: then hot blocks are
    /// sent once.
    #[must_use]
    pub fn between(&self, after: Epoch, upto: Epoch) -> BlockSet {
        let mut set = BlockSet::new(self.blocks());
        self.core.between(after.0, upto.0, &mut set);
        set
    }

    /// Whether a block of `range` is newer than `after`.
    #[must_use]
    pub fn any_newer(&self, range: BlockRange, after: Epoch) -> bool {
        let end = range.end().min(self.blocks());
        (range.start.0..end).any(|block| self.core.epoch(BlockIndex(block)) > after.0)
    }

    /// What the owner says about blocks that this side does not own: they have exactly this epoch,
    /// older or newer than what was known. Never called beside writers of the same blocks.
    pub fn set(&self, range: BlockRange, epoch: Epoch) {
        self.core.set(range, epoch.0);
    }

    /// The blocks of `range` whose epoch is newer than `to` and not newer than `upto` have not changed
    /// since `to`: they get that epoch. Beside writers: what they stamp is newer, and stays.
    pub fn lower(&self, range: BlockRange, upto: Epoch, to: Epoch) {
        self.core.lower(range, upto.0, to.0);
    }

    /// This side becomes the owner after the owner's rounds up to `last` (or is restored from a
    /// state at that clock): the open round is the next one. Never moves the clock back.
    ///
    /// # Errors
    /// If writers are inside after `wait`, or numbers are used up.
    pub fn continue_after(&self, last: Epoch, wait: Duration) -> Result<Epoch, RoundError> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        let open = self.core.gate.clock();
        if last.0 == u32::MAX {
            return Err(RoundError::UsedUp);
        }
        if open > last.0 {
            return Ok(Epoch(open));
        }
        // The clock may jump by an even number: nobody may be inside under either parity.
        self.drain(open.saturating_sub(1), begun, wait)?;
        self.drain(open, begun, wait)?;
        self.core.gate.open(last.0 + 1);
        *idle = last.0;
        Ok(Epoch(last.0 + 1))
    }

    /// Bytes of memory that this takes.
    #[must_use]
    pub fn memory(&self) -> usize {
        (self.core.epochs.len() + self.core.newest.len()) * 4 + SHARDS * 128
    }
}

impl fmt::Debug for Rounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rounds({} blocks, {} is open:", self.blocks(), self.clock())?;
        for block in 0..self.blocks().min(16) {
            write!(f, " {}", self.epoch(BlockIndex(block)).0)?;
        }
        f.write_str(if self.blocks() > 16 { " …)" } else { ")" })
    }
}

/// A small number for each thread, so that threads use different shards.
fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static NUMBER: Cell<usize> = const { Cell::new(usize::MAX) });
    NUMBER.with(|number| {
        if number.get() == usize::MAX {
            number.set(NEXT.fetch_add(1, Ordering::Relaxed) & (usize::MAX >> 1));
        }
        number.get()
    })
}

/// The part that loom runs too: gate, epochs and summary.
struct Core<W> {
    gate: Gate<W>,
    epochs: Box<[W]>,
    /// Per [`SUMMARY`] blocks: at least the newest epoch among them.
    newest: Box<[W]>,
}

impl<W: Word> Core<W> {
    fn new(blocks: u64, shards: usize) -> Self {
        let zeros = |count: u64| (0..count).map(|_| W::new(0)).collect();
        Self {
            gate: Gate::new(1, shards),
            epochs: zeros(blocks),
            newest: zeros(blocks.div_ceil(SUMMARY)),
        }
    }

    fn blocks(&self) -> u64 {
        self.epochs.len() as u64
    }

    fn epoch(&self, block: BlockIndex) -> u32 {
        self.epochs.get(block.0 as usize).map_or(0, |epoch| epoch.load(Ordering::Relaxed))
    }

    /// Raises epochs to `epoch`. Only inside the gate. A writer of the round before may still be at
    /// work on the same block, so a store would not do: the newer epoch must stay.
    #[inline]
    fn stamp(&self, range: BlockRange, epoch: u32) {
        let end = range.end().min(self.blocks());
        let start = range.start.0.min(end);
        // Summary first, and released by the epoch: who has seen the epoch finds it again.
        self.note(start, end, epoch);
        for word in &self.epochs[start as usize..end as usize] {
            if word.load(Ordering::Relaxed) < epoch {
                word.fetch_max(epoch, Ordering::Release);
            }
        }
    }

    fn set(&self, range: BlockRange, epoch: u32) {
        let end = range.end().min(self.blocks());
        let start = range.start.0.min(end);
        self.note(start, end, epoch);
        for word in &self.epochs[start as usize..end as usize] {
            word.store(epoch, Ordering::Release);
        }
    }

    /// The summary stays as it is: it says "at least".
    fn lower(&self, range: BlockRange, upto: u32, to: u32) {
        let end = range.end().min(self.blocks());
        let start = range.start.0.min(end);
        for word in &self.epochs[start as usize..end as usize] {
            let known = word.load(Ordering::Relaxed);
            if known > to && known <= upto {
                word.replace(known, to, Ordering::Release);
            }
        }
    }

    #[inline]
    fn note(&self, start: u64, end: u64, epoch: u32) {
        if start >= end {
            return;
        }
        let (first, last) = ((start / SUMMARY) as usize, ((end - 1) / SUMMARY) as usize);
        for word in &self.newest[first..=last] {
            if word.load(Ordering::Relaxed) < epoch {
                word.fetch_max(epoch, Ordering::Relaxed);
            }
        }
    }

    fn between(&self, after: u32, upto: u32, into: &mut BlockSet) {
        for (at, newest) in self.newest.iter().enumerate() {
            if newest.load(Ordering::Relaxed) <= after {
                continue;
            }
            let from = at * SUMMARY as usize;
            let to = (from + SUMMARY as usize).min(self.epochs.len());
            for (word, epochs) in self.epochs[from..to].chunks(64).enumerate() {
                let mut bits = 0u64;
                for (bit, epoch) in epochs.iter().enumerate() {
                    let epoch = epoch.load(Ordering::Acquire);
                    bits |= u64::from(epoch > after && epoch <= upto) << bit;
                }
                into.insert_word(from / 64 + word, bits);
            }
        }
    }
}
