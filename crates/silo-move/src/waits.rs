//! How long readers waited: counts in buckets of an eighth of a power of two, so that a figure is
//! right to a tenth, in a kilobyte.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

const STEPS: u64 = 8;
/// Up to 2^44 nanoseconds: five hours.
const BUCKETS: usize = 45 * STEPS as usize;

/// Counts waits; shared by all readers.
pub(crate) struct Waits {
    counts: Box<[AtomicU64]>,
    longest: AtomicU64,
}

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

impl Default for Waits {
    fn default() -> Self {
        let counts = (0..BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Self { counts, longest: AtomicU64::new(0) }
    }
}

impl Waits {
    pub(crate) fn add(&self, wait: Duration) {
        let nanos = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        self.longest.fetch_max(nanos, Ordering::Relaxed);
    }

    pub(crate) fn summary(&self) -> WaitSummary {
        let counts: Vec<u64> = self.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let longest = Duration::from_nanos(self.longest.load(Ordering::Relaxed));
        let at = |share: f64| {
            let wanted = (count as f64 * share).ceil() as u64;
            let mut seen = 0;
            let found = counts.iter().position(|count| {
                seen += count;
                seen >= wanted.max(1)
            });
            found.map_or(Duration::ZERO, |bucket| top(bucket).min(longest))
        };
        WaitSummary { count, p50: at(0.5), p99: at(0.99), longest }
    }
}

fn bucket(nanos: u64) -> usize {
    let power = u64::from(nanos.max(STEPS).ilog2());
    let step = (nanos.max(STEPS) >> (power - 3)) & (STEPS - 1);
    ((power * STEPS + step) as usize).min(BUCKETS - 1)
}

/// The longest wait that falls into a bucket.
fn top(bucket: usize) -> Duration {
    let (power, step) = (bucket as u64 / STEPS, bucket as u64 % STEPS);
    Duration::from_nanos(((STEPS + step + 1) << power.saturating_sub(3)) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_an_eighth() {
        let waits = Waits::default();
        (1..=1000).for_each(|n| waits.add(Duration::from_micros(n)));
        let summary = waits.summary();
        assert_eq!(summary.count, 1000);
        let near = |time: Duration, micros: f64| (time.as_secs_f64() * 1e6 / micros - 1.0).abs();
        assert!(near(summary.p50, 500.0) < 0.13, "{summary:?}");
        assert!(near(summary.p99, 990.0) < 0.13, "{summary:?}");
        assert_eq!(summary.longest, Duration::from_millis(1));
        assert_eq!(Waits::default().summary(), WaitSummary::default());
        Waits::default().add(Duration::MAX);
    }
}
