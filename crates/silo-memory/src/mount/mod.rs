//! Mounts: a device that is elsewhere, as memory here.
//!
//! A mount is a mapping of a memfd in this process (and, through the descriptor, in others) whose
//! pages come from a [`BlockDevice`] when they are touched, or before. A *direct* mount fetches what
//! is touched and what a walker will touch next; a *managed* one also pulls everything else in the
//! background. What is written goes back at an interval, at a flush and at the close.
//!
//! ```text
//!  touch ──fault──> fault thread ──here?──> map it
//!                        │ absent                    fetching threads
//!                        └──> queue: demand > first > ahead > bulk ──> backend ──> UFFDIO_COPY
//!  stores <──WP_ASYNC + PAGEMAP_SCAN── write-back thread ──> backend
//! ```
//!
//! | module | says |
//! |---|---|
//! | `table` | the state of each block: who may put content where, what is dirty |
//! | `queue`, `window`, `ahead` | what is fetched next, how much at once, what a walker touches next |
//! | `fetch`, `faults`, `back` | the threads |
//! | `view` | one registered mapping |
//! | `device` | the mount as a [`BlockDevice`] |
//!
//! What must hold:
//! - One request for a block at a time, however many wait for it; all of them go on when it arrives.
//! - Late content never lands on a local write, and nobody reads a page before its content.
//! - A block that was written here is dirty until the backend has it; after a flush, durably.
//! - No access waits longer than the deadline; it then fails with SIGBUS in a mapping and with an
//!   error in the library. Closing ends all waits at once.

mod ahead;
mod back;
mod device;
mod faults;
mod fetch;
mod options;
mod queue;
mod shared;
mod stats;
mod table;
#[cfg(test)]
mod tests;
mod view;
mod window;

pub use options::{MountError, Options, Order, PullFirst};
pub use stats::Status;
pub use view::Foreign;

use crate::sys::{self, SharedMap};
use queue::{Bulk, PIECE, Queue};
use shared::{Phase, Shared, after};
use silo_block::{
    block::{BLOCK_SIZE, BlockRange},
    io::BlockDevice,
    times::Histogram,
};
use std::{
    fs::File,
    io,
    ops::Range,
    ptr::NonNull,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};
use view::View;

/// How long closing waits for requests that are on their way.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// A device that is mapped here. Dropping it closes it, with a log line if that fails.
///
/// The mapping lives as long as this value: whoever uses [`Mount::address`] keeps it alive.
pub struct Mount {
    shared: Arc<Shared>,
    map: Option<SharedMap>,
    len: usize,
    threads: Mutex<Vec<Thread>>,
}

/// A fault thread with its view, or the write-back thread.
type Thread = (Option<Arc<View>>, JoinHandle<()>);

impl Mount {
    /// Mounts a device; only what is touched, and what walkers will touch, is fetched.
    ///
    /// # Errors
    /// If the kernel cannot do it, or what was to come first did not.
    pub fn direct(backend: Arc<dyn BlockDevice>, options: Options) -> Result<Self, MountError> {
        Self::open(backend, options, false)
    }

    /// Mounts a device and pulls all of it in the background.
    ///
    /// # Errors
    /// As [`Mount::direct`].
    pub fn managed(backend: Arc<dyn BlockDevice>, options: Options) -> Result<Self, MountError> {
        Self::open(backend, options, true)
    }

    fn open(
        backend: Arc<dyn BlockDevice>,
        mut options: Options,
        managed: bool,
    ) -> Result<Self, MountError> {
        let system = |operation| move |source| MountError::System { operation, source };
        let faults = faults::prepare().map_err(system("start the fault thread"))?;
        options.read_only |= backend.is_read_only();
        let blocks = backend.size().div_ceil(BLOCK_SIZE as u64);
        // An empty device still is a mapping.
        let len = blocks.max(1) * BLOCK_SIZE as u64;
        let fd = sys::memfd(options.name.as_str(), len).map_err(system("make a memfd"))?;
        let file = File::from(fd);
        let too_large = |_| system("map so much")(io::Error::from(io::ErrorKind::OutOfMemory));
        let length = usize::try_from(len).map_err(too_large)?;
        let map =
            SharedMap::new(&file, length, !options.read_only).map_err(system("map the memfd"))?;
        map.keep_to_ourselves().map_err(system("keep the mapping out of child processes"))?;
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")
            .map_err(system("open /dev/userfaultfd"))?;
        let userfaultfd = sys::new_userfaultfd(&device).map_err(system("make a userfaultfd"))?;
        let address = map.base().as_ptr() as u64;
        let (pid, writable) = (std::process::id(), !options.read_only);
        let local = Arc::new(View::new(userfaultfd, pid, address, len, writable)?);
        let pieces = order(&options, blocks);
        let first = first(&options, blocks, pieces.as_deref());
        let bulk = match pieces {
            _ if !managed => Bulk::Off,
            None => Bulk::InOrder(0),
            Some(pieces) => Bulk::Listed(pieces, 0),
        };
        let shared = Shared::new(options, backend, file, Arc::clone(&local), Queue::new(bulk));
        let shared = Arc::new(shared);
        let mount = Self { shared, map: Some(map), len: length, threads: Mutex::default() };
        let shared = &mount.shared;
        let faults = faults.begin(shared, &local);
        mount.threads().push((Some(local), faults));
        if !shared.options.read_only {
            shared.lock().writing_back = true;
            let back = Arc::clone(shared);
            let thread = std::thread::Builder::new()
                .name("mount-back".into())
                .spawn(move || {
                    back.write_back_loop();
                    back.lock().writing_back = false;
                    back.news.notify_all();
                })
                .inspect_err(|_| shared.lock().writing_back = false)
                .map_err(system("start the write-back thread"))?;
            mount.threads().push((None, thread));
        }
        shared.start_fetching();
        mount.pull_blocks(&first);
        mount.wait_for(&first)?;
        Ok(mount)
    }

    fn threads(&self) -> std::sync::MutexGuard<'_, Vec<Thread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where byte 0 of the device is in this process. Reading through it may wait for the backend,
    /// and raises SIGBUS where content cannot be had within the deadline; writing is possible unless
    /// the mount is read-only. The rest of the last page is not part of the device.
    pub fn address(&self) -> NonNull<u8> {
        self.map.as_ref().map_or(NonNull::dangling(), SharedMap::base)
    }

    /// Length of the mapping in bytes: the device's size, in whole pages, at least one.
    pub fn mapped_len(&self) -> usize {
        self.len
    }

    /// The memfd, for another process to map (shared, from offset 0, [`Mount::mapped_len`] bytes) and
    /// to hand back a userfaultfd for, by [`Mount::attach`], before it touches anything.
    pub fn file(&self) -> &File {
        &self.shared.file
    }

    /// Serves the faults of a mapping in another process, too, and sees what it writes: when the
    /// process has ended, by writing back all that is here. What it unmaps before it ends, it has to
    /// have [`Mount::sync`]ed.
    ///
    /// # Errors
    /// If the mapping cannot be registered.
    pub fn attach(&self, mapping: Foreign) -> Result<(), MountError> {
        let system = |operation| move |source| MountError::System { operation, source };
        let writable = !self.shared.options.read_only;
        let faults = faults::prepare().map_err(system("start the fault thread"))?;
        let Foreign { userfaultfd, pid, address } = mapping;
        let view = Arc::new(View::new(userfaultfd, pid, address, self.len as u64, writable)?);
        // Pages count as written when they are not protected, also those that are not mapped.
        view.protect(BlockRange::new(0, (self.len / BLOCK_SIZE) as u64))
            .map_err(system("protect the mapping"))?;
        self.shared.foreign.write().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&view));
        let thread = faults.begin(&self.shared, &view);
        self.threads().push((Some(view), thread));
        Ok(())
    }

    /// Fetches these bytes before the rest.
    pub fn pull(&self, bytes: Range<u64>) {
        let end = bytes.end.min(self.shared.size);
        let range = Shared::touched(bytes.start.min(end), end - bytes.start.min(end));
        self.pull_blocks(&[range]);
    }

    fn pull_blocks(&self, ranges: &[BlockRange]) {
        let mut state = self.shared.lock();
        ranges.iter().for_each(|range| state.queue.first(*range));
        self.shared.stir(&mut state);
    }

    /// Waits until blocks are here, as long as more of them come within each deadline.
    fn wait_for(&self, ranges: &[BlockRange]) -> Result<(), MountError> {
        let mut state = self.shared.lock();
        let mut least = u64::MAX;
        let mut deadline = after(self.shared.options.deadline);
        loop {
            let left: u64 = ranges.iter().map(|range| state.table.absent().count_in(*range)).sum();
            if left == 0 {
                return Ok(());
            }
            if left < least {
                (least, deadline) = (left, after(self.shared.options.deadline));
            }
            let time = deadline.saturating_duration_since(Instant::now());
            if time.is_zero() {
                let cause = state.stats.last_error.clone();
                let cause = cause.unwrap_or_else(|| "the backend does not answer".into());
                return Err(MountError::PullFirst {
                    name: self.shared.options.name.clone(),
                    left: left * BLOCK_SIZE as u64,
                    source: io::Error::new(io::ErrorKind::TimedOut, cause),
                });
            }
            state = Shared::wait_on(&self.shared.news, state, time);
        }
    }

    /// Waits until everything is here; false if that takes longer.
    pub fn wait_complete(&self, time: Duration) -> bool {
        let deadline = after(time);
        let mut state = self.shared.lock();
        while !state.table.absent().is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.phase != Phase::Open {
                return false;
            }
            state = Shared::wait_on(&self.shared.news, state, left);
        }
        true
    }

    /// Everything written before the call is durable in the backend when this returns.
    ///
    /// # Errors
    /// If that failed; nothing is lost, and a later flush tries again.
    pub fn sync(&self) -> Result<(), MountError> {
        self.flush().map_err(|source| self.shared.write_back_error(source))
    }

    /// Looks for stores through the mappings now, as each round of writing back does, so that
    /// [`Status::dirty_bytes`] counts them.
    ///
    /// # Errors
    /// If the kernel cannot tell.
    pub fn look(&self) -> io::Result<()> {
        self.shared.scan()
    }

    pub(crate) fn block_count(&self) -> u64 {
        self.shared.lock().table.blocks()
    }

    /// Notes writes for a capture, anew.
    pub(crate) fn note_changes(&self) -> io::Result<()> {
        self.shared.scan()?;
        self.shared.lock().table.note_changes();
        Ok(())
    }

    /// What was written since [`Mount::note_changes`] or the last call.
    pub(crate) fn take_changes(&self) -> io::Result<silo_block::block::BlockSet> {
        self.shared.scan()?;
        Ok(self.shared.lock().table.take_changes())
    }

    /// Reads whole blocks; past the end of the device they are zero.
    pub(crate) fn read_blocks(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        self.shared.need(range)?;
        self.shared.file.read_exact_at(buf, range.start.offset())
    }

    /// The state in numbers.
    pub fn status(&self) -> Status {
        let state = self.shared.lock();
        let block = BLOCK_SIZE as u64;
        let absent: u64 = match state.table.absent().len() {
            0 => 0,
            count => {
                // The last block may be short.
                let last = BlockRange::new(state.table.blocks() - 1, 1);
                let short = block - self.shared.bytes_of(last) as u64;
                count * block - if state.table.is_here(last) { 0 } else { short }
            }
        };
        let mut status = Status {
            bytes: self.shared.size,
            here_bytes: self.shared.size - absent,
            dirty_bytes: (state.table.dirty().len() + state.in_round) * block,
            failed_bytes: state.table.failed().bytes(),
            window_bytes: state.window.size(),
            round_trip_us: stats::micros(state.window.round_trip()),
            rate: state.window.rate() as u64,
            ..Status::default()
        };
        state.stats.fill(&mut status);
        status
    }

    /// How long mapped accesses waited for their content, each that did.
    #[must_use]
    pub fn waits(&self) -> Histogram {
        self.shared.lock().stats.waits()
    }

    /// Ends all waits, writes back what was written here, makes it durable, and lets go of the
    /// backend. Content that is here can be read through the mapping until the mount is dropped;
    /// touching anything else raises SIGBUS; what is written from now on is lost.
    ///
    /// # Errors
    /// If what was written could not be made durable in time. The mount is closed all the same.
    pub fn close(&self) -> Result<(), MountError> {
        let shared = &self.shared;
        let (waiting, absent) = {
            let mut state = shared.lock();
            if state.phase != Phase::Open {
                return Ok(());
            }
            state.phase = Phase::Closing;
            let all = BlockRange::new(0, state.table.blocks());
            (state.table.fail(all), state.table.absent().clone())
        };
        for condition in [&shared.work, &shared.news, &shared.round] {
            condition.notify_all();
        }
        shared.poison(&waiting);
        // Nobody will be here to serve the faults of other processes.
        for view in shared.foreign() {
            for range in absent.ranges() {
                if let Err(error) = view.poison(range) {
                    tracing::error!(mount = %shared.options.name, %error, "poisoning failed");
                }
            }
        }
        let result = if shared.options.read_only {
            Ok(())
        } else {
            shared.last_round(shared.options.close_deadline)
        };
        shared.lock().phase = Phase::Closed;
        // Whoever pauses or waits for room sees that there is no more.
        [&shared.work, &shared.news, &shared.round].into_iter().for_each(Condvar::notify_all);
        if !self.requests_ended() {
            // Only now: what was written had to get through.
            shared.backend.interrupt();
            if !self.requests_ended() {
                tracing::warn!(mount = %shared.options.name, "the backend holds a request for good");
            }
        }
        result
    }

    /// Whether no thread of this mount waits for the backend, soon.
    fn requests_ended(&self) -> bool {
        let deadline = after(LAST_ANSWERS);
        let mut state = self.shared.lock();
        while state.threads > 0 || state.writing_back {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = Shared::wait_on(&self.shared.news, state, left);
        }
        true
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!("{error}");
        }
        // First the mapping, then who serves its faults: a page must never read as zero for want of
        // somebody who knows better.
        self.shared.local.retire();
        self.map.take();
        // A write that the backend holds for good ends there, not here.
        let writes = self.shared.lock().writing_back;
        for (view, thread) in self.threads().drain(..) {
            let ends = view.map_or(!writes, |view| view.stop.write(1).is_ok());
            if ends && thread.join().is_err() {
                tracing::error!(mount = %self.shared.options.name, "a thread of the mount panicked");
            }
        }
    }
}

impl std::fmt::Debug for Mount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mount").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

/// The pieces of a device in the order in which to pull them, if one is given.
fn order(options: &Options, blocks: u64) -> Option<Vec<u32>> {
    let order = options.order.as_ref()?;
    let count = u32::try_from(blocks.div_ceil(PIECE)).unwrap_or(u32::MAX);
    let mut pieces: Vec<u32> = (0..count).collect();
    let offset = |piece: u32| u64::from(piece) * PIECE * BLOCK_SIZE as u64;
    pieces.sort_by_cached_key(|piece| std::cmp::Reverse(order(offset(*piece))));
    Some(pieces)
}

/// What has to be here first.
fn first(options: &Options, blocks: u64, pieces: Option<&[u32]>) -> Vec<BlockRange> {
    let cut = |range: BlockRange| {
        let start = range.start.0.min(blocks);
        BlockRange::new(start, range.end().min(blocks) - start)
    };
    let block = BLOCK_SIZE as u64;
    match &options.pull_first {
        PullFirst::Nothing => Vec::new(),
        PullFirst::Ranges(ranges) => ranges
            .iter()
            .filter(|range| range.start < range.end)
            .map(|range| {
                cut(BlockRange::new(
                    range.start / block,
                    range.end.div_ceil(block) - range.start / block,
                ))
            })
            .collect(),
        PullFirst::Bytes(bytes) => match pieces {
            None => vec![cut(BlockRange::new(0, bytes.div_ceil(block)))],
            Some(pieces) => {
                let count = bytes.div_ceil(PIECE * block) as usize;
                let pieces = pieces.iter().take(count);
                pieces.map(|piece| cut(BlockRange::new(u64::from(*piece) * PIECE, PIECE))).collect()
            }
        },
    }
}
