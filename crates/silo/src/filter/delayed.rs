//! Latency and bandwidth by the caller's timer: how far away a device is, without a network.
//!
//! Every operation takes its latency on the thread that calls, so a thousand threads have a
//! thousand operations under way, as on a line that is long and not narrow. A bandwidth, if one is
//! given, is shared by all: bytes queue for the line, in order of arrival.

use crate::io::BlockDevice;
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// What is added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delays {
    /// To each read.
    pub read: Duration,
    /// To each write, trim and zero.
    pub write: Duration,
    /// To each flush.
    pub flush: Duration,
    /// Bytes a second in either direction, together; 0: no limit.
    pub bandwidth: u64,
}

impl Delays {
    /// The same round trip for every operation.
    #[must_use]
    pub const fn round_trip(time: Duration) -> Self {
        Self { read: time, write: time, flush: time, bandwidth: 0 }
    }
}

/// See the comment of its module.
pub struct Delayed {
    inner: Arc<dyn BlockDevice>,
    delays: Delays,
    /// Until when the line is taken.
    taken: Mutex<Instant>,
}

impl Delayed {
    /// Over `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>, delays: Delays) -> Self {
        Self { inner, delays, taken: Mutex::new(Instant::now()) }
    }

    fn delay(&self, start: Instant, latency: Duration, bytes: u64) {
        let mut until = start + latency;
        if self.delays.bandwidth > 0 && bytes > 0 {
            let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.delays.bandwidth);
            let line = Duration::from_nanos(nanoseconds.min(u128::from(u64::MAX)) as u64);
            let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
            *taken = (*taken).max(start) + line;
            until = *taken + latency;
        }
        // The delay is what this is for; nobody is waited for.
        if let Some(left) = until.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) {
            thread::sleep(left);
        }
    }
}

impl BlockDevice for Delayed {
    forward!(inner: size interrupt extents prefetch zeroes_fast is_read_only);

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = Instant::now();
        let result = self.inner.read_at(offset, buf);
        self.delay(start, self.delays.read, buf.len() as u64);
        result
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = Instant::now();
        let result = self.inner.write_at(offset, data);
        self.delay(start, self.delays.write, data.len() as u64);
        result
    }

    fn flush(&self) -> io::Result<()> {
        let start = Instant::now();
        let result = self.inner.flush();
        self.delay(start, self.delays.flush, 0);
        result
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        let start = Instant::now();
        let result = self.inner.trim(offset, length);
        self.delay(start, self.delays.write, 0);
        result
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        let start = Instant::now();
        let result = self.inner.zero(offset, length, allocate);
        self.delay(start, self.delays.write, 0);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemoryDevice;

    #[test]
    fn operations_wait_side_by_side_and_bytes_one_after_the_other() {
        let memory = Arc::new(MemoryDevice::new("test", 1 << 20).unwrap());
        let far = Delayed::new(memory.clone(), Delays::round_trip(Duration::from_millis(200)));
        let start = Instant::now();
        thread::scope(|scope| {
            for thread in 0..16u64 {
                let far = &far;
                scope.spawn(move || far.read_at(thread * 4096, &mut [0; 4096]).unwrap());
            }
        });
        let took = start.elapsed();
        // One after the other they would take sixteen times as long.
        assert!(took >= Duration::from_millis(200) && took < Duration::from_secs(3), "{took:?}");
        let narrow = Delayed::new(memory, Delays { bandwidth: 10 << 20, ..Delays::default() });
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| narrow.write_at(0, &vec![1; 256 << 10]).unwrap());
            }
        });
        assert!(start.elapsed() >= Duration::from_millis(99));
    }
}
