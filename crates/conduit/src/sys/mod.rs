//! The ioctls of `/dev/net/tun` that no crate at hand offers, the packet socket that puts a frame
//! into an interface, and nothing else. Numbers and layouts are those of `linux/if_tun.h`,
//! `linux/if.h` and `linux/if_packet.h`.

pub(crate) mod rights;

use nix::{
    errno::Errno,
    sys::{
        socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt},
        time::{TimeVal, TimeValLike},
    },
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    time::Duration,
};

nix::ioctl_write_ptr_bad!(tun_set_iff, 0x4004_54ca_u32 as libc::Ioctl, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_persist, 0x4004_54cb_u32 as libc::Ioctl);
nix::ioctl_write_int_bad!(tun_set_offload, 0x4004_54d0_u32 as libc::Ioctl);
nix::ioctl_read_bad!(tun_get_vnet_hdr_sz, 0x8004_54d7_u32 as libc::Ioctl, libc::c_int);
nix::ioctl_write_ptr_bad!(tun_set_vnet_hdr_sz, 0x4004_54d8_u32 as libc::Ioctl, libc::c_int);

/// `TUNSETOFFLOAD`: the reader takes frames whose checksum is not filled in.
pub(crate) const TUN_F_CSUM: i32 = 0x01;
/// `TUNSETOFFLOAD`: the reader takes TCP/IPv4 frames larger than the MTU.
pub(crate) const TUN_F_TSO4: i32 = 0x02;

/// `TUNSETOFFLOAD`: likewise TCP/IPv6.
pub(crate) const TUN_F_TSO6: i32 = 0x04;
/// `TUNSETOFFLOAD`: likewise with ECN bits set.
pub(crate) const TUN_F_TSO_ECN: i32 = 0x08;
/// `TUNSETOFFLOAD`: UDP datagrams of one size put together, IPv4 and IPv6 (Linux 6.2).
pub(crate) const TUN_F_USO: i32 = 0x20 | 0x40;

/// Attaches `fd` (an open `/dev/net/tun`) to the interface `name`, which is created if need be;
/// an empty name lets the kernel choose. `flags` are `IFF_TAP` and the like. Returns the name.
pub(crate) fn attach(fd: BorrowedFd<'_>, name: &str, flags: i32) -> io::Result<String> {
    let bytes = name.as_bytes();
    if bytes.len() >= libc::IFNAMSIZ || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("\"{name}\" is not an interface name"),
        ));
    }
    // SAFETY: ifreq is plain data; all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open for the borrow's life, and the kernel reads and writes
    // exactly one ifreq, which lives on this stack frame.
    unsafe { tun_set_iff(fd.as_raw_fd(), &raw const request) }.map_err(io_error)?;
    let name = request.ifr_name.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
    String::from_utf8(name).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Makes the interface stay when its last descriptor closes, or not.
pub(crate) fn set_persistent(fd: BorrowedFd<'_>, stay: bool) -> io::Result<()> {
    // SAFETY: takes an int by value; the descriptor is open.
    unsafe { tun_set_persist(fd.as_raw_fd(), i32::from(stay)) }.map_err(io_error).map(drop)
}

/// Says which unfinished frames the reader of this tap takes ([`TUN_F_CSUM`], [`TUN_F_TSO4`]).
pub(crate) fn set_offload(fd: BorrowedFd<'_>, offload: i32) -> io::Result<()> {
    // SAFETY: takes an int by value; the descriptor is open.
    unsafe { tun_set_offload(fd.as_raw_fd(), offload) }.map_err(io_error).map(drop)
}

/// Bytes of the `virtio_net_hdr` before each frame: 10, or 12 once a monitor asked for that.
pub(crate) fn vnet_header_size(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut size: libc::c_int = 0;
    // SAFETY: the kernel writes one int to the place given.
    unsafe { tun_get_vnet_hdr_sz(fd.as_raw_fd(), &raw mut size) }.map_err(io_error)?;
    usize::try_from(size).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Sets what [`vnet_header_size`] reads.
pub(crate) fn set_vnet_header_size(fd: BorrowedFd<'_>, size: i32) -> io::Result<()> {
    // SAFETY: the kernel reads one int from the place given.
    unsafe { tun_set_vnet_hdr_sz(fd.as_raw_fd(), &raw const size) }.map_err(io_error).map(drop)
}

/// Gives a whole Ethernet frame to an interface to send, past routes and neighbours. Takes tens of
/// milliseconds, in which the kernel closes the socket: see [`send_frame_by`].
pub(crate) fn send_frame(interface: u32, frame: &[u8]) -> io::Result<()> {
    send_frame_by(frame_socket()?.as_fd(), interface, frame)
}

/// A socket for [`send_frame_by`].
pub(crate) fn frame_socket() -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only. Protocol 0: this socket receives nothing.
    let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Likewise, by a socket that stays open: microseconds.
pub(crate) fn send_frame_by(
    socket: BorrowedFd<'_>,
    interface: u32,
    frame: &[u8],
) -> io::Result<()> {
    let index = libc::c_int::try_from(interface)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    // SAFETY: sockaddr_ll is plain data; all zeros is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_ifindex = index;
    // SAFETY: the kernel reads the frame and one sockaddr_ll, of the lengths given, and both live
    // until the call returns.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            libc::MSG_DONTWAIT,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct icmp6_filter` of `linux/icmpv6.h`: a bit for each type that does not come in.
#[repr(C)]
struct IcmpFilter([u32; 8]);

/// A raw ICMPv6 socket of all interfaces, which router solicitations alone come in by, with the interface
/// of each; what it sends has crossed no router (RFC 4861, 6.1). A read gives up after `patience`.
pub(crate) fn solicitations(patience: Duration) -> io::Result<OwnedFd> {
    const ROUTER_SOLICITATION: usize = 133;
    const ICMPV6_FILTER: libc::c_int = 1;
    let socket = socket(
        AddressFamily::Inet6,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        Some(SockProtocol::IcmpV6),
    )?;
    let mut filter = IcmpFilter([u32::MAX; 8]);
    filter.0[ROUTER_SOLICITATION / 32] &= !(1 << (ROUTER_SOLICITATION % 32));
    // SAFETY: the kernel reads one icmp6_filter of the size given, which lives on this stack frame; the
    // descriptor is open.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_ICMPV6,
            ICMPV6_FILTER,
            (&raw const filter).cast(),
            size_of::<IcmpFilter>() as libc::socklen_t,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    setsockopt(&socket, sockopt::Ipv6MulticastHops, &255)?;
    setsockopt(&socket, sockopt::Ipv6Ttl, &255)?;
    let patience = TimeVal::microseconds(i64::try_from(patience.as_micros()).unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    Ok(socket)
}

/// `struct ethtool_value` of `linux/ethtool.h`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// What a network card can be asked to do, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CardOffload {
    /// Put small packets of a stream together as they arrive (`ETHTOOL_SGRO`).
    Gro,
    /// Take large segments of TCP and cut them (`ETHTOOL_STSO`).
    Tso,
}

/// Switches an offload of an interface on or off.
pub(crate) fn set_card(name: &str, offload: CardOffload, on: bool) -> io::Result<()> {
    let command = match offload {
        CardOffload::Gro => 0x2c,
        CardOffload::Tso => 0x1f,
    };
    let bytes = name.as_bytes();
    if bytes.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an interface name"));
    }
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut value = EthtoolValue { command, data: u32::from(on) };
    // SAFETY: ifreq is plain data; all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the socket is open; the kernel reads one ifreq and, through it, one ethtool_value,
    // and both live until the call returns.
    let result =
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Packets of this IPv4 socket may not be cut (`IP_PMTUDISC_DO`).
pub(crate) fn never_cut(socket: &std::net::UdpSocket) -> io::Result<()> {
    let value: libc::c_int = libc::IP_PMTUDISC_DO;
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads one int of this stack frame; the socket is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const value).cast(),
            size,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What the kernel knows of the path MTU of a connected socket (`IP_MTU`, `IPV6_MTU`).
pub(crate) fn path_mtu(socket: &std::net::UdpSocket, v6: bool) -> io::Result<u32> {
    let (level, option) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_MTU) } else { (libc::IPPROTO_IP, libc::IP_MTU) };
    let mut mtu: libc::c_int = 0;
    let mut size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to the int, which lives through the call; the
    // socket is open.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut mtu).cast(), &raw mut size)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(mtu).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Makes the kernel repeat what a connection with little under way has lost at the same interval several
/// times, before it takes ever longer: so an end of an outage is noticed soon.
pub(crate) fn repeat_steadily(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one int, which lives through the call; the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_THIN_LINEAR_TIMEOUTS,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether something is on its way over a TCP connection that the peer has not acknowledged
/// (`TCP_INFO`).
pub(crate) fn is_unacknowledged(socket: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: tcp_info is plain data; all zeros is a valid value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to the struct, which lives through the call; the
    // descriptor is open.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut size,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.tcpi_unacked > 0)
}

/// Bytes of the C library's heap that are in use, by all threads.
pub(crate) fn heap_in_use() -> usize {
    // SAFETY: takes nothing, and returns a struct of numbers by value.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

/// Packets of this socket are never cut, and the kernel does not refuse any for what it believes of
/// the path (`IP_PMTUDISC_PROBE`).
pub(crate) fn probe_sizes(socket: &impl AsRawFd, v6: bool) -> io::Result<()> {
    let (level, option, value) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
    };
    // SAFETY: the kernel reads one int, which lives through the call; the socket is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn io_error(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno as i32)
}
