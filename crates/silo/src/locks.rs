//! Range locks: two changes of the same blocks never overlap in time, and a frozen device takes no
//! change from its guest. Reads take no lock.

use crate::block::BlockRange;
use std::{
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Longest wait for another change of the same blocks: that is one write to a file, unless the
/// file's device hangs.
const LIMIT: Duration = Duration::from_secs(300);

/// A lock that was not had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LockError {
    /// The device is frozen.
    #[error("the device is frozen: nothing may write here")]
    Frozen,
    /// Somebody else held it for too long.
    #[error("{what} did not end within {limit:?}")]
    Timeout { what: &'static str, limit: Duration },
}

impl From<LockError> for io::Error {
    fn from(error: LockError) -> Self {
        let kind = match error {
            LockError::Frozen => io::ErrorKind::NotConnected,
            LockError::Timeout { .. } => io::ErrorKind::TimedOut,
        };
        Self::new(kind, error)
    }
}

/// Who changes blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// The guest: refused while frozen.
    Guest,
    /// A block that arrives from another host.
    Mover,
}

#[derive(Default)]
struct Held {
    ranges: Vec<(BlockRange, Who)>,
    waiters: usize,
    frozen: bool,
}

pub(crate) struct RangeLocks {
    held: Mutex<Held>,
    freed: Condvar,
}

/// Blocks that nobody else changes while this lives.
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: BlockRange,
    who: Who,
}

fn overlap(a: BlockRange, b: BlockRange) -> bool {
    a.start.0 < b.end() && b.start.0 < a.end()
}

impl RangeLocks {
    pub(crate) fn new(frozen: bool) -> Self {
        let held = Held { frozen, ..Held::default() };
        Self { held: Mutex::new(held), freed: Condvar::new() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // Nothing in this module panics with the lock held; the list is whole at every step.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody changes blocks of `range`, and keeps others from it.
    pub(crate) fn lock(&self, range: BlockRange, who: Who) -> Result<RangeGuard<'_>, LockError> {
        let mut held = self.held();
        let mut deadline = None;
        loop {
            if held.frozen && who == Who::Guest {
                return Err(LockError::Frozen);
            }
            if !held.ranges.iter().any(|(other, _)| overlap(*other, range)) {
                held.ranges.push((range, who));
                return Ok(RangeGuard { locks: self, range, who });
            }
            let until = *deadline.get_or_insert_with(|| Instant::now() + LIMIT);
            held = self.wait(held, until).ok_or(LockError::Timeout {
                what: "another write of the same blocks",
                limit: LIMIT,
            })?;
        }
    }

    /// Refuses the guest's changes from now on, and waits for those that are under way. If they do
    /// not end in time, the disk stays frozen all the same.
    pub(crate) fn freeze(&self, limit: Duration) -> Result<(), LockError> {
        let until = Instant::now() + limit;
        let mut held = self.held();
        held.frozen = true;
        self.freed.notify_all();
        while held.ranges.iter().any(|(_, who)| *who == Who::Guest) {
            held = self.wait(held, until).ok_or(LockError::Timeout {
                what: "a write that was under way when the disk was frozen",
                limit,
            })?;
        }
        Ok(())
    }

    pub(crate) fn thaw(&self) {
        self.held().frozen = false;
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.held().frozen
    }

    /// Waits for a change of the list; `None` when it is too late.
    fn wait<'a>(
        &self,
        mut held: MutexGuard<'a, Held>,
        until: Instant,
    ) -> Option<MutexGuard<'a, Held>> {
        let left = until.checked_duration_since(Instant::now())?;
        held.waiters += 1;
        let (mut held, _) =
            self.freed.wait_timeout(held, left).unwrap_or_else(PoisonError::into_inner);
        held.waiters -= 1;
        Some(held)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = self.locks.held();
        let at =
            held.ranges.iter().position(|(range, who)| *range == self.range && *who == self.who);
        held.ranges.swap_remove(at.expect("a guard's range is in the list until its drop"));
        if held.waiters > 0 {
            self.locks.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, thread};

    #[test]
    fn overlapping_changes_wait_for_each_other_and_others_do_not() {
        let locks = RangeLocks::new(false);
        let first = locks.lock(BlockRange::new(0, 4), Who::Guest).unwrap();
        drop(locks.lock(BlockRange::new(4, 4), Who::Guest).unwrap());
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                let _second = locks.lock(BlockRange::new(3, 2), Who::Mover).unwrap();
                sender.send(()).unwrap();
            });
            assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
            drop(first);
            receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        });
    }

    #[test]
    fn freezing_waits_for_the_guests_writes_and_refuses_new_ones_even_those_that_queue() {
        let locks = RangeLocks::new(false);
        let first = locks.lock(BlockRange::new(0, 4), Who::Guest).unwrap();
        thread::scope(|scope| {
            let queued = scope.spawn(|| locks.lock(BlockRange::new(0, 1), Who::Guest).err());
            let late = locks.freeze(Duration::from_millis(30));
            assert!(matches!(late, Err(LockError::Timeout { .. })));
            assert!(matches!(queued.join().unwrap(), Some(LockError::Frozen)));
            let frozen = scope.spawn(|| locks.freeze(Duration::from_secs(10)));
            drop(first);
            frozen.join().unwrap().unwrap();
        });
        assert!(locks.lock(BlockRange::new(9, 1), Who::Guest).is_err());
        drop(locks.lock(BlockRange::new(9, 1), Who::Mover).unwrap());
        locks.thaw();
        drop(locks.lock(BlockRange::new(9, 1), Who::Guest).unwrap());
    }
}
