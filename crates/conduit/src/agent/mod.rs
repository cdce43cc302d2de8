//! The network agent of a host: keeps the book of machines' addresses, makes the kernel follow it,
//! and tells the edge.
//!
//! One per host, in the host's network namespace. Runners ask it over a unix socket
//! ([`crate::AgentDataPath`]); it dials the edge itself, so that a host needs no public address.
//!
//! What must hold: the kernel holds the data path, the state folder the book. So the agent may be
//! killed at any instruction and started again without a frame lost: at start everything written is
//! made again (which changes nothing that is so already). A caller that got no answer asks again with
//! the same epoch.
//!
//! A flip with BPF is written down by its entry in the pinned map, which outlives the agent as the
//! frames' way itself does; the file follows ([`crate::journal`]), and a start takes the entry's word
//! where it is newer ([`crate::recall`]). What no entry says (a new machine and its ports), and every
//! change with routes, is in its file before it is made in the kernel.

mod changes;
mod edges;
mod figures;
pub(crate) mod guests;
mod link;
mod server;

pub(crate) use server::{listen as listen_unix, spawn};

use crate::{
    announce::Announce,
    book::{Book, EdgeView, Place, RECORD_VERSION, Record},
    datapath::{MachineKey, NetworkId},
    exec::KernelError,
    holder::{HoldSettings, Keeper},
    homes::{EdgeAt, Words},
    host::HostNet,
    journal::Journal,
    metrics::{self, Changes},
    plane::{PathChoice, PathKind},
    recall::{self, Recalled},
    secure::{Ends, Note, Secure, SecureConfig},
    store::Store,
    wire::{self, MachineStatus, Peer, Status},
};
use identity::{HostName, Security};
use scrape::{Endpoint, EndpointError, Metrics};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Name of this host; under TLS the name in its certificate.
    pub host: HostName,
    /// Where this host is: its overlay address (unique in the fleet) and its own underlay address.
    pub this: Peer,
    /// Where the edge listens for agents.
    pub edge: SocketAddr,
    /// The name that the edge must prove under TLS.
    pub edge_name: HostName,
    /// Further edges of the fleet; those without a name prove `edge_name`.
    pub more_edges: Vec<EdgeAt>,
    /// How the connection to the edge is protected.
    pub security: Security,
    /// The unix socket to serve runners on.
    pub socket: PathBuf,
    /// The state folder.
    pub state: PathBuf,
    /// How frames find their way.
    pub path: PathChoice,
    /// Where what BPF needs is pinned, on a BPF file system.
    pub pins: PathBuf,
    /// How frames are held through long blackouts (needs BPF); `None`: they are not.
    pub hold: Option<HoldSettings>,
    /// How packets to other hosts are protected.
    pub secure: SecureConfig,
    /// How the network around is told which machines run here, if that is what leads their frames to this
    /// host (needs BPF); `None`: the edge does.
    pub announce: Option<Announce>,
}

/// How long a divert waits for the keys of the host that it leads to.
const KEYS_PATIENCE: Duration = Duration::from_secs(2);
/// How long `prepare` waits for the edge to be known, or to confirm an earlier move.
const PREPARE_PATIENCE: Duration = Duration::from_secs(3);

/// Where the connection to the edge stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum LinkState {
    Connecting { last_error: String },
    Up,
}

/// A host as remembered over a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KnownPeer {
    #[serde(flatten)]
    peer: Peer,
    edge: bool,
}

struct Core {
    book: Book,
    peers: BTreeMap<Ipv4Addr, Peer>,
    /// The edge of machines without a home: the only one, or the first that was heard.
    edge: Option<Peer>,
    /// Names of machines end with this, as the edge says.
    domain: Option<String>,
    /// The connections to edges, in the order of the settings.
    links: Vec<Link>,
    /// Which of them passes the next note on.
    turn: usize,
    /// What edges say of homes; nothing where there is one edge.
    words: Words,
    /// Who has answered the last word about a machine, and its epoch.
    answers: BTreeMap<MachineKey, (u64, BTreeSet<usize>)>,
}

/// The connection to one edge.
struct Link {
    state: LinkState,
    /// Addresses whose records changed since the thread that tells this edge last looked.
    news: BTreeSet<MachineKey>,
    /// What is to be asked of this edge.
    questions: VecDeque<link::Question>,
    /// The epoch that was last said to it of each machine, whether it has answered or not.
    said: BTreeMap<MachineKey, u64>,
    /// Overlay address of the edge that was last at its other end.
    edge: Option<Ipv4Addr>,
    /// What that edge says of encrypted packets.
    tunnels: Ends,
    /// What other ends of the tunnel are to be told by it.
    notes: VecDeque<(Ipv4Addr, Note)>,
}

/// How long the last word about a machine that leaves may take to leave too.
const SAY_LIMIT: Duration = Duration::from_millis(20);

/// How long what came while a machine stopped may take to follow what was in its tap, and how often that
/// is looked at.
const FOLLOW_LIMIT: Duration = Duration::from_millis(20);
const FOLLOW_LOOK: Duration = Duration::from_micros(200);

/// What the threads of an agent share.
struct Shared {
    host: Arc<HostNet>,
    keeper: Option<Keeper>,
    secure: Option<Arc<Secure>>,
    name: HostName,
    this: Peer,
    core: Mutex<Core>,
    /// Signalled on every change of `core` that somebody may wait for.
    changed: Condvar,
    /// Held while taps are made and removed, which takes milliseconds; never taken under `core`.
    taps: Mutex<()>,
    /// Guests are answered when they ask for names.
    answers_names: AtomicBool,
    machines: Journal<Record>,
    floors: Store,
    fleet: Store,
    homes: Store,
    changes: Changes<{ figures::OPERATIONS.len() }>,
    /// Nobody needs this agent any more.
    ended: AtomicBool,
}

/// A running agent. Its threads end with the process.
pub struct Agent {
    shared: Arc<Shared>,
    socket: PathBuf,
}

/// What is remembered of an address without a machine.
#[derive(Serialize, Deserialize)]
struct Floor {
    address: Ipv4Addr,
    #[serde(default)]
    network: NetworkId,
    epoch: u64,
}

impl Agent {
    /// Sets the host up, takes up what the last agent left, and serves. Must be called in the
    /// host's network namespace.
    pub fn start(mut config: AgentConfig) -> Result<Self, KernelError> {
        let secure = Secure::open(&config.secure, &mut config.this)?;
        let mut host = HostNet::open(Some(config.this), config.path, &config.pins)?;
        host.announce(config.announce.as_ref())?;
        let host = Arc::new(host);
        let machines = Journal::<Record>::open(&config.state.join("machines"))?;
        let floors = Store::open(&config.state.join("floors"))?;
        let fleet = Store::open(&config.state.join("fleet"))?;
        let homes = Store::open(&config.state.join("homes"))?;
        let first = EdgeAt { name: Some(config.edge_name.clone()), address: config.edge };
        let edges: Vec<EdgeAt> = std::iter::once(first).chain(config.more_edges).collect();
        edges::check(&edges, host.path())?;
        let mut core = Core {
            book: Book::default(),
            peers: BTreeMap::new(),
            edge: None,
            domain: None,
            links: edges.iter().map(|_| Link::new()).collect(),
            turn: 0,
            words: Words::new(),
            answers: BTreeMap::new(),
        };
        for floor in floors.load::<Floor>()? {
            let Floor { address, network, epoch } = floor;
            core.book.restore_floor(MachineKey { network, address }, epoch);
        }
        for known in fleet.load::<KnownPeer>()? {
            core.peers.insert(known.peer.overlay, known.peer);
            // Never the edge as a host first: for that moment its frames would be refused.
            if known.edge && core.edge.is_some() {
                host.let_edge_in(&known.peer)?;
            } else if known.edge {
                host.set_edge(&known.peer)?;
                core.edge = Some(known.peer);
            } else {
                host.set_peer(&known.peer)?;
            }
        }
        edges::take_up(&homes, &host, &mut core)?;
        let kernel = host.recall()?;
        for mut record in machines.load()? {
            if record.version > RECORD_VERSION {
                return Err(KernelError::new(
                    format!("read the state of machine \"{}\"", record.net.machine),
                    format!("it is of version {}, written by a newer agent", record.version),
                ));
            }
            let key = record.net.key();
            record = match recall::record(record, kernel.get(&key).copied()) {
                Recalled::AsWritten(record) => record,
                Recalled::Ahead(record) => {
                    machines.note(key, record.clone());
                    record
                }
                Recalled::Lost { floor } => {
                    tracing::warn!(address = %key, floor, "it is on a host that is not known here");
                    core.book.restore_floor(key, floor);
                    let MachineKey { network, address } = key;
                    floors.save(key, &Floor { network, address, epoch: floor })?;
                    machines.remove(key)?;
                    continue;
                }
            };
            if !record.retiring {
                host.ensure_tap(&record.net)?;
            }
            // Whoever was to say that the tap is drained may have said it to nobody.
            if record.edge == EdgeView::Held {
                record.edge = EdgeView::Pending;
            }
            host.apply(&record)?;
            tracing::info!(machine = record.net.machine, place = ?record.place, epoch = record.epoch,
                "machine taken up");
            core.book.restore(record);
        }
        // The kernel remembers what a lost state folder does not.
        for (key, known) in kernel {
            if core.book.get(key).is_none() {
                core.book.restore_floor(key, known.floor);
            }
        }
        let keeper = config.hold.filter(|_| host.path() == PathKind::Bpf).map(|settings| {
            let host = host.clone();
            let tell = move |tap| host.hold_in(Some(tap));
            Keeper::start(settings, &config.state, &config.pins, tell)
        });
        if keeper.is_none() {
            host.hold_in(None)?;
        }
        let shared = Arc::new(Shared {
            host,
            keeper,
            secure,
            name: config.host.clone(),
            this: config.this,
            core: Mutex::new(core),
            changed: Condvar::new(),
            taps: Mutex::new(()),
            answers_names: AtomicBool::new(false),
            machines,
            floors,
            fleet,
            homes,
            changes: Changes::of(figures::OPERATIONS),
            ended: AtomicBool::new(false),
        });
        edges::pass_notes(&shared);
        server::serve(&config.socket, shared.clone())?;
        guests::serve(&shared);
        for (number, edge) in edges.into_iter().enumerate() {
            let name = edge.name.unwrap_or_else(|| config.edge_name.clone());
            link::keep(number, edge.address, name, config.security.clone(), shared.clone());
        }
        Ok(Self { shared, socket: config.socket })
    }

    /// Everything there is to know, for people.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// Answers Prometheus on this address for as long as the endpoint lives.
    pub fn serve_metrics(&self, address: SocketAddr) -> Result<Endpoint, EndpointError> {
        let metrics = Metrics::new(metrics::ALL);
        metrics.add(self.shared.clone());
        Endpoint::start(address, metrics)
    }

    /// How many machines are in the book.
    pub(crate) fn machines(&self) -> usize {
        self.shared.core().book.records().count()
    }

    /// Takes up machines that are elsewhere and have no tap here any more; for benchmarks.
    pub(crate) fn remember(&self, records: Vec<Record>) -> Result<(), KernelError> {
        for record in records {
            self.shared.host.apply(&record)?;
            self.shared.core().book.restore(record);
        }
        Ok(())
    }

    /// Removes all that this host was set up with: traffic of its machines ends. Not done at a
    /// normal end, because the data path outlives its agent.
    pub fn remove_everything(&self) -> Result<(), KernelError> {
        let machines: Vec<_> = self.shared.core().book.records().map(|r| r.net.clone()).collect();
        for net in machines {
            self.shared.host.remove_tap(&net)?;
            self.shared.machines.remove(net.key())?;
        }
        if let Some(keeper) = &self.shared.keeper {
            keeper.stop()?;
        }
        self.shared.host.remove()?;
        self.shared.secure.as_ref().map_or(Ok(()), |secure| secure.remove())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // For those that are part of a larger process.
        self.shared.ended.store(true, Ordering::Release);
        self.shared.changed.notify_all();
        self.shared.host.end();
        if !self.shared.machines.flush() {
            tracing::warn!("some state files are behind; the kernel's maps say what they do not");
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Shared {
    fn core(&self) -> MutexGuard<'_, Core> {
        // Each change leaves the core consistent at every step, so a panic elsewhere does not.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What machines are told besides what is theirs.
    fn offer(&self) -> guests::Offer {
        guests::Offer {
            names: self.answers_names.load(Ordering::Relaxed),
            domain: self.core().domain.clone(),
        }
    }

    fn taps(&self) -> MutexGuard<'_, ()> {
        self.taps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` says so, at most until `deadline`. Returns the core in either case.
    fn wait<'a>(
        &'a self,
        mut core: MutexGuard<'a, Core>,
        deadline: Instant,
        ready: impl Fn(&Core) -> bool,
    ) -> MutexGuard<'a, Core> {
        while !ready(&core) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(core, left);
            core = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        core
    }

    fn drop_files(&self, key: MachineKey, epoch: u64) -> Result<(), KernelError> {
        let MachineKey { address, network } = key;
        self.floors.save(key, &Floor { address, network, epoch })?;
        self.machines.remove(key)
    }

    /// Takes the edge's word on who is in the overlay.
    fn set_fleet(&self, edge: Option<Peer>, peers: &[Peer]) -> Result<(), KernelError> {
        let mut core = self.core();
        let known = edge.into_iter().map(|peer| KnownPeer { peer, edge: true });
        let all = known.chain(peers.iter().map(|peer| KnownPeer { peer: *peer, edge: false }));
        for known in all.filter(|k| k.peer.overlay != self.this.overlay) {
            let peer = known.peer;
            let first = core.edge.is_none_or(|e| e.overlay == peer.overlay);
            if known.edge && (first || core.links.len() == 1) {
                self.host.set_edge(&peer)?;
                core.edge = Some(peer);
            } else if known.edge {
                self.host.let_edge_in(&peer)?;
            } else if core.is_edge(peer.overlay) {
                continue;
            } else {
                self.host.set_peer(&peer)?;
            }
            core.peers.insert(peer.overlay, peer);
            self.fleet.save(peer.overlay, &known)?;
        }
        drop(core);
        self.changed.notify_all();
        Ok(())
    }

    /// What programs and holder counted.
    fn counts(&self) -> BTreeMap<String, u64> {
        let mut counts = self.host.counts();
        counts.extend(self.keeper.iter().flat_map(Keeper::counts));
        counts
    }

    /// The machines after an address, as many as one answer holds.
    fn machines_after(&self, after: Option<wire::Cursor>) -> Vec<MachineStatus> {
        let core = self.core();
        let rest = core.book.records().filter(|r| Some(wire::cursor(&r.net)) > after);
        wire::page(rest.map(|r| MachineStatus {
            net: r.net.clone(),
            epoch: r.epoch,
            place: match r.place {
                Place::Candidate => "candidate".into(),
                Place::Here if r.retiring => "gone".into(),
                Place::Here => "here".into(),
                Place::Away { to } => to.to_string(),
            },
            edge: match &r.edge {
                EdgeView::Unasked => "unasked".into(),
                EdgeView::Held => "held".into(),
                EdgeView::Pending => "pending".into(),
                EdgeView::Confirmed => "confirmed".into(),
                EdgeView::Refused { error } => format!("refused: {error}"),
            },
            home: r.home.map(|home| home.edge),
        }))
    }

    fn status(&self) -> Status {
        let counts = self.counts();
        let pairs = self.secure.as_ref().map(|secure| secure.pairs()).unwrap_or_default();
        let machines = self.machines_after(None);
        let core = self.core();
        Status {
            role: "agent".into(),
            version: wire::VERSION,
            host: self.name.to_string(),
            peer: self.this,
            link: core.link(),
            homes: core.homes(),
            path: self.host.path(),
            protection: self.secure.as_ref().map(|s| s.describe().into()).unwrap_or_default(),
            counts,
            pairs,
            peers: core.peers.values().copied().collect(),
            silent: Vec::new(),
            machines,
            machine_count: core.book.records().count(),
        }
    }
}

impl std::fmt::Display for LinkState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Up => f.write_str("connected to the edge"),
            Self::Connecting { last_error } => write!(f, "no connection to the edge: {last_error}"),
        }
    }
}
