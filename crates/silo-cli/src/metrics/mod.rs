//! What silo says about itself to Prometheus.
//!
//! [`names`] is the one list of metrics; `docs/silo-metrics.md` shows it and a test compares.
//! Whoever has figures is a [`Source`]: it is asked at each scrape and answers from counters that
//! it keeps anyway, so that nothing is computed between scrapes, and no scrape walks over blocks.
//!
//! ```text
//!  metered devices ─┐
//!  move, backup …  ─┼─ Source::read ─► Readings ─► text ─► http
//! ```
//!
//! What must hold: a figure without a line in [`names`] cannot be given; a scrape never waits for
//! an operation of a device.

mod device;
mod histogram;
mod http;
mod moving;
pub(crate) mod names;

pub(crate) use device::{CacheFigures, DeviceFigures, FilterFigures};
pub(crate) use histogram::Spread;
pub(crate) use http::Endpoint;
pub(crate) use moving::{MoveFigures, Tracking};

use names::{Kind, Metric};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, text},
    metrics::MetricType,
    registry::{Registry, Unit},
};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

/// Something that has figures.
pub(crate) trait Source: Send + Sync {
    /// Gives the figures of this moment. Must not wait and must not walk over blocks.
    fn read(&self, readings: &mut Readings);
}

/// One figure.
enum Figure {
    Count(u64),
    Level(f64),
    Spread(Spread),
}

type Labels = Vec<(&'static str, String)>;
/// Of exemplars, which are not used.
type NoLabels = [(&'static str, &'static str); 0];

/// The figures of one scrape, by metric.
#[derive(Default)]
pub(crate) struct Readings(BTreeMap<&'static str, Vec<(Labels, Figure)>>);

impl Readings {
    /// Something that only grows.
    pub(crate) fn count(&mut self, metric: &'static Metric, labels: &[&str], value: u64) {
        self.put(metric, Kind::Counter, labels, Figure::Count(value));
    }

    /// Something that goes up and down.
    pub(crate) fn level(&mut self, metric: &'static Metric, labels: &[&str], value: f64) {
        self.put(metric, Kind::Gauge, labels, Figure::Level(value));
    }

    /// Latencies.
    pub(crate) fn spread(&mut self, metric: &'static Metric, labels: &[&str], value: Spread) {
        self.put(metric, Kind::Histogram, labels, Figure::Spread(value));
    }

    fn put(&mut self, metric: &'static Metric, kind: Kind, labels: &[&str], figure: Figure) {
        assert_eq!(metric.kind, kind, "{} is not of this kind", metric.name);
        assert_eq!(metric.labels.len(), labels.len(), "{} has other labels", metric.name);
        let labels =
            metric.labels.iter().copied().zip(labels.iter().map(|&value| value.to_owned()));
        self.0.entry(metric.name).or_default().push((labels.collect(), figure));
    }
}

/// All sources of this process. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Metrics {
    sources: Arc<Mutex<Vec<Arc<dyn Source>>>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Asks this source too from now on.
    pub(crate) fn add(&self, source: Arc<dyn Source>) {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).push(source);
    }

    /// The figures of this moment, as OpenMetrics text.
    pub(crate) fn text(&self) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self.clone()));
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut readings = Readings::default();
        for source in sources {
            source.read(&mut readings);
        }
        for metric in names::ALL {
            let kind = match metric.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
            };
            // Every name is there from the start: a dashboard can tell "none" from "unknown".
            let mut descriptor =
                encoder.encode_descriptor(metric.name, metric.help, None::<&Unit>, kind)?;
            for (labels, figure) in readings.0.remove(metric.name).unwrap_or_default() {
                let labels: Vec<(&str, String)> = labels;
                encode_one(descriptor.encode_family(&labels)?, &figure)?;
            }
        }
        Ok(())
    }
}

fn encode_one(mut encoder: MetricEncoder<'_>, figure: &Figure) -> Result<(), fmt::Error> {
    match figure {
        Figure::Count(value) => encoder.encode_counter::<NoLabels, u64, u64>(value, None),
        Figure::Level(value) => encoder.encode_gauge(value),
        Figure::Spread(spread) => {
            encoder.encode_histogram::<NoLabels>(spread.sum, spread.count, &spread.buckets, None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

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
        let metrics = Metrics::default();
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
