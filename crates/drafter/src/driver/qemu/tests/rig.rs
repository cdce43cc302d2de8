//! What the tests stand on: a driver, hosts' run directories, and machines that end with the test.
//!
//! The guest is built by `tests/guest/build.sh`; its paths come in the environment.

use super::super::{QemuConfig, QemuDriver, command, launch, vm::QemuVm};
use crate::driver::{DiskKind, DriverError, HostResources, MachineShape, NetworkShape, Start, Vm};
use nix::sys::memfd::{MFdFlags, memfd_create};
use silo::{
    expose::vhost::{VhostOptions, VhostServer},
    io::BlockDevice,
    source::MemoryDevice,
};
use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    net::Ipv4Addr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Machines are timed, and this computer may have two processors: one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

fn from_environment(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or_else(
        || {
            panic!(
                "{variable} is not set: build the guest of these tests with \
             crates/drafter/src/driver/qemu/tests/guest/build.sh DIRECTORY and set it to the file \
             there"
            )
        },
        PathBuf::from,
    );
    assert!(path.is_file(), "{variable} is {}, which is not a file", path.display());
    path
}

pub(super) struct Rig {
    pub(super) driver: QemuDriver,
    pub(super) state: TempDir,
    kernel: PathBuf,
    initramfs: PathBuf,
    _one: Option<MutexGuard<'static, ()>>,
}

/// A machine and what it stands on; ends with the value.
pub(super) struct Machine {
    pub(super) vm: QemuVm,
    pub(super) memory: OwnedFd,
    pub(super) dir: TempDir,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.vm.kill();
        if thread::panicking() {
            for log in ["console.log", "qemu.log"] {
                let text = fs::read_to_string(self.dir.path().join(log)).unwrap_or_default();
                eprintln!("--- {log}\n{text}");
            }
        }
    }
}

/// What a host gives beside memory and directory.
#[derive(Clone, Copy, Default)]
pub(super) struct Given<'a> {
    pub(super) tap: Option<&'a OwnedFd>,
    pub(super) disk: Option<&'a Path>,
}

/// A disk in memory whose flushes wait while it is shut.
pub(super) struct Gated {
    inner: MemoryDevice,
    shut: Mutex<bool>,
    changed: Condvar,
    pub(super) waiting: AtomicU64,
}

impl Gated {
    pub(super) fn new(bytes: u64) -> Arc<Self> {
        let inner = MemoryDevice::new("disk", bytes).unwrap();
        let (shut, changed, waiting) = (Mutex::new(false), Condvar::new(), AtomicU64::new(0));
        Arc::new(Self { inner, shut, changed, waiting })
    }

    pub(super) fn shut(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.changed.notify_all();
    }
}

impl BlockDevice for Gated {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write_at(offset, data)
    }

    fn flush(&self) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let shut = self.shut.lock().unwrap();
        let limit = Duration::from_secs(60);
        let (_open, late) = self.changed.wait_timeout_while(shut, limit, |shut| *shut).unwrap();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        if late.timed_out() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.trim(offset, length)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.inner.zero(offset, length, allocate)
    }
}

/// A disk in memory on a vhost-user socket, whose server takes all guest memory for present.
pub(super) fn vhost_disk(path: &Path, bytes: u64) -> VhostServer {
    let device = Arc::new(MemoryDevice::new("disk", bytes).unwrap());
    VhostServer::start(path, device, VhostOptions::default()).unwrap()
}

pub(super) fn memory(bytes: u64) -> OwnedFd {
    let memory = memfd_create(c"test-memory", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&memory, bytes as i64).unwrap();
    memory
}

impl Rig {
    pub(super) fn new() -> Self {
        Self::with(|_| ())
    }

    pub(super) fn with(change: impl FnOnce(&mut QemuConfig)) -> Self {
        let one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let state = tempfile::tempdir().unwrap();
        Self { _one: Some(one), ..Self::inside(state, change) }
    }

    /// For a second process of the same test.
    pub(super) fn inside(state: TempDir, change: impl FnOnce(&mut QemuConfig)) -> Self {
        let (kernel, initramfs) =
            (from_environment("DRAFTER_TEST_KERNEL"), from_environment("DRAFTER_TEST_INITRAMFS"));
        let mut config = QemuConfig::new(state.path());
        change(&mut config);
        Self { driver: QemuDriver::new(config), state, kernel, initramfs, _one: None }
    }

    /// A small machine for this host, without network and disk.
    pub(super) fn shape(&self) -> MachineShape {
        MachineShape {
            vcpus: 1,
            command_line: String::new(),
            network: None,
            disks: vec![],
            disk_kind: DiskKind::Nbd,
            tsc_khz: self.driver.find().unwrap().facts.tsc_khz,
            ..command::tests::shape()
        }
    }

    /// With a network and a disk.
    pub(super) fn full_shape(&self) -> MachineShape {
        MachineShape {
            command_line: format!("test.ip={GUEST}/24"),
            network: Some(NetworkShape {
                address: GUEST,
                address_v6: None,
                mac: [2, 0, 0, 0, 0, 2],
                mtu: 1400,
            }),
            disks: vec!["root".into()],
            ..self.shape()
        }
    }

    pub(super) fn try_start(
        &self,
        shape: &MachineShape,
        memory: &OwnedFd,
        run_dir: &Path,
        start: Start,
        given: Given<'_>,
    ) -> Result<QemuVm, DriverError> {
        let host = HostResources {
            memory,
            memory_is_shared: false,
            tap: given.tap,
            disk_sockets: given.disk.map(Path::to_owned).into_iter().collect(),
            kernel: &self.kernel,
            initramfs: &self.initramfs,
            run_dir,
        };
        let found = self.driver.find()?;
        launch::start(&self.driver.config, &found, shape, &host, start)
    }

    pub(super) fn start(
        &self,
        shape: &MachineShape,
        memory: OwnedFd,
        start: Start,
        given: Given<'_>,
    ) -> Machine {
        let dir = tempfile::tempdir().unwrap();
        let vm = self.try_start(shape, &memory, dir.path(), start, given).unwrap();
        Machine { vm, memory, dir }
    }

    /// A machine that runs and answers.
    pub(super) fn boot(&self, shape: &MachineShape, given: Given<'_>) -> Machine {
        let mut machine = self.start(shape, memory(shape.memory_bytes), Start::Boot, given);
        machine.vm.run().unwrap();
        wait_for_guest(&machine.vm);
        machine
    }

    /// The place on another host for a machine: an empty QEMU on the same memory.
    pub(super) fn place_for(
        &self,
        machine: &Machine,
        shape: &MachineShape,
        given: Given<'_>,
    ) -> Machine {
        let memory = machine.memory.try_clone().unwrap();
        let mut place = self.start(shape, memory, Start::Incoming, given);
        place.vm.prepare_load().unwrap();
        place
    }
}

/// Waits until the guest's agent listens.
pub(super) fn wait_for_guest(vm: &dyn Vm) {
    until(Duration::from_secs(60), "the guest comes up", || {
        fs::read_to_string(vm.console_log()).is_ok_and(|text| text.contains("test guest: up"))
    });
}

pub(super) fn until(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "waited {limit:?} until {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The guest's answer to one line.
pub(super) fn ask(vm: &dyn Vm, line: &str) -> String {
    let mut answer = String::new();
    say(vm, line).read_line(&mut answer).unwrap();
    answer.trim().to_owned()
}

/// Says a line to the guest.
pub(super) fn say(vm: &dyn Vm, line: &str) -> BufReader<UnixStream> {
    let mut stream = UnixStream::connect(vm.guest_socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    BufReader::new(stream)
}

/// How far the guest has counted.
pub(super) fn count(vm: &dyn Vm) -> u64 {
    let answer = ask(vm, "count");
    answer
        .strip_prefix("count ")
        .and_then(|n| n.parse().ok())
        .unwrap_or_else(|| panic!("{answer:?}"))
}

/// A whole file of /proc about a process.
pub(super) fn proc_file(pid: u32, name: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap()
}

/// Reads part of the memory.
pub(super) fn read_memory(memory: &OwnedFd, offset: u64, length: u64) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut data = vec![0; length as usize];
    File::from(memory.try_clone().unwrap()).read_exact_at(&mut data, offset).unwrap();
    data
}
