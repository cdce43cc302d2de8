//! Starting a QEMU, and finding one again.
//!
//! ```text
//! check the shape → user id → control group → sockets → fork, exec → userfaultfd → record → go → QMP
//! ```
//!
//! Whatever fails on the way, what was made before it is unmade: no process, no group, no number
//! and no socket stays behind.

use super::{
    Found, QemuConfig,
    cgroup::{Cgroup, Limits},
    command::{self, Given},
    confine::{self, Needs},
    disks, files,
    halt::Halt,
    held,
    memory_map::FileId,
    process::Process,
    qmp::{Qmp, QmpError},
    record::{Files, Record},
    shim,
    sys::{self, BeforeExec},
    users::UserLease,
    vm::QemuVm,
};
use crate::driver::compatible::tsc_differs;
use crate::driver::{
    Accelerator, DriverError, Fence, Held, HostResources, MachineShape, Start, Vm,
};
use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

/// From exec to the preload hook's message: a few milliseconds when the host is not busy.
const SHIM_LIMIT: Duration = Duration::from_secs(15);
/// From there to the first answer: loads a kernel of 50 MB and connects to the disks.
const QMP_LIMIT: Duration = Duration::from_secs(30);
/// To connect to a QEMU that has been running for a while.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(5);
/// Memory of QEMU beside guest memory and translated code: itself, kernel and initramfs, stacks.
const OVERHEAD: u64 = 256 << 20;
/// QEMU's own threads: main, RCU, migration, and a pool of up to 64 for I/O.
const OWN_TASKS: u64 = 96;
/// Most bytes of each log: the guest decides what it writes to its console.
const LOG_LIMIT: u64 = 64 << 20;

/// Whether machines run as users of their own: only root can arrange for it.
pub(super) fn own_users() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Undoes what was done for a machine that did not come up.
struct Unmade<'a> {
    files: &'a Files,
    user: Option<UserLease>,
    cgroup: Option<Cgroup>,
    process: Option<Process>,
    given_up: bool,
}

impl Drop for Unmade<'_> {
    fn drop(&mut self) {
        if !self.given_up {
            return;
        }
        if let Some(process) = &mut self.process {
            let _ = process.signal(nix::sys::signal::SIGKILL);
            process.wait(Duration::from_secs(5));
        }
        if let Some(cgroup) = &self.cgroup {
            cgroup.remove();
        }
        if let Some(user) = &self.user {
            user.release();
        }
        self.files.remove();
    }
}

/// Starts a machine.
pub(super) fn start(
    config: &QemuConfig,
    found: &Found,
    shape: &MachineShape,
    host: &HostResources<'_>,
    start: Start,
) -> Result<QemuVm, DriverError> {
    let machine = shape.name.as_str();
    command::check(shape, host.disk_sockets.len(), host.tap.is_some())?;
    if start == Start::Boot && found.facts.accelerator == Accelerator::Tcg {
        check_clock(shape, found.facts.tsc_khz)?;
    }
    let files = Files::of(host.run_dir);
    files.check(machine)?;
    let memory = memory_id(host.memory, shape)?;
    files::mappable_by_all(host.memory)?;
    let shim = shim::find(config.shim.as_deref())?;
    refuse_second(machine, host.run_dir)?;
    files.remove();

    let mut unmade =
        Unmade { files: &files, user: None, cgroup: None, process: None, given_up: true };
    if own_users() {
        let lease = UserLease::take(&config.state_dir.join("users"), &config.users)?;
        unmade.user = Some(lease);
    }
    let user = unmade.user.as_ref().map(|lease| lease.uid);
    let limits = Limits {
        memory_bytes: shape.memory_bytes + config.translation_cache + OVERHEAD,
        tasks: OWN_TASKS + u64::from(shape.vcpus),
    };
    let cgroup = Cgroup::create(&group_name(machine)?, limits);
    for missing in cgroup.without() {
        tracing::warn!(machine, missing, "machine runs without a limit");
    }
    let join = cgroup.join_files()?;
    unmade.cgroup = Some(cgroup);
    if let Some(user) = user {
        disks::admit(&host.disk_sockets, user)?;
    }

    let mut inherit = Inherit::default();
    let (mut environment, for_shim, from_shim) = shim::prepare(&shim)?.split();
    inherit.0.extend(for_shim);
    let memory_file = clone(host.memory)?;
    if host.memory_is_shared {
        environment.push(shim::private(&memory_file));
    }
    let given = Given {
        accelerator: found.facts.accelerator,
        translation_cache: config.translation_cache,
        memory: inherit.path(memory_file),
        kernel: inherit.path(files::readable_by_all(host.kernel)?),
        initramfs: inherit.path(files::readable_by_all(host.initramfs)?),
        tap: host.tap.map(|tap| clone(tap).map(|tap| inherit.number(tap))).transpose()?,
        qmp: inherit.number(listen(&files.qmp)?),
        guest: inherit.number(listen(&files.guest)?),
        console: inherit.number(listen(&files.console)?),
        console_log: inherit.number(log(&files.console_log)?),
        // Named once it is known what it sees of this host.
        disks: vec![],
    };
    let groups = user.into_iter().chain(found.verdict.device_group).collect();
    let setup = BeforeExec {
        join,
        inherit: inherit.0,
        user: user.map(|user| (user, groups)),
        file_limit: LOG_LIMIT,
        confined: false,
    };
    let disks = host.disk_sockets.iter().map(|socket| DiskPlace::of(socket));
    let disks = disks.collect::<Result<_, _>>()?;
    let launched = Launched { found, shape, start, given, environment, setup, disks };
    let (process, unconfined) = launched.spawn(&config.state_dir.join("root"), &files)?;
    unmade.process = Some(process);
    if let Some(why) = &unconfined {
        tracing::warn!(machine, why, "its monitor runs without namespaces and a root of its own");
    }

    let userfaultfd = shim::Handshake::receive(&from_shim, SHIM_LIMIT, &files.stderr)
        .map_err(|failure| failure.into_error(machine, SHIM_LIMIT, &files.stderr))?;
    let process = unmade.process.as_mut().expect("the process was just started");
    let record = Record {
        version: Record::VERSION,
        process: process.identity(),
        user: unmade.user.clone(),
        cgroup: unmade.cgroup.clone().expect("the group was made above"),
        memory,
        memory_is_shared: host.memory_is_shared,
        disk_sockets: host.disk_sockets.clone(),
        shape: shape.clone(),
        unconfined,
    };
    // Written down before it may begin: a runner that dies leaves no QEMU that nobody finds.
    record.save(host.run_dir)?;
    let recorded = record.user.as_ref().map_or(Ok(()), |user| user.hand_to(process.identity()));
    recorded.and_then(|()| shim::Handshake::go(from_shim)).map_err(|source| DriverError::Host {
        operation: format!("letting the QEMU of machine \"{machine}\" begin"),
        source,
    })?;
    let mut qmp = connect(machine, &files, QMP_LIMIT, process)?;
    prepare_migration(&mut qmp).map_err(|error| refused(machine, &error))?;

    // From here on the machine cleans up after itself.
    let process = unmade.process.take().expect("it was there above");
    unmade.given_up = false;
    let mut vm = QemuVm::new(files.clone(), record, process, qmp, Some(userfaultfd));
    if let Err(error) = vm.started(start) {
        vm.kill()?;
        return Err(error);
    }
    Ok(vm)
}

/// The record of a run directory and its process, if that still lives. What a dead one left is
/// cleaned up.
fn find(run_dir: &Path) -> Result<Option<(Record, Process)>, DriverError> {
    let Some(record) = Record::load(run_dir)? else { return Ok(None) };
    let process = Process::open(record.process).map_err(|source| DriverError::Host {
        operation: format!(
            "looking for the QEMU of machine \"{}\", process {}",
            record.shape.name, record.process.pid
        ),
        source,
    })?;
    if process.is_none() {
        clean_up(&record, &Files::of(run_dir));
    }
    Ok(process.map(|process| (record, process)))
}

/// What is left of a QEMU that has ended, except its logs.
pub(super) fn clean_up(record: &Record, files: &Files) {
    record.cgroup.remove();
    if let Some(user) = &record.user {
        user.release();
    }
    files.remove();
}

/// A handle to stop the QEMU that a run directory tells of, without asking it.
pub(super) fn fence(run_dir: &Path) -> Result<Option<Arc<dyn Fence>>, DriverError> {
    Ok(find(run_dir)?
        .map(|(record, process)| Arc::new(Halt::of(&record, &process)) as Arc<dyn Fence>))
}

/// What the QEMU holds that a run directory tells of, without asking it.
pub(super) fn held(run_dir: &Path) -> Result<Option<Held>, DriverError> {
    find(run_dir)?.map(|(record, process)| held::everything(&record, &process)).transpose()
}

/// Finds the QEMU that a run directory tells of.
pub(super) fn take_over(run_dir: &Path) -> Result<Option<QemuVm>, DriverError> {
    let Some((record, mut process)) = find(run_dir)? else { return Ok(None) };
    let (machine, files) = (record.shape.name.clone(), Files::of(run_dir));
    if record.cgroup.is_frozen(process.pid()) {
        // Whoever froze it may have taken it its authority: we are not to let it run.
        return Err(DriverError::Refused {
            machine,
            operation: "taking it over",
            detail: "it is frozen and cannot answer; thaw it or kill it through its fence".into(),
        });
    }
    disks::admit_to_those_there(&record)?;
    let mut qmp = match connect(&machine, &files, TAKE_OVER_LIMIT, &mut process) {
        Ok(qmp) => qmp,
        Err(_) if process.ended().is_some() => {
            clean_up(&record, &files);
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // Its first runner may have died before this; while it waits for state QEMU refuses it.
    if let Err(error) = prepare_migration(&mut qmp) {
        tracing::debug!(machine, %error, "saved state stays as its first runner prepared it");
    }
    let mut vm = QemuVm::new(files, record, process, qmp, None);
    vm.find_phase()?;
    Ok(Some(vm))
}

/// Two QEMUs on one run directory would fight over its sockets.
fn refuse_second(machine: &str, run_dir: &Path) -> Result<(), DriverError> {
    match Record::load(run_dir)? {
        Some(record) if record.process.runs() => Err(DriverError::Invalid {
            machine: machine.into(),
            detail: format!(
                "process {} of machine \"{}\" still uses {}; take it over, or end it first",
                record.process.pid,
                record.shape.name,
                run_dir.display()
            ),
        }),
        _ => Ok(()),
    }
}

/// The guest's clock runs by the rate that it is told at boot, so that must be this host's.
fn check_clock(shape: &MachineShape, tsc_khz: u64) -> Result<(), DriverError> {
    match tsc_differs(shape.tsc_khz, tsc_khz, "this host") {
        None => Ok(()),
        Some(detail) => Err(DriverError::Invalid {
            machine: shape.name.clone(),
            detail: format!("{detail}; boot it with tsc_khz of this host's facts"),
        }),
    }
}

fn memory_id(memory: &OwnedFd, shape: &MachineShape) -> Result<FileId, DriverError> {
    let stat = nix::sys::stat::fstat(memory).map_err(|errno| DriverError::Host {
        operation: format!("looking at the memory of machine \"{}\"", shape.name),
        source: errno.into(),
    })?;
    if stat.st_size as u64 == shape.memory_bytes {
        return Ok(FileId { device: stat.st_dev, inode: stat.st_ino });
    }
    Err(DriverError::Invalid {
        machine: shape.name.clone(),
        detail: format!(
            "its memory file has {} bytes and its shape says {}",
            stat.st_size, shape.memory_bytes
        ),
    })
}

fn group_name(machine: &str) -> Result<String, DriverError> {
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(|error| DriverError::Host {
        operation: "naming a control group".into(),
        source: io::Error::other(error.to_string()),
    })?;
    Ok(format!("drafter-{machine}-{:08x}", u32::from_le_bytes(random)))
}

/// Descriptors for QEMU; each keeps its number.
#[derive(Default)]
struct Inherit(Vec<OwnedFd>);

impl Inherit {
    fn number(&mut self, descriptor: OwnedFd) -> i32 {
        let number = descriptor.as_raw_fd();
        self.0.push(descriptor);
        number
    }

    fn path(&mut self, descriptor: OwnedFd) -> String {
        format!("/proc/self/fd/{}", self.number(descriptor))
    }
}

/// A disk's socket, by its folder: a server that starts again makes a new socket there.
struct DiskPlace {
    folder: PathBuf,
    name: String,
}

impl DiskPlace {
    fn of(socket: &Path) -> Result<Self, DriverError> {
        let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
            return Err(Self::failed(socket, io::ErrorKind::InvalidInput.into()));
        };
        let name = name.to_str();
        let name =
            name.ok_or_else(|| Self::failed(socket, io::ErrorKind::InvalidFilename.into()))?;
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        Ok(Self { folder: folder.to_owned(), name: name.to_owned() })
    }

    fn failed(socket: &Path, source: io::Error) -> DriverError {
        let operation = format!("opening the folder of the disk's socket {}", socket.display());
        DriverError::Host { operation, source }
    }

    /// The folder for a monitor that sees this host, and may not search the folders above it.
    fn open(&self) -> Result<OwnedFd, DriverError> {
        File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(&self.folder)
            .map(OwnedFd::from)
            .map_err(|source| Self::failed(&self.folder.join(&self.name), source))
    }
}

fn clone(descriptor: &OwnedFd) -> Result<OwnedFd, DriverError> {
    descriptor.try_clone().map_err(|source| DriverError::Host {
        operation: "copying a descriptor for QEMU".into(),
        source,
    })
}

fn listen(path: &Path) -> Result<OwnedFd, DriverError> {
    UnixListener::bind(path).map(OwnedFd::from).map_err(|source| DriverError::Host {
        operation: format!("listening at {}", path.display()),
        source,
    })
}

fn log(path: &Path) -> Result<OwnedFd, DriverError> {
    let file = File::options().create(true).append(true).mode(0o600).open(path);
    file.map(OwnedFd::from).map_err(|source| DriverError::Host {
        operation: format!("opening the log {}", path.display()),
        source,
    })
}

/// A QEMU that is about to be started.
struct Launched<'a> {
    found: &'a Found,
    shape: &'a MachineShape,
    start: Start,
    given: Given,
    environment: Vec<(&'static str, String)>,
    setup: BeforeExec,
    disks: Vec<DiskPlace>,
}

impl Launched<'_> {
    /// Starts it, within walls if this host allows it; else says why not. `place`: a folder of ours for
    /// nothing but its root.
    fn spawn(self, place: &Path, files: &Files) -> Result<(Process, Option<String>), DriverError> {
        let (found, machine) = (self.found, self.shape.name.clone());
        let host = |source| DriverError::Host {
            operation: format!("starting {} for machine \"{machine}\"", found.binary.display()),
            source,
        };
        let binary = std::fs::canonicalize(&found.binary).map_err(host)?;
        let needs = Needs {
            binary: binary.clone(),
            kvm: self.given.accelerator == Accelerator::Kvm,
            disks: self.disks.iter().map(|disk| disk.folder.clone()).collect(),
            place: place.to_owned(),
        };
        // Only this QEMU's words: what an earlier one said is no news.
        let stderr = log(&files.stderr)?;
        nix::unistd::ftruncate(&stderr, 0).map_err(|errno| host(errno.into()))?;
        let stdout = stderr.try_clone().map_err(host)?;
        let walls = if own_users() { Ok(&needs) } else { Err(confine::ORDINARY_USER.to_owned()) };
        let (child, unconfined) = confine::within(walls, |confined| {
            let mut command = Command::new(&binary);
            command.stdout(stdout).stderr(stderr);
            self.start(command, confined, host)
        });
        let mut child = child?;
        let process = Process::of_child(child.id()).map_err(|source| {
            let _ = child.kill().and_then(|()| child.wait());
            host(source)
        })?;
        Ok((process, unconfined))
    }

    /// In the thread whose namespaces it gets, and with its root: nothing else of this host is to be
    /// seen here.
    fn start(
        mut self,
        mut command: Command,
        confined: bool,
        host: impl Fn(io::Error) -> DriverError,
    ) -> Result<Child, DriverError> {
        for (index, disk) in self.disks.iter().enumerate() {
            let folder = if confined {
                confine::disk_folder(index)
            } else {
                let folder = disk.open()?;
                let path = files::path_of(&folder).into();
                self.setup.inherit.push(folder);
                path
            };
            self.given.disks.push(format!("{}/{}", folder.display(), disk.name));
        }
        self.setup.confined = confined;
        command
            .args(command::arguments(self.shape, &self.given, self.start))
            .env_clear()
            .env("LANG", "C.UTF-8")
            .envs(self.environment)
            .current_dir("/")
            .stdin(Stdio::null());
        sys::before_exec(&mut command, self.setup);
        // With the command go our copies of what QEMU inherits, among them the sockets it listens at.
        command.spawn().map_err(host)
    }
}

fn connect(
    machine: &str,
    files: &Files,
    limit: Duration,
    process: &mut Process,
) -> Result<Qmp, DriverError> {
    const OPERATION: &str = "connecting to QEMU";
    Qmp::connect(&files.qmp, limit).map_err(|error| match error {
        QmpError::Timeout(limit) => {
            DriverError::Timeout { machine: machine.into(), operation: OPERATION, limit }
        }
        QmpError::Refused(detail) => {
            DriverError::Refused { machine: machine.into(), operation: OPERATION, detail }
        }
        QmpError::Closed(why) => {
            let ended = process.wait(Duration::from_secs(1));
            let ended = ended.map_or(why, |ended| ended.to_string());
            let errors = super::process::tail(&files.stderr, 2000);
            let detail = format!("{ended}; {errors}");
            DriverError::Gone { machine: machine.into(), operation: OPERATION, detail }
        }
    })
}

fn refused(machine: &str, error: &QmpError) -> DriverError {
    let detail = error.to_string();
    DriverError::Refused { machine: machine.into(), operation: "preparing saved state", detail }
}

/// Once per QEMU: memory is ours, so its stream carries device state only.
fn prepare_migration(qmp: &mut Qmp) -> Result<(), QmpError> {
    let limit = Duration::from_secs(10);
    let capabilities = serde_json::json!({ "capabilities": [
        { "capability": "x-ignore-shared", "state": true },
        { "capability": "events", "state": true },
    ]});
    qmp.call("migrate-set-capabilities", capabilities, limit)?;
    // No rate limit on state; conduit tells the network, so QEMU need not announce the guest.
    let parameters = serde_json::json!({ "max-bandwidth": 1u64 << 40, "announce-rounds": 0 });
    qmp.call("migrate-set-parameters", parameters, limit)?;
    Ok(())
}
