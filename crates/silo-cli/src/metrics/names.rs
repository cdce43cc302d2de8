//! The list of metrics. `docs/silo-metrics.md` shows the same; a test keeps them in step.

/// How a metric behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Only grows; Prometheus sees it with `_total` at its end.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Latencies in seconds.
    Histogram,
}

/// One metric.
#[derive(Debug)]
pub(crate) struct Metric {
    /// With its prefix, without the `_total` of a counter.
    pub(crate) name: &'static str,
    /// How it behaves.
    pub(crate) kind: Kind,
    /// Names of its labels.
    pub(crate) labels: &'static [&'static str],
    /// For people.
    pub(crate) help: &'static str,
}

macro_rules! metrics {
    ($($constant:ident $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(pub(crate) static $constant: Metric = Metric {
            name: concat!("silo_", $name),
            kind: Kind::$kind,
            labels: &[$($label),*],
            help: $help,
        };)*
        /// All of them, in the order of the documentation.
        pub(crate) static ALL: &[&Metric] = &[$(&$constant),*];
    };
}

metrics! {
    DEVICE_SIZE Gauge "device_size_bytes" ["device"] "Size of the device";
    DEVICE_READ Histogram "device_read_seconds" ["device"] "Time that reads took at the device";
    DEVICE_WRITE Histogram "device_write_seconds" ["device"] "Time that writes took at the device";
    DEVICE_FLUSH Histogram "device_flush_seconds" ["device"] "Time that flushes took at the device";
    DEVICE_READ_BYTES Counter "device_read_bytes" ["device"] "Bytes read";
    DEVICE_WRITE_BYTES Counter "device_write_bytes" ["device"] "Bytes written";
    DEVICE_ZERO_BYTES Counter "device_zero_bytes" ["device"] "Bytes made zero without being sent";
    DEVICE_TRIM_BYTES Counter "device_trim_bytes" ["device"] "Bytes that are no longer needed";
    DEVICE_ERRORS Counter "device_errors" ["device", "operation"]
        "Operations that failed: read, write, flush, zero or trim";
    CACHE_HELD Gauge "write_cache_held_bytes" ["device"] "Memory that the write cache holds";
    CACHE_WAITING Gauge "write_cache_waiting_writers" ["device"] "Writers that wait for room in it";
    CACHE_WRITTEN Counter "write_cache_written_back_bytes" ["device"]
        "Bytes that went to the device behind";
    CACHE_ERRORS Counter "write_cache_errors" ["device"]
        "Writes to the device behind that failed; each is tried again";
    FILTER_DROPPED Counter "filter_dropped_bytes" ["device"]
        "Bytes of writes that were there already";
    FILTER_FORWARDED Counter "filter_forwarded_bytes" ["device"]
        "Bytes of writes that the filter passed on";
}
