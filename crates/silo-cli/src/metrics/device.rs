//! A device whose operations are counted and timed.

use super::{Latencies, Readings, Source, names};
use silo::io::{BlockDevice, Extent};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// Counters of one device; the scrape reads them while the device works.
#[derive(Debug, Default)]
struct Counters {
    read: Latencies,
    write: Latencies,
    flush: Latencies,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    zeroed_bytes: AtomicU64,
    trimmed_bytes: AtomicU64,
    read_errors: AtomicU64,
    write_errors: AtomicU64,
    flush_errors: AtomicU64,
}

/// Passes everything on to the device behind it, and counts.
pub(crate) struct Measured {
    name: String,
    device: Arc<dyn BlockDevice>,
    counters: Counters,
}

impl Measured {
    /// Counts what goes through to `device`.
    pub(crate) fn new(name: &str, device: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(Self { name: name.to_owned(), device, counters: Counters::default() })
    }

    fn done<T>(
        began: Instant,
        result: io::Result<T>,
        length: usize,
        latencies: &Latencies,
        bytes: &AtomicU64,
        errors: &AtomicU64,
    ) -> io::Result<T> {
        match &result {
            Ok(_) => {
                latencies.add(began.elapsed());
                bytes.fetch_add(length as u64, Ordering::Relaxed);
            }
            Err(_) => {
                errors.fetch_add(1, Ordering::Relaxed);
            }
        }
        result
    }
}

impl BlockDevice for Measured {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (began, length) = (Instant::now(), buf.len());
        let counters = &self.counters;
        Self::done(
            began,
            self.device.read_at(offset, buf),
            length,
            &counters.read,
            &counters.read_bytes,
            &counters.read_errors,
        )
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let (began, length) = (Instant::now(), buf.len());
        let result = self.device.try_read_at(offset, buf);
        // One that would have to wait is counted when it is read.
        if matches!(result, Ok(false)) {
            return result;
        }
        let counters = &self.counters;
        Self::done(
            began,
            result,
            length,
            &counters.read,
            &counters.read_bytes,
            &counters.read_errors,
        )
    }

    fn may_wait(&self, offset: u64, length: u64) -> bool {
        self.device.may_wait(offset, length)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let began = Instant::now();
        let counters = &self.counters;
        Self::done(
            began,
            self.device.write_at(offset, data),
            data.len(),
            &counters.write,
            &counters.written_bytes,
            &counters.write_errors,
        )
    }

    fn flush(&self) -> io::Result<()> {
        let began = Instant::now();
        let counters = &self.counters;
        let none = AtomicU64::new(0);
        Self::done(began, self.device.flush(), 0, &counters.flush, &none, &counters.flush_errors)
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        let result = self.device.trim(offset, length);
        count(&result, length, &self.counters.trimmed_bytes, &self.counters.write_errors);
        result
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        let result = self.device.zero(offset, length, allocate);
        count(&result, length, &self.counters.zeroed_bytes, &self.counters.write_errors);
        result
    }

    fn interrupt(&self) {
        self.device.interrupt();
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        self.device.extents(offset, length)
    }

    fn is_read_only(&self) -> bool {
        self.device.is_read_only()
    }
}

fn count(result: &io::Result<()>, length: u64, bytes: &AtomicU64, errors: &AtomicU64) {
    match result {
        Ok(()) => bytes.fetch_add(length, Ordering::Relaxed),
        Err(_) => errors.fetch_add(1, Ordering::Relaxed),
    };
}

impl Source for Measured {
    fn read(&self, readings: &mut Readings) {
        let device = [self.name.as_str()];
        let counters = &self.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        readings.level(&names::DEVICE_SIZE, &device, self.device.size() as f64);
        readings.spread(&names::DEVICE_READ, &device, counters.read.read());
        readings.spread(&names::DEVICE_WRITE, &device, counters.write.read());
        readings.spread(&names::DEVICE_FLUSH, &device, counters.flush.read());
        readings.count(&names::DEVICE_READ_BYTES, &device, load(&counters.read_bytes));
        readings.count(&names::DEVICE_WRITE_BYTES, &device, load(&counters.written_bytes));
        readings.count(&names::DEVICE_ZERO_BYTES, &device, load(&counters.zeroed_bytes));
        readings.count(&names::DEVICE_TRIM_BYTES, &device, load(&counters.trimmed_bytes));
        for (operation, errors) in [
            ("read", &counters.read_errors),
            ("write", &counters.write_errors),
            ("flush", &counters.flush_errors),
        ] {
            readings.count(&names::DEVICE_ERRORS, &[&self.name, operation], load(errors));
        }
    }
}
