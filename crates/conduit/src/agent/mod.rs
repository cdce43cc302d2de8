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

mod figures;
mod link;
mod server;

pub(crate) use server::{listen as listen_unix, spawn};

use crate::{
    book::{Book, EdgeView, Forgotten, Place, RECORD_VERSION, Record, Wait},
    datapath::{MachineKey, MachineNet, NetError, NetworkId},
    exec::KernelError,
    holder::{HoldSettings, Keeper},
    host::HostNet,
    journal::Journal,
    metrics::{self, Changes},
    plane::{PathChoice, PathKind},
    recall::{self, Recalled},
    secure::{Secure, SecureConfig},
    store::Store,
    wire::{self, MachineStatus, Peer, Status},
};
use identity::{HostName, Security};
use scrape::{Endpoint, EndpointError, Metrics};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
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
}

/// A blackout that is expected to be longer is not left to the tap's queue, which the machine would
/// read at once.
const LONG_BLACKOUT: Duration = Duration::from_millis(200);

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
    /// Addresses whose records changed since the thread that tells the edge last looked.
    news: BTreeSet<MachineKey>,
    peers: BTreeMap<Ipv4Addr, Peer>,
    edge: Option<Peer>,
    link: LinkState,
    /// The epoch that was last said to the edge of each machine, whether it has answered or not.
    said: BTreeMap<MachineKey, u64>,
}

/// How long the last word about a machine that leaves may take to leave too.
const SAY_LIMIT: Duration = Duration::from_millis(20);

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
    machines: Journal<Record>,
    floors: Store,
    fleet: Store,
    changes: Changes<{ figures::OPERATIONS.len() }>,
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
        let host = Arc::new(HostNet::open(Some(config.this), config.path, &config.pins)?);
        let machines = Journal::<Record>::open(&config.state.join("machines"))?;
        let floors = Store::open(&config.state.join("floors"))?;
        let fleet = Store::open(&config.state.join("fleet"))?;
        let mut core = Core {
            book: Book::default(),
            news: BTreeSet::new(),
            peers: BTreeMap::new(),
            edge: None,
            link: LinkState::Connecting { last_error: "not tried yet".into() },
            said: BTreeMap::new(),
        };
        for floor in floors.load::<Floor>()? {
            let Floor { address, network, epoch } = floor;
            core.book.restore_floor(MachineKey { network, address }, epoch);
        }
        for known in fleet.load::<KnownPeer>()? {
            core.peers.insert(known.peer.overlay, known.peer);
            // Never the edge as a host first: for that moment its frames would be refused.
            if known.edge {
                host.set_edge(&known.peer)?;
                core.edge = Some(known.peer);
            } else {
                host.set_peer(&known.peer)?;
            }
        }
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
            machines,
            floors,
            fleet,
            changes: Changes::of(figures::OPERATIONS),
        });
        server::serve(&config.socket, shared.clone())?;
        link::keep(config.edge, config.edge_name, config.security, shared.clone());
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

    fn prepare(&self, net: &MachineNet, blackout: Option<Duration>) -> Result<String, NetError> {
        wire::check_machine(net)?;
        let operation = "prepare its network";
        if u32::from(net.mtu) > self.host.mtu() {
            return Err(NetError::failed(
                net,
                operation,
                format!(
                    "its MTU of {} does not fit this host's overlay ({}); give machines the \
                     smallest MTU of the fleet when they are created",
                    net.mtu,
                    self.host.mtu()
                ),
            ));
        }
        let _one_at_a_time = self.taps();
        let last = self.core().book.get(net.key()).map_or(0, |r| r.epoch);
        self.drained(net.key(), last);
        let moving_on = |core: &Core| {
            core.book
                .get(net.key())
                .is_some_and(|r| matches!(r.place, Place::Away { .. }) && r.edge_is_open())
        };
        let deadline = Instant::now() + PREPARE_PATIENCE;
        let ready = |core: &Core| core.edge.is_some() && !moving_on(core);
        let mut core = self.wait(self.core(), deadline, ready);
        if core.edge.is_none() {
            let detail = format!("this host has not reached its edge yet ({})", core.link);
            return Err(NetError::failed(net, operation, detail));
        }
        let long = blackout.is_some_and(|b| b > LONG_BLACKOUT);
        let wait = if long && self.host.holds() { Wait::Hold } else { Wait::Tap };
        // A rehearsal: is it refused? Then nothing is made.
        let before = core.book.get(net.key()).cloned();
        core.book.prepare(net, wait)?;
        core.book.undo(net.key(), before);
        drop(core);

        let fail = |e: KernelError| NetError::failed(net, operation, e);
        let name = self.host.ensure_tap(net).map_err(fail)?;
        self.change(net, operation, |book| book.prepare(net, wait).cloned())?;
        Ok(name)
    }

    fn divert(&self, net: &MachineNet, to: Ipv4Addr, epoch: u64) -> Result<(), NetError> {
        let operation = format!("send its frames to {to}");
        if to == self.this.overlay {
            return Err(NetError::failed(net, operation, "that is this host itself"));
        }
        if !self.core().peers.contains_key(&to) {
            let detail = "no such host is known here; is its agent connected to the same edge?";
            return Err(NetError::failed(net, operation, detail));
        }
        self.change(net, &operation, |book| book.divert(net, to, epoch).cloned())
    }

    /// The edge may be told of a divert.
    fn drained(&self, key: MachineKey, epoch: u64) {
        let mut core = self.core();
        // Not written down: a restart says it by itself.
        let Some(record) = core.book.drained(key, epoch).cloned() else { return };
        core.news.insert(key);
        let applied = self.host.apply(&record);
        drop(core);
        self.changed.notify_all();
        if let Err(error) = applied {
            tracing::warn!(machine = record.net.machine, %error, "its last frames may still leave");
        }
    }

    /// Waits a moment until the edge has been told what is pending: this host may be gone soon.
    fn say(&self, key: MachineKey, epoch: u64) {
        let said = |core: &Core| {
            core.link != LinkState::Up
                || core.said.get(&key).is_some_and(|&said| said >= epoch)
                || core.book.get(key).is_none_or(|r| r.edge != EdgeView::Pending)
        };
        drop(self.wait(self.core(), Instant::now() + SAY_LIMIT, said));
    }

    fn resume(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        self.change(net, "take its frames", |book| book.resume(net, epoch).cloned())
    }

    /// One change: decided by the book, written down, made in the kernel. A repeated call makes the
    /// kernel follow again. Whoever asked is answered next, and the others are told then
    /// ([`Shared::tell`]).
    fn change(
        &self,
        net: &MachineNet,
        operation: &str,
        decide: impl FnOnce(&mut Book) -> Result<Record, NetError>,
    ) -> Result<(), NetError> {
        let mut core = self.core();
        let before = core.book.get(net.key()).cloned();
        let record = decide(&mut core.book)?;
        let news = before.as_ref() != Some(&record);
        // What the entry in the kernel says need not be in the file yet.
        let entry_says_it = self.host.path() == PathKind::Bpf
            && before.as_ref().is_some_and(|b| b.net == record.net);
        if news
            && !entry_says_it
            && let Err(error) = self.machines.save(net.key(), &record)
        {
            core.book.undo(net.key(), before);
            return Err(NetError::failed(net, operation, error));
        }
        core.news.insert(net.key());
        let done = self.host.apply(&record);
        if news && entry_says_it {
            self.machines.note(net.key(), record);
        }
        done.map_err(|e| NetError::failed(net, operation, e))
    }

    /// After a change and its answer: wakes the threads that wait for one, that which tells the edge
    /// among them, and that which writes files.
    fn tell(&self, net: &MachineNet, done: bool) {
        self.changed.notify_all();
        self.machines.wake();
        if done && let Some(record) = self.core().book.get(net.key()) {
            let (place, epoch) = (record.place, record.epoch);
            tracing::info!(machine = net.machine, ?place, epoch, "way set");
        }
    }

    fn settled(&self, net: &MachineNet, epoch: u64, limit: Duration) -> Result<(), NetError> {
        let operation = format!("wait for the edge to confirm epoch {epoch}");
        let answer = |core: &Core| -> Option<Result<(), NetError>> {
            let floor = core.book.floor(net.key());
            let Some(record) = core.book.get(net.key()).filter(|r| r.epoch <= epoch) else {
                // Confirmed and forgotten, or overtaken.
                let last = floor == epoch || floor == epoch.saturating_add(1);
                let gone = core.book.get(net.key()).is_none() && floor > 0 && last;
                return Some(if gone {
                    Ok(())
                } else {
                    let (machine, asked) = (net.machine.clone(), epoch);
                    Err(NetError::StaleEpoch { machine, asked, current: floor })
                });
            };
            if record.epoch < epoch || record.edge == EdgeView::Unasked {
                let detail = "nothing was said with that epoch here";
                return Some(Err(NetError::failed(net, &operation, detail)));
            }
            match &record.edge {
                EdgeView::Confirmed => Some(Ok(())),
                EdgeView::Refused { error } => Some(Err(error.clone())),
                EdgeView::Held | EdgeView::Pending | EdgeView::Unasked => None,
            }
        };
        // A runner that was interrupted before it could say so says it now.
        self.drained(net.key(), epoch);
        let deadline = Instant::now() + limit;
        let core = self.wait(self.core(), deadline, |c| answer(c).is_some());
        answer(&core).unwrap_or_else(|| {
            let detail = format!(
                "no answer within {limit:?} ({}); frames are forwarded until it answers, so keep \
                 both hosts up",
                core.link
            );
            Err(NetError::failed(net, operation, detail))
        })
    }

    fn forget(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        let operation = "forget it";
        let fail = |e: KernelError| NetError::failed(net, operation, e);
        let _one_at_a_time = self.taps();
        let mut core = self.core();
        let floor = core.book.get(net.key()).map_or(0, Record::floor_after);
        let forgotten = core.book.forget(net, epoch)?;
        core.news.insert(net.key());
        match forgotten {
            Forgotten::Nothing => return Ok(()),
            Forgotten::Remove => {
                self.drop_files(net.key(), floor.max(epoch)).map_err(fail)?;
                self.host.unroute(net).map_err(fail)?;
            }
            Forgotten::KeepForwarding | Forgotten::RemoveAndRelease => {
                let record = core.book.get(net.key()).cloned();
                if let Some(record) = record {
                    self.machines.save(net.key(), &record).map_err(fail)?;
                    self.host.apply(&record).map_err(fail)?;
                }
            }
        }
        drop(core);
        self.changed.notify_all();
        tracing::info!(machine = net.machine, epoch, "machine forgotten");
        self.host.remove_tap(net).map_err(fail)
    }

    /// The edge answered about a machine.
    fn edge_answered(&self, key: MachineKey, epoch: u64, answer: Result<(), NetError>) {
        let mut core = self.core();
        let Some(record) = core.book.edge_answered(key, epoch, answer) else { return };
        core.news.insert(key);
        let saved = if record.retiring {
            self.drop_files(key, record.floor_after()).and_then(|()| self.host.unroute(&record.net))
        } else {
            self.machines.note(key, record.clone());
            Ok(())
        };
        drop(core);
        self.changed.notify_all();
        self.machines.wake();
        if let EdgeView::Refused { error } = &record.edge {
            tracing::warn!(machine = record.net.machine, epoch, %error, "the edge refused");
        }
        if let Err(error) = saved {
            // The edge is asked again after a restart, and answers the same.
            tracing::warn!(machine = record.net.machine, %error, "the edge's answer was not saved");
        }
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
            if known.edge {
                self.host.set_edge(&peer)?;
                core.edge = Some(peer);
            } else if core.edge.is_some_and(|e| e.overlay == peer.overlay) {
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

    fn set_link(&self, link: LinkState) {
        self.core().link = link;
        self.changed.notify_all();
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
        }))
    }

    fn status(&self) -> Status {
        let counts = self.counts();
        let machines = self.machines_after(None);
        let core = self.core();
        Status {
            role: "agent".into(),
            version: wire::VERSION,
            host: self.name.to_string(),
            peer: self.this,
            link: core.link.to_string(),
            path: self.host.path(),
            protection: self.secure.as_ref().map(|s| s.describe().into()).unwrap_or_default(),
            counts,
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
