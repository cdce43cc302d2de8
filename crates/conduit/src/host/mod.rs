//! The kernel's side of a host: taps, routes, rules and the guard against guests that lie about
//! their address. Called by the agent and by [`crate::LocalDataPath`]; knows no epochs.
//!
//! Frames find their way by BPF ([`crate::plane`]) or by routes, as [`PathChoice`] says. With BPF the
//! tables below serve this host's own stack only: it answers machines whose packets are too large.
//!
//! What is set up, all of it idempotent, so that a restarted agent disturbs nothing:
//!
//! ```text
//!  rule 6400: from vx-conduit → table 6474 (candidates: machines that may come here)
//!  rule 6401: all             → table 6472 (machines that run here, or were here and moved on)
//!  rule 6402: from each tap   → table 6473 (default via the edge), unless machines are announced
//!  nft table inet conduit_host: a tap's frames carry its machine's address, or are dropped;
//!                               guests open no connection to the host
//! ```
//!
//! Rules and tables are IPv4's and IPv6's alike. Machines of a tenant's network may have addresses that
//! others have too: their routes are in a table of their own, for packets that carry the network's
//! [mark]. It is set by the program at the tap, and the kernel's answers carry their question's
//! (`fwmark_reflect`).
//!
//! A frame taken out of a tap's queue and put back by [`crate::tap::drain`] comes in through the
//! tap with a foreign source address. That is why reverse path filters are off on taps and the
//! guard accepts frames *to* the machine's address as well.

mod guard;
mod sysctl;

pub(crate) use sysctl::{forward, has_ipv6, loosen_reverse_path_filter, quiet_interface};

use crate::{
    announce::{self, Announce, Announcer},
    book::{EdgeView, Place, Record, Wait},
    datapath::{MachineKey, MachineNet, NetworkId},
    exec::{self, KernelError},
    netlink::{Netlink, NextHop, Route, Rule, interface_index},
    overlay,
    plane::{PathChoice, PathKind, Plane},
    recall::Known,
    tap::{self, GATEWAY, GATEWAY_MAC, GATEWAY_V6},
    tunnel,
    wire::Peer,
};
use conduit_bpf::Role;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::{Arc, Mutex},
};

/// Routes to machines.
pub const MACHINES: u32 = 6472;
/// The way out for guests.
pub const OUT: u32 = 6473;
/// Routes to machines that may come here, for frames of the overlay only.
pub const CANDIDATES: u32 = 6474;

/// Marks of packets start with this byte; the network follows. Tables of networks have the same number.
const MARK: u32 = conduit_bpf::NETWORK_MARK;

const RULE_CANDIDATES: u32 = 6400;
const RULE_MACHINES: u32 = 6401;
const RULE_OUT: u32 = 6402;

/// The kernel's side of one host. Two locks: changes of routes never wait for set-up, which starts
/// processes.
pub struct HostNet {
    routes: Mutex<Netlink>,
    setup: Mutex<Netlink>,
    overlay: Option<OverlayLink>,
    plane: Option<Arc<Plane>>,
    announcer: Option<Announcer>,
}

/// The overlay interface of this host.
#[derive(Clone, Copy, Debug)]
struct OverlayLink {
    index: u32,
    mtu: u32,
}

/// The mark of packets of a tenant's network.
#[must_use]
pub fn mark(network: NetworkId) -> u32 {
    MARK | u32::from(network.0)
}

/// Routes to machines of a network.
fn table(network: NetworkId) -> u32 {
    if network == NetworkId::COMMON { MACHINES } else { mark(network) }
}

/// The rule that sends all traffic for machines to their table; the edge uses it too.
pub(crate) fn machines_rule() -> Rule {
    Rule { priority: RULE_MACHINES, table: MACHINES, ..Rule::default() }
}

/// `table` is a tenant's.
fn network_rule(table: u32) -> Rule {
    Rule { priority: RULE_MACHINES, mark: Some(table), table, ..Rule::default() }
}

fn candidates_rule() -> Rule {
    let from_interface = Some(overlay::INTERFACE.to_owned());
    Rule { priority: RULE_CANDIDATES, from_interface, table: CANDIDATES, ..Rule::default() }
}

fn out_rule(tap: &str) -> Rule {
    let from_interface = Some(tap.to_owned());
    Rule { priority: RULE_OUT, from_interface, table: OUT, ..Rule::default() }
}

/// A machine's addresses.
fn addresses(net: &MachineNet) -> impl Iterator<Item = IpAddr> {
    [Some(IpAddr::V4(net.address)), net.address_v6.map(IpAddr::V6)].into_iter().flatten()
}

impl HostNet {
    /// Sets the host up; `this` is where it is in the overlay, or `None` for a host by itself.
    /// Must be called in the host's network namespace.
    pub fn open(this: Option<Peer>, choice: PathChoice, pins: &Path) -> Result<Self, KernelError> {
        forward()?;
        loosen_reverse_path_filter()?;
        let mut netlink = Netlink::open()?;
        netlink.ensure_rule(&machines_rule())?;
        let mut link = None;
        let mut plane = None;
        if let Some(this) = this {
            plane = open_plane(choice, this, Role::Host, pins)?;
        }
        if let Some(plane) = &plane {
            let device = plane.tunnel();
            link = Some(OverlayLink { index: device.index, mtu: device.mtu });
        } else if let Some(this) = this {
            let (index, mtu) = overlay::ensure(this.overlay, this.underlay)?;
            quiet_interface(overlay::INTERFACE)?;
            netlink.ensure_rule(&candidates_rule())?;
            link = Some(OverlayLink { index, mtu });
        }
        exec::run("nft", &["-f", "-"], &guard::script(link.is_some()))?;
        let setup = Mutex::new(Netlink::open()?);
        let routes = Mutex::new(netlink);
        Ok(Self { routes, setup, overlay: link, plane, announcer: None })
    }

    /// Machines are announced in place of leading their frames through the tunnel, or not (any more). To
    /// be said before anything is done for a machine.
    pub(crate) fn announce(&mut self, announce: Option<&Announce>) -> Result<(), KernelError> {
        match (&self.plane, announce) {
            (None, Some(announce)) => {
                let detail = "routes have no epochs; announcing needs BPF (--path bpf)";
                return Err(KernelError::new(format!("announce machines by {announce}"), detail));
            }
            (None, None) => return Ok(()),
            (Some(plane), _) => plane.leave_by_stack(announce.is_some())?,
        }
        self.announcer = announce.map(Announcer::open).transpose()?;
        Ok(())
    }

    /// How frames find their way here.
    #[must_use]
    pub fn path(&self) -> PathKind {
        if self.plane.is_some() { PathKind::Bpf } else { PathKind::Routes }
    }

    /// What the BPF programs counted, by name; empty with routes.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.plane.as_ref().map(|p| p.counts()).unwrap_or_default()
    }

    /// Frames on hold go into this tap; with `None` there is no hold.
    pub(crate) fn hold_in(&self, tap: Option<u32>) -> Result<(), KernelError> {
        self.plane.as_ref().map_or(Ok(()), |plane| plane.set_hold(tap))
    }

    /// Whether frames can be held.
    pub(crate) fn holds(&self) -> bool {
        self.plane.as_ref().is_some_and(|plane| plane.holds())
    }

    /// The data path's figures; none with routes.
    pub(crate) fn read_figures(&self, readings: &mut scrape::Readings) {
        if let Some(plane) = &self.plane {
            plane.read_figures(readings);
        }
    }

    /// What the kernel remembers of machines, for an agent whose files are behind it; nothing with
    /// routes, which have no epochs.
    pub(crate) fn recall(&self) -> Result<BTreeMap<MachineKey, Known>, KernelError> {
        self.plane.as_ref().map_or_else(|| Ok(BTreeMap::new()), |p| p.recall())
    }

    /// Largest guest MTU that crosses the overlay whole.
    #[must_use]
    pub fn mtu(&self) -> u32 {
        self.overlay.map_or(65_000, |o| o.mtu)
    }

    fn link(&self) -> Result<OverlayLink, KernelError> {
        self.overlay
            .ok_or_else(|| KernelError::new("use the overlay", "this host was set up without one"))
    }

    fn routes(&self) -> std::sync::MutexGuard<'_, Netlink> {
        // A panic while the lock was held leaves a socket that skips stale answers by number.
        self.routes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Whether this host can lead a machine's frames at all.
    fn check(&self, net: &MachineNet) -> Result<(), KernelError> {
        let fail = |detail: &str| {
            Err(KernelError::new(format!("lead the frames of {}", net.key()), detail))
        };
        if self.announcer.is_some()
            && let Err(detail) = announce::check(net)
        {
            return fail(detail);
        }
        let by_routes = self.plane.is_none();
        if by_routes && net.network != NetworkId::COMMON {
            return fail("routes know one network only; tenants' networks need BPF (--path bpf)");
        }
        if by_routes && self.overlay.is_some() && net.address_v6.is_some() {
            return fail("routes lead IPv4 only; IPv6 needs BPF (--path bpf)");
        }
        if net.address_v6.is_some() && !has_ipv6() {
            return fail(
                "this kernel has no IPv6; make the machine without, or boot with ipv6.disable=0",
            );
        }
        Ok(())
    }

    /// Makes a machine's tap ready to be opened, or leaves it alone if it is. Slow: milliseconds.
    pub fn ensure_tap(&self, net: &MachineNet) -> Result<String, KernelError> {
        self.check(net)?;
        let mut netlink = self.setup.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let name = tap::name(net.key());
        if netlink.link(&name)?.is_none() {
            tap::create_persistent(&name)
                .map_err(|e| KernelError::new(format!("make tap {name}"), e))?;
        }
        quiet_interface(&name)?;
        exec::sysctl(&format!("net/ipv4/conf/{name}/accept_local"), "1")?;
        let without_v6 = if net.address_v6.is_some() { "0" } else { "1" };
        exec::sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), without_v6)
            .or_else(overlay::no_ipv6)?;
        let link = netlink
            .link(&name)?
            .ok_or_else(|| KernelError::new(format!("find tap {name}"), "it vanished"))?;
        let index = link.index;
        if net.address_v6.is_some() {
            exec::sysctl(&format!("net/ipv6/conf/{name}/accept_ra"), "0")?;
            netlink.make_no_address(index)?;
        }
        // A MAC set anew would flush the neighbours of a tap in use, even to the same value.
        if link.mac != GATEWAY_MAC {
            netlink.set_mac(index, GATEWAY_MAC)?;
        }
        if !link.up || link.mtu != u32::from(net.mtu) || link.queue != tap::QUEUE {
            netlink.set_up(index, net.mtu.into(), tap::QUEUE)?;
        }
        netlink.set_address(index, GATEWAY.into(), 32)?;
        if net.address_v6.is_some() {
            netlink.set_address(index, GATEWAY_V6.into(), 64)?;
        }
        let guard: String =
            guard::guarded(&name, net).map(|g| format!("add element {g}\n")).collect();
        exec::run("nft", &["-f", "-"], &guard)?;
        for address in addresses(net) {
            netlink.set_neighbour(index, address, net.mac)?;
        }
        if self.announcer.is_some() {
            while netlink.delete_rule(&out_rule(&name))? {}
        } else {
            netlink.ensure_rule(&out_rule(&name))?;
        }
        if let Some(plane) = &self.plane {
            plane.set_tap(index, net)?;
        }
        Ok(name)
    }

    /// Removes a machine's tap, if there is one. A process that has it open keeps a dead
    /// descriptor.
    pub fn remove_tap(&self, net: &MachineNet) -> Result<(), KernelError> {
        let mut netlink = self.setup.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let name = tap::name(net.key());
        while netlink.delete_rule(&out_rule(&name))? {}
        if let Ok(index) = interface_index(&name) {
            if let Some(plane) = &self.plane {
                plane.remove_tap(index)?;
            }
            netlink.remove_link(index)?;
        }
        // The set has no "remove if there": add first, so that the removal always finds it.
        let guard: String = guard::guarded(&name, net)
            .map(|g| format!("add element {g}\ndelete element {g}\n"))
            .collect();
        exec::run("nft", &["-f", "-"], &guard).map(drop)
    }

    /// Frames for the machine go into its tap, wherever they come from.
    fn route_here(&self, net: &MachineNet, tap: u32) -> Result<(), KernelError> {
        let next = NextHop::Device(tap);
        let table = table(net.network);
        let mut routes = self.routes();
        if table != MACHINES {
            routes.ensure_rule(&network_rule(table))?;
        }
        for address in addresses(net) {
            routes.replace_route(&Route::host(table, address, next))?;
        }
        if self.overlay.is_some() && self.plane.is_none() {
            routes.delete_route(CANDIDATES, net.address, 32)?;
        }
        Ok(())
    }

    /// Frames for the machine that come over the overlay go into its tap; this host's own still
    /// go their usual way.
    fn route_candidate(&self, net: &MachineNet) -> Result<(), KernelError> {
        let index = interface_index(&tap::name(net.key()))?;
        let mut routes = self.routes();
        for address in addresses(net) {
            delete_whole(&mut routes, MACHINES, address)?;
            if self.overlay.is_some() {
                routes.replace_route(&Route::host(CANDIDATES, address, NextHop::Device(index)))?;
            }
        }
        Ok(())
    }

    /// Frames for the machine go to the host `to`.
    fn route_away(&self, address: Ipv4Addr, to: Ipv4Addr) -> Result<(), KernelError> {
        let next = NextHop::Gateway(to.into(), self.link()?.index);
        let mut routes = self.routes();
        routes.replace_route(&Route::host(MACHINES, address, next))?;
        routes.delete_route(CANDIDATES, address, 32).map(drop)
    }

    /// Makes the kernel do what the book says.
    pub fn apply(&self, record: &Record) -> Result<(), KernelError> {
        let net = &record.net;
        if let Some(plane) = &self.plane {
            return self.apply_to(plane, record);
        }
        match record.place {
            Place::Candidate => self.route_candidate(net),
            Place::Here if record.retiring => self.unroute(net),
            Place::Here => self.route_here(net, interface_index(&tap::name(net.key()))?),
            Place::Away { to } => self.route_away(net.address, to),
        }
    }

    /// Another edge than that of [`HostNet::set_edge`].
    pub(crate) fn let_edge_in(&self, edge: &Peer) -> Result<(), KernelError> {
        self.plane.as_ref().map_or(Ok(()), |plane| plane.let_edge_in(edge))
    }

    /// Leads all machines of a home to the edge that serves it.
    pub(crate) fn set_front(
        &self,
        home: Ipv4Addr,
        by: &Peer,
        epoch: u64,
    ) -> Result<(), KernelError> {
        self.plane.as_ref().map_or(Ok(()), |plane| plane.set_front(home, by, epoch))
    }

    /// The entry first: it leads the frames. The route is for this host's own stack.
    fn apply_to(&self, plane: &Plane, record: &Record) -> Result<(), KernelError> {
        let Record { net, epoch, .. } = record;
        let tap = || interface_index(&tap::name(net.key()));
        // Before its frames may leave.
        if let Some(home) = record.home.filter(|_| !record.retiring) {
            plane.set_home(net, home.edge)?;
        }
        match record.place {
            Place::Candidate if record.wait == Wait::Hold => plane.expect(net, *epoch, None),
            Place::Candidate => plane.local(net, tap()?, *epoch, true),
            Place::Here if record.retiring => self.unroute(net),
            Place::Here => {
                // Looked up once: it is a good part of a flip.
                let tap = tap()?;
                plane.local(net, tap, *epoch, false)?;
                self.route_here(net, tap)?;
                self.say_here(net)
            }
            Place::Away { to } => {
                let leaving = record.edge == EdgeView::Held;
                plane.remote(net, to, *epoch, leaving, None)?;
                if self.announcer.is_some() {
                    return self.say_gone(net);
                }
                if leaving {
                    // Until it stops, this host's stack may have to answer it; and a flip waits for
                    // nothing but its entry. The next step comes here again.
                    return Ok(());
                }
                self.remove_routes(net)
            }
        }
    }

    /// A machine's frames go into its tap, and the network around is told so.
    fn say_here(&self, net: &MachineNet) -> Result<(), KernelError> {
        let Some(announcer) = &self.announcer else { return Ok(()) };
        announcer.here(&mut self.routes(), addresses(net))
    }

    /// A machine's frames go elsewhere, and what still comes here follows it, from this moment: nobody would
    /// send on what comes into its tap's queue once that was drained. The route stays for as long as this
    /// host leads frames on, so that a routing daemon has one until the next host's.
    fn say_gone(&self, net: &MachineNet) -> Result<(), KernelError> {
        let Some(announcer) = &self.announcer else { return Ok(()) };
        let index = self.link()?.index;
        let mut routes = self.routes();
        announcer.gone(&mut routes, addresses(net))?;
        for address in addresses(net) {
            let next: IpAddr = match address {
                IpAddr::V4(_) => tunnel::NEXT_HOP.into(),
                IpAddr::V6(_) => tunnel::NEXT_HOP_V6.into(),
            };
            routes.replace_route(&Route::host(MACHINES, address, NextHop::Gateway(next, index)))?;
        }
        Ok(())
    }

    /// Its owner goes, in a process that goes on.
    pub(crate) fn end(&self) {
        if let Some(plane) = &self.plane {
            plane.end();
        }
    }

    /// Whether frames that waited for a machine are still being given back or sent on.
    pub(crate) fn is_draining(&self, net: &MachineNet) -> bool {
        self.plane.as_ref().is_some_and(|plane| plane.is_draining(net))
    }

    /// Removes what this host knows of the way to a machine.
    pub fn unroute(&self, net: &MachineNet) -> Result<(), KernelError> {
        if let Some(plane) = &self.plane {
            plane.forget(net)?;
        }
        self.remove_routes(net)
    }

    /// The last machine of a tenant takes the rule with it.
    fn remove_routes(&self, net: &MachineNet) -> Result<(), KernelError> {
        let table = table(net.network);
        let mut routes = self.routes();
        if let Some(announcer) = &self.announcer {
            announcer.gone(&mut routes, addresses(net))?;
        }
        for address in addresses(net) {
            delete_whole(&mut routes, table, address)?;
            if self.plane.is_none() {
                delete_whole(&mut routes, CANDIDATES, address)?;
            }
        }
        if table != MACHINES && routes.routes(table)?.is_empty() {
            while routes.delete_rule(&network_rule(table))? {}
        }
        Ok(())
    }

    /// Makes another host reachable.
    pub fn set_peer(&self, peer: &Peer) -> Result<(), KernelError> {
        if let Some(plane) = &self.plane {
            return plane.set_peer(peer, Role::Host);
        }
        let index = self.link()?.index;
        overlay::set_peer(&mut self.routes(), index, peer)
    }

    /// Makes the edge reachable, and the way out for guests.
    pub fn set_edge(&self, edge: &Peer) -> Result<(), KernelError> {
        let index = self.link()?.index;
        let default = |to: IpAddr, next: IpAddr| {
            let next = NextHop::Gateway(next, index);
            self.routes().replace_route(&Route { table: OUT, to, prefix: 0, next })
        };
        let (all, all_v6) = (Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into());
        let Some(plane) = &self.plane else {
            self.set_peer(edge)?;
            return default(all, edge.overlay.into());
        };
        plane.set_edge(edge)?;
        default(all, tunnel::NEXT_HOP.into())?;
        if has_ipv6() { default(all_v6, tunnel::NEXT_HOP_V6.into()) } else { Ok(()) }
    }

    /// The machines that the kernel has a route for, here and now.
    pub fn routed(&self) -> Result<Vec<Route>, KernelError> {
        self.routes().routes(MACHINES)
    }

    /// Removes everything that this host was set up with, except taps of machines that
    /// [`HostNet::remove_tap`] was not called for.
    pub fn remove(&self) -> Result<(), KernelError> {
        let mut netlink = self.routes();
        let mut networks = BTreeSet::new();
        for route in netlink.all_routes()? {
            let network = route.table & 0xff00_0000 == MARK;
            if network || [MACHINES, OUT, CANDIDATES].contains(&route.table) {
                netlink.delete_route(route.table, route.to, route.prefix)?;
            }
            networks.extend(network.then_some(route.table));
        }
        for table in networks {
            while netlink.delete_rule(&network_rule(table))? {}
        }
        while netlink.delete_rule(&machines_rule())? {}
        while netlink.delete_rule(&candidates_rule())? {}
        if let Some(announcer) = &self.announcer {
            announcer.remove(&mut netlink)?;
        }
        drop(netlink);
        let script = "add table inet conduit_host\ndelete table inet conduit_host\n";
        exec::run("nft", &["-f", "-"], script)?;
        if let Some(plane) = &self.plane {
            plane.remove()?;
        }
        overlay::remove()
    }
}

/// Opens the BPF data path, if that is the choice and this kernel can. What the other one used goes:
/// both listen on the same port.
pub(crate) fn open_plane(
    choice: PathChoice,
    this: Peer,
    role: Role,
    pins: &Path,
) -> Result<Option<Arc<Plane>>, KernelError> {
    if choice == PathChoice::Routes {
        conduit_bpf::sweep(pins).map_err(|e| KernelError::new("leave the BPF data path", e))?;
        tunnel::remove()?;
        return Ok(None);
    }
    overlay::remove()?;
    let Some(plane) = Plane::open(choice, this, role, pins)? else { return Ok(None) };
    let plane = Arc::new(plane);
    plane.keep_fit();
    Ok(Some(plane))
}

fn delete_whole(routes: &mut Netlink, table: u32, to: IpAddr) -> Result<(), KernelError> {
    routes.delete_route(table, to, if to.is_ipv4() { 32 } else { 128 }).map(drop)
}
