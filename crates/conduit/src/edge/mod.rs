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

mod authority;
mod figures;
mod health;
pub mod ledger;
mod nat;
mod server;
mod words;

use crate::{
    agent::listen_unix,
    datapath::{MachineKey, MachineNet, NetError},
    exec::{self, KernelError},
    holder::{HoldSettings, Keeper},
    host::{
        MACHINES, forward, loosen_reverse_path_filter, machines_rule, open_plane, quiet_interface,
    },
    journal::Journal,
    metrics::{self, Changes},
    netlink::{Netlink, NextHop, Route},
    overlay,
    plane::{PathChoice, PathKind, Plane},
    policy::Prefix,
    recall::{self, Recalled},
    secure::{self, Secure, SecureConfig},
    store::Store,
    tunnel,
    wire::{self, MachineStatus, Peer, Status, TunnelEnd},
};
use authority::{Authority, Refusal};
use conduit_bpf::Role;
use health::{Health, Signs, Treatment};
use identity::{HostName, Security};
use lease::FileStore;
use ledger::{ENTRY_VERSION, Entry, Ledger, Rules};
use nat::Nat;
use scrape::{Endpoint, EndpointError, Metrics};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicUsize},
    time::{Duration, Instant},
};

/// How an edge is started.
#[derive(Clone, Debug)]
pub struct EdgeConfig {
    /// The address that clients use; one of this host's own.
    pub public: Ipv4Addr,
    /// Where the edge is in the overlay, and the underlay address that hosts reach it by.
    pub this: Peer,
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Machines have addresses in this network.
    pub machines: (Ipv4Addr, u8),
    /// What not every edge has.
    pub options: EdgeOptions,
    /// How connections of agents are protected.
    pub security: Security,
    /// The unix socket for status.
    pub socket: PathBuf,
    /// The state folder.
    pub state: PathBuf,
    /// How frames find their way.
    pub path: PathChoice,
    /// Where what BPF needs is pinned, on a BPF file system.
    pub pins: PathBuf,
    /// How frames are held while no host has their machine (needs BPF); `None`: they are not.
    pub hold: Option<HoldSettings>,
    /// How packets to hosts are protected.
    pub secure: SecureConfig,
}

/// What not every edge has.
#[derive(Clone, Debug)]
pub struct EdgeOptions {
    /// Machines have IPv6 addresses in this network.
    pub machines_v6: Option<Prefix>,
    /// The IPv6 address that clients use, one of this host's own. Without it machines' addresses are seen
    /// as they are: the network outside leads their prefix to this edge.
    pub public_v6: Option<Ipv6Addr>,
    /// Addresses of this host that a machine may have whole.
    pub spare: Vec<IpAddr>,
    /// Tracked connections that the machines of one network may have.
    pub flows_per_network: u32,
    /// The folder of leases: where it is given, only a machine's lease says who leads its frames.
    pub lease: Option<PathBuf>,
}

impl Default for EdgeOptions {
    fn default() -> Self {
        Self {
            machines_v6: None,
            public_v6: None,
            spare: Vec::new(),
            flows_per_network: 16_384,
            lease: None,
        }
    }
}

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
    changes: Changes<{ figures::OPERATIONS.len() }>,
    /// Agents that are connected.
    agents: AtomicUsize,
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
        nat::interface_of(config.public.into())?;
        let secure = Secure::open(&config.secure, &mut config.this)?;
        let machines = Journal::<Entry>::open(&config.state.join("machines"))?;
        let hosts = Store::open(&config.state.join("hosts"))?;
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
        let nat = Nat::find(config.public, &config.options, interface)?;

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
        let shared = Shared {
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
            changes: Changes::of(figures::OPERATIONS),
            agents: AtomicUsize::new(0),
        };
        shared.take_up()?;
        // A move reorders a few segments; without this, those at the edge of a window count as
        // invalid and are not translated. The file appears with the first rule that needs it.
        if let Err(error) = exec::sysctl("net/netfilter/nf_conntrack_tcp_be_liberal", "1") {
            tracing::warn!(%error, "connection tracking stays strict");
        }
        let shared = Arc::new(shared);
        server::serve(listener, unix, config.security, &shared);
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

/// How long a lease's lock may be waited for; holders write one small file.
const LEASE_LIMIT: Duration = Duration::from_millis(500);

fn open_authority(config: &EdgeConfig) -> Result<Authority, KernelError> {
    if let Some(folder) = &config.options.lease {
        let store = FileStore::open(folder, LEASE_LIMIT)
            .map_err(|e| KernelError::new(format!("read leases in {}", folder.display()), e))?;
        return Ok(Authority::Lease(Box::new(store)));
    }
    tracing::warn!("no leases to read (--lease): any host of the fleet may take any machine");
    Ok(Authority::Fleet)
}

impl Drop for Edge {
    fn drop(&mut self) {
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
            if !entry.released {
                // What the last edge held back stays held until its host has spoken.
                if self.plane.as_ref().is_some_and(|p| p.is_held_back(&entry.net)) {
                    core.awaited.insert(entry.net.key(), Instant::now());
                }
                self.lead(&mut core, &entry)?;
            }
            core.ledger.restore(entry);
        }
        self.nat.start(core.ledger.machines())
    }

    /// Makes a host reachable.
    fn reach(&self, core: &mut Core, peer: &Peer) -> Result<(), KernelError> {
        match &self.plane {
            Some(plane) => plane.set_peer(peer, Role::Host),
            None => overlay::set_peer(&mut core.netlink, self.index, peer),
        }
    }

    /// Leads a machine's frames to the host that has it.
    fn lead(&self, core: &mut Core, entry: &Entry) -> Result<(), KernelError> {
        let Entry { net, owner, epoch, .. } = entry;
        // Where one is announced, no other's newer epoch is believed.
        let only_owner = (!self.authority.believes_strangers()).then_some(*owner);
        let candidate = core.believed.get(&net.key()).copied().or(only_owner);
        let awaited = core.awaited.contains_key(&net.key()).then_some(Treatment::Hold);
        match &self.plane {
            Some(plane) => match core.health.treatment(*owner).or(awaited) {
                Some(Treatment::Hold) if plane.holds() => {
                    plane.hold(net, *owner, *epoch, candidate)
                }
                Some(Treatment::Drop) if plane.holds() => plane.drop_frames(net, *owner, *epoch),
                _ => plane.remote(net, *owner, *epoch, false, candidate),
            },
            None => {
                let next = NextHop::Gateway(entry.owner.into(), self.index);
                core.netlink.replace_route(&Route::host(MACHINES, entry.net.address, next))
            }
        }
    }

    /// Judges hosts by their signs of life; what changes for their machines is made so.
    fn judge_hosts(&self, signs: &BTreeMap<Ipv4Addr, Vec<Signs>>, now: Instant) {
        let mut core = self.core();
        let bound = core.health.bound();
        let late = |e: &Expected| now.saturating_duration_since(e.since) > bound;
        let late: Vec<_> =
            core.expected.iter().filter(|(_, e)| late(e)).map(|(&address, _)| address).collect();
        for address in late {
            tracing::warn!(%address, "nobody has come to have it: its frames are not held any more");
            if let Err(error) = self.expect_no_more(&mut core, address) {
                tracing::warn!(%address, %error, "they are held all the same");
            }
        }
        if now.saturating_duration_since(core.started) > bound
            && let Some(plane) = &self.plane
        {
            let left_over = std::mem::take(&mut core.left_over);
            let expected = core.expected.values().map(|e| &e.net);
            if let Err(error) = plane.expect_only(&left_over, expected) {
                tracing::warn!(%error, "frames are held for nobody");
            }
        }
        let Core { awaited, ledger, .. } = &mut *core;
        let late: Vec<Entry> = awaited
            .extract_if(.., |_, since| now.saturating_duration_since(*since) > bound)
            .filter_map(|(address, _)| ledger.get(address).filter(|e| !e.released).cloned())
            .collect();
        self.lead_each(&mut core, &late);
        for host in core.health.judge(signs, now) {
            let name = core.hosts.get(&host).map_or("", |h| &h.name).to_owned();
            match core.health.treatment(host) {
                Some(Treatment::Hold) => {
                    tracing::warn!(host = name, "silent: frames for its machines are held");
                }
                Some(Treatment::Drop) => {
                    tracing::warn!(
                        host = name,
                        "still silent: frames for its machines are dropped"
                    );
                }
                None => tracing::info!(host = name, "speaks again"),
            }
            self.lead_all(&mut core, host);
        }
    }

    /// A host has said something.
    fn heard(&self, host: Ipv4Addr) {
        let mut core = self.core();
        if core.health.heard(host) {
            let name = core.hosts.get(&host).map_or("", |h| &h.name);
            tracing::info!(host = name, "speaks again: what was held goes there");
            self.lead_all(&mut core, host);
        }
    }

    /// Leads all machines of a host (again).
    fn lead_all(&self, core: &mut Core, host: Ipv4Addr) {
        let entries: Vec<Entry> =
            core.ledger.machines().filter(|e| e.owner == host).cloned().collect();
        self.lead_each(core, &entries);
    }

    fn lead_each(&self, core: &mut Core, entries: &[Entry]) {
        for entry in entries {
            if let Err(error) = self.lead(core, entry) {
                tracing::warn!(machine = entry.net.machine, %error, "its way stays as it was");
            }
        }
    }

    /// Leads a machine's frames nowhere.
    fn mislead(&self, core: &mut Core, net: &MachineNet) -> Result<(), KernelError> {
        core.candidates.remove(&net.key());
        core.believed.remove(&net.key());
        core.awaited.remove(&net.key());
        match &self.plane {
            Some(plane) => plane.forget(net),
            None => core.netlink.delete_route(MACHINES, net.address, 32).map(drop),
        }
    }

    /// A host says where it is.
    fn join(&self, name: &HostName, peer: Peer) -> Result<(), String> {
        let mut core = self.core();
        if peer.overlay == self.this.overlay || peer.underlay == self.this.underlay {
            return Err(format!("host {name}: {} is the edge's own address", peer.overlay));
        }
        // Inside the tunnel, every host has the address that goes with its overlay address.
        let inside = peer.underlay == secure::address(peer.overlay);
        if inside != self.secure.is_some() {
            let (its, ours) = if inside { ("", " not") } else { (" not", "") };
            return Err(format!(
                "host {name}: its packets are{its} encrypted, this edge's are{ours}; start all \
                 hosts and edges with the same --encrypt"
            ));
        }
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

    /// A host says how it is reached by encrypted packets.
    fn join_tunnel(&self, by: Ipv4Addr, tunnel: TunnelEnd) -> Result<(), String> {
        let mut core = self.core();
        let same = |end: &TunnelEnd| end.keys.iter().any(|k| tunnel.keys.contains(k));
        let another = core.hosts.values().find(|h| {
            let shares = h.tunnel.as_ref().is_some_and(same);
            let address = secure::address(h.peer.overlay) == secure::address(by);
            h.peer.overlay != by && (shares || address)
        });
        if let Some(another) = another {
            return Err(format!(
                "host \"{}\" has the same key, or the same low 17 bits of its overlay address",
                another.name
            ));
        }
        if tunnel.keys.is_empty() || tunnel.keys.len() > 2 {
            return Err(format!("{} keys are not one or two", tunnel.keys.len()));
        }
        let host = core.hosts.get_mut(&by).ok_or("it has not said hello")?;
        host.tunnel = Some(tunnel);
        let saved = self.hosts.save(by, host);
        self.tell_tunnel(&core).and(saved).map_err(|e| e.to_string())
    }

    /// Everybody's ends, this edge's included.
    fn tunnels(&self, core: &Core) -> BTreeMap<Ipv4Addr, TunnelEnd> {
        let hosts = core.hosts.values().filter_map(|h| Some((h.peer.overlay, h.tunnel.clone()?)));
        let own = self.secure.iter().map(|secure| (self.this.overlay, secure.this()));
        hosts.chain(own).collect()
    }

    fn tell_tunnel(&self, core: &Core) -> Result<(), KernelError> {
        let Some(secure) = &self.secure else { return Ok(()) };
        secure.set_peers(self.tunnels(core))
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
        }))
    }

    fn status(&self) -> Status {
        let counts = self.counts();
        let machines = self.machines_after(None);
        let core = self.core();
        Status {
            role: "edge".into(),
            version: wire::VERSION,
            host: String::new(),
            peer: self.this,
            path: self.path(),
            protection: self.secure.as_ref().map(|s| s.describe().into()).unwrap_or_default(),
            counts,
            link: format!("agents connect to {}, clients to {}", self.listen, self.public),
            peers: core.hosts.values().map(|h| h.peer).collect(),
            silent: core.health.silent(),
            machines,
            machine_count: core.ledger.machines().count(),
        }
    }
}
