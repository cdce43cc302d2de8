//! Keeps the history of a line, which is written all the time, within bounds: prunes it by a rule, and
//! collects what its generations no longer need.
//!
//! One thread beside whoever writes the line. What must hold: it never delays a generation (it works on
//! connections of its own turn, not on the writer's thread), a failure harms nothing and is tried again
//! at its next turn, and what it deletes is decided by [`Store::prune`], [`Store::mark`] and
//! [`Store::sweep`], which may run beside writers, readers and each other.

use crate::{StoreError, collect::Swept, layout::LineName, prune::Retention, store::Store};
use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

/// How a history is kept within bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keeping {
    /// What stays.
    pub retention: Retention,
    /// How often the rest is deleted.
    pub every: Duration,
    /// Objects that nothing refers to stay at least this long, so that slow writers need not store
    /// again; see [`Store::mark`]. None: nothing is collected here, somebody else does it.
    pub grace: Option<Duration>,
}

/// How it does.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// Generations that were deleted.
    pub pruned: u64,
    /// Objects that were collected.
    pub collected: u64,
    /// What went wrong last, until a turn succeeds.
    pub error: Option<String>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<(bool, Kept)>,
    changed: Condvar,
}

/// See the module. Dropping it ends it, after the request in hand.
pub struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Begins; the first turn comes after one interval.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(store: Arc<Store>, line: LineName, keeping: Keeping) -> Result<Self, StoreError> {
        let shared = Arc::new(Shared::default());
        let work = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("silo-keeper".to_owned())
            .spawn(move || {
                while work.rest(keeping.every) {
                    let result = turn(&store, &line, &keeping);
                    work.note(&line, result);
                }
            })
            .map_err(|source| StoreError::Local { operation: "start a thread", source })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// How it does.
    #[must_use]
    pub fn kept(&self) -> Kept {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).0 = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by then.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// False when it is time to end.
    fn rest(&self, time: Duration) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(state, time, |(ended, _)| !*ended);
        !waited.unwrap_or_else(PoisonError::into_inner).0.0
    }

    fn note(&self, line: &LineName, result: Result<(u64, u64), StoreError>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok((pruned, collected)) => {
                state.1.pruned += pruned;
                state.1.collected += collected;
                state.1.error = None;
            }
            Err(error) => {
                tracing::warn!(%line, %error, "the history was not tidied; it is tried again");
                state.1.error = Some(error.to_string());
            }
        }
    }
}

/// Prunes, ends the collection that is under way if it is old enough, and begins the next. Gives
/// generations and objects that were deleted.
fn turn(store: &Store, line: &LineName, keeping: &Keeping) -> Result<(u64, u64), StoreError> {
    let now = SystemTime::now();
    let pruned = store.prune(line, &keeping.retention, now, false)?.deleted.len() as u64;
    let Some(grace) = keeping.grace else { return Ok((pruned, 0)) };
    // Of many who keep lines of one store, one collects.
    if store.collected_ago(now)?.is_some_and(|ago| ago < grace) {
        return Ok((pruned, 0));
    }
    let collected = match store.sweep(grace)? {
        Swept::Wait(_) => return Ok((pruned, 0)),
        Swept::Done(swept) => swept.objects.len() as u64,
        Swept::Nothing => 0,
    };
    store.mark(grace, false)?;
    Ok((pruned, collected))
}
