//! Latencies as Prometheus wants them: the same few buckets always, so that rates can be taken.

use silo::times::Histogram;
use std::time::Duration;

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
pub(crate) struct Spread {
    /// How many.
    pub(crate) count: u64,
    /// All together, in seconds.
    pub(crate) sum: f64,
    /// Upper end in seconds, and how many lie in the bucket (not below it).
    pub(crate) buckets: Vec<(f64, u64)>,
}

impl Spread {
    /// Of times that were counted in finer buckets. One that may lie on either side of an end is
    /// counted above it.
    pub(crate) fn of(times: &Histogram) -> Self {
        Self::from_cumulative(times.cumulative(), times.sum())
    }

    /// Of upper bounds, each with how many are up to there.
    pub(crate) fn from_cumulative(
        bounds: impl IntoIterator<Item = (Duration, u64)>,
        sum: Duration,
    ) -> Self {
        let mut counts = [0; ENDS.len() + 1];
        let mut before = 0;
        for (bound, seen) in bounds {
            counts[ENDS.partition_point(|&end| end < bound)] += seen - before;
            before = seen;
        }
        let ends = ENDS.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
        Self { count: before, sum: sum.as_secs_f64(), buckets: ends.zip(counts).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
