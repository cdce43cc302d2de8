//! Writing back: finds what was written here and gives it to the backend, in rounds.
//!
//! Stores through a mapping are found by asking the kernel which pages were written since the last
//! round (nobody was told when they were); writes through the library note themselves. A block is
//! dirty again when writing it back failed, and when a flush of the backend failed that was to cover
//! it.

use super::{
    options::MountError,
    shared::{Phase, Shared, State, after},
};
use silo_block::block::{BLOCK_SIZE, BlockRange, BlockSet, is_zero};
use std::{
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Writes to the backend side by side.
const WRITERS: usize = 16;
/// Shortest interval between rounds; one of nothing would never rest.
const LEAST_INTERVAL: Duration = Duration::from_millis(1);
/// Largest write, in blocks (1 MiB).
const WRITE: u64 = 256;

impl Shared {
    /// Looks for what was written through the mappings.
    pub(super) fn scan(&self) -> io::Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        let blocks = self.size.div_ceil(BLOCK_SIZE as u64);
        let tell = !self.lock().table.absent().is_empty();
        let mut found = Vec::new();
        let mut result = Ok(());
        for view in std::iter::once(Arc::clone(&self.local)).chain(self.foreign()) {
            let scanned = view.scan(blocks, tell, |range, mapped| found.push((range, mapped)));
            result = result.and(scanned);
            if view.is_over() {
                // Nobody can tell any more what its process wrote last: it may have been anything.
                found.push((BlockRange::new(0, blocks), true));
                let mut foreign = self.foreign.write().unwrap_or_else(PoisonError::into_inner);
                foreign.retain(|other| !Arc::ptr_eq(other, &view));
            }
        }
        // What was found is protected again, so it is kept even if a scan failed later.
        let mut state = self.lock();
        found.into_iter().for_each(|(range, mapped)| state.table.scanned(range, mapped));
        result
    }

    /// Gives the backend everything that was written before the call; with `durable` also makes it
    /// durable there.
    ///
    /// # Errors
    /// If a write or the flush failed; what they were to cover is dirty again.
    pub(super) fn write_back(&self, durable: bool) -> io::Result<()> {
        let _round = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lock().phase == Phase::Closed {
            return Err(self.closed());
        }
        self.scan()?;
        let taken = {
            let mut state = self.lock();
            // Who stored there may be here already; putting content in place takes no backend.
            while state.table.is_dirty_landing() {
                state = Self::wait_on(&self.news, state, Duration::from_millis(100));
            }
            let taken = state.table.take_dirty();
            state.in_round = taken.len();
            taken
        };
        let written = self.write_all(&taken);
        self.lock().in_round = 0;
        self.news.notify_all();
        written?;
        if durable { self.flush_backend() } else { Ok(()) }
    }

    fn write_all(&self, taken: &BlockSet) -> io::Result<()> {
        let pieces: Vec<BlockRange> =
            taken.ranges().flat_map(|range| range.chunks(WRITE)).collect();
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let work = || {
            let mut buffer = Vec::new();
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                let closed = self.lock().phase == Phase::Closed;
                let failed = {
                    let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                    if closed && failure.is_none() {
                        // Somebody else may write there by now.
                        *failure = Some(self.closed());
                    }
                    failure.is_some()
                };
                let result =
                    if failed { None } else { Some(self.write_piece(*piece, &mut buffer)) };
                let mut state = self.lock();
                state.in_round = state.in_round.saturating_sub(piece.count);
                match result {
                    Some(Ok(bytes)) => {
                        state.stats.written += bytes;
                        state.table.given(*piece);
                    }
                    None => state.table.put_back(*piece),
                    Some(Err(error)) => {
                        state.table.put_back(*piece);
                        state.stats.error(error.to_string());
                        failure.lock().unwrap_or_else(PoisonError::into_inner).replace(error);
                    }
                }
                drop(state);
                self.news.notify_all();
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..WRITERS.min(pieces.len()) {
                // Those that do not start are not missed: this thread works, too.
                let _ =
                    std::thread::Builder::new().name("mount-back".into()).spawn_scoped(scope, work);
            }
            work();
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn write_piece(&self, piece: BlockRange, buffer: &mut Vec<u8>) -> io::Result<u64> {
        let (offset, length) = (piece.start.offset(), self.bytes_of(piece));
        buffer.resize(length, 0);
        let explain = |what: &str, error: io::Error| {
            let text = format!("{what} {length} bytes at {offset} back: {error}");
            io::Error::new(error.kind(), text)
        };
        self.file.read_exact_at(buffer, offset).map_err(|e| explain("reading for writing", e))?;
        let written = if is_zero(buffer) {
            self.backend.zero(offset, length as u64, false)
        } else {
            self.backend.write_at(offset, buffer)
        };
        written.map_err(|e| explain("writing", e))?;
        Ok(length as u64)
    }

    fn flush_backend(&self) -> io::Result<()> {
        let covered = self.lock().table.take_unflushed();
        let result = self.backend.flush();
        if let Err(error) = &result {
            let mut state = self.lock();
            state.table.flush_failed(&covered);
            state.stats.error(format!("making written blocks durable: {error}"));
        }
        result
    }

    /// The write-back thread: a round at each interval, or at once when writers wait for room.
    pub(super) fn write_back_loop(&self) {
        let mut pause = Duration::ZERO;
        let never = Duration::from_secs(3600);
        loop {
            let began = Instant::now();
            let mut state = self.lock();
            loop {
                if state.phase != Phase::Open {
                    return;
                }
                let interval =
                    self.options.write_back.unwrap_or(never).max(LEAST_INTERVAL).max(pause);
                let wait = if state.hurry { pause } else { interval };
                let left = wait.saturating_sub(began.elapsed());
                if left.is_zero() {
                    break;
                }
                state = Self::wait_on(&self.round, state, left);
            }
            let needed = std::mem::take(&mut state.hurry) || self.options.write_back.is_some();
            drop(state);
            if !needed {
                continue;
            }
            pause = match self.write_back(false) {
                Ok(()) => Duration::ZERO,
                Err(error) => {
                    tracing::warn!(mount = %self.options.name, %error, "write-back failed");
                    Duration::from_millis(200)
                }
            };
        }
    }

    /// Slows a writer down while too much waits for write-back.
    ///
    /// # Errors
    /// If nothing at all was written back for the deadline, or the mount closes.
    pub(super) fn wait_for_room(&self) -> io::Result<()> {
        let limit = self.options.dirty_limit / BLOCK_SIZE as u64;
        let mut state = self.lock();
        let load = |state: &State| state.table.dirty().len() + state.in_round;
        let (mut least, mut deadline) = (u64::MAX, after(self.options.deadline));
        loop {
            let now = load(&state);
            if now <= limit {
                return Ok(());
            }
            if state.phase != Phase::Open || state.interrupted {
                return Err(self.closed());
            }
            if now < least {
                (least, deadline) = (now, after(self.options.deadline));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let cause = state.stats.last_error.as_deref().unwrap_or("no answer");
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!(
                        "mount \"{}\": the backend has taken none of {} bytes to write back: {cause}",
                        self.options.name,
                        now * BLOCK_SIZE as u64
                    ),
                ));
            }
            state.hurry = true;
            self.round.notify_one();
            state = Self::wait_on(&self.news, state, left.min(Duration::from_millis(500)));
        }
    }

    /// Writes everything back and makes it durable, within a time.
    pub(super) fn last_round(self: &Arc<Self>, time: Duration) -> Result<(), MountError> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let shared = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("mount-last".into())
            .spawn(move || sender.send(shared.write_back(true)));
        let result = match spawned {
            Ok(_) => receiver.recv_timeout(time).unwrap_or_else(|_| {
                let text = format!("no end after {:.1} s", time.as_secs_f64());
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            }),
            Err(_) => self.write_back(true),
        };
        result.map_err(|source| self.write_back_error(source))
    }

    pub(super) fn write_back_error(&self, source: io::Error) -> MountError {
        let state = self.lock();
        let left = (state.table.dirty().len() + state.in_round) * BLOCK_SIZE as u64;
        MountError::WriteBack { name: self.options.name.clone(), left, source }
    }
}
