//! Where the machine is, in one record; and in one line what is the matter, if something is.

use super::{Inner, Runner, api::Status, stay::Stay};
use crate::migrate::source::Outage;

impl Runner {
    /// In one line: which host is not reached while blocks are missing, since when, and what to do.
    fn outage_line(&self, inner: &Inner) -> Option<String> {
        let machine = &self.config.machine;
        if let Some(outage) = &inner.outage {
            let Outage { peer, since, reason, left } = outage;
            return Some(format!(
                "host \"{peer}\" is not reached since {:.0} s ({reason}) while it may run the machine \
                 without {left} blocks that have not been sent: it is tried again all the time. Mend \
                 the line or start the runner there again, and leave this one up: it has the blocks. \
                 Only if \"{peer}\" will never come back: `drafter job cancel {machine}`",
                since.elapsed().as_secs_f64()
            ));
        }
        let missing: u64 = inner.devices.iter().map(|device| device.missing_blocks()).sum();
        let (since, why) = inner.doors.last().filter(|_| missing > 0)?.outage()?;
        let store = inner.fallback.as_ref().and_then(|fallback| fallback.words());
        let store = store.map(|words| format!(" ({words})")).unwrap_or_default();
        Some(format!(
            "{missing} blocks are missing{store} and their source is not reached since {:.0} s ({why}): the \
             guest runs until it needs one of them. Mend the line, or start the runner there again \
             (`drafter recover {machine}`); it connects by itself. Only if that host will never come \
             back: `drafter stop {machine}` here and `drafter restore`",
            since.as_secs_f64()
        ))
    }

    pub(super) fn status(&self) -> Status {
        let lease = self.store.read(&self.name).ok().flatten();
        let backups = self.lock().backups.clone();
        let backup = backups.and_then(|backups| Self::backup_state(&backups));
        let protection = self.protection_state(backup.as_ref());
        let frozen = protection.as_ref().filter(|p| p.word == "frozen").map(|p| p.detail.clone());
        let inner = self.lock();
        let filling = inner.filling.as_ref().and_then(|filling| filling.trouble()).map(|trouble| {
            format!(
                "the store that holds the rest of it gives nothing ({trouble}); it is asked again"
            )
        });
        let waits = self.outage_line(&inner).or(filling).or_else(|| self.path.trouble());
        Status {
            machine: self.config.machine.clone(),
            host: self.config.host.clone(),
            runner_pid: std::process::id(),
            monitor_pid: inner.monitor_pid,
            monitor_without: match inner.monitor_pid {
                Some(_) => crate::driver::qemu::runs_without(&self.dir.run()),
                None => Vec::new(),
            },
            state: if frozen.is_some() { "frozen" } else { inner.state.word() }.to_owned(),
            detail: frozen.or(waits).unwrap_or_else(|| inner.detail.clone()),
            lease_owner: lease.as_ref().map(|r| r.owner.as_str().to_owned()),
            epoch: lease.as_ref().map(|r| r.epoch.0),
            missing: inner
                .devices
                .iter()
                .map(|d| (d.name().as_str().to_owned(), d.missing_blocks()))
                .collect(),
            stay_bytes: inner.stay.as_ref().map_or(0, Stay::bytes),
            listen: self.listens.get().copied(),
            job: inner.jobs.values().next_back().map(|job| job.progress()),
            moves: inner.moves.clone(),
            backup,
            protection,
        }
    }
}
