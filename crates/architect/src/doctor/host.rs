//! The host around the machines: privilege, groups, space, and the tools that build packages.

use super::{Finding, State};
use crate::table::bytes;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const GIB: u64 = 1 << 30;
/// Debian's cloud kernel, a root file system with its disk, and two hosts' overlays.
const DISK_NEEDED: u64 = 3 * GIB;
/// Two machines of 256 MiB, each with as much again for its translator, and slack.
const MEMORY_NEEDED: u64 = 3 * GIB / 2;

const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;

/// The effective capabilities in the text of /proc/self/status.
pub(super) fn capabilities(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

pub(super) fn root(_: &Path) -> Finding {
    if !nix::unistd::geteuid().is_root() {
        return Finding::missing("not root", "run with sudo");
    }
    let held = capabilities(&fs::read_to_string("/proc/self/status").unwrap_or_default());
    let needed = [
        (CAP_SYS_ADMIN, "CAP_SYS_ADMIN"),
        (CAP_NET_ADMIN, "CAP_NET_ADMIN"),
        (CAP_SYS_PTRACE, "CAP_SYS_PTRACE"),
    ];
    let lacking: Vec<_> =
        needed.iter().filter(|(bit, _)| held >> bit & 1 == 0).map(|(_, name)| *name).collect();
    if lacking.is_empty() {
        Finding::ok("root with the capabilities needed")
    } else {
        Finding::missing(
            format!("root without {}", lacking.join(", ")),
            "a container must be given these capabilities (docker: --privileged)",
        )
    }
}

/// A mounted hierarchy that may freeze processes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Hierarchy {
    V2(PathBuf),
    FreezerV1(PathBuf),
}

/// The hierarchies that may freeze, in the text of /proc/self/mounts, version 2 first.
pub(super) fn hierarchies(mounts: &str) -> Vec<Hierarchy> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        let [_, path, kind, options, ..] = fields[..] else { continue };
        match kind {
            "cgroup2" => found.insert(0, Hierarchy::V2(path.into())),
            "cgroup" if options.split(',').any(|option| option == "freezer") => {
                found.push(Hierarchy::FreezerV1(path.into()));
            }
            _ => {}
        }
    }
    found
}

/// A group with a sleeping child in it; both go when dropped.
struct FrozenChild {
    group: PathBuf,
    child: Child,
}

impl FrozenChild {
    fn new(group: PathBuf) -> std::io::Result<FrozenChild> {
        fs::create_dir(&group)?;
        let child = Command::new("sleep").arg("30").stdin(Stdio::null()).spawn();
        let child = child.inspect_err(|_| drop(fs::remove_dir(&group)))?;
        let this = FrozenChild { group, child };
        fs::write(this.group.join("cgroup.procs"), this.child.id().to_string())?;
        Ok(this)
    }
}

impl Drop for FrozenChild {
    fn drop(&mut self) {
        let _ = fs::write(self.group.join("cgroup.freeze"), "0");
        let _ = fs::write(self.group.join("freezer.state"), "THAWED");
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The kernel lets go of an empty group a moment after its last process.
        for _ in 0..100 {
            match fs::remove_dir(&self.group) {
                Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                    sleep(Duration::from_millis(5));
                }
                _ => break,
            }
        }
    }
}

fn freezes(hierarchy: &Hierarchy) -> std::io::Result<bool> {
    let name = format!("architect-doctor-{}", std::process::id());
    let (root, switch, on, state, frozen) = match hierarchy {
        Hierarchy::V2(root) => (root, "cgroup.freeze", "1", "cgroup.events", "frozen 1"),
        Hierarchy::FreezerV1(root) => (root, "freezer.state", "FROZEN", "freezer.state", "FROZEN"),
    };
    let child = FrozenChild::new(root.join(name))?;
    fs::write(child.group.join(switch), on)?;
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        let text = fs::read_to_string(child.group.join(state))?;
        if text.lines().any(|line| line == frozen) {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        sleep(Duration::from_millis(1));
    }
}

pub(super) fn freezer(_: &Path) -> Finding {
    const SIGNALS: &str =
        "SIGSTOP is used instead, which a machine's monitor shares with debuggers";
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let hierarchies = hierarchies(&mounts);
    let v1 = mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup"));
    let mut problems = Vec::new();
    for hierarchy in &hierarchies {
        let name = match hierarchy {
            Hierarchy::V2(_) if v1 => "cgroup v2 (beside v1)",
            Hierarchy::V2(_) => "cgroup v2",
            Hierarchy::FreezerV1(_) => "cgroup v1",
        };
        match freezes(hierarchy) {
            Ok(true) => return Finding::ok(format!("{name}: a process was frozen")),
            Ok(false) => problems.push(format!("{name}: a process did not freeze within 2 s")),
            Err(error) => problems.push(format!("{name}: {error}")),
        }
    }
    match problems.is_empty() {
        true => Finding::limited("no cgroup hierarchy with a freezer is mounted", SIGNALS),
        false => Finding::limited(problems.join("; "), SIGNALS),
    }
}

/// Programs of `names` that no folder of PATH holds.
fn not_installed(names: &[&'static str]) -> Vec<&'static str> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps mke2fs where an ordinary user's PATH does not look.
    let folders: Vec<_> =
        std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).collect();
    let absent = |name: &&str| !folders.iter().any(|folder| folder.join(name).is_file());
    names.iter().copied().filter(absent).collect()
}

fn tools(names: &[&'static str], hint: &str) -> Finding {
    let absent = not_installed(names);
    if absent.is_empty() {
        Finding::ok(names.join(", "))
    } else {
        Finding::missing(format!("without {}", absent.join(", ")), hint)
    }
}

pub(super) fn package_tools(_: &Path) -> Finding {
    tools(
        &["apt-get", "apt-cache", "dpkg-deb"],
        "packages are built on Debian and its relatives; elsewhere bring a built package",
    )
}

pub(super) fn ext4_tools(_: &Path) -> Finding {
    tools(&["mke2fs"], "install e2fsprogs")
}

pub(super) fn processors(_: &Path) -> Finding {
    match std::thread::available_parallelism().map_or(1, usize::from) {
        1 => {
            Finding::limited("1", "source and destination share one processor: gaps will be longer")
        }
        several => Finding::ok(several.to_string()),
    }
}

fn enough(found: u64, needed: u64, what: &str, hint: &str) -> Finding {
    let detail = format!("{} {what}, {} needed", bytes(found), bytes(needed));
    if found >= needed { Finding::ok(detail) } else { Finding::missing(detail, hint) }
}

/// `MemAvailable` in the text of /proc/meminfo, in bytes.
pub(super) fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

pub(super) fn memory(_: &Path) -> Finding {
    match available(&fs::read_to_string("/proc/meminfo").unwrap_or_default()) {
        Some(found) => {
            enough(found, MEMORY_NEEDED, "free", "end something, or use smaller machines")
        }
        None => Finding {
            state: State::Limited,
            detail: "/proc/meminfo does not say how much is free".into(),
            hint: None,
        },
    }
}

pub(super) fn disk_space(data: &Path) -> Finding {
    match nix::sys::statvfs::statvfs(data) {
        Ok(stat) => enough(
            stat.blocks_available() * stat.fragment_size(),
            DISK_NEEDED,
            "free",
            "free some space, or name another folder with --data",
        ),
        Err(error) => Finding::missing(
            format!("{}: {}", data.display(), error.desc()),
            "name a folder that exists with --data",
        ),
    }
}
