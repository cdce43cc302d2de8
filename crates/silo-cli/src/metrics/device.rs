//! The figures of a device that is [`Metered`], and of what lies below it.

use super::{Readings, Source, names, spread};
use silo::{
    filter::{Metered, RedundantWrites, WriteCache},
    io::BlockDevice,
};
use std::sync::Arc;

/// A device with the name it is known by.
pub(crate) struct DeviceFigures {
    name: String,
    device: Arc<Metered>,
}

impl DeviceFigures {
    /// Of `device`.
    pub(crate) fn new(name: &str, device: Arc<Metered>) -> Arc<Self> {
        Arc::new(Self { name: name.to_owned(), device })
    }
}

impl Source for DeviceFigures {
    fn read(&self, readings: &mut Readings) {
        let device = [self.name.as_str()];
        let measures = self.device.measures();
        readings.level(&names::DEVICE_SIZE, &device, self.device.size() as f64);
        for (metric, of) in [
            (&names::DEVICE_READ, &measures.read),
            (&names::DEVICE_WRITE, &measures.write),
            (&names::DEVICE_FLUSH, &measures.flush),
        ] {
            readings.spread(metric, &device, spread(&of.latency));
        }
        for (metric, of) in [
            (&names::DEVICE_READ_BYTES, &measures.read),
            (&names::DEVICE_WRITE_BYTES, &measures.write),
            (&names::DEVICE_ZERO_BYTES, &measures.zero),
            (&names::DEVICE_TRIM_BYTES, &measures.trim),
        ] {
            readings.count(metric, &device, of.bytes);
        }
        for (operation, of) in [
            ("read", &measures.read),
            ("write", &measures.write),
            ("flush", &measures.flush),
            ("zero", &measures.zero),
            ("trim", &measures.trim),
        ] {
            readings.count(&names::DEVICE_ERRORS, &[&self.name, operation], of.errors);
        }
    }
}

/// The figures of a write cache.
pub(crate) struct CacheFigures {
    name: String,
    cache: Arc<WriteCache>,
}

impl CacheFigures {
    /// Of `cache`.
    pub(crate) fn new(name: &str, cache: Arc<WriteCache>) -> Arc<Self> {
        Arc::new(Self { name: name.to_owned(), cache })
    }
}

impl Source for CacheFigures {
    fn read(&self, readings: &mut Readings) {
        let device = [self.name.as_str()];
        let status = self.cache.status();
        readings.level(&names::CACHE_HELD, &device, status.held as f64);
        readings.level(&names::CACHE_WAITING, &device, status.waiting as f64);
        readings.count(&names::CACHE_WRITTEN, &device, status.written_back);
        readings.count(&names::CACHE_ERRORS, &device, status.failures);
    }
}

/// The figures of a filter of redundant writes.
pub(crate) struct FilterFigures {
    name: String,
    filter: Arc<RedundantWrites>,
}

impl FilterFigures {
    /// Of `filter`.
    pub(crate) fn new(name: &str, filter: Arc<RedundantWrites>) -> Arc<Self> {
        Arc::new(Self { name: name.to_owned(), filter })
    }
}

impl Source for FilterFigures {
    fn read(&self, readings: &mut Readings) {
        let (dropped, forwarded) = self.filter.counts();
        readings.count(&names::FILTER_DROPPED, &[&self.name], dropped);
        readings.count(&names::FILTER_FORWARDED, &[&self.name], forwarded);
    }
}
