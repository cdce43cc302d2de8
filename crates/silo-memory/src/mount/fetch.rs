//! The threads that fetch: each takes the most urgent request that the window allows, reads it from
//! the backend and puts it in place. More are started while there is work that may leave, so that
//! requests overlap whatever the backend's round trip is.
//!
//! What must hold: whoever waits is served or told of the failure within the deadline; a thread
//! holds no lock while it reads or copies.

use super::{
    queue::{Class, Job},
    shared::{Phase, Shared, State, after},
};
use silo_block::block::{BLOCK_SIZE, BlockRange};
use std::{
    io,
    os::unix::fs::FileExt,
    sync::Arc,
    time::{Duration, Instant},
};

/// Fetching threads at most: enough for a budget of 256 MiB in requests of 1 MiB, and demands.
const MAX_THREADS: usize = 320;
/// Threads that stay when there is nothing to do.
const STAYING: usize = 2;
/// The others end after this long without work.
const IDLE: Duration = Duration::from_secs(10);
/// Blocks that are put in place between two looks at the table (256 KiB).
const LANDING: u64 = 64;
/// Pauses between attempts for somebody who waits: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

impl Shared {
    /// There may be work: wakes a thread for it, or starts one. Each thread that takes work calls
    /// this before it carries it out, so that one call gets as many going as can run.
    pub(super) fn stir(self: &Arc<Self>, state: &mut State) {
        let now = Instant::now();
        if state.phase != Phase::Open || !state.queue.has_work(&state.table, &mut state.window, now)
        {
            return;
        }
        if state.resting > 0 {
            self.work.notify_one();
        } else if state.threads < MAX_THREADS {
            self.start_thread(state);
        }
    }

    /// Starts what bulk work there is; a mount without any has no thread to fetch until one is needed.
    pub(super) fn start_fetching(self: &Arc<Self>) {
        self.stir(&mut self.lock());
    }

    fn start_thread(self: &Arc<Self>, state: &mut State) {
        let shared = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("mount-fetch".into())
            .spawn(move || shared.fetch_loop());
        match spawned {
            Ok(_) => state.threads += 1,
            // The threads that run do the work, later.
            Err(error) => state.stats.error(format!("starting a fetching thread: {error}")),
        }
    }

    fn fetch_loop(self: Arc<Self>) {
        let mut buffer = Vec::new();
        let mut state = self.lock();
        while state.phase == Phase::Open {
            let now = Instant::now();
            let parts = &mut *state;
            if let Some(job) = parts.queue.next(&mut parts.table, &mut parts.window, now) {
                self.stir(&mut state);
                drop(state);
                self.carry_out(job, &mut buffer);
                state = self.lock();
                continue;
            }
            let pause = state.queue.rests_until(now).map_or(IDLE, |until| (until - now).min(IDLE));
            state.resting += 1;
            state = Self::wait_on(&self.work, state, pause);
            state.resting -= 1;
            if pause == IDLE && now.elapsed() >= IDLE && state.threads > STAYING {
                break;
            }
        }
        state.threads -= 1;
        self.news.notify_all();
    }

    fn carry_out(self: &Arc<Self>, job: Job, buffer: &mut Vec<u8>) {
        let length = self.bytes_of(job.range);
        if buffer.len() < job.range.bytes() as usize {
            buffer.resize(job.range.bytes() as usize, 0);
        }
        let buffer = &mut buffer[..job.range.bytes() as usize];
        buffer[length..].fill(0);
        let read = self.read_backend(job, &mut buffer[..length]);
        let took = read.as_ref().ok().copied();
        let landed = read.and_then(|_| self.land(job.range, buffer, job.class, job.marked));
        let mut state = self.lock();
        let now = Instant::now();
        if job.class != Class::Demand {
            state.window.done(now, job.range.bytes(), took);
        }
        match landed {
            Ok(()) if job.class == Class::Demand => {}
            Ok(()) => state.queue.succeeded(),
            Err(_) => self.could_not(job, state, now),
        }
    }

    /// Reads; tries again for somebody who waits, until the deadline. Returns how long the attempt
    /// took that worked.
    fn read_backend(&self, job: Job, buffer: &mut [u8]) -> io::Result<Duration> {
        let deadline = after(self.options.deadline);
        let mut pause = RETRY.0;
        loop {
            let began = Instant::now();
            let error = match self.backend.read_at(job.range.start.offset(), buffer) {
                Ok(()) => return Ok(began.elapsed()),
                Err(error) => error,
            };
            let mut state = self.lock();
            let (bytes, offset) = (buffer.len(), job.range.start.offset());
            state.stats.error(format!("reading {bytes} bytes at {offset}: {error}"));
            let retry = job.class == Class::Demand && Instant::now() + pause < deadline;
            if !retry || state.phase != Phase::Open {
                return Err(error);
            }
            // Not by `work`: a call for a thread that rests must not reach one that only pauses.
            let until = after(pause);
            while state.phase == Phase::Open && Instant::now() < until {
                let left = until.saturating_duration_since(Instant::now());
                state = Self::wait_on(&self.news, state, left);
            }
            drop(state);
            pause = (pause * 2).min(RETRY.1);
        }
    }

    /// A request failed for good. Background work tries again later; who waits is told.
    fn could_not(
        self: &Arc<Self>,
        job: Job,
        mut state: std::sync::MutexGuard<'_, State>,
        now: Instant,
    ) {
        state.table.give_up(job.range);
        if job.class == Class::Demand {
            let waiting = state.table.fail(job.range);
            drop(state);
            self.poison(&waiting);
        } else {
            state.queue.failed(now);
            // Somebody waits for what was only on its way by chance: now it is a demand.
            for block in state.table.waited(job.range) {
                self.demand(&mut state, BlockRange::new(block, 1));
            }
            drop(state);
        }
        self.news.notify_all();
    }

    /// Fetches what nobody brings yet of `range`, for somebody who waits.
    pub(super) fn demand(self: &Arc<Self>, state: &mut State, range: BlockRange) {
        for piece in state.table.want(range) {
            state.stats.demands += 1;
            state.queue.demand(piece);
            self.stir(state);
        }
    }

    /// Puts content in place where it is still wanted. With `marked` the first block is left out of
    /// the mapping, so that touching it is seen.
    pub(super) fn land(
        &self,
        range: BlockRange,
        data: &[u8],
        class: Class,
        marked: bool,
    ) -> io::Result<()> {
        let (pieces, marked) = {
            let mut state = self.lock();
            // A page that was given up holds a mark of its own, which only mapping it takes away.
            let clean = !state.table.failed().contains(range.start);
            (state.table.begin(range), marked && clean)
        };
        let foreign = self.foreign();
        let mut result = Ok(());
        for chunk in pieces.into_iter().flat_map(|piece| piece.chunks(LANDING)) {
            if result.is_err() {
                self.lock().table.not_landed(chunk);
                continue;
            }
            let from = (chunk.start.0 - range.start.0) as usize * BLOCK_SIZE;
            let bytes = &data[from..from + chunk.bytes() as usize];
            let mark = marked && chunk.start == range.start;
            let placed = self.place(chunk, bytes, mark);
            let mut state = self.lock();
            if let Err(error) = placed {
                state.stats.error(format!("putting block {} in place: {error}", chunk.start.0));
                state.table.not_landed(chunk);
                drop(state);
                self.news.notify_all();
                result = Err(error);
                continue;
            }
            let waits = state.table.landed(chunk);
            state.stats.waited(Instant::now(), &waits);
            state.stats.fetched[class as usize] += self.bytes_of(chunk) as u64;
            drop(state);
            self.news.notify_all();
            let exposed = if mark && !waits.is_empty() {
                self.local.expose(BlockRange::new(chunk.start.0, 1))
            } else {
                Ok(())
            };
            result = foreign.iter().fold(exposed, |so_far, view| so_far.and(view.expose(chunk)));
        }
        result
    }

    fn place(&self, chunk: BlockRange, bytes: &[u8], mark: bool) -> io::Result<()> {
        if !mark {
            return self.local.place(&self.file, chunk.start, bytes);
        }
        let (first, rest) = bytes.split_at(BLOCK_SIZE);
        self.file.write_all_at(first, chunk.start.offset())?;
        self.local.protect(BlockRange::new(chunk.start.0, 1))?;
        if rest.is_empty() {
            return Ok(());
        }
        self.local.place(&self.file, silo_block::block::BlockIndex(chunk.start.0 + 1), rest)
    }

    /// Waits until blocks are here, and has them fetched.
    ///
    /// # Errors
    /// If they cannot be had, the wait is too long, or the mount closes.
    pub(super) fn need(self: &Arc<Self>, range: BlockRange) -> io::Result<()> {
        let mut state = self.lock();
        if !state.table.idle().is_empty() {
            self.touched_by_walker(&mut state, range);
        }
        let began = Instant::now();
        let deadline = after(self.options.deadline);
        let mut asked = false;
        while !state.table.is_here(range) {
            if state.phase != Phase::Open || state.interrupted {
                return Err(self.closed());
            }
            let now = Instant::now();
            if now >= deadline || (asked && state.table.failed().intersects(range)) {
                return Err(self.unavailable(&state, range, began.elapsed()));
            }
            if !asked {
                state.table.forgive(range);
            }
            self.demand(&mut state, range);
            asked = true;
            state = Self::wait_on(&self.news, state, deadline - now);
        }
        self.stir(&mut state);
        Ok(())
    }
}
