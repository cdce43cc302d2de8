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
//!  rule 6402: from each tap   → table 6473 (default via the edge)
//!  nft table inet conduit_host: a tap's frames carry its machine's address, or are dropped;
//!                               guests open no connection to the host
//! ```
//!
//! A frame taken out of a tap's queue and put back by [`crate::tap::drain`] comes in through the
//! tap with a foreign source address. That is why reverse path filters are off on taps and the
//! guard accepts frames *to* the machine's address as well.

use crate::{
    book::{EdgeView, Place, Record, Wait},
    datapath::MachineNet,
    exec::{self, KernelError},
    netlink::{Netlink, NextHop, Route, Rule, interface_index},
    overlay,
    plane::{PathChoice, PathKind, Plane},
    tap::{self, GATEWAY, GATEWAY_MAC},
    tunnel,
    wire::Peer,
};
use conduit_bpf::Role;
use std::{
    net::Ipv4Addr,
    path::Path,
    sync::{Arc, Mutex},
};

/// Routes to machines.
pub const MACHINES: u32 = 6472;
/// The way out for guests.
pub const OUT: u32 = 6473;
/// Routes to machines that may come here, for frames of the overlay only.
pub const CANDIDATES: u32 = 6474;

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
}

/// The overlay interface of this host.
#[derive(Clone, Copy, Debug)]
struct OverlayLink {
    index: u32,
    mtu: u32,
}

/// The rule that sends all traffic for machines to their table; the edge uses it too.
pub(crate) fn machines_rule() -> Rule {
    Rule { priority: RULE_MACHINES, from_interface: None, table: MACHINES }
}

fn candidates_rule() -> Rule {
    let from = Some(overlay::INTERFACE.to_owned());
    Rule { priority: RULE_CANDIDATES, from_interface: from, table: CANDIDATES }
}

fn out_rule(tap: &str) -> Rule {
    Rule { priority: RULE_OUT, from_interface: Some(tap.to_owned()), table: OUT }
}

impl HostNet {
    /// Sets the host up; `this` is where it is in the overlay, or `None` for a host by itself.
    /// Must be called in the host's network namespace.
    pub fn open(this: Option<Peer>, choice: PathChoice, pins: &Path) -> Result<Self, KernelError> {
        exec::sysctl("net/ipv4/ip_forward", "1")?;
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
        exec::run("nft", &["-f", "-"], &guard_script(link.is_some()))?;
        let setup = Mutex::new(Netlink::open()?);
        Ok(Self { routes: Mutex::new(netlink), setup, overlay: link, plane })
    }

    /// How frames find their way here.
    #[must_use]
    pub fn path(&self) -> PathKind {
        if self.plane.is_some() { PathKind::Bpf } else { PathKind::Routes }
    }

    /// What the BPF programs counted, by name; empty with routes.
    #[must_use]
    pub fn counts(&self) -> std::collections::BTreeMap<String, u64> {
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

    /// Epochs that the kernel remembers, for an agent that has lost its state.
    pub fn floors(&self) -> Result<Vec<(Ipv4Addr, u64)>, KernelError> {
        self.plane.as_ref().map_or_else(|| Ok(Vec::new()), |p| p.floors())
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

    /// Makes a machine's tap ready to be opened, or leaves it alone if it is. Slow: milliseconds.
    pub fn ensure_tap(&self, net: &MachineNet) -> Result<String, KernelError> {
        let mut netlink = self.setup.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let name = tap::name(net.address);
        let mac = overlay::mac_text(GATEWAY_MAC);
        if overlay::link_facts(&name)?.is_none() {
            tap::create_persistent(&name)
                .map_err(|e| KernelError::new(format!("make tap {name}"), e))?;
        }
        quiet_interface(&name)?;
        exec::sysctl(&format!("net/ipv4/conf/{name}/accept_local"), "1")?;
        exec::sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")
            .or_else(overlay::no_ipv6)?;
        let facts = overlay::link_facts(&name)?
            .ok_or_else(|| KernelError::new(format!("find tap {name}"), "it vanished"))?;
        let mut script = String::new();
        // A MAC set anew would flush the neighbours of a tap in use, even to the same value.
        if facts.address != mac {
            script += &format!("link set dev {name} address {mac}\n");
        }
        let up = facts.flags.iter().any(|f| f == "UP");
        if !up || facts.mtu != u32::from(net.mtu) || facts.txqlen != tap::QUEUE {
            let (mtu, queue) = (net.mtu, tap::QUEUE);
            script += &format!("link set dev {name} mtu {mtu} txqueuelen {queue} up\n");
        }
        script += &format!("address replace {GATEWAY}/32 dev {name} scope link\n");
        exec::run("ip", &["-batch", "-"], &script)?;
        let guard =
            format!("add element inet conduit_host guests {{ \"{name}\" . {} }}\n", net.address);
        exec::run("nft", &["-f", "-"], &guard)?;
        let index = interface_index(&name)?;
        netlink.set_neighbour(index, net.address, net.mac)?;
        netlink.ensure_rule(&out_rule(&name))?;
        if let Some(plane) = &self.plane {
            plane.set_tap(index, net)?;
        }
        Ok(name)
    }

    /// Removes a machine's tap, if there is one. A process that has it open keeps a dead
    /// descriptor.
    pub fn remove_tap(&self, address: Ipv4Addr) -> Result<(), KernelError> {
        let mut netlink = self.setup.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let name = tap::name(address);
        while netlink.delete_rule(&out_rule(&name))? {}
        if let Ok(index) = interface_index(&name) {
            if let Some(plane) = &self.plane {
                plane.remove_tap(index)?;
            }
            exec::run("ip", &["link", "del", &name], "")?;
        }
        // The set has no "remove if there": add first, so that the removal always finds it.
        let element = format!("element inet conduit_host guests {{ \"{name}\" . {address} }}\n");
        exec::run("nft", &["-f", "-"], &format!("add {element}delete {element}")).map(drop)
    }

    /// Frames for the machine go into its tap, wherever they come from.
    fn route_here(&self, address: Ipv4Addr) -> Result<(), KernelError> {
        let index = interface_index(&tap::name(address))?;
        let mut routes = self.routes();
        routes.replace_route(&Route::host(MACHINES, address, NextHop::Device(index)))?;
        if self.overlay.is_some() {
            routes.delete_route(CANDIDATES, address, 32)?;
        }
        Ok(())
    }

    /// Frames for the machine that come over the overlay go into its tap; this host's own still
    /// go their usual way.
    fn route_candidate(&self, address: Ipv4Addr) -> Result<(), KernelError> {
        let index = interface_index(&tap::name(address))?;
        let mut routes = self.routes();
        routes.delete_route(MACHINES, address, 32)?;
        if self.overlay.is_some() {
            routes.replace_route(&Route::host(CANDIDATES, address, NextHop::Device(index)))?;
        }
        Ok(())
    }

    /// Frames for the machine go to the host `to`.
    fn route_away(&self, address: Ipv4Addr, to: Ipv4Addr) -> Result<(), KernelError> {
        let next = NextHop::Gateway(to, self.link()?.index);
        let mut routes = self.routes();
        routes.replace_route(&Route::host(MACHINES, address, next))?;
        routes.delete_route(CANDIDATES, address, 32).map(drop)
    }

    /// Makes the kernel do what the book says.
    pub fn apply(&self, record: &Record) -> Result<(), KernelError> {
        let address = record.net.address;
        if let Some(plane) = &self.plane {
            return self.apply_to(plane, record);
        }
        match record.place {
            Place::Candidate => self.route_candidate(address),
            Place::Here if record.retiring => self.unroute(address),
            Place::Here => self.route_here(address),
            Place::Away { to } => self.route_away(address, to),
        }
    }

    /// The entry first: it leads the frames. The route is for this host's own stack.
    fn apply_to(&self, plane: &Plane, record: &Record) -> Result<(), KernelError> {
        let Record { net, epoch, .. } = record;
        let tap = || interface_index(&tap::name(net.address));
        match record.place {
            Place::Candidate if record.wait == Wait::Hold => plane.expect(net, *epoch, None),
            Place::Candidate => plane.local(net, tap()?, *epoch, true),
            Place::Here if record.retiring => self.unroute(net.address),
            Place::Here => {
                plane.local(net, tap()?, *epoch, false)?;
                self.route_here(net.address)
            }
            Place::Away { to } => {
                let leaving = record.edge == EdgeView::Held;
                plane.remote(net, to, *epoch, leaving, None)?;
                self.routes().delete_route(MACHINES, net.address, 32).map(drop)
            }
        }
    }

    /// Removes what this host knows of the way to a machine.
    pub fn unroute(&self, address: Ipv4Addr) -> Result<(), KernelError> {
        if let Some(plane) = &self.plane {
            plane.forget(address)?;
        }
        let mut routes = self.routes();
        routes.delete_route(MACHINES, address, 32)?;
        routes.delete_route(CANDIDATES, address, 32).map(drop)
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
        let next = match &self.plane {
            Some(plane) => {
                plane.set_edge(edge)?;
                NextHop::Gateway(tunnel::NEXT_HOP, index)
            }
            None => {
                self.set_peer(edge)?;
                NextHop::Gateway(edge.overlay, index)
            }
        };
        let default = Route { table: OUT, to: Ipv4Addr::UNSPECIFIED, prefix: 0, next };
        self.routes().replace_route(&default)
    }

    /// The machines that the kernel has a route for, here and now.
    pub fn routed(&self) -> Result<Vec<Route>, KernelError> {
        self.routes().routes(MACHINES)
    }

    /// Removes everything that this host was set up with, except taps of machines that
    /// [`HostNet::remove_tap`] was not called for.
    pub fn remove(&self) -> Result<(), KernelError> {
        let mut netlink = self.routes();
        for table in [MACHINES, OUT, CANDIDATES] {
            for route in netlink.routes(table)? {
                netlink.delete_route(table, route.to, route.prefix)?;
            }
        }
        while netlink.delete_rule(&machines_rule())? {}
        while netlink.delete_rule(&candidates_rule())? {}
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

/// Interfaces of ours neither filter by reverse path nor tell senders of shorter ways.
pub(crate) fn quiet_interface(name: &str) -> Result<(), KernelError> {
    exec::sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), "0")?;
    exec::sysctl(&format!("net/ipv4/conf/{name}/send_redirects"), "0")
}

/// The kernel takes the larger of `all` and the interface's own value, so `all` must be 0 for our
/// interfaces to be free of it. The others keep what they had: the value moves down to them.
pub(crate) fn loosen_reverse_path_filter() -> Result<(), KernelError> {
    let read = |name: &str| -> u8 {
        exec::read_sysctl(&format!("net/ipv4/conf/{name}/rp_filter"))
            .and_then(|v| v.parse().ok())
            .unwrap_or(0)
    };
    let all = read("all");
    if all > 0 {
        let list = |e| KernelError::new("list /proc/sys/net/ipv4/conf", e);
        for entry in std::fs::read_dir("/proc/sys/net/ipv4/conf").map_err(list)? {
            let entry = entry.map_err(list)?.file_name();
            let Some(name) = entry.to_str().filter(|n| *n != "all") else { continue };
            if name != overlay::INTERFACE && !name.starts_with(tap::PREFIX) && read(name) < all {
                exec::sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), &all.to_string())?;
            }
        }
        exec::sysctl("net/ipv4/conf/all/rp_filter", "0")?;
    }
    // Likewise an OR of both: redirects would tell an edge to leave the trombone.
    exec::sysctl("net/ipv4/conf/all/send_redirects", "0")
}

/// The guard. Set elements stay as they are; the rest is replaced in one transaction. A host by
/// itself may be the client of its guests, so only its own answers to them are let in there too.
fn guard_script(in_overlay: bool) -> String {
    let mut script = String::from(
        "add table inet conduit_host
add set inet conduit_host guests { type ifname . ipv4_addr; }
add chain inet conduit_host from_guest { type filter hook prerouting priority raw; policy accept; }
add chain inet conduit_host to_host { type filter hook input priority filter; policy accept; }
flush chain inet conduit_host from_guest
flush chain inet conduit_host to_host
add rule inet conduit_host from_guest iifname != \"dr-*\" accept
add rule inet conduit_host from_guest iifname . ip saddr @guests accept
add rule inet conduit_host from_guest iifname . ip daddr @guests accept
add rule inet conduit_host from_guest drop
add rule inet conduit_host to_host iifname \"dr-*\" icmp type { echo-request, echo-reply } accept
add rule inet conduit_host to_host iifname \"dr-*\" tcp flags & (syn | ack) != syn accept
",
    );
    if in_overlay {
        script += "add rule inet conduit_host to_host iifname \"dr-*\" drop\n";
    } else {
        script += "add rule inet conduit_host to_host iifname \"dr-*\" meta l4proto tcp drop\n";
    }
    script
}
