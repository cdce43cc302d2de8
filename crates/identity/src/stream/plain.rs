//! Bytes in and out of a socket without ever waiting longer than allowed.
//!
//! The socket itself stays in blocking mode (its descriptor is shared); each call says
//! `MSG_DONTWAIT` and waits in poll(2).

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv, sendmsg},
};
use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

/// Waits until the socket can be read (`POLLIN`) or written (`POLLOUT`), or has failed, which the
/// next call on it reports.
pub(super) fn wait(socket: &OwnedFd, what: PollFlags, limit: Option<Duration>) -> io::Result<()> {
    let end = limit.map(|d| (Instant::now() + d, d));
    loop {
        let timeout = match end {
            None => PollTimeout::NONE,
            Some((end, _)) => {
                let rest = end.saturating_duration_since(Instant::now());
                // Rounded up: poll counts milliseconds, and 0 would spin.
                let millis = rest.as_nanos().div_ceil(1_000_000).min(60_000);
                PollTimeout::from(u16::try_from(millis).unwrap_or(60_000))
            }
        };
        match poll(&mut [PollFd::new(socket.as_fd(), what)], timeout) {
            Ok(0) => {
                if let Some((end, limit)) = end
                    && Instant::now() >= end
                {
                    let message = format!("the peer was silent for {limit:?}");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, message));
                }
            }
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// What is in the socket now, without waiting; `None` if nothing is.
pub(super) fn try_read(socket: &OwnedFd, buf: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match recv(socket.as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT) {
            Ok(n) => return Ok(Some(n)),
            Err(Errno::EAGAIN) => return Ok(None),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

pub(super) fn read(socket: &OwnedFd, buf: &mut [u8], limit: Option<Duration>) -> io::Result<usize> {
    loop {
        if let Some(n) = try_read(socket, buf)? {
            return Ok(n);
        }
        wait(socket, PollFlags::POLLIN, limit)?;
    }
}

pub(super) fn write(
    socket: &OwnedFd,
    bufs: &[IoSlice<'_>],
    limit: Option<Duration>,
) -> io::Result<usize> {
    if bufs.iter().all(|b| b.is_empty()) {
        return Ok(0);
    }
    // More than the kernel takes in one call; the rest is the caller's next call.
    let bufs = &bufs[..bufs.len().min(1024)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), bufs, &[], flags, None) {
            Ok(n) => return Ok(n),
            Err(Errno::EAGAIN) => wait(socket, PollFlags::POLLOUT, limit)?,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

pub(super) fn write_all(
    socket: &OwnedFd,
    mut bytes: &[u8],
    limit: Option<Duration>,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = write(socket, &[IoSlice::new(bytes)], limit)?;
        bytes = &bytes[n..];
    }
    Ok(())
}
