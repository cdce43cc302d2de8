//! Counts what passes: operations, bytes, errors, times. A few uncontended atomic adds and two
//! looks at the clock for each operation.

use crate::{
    io::BlockDevice,
    times::{Histogram, Times},
};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

struct Counters {
    operations: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    times: Times,
}

impl Counters {
    fn new() -> Self {
        Self {
            operations: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            times: Times::default(),
        }
    }

    fn run<T>(&self, bytes: u64, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let start = Instant::now();
        let result = work();
        self.times.add(start.elapsed());
        self.operations.fetch_add(1, Ordering::Relaxed);
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
            latency: self.times.read(),
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
            self.read.times.add(start.elapsed());
            self.read.operations.fetch_add(1, Ordering::Relaxed);
            self.read.bytes.fetch_add(length, Ordering::Relaxed);
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
