//! What no crate at hand offers: the identity of a network namespace, and the promise that the
//! kernel's structs may be copied as bytes.

use crate::abi::{
    RawChange, RawConfig, RawEntry, RawFlow, RawFlowKey, RawFront, RawKey, RawPort, RawWatch,
};
use std::{io, mem::size_of, os::fd::AsRawFd};

// SAFETY: `repr(C)`, integers and byte arrays only, no padding (the sizes asserted
// in `abi` are the sums of the fields), any bit pattern is a value.
unsafe impl aya::Pod for RawKey {}
// SAFETY: see above.
unsafe impl aya::Pod for RawEntry {}
// SAFETY: see above.
unsafe impl aya::Pod for RawPort {}
// SAFETY: see above.
unsafe impl aya::Pod for RawConfig {}
// SAFETY: as above; 16 bytes and a u64 at 16, 24 in all.
unsafe impl aya::Pod for RawFront {}
// SAFETY: see above.
unsafe impl aya::Pod for RawChange {}
// SAFETY: see above.
unsafe impl aya::Pod for RawWatch {}
// SAFETY: see above.
unsafe impl aya::Pod for RawFlowKey {}
// SAFETY: see above.
unsafe impl aya::Pod for RawFlow {}

/// The bytes of a change.
pub(crate) fn bytes_of(change: &RawChange) -> [u8; size_of::<RawChange>()] {
    // SAFETY: same size, and every byte of it is set (no padding).
    unsafe { std::mem::transmute::<RawChange, [u8; size_of::<RawChange>()]>(*change) }
}

/// The change in these bytes.
pub(crate) fn change_of(bytes: [u8; size_of::<RawChange>()]) -> RawChange {
    // SAFETY: same size, and any bit pattern is a value.
    unsafe { std::mem::transmute::<[u8; size_of::<RawChange>()], RawChange>(bytes) }
}

/// A number that no other network namespace has or will have until this computer starts again
/// (`SO_NETNS_COOKIE`, Linux 5.14).
pub(crate) fn namespace_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))
        .or_else(|_| std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)))?;
    let mut cookie = 0_u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to the u64, which lives through the call; the
    // socket is open.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
