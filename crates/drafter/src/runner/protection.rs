//! With what right a protected machine runs here just now, and what stops it when it has none.
//!
//! Changed by the term's holder on the tenure's thread, read by whoever works on the machine. What must
//! hold: the guard knows the end of the machine's time before the machine may run until then, and what is
//! over stays over.

use super::{api::ProtectionState, guard::Guard, tenure::Pace};
use crate::{
    driver::Fence,
    lease::{BootClock, BootTime, Clock as _},
    migrate::source::MachineError,
};
use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

/// Share of T that a lease must still hold for a pause to begin: one that is cut short by the end of
/// the lease is hard on a monitor.
const PAUSE_SHARE: u32 = 4;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// With what right the machine runs.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Right {
    /// Nobody may take it yet.
    Open,
    /// Until then.
    Until(BootTime),
    /// It stands still: the lease could not be renewed.
    Frozen { since: BootTime },
    /// It has ended here, or left.
    Over,
}

/// Protection of one stay of the machine.
pub(super) struct Protection {
    pace: Pace,
    /// What the guest sends is to be held.
    wants_commit: bool,
    /// It is, from the next generation on.
    commits: AtomicBool,
    /// A generation of this host is there, and the lease names its beat.
    begun: AtomicBool,
    right: Mutex<Right>,
    /// The end of its time, as last told.
    end: Mutex<Option<BootTime>>,
    changed: Condvar,
    freezes: AtomicU64,
    fence: Arc<dyn Fence>,
    guard: Arc<Guard>,
}

impl Protection {
    /// Of a machine that nobody may take yet.
    pub(super) fn new(
        fence: Arc<dyn Fence>,
        guard: Arc<Guard>,
        pace: Pace,
        wants_commit: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            pace,
            wants_commit,
            commits: AtomicBool::new(false),
            begun: AtomicBool::new(false),
            right: Mutex::new(Right::Open),
            end: Mutex::new(None),
            changed: Condvar::new(),
            freezes: AtomicU64::new(0),
            fence,
            guard,
        })
    }

    /// T, and how often the lease is renewed.
    pub(super) const fn pace(&self) -> Pace {
        self.pace
    }

    /// Whether it is all that was asked for.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// It is to begin once more: the machine has stayed after a move that ended its generations.
    pub(super) fn begin_again(&self) {
        self.begun.store(false, Ordering::Release);
    }

    /// The lease names a beat, and there is a generation of this host.
    pub(super) fn begin(&self) {
        self.commits.store(self.wants_commit, Ordering::Release);
        self.begun.store(true, Ordering::Release);
    }

    /// Ends the machine for good; it stands still from here on whatever becomes of that.
    pub(super) fn end(&self) {
        self.freeze();
        self.set(Right::Over);
        if let Err(error) = self.fence.kill() {
            tracing::error!(%error, "it stands still, and could not be ended");
        }
        self.guard.end();
    }

    /// The guard is not needed: nothing began.
    pub(super) fn drop_guard(&self) {
        self.guard.end();
    }

    /// Whether a generation may be begun.
    pub(super) fn may_pause(&self) -> Result<(), MachineError> {
        match &*lock(&self.right) {
            Right::Open => Ok(()),
            Right::Until(until) if until.since(BootClock.now()) > self.pace.term / PAUSE_SHARE => {
                Ok(())
            }
            Right::Until(_) => Err("its lease is about to end; it is being renewed".into()),
            Right::Frozen { .. } => Err("it is frozen until its lease can be renewed".into()),
            Right::Over => Err("it has ended here".into()),
        }
    }

    /// Whether what the guest sends is to wait for its generation.
    pub(super) const fn wants_commit(&self) -> bool {
        self.wants_commit
    }

    /// Whether it does.
    pub(super) fn commits_output(&self) -> bool {
        self.commits.load(Ordering::Acquire)
    }

    /// Whether it stands still for want of a lease.
    pub(super) fn is_frozen(&self) -> bool {
        matches!(*lock(&self.right), Right::Frozen { .. })
    }

    /// How often it was frozen so far.
    pub(super) fn freezes(&self) -> u64 {
        self.freezes.load(Ordering::Relaxed)
    }

    /// Whether it was frozen since it had been `before` times, and may run again; waits while it is.
    pub(super) fn thawed_since(&self, before: u64) -> bool {
        let mut right = lock(&self.right);
        if self.freezes() == before {
            return false;
        }
        // As long as the lease takes to be renewed or lost: its end is the tenure's business.
        while matches!(*right, Right::Frozen { .. }) {
            let waited = self.changed.wait_timeout(right, Duration::from_secs(1));
            right = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        matches!(*right, Right::Until(_) | Right::Open)
    }

    /// What the guest sends is held: from its first instruction here, or of a machine that runs from the
    /// next generation's instant on.
    pub(super) fn hold_output(&self) {
        self.commits.store(true, Ordering::Release);
    }

    /// How it does.
    pub(super) fn state(&self) -> ProtectionState {
        let right = lock(&self.right).clone();
        let now = BootClock.now();
        let (word, left, detail) = match right {
            Right::Open => ("starting", Duration::ZERO, String::new()),
            Right::Until(until) => ("protected", until.since(now), String::new()),
            Right::Frozen { since } => {
                let detail = format!(
                    "its lease could not be renewed for {:.1} s: it stands still until the lease store \
                     answers",
                    (now.since(since) + self.pace.term).as_secs_f64()
                );
                ("frozen", Duration::ZERO, detail)
            }
            Right::Over => ("over", Duration::ZERO, String::new()),
        };
        ProtectionState {
            word: word.to_owned(),
            detail,
            term_ms: self.pace.term.as_millis() as u64,
            left_ms: left.as_millis() as u64,
            freezes: self.freezes.load(Ordering::Relaxed),
            output_commit: self.commits_output(),
            beat: None,
            guard_pid: Some(self.guard.pid()),
            taken_over: None,
        }
    }

    fn set(&self, right: Right) {
        *lock(&self.right) = right;
        self.changed.notify_all();
    }

    /// Its time ends then.
    pub(super) fn ends_at(&self, end: Option<BootTime>) {
        match end {
            Some(end) => self.guard.until(end),
            None => self.guard.open_end(),
        }
        *lock(&self.end) = end;
        let mut right = lock(&self.right);
        if matches!(*right, Right::Open | Right::Until(_)) {
            *right = end.map_or(Right::Open, Right::Until);
        }
    }

    /// Its time is over, by this host's clock.
    pub(super) fn freeze(&self) {
        let mut right = lock(&self.right);
        if matches!(*right, Right::Over | Right::Frozen { .. }) {
            return;
        }
        if let Err(error) = self.fence.freeze() {
            tracing::error!(%error, "its time is over and the machine does not freeze: it is ended");
            let _ = self.fence.kill();
        }
        self.freezes.fetch_add(1, Ordering::Relaxed);
        *right = Right::Frozen { since: BootClock.now() };
        drop(right);
        self.changed.notify_all();
    }

    /// It has time again; the guard knows.
    pub(super) fn thaw(&self) {
        let mut right = lock(&self.right);
        if !matches!(*right, Right::Frozen { .. }) {
            return;
        }
        if let Err(error) = self.fence.thaw() {
            tracing::error!(%error, "the lease is ours again and the machine does not thaw");
        }
        *right = lock(&self.end).map_or(Right::Open, Right::Until);
        drop(right);
        self.changed.notify_all();
    }

    /// Whether it still has time: not for one that stands still, or is over.
    pub(super) fn has_time(&self) -> bool {
        matches!(*lock(&self.right), Right::Open | Right::Until(_))
    }

    /// Waits until it has time, looking now and then whether the runner `ends`.
    ///
    /// # Errors
    /// If it never will: another host has the machine, or the runner ends.
    pub(super) fn wait_for_time(&self, ends: impl Fn() -> bool) -> Result<(), String> {
        let mut right = lock(&self.right);
        loop {
            match &*right {
                Right::Over => return Err("another host has the machine".to_owned()),
                // As long as the lease takes to be renewed or lost: its end is the tenure's business.
                Right::Frozen { .. } => {}
                Right::Open | Right::Until(_) => return Ok(()),
            }
            if ends() {
                return Err("the runner ends".to_owned());
            }
            let waited = self.changed.wait_timeout(right, Duration::from_millis(250));
            right = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether it never runs here again.
    pub(super) fn is_over(&self) -> bool {
        matches!(*lock(&self.right), Right::Over)
    }

    /// The machine leaves this host or has ended: its time has no end that matters any more.
    pub(super) fn leave(&self) {
        self.set(Right::Over);
        self.guard.end();
    }
}
