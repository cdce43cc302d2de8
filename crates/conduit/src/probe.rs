//! How large a packet may be on the way to a peer and back: echoes of growing size that may not be cut
//! on the way. For `conduit check`; the data path itself follows what the kernel learns of its paths
//! ([`crate::tunnel::fit`]), which a network that drops silently never tells.

use crate::{sys, tunnel};
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, recv,
        send, setsockopt, socket, sockopt,
    },
    time::{TimeVal, TimeValLike},
};
use serde::Serialize;
use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

/// How long one echo may take.
const ECHO_LIMIT: Duration = Duration::from_millis(300);
/// Echoes of one size: one may be lost.
const TRIES: u16 = 2;
/// What every path carries: less is not asked for.
const SMALLEST: (u32, u32) = (576, 1280);

/// The way to a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Path {
    /// The peer's underlay address.
    pub peer: IpAddr,
    /// The largest packet, with its IP header, that went there and came back whole; absent if none
    /// did.
    pub carries: Option<u32>,
    /// What this host takes the path for.
    pub believed: u32,
    /// The largest packet of a machine that fits, without being cut, through the tunnel.
    pub inside: Option<u32>,
    /// Time of one echo, in microseconds.
    pub round_trip_us: Option<u64>,
    /// What that means, for people; empty if all is well.
    pub detail: String,
}

/// Finds the size by halving, from the caller's network namespace. Takes seconds where packets
/// vanish. Needs root. What could not be tried says so in its detail.
#[must_use]
pub fn path(peer: IpAddr) -> Path {
    let mut believed = 0;
    match probe(peer, &mut believed) {
        Ok((carries, round_trip)) => describe(peer, believed, carries, round_trip),
        Err(error) => Path {
            detail: format!("could not be tried: {error}"),
            ..describe(peer, believed, None, None)
        },
    }
}

fn probe(peer: IpAddr, believed: &mut u32) -> io::Result<(Option<u32>, Option<Duration>)> {
    *believed = believed_mtu(peer)?;
    let mut echo = Echo::open(peer)?;
    let smallest = if peer.is_ipv4() { SMALLEST.0 } else { SMALLEST.1 };
    let round_trip = echo.of_size(smallest)?;
    if round_trip.is_none() {
        return Ok((None, None));
    }
    let carries = largest(smallest, *believed, |size| Ok(echo.of_size(size)?.is_some()))?;
    Ok((Some(carries), round_trip))
}

fn describe(
    peer: IpAddr,
    believed: u32,
    carries: Option<u32>,
    round_trip: Option<Duration>,
) -> Path {
    let detail = match carries {
        None => "no echo came back: the peer is down, or something on the way drops echoes".into(),
        Some(size) if size < believed => format!(
            "packets of more than {size} bytes vanish, and nobody says so: set the MTU of the \
             interface to {size}, or let ICMP \"fragmentation needed\" through"
        ),
        Some(_) => String::new(),
    };
    Path {
        peer,
        carries,
        believed,
        inside: carries.map(|size| size.saturating_sub(tunnel::overhead(peer))),
        round_trip_us: round_trip.and_then(|t| u64::try_from(t.as_micros()).ok()),
        detail,
    }
}

/// The largest size that works, given that `works` and that no size above `most` does.
fn largest(
    works: u32,
    most: u32,
    mut try_size: impl FnMut(u32) -> io::Result<bool>,
) -> io::Result<u32> {
    if most <= works || try_size(most)? {
        return Ok(most.max(works));
    }
    let (mut low, mut high) = (works, most);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if try_size(middle)? { low = middle } else { high = middle }
    }
    Ok(low)
}

fn believed_mtu(peer: IpAddr) -> io::Result<u32> {
    let any: SocketAddr = match peer {
        IpAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        IpAddr::V6(_) => ([0_u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect((peer, tunnel::PORT))?;
    sys::path_mtu(&socket, peer.is_ipv6())
}

/// A socket for echoes to one peer.
struct Echo {
    socket: OwnedFd,
    v6: bool,
    id: u16,
    number: u16,
}

impl Echo {
    fn open(peer: IpAddr) -> io::Result<Self> {
        let v6 = peer.is_ipv6();
        let (family, protocol) = if v6 {
            (AddressFamily::Inet6, SockProtocol::IcmpV6)
        } else {
            (AddressFamily::Inet, SockProtocol::Icmp)
        };
        let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        sys::probe_sizes(&socket, v6)?;
        let limit = TimeVal::milliseconds(ECHO_LIMIT.as_millis() as i64);
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(peer, 0)))?;
        Ok(Self { socket, v6, id: std::process::id() as u16, number: 0 })
    }

    /// Sends an echo in a packet of `size` bytes; how long it took, or `None` if it was too large or
    /// did not come back.
    fn of_size(&mut self, size: u32) -> io::Result<Option<Duration>> {
        for _ in 0..TRIES {
            self.number = self.number.wrapping_add(1);
            let start = Instant::now();
            let request = request(self.v6, self.id, self.number, size);
            match send(self.socket.as_raw_fd(), &request, MsgFlags::empty()) {
                Ok(_) => {}
                Err(nix::errno::Errno::EMSGSIZE) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
            match self.wait(start + ECHO_LIMIT)? {
                Answer::Came => return Ok(Some(start.elapsed())),
                Answer::TooLarge => return Ok(None),
                Answer::Nothing => {}
            }
        }
        Ok(None)
    }

    fn wait(&self, deadline: Instant) -> io::Result<Answer> {
        let mut buffer = vec![0; 65_536];
        while Instant::now() < deadline {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(size) if is_answer(self.v6, &buffer[..size], self.id, self.number) => {
                    return Ok(Answer::Came);
                }
                // Another's echo.
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => return Ok(Answer::Nothing),
                // What a router on the way said.
                Err(nix::errno::Errno::EMSGSIZE) => return Ok(Answer::TooLarge),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(Answer::Nothing)
    }
}

enum Answer {
    Came,
    TooLarge,
    Nothing,
}

/// An echo request that makes a packet of `size` bytes.
fn request(v6: bool, id: u16, number: u16, size: u32) -> Vec<u8> {
    let header = if v6 { 40 } else { 20 };
    let mut bytes = vec![0xa5; (size.saturating_sub(header) as usize).max(8)];
    bytes[..4].copy_from_slice(&[if v6 { 128 } else { 8 }, 0, 0, 0]);
    bytes[4..6].copy_from_slice(&id.to_be_bytes());
    bytes[6..8].copy_from_slice(&number.to_be_bytes());
    if !v6 {
        // The kernel fills in that of ICMPv6.
        let sum = checksum(&bytes);
        bytes[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Whether this is the answer; of IPv4 the packet's header comes first.
fn is_answer(v6: bool, packet: &[u8], id: u16, number: u16) -> bool {
    let skip = if v6 { 0 } else { packet.first().map_or(0, |b| usize::from(b & 0xf) * 4) };
    let Some(icmp) = packet.get(skip..).filter(|icmp| icmp.len() >= 8) else { return false };
    icmp[0] == if v6 { 129 } else { 0 }
        && icmp[4..6] == id.to_be_bytes()
        && icmp[6..8] == number.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_size_is_found_whatever_it_is() {
        for truth in [576, 577, 1000, 1399, 1400, 1499, 1500] {
            let mut tried = 0;
            let found = largest(576, 1500, |size| {
                tried += 1;
                Ok(size <= truth)
            });
            assert_eq!(found.unwrap(), truth);
            assert!(tried <= 11, "{tried} sizes were tried");
        }
        assert_eq!(largest(1280, 1280, |_| panic!("there is nothing to try")).unwrap(), 1280);
    }

    #[test]
    fn a_request_has_its_size_and_a_sum_that_adds_up() {
        for (v6, size, length) in [(false, 576, 556), (false, 1500, 1480), (true, 1280, 1240)] {
            assert_eq!(request(v6, 1, 2, size).len(), length);
        }
        assert_eq!(checksum(&request(false, 0x1234, 7, 1001)), 0, "over a sum that is filled in");
    }

    #[test]
    fn only_the_answer_to_the_last_request_counts() {
        let mut packet = vec![0x45; 20];
        packet.extend([0, 0, 9, 9, 0x12, 0x34, 0, 7, 1, 2, 3]);
        assert!(is_answer(false, &packet, 0x1234, 7));
        assert!(!is_answer(false, &packet, 0x1234, 8));
        assert!(!is_answer(false, &packet[..26], 0x1234, 7), "cut short");
        assert!(!is_answer(false, &[], 0x1234, 7));
        assert!(is_answer(true, &[129, 0, 0, 0, 0x12, 0x34, 0, 7], 0x1234, 7));
    }

    #[test]
    fn a_path_that_swallows_large_packets_is_pointed_out() {
        let peer = IpAddr::from([10, 88, 0, 2]);
        let narrow = describe(peer, 1500, Some(1400), Some(Duration::from_micros(80)));
        assert!(narrow.detail.contains("1400"), "{}", narrow.detail);
        assert_eq!((narrow.inside, narrow.round_trip_us), (Some(1350), Some(80)));
        assert_eq!(describe(peer, 1500, Some(1500), None).detail, "");
        assert!(describe(peer, 1500, None, None).detail.contains("no echo"));
    }
}
