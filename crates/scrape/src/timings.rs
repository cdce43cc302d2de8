//! Times as Prometheus wants them: the same few buckets always, so that rates can be taken.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Upper ends of the buckets: 1 us to 4 s in steps of 4 and 2.5, then everything.
const ENDS: [Duration; 14] = [
    Duration::from_micros(1),
    Duration::from_micros(4),
    Duration::from_micros(10),
    Duration::from_micros(40),
    Duration::from_micros(100),
    Duration::from_micros(400),
    Duration::from_millis(1),
    Duration::from_millis(4),
    Duration::from_millis(10),
    Duration::from_millis(40),
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_secs(1),
    Duration::from_secs(4),
];

/// A histogram at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Spread {
    /// How many.
    pub count: u64,
    /// All together, in seconds.
    pub sum: f64,
    /// Upper end in seconds, and how many lie in the bucket (not below it).
    pub buckets: Vec<(f64, u64)>,
}

impl Spread {
    /// Of times that were counted in finer buckets: upper bounds, each with how many are up to there.
    /// One that may lie on either side of an end is counted above it.
    #[must_use]
    pub fn from_cumulative(
        bounds: impl IntoIterator<Item = (Duration, u64)>,
        sum: Duration,
    ) -> Self {
        let mut counts = [0; ENDS.len() + 1];
        let mut before = 0;
        for (bound, seen) in bounds {
            counts[ENDS.partition_point(|&end| end < bound)] += seen - before;
            before = seen;
        }
        Self { count: before, sum: sum.as_secs_f64(), buckets: buckets(counts) }
    }
}

fn buckets(counts: impl IntoIterator<Item = u64>) -> Vec<(f64, u64)> {
    ENDS.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]).zip(counts).collect()
}

/// Times that are counted as they happen; costs two additions each.
#[derive(Debug, Default)]
pub struct Timings {
    nanoseconds: AtomicU64,
    counts: [AtomicU64; ENDS.len() + 1],
}

impl Timings {
    /// One more.
    pub fn record(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        self.counts[ENDS.partition_point(|&end| end < time)].fetch_add(1, Ordering::Relaxed);
    }

    /// All so far. While times are recorded the sum may be of one more or less than the count.
    #[must_use]
    pub fn read(&self) -> Spread {
        let buckets = buckets(self.counts.iter().map(|count| count.load(Ordering::Relaxed)));
        Spread {
            count: buckets.iter().map(|(_, count)| count).sum(),
            sum: self.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9,
            buckets,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_lies_in_the_bucket_whose_end_it_does_not_pass() {
        let timings = Timings::default();
        for nanoseconds in [1, 1000, 1001, 4_000_000_000, 4_000_000_001] {
            timings.record(Duration::from_nanos(nanoseconds));
        }
        let spread = timings.read();
        assert_eq!(spread.count, 5);
        assert!((spread.sum - 8.000_002_003).abs() < 1e-9, "{}", spread.sum);
        assert_eq!(spread.buckets[0], (1e-6, 2));
        assert_eq!(spread.buckets[1], (4e-6, 1));
        assert_eq!(spread.buckets[13], (4.0, 1));
        assert_eq!(spread.buckets[14], (f64::INFINITY, 1));
    }

    #[test]
    fn each_latency_lies_in_the_bucket_whose_end_it_does_not_pass() {
        let bounds = [(1, 2), (1000, 3), (1001, 7), (4_000_000_000, 8), (u64::MAX, 10)];
        let bounds = bounds.map(|(bound, seen)| (Duration::from_nanos(bound), seen));
        let spread = Spread::from_cumulative(bounds, Duration::from_millis(1500));
        assert_eq!((spread.count, spread.sum), (10, 1.5));
        assert_eq!(spread.buckets[0], (1e-6, 3));
        assert_eq!(spread.buckets[1], (4e-6, 4));
        assert_eq!(spread.buckets[13], (4.0, 1));
        assert_eq!(spread.buckets[14], (f64::INFINITY, 2));
        assert_eq!(spread.buckets.iter().map(|(_, count)| count).sum::<u64>(), 10);
    }
}
