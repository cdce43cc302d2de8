//! A fleet with several edges, as processes: two edges, two hosts, two clients, and machines without a
//! processor.
//!
//! ```text
//!  client 0 ─┐  203.0.113.0/24  ┌─ east (serves .1) ═╗                ╔═ host a ── machines
//!            ├───── switch ─────┤                    ╠═ 10.88.0.0/24 ═╣
//!  client 1 ─┘                  └─ west (serves .9) ═╝                ╚═ host b ── machines
//! ```
//!
//! An edge is killed (its process), cut off (all its links, as if its computer were dead), and started
//! again. Leases are files; machines' leases are written here, as their runners would.

use super::{
    Space,
    fleet::Daemon,
    machine::{Guest, Vmm},
    sniff::Sniffer,
    wait_for,
};
use crate::{
    AgentDataPath, DataPath, KernelError, MachineNet, PortMapping, Protocol, Tap, exec,
    homes::{self, HomeWord},
    wire::{Drained, Peer, Status},
};
use lease::{AttemptId, FileStore, HostName, LeaseStore, MachineName, Nonce, Record};
use nix::sys::signal::Signal;
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

const READY: Duration = Duration::from_secs(20);
const SETTLE: Duration = Duration::from_secs(5);
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// The edges: name, last byte of overlay, underlay and public address.
pub const EDGES: [(&str, u8); 2] = [("east", 1), ("west", 9)];
const HOSTS: [(&str, u8); 2] = [("a", 2), ("b", 3)];

/// The machine's ports that are mapped: echo, datagrams, bulk.
pub const INSIDE: [u16; 3] = [7, 9, 8];

struct Edge {
    space: Space,
    daemon: Option<Daemon>,
}

struct Host {
    space: Space,
    agent: Option<Daemon>,
    path: Option<AgentDataPath>,
}

/// A machine that runs.
pub struct Machine {
    /// As the network sees it.
    pub net: MachineNet,
    /// From inside.
    pub guest: Guest,
    /// The edge that it belongs to.
    pub home: usize,
    /// The host that it is on.
    pub at: usize,
    epoch: u64,
    lease: Record,
    tap: Option<Tap>,
    vmm: Option<Vmm>,
}

/// See the module.
pub struct Edges {
    /// Where clients are, and servers outside.
    pub clients: [Space; 2],
    switch: Space,
    underlay: Space,
    edges: Vec<Edge>,
    hosts: Vec<Host>,
    leases: FileStore,
    program: PathBuf,
    /// `--encrypt`.
    encrypt: &'static str,
    next: u8,
    folder: tempfile::TempDir,
}

fn failed(operation: &str, error: impl std::fmt::Display) -> KernelError {
    KernelError::new(operation, error.to_string())
}

/// The public address of an edge's home.
#[must_use]
pub fn public(edge: usize) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, EDGES[edge].1)
}

/// The address of a client.
#[must_use]
pub fn client(number: usize) -> IpAddr {
    Ipv4Addr::new(203, 0, 113, 101 + number as u8).into()
}

fn overlay(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 64, 0, last)
}

impl Edges {
    /// Starts everything, with the `conduit` at `program`.
    pub fn new(program: &Path) -> Result<Self, KernelError> {
        Self::with(program, 2)
    }

    /// The same, with the first so many edges; the agents know of all of them.
    pub fn with(program: &Path, edges: usize) -> Result<Self, KernelError> {
        Self::open(program, edges, "off")
    }

    /// Both edges, with all packets between hosts and edges encrypted in user space.
    pub fn encrypted(program: &Path) -> Result<Self, KernelError> {
        Self::open(program, 2, "userspace")
    }

    fn open(program: &Path, edges: usize, encrypt: &'static str) -> Result<Self, KernelError> {
        let folder = tempfile::tempdir().map_err(|e| failed("make a folder", e))?;
        let leases = FileStore::open(&folder.path().join("leases"), LOCK_LIMIT)
            .map_err(|e| failed("make leases", e))?;
        let (switch, underlay) = (Space::new()?, Space::new()?);
        for space in [&switch, &underlay] {
            space.ip("link add br0 type bridge\nlink set br0 up\n")?;
        }
        let plug = |space: &Space, interface: &str, into: &Space, port: &str, address: String| {
            let port = format!("to-{port}");
            space.join(interface, into, &port)?;
            into.ip(&format!("link set {port} master br0\n"))?;
            space.ip(&format!("address add {address}/24 dev {interface}\n"))
        };
        let clients = [Space::new()?, Space::new()?];
        for (number, space) in clients.iter().enumerate() {
            plug(space, "eth0", &switch, &format!("client{number}"), client(number).to_string())?;
        }
        let mut rig = Self {
            clients,
            switch,
            underlay,
            edges: Vec::new(),
            hosts: Vec::new(),
            leases,
            program: program.to_owned(),
            encrypt,
            next: 0,
            folder,
        };
        for (number, (name, last)) in EDGES.into_iter().enumerate() {
            let space = Space::new()?;
            plug(&space, "pub0", &rig.switch, name, format!("203.0.113.{}", 11 + number))?;
            plug(&space, "under0", &rig.underlay, name, format!("10.88.0.{last}"))?;
            rig.edges.push(Edge { space, daemon: None });
        }
        for (name, last) in HOSTS {
            let space = Space::new()?;
            plug(&space, "eth0", &rig.underlay, name, format!("10.88.0.{last}"))?;
            rig.hosts.push(Host { space, agent: None, path: None });
        }
        for edge in 0..edges {
            rig.start_edge(edge)?;
        }
        for host in 0..HOSTS.len() {
            rig.start_agent(host, edges)?;
            let path = AgentDataPath::connect(&rig.agent_socket(host));
            rig.hosts[host].path = Some(path.map_err(|e| failed("ask an agent", e))?);
        }
        Ok(rig)
    }

    /// The socket of an agent.
    #[must_use]
    pub fn agent_socket(&self, host: usize) -> PathBuf {
        self.folder.path().join(format!("{}.sock", HOSTS[host].0))
    }

    /// The socket of an edge.
    #[must_use]
    pub fn edge_socket(&self, edge: usize) -> PathBuf {
        self.folder.path().join(format!("{}.sock", EDGES[edge].0))
    }

    /// The control socket of the tunnel of an edge or host, by its name.
    #[must_use]
    pub fn tunnel_socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(name).join("encrypt/tunnel.sock")
    }

    /// The names of all edges and hosts.
    pub fn names() -> impl Iterator<Item = &'static str> {
        EDGES.into_iter().chain(HOSTS).map(|(name, _)| name)
    }

    /// Puts a new process in the place of a tunnel's that runs, as an upgrade does. It ends by its
    /// control socket, as others do.
    pub fn upgrade_tunnel(&self, name: &str) -> Result<(), KernelError> {
        let fail = |e: &dyn std::fmt::Display| failed("upgrade a tunnel", e);
        let control = self.tunnel_socket(name);
        let before = conduit_wg::status(&control).map_err(|e| fail(&e))?;
        let (_, last) =
            EDGES.into_iter().chain(HOSTS).find(|(n, _)| *n == name).expect("it is one");
        let space = match EDGES.iter().position(|(n, _)| *n == name) {
            Some(edge) => &self.edges[edge].space,
            None => {
                &self.hosts[HOSTS.iter().position(|(n, _)| *n == name).expect("it is one")].space
            }
        };
        let mut command = Command::new(&self.program);
        command.args(["tunnel", "run", "--upgrade", "--interface", &before.interface]);
        command.args(["--mtu", &before.mtu.to_string(), "--listen", &before.listen.to_string()]);
        let address = crate::secure::address(overlay(last));
        command.args(["--address", &format!("{address}/15"), "--state"]);
        command.arg(self.folder.path().join(name).join("encrypt/tunnel"));
        command.arg("--control").arg(&control).stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = space.run(|| command.spawn()).map_err(|e| fail(&e))?;
        let process = child.id();
        // So that it leaves no zombie.
        std::thread::spawn(move || child.wait());
        let upgraded = || conduit_wg::status(&control).is_ok_and(|s| s.process == process);
        self.ready(upgraded, &format!("the new tunnel of {name}"))
    }

    /// All frames that cross the network of hosts and edges, or that of clients.
    pub fn sniff(&self, of_clients: bool) -> Result<Sniffer, KernelError> {
        let space = if of_clients { &self.switch } else { &self.underlay };
        Sniffer::start(space)
    }

    fn mtu(&self) -> u16 {
        if self.encrypt == "off" { 1400 } else { 1380 }
    }

    /// An edge's namespace.
    #[must_use]
    pub fn edge_space(&self, edge: usize) -> &Space {
        &self.edges[edge].space
    }

    fn ready(&self, ready: impl FnMut() -> bool, who: &str) -> Result<(), KernelError> {
        if wait_for(READY, ready) {
            return Ok(());
        }
        let mut text = String::new();
        for (name, _) in EDGES.into_iter().chain(HOSTS) {
            let log = self.folder.path().join(format!("{name}.log"));
            text += &format!("\n{name}:\n{}", std::fs::read_to_string(log).unwrap_or_default());
        }
        Err(failed(&format!("wait for {who}"), format!("not within {READY:?}{text}")))
    }

    /// Starts an edge (again), and returns when it answers.
    pub fn start_edge(&mut self, edge: usize) -> Result<(), KernelError> {
        let (name, last) = EDGES[edge];
        let (other, its) = EDGES[1 - edge];
        let mut command = Command::new(&self.program);
        command.args(["edge", "--name", name, "--public", &public(edge).to_string()]);
        command.args(["--overlay", &overlay(last).to_string()]);
        command.args(["--underlay", &format!("10.88.0.{last}"), "--path", "bpf"]);
        command.args(["--beside", &format!("{other}=10.88.0.{its}:7450")]);
        command
            .args(["--public-interface", "pub0", "--lease"])
            .arg(self.folder.path().join("leases"));
        command.arg("--socket").arg(self.edge_socket(edge));
        command.arg("--state").arg(self.folder.path().join(name));
        let daemon = Daemon::start(
            &self.edges[edge].space,
            self.folder.path(),
            name,
            self.encrypt,
            &mut command,
        )?;
        self.edges[edge].daemon = Some(daemon);
        let socket = self.edge_socket(edge);
        self.ready(|| crate::status(&socket).is_ok(), &format!("edge {name}"))
    }

    /// Kills an edge's process (SIGKILL). Its kernel goes on.
    pub fn kill_edge(&mut self, edge: usize) {
        if let Some(daemon) = self.edges[edge].daemon.take() {
            daemon.kill();
        }
    }

    /// Sends a signal to an edge's process.
    pub fn signal_edge(&self, edge: usize, signal: Signal) -> Result<(), KernelError> {
        let daemon = self.edges[edge].daemon.as_ref().expect("it runs");
        daemon.signal(signal)
    }

    /// Starts the agent of a host (again), and returns when it has so many edges.
    pub fn start_agent(&mut self, host: usize, edges: usize) -> Result<(), KernelError> {
        let (name, last) = HOSTS[host];
        let mut command = Command::new(&self.program);
        command.args(["agent", "--host", name, "--path", "bpf"]);
        for (edge, at) in EDGES {
            command.args(["--edge", &format!("{edge}=10.88.0.{at}:7450")]);
        }
        command.args(["--overlay", &overlay(last).to_string()]);
        command.args(["--underlay", &format!("10.88.0.{last}"), "--socket"]);
        command.arg(self.agent_socket(host)).arg("--state").arg(self.folder.path().join(name));
        let agent = Daemon::start(
            &self.hosts[host].space,
            self.folder.path(),
            name,
            self.encrypt,
            &mut command,
        )?;
        self.hosts[host].agent = Some(agent);
        self.connected(host, edges)
    }

    /// Waits until an agent has so many edges, and has heard of as many homes.
    pub fn connected(&self, host: usize, edges: usize) -> Result<(), KernelError> {
        let socket = self.agent_socket(host);
        let joined = || {
            crate::status(&socket).is_ok_and(|s| {
                let up = s.homes.iter().filter(|h| h.health.starts_with("connected")).count();
                up == edges && s.homes.len() >= edges
            })
        };
        self.ready(joined, &format!("the agent of host {} and its edges", HOSTS[host].0))
    }

    /// Kills the agent of a host (SIGKILL).
    pub fn kill_agent(&mut self, host: usize) {
        if let Some(agent) = self.hosts[host].agent.take() {
            agent.kill();
        }
    }

    /// Cuts an edge off from everybody, as if its computer were dead; or plugs it in again.
    pub fn cut_edge(&self, edge: usize, cut: bool) -> Result<(), KernelError> {
        self.cut_public(edge, cut)?;
        self.cut_underlay(edge, cut)
    }

    /// Cuts an edge off from clients.
    pub fn cut_public(&self, edge: usize, cut: bool) -> Result<(), KernelError> {
        Self::cut(&self.switch, EDGES[edge].0, cut)
    }

    /// Cuts an edge off from hosts and the other edge.
    pub fn cut_underlay(&self, edge: usize, cut: bool) -> Result<(), KernelError> {
        Self::cut(&self.underlay, EDGES[edge].0, cut)
    }

    fn cut(switch: &Space, port: &str, cut: bool) -> Result<(), KernelError> {
        // Not by taking the link down: a kernel may take a second to notice that it is up again.
        let state = if cut { "0" } else { "3" };
        let port = format!("to-{port}");
        let args = ["link", "set", "dev", &port, "state", state];
        switch.run(|| exec::run("bridge", &args, "")).map(drop)
    }

    /// What an edge says of itself.
    pub fn status(&self, edge: usize) -> Result<Status, KernelError> {
        crate::status(&self.edge_socket(edge)).map_err(|e| failed("ask an edge", e))
    }

    /// What an edge has counted under a name.
    #[must_use]
    pub fn count(&self, edge: usize, name: &str) -> u64 {
        self.status(edge).ok().and_then(|s| s.counts.get(name).copied()).unwrap_or(0)
    }

    /// Which edge serves a home, as an edge has it.
    #[must_use]
    pub fn served_by(&self, home: usize, says: usize) -> Option<usize> {
        let status = self.status(says).ok()?;
        let word = status.homes.into_iter().find(|h| h.word.home == overlay(EDGES[home].1))?.word;
        EDGES.iter().position(|(_, last)| overlay(*last) == word.by.overlay)
    }

    /// Waits until an edge serves a home, and the hosts know.
    pub fn until_served(&self, home: usize, by: usize) -> Result<(), KernelError> {
        let known = |host| {
            crate::status(&self.agent_socket(host)).is_ok_and(|s| {
                s.homes.iter().any(|h| {
                    h.word.home == overlay(EDGES[home].1)
                        && h.word.by.overlay == overlay(EDGES[by].1)
                })
            })
        };
        let served = || self.served_by(home, by) == Some(by) && known(0) && known(1);
        self.ready(served, &format!("edge {} to serve {}", EDGES[by].0, EDGES[home].0))
    }

    /// Waits until an edge hears the other one, so that it could drain to it.
    pub fn until_drainable(&self, from: usize) -> Result<(), KernelError> {
        let (other, last) = EDGES[1 - from];
        let heard = || {
            self.status(from).is_ok_and(|s| {
                s.homes.iter().any(|h| h.word.home == overlay(last) && h.health == "alive")
            })
        };
        self.ready(heard, &format!("edge {other} to be heard by the other"))
    }

    /// `conduit drain` of one edge to the other.
    pub fn drain(&self, from: usize, more: &[&str]) -> Result<Vec<Drained>, KernelError> {
        let socket = self.edge_socket(from).display().to_string();
        let mut args = vec!["drain", EDGES[1 - from].0, "--socket", &socket, "--json"];
        args.extend(more);
        let program = self.program.display().to_string();
        let text = exec::run(&program, &args, "")?;
        serde_json::from_str(&text).map_err(|e| failed("read what a drain says", e))
    }

    /// Where clients reach a mapped port of a machine: `which` of [`INSIDE`].
    #[must_use]
    pub fn public(&self, machine: &Machine, which: usize) -> SocketAddr {
        (public(machine.home), machine.net.ports[which].public).into()
    }

    fn path(&self, host: usize) -> &AgentDataPath {
        self.hosts[host].path.as_ref().expect("each host has one from the start")
    }

    /// A machine with a name, and so a home, of its own that belongs to an edge (if both are there).
    pub fn machine_of(&mut self, home: usize) -> MachineNet {
        let words = EDGES.map(|(name, last)| HomeWord {
            home: overlay(last),
            name: name.into(),
            public: Ipv4Addr::new(203, 0, 113, last),
            public_v6: None,
            spare: Vec::new(),
            by: Peer { overlay: overlay(last), underlay: Ipv4Addr::new(10, 88, 0, last) },
            epoch: 1,
        });
        loop {
            self.next += 1;
            let number = self.next;
            let port = |protocol, which: u16| PortMapping {
                protocol,
                public: 7000 + u16::from(number) * 10 + which,
                machine: INSIDE[usize::from(which)],
            };
            let address = Ipv4Addr::new(10, 77, 0, number);
            let net = MachineNet {
                ports: vec![port(Protocol::Tcp, 0), port(Protocol::Udp, 1), port(Protocol::Tcp, 2)],
                ..MachineNet::new(
                    format!("m{number}"),
                    address,
                    [2, 0, 0, 0x77, 0, number],
                    self.mtu(),
                )
            };
            if homes::choose(&net, words.iter()) == Some(words[home].home) {
                return net;
            }
        }
    }

    /// Boots a machine on a host; `home` is the edge that it comes to belong to.
    pub fn boot(
        &mut self,
        net: MachineNet,
        at: usize,
        home: usize,
    ) -> Result<Machine, KernelError> {
        let fail = |e: &dyn std::fmt::Display| failed("boot a machine", e);
        let name = MachineName::new(&net.machine).map_err(|e| fail(&e))?;
        let number = u64::from(net.address.octets()[3]);
        let owner = HostName::new(HOSTS[at].0).map_err(|e| fail(&e))?;
        let lease = Record::first(name.clone(), owner, AttemptId(number), Nonce(number.into()));
        self.leases.compare_and_set(&name, None, &lease).map_err(|e| fail(&e))?;
        let (guest, epoch) = (Guest::new(&net)?, 1 << 16);
        let path = self.path(at);
        let tap = self.hosts[at].space.run(|| path.prepare(&net)).map_err(|e| fail(&e))?;
        path.resume(&net, epoch).map_err(|e| fail(&e))?;
        path.settled(&net, epoch, SETTLE).map_err(|e| fail(&e))?;
        let vmm = Some(Vmm::run(&guest, &tap));
        Ok(Machine { net, guest, home, at, epoch, lease, tap: Some(tap), vmm })
    }

    /// Moves a machine to the other host, as drafter does.
    pub fn move_machine(&self, machine: &mut Machine) -> Result<(), KernelError> {
        let fail = |e: &dyn std::fmt::Display| failed("move a machine", e);
        let net = machine.net.clone();
        let to = 1 - machine.at;
        let (from_path, to_path) = (self.path(machine.at), self.path(to));
        let tap = self.hosts[to].space.run(|| to_path.prepare(&net)).map_err(|e| fail(&e))?;
        let target = to_path.endpoint();
        let flip = machine.epoch + 1;
        from_path.divert(&net, &target, flip).map_err(|e| fail(&e))?;
        machine.vmm.take().expect("it runs").pause();
        let old = machine.tap.replace(tap).expect("it has a tap");
        from_path.pause(&net, &old, &target, flip).map_err(|e| fail(&e))?;
        let owner = HostName::new(HOSTS[to].0).map_err(|e| fail(&e))?;
        let nonce = Nonce(machine.lease.nonce.0 + 1000);
        let taken = machine.lease.taken(owner, machine.lease.attempt, nonce);
        let name = &machine.lease.machine;
        let won = self.leases.compare_and_set(name, Some(&machine.lease), &taken);
        won.map_err(|e| fail(&e))?;
        machine.epoch = taken.epoch.0 << 16;
        machine.lease = taken;
        to_path.resume(&net, machine.epoch).map_err(|e| fail(&e))?;
        machine.vmm = machine.tap.as_ref().map(|tap| Vmm::run(&machine.guest, tap));
        to_path.settled(&net, machine.epoch, SETTLE).map_err(|e| fail(&e))?;
        drop(old);
        from_path.forget(&net, machine.epoch).map_err(|e| fail(&e))?;
        machine.at = to;
        Ok(())
    }

    /// The home that a machine's host has for it, as an edge's number.
    #[must_use]
    pub fn home_of(&self, machine: &Machine) -> Option<usize> {
        let status = crate::status(&self.agent_socket(machine.at)).ok()?;
        let its = status.machines.into_iter().find(|m| m.net.machine == machine.net.machine)?;
        EDGES.iter().position(|(_, last)| Some(overlay(*last)) == its.home)
    }
}

impl Drop for Edges {
    fn drop(&mut self) {
        for host in &mut self.hosts {
            host.agent = None;
        }
        for edge in &mut self.edges {
            edge.daemon = None;
        }
        // A daemon that was killed has left its tunnel.
        if self.encrypt == "userspace" {
            for name in Self::names() {
                let stop = conduit_wg::Ask::Stop { remove: true };
                let _ = conduit_wg::tell(&self.tunnel_socket(name), &stop);
            }
        }
    }
}
