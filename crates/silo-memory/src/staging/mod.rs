//! The content of mapped memory at one instant, for a backup: written pages are copied to a staging
//! area in rounds while the writer runs, and only a last small set while it is paused.
//!
//! Tracking by `WP_ASYNC` raises no event, so memory cannot be copied before it is written, and a
//! mapping takes no second userfaultfd; hence rounds. A device group with several memories (and
//! disks that freeze in their own way) calls [`Staging::prepare`] for each, pauses the writer, calls
//! [`Staging::seal`] for each, and lets the writer go on; [`freeze`] does that for memories alone.
//!
//! ```text
//!  prepare: take written → copy → take written → copy … until little is left      writer runs
//!  seal:    take written → copy (at most the limit)                               writer paused
//!  Staged:  read … → release (what it listed is stored) or put back (listed again)
//! ```
//!
//! What must hold:
//! - What a [`Staged`] does not list is equal to the content of the last one that was released.
//! - A round that was not released, for whatever reason, counts as never taken.
//! - Content that is elsewhere is made present by the memory's own pager before it is read; a hole
//!   is never read through a mapping.

#[cfg(test)]
mod tests;
mod tracked;

pub use tracked::Tracked;

use crate::sys;
use silo_block::block::{BLOCK_SIZE, BlockRange, BlockSet, is_zero};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Blocks that are copied at once.
const PART: u64 = 256;
/// Less than this is copied sooner by one thread, bytes.
const WORTH_THREADS: u64 = 16 << 20;

/// How memory is copied for a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagingOptions {
    /// Bytes that are copied while the writer is paused, at most.
    pub last_set: u64,
    /// Rounds are taken until no more than this many bytes were written during one.
    pub enough: u64,
    /// Rounds before a pause, at most.
    pub rounds: u32,
    /// Pauses that may turn out to be too early before a freeze is given up.
    pub pauses: u32,
    /// Threads that copy a large round while the writer runs: somebody may wait for it.
    pub threads: usize,
}

impl Default for StagingOptions {
    fn default() -> Self {
        Self { last_set: 8 << 20, enough: 1 << 20, rounds: 8, pauses: 3, threads: 1 }
    }
}

/// Why memory could not be frozen. In every case nothing is lost: the next freeze lists it again.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// One backup at a time.
    #[error("the memory is frozen already: release or put back the round before")]
    Frozen,
    /// The writer is faster than the copying.
    #[error(
        "the writer dirties memory faster than it can be copied: {left} bytes were left to copy in \
         a pause of at most {limit}; slow the writer down or allow a longer pause"
    )]
    Outpaced {
        /// Bytes that a pause would have had to copy.
        left: u64,
        /// Bytes that it may copy.
        limit: u64,
    },
    /// A call failed.
    #[error("could not {operation} to stage memory: {source}")]
    System {
        /// What was attempted, as a verb.
        operation: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl StagingError {
    fn system(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { operation, source }
    }
}

/// Stops and continues whoever writes to the memory.
pub trait Pauser {
    /// When this returns, nobody writes.
    ///
    /// # Errors
    /// If the writer cannot be paused; it then runs.
    fn pause(&self) -> io::Result<()>;

    /// Lets the writer go on. Called once after each pause that worked, whatever happened in it.
    ///
    /// # Errors
    /// If it cannot.
    fn resume(&self) -> io::Result<()>;
}

/// A memory and its staging area.
pub struct Staging {
    shared: Arc<Shared>,
    options: StagingOptions,
}

struct Shared {
    memory: Arc<dyn Tracked>,
    /// As large as the memory, and a hole except for what a round holds.
    area: File,
    /// Changed since the last round that was released.
    pending: Mutex<Pending>,
}

struct Pending {
    blocks: BlockSet,
    frozen: bool,
}

/// A round that is under way. Dropping it puts it back.
pub struct Prepared {
    round: Option<Round>,
    /// Written since it was copied, or not copied yet.
    left: BlockSet,
    options: StagingOptions,
}

/// The content at one instant of what changed before it. Dropping it puts it back.
pub struct Staged {
    round: Option<Round>,
}

/// What a round holds in the staging area.
struct Round {
    shared: Arc<Shared>,
    staged: BlockSet,
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of a set of all blocks: those that have to be copied, and those that are zeros, as the area is
    /// before a round.
    fn without_holes(&self, all: BlockSet) -> (BlockSet, BlockSet) {
        let none = BlockSet::new(all.device_blocks());
        if all.len() < all.device_blocks() {
            return (all, none);
        }
        match self.memory.populated() {
            Ok(Some(populated)) => {
                let mut holes = all;
                holes.subtract(&populated);
                (populated, holes)
            }
            Ok(None) => (all, none),
            Err(error) => {
                tracing::debug!(%error, "holes are read, too");
                (all, none)
            }
        }
    }

    fn take_written(&self) -> Result<BlockSet, StagingError> {
        self.memory.take_written().map_err(StagingError::system("look for written pages"))
    }

    /// Copies the present content of a few blocks into the staging area; where that is `fresh`, it holds
    /// zeros.
    fn copy(&self, range: BlockRange, fresh: bool, buffer: &mut [u8]) -> Result<(), StagingError> {
        let read = self.memory.read_present(range, buffer);
        read.map_err(StagingError::system("read memory"))?;
        if fresh && is_zero(buffer) {
            return Ok(());
        }
        let written = self.area.write_all_at(buffer, range.start.offset());
        written.map_err(StagingError::system("write the staging area"))
    }

    /// The round is over: its room is given back.
    fn end(&self, staged: &BlockSet, put_back: Option<&BlockSet>) {
        use nix::fcntl::{FallocateFlags, fallocate};
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for range in staged.ranges() {
            let (at, length) = (range.start.offset() as i64, range.bytes() as i64);
            // Old content there would be wrong for the next round, which counts on holes.
            if let Err(error) = fallocate(&self.area, flags, at, length) {
                tracing::error!(%error, "emptying the staging area failed; zeroing it");
                let zeros = vec![0; range.bytes() as usize];
                if let Err(error) = self.area.write_all_at(&zeros, range.start.offset()) {
                    tracing::error!(%error, "zeroing the staging area failed, too");
                }
            }
        }
        let mut pending = self.pending();
        if let Some(blocks) = put_back {
            pending.blocks.union_with(blocks);
        }
        pending.frozen = false;
    }
}

impl Round {
    /// Copies the present content of blocks into the staging area, by this many threads if that is worth
    /// their start.
    fn copy(&mut self, blocks: &BlockSet, threads: usize) -> Result<(), StagingError> {
        let mut parts = Vec::new();
        for range in blocks.ranges().flat_map(|range| range.chunks(PART)) {
            // A hole reads as zeros, too, unless an earlier round of this freeze filled it.
            let fresh = !self.staged.intersects(range);
            self.staged.insert_range(range);
            parts.push((range, fresh));
        }
        let shared = &*self.shared;
        let threads = if blocks.bytes() >= WORTH_THREADS { threads.max(1) } else { 1 };
        let next = AtomicUsize::new(0);
        let work = || -> Result<(), StagingError> {
            let mut buffer = vec![0; PART as usize * BLOCK_SIZE];
            while let Some(&(range, fresh)) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                shared.copy(range, fresh, &mut buffer[..range.bytes() as usize])?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads)
                .filter_map(|_| {
                    thread::Builder::new().name("copy".into()).spawn_scoped(scope, work).ok()
                })
                .collect();
            let mut all = work();
            for other in others {
                all =
                    all.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            all
        })
    }
}

impl Staging {
    /// Starts to track the memory's writes. The first round holds all of it.
    ///
    /// # Errors
    /// If the memory cannot be tracked.
    pub fn new(memory: Arc<dyn Tracked>, options: StagingOptions) -> Result<Self, StagingError> {
        let blocks = memory.blocks();
        let length = blocks.max(1) * BLOCK_SIZE as u64;
        let area = sys::memfd("staging", length).map_err(StagingError::system("make room"))?;
        memory.start_tracking().map_err(StagingError::system("start tracking"))?;
        let pending = Mutex::new(Pending { blocks: BlockSet::full(blocks), frozen: false });
        let shared = Shared { memory, area: File::from(area), pending };
        Ok(Self { shared: Arc::new(shared), options })
    }

    /// Size of the memory in blocks of 4 KiB.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.shared.memory.blocks()
    }

    /// The next round holds all of the memory, whatever was stored before.
    pub fn forget(&self) {
        let blocks = self.shared.memory.blocks();
        self.shared.pending().blocks = BlockSet::full(blocks);
    }

    /// What is stored differs from the memory in `blocks` at most, and in what was written since the
    /// tracking began: the next round holds that, not all of it.
    ///
    /// # Errors
    /// If a round is frozen.
    pub fn know(&self, blocks: BlockSet) -> Result<(), StagingError> {
        let mut pending = self.shared.pending();
        if pending.frozen {
            return Err(StagingError::Frozen);
        }
        pending.blocks = blocks;
        Ok(())
    }

    /// What a round taken now would hold at least.
    ///
    /// # Errors
    /// If the kernel cannot tell what was written.
    pub fn changed(&self) -> Result<BlockSet, StagingError> {
        let written = self.shared.take_written()?;
        let mut pending = self.shared.pending();
        pending.blocks.union_with(&written);
        Ok(pending.blocks.clone())
    }

    /// Copies what changed, in rounds, while the writer runs.
    ///
    /// # Errors
    /// If a round is frozen already, or memory cannot be read.
    pub fn prepare(&self) -> Result<Prepared, StagingError> {
        let left = {
            let mut pending = self.shared.pending();
            if pending.frozen {
                return Err(StagingError::Frozen);
            }
            pending.frozen = true;
            let none = BlockSet::new(pending.blocks.device_blocks());
            std::mem::replace(&mut pending.blocks, none)
        };
        let (left, staged) = self.shared.without_holes(left);
        let round = Some(Round { shared: Arc::clone(&self.shared), staged });
        let mut prepared = Prepared { round, left, options: self.options };
        prepared.again()?;
        Ok(prepared)
    }
}

impl Prepared {
    /// More rounds, after a pause that came too early.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn again(&mut self) -> Result<(), StagingError> {
        let Some(round) = &mut self.round else { return Ok(()) };
        let mut before = u64::MAX;
        for number in 0..self.options.rounds {
            let written = round.shared.take_written()?;
            self.left.union_with(&written);
            let bytes = self.left.bytes();
            // The last set is small, or does not get smaller by trying.
            let settled = bytes <= self.options.last_set && bytes >= before;
            if number > 0 && (bytes <= self.options.enough || settled) {
                break;
            }
            before = bytes;
            let copied = std::mem::replace(&mut self.left, BlockSet::new(written.device_blocks()));
            if let Err(error) = round.copy(&copied, self.options.threads) {
                self.left.union_with(&copied);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Copies what is left; the writer is paused. `Err` gives the round back, to go on with after the
    /// pause.
    pub fn seal(mut self) -> Result<Staged, Box<(Prepared, StagingError)>> {
        let limit = self.options.last_set;
        let result = match &mut self.round {
            None => return Ok(Staged { round: None }),
            Some(round) => round.shared.take_written().and_then(|written| {
                self.left.union_with(&written);
                match self.left.bytes() {
                    left if left > limit => Err(StagingError::Outpaced { left, limit }),
                    _ => round.copy(&self.left, 1),
                }
            }),
        };
        match result {
            Ok(()) => Ok(Staged { round: self.round.take() }),
            Err(error) => Err(Box::new((self, error))),
        }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Some(round) = self.round.take() {
            let mut blocks = round.staged.clone();
            blocks.union_with(&self.left);
            round.shared.end(&round.staged, Some(&blocks));
        }
    }
}

impl Staged {
    /// The blocks that this round holds.
    pub fn changed(&self) -> BlockSet {
        self.round.as_ref().map_or_else(|| BlockSet::new(0), |round| round.staged.clone())
    }

    /// Reads blocks that [`Staged::changed`] lists, as they were at the instant.
    ///
    /// # Errors
    /// If a block is not among them, or reading fails.
    pub fn read(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        match &self.round {
            Some(round) if round.staged.contains_range(range) => {
                round.shared.area.read_exact_at(buf, range.start.offset())
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("blocks {}..{} are not part of this round", range.start.0, range.end()),
            )),
        }
    }

    /// Gives the staging area away: a file with all of the memory as it was at the instant, of which the
    /// round must hold everything ([`Staging::forget`]). The staging it is of makes no further round.
    ///
    /// # Errors
    /// If the round holds a part only, or the file cannot be had.
    pub fn into_area(mut self) -> io::Result<File> {
        let round = self.round.take_if(|round| round.staged.len() == round.staged.device_blocks());
        // Without its end the staging stays frozen, and its area as it is.
        let round = round.ok_or_else(|| io::Error::other("the round holds a part only"))?;
        round.shared.area.try_clone()
    }

    /// What this round holds is stored: the next one lists only what changed after it.
    pub fn release(mut self) {
        if let Some(round) = self.round.take() {
            round.shared.end(&round.staged, None);
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(round) = self.round.take() {
            round.shared.end(&round.staged, Some(&round.staged));
        }
    }
}

/// Freezes several memories at one instant. Returns how long the writer was paused, all pauses
/// together.
///
/// # Errors
/// If a memory cannot be read, the writer cannot be paused, or it is too fast. The writer runs.
pub fn freeze(
    memories: &[&Staging],
    pauser: &dyn Pauser,
) -> Result<(Vec<Staged>, Duration), StagingError> {
    freeze_with(memories, pauser, &mut || Ok(()))
}

/// As [`freeze`], with something more to do at the same instant: `also` is called while the writer is
/// paused, once all memories have what they need, and never twice. It should take no time: disks
/// freeze by pushing a layer.
///
/// # Errors
/// As [`freeze`], or if `also` fails. The writer runs.
pub fn freeze_with(
    memories: &[&Staging],
    pauser: &dyn Pauser,
    also: &mut dyn FnMut() -> io::Result<()>,
) -> Result<(Vec<Staged>, Duration), StagingError> {
    let mut prepared =
        memories.iter().map(|memory| memory.prepare()).collect::<Result<Vec<_>, _>>()?;
    let pauses = memories.iter().map(|memory| memory.options.pauses).max().unwrap_or(1).max(1);
    let mut held = Duration::ZERO;
    let mut last = None;
    for number in 0..pauses {
        if number > 0 {
            prepared.iter_mut().try_for_each(Prepared::again)?;
        }
        // A pause that is sure to be too long is not begun.
        let too_much = prepared.iter().find(|one| one.left.bytes() > one.options.last_set);
        if let Some(one) = too_much {
            let (left, limit) = (one.left.bytes(), one.options.last_set);
            last = Some(StagingError::Outpaced { left, limit });
            continue;
        }
        pauser.pause().map_err(StagingError::system("pause the writer"))?;
        let began = Instant::now();
        let (mut sealed, mut open, mut failure) = (Vec::new(), Vec::new(), None);
        for one in prepared {
            if failure.is_some() {
                open.push(one);
                continue;
            }
            match one.seal() {
                Ok(staged) => sealed.push(staged),
                Err(refused) => {
                    let (one, error) = *refused;
                    open.push(one);
                    failure = Some(error);
                }
            }
        }
        if failure.is_none() {
            failure = also().map_err(StagingError::system("freeze the disks beside")).err();
        }
        held += began.elapsed();
        pauser.resume().map_err(StagingError::system("let the writer go on"))?;
        match failure {
            None => return Ok((sealed, held)),
            Some(error @ StagingError::Outpaced { .. }) => last = Some(error),
            Some(error) => return Err(error),
        }
        // Those that were sealed are opened again: another instant will be taken.
        prepared = sealed.into_iter().zip(memories).map(|(s, m)| s.reopen(m.options)).collect();
        prepared.extend(open);
    }
    Err(last.unwrap_or(StagingError::Frozen))
}

impl Staged {
    fn reopen(mut self, options: StagingOptions) -> Prepared {
        let round = self.round.take();
        let blocks = round.as_ref().map_or(0, |round| round.staged.device_blocks());
        Prepared { round, left: BlockSet::new(blocks), options }
    }
}
