//! Two hosts with agents, a real edge, a router with two clients behind it, and machines without a
//! processor.
//!
//! ```text
//!  client 0  198.51.100.2, fd0a::2 ─┐                      ┌─ host a ── machines
//!                                   ├─ router ── edge ═════┤
//!  client 1  192.0.2.2,    fd0b::2 ─┘  203.0.113.0/24,     └─ host b ── machines
//!                                      fd03::/64
//! ```

use conduit::{
    AgentDataPath, Announce, DataPath, MachineNet, NetError, NetworkId, PathChoice, PortMapping,
    Protocol, Tap,
    agent::{Agent, AgentConfig},
    edge::{Edge, EdgeConfig, EdgeOptions},
    holder::HoldSettings,
    lab::{
        Space,
        machine::{Guest, Vmm},
        traffic::serve_echo,
        wait_for,
    },
    wire::Peer,
};
use identity::{HostName, Security};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    time::Duration,
};

pub(crate) const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub(crate) const PUBLIC_V6: Ipv6Addr = Ipv6Addr::new(0xfd03, 0, 0, 0, 0, 0, 0, 1);
/// For a machine that has one whole.
pub(crate) const SPARE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
pub(crate) const CLIENTS: [Ipv4Addr; 2] =
    [Ipv4Addr::new(198, 51, 100, 2), Ipv4Addr::new(192, 0, 2, 2)];
pub(crate) const CLIENTS_V6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0xfd0a, 0, 0, 0, 0, 0, 0, 2), Ipv6Addr::new(0xfd0b, 0, 0, 0, 0, 0, 0, 2)];
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
/// How long something is waited for that must not come.
pub(crate) const SILENCE: Duration = Duration::from_millis(300);

/// The first epoch of the data path of a lease's epoch.
pub(crate) fn epoch(lease: u64) -> u64 {
    lease << 16
}

/// Machine `number` of a network: the same addresses in each.
pub(crate) fn net(name: &str, network: u16, number: u8) -> MachineNet {
    MachineNet {
        network: NetworkId(network),
        address_v6: Some(address_v6(number)),
        ..MachineNet::new(name, address(number), [2, 0, network as u8, 0x77, 0, number], 1400)
    }
}

pub(crate) fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, number)
}

pub(crate) fn address_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into())
}

pub(crate) fn tcp(public: u16, machine: u16) -> PortMapping {
    PortMapping { protocol: Protocol::Tcp, public, machine }
}

pub(crate) fn udp(public: u16, machine: u16) -> PortMapping {
    PortMapping { protocol: Protocol::Udp, public, machine }
}

pub(crate) fn public(port: u16) -> SocketAddr {
    (PUBLIC, port).into()
}

pub(crate) fn public_v6(port: u16) -> SocketAddr {
    (PUBLIC_V6, port).into()
}

pub(crate) struct Host {
    pub(crate) space: Space,
    pub(crate) agent: Option<Agent>,
    pub(crate) path: AgentDataPath,
    pub(crate) peer: Peer,
}

/// A machine that runs on one of the hosts.
pub(crate) struct Machine {
    pub(crate) net: MachineNet,
    pub(crate) guest: Guest,
    pub(crate) at: usize,
    pub(crate) epoch: u64,
    tap: Option<Tap>,
    vmm: Option<Vmm>,
}

pub(crate) struct Rig {
    pub(crate) clients: [Space; 2],
    pub(crate) router: Space,
    pub(crate) edge_space: Space,
    pub(crate) edge: Option<Edge>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) folder: tempfile::TempDir,
    options: EdgeOptions,
    hold: Option<HoldSettings>,
    announce: Option<Announce>,
}

fn host_name(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn space() -> Space {
    let space = Space::new().expect("these tests make namespaces: run them as root");
    space.sysctl("net/ipv6/conf/default/accept_dad", "0").unwrap();
    space
}

/// IPv6 as well, by one public address.
pub(crate) fn translated() -> EdgeOptions {
    EdgeOptions {
        machines_v6: Some("fd77::/64".parse().unwrap()),
        public_v6: Some(PUBLIC_V6),
        spare: vec![SPARE.into()],
        ..EdgeOptions::default()
    }
}

/// Machines' IPv6 addresses are seen as they are.
pub(crate) fn routed() -> EdgeOptions {
    EdgeOptions { public_v6: None, ..translated() }
}

impl Rig {
    pub(crate) fn new(options: &EdgeOptions) -> Self {
        Self::with_hold(options, None)
    }

    /// With an edge that holds frames, if that is said.
    pub(crate) fn with_hold(options: &EdgeOptions, hold: Option<HoldSettings>) -> Self {
        Self::made(options, hold, None)
    }

    /// With hosts that announce their machines.
    pub(crate) fn announcing(announce: Announce) -> Self {
        Self::made(&translated(), None, Some(announce))
    }

    fn made(options: &EdgeOptions, hold: Option<HoldSettings>, announce: Option<Announce>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (clients, router, edge_space) = ([space(), space()], space(), space());
        router.sysctl("net/ipv4/ip_forward", "1").unwrap();
        router.sysctl("net/ipv6/conf/all/forwarding", "1").unwrap();
        for (at, client) in clients.iter().enumerate() {
            router.join(&format!("c{at}"), client, "eth0").unwrap();
            let gateway = Ipv4Addr::from(u32::from(CLIENTS[at]) - 1);
            let gateway_v6 = Ipv6Addr::from(u128::from(CLIENTS_V6[at]) - 1);
            router
                .ip(&format!(
                    "address add {gateway}/24 dev c{at}\naddress add {gateway_v6}/64 dev c{at} nodad\n"
                ))
                .unwrap();
            client
                .ip(&format!(
                    "address add {}/24 dev eth0\naddress add {}/64 dev eth0 nodad
                    route add default via {gateway}\nroute add ::/0 via {gateway_v6}\n",
                    CLIENTS[at], CLIENTS_V6[at]
                ))
                .unwrap();
        }
        edge_space.join("pub0", &router, "to-edge").unwrap();
        router
            .ip("address add 203.0.113.254/24 dev to-edge\naddress add fd03::fe/64 dev to-edge nodad
                route add fd77::/64 via fd03::1\n")
            .unwrap();
        edge_space
            .ip(&format!(
                "address add {PUBLIC}/24 dev pub0\naddress add {SPARE}/32 dev pub0
                address add {PUBLIC_V6}/64 dev pub0 nodad
                route add default via 203.0.113.254\nroute add ::/0 via fd03::fe
                link add under0 type bridge\naddress add 10.88.0.1/24 dev under0
                link set under0 up\n"
            ))
            .unwrap();
        let mut rig = Self {
            clients,
            router,
            edge_space,
            edge: None,
            hosts: Vec::new(),
            folder,
            options: options.clone(),
            hold,
            announce,
        };
        rig.start_edge();
        for (at, name) in [(2, "a"), (3, "b")] {
            let host = rig.host(at, name);
            rig.hosts.push(host);
        }
        rig
    }

    /// Starts the edge, in place of the one that runs if there is one.
    pub(crate) fn start_edge(&mut self) {
        self.edge = None;
        let folder = self.folder.path();
        let underlay = Ipv4Addr::new(10, 88, 0, 1);
        let config = EdgeConfig {
            public: PUBLIC,
            this: Peer { overlay: Ipv4Addr::new(100, 64, 0, 1), underlay },
            listen: (underlay, 7450).into(),
            machines: (Ipv4Addr::new(10, 77, 0, 0), 16),
            options: self.options.clone(),
            security: Security::Plaintext,
            socket: folder.join("edge.sock"),
            state: folder.join("edge"),
            path: PathChoice::Bpf,
            pins: conduit::PINS.into(),
            hold: self.hold.clone(),
            secure: conduit::secure::SecureConfig::off(),
        };
        self.edge = Some(self.edge_space.run(|| Edge::start(config)).unwrap());
    }

    fn host(&self, at: u8, name: &str) -> Host {
        let space = space();
        space.join("eth0", &self.edge_space, &format!("to-{name}")).unwrap();
        self.edge_space.ip(&format!("link set to-{name} master under0\n")).unwrap();
        space.ip(&format!("address add 10.88.0.{at}/24 dev eth0\n")).unwrap();
        let folder = self.folder.path();
        let peer =
            Peer { overlay: Ipv4Addr::new(100, 64, 0, at), underlay: Ipv4Addr::new(10, 88, 0, at) };
        let (agent, path) = start_agent(&space, folder, name, peer, self.announce.clone());
        Host { space, agent: Some(agent), path, peer }
    }

    /// Boots a machine on a host, at the first epoch of the lease's epoch 1.
    pub(crate) fn boot(&self, net: MachineNet, at: usize) -> Machine {
        self.boot_at(net, at, epoch(1)).unwrap()
    }

    /// Likewise, with a guest that nobody has told its addresses.
    pub(crate) fn boot_bare(&self, net: MachineNet, at: usize) -> Machine {
        let guest = Guest::bare(&net).unwrap();
        self.boot_guest(net, guest, at, epoch(1)).unwrap()
    }

    pub(crate) fn boot_at(
        &self,
        net: MachineNet,
        at: usize,
        epoch: u64,
    ) -> Result<Machine, NetError> {
        let guest = Guest::new(&net).unwrap();
        self.boot_guest(net, guest, at, epoch)
    }

    fn boot_guest(
        &self,
        net: MachineNet,
        guest: Guest,
        at: usize,
        epoch: u64,
    ) -> Result<Machine, NetError> {
        let host = &self.hosts[at];
        let tap = host.space.run(|| host.path.prepare(&net))?;
        host.path.resume(&net, epoch)?;
        host.path.settled(&net, epoch, LIMIT)?;
        let vmm = Some(Vmm::run(&guest, &tap));
        Ok(Machine { net, guest, at, epoch, tap: Some(tap), vmm })
    }

    /// Waits until the edge does as the machine's host has said.
    pub(crate) fn settle(&self, machine: &Machine) {
        self.hosts[machine.at].path.settled(&machine.net, machine.epoch, LIMIT).unwrap();
    }

    /// Moves a machine to the other host as drafter does.
    pub(crate) fn move_machine(&self, machine: &mut Machine, blackout: Duration) {
        let (from, to) = (&self.hosts[machine.at], &self.hosts[1 - machine.at]);
        let net = machine.net.clone();
        let tap = to.space.run(|| to.path.prepare(&net)).unwrap();
        let target = to.path.endpoint();
        // The flip is its owner's, the next epoch the next owner's.
        let (flip, next) = (machine.epoch + 1, epoch((machine.epoch >> 16) + 1));
        from.path.divert(&net, &target, flip).unwrap();
        machine.vmm.take().expect("it runs").pause();
        let old = machine.tap.replace(tap).expect("it has a tap");
        from.path.pause(&net, &old, &target, flip).unwrap();
        std::thread::sleep(blackout);
        to.path.resume(&net, next).unwrap();
        machine.vmm = machine.tap.as_ref().map(|tap| Vmm::run(&machine.guest, tap));
        to.path.settled(&net, next, LIMIT).unwrap();
        drop(old);
        from.path.forget(&net, next).unwrap();
        machine.at = 1 - machine.at;
        machine.epoch = next;
    }

    /// What the edge has counted under a name.
    pub(crate) fn count(&self, name: &str) -> u64 {
        let status = self.edge_space.run(|| self.edge.as_ref().unwrap().status());
        status.counts.get(name).copied().unwrap_or(0)
    }
}

fn start_agent(
    space: &Space,
    folder: &Path,
    name: &str,
    peer: Peer,
    announce: Option<Announce>,
) -> (Agent, AgentDataPath) {
    let socket = folder.join(format!("{name}.sock"));
    let config = AgentConfig {
        announce,
        host: host_name(name),
        this: peer,
        edge: "10.88.0.1:7450".parse().unwrap(),
        edge_name: host_name("edge"),
        more_edges: Vec::new(),
        security: Security::Plaintext,
        socket: socket.clone(),
        state: folder.join(name),
        path: PathChoice::Bpf,
        pins: conduit::PINS.into(),
        hold: None,
        secure: conduit::secure::SecureConfig::off(),
    };
    let agent = space.run(|| Agent::start(config)).unwrap();
    let joined = || conduit::status(&socket).is_ok_and(|s| s.link.starts_with("connected"));
    assert!(wait_for(LIMIT, joined), "the agent of host {name} did not reach the edge");
    let path = AgentDataPath::connect(&socket).unwrap();
    (agent, path)
}

impl Machine {
    /// Echoes TCP on a port, of both families.
    pub(crate) fn echo(&self, port: u16) {
        let any = Ipv6Addr::UNSPECIFIED;
        serve_echo(self.guest.run(|| TcpListener::bind((any, port))).unwrap());
    }

    /// A UDP socket in the guest, of both families.
    pub(crate) fn udp(&self, port: u16) -> UdpSocket {
        udp_in(&self.guest, port)
    }
}

fn udp_in(guest: &Guest, port: u16) -> UdpSocket {
    let socket = guest.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

/// A UDP socket of an address's family.
pub(crate) fn udp_of(space: &Space, address: impl Into<IpAddr>, port: u16) -> UdpSocket {
    let address = address.into();
    let socket = space.run(|| UdpSocket::bind((address, port))).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

/// What a socket hears, and from whom; `None` if it hears nothing within `limit`.
pub(crate) fn heard(socket: &UdpSocket, limit: Duration) -> Option<(String, SocketAddr)> {
    socket.set_read_timeout(Some(limit)).unwrap();
    let mut buffer = [0; 2048];
    let (size, from) = socket.recv_from(&mut buffer).ok()?;
    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
    Some((String::from_utf8_lossy(&buffer[..size]).into_owned(), from))
}

impl Drop for Rig {
    fn drop(&mut self) {
        let calm = !std::thread::panicking();
        for host in &mut self.hosts {
            if let Some(agent) = host.agent.take() {
                let removed = host.space.run(|| agent.remove_everything());
                assert!(!calm || removed.is_ok(), "{removed:?}");
            }
        }
        if let Some(edge) = self.edge.take() {
            let removed = self.edge_space.run(|| edge.remove_everything());
            assert!(!calm || removed.is_ok(), "{removed:?}");
        }
    }
}
