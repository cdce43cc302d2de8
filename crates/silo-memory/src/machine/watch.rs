//! Several who want to know what was written, over the one tracking that a mapping can have: the
//! move, which asks by [`Device::take_dirty`](silo_block::device::Device::take_dirty), and any number
//! of watchers, such as a backup.
//!
//! The kernel tells of a written page once, to whoever looks first. So every look is told to all:
//!
//! ```text
//!   look ──▶ written pages ──▶ the move's set
//!                          └─▶ each watcher's set
//! ```
//!
//! What must hold: looks come one after another, and a look is over only when everybody has been told;
//! so what was written before somebody asks is in his answer, whoever else has looked before.

use super::{Attached, Memory, Stage, Tracking, sys};
use crate::staging::Tracked;
use silo_block::{
    block::{BLOCK_SIZE, BlockRange, BlockSet},
    device::{Device as _, Result},
};
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

/// How long content that is elsewhere may take to come for a watcher that reads.
const PAGER: Duration = Duration::from_secs(30);
/// Blocks that are asked for at once for a watcher that reads: a guest's fault waits behind no more.
const BROUGHT: u64 = 8;

/// Threads that look for written pages, at most.
const SCAN_THREADS: u64 = 4;
/// Blocks that are worth a thread (512 MiB): starting one costs about what looking at them does.
const SCAN_SHARE: u64 = 128 << 10;

type Seen = Mutex<BlockSet>;

/// Who looks, and who is told.
#[derive(Default)]
pub(super) struct Watchers {
    /// Writes are noted by the kernel: pages were protected since the mapping came.
    pub(super) tracking: bool,
    /// Grows with every mapping: a watcher of an earlier one has missed what happened between.
    stay: u64,
    told: Vec<Weak<Seen>>,
}

impl Watchers {
    /// Another mapping, or none. `tracking`: its pages are protected already.
    pub(super) fn enter(&mut self, tracking: bool) {
        self.tracking = tracking;
        self.stay += 1;
        self.told.clear();
    }

    /// Whether anybody has to be told.
    pub(super) fn any(&self) -> bool {
        self.told.iter().any(|seen| seen.strong_count() > 0)
    }

    fn tell(&mut self, written: &BlockSet) {
        self.told.retain(|seen| match seen.upgrade() {
            Some(seen) => {
                lock(&seen).union_with(written);
                true
            }
            None => false,
        });
    }
}

fn lock(seen: &Seen) -> MutexGuard<'_, BlockSet> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    /// The right to look.
    pub(super) fn watchers(&self) -> MutexGuard<'_, Watchers> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what the monitor wrote since the last look. Looking is the part of a blackout that
    /// grows with the memory (0.6 ms a GiB here), so large memory is looked at by several threads.
    fn scan(&self, attached: &Attached, dirty: &mut BlockSet) -> io::Result<()> {
        let page = BLOCK_SIZE as u64;
        let base = attached.address;
        let look = |blocks: std::ops::Range<u64>| {
            let mut found = Vec::new();
            let (start, end) = (base + blocks.start * page, base + blocks.end * page);
            sys::scan_written(&attached.pagemap, start, end, |start, end| {
                found.push(BlockRange::new((start - base) / page, (end - start) / page));
            })?;
            io::Result::Ok(found)
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        let threads = threads.min(SCAN_THREADS).min(self.blocks / SCAN_SHARE).max(1);
        let share = self.blocks.div_ceil(threads);
        let part = |number: u64| number * share..((number + 1) * share).min(self.blocks);
        std::thread::scope(|scope| {
            let look = &look;
            let others: Vec<_> = (1..threads)
                .map(|number| {
                    // Without a thread the part is looked at here.
                    let spawned = std::thread::Builder::new()
                        .name("scan".into())
                        .spawn_scoped(scope, move || look(part(number)));
                    (number, spawned)
                })
                .collect();
            let mut add = |found: Vec<BlockRange>| {
                found.into_iter().for_each(|range| dirty.insert_range(range));
            };
            let mut result = look(part(0)).map(&mut add);
            for (number, spawned) in others {
                let looked = match spawned {
                    Ok(thread) => thread
                        .join()
                        .unwrap_or_else(|_| Err(io::Error::other("a scanning thread panicked"))),
                    Err(_) => look(part(number)),
                };
                // What one part found is kept even if another failed: it is protected again.
                result = result.and(looked.map(&mut add));
            }
            result
        })
    }

    /// What was written since the last look, whoever looked; the watchers are told. What was found
    /// before an error is told to everybody.
    pub(super) fn look(&self, watchers: &mut Watchers) -> Result<BlockSet> {
        let mut written = BlockSet::new(self.blocks);
        self.beside.take_written(&mut written);
        let scanned = self.with_attached("track", |attached| self.scan(attached, &mut written));
        self.note_own(&written);
        {
            // A block that has not arrived cannot have been written; one that is just arriving can.
            let holes = self.holes();
            let mut absent = holes.missing.clone();
            absent.subtract(&holes.landing);
            written.subtract(&absent);
        }
        watchers.tell(&written);
        match scanned {
            Ok(()) => Ok(written),
            Err(error) => {
                self.put_back(&written);
                Err(error)
            }
        }
    }

    /// Watches what is written from now on, for as long as the machine stays. A move that is tracking
    /// or will be misses nothing by it.
    ///
    /// # Errors
    /// If no monitor is attached, or this kernel cannot track.
    pub fn watch(self: &Arc<Self>) -> Result<Watcher> {
        let mut watchers = self.watchers();
        if watchers.tracking {
            let written = self.look(&mut watchers)?;
            self.put_back(&written);
        } else {
            self.protect()?;
            watchers.tracking = true;
        }
        let seen = Arc::new(Mutex::new(BlockSet::new(self.blocks)));
        watchers.told.push(Arc::downgrade(&seen));
        Ok(Watcher { memory: Arc::clone(self), seen, stay: watchers.stay })
    }

    /// What [`Device::take_dirty`](silo_block::device::Device::take_dirty) would tell, which it still
    /// does: after an arrival, what was written here since then, as long as no move has begun.
    ///
    /// # Errors
    /// If the kernel cannot tell, which loses nothing.
    pub fn dirty(&self) -> Result<BlockSet> {
        let mut watchers = self.watchers();
        let written = self.look(&mut watchers)?;
        let mut returned = self.returned.lock().unwrap_or_else(PoisonError::into_inner);
        returned.union_with(&written);
        Ok(returned.clone())
    }

    /// Protects all pages, so that the next write to each is noted.
    pub(super) fn protect(&self) -> Result<()> {
        self.with_attached("start tracking", |attached| {
            if attached.tracking == Tracking::None {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "writes to memory are not tracked here (the kernel has no WP_ASYNC before Linux \
                     6.7, or tracking was switched off)",
                ));
            }
            let length = self.blocks * BLOCK_SIZE as u64;
            attached.userfault.write_protect(attached.address, length)
        })
    }
}

/// Somebody beside the move who is told what is written. Dropping it ends that.
pub struct Watcher {
    memory: Arc<Memory>,
    seen: Arc<Seen>,
    stay: u64,
}

impl Watcher {
    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Looks, and returns what was written since the last [`Watcher::take`].
    fn seen(&self) -> Result<MutexGuard<'_, BlockSet>> {
        let mut watchers = self.memory.watchers();
        if watchers.stay != self.stay {
            let source = io::Error::new(
                io::ErrorKind::NotConnected,
                "the machine has left since the watching began",
            );
            return Err(self.memory.error("watch", "mapping".into(), source));
        }
        let written = self.memory.look(&mut watchers)?;
        self.memory.put_back(&written);
        Ok(lock(&self.seen))
    }

    /// What was written since the last call, or since the watching began.
    ///
    /// # Errors
    /// If the kernel cannot tell, which loses nothing, or the machine has left.
    pub fn take(&self) -> Result<BlockSet> {
        let mut seen = self.seen()?;
        Ok(std::mem::replace(&mut *seen, BlockSet::new(self.memory.blocks)))
    }

    /// How many blocks the next [`Watcher::take`] would tell of at least.
    ///
    /// # Errors
    /// As [`Watcher::take`].
    pub fn count(&self) -> Result<u64> {
        Ok(self.seen()?.len())
    }
}

impl Tracked for Watcher {
    fn blocks(&self) -> u64 {
        self.memory.blocks
    }

    /// What was told so far is forgotten.
    fn start_tracking(&self) -> io::Result<()> {
        self.take().map(drop).map_err(io::Error::other)
    }

    fn take_written(&self) -> io::Result<BlockSet> {
        self.take().map_err(io::Error::other)
    }

    fn populated(&self) -> io::Result<Option<BlockSet>> {
        if self.memory.missing_blocks() > 0 {
            // What is elsewhere is a hole here.
            return Ok(None);
        }
        self.memory.allocated().map(Some).map_err(io::Error::other)
    }

    fn read_present(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        let missing = self.memory.beside.is(Stage::Armed) && {
            let holes = self.memory.holes();
            holes.missing.intersects(range)
        };
        if missing {
            for piece in range.chunks(BROUGHT) {
                self.memory.bring(piece, PAGER).map_err(io::Error::other)?;
            }
        }
        self.memory.read(range.start, buf).map_err(io::Error::other)
    }
}
