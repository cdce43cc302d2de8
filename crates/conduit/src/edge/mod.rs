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

pub mod ledger;
mod nat;
mod server;

use crate::{
    agent::listen_unix,
    datapath::{MachineNet, NetError},
    exec::{self, KernelError},
    host::{MACHINES, loosen_reverse_path_filter, machines_rule, open_plane, quiet_interface},
    netlink::{Netlink, NextHop, Route},
    overlay,
    plane::{PathChoice, PathKind, Plane},
    store::Store,
    tunnel,
    wire::{self, MachineStatus, Peer, Status},
};
use conduit_bpf::Role;
use identity::{HostName, Security};
use ledger::{Change, ENTRY_VERSION, Entry, Ledger, Rules};
use nat::Outside;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
}

/// A host as remembered over a restart: its overlay address belongs to its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KnownHost {
    name: String,
    #[serde(flatten)]
    peer: Peer,
}

struct Core {
    ledger: Ledger,
    hosts: BTreeMap<Ipv4Addr, KnownHost>,
    netlink: Netlink,
    /// The host that was prepared for a machine: the only one whose frames may run ahead of its
    /// claim.
    candidates: BTreeMap<Ipv4Addr, Ipv4Addr>,
}

/// What the threads of an edge share.
struct Shared {
    this: Peer,
    outside: Outside,
    index: u32,
    plane: Option<Arc<Plane>>,
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
        let core = Core { ledger, hosts: known, netlink, candidates: BTreeMap::new() };
        let (this, core) = (config.this, Mutex::new(core));
        let shared = Shared { this, outside, index, plane, listen, core, machines, hosts };
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
                self.lead(&mut core, &entry, None)?;
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
    fn lead(
        &self,
        core: &mut Core,
        entry: &Entry,
        candidate: Option<Ipv4Addr>,
    ) -> Result<(), KernelError> {
        match &self.plane {
            Some(plane) => plane.remote(&entry.net, entry.owner, entry.epoch, false, candidate),
            None => {
                let next = NextHop::Gateway(entry.owner, self.index);
                core.netlink.replace_route(&Route::host(MACHINES, entry.net.address, next))
            }
        }
    }

    /// Leads a machine's frames nowhere.
    fn mislead(&self, core: &mut Core, address: Ipv4Addr) -> Result<(), KernelError> {
        core.candidates.remove(&address);
        match &self.plane {
            Some(plane) => plane.forget(address),
            None => core.netlink.delete_route(MACHINES, address, 32).map(drop),
        }
    }

    /// A host was prepared for a machine.
    fn candidate(&self, by: Ipv4Addr, net: &MachineNet) -> Result<(), NetError> {
        wire::check_machine(net)?;
        let mut core = self.core();
        let Some(entry) = core.ledger.get(net.address).cloned() else { return Ok(()) };
        if entry.released || entry.net.machine != net.machine || entry.owner == by {
            return Ok(());
        }
        core.candidates.insert(net.address, by);
        if self.plane.is_none() {
            return Ok(());
        }
        self.lead(&mut core, &entry, Some(by))
            .map_err(|e| NetError::failed(net, "announce where it may go", e))
    }

    /// A host says where it is.
    fn join(&self, name: &HostName, peer: Peer) -> Result<(), String> {
        let mut core = self.core();
        if peer.overlay == self.this.overlay || peer.underlay == self.this.underlay {
            return Err(format!("host {name}: {} is the edge's own address", peer.overlay));
        }
        let host = KnownHost { name: name.to_string(), peer };
        match core.hosts.get(&peer.overlay) {
            Some(known) if *known == host => return Ok(()),
            Some(known) if known.name != host.name => {
                return Err(format!(
                    "host {name}: the overlay address {} belongs to host \"{}\"; give each host \
                     its own, or remove hosts/{}.json from the edge's state and restart it",
                    peer.overlay, known.name, peer.overlay
                ));
            }
            _ => {}
        }
        let fail = |e: KernelError| format!("host {name}: {e}");
        self.hosts.save(peer.overlay, &host).map_err(fail)?;
        self.reach(&mut core, &peer).map_err(fail)?;
        core.hosts.insert(peer.overlay, host);
        tracing::info!(host = %name, overlay = %peer.overlay, underlay = %peer.underlay, "host joined");
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
        self.commit(&mut core, net, before, change)?;
        if change.route {
            tracing::info!(machine = net.machine, address = %net.address, %owner, epoch, "route set");
        }
        Ok(())
    }

    fn release(&self, by: Ipv4Addr, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        let mut core = self.core();
        let before = core.ledger.get(net.address).cloned();
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
            if before.is_none_or(|b| b.owner != entry.owner) {
                core.candidates.remove(&net.address);
            }
            let candidate = core.candidates.get(&net.address).copied();
            self.lead(core, &entry, candidate).map_err(fail)?;
        }
        if change.ports {
            nat::apply(&self.outside, self.tunnel(), core.ledger.machines()).map_err(fail)?;
        }
        Ok(())
    }

    fn status(&self) -> Status {
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
            counts: self.plane.as_ref().map(|p| p.counts()).unwrap_or_default(),
            link: format!("agents connect to {}, clients to {}", self.listen, self.outside.address),
            peers: core.hosts.values().map(|h| h.peer).collect(),
            machines: machines.collect(),
        }
    }
}
