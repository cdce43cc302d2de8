//! An edge's figures for Prometheus.

use super::Shared;
use crate::metrics::{self, AGENTS, BEHIND, HOSTS, MACHINES};
use scrape::Readings;
use std::sync::atomic::Ordering;

/// What agents ask for, and what is counted.
pub(super) const OPERATIONS: [&str; 3] = ["claim", "candidate", "release"];

impl scrape::Source for Shared {
    fn read(&self, readings: &mut Readings) {
        metrics::common(readings, "edge", self.path());
        if let Some(plane) = &self.plane {
            plane.read_figures(readings);
        }
        metrics::connections(readings);
        self.changes.read(readings);
        readings.level(&BEHIND, &[], self.machines.behind() as f64);
        readings.level(&AGENTS, &[], self.agents.load(Ordering::Relaxed) as f64);
        let core = self.core();
        let (machines, hosts) = (core.ledger.machines().count(), core.hosts.len());
        drop(core);
        readings.level(&MACHINES, &["known"], machines as f64);
        readings.level(&HOSTS, &[], hosts as f64);
    }
}
