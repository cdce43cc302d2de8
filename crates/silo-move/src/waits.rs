//! How long readers waited.

use silo_block::times::{Histogram, Times};
use std::time::Duration;

/// Counts waits; shared by all readers.
#[derive(Default)]
pub(crate) struct Waits(Times);

/// What readers waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitSummary {
    /// How many accesses waited.
    pub count: u64,
    /// Half of them waited at most so long.
    pub p50: Duration,
    /// 99 of 100 waited at most so long.
    pub p99: Duration,
    /// The longest wait.
    pub longest: Duration,
}

impl Waits {
    pub(crate) fn add(&self, wait: Duration) {
        self.0.add(wait);
    }

    pub(crate) fn read(&self) -> Histogram {
        self.0.read()
    }

    pub(crate) fn summary(&self) -> WaitSummary {
        let waits = self.read();
        let (p50, p99) = (waits.quantile(0.5), waits.quantile(0.99));
        WaitSummary { count: waits.count(), p50, p99, longest: waits.longest() }
    }
}
