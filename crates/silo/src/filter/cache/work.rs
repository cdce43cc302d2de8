//! The regions of a cache, and the threads that write them back.

use super::{
    CacheOptions, CacheStatus, REGION, nothing_done,
    pieces::{Content, Piece, Pieces},
    pool::Pool,
    until,
};
use crate::{io::BlockDevice, range::same_error};
use std::{
    collections::{BTreeSet, HashMap},
    io,
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Waits between tries of a region that fails.
const FIRST_RETRY: Duration = Duration::from_millis(10);
const LAST_RETRY: Duration = Duration::from_secs(1);
/// A region with more runs than this is written as one span, with what lies between read first.
const MOST_RUNS: usize = 4;

#[derive(Default)]
struct Region {
    pieces: Pieces,
    /// The oldest write that is not behind, the key in `waiting` or `writing`. It stays when newer
    /// pieces cover that write: a flush that came before them waits for what replaced it.
    key: u64,
    /// The first write that came while the region is being written.
    next_key: Option<u64>,
    writing: bool,
    since: Option<Instant>,
    failures: u32,
    retry: Option<Instant>,
}

pub(super) struct State {
    regions: HashMap<u64, Region>,
    /// (oldest version, region) of those that wait to be written, and of those under way.
    waiting: BTreeSet<(u64, u64)>,
    writing: BTreeSet<(u64, u64)>,
    held: u64,
    version: u64,
    /// More than [`CacheOptions::start`] was held, and not yet as little as [`CacheOptions::keep`].
    draining: bool,
    /// Everything up to this version is wanted behind now.
    wanted: u64,
    written_back: u64,
    failures: u64,
    last_failure: Option<(u64, io::Error)>,
    /// When something was last written back.
    progress: Instant,
    blocked: u64,
    interrupts: u64,
    stop: bool,
}

impl State {
    /// The pieces that overlap a range of the device, in order.
    pub(super) fn pieces(&self, offset: u64, length: u64) -> Vec<(u64, Piece)> {
        let mut found = Vec::new();
        if self.regions.is_empty() {
            return found;
        }
        for (number, within, length) in super::regions(offset, length) {
            if let Some(region) = self.regions.get(&number) {
                found.extend(
                    region
                        .pieces
                        .overlapping(within, within + length)
                        .map(|(at, piece)| (number * REGION + u64::from(at), piece.clone())),
                );
            }
        }
        found
    }

    pub(super) fn status(&self) -> CacheStatus {
        CacheStatus {
            held: self.held,
            written_back: self.written_back,
            failures: self.failures,
            waiting: self.blocked,
        }
    }

    /// The version of the oldest piece of all.
    fn oldest(&self) -> Option<u64> {
        let (waiting, writing) = (self.waiting.first(), self.writing.first());
        waiting.into_iter().chain(writing).map(|(version, _)| *version).min()
    }

    /// The region to write next, or how long there is nothing to do.
    fn next(&mut self, options: &CacheOptions) -> Result<u64, Option<Duration>> {
        let now = Instant::now();
        let mut pause: Option<Duration> = None;
        for (version, number) in &self.waiting {
            let region = &self.regions[number];
            let mut due = region.since.map_or(now, |since| until(since, options.age));
            if self.draining || *version <= self.wanted {
                due = now;
            }
            if let Some(retry) = region.retry {
                due = due.max(retry);
            }
            if due <= now {
                return Ok(*number);
            }
            let left = due - now;
            pause = Some(pause.map_or(left, |pause| pause.min(left)));
            // Later ones are younger; only one that failed is worth passing over.
            if region.retry.is_none() {
                break;
            }
        }
        Err(pause)
    }
}

impl State {
    /// A region was written as it was at `version`, or not.
    fn finish(&mut self, number: u64, version: u64, result: io::Result<u64>, keep: u64) {
        let region = self.regions.get_mut(&number).expect("it stays while it is written");
        region.writing = false;
        let next = region.next_key.take();
        match result {
            Ok(bytes) => {
                let before = region.pieces.cost();
                region.pieces.drop_until(version);
                self.held = self.held + region.pieces.cost() - before;
                self.written_back += bytes;
                self.progress = Instant::now();
                self.draining &= self.held > keep;
                match next {
                    None => {
                        debug_assert!(region.pieces.is_empty());
                        self.regions.remove(&number);
                    }
                    Some(key) => {
                        (region.failures, region.retry) = (0, None);
                        (region.key, region.since) = (key, Some(Instant::now()));
                        self.waiting.insert((key, number));
                    }
                }
            }
            Err(error) => {
                let wait = FIRST_RETRY * 2u32.saturating_pow(region.failures.min(10));
                region.failures += 1;
                region.retry = Some(Instant::now() + wait.min(LAST_RETRY));
                self.waiting.insert((region.key, number));
                self.failures += 1;
                tracing::warn!(%error, region = number, "writing back failed; it is tried again");
                self.last_failure = Some((region.key, error));
            }
        }
    }
}

pub(super) struct Shared {
    pub(super) inner: Arc<dyn BlockDevice>,
    pub(super) pool: Arc<Pool>,
    options: CacheOptions,
    state: Mutex<State>,
    /// There may be something to write.
    work: Condvar,
    /// Something was written, or failed.
    done: Condvar,
}

impl Shared {
    pub(super) fn new(inner: Arc<dyn BlockDevice>, options: CacheOptions) -> Self {
        let budget = options.budget.max(4 * REGION);
        let start = options.start.min(budget / 4 * 3);
        let options = CacheOptions { budget, start, keep: options.keep.min(start), ..options };
        let state = State {
            regions: HashMap::new(),
            waiting: BTreeSet::new(),
            writing: BTreeSet::new(),
            held: 0,
            version: 0,
            draining: false,
            wanted: 0,
            written_back: 0,
            failures: 0,
            last_failure: None,
            progress: Instant::now(),
            blocked: 0,
            interrupts: 0,
            stop: false,
        };
        let (work, done) = (Condvar::new(), Condvar::new());
        Self { inner, pool: Arc::default(), options, state: Mutex::new(state), work, done }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // No call inside panics between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn interrupt(&self) {
        self.state().interrupts += 1;
        self.done.notify_all();
    }

    /// Puts a piece in, when there is room.
    pub(super) fn put(&self, number: u64, within: u32, content: Content) -> io::Result<()> {
        let size = match &content {
            Content::Data(bytes) => bytes.len() as u64,
            Content::Zero { .. } => 0,
        };
        let mut state = self.state();
        if state.held + size > self.options.budget {
            state = self.wait_for_room(state, size)?;
        }
        state.version += 1;
        let version = state.version;
        let region = state.regions.entry(number).or_default();
        let before = region.pieces.cost();
        let mut fresh = None;
        if region.writing {
            region.next_key.get_or_insert(version);
        } else if region.pieces.is_empty() {
            (region.key, region.since) = (version, Some(Instant::now()));
            fresh = Some((version, number));
        }
        region.pieces.put(within, content, version);
        let after = region.pieces.cost();
        state.held = state.held + after - before;
        state.waiting.extend(fresh);
        // What waits to be used again is memory too.
        self.pool.keep(self.options.budget.saturating_sub(state.held));
        if state.held > self.options.start && !state.draining {
            state.draining = true;
            self.work.notify_all();
        } else if state.draining || state.waiting.len() == 1 {
            self.work.notify_one();
        }
        Ok(())
    }

    fn wait_for_room<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        size: u64,
    ) -> io::Result<MutexGuard<'a, State>> {
        state.blocked += 1;
        state.draining = true;
        self.work.notify_all();
        let (began, interrupts) = (Instant::now(), state.interrupts);
        let result = loop {
            if state.held + size <= self.options.budget || state.held == 0 {
                break Ok(());
            }
            if state.interrupts != interrupts {
                break Err(io::ErrorKind::Interrupted.into());
            }
            let deadline = until(state.progress.max(began), self.options.patience);
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                let last = state.last_failure.as_ref().map(|(_, error)| error);
                break Err(nothing_done(self.options.patience, last));
            };
            state = self.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.blocked -= 1;
        result.map(|()| state)
    }

    /// Waits until everything that is here now is behind, then flushes that.
    pub(super) fn flush(&self) -> io::Result<()> {
        let target = self.state().version;
        self.wait_written(target, |state| state.oldest().is_none_or(|oldest| oldest > target))?;
        self.inner.flush()
    }

    /// Waits until regions hold nothing. Nobody puts anything in meanwhile.
    pub(super) fn drain(&self, numbers: Range<u64>) -> io::Result<()> {
        let target = self.state().version;
        let empty = |state: &State| {
            // Whichever is shorter to look through.
            if numbers.end - numbers.start > state.regions.len() as u64 {
                state.regions.keys().all(|number| !numbers.contains(number))
            } else {
                numbers.clone().all(|number| !state.regions.contains_key(&number))
            }
        };
        self.wait_written(target, empty)
    }

    fn wait_written(&self, target: u64, done: impl Fn(&State) -> bool) -> io::Result<()> {
        let mut state = self.state();
        let (failures, began, interrupts) = (state.failures, Instant::now(), state.interrupts);
        state.wanted = state.wanted.max(target);
        self.work.notify_all();
        loop {
            if done(&state) {
                return Ok(());
            }
            if state.failures != failures
                && let Some((version, error)) = &state.last_failure
                && *version <= target
            {
                return Err(same_error(error));
            }
            if state.interrupts != interrupts {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let deadline = until(state.progress.max(began), self.options.patience);
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(nothing_done(self.options.patience, None));
            };
            state = self.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What each thread does until it is stopped.
    fn work(&self) {
        let mut state = self.state();
        loop {
            if state.stop {
                return;
            }
            let number = match state.next(&self.options) {
                Ok(number) => number,
                Err(pause) => {
                    // Idle, not a wait for anything: ended by work, by age, or by `stop`.
                    let pause = pause.unwrap_or(Duration::from_secs(3600));
                    state = self
                        .work
                        .wait_timeout(state, pause)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                    continue;
                }
            };
            let version = state.version;
            let region = state.regions.get_mut(&number).expect("a queued region is there");
            region.writing = true;
            let (pieces, key) = (region.pieces.all(), region.key);
            state.waiting.remove(&(key, number));
            state.writing.insert((key, number));
            drop(state);
            let result = self.write_back(number, &pieces);
            state = self.state();
            state.writing.remove(&(key, number));
            state.finish(number, version, result, self.options.keep);
            self.done.notify_all();
        }
    }

    /// Writes the pieces of a region; returns how many bytes.
    fn write_back(&self, number: u64, pieces: &[(u32, Piece)]) -> io::Result<u64> {
        let start = number * REGION;
        let runs = runs(pieces);
        if let (true, Some(first), Some(last)) = (runs.len() > MOST_RUNS, runs.first(), runs.last())
        {
            let (from, to) = (first[0].0, end_of(&last[last.len() - 1]));
            let data: u32 = pieces.iter().map(|(_, piece)| piece.length()).sum();
            if data >= (to - from) / 2 {
                return self.write_span(start, from, to, pieces);
            }
        }
        let mut written = 0;
        for run in runs {
            let at = start + u64::from(run[0].0);
            match (run, &run[0].1.content) {
                ([(_, piece)], Content::Data(bytes)) => {
                    self.inner.write_at(at, bytes)?;
                    written += u64::from(piece.length());
                }
                (_, Content::Data(_)) => {
                    let mut joined = Vec::new();
                    for (_, piece) in run {
                        if let Content::Data(bytes) = &piece.content {
                            joined.extend_from_slice(bytes);
                        }
                    }
                    self.inner.write_at(at, &joined)?;
                    written += joined.len() as u64;
                }
                (_, Content::Zero { length, allocate }) => {
                    self.inner.zero(at, u64::from(*length), *allocate)?;
                }
            }
        }
        Ok(written)
    }

    /// Writes everything from the first changed byte to the last with one call, after reading what
    /// lies between. Nobody else writes to the device, and nobody else writes this region now.
    fn write_span(
        &self,
        start: u64,
        from: u32,
        to: u32,
        pieces: &[(u32, Piece)],
    ) -> io::Result<u64> {
        let mut span = vec![0; (to - from) as usize];
        self.inner.read_at(start + u64::from(from), &mut span)?;
        for (at, piece) in pieces {
            let target = &mut span[(at - from) as usize..][..piece.length() as usize];
            match &piece.content {
                Content::Data(bytes) => target.copy_from_slice(bytes),
                Content::Zero { .. } => target.fill(0),
            }
        }
        self.inner.write_at(start + u64::from(from), &span)?;
        Ok(span.len() as u64)
    }
}

fn end_of((at, piece): &(u32, Piece)) -> u32 {
    at + piece.length()
}

/// Pieces that one call can write: neighbours with bytes, or one piece of zeros.
fn runs(pieces: &[(u32, Piece)]) -> Vec<&[(u32, Piece)]> {
    pieces
        .chunk_by(|a, b| {
            let both = matches!((&a.1.content, &b.1.content), (Content::Data(_), Content::Data(_)));
            both && end_of(a) == b.0
        })
        .collect()
}

/// The threads; dropping ends them after what they are writing.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(super) fn start(shared: &Arc<Shared>, count: usize) -> io::Result<Self> {
        let mut workers = Self { shared: shared.clone(), threads: Vec::new() };
        for _ in 0..count {
            let shared = shared.clone();
            let thread = thread::Builder::new().name("silo-cache".to_owned());
            workers.threads.push(thread.spawn(move || shared.work())?);
        }
        Ok(workers)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}
