//! How much of what was written to a socket still waits.

use std::os::fd::AsRawFd;

/// Bytes that the peer has not taken: on a unix socket not read, over TCP not acknowledged
/// (`SIOCOUTQ`, linux/sockios.h). 0 if the kernel does not tell.
pub(crate) fn untaken(socket: &impl AsRawFd) -> u32 {
    queue(socket, libc::TIOCOUTQ)
}

/// Bytes over TCP that have not been sent (`SIOCOUTQNSD`, linux/sockios.h). 0 if the kernel does
/// not tell.
pub(crate) fn unsent(socket: &impl AsRawFd) -> u32 {
    const SIOCOUTQNSD: libc::c_ulong = 0x894b;
    queue(socket, SIOCOUTQNSD)
}

fn queue(socket: &impl AsRawFd, request: libc::c_ulong) -> u32 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both requests store one int through the pointer.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request as _, &raw mut bytes) };
    if result < 0 { 0 } else { u32::try_from(bytes).unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    #[test]
    fn bytes_wait_until_the_peer_has_read_them() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        assert_eq!(untaken(&here), 0);
        here.write_all(b"twelve bytes").unwrap();
        assert!(untaken(&here) >= 12);
        there.read_exact(&mut [0; 12]).unwrap();
        assert_eq!(untaken(&here), 0);
    }
}
