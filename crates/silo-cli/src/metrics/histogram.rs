//! Latencies, counted without a lock: a read of 4 KiB from memory takes well under a microsecond,
//! and a lock for each would be seen in the figures it is there to give.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Upper ends of the buckets, in nanoseconds: 1 us to 4 s in steps of 4 and 2.5, then everything.
const ENDS: [u64; 14] = [
    1_000,
    4_000,
    10_000,
    40_000,
    100_000,
    400_000,
    1_000_000,
    4_000_000,
    10_000_000,
    40_000_000,
    100_000_000,
    400_000_000,
    1_000_000_000,
    4_000_000_000,
];

/// How long operations took.
#[derive(Debug, Default)]
pub(crate) struct Latencies {
    buckets: [AtomicU64; ENDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl Latencies {
    /// Counts one.
    pub(crate) fn add(&self, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = ENDS.partition_point(|&end| end < nanoseconds);
        // Each is a sum of its own; a scrape in between may miss the newest, never an older one.
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub(crate) fn read(&self) -> Spread {
        let counts = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed));
        let ends = ENDS.iter().map(|&end| end as f64 / 1e9).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = ends.zip(counts).collect();
        Spread {
            count: buckets.iter().map(|(_, count)| count).sum(),
            sum: self.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9,
            buckets,
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_latency_lies_in_the_bucket_whose_end_it_does_not_pass() {
        let latencies = Latencies::default();
        for nanoseconds in [0, 1000, 1001, 4_000_000_000, 4_000_000_001] {
            latencies.add(Duration::from_nanos(nanoseconds));
        }
        latencies.add(Duration::MAX);
        let read = latencies.read();
        assert_eq!(read.count, 6);
        assert_eq!(read.buckets[0], (1e-6, 2));
        assert_eq!(read.buckets[1], (4e-6, 1));
        assert_eq!(read.buckets[13], (4.0, 1));
        assert_eq!(read.buckets[14], (f64::INFINITY, 2));
    }
}
