//! What silo says about itself to Prometheus.
//!
//! [`names`] is the one list of metrics; `docs/silo-metrics.md` shows it and a test compares.
//! Whoever has figures is a [`Source`]: it is asked at each scrape and answers from counters that
//! it keeps anyway, so that nothing is computed between scrapes, and no scrape walks over blocks.
//!
//! ```text
//!  metered devices ─┐
//!  move, backup …  ─┼─ Source::read ─► scrape
//! ```
//!
//! What must hold: a figure without a line in [`names`] cannot be given; a scrape never waits for
//! an operation of a device.

mod device;
mod moving;
pub(crate) mod names;

pub(crate) use device::{CacheFigures, DeviceFigures, FilterFigures};
pub(crate) use moving::{MoveFigures, Tracking};
pub(crate) use scrape::{Endpoint, Metrics, Readings, Source};

use scrape::Spread;
use silo::times::Histogram;

/// Latencies as Prometheus gets them.
pub(crate) fn spread(times: &Histogram) -> Spread {
    Spread::from_cumulative(times.cumulative(), times.sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::Arc, time::Duration};

    struct Fixed;

    impl Source for Fixed {
        fn read(&self, readings: &mut Readings) {
            readings.count(&names::DEVICE_READ_BYTES, &["root"], 7);
            readings.count(&names::DEVICE_READ_BYTES, &["da\"ta"], 8);
            readings.level(&names::DEVICE_SIZE, &["root"], 4096.0);
            let two = Duration::from_millis(2);
            let spread = Spread::from_cumulative([(two, 1)], two);
            readings.spread(&names::DEVICE_READ, &["root"], spread);
        }
    }

    #[test]
    fn figures_are_written_as_open_metrics_and_names_without_figures_too() {
        let metrics = Metrics::new(names::ALL);
        metrics.add(Arc::new(Fixed));
        let text = metrics.text().unwrap();
        for line in [
            "# TYPE silo_device_read_bytes counter",
            "silo_device_read_bytes_total{device=\"root\"} 7",
            "silo_device_read_bytes_total{device=\"da\\\"ta\"} 8",
            "silo_device_size_bytes{device=\"root\"} 4096.0",
            "silo_device_read_seconds_bucket{le=\"0.001\",device=\"root\"} 0",
            "silo_device_read_seconds_bucket{le=\"0.004\",device=\"root\"} 1",
            "silo_device_read_seconds_bucket{le=\"+Inf\",device=\"root\"} 1",
            "silo_device_read_seconds_sum{device=\"root\"} 0.002",
            "# EOF",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is missing in\n{text}");
        }
        for metric in names::ALL {
            assert!(text.contains(&format!("# HELP {} ", metric.name)), "{}", metric.name);
        }
    }
}
