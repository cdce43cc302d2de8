//! What the threads of a mount share: the lock, the device, and the ways to wait.

use super::{
    ahead::Ahead, options::Options, queue::Queue, stats::Stats, table::Table, view::View,
    window::Window,
};
use silo_block::{
    block::{BLOCK_SIZE, BlockRange},
    io::BlockDevice,
};
use std::{
    fs::File,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

/// The life of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Serving.
    Open,
    /// No access waits any more; what was written goes back.
    Closing,
    /// Nothing more reaches the backend.
    Closed,
}

pub(super) struct State {
    pub(super) table: Table,
    pub(super) queue: Queue,
    pub(super) window: Window,
    pub(super) ahead: Ahead,
    pub(super) stats: Stats,
    pub(super) phase: Phase,
    /// Accesses through the library fail instead of waiting.
    pub(super) interrupted: bool,
    /// Fetching threads: all, and those that wait for work.
    pub(super) threads: usize,
    pub(super) resting: usize,
    /// The write-back thread runs.
    pub(super) writing_back: bool,
    /// Blocks that a round of writing back has taken and not written yet.
    pub(super) in_round: u64,
    /// The write-back thread shall not wait for its interval.
    pub(super) hurry: bool,
}

pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) backend: Arc<dyn BlockDevice>,
    pub(super) file: File,
    pub(super) size: u64,
    /// The mapping in this process.
    pub(super) local: Arc<View>,
    /// Mappings in other processes.
    pub(super) foreign: RwLock<Vec<Arc<View>>>,
    state: Mutex<State>,
    /// For fetching threads: there may be work, or the phase changed.
    pub(super) work: Condvar,
    /// For accesses and for closing: something arrived, was written back, failed or ended.
    pub(super) news: Condvar,
    /// For the write-back thread.
    pub(super) round: Condvar,
    /// One round of writing back at a time.
    pub(super) rounds: Mutex<()>,
}

impl Shared {
    pub(super) fn new(
        options: Options,
        backend: Arc<dyn BlockDevice>,
        file: File,
        local: Arc<View>,
        queue: Queue,
    ) -> Self {
        let size = backend.size();
        let blocks = size.div_ceil(BLOCK_SIZE as u64);
        let state = State {
            table: Table::new(blocks),
            queue,
            window: Window::new(options.budget),
            ahead: Ahead::new(blocks),
            stats: Stats::new(),
            phase: Phase::Open,
            interrupted: false,
            threads: 0,
            resting: 0,
            writing_back: false,
            in_round: 0,
            hurry: false,
        };
        Self {
            options,
            backend,
            file,
            size,
            local,
            foreign: RwLock::default(),
            state: Mutex::new(state),
            work: Condvar::new(),
            news: Condvar::new(),
            round: Condvar::new(),
            rounds: Mutex::new(()),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `condition` to be told of, at most `time`.
    pub(super) fn wait_on<'a>(
        condition: &Condvar,
        state: MutexGuard<'a, State>,
        time: Duration,
    ) -> MutexGuard<'a, State> {
        condition.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(super) fn foreign(&self) -> Vec<Arc<View>> {
        self.foreign.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes of `range` that the device has: less than the blocks hold at an odd end.
    pub(super) fn bytes_of(&self, range: BlockRange) -> usize {
        (range.bytes().min(self.size.saturating_sub(range.start.offset()))) as usize
    }

    /// The blocks that bytes touch.
    pub(super) fn touched(offset: u64, length: u64) -> BlockRange {
        let first = offset / BLOCK_SIZE as u64;
        BlockRange::new(first, (offset + length).div_ceil(BLOCK_SIZE as u64) - first)
    }

    /// Maps blocks that are here into every mapping and wakes whoever waits for them.
    pub(super) fn expose(&self, range: BlockRange) -> io::Result<()> {
        self.local.expose(range)?;
        self.foreign().iter().try_for_each(|view| view.expose(range))
    }

    /// Ends the wait of mapped accesses for blocks, with SIGBUS.
    pub(super) fn poison(&self, blocks: &[u64]) {
        let views = || std::iter::once(Arc::clone(&self.local)).chain(self.foreign());
        for view in views() {
            for block in blocks {
                if let Err(error) = view.poison(BlockRange::new(*block, 1)) {
                    tracing::error!(mount = %self.options.name, block, %error, "poisoning failed");
                }
            }
        }
    }

    /// Blocks were touched by somebody that we see: fetches ahead if that is somebody who walks.
    pub(super) fn touched_by_walker(&self, state: &mut State, range: BlockRange) {
        if state.table.idle().is_empty() {
            return;
        }
        let line = (2 * state.window.size()).max(1 << 20);
        let limit = self.options.read_ahead.min(line) / BLOCK_SIZE as u64;
        for piece in state.ahead.touched(range, limit) {
            // In-order background work just ahead does the same.
            let near = state
                .queue
                .cursor()
                .is_some_and(|cursor| (piece.start.0..piece.end() + limit).contains(&cursor));
            if !near && state.table.idle().intersects(piece) {
                state.queue.ahead(piece);
            }
        }
    }

    /// The error of an access that a mount cannot serve any more.
    pub(super) fn closed(&self) -> io::Error {
        let text = format!("mount \"{}\" is closed", self.options.name);
        io::Error::new(io::ErrorKind::NotConnected, text)
    }

    /// The error of an access to blocks that could not be had.
    pub(super) fn unavailable(
        &self,
        state: &State,
        range: BlockRange,
        waited: Duration,
    ) -> io::Error {
        let cause = state.stats.last_error.as_deref().unwrap_or("the backend does not answer");
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!(
                "mount \"{}\": block {} did not come within {:.1} s: {cause}",
                self.options.name,
                range.start.0,
                waited.as_secs_f64()
            ),
        )
    }
}

/// When `wait` from now is over.
pub(super) fn after(wait: Duration) -> Instant {
    let now = Instant::now();
    // A wait that no clock can hold is as good as a year.
    now.checked_add(wait).unwrap_or(now + Duration::from_secs(365 * 24 * 3600))
}
