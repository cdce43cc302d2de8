//! One client, and three machines that differ in the way between edge and host: routed plainly,
//! through kernel vxlan with routes, and through the BPF data path. Each has an edge and a host of its
//! own, so that none pays for another's devices: with one tunnel in a namespace the kernel (6.16 and
//! newer) finds its socket without looking, with two it looks for every packet. They take turns.
//!
//! ```text
//!           ┌─ edge ══ under0 ══ host ── plain  10.77.1.1
//!  client ──┼─ edge ══ under0 ══ host ── vxlan  10.77.2.1
//!           └─ edge ══ under0 ══ host ── bpf    10.77.3.1
//! ```

use crate::{
    exec,
    lab::Space,
    netlink::interface_index,
    sys::{self, CardOffload},
    tap::{GATEWAY, GATEWAY_MAC},
    tunnel::{self, NETWORK},
};
use anyhow::Context;
use conduit_bpf::{Attach, Config, DataPlane, Entry, Flows, Key, Place, Port, Program, Role};
use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

const EDGE: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 2);
/// Inside the machines, on every path.
const GUEST_MTU: u32 = 1400;

/// The way between edge and host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Plain,
    Vxlan,
    Bpf,
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::Plain, Self::Vxlan, Self::Bpf];

    fn number(self) -> u8 {
        match self {
            Self::Plain => 1,
            Self::Vxlan => 2,
            Self::Bpf => 3,
        }
    }

    pub(super) fn machine(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number(), 1)
    }

    /// The client's address on this way.
    pub(super) fn client(self) -> Ipv4Addr {
        Ipv4Addr::new(203, 0, 112 + self.number(), 2)
    }

    fn mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 7, self.number()]
    }
}

/// One way's edge, host and machine.
struct Lane {
    edge: Space,
    host: Space,
    machine: Space,
}

pub(super) struct Rig {
    pub(super) client: Space,
    lanes: [Lane; 3],
    planes: Vec<DataPlane>,
}

impl Rig {
    pub(super) fn new() -> anyhow::Result<Self> {
        let client = Space::new()?;
        let [plain, vxlan, bpf] = Way::ALL.map(|way| Lane::new(way, &client));
        let mut rig = Self { client, lanes: [plain?, vxlan?, bpf?], planes: Vec::new() };
        rig.build().context("the rig")?;
        Ok(rig)
    }

    fn lane(&self, way: Way) -> &Lane {
        &self.lanes[usize::from(way.number()) - 1]
    }

    fn build(&mut self) -> anyhow::Result<()> {
        let [plain, vxlan, bpf] = &self.lanes;
        // Plain: the host is the next hop, both ways.
        plain.edge.ip(&format!("route add {} via {HOST}\n", Way::Plain.machine()))?;
        plain.host.ip(&format!("route add default via {EDGE} table 101\n"))?;
        // Kernel vxlan with routes, as conduit's other path has it.
        for (space, own, its, at) in [(&vxlan.edge, EDGE, HOST, 1), (&vxlan.host, HOST, EDGE, 2)] {
            let other = 3 - at;
            space.ip(&format!(
                "link add vx0 address 02:00:00:00:aa:0{at} type vxlan id 100 local {own} dstport 4789 nolearning
                link set vx0 mtu 1450 up
                address add 100.64.0.{at}/24 dev vx0
                neighbour add 100.64.0.{other} lladdr 02:00:00:00:aa:0{other} dev vx0\n"
            ))?;
            let mac = format!("02:00:00:00:aa:0{other}");
            let its = its.to_string();
            let fdb = ["fdb", "append", &mac, "dev", "vx0", "dst", &its];
            space.run(|| exec::run("bridge", &fdb, ""))?;
        }
        vxlan.edge.ip(&format!("route add {} via 100.64.0.2\n", Way::Vxlan.machine()))?;
        vxlan.host.ip("route add default via 100.64.0.1 table 102\n")?;
        // BPF.
        let Lane { edge, host, .. } = bpf;
        for (space, own, its, role) in
            [(edge, EDGE, HOST, Role::Edge), (host, HOST, EDGE, Role::Host)]
        {
            self.planes.push(space.run(|| open(own.into(), its.into(), role))?);
        }
        let (planes, machine) = (&self.planes, Way::Bpf.machine());
        edge.ip(&format!("route add {machine} via {} dev cd-tunnel onlink\n", tunnel::NEXT_HOP))?;
        let key = Key { net: NETWORK, address: machine.into() };
        let tap = host.run(|| interface_index("tap3"))?;
        let entry = |place| Entry {
            epoch: 1,
            owner: HOST.into(),
            candidate: None,
            place,
            mac: Way::Bpf.mac(),
        };
        planes[0].change(key, &entry(Place::Remote { leaving: false }))?;
        planes[1].change(key, &entry(Place::Local { tap, candidate: false }))?;
        let port = Port { net: NETWORK, mac: Way::Bpf.mac(), v4: Some(machine), v6: None };
        planes[1].set_port(tap, &port)?;
        host.run(|| planes[1].attach(tap, Program::Tap))?;
        Ok(())
    }

    /// Packets of wire size on the underlay, as a network card without offloads sends them, put
    /// together again where they arrive; or large ones kept whole from end to end.
    pub(super) fn set_wire(&self, wire: bool) -> anyhow::Result<()> {
        let segments = if wire { 1 } else { 65_535 };
        for space in self.lanes.iter().flat_map(|lane| [&lane.edge, &lane.host]) {
            space.ip(&format!("link set dev under0 gso_max_segs {segments}\n"))?;
            // A veth puts together only what comes from one that cuts nothing itself.
            space
                .run(|| {
                    sys::set_card("under0", CardOffload::Tso, !wire)?;
                    sys::set_card("under0", CardOffload::Gro, true)
                })
                .context("set the offloads of under0")?;
        }
        Ok(())
    }

    pub(super) fn machine(&self, way: Way) -> &Space {
        &self.lane(way).machine
    }

    /// Has frames counted by flow at the BPF way's edge and host for as long as this lives.
    pub(super) fn count_flows(&self) -> anyhow::Result<Vec<Flows>> {
        self.planes.iter().map(|plane| Ok(plane.view()?.flows()?)).collect()
    }

    /// Bytes and packets that a way's edge and host have put on their underlay.
    pub(super) fn on_the_wire(&self, way: Way) -> anyhow::Result<(u64, u64)> {
        let lane = self.lane(way);
        let (edge, host) = (sent(&lane.edge, "under0")?, sent(&lane.host, "under0")?);
        Ok((edge.0 + host.0, edge.1 + host.1))
    }
}

impl Lane {
    fn new(way: Way, client: &Space) -> anyhow::Result<Self> {
        let lane = Self { edge: Space::new()?, host: Space::new()?, machine: Space::new()? };
        let Self { edge, host, machine } = &lane;
        let (n, its) = (way.number(), way.client());
        let outside = Ipv4Addr::new(203, 0, 112 + n, 1);
        edge.join("under0", host, "under0")?;
        edge.join("pub0", client, &format!("eth{n}"))?;
        for space in [edge, host] {
            space.sysctl("net/ipv4/ip_forward", "1")?;
            for key in ["all", "default", "under0"] {
                space.sysctl(&format!("net/ipv4/conf/{key}/rp_filter"), "0")?;
            }
        }
        edge.ip(&format!("address add {EDGE}/24 dev under0\naddress add {outside}/24 dev pub0\n"))?;
        host.ip(&format!("address add {HOST}/24 dev under0\n"))?;
        client.ip(&format!(
            "address add {its}/24 dev eth{n}\nroute add {} via {outside}\n",
            way.machine()
        ))?;
        attach(way, host, machine)?;
        Ok(lane)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for plane in &self.planes {
            if let Err(error) = plane.remove() {
                tracing::warn!(%error, "pins stay");
            }
        }
    }
}

/// Bytes and packets that an interface has sent.
fn sent(space: &Space, interface: &str) -> anyhow::Result<(u64, u64)> {
    let numbers = counters(space, interface)?;
    Ok((numbers[8], numbers[9]))
}

/// Packets that an interface has received.
pub(super) fn received(space: &Space, interface: &str) -> anyhow::Result<u64> {
    Ok(counters(space, interface)?[1])
}

/// The sixteen counters of `/proc/net/dev`.
fn counters(space: &Space, interface: &str) -> anyhow::Result<Vec<u64>> {
    let text = space.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))?;
    let numbers =
        text.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
    let numbers: Vec<u64> =
        numbers.unwrap_or_default().split_whitespace().filter_map(|n| n.parse().ok()).collect();
    anyhow::ensure!(numbers.len() >= 16, "no counters of {interface} in /proc/net/dev");
    Ok(numbers)
}

fn open(own: IpAddr, its: IpAddr, role: Role) -> anyhow::Result<DataPlane> {
    let device = tunnel::ensure(own)?;
    let plane = DataPlane::open(Path::new(conduit_bpf::ROOT), Attach::Auto)?;
    let other = if role == Role::Edge { Role::Host } else { Role::Edge };
    plane.set_peer(its, other)?;
    plane.configure(&Config {
        this: own,
        edge: (role == Role::Host).then_some(its),
        tunnel: device.index,
        hold: None,
        net: NETWORK,
        role,
        gateway: GATEWAY_MAC,
        by_stack: false,
    })?;
    for program in [Program::Decap, Program::Stack] {
        plane.attach(device.index, program)?;
    }
    Ok(plane)
}

/// A machine behind an interface of the host, as behind a tap.
fn attach(way: Way, host: &Space, machine: &Space) -> anyhow::Result<()> {
    let n = way.number();
    let (tap, address) = (format!("tap{n}"), way.machine());
    let mac = way.mac().map(|b| format!("{b:02x}")).join(":");
    let gateway = GATEWAY_MAC.map(|b| format!("{b:02x}")).join(":");
    host.join(&tap, machine, "eth0")?;
    host.ip(&format!(
        "link set {tap} address {gateway} mtu {GUEST_MTU}
        address add {GATEWAY}/32 dev {tap}
        route add {address} dev {tap}
        neighbour replace {address} lladdr {mac} dev {tap}
        rule add iif {tap} table 10{n}\n"
    ))?;
    machine.ip(&format!(
        "link set eth0 address {mac} mtu {GUEST_MTU}
        address add {address}/32 dev eth0
        route add {GATEWAY} dev eth0
        route add default via {GATEWAY} dev eth0\n"
    ))?;
    Ok(())
}
