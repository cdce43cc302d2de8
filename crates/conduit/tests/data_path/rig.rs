//! Two hosts, an edge, a router between them, a client, and a machine that is on both hosts at once
//! (as two namespaces), so that a test sees where a frame ends.
//!
//! ```text
//!  client ── edge ── router ─┬─ host a ── guest a  10.77.0.5, fd77::5
//!                            └─ host b ── guest b  the same
//! ```

use conduit::{
    exec,
    lab::Space,
    netlink::interface_index,
    tap::GATEWAY_MAC,
    tunnel::{self, NETWORK, Tunnel},
};
use conduit_bpf::{Attach, Config, DataPlane, Entry, Event, Key, Place, Port, Program, Role};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

pub(crate) const MACHINE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);
pub(crate) const MACHINE_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 5);
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
pub(crate) const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd03, 0, 0, 0, 0, 0, 0, 2);
pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];
/// Where datagrams are sent to in tests.
pub(crate) const PORT: u16 = 9;

pub(crate) fn key() -> Key {
    Key { net: NETWORK, address: MACHINE.into() }
}

pub(crate) fn key_v6() -> Key {
    Key { net: NETWORK, address: MACHINE_V6.into() }
}

/// A host or an edge.
pub(crate) struct Node {
    pub(crate) space: Space,
    pub(crate) this: IpAddr,
    pub(crate) role: Role,
    pub(crate) tunnel: Tunnel,
    pub(crate) plane: Option<DataPlane>,
    attach: Attach,
    root: PathBuf,
}

impl Node {
    fn new(space: Space, this: IpAddr, role: Role, attach: Attach) -> Self {
        let root = PathBuf::from(conduit_bpf::ROOT);
        let tunnel = space.run(|| tunnel::ensure(this)).unwrap();
        let mut node = Self { space, this, role, tunnel, plane: None, attach, root };
        node.open();
        node
    }

    /// Opens the data path, again if it was open.
    pub(crate) fn open(&mut self) {
        self.plane = None;
        let (root, attach) = (self.root.clone(), self.attach);
        let plane = self.space.run(move || DataPlane::open(&root, attach)).unwrap();
        let programs: &[Program] = &[Program::Decap, Program::Stack];
        self.space.run(|| {
            for &program in programs {
                plane.attach(self.tunnel.index, program).unwrap();
            }
        });
        self.plane = Some(plane);
    }

    pub(crate) fn plane(&self) -> &DataPlane {
        self.plane.as_ref().unwrap()
    }

    pub(crate) fn count(&self, event: Event) -> u64 {
        self.plane().count(event).unwrap()
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn set(&self, key: Key, epoch: u64, place: Place, owner: IpAddr) {
        self.try_set(key, epoch, place, owner).unwrap();
    }

    pub(crate) fn try_set(
        &self,
        key: Key,
        epoch: u64,
        place: Place,
        owner: IpAddr,
    ) -> Result<conduit_bpf::Changed, conduit_bpf::Error> {
        let entry = Entry { epoch, owner, candidate: None, place, mac: MAC };
        self.plane().change(key, &entry)
    }

    pub(crate) fn configure(&self, edge: Option<IpAddr>, hold: Option<u32>) {
        let (this, tunnel, role) = (self.this, self.tunnel.index, self.role);
        let (gateway, by_stack) = (GATEWAY_MAC, false);
        let config = Config { this, edge, tunnel, hold, net: NETWORK, role, gateway, by_stack };
        self.plane().configure(&config).unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.plane.is_none() {
            // A test that failed half-way.
            let root = self.root.clone();
            let _ = self.space.run(move || conduit_bpf::sweep(&root));
        }
        if let Some(plane) = self.plane.take() {
            let folder = plane.pins().to_owned();
            let removed = self.space.run(move || plane.remove());
            if !thread::panicking() {
                removed.unwrap();
                assert!(!folder.exists(), "pins were left in {}", folder.display());
            }
        }
    }
}

pub(crate) struct Rig {
    pub(crate) client: Space,
    pub(crate) router: Space,
    pub(crate) edge: Node,
    pub(crate) hosts: [Node; 2],
    pub(crate) guests: [Space; 2],
    pub(crate) taps: [u32; 2],
}

/// Which addresses the hosts have among themselves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Underlay {
    V4,
    V6,
}

pub(crate) struct Options {
    pub(crate) underlay: Underlay,
    pub(crate) attach: Attach,
    pub(crate) guest_mtu: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { underlay: Underlay::V4, attach: Attach::Auto, guest_mtu: 1400 }
    }
}

/// Three pairs of addresses on the router: edge, host a, host b.
fn underlay(at: u16) -> (Ipv4Addr, Ipv6Addr) {
    (Ipv4Addr::new(10, 88, at as u8, 2), Ipv6Addr::new(0xfd88, at, 0, 0, 0, 0, 0, 2))
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(&Options::default())
    }

    pub(crate) fn with(options: &Options) -> Self {
        let space = || {
            let space = Space::new().expect("these tests make namespaces: run them as root");
            // No router asks for neighbours while its own address may be somebody else's.
            space.sysctl("net/ipv6/conf/default/accept_dad", "0").unwrap();
            space
        };
        let (client, router) = (space(), space());
        router.sysctl("net/ipv4/ip_forward", "1").unwrap();
        router.sysctl("net/ipv6/conf/all/forwarding", "1").unwrap();
        let nodes: Vec<Space> = (1..=3_u16)
            .map(|at| {
                let node = space();
                node.join("under0", &router, &format!("to{at}")).unwrap();
                let (v4, v6) = underlay(at);
                router
                    .ip(&format!(
                        "address add 10.88.{at}.1/24 dev to{at}
                        address add fd88:{at}::1/64 dev to{at} nodad\n"
                    ))
                    .unwrap();
                node.ip(&format!(
                    "address add {v4}/24 dev under0
                    address add {v6}/64 dev under0 nodad
                    route add 10.88.0.0/16 via 10.88.{at}.1
                    route add fd88::/16 via fd88:{at}::1\n"
                ))
                .unwrap();
                node.sysctl("net/ipv4/ip_forward", "1").unwrap();
                node.sysctl("net/ipv6/conf/all/forwarding", "1").unwrap();
                for what in ["all", "default", "under0"] {
                    node.sysctl(&format!("net/ipv4/conf/{what}/rp_filter"), "0").unwrap();
                }
                node
            })
            .collect();
        let address = |at: u16| match options.underlay {
            Underlay::V4 => underlay(at).0.into(),
            Underlay::V6 => underlay(at).1.into(),
        };
        let mut nodes = nodes.into_iter().zip(1_u16..);
        let mut node = |role| {
            let (space, at) = nodes.next().unwrap();
            Node::new(space, address(at), role, options.attach)
        };
        let edge = node(Role::Edge);
        let hosts = [node(Role::Host), node(Role::Host)];

        edge.space.join("pub0", &client, "eth0").unwrap();
        let v6_hop = tunnel::NEXT_HOP_V6;
        edge.space
            .ip(&format!(
                "address add 203.0.113.1/24 dev pub0
                address add fd03::1/64 dev pub0 nodad
                route add 10.77.0.0/16 via {} dev cd-tunnel onlink
                route add fd77::/64 via {v6_hop} dev cd-tunnel onlink\n",
                tunnel::NEXT_HOP
            ))
            .unwrap();
        client
            .ip("address add 203.0.113.2/24 dev eth0
                address add fd03::2/64 dev eth0 nodad
                route add 10.77.0.0/16 via 203.0.113.1
                route add fd77::/64 via fd03::1\n")
            .unwrap();

        let guests = [space(), space()];
        let taps = [0, 1].map(|at| attach_guest(&hosts[at], &guests[at], options.guest_mtu));
        let rig = Self { client, router, edge, hosts, guests, taps };
        rig.edge.configure(None, None);
        let everyone =
            [(&rig.edge, Role::Edge), (&rig.hosts[0], Role::Host), (&rig.hosts[1], Role::Host)];
        for node in rig.nodes() {
            for (peer, role) in everyone {
                if peer.this != node.this {
                    node.plane().set_peer(peer.this, role).unwrap();
                }
            }
        }
        for host in &rig.hosts {
            host.configure(Some(rig.edge.this), None);
        }
        rig
    }

    pub(crate) fn nodes(&self) -> [&Node; 3] {
        [&self.edge, &self.hosts[0], &self.hosts[1]]
    }

    pub(crate) fn local(&self, host: usize) -> Place {
        Place::Local { tap: self.taps[host], candidate: false }
    }

    /// The machine is on `host` at `epoch`, and everybody knows.
    pub(crate) fn place(&self, host: usize, epoch: u64) {
        let owner = self.hosts[host].this;
        let away = Place::Remote { leaving: false };
        for key in [key(), key_v6()] {
            self.edge.set(key, epoch, away, owner);
            self.hosts[host].set(key, epoch, self.local(host), owner);
            if self.hosts[1 - host].plane().entry(key).unwrap().is_some() {
                self.hosts[1 - host].set(key, epoch, away, owner);
            }
        }
    }

    /// A socket in a guest that hears datagrams for the machine.
    pub(crate) fn listen(&self, guest: usize) -> UdpSocket {
        let socket = self.guests[guest].run(|| UdpSocket::bind("[::]:9").unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        socket
    }

    /// Sends a datagram to the machine from the client.
    pub(crate) fn say(&self, text: &str) {
        let socket = self.client.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        socket.send_to(text.as_bytes(), (MACHINE, PORT)).unwrap();
    }
}

/// What a socket hears within its time.
pub(crate) fn heard(socket: &UdpSocket) -> Option<(String, SocketAddr)> {
    let mut buffer = [0; 2048];
    let (size, from) = socket.recv_from(&mut buffer).ok()?;
    Some((String::from_utf8_lossy(&buffer[..size]).into_owned(), from))
}

/// Waits until `done`; fails the test if it takes half a minute.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Puts a guest behind an interface of a host, as a monitor would behind a tap.
fn attach_guest(host: &Node, guest: &Space, mtu: u32) -> u32 {
    host.space.join("tap0", guest, "eth0").unwrap();
    let gateway = conduit::tap::GATEWAY;
    host.space
        .ip(&format!(
            "link set tap0 address {} mtu {mtu}
            address add {gateway}/32 dev tap0
            address add fe80::1/64 dev tap0 nodad
            route add {MACHINE} dev tap0
            route add {MACHINE_V6} dev tap0
            neighbour replace {MACHINE} lladdr 02:00:00:00:00:05 dev tap0
            neighbour replace {MACHINE_V6} lladdr 02:00:00:00:00:05 dev tap0\n",
            "02:64:72:61:66:fe"
        ))
        .unwrap();
    host.space.sysctl("net/ipv4/conf/tap0/rp_filter", "0").unwrap();
    guest
        .ip(&format!(
            "link set eth0 address 02:00:00:00:00:05 mtu {mtu}
            address add {MACHINE}/32 dev eth0
            address add {MACHINE_V6}/128 dev eth0 nodad
            route add {gateway} dev eth0
            route add default via {gateway} dev eth0
            route add ::/0 via fe80::1 dev eth0\n"
        ))
        .unwrap();
    // What is too large for the tunnel goes out by the stack, which says so.
    let out = format!(
        "route add default via {} dev cd-tunnel onlink table 6473
        rule add iif tap0 table 6473
        route add ::/0 via {} dev cd-tunnel onlink table 6473\n",
        tunnel::NEXT_HOP,
        tunnel::NEXT_HOP_V6
    );
    host.space.ip(&out).unwrap();
    host.space.run(|| {
        let tap = interface_index("tap0").unwrap();
        let port = Port { net: NETWORK, mac: MAC, v4: Some(MACHINE), v6: Some(MACHINE_V6) };
        host.plane().set_port(tap, &port).unwrap();
        host.plane().attach(tap, Program::Tap).unwrap();
        exec::run("ip", &["-6", "rule", "add", "iif", "tap0", "table", "6473"], "").unwrap();
        tap
    })
}
