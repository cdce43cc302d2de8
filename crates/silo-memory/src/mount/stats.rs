//! What a mount counts, and the status it reports.

use super::queue::Class;
use silo_block::times::{Histogram, Times};
use std::time::{Duration, Instant};

/// The mount's state in numbers. Bytes and microseconds.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Status {
    /// Size of the device.
    pub bytes: u64,
    /// Content that is here.
    pub here_bytes: u64,
    /// Newer here than in the backend, as far as known: mapped stores are found once per round.
    pub dirty_bytes: u64,
    /// Content that could not be had; asking again tries again.
    pub failed_bytes: u64,
    /// Bytes fetched because somebody waited.
    pub demanded_bytes: u64,
    /// Bytes fetched because they were to come first.
    pub first_bytes: u64,
    /// Bytes fetched ahead of a walker.
    pub ahead_bytes: u64,
    /// Bytes fetched in the background.
    pub bulk_bytes: u64,
    /// Bytes that needed no fetch, because a write covered them before they came.
    pub local_bytes: u64,
    /// Bytes given to the backend.
    pub written_bytes: u64,
    /// Page faults taken.
    pub faults: u64,
    /// Page faults on content that was here.
    pub present_faults: u64,
    /// Requests made because somebody waited.
    pub demands: u64,
    /// Median wait of a mapped access for its content.
    pub wait_p50_us: u64,
    /// 99th percentile of the same.
    pub wait_p99_us: u64,
    /// Longest of the same.
    pub wait_max_us: u64,
    /// Background bytes that may be in flight now.
    pub window_bytes: u64,
    /// Smallest time a request took.
    pub round_trip_us: u64,
    /// Best rate of late, bytes a second.
    pub rate: u64,
    /// Requests that the backend answered with an error.
    pub errors: u64,
    /// The last of them, with what was attempted.
    pub last_error: Option<String>,
}

impl Status {
    /// Whether everything is here.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.here_bytes == self.bytes
    }
}

pub(super) struct Stats {
    waits: Times,
    pub(super) fetched: [u64; 4],
    pub(super) local: u64,
    pub(super) written: u64,
    pub(super) faults: u64,
    pub(super) present: u64,
    pub(super) demands: u64,
    pub(super) errors: u64,
    pub(super) last_error: Option<String>,
}

impl Stats {
    pub(super) fn new() -> Self {
        Self {
            waits: Times::default(),
            fetched: [0; 4],
            local: 0,
            written: 0,
            faults: 0,
            present: 0,
            demands: 0,
            errors: 0,
            last_error: None,
        }
    }

    pub(super) fn waited(&mut self, now: Instant, since: &[Instant]) {
        for since in since {
            self.waits.add(now.saturating_duration_since(*since));
        }
    }

    pub(super) fn waits(&self) -> Histogram {
        self.waits.read()
    }

    pub(super) fn error(&mut self, text: String) {
        self.errors += 1;
        self.last_error = Some(text);
    }

    pub(super) fn fill(&self, status: &mut Status) {
        status.demanded_bytes = self.fetched[Class::Demand as usize];
        status.first_bytes = self.fetched[Class::First as usize];
        status.ahead_bytes = self.fetched[Class::Ahead as usize];
        status.bulk_bytes = self.fetched[Class::Bulk as usize];
        status.local_bytes = self.local;
        status.written_bytes = self.written;
        status.faults = self.faults;
        status.present_faults = self.present;
        status.demands = self.demands;
        let waits = self.waits.read();
        status.wait_p50_us = micros(Some(waits.quantile(0.5)));
        status.wait_p99_us = micros(Some(waits.quantile(0.99)));
        status.wait_max_us = micros(Some(waits.longest()));
        status.errors = self.errors;
        status.last_error.clone_from(&self.last_error);
    }
}

pub(super) fn micros(time: Option<Duration>) -> u64 {
    time.map_or(0, |time| time.as_micros() as u64)
}
