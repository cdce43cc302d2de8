//! Whole entries of connection tracking: read, made on another computer, and removed. For the drain of
//! an edge ([`crate::edge`]), whose connections go on there without a packet that says so.
//!
//! An entry is made as it would have become: its reply tuple as if nothing were translated, and what is
//! translated as `CTA_NAT_SRC` and `CTA_NAT_DST`, from which the kernel makes the reply tuple itself.
//! Numbers are those of `linux/netfilter/nfnetlink_conntrack.h`.

use super::{DONE, ERROR, attribute, each, messages, open};
use crate::exec::KernelError;
use netlink_sys::Socket;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, io, net::IpAddr};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW`, and `IPCTNL_MSG_CT_DELETE`.
const NEW: u16 = 0x0100;
const DELETE: u16 = 0x0102;
/// `NLM_F_REQUEST | NLM_F_ACK`, and with `NLM_F_CREATE | NLM_F_EXCL`.
const ASK: u16 = 0x0005;
const CREATE: u16 = ASK | 0x0600;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// `enum ctattr_type`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOINFO: u16 = 4;
const NAT_SRC: u16 = 6;
const TIMEOUT: u16 = 7;
const MARK: u16 = 8;
const NAT_DST: u16 = 13;
const ZONE: u16 = 18;

/// `enum ip_conntrack_status`: what is carried over. The rest the kernel sets by itself.
const SEEN_REPLY: u32 = 1 << 1;
const ASSURED: u32 = 1 << 2;
const CONFIRMED: u32 = 1 << 3;
/// `IP_CT_TCP_FLAG_BE_LIBERAL`: the kernel tells no windows, so there are none to hold anybody to.
const LIBERAL: u8 = 8;

/// Entries made by one call of the kernel. Its answers must fit the socket's buffer.
const BATCH: usize = 64;
/// An entry of TCP that is that old is not worth less: it lives as long as here.
const LONGEST: u32 = 5 * 24 * 3600;

/// One direction of an entry. Of ICMP the ports are the echo's identifier, and its type and code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FlowTuple {
    /// Who sends.
    pub from: IpAddr,
    /// To whom.
    pub to: IpAddr,
    /// Source port; of ICMP the identifier.
    pub sport: u16,
    /// Destination port; of ICMP type and code, a byte each.
    pub dport: u16,
    /// The zone of this direction alone; 0 for none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub zone: u16,
}

/// What is known of a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tcp {
    /// `enum tcp_conntrack`.
    pub state: u8,
    /// Window scale of either direction.
    pub scale: [u8; 2],
    /// `IP_CT_TCP_FLAG_...` of either direction.
    pub flags: [u8; 2],
}

/// A tracked connection, whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// IP protocol.
    pub protocol: u8,
    /// As the first packet had it.
    pub original: FlowTuple,
    /// As answers come.
    pub reply: FlowTuple,
    /// The zone of both directions; 0 for none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub zone: u16,
    /// `IPS_...`
    pub status: u32,
    /// Seconds that it stays if it is silent.
    pub timeout: u32,
    /// Its mark.
    #[serde(default, skip_serializing_if = "none")]
    pub mark: u32,
    /// Of TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<Tcp>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn is_zero(zone: &u16) -> bool {
    *zone == 0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn none(mark: &u32) -> bool {
    *mark == 0
}

/// What names an entry, in all zones.
pub type FlowId = (u8, FlowTuple, u16);

const ICMP: u8 = 1;
const ICMP6: u8 = 58;
const TCP: u8 = 6;

impl FlowTuple {
    /// As it would be answered if nothing were translated.
    fn answered(&self, protocol: u8) -> Self {
        let Self { from, to, sport, dport, .. } = *self;
        let (sport, dport) = match protocol {
            // The identifier stays; a request is answered by a reply.
            ICMP | ICMP6 => (sport, answer_to(protocol, dport)),
            _ => (dport, sport),
        };
        Self { from: to, to: from, sport, dport, zone: 0 }
    }
}

/// Type and code of an answer.
fn answer_to(protocol: u8, asked: u16) -> u16 {
    let [kind, code] = asked.to_be_bytes();
    let answer = match (protocol, kind) {
        (ICMP, 8) => 0,
        (ICMP, 0) => 8,
        (ICMP6, 128) => 129,
        (ICMP6, 129) => 128,
        // Requests of time, information and mask, one above the other.
        (ICMP, 13 | 15 | 17) => kind + 1,
        (ICMP, 14 | 16 | 18) => kind - 1,
        _ => kind,
    };
    u16::from_be_bytes([answer, code])
}

impl Flow {
    /// What names it.
    #[must_use]
    pub fn id(&self) -> FlowId {
        (self.protocol, self.original, self.zone)
    }

    /// Whether one of these addresses is an end of it, and it is translated.
    #[must_use]
    pub fn is_of(&self, addresses: &[IpAddr]) -> bool {
        let plain = self.original.answered(self.protocol);
        let translated = FlowTuple { zone: 0, ..self.reply } != plain;
        translated && (addresses.contains(&self.original.to) || addresses.contains(&self.reply.to))
    }

    /// Whether its addresses are of one family, as the kernel's always are.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let v4 = self.original.from.is_ipv4();
        let all = [self.original.to, self.reply.from, self.reply.to];
        all.iter().all(|a| a.is_ipv4() == v4)
    }

    /// Whether it is worth saying again, another view of it being known.
    #[must_use]
    pub fn differs(&self, known: &Self) -> bool {
        let what = |flow: &Self| (flow.reply, flow.status, flow.mark, flow.tcp.map(|t| t.state));
        what(self) != what(known)
    }

    fn family(&self) -> u8 {
        if self.original.from.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
    }

    /// The message that makes it.
    fn create(&self, number: u32) -> Vec<u8> {
        let plain = FlowTuple { zone: self.reply.zone, ..self.original.answered(self.protocol) };
        let mut body = tuple(ORIGINAL, self.protocol, &self.original);
        body.extend(tuple(REPLY, self.protocol, &plain));
        if self.zone != 0 {
            body.extend(number16(ZONE, self.zone));
        }
        // The source that is seen outside is where answers go, and the destination who answers.
        if (self.reply.to, self.reply.dport) != (plain.to, plain.dport) || self.icmp_differs(&plain)
        {
            body.extend(self.translated(NAT_SRC, self.reply.to, self.seen_port()));
        }
        if (self.reply.from, self.reply.sport) != (plain.from, plain.sport) && !self.is_icmp()
            || self.is_icmp() && self.reply.from != plain.from
        {
            body.extend(self.translated(NAT_DST, self.reply.from, self.reply.sport));
        }
        let status = self.status & (SEEN_REPLY | ASSURED) | CONFIRMED;
        body.extend(number32(STATUS, status));
        body.extend(number32(TIMEOUT, self.timeout.clamp(1, LONGEST)));
        if self.mark != 0 {
            body.extend(number32(MARK, self.mark));
        }
        if let Some(tcp) = &self.tcp {
            let flags = |of: u8| [of | LIBERAL, of | LIBERAL];
            let tcp = [
                attr(1, &[tcp.state]),
                attr(2, &[tcp.scale[0]]),
                attr(3, &[tcp.scale[1]]),
                attr(4, &flags(tcp.flags[0])),
                attr(5, &flags(tcp.flags[1])),
            ];
            body.extend(attr(PROTOINFO | NESTED, &attr(1 | NESTED, &tcp.concat())));
        }
        message(NEW, CREATE, number, self.family(), &body)
    }

    fn is_icmp(&self) -> bool {
        matches!(self.protocol, ICMP | ICMP6)
    }

    /// Of an echo the identifier may have been changed.
    fn icmp_differs(&self, plain: &FlowTuple) -> bool {
        self.is_icmp() && self.reply.sport != plain.sport
    }

    /// The port, or identifier, that is seen outside.
    fn seen_port(&self) -> u16 {
        if self.is_icmp() { self.reply.sport } else { self.reply.dport }
    }

    /// `enum ctattr_nat` and `enum ctattr_protonat`: exactly this address and port.
    fn translated(&self, kind: u16, address: IpAddr, port: u16) -> Vec<u8> {
        let (least, most) = if address.is_ipv4() { (1, 2) } else { (4, 5) };
        let address = bytes_of(address);
        let ports = [number16(1, port), number16(2, port)].concat();
        let mut body = [attr(least, &address), attr(most, &address)].concat();
        let has_port = !(self.is_icmp() && kind == NAT_DST);
        if has_port {
            body.extend(attr(3 | NESTED, &ports));
        }
        attr(kind | NESTED, &body)
    }

    /// The message that removes it.
    fn delete(&self, number: u32) -> Vec<u8> {
        let mut body = tuple(ORIGINAL, self.protocol, &self.original);
        if self.zone != 0 {
            body.extend(number16(ZONE, self.zone));
        }
        message(DELETE, ASK, number, self.family(), &body)
    }

    /// Reads a message of the kernel's, past its headers.
    fn read(message: &[u8]) -> Option<Self> {
        let (protocol, original) = read_tuple(attribute(message, ORIGINAL)?)?;
        let (_, reply) = read_tuple(attribute(message, REPLY)?)?;
        let tcp = attribute(message, PROTOINFO).and_then(|info| {
            let tcp = attribute(info, 1)?;
            let byte = |kind| attribute(tcp, kind).and_then(|v| v.first().copied());
            Some(Tcp {
                state: byte(1)?,
                scale: [byte(2).unwrap_or(0), byte(3).unwrap_or(0)],
                flags: [byte(4).unwrap_or(0), byte(5).unwrap_or(0)],
            })
        });
        let number = |kind| u32_of(attribute(message, kind)?);
        Some(Self {
            protocol,
            original,
            reply,
            zone: attribute(message, ZONE).and_then(u16_of).unwrap_or(0),
            status: number(STATUS)?,
            timeout: number(TIMEOUT).unwrap_or(0),
            mark: number(MARK).unwrap_or(0),
            tcp: tcp.filter(|_| protocol == TCP),
        })
    }
}

/// Attributes of `enum ctattr_tuple`, `ctattr_ip` and `ctattr_l4proto`.
fn tuple(kind: u16, protocol: u8, tuple: &FlowTuple) -> Vec<u8> {
    let (from, to) = if tuple.from.is_ipv4() { (1, 2) } else { (3, 4) };
    let ip = [attr(from, &bytes_of(tuple.from)), attr(to, &bytes_of(tuple.to))].concat();
    let mut proto = attr(1, &[protocol]);
    let [what, code] = tuple.dport.to_be_bytes();
    match protocol {
        ICMP => {
            proto.extend([number16(4, tuple.sport), attr(5, &[what]), attr(6, &[code])].concat());
        }
        ICMP6 => {
            proto.extend([number16(7, tuple.sport), attr(8, &[what]), attr(9, &[code])].concat());
        }
        _ => proto.extend([number16(2, tuple.sport), number16(3, tuple.dport)].concat()),
    }
    let mut body = [attr(1 | NESTED, &ip), attr(2 | NESTED, &proto)].concat();
    if tuple.zone != 0 {
        body.extend(number16(3, tuple.zone));
    }
    attr(kind | NESTED, &body)
}

fn read_tuple(nested: &[u8]) -> Option<(u8, FlowTuple)> {
    let (ip, proto) = (attribute(nested, 1)?, attribute(nested, 2)?);
    let address = |v4: u16, v6: u16| -> Option<IpAddr> {
        match attribute(ip, v4) {
            Some(bytes) => Some(IpAddr::from(*bytes.first_chunk::<4>()?)),
            None => Some(IpAddr::from(*attribute(ip, v6)?.first_chunk::<16>()?)),
        }
    };
    let protocol = *attribute(proto, 1)?.first()?;
    let number = |kind| attribute(proto, kind).and_then(u16_of);
    let byte = |kind| attribute(proto, kind).and_then(|v| v.first().copied());
    let (sport, dport) = match protocol {
        ICMP => (number(4)?, u16::from_be_bytes([byte(5)?, byte(6)?])),
        ICMP6 => (number(7)?, u16::from_be_bytes([byte(8)?, byte(9)?])),
        _ => (number(2).unwrap_or(0), number(3).unwrap_or(0)),
    };
    let zone = attribute(nested, 3).and_then(u16_of).unwrap_or(0);
    Some((protocol, FlowTuple { from: address(1, 3)?, to: address(2, 4)?, sport, dport, zone }))
}

fn u16_of(value: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(*value.first_chunk()?))
}

fn u32_of(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*value.first_chunk()?))
}

fn bytes_of(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("attributes here are small");
    let mut bytes = Vec::with_capacity(value.len() + 8);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn number16(kind: u16, value: u16) -> Vec<u8> {
    attr(kind, &value.to_be_bytes())
}

fn number32(kind: u16, value: u32) -> Vec<u8> {
    attr(kind, &value.to_be_bytes())
}

/// nlmsghdr, nfgenmsg of version 0, and the body.
fn message(kind: u16, flags: u16, number: u32, family: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(20 + body.len()).expect("messages here are small");
    let mut bytes = Vec::with_capacity(20 + body.len());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(number.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([family, 0, 0, 0]);
    bytes.extend(body);
    bytes
}

/// What became of many entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// As asked.
    pub done: usize,
    /// Refused by the kernel.
    pub failed: usize,
}

fn failed(operation: &str, error: &io::Error) -> KernelError {
    KernelError::new(
        operation,
        format!("{error}; this needs root and a kernel with CONFIG_NF_CT_NETLINK"),
    )
}

/// All entries that [are of](Flow::is_of) these addresses, in this network namespace.
pub fn taken(addresses: &[IpAddr]) -> Result<BTreeMap<FlowId, Flow>, KernelError> {
    let mut found = BTreeMap::new();
    each(|body| {
        if let Some(flow) = Flow::read(body).filter(|flow| flow.is_of(addresses)) {
            found.insert(flow.id(), flow);
        }
    })
    .map_err(|e| failed("list tracked connections", &e))?;
    Ok(found)
}

/// Makes entries. One that is there already, from an earlier time, is replaced.
pub fn made(flows: &[Flow]) -> Result<Done, KernelError> {
    let fail = |e: io::Error| failed("make tracked connections", &e);
    let socket = open().map_err(fail)?;
    let mut done = Done::default();
    for batch in flows.chunks(BATCH) {
        let errors = ask(&socket, batch, Flow::create).map_err(fail)?;
        let there: Vec<Flow> = batch
            .iter()
            .zip(&errors)
            .filter(|(_, error)| **error == libc::EEXIST)
            .map(|(flow, _)| *flow)
            .collect();
        let mut bad = errors.iter().filter(|e| **e != 0 && **e != libc::EEXIST).count();
        if !there.is_empty() {
            ask(&socket, &there, Flow::delete).map_err(fail)?;
            let again = ask(&socket, &there, Flow::create).map_err(fail)?;
            bad += again.iter().filter(|e| **e != 0).count();
        }
        done.done += batch.len() - bad;
        done.failed += bad;
    }
    Ok(done)
}

/// Removes entries; that one is gone already is as well.
pub fn ended<'a>(flows: impl Iterator<Item = &'a Flow>) -> Result<Done, KernelError> {
    let fail = |e: io::Error| failed("remove tracked connections", &e);
    let socket = open().map_err(fail)?;
    let mut done = Done::default();
    let flows: Vec<Flow> = flows.copied().collect();
    for batch in flows.chunks(BATCH) {
        let errors = ask(&socket, batch, Flow::delete).map_err(fail)?;
        let bad = errors.iter().filter(|e| **e != 0 && **e != libc::ENOENT).count();
        done.done += batch.len() - bad;
        done.failed += bad;
    }
    Ok(done)
}

/// One message for each flow, in one call; the kernel's answers in order.
fn ask(
    socket: &Socket,
    flows: &[Flow],
    what: impl Fn(&Flow, u32) -> Vec<u8>,
) -> io::Result<Vec<i32>> {
    let mut text = Vec::new();
    for (number, flow) in (1..).zip(flows) {
        text.extend(what(flow, number));
    }
    socket.send(&text, 0)?;
    let mut errors = vec![None; flows.len()];
    let mut buffer = Vec::with_capacity(64 * 1024);
    while errors.iter().any(Option::is_none) {
        buffer.clear();
        socket.recv(&mut buffer, 0)?;
        for (kind, body) in messages(&buffer) {
            // nlmsgerr: the error, and the header of the question.
            let number = body.get(12..).and_then(|b| Some(u32::from_ne_bytes(*b.first_chunk()?)));
            let at = number.and_then(|n| errors.get_mut(n.checked_sub(1)? as usize));
            if let (ERROR, Some(at)) = (kind, at) {
                *at = body.first_chunk().map(|b| -i32::from_ne_bytes(*b));
            } else if kind == DONE {
                return Err(io::Error::other("an end without an answer"));
            }
        }
    }
    Ok(errors.into_iter().flatten().collect())
}

#[cfg(test)]
#[path = "flow_tests.rs"]
mod tests;
