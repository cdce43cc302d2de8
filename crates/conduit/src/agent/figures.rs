//! An agent's figures for Prometheus.

use super::Shared;
use crate::{
    book::Place,
    holder::Keeper,
    metrics::{self, BEHIND, EDGE, EDGES, HOSTS, MACHINES},
};
use scrape::Readings;

/// What runners ask for, and what is counted.
pub(super) const OPERATIONS: [&str; 5] = ["prepare", "divert", "drained", "resume", "forget"];

impl scrape::Source for Shared {
    fn read(&self, readings: &mut Readings) {
        metrics::common(readings, "agent", self.host.path());
        self.host.read_figures(readings);
        self.changes.read(readings);
        if let Some(secure) = &self.secure {
            secure.read_figures(readings);
        }
        if let Some(stats) = self.keeper.as_ref().and_then(Keeper::stats) {
            metrics::held(readings, &stats);
        }
        readings.level(&BEHIND, &[], self.machines.behind() as f64);
        let core = self.core();
        let [mut here, mut candidate, mut away, mut gone] = [0_u32; 4];
        for record in core.book.records() {
            match record.place {
                Place::Here if record.retiring => gone += 1,
                Place::Here => here += 1,
                Place::Candidate => candidate += 1,
                Place::Away { .. } => away += 1,
            }
        }
        let connected = core.is_connected();
        let hosts = core.peers.len();
        let (up, all) = core.count_links();
        drop(core);
        for (place, count) in
            [("here", here), ("candidate", candidate), ("away", away), ("gone", gone)]
        {
            readings.level(&MACHINES, &[place], f64::from(count));
        }
        readings.level(&HOSTS, &[], hosts as f64);
        readings.level(&EDGE, &[], f64::from(u8::from(connected)));
        if all > 1 {
            readings.level(&EDGES, &["connected"], up as f64);
            readings.level(&EDGES, &["not"], (all - up) as f64);
        }
    }
}
