//! Figures of a process for Prometheus, in the OpenMetrics format over HTTP.
//!
//! A program has one list of metrics ([`metrics!`]). Whoever has figures is a [`Source`]: it is asked
//! at each scrape and answers from counters that it keeps anyway, so that nothing is computed between
//! scrapes.
//!
//! ```text
//!  sources ─► Source::read ─► Readings ─► text ─► Endpoint
//! ```
//!
//! What must hold: a figure of a metric that is not in the list, or with other labels, cannot be
//! given; every name is there from the start, also while it has no figures.

mod http;
mod timings;

pub use http::{Endpoint, EndpointError};
pub use timings::{Spread, Timings};

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

/// How a metric behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; Prometheus sees it with `_total` at its end.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Times in seconds.
    Histogram,
}

/// One metric.
#[derive(Debug)]
pub struct Metric {
    /// With its prefix, without the `_total` of a counter.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// For people.
    pub help: &'static str,
}

/// Makes the list of a program's metrics: a static for each, and `ALL`.
///
/// ```
/// scrape::metrics! { "example_"
///     REQUESTS Counter "requests" ["path"] "Requests that were answered";
/// }
/// assert_eq!(ALL[0].name, "example_requests");
/// # assert_eq!(REQUESTS.labels, ["path"]);
/// ```
#[macro_export]
macro_rules! metrics {
    ($prefix:literal $($constant:ident $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(pub(crate) static $constant: $crate::Metric = $crate::Metric {
            name: concat!($prefix, $name),
            kind: $crate::Kind::$kind,
            labels: &[$($label),*],
            help: $help,
        };)*
        /// All of them, in the order of the documentation.
        pub(crate) static ALL: &[&$crate::Metric] = &[$(&$constant),*];
    };
}

/// Something that has figures.
pub trait Source: Send + Sync {
    /// Gives the figures of this moment. Must not wait for anything that takes its time.
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
pub struct Readings(BTreeMap<&'static str, Vec<(Labels, Figure)>>);

impl Readings {
    /// Something that only grows.
    pub fn count(&mut self, metric: &'static Metric, labels: &[&str], value: u64) {
        self.put(metric, Kind::Counter, labels, Figure::Count(value));
    }

    /// Something that goes up and down.
    pub fn level(&mut self, metric: &'static Metric, labels: &[&str], value: f64) {
        self.put(metric, Kind::Gauge, labels, Figure::Level(value));
    }

    /// Times.
    pub fn spread(&mut self, metric: &'static Metric, labels: &[&str], value: Spread) {
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

/// All sources of a process. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    list: &'static [&'static Metric],
    sources: Arc<Mutex<Vec<Arc<dyn Source>>>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Of a program with this list of metrics, which is shown in its order.
    #[must_use]
    pub fn new(list: &'static [&'static Metric]) -> Self {
        Self { list, sources: Arc::default() }
    }

    /// Asks this source too from now on.
    pub fn add(&self, source: Arc<dyn Source>) {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).push(source);
    }

    /// The figures of this moment, as OpenMetrics text.
    pub fn text(&self) -> Result<String, fmt::Error> {
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
        for metric in self.list {
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

    metrics! { "test_"
        READ_BYTES Counter "read_bytes" ["device"] "Bytes read";
        SIZE Gauge "size_bytes" ["device"] "Size";
        READ Histogram "read_seconds" [] "Time that reads took";
        NOTHING Counter "nothing" [] "Of which there is none";
    }

    struct Fixed;

    impl Source for Fixed {
        fn read(&self, readings: &mut Readings) {
            readings.count(&READ_BYTES, &["root"], 7);
            readings.count(&READ_BYTES, &["da\"ta"], 8);
            readings.level(&SIZE, &["root"], 4096.0);
            let timings = Timings::default();
            timings.record(Duration::from_millis(2));
            readings.spread(&READ, &[], timings.read());
        }
    }

    #[test]
    fn figures_are_written_as_open_metrics_and_names_without_figures_too() {
        let metrics = Metrics::new(ALL);
        metrics.add(Arc::new(Fixed));
        let text = metrics.text().unwrap();
        for line in [
            "# TYPE test_read_bytes counter",
            "test_read_bytes_total{device=\"root\"} 7",
            "test_read_bytes_total{device=\"da\\\"ta\"} 8",
            "test_size_bytes{device=\"root\"} 4096.0",
            "test_read_seconds_bucket{le=\"0.001\"} 0",
            "test_read_seconds_bucket{le=\"0.004\"} 1",
            "test_read_seconds_bucket{le=\"+Inf\"} 1",
            "test_read_seconds_sum 0.002",
            "# TYPE test_nothing counter",
            "# EOF",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is missing in\n{text}");
        }
    }
}
