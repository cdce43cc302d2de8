//! Taking over a machine whose runner is gone while its monitor lives.
//!
//! The monitor keeps what its first runner gave it: the memfd, the userfaultfd (the preload hook's
//! copy) and the tap; they are fetched from it by `pidfd_getfd`, and its faults are served before
//! anybody talks to it. Its block client waits for the disks' sockets and asks again; of a
//! vhost-user disk it keeps the record of requests in hand, which the new server runs once more.
//! What the old runner knew and nobody else is in `machine.json`, written when the machine began to
//! run here.
//!
//! What cannot be taken over: a machine whose blocks had not all arrived. Only the old runner knew
//! which were missing, so what the guest would read could be wrong; it is refused.

use super::{Runner, hosted::Hosted, state::MachineDir};
use crate::{driver::MachineShape, migrate::switchover::FlipEpoch, package::Package};
use conduit::MachineNet;
use serde::{Deserialize, Serialize};
use silo::{
    device::DeviceName,
    disk::{Disk, DiskOptions},
};
use std::{fs, io, path::Path, sync::Arc};

const FILE: &str = "machine.json";
const VERSION: u32 = 2;
/// Version 1 knew machines with NBD disks only, and did not say so.
const OLDEST: u32 = 1;

/// What a machine on this host is.
#[derive(Serialize, Deserialize)]
pub(super) struct Noted {
    version: u32,
    shape: MachineShape,
    network: Option<MachineNet>,
    package: String,
    /// It came by a move, and everything has arrived: faults on zero blocks need a server.
    arrived: bool,
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
        }
    }

    pub(super) fn write(&self, dir: &MachineDir) -> io::Result<()> {
        let new = dir.root().join("machine.json.new");
        fs::write(&new, serde_json::to_vec_pretty(self)?)?;
        fs::rename(new, dir.root().join(FILE))
    }
}

/// Nothing complete runs here any more, or not yet.
pub(super) fn forget(dir: &MachineDir) {
    let _ = fs::remove_file(dir.root().join(FILE));
}

impl Runner {
    /// Finds the monitor of this machine and goes on with it.
    pub(super) fn take_over(self: &Arc<Self>, package: &Path) -> Result<(), String> {
        let path = self.dir.root().join(FILE);
        let bytes = fs::read(&path).map_err(|e| {
            format!(
                "{}: {e}; without it the machine cannot be taken over (it was not complete here, \
                 or never ran here): `drafter stop` ends its monitor",
                path.display()
            )
        })?;
        let noted: Noted = serde_json::from_slice(&bytes)
            .map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
        if !(OLDEST..=VERSION).contains(&noted.version) {
            return Err(format!("{} has version {}", path.display(), noted.version));
        }
        let package = self.open_package(package)?;
        if package.id().to_string() != noted.package {
            return Err(format!(
                "it runs package {}, not {} ({})",
                noted.package,
                package.id(),
                package.manifest().name
            ));
        }
        let disks = self.open_disks(&package)?;
        let paths = self.site();
        let site = paths.site(&*self.driver, &self.path);
        let mut body =
            Hosted::adopt(package, noted.network, noted.shape, disks, noted.arrived, &site)
                .map_err(|e| e.to_string())?;
        let holding = self.settle_authority(body.vm().is_running())?;
        let flip = FlipEpoch::of(holding.record.epoch, 0).0;
        if body.vm().is_running() {
            body.reclaim_network(flip).map_err(|e| e.to_string())?;
        } else {
            body.begin(flip).map_err(|e| e.to_string())?;
        }
        body.release().map_err(|e| e.to_string())?;
        // What was written since the last move is not known: the next move sends everything.
        self.install(Box::new(body), holding, None);
        Ok(())
    }

    fn open_disks(&self, package: &Package) -> Result<Vec<Arc<Disk>>, String> {
        let mut disks = Vec::new();
        for device in &package.manifest().devices {
            let name = DeviceName::new(&device.name)
                .ok_or_else(|| format!("\"{}\" cannot name a device", device.name))?;
            let dir = self.dir.disks().join(&device.name);
            let base = package.dir().join(&device.file);
            let disk = Disk::open(&dir, Some(&base), &DiskOptions::new(name));
            disks.push(Arc::new(disk.map_err(|e| e.to_string())?));
        }
        Ok(disks)
    }

    /// The lease says that this host owns the machine, and no token of a move that the old runner
    /// began can be taken up any more.
    fn settle_authority(
        &self,
        running: bool,
    ) -> Result<crate::migrate::switchover::Holding, String> {
        let found = self.store.read(&self.name).map_err(|e| e.to_string())?;
        let handing = found.as_ref().is_some_and(|record| record.handing_to.is_some());
        if handing && !running {
            // A token may be out: wait until the longest offer that it could name is over.
            self.wait_for_offers();
        }
        self.acquire()
    }
}
