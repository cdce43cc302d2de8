//! Runs for a device that stores slowly: they leave the connections, so that those go on with the
//! other devices.
//!
//! What must hold: memory is bounded, whatever the other end sends (it keeps to its window; one
//! that does not is slowed down here).

use crate::lane::lock;
use silo_block::session::{LinkId, messages::BlockHeader};
use std::{
    collections::VecDeque,
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// A device that took so long to store a run is slow.
pub(super) const SLOW: Duration = Duration::from_millis(100);
/// Bytes that wait for one device at most.
const MOST: usize = 64 << 20;

/// A run that waits.
pub(super) struct Waiting {
    pub(super) link: LinkId,
    pub(super) header: BlockHeader,
    pub(super) parcel: Vec<u8>,
}

#[derive(Default)]
struct State {
    runs: VecDeque<Waiting>,
    bytes: usize,
    closed: bool,
}

/// The runs that wait for one device.
#[derive(Default)]
pub(super) struct Backlog {
    slow: AtomicBool,
    /// A thread takes what waits.
    served: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Backlog {
    /// Whether runs of this device are to wait here.
    pub(super) fn is_slow(&self) -> bool {
        self.slow.load(Ordering::Acquire)
    }

    /// A run was stored in so long. True when a thread is needed for those that will wait.
    pub(super) fn took(&self, time: Duration) -> bool {
        if time < SLOW {
            return false;
        }
        self.slow.store(true, Ordering::Release);
        !self.served.swap(true, Ordering::AcqRel)
    }

    /// There is no thread for it: runs are stored as they come, and the next slow one asks again.
    pub(super) fn give_up(&self) {
        self.slow.store(false, Ordering::Release);
        self.served.store(false, Ordering::Release);
    }

    /// A run that had waited was stored in so long: the device may be fast again.
    pub(super) fn recovered(&self, time: Duration) {
        if time < SLOW / 10 && lock(&self.state).runs.is_empty() {
            self.slow.store(false, Ordering::Release);
        }
    }

    /// Waits for room.
    pub(super) fn push(&self, run: Waiting) {
        let state = lock(&self.state);
        let full = |state: &mut State| state.bytes > MOST && !state.closed;
        let mut state =
            self.changed.wait_while(state, full).unwrap_or_else(PoisonError::into_inner);
        state.bytes += run.parcel.len();
        state.runs.push_back(run);
        drop(state);
        self.changed.notify_all();
    }

    /// The next run; none when the session is over.
    pub(super) fn pop(&self) -> Option<Waiting> {
        let state = lock(&self.state);
        let empty = |state: &mut State| state.runs.is_empty() && !state.closed;
        let mut state =
            self.changed.wait_while(state, empty).unwrap_or_else(PoisonError::into_inner);
        let run = state.runs.pop_front();
        state.bytes -= run.as_ref().map_or(0, |run| run.parcel.len());
        drop(state);
        self.changed.notify_all();
        run
    }

    /// The session is over.
    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        state.runs.clear();
        state.bytes = 0;
        drop(state);
        self.changed.notify_all();
    }
}
