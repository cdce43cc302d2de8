//! The outer socket, and what waits to be sent over it: datagrams of one size to one address side by
//! side in a buffer, which the kernel cuts (`UDP_SEGMENT`), several buffers in one call.

use crate::{TunnelError, counters::Counters, sys};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// What is asked for as the socket's buffers: some milliseconds at line rate.
const BUFFER: i32 = 8 << 20;
/// Bytes of a message's buffer that are used: below what UDP over IPv4 takes (65,507).
const FULL: usize = 65_000;
/// Most datagrams of one message (`UDP_MAX_SEGMENTS`).
const SEGMENTS: usize = 64;
/// What boringtun wants to find behind the place where it writes, beyond what it writes.
const SLACK: usize = 256;
/// How long to wait for room in the socket's buffer before a message is given up.
const PATIENCE_MS: u16 = 200;

/// The outer socket.
#[derive(Debug)]
pub(crate) struct Outer {
    socket: UdpSocket,
    v6: bool,
    /// Whether the kernel cuts messages; not over cards without checksum offload.
    cuts: bool,
}

impl Outer {
    /// Binds in this thread's network namespace. An IPv6 wildcard takes IPv4 as well.
    pub(crate) fn bind(listen: SocketAddr) -> Result<Self, TunnelError> {
        let fail = || format!("listen on UDP {listen}");
        let socket = UdpSocket::bind(listen).map_err(TunnelError::system(fail()))?;
        let this = Self::adopt(socket.into()).map_err(TunnelError::system(fail()))?;
        // Packets on the way are never cut; senders are told of the path's MTU by the tun device's.
        let set = |level, option, value| sys::set_option(this.as_fd(), level, option, value);
        let never = libc::IP_PMTUDISC_DO;
        if this.v6 {
            set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, never)
                .map_err(TunnelError::system(fail()))?;
        }
        let v4 = set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, never);
        if !this.v6 {
            v4.map_err(TunnelError::system(fail()))?;
        }
        for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
            set(libc::SOL_SOCKET, option, BUFFER).map_err(TunnelError::system(fail()))?;
        }
        set(libc::SOL_UDP, libc::UDP_GRO, 1).map_err(TunnelError::system(fail()))?;
        Ok(this)
    }

    /// Takes over a socket that another process bound.
    pub(crate) fn adopt(socket: OwnedFd) -> io::Result<Self> {
        let socket = UdpSocket::from(socket);
        socket.set_nonblocking(true)?;
        let v6 = socket.local_addr()?.is_ipv6();
        Ok(Self { socket, v6, cuts: true })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn reach(&self, to: SocketAddr) -> SocketAddr {
        match to.ip() {
            IpAddr::V4(v4) if self.v6 => (v4.to_ipv6_mapped(), to.port()).into(),
            _ => to,
        }
    }

    /// The address that the peer would be reached by can be reached by this socket at all.
    pub(crate) fn can_reach(&self, to: SocketAddr) -> bool {
        to.is_ipv4() || self.v6
    }
}

impl AsFd for Outer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

struct Slot {
    bytes: Box<[u8]>,
    length: usize,
    segment: usize,
    count: usize,
    to: SocketAddr,
}

impl Slot {
    fn takes(&self, to: SocketAddr, size: usize) -> bool {
        let uncut = self.length == self.segment * self.count;
        self.to == to
            && uncut
            && size <= self.segment
            && self.count < SEGMENTS
            && self.length + size <= FULL
    }
}

/// The socket, what waits to be sent over it, and what was counted.
pub(crate) struct Wire {
    pub(crate) outer: Outer,
    pub(crate) counters: Counters,
    outbox: Outbox,
}

impl Wire {
    pub(crate) fn new(outer: Outer) -> Self {
        Self { outer, counters: Counters::default(), outbox: Outbox::new() }
    }

    /// Puts a datagram of at most `size` bytes to what waits: `write` makes it in the place given,
    /// which has some room behind it, and says its size; `None` is nothing.
    pub(crate) fn put(
        &mut self,
        to: SocketAddr,
        size: usize,
        write: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) {
        self.outbox.put(&mut self.outer, &mut self.counters, to, size, write);
    }

    /// Puts a datagram that is there already.
    pub(crate) fn put_copy(&mut self, to: SocketAddr, datagram: &[u8]) {
        self.put(to, datagram.len(), |room| {
            room[..datagram.len()].copy_from_slice(datagram);
            Some(datagram.len())
        });
    }

    /// Sends all that waits.
    pub(crate) fn send(&mut self) {
        self.outbox.send(&mut self.outer, &mut self.counters);
    }
}

struct Outbox {
    slots: Vec<Slot>,
    used: usize,
}

impl Outbox {
    fn new() -> Self {
        let nobody = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let slot = || Slot {
            bytes: vec![0; FULL + SLACK].into_boxed_slice(),
            length: 0,
            segment: 0,
            count: 0,
            to: nobody,
        };
        Self { slots: (0..sys::BATCH).map(|_| slot()).collect(), used: 0 }
    }

    fn put(
        &mut self,
        outer: &mut Outer,
        counters: &mut Counters,
        to: SocketAddr,
        size: usize,
        write: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) {
        debug_assert!(size <= FULL, "a datagram of {size} bytes");
        let last = self.used.checked_sub(1).filter(|n| self.slots[*n].takes(to, size));
        let at = last.unwrap_or_else(|| {
            if self.used == self.slots.len() {
                self.send(outer, counters);
            }
            let slot = &mut self.slots[self.used];
            (slot.length, slot.segment, slot.count, slot.to) = (0, size, 0, to);
            self.used += 1;
            self.used - 1
        });
        let slot = &mut self.slots[at];
        let written = write(&mut slot.bytes[slot.length..]).unwrap_or(0);
        if written == 0 {
            if slot.count == 0 {
                self.used -= 1;
            }
            return;
        }
        if slot.count == 0 {
            slot.segment = written;
        }
        debug_assert!(written <= slot.segment, "{written} bytes where {size} were announced");
        slot.length += written;
        slot.count += 1;
    }

    fn send(&mut self, outer: &mut Outer, counters: &mut Counters) {
        let mut next = 0;
        while next < self.used {
            let cuts = outer.cuts;
            let messages = self.slots[next..self.used].iter().map(|s| sys::Message {
                bytes: &s.bytes[..s.length],
                segment: s.segment,
                to: outer.reach(s.to),
            });
            let mut room = [const { None }; sys::BATCH];
            let mut count = 0;
            for (place, message) in room.iter_mut().zip(messages) {
                *place = Some(message);
                count += 1;
            }
            let result = if cuts || self.slots[next].count == 1 {
                let one = if cuts { count } else { 1 };
                send_some(outer, counters, &room[..one])
            } else {
                Err(io::Error::from_raw_os_error(libc::EIO))
            };
            match result {
                Ok(sent) => next += sent,
                Err(error) => {
                    if error.raw_os_error() == Some(libc::EIO) && cuts {
                        tracing::warn!("this way out takes no large messages: sending singly");
                        outer.cuts = false;
                    }
                    if let Some(message) = &room[0] {
                        send_singly(outer, counters, message, &error);
                    }
                    next += 1;
                }
            }
        }
        self.used = 0;
    }
}

fn send_some(
    outer: &Outer,
    counters: &mut Counters,
    messages: &[Option<sys::Message<'_>>],
) -> io::Result<usize> {
    loop {
        counters.send_calls += 1;
        match sys::send(outer.as_fd(), messages) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let mut ready = [PollFd::new(outer.as_fd(), PollFlags::POLLOUT)];
                if poll(&mut ready, PollTimeout::from(PATIENCE_MS)).unwrap_or(0) == 0 {
                    return Err(e);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// One message's datagrams by themselves, after `error` about all of them.
fn send_singly(
    outer: &Outer,
    counters: &mut Counters,
    message: &sys::Message<'_>,
    error: &io::Error,
) {
    let many = message.bytes.len() > message.segment;
    let may_help = matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE | libc::EOPNOTSUPP)
    );
    if !many || !may_help {
        let count = message.bytes.len().div_ceil(message.segment.max(1)) as u64;
        return refused(counters, error, count);
    }
    for datagram in message.bytes.chunks(message.segment) {
        let single = sys::Message { bytes: datagram, segment: datagram.len(), to: message.to };
        if let Err(error) = send_some(outer, counters, &[Some(single)]) {
            refused(counters, &error, 1);
        }
    }
}

fn refused(counters: &mut Counters, error: &io::Error, count: u64) {
    if error.raw_os_error() == Some(libc::EMSGSIZE) {
        counters.dropped_too_large += count;
    } else {
        counters.dropped_by_socket += count;
    }
}

/// An address as a peer is remembered by: IPv4 as IPv4.
pub(crate) fn plain(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V6(v6) if v6 != Ipv6Addr::UNSPECIFIED => match v6.to_ipv4_mapped() {
            Some(v4) => (v4, address.port()).into(),
            None => address,
        },
        _ => address,
    }
}
