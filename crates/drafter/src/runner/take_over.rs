//! Taking over a machine whose runner is gone while its monitor lives.
//!
//! The monitor keeps what its first runner gave it: the memfd, the userfaultfd (the preload hook's
//! copy) and the tap; they are fetched from it by `pidfd_getfd`, and its faults are served before
//! anybody talks to it. Its block client waits for the disks' sockets and asks again; of a
//! vhost-user disk it keeps the record of requests in hand, which the new server runs once more.
//! What the old runner knew and nobody else is in `machine.json`:
//!
//! | it says | the lease names | so the new runner |
//! |---|---|---|
//! | complete | this host | goes on with it |
//! | complete, since a move from host h | h | ends the copy, which never was this host's, and waits for the machine |
//! | complete, its term guarded | another | ends the copy, which was lost to a stand-in |
//! | arriving by attempt n | this host, by n | serves its faults, and waits for the source to connect: [`arrival`] |
//! | arriving by attempt n | another, which hands it to this host by n; the guard says that it was asked for | takes the lease, and as above, or as below |
//! | arriving by attempt n | another | ends the copy, which never was this host's, and waits for the machine |
//! | leaving by attempt n | this host, handing over, and it stands still | serves its content until the offer is over; then the lease decides: [`departure`] |
//! | leaving by attempt n | another | serves its content until the other needs it no more: [`departure`] |
//! | leaving by attempt n | this host, or it runs | goes on with it: no token has left |
//! | being suspended | this host | takes the lease anew, so that nobody resumes it, and goes on with it |
//! | being suspended | another | ends the copy: that host has resumed it |
//! | anything | another, and is protected | ends the copy: it stood still before the other could run it |
//!
//! A protected machine of this host goes on only when its lease has been got back in a new life: [`regain`].
//!
//! What the guard froze is thawed when the lease is this host's, and never before: [`authority`].
//!
//! No secret is in that file. A session's name tells which move goes on; who may go on with it is
//! proved by certificates.

mod arrival;
mod authority;
mod departure;
mod regain;

use super::{
    Runner, State,
    hosted::{Found, Hosted},
    state::MachineDir,
};
use crate::{
    driver::MachineShape,
    lease::Record,
    migrate::{
        protocol::SessionId,
        switchover::{FlipEpoch, Holding},
    },
    package::Package,
};
use conduit::MachineNet;
use serde::{Deserialize, Serialize};
use silo::{
    device::DeviceName,
    disk::{Disk, DiskOptions},
};
use std::{
    fs,
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
    time::Duration,
};

const FILE: &str = "machine.json";
const VERSION: u32 = 3;
/// Version 1 knew machines with NBD disks only, and did not say so; version 2 only complete machines.
const OLDEST: u32 = 1;

/// What a machine on this host is.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Noted {
    version: u32,
    shape: MachineShape,
    network: Option<MachineNet>,
    package: String,
    /// It came by a move: faults on zero blocks need a server.
    arrived: bool,
    /// It comes by this move, and may lack blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    arriving: Option<MoveNote>,
    /// It came by this move, and lacks nothing: a source that asks is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    settled: Option<MoveNote>,
    /// It may be leaving by this move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    leaving: Option<MoveNote>,
    /// It may be in a store by now, to be resumed elsewhere.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    suspending: bool,
}

/// A move, as far as it must be known to go on with it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct MoveNote {
    /// The attempt.
    pub attempt: u64,
    /// The session, hex.
    pub session: String,
    /// The other host.
    pub peer: String,
    /// Where that listens, if it is the destination.
    pub to: Option<SocketAddr>,
    /// The longest that its offers hold, milliseconds, if it is the destination.
    pub offers_hold_ms: u64,
    /// How often the network had been flipped under the lease's epoch before it, if it is the destination.
    #[serde(default)]
    pub flips: u16,
}

impl MoveNote {
    fn session(&self) -> Option<SessionId> {
        let mut bytes = [0; 16];
        if self.session.len() != 32 || !self.session.is_ascii() {
            return None;
        }
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&self.session[at * 2..at * 2 + 2], 16).ok()?;
        }
        Some(SessionId(bytes))
    }
}

impl Noted {
    /// A machine that is complete and runs here.
    pub(super) fn of(body: &Hosted, arrived: bool) -> Self {
        Self {
            version: VERSION,
            shape: body.shape.clone(),
            network: body.net.clone(),
            package: body.package.id().to_string(),
            arrived,
            arriving: None,
            settled: None,
            leaving: None,
            suspending: false,
        }
    }

    /// The same, while it may lack blocks.
    pub(super) fn arriving(&self, by: MoveNote) -> Self {
        Self { arriving: Some(by), ..self.clone() }
    }

    /// The same, once it lacks none.
    pub(super) fn settled(&self, by: Option<MoveNote>) -> Self {
        Self { arriving: None, settled: by, ..self.clone() }
    }

    pub(super) fn write(&self, dir: &MachineDir) -> io::Result<()> {
        let new = dir.root().join("machine.json.new");
        let mut options = fs::OpenOptions::new();
        let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        fs::rename(new, dir.root().join(FILE))
    }

    fn read(dir: &MachineDir) -> Result<Self, String> {
        let path = dir.root().join(FILE);
        let bytes = fs::read(&path).map_err(|e| {
            format!(
                "{}: {e}; without it the machine cannot be taken over (it never ran here, or is \
                 restored lazily and not complete): `drafter stop` ends its monitor",
                path.display()
            )
        })?;
        let noted: Self = serde_json::from_slice(&bytes)
            .map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
        if !(OLDEST..=VERSION).contains(&noted.version) {
            return Err(format!("{} has version {}", path.display(), noted.version));
        }
        Ok(noted)
    }
}

/// Nothing that could be taken over runs here any more, or not yet.
pub(super) fn forget(dir: &MachineDir) {
    let _ = fs::remove_file(dir.root().join(FILE));
}

/// The machine leaves by this move, or stays after all.
pub(super) fn note_leaving(dir: &MachineDir, leaving: Option<MoveNote>) {
    // Of what cannot be taken over nothing is noted.
    let Ok(noted) = Noted::read(dir) else { return };
    if let Err(error) = (Noted { version: VERSION, leaving, ..noted }).write(dir) {
        tracing::error!(%error, "a later runner could not go on with this move");
    }
}

/// The machine is being suspended to a store, or stays after all.
pub(super) fn note_suspending(dir: &MachineDir, suspending: bool) {
    let Ok(noted) = Noted::read(dir) else { return };
    if let Err(error) = (Noted { version: VERSION, suspending, ..noted }).write(dir) {
        tracing::error!(%error, "a later runner does not know that the machine is being suspended");
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Runner {
    /// Finds the monitor of this machine and goes on with it. `package`: where its package is;
    /// `None`: among those that the runner was given.
    pub(super) fn take_over(self: &Arc<Self>, package: Option<&Path>) -> Result<(), String> {
        let noted = match Noted::read(&self.dir) {
            Ok(noted) => noted,
            Err(why) => return self.without_note(why),
        };
        let package = match package {
            Some(path) => self.open_package(path)?,
            None => self.find_package(&noted.package).ok_or_else(|| {
                format!("its package ({}) is not here; give it with --package", noted.package)
            })?,
        };
        if package.id().to_string() != noted.package {
            return Err(format!(
                "it runs package {}, not {} ({})",
                noted.package,
                package.id(),
                package.manifest().name
            ));
        }
        if noted.suspending
            && let Some(lease) = self.store.read(&self.name).map_err(text)?
            && lease.owner != self.host
        {
            crate::driver::qemu::stop_without_runner(&self.dir.run()).map_err(text)?;
            forget(&self.dir);
            return Err(format!(
                "it was suspended here, and host \"{}\" has resumed it ({}); what was left of it here \
                 was ended",
                lease.owner, lease.epoch
            ));
        }
        let Some(right) = self.find_right(&noted)? else { return Ok(()) };
        let (lease, settled) = (right.lease, right.holding);
        if let Some(by) = &noted.arriving {
            let holding = settled.ok_or("its lease is gone")?;
            return self.take_over_arrival(&noted, by, package, holding);
        }
        let may_have_left = lease
            .as_ref()
            .is_some_and(|record| record.owner != self.host || record.handing_to.is_some());
        if let (Some(by), Some(lease), true) = (noted.leaving.clone(), &lease, may_have_left)
            && self.take_over_departure(&noted, &by, &package, lease)?
        {
            return Ok(());
        }
        let disks = self.open_disks(&package, false)?;
        let paths = self.site();
        let site = paths.site(&*self.driver, &self.path);
        let found =
            Found::look(&noted.shape, noted.network.as_ref(), disks, noted.arrived, &site, |_| {
                Ok(())
            })
            .map_err(text)?;
        let servers = found.serve(&noted.shape, &site).map_err(text)?;
        let vm = self.driver.take_over(site.run_dir).map_err(text)?;
        let vm = vm.ok_or("its monitor is gone too; start it from its disks (--keep-disks)")?;
        let mut body =
            found.adopt(package, noted.network.clone(), noted.shape.clone(), servers, vm, &site);
        let holding = match settled {
            Some(holding) => holding,
            None => self.settle_authority(body.vm().is_running())?,
        };
        self.output_as_before(&mut body)?;
        self.lead_here(&mut body, FlipEpoch::of(holding.record.epoch, 0))?;
        body.release().map_err(text)?;
        if let Some(by) = &noted.settled {
            self.answer_settled(by, holding.record.epoch.0);
        }
        // What was written since the last move is not known: the next move sends everything.
        self.install(Box::new(body), holding, None);
        note_leaving(&self.dir, None);
        note_suspending(&self.dir, false);
        Ok(())
    }

    /// What waited for its generation waits on, or for nothing any more.
    fn output_as_before(&self, body: &mut Hosted) -> Result<(), String> {
        body.commit_output(self.commits_output()).map_err(text)
    }

    fn commits_output(&self) -> bool {
        self.protection().is_some_and(|protection| protection.commits_output())
    }

    /// The machine is this host's: its frames come here, and it runs.
    fn lead_here(&self, body: &mut Hosted, flip: FlipEpoch) -> Result<(), String> {
        if !body.vm().is_running() {
            return body.begin(flip.0).map_err(text);
        }
        body.lead_here(flip.0);
        // Later, if not now: see `Runner::watch`.
        if let Err(error) = body.await_monitor(FOUND_LIMIT).and_then(|()| body.rejoin_disks()) {
            tracing::warn!(%error, "its disks are not in use yet");
        }
        Ok(())
    }

    /// A monitor without a note: one that was started for an arrival, or for a boot that came to
    /// nothing. If the lease is another's it is ended, and this runner waits for the machine.
    fn without_note(&self, why: String) -> Result<(), String> {
        let lease = self.store.read(&self.name).map_err(text)?;
        let elsewhere = lease.is_some_and(|record| record.owner != self.host);
        if !elsewhere || self.config.listen.is_none() {
            return Err(why);
        }
        crate::driver::qemu::stop_without_runner(&self.dir.run()).map_err(text)?;
        self.set_state(State::Standby, "a monitor that had not got its machine was ended");
        Ok(())
    }

    fn open_disks(&self, package: &Package, incomplete: bool) -> Result<Vec<Arc<Disk>>, String> {
        let mut disks = Vec::new();
        for device in &package.manifest().devices {
            let name = DeviceName::new(&device.name)
                .ok_or_else(|| format!("\"{}\" cannot name a device", device.name))?;
            let dir = self.dir.disks().join(&device.name);
            let base = package.dir().join(&device.file);
            let mut options = DiskOptions::new(name);
            options.accept_incomplete = incomplete;
            let disk = Disk::open(&dir, Some(&base), &options);
            disks.push(Arc::new(disk.map_err(text)?));
        }
        Ok(disks)
    }

    /// The lease says that this host owns the machine, and no token of a move that the old runner
    /// began can be taken up any more.
    fn settle_authority(&self, running: bool) -> Result<Holding, String> {
        let found = self.store.read(&self.name).map_err(text)?;
        let handing = found.as_ref().is_some_and(|record| record.handing_to.is_some());
        if handing && !running {
            // A token may be out: wait until the longest offer that it could name is over.
            self.wait_for_offers();
        }
        self.acquire()
    }
}

/// Whether the lease is being handed to `host` by that attempt.
fn handed_by(lease: Option<&Record>, host: &identity::HostName, attempt: u64) -> bool {
    let handing = lease.and_then(|record| record.handing_to.as_ref());
    handing.is_some_and(|handing| handing.to == *host && handing.attempt.0 == attempt)
}

fn owned_by(lease: Option<&Record>, host: &identity::HostName, attempt: u64) -> bool {
    lease.is_some_and(|record| {
        record.owner == *host && record.handing_to.is_none() && record.attempt.0 == attempt
    })
}

/// How long taking over waits for the monitor of a machine that runs to find the servers of its disks.
const FOUND_LIMIT: Duration = Duration::from_secs(1);
/// How long a monitor that waits for pages may take to answer, in pieces.
const ASK_AGAIN: Duration = Duration::from_millis(200);
