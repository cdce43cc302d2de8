//! Machine drivers: what drafter needs from a virtual machine monitor, and nothing more.
//!
//! Drafter owns memory (a memfd) and disks (servers on unix sockets, see [`DiskKind`]); the driver gives
//! boot, pause, save, load, run and stop. QEMU is the first implementation ([`qemu`]); a native
//! monitor comes later behind the same traits.

mod compatible;
pub mod qemu;
mod urgent;

pub use compatible::compatible;
pub use urgent::{HelpersFirst, Urgent, UrgentHelpers, give_way};

use std::{
    net::Ipv4Addr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// What the guest's processor runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// QEMU's translator: works everywhere.
    Tcg,
    /// Hardware virtualisation.
    Kvm,
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        })
    }
}

/// What a driver found on this host; part of what `prepare` compares between two hosts.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostFacts {
    /// Driver and exact version, as in `qemu 7.2.22`: microvm is not a versioned machine type, so
    /// saved state belongs to one version.
    pub driver: String,
    /// What was chosen.
    pub accelerator: Accelerator,
    /// Measured TSC rate in kHz (rdtsc against CLOCK_MONOTONIC_RAW).
    pub tsc_khz: u64,
    /// CPU features that a machine sees here, sorted; empty under TCG, whose CPU is its own.
    pub cpu_features: Vec<String>,
}

/// How a machine reaches its disks. Its saved state depends on it, so a machine keeps for life what
/// it booted with, and one that began as a copy has [`DiskKind::Nbd`]. Decisions 7 and 15.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum DiskKind {
    /// The monitor's block layer speaks NBD with the disk's server. What a record or a message
    /// means that does not say.
    #[default]
    Nbd,
    /// The disk's server works on the guest's own rings and pages.
    VhostUserBlk,
}

impl std::fmt::Display for DiskKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nbd => "nbd",
            Self::VhostUserBlk => "vhost-user-blk",
        })
    }
}

/// Everything about a machine that its driver must know; the same on every host it visits.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MachineShape {
    /// Name of the machine.
    pub name: String,
    /// Machine type, as in `microvm`.
    pub machine_type: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Kernel command line without what the driver itself adds.
    pub command_line: String,
    /// The guest's network, if it has one.
    pub network: Option<NetworkShape>,
    /// Disk names in the order the guest sees them (`/dev/vda`, …).
    pub disks: Vec<String>,
    /// How it reaches them.
    #[serde(default)]
    pub disk_kind: DiskKind,
    /// TSC rate in kHz of the host where the machine booted; the guest's clock was set by it.
    pub tsc_khz: u64,
}

/// The guest's side of its network: the same for life.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct NetworkShape {
    /// The machine's address.
    pub address: Ipv4Addr,
    /// Its IPv6 address, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_v6: Option<std::net::Ipv6Addr>,
    /// The guest interface's MAC.
    pub mac: [u8; 6],
    /// MTU inside the guest.
    pub mtu: u16,
}

/// What one host gives to one machine. Nothing here travels to another host.
pub struct HostResources<'a> {
    /// The machine's memory; the driver passes it on by descriptor.
    pub memory: &'a OwnedFd,
    /// The file is shared by several copies of a machine: it is mapped privately, and never written.
    pub memory_is_shared: bool,
    /// Open tap (IFF_TAP|IFF_NO_PI|IFF_VNET_HDR), if the machine has a network.
    pub tap: Option<&'a OwnedFd>,
    /// One unix socket with a server of the machine's [`DiskKind`] per disk, in the order of
    /// `MachineShape::disks`. An NBD export has the empty name; each server listens before the
    /// start, and takes connections again at the same path after it was away.
    pub disk_sockets: Vec<PathBuf>,
    /// Kernel (ELF) and initramfs.
    pub kernel: &'a Path,
    /// See `kernel`.
    pub initramfs: &'a Path,
    /// A directory for sockets, logs and saved facts of this machine on this host. Exists; one
    /// machine's alone.
    pub run_dir: &'a Path,
}

/// How a machine starts. Either way it stands still until [`Vm::run`], so that tracking and faults
/// can be set up before its first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// From its kernel.
    Boot,
    /// Empty, to be filled by [`Vm::load`].
    Incoming,
}

/// The guest's memory as the memory engine needs it. The mapping may be shared or private.
pub struct MemoryHandle {
    /// A userfaultfd made inside the monitor's process.
    pub userfaultfd: OwnedFd,
    /// The monitor's process.
    pub pid: u32,
    /// Where the memfd is mapped in that process (offset 0 of the memfd).
    pub address: u64,
    /// Length of the mapping in bytes.
    pub length: u64,
}

/// What a monitor got from its first runner, and still holds.
pub struct Held {
    /// The machine's memory.
    pub memory: OwnedFd,
    /// As [`HostResources::memory_is_shared`] was.
    pub memory_is_shared: bool,
    /// Where it is mapped.
    pub mapping: MemoryHandle,
    /// Its tap, if it has a network.
    pub tap: Option<OwnedFd>,
}

/// Why a machine is no longer there.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case", tag = "reason")]
pub enum Exit {
    /// The guest powered off or its monitor was asked to end.
    Shutdown,
    /// The guest rebooted or panicked (we run with `-no-reboot`).
    Reset,
    /// The monitor ended by itself.
    Failed {
        /// Exit status or signal, and the last lines of its error output.
        detail: String,
    },
}

/// What a monitor reports without being asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// The virtual processors stopped: by [`Vm::pause`], or by the monitor after a disk error.
    Stopped,
    /// The virtual processors run.
    Resumed,
    /// A disk request failed. The machine stands still, the guest has not seen the error, and
    /// [`Vm::run`] tries the request again.
    DiskError {
        /// Name of the disk as in [`MachineShape::disks`].
        disk: String,
        /// "read" or "write".
        operation: String,
        /// The monitor's own words.
        detail: String,
    },
    /// The machine is ending; [`Vm::exit`] says how once it has.
    Ending,
}

/// What a driver could not do.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The monitor is not installed or cannot be used here.
    #[error("{what}: {hint}")]
    Unusable {
        /// What is missing.
        what: String,
        /// How to get it.
        hint: String,
    },
    /// The monitor did not answer in time.
    #[error("machine \"{machine}\": {operation} did not finish within {limit:?}")]
    Timeout {
        /// Which machine.
        machine: String,
        /// What was asked.
        operation: &'static str,
        /// How long we waited.
        limit: Duration,
    },
    /// The monitor refused.
    #[error("machine \"{machine}\": {operation}: {detail}")]
    Refused {
        /// Which machine.
        machine: String,
        /// What was asked.
        operation: &'static str,
        /// The monitor's own words.
        detail: String,
    },
    /// The monitor is gone.
    #[error("machine \"{machine}\": its monitor ended during {operation}: {detail}")]
    Gone {
        /// Which machine.
        machine: String,
        /// What was asked.
        operation: &'static str,
        /// Exit status and last lines of its error output.
        detail: String,
    },
    /// The machine cannot be what was asked for.
    #[error("machine \"{machine}\": {detail}")]
    Invalid {
        /// Which machine.
        machine: String,
        /// What is wrong, and what would be right.
        detail: String,
    },
    /// The host refused us.
    #[error("{operation}: {source}")]
    Host {
        /// What was attempted, with the path or descriptor.
        operation: String,
        /// The cause.
        source: std::io::Error,
    },
}

/// A kind of monitor.
pub trait Driver: Send + Sync {
    /// What this host offers with this driver; cached after the first real probe.
    fn facts(&self) -> Result<HostFacts, DriverError>;

    /// Starts a machine that stands still until [`Vm::run`].
    fn start(
        &self,
        shape: &MachineShape,
        host: &HostResources<'_>,
        start: Start,
    ) -> Result<Box<dyn Vm>, DriverError>;

    /// A handle to stop the monitor that a run directory tells of, without talking to it: for a
    /// runner that came back and does not know yet whether its machine may run. `None` as for
    /// [`Driver::take_over`].
    fn fence(&self, run_dir: &Path) -> Result<Option<Arc<dyn Fence>>, DriverError>;

    /// What the monitor holds that a run directory tells of, without talking to it: it may hang on
    /// a page until somebody serves its faults again. `None` as for [`Driver::take_over`].
    fn held(&self, run_dir: &Path) -> Result<Option<Held>, DriverError>;

    /// Finds a machine's monitor that lost its runner, by its run directory. `None`: there is
    /// none any more, and what it left behind on this host was cleaned up. A frozen one is refused:
    /// thaw it through [`Driver::fence`] if it may run. Its faults must be served again before
    /// ([`Driver::held`]), and the disks' sockets be listening, at the same paths.
    fn take_over(&self, run_dir: &Path) -> Result<Option<Box<dyn Vm>>, DriverError>;

    /// The saved state of a machine of `shape`, whose disks are [`DiskKind::VhostUserBlk`], for one of the
    /// same shape with [`DiskKind::Nbd`]. Its guest cannot tell the difference.
    fn with_nbd_disks(&self, shape: &MachineShape, state: &[u8]) -> Result<Vec<u8>, DriverError>;
}

/// Stops a machine without its monitor's help, from any thread: for whoever enforces deadlines
/// while the thread that owns the [`Vm`] hangs. See [`Vm::freeze`], [`Vm::thaw`], [`Vm::kill`].
pub trait Fence: Send + Sync {
    /// As [`Vm::freeze`].
    fn freeze(&self) -> Result<(), DriverError>;

    /// As [`Vm::thaw`].
    fn thaw(&self) -> Result<(), DriverError>;

    /// As [`Vm::kill`], but cleans nothing up: the owner does, by [`Vm::exit`] or [`Vm::kill`].
    fn kill(&self) -> Result<(), DriverError>;
}

/// One machine under a monitor. Calls are made by one thread at a time; every call has a deadline.
/// Dropping it leaves the machine as it is, to be found by [`Driver::take_over`]; only
/// [`Vm::kill`] ends it.
pub trait Vm: Send {
    /// The monitor's process.
    fn pid(&self) -> u32;

    /// The guest's memory, for tracking and faults.
    fn memory(&self) -> Result<MemoryHandle, DriverError>;

    /// Whether the guest's processors run (as far as the monitor says).
    fn is_running(&self) -> bool;

    /// The console's log file.
    fn console_log(&self) -> &Path;

    /// The unix socket of the guest channel.
    fn guest_socket(&self) -> &Path;

    /// Lets the monitor in to the servers of its disks, which may have come anew since
    /// [`Driver::take_over`], and says whether it has found them all. What a server is told when it is
    /// found has been said by then. Does not wait.
    fn finds_disks(&mut self) -> Result<bool, DriverError>;

    /// The blocks of the memfd that loading the state reads (virtqueue rings): they must be
    /// present before [`Vm::load`]. Constant once the guest's drivers are up; empty before.
    fn state_blocks(&mut self) -> Result<Vec<silo::block::BlockRange>, DriverError>;

    /// Stops the virtual processors and drains I/O. Returns when no instruction runs any more, and
    /// the rings of vhost-user disks are stopped. `on_stopped` is called as soon as the processors
    /// have stopped, which is before NBD disks are flushed: from then on an early answer to a FLUSH
    /// is not seen by the guest here.
    fn pause(&mut self, on_stopped: &mut dyn FnMut()) -> Result<(), DriverError>;

    /// Device state of a paused machine. A second call before [`Vm::run`] gives the same bytes.
    fn save(&mut self) -> Result<Vec<u8>, DriverError>;

    /// Gets an [`Start::Incoming`] machine ready for [`Vm::load`], so that loading is quick.
    fn prepare_load(&mut self) -> Result<(), DriverError>;

    /// Loads device state; the machine stays paused.
    fn load(&mut self, state: &[u8]) -> Result<(), DriverError>;

    /// Runs a paused or just loaded machine, also one that was saved (an aborted move).
    fn run(&mut self) -> Result<(), DriverError>;

    /// Holds the frames that the guest sends (`true`), or lets them and all later ones go.
    fn hold_output(&mut self, hold: bool) -> Result<(), DriverError>;

    /// Output commit: holds what the guest sends in two stages (`true`), or lets all of it and all
    /// later frames go. Asked again for what is so already, it does nothing.
    fn commit_output(&mut self, on: bool) -> Result<(), DriverError>;

    /// Of a paused machine under [`Vm::commit_output`]: what it has sent so far is of this instant, and
    /// goes with the next [`Vm::release_sealed`]; what it sends from here on does not.
    fn seal_output(&mut self) -> Result<(), DriverError>;

    /// Lets go what was sealed: the instant of which it was can be gone back to.
    fn release_sealed(&mut self) -> Result<(), DriverError>;

    /// Freezes the monitor's process without asking it: works while a page is missing. From its
    /// return neither guest nor monitor executes an instruction.
    fn freeze(&mut self) -> Result<(), DriverError>;

    /// Undoes [`Vm::freeze`].
    fn thaw(&mut self) -> Result<(), DriverError>;

    /// A handle that other threads may use to freeze or kill at any time.
    fn fence(&self) -> Arc<dyn Fence>;

    /// What happened since the last call, oldest first. Does not wait.
    fn events(&mut self) -> Vec<VmEvent>;

    /// Ends the monitor at once (the guest is not asked). Idempotent.
    fn kill(&mut self) -> Result<(), DriverError>;

    /// Why the machine ended, if it did. Does not wait. The first call that finds it ended cleans
    /// up what it had on this host, except its logs.
    fn exit(&mut self) -> Option<Exit>;
}
