//! The kernel's connection tracking, as an edge has it: which public address and port a conversation
//! of a machine has outside. Read by ctnetlink (`linux/netfilter/nfnetlink_conntrack.h`), of the
//! calling thread's network namespace.
//!
//! What the kernel says is read with every length checked. [`list`] is for looking on; [`flow`] reads
//! entries whole, and makes and removes them: a drain hands them to another edge.

mod flow;

pub use flow::{Done, Flow, FlowId, FlowTuple, Tcp, ended, made, taken};

use crate::exec::KernelError;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_NETFILTER};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::{TimeVal, TimeValLike},
};
use std::{
    io,
    net::{IpAddr, SocketAddr},
};

/// How long the kernel may take for one part of its answer.
const LIMIT_MS: i64 = 2000;
/// More connections than this are not listed.
const CONNECTIONS: usize = 1 << 20;

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET`.
const GET: u16 = 0x0101;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x0301;
/// `NLMSG_ERROR`, `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    /// Who sends. The port is an echo's identifier for ICMP.
    pub from: SocketAddr,
    /// To whom.
    pub to: SocketAddr,
}

/// A connection that is tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// IP protocol.
    pub protocol: u8,
    /// As the first packet had it.
    pub original: Tuple,
    /// As answers come.
    pub reply: Tuple,
    /// For how long it stays if it is silent, in seconds.
    pub timeout: Option<u32>,
    /// The state of TCP, by name.
    pub state: Option<&'static str>,
}

/// All connections of this network namespace.
pub fn list() -> Result<Vec<Connection>, KernelError> {
    dump().map_err(|e| {
        KernelError::new(
            "list tracked connections",
            format!("{e}; this needs root and a kernel with CONFIG_NF_CT_NETLINK"),
        )
    })
}

fn dump() -> io::Result<Vec<Connection>> {
    let mut found = Vec::new();
    each(|body| {
        if found.len() < CONNECTIONS {
            found.extend(connection(body));
        }
    })?;
    Ok(found)
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&NetlinkAddr::new(0, 0))?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(LIMIT_MS))?;
    Ok(socket)
}

/// What follows the headers of every entry's message.
fn each(mut entry: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = open()?;
    // nlmsghdr and nfgenmsg, of any family.
    let mut request = Vec::with_capacity(20);
    request.extend(20_u32.to_ne_bytes());
    request.extend(GET.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.extend(1_u32.to_ne_bytes());
    request.extend([0; 8]);
    socket.send(&request, 0)?;
    let mut buffer = Vec::with_capacity(64 * 1024);
    loop {
        buffer.clear();
        socket.recv(&mut buffer, 0)?;
        for (kind, body) in messages(&buffer) {
            match kind {
                DONE => return Ok(()),
                ERROR => {
                    let code = body.first_chunk().map_or(0, |b| i32::from_ne_bytes(*b));
                    return Err(io::Error::from_raw_os_error(-code));
                }
                // Past nfgenmsg.
                _ => body.get(4..).into_iter().for_each(&mut entry),
            }
        }
    }
}

/// The messages of a datagram: type and what follows the header.
fn messages(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
        let body = rest.get(16..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// The attributes of a message: type without its flags, and value.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        // NLA_F_NESTED and NLA_F_NET_BYTEORDER.
        Some((kind & 0x3fff, value))
    })
}

fn attribute(within: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(within).find_map(|(k, value)| (k == kind).then_some(value))
}

/// Attributes of `enum ctattr_type`.
fn connection(message: &[u8]) -> Option<Connection> {
    let (protocol, original) = tuple(attribute(message, 1)?)?;
    let (_, reply) = tuple(attribute(message, 2)?)?;
    let timeout = attribute(message, 7).and_then(|v| Some(u32::from_be_bytes(*v.first_chunk()?)));
    // CTA_PROTOINFO, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_STATE.
    let tcp = attribute(message, 4).and_then(|v| attribute(attribute(v, 1)?, 1)?.first().copied());
    let state = tcp.map(|state| match state {
        1 => "syn-sent",
        2 => "syn-received",
        3 => "established",
        4 => "fin-wait",
        5 => "close-wait",
        6 => "last-ack",
        7 => "time-wait",
        8 => "close",
        _ => "none",
    });
    Some(Connection { protocol, original, reply, timeout, state })
}

/// Attributes of `enum ctattr_tuple`, `ctattr_ip` and `ctattr_l4proto`.
fn tuple(nested: &[u8]) -> Option<(u8, Tuple)> {
    let (ip, proto) = (attribute(nested, 1)?, attribute(nested, 2)?);
    let address = |v4: u16, v6: u16| -> Option<IpAddr> {
        match attribute(ip, v4) {
            Some(bytes) => Some(IpAddr::from(*bytes.first_chunk::<4>()?)),
            None => Some(IpAddr::from(*attribute(ip, v6)?.first_chunk::<16>()?)),
        }
    };
    let port =
        |kind| attribute(proto, kind).and_then(|v| Some(u16::from_be_bytes(*v.first_chunk()?)));
    let protocol = *attribute(proto, 1)?.first()?;
    // An echo has one identifier for both ends: CTA_PROTO_ICMP_ID, CTA_PROTO_ICMPV6_ID.
    let echo = port(4).or_else(|| port(7));
    let from = SocketAddr::new(address(1, 3)?, port(2).or(echo).unwrap_or(0));
    let to = SocketAddr::new(address(2, 4)?, port(3).unwrap_or(0));
    Some((protocol, Tuple { from, to }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((4 + value.len() as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn tuple_of(kind: u16, from: [u8; 4], sport: u16, to: [u8; 4], dport: u16) -> Vec<u8> {
        let ip = [attr(1, &from), attr(2, &to)].concat();
        let ports = [attr(2, &sport.to_be_bytes()), attr(3, &dport.to_be_bytes())].concat();
        let proto = [attr(1, &[6]), ports].concat();
        attr(0x8000 | kind, &[attr(0x8001, &ip), attr(0x8002, &proto)].concat())
    }

    fn message() -> Vec<u8> {
        [
            tuple_of(1, [203, 0, 113, 2], 4040, [203, 0, 113, 1], 80),
            tuple_of(2, [10, 77, 0, 5], 8080, [203, 0, 113, 2], 4040),
            attr(7, &431_999_u32.to_be_bytes()),
            attr(0x8004, &attr(0x8001, &attr(1, &[3]))),
        ]
        .concat()
    }

    #[test]
    fn a_connection_is_read_in_both_directions_with_its_state() {
        let found = connection(&message()).unwrap();
        assert_eq!(
            (found.protocol, found.state, found.timeout),
            (6, Some("established"), Some(431_999))
        );
        assert_eq!(found.original.to, "203.0.113.1:80".parse().unwrap());
        assert_eq!(found.reply.from, "10.77.0.5:8080".parse().unwrap());
    }

    #[test]
    fn a_message_that_is_cut_short_anywhere_is_left_out_or_has_less_and_never_panics() {
        let whole = message();
        for size in 0..whole.len() {
            let _ = connection(&whole[..size]);
        }
        assert!(connection(&whole[..40]).is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_go_on_for_ever(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for (_, body) in messages(&bytes) {
                let _ = connection(body);
            }
            let _ = connection(&bytes);
        }
    }
}
