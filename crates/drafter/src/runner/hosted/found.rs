//! What a runner that is gone has left with its monitor, on the way to being a body again.
//!
//! In this order, because the guest may be waiting for a page or a block, and the monitor with it:
//! memory with its faults, disks with their servers, and only then the monitor.

use super::{Content, Hosted, MachineError, Site, device_name, fail};
use crate::{
    checkpoint::capture::DiskCopies,
    driver::{MachineShape, Vm},
    package::Package,
    runner::{disks::DiskServers, reasons::Reasons},
};
use conduit::{MachineNet, Tap};
use silo::{
    disk::Disk,
    memory::{Mapping, Memory, Tracking},
};
use std::{sync::Arc, time::Duration};

/// See the module.
pub(in crate::runner) struct Found {
    /// Memory and disks.
    pub content: Content,
    tracking: Tracking,
    tap: Option<Arc<Tap>>,
}

/// Disks that are served.
pub(in crate::runner) struct Served {
    copies: DiskCopies,
    servers: DiskServers,
}

impl Found {
    /// Takes memory and tap from the monitor, and serves its faults from now on. `arrived`: the machine
    /// came here by a move. `before` is called when memory and disks are there and no fault is served
    /// yet: to say what is missing.
    ///
    /// # Errors
    /// If the monitor is gone, or something of it cannot be had.
    pub(in crate::runner) fn look(
        shape: &MachineShape,
        net: Option<&MachineNet>,
        disks: Vec<Arc<Disk>>,
        arrived: bool,
        site: &Site<'_>,
        before: impl FnOnce(&Content) -> Result<(), MachineError>,
    ) -> Result<Self, MachineError> {
        let gone = || {
            fail(format!(
                "the monitor of \"{}\" is gone too; start it from its disks (--keep-disks)",
                shape.name
            ))
        };
        let held = site.driver.held(site.run_dir).map_err(fail)?.ok_or_else(gone)?;
        let (name, file) = (device_name("memory")?, held.memory.into());
        let memory = if held.memory_is_shared {
            Memory::copy_of(name, file)
        } else {
            Memory::adopt(name, file)
        };
        let memory = memory.map_err(fail)?;
        let content = Content { memory: Arc::new(memory), disks };
        before(&content)?;
        let tracking = content
            .memory
            .attach(Mapping {
                userfaultfd: held.mapping.userfaultfd,
                pid: held.mapping.pid,
                address: held.mapping.address,
                incoming: arrived,
                adopted: true,
                track: site.track,
            })
            .map_err(fail)?;
        let tap = held.tap.map(|fd| {
            let name = net.map_or_else(String::new, |net| conduit::tap_name(net.key()));
            Arc::new(Tap { name, fd })
        });
        Ok(Self { content, tracking, tap })
    }

    /// Serves the disks, which may be written from now on.
    ///
    /// # Errors
    /// If a server cannot be started.
    pub(in crate::runner) fn serve(
        &self,
        shape: &MachineShape,
        site: &Site<'_>,
    ) -> Result<Served, MachineError> {
        let copies = self.content.copies(site.run_dir)?;
        let servers = DiskServers::start(
            shape.disk_kind,
            &self.content.disks,
            &copies,
            &self.content.memory,
            shape.vcpus,
            site.run_dir,
        )?;
        Ok(Served { copies, servers })
    }

    /// All of it, with its monitor.
    pub(in crate::runner) fn adopt(
        self,
        package: Package,
        net: Option<MachineNet>,
        shape: MachineShape,
        served: Served,
        vm: Box<dyn Vm>,
        site: &Site<'_>,
    ) -> Hosted {
        let Served { copies, servers } = served;
        Hosted {
            tracking: self.tracking,
            guest: None,
            copies,
            helpers: servers.helpers(),
            servers,
            servers_were_away: true,
            reasons: Reasons::new(vm.fence()),
            commits: false,
            vm,
            guard: None,
            tap: self.tap,
            path: Arc::clone(site.path),
            drain: None,
            flip: 0,
            expected: Duration::ZERO,
            shape,
            package,
            net,
            content: self.content,
        }
    }
}
