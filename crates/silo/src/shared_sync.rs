//! One sync for all who ask at the same time.
//!
//! Each caller waits for a run that began after its call, so that ten flushes at once cost two
//! syncs at most; and an error goes to everybody whose writes that run was for.

use crate::range::same_error;
use std::{
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// What is done when a run fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterFailure {
    /// The kernel has dropped what it could not write, and the next `fsync` would succeed without
    /// it: every later call fails too.
    Sticky,
    /// What was not written is kept and tried again by the next run.
    Retry,
}

#[derive(Default)]
struct State {
    started: u64,
    finished: u64,
    last: Option<io::Error>,
    lost: Option<String>,
}

/// See the [module](self).
pub(crate) struct SharedSync {
    state: Mutex<State>,
    ended: Condvar,
    after: AfterFailure,
    limit: Duration,
}

impl SharedSync {
    /// `limit`: how long a caller waits for a run of somebody else.
    pub(crate) fn new(after: AfterFailure, limit: Duration) -> Self {
        Self { state: Mutex::default(), ended: Condvar::new(), after, limit }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Fields are set one by one and each is valid alone.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As if a run had failed that nobody waits for: a sync elsewhere that later runs rely on.
    pub(crate) fn lose(&self, error: &io::Error) {
        self.state().lost.get_or_insert_with(|| error.to_string());
    }

    /// Returns when a run that began after this call has ended.
    ///
    /// # Errors
    /// Those of `sync`, an earlier failure if failures are sticky, or `TimedOut`.
    pub(crate) fn run(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let deadline = Instant::now() + self.limit;
        let mut state = self.state();
        let round = state.started + 1;
        loop {
            if let Some(cause) = &state.lost {
                return Err(io::Error::other(format!(
                    "an earlier sync failed ({cause}); what was written since is of unknown \
                     durability, so every further flush is refused until the device is opened again"
                )));
            }
            if state.finished >= round {
                return state.last.as_ref().map_or(Ok(()), |error| Err(same_error(error)));
            }
            if state.started == state.finished {
                state.started += 1;
                drop(state);
                let result = sync();
                let mut state = self.state();
                state.finished += 1;
                state.last = result.as_ref().err().map(same_error);
                if let (Err(error), AfterFailure::Sticky) = (&result, self.after) {
                    state.lost = Some(error.to_string());
                }
                self.ended.notify_all();
                return result;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                let text = format!("a sync did not end within {:?}", self.limit);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            };
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        thread,
    };

    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn callers_at_the_same_time_share_runs_that_began_after_they_came() {
        let (shared, runs) = (SharedSync::new(AfterFailure::Retry, LIMIT), AtomicU32::new(0));
        let gate = std::sync::Barrier::new(9);
        thread::scope(|scope| {
            scope.spawn(|| {
                shared
                    .run(|| {
                        runs.fetch_add(1, Ordering::SeqCst);
                        gate.wait();
                        Ok(())
                    })
                    .unwrap();
            });
            for _ in 0..8 {
                scope.spawn(|| {
                    gate.wait();
                    shared.run(|| {
                        runs.fetch_add(1, Ordering::SeqCst);
                        Ok(())
                    })
                });
            }
        });
        let runs = runs.load(Ordering::SeqCst);
        assert!((2..=9).contains(&runs), "{runs}");
    }

    #[test]
    fn a_failed_sync_stays_failed_where_the_kernel_forgets() {
        let shared = SharedSync::new(AfterFailure::Sticky, LIMIT);
        assert!(shared.run(|| Err(io::Error::other("disk on fire"))).is_err());
        let error = shared.run(|| Ok(())).unwrap_err();
        assert!(error.to_string().contains("disk on fire"), "{error}");
        let shared = SharedSync::new(AfterFailure::Retry, LIMIT);
        assert!(shared.run(|| Err(io::Error::other("full"))).is_err());
        shared.run(|| Ok(())).unwrap();
    }
}
