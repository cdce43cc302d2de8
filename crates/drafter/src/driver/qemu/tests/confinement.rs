//! What a machine's QEMU sees of its host and can do there, looked at from outside (`/proc/PID`) and from
//! within (a thread of this process in its namespaces).

use super::{nbd::Disk, rig::*, sys};
use crate::driver::{
    Driver, Start, Vm,
    qemu::{
        confine::{self, Needs},
        runs_without,
    },
};
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    thread,
};

const NAMESPACES: [&str; 6] = ["mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// A machine with a disk and a tap, which it has all that QEMU ever gets.
struct Full {
    machine: Machine,
    disk: PathBuf,
    _tap: OwnedFd,
}

fn full(rig: &Rig) -> Full {
    let folder = rig.state.path().join("disk");
    fs::create_dir(&folder).unwrap();
    let disk = folder.join("root.sock");
    let _served = Disk::serve(&disk, 1 << 20);
    let tap = sys::tap("tap-walls").unwrap();
    let given = Given { tap: Some(&tap), disk: Some(&disk) };
    let machine = rig.boot(&rig.full_shape(), given);
    Full { machine, disk, _tap: tap }
}

fn link(pid: u32, name: &str) -> String {
    let path = format!("/proc/{pid}/{name}");
    fs::read_link(&path).unwrap_or_else(|e| panic!("{path}: {e}")).to_string_lossy().into_owned()
}

/// Runs in the mount, network and IPC namespaces of a process, with its root.
fn inside<T: Send>(pid: u32, look: impl FnOnce() -> T + Send) -> T {
    let namespaces =
        ["mnt", "net", "ipc"].map(|n| File::open(format!("/proc/{pid}/ns/{n}")).unwrap());
    thread::scope(|scope| {
        let there = scope.spawn(move || {
            unshare(CloneFlags::CLONE_FS).unwrap();
            for namespace in &namespaces {
                setns(namespace, CloneFlags::empty()).unwrap();
            }
            look()
        });
        there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn names(folder: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder}: {error}"));
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

fn network_devices(file: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(file).unwrap();
    let names = text.lines().skip(2).filter_map(|line| line.split(':').next());
    names.map(|name| name.trim().to_owned()).collect()
}

/// What is mounted on this host below a folder.
fn mounted_below(folder: &Path) -> Vec<String> {
    let mounts = proc_file(std::process::id(), "mountinfo");
    let folder = folder.to_string_lossy().into_owned();
    mounts.lines().filter(|line| line.contains(&folder)).map(str::to_owned).collect()
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

#[test]
fn hop_check_32_a_machines_qemu_has_namespaces_of_its_own_and_no_capability() {
    super::moving::in_own_network(|| {
        let rig = Rig::new();
        let a = full(&rig);
        let b = rig.boot(&rig.shape(), Given::default());
        let own = std::process::id();
        let (first, second) = (a.machine.vm.pid(), b.vm.pid());
        for name in NAMESPACES {
            let found = [own, first, second].map(|pid| link(pid, &format!("ns/{name}")));
            let different: BTreeSet<_> = found.iter().collect();
            assert_eq!(different.len(), 3, "{name}: {found:?}");
        }
        assert_eq!(runs_without(a.machine.dir.path()), Vec::<String>::new());

        let status = proc_file(first, "status");
        let line = |name: &str| {
            let found = status.lines().find_map(|line| line.strip_prefix(name));
            found.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
        };
        for capabilities in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(line(capabilities), "0000000000000000", "{capabilities}");
        }
        assert_eq!((line("NoNewPrivs:"), line("Seccomp:")), ("1".into(), "2".into()));
        // The first process of its namespace, which has no other.
        assert!(line("NSpid:").ends_with("\t1"), "{}", line("NSpid:"));

        let limits = proc_file(first, "limits");
        for (name, most) in [("Max core file size", "0"), ("Max msgqueue size", "0")] {
            let found = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            let values: Vec<_> = found.split_whitespace().take(2).collect();
            assert_eq!(values, [most, most], "{name}");
        }
    });
}

#[test]
fn a_machines_qemu_sees_its_program_its_libraries_and_the_sockets_of_its_disks_and_can_write_nothing()
 {
    super::moving::in_own_network(|| {
        let rig = Rig::new();
        let full = full(&rig);
        let pid = full.machine.vm.pid();
        // Every mount, by its place and its options.
        let mounts = proc_file(pid, "mountinfo");
        let mut places = BTreeSet::new();
        for mount in mounts.lines() {
            let fields: Vec<&str> = mount.split(' ').collect();
            let (place, options) = (fields[4], fields[5]);
            let has = |option: &str| options.split(',').any(|found| found == option);
            assert!(has("ro") && has("nosuid"), "{mount}");
            assert!(has("nodev") || place.starts_with("/dev/"), "{mount}");
            // It would appear elsewhere too.
            assert!(!mount.contains(" shared:"), "{mount}");
            places.insert(place.to_owned());
        }
        let known = |place: &str| {
            let exactly =
                ["/", "/proc", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/disks/0"];
            exactly.contains(&place)
                || place.starts_with("/usr/bin/qemu-system-")
                || ["/usr/lib", "/lib", "/usr/local", "/usr/share/qemu", "/usr/share/seabios"]
                    .iter()
                    .any(|folder| place.starts_with(folder))
        };
        assert!(places.iter().all(|place| known(place)), "{places:#?}");

        let secret = rig.state.path().join("secret");
        fs::write(&secret, "x").unwrap();
        let below = secret.strip_prefix("/").unwrap();
        inside(pid, || {
            let mut roots = names("/");
            roots.retain(|name| !name.starts_with("lib"));
            assert_eq!(roots, set(["dev", "disks", "etc", "proc", "usr"]));
            assert_eq!(names("/etc"), set(["ld.so.cache"]));
            assert_eq!(names("/dev"), set(["null", "urandom"]));
            assert_eq!(names("/disks/0"), set(["root.sock"]));
            assert_eq!(names("/usr/bin").len(), 1);
            // The root of a process namespace in which there is one process.
            let numbers = names("/proc").into_iter().filter(|name| name.parse::<u32>().is_ok());
            assert_eq!(numbers.collect::<Vec<_>>(), ["1"]);
            assert!(!Path::new("/proc/sys").exists() && !Path::new("/proc/kcore").exists());
            // Not by name, not by going up, and not by a descriptor: it has none of a folder.
            for path in [secret.clone(), Path::new("/disks/0/../../../../../..").join(below)] {
                let error = File::open(&path).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::NotFound, "{}", path.display());
            }
            // This thread is root, and yet.
            for folder in ["/", "/usr/bin", "/dev", "/disks/0", "/usr/share/qemu"] {
                let error = File::create(Path::new(folder).join("new")).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{folder}");
            }
            let error = File::options().write(true).open("/etc/ld.so.cache").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        });
        assert_eq!(ask(&full.machine.vm, "sync"), "sync ok");
    });
}

#[test]
fn a_machines_qemu_has_no_network_and_reaches_no_server_of_its_host() {
    super::moving::in_own_network(|| {
        super::moving::ip("link set lo up");
        let rig = Rig::new();
        let full = full(&rig);
        let pid = full.machine.vm.pid();
        // What any new namespace has, and not the tap.
        let fresh = thread::scope(|scope| {
            let alone = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                network_devices("/proc/thread-self/net/dev")
            });
            alone.join().unwrap()
        });
        assert_eq!(network_devices(&format!("/proc/{pid}/net/dev")), fresh);
        assert!(network_devices("/proc/thread-self/net/dev").contains("tap-walls"));

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        TcpStream::connect(address).expect("from this host it is reached");
        // A unix socket without a file belongs to a network namespace too.
        let name = format!("drafter-test-{pid}");
        let abstract_address =
            std::os::unix::net::SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        let _abstract = UnixListener::bind_addr(&abstract_address).unwrap();
        inside(pid, || {
            let error = TcpStream::connect(address).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NetworkUnreachable, "{error}");
            let stream =
                socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
                    .unwrap();
            let there = UnixAddr::new_abstract(name.as_bytes()).unwrap();
            assert_eq!(connect(stream.as_raw_fd(), &there), Err(nix::Error::ECONNREFUSED));
            // What it may reach, and that it is this.
            std::os::unix::net::UnixStream::connect("/disks/0/root.sock").unwrap();
        });
    });
}

#[test]
fn a_machines_qemu_holds_no_descriptor_that_it_does_not_need() {
    super::moving::in_own_network(|| {
        let rig = Rig::new();
        // What this process has open is not QEMU's, also where it would survive an exec.
        let ours = File::open(rig.state.path()).unwrap();
        nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))
            .unwrap();
        let full = full(&rig);
        let pid = full.machine.vm.pid();
        let guest = ["DRAFTER_TEST_KERNEL", "DRAFTER_TEST_INITRAMFS"]
            .map(|variable| std::env::var(variable).unwrap())
            .map(|path| fs::canonicalize(path).unwrap().to_string_lossy().into_owned());
        let logs = ["console.log", "qemu.log"]
            .map(|log| full.machine.dir.path().join(log).to_string_lossy().into_owned());
        let mut taps = 0;
        let mut userfaultfds = 0;
        for number in names(&format!("/proc/{pid}/fd")) {
            let target = link(pid, &format!("fd/{number}"));
            taps += usize::from(target == "/dev/net/tun");
            userfaultfds += usize::from(target == "anon_inode:[userfaultfd]");
            let needed = target == "/dev/null"
                || target == "/dev/net/tun"
                || target.starts_with("socket:[")
                || target.starts_with("anon_inode:[")
                || target.starts_with("/memfd:")
                || guest.contains(&target)
                || logs.contains(&target);
            assert!(needed, "descriptor {number}: {target}");
        }
        assert_eq!((taps, userfaultfds), (1, 1));
        assert!(full.disk.exists());
    });
}

#[test]
fn hop_check_25_nothing_is_mounted_on_the_host_and_the_walls_go_with_the_process_that_is_killed_inside_them()
 {
    super::moving::in_own_network(|| {
        let rig = Rig::new();
        let full = full(&rig);
        let pid = full.machine.vm.pid();
        assert_eq!(mounted_below(rig.state.path()), Vec::<String>::new());
        let place = rig.state.path().join("root");
        assert_eq!(
            fs::read_dir(&place).unwrap().count(),
            0,
            "what is mounted there shows inside only"
        );
        let walls = NAMESPACES.map(|name| link(pid, &format!("ns/{name}")));

        let run_dir = full.machine.dir.path().to_owned();
        let process = super::super::process_of(&run_dir).unwrap().expect("it runs");
        crate::driver::qemu::sys::pidfd_signal(std::os::fd::AsFd::as_fd(&process), libc::SIGKILL)
            .unwrap();
        let limit = std::time::Duration::from_secs(60);
        until(limit, "it is dead", || super::super::monitor_without_runner(&run_dir).is_none());
        // Whoever comes next learns of its end: until somebody has, its number names its namespaces.
        assert!(rig.driver.take_over(&run_dir).unwrap().is_none());
        until(limit, "no process is inside its walls", || {
            let processes = names("/proc").into_iter().filter(|name| name.parse::<u32>().is_ok());
            !processes.into_iter().any(|process| {
                NAMESPACES.iter().zip(&walls).any(|(name, wall)| {
                    fs::read_link(format!("/proc/{process}/ns/{name}"))
                        .is_ok_and(|found| found.to_string_lossy() == wall.as_str())
                })
            })
        });
        fs::remove_dir(&place).expect("nothing holds the place of its root");
        assert_eq!(mounted_below(rig.state.path()), Vec::<String>::new());
    });
}

#[test]
fn where_no_walls_can_be_made_a_machine_runs_without_and_its_record_says_why() {
    let rig = Rig::new();
    // No folder can be made here.
    fs::write(rig.state.path().join("root"), "a file").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("root.sock");
    let _served = Disk::serve(&disk, 1 << 20);
    let mut shape = rig.shape();
    shape.disks = vec!["root".into()];
    let run_dir = tempfile::tempdir().unwrap();
    let memory = memory(shape.memory_bytes);
    let given = Given { disk: Some(&disk), tap: None };
    let mut vm = rig.try_start(&shape, &memory, run_dir.path(), Start::Boot, given).unwrap();
    vm.run().unwrap();
    wait_for_guest(&vm);
    assert_eq!(ask(&vm, "sync"), "sync ok");
    assert_eq!(link(vm.pid(), "ns/mnt"), link(std::process::id(), "ns/mnt"));
    let without = runs_without(run_dir.path()).join("; ");
    assert!(without.starts_with("namespaces and a root of its own: making "), "{without}");
    vm.kill().unwrap();
}

#[test]
fn hop_check_26_the_walls_of_a_thousand_monitors_come_and_go_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let needs = Needs {
        binary: fs::canonicalize("/bin/sh").unwrap(),
        kvm: false,
        disks: vec![folder.path().to_owned()],
        place: folder.path().join("root"),
    };
    for _ in 0..1000 {
        let (seen, why) = confine::within(Ok(&needs), |confined| (confined, names("/disks")));
        assert_eq!((seen, why), ((true, set(["0"])), None));
    }
    assert_eq!(mounted_below(folder.path()), Vec::<String>::new());
    fs::remove_dir(&needs.place).expect("nothing holds the place of their roots");
}
