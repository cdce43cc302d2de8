//! Flushes: who waits for which sync, and when a flush may be answered before its sync is done.
//!
//! Syncs run one at a time on a thread of their own; every flush waits for one that started after
//! the flush came in, so ten flushes at once cost two syncs at most.
//!
//! Stopping a machine makes QEMU flush its disks twice, inside the blackout. For those the runner
//! sets [`FlushPolicy::Switchover`]: a flush starts its sync at once, and is answered when the sync
//! is done or when the runner has called [`Flusher::answer_now`] (the processors stand still, so
//! the guest cannot see the answer before the move is settled). [`Flusher::wait_durable`] tells
//! when the syncs behind such answers are done; the runner releases nothing before that.

use super::{error::DiskError, store::Store};
use crate::map::Tidy;
use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// When a flush is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FlushPolicy {
    /// When it is durable.
    #[default]
    Normal,
    /// When it is durable, or when the runner says so.
    Switchover,
}

struct State {
    policy: FlushPolicy,
    answer_now: bool,
    /// Rounds are numbered from 1; at most one is between `started` and `finished`.
    started: u64,
    finished: u64,
    /// The round that somebody wants.
    wanted: u64,
    /// The round that a flush needed which was answered before it was done.
    early: u64,
    /// How the last finished round ended.
    last: Result<(), (io::ErrorKind, String)>,
    stop: bool,
}

struct Shared {
    store: Arc<Store>,
    state: Mutex<State>,
    changed: Condvar,
}

pub(super) struct Flusher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    limit: Duration,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Fields are set one by one and each is valid alone.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.state();
        loop {
            if state.stop {
                return;
            }
            if state.wanted <= state.started {
                // Not a wait for anything: the thread's idle state, which `stop` ends.
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.started += 1;
            let tidy = match state.policy {
                FlushPolicy::Normal => Tidy::Yes,
                FlushPolicy::Switchover => Tidy::No,
            };
            drop(state);
            let result = self.store.sync(tidy).map_err(|error| (error.kind(), error.to_string()));
            if let Err((_, error)) = &result {
                tracing::error!(disk = %self.store.dir().display(), error, "a sync failed");
            }
            state = self.state();
            state.finished = state.started;
            state.last = result;
            self.changed.notify_all();
        }
    }
}

impl State {
    /// How a flush that needs `round` ended, if it has.
    fn outcome(&self, round: u64) -> Option<Result<(), DiskError>> {
        let failed = |(kind, cause)| DiskError::Sync { cause, kind };
        (self.finished >= round).then(|| self.last.clone().map_err(failed))
    }
}

impl Flusher {
    /// `limit`: how long a flush may take before it is answered with an error.
    pub(super) fn new(store: Arc<Store>, limit: Duration) -> io::Result<Self> {
        let state = State {
            policy: FlushPolicy::Normal,
            answer_now: false,
            started: 0,
            finished: 0,
            wanted: 0,
            early: 0,
            last: Ok(()),
            stop: false,
        };
        let shared = Arc::new(Shared { store, state: Mutex::new(state), changed: Condvar::new() });
        let runner = shared.clone();
        let thread =
            thread::Builder::new().name("silo-sync".to_owned()).spawn(move || runner.run())?;
        Ok(Self { shared, thread: Some(thread), limit })
    }

    /// A guest's flush; see the module's documentation.
    pub(super) fn flush(&self) -> Result<(), DiskError> {
        self.until_synced(Instant::now() + self.limit, true)
    }

    /// Makes everything durable that was written before the call, whatever the policy.
    pub(super) fn sync(&self) -> Result<(), DiskError> {
        self.until_synced(Instant::now() + self.limit, false)
    }

    fn until_synced(&self, deadline: Instant, may_be_early: bool) -> Result<(), DiskError> {
        let mut state = self.shared.state();
        let round = state.started + 1;
        state.wanted = state.wanted.max(round);
        self.shared.changed.notify_all();
        loop {
            if let Some(outcome) = state.outcome(round) {
                return outcome;
            }
            if may_be_early && state.policy == FlushPolicy::Switchover && state.answer_now {
                state.early = state.early.max(round);
                return Ok(());
            }
            state = self.wait(state, deadline, "a sync of the disk", self.limit)?;
        }
    }

    /// Sets when flushes are answered; those that wait already obey too.
    pub(super) fn set_policy(&self, policy: FlushPolicy) {
        let mut state = self.shared.state();
        state.policy = policy;
        state.answer_now = false;
        self.shared.changed.notify_all();
    }

    /// Under [`FlushPolicy::Switchover`]: answers every flush that waits, and every later one at
    /// once, until the policy is set again.
    pub(super) fn answer_now(&self) {
        let mut state = self.shared.state();
        state.answer_now = state.policy == FlushPolicy::Switchover;
        self.shared.changed.notify_all();
    }

    /// Waits until everything is durable that a flush was answered for.
    pub(super) fn wait_durable(&self, deadline: Instant) -> Result<(), DiskError> {
        let limit = deadline.saturating_duration_since(Instant::now());
        let mut state = self.shared.state();
        let round = state.early;
        if round == 0 {
            return Ok(());
        }
        loop {
            match state.outcome(round) {
                None => {}
                Some(Ok(())) => return Ok(()),
                // Try again: what failed may have been lack of room.
                Some(Err(error)) => {
                    drop(state);
                    return self.until_synced(deadline, false).map_err(|_| error);
                }
            }
            state = self.wait(state, deadline, "the sync behind an answered flush", limit)?;
        }
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        deadline: Instant,
        what: &'static str,
        limit: Duration,
    ) -> Result<MutexGuard<'a, State>, DiskError> {
        let Some(left) = deadline.checked_duration_since(Instant::now()) else {
            return Err(DiskError::Timeout { what, limit });
        };
        let woken = self.shared.changed.wait_timeout(state, left);
        Ok(woken.unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}
