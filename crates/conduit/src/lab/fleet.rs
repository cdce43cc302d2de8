//! A fleet of processes: `conduit edge` and two `conduit agent`s in namespaces, a client outside, and a
//! machine without a processor that moves between the hosts. Daemons can be killed and started again.

use super::{
    Space,
    line::{Line, Shape},
    machine::{Guest, Vmm},
    wait_for,
};
use crate::{
    AgentDataPath, DataPath, KernelError, MachineNet, PathChoice, PortMapping, Protocol, Tap, exec,
    holder,
};
use identity::HostName;
use lease::{AttemptId, FileStore, LeaseStore, MachineName, Nonce, Record};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// The edge's public address.
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// Public TCP port of the machine's echo port 7.
pub const TCP: u16 = 7000;
/// Public UDP port of the machine's port 9.
pub const UDP: u16 = 7001;
/// Public TCP port of the machine's port 8, for bulk.
pub const BULK: u16 = 7002;
/// All of them, with the machine's own.
const PORTS: [(Protocol, u16, u16); 3] =
    [(Protocol::Tcp, TCP, 7), (Protocol::Udp, UDP, 9), (Protocol::Tcp, BULK, 8)];

const READY: Duration = Duration::from_secs(60);
/// Lines of each log that are told when something did not begin.
const LOG_LINES: usize = 12;
const SETTLE: Duration = Duration::from_secs(5);
const END: Duration = Duration::from_secs(20);

/// A daemon's process. Dropped, it is asked to remove all that it made.
pub(super) struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts one in a namespace, with what all daemons of a rig are told.
    pub(super) fn start(
        space: &Space,
        folder: &Path,
        log: &str,
        encrypt: &str,
        command: &mut Command,
    ) -> Result<Self, KernelError> {
        let fail = |e: std::io::Error| failed("start a daemon", e);
        let log = File::options()
            .create(true)
            .append(true)
            .open(folder.join(format!("{log}.log")))
            .map_err(fail)?;
        command.args(["--plaintext", "--remove-on-exit", "--encrypt", encrypt]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = space.run(|| command.spawn()).map_err(fail)?;
        Ok(Self { child })
    }

    pub(super) fn signal(&self, signal: Signal) -> Result<(), KernelError> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal)
            .map_err(|e| failed("send a signal to a daemon", e))
    }

    pub(super) fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Nothing is left to end.
        std::mem::forget(self);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        if !wait_for(END, || !matches!(self.child.try_wait(), Ok(None))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A host.
struct Host {
    name: &'static str,
    at: u8,
    space: Space,
    agent: Option<Daemon>,
    path: Option<AgentDataPath>,
    tap: Option<Tap>,
    line: Option<Line>,
}

/// How frames go between hosts and edge, and to clients.
#[derive(Clone, Copy)]
struct Ways {
    /// `--encrypt`.
    encrypt: &'static str,
    /// Hosts announce the machine; the client is on their link too.
    announce: bool,
    /// Lines that can be slow, and the edge reads leases.
    lines: bool,
}

impl Ways {
    fn encrypted(encrypt: &'static str) -> Self {
        Self { encrypt, announce: false, lines: false }
    }
}

/// See the module.
pub struct Fleet {
    /// Where clients are.
    pub client: Space,
    /// The machine from inside.
    pub guest: Guest,
    /// The machine.
    pub net: MachineNet,
    hosts: Vec<Host>,
    edge: Option<Daemon>,
    edge_space: Space,
    vmm: Option<Vmm>,
    at: usize,
    epoch: u64,
    leases: Option<(FileStore, Record)>,
    stopped: Instant,
    ways: Ways,
    program: PathBuf,
    folder: tempfile::TempDir,
}

/// What one move took.
#[derive(Clone, Copy, Debug)]
pub struct Moved {
    /// The machine stood still for this long.
    pub stood: Duration,
    /// The first change at the source's agent.
    pub divert: Duration,
    /// Frames that were in the old tap's queue, and were sent on.
    pub drained: u64,
}

fn failed(operation: &str, error: impl std::fmt::Display) -> KernelError {
    KernelError::new(operation, error.to_string())
}

impl Fleet {
    /// Starts everything, with the `conduit` at `program`; the machine runs on the first host.
    pub fn new(program: &Path, path: PathChoice) -> Result<Self, KernelError> {
        Self::with(program, path, Ways::encrypted("off"), 1400)
    }

    /// The same, with hosts that announce their machine on a link that the client shares.
    pub fn announced(program: &Path) -> Result<Self, KernelError> {
        Self::with(
            program,
            PathChoice::Bpf,
            Ways { announce: true, ..Ways::encrypted("off") },
            1400,
        )
    }

    /// The same, with lines between hosts and edge that can be slow and disorderly ([`Self::shape`]), and an
    /// edge that reads leases.
    pub fn on_lines(program: &Path) -> Result<Self, KernelError> {
        Self::with(program, PathChoice::Bpf, Ways { lines: true, ..Ways::encrypted("off") }, 1400)
    }

    /// The same, with all packets between hosts and edge encrypted in user space.
    pub fn encrypted(program: &Path, path: PathChoice) -> Result<Self, KernelError> {
        Self::with(program, path, Ways::encrypted("userspace"), 1380)
    }

    /// The same, encrypted by the kernel.
    pub fn encrypted_by_the_kernel(program: &Path, path: PathChoice) -> Result<Self, KernelError> {
        Self::with(program, path, Ways::encrypted("kernel"), 1380)
    }

    fn with(program: &Path, path: PathChoice, ways: Ways, mtu: u16) -> Result<Self, KernelError> {
        let folder = tempfile::tempdir().map_err(|e| failed("make a folder", e))?;
        let (client, edge_space) = (Space::new()?, Space::new()?);
        edge_space.join("pub0", &client, "eth0")?;
        client.ip("address add 203.0.113.2/24 dev eth0\n")?;
        edge_space.ip(&format!(
            "address add {PUBLIC}/24 dev pub0
            link add under0 type bridge
            address add 10.88.0.1/24 dev under0
            link set under0 up\n"
        ))?;
        if ways.announce {
            edge_space.join("to-client", &client, "near0")?;
            edge_space.ip("link set to-client master under0\n")?;
            client.ip("address add 10.77.255.9/16 dev near0\n")?;
        }
        let port = |protocol, public, machine| PortMapping { protocol, public, machine };
        let net = MachineNet {
            ports: if ways.announce {
                Vec::new()
            } else {
                PORTS.map(|(protocol, public, machine)| port(protocol, public, machine)).to_vec()
            },
            ..MachineNet::new("echo", Ipv4Addr::new(10, 77, 0, 1), [2, 0, 0, 0x77, 0, 1], mtu)
        };
        let guest = Guest::new(&net)?;
        let mut hosts = Vec::new();
        for (at, name) in [(2_u8, "a"), (3, "b")] {
            let space = Space::new()?;
            let its = format!("to-{name}");
            let line = if ways.lines {
                Some(Line::join(&space, "eth0", &edge_space, &its)?)
            } else {
                space.join("eth0", &edge_space, &its)?;
                None
            };
            edge_space.ip(&format!("link set {its} master under0\n"))?;
            space.ip(&format!("address add 10.88.0.{at}/24 dev eth0\n"))?;
            if ways.announce {
                space.ip(&format!("address add 10.77.255.{at}/16 dev eth0\n"))?;
            }
            hosts.push(Host { name, at, space, agent: None, path: None, tap: None, line });
        }
        let leases = ways.lines.then(|| first_lease(folder.path(), &net)).transpose()?;
        let mut fleet = Self {
            client,
            guest,
            net,
            hosts,
            edge: None,
            edge_space,
            vmm: None,
            at: 0,
            epoch: 1 << 16,
            leases,
            stopped: Instant::now(),
            ways,
            program: program.to_owned(),
            folder,
        };
        fleet.start_edge_by(path)?;
        for host in 0..2 {
            fleet.start_agent_by(host, path)?;
            let socket = fleet.agent_socket(host);
            let path = AgentDataPath::connect(&socket).map_err(|e| failed("ask an agent", e))?;
            fleet.hosts[host].path = Some(path);
        }
        fleet.prepare(0, None)?;
        let path = fleet.path(0);
        path.resume(&fleet.net, fleet.epoch).map_err(|e| failed("start the machine", e))?;
        path.settled(&fleet.net, fleet.epoch, SETTLE)
            .map_err(|e| failed("start the machine", e))?;
        fleet.run(0);
        Ok(fleet)
    }

    fn path(&self, host: usize) -> &AgentDataPath {
        self.hosts[host].path.as_ref().expect("each host has one from the start")
    }

    /// The socket of an agent.
    #[must_use]
    pub fn agent_socket(&self, host: usize) -> PathBuf {
        self.folder.path().join(format!("{}.sock", self.hosts[host].name))
    }

    /// The socket of the edge.
    #[must_use]
    pub fn edge_socket(&self) -> PathBuf {
        self.folder.path().join("edge.sock")
    }

    /// The control socket of a host's tunnel, or the edge's (`None`).
    #[must_use]
    pub fn tunnel_socket(&self, host: Option<usize>) -> PathBuf {
        let name = host.map_or("edge", |host| self.hosts[host].name);
        self.folder.path().join(name).join("encrypt/tunnel.sock")
    }

    /// The edge's namespace.
    #[must_use]
    pub fn edge_space(&self) -> &Space {
        &self.edge_space
    }

    /// A host's namespace, or the edge's (`None`).
    #[must_use]
    pub fn space(&self, host: Option<usize>) -> &Space {
        host.map_or(&self.edge_space, |host| &self.hosts[host].space)
    }

    /// The socket of a host's agent, or of the edge (`None`).
    #[must_use]
    pub fn socket(&self, host: Option<usize>) -> PathBuf {
        host.map_or_else(|| self.edge_socket(), |host| self.agent_socket(host))
    }

    /// The host that has the machine.
    #[must_use]
    pub fn at(&self) -> usize {
        self.at
    }

    /// Where a client reaches a public port of the machine.
    #[must_use]
    pub fn public(&self, port: u16) -> SocketAddr {
        if self.ways.announce {
            let own = PORTS.iter().find(|(_, public, _)| *public == port).map_or(port, |p| p.2);
            return (self.net.address, own).into();
        }
        (PUBLIC, port).into()
    }

    fn daemon(
        &self,
        space: &Space,
        log: &str,
        command: &mut Command,
    ) -> Result<Daemon, KernelError> {
        Daemon::start(space, self.folder.path(), log, self.ways.encrypt, command)
    }

    fn by(path: PathChoice) -> &'static str {
        match path {
            PathChoice::Auto => "auto",
            PathChoice::Bpf => "bpf",
            PathChoice::Routes => "routes",
        }
    }

    /// Starts the edge (again), and returns when it answers.
    pub fn start_edge(&mut self) -> Result<(), KernelError> {
        self.start_edge_by(PathChoice::Bpf)
    }

    fn start_edge_by(&mut self, path: PathChoice) -> Result<(), KernelError> {
        let mut command = Command::new(&self.program);
        command.args(["edge", "--public", "203.0.113.1", "--underlay", "10.88.0.1", "--socket"]);
        command.arg(self.edge_socket()).arg("--state").arg(self.folder.path().join("edge"));
        command.args(["--path", Self::by(path)]);
        if self.leases.is_some() {
            command.arg("--lease").arg(self.folder.path().join("leases"));
        }
        self.edge = Some(self.daemon(&self.edge_space, "edge", &mut command)?);
        let socket = self.edge_socket();
        self.ready(|| crate::status(&socket).is_ok(), "the edge")
    }

    /// Starts the agent of a host (again), and returns when it has its edge.
    pub fn start_agent(&mut self, host: usize) -> Result<(), KernelError> {
        self.start_agent_by(host, PathChoice::Bpf)
    }

    fn start_agent_by(&mut self, host: usize, path: PathChoice) -> Result<(), KernelError> {
        let Host { name, at, space, .. } = &self.hosts[host];
        let mut command = Command::new(&self.program);
        command.args(["agent", "--host", name, "--edge", "10.88.0.1:7450"]);
        command.args(["--overlay", &format!("100.64.0.{at}")]);
        command.args(["--underlay", &format!("10.88.0.{at}"), "--socket"]);
        command.arg(self.agent_socket(host)).arg("--state").arg(self.folder.path().join(name));
        command.args(["--path", Self::by(path)]);
        if self.ways.announce {
            command.args(["--announce", "link:eth0"]);
        }
        let agent = self.daemon(space, name, &mut command)?;
        self.hosts[host].agent = Some(agent);
        let socket = self.agent_socket(host);
        let joined = || crate::status(&socket).is_ok_and(|s| s.link.starts_with("connected"));
        self.ready(joined, &format!("the agent of host {}", self.hosts[host].name))
    }

    fn ready(&self, ready: impl FnMut() -> bool, who: &str) -> Result<(), KernelError> {
        if wait_for(READY, ready) {
            return Ok(());
        }
        // The folder goes with the fleet: what the logs end with is told here.
        let mut detail = format!("not within {READY:?}");
        for name in ["edge", "a", "b"] {
            let log = std::fs::read_to_string(self.folder.path().join(format!("{name}.log")));
            let log = log.unwrap_or_default();
            let lines: Vec<&str> = log.lines().rev().take(LOG_LINES).collect();
            for line in lines.into_iter().rev() {
                detail += &format!("\n{name}: {line}");
            }
        }
        Err(failed(&format!("wait for {who}"), detail))
    }

    /// Kills the edge's process (SIGKILL).
    pub fn kill_edge(&mut self) {
        if let Some(edge) = self.edge.take() {
            edge.kill();
        }
    }

    /// Kills the agent of a host (SIGKILL).
    pub fn kill_agent(&mut self, host: usize) {
        if let Some(agent) = self.hosts[host].agent.take() {
            agent.kill();
        }
    }

    /// What the holder of a host, or of the edge (`None`), has done since it was started.
    pub fn holder_stats(&self, host: Option<usize>) -> Result<holder::Stats, KernelError> {
        let socket = self.holder_socket(host);
        let mut found = None;
        // It may be restarting.
        self.ready(
            || {
                found = holder::stats(&socket).ok();
                found.is_some()
            },
            "a holder",
        )?;
        found.map(|(stats, _)| stats).ok_or_else(|| failed("ask a holder", "it is gone"))
    }

    /// Kills that holder (SIGKILL), and returns when the next one answers.
    pub fn kill_holder(&self, host: Option<usize>) -> Result<(), KernelError> {
        let socket = self.holder_socket(host);
        let old = holder::pid_at(&socket).map_err(|e| failed("find a holder", e))?;
        kill(Pid::from_raw(old.cast_signed()), Signal::SIGKILL)
            .map_err(|e| failed("kill a holder", e))?;
        self.ready(|| holder::pid_at(&socket).is_ok_and(|new| new != old), "the next holder")
    }

    fn holder_socket(&self, host: Option<usize>) -> PathBuf {
        let name = host.map_or("edge", |host| self.hosts[host].name);
        self.folder.path().join(name).join("hold.sock")
    }

    /// Sends a signal to the agent of a host.
    pub fn signal_agent(&self, host: usize, signal: Signal) -> Result<(), KernelError> {
        let agent = self.hosts[host].agent.as_ref().expect("it runs");
        agent.signal(signal)
    }

    /// The folder of all state; its name is in the command line of every process of this fleet.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Cuts a host off, or lets it in again, and waits until the edge has heard it.
    pub fn cut(&self, host: usize, cut: bool) -> Result<(), KernelError> {
        let name = self.hosts[host].name;
        // Not by taking the link down: a kernel may take a second to notice that it is up again.
        let (port, state) = (format!("to-{name}"), if cut { "0" } else { "3" });
        let args = ["link", "set", "dev", &port, "state", state];
        self.edge_space.run(|| exec::run("bridge", &args, ""))?;
        if cut {
            return Ok(());
        }
        let (socket, overlay) =
            (self.edge_socket(), Ipv4Addr::new(100, 64, 0, self.hosts[host].at));
        let heard = || crate::status(&socket).is_ok_and(|s| !s.silent.contains(&overlay));
        self.ready(heard, &format!("host {name} to be heard again"))
    }

    fn prepare(&mut self, host: usize, blackout: Option<Duration>) -> Result<(), KernelError> {
        let Self { hosts, net, .. } = self;
        let Host { space, path, tap, .. } = &mut hosts[host];
        let path = path.as_ref().expect("each host has one from the start");
        let prepared = space.run(|| match blackout {
            Some(blackout) => path.prepare_for(net, blackout),
            None => path.prepare(net),
        });
        *tap = Some(prepared.map_err(|e| failed("prepare a host", e))?);
        Ok(())
    }

    fn run(&mut self, host: usize) {
        let tap = self.hosts[host].tap.as_ref().expect("a tap was prepared");
        self.vmm = Some(Vmm::run(&self.guest, tap));
    }

    /// The first half of a move: the machine stands still, and its frames go to the other host. The
    /// destination is told to expect a blackout of `expected`.
    pub fn depart(&mut self, expected: Option<Duration>) -> Result<Moved, KernelError> {
        let (from, to) = (self.at, 1 - self.at);
        self.prepare(to, expected)?;
        // Where leases count, the owner gives its frames away within its own epoch.
        self.epoch += if self.leases.is_some() { 1 } else { 1 << 16 };
        let target = self.path(to).endpoint();
        let start = Instant::now();
        let fail = |e| failed("leave a host", e);
        self.path(from).divert(&self.net, &target, self.epoch).map_err(fail)?;
        let divert = start.elapsed();
        self.stopped = Instant::now();
        self.vmm.take().expect("the machine runs").pause();
        let tap = self.hosts[from].tap.take().expect("it has a tap");
        let drained = self.path(from).pause(&self.net, &tap, &target, self.epoch).map_err(fail)?;
        // Kept open until it is forgotten, as a runner does.
        self.hosts[from].tap = Some(tap);
        Ok(Moved { stood: Duration::ZERO, divert, drained })
    }

    /// Waits until the edge has confirmed that the machine has left.
    pub fn left(&self) -> Result<(), KernelError> {
        let path = self.path(self.at);
        path.settled(&self.net, self.epoch, SETTLE).map_err(|e| failed("leave a host", e))
    }

    /// Since the machine has stood still.
    #[must_use]
    pub fn stands_for(&self) -> Duration {
        self.stopped.elapsed()
    }

    /// The second half: the machine runs on the other host. Says how long it stood still.
    pub fn arrive(&mut self) -> Result<Duration, KernelError> {
        let to = 1 - self.at;
        self.take_lease(to)?;
        let fail = |e| failed("run on a host", e);
        self.path(to).resume(&self.net, self.epoch).map_err(fail)?;
        self.run(to);
        let stood = self.stopped.elapsed();
        self.at = to;
        Ok(stood)
    }

    /// The machine's lease is a host's from now on, if there are leases.
    fn take_lease(&mut self, host: usize) -> Result<(), KernelError> {
        let Some((store, lease)) = &mut self.leases else { return Ok(()) };
        let fail = |e: &dyn std::fmt::Display| failed("take the machine's lease", e);
        let owner = HostName::new(self.hosts[host].name).map_err(|e| fail(&e))?;
        let next = lease.taken(owner, lease.attempt, Nonce(lease.nonce.0 + 1));
        store.compare_and_set(&lease.machine, Some(lease), &next).map_err(|e| fail(&e))?;
        self.epoch = next.epoch.0 << 16;
        *lease = next;
        Ok(())
    }

    /// How the line between a host and the edge is from now on.
    pub fn shape(&self, host: usize, shape: Shape) {
        self.line(host).set(shape);
    }

    /// Frames that were overtaken on the line of a host.
    #[must_use]
    pub fn overtaken(&self, host: usize) -> u64 {
        self.line(host).overtaken()
    }

    fn line(&self, host: usize) -> &Line {
        self.hosts[host].line.as_ref().expect("a fleet on lines has one for each host")
    }

    /// What is left at the source is removed, when the edge has confirmed.
    pub fn forget(&mut self) -> Result<(), KernelError> {
        let from = 1 - self.at;
        let fail = |e| failed("leave a host behind", e);
        // The next owner's word is another epoch's, where leases count.
        let says = if self.leases.is_some() { self.at } else { from };
        self.path(says).settled(&self.net, self.epoch, SETTLE).map_err(fail)?;
        self.hosts[from].tap = None;
        self.path(from).forget(&self.net, self.epoch).map_err(fail)
    }

    /// A whole move, as drafter makes one.
    pub fn move_machine(
        &mut self,
        blackout: Duration,
        expected: Option<Duration>,
    ) -> Result<Moved, KernelError> {
        let mut moved = self.depart(expected)?;
        thread::sleep(blackout.saturating_sub(self.stands_for()));
        moved.stood = self.arrive()?;
        self.forget()?;
        Ok(moved)
    }
}

/// Leases, and the machine's first one: host a's.
fn first_lease(folder: &Path, net: &MachineNet) -> Result<(FileStore, Record), KernelError> {
    let fail = |e: &dyn std::fmt::Display| failed("make a lease", e);
    let store = FileStore::open(&folder.join("leases"), SETTLE).map_err(|e| fail(&e))?;
    let machine = MachineName::new(&net.machine).map_err(|e| fail(&e))?;
    let owner = HostName::new("a").map_err(|e| fail(&e))?;
    let first = Record::first(machine.clone(), owner, AttemptId(1), Nonce(1));
    store.compare_and_set(&machine, None, &first).map_err(|e| fail(&e))?;
    Ok((store, first))
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.vmm = None;
        for host in &mut self.hosts {
            host.tap = None;
            host.agent = None;
        }
        self.edge = None;
        // A daemon that was killed has left its tunnel.
        if self.ways.encrypt == "userspace" {
            for end in [None, Some(0), Some(1)] {
                let stop = conduit_wg::Ask::Stop { remove: true };
                let _ = conduit_wg::tell(&self.tunnel_socket(end), &stop);
            }
        }
    }
}
