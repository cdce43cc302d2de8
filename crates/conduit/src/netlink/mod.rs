//! A route socket that stays open: one system call each way per change, so that a move costs
//! microseconds and no process is started on its way.
//!
//! Called by [`crate::host`] and [`crate::edge`]. The socket belongs to the network namespace of
//! the thread that opened it, for life. Every answer has a deadline.

mod link;

use crate::exec::KernelError;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkFlags, LinkMessage},
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
    },
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
        RouteScope, RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::{TimeVal, TimeValLike},
};
use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    thread,
    time::{Duration, Instant},
};

/// How long the kernel may take to answer; it takes microseconds.
const LIMIT_MS: i64 = 2000;

/// A number of `rtnetlink(7)`'s `rtm_protocol` that marks routes as ours (`ip route` shows it).
const ROUTE_OWNER: u8 = 64;

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// Straight out of an interface, given by its index.
    Device(u32),
    /// To a neighbour that is taken to be on the link of the interface.
    Gateway(IpAddr, u32),
}

/// A route of one of our tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Which table.
    pub table: u32,
    /// Destination network.
    pub to: IpAddr,
    /// Its prefix length.
    pub prefix: u8,
    /// Where it leads.
    pub next: NextHop,
}

impl Route {
    /// The route to one machine.
    #[must_use]
    pub fn host(table: u32, to: impl Into<IpAddr>, next: NextHop) -> Self {
        let to = to.into();
        Self { table, to, prefix: whole(to), next }
    }
}

fn proxy_message(interface: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = interface;
    message.header.flags = NeighbourFlags::Proxy;
    message.attributes.push(NeighbourAttribute::Destination(match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    }));
    message
}

/// The prefix length of one address.
fn whole(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} ", self.to, self.prefix)?;
        match self.next {
            NextHop::Device(index) => write!(f, "dev #{index}")?,
            NextHop::Gateway(via, index) => write!(f, "via {via} dev #{index}")?,
        }
        write!(f, " table {}", self.table)
    }
}

/// A policy rule, for IPv4 and IPv6 alike: which packets look into which table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Rules are tried in ascending order of this.
    pub priority: u32,
    /// Only frames that came in here; all if `None`.
    pub from_interface: Option<String>,
    /// Only packets with this mark; all if `None`.
    pub mark: Option<u32>,
    /// The table to look into.
    pub table: u32,
}

/// An open route socket.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, KernelError> {
        let fail = |e: io::Error| KernelError::new("open a route socket", e);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(fail)?;
        socket.bind_auto().map_err(fail)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(fail)?;
        let limit = TimeVal::milliseconds(LIMIT_MS);
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit).map_err(|e| fail(e.into()))?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(64 * 1024) })
    }

    /// Adds a route, or replaces the one to the same network in the same table, in one step:
    /// there is no moment without a route.
    pub fn replace_route(&mut self, route: &Route) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::NewRoute(route_message(route));
        self.request(message, NLM_F_CREATE | NLM_F_REPLACE)
            .map_err(|e| KernelError::new(format!("set route {route}"), e))
    }

    /// Removes the route to a network; true if there was one.
    pub fn delete_route(
        &mut self,
        table: u32,
        to: impl Into<IpAddr>,
        prefix: u8,
    ) -> Result<bool, KernelError> {
        let to = to.into();
        let mut message = RouteMessage::default();
        message.header.address_family = family(to);
        message.header.destination_prefix_length = prefix;
        message.header.scope = RouteScope::NoWhere;
        message.header.protocol = RouteProtocol::Other(ROUTE_OWNER);
        message.attributes.push(RouteAttribute::Table(table));
        message.attributes.push(RouteAttribute::Destination(route_address(to)));
        match self.request(RouteNetlinkMessage::DelRoute(message), 0) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            Err(e) => Err(KernelError::new(format!("remove route {to}/{prefix} table {table}"), e)),
        }
    }

    /// Our routes of one table.
    pub fn routes(&mut self, table: u32) -> Result<Vec<Route>, KernelError> {
        let mut routes = self.all_routes()?;
        routes.retain(|r| r.table == table);
        Ok(routes)
    }

    /// Our routes of all tables.
    pub fn all_routes(&mut self) -> Result<Vec<Route>, KernelError> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let listed = self.dump(RouteNetlinkMessage::GetRoute(message), |answer| {
                if let RouteNetlinkMessage::NewRoute(message) = answer {
                    found.extend(route_of(&message));
                }
            });
            unless_without(family, listed).map_err(|e| KernelError::new("list routes", e))?;
        }
        Ok(found)
    }

    /// Makes `address` known behind `interface` with `mac`, for good: nobody is ever asked for it.
    pub fn set_neighbour(
        &mut self,
        interface: u32,
        address: impl Into<IpAddr>,
        mac: [u8; 6],
    ) -> Result<(), KernelError> {
        let address = address.into();
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = interface;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unicast;
        let destination = match address {
            IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
            IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
        };
        message.attributes.push(NeighbourAttribute::Destination(destination));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
            .map_err(|e| KernelError::new(format!("set neighbour {address} on #{interface}"), e))
    }

    /// This host answers for an address on an interface, though the address is somebody else's.
    pub(crate) fn set_proxy(&mut self, interface: u32, address: IpAddr) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::NewNeighbour(proxy_message(interface, address));
        self.request(message, NLM_F_CREATE | NLM_F_REPLACE)
            .map_err(|e| KernelError::new(format!("answer for {address} on #{interface}"), e))
    }

    /// It does so no longer.
    pub(crate) fn remove_proxy(
        &mut self,
        interface: u32,
        address: IpAddr,
    ) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::DelNeighbour(proxy_message(interface, address));
        match self.request(message, 0) {
            Err(e) if e.raw_os_error() != Some(libc::ENOENT) => {
                Err(KernelError::new(format!("stop to answer for {address} on #{interface}"), e))
            }
            _ => Ok(()),
        }
    }

    /// Tells a vxlan interface that frames for `mac` go to the host `underlay`.
    pub fn set_tunnel(
        &mut self,
        interface: u32,
        mac: [u8; 6],
        underlay: Ipv4Addr,
    ) -> Result<(), KernelError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = interface;
        message.header.state = NeighbourState::Permanent;
        message.header.flags = NeighbourFlags::Own;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(underlay)));
        self.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
            .map_err(|e| KernelError::new(format!("set tunnel to {underlay} on #{interface}"), e))
    }

    /// Adds a policy rule; one that is there already stays.
    pub fn ensure_rule(&mut self, rule: &Rule) -> Result<(), KernelError> {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let message = RouteNetlinkMessage::NewRule(rule_message(rule, family));
            match unless_without(family, self.request(message, NLM_F_CREATE | NLM_F_EXCL)) {
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
                other => other.map_err(|e| KernelError::new(format!("add {rule:?}"), e))?,
            }
        }
        Ok(())
    }

    /// Removes a policy rule; true if it was there.
    pub fn delete_rule(&mut self, rule: &Rule) -> Result<bool, KernelError> {
        let mut there = false;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let message = RouteNetlinkMessage::DelRule(rule_message(rule, family));
            match self.request(message, 0) {
                Ok(()) => there = true,
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
                Err(e) if lacks(family, &e) => {}
                Err(e) => return Err(KernelError::new(format!("remove {rule:?}"), e)),
            }
        }
        Ok(there)
    }

    /// Waits until an interface sends what is given to it. Between the moment its carrier comes
    /// (a tap's: when it is opened) and the moment the kernel has noticed, frames are dropped.
    pub fn wait_running(&mut self, interface: u32, limit: Duration) -> Result<(), KernelError> {
        let operation = || format!("wait for interface #{interface} to run");
        let mut message = LinkMessage::default();
        message.header.index = interface;
        let deadline = Instant::now() + limit;
        loop {
            // On Linux 6.9 and later the question itself makes the kernel notice.
            let mut running = false;
            self.query(RouteNetlinkMessage::GetLink(message.clone()), |answer| {
                if let RouteNetlinkMessage::NewLink(link) = answer {
                    running = link.header.flags.contains(LinkFlags::Running);
                }
            })
            .map_err(|e| KernelError::new(operation(), e))?;
            if running {
                break;
            }
            if Instant::now() >= deadline {
                let detail =
                    format!("not within {limit:?}; is it up, and does somebody have it open?");
                return Err(KernelError::new(operation(), detail));
            }
            thread::sleep(Duration::from_millis(1));
        }
        // Older kernels say "running" a little early, under a lock that this empty change waits for.
        self.request(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(|e| KernelError::new(operation(), e))
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        Ok(self.sequence)
    }

    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let sequence = self.send(message, flags | NLM_F_ACK)?;
        loop {
            let mut answer = None;
            self.receive(sequence, |payload| {
                if let NetlinkPayload::Error(error) = payload {
                    answer = Some(if error.code.is_none() { Ok(()) } else { Err(error.to_io()) });
                }
            })?;
            if let Some(answer) = answer {
                return answer;
            }
        }
    }

    fn dump(
        &mut self,
        message: RouteNetlinkMessage,
        each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        self.ask(message, NLM_F_DUMP, each)
    }

    fn query(
        &mut self,
        message: RouteNetlinkMessage,
        each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        self.ask(message, NLM_F_ACK, each)
    }

    /// Asks, and hands over the answers up to the end of a dump or the acknowledgement.
    fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        let sequence = self.send(message, flags)?;
        loop {
            let mut end = None;
            self.receive(sequence, |payload| match payload {
                NetlinkPayload::InnerMessage(message) => each(message),
                NetlinkPayload::Done(_) => end = Some(Ok(())),
                NetlinkPayload::Error(error) if error.code.is_none() => end = Some(Ok(())),
                NetlinkPayload::Error(error) => end = Some(Err(error.to_io())),
                _ => {}
            })?;
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Receives one datagram and hands over its messages that answer `sequence`; older ones (of a
    /// request that ran into its deadline) are skipped.
    fn receive(
        &mut self,
        sequence: u32,
        mut each: impl FnMut(NetlinkPayload<RouteNetlinkMessage>),
    ) -> io::Result<()> {
        self.buffer.clear();
        let size = self.socket.recv(&mut self.buffer, 0).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the kernel did not answer within {LIMIT_MS} ms"),
            ),
            _ => e,
        })?;
        let mut rest = &self.buffer[..size];
        while rest.len() >= 16 {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
            let length = (message.header.length as usize).next_multiple_of(4);
            if message.header.sequence_number == sequence {
                each(message.payload);
            }
            if length < 16 {
                break;
            }
            rest = rest.get(length..).unwrap_or_default();
        }
        Ok(())
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

/// A kernel without IPv6 says so in one of these ways.
fn lacks(family: AddressFamily, error: &io::Error) -> bool {
    let code = error.raw_os_error();
    family == AddressFamily::Inet6
        && matches!(code, Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EPFNOSUPPORT))
}

/// What a kernel without IPv6 has nothing of is done.
fn unless_without(family: AddressFamily, result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if lacks(family, &e) => Ok(()),
        other => other,
    }
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(route.to),
        destination_prefix_length: route.prefix,
        table: RouteHeader::RT_TABLE_UNSPEC,
        protocol: RouteProtocol::Other(ROUTE_OWNER),
        kind: RouteType::Unicast,
        ..Default::default()
    };
    message.attributes.push(RouteAttribute::Table(route.table));
    message.attributes.push(RouteAttribute::Destination(route_address(route.to)));
    match route.next {
        NextHop::Device(index) => {
            message.header.scope = RouteScope::Link;
            message.attributes.push(RouteAttribute::Oif(index));
        }
        NextHop::Gateway(via, index) => {
            message.header.scope = RouteScope::Universe;
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(route_address(via)));
            message.attributes.push(RouteAttribute::Oif(index));
        }
    }
    message
}

fn route_of(message: &RouteMessage) -> Option<Route> {
    if message.header.protocol != RouteProtocol::Other(ROUTE_OWNER) {
        return None;
    }
    // The kernel leaves out a destination that is everything.
    let mut to = match message.header.address_family {
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    let mut table = u32::from(message.header.table);
    let (mut device, mut gateway) = (None, None);
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(t) => table = *t,
            RouteAttribute::Destination(a) => to = address(a)?,
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::Gateway(a) => gateway = address(a),
            _ => {}
        }
    }
    let device = device?;
    let next = gateway.map_or(NextHop::Device(device), |via| NextHop::Gateway(via, device));
    Some(Route { table, to, prefix: message.header.destination_prefix_length, next })
}

fn rule_message(rule: &Rule, family: AddressFamily) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.action = RuleAction::ToTable;
    message.attributes.push(RuleAttribute::Priority(rule.priority));
    message.attributes.push(RuleAttribute::Table(rule.table));
    if let Some(name) = &rule.from_interface {
        message.attributes.push(RuleAttribute::Iifname(name.clone()));
    }
    if let Some(mark) = rule.mark {
        message.attributes.push(RuleAttribute::FwMark(mark));
        message.attributes.push(RuleAttribute::FwMask(u32::MAX));
    }
    message
}

/// The index of an interface of this thread's namespace.
pub fn interface_index(name: &str) -> Result<u32, KernelError> {
    nix::net::if_::if_nametoindex(name)
        .map_err(|e| KernelError::new(format!("find interface {name}"), e.desc()))
}
