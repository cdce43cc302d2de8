//! Packets as they pass the tun device: a `virtio_net_hdr`, then IP. Large segments are cut into
//! packets on the way out ([`cut`]) and packets of a stream are put together on the way in
//! ([`Merger`]). No I/O, and no allocation per packet.
//!
//! The tunnel's loop calls it. Whatever the bytes are, nothing here panics: a frame that is not
//! what its header says is an error or is passed on as it is.

mod checksum;
mod cut;
mod merge;

pub use cut::{Malformed, cut};
pub use merge::Merger;

use std::net::IpAddr;

/// Bytes of a `virtio_net_hdr` (`linux/virtio_net.h`), without the count of buffers.
pub const VNET: usize = 10;
/// The largest IP packet.
pub const LARGEST: usize = 65_535;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum holds the sum of the pseudo header only.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_ECN`: a mark beside the kind.
const GSO_ECN: u8 = 0x80;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What the frame is one of many of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Itself (`VIRTIO_NET_HDR_GSO_NONE`).
    Single,
    /// TCP segments over IPv4 (`VIRTIO_NET_HDR_GSO_TCPV4`).
    Tcp4,
    /// TCP segments over IPv6 (`VIRTIO_NET_HDR_GSO_TCPV6`).
    Tcp6,
    /// UDP datagrams (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Datagrams,
}

impl Kind {
    fn read(byte: u8) -> Option<Self> {
        match byte & !GSO_ECN {
            0 => Some(Self::Single),
            1 => Some(Self::Tcp4),
            4 => Some(Self::Tcp6),
            5 => Some(Self::Datagrams),
            _ => None,
        }
    }

    fn byte(self) -> u8 {
        match self {
            Self::Single => 0,
            Self::Tcp4 => 1,
            Self::Tcp6 => 4,
            Self::Datagrams => 5,
        }
    }
}

/// A `virtio_net_hdr`, in the computer's own byte order as tun devices have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct VnetHeader {
    needs_checksum: bool,
    kind: Kind,
    /// Bytes of headers, or zero.
    headers: u16,
    /// Bytes of payload in each segment.
    segment: u16,
    /// Where the sum begins.
    start: u16,
    /// Where the checksum is, from there.
    offset: u16,
}

impl VnetHeader {
    fn read(bytes: [u8; VNET]) -> Option<Self> {
        let [flags, kind, a, b, c, d, e, f, g, h] = bytes;
        Some(Self {
            needs_checksum: flags & NEEDS_CSUM != 0,
            kind: Kind::read(kind)?,
            headers: u16::from_ne_bytes([a, b]),
            segment: u16::from_ne_bytes([c, d]),
            start: u16::from_ne_bytes([e, f]),
            offset: u16::from_ne_bytes([g, h]),
        })
    }

    fn bytes(self) -> [u8; VNET] {
        let [a, b] = self.headers.to_ne_bytes();
        let [c, d] = self.segment.to_ne_bytes();
        let [e, f] = self.start.to_ne_bytes();
        let [g, h] = self.offset.to_ne_bytes();
        let flags = if self.needs_checksum { NEEDS_CSUM } else { 0 };
        [flags, self.kind.byte(), a, b, c, d, e, f, g, h]
    }
}

/// Source and destination of an IP packet; `None` if it is none.
#[must_use]
pub fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let v4 = |at: usize| packet.get(at..)?.first_chunk::<4>().map(|b| IpAddr::from(*b));
    let v6 = |at: usize| packet.get(at..)?.first_chunk::<16>().map(|b| IpAddr::from(*b));
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => Some((v4(12)?, v4(16)?)),
        6 if packet.len() >= 40 => Some((v6(8)?, v6(24)?)),
        _ => None,
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put(bytes: &mut [u8], at: usize, word: u16) {
    bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

/// Fills in the checksum of an IPv4 header.
fn finish_v4(header: &mut [u8]) {
    header[10..12].fill(0);
    let sum = checksum::fold(checksum::add(0, header));
    header[10..12].copy_from_slice(&(!sum).to_ne_bytes());
}

#[cfg(test)]
mod tests;
