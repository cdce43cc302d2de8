//! A machine that two may stop, each for his own reason: the end of a destination's offer, and the end of a
//! lease. It runs when neither holds it.
//!
//! What must hold: a freeze for one reason has taken effect when it returns; a thaw ends its own reason only.

use crate::driver::{DriverError, Fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Why it stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// It has arrived, and the offer under which it runs is over.
    Offer,
    /// Its lease is over.
    Term,
}

/// See the module.
pub(super) struct Reasons {
    fence: Arc<dyn Fence>,
    /// Those that hold it.
    held: Mutex<Vec<Reason>>,
}

impl Reasons {
    /// Of a machine that nobody holds.
    pub(super) fn new(fence: Arc<dyn Fence>) -> Arc<Self> {
        Arc::new(Self { fence, held: Mutex::default() })
    }

    /// What stops it for one of them.
    pub(super) fn fence(self: &Arc<Self>, reason: Reason) -> Arc<dyn Fence> {
        Arc::new(One { of: Arc::clone(self), reason })
    }

    fn held(&self) -> MutexGuard<'_, Vec<Reason>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct One {
    of: Arc<Reasons>,
    reason: Reason,
}

impl Fence for One {
    fn freeze(&self) -> Result<(), DriverError> {
        let mut held = self.of.held();
        if !held.contains(&self.reason) {
            held.push(self.reason);
        }
        self.of.fence.freeze()
    }

    fn thaw(&self) -> Result<(), DriverError> {
        let mut held = self.of.held();
        held.retain(|reason| *reason != self.reason);
        if held.is_empty() { self.of.fence.thaw() } else { Ok(()) }
    }

    fn kill(&self) -> Result<(), DriverError> {
        self.of.fence.kill()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Still(AtomicBool);

    impl Fence for Still {
        fn freeze(&self) -> Result<(), DriverError> {
            self.0.store(true, Ordering::SeqCst);
            Ok(())
        }

        fn thaw(&self) -> Result<(), DriverError> {
            self.0.store(false, Ordering::SeqCst);
            Ok(())
        }

        fn kill(&self) -> Result<(), DriverError> {
            Ok(())
        }
    }

    #[test]
    fn it_runs_when_no_reason_is_left() {
        let still = Arc::new(Still::default());
        let reasons = Reasons::new(still.clone());
        let (offer, term) = (reasons.fence(Reason::Offer), reasons.fence(Reason::Term));
        let stands = || still.0.load(Ordering::SeqCst);
        offer.freeze().unwrap();
        term.freeze().unwrap();
        term.freeze().unwrap();
        offer.thaw().unwrap();
        assert!(stands(), "its lease is over");
        term.thaw().unwrap();
        assert!(!stands());
        // A thaw that nobody owes undoes a freeze from outside: the guard's.
        still.freeze().unwrap();
        term.thaw().unwrap();
        assert!(!stands());
    }
}
