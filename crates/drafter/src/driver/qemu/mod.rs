//! The QEMU driver: stock Debian QEMU, microvm with PCI, memory and disks owned by drafter.
//!
//! Called by the runner, through [`Driver`] and [`Vm`](super::Vm). QEMU is the least trusted part
//! of a host, because a guest talks to it all day: it runs as a user of its own, in a control
//! group of its own, in its own sandbox, without new privileges, and opens nothing by itself.
//! Memory, kernel, tap, sockets and logs reach it as descriptors; disks as sockets that it may
//! connect to and nothing beside them. Around it are namespaces of its own and a root with hardly more
//! than its program and libraries. A vhost-user disk's server gets the memory from it.
//!
//! QEMU outlives a runner that crashes: the next one finds it by `qemu.json` in the run directory.
//!
//! | file | is |
//! |---|---|
//! | `command` | QEMU's command line |
//! | `launch` | starting: user, control group, descriptors, handshake |
//! | `confine` | the namespaces around it, and the root that it sees |
//! | `vm` | the machine's life: pause, save, load, run, end |
//! | `halt`, `held` | stopping it without asking it; fetching what it holds without asking it |
//! | `disks` | letting it in to its disks' servers, and whether it has found them |
//! | `qmp` | QEMU's control protocol |
//! | `monitor` | the same, to a QEMU that is not ours: the baseline of benchmarks |
//! | `disk_state` | saved state with the other kind of disks, for copies |
//! | `shim` | the userfaultfd made inside QEMU by `drafter-shim` |
//! | `memory_map` | guest-physical addresses, virtqueues, the mapping of the memory |
//! | `cgroup`, `users`, `process`, `files`, `record` | limits and freezer, user ids, pidfds, passing files, `qemu.json` |
//! | `probe`, `tsc` | what this host offers |

mod cgroup;
mod command;
mod confine;
mod disk_state;
mod disks;
mod files;
mod halt;
mod held;
mod kept;
mod launch;
mod memory_map;
mod monitor;
mod probe;
mod process;
mod qmp;
mod record;
mod shim;
mod sys;
#[cfg(test)]
mod tests;
mod tsc;
mod users;
mod version;
mod vm;

pub use monitor::Monitor;
pub use probe::Verdict;

use super::{
    Accelerator, Driver, DriverError, Fence, Held, HostFacts, HostResources, MachineShape, Start,
    Vm,
};
use std::{
    ops::RangeInclusive,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// How long a killed monitor may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Which accelerator to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    /// KVM if a test guest lives in it, else TCG.
    #[default]
    Auto,
    /// Always TCG.
    Tcg,
    /// Always KVM, tried or not.
    Kvm,
}

/// Settings of the driver on one host.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// The QEMU program: a path, or a name to be found in `PATH`.
    pub binary: PathBuf,
    /// A directory of this host for what outlives a machine: user ids taken, the verdict on KVM.
    pub state_dir: PathBuf,
    /// Which accelerator to use.
    pub accelerator: AcceleratorChoice,
    /// User ids for machines, none of them anybody's. Ignored when not root: then machines run as
    /// the runner's own user.
    pub users: RangeInclusive<u32>,
    /// Bytes for translated code. A guest that runs Linux and Redis fills 90 MiB; when it is full
    /// it is thrown away and all code is translated again.
    pub translation_cache: u64,
    /// The preload hook; `None`: searched for, see `DRAFTER_SHIM`.
    pub shim: Option<PathBuf>,
}

impl QemuConfig {
    /// The usual settings, with a state directory.
    #[must_use]
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            binary: "qemu-system-x86_64".into(),
            state_dir: state_dir.into(),
            accelerator: AcceleratorChoice::Auto,
            users: 64_512..=65_500,
            translation_cache: 256 << 20,
            shim: None,
        }
    }
}

/// What was found out about this host, once.
#[derive(Clone, Debug)]
struct Found {
    binary: PathBuf,
    facts: HostFacts,
    verdict: Verdict,
}

/// The driver. One serves all machines of a process.
pub struct QemuDriver {
    config: QemuConfig,
    known: Option<HostFacts>,
    found: Mutex<Option<Found>>,
}

impl QemuDriver {
    /// A driver with these settings; looks at nothing yet.
    #[must_use]
    pub fn new(config: QemuConfig) -> Self {
        Self { config, known: None, found: Mutex::new(None) }
    }

    /// A driver that finds out nothing that another of this host has just found out, which may take half a
    /// second: for a copy of a machine. `known` must hold now: see [`installed`].
    #[must_use]
    pub fn knowing(config: QemuConfig, known: HostFacts) -> Self {
        Self { known: Some(known), ..Self::new(config) }
    }

    /// Which accelerator this host uses, and why: for people.
    pub fn verdict(&self) -> Result<Verdict, DriverError> {
        self.find().map(|found| found.verdict)
    }

    /// Looks at the host, the first time.
    fn find(&self) -> Result<Found, DriverError> {
        let mut place = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = &*place {
            return Ok(found.clone());
        }
        // Who may use KVM is looked up each time.
        if let Some(facts) = self.known.clone().filter(|f| f.accelerator == Accelerator::Tcg) {
            let reason = "as for the machine that this one is a copy of".into();
            let verdict = Verdict { accelerator: Accelerator::Tcg, reason, device_group: None };
            let binary = probe::program(&self.config.binary)?;
            return Ok(place.insert(Found { binary, facts, verdict }).clone());
        }
        let (binary, version) = version::installed(&self.config.binary, &self.config.state_dir)?;
        let forced = |accelerator| Verdict {
            accelerator,
            reason: "the configuration says so".into(),
            device_group: None,
        };
        let own_users = launch::own_users();
        let verdict = match self.config.accelerator {
            AcceleratorChoice::Tcg => forced(Accelerator::Tcg),
            AcceleratorChoice::Kvm => {
                let device_group = probe::device_group(own_users).ok().flatten();
                Verdict { device_group, ..forced(Accelerator::Kvm) }
            }
            AcceleratorChoice::Auto => {
                probe::verdict(&binary, &version, &self.config.state_dir, own_users)?
            }
        };
        let accelerator = verdict.accelerator;
        let tsc_khz = tsc::khz(&self.config.state_dir).map_err(|errno| DriverError::Host {
            operation: "measuring the processor's clock".into(),
            source: errno.into(),
        })?;
        let cpu_features = match accelerator {
            Accelerator::Tcg => vec![],
            Accelerator::Kvm => probe::cpu_features(),
        };
        let driver = format!("qemu {version}");
        let facts = HostFacts { driver, accelerator, tsc_khz, cpu_features };
        Ok(place.insert(Found { binary, facts, verdict }).clone())
    }
}

impl Driver for QemuDriver {
    fn facts(&self) -> Result<HostFacts, DriverError> {
        self.find().map(|found| found.facts)
    }

    fn start(
        &self,
        shape: &MachineShape,
        host: &HostResources<'_>,
        start: Start,
    ) -> Result<Box<dyn Vm>, DriverError> {
        let found = self.find()?;
        Ok(Box::new(launch::start(&self.config, &found, shape, host, start)?))
    }

    fn fence(&self, run_dir: &Path) -> Result<Option<Arc<dyn Fence>>, DriverError> {
        launch::fence(run_dir)
    }

    fn held(&self, run_dir: &Path) -> Result<Option<Held>, DriverError> {
        launch::held(run_dir)
    }

    fn take_over(&self, run_dir: &Path) -> Result<Option<Box<dyn Vm>>, DriverError> {
        Ok(launch::take_over(run_dir)?.map(|vm| Box::new(vm) as Box<dyn Vm>))
    }

    fn with_nbd_disks(&self, shape: &MachineShape, state: &[u8]) -> Result<Vec<u8>, DriverError> {
        disk_state::with_nbd_disks(state, shape.disks.len(), shape.vcpus).map_err(|detail| {
            DriverError::Refused {
                machine: shape.name.clone(),
                operation: "giving a copy of it NBD disks",
                detail,
            }
        })
    }
}

/// The driver of the QEMU that is installed now, as in [`HostFacts::driver`]: it may have been replaced
/// since a machine was started.
///
/// # Errors
/// If there is none.
pub fn installed(config: &QemuConfig) -> Result<String, DriverError> {
    let (_, version) = version::installed(&config.binary, &config.state_dir)?;
    Ok(format!("qemu {version}"))
}

/// The process of a monitor that lives in `run_dir`, whoever looks after it.
#[must_use]
pub fn monitor_without_runner(run_dir: &Path) -> Option<u32> {
    let record = record::Record::load(run_dir).ok().flatten()?;
    record.process.runs().then_some(record.process.pid)
}

/// What the monitor in `run_dir` runs without that should keep it within bounds, each with its cause:
/// limits that the kernel does not have here, or namespaces that only root can make.
#[must_use]
pub fn runs_without(run_dir: &Path) -> Vec<String> {
    let record = record::Record::load(run_dir).ok().flatten();
    record.map_or_else(Vec::new, |record| record.without())
}

/// A handle to freeze or kill the monitor in `run_dir`, for whoever guards it. `None` if there is none.
///
/// # Errors
/// If this host does not let it be reached.
pub fn fence_of(run_dir: &Path) -> Result<Option<Arc<dyn Fence>>, DriverError> {
    launch::fence(run_dir)
}

/// The process of the monitor in `run_dir`, for whoever waits for its end: a descriptor that becomes
/// readable then. `None` if there is none.
///
/// # Errors
/// If this host does not let it be reached.
pub fn process_of(run_dir: &Path) -> Result<Option<OwnedFd>, DriverError> {
    let Some(record) = record::Record::load(run_dir)? else { return Ok(None) };
    let found = process::Process::open(record.process).and_then(|found| {
        found.map(|process| process.descriptor().try_clone_to_owned()).transpose()
    });
    found.map_err(|source| DriverError::Host {
        operation: format!("looking for the QEMU of machine \"{}\"", record.shape.name),
        source,
    })
}

/// Whether somebody froze the monitor in `run_dir`, or is about to; false if there is none.
#[must_use]
pub fn is_frozen(run_dir: &Path) -> bool {
    let record = record::Record::load(run_dir).ok().flatten();
    let frozen = |record: record::Record| record.cgroup.is_frozen(record.process.pid);
    record.filter(|record| record.process.runs()).is_some_and(frozen)
}

/// Ends a monitor that lost its runner, at once and without asking it: it may hang on a page that
/// nobody will bring. Its control group, user id and sockets are given back, also those of one
/// that is gone already. False if none lived.
pub fn stop_without_runner(run_dir: &Path) -> Result<bool, DriverError> {
    let Some(record) = record::Record::load(run_dir)? else { return Ok(false) };
    let host = |source| DriverError::Host {
        operation: format!(
            "ending the QEMU of machine \"{}\", process {}",
            record.shape.name, record.process.pid
        ),
        source,
    };
    let process = process::Process::open(record.process).map_err(host)?;
    let lived = process.is_some();
    if let Some(mut process) = process {
        process.signal(nix::sys::signal::Signal::SIGKILL).map_err(host)?;
        // Frozen by control group version 1 it dies only when thawed.
        record.cgroup.release_killed().map_err(host)?;
        if process.wait(END_LIMIT).is_none() {
            return Err(host(std::io::ErrorKind::TimedOut.into()));
        }
    }
    record.cgroup.remove();
    if let Some(user) = &record.user {
        user.release();
    }
    record::Files::of(run_dir).remove();
    Ok(lived)
}
