//! One client, one edge, one host, and three machines that differ in the way between edge and
//! host: routed plainly, through kernel vxlan with routes, and through the BPF data path. They take
//! turns over the same underlay.
//!
//! ```text
//!  client ── edge ══ under0 ══ host ─┬─ plain  10.77.1.1
//!                                    ├─ vxlan  10.77.2.1
//!                                    └─ bpf    10.77.3.1
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
use conduit_bpf::{Attach, Config, DataPlane, Entry, Key, Place, Port, Program, Role};
use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

const EDGE: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 2);
pub(super) const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
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

    fn mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 7, self.number()]
    }
}

pub(super) struct Rig {
    pub(super) client: Space,
    edge: Space,
    host: Space,
    machines: [Space; 3],
    planes: Vec<DataPlane>,
}

impl Rig {
    pub(super) fn new() -> anyhow::Result<Self> {
        let space = Space::new;
        let mut rig = Self {
            client: space()?,
            edge: space()?,
            host: space()?,
            machines: [space()?, space()?, space()?],
            planes: Vec::new(),
        };
        rig.build().context("the rig")?;
        Ok(rig)
    }

    fn build(&mut self) -> anyhow::Result<()> {
        let Self { client, edge, host, machines, planes } = self;
        edge.join("under0", host, "under0")?;
        edge.join("pub0", client, "eth0")?;
        for space in [&*edge, &*host] {
            space.sysctl("net/ipv4/ip_forward", "1")?;
            for key in ["all", "default", "under0"] {
                space.sysctl(&format!("net/ipv4/conf/{key}/rp_filter"), "0")?;
            }
        }
        edge.ip(&format!(
            "address add {EDGE}/24 dev under0\naddress add 203.0.113.1/24 dev pub0\n"
        ))?;
        host.ip(&format!("address add {HOST}/24 dev under0\n"))?;
        client.ip(&format!(
            "address add {CLIENT}/24 dev eth0\nroute add 10.77.0.0/16 via 203.0.113.1\n"
        ))?;
        for (way, machine) in Way::ALL.into_iter().zip(machines.iter()) {
            attach(way, host, machine)?;
        }
        // Plain: the host is the next hop, both ways.
        edge.ip(&format!("route add {} via {HOST}\n", Way::Plain.machine()))?;
        host.ip(&format!("route add default via {EDGE} table 101\n"))?;
        // Kernel vxlan with routes, as conduit's other path has it.
        for (space, own, its, at) in [(&*edge, EDGE, HOST, 1), (&*host, HOST, EDGE, 2)] {
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
        edge.ip(&format!("route add {} via 100.64.0.2\n", Way::Vxlan.machine()))?;
        host.ip("route add default via 100.64.0.1 table 102\n")?;
        // BPF.
        for (space, own, its, role) in
            [(&*edge, EDGE, HOST, Role::Edge), (&*host, HOST, EDGE, Role::Host)]
        {
            planes.push(space.run(|| open(own.into(), its.into(), role))?);
        }
        let machine = Way::Bpf.machine();
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
        for space in [&self.edge, &self.host] {
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
        &self.machines[usize::from(way.number()) - 1]
    }

    /// Bytes and packets that the edge and the host have put on the underlay.
    pub(super) fn on_the_wire(&self) -> anyhow::Result<(u64, u64)> {
        let (edge, host) = (sent(&self.edge, "under0")?, sent(&self.host, "under0")?);
        Ok((edge.0 + host.0, edge.1 + host.1))
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
