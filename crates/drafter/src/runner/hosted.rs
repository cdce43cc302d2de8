//! A machine's body on this host: memory, disks and their servers, tap, monitor. Built for a boot
//! or for an arrival; torn down to what is worth keeping (memory and disks) when it has moved away.

mod found;
mod freezer;
mod objections;
mod rejoin;
mod standstill;

pub(super) use found::Found;
pub(crate) use objections::free_memory;
pub(super) use objections::objections;

use super::{
    config::Boot,
    disks::{DiskServers, DiskTrouble, unless_full},
    guard::Guard,
    network::Network,
    reasons::{Reason, Reasons},
};
use crate::{
    checkpoint::capture::DiskCopies,
    driver::{
        Driver, Fence, HostFacts, HostResources, MachineShape, NetworkShape, Start, UrgentHelpers,
        Vm,
    },
    guest::GuestChannel,
    lease::Epoch,
    migrate::{
        destination::{DestinationMachine, Freezer},
        messages::DeviceDescription,
        protocol::DeviceNumber,
        source::{MachineError, SourceMachine},
        switchover::FlipEpoch,
    },
    package::Package,
};
use conduit::{DataPath, HostEndpoint, LONG_BLACKOUT, MachineNet, Tap};
use drafter_guest::config::InstanceConfig;
use silo::{
    block::BlockRange,
    device::{Device, DeviceName},
    disk::{Disk, DiskOptions, FlushPolicy},
    hash::RootHash,
    io::BlockDevice,
    memory::{FaultSummary, Mapping, Memory, Tracking},
};
use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How long disk writes in hand may take at the pause.
const FREEZE_LIMIT: Duration = Duration::from_secs(2);
/// How long the guest's hook before a pause may take.
const HOOK_LIMIT: Duration = Duration::from_secs(30);

/// How long the monitor may take for what was said to the guest before a pause.
const HUSH_LIMIT: Duration = Duration::from_millis(50);

/// What of a machine can outlive its stay on this host.
#[derive(Clone)]
pub(super) struct Content {
    /// Memory.
    pub memory: Arc<Memory>,
    /// Disks, in the order of the shape.
    pub disks: Vec<Arc<Disk>>,
}

impl Content {
    /// The device group: memory first, then the disks.
    pub(super) fn devices(&self) -> Vec<Arc<dyn Device>> {
        let mut devices: Vec<Arc<dyn Device>> = vec![self.memory.clone()];
        devices.extend(self.disks.iter().map(|d| d.clone() as Arc<dyn Device>));
        devices
    }

    /// The disks, made ready to be frozen for a backup.
    fn copies(&self, folder: &Path) -> Result<DiskCopies, MachineError> {
        let disk = |disk: &Arc<Disk>| {
            (disk.name().as_str().to_owned(), disk.clone() as Arc<dyn BlockDevice>)
        };
        Ok(DiskCopies::new(self.disks.iter().map(disk).collect(), folder)?)
    }
}

/// What building needs from the runner.
pub(super) struct Site<'a> {
    /// Starts monitors.
    pub driver: &'a dyn Driver,
    /// Leads frames here.
    pub path: &'a Arc<Network>,
    /// For sockets and logs.
    pub run_dir: &'a Path,
    /// Whether writes to memory are tracked, where the kernel can.
    pub track: bool,
}

/// See the module.
pub(super) struct Hosted {
    /// What the machine is.
    pub shape: MachineShape,
    /// What it was made from.
    pub package: Package,
    /// Its network.
    pub net: Option<MachineNet>,
    /// Its memory and disks.
    pub content: Content,
    /// Whether writes to memory can be tracked here.
    pub tracking: Tracking,
    /// The guest channel, once somebody opened it.
    pub guest: Option<Arc<GuestChannel>>,
    /// Its disks as they are served, so that a backup can freeze them.
    pub copies: DiskCopies,
    servers: DiskServers,
    /// The monitor lost those before them, and may not have found them yet.
    servers_were_away: bool,
    /// Those of the servers that a switchover waits for, as of the last look.
    helpers: UrgentHelpers,
    vm: Box<dyn Vm>,
    /// Of a machine that arrives, until it is this host's.
    guard: Option<Arc<Guard>>,
    /// Who holds it still from outside.
    reasons: Arc<Reasons>,
    /// What the guest sends waits for its generation.
    commits: bool,
    tap: Option<Arc<Tap>>,
    path: Arc<Network>,
    drain: Option<JoinHandle<()>>,
    /// The network epoch of the last pause.
    flip: u64,
    /// How long its network was told that it will stand still.
    expected: Duration,
}

pub(super) fn fail(error: impl std::fmt::Display) -> MachineError {
    error.to_string().into()
}

/// The name that a device has in its group.
pub(super) fn device_name(name: &str) -> Result<DeviceName, MachineError> {
    DeviceName::new(name).ok_or_else(|| fail(format!("\"{name}\" cannot name a device")))
}

/// A new machine's shape.
pub(super) fn shape_of(
    name: &str,
    package: &Package,
    boot: &Boot,
    facts: &HostFacts,
) -> (MachineShape, Option<MachineNet>) {
    let manifest = package.manifest();
    let instance = InstanceConfig {
        host: Some(name.to_owned()),
        address: boot.address,
        address_v6: boot.address_v6,
        name_servers: boot.name_servers.clone(),
        mtu: boot.mtu,
        ..InstanceConfig::default()
    };
    let network = boot.address.map(|address| NetworkShape {
        address,
        address_v6: boot.address_v6,
        mac: conduit::mac_of(address),
        mtu: boot.mtu,
    });
    let net = network.as_ref().map(|network| MachineNet {
        machine: name.to_owned(),
        address: network.address,
        address_v6: network.address_v6,
        network: boot.network,
        mac: network.mac,
        mtu: network.mtu,
        ports: boot.ports.clone(),
        policy: boot.policy.clone(),
    });
    let words = instance.to_command_line();
    let shape = MachineShape {
        name: name.to_owned(),
        machine_type: manifest.machine_type.clone(),
        vcpus: boot.vcpus.unwrap_or(manifest.vcpus),
        memory_bytes: boot.memory_bytes.unwrap_or(manifest.memory_bytes),
        command_line: format!("{} {words}", manifest.command_line).trim().to_owned(),
        network,
        disks: manifest.devices.iter().map(|d| d.name.clone()).collect(),
        disk_kind: boot.disk_kind,
        tsc_khz: facts.tsc_khz,
    };
    (shape, net)
}

/// Fresh memory and disks for `shape`; `keep_disks`: the overlays that are here.
pub(super) fn new_content(
    shape: &MachineShape,
    package: &Package,
    disks_dir: &Path,
    keep_disks: bool,
) -> Result<Content, MachineError> {
    let memory = Memory::new(device_name("memory")?, shape.memory_bytes).map_err(fail)?;
    let mut disks = Vec::new();
    for device in &package.manifest().devices {
        let dir = disks_dir.join(&device.name);
        let base = package.dir().join(&device.file);
        let mut options = DiskOptions::new(device_name(&device.name)?);
        options.base_hash = Some(RootHash::from(device.blake3.0));
        let disk = if keep_disks {
            Disk::open(&dir, Some(&base), &options).map_err(fail)?
        } else {
            if dir.exists() {
                std::fs::remove_dir_all(&dir)
                    .map_err(|e| fail(format!("removing the old disk {}: {e}", dir.display())))?;
            }
            Disk::create(&dir, Some(&base), device.bytes, &options).map_err(fail)?
        };
        disks.push(Arc::new(disk));
    }
    Ok(Content { memory: Arc::new(memory), disks })
}

/// The group as told to a destination.
pub(super) fn describe(content: &Content, package: &Package) -> Vec<DeviceDescription> {
    let devices = content.devices();
    let bases = &package.manifest().devices;
    devices
        .iter()
        .enumerate()
        .map(|(at, device)| DeviceDescription {
            name: device.name().as_str().to_owned(),
            blocks: device.blocks(),
            base: at.checked_sub(1).and_then(|at| bases.get(at)).map(|d| d.blake3.to_string()),
        })
        .collect()
}

impl Hosted {
    /// Builds everything around `content` and starts a monitor, whose guest stands still: for about
    /// `expected`, if that is known.
    pub(super) fn build(
        shape: MachineShape,
        package: Package,
        net: Option<MachineNet>,
        content: Content,
        site: &Site<'_>,
        start: Start,
        expected: Option<Duration>,
    ) -> Result<Self, MachineError> {
        let copies = content.copies(site.run_dir)?;
        let servers = DiskServers::start(
            shape.disk_kind,
            &content.disks,
            &copies,
            &content.memory,
            shape.vcpus,
            site.run_dir,
        )?;
        if start == Start::Incoming && !content.memory.is_copy() {
            for device in content.devices() {
                device.begin().map_err(fail)?;
            }
        }
        let tap = net.as_ref().map(|net| site.path.tap(net, expected)).transpose().map_err(fail)?;
        if start == Start::Incoming
            && let Some(tap) = &tap
            && let Err(error) = conduit::tap::give_decoy(tap)
        {
            tracing::warn!(%error, "one frame may get lost at the switchover");
        }
        let memory_fd = OwnedFd::from(content.memory.file().try_clone()?);
        let manifest = package.manifest();
        let kernel = package.dir().join(&manifest.kernel.file);
        let initramfs = package.dir().join(&manifest.initramfs.file);
        let resources = HostResources {
            memory: &memory_fd,
            memory_is_shared: content.memory.is_copy(),
            tap: tap.as_ref().map(|tap| &tap.fd),
            disk_sockets: servers.sockets(),
            kernel: &kernel,
            initramfs: &initramfs,
            run_dir: site.run_dir,
        };
        let vm = site.driver.start(&shape, &resources, start).map_err(fail)?;
        let mut hosted = Self {
            tracking: Tracking::None,
            guest: None,
            copies,
            helpers: servers.helpers(),
            servers,
            servers_were_away: false,
            reasons: Reasons::new(vm.fence()),
            commits: false,
            vm,
            guard: None,
            tap: tap.map(Arc::new),
            path: Arc::clone(site.path),
            drain: None,
            flip: 0,
            expected: expected.unwrap_or_default(),
            shape,
            package,
            net,
            content,
        };
        if let Err(error) = hosted.attach(start, site.track) {
            hosted.tear_down();
            return Err(error);
        }
        Ok(hosted)
    }

    fn attach(&mut self, start: Start, track: bool) -> Result<(), MachineError> {
        let handle = self.vm.memory().map_err(fail)?;
        let incoming = start == Start::Incoming;
        // A copy has all of its memory: nothing of it is missing, and no fault is for us.
        let arrives = incoming && !self.content.memory.is_copy();
        self.tracking = self
            .content
            .memory
            .attach(Mapping {
                userfaultfd: handle.userfaultfd,
                pid: handle.pid,
                address: handle.address,
                incoming: arrives,
                adopted: false,
                track,
            })
            .map_err(fail)?;
        if incoming {
            self.vm.hold_output(true).map_err(fail)?;
            self.vm.prepare_load().map_err(fail)?;
            match GuestChannel::attach(self.vm.guest_socket(), &self.shape.name) {
                Ok(channel) => self.guest = Some(Arc::new(channel)),
                // It is opened when the machine runs; then the guest sees its host come back.
                Err(error) => tracing::warn!(%error, "the guest will notice the change of host"),
            }
        }
        Ok(())
    }

    /// Has `guard` stop it at the end of an offer under which it runs here.
    ///
    /// # Errors
    /// If it does not guard it.
    pub(super) fn guarded(&mut self, guard: &Arc<Guard>) -> Result<(), MachineError> {
        guard
            .watch()
            .map_err(|error| fail(format!("no guard for an unconfirmed machine: {error}")))?;
        self.guard = Some(Arc::clone(guard));
        Ok(())
    }

    /// It runs here in its own right: nothing need stop it at the end of an offer.
    pub(super) fn unguard(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.end_of_offers();
        }
    }

    /// Lets a booted or resumed guest go, owner of its network under `flip`.
    pub(super) fn begin(&mut self, flip: u64) -> Result<(), MachineError> {
        self.before_run()?;
        self.lead_here(flip);
        self.vm.run().map_err(fail)
    }

    /// Frames for a machine that runs already, or will whatever the network says, come here under `flip`:
    /// as soon as somebody answers.
    pub(super) fn lead_here(&self, flip: u64) {
        if let Some(net) = &self.net {
            self.path.lead_here(net, flip);
        }
    }

    /// Frames come here under `flip`, or the machine, a copy on which nobody depends yet, is not to be.
    pub(super) fn claim_network(&self, flip: u64) -> Result<(), MachineError> {
        match &self.net {
            Some(net) => self.path.resume(net, flip).map_err(fail),
            None => Ok(()),
        }
    }

    /// What the guest sends may leave, or waits for its generation only.
    pub(super) fn release(&mut self) -> Result<(), MachineError> {
        if self.commits { Ok(()) } else { self.vm.hold_output(false).map_err(fail) }
    }

    /// What the guest sends waits for its generation from here on, or for nothing any more.
    pub(super) fn commit_output(&mut self, on: bool) -> Result<(), MachineError> {
        self.commits = on;
        self.vm.commit_output(on).map_err(fail)
    }

    /// What stops it when its lease is over.
    pub(super) fn fence(&self) -> Arc<dyn Fence> {
        self.reasons.fence(Reason::Term)
    }

    /// A request of a disk that waits for somebody to help.
    pub(super) fn disk_trouble(&self) -> Option<DiskTrouble> {
        self.servers.trouble()
    }

    /// Has such requests tried again.
    pub(super) fn retry_disks(&self) {
        self.servers.try_again();
    }

    /// The monitor.
    pub(super) fn vm(&mut self) -> &mut dyn Vm {
        &mut *self.vm
    }

    /// The monitor's process.
    pub(super) fn monitor_pid(&self) -> u32 {
        self.vm.pid()
    }

    /// The guest channel's socket.
    pub(super) fn guest_socket(&self) -> PathBuf {
        self.vm.guest_socket().to_owned()
    }

    /// Closes the guest channel, whoever else holds it.
    pub(super) fn hang_up(&mut self) {
        if let Some(guest) = self.guest.take() {
            guest.close();
        }
    }

    /// Ends the monitor and the servers; the content stays.
    pub(super) fn tear_down(&mut self) {
        if let Some(drain) = self.drain.take() {
            let _ = drain.join();
        }
        self.hang_up();
        if let Err(error) = self.vm.kill() {
            tracing::error!(%error, "ending the monitor failed");
        }
        self.path.owe_nothing();
        self.unguard();
        self.servers.stop();
        self.content.memory.detach();
        self.tap = None;
    }

    /// As [`Hosted::tear_down`], for a machine that has moved away: frames for it are led on until
    /// the edge knows where it is.
    pub(super) fn leave(&mut self) {
        let flip = self.flip;
        self.tear_down();
        if let Some(net) = &self.net {
            let left = self
                .path
                .settled(net, flip, Duration::from_secs(5))
                .and_then(|()| self.path.forget(net, flip));
            if let Err(error) = left {
                tracing::warn!(%error, "the network still knows the machine here");
            }
        }
    }

    /// An arrival that came to nothing: the network forgets that the machine was expected here.
    /// `epoch` is the source's, which stays the owner.
    pub(super) fn give_up(&mut self, epoch: u64) {
        self.tear_down();
        if let Some(net) = &self.net {
            let last = FlipEpoch::of(Epoch(epoch), u16::MAX);
            if let Err(error) = self.path.forget(net, last.0) {
                tracing::warn!(%error, "the network still expects the machine here");
            }
        }
    }

    /// Waits until the edge knows where the machine is.
    pub(super) fn settled(&self, flip: u64, limit: Duration) -> Result<(), MachineError> {
        match &self.net {
            Some(net) => self.path.settled(net, flip, limit).map_err(fail),
            None => Ok(()),
        }
    }

    /// Whether the package asks for a call before each pause.
    fn has_suspend_hook(&self) -> bool {
        self.package.manifest().guest.hooks.before_suspend.is_some()
    }
}

impl SourceMachine for Hosted {
    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.content.devices()
    }

    fn state_blocks(&mut self) -> Result<Vec<(DeviceNumber, BlockRange)>, MachineError> {
        let blocks = self.vm.state_blocks().map_err(fail)?;
        Ok(blocks.into_iter().map(|range| (DeviceNumber(0), range)).collect())
    }

    fn before_pause(&mut self) -> Result<(), MachineError> {
        self.rejoin_disks()?;
        self.servers.before_pause()?;
        self.helpers = self.servers.helpers();
        if self.has_suspend_hook()
            && let Some(guest) = &self.guest
        {
            guest.before_suspend(false, HOOK_LIMIT).map_err(fail)?;
        }
        // A monitor hands what comes on the channel to the guest even while that stands still,
        // and the last scan of its memory would not see it.
        if let Some(guest) = &self.guest {
            guest.hush(HUSH_LIMIT);
        }
        for disk in &self.content.disks {
            unless_full(disk, disk.sync())?;
            disk.set_flush_policy(FlushPolicy::Switchover);
        }
        Ok(())
    }

    fn pause(&mut self, to: Option<&HostEndpoint>, flip: u64) -> Result<(), MachineError> {
        self.flip = flip;
        let _first = self.helpers.go_first();
        let diverted = self.net.clone().zip(to.copied());
        if let Some((net, to)) = &diverted
            && let Err(error) = self.path.divert(net, to, flip)
        {
            // `pause` below does this step too.
            tracing::warn!(%error, "frames could not be led away before the pause");
        }
        let disks = &self.content.disks;
        let paused = self.vm.pause(&mut || disks.iter().for_each(|disk| disk.answer_now()));
        paused.map_err(fail)?;
        self.servers.after_pause(disks)?;
        // Design, 4a(e): after the pause the content stays as it is.
        for disk in &self.content.disks {
            disk.freeze(FREEZE_LIMIT).map_err(fail)?;
        }
        if let Some((net, to)) = diverted
            && let Some(tap) = self.tap.clone()
        {
            let path = Arc::clone(&self.path);
            // Beside the flight: what waited in the old queue follows to the destination.
            let drain = std::thread::Builder::new().name("drain".into()).spawn(move || match path
                .pause(&net, &tap, &to, flip)
            {
                Ok(frames) => tracing::debug!(frames, "drained the old tap"),
                Err(error) => tracing::warn!(%error, "draining the old tap failed"),
            });
            self.drain = drain.ok();
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, MachineError> {
        self.vm.save().map_err(fail)
    }

    fn flush_pending(&self) -> bool {
        // Always owed: QEMU (or `after_pause`) flushes at the pause, and is answered early.
        !self.content.disks.is_empty()
    }

    fn wait_flushed(&mut self, limit: Duration) -> Result<(), MachineError> {
        let deadline = Instant::now() + limit;
        for disk in &self.content.disks {
            disk.wait_durable(deadline).map_err(fail)?;
        }
        Ok(())
    }

    fn go_on(&mut self, epoch: u64, flip: u64) -> Result<(), MachineError> {
        tracing::info!(epoch, "the machine goes on here");
        if let Some(drain) = self.drain.take() {
            let _ = drain.join();
        }
        for disk in &self.content.disks {
            disk.set_flush_policy(FlushPolicy::Normal);
            if disk.is_frozen() {
                disk.thaw().map_err(fail)?;
            }
        }
        self.lead_here(flip);
        self.before_run()?;
        self.vm.run().map_err(fail)
    }
}

impl DestinationMachine for Hosted {
    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.content.devices()
    }

    fn expect(&mut self, blackout: Duration) {
        let changes = (blackout > LONG_BLACKOUT) != (self.expected > LONG_BLACKOUT);
        self.expected = blackout;
        if changes
            && let Some(net) = &self.net
            && let Err(error) = self.path.expect(net, blackout)
        {
            // Frames wait where they were to wait before: none is lost by that.
            tracing::warn!(%error, ?blackout, "the network does not know how long it will stand still");
        }
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.vm.load(state).map_err(fail)
    }

    fn run(&mut self) -> Result<(), MachineError> {
        let _first = self.helpers.go_first();
        self.vm.run().map_err(fail)
    }

    fn own(&mut self, epoch: u64, flip: u64) {
        tracing::info!(epoch, "this host owns the machine");
        self.lead_here(flip);
    }

    fn release_output(&mut self) -> Result<(), MachineError> {
        self.release()
    }

    fn faults(&self) -> Box<dyn Fn() -> FaultSummary + Send + Sync> {
        let memory = Arc::clone(&self.content.memory);
        Box::new(move || memory.fault_summary())
    }

    fn freezer(&self) -> Arc<dyn Freezer> {
        Arc::new(freezer::Fenced(self.reasons.fence(Reason::Offer), self.guard.clone()))
    }
}
