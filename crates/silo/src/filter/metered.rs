//! Counts what passes: operations, bytes, errors, times. A few uncontended atomic adds and two
//! looks at the clock for each operation.

use crate::io::BlockDevice;
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Buckets of a [`Histogram`]: four for each power of two of nanoseconds, to over an hour.
const BUCKETS: usize = 42 * 4;

/// How long operations took. Each bucket is at most a quarter wider than the one below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    counts: Vec<u64>,
}

fn bucket(nanoseconds: u64) -> usize {
    if nanoseconds < 4 {
        return nanoseconds as usize;
    }
    let exponent = nanoseconds.ilog2();
    let quarter = (nanoseconds >> (exponent - 2)) & 3;
    ((exponent as usize - 1) * 4 + quarter as usize).min(BUCKETS - 1)
}

/// The first time that is too long for a bucket.
fn bound(bucket: usize) -> Duration {
    let next = bucket as u64 + 1;
    if next < 4 {
        return Duration::from_nanos(next);
    }
    let (exponent, quarter) = (next / 4 + 1, next % 4);
    Duration::from_nanos((4 + quarter) << (exponent - 2))
}

impl Histogram {
    /// How many were measured.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// A time that `share` (0 to 1) of all operations did not exceed; zero if there were none.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Duration {
        let wanted = (self.count() as f64 * share.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return bound(index);
            }
        }
        Duration::ZERO
    }

    /// The buckets that are not empty: an upper bound of the time, and how many up to there
    /// altogether, as Prometheus wants them.
    pub fn cumulative(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let mut seen = 0;
        self.counts.iter().enumerate().filter(|(_, count)| **count > 0).map(
            move |(index, count)| {
                seen += count;
                (bound(index), seen)
            },
        )
    }
}

struct Counters {
    operations: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
    buckets: Box<[AtomicU64]>,
}

impl Counters {
    fn new() -> Self {
        Self {
            operations: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn run<T>(&self, bytes: u64, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let start = Instant::now();
        let result = work();
        let took = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(took, Ordering::Relaxed);
        self.buckets[bucket(took)].fetch_add(1, Ordering::Relaxed);
        match result {
            Ok(_) => self.bytes.fetch_add(bytes, Ordering::Relaxed),
            Err(_) => self.errors.fetch_add(1, Ordering::Relaxed),
        };
        result
    }

    fn read(&self) -> OpMeasures {
        OpMeasures {
            operations: self.operations.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            time: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)),
            latency: Histogram {
                counts: self.buckets.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            },
        }
    }
}

/// What one kind of operation did so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpMeasures {
    /// How many, failed ones too.
    pub operations: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// How many failed.
    pub errors: u64,
    /// Time spent in them, added up.
    pub time: Duration,
    /// Their times.
    pub latency: Histogram,
}

/// What all operations did so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measures {
    /// Reads.
    pub read: OpMeasures,
    /// Writes.
    pub write: OpMeasures,
    /// Flushes.
    pub flush: OpMeasures,
    /// Trims.
    pub trim: OpMeasures,
    /// Writes of zeros.
    pub zero: OpMeasures,
}

/// See the comment of its module.
pub struct Metered {
    inner: Arc<dyn BlockDevice>,
    read: Counters,
    write: Counters,
    flush: Counters,
    trim: Counters,
    zero: Counters,
}

impl Metered {
    /// Over `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>) -> Self {
        let counters = Counters::new;
        Self {
            inner,
            read: counters(),
            write: counters(),
            flush: counters(),
            trim: counters(),
            zero: counters(),
        }
    }

    /// What was counted so far; operations under way are not in it.
    #[must_use]
    pub fn measures(&self) -> Measures {
        Measures {
            read: self.read.read(),
            write: self.write.read(),
            flush: self.flush.read(),
            trim: self.trim.read(),
            zero: self.zero.read(),
        }
    }
}

impl BlockDevice for Metered {
    forward!(inner: size may_wait interrupt extents prefetch zeroes_fast is_read_only);

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read.run(buf.len() as u64, || self.inner.read_at(offset, buf))
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let start = Instant::now();
        let (length, result) = (buf.len() as u64, self.inner.try_read_at(offset, buf));
        if matches!(result, Ok(true)) {
            // Counted where it was an answer; otherwise a read follows.
            let took = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.read.operations.fetch_add(1, Ordering::Relaxed);
            self.read.bytes.fetch_add(length, Ordering::Relaxed);
            self.read.nanoseconds.fetch_add(took, Ordering::Relaxed);
            self.read.buckets[bucket(took)].fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write.run(data.len() as u64, || self.inner.write_at(offset, data))
    }

    fn flush(&self) -> io::Result<()> {
        self.flush.run(0, || self.inner.flush())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.trim.run(length, || self.inner.trim(offset, length))
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.zero.run(length, || self.inner.zero(offset, length, allocate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemoryDevice;

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
    fn operations_bytes_and_errors_are_counted_by_kind() {
        let device = Metered::new(Arc::new(MemoryDevice::new("test", 8192).unwrap()));
        device.write_at(0, &[1; 4096]).unwrap();
        device.read_at(0, &mut [0; 100]).unwrap();
        assert!(device.read_at(8192, &mut [0; 1]).is_err());
        device.trim(0, 4096).unwrap();
        device.flush().unwrap();
        let measures = device.measures();
        assert_eq!((measures.write.operations, measures.write.bytes), (1, 4096));
        let read = &measures.read;
        assert_eq!((read.operations, read.bytes, read.errors), (2, 100, 1));
        assert_eq!((read.latency.count(), measures.flush.operations), (2, 1));
        assert!(read.latency.quantile(0.5) <= read.latency.quantile(1.0));
        assert_eq!(read.latency.cumulative().last().unwrap().1, 2);
        assert_eq!(measures.trim.bytes, 4096);
    }
}
