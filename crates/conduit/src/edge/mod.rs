//! The edge: the address that clients see. Owns the public address, all translation, and one route
//! per machine to the host that has it; answers the hosts' agents.
//!
//! It outlives hosts and must not run on one that may be taken back. What must hold: translation
//! state and routes live in the kernel, the ledger in the state folder, so the process may be
//! killed and started again without a frame lost; an edge that lost its state folder as well
//! hears everything again from the agents.
//!
//! A move costs one state file and one netlink request here; `nft` runs only when a machine or its
//! ports are new.

mod health;
pub mod ledger;
mod nat;
mod server;

use crate::{
    agent::listen_unix,
    datapath::{MachineNet, NetError},
    exec::{self, KernelError},
    holder::{HoldSettings, Keeper},
    host::{MACHINES, loosen_reverse_path_filter, machines_rule, open_plane, quiet_interface},
    netlink::{Netlink, NextHop, Route},
    overlay,
    plane::{PathChoice, PathKind, Plane},
    store::Store,
    tunnel,
    wire::{self, MachineStatus, Peer, Status},
};
use conduit_bpf::Role;
use health::{Health, Signs, Treatment};
use identity::{HostName, Security};
use ledger::{Change, ENTRY_VERSION, Entry, Ledger, Rules};
use nat::Outside;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
}

/// A host as remembered over a restart: its overlay address belongs to its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KnownHost {
    name: String,
    #[serde(flatten)]
    peer: Peer,
}

/// A host that was prepared for a machine.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    by: Ipv4Addr,
    /// It expects a long blackout: when the machine leaves its owner, its frames are held here.
    long: bool,
}

/// Who will have a machine, and since when that is known.
#[derive(Clone, Copy, Debug)]
struct Expected {
    by: Ipv4Addr,
    since: Instant,
}

struct Core {
    ledger: Ledger,
    hosts: BTreeMap<Ipv4Addr, KnownHost>,
    netlink: Netlink,
    /// The host that was prepared for a machine: the only one whose frames may run ahead of its
    /// claim.
    candidates: BTreeMap<Ipv4Addr, Candidate>,
    /// Machines whose frames are held until their owner itself has said that it has them, and since
    /// when.
    awaited: BTreeMap<Ipv4Addr, Instant>,
    /// Machines that nobody has and somebody will have: their frames are held.
    expected: BTreeMap<Ipv4Addr, Expected>,
    health: Health,
}

/// What the threads of an edge share.
struct Shared {
    this: Peer,
    outside: Outside,
    index: u32,
    plane: Option<Arc<Plane>>,
    keeper: Option<Keeper>,
    listen: SocketAddr,
    core: Mutex<Core>,
    machines: Store,
    hosts: Store,
}

/// A running edge. Its threads end with the process.
pub struct Edge {
    shared: Arc<Shared>,
    socket: PathBuf,
}

impl Edge {
    /// Sets this host up as an edge, takes up what the last one left, and serves. Must be called
    /// in the edge's network namespace.
    pub fn start(config: EdgeConfig) -> Result<Self, KernelError> {
        let outside = Outside::find(config.public)?;
        let machines = Store::open(&config.state.join("machines"))?;
        let hosts = Store::open(&config.state.join("hosts"))?;
        let unix = listen_unix(&config.socket)?;
        let listener = TcpListener::bind(config.listen)
            .map_err(|e| KernelError::new(format!("listen for agents on {}", config.listen), e))?;
        let listen = listener
            .local_addr()
            .map_err(|e| KernelError::new(format!("listen for agents on {}", config.listen), e))?;

        exec::sysctl("net/ipv4/ip_forward", "1")?;
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
            let next = NextHop::Gateway(tunnel::NEXT_HOP, index);
            netlink.replace_route(&Route { table: MACHINES, to, prefix, next })?;
        }

        let rules = Rules { machines: config.machines, reserved: BTreeSet::from([listen.port()]) };
        let (ledger, known) = (Ledger::new(rules), BTreeMap::new());
        let health = Health::new(config.hold.as_ref().map_or(Duration::ZERO, |h| h.limits.age));
        let (candidates, awaited, expected) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let core = Core { ledger, hosts: known, netlink, candidates, awaited, expected, health };
        let (this, core) = (config.this, Mutex::new(core));
        let keeper = config.hold.zip(plane.clone()).map(|(settings, plane)| {
            let tell = move |tap| plane.set_hold(Some(tap));
            Keeper::start(settings, &config.state, &config.pins, tell)
        });
        if let (None, Some(plane)) = (&keeper, &plane) {
            plane.set_hold(None)?;
        }
        let shared = Shared { this, outside, index, plane, keeper, listen, core, machines, hosts };
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
        overlay::remove()
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
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
        for entry in self.machines.load::<Entry>()? {
            if entry.version > ENTRY_VERSION {
                return Err(KernelError::new(
                    format!("read the state of machine \"{}\"", entry.net.machine),
                    format!("it is of version {}, written by a newer edge", entry.version),
                ));
            }
            if !entry.released {
                // What the last edge held back stays held until its host has spoken.
                if self.plane.as_ref().is_some_and(|p| p.is_held_back(entry.net.address)) {
                    core.awaited.insert(entry.net.address, Instant::now());
                }
                self.lead(&mut core, &entry)?;
            }
            core.ledger.restore(entry);
        }
        nat::apply(&self.outside, self.tunnel(), core.ledger.machines())
    }

    /// The interface that machines are behind.
    fn tunnel(&self) -> &'static str {
        if self.plane.is_some() { tunnel::INTERFACE } else { overlay::INTERFACE }
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
        let candidate = core.candidates.get(&net.address).map(|c| c.by);
        let awaited = core.awaited.contains_key(&net.address).then_some(Treatment::Hold);
        match &self.plane {
            Some(plane) => match core.health.treatment(*owner).or(awaited) {
                Some(Treatment::Hold) if plane.holds() => {
                    plane.hold(net, *owner, *epoch, candidate)
                }
                Some(Treatment::Drop) if plane.holds() => plane.drop_frames(net, *owner, *epoch),
                _ => plane.remote(net, *owner, *epoch, false, candidate),
            },
            None => {
                let next = NextHop::Gateway(entry.owner, self.index);
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
    fn mislead(&self, core: &mut Core, address: Ipv4Addr) -> Result<(), KernelError> {
        core.candidates.remove(&address);
        core.awaited.remove(&address);
        match &self.plane {
            Some(plane) => plane.forget(address),
            None => core.netlink.delete_route(MACHINES, address, 32).map(drop),
        }
    }

    /// A host was prepared for a machine.
    fn candidate(&self, by: Ipv4Addr, net: &MachineNet, long: bool) -> Result<(), NetError> {
        wire::check_machine(net)?;
        let mut core = self.core();
        let entry = core.ledger.get(net.address).cloned();
        let Some(entry) = entry.filter(|e| !e.released) else {
            return self.expect(&mut core, by, net);
        };
        if entry.net.machine != net.machine || entry.owner == by {
            return Ok(());
        }
        core.candidates.insert(net.address, Candidate { by, long });
        if self.plane.is_none() {
            return Ok(());
        }
        self.lead(&mut core, &entry)
            .map_err(|e| NetError::failed(net, "announce where it may go", e))
    }

    /// Nobody has this machine, and `by` says that it will: what comes meanwhile is held.
    fn expect(&self, core: &mut Core, by: Ipv4Addr, net: &MachineNet) -> Result<(), NetError> {
        let Some(plane) = self.plane.as_ref().filter(|plane| plane.holds()) else { return Ok(()) };
        core.ledger.check_rules(net)?;
        let epoch = core.ledger.get(net.address).map_or(0, |e| e.epoch);
        plane
            .expect(net, epoch, Some(by))
            .map_err(|e| NetError::failed(net, "hold its frames at the edge", e))?;
        core.expected.insert(net.address, Expected { by, since: Instant::now() });
        Ok(())
    }

    /// A host that said it might have a machine will not; false if it had not said so.
    fn withdraw(&self, core: &mut Core, by: Ipv4Addr, net: &MachineNet) -> Result<bool, NetError> {
        let fail = |e: KernelError| NetError::failed(net, "forget where it might have gone", e);
        if core.expected.get(&net.address).is_some_and(|e| e.by == by) {
            self.expect_no_more(core, net.address).map_err(fail)?;
            return Ok(true);
        }
        if core.candidates.get(&net.address).is_some_and(|c| c.by == by) {
            core.candidates.remove(&net.address);
            let entry = core.ledger.get(net.address).filter(|e| !e.released).cloned();
            if let Some(entry) = entry {
                self.lead(core, &entry).map_err(fail)?;
            }
            return Ok(true);
        }
        Ok(false)
    }

    fn expect_no_more(&self, core: &mut Core, address: Ipv4Addr) -> Result<(), KernelError> {
        core.expected.remove(&address);
        let taken = core.ledger.get(address).is_some_and(|e| !e.released);
        match &self.plane {
            Some(plane) if !taken => plane.forget(address),
            _ => Ok(()),
        }
    }

    /// A host says where it is.
    fn join(&self, name: &HostName, peer: Peer) -> Result<(), String> {
        let mut core = self.core();
        if peer.overlay == self.this.overlay || peer.underlay == self.this.underlay {
            return Err(format!("host {name}: {} is the edge's own address", peer.overlay));
        }
        let host = KnownHost { name: name.to_string(), peer };
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
        if core.health.connected(peer.overlay) {
            tracing::info!(host = %name, "connected again: what was held goes there");
            self.lead_all(&mut core, peer.overlay);
        }
        Ok(())
    }

    fn peers(&self) -> Vec<Peer> {
        self.core().hosts.values().map(|h| h.peer).collect()
    }

    fn claim(
        &self,
        by: Ipv4Addr,
        net: &MachineNet,
        owner: Ipv4Addr,
        epoch: u64,
    ) -> Result<(), NetError> {
        let mut core = self.core();
        if !core.hosts.contains_key(&owner) {
            let detail = format!("no host with overlay address {owner} has ever connected");
            return Err(NetError::failed(net, "take it to the edge", detail));
        }
        let before = core.ledger.get(net.address).cloned();
        let change = core.ledger.claim(by, net, owner, epoch)?;
        if by == owner {
            core.awaited.remove(&net.address);
        } else if change.route
            && core.candidates.get(&net.address).is_some_and(|c| c.by == owner && c.long)
        {
            core.awaited.insert(net.address, Instant::now());
        }
        self.commit(&mut core, net, before, change)?;
        if change.route {
            tracing::info!(machine = net.machine, address = %net.address, %owner, epoch, "route set");
        }
        Ok(())
    }

    fn release(&self, by: Ipv4Addr, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        let mut core = self.core();
        let before = core.ledger.get(net.address).cloned();
        let owner = before.as_ref().filter(|e| !e.released).map(|e| e.owner);
        if owner != Some(by) && self.withdraw(&mut core, by, net)? {
            return Ok(());
        }
        let change = core.ledger.release(by, net, epoch)?;
        self.commit(&mut core, net, before, change)?;
        tracing::info!(machine = net.machine, address = %net.address, epoch, "machine released");
        Ok(())
    }

    /// Makes the kernel follow the ledger: the route first, because a move waits for it. Asked
    /// again with nothing new, the route is made again all the same.
    fn commit(
        &self,
        core: &mut Core,
        net: &MachineNet,
        before: Option<Entry>,
        change: Change,
    ) -> Result<(), NetError> {
        let fail = |e: KernelError| NetError::failed(net, "set its way at the edge", e);
        let Some(entry) = core.ledger.get(net.address).cloned() else { return Ok(()) };
        if before.as_ref() != Some(&entry)
            && let Err(error) = self.machines.save(net.address, &entry)
        {
            core.ledger.undo(net.address, before);
            return Err(fail(error));
        }
        if entry.released {
            self.mislead(core, net.address).map_err(fail)?;
        } else {
            core.expected.remove(&net.address);
            if before.is_none_or(|b| b.owner != entry.owner) {
                core.candidates.remove(&net.address);
            }
            self.lead(core, &entry).map_err(fail)?;
        }
        if change.ports {
            nat::apply(&self.outside, self.tunnel(), core.ledger.machines()).map_err(fail)?;
        }
        Ok(())
    }

    /// What programs and holder counted.
    fn counts(&self) -> BTreeMap<String, u64> {
        let mut counts = self.plane.as_ref().map(|p| p.counts()).unwrap_or_default();
        counts.extend(self.keeper.iter().flat_map(Keeper::counts));
        counts
    }

    fn status(&self) -> Status {
        let counts = self.counts();
        let core = self.core();
        let machines = core.ledger.machines().map(|e| MachineStatus {
            net: e.net.clone(),
            epoch: e.epoch,
            place: e.owner.to_string(),
            edge: String::new(),
        });
        Status {
            role: "edge".into(),
            version: wire::VERSION,
            host: String::new(),
            peer: self.this,
            path: self.path(),
            counts,
            link: format!("agents connect to {}, clients to {}", self.listen, self.outside.address),
            peers: core.hosts.values().map(|h| h.peer).collect(),
            machines: machines.collect(),
        }
    }
}
