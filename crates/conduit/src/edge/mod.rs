//! The edge: the address that clients see. Owns the public address, all translation, and one route
//! per machine to the host that has it; answers the hosts' agents.
//!
//! It outlives hosts and must not run on one that may be taken back. What must hold: translation
//! state and routes live in the kernel, the ledger in the state folder, so the process may be
//! killed and started again without a frame lost; an edge that lost its state folder as well
//! hears everything again from the agents.
//!
//! A move costs one change in the kernel's map here (with routes: a state file and a netlink request);
//! `nft` runs only when a machine or its ports are new. With BPF the state file follows
//! ([`crate::journal`]): the pinned map says meanwhile who has the machine, and a start takes its word
//! where it is newer ([`crate::recall`]).

mod addresses;
mod authority;
mod beside;
mod config;
mod drain;
mod ends;
mod figures;
mod forward;
mod fronts;
mod health;
mod lead;
pub mod ledger;
pub(crate) mod names;
mod nat;
mod others;
mod outside;
mod pool;
mod server;
mod words;

use crate::{
    agent::listen_unix,
    datapath::{MachineKey, MachineNet, NetError},
    exec::{self, KernelError},
    holder::Keeper,
    homes::Home,
    host::{
        MACHINES, forward, loosen_reverse_path_filter, machines_rule, open_plane, quiet_interface,
    },
    journal::Journal,
    metrics::{self, Changes},
    netlink::{Netlink, NextHop, Route},
    overlay,
    plane::{PathKind, Plane},
    recall::{self, Recalled},
    secure::Secure,
    store::Store,
    tunnel,
    wire::{self, MachineStatus, Peer, Status, TunnelEnd},
};
pub use config::{EdgeConfig, EdgeOptions};
pub use fronts::BesideConfig;

use authority::{Authority, Refusal};
use conduit_bpf::Role;
use config::{open_authority, open_fronts, open_pool, open_zone};
use forward::Forwarder;
use fronts::Fronts;
use health::Health;
use identity::{HostName, Security};
use ledger::{ENTRY_VERSION, Entry, Ledger, Rules};
use names::Zone;
use nat::Nat;
use pool::Pool;
pub use pool::{BadRange, Range};
use scrape::{Endpoint, EndpointError, Metrics};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::AtomicUsize},
    time::{Duration, Instant},
};

/// A host as remembered over a restart: its overlay address belongs to its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KnownHost {
    name: String,
    #[serde(flatten)]
    peer: Peer,
    /// How it is reached by encrypted packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tunnel: Option<TunnelEnd>,
}

/// A host that was prepared for a machine.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    by: Ipv4Addr,
    /// It expects a long blackout: when the machine leaves its owner, its frames are held here.
    long: bool,
}

/// Who will have a machine, and since when that is known.
#[derive(Clone, Debug)]
struct Expected {
    net: MachineNet,
    by: Ipv4Addr,
    since: Instant,
}

struct Core {
    ledger: Ledger,
    /// The addresses that were given to machines which came without.
    pool: Pool,
    hosts: BTreeMap<Ipv4Addr, KnownHost>,
    netlink: Netlink,
    /// The host that was prepared for a machine: the only one whose frames may run ahead of its
    /// claim.
    candidates: BTreeMap<MachineKey, Candidate>,
    /// The host whose frames are believed before its claim: the one that may have the machine next, said
    /// by whoever may say so.
    believed: BTreeMap<MachineKey, Ipv4Addr>,
    /// Machines whose frames are held until their owner itself has said that it has them, and since
    /// when.
    awaited: BTreeMap<MachineKey, Instant>,
    /// Machines that nobody has and somebody will have: their frames are held.
    expected: BTreeMap<MachineKey, Expected>,
    /// Addresses that the last edge expected machines at, until the hosts concerned have had the time to
    /// say so again.
    left_over: Vec<conduit_bpf::Key>,
    started: Instant,
    health: Health,
}

/// What the threads of an edge share.
struct Shared {
    this: Peer,
    public: Ipv4Addr,
    nat: Nat,
    authority: Authority,
    /// Words that had no effect, by the reason's name.
    refused: Mutex<BTreeMap<&'static str, u64>>,
    secure: Option<Arc<Secure>>,
    index: u32,
    plane: Option<Arc<Plane>>,
    keeper: Option<Keeper>,
    listen: SocketAddr,
    core: Mutex<Core>,
    machines: Journal<Entry>,
    hosts: Store,
    /// Who was given which address.
    addresses: Store,
    /// Held while an address is given, which takes a disk's time; never taken under `core`.
    giving: Mutex<()>,
    domain: String,
    zone: Zone,
    forwarder: Forwarder,
    changes: Changes<{ figures::OPERATIONS.len() }>,
    /// Agents that are connected.
    agents: AtomicUsize,
    lines: Arc<server::Agents>,
    security: Security,
    /// Where there are several edges.
    fronts: Option<Fronts>,
    /// Homes whose addresses this process has taken.
    announced: Mutex<BTreeSet<Ipv4Addr>>,
    me: Weak<Shared>,
}

/// A running edge. Its threads end with the process.
pub struct Edge {
    shared: Arc<Shared>,
    socket: PathBuf,
}

impl Edge {
    /// Sets this host up as an edge, takes up what the last one left, and serves. Must be called
    /// in the edge's network namespace.
    pub fn start(mut config: EdgeConfig) -> Result<Self, KernelError> {
        let authority = open_authority(&config)?;
        // The address first: it is what people get wrong.
        if config.options.beside.is_none() {
            nat::interface_of(config.public.into())?;
        }
        let secure = Secure::open(&config.secure, &mut config.this)?;
        let machines = Journal::<Entry>::open(&config.state.join("machines"))?;
        let hosts = Store::open(&config.state.join("hosts"))?;
        let addresses = Store::open(&config.state.join("addresses"))?;
        let (pool, zone) = (open_pool(&config)?, open_zone(&config)?);
        let unix = listen_unix(&config.socket)?;
        let listener = TcpListener::bind(config.listen)
            .map_err(|e| KernelError::new(format!("listen for agents on {}", config.listen), e))?;
        let listen = listener
            .local_addr()
            .map_err(|e| KernelError::new(format!("listen for agents on {}", config.listen), e))?;

        forward()?;
        loosen_reverse_path_filter()?;
        let plane = open_plane(config.path, config.this, Role::Edge, &config.pins)?;
        let index = match &plane {
            Some(plane) => plane.tunnel().index,
            None => {
                let (index, _) = overlay::ensure(config.this.overlay, config.this.underlay)?;
                quiet_interface(overlay::INTERFACE)?;
                index
            }
        };
        let mut netlink = Netlink::open()?;
        netlink.ensure_rule(&machines_rule())?;
        if plane.is_some() {
            // All machines are behind the tunnel; which host each is on, its program knows.
            let (to, prefix) = config.machines;
            let next = NextHop::Gateway(tunnel::NEXT_HOP.into(), index);
            netlink.replace_route(&Route { table: MACHINES, to: to.into(), prefix, next })?;
            if let Some(v6) = config.options.machines_v6 {
                let next = NextHop::Gateway(tunnel::NEXT_HOP_V6.into(), index);
                let (to, prefix) = (v6.address(), v6.bits());
                netlink.replace_route(&Route { table: MACHINES, to, prefix, next })?;
            }
        }
        let interface = if plane.is_some() { tunnel::INTERFACE } else { overlay::INTERFACE };
        let nat = Nat::find(config.this.overlay, config.public, &config.options, interface)?;
        let fronts = open_fronts(&config, plane.is_some())?;

        let rules = Rules {
            machines: config.machines,
            machines_v6: config.options.machines_v6,
            routed_v6: config.options.public_v6.is_none(),
            spare: config.options.spare.iter().copied().collect(),
            reserved: BTreeSet::from([listen.port()]),
        };
        let (ledger, known) = (Ledger::new(rules), BTreeMap::new());
        let health = Health::new(config.hold.as_ref().map_or(Duration::ZERO, |h| h.limits.age));
        let core = Core {
            ledger,
            pool,
            hosts: known,
            netlink,
            candidates: BTreeMap::new(),
            believed: BTreeMap::new(),
            awaited: BTreeMap::new(),
            expected: BTreeMap::new(),
            left_over: plane.as_ref().map_or(Ok(Vec::new()), |p| p.expected())?,
            started: Instant::now(),
            health,
        };
        let keeper = config.hold.zip(plane.clone()).map(|(settings, plane)| {
            let tell = move |tap| plane.set_hold(Some(tap));
            Keeper::start(settings, &config.state, &config.pins, tell)
        });
        if let (None, Some(plane)) = (&keeper, &plane) {
            plane.set_hold(None)?;
        }
        let shared = Arc::new_cyclic(|me| Shared {
            me: me.clone(),
            lines: Arc::default(),
            security: config.security.clone(),
            fronts,
            announced: Mutex::default(),
            this: config.this,
            public: config.public,
            nat,
            authority,
            secure,
            refused: Mutex::default(),
            index,
            plane,
            keeper,
            listen,
            core: Mutex::new(core),
            machines,
            hosts,
            addresses,
            giving: Mutex::new(()),
            domain: config.options.domain,
            zone,
            forwarder: Forwarder::start(config.options.name_servers),
            changes: Changes::of(figures::OPERATIONS),
            agents: AtomicUsize::new(0),
        });
        shared.take_up_homes()?;
        shared.take_up()?;
        // A move reorders a few segments; without this, those at the edge of a window count as
        // invalid and are not translated. The file appears with the first rule that needs it.
        if let Err(error) = exec::sysctl("net/netfilter/nf_conntrack_tcp_be_liberal", "1") {
            tracing::warn!(%error, "connection tracking stays strict");
        }
        ends::pass_notes(&shared);
        fronts::begin(&shared);
        server::serve(listener, unix, config.security, &shared);
        beside::keep(&shared);
        Ok(Self { shared, socket: config.socket })
    }

    /// Everything there is to know, for people.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// Where agents connect.
    #[must_use]
    pub fn listens_on(&self) -> SocketAddr {
        self.shared.listen
    }

    /// Answers Prometheus on this address for as long as the endpoint lives.
    pub fn serve_metrics(&self, address: SocketAddr) -> Result<Endpoint, EndpointError> {
        let metrics = Metrics::new(metrics::ALL);
        metrics.add(self.shared.clone());
        Endpoint::start(address, metrics)
    }

    /// How many machines exist.
    pub(crate) fn machines(&self) -> usize {
        self.shared.core().ledger.machines().count()
    }

    /// Removes all that this host was set up with: connections through it end. Not done at a
    /// normal end.
    pub fn remove_everything(&self) -> Result<(), KernelError> {
        if let Some(fronts) = &self.shared.fronts {
            let _changing = fronts.changing();
            fronts.stop();
            for word in fronts.words() {
                self.shared.leave(fronts, &word)?;
            }
        }
        nat::remove()?;
        let mut core = self.shared.core();
        for route in core.netlink.routes(MACHINES)? {
            core.netlink.delete_route(MACHINES, route.to, route.prefix)?;
        }
        while core.netlink.delete_rule(&machines_rule())? {}
        if let Some(keeper) = &self.shared.keeper {
            keeper.stop()?;
        }
        if let Some(plane) = &self.shared.plane {
            plane.remove()?;
        }
        overlay::remove()?;
        self.shared.secure.as_ref().map_or(Ok(()), |secure| secure.remove())
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        // For those that are part of a larger process.
        if let Some(plane) = &self.shared.plane {
            plane.end();
        }
        if !self.shared.machines.flush() {
            tracing::warn!("some state files are behind; the kernel's maps say what they do not");
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Core {
    /// The name of a host, empty for one that never connected.
    fn name(&self, host: Ipv4Addr) -> &str {
        self.hosts.get(&host).map_or("", |h| &h.name)
    }
}

impl From<NetError> for Refusal {
    fn from(error: NetError) -> Self {
        Self::Final(error)
    }
}

impl Shared {
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self) -> PathKind {
        if self.plane.is_some() { PathKind::Bpf } else { PathKind::Routes }
    }

    /// Makes again what the state folder says, which changes nothing that is so already.
    fn take_up(&self) -> Result<(), KernelError> {
        let mut core = self.core();
        for host in self.hosts.load::<KnownHost>()? {
            self.reach(&mut core, &host.peer)?;
            core.hosts.insert(host.peer.overlay, host);
        }
        self.tell_tunnel(&core)?;
        let kernel = match &self.plane {
            Some(plane) => plane.recall()?,
            None => BTreeMap::new(),
        };
        // What was led here while this was the only edge stays here.
        let first = self.fronts.as_ref().is_some_and(Fronts::is_new);
        let own = first.then_some(Home { edge: self.this.overlay, since: 0 });
        for entry in self.machines.load()? {
            if entry.version > ENTRY_VERSION {
                return Err(KernelError::new(
                    format!("read the state of machine \"{}\"", entry.net.machine),
                    format!("it is of version {}, written by a newer edge", entry.version),
                ));
            }
            let (key, before) = (entry.net.key(), entry.clone());
            let entry = match recall::entry(entry, kernel.get(&key).copied()) {
                Recalled::AsWritten(entry) => entry,
                Recalled::Ahead(entry) => {
                    self.machines.note(key, entry.clone());
                    entry
                }
                Recalled::Lost { floor } => {
                    tracing::warn!(address = %key, floor, "it is on a host that is not known here");
                    core.ledger.restore(Entry { epoch: floor, released: true, ..before });
                    continue;
                }
            };
            let mut entry = entry;
            if entry.home.is_none() && own.is_some() {
                entry.home = own;
                self.machines.save(key, &entry)?;
            }
            if !entry.released {
                // What the last edge held back stays held until its host has spoken.
                if self.plane.as_ref().is_some_and(|p| p.is_held_back(&entry.net)) {
                    core.awaited.insert(entry.net.key(), Instant::now());
                }
                self.lead(&mut core, &entry)?;
            }
            core.ledger.restore(entry);
        }
        self.take_up_addresses(&mut core)?;
        self.nat.start(core.ledger.machines())
    }

    /// A host says where it is.
    fn join(&self, name: &HostName, peer: Peer) -> Result<(), String> {
        let mut core = self.core();
        if peer.overlay == self.this.overlay || peer.underlay == self.this.underlay {
            return Err(format!("host {name}: {} is the edge's own address", peer.overlay));
        }
        self.check_encryption(peer).map_err(|e| format!("host {name}: {e}"))?;
        let tunnel = core.hosts.get(&peer.overlay).and_then(|h| h.tunnel.clone());
        let host = KnownHost { name: name.to_string(), peer, tunnel };
        if let Some(known) = core.hosts.get(&peer.overlay)
            && known.name != host.name
        {
            return Err(format!(
                "host {name}: the overlay address {} belongs to host \"{}\"; give each host \
                 its own, or remove hosts/{}.json from the edge's state and restart it",
                peer.overlay, known.name, peer.overlay
            ));
        }
        if core.hosts.get(&peer.overlay) != Some(&host) {
            let fail = |e: KernelError| format!("host {name}: {e}");
            self.hosts.save(peer.overlay, &host).map_err(fail)?;
            self.reach(&mut core, &peer).map_err(fail)?;
            core.hosts.insert(peer.overlay, host);
            tracing::info!(host = %name, overlay = %peer.overlay, underlay = %peer.underlay, "host joined");
        }
        drop(core);
        self.heard(peer.overlay);
        Ok(())
    }

    fn peers(&self) -> Vec<Peer> {
        self.core().hosts.values().map(|h| h.peer).collect()
    }

    /// What programs, rules, holder and listeners counted, by name.
    fn counts(&self) -> BTreeMap<String, u64> {
        let mut counts = self.plane.as_ref().map(|p| p.counts()).unwrap_or_default();
        counts.extend(self.keeper.iter().flat_map(Keeper::counts));
        counts.extend(Nat::counts());
        counts.extend(self.refused().iter().map(|(name, n)| ((*name).to_owned(), *n)));
        counts.extend(self.fronts.iter().flat_map(Fronts::counts));
        counts
    }

    /// The machines after an address, as many as one answer holds.
    fn machines_after(&self, after: Option<wire::Cursor>) -> Vec<MachineStatus> {
        let core = self.core();
        let rest = core.ledger.machines().filter(|e| Some(wire::cursor(&e.net)) > after);
        wire::page(rest.map(|e| MachineStatus {
            net: e.net.clone(),
            epoch: e.epoch,
            place: e.owner.to_string(),
            edge: String::new(),
            home: e.home.map(|home| home.edge),
        }))
    }

    fn status(&self) -> Status {
        let counts = self.counts();
        let pairs = self.secure.as_ref().map(|secure| secure.pairs()).unwrap_or_default();
        let machines = self.machines_after(None);
        let core = self.core();
        Status {
            homes: self.fronts.as_ref().map_or_else(Vec::new, |f| f.status(&core)),
            role: "edge".into(),
            version: wire::VERSION,
            host: String::new(),
            peer: self.this,
            path: self.path(),
            protection: self.secure.as_ref().map(|s| s.describe().into()).unwrap_or_default(),
            counts,
            pairs,
            link: format!("agents connect to {}, clients to {}", self.listen, self.public),
            peers: core.hosts.values().map(|h| h.peer).collect(),
            silent: core.health.silent(),
            machines,
            machine_count: core.ledger.machines().count(),
        }
    }
}
