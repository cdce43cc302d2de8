//! How long things took: counts in buckets of an eighth of a power of two, so that a figure is right
//! to an eighth, in three kilobytes and a few uncontended atomic adds.
//!
//! Used wherever latencies are told: devices, waits of readers at a destination, writers that a
//! backup holds. Reads no clock: whoever measured gives the time.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

const STEPS: u64 = 8;
/// Up to 2^45 nanoseconds, nine hours; what took longer counts as that.
const BUCKETS: usize = 43 * STEPS as usize;

fn bucket(nanoseconds: u64) -> usize {
    if nanoseconds < STEPS {
        return nanoseconds as usize;
    }
    let power = u64::from(nanoseconds.ilog2());
    let step = (nanoseconds >> (power - 3)) & (STEPS - 1);
    (((power - 2) * STEPS + step) as usize).min(BUCKETS - 1)
}

/// The first time that is too long for a bucket.
fn bound(bucket: usize) -> Duration {
    let next = bucket as u64 + 1;
    if next < STEPS {
        return Duration::from_nanos(next);
    }
    let (power, step) = (next / STEPS + 2, next % STEPS);
    Duration::from_nanos((STEPS + step) << (power - 3))
}

/// Counts times; shared by all who measure.
#[derive(Debug)]
pub struct Times {
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
    longest: AtomicU64,
}

impl Default for Times {
    fn default() -> Self {
        let counts = (0..BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Self { counts, sum: AtomicU64::new(0), longest: AtomicU64::new(0) }
    }
}

impl Times {
    /// Counts one.
    pub fn add(&self, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(nanoseconds)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(nanoseconds, Ordering::Relaxed);
        if nanoseconds > self.longest.load(Ordering::Relaxed) {
            self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
        }
    }

    /// What was counted so far.
    #[must_use]
    pub fn read(&self) -> Histogram {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Histogram {
            counts: self.counts.iter().map(read).collect(),
            sum: Duration::from_nanos(read(&self.sum)),
            longest: Duration::from_nanos(read(&self.longest)),
        }
    }
}

/// Times that were counted, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: Vec<u64>,
    sum: Duration,
    longest: Duration,
}

impl Histogram {
    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// All of them added up.
    #[must_use]
    pub fn sum(&self) -> Duration {
        self.sum
    }

    /// The longest.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// A time that `share` (0 to 1) of them did not exceed; zero if there are none.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Duration {
        let wanted = (self.count() as f64 * share.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut cumulative = self.cumulative();
        let found = cumulative.find(|(_, seen)| *seen >= wanted);
        found.map_or(Duration::ZERO, |(bound, _)| bound.min(self.longest))
    }

    /// The buckets that are not empty: an upper bound of the time, and how many up to there
    /// altogether, as Prometheus wants them.
    pub fn cumulative(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let filled = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        filled.scan(0, |seen, (index, count)| {
            *seen += count;
            Some((bound(index), *seen))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_lies_below_the_bound_of_its_bucket_and_above_that_of_the_one_before() {
        for time in (0..200).chain((8..41).flat_map(|e| [(1 << e) - 1, 1 << e, (1 << e) + 1])) {
            let at = bucket(time);
            assert!(Duration::from_nanos(time) < bound(at), "{time} in {at}");
            if at > 0 {
                assert!(Duration::from_nanos(time) >= bound(at - 1), "{time} in {at}");
            }
        }
    }

    #[test]
    fn percentiles_are_right_to_an_eighth() {
        let times = Times::default();
        (1..=1000).for_each(|n| times.add(Duration::from_micros(n)));
        let read = times.read();
        assert_eq!((read.count(), read.longest()), (1000, Duration::from_millis(1)));
        assert_eq!(read.sum(), Duration::from_micros(500_500));
        let near = |time: Duration, micros: f64| (time.as_secs_f64() * 1e6 / micros - 1.0).abs();
        assert!(near(read.quantile(0.5), 500.0) < 0.13, "{read:?}");
        assert!(near(read.quantile(0.99), 990.0) < 0.13, "{read:?}");
        assert_eq!(read.quantile(1.0), Duration::from_millis(1));
        assert_eq!(read.cumulative().last().unwrap().1, 1000);
        assert_eq!(Histogram::default().quantile(0.5), Duration::ZERO);
        times.add(Duration::MAX);
        assert_eq!(times.read().count(), 1001);
    }
}
