//! Waiting for blocks that have not arrived: asks for each of them once, and sleeps until they are
//! filled, overwritten, called off, or too late.

use super::error::DiskError;
use crate::map::{AtomicBits, BlockState, StateMap};
use crate::{
    block::{BlockIndex, BlockRange},
    device::Demand,
};
use std::{
    sync::{Arc, Condvar, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

pub(super) struct Arrivals {
    demand: RwLock<Option<Arc<Demand>>>,
    /// Blocks that were asked for since the disk was armed.
    asked: AtomicBits,
    /// Counts the calls of [`Arrivals::interrupt`].
    interrupts: Mutex<u64>,
    arrived: Condvar,
    limit: Duration,
}

impl Arrivals {
    pub(super) fn new(blocks: u64, limit: Duration) -> Self {
        Self {
            demand: RwLock::new(None),
            asked: AtomicBits::new(blocks),
            interrupts: Mutex::new(0),
            arrived: Condvar::new(),
            limit,
        }
    }

    /// From now on missing blocks are asked for by `demand`; those who wait already ask again.
    pub(super) fn connect(&self, demand: Demand) {
        *self.demand.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(demand));
        self.asked.clear();
        self.wake();
    }

    /// Nobody is there to be asked any more.
    pub(super) fn disconnect(&self) {
        *self.demand.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Blocks changed their state: whoever waits looks again.
    pub(super) fn wake(&self) {
        // The lock orders this after a waiter's look at the states and before its sleep, or after
        // both: no wake-up is lost.
        let _order = self.interrupts.lock().unwrap_or_else(PoisonError::into_inner);
        self.arrived.notify_all();
    }

    /// Everybody who waits now gets [`DiskError::Interrupted`].
    pub(super) fn interrupt(&self) {
        let mut interrupts = self.interrupts.lock().unwrap_or_else(PoisonError::into_inner);
        *interrupts += 1;
        self.arrived.notify_all();
    }

    /// Waits until no block of `range` is missing.
    pub(super) fn wait(&self, states: &StateMap, range: BlockRange) -> Result<(), DiskError> {
        let deadline = Instant::now() + self.limit;
        let before = *self.interrupts.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // Without a lock: a demand may answer at once, on this thread.
            self.ask(states, range)?;
            let interrupts = self.interrupts.lock().unwrap_or_else(PoisonError::into_inner);
            if !states.any(range, BlockState::Missing) {
                return Ok(());
            }
            if *interrupts != before {
                return Err(DiskError::Interrupted);
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(DiskError::ArrivalTimeout { range, limit: self.limit });
            };
            drop(
                self.arrived.wait_timeout(interrupts, left).unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    /// Asks for those missing blocks of `range` that nobody has asked for.
    pub(super) fn ask(&self, states: &StateMap, range: BlockRange) -> Result<(), DiskError> {
        let demand = self.demand.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut run: Option<BlockRange> = None;
        for block in range.start.0..range.end() {
            let missing = states.get(block) == BlockState::Missing;
            if missing && demand.is_none() {
                return Err(DiskError::NotArrived { range });
            }
            if missing && self.asked.insert_one(BlockIndex(block)) {
                run.get_or_insert(BlockRange::new(block, 0)).count += 1;
            } else if let (Some(run), Some(demand)) = (run.take(), &demand) {
                demand(run);
            }
        }
        if let (Some(run), Some(demand)) = (run, &demand) {
            demand(run);
        }
        Ok(())
    }
}
