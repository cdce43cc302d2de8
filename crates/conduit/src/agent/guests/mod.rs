//! What a host says to the machines that run on it: their address by DHCP, their router, IPv6 address and
//! MTU by router advertisements, and names, which it asks the edge for. (ARP and neighbour questions for the gateway are answered by the
//! kernel, whose address it is.) So a stock guest needs nobody who tells it its addresses.
//!
//! Called by the agent, whose book has the answers. One thread per service. While the agent is away nobody
//! answers; clients ask again. What must hold:
//!
//! - A question is believed by the tap it came in by, never by what it says; the answer goes to that tap
//!   alone.
//! - A machine is answered by the host that it runs on, and no other.
//! - How often a machine may ask is bounded in the kernel, by the rules at the tap ([`crate::host`]).

pub(crate) mod dhcp;
mod names;
pub(crate) mod router;

use super::{Shared, server::spawn};
use crate::{
    book::Place,
    datapath::MachineNet,
    exec::KernelError,
    netlink::interface_index,
    sys,
    tap::{self, GATEWAY, GATEWAY_V6},
};
use nix::{
    cmsg_space,
    net::if_::if_indextoname,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrLike,
        recvmsg, sendmsg, setsockopt, sockopt,
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
/// Longer than what fits an Ethernet frame of most networks; what is longer is cut, and not understood.
const LONGEST: usize = 2048;
/// How often machines are told of their router unasked: a third of what they believe in it would do.
const EVERY: Duration = Duration::from_secs(600);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// What machines are told besides what is theirs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Names are answered at the gateway.
    pub(crate) names: bool,
    /// Machines' names end with this.
    pub(crate) domain: Option<String>,
}

/// A machine's name as a label of a domain name, if it can be one.
pub(crate) fn label(machine: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let fits = (1..=63).contains(&machine.len()) && machine.chars().all(plain);
    let whole = !machine.starts_with('-') && !machine.ends_with('-');
    (fits && whole).then(|| machine.to_ascii_lowercase())
}

/// Starts to answer. Where a service cannot, it is said, and the others go on.
pub(super) fn serve(shared: &Arc<Shared>) {
    match dhcp_socket() {
        Ok(socket) => {
            let shared = shared.clone();
            spawn("agent-dhcp", move || serve_dhcp(&socket, &shared));
        }
        Err(error) => {
            tracing::warn!(%error, "guests that ask for their address by DHCP get no answer");
        }
    }
    if let Err(error) = names::serve(shared) {
        tracing::warn!(%error, "guests that ask for names get no answer");
    }
    if !crate::host::has_ipv6() {
        return;
    }
    match sys::solicitations(Duration::from_secs(1)) {
        Ok(socket) => {
            let shared = shared.clone();
            spawn("agent-router", move || serve_router(&socket, &shared));
        }
        Err(error) => tracing::warn!(%error, "guests are not told of their IPv6 router"),
    }
}

impl Shared {
    /// The machine behind a tap, if it runs here.
    fn behind(&self, index: u32) -> Option<MachineNet> {
        let name = if_indextoname(index).ok()?;
        let key = tap::key(name.to_str().ok()?)?;
        let core = self.core();
        let record = core.book.get(key)?;
        let runs = record.place == Place::Here && !record.retiring;
        runs.then(|| record.net.clone())
    }

    /// The machines with IPv6 that run here, by tap.
    fn routed_here(&self) -> Vec<(u32, MachineNet)> {
        let core = self.core();
        let runs = |r: &&crate::book::Record| {
            r.place == Place::Here && !r.retiring && r.net.address_v6.is_some()
        };
        let nets: Vec<_> = core.book.records().filter(runs).map(|r| r.net.clone()).collect();
        drop(core);
        let tap = |net: MachineNet| Some((interface_index(&tap::name(net.key())).ok()?, net));
        nets.into_iter().filter_map(tap).collect()
    }
}

/// One datagram: its size, the interface that it came in by, and from whom.
fn receive<A: SockaddrLike>(
    socket: &impl AsRawFd,
    bytes: &mut [u8],
) -> io::Result<(usize, Option<u32>, Option<A>)> {
    let mut space = cmsg_space!(libc::in6_pktinfo);
    let mut pieces = [IoSliceMut::new(bytes)];
    let got = recvmsg::<A>(socket.as_raw_fd(), &mut pieces, Some(&mut space), MsgFlags::empty())?;
    let mut cmsgs = got.cmsgs()?;
    let index = cmsgs.find_map(|c| match c {
        ControlMessageOwned::Ipv4PacketInfo(info) => u32::try_from(info.ipi_ifindex).ok(),
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(info.ipi6_ifindex),
        _ => None,
    });
    Ok((got.bytes, index, got.address))
}

fn dhcp_socket() -> Result<UdpSocket, KernelError> {
    let fail = |e: io::Error| {
        let detail = format!("{e}; another DHCP server of this host may have the port");
        KernelError::new(format!("listen on UDP port {DHCP_SERVER}"), detail)
    };
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, DHCP_SERVER)).map_err(fail)?;
    socket.set_broadcast(true).map_err(fail)?;
    setsockopt(&socket, sockopt::Ipv4PacketInfo, &true).map_err(|e| fail(e.into()))?;
    Ok(socket)
}

fn serve_dhcp(socket: &UdpSocket, shared: &Shared) {
    let mut bytes = [0; LONGEST];
    loop {
        if let Err(error) = answer_dhcp(socket, shared, &mut bytes) {
            tracing::debug!(%error, "a DHCP question was not answered");
            pause_if_broken(&error);
        }
    }
}

fn answer_dhcp(socket: &UdpSocket, shared: &Shared, bytes: &mut [u8]) -> io::Result<()> {
    let (size, index, _) = receive::<SockaddrIn>(socket, bytes)?;
    let Some(index) = index else { return Ok(()) };
    let Some(net) = shared.behind(index) else { return Ok(()) };
    let Some((answer, to)) = dhcp::answer(&bytes[..size], &net, &shared.offer()) else {
        return Ok(());
    };
    let info = libc::in_pktinfo {
        ipi_ifindex: i32::try_from(index).map_err(io::Error::other)?,
        ipi_spec_dst: libc::in_addr { s_addr: u32::from(GATEWAY).to_be() },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let to = SockaddrIn::from(SocketAddrV4::new(to, DHCP_CLIENT));
    let control = [ControlMessage::Ipv4PacketInfo(&info)];
    let pieces = [IoSlice::new(&answer)];
    sendmsg(socket.as_raw_fd(), &pieces, &control, MsgFlags::MSG_DONTWAIT, Some(&to))?;
    Ok(())
}

fn serve_router(socket: &OwnedFd, shared: &Shared) {
    let mut bytes = [0; LONGEST];
    // At once: who runs here may have come while no agent was.
    let mut next = Instant::now();
    loop {
        if Instant::now() >= next {
            for (index, net) in shared.routed_here() {
                tell_of_router(socket, index, &net);
            }
            next = Instant::now() + EVERY;
        }
        match receive::<SockaddrIn6>(socket, &mut bytes) {
            Ok((size, Some(index), _)) if router::is_solicitation(&bytes[..size]) => {
                if let Some(net) = shared.behind(index) {
                    tell_of_router(socket, index, &net);
                }
            }
            Ok(_) => {}
            Err(error) => pause_if_broken(&error),
        }
    }
}

/// To all on the link: nobody but the machine is there.
fn tell_of_router(socket: &OwnedFd, index: u32, net: &MachineNet) {
    let Some(said) = router::advertisement(net) else { return };
    let info = libc::in6_pktinfo {
        ipi6_addr: libc::in6_addr { s6_addr: GATEWAY_V6.octets() },
        ipi6_ifindex: index,
    };
    let to = SockaddrIn6::from(SocketAddrV6::new(ALL_NODES, 0, 0, index));
    let control = [ControlMessage::Ipv6PacketInfo(&info)];
    let pieces = [IoSlice::new(&said)];
    let sent = sendmsg(socket.as_raw_fd(), &pieces, &control, MsgFlags::MSG_DONTWAIT, Some(&to));
    if let Err(error) = sent {
        tracing::debug!(machine = net.machine, %error, "it was not told of its router");
    }
}

/// A socket that fails again and again must not take a processor with it.
fn pause_if_broken(error: &io::Error) {
    let usual = [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted, io::ErrorKind::TimedOut];
    if !usual.contains(&error.kind()) {
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_name_is_a_label_if_it_can_be_one() {
        assert_eq!(label("Web-1").as_deref(), Some("web-1"));
        for not in ["", "-a", "a-", "a.b", "a b", "ä", &"a".repeat(64)] {
            assert_eq!(label(not), None, "{not}");
        }
    }
}
