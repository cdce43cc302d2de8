//! An edge's figures for Prometheus.

use super::{Shared, nat::Nat};
use crate::{
    holder::Keeper,
    metrics::{
        self, AGENTS, BEHIND, DISBELIEVED, DRAINED_FLOWS, EDGES, HOME_CHANGES, HOMES, HOSTS,
        MACHINES, RULE_DROPS,
    },
};
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
        for (name, count) in Nat::counts() {
            readings.count(&RULE_DROPS, &[name.trim_start_matches("nat_")], count);
        }
        for (reason, count) in self.refused().iter() {
            readings.count(&DISBELIEVED, &[reason.trim_start_matches("flip_")], *count);
        }
        if let Some(secure) = &self.secure {
            secure.read_figures(readings);
        }
        if let Some(stats) = self.keeper.as_ref().and_then(Keeper::stats) {
            metrics::held(readings, &stats);
        }
        self.changes.read(readings);
        readings.level(&BEHIND, &[], self.machines.behind() as f64);
        readings.level(&AGENTS, &[], self.agents.load(Ordering::Relaxed) as f64);
        if let Some(fronts) = &self.fronts {
            let (here, all) = (fronts.serving().len(), fronts.words().len());
            readings.level(&HOMES, &["here"], here as f64);
            readings.level(&HOMES, &["elsewhere"], all.saturating_sub(here) as f64);
            for (health, count) in fronts.healths() {
                readings.level(&EDGES, &[health], count as f64);
            }
            let counts = fronts.counts();
            let count = |name: &str| counts.get(name).copied().unwrap_or(0);
            for (kind, name) in [
                ("taken_over", "homes_taken_over"),
                ("given_up", "homes_given_up"),
                ("drained", "homes_drained"),
                ("undone", "drains_undone"),
            ] {
                readings.count(&HOME_CHANGES, &[kind], count(name));
            }
            for way in ["out", "in", "failed"] {
                readings.count(&DRAINED_FLOWS, &[way], count(&format!("drain_flows_{way}")));
            }
        }
        let core = self.core();
        let (machines, hosts) = (core.ledger.machines().count(), core.hosts.len());
        drop(core);
        readings.level(&MACHINES, &["known"], machines as f64);
        readings.level(&HOSTS, &[], hosts as f64);
    }
}
