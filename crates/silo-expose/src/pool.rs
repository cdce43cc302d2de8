//! Threads for what may take long: they are made when all others are busy, up to a limit, and end
//! with the server.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

/// A piece of work; it gets a buffer that the thread keeps.
pub(crate) type Job = Box<dyn FnOnce(&mut Vec<u8>) + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    stopping: bool,
}

struct Inner {
    state: Mutex<State>,
    /// A job came, or the end.
    work: Condvar,
    /// A thread ended.
    ended: Condvar,
    limit: usize,
}

/// The threads of one server. How many jobs can wait is bounded by who submits them: a queue never
/// has more requests in hand than it has entries.
pub(crate) struct Pool(Arc<Inner>);

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // Counts change in one step each, and jobs run outside of the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut buffer = Vec::new();
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job(&mut buffer);
                state = self.state();
            } else if state.stopping {
                return;
            } else {
                state.idle += 1;
                // No deadline: a job or the end of the server wakes it.
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

/// Counts a thread out, also after a panic.
struct Ending(Arc<Inner>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.state().threads -= 1;
        self.0.ended.notify_all();
    }
}

impl Pool {
    pub(crate) fn new(limit: usize) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::default(),
            work: Condvar::new(),
            ended: Condvar::new(),
            limit: limit.max(1),
        }))
    }

    /// Has it done by some thread.
    ///
    /// # Errors
    /// If there is no thread and none can be made; then the job is dropped.
    pub(crate) fn submit(&self, job: Job) -> io::Result<()> {
        let mut state = self.0.state();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() || state.threads >= self.0.limit {
            drop(state);
            self.0.work.notify_one();
            return Ok(());
        }
        state.threads += 1;
        let alone = state.threads == 1;
        drop(state);
        let ending = Ending(self.0.clone());
        let spawned = thread::Builder::new()
            .name("silo-expose-io".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                let inner = ending.0.clone();
                inner.run();
                drop(ending);
            });
        match spawned {
            Ok(_) => Ok(()),
            Err(error) if alone => {
                self.0.state().jobs.pop_back();
                Err(error)
            }
            // The others will come to it.
            Err(error) => {
                tracing::warn!(%error, "no further thread for requests");
                Ok(())
            }
        }
    }

    /// Lets the threads end once they have nothing to do.
    pub(crate) fn stop(&self) {
        self.0.state().stopping = true;
        self.0.work.notify_all();
    }

    /// Waits until all threads have ended, or the deadline; how many are left.
    pub(crate) fn wait(&self, deadline: Instant) -> usize {
        let mut state = self.0.state();
        while state.threads > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.0.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.threads
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop();
    }
}
