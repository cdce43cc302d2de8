//! A control group of its own for each machine's monitor: limits, and the freezer that stops a
//! machine without asking it.
//!
//! Works with cgroup v2, with v1, and with both at once (hybrid): each controller is used where it
//! is mounted. The group is a child of the runner's own, so it stays inside whatever limits the
//! runner was given; on v2 a group that holds processes cannot pass controllers on, then it is a
//! sibling.
//!
//! Who pays for guest memory: a page of the memfd is charged to the group of whoever touches it
//! first. Pages that the guest touches, and pages that arrive by `UFFDIO_COPY` (charged to the
//! process whose memory it fills), belong to this group; pages that the runner writes through its
//! own mapping or by write(2) belong to the runner's. So the limit here has to hold the whole
//! memory, and the runner's must too where it is filled from there.

use super::process::{Identity, signal_by};
use crate::driver::DriverError;
use nix::sys::signal::Signal;
use std::{
    fs::{self, File},
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

const FREEZE_LIMIT: Duration = Duration::from_secs(2);
const REMOVE_LIMIT: Duration = Duration::from_secs(2);

/// What a machine's monitor may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) memory_bytes: u64,
    /// Threads and processes.
    pub(super) tasks: u64,
}

/// One mounted hierarchy, and where this process is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    /// Empty for v2.
    controllers: Vec<String>,
    v2: bool,
    /// Directory of this process' own group.
    own: PathBuf,
}

/// The hierarchies of /proc/self/mountinfo and /proc/self/cgroup.
fn hierarchies(mountinfo: &str, membership: &str) -> Vec<Hierarchy> {
    mountinfo.lines().filter_map(|line| hierarchy(line, membership)).collect()
}

fn hierarchy(mount: &str, membership: &str) -> Option<Hierarchy> {
    let (before, after) = mount.split_once(" - ")?;
    let mut fields = before.split(' ').skip(3);
    let (root, point) = (fields.next()?, fields.next()?);
    let mut fields = after.split(' ');
    let v2 = match fields.next()? {
        "cgroup2" => true,
        "cgroup" => false,
        _ => return None,
    };
    let options: Vec<&str> = fields.nth(1)?.split(',').collect();
    // "4:memory:/path", "1:name=systemd:/path", "0::/path"
    let path = membership.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (names, path) = (parts.next()?, parts.next()?);
        let here =
            if v2 { names.is_empty() } else { names.split(',').all(|n| options.contains(&n)) };
        (here && v2 == names.is_empty()).then_some(path)
    })?;
    let below = if root == "/" { path } else { path.strip_prefix(root)? };
    let controllers = if v2 { vec![] } else { options.into_iter().map(str::to_owned).collect() };
    Some(Hierarchy { controllers, v2, own: Path::new(point).join(below.trim_start_matches('/')) })
}

/// How the machine is frozen.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case", tag = "by", content = "group")]
enum Freezer {
    /// `cgroup.freeze` of a v2 group.
    V2(PathBuf),
    /// `freezer.state` of a v1 group.
    V1(PathBuf),
    /// SIGSTOP and SIGCONT.
    Signals,
}

/// The groups of one machine, in all hierarchies that it uses. Saved beside the machine, so that
/// a later runner finds them.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Cgroup {
    directories: Vec<PathBuf>,
    /// The group with the memory limit.
    memory: Option<PathBuf>,
    freezer: Freezer,
    /// What could not be had.
    without: Vec<String>,
}

impl Cgroup {
    /// Makes the groups. `name` must be unique on this computer and fit in a file name. What
    /// cannot be had (no controller, a read-only mount) is left out and listed by
    /// [`Cgroup::without`].
    pub(super) fn create(name: &str, limits: Limits) -> Self {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let found = hierarchies(&mountinfo, &membership);
        let mut group =
            Self { directories: vec![], memory: None, freezer: Freezer::Signals, without: vec![] };
        let settings = [
            ("memory", "memory.limit_in_bytes", "memory.max", limits.memory_bytes),
            ("pids", "pids.max", "pids.max", limits.tasks),
        ];
        for (controller, v1_file, v2_file, value) in settings {
            let v1 = found.iter().find(|h| h.controllers.iter().any(|c| c == controller));
            let made = match v1 {
                Some(hierarchy) => group.limit(&hierarchy.own.join(name), v1_file, value),
                None => group.limit_v2(&found, name, controller, v2_file, value),
            };
            match made {
                Ok(directory) if controller == "memory" => group.memory = Some(directory),
                Ok(_) => {}
                Err(error) => group.without.push(format!("{controller} limit: {error}")),
            }
        }
        group.freezer = group.find_freezer(&found, name);
        group
    }

    /// What could not be had, each with its cause.
    pub(super) fn without(&self) -> &[String] {
        &self.without
    }

    /// Makes a directory if it is not there and remembers it.
    fn directory(&mut self, path: &Path) -> io::Result<()> {
        if !self.directories.iter().any(|known| known == path) {
            fs::create_dir(path).map_err(|error| named(&error, "mkdir", path))?;
            self.directories.push(path.to_owned());
        }
        Ok(())
    }

    fn limit(&mut self, directory: &Path, file: &str, value: u64) -> io::Result<PathBuf> {
        self.directory(directory)?;
        let path = directory.join(file);
        fs::write(&path, value.to_string()).map_err(|error| named(&error, "write", &path))?;
        Ok(directory.to_owned())
    }

    fn limit_v2(
        &mut self,
        found: &[Hierarchy],
        name: &str,
        controller: &str,
        file: &str,
        value: u64,
    ) -> io::Result<PathBuf> {
        let hierarchy = found.iter().find(|h| h.v2).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, "no cgroup hierarchy with it is mounted")
        })?;
        let parent = self.v2_parent(hierarchy, name, controller)?;
        self.limit(&parent.join(name), file, value)
    }

    /// A group that passes `controller` on to its children: our own, or else its parent. All
    /// controllers end up at the same place, because a process has one place in v2.
    fn v2_parent(&self, h: &Hierarchy, name: &str, controller: &str) -> io::Result<PathBuf> {
        let fixed = self.directories.iter().find(|d| d.file_name().is_some_and(|n| n == name));
        let candidates = match fixed.and_then(|d| d.parent()) {
            Some(parent) if parent.starts_with(&h.own) || h.own.starts_with(parent) => vec![parent],
            _ => vec![h.own.as_path(), h.own.parent().unwrap_or(&h.own)],
        };
        let mut last = None;
        for parent in candidates {
            let control = parent.join("cgroup.subtree_control");
            let on = fs::read_to_string(&control)
                .is_ok_and(|text| text.split_whitespace().any(|word| word == controller));
            match if on { Ok(()) } else { fs::write(&control, format!("+{controller}")) } {
                Ok(()) => return Ok(parent.to_owned()),
                Err(error) => last = Some(named(&error, "write", &control)),
            }
        }
        Err(last.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
    }

    fn find_freezer(&mut self, found: &[Hierarchy], name: &str) -> Freezer {
        // v2 first, also where it carries no controller: a frozen process can be killed there.
        if let Some(h) = found.iter().find(|h| h.v2) {
            let known = self.directories.iter().find(|d| d.join("cgroup.freeze").exists()).cloned();
            let path = known.unwrap_or_else(|| h.own.join(name));
            if self.directory(&path).is_ok() && path.join("cgroup.freeze").exists() {
                return Freezer::V2(path);
            }
        }
        if let Some(h) = found.iter().find(|h| h.controllers.iter().any(|c| c == "freezer")) {
            let path = h.own.join(name);
            if self.directory(&path).is_ok() {
                return Freezer::V1(path);
            }
        }
        self.without.push("freezer: no group could be made, signals are used".into());
        Freezer::Signals
    }

    /// The files through which a process joins, open for writing.
    pub(super) fn join_files(&self) -> Result<Vec<OwnedFd>, DriverError> {
        let open = |directory: &PathBuf| {
            let path = directory.join("cgroup.procs");
            File::options().write(true).open(&path).map(OwnedFd::from).map_err(|source| {
                DriverError::Host { operation: format!("opening {}", path.display()), source }
            })
        };
        self.directories.iter().map(open).collect()
    }

    /// Freezes all threads of a process that joined. From its return none executes an
    /// instruction of the program.
    pub(super) fn freeze(&self, identity: Identity, process: BorrowedFd<'_>) -> io::Result<()> {
        match &self.freezer {
            Freezer::V2(group) => {
                fs::write(group.join("cgroup.freeze"), "1")?;
                until(FREEZE_LIMIT, || has_line(&group.join("cgroup.events"), "frozen 1"))
            }
            Freezer::V1(group) => {
                let state = group.join("freezer.state");
                fs::write(&state, "FROZEN")?;
                until(FREEZE_LIMIT, || has_line(&state, "FROZEN"))
            }
            Freezer::Signals => {
                signal_by(process, Signal::SIGSTOP)?;
                until(FREEZE_LIMIT, || all_stopped(identity.pid))
            }
        }
    }

    /// Whether somebody froze it, or is about to.
    pub(super) fn is_frozen(&self, pid: u32) -> bool {
        match &self.freezer {
            Freezer::V2(group) => has_line(&group.join("cgroup.freeze"), "1").unwrap_or(false),
            Freezer::V1(group) => !has_line(&group.join("freezer.state"), "THAWED").unwrap_or(true),
            Freezer::Signals => all_stopped(pid).unwrap_or(false),
        }
    }

    /// Undoes [`Cgroup::freeze`].
    pub(super) fn thaw(&self, process: BorrowedFd<'_>) -> io::Result<()> {
        match &self.freezer {
            Freezer::V2(group) => fs::write(group.join("cgroup.freeze"), "0"),
            Freezer::V1(group) => fs::write(group.join("freezer.state"), "THAWED"),
            Freezer::Signals => signal_by(process, Signal::SIGCONT),
        }
    }

    /// Lets a frozen process that got SIGKILL die. In v1 it would wait for the thaw; it executes
    /// nothing more either way.
    pub(super) fn release_killed(&self) -> io::Result<()> {
        match &self.freezer {
            Freezer::V1(group) => fs::write(group.join("freezer.state"), "THAWED"),
            Freezer::V2(_) | Freezer::Signals => Ok(()),
        }
    }

    /// Whether the kernel killed the machine because it reached its memory limit.
    pub(super) fn out_of_memory(&self) -> bool {
        self.memory.as_ref().is_some_and(|group| {
            ["memory.oom_control", "memory.events"].iter().any(|file| {
                fs::read_to_string(group.join(file)).is_ok_and(|text| {
                    text.lines().any(|l| l.strip_prefix("oom_kill ").is_some_and(|n| n != "0"))
                })
            })
        })
    }

    /// Removes the groups once the last process is gone.
    pub(super) fn remove(&self) {
        for directory in &self.directories {
            let gone = || match fs::remove_dir(directory) {
                Ok(()) => Ok(true),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
                // Busy: the last task is on its way out.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
                Err(error) => Err(error),
            };
            if let Err(error) = until(REMOVE_LIMIT, gone) {
                tracing::warn!(group = %directory.display(), %error, "control group stays behind");
            }
        }
    }
}

fn named(error: &io::Error, operation: &str, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{operation} {}: {error}", path.display()))
}

fn has_line(path: &Path, line: &str) -> io::Result<bool> {
    Ok(fs::read_to_string(path)?.lines().any(|l| l == line))
}

/// Whether no thread of a process can run: stopped, traced, dead or a zombie.
fn all_stopped(pid: u32) -> io::Result<bool> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(stat) = fs::read_to_string(task?.path().join("stat")) else { continue };
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        if !matches!(state, Some('T' | 't' | 'X' | 'Z')) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Asks again until `done`, first without rest, then at longer and longer intervals.
fn until(limit: Duration, mut done: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let end = Instant::now() + limit;
    let mut rest = Duration::from_micros(50);
    while !done()? {
        if Instant::now() >= end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(rest);
        rest = (rest * 2).min(Duration::from_millis(10));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::qemu::{
        process::Process,
        sys::{BeforeExec, before_exec},
    };
    use std::process::{Child, Command};

    #[test]
    fn hybrid_v2_and_containers_are_understood() {
        let hybrid = "\
33 30 0:29 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
34 30 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
35 30 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
36 30 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        let membership = "4:memory:/a/b\n3:cpuacct,cpu:/\n2:name=systemd:/\n0::/u";
        let owns = |text, membership| -> Vec<_> {
            hierarchies(text, membership).into_iter().map(|h| h.own).collect()
        };
        let expected = ["memory/a/b", "cpu,cpuacct", "systemd", "unified/u"];
        let expected: Vec<_> =
            expected.iter().map(|e| Path::new("/sys/fs/cgroup").join(e)).collect();
        assert_eq!(owns(hybrid, membership), expected);
        assert!(hierarchies(hybrid, membership)[3].v2);

        let container = "99 30 0:26 /pod/x /sys/fs/cgroup ro - cgroup2 cgroup rw,nsdelegate";
        assert_eq!(owns(container, "0::/pod/x/leaf"), [PathBuf::from("/sys/fs/cgroup/leaf")]);
        assert!(owns(container, "0::/elsewhere").is_empty());
        assert!(hierarchies("nonsense\n - \n1 2 3 - cgroup", "::\n").is_empty());
    }

    /// A process in the group that counts, unless it is frozen.
    fn busy(group: &Cgroup) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        let join = group.join_files().unwrap();
        let setup = BeforeExec { join, file_limit: 1 << 20, ..BeforeExec::default() };
        before_exec(&mut command, setup);
        command.spawn().unwrap()
    }

    fn cpu_ticks(pid: u32) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(11).unwrap().parse().unwrap()
    }

    fn freezing_stops_it(group: &Cgroup, child: &Child) {
        let process = Process::of_child(child.id()).unwrap();
        let runs = || {
            let before = cpu_ticks(child.id());
            let end = Instant::now() + Duration::from_secs(10);
            while cpu_ticks(child.id()) == before && Instant::now() < end {
                thread::sleep(Duration::from_millis(10));
            }
            cpu_ticks(child.id()) > before
        };
        assert!(runs(), "the process should be busy to begin with");
        assert!(!group.is_frozen(child.id()));
        group.freeze(process.identity(), process.descriptor()).unwrap();
        assert!(group.is_frozen(child.id()));
        let frozen_at = cpu_ticks(child.id());
        thread::sleep(Duration::from_millis(150));
        assert_eq!(cpu_ticks(child.id()), frozen_at);
        group.thaw(process.descriptor()).unwrap();
        assert!(runs(), "it should go on after the thaw");
    }

    fn kill_frozen(group: &Cgroup, child: &mut Child) {
        let mut process = Process::of_child(child.id()).unwrap();
        group.freeze(process.identity(), process.descriptor()).unwrap();
        process.signal(Signal::SIGKILL).unwrap();
        group.release_killed().unwrap();
        assert!(process.wait(Duration::from_secs(10)).is_some(), "a frozen process must die");
        group.remove();
        assert!(group.directories.iter().all(|d| !d.exists()), "{:?}", group.directories);
    }

    #[test]
    fn limits_are_set_and_the_process_is_frozen_thawed_and_killed_in_its_group() {
        let name = format!("drafter-test-group-{}", std::process::id());
        let group = Cgroup::create(&name, Limits { memory_bytes: 64 << 20, tasks: 9 });
        let mut child = busy(&group);
        assert!(group.without().is_empty(), "{:?}", group.without());
        let memory = group.memory.clone().unwrap();
        let limit = ["memory.limit_in_bytes", "memory.max"]
            .iter()
            .find_map(|file| fs::read_to_string(memory.join(file)).ok());
        assert_eq!(limit.unwrap().trim(), (64u64 << 20).to_string());
        let procs = fs::read_to_string(memory.join("cgroup.procs")).unwrap();
        assert_eq!(procs.trim(), child.id().to_string());
        freezing_stops_it(&group, &child);
        kill_frozen(&group, &mut child);
    }

    #[test]
    fn every_freezer_that_this_kernel_offers_freezes() {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let membership = fs::read_to_string("/proc/self/cgroup").unwrap();
        let name = format!("drafter-test-each-{}", std::process::id());
        let mut offered = vec![Freezer::Signals];
        for h in hierarchies(&mountinfo, &membership) {
            let path = h.own.join(&name);
            if h.v2 {
                offered.push(Freezer::V2(path));
            } else if h.controllers.iter().any(|c| c == "freezer") {
                offered.push(Freezer::V1(path));
            }
        }
        for freezer in offered {
            let mut group = Cgroup { directories: vec![], memory: None, freezer, without: vec![] };
            if let Freezer::V1(path) | Freezer::V2(path) = group.freezer.clone() {
                group.directory(&path).unwrap();
            }
            let mut child = busy(&group);
            freezing_stops_it(&group, &child);
            kill_frozen(&group, &mut child);
        }
    }
}
