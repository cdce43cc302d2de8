//! The system calls that no crate at hand offers as they are needed here: ioctls of `/dev/net/tun`,
//! `sendmmsg` with a segment size for each message, `recvmmsg` with the size of what was put
//! together, descriptors over a unix socket. Numbers and layouts are those of `linux/if_tun.h`,
//! `linux/if.h`, `linux/sockios.h` and `linux/udp.h`.

use std::{
    ffi::c_int,
    io,
    mem::{size_of, zeroed},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

nix::ioctl_write_ptr_bad!(tun_set_iff, 0x4004_54ca_u32 as libc::Ioctl, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_persist, 0x4004_54cb_u32 as libc::Ioctl);
nix::ioctl_write_int_bad!(tun_set_offload, 0x4004_54d0_u32 as libc::Ioctl);

/// `TUNSETOFFLOAD`: the reader takes frames whose checksum is not filled in.
pub(crate) const TUN_F_CSUM: i32 = 0x01;
/// The reader takes TCP over IPv4 larger than the MTU.
pub(crate) const TUN_F_TSO4: i32 = 0x02;
/// The reader takes TCP over IPv6 larger than the MTU.
pub(crate) const TUN_F_TSO6: i32 = 0x04;
/// The same for segments with a congestion mark.
pub(crate) const TUN_F_TSO_ECN: i32 = 0x08;
/// The reader takes several UDP datagrams of IPv4 in one frame (Linux 6.2).
pub(crate) const TUN_F_USO4: i32 = 0x20;
/// The same for IPv6.
pub(crate) const TUN_F_USO6: i32 = 0x40;

/// Messages that one system call sends or receives.
pub(crate) const BATCH: usize = 16;

/// Bytes of one control message that holds an int.
const CONTROL: usize = 32;

/// An address as the kernel takes it.
#[derive(Clone, Copy)]
#[repr(C)]
union Name {
    any: libc::sockaddr,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

fn request(name: &str) -> io::Result<libc::ifreq> {
    let bytes = name.as_bytes();
    if bytes.len() >= libc::IFNAMSIZ || bytes.contains(&0) {
        let message = format!("\"{name}\" is not an interface name");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    // SAFETY: ifreq is plain data; all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(request)
}

/// Attaches `fd` (an open `/dev/net/tun`) to the interface `name`, made if need be. Returns its
/// name, which the kernel chooses if `name` has a `%d`.
pub(crate) fn attach(fd: BorrowedFd<'_>, name: &str) -> io::Result<String> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open for the borrow's life, and the kernel reads and writes
    // exactly one ifreq, which lives on this stack frame.
    unsafe { tun_set_iff(fd.as_raw_fd(), &raw const request) }?;
    let name = request.ifr_name.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
    String::from_utf8(name).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Makes the interface stay when its last descriptor closes, or go.
pub(crate) fn set_persistent(fd: BorrowedFd<'_>, stay: bool) -> io::Result<()> {
    // SAFETY: takes an int by value; the descriptor is open.
    unsafe { tun_set_persist(fd.as_raw_fd(), stay.into()) }.map_err(Into::into).map(drop)
}

/// Says which unfinished frames the reader takes (`TUN_F_…`).
pub(crate) fn set_offload(fd: BorrowedFd<'_>, offload: i32) -> io::Result<()> {
    // SAFETY: takes an int by value; the descriptor is open.
    unsafe { tun_set_offload(fd.as_raw_fd(), offload) }.map_err(Into::into).map(drop)
}

/// Sets the MTU of an interface of this thread's network namespace.
pub(crate) fn set_mtu(socket: BorrowedFd<'_>, name: &str, mtu: u32) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_mtu = mtu as c_int;
    // SAFETY: the socket is open, and the kernel reads one ifreq, which lives until it returns.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFMTU as _, &raw mut request) })
}

/// The MTU of an interface of this thread's network namespace.
pub(crate) fn mtu(socket: BorrowedFd<'_>, name: &str) -> io::Result<u32> {
    let mut request = request(name)?;
    // SAFETY: as above; the kernel writes into the same ifreq, whose MTU is read after success.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU as _, &raw mut request))?;
        Ok(request.ifr_ifru.ifru_mtu as u32)
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets an option of a socket that is an int.
pub(crate) fn set_option(
    socket: BorrowedFd<'_>,
    level: c_int,
    option: c_int,
    value: c_int,
) -> io::Result<()> {
    let size = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads one int of this stack frame; the socket is open.
    check(unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), size)
    })
}

/// Reads an option of a socket that is an int.
pub(crate) fn option(socket: BorrowedFd<'_>, level: c_int, option: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut size = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes, into one int of this stack frame.
    check(unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut size)
    })?;
    Ok(value)
}

fn to_name(address: SocketAddr) -> (Name, libc::socklen_t) {
    // SAFETY: a union of plain data; all zeros is a valid value of each part.
    let mut name: Name = unsafe { zeroed() };
    match address {
        SocketAddr::V4(a) => {
            name.v4 = libc::sockaddr_in {
                sin_family: libc::AF_INET as _,
                sin_port: a.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(a.ip().octets()) },
                sin_zero: [0; 8],
            };
            (name, size_of::<libc::sockaddr_in>() as _)
        }
        SocketAddr::V6(a) => {
            name.v6 = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as _,
                sin6_port: a.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: a.ip().octets() },
                sin6_scope_id: a.scope_id(),
            };
            (name, size_of::<libc::sockaddr_in6>() as _)
        }
    }
}

fn from_name(name: &Name) -> Option<SocketAddr> {
    // SAFETY: every part begins with the family, and the part that it names is read; all parts are
    // plain data that was zero before the kernel wrote it.
    unsafe {
        match c_int::from(name.any.sa_family) {
            libc::AF_INET => {
                let ip = Ipv4Addr::from(name.v4.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddrV4::new(ip, u16::from_be(name.v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                let ip = Ipv6Addr::from(name.v6.sin6_addr.s6_addr);
                let port = u16::from_be(name.v6.sin6_port);
                Some(match ip.to_ipv4_mapped() {
                    Some(v4) => SocketAddrV4::new(v4, port).into(),
                    None => SocketAddrV6::new(ip, port, 0, name.v6.sin6_scope_id).into(),
                })
            }
            _ => None,
        }
    }
}

/// One message to send: `bytes` is cut by the kernel into datagrams of `segment` bytes.
pub(crate) struct Message<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) segment: usize,
    pub(crate) to: SocketAddr,
}

/// Sends the first messages (at most [`BATCH`]) that the socket takes; returns how many. An error
/// is about the first message.
pub(crate) fn send(socket: BorrowedFd<'_>, messages: &[Option<Message<'_>>]) -> io::Result<usize> {
    let count = messages.len().min(BATCH);
    // SAFETY: all of these are plain data for which zeros are valid: null pointers with no length.
    let (mut headers, mut slices, mut names): (
        [libc::mmsghdr; BATCH],
        [libc::iovec; BATCH],
        [Name; BATCH],
    ) = unsafe { (zeroed(), zeroed(), zeroed()) };
    let mut controls = [Control([0; CONTROL]); BATCH];
    for (n, message) in messages.iter().take(count).flatten().enumerate() {
        slices[n] = libc::iovec {
            iov_base: message.bytes.as_ptr().cast_mut().cast(),
            iov_len: message.bytes.len(),
        };
        let (name, size) = to_name(message.to);
        names[n] = name;
        let header = &mut headers[n].msg_hdr;
        header.msg_name = (&raw mut names[n]).cast();
        header.msg_namelen = size;
        header.msg_iov = &raw mut slices[n];
        header.msg_iovlen = 1;
        if message.bytes.len() > message.segment {
            header.msg_control = controls[n].0.as_mut_ptr().cast();
            // SAFETY: the buffer is aligned and larger than one control message of two bytes, and
            // the header points to it, so the first header and its data lie within it.
            unsafe {
                header.msg_controllen = libc::CMSG_SPACE(size_of::<u16>() as u32) as _;
                let control = libc::CMSG_FIRSTHDR(header);
                (*control).cmsg_level = libc::SOL_UDP;
                (*control).cmsg_type = libc::UDP_SEGMENT;
                (*control).cmsg_len = libc::CMSG_LEN(size_of::<u16>() as u32) as _;
                libc::CMSG_DATA(control).cast::<u16>().write_unaligned(message.segment as u16);
            }
        }
    }
    // SAFETY: `count` headers are filled in, and all that they point to (bytes borrowed by
    // `messages`, names, slices and controls on this stack frame) lives until the call returns; the
    // kernel writes to the headers only.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            count as u32,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    check(sent)?;
    Ok(sent as usize)
}

/// Buffers for what [`BATCH`] calls of `recvmsg` would receive.
pub(crate) struct Inbox {
    buffers: Vec<Box<[u8]>>,
    got: Vec<(usize, usize, Option<SocketAddr>)>,
}

/// Larger than any datagram, or several put together by the kernel.
const LARGEST: usize = 65_536;

impl Inbox {
    pub(crate) fn new() -> Self {
        let buffers = (0..BATCH).map(|_| vec![0; LARGEST].into_boxed_slice()).collect();
        Self { buffers, got: Vec::with_capacity(BATCH) }
    }

    /// Receives what is there, without waiting; returns how many messages.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.got.clear();
        // SAFETY: all of these are plain data for which zeros are valid.
        let (mut headers, mut slices, mut names): (
            [libc::mmsghdr; BATCH],
            [libc::iovec; BATCH],
            [Name; BATCH],
        ) = unsafe { (zeroed(), zeroed(), zeroed()) };
        let mut controls = [Control([0; CONTROL]); BATCH];
        for n in 0..BATCH {
            let buffer = &mut self.buffers[n];
            slices[n] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            let header = &mut headers[n].msg_hdr;
            header.msg_name = (&raw mut names[n]).cast();
            header.msg_namelen = size_of::<Name>() as _;
            header.msg_iov = &raw mut slices[n];
            header.msg_iovlen = 1;
            header.msg_control = controls[n].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL as _;
        }
        // SAFETY: every header points to a buffer of the stated length that nobody else uses, and
        // to a name, a slice and a control buffer on this stack frame.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        check(count)?;
        for n in 0..count as usize {
            let header = &headers[n];
            let length = (header.msg_len as usize).min(LARGEST);
            let whole = header.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
            let segment = segment_size(&header.msg_hdr).unwrap_or(length).max(1);
            let from = if whole { from_name(&names[n]) } else { None };
            self.got.push((length, segment, from));
        }
        Ok(self.got.len())
    }

    /// What was received: bytes, the size of each datagram in them but the last, and the sender.
    pub(crate) fn message(&self, n: usize) -> (&[u8], usize, Option<SocketAddr>) {
        let (length, segment, from) = self.got[n];
        (&self.buffers[n][..length], segment, from)
    }
}

fn segment_size(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: the kernel filled the control buffer that the header points to and set its length;
    // the macros stay within it, and data is read only after its length was checked.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        while !control.is_null() {
            let fits = (*control).cmsg_len >= libc::CMSG_LEN(size_of::<c_int>() as u32) as usize;
            if (*control).cmsg_level == libc::SOL_UDP
                && (*control).cmsg_type == libc::UDP_GRO
                && fits
            {
                let size = libc::CMSG_DATA(control).cast::<c_int>().read_unaligned();
                return usize::try_from(size).ok();
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    None
}

/// Most descriptors in one message.
pub(crate) const DESCRIPTORS: usize = 4;

/// Sends bytes with descriptors over a unix socket.
pub(crate) fn send_with_descriptors(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [nix::sys::socket::ControlMessage::ScmRights(&raw)];
    let slices = [io::IoSlice::new(bytes)];
    let flags = nix::sys::socket::MsgFlags::MSG_NOSIGNAL;
    let sent = nix::sys::socket::sendmsg::<()>(socket.as_raw_fd(), &slices, &control, flags, None)?;
    if sent < bytes.len() {
        return Err(io::Error::new(io::ErrorKind::WriteZero, "the message was cut short"));
    }
    Ok(())
}

/// Receives bytes with descriptors from a unix socket.
pub(crate) fn receive_with_descriptors(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; DESCRIPTORS]);
    let mut slices = [io::IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel made these for this process just now, and nobody else knows them.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, descriptors))
}

/// What the kernel knows of the path MTU to `to`.
pub(crate) fn path_mtu(to: SocketAddr) -> io::Result<u32> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    let (level, name) = match to {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    Ok(option(socket.as_fd(), level, name)?.max(0) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn what_the_kernel_cuts_arrives_together_again() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let from = UdpSocket::bind(any).unwrap();
            let to = UdpSocket::bind(any).unwrap();
            set_option(to.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1).unwrap();
            let bytes: Vec<u8> = (0..3000_u32).map(|n| n as u8).collect();
            let address = to.local_addr().unwrap();
            let message = |bytes, segment| Message { bytes, segment, to: address };
            let sent = send(
                from.as_fd(),
                &[Some(message(&bytes, 1400)), Some(message(&bytes[..7], 1400))],
            )
            .unwrap();
            assert_eq!(sent, 2);
            let (mut inbox, mut got) = (Inbox::new(), Vec::new());
            while got.len() < 3007 {
                let count = match inbox.receive(to.as_fd()) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                    other => other.unwrap(),
                };
                for n in 0..count {
                    let (bytes, segment, sender) = inbox.message(n);
                    assert_eq!(sender, Some(from.local_addr().unwrap()));
                    assert!(segment <= 1400, "{segment}");
                    got.extend_from_slice(bytes);
                }
            }
            assert_eq!(got[..3000], bytes);
            assert_eq!(got[3000..], bytes[..7]);
        }
    }

    #[test]
    fn descriptors_cross_a_socket() {
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send_with_descriptors(one.as_fd(), b"here\n", &[file.as_fd(), one.as_fd()]).unwrap();
        let mut bytes = [0; 64];
        let (size, got) = receive_with_descriptors(other.as_fd(), &mut bytes).unwrap();
        assert_eq!((&bytes[..size], got.len()), (&b"here\n"[..], 2));
        std::fs::File::from(got.into_iter().next().unwrap()).set_len(5).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 5);
    }

    #[test]
    fn the_path_to_oneself_is_wide() {
        assert!(path_mtu("127.0.0.1:9".parse().unwrap()).unwrap() >= 1500);
    }
}
