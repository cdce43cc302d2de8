//! A gate before a device: requests pass it one by one, and it can be closed for a moment in which
//! no request is in hand, to put another device behind it.

use std::{
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

/// The gate is closed; the other bits count who is inside, and who is about to turn back.
const CLOSED: u32 = 1 << 31;
/// How often somebody who waits before a closed gate looks whether waiting still makes sense.
const LOOK: Duration = Duration::from_millis(20);

/// See the module.
#[derive(Default)]
pub(super) struct Gate {
    state: AtomicU32,
    /// Held by whoever has closed the gate.
    closing: Mutex<()>,
    lock: Mutex<()>,
    changed: Condvar,
}

/// Somebody is inside for as long as it lives.
pub(super) struct Pass<'a>(&'a Gate);

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Gate {
    /// Goes in, after waiting for an open gate. `None` if `give_up` says so meanwhile.
    pub(super) fn enter(&self, give_up: impl Fn() -> bool) -> Option<Pass<'_>> {
        loop {
            if self.state.fetch_add(1, Ordering::AcqRel) & CLOSED == 0 {
                return Some(Pass(self));
            }
            self.leave();
            let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            while self.state.load(Ordering::Acquire) & CLOSED != 0 {
                if give_up() {
                    return None;
                }
                let waited = self.changed.wait_timeout(lock, LOOK);
                lock = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    fn leave(&self) {
        if self.state.fetch_sub(1, Ordering::AcqRel) - 1 == CLOSED {
            // Under the lock, so that the closer does not miss it between a look and its sleep.
            let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.changed.notify_all();
        }
    }

    /// Closes the gate, waits until nobody is inside, does `work`, and opens it again. `Err` with
    /// the number inside if they do not leave within `limit`; then `work` was not done.
    pub(super) fn while_closed<T>(
        &self,
        limit: Duration,
        work: impl FnOnce() -> T,
    ) -> Result<T, u32> {
        let deadline = Instant::now() + limit;
        let _closing = self.closing.lock().unwrap_or_else(PoisonError::into_inner);
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
        let opened = Opener(self);
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let inside = self.state.load(Ordering::Acquire) & !CLOSED;
            if inside == 0 {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(inside);
            }
            let waited = self.changed.wait_timeout(lock, left);
            lock = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(lock);
        let done = work();
        drop(opened);
        Ok(done)
    }
}

/// Opens the gate again, also when the work inside panics.
struct Opener<'a>(&'a Gate);

impl Drop for Opener<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!CLOSED, Ordering::AcqRel);
        // No lock: the closer may still hold it. Whoever misses this looks again soon.
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::atomic::AtomicU64, thread};

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn nobody_is_inside_while_it_is_closed_and_everybody_gets_in_afterwards() {
        let (gate, inside, passed) = (Gate::default(), AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let _pass = gate.enter(|| false).unwrap();
                        inside.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        passed.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..200 {
                let seen = gate.while_closed(LIMIT, || inside.load(Ordering::SeqCst));
                assert_eq!(seen, Ok(0));
            }
        });
        assert_eq!(passed.into_inner(), 80_000);
    }

    #[test]
    fn a_gate_that_somebody_does_not_leave_opens_again() {
        let gate = Gate::default();
        let pass = gate.enter(|| false).unwrap();
        assert_eq!(gate.while_closed(Duration::from_millis(5), || ()), Err(1));
        drop(gate.enter(|| panic!("it is open")).unwrap());
        drop(pass);
        let turned_back = gate.while_closed(LIMIT, || gate.enter(|| true).is_none());
        assert_eq!(turned_back, Ok(true));
    }
}
