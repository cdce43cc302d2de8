//! Namespaces, daemons and runners for one test, and the package that its machines are made of.

use crate::BOOT;
use architect::{
    doctor::missing,
    fleet::{Fleet, MachineSpec, RunnerId},
    programs,
    rig::{self, Rig, RigConfig},
};
use drafter::{
    driver::qemu,
    runner::state::{MachineDir, machines},
};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    ffi::OsStr,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// Namespaces of these tests begin with this.
const PREFIX: &str = "e2e";

/// One test's world. Dropping it ends everything.
pub struct Stage {
    /// The machines' runners, and the rig that they are on.
    pub fleet: Fleet,
    // In the order in which they must go: runners that a command left in the background end after
    // the fleet, and the next test begins after that.
    _strays: Strays,
    package: PathBuf,
    _alone: Flock<File>,
}

/// Runners and monitors that nobody waits for, in the state folders of a rig.
struct Strays(PathBuf);

impl Drop for Strays {
    fn drop(&mut self) {
        end_strays(&self.0);
    }
}

/// Ends every runner and monitor that a state folder below `folder` knows of.
fn end_strays(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for state in entries.flatten().map(|e| e.path()).filter(|p| is_state(p)) {
        for name in machines(&state).unwrap_or_default() {
            let dir = MachineDir::at(&state, &name);
            if let Ok(Some(record)) = dir.read_record()
                && record.alive()
            {
                let _ = kill(Pid::from_raw(record.pid as i32), Signal::SIGKILL);
                let deadline = Instant::now() + Duration::from_secs(5);
                while record.alive() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            if let Err(error) = qemu::stop_without_runner(&dir.run()) {
                eprintln!("a monitor of \"{name}\" may be left: {error}");
            }
        }
    }
}

/// Removes a folder of a test before, whose guards and keepers may be about to end: each does when the
/// runner that began it is gone, and tidies up in there.
fn remove(folder: &Path) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while let Err(error) = fs::remove_dir_all(folder) {
        assert!(Instant::now() < deadline, "{} cannot be removed: {error}", folder.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_state(path: &Path) -> bool {
    path.file_name().and_then(OsStr::to_str).is_some_and(|n| n.starts_with("state-"))
}

/// What a machine under test cannot do without; `Err` names the first that is not there.
fn needs() -> Result<(), (&'static str, &'static str)> {
    if !nix::unistd::geteuid().is_root() {
        return Err(("root", "namespaces, taps and other processes' memory need it"));
    }
    for (path, name) in [("/dev/userfaultfd", "userfaultfd"), ("/dev/net/tun", "tap")] {
        if !Path::new(path).exists() {
            return Err((name, "the device is not there; `architect doctor` says more"));
        }
    }
    let found = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|dir| dir.join("qemu-system-x86_64").is_file())
    });
    if !found {
        return Err(("qemu", "qemu-system-x86_64 is not installed; run scripts/setup.sh"));
    }
    Ok(())
}

impl Stage {
    /// Two hosts, an edge and a client, once no other test has a stage. `None` if this computer
    /// lacks a capability, which is then noted by name.
    #[must_use]
    pub fn open() -> Option<Self> {
        Self::with(RigConfig::default())
    }

    /// As [`Stage::open`], on a rig with other settings.
    #[must_use]
    pub fn with(config: RigConfig) -> Option<Self> {
        if let Err((capability, why)) = needs() {
            missing::note(&format!("{capability} (for end-to-end tests)"), why);
            return None;
        }
        let alone = File::create(std::env::temp_dir().join("architect-e2e.lock")).unwrap();
        let alone = Flock::lock(alone, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
        let folder = std::env::temp_dir().join(format!("architect-rig-{PREFIX}"));
        // What a test that was killed has left.
        end_strays(&folder);
        Rig::sweep(PREFIX, Some(&folder)).unwrap();
        for entry in fs::read_dir(&folder).unwrap().flatten() {
            if is_state(&entry.path()) || entry.file_name() == "leases" {
                remove(&entry.path());
            }
        }
        let package = package();
        let rig = Rig::new(RigConfig {
            prefix: PREFIX.into(),
            folder: Some(folder.clone()),
            leases: true,
            ..config
        });
        let fleet = Fleet::new(rig.unwrap()).unwrap();
        Some(Self { fleet, _strays: Strays(folder), package, _alone: alone })
    }

    /// The package: Redis, and the oracle as `/usr/bin/oracle`.
    #[must_use]
    pub fn package(&self) -> &Path {
        &self.package
    }

    /// The package with something changed in its recipe: `name` tells it from others.
    #[must_use]
    pub fn package_with(&self, name: &str, change: impl FnOnce(&mut serde_json::Value)) -> PathBuf {
        build_package(name, change)
    }

    /// A machine with an address and its Redis at the edge, over mutual TLS. `number` tells
    /// machines of one stage apart.
    #[must_use]
    pub fn spec(&self, name: &str, number: u8) -> MachineSpec {
        let mut spec = MachineSpec::new(name, &self.package);
        spec.address = Some(Ipv4Addr::new(10, 77, 0, number));
        spec.ports = vec![(public_port(number), 6379)];
        spec
    }

    /// A machine without network, where none is needed.
    #[must_use]
    pub fn plain_spec(&self, name: &str) -> MachineSpec {
        MachineSpec::new(name, &self.package)
    }

    /// Where clients find the Redis of machine `number`.
    #[must_use]
    pub fn public(number: u8) -> SocketAddr {
        (rig::PUBLIC, public_port(number)).into()
    }

    /// Boots a machine on host a and starts a runner for it on host b; returns when Redis serves.
    pub fn pair(&mut self, spec: &MachineSpec) -> (RunnerId, RunnerId) {
        let from = self.fleet.run(0, spec).unwrap();
        let to = self.fleet.receive(1, spec).unwrap();
        self.fleet.runner(from).wait_ready(BOOT).unwrap();
        (from, to)
    }

    /// A command of ours in a host's namespace, with that host's state directory.
    #[must_use]
    pub fn drafter(&self, host: usize) -> Command {
        let mut command = self.fleet.rig().hosts()[host].namespace.command(program("drafter"));
        command.arg("--state").arg(self.fleet.state_of(host));
        command
    }

    /// The directory of lease files that the runners share.
    #[must_use]
    pub fn leases(&self) -> PathBuf {
        self.fleet.leases()
    }

    /// Gives each host a way of its own to the leases, which a test can cut. For runners that start
    /// afterwards.
    pub fn lease_ways(&mut self) {
        fs::create_dir_all(self.leases()).unwrap();
        for host in 0..self.fleet.rig().hosts().len() {
            let way = self.lease_way(host);
            self.lead_leases(host, true);
            self.fleet.set_leases(host, way);
        }
    }

    fn lease_way(&self, host: usize) -> PathBuf {
        self.fleet.rig().folder().join(format!("leases-of-{}", self.fleet.rig().hosts()[host].name))
    }

    /// The lease store is there for that host's runners, or is not.
    pub fn lead_leases(&self, host: usize, there: bool) {
        let (way, new) = (self.lease_way(host), self.lease_way(host).with_extension("new"));
        let _ = fs::remove_file(&new);
        // To nowhere: a folder that is not there would be made.
        let to = if there { self.leases() } else { self.leases().join("nowhere/at/all") };
        std::os::unix::fs::symlink(to, &new).unwrap();
        fs::rename(new, way).unwrap();
    }
}

fn public_port(number: u8) -> u16 {
    6378 + u16::from(number)
}

/// One of our commands, of the build that the tests belong to.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    programs::command(name).unwrap_or_else(|| panic!("no {name} beside the tests: {BUILD}"))
}

/// The program that checks a guest from inside; on this side it is an echo server.
#[must_use]
pub(crate) fn oracle() -> PathBuf {
    programs::oracle().unwrap_or_else(|| panic!("no oracle for guests: {BUILD}"))
}

const BUILD: &str = "run scripts/build.sh first";

/// Builds the package, or finds it built: the builder knows by its inputs. The Redis of the demo,
/// and a shell with its tools.
fn package() -> PathBuf {
    build_package("redis", |_| {})
}

fn build_package(name: &str, change: impl FnOnce(&mut serde_json::Value)) -> PathBuf {
    let folder = std::env::temp_dir().join("architect-e2e");
    fs::create_dir_all(&folder).unwrap();
    let (output, recipe) = (folder.join(name), folder.join(format!("{name}.recipe.json")));
    let oracle = oracle();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packages/redis.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(demo).unwrap()).unwrap();
    let debian = json["root"]["debian"]["packages"].as_array_mut().expect("a list of packages");
    debian.extend(["dash", "coreutils"].map(serde_json::Value::from));
    change(&mut json);
    fs::write(&recipe, json.to_string()).unwrap();
    let built = Command::new(program("drafter"))
        .args(["package", "build", "--recipe"])
        .arg(&recipe)
        .arg("--add")
        .arg(format!("{}:/usr/bin/oracle", oracle.display()))
        .arg("--output")
        .arg(&output)
        .output()
        .unwrap();
    assert!(
        built.status.success(),
        "the package was not built: {}",
        String::from_utf8_lossy(&built.stderr)
    );
    output
}
