//! What a client feels of a move: real agents and a real edge, a machine without a processor, TCP
//! and UDP through the public address, and a blackout of a stated length.

use super::Group;
use crate::{
    AgentDataPath, DataPath, MachineNet, PathChoice, PortMapping, Protocol, Tap,
    agent::{Agent, AgentConfig},
    edge::{Edge, EdgeConfig},
    lab::{
        Space,
        machine::{Guest, Vmm},
        traffic::{Datagrams, Echoes, Received, retransmits, serve_echo},
        wait_for,
    },
    wire::Peer,
};
use anyhow::{Context, ensure};
use bench::{Row, Target};
use identity::{HostName, Security};
use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    thread,
    time::{Duration, Instant},
};

pub(super) const GROUPS: &[Group] = &[Group {
    name: "gap",
    about: "TCP and UDP of a client while a machine moves",
    bars: &["conduit.gap.", "conduit.flip.agent"],
    run: gaps,
}];

const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const SETTLE: Duration = Duration::from_secs(5);

struct Host {
    space: Space,
    agent: Option<Agent>,
    path: AgentDataPath,
    tap: Option<Tap>,
}

/// A fleet of two hosts in this process, with a machine on the first.
struct Fleet {
    client: Space,
    edge_space: Space,
    edge: Option<Edge>,
    hosts: Vec<Host>,
    guest: Guest,
    received: Received,
    net: MachineNet,
    vmm: Option<Vmm>,
    at: usize,
    epoch: u64,
}

fn name(text: &str) -> anyhow::Result<HostName> {
    HostName::new(text).map_err(|e| anyhow::anyhow!("{e}"))
}

fn edge_config(folder: &Path) -> anyhow::Result<EdgeConfig> {
    Ok(EdgeConfig {
        public: PUBLIC,
        this: Peer { overlay: Ipv4Addr::new(100, 64, 0, 1), underlay: Ipv4Addr::new(10, 88, 0, 1) },
        listen: "10.88.0.1:7450".parse()?,
        machines: (Ipv4Addr::new(10, 77, 0, 0), 16),
        security: Security::Plaintext,
        socket: folder.join("edge.sock"),
        state: folder.join("edge"),
        path: PathChoice::Bpf,
        pins: conduit_bpf::ROOT.into(),
    })
}

impl Fleet {
    fn new(folder: &Path) -> anyhow::Result<Self> {
        let (client, edge_space) = (Space::new()?, Space::new()?);
        edge_space.join("pub0", &client, "eth0")?;
        client.ip("address add 203.0.113.2/24 dev eth0\n")?;
        edge_space.ip(&format!(
            "address add {PUBLIC}/24 dev pub0
            link add under0 type bridge
            address add 10.88.0.1/24 dev under0
            link set under0 up\n"
        ))?;
        let config = edge_config(folder)?;
        let edge = edge_space.run(|| Edge::start(config))?;
        let port = |protocol, public, machine| PortMapping { protocol, public, machine };
        let net = MachineNet {
            machine: "echo".into(),
            address: Ipv4Addr::new(10, 77, 0, 1),
            mac: [2, 0, 0, 0x77, 0, 1],
            mtu: 1400,
            ports: vec![port(Protocol::Tcp, 7000, 7), port(Protocol::Udp, 7001, 9)],
        };
        let guest = Guest::new(&net)?;
        serve_echo(guest.run(|| TcpListener::bind("0.0.0.0:7"))?);
        let received = Received::collect(guest.run(|| UdpSocket::bind("0.0.0.0:9"))?);
        let mut fleet = Self {
            client,
            edge_space,
            edge: Some(edge),
            hosts: Vec::new(),
            guest,
            received,
            net,
            vmm: None,
            at: 0,
            epoch: 1,
        };
        for (at, host) in [(2_u8, "a"), (3, "b")] {
            let host = fleet.host(folder, at, host)?;
            fleet.hosts.push(host);
        }
        fleet.prepare(0)?;
        fleet.hosts[0].path.resume(&fleet.net, 1)?;
        fleet.hosts[0].path.settled(&fleet.net, 1, SETTLE)?;
        fleet.start(0)?;
        Ok(fleet)
    }

    fn host(&self, folder: &Path, at: u8, host: &str) -> anyhow::Result<Host> {
        let space = Space::new()?;
        space.join("eth0", &self.edge_space, &format!("to-{host}"))?;
        self.edge_space.ip(&format!("link set to-{host} master under0\n"))?;
        space.ip(&format!("address add 10.88.0.{at}/24 dev eth0\n"))?;
        let socket = folder.join(format!("{host}.sock"));
        let config = AgentConfig {
            host: name(host)?,
            this: Peer {
                overlay: Ipv4Addr::new(100, 64, 0, at),
                underlay: Ipv4Addr::new(10, 88, 0, at),
            },
            edge: "10.88.0.1:7450".parse()?,
            edge_name: name("edge")?,
            security: Security::Plaintext,
            socket: socket.clone(),
            state: folder.join(host),
            path: PathChoice::Bpf,
            pins: conduit_bpf::ROOT.into(),
        };
        let agent = space.run(|| Agent::start(config))?;
        let joined = || crate::status(&socket).is_ok_and(|s| s.link.starts_with("connected"));
        ensure!(wait_for(SETTLE, joined), "the agent of host {host} did not reach the edge");
        let path = AgentDataPath::connect(&socket)?;
        Ok(Host { space, agent: Some(agent), path, tap: None })
    }

    fn prepare(&mut self, host: usize) -> anyhow::Result<()> {
        let Self { hosts, net, .. } = self;
        let host = &mut hosts[host];
        host.tap = Some(host.space.run(|| host.path.prepare(net))?);
        Ok(())
    }

    fn start(&mut self, host: usize) -> anyhow::Result<()> {
        let tap = self.hosts[host].tap.as_ref().context("a tap was prepared")?;
        self.vmm = Some(Vmm::run(&self.guest, tap));
        Ok(())
    }

    /// Moves the machine as drafter does; it stands still for `blackout`. Returns how long it really
    /// did, and how long the first change at the agent took.
    fn move_machine(&mut self, blackout: Duration) -> anyhow::Result<(Duration, Duration)> {
        let (from, to) = (self.at, 1 - self.at);
        self.prepare(to)?;
        self.epoch += 1;
        let target = self.hosts[to].path.endpoint();
        let start = Instant::now();
        self.hosts[from].path.divert(&self.net, &target, self.epoch)?;
        let divert = start.elapsed();
        let stopped = Instant::now();
        self.vmm.take().context("the machine runs")?.pause();
        let tap = self.hosts[from].tap.take().context("it has a tap")?;
        self.hosts[from].path.pause(&self.net, &tap, &target, self.epoch)?;
        thread::sleep(blackout.saturating_sub(stopped.elapsed()));
        self.hosts[to].path.resume(&self.net, self.epoch)?;
        self.start(to)?;
        let stood = stopped.elapsed();
        self.at = to;
        self.hosts[from].path.settled(&self.net, self.epoch, SETTLE)?;
        drop(tap);
        self.hosts[from].path.forget(&self.net, self.epoch)?;
        Ok((stood, divert))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.vmm = None;
        for host in &mut self.hosts {
            let removed =
                host.agent.take().map(|agent| host.space.run(|| agent.remove_everything()));
            if let Some(Err(error)) = removed {
                tracing::warn!(%error, "a host was not cleaned up");
            }
        }
        let edge = self.edge.take();
        if let Some(Err(error)) = edge.map(|e| self.edge_space.run(|| e.remove_everything())) {
            tracing::warn!(%error, "the edge was not cleaned up");
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn gaps(quick: bool) -> anyhow::Result<Vec<Row>> {
    let moves = if quick { 2 } else { 20 };
    let folder = tempfile::tempdir()?;
    let mut fleet = Fleet::new(folder.path())?;
    let (mut rows, mut diverts) = (Vec::new(), Vec::new());
    for blackout in [100, 300, 1000] {
        let (mut added, mut again, mut lost) = (Vec::new(), Vec::new(), 0);
        for _ in 0..moves {
            let moved = one_move(&mut fleet, Duration::from_millis(blackout))?;
            added.push(moved.added * 1e3);
            again.push(moved.retransmits as f64);
            diverts.push(moved.divert * 1e6);
            lost += moved.lost;
        }
        let worst = added.iter().copied().fold(0.0, f64::max);
        let row = |what: &str, value, unit: &str, target| {
            Row::judged(&format!("conduit.gap.{blackout}ms | {what}"), value, unit, None, target)
        };
        rows.push(row(
            "TCP, beyond the blackout, median",
            median(&mut added),
            "ms",
            Some(Target::AtMost(10.0)),
        ));
        rows.push(row("TCP, beyond the blackout, worst", worst, "ms", None));
        rows.push(row(
            "TCP segments that the client sent again, median",
            median(&mut again),
            "segments",
            Some(Target::AtMost(5.0)),
        ));
        rows.push(row(
            "UDP at 1000 a second, lost",
            lost as f64,
            "datagrams",
            Some(Target::AtMost(0.0)),
        ));
    }
    rows.push(Row::judged(
        "conduit.flip.agent | asked over its socket, written down",
        median(&mut diverts),
        "us",
        None,
        None,
    ));
    Ok(rows)
}

struct Moved {
    /// Longest silence of the echo stream, less the blackout; seconds.
    added: f64,
    retransmits: u64,
    divert: f64,
    lost: u64,
}

fn one_move(fleet: &mut Fleet, blackout: Duration) -> anyhow::Result<Moved> {
    let public = |port| SocketAddr::from((PUBLIC, port));
    // The client's only: a real machine's clock stands still with it, this one's does not.
    let before = fleet.client.run(retransmits);
    let echoes = fleet.client.run(|| Echoes::start(public(7000)));
    let datagrams = fleet.client.run(|| Datagrams::start(public(7001)));
    echoes.wait(150);
    let (stood, divert) = fleet.move_machine(blackout)?;
    echoes.wait(150);
    let seen = echoes.finish();
    let (_, lost) = datagrams.finish(&fleet.received);
    ensure!(seen.sent == seen.answered, "echoes were lost: {seen:?}");
    let after = fleet.client.run(retransmits);
    Ok(Moved {
        added: seen.gap.saturating_sub(stood).as_secs_f64(),
        retransmits: after - before,
        divert: divert.as_secs_f64(),
        lost,
    })
}
