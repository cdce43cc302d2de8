//! What it would take to move this machine, for whoever plans to: how much a destination lacks, and how
//! fast the guest writes.
//!
//! The machine notices as much of it as of the first round of a move: for the length of the sample each
//! page that it writes costs a fault.

use super::{
    Runner, State,
    api::{CompareRequest, HeldReport, LoadReport},
    held,
};
use silo::{
    block::BLOCK_SIZE,
    device::{Device, DeviceName},
};
use std::{sync::Arc, time::Duration};

/// The longest sample.
const LONGEST: Duration = Duration::from_secs(10);
/// How memory is called among the devices.
const MEMORY: &str = crate::checkpoint::MEMORY;

impl Runner {
    /// Measures for as long as `sample`, and then what each of these histories has of the machine.
    pub(super) fn load(
        &self,
        sample: Duration,
        compare: &[CompareRequest],
    ) -> Result<LoadReport, String> {
        let sample = sample.min(LONGEST);
        let (subject, devices) = {
            let inner = self.lock();
            if !matches!(inner.state, State::Running | State::Saving) {
                return Err(format!(
                    "machine \"{}\" is {} here: there is nothing to be measured",
                    self.config.machine,
                    inner.state.word()
                ));
            }
            (inner.subject.clone(), inner.devices.clone())
        };
        let text = |error: &dyn std::fmt::Display| error.to_string();
        // Without tracking (an older kernel) nobody can tell what is written.
        let written = match subject.map(|subject| subject.memory().watch()) {
            Some(Ok(watcher)) => {
                std::thread::sleep(sample);
                Some(watcher.count().map_err(|e| text(&e))? * BLOCK_SIZE as u64)
            }
            _ => None,
        };
        let memory = DeviceName::new(MEMORY);
        let (mut memory_bytes, mut disk_bytes, mut missing_bytes) = (0, 0, 0);
        for device in &devices {
            let device: &Arc<dyn Device> = device;
            let bytes = device.allocated().map_err(|e| text(&e))?.len() * BLOCK_SIZE as u64;
            if Some(device.name()) == memory.as_ref() {
                memory_bytes += bytes;
            } else {
                disk_bytes += bytes;
            }
            missing_bytes += device.missing_blocks() * BLOCK_SIZE as u64;
        }
        let backups = self.lock().backups.clone();
        let backup = backups.and_then(|backups| Self::backup_state(&backups));
        Ok(LoadReport {
            machine: self.config.machine.clone(),
            memory_bytes,
            disk_bytes,
            missing_bytes,
            written_bytes: written,
            sample_ms: sample.as_millis() as u64,
            generation_age_s: backup.and_then(|backup| backup.age_s),
            protected: self.protection().is_some(),
            held: self.held(compare, &devices),
        })
    }

    /// Side by side: each may take its limit.
    fn held(&self, compare: &[CompareRequest], devices: &[Arc<dyn Device>]) -> Vec<HeldReport> {
        let twice = self.stored_twice(devices);
        std::thread::scope(|scope| {
            let begin = |one| scope.spawn(move || held::held(one, devices, twice));
            let begun: Vec<_> = compare.iter().map(begin).collect();
            begun
                .into_iter()
                .map(|one| one.join().unwrap_or_else(|_| HeldReport::panicked()))
                .collect()
        })
    }

    /// Blocks that a sleep stores although the history has them, so that they lie together.
    fn stored_twice(&self, devices: &[Arc<dyn Device>]) -> u64 {
        let memory = devices.iter().find(|device| device.name().as_str() == MEMORY);
        let early = memory.map(|memory| self.touched_first(memory.blocks())).unwrap_or_default();
        early.iter().map(|range| range.count).sum()
    }
}
