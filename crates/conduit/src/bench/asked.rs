//! What a flip costs whoever asks for it: a runner at its host's agent, and an agent at the edge, each
//! over its real connection, with one machine and with 10,000.

use super::Group;
use crate::{
    AgentDataPath, DataPath, HostEndpoint, MachineNet, PathChoice, PathKind,
    agent::{Agent, AgentConfig},
    book::{EdgeView, Place, RECORD_VERSION, Record, Wait},
    edge::{
        Edge, EdgeConfig, EdgeOptions,
        ledger::{ENTRY_VERSION, Entry},
    },
    lab::{Space, wait_for},
    secure::SecureConfig,
    store::Store,
    sys,
    wire::{self, EdgeSays, HostSays, Peer},
};
use anyhow::{bail, ensure};
use bench::{Row, Target};
use identity::{HostName, Security, Stream};
use std::{
    collections::BTreeSet,
    io::BufReader,
    net::Ipv4Addr,
    path::Path,
    time::{Duration, Instant},
};

pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "flip-agent",
        about: "a flip as a runner asks for it, over the agent's socket",
        bars: &["conduit.flip.agent"],
        run: at_the_agent,
    },
    Group {
        name: "flip-edge",
        about: "a flip as an agent asks for it, over its connection to the edge",
        bars: &["conduit.flip.edge", "conduit.flip.heap"],
        run: at_the_edge,
    },
];

const MANY: u16 = 10_000;
/// Flips before those that are measured. The bar is what a flip costs; the first ones cost what it takes
/// to wake processors from a deep sleep as well, and whichever row came first had that.
const WARM: u32 = 500;
const LIMIT: Duration = Duration::from_secs(5);
const A: Peer =
    Peer { overlay: Ipv4Addr::new(100, 64, 0, 2), underlay: Ipv4Addr::new(10, 88, 0, 2) };
const B: Peer =
    Peer { overlay: Ipv4Addr::new(100, 64, 0, 3), underlay: Ipv4Addr::new(10, 88, 0, 3) };

fn name(text: &str) -> anyhow::Result<HostName> {
    HostName::new(text).map_err(|e| anyhow::anyhow!("{e}"))
}

fn edge_config(folder: &Path) -> anyhow::Result<EdgeConfig> {
    Ok(EdgeConfig {
        public: Ipv4Addr::new(203, 0, 113, 1),
        this: Peer { overlay: Ipv4Addr::new(100, 64, 0, 1), underlay: Ipv4Addr::new(10, 88, 0, 1) },
        listen: "10.88.0.1:7450".parse()?,
        machines: (Ipv4Addr::new(10, 77, 0, 0), 16),
        options: EdgeOptions::default(),
        security: Security::Plaintext,
        secure: SecureConfig::off(),
        socket: folder.join("edge.sock"),
        state: folder.join("edge"),
        path: PathChoice::Bpf,
        pins: conduit_bpf::ROOT.into(),
        hold: None,
    })
}

/// An agent in this process, so that it can be given 10,000 machines at once; with one of its own.
struct Host {
    space: Space,
    agent: Agent,
    path: AgentDataPath,
}

impl Host {
    /// Of host a; the edge is told of host b as well.
    fn new(folder: &Path, edge: &Site) -> anyhow::Result<Self> {
        let space = Space::new()?;
        space.join("eth0", &edge.space, "to-a")?;
        edge.space.ip("address add 10.88.0.1/24 dev to-a\n")?;
        space.ip("address add 10.88.0.2/24 dev eth0\n")?;
        let socket = folder.join("agent.sock");
        let config = AgentConfig {
            announce: None,
            host: name("a")?,
            this: A,
            edge: edge.edge.listens_on(),
            edge_name: name("edge")?,
            more_edges: Vec::new(),
            security: Security::Plaintext,
            secure: SecureConfig::off(),
            socket: socket.clone(),
            state: folder.join("agent"),
            path: PathChoice::Bpf,
            pins: conduit_bpf::ROOT.into(),
            hold: None,
        };
        let agent = space.run(|| Agent::start(config))?;
        let joined = || crate::status(&socket).is_ok_and(|s| s.peers.len() == 2);
        ensure!(wait_for(LIMIT, joined), "the agent did not reach the edge");
        let path = AgentDataPath::connect(&socket)?;
        Ok(Self { space, agent, path })
    }
}

fn machine(number: u16) -> MachineNet {
    let [high, low] = number.to_be_bytes();
    let address = Ipv4Addr::new(10, 77, 64 + high, low);
    MachineNet::new(format!("m{number}"), address, [2, 0, 0, 0x78, high, low], 1400)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The median time of `flip` over these machines, each time at a newer epoch; microseconds.
fn measure(
    machines: u16,
    count: u32,
    epoch: &mut u64,
    mut flip: impl FnMut(&MachineNet, u64) -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let mut times = Vec::with_capacity(count as usize);
    for n in 0..count {
        *epoch += 1;
        // A step that is prime to the count: no order that a cache likes.
        let net = machine((n.wrapping_mul(7919) % u32::from(machines)) as u16);
        let start = Instant::now();
        flip(&net, *epoch)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(median(times))
}

/// The rows of one place.
fn rows(place: &str, what: &str, one: f64, many: f64, target: Option<Target>) -> Vec<Row> {
    vec![
        Row::judged(
            &format!("conduit.flip.{place} | {what}, one machine"),
            one,
            "us",
            None,
            target,
        ),
        Row::judged(
            &format!("conduit.flip.{place} | {what}, one of 10,000 machines"),
            many,
            "us",
            Some(one),
            Some(Target::RatioAtMost(1.5)),
        ),
    ]
}

fn at_the_agent(quick: bool) -> anyhow::Result<Vec<Row>> {
    let count = if quick { 300 } else { 3_000 };
    let folder = tempfile::tempdir()?;
    let (edge, _) = edge_with(folder.path(), 0)?;
    let host = Host::new(folder.path(), &edge)?;
    let (path, to) = (&host.path, HostEndpoint(B.overlay));
    let net = machine(0);
    let _tap = host.space.run(|| path.prepare(&net))?;
    let mut epoch = 1;
    let divert = |net: &MachineNet, epoch| Ok(path.divert(net, &to, epoch)?);
    measure(1, WARM, &mut epoch, divert)?;
    let one = measure(1, count, &mut epoch, divert)?;
    // There and back, as often: a failed move.
    let mut back = Vec::new();
    for n in 0..count + WARM {
        epoch += 1;
        path.divert(&net, &to, epoch)?;
        epoch += 1;
        let start = Instant::now();
        path.resume(&net, epoch)?;
        if n >= WARM {
            back.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    let rest = (1..MANY).map(|number| Record {
        version: RECORD_VERSION,
        net: machine(number),
        place: Place::Away { to: to.0 },
        epoch: 1,
        edge: EdgeView::Confirmed,
        retiring: false,
        wait: Wait::Tap,
        home: None,
    });
    host.agent.remember(rest.collect())?;
    measure(MANY, WARM, &mut epoch, divert)?;
    let many = measure(MANY, count, &mut epoch, divert)?;
    let known = host.agent.machines();
    ensure!(known >= usize::from(MANY), "the agent knows {known} machines");
    let mut all = rows("agent", "divert", one, many, Some(Target::AtMost(50.0)));
    all.push(Row::judged(
        "conduit.flip.agent | resume, one machine",
        median(back),
        "us",
        None,
        Some(Target::AtMost(50.0)),
    ));
    // Its machines have no taps that would be taken down one by one: those go with the namespace.
    let Host { space, agent, .. } = host;
    drop(agent);
    space.run(|| crate::sweep_pins(Path::new(crate::PINS)))?;
    edge.space.run(|| edge.edge.remove_everything())?;
    Ok(all)
}

/// An edge in a namespace of its own.
struct Site {
    space: Space,
    edge: Edge,
}

/// Starts an edge that has known `machines` before, all on host a. Returns what they take of the
/// heap, each, too.
fn edge_with(folder: &Path, machines: u16) -> anyhow::Result<(Site, f64)> {
    let (space, beyond) = (Space::new()?, Space::new()?);
    space.join("pub0", &beyond, "eth0")?;
    space.ip("address add 203.0.113.1/24 dev pub0\naddress add 10.88.0.1/32 dev lo\n")?;
    let config = edge_config(folder)?;
    let hosts = Store::open(&config.state.join("hosts"))?;
    for (name, peer) in [("a", A), ("b", B)] {
        let (overlay, underlay) = (peer.overlay, peer.underlay);
        let known = serde_json::json!({ "name": name, "overlay": overlay, "underlay": underlay });
        hosts.save(overlay, &known)?;
    }
    let store = Store::open(&config.state.join("machines"))?;
    for number in 0..machines {
        let (net, owner) = (machine(number), A.overlay);
        let (version, released, holder) = (ENTRY_VERSION, false, None);
        let entry = Entry { version, net, owner, epoch: 1, released, holder, home: None };
        store.save(entry.net.key(), &entry)?;
    }
    let before = sys::heap_in_use();
    let edge = space.run(|| Edge::start(config))?;
    let taken = sys::heap_in_use().saturating_sub(before);
    Ok((Site { space, edge }, taken as f64 / f64::from(machines.max(1))))
}

/// An agent's end of its connection to an edge.
struct Voice {
    reader: BufReader<identity::Reader>,
    writer: identity::Writer,
    id: u64,
}

impl Voice {
    fn join(at: &Site, host: &str, peer: Peer) -> anyhow::Result<Self> {
        let (to, edge) = (at.edge.listens_on(), name("edge")?);
        let stream = at.space.run(|| Stream::connect(to, &edge, &Security::Plaintext, LIMIT))?;
        stream.control().set_read_timeout(Some(LIMIT));
        let (reader, mut writer) = stream.split();
        let mut reader = BufReader::new(reader);
        let (version, path) = (wire::VERSION, PathKind::Bpf);
        wire::send(&mut writer, &HostSays::Hello { version, host: host.into(), peer, path })?;
        match wire::receive(&mut reader)? {
            Some(EdgeSays::Welcome { .. }) => Ok(Self { reader, writer, id: 0 }),
            other => bail!("no welcome but {other:?}"),
        }
    }

    /// Says who has a machine, and waits until the edge has done so.
    fn claim(&mut self, net: &MachineNet, owner: Ipv4Addr, epoch: u64) -> anyhow::Result<()> {
        self.id += 1;
        let say = HostSays::Claim { id: self.id, net: net.clone(), owner, epoch, home: None };
        wire::send(&mut self.writer, &say)?;
        loop {
            match wire::receive(&mut self.reader)? {
                Some(EdgeSays::Done { id }) if id == self.id => return Ok(()),
                Some(EdgeSays::Peers { .. }) => {}
                other => bail!("the edge answered {other:?}"),
            }
        }
    }
}

fn at_the_edge(quick: bool) -> anyhow::Result<Vec<Row>> {
    let count = if quick { 300 } else { 3_000 };
    let mut medians = Vec::new();
    let mut bytes = Vec::new();
    for machines in [1, MANY / 10, MANY] {
        let folder = tempfile::tempdir()?;
        let (at, each) = edge_with(folder.path(), machines)?;
        let mut voice = Voice::join(&at, "a", A)?;
        let mut epoch = 1;
        // A host gives a machine away, and takes it for itself again with a newer epoch.
        let mut away = BTreeSet::new();
        let mut flip = |net: &MachineNet, epoch: u64| {
            let here = away.remove(&net.address);
            if !here {
                away.insert(net.address);
            }
            voice.claim(net, if here { A.overlay } else { B.overlay }, epoch)
        };
        measure(machines, WARM, &mut epoch, &mut flip)?;
        medians.push(measure(machines, count, &mut epoch, &mut flip)?);
        bytes.push(each);
        let known = at.edge.machines();
        ensure!(known == usize::from(machines), "the edge knows {known} of {machines} machines");
        at.space.run(|| at.edge.remove_everything())?;
    }
    let mut all = rows("edge", "claim", medians[0], medians[2], None);
    all.push(Row::judged(
        "conduit.flip.heap | an edge's memory, a machine, of 10,000 next to 1,000",
        bytes[2],
        "bytes",
        Some(bytes[1]),
        Some(Target::RatioAtMost(1.1)),
    ));
    Ok(all)
}
