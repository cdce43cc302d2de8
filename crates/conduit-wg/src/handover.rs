//! From one process to the next without a packet lost.
//!
//! Session keys do not leave boringtun, so sessions are not handed over: descriptors are, and the
//! old process goes on with what only it can do until nobody needs it.
//!
//! ```text
//!  new                                   old
//!  upgrade ───────────────────────────►  writes down who is where
//!        ◄── tun, UDP, control, pipe ──  reads the UDP socket no more; still encrypts what the
//!  reads the UDP socket; what is of a    machine sends, and decrypts what comes out of the pipe
//!  session of the old one: into the pipe
//!  handshakes with each live peer
//!  all there (or 5 s over): "t" ──────►  sends what it has read, reads the tun device no more
//!        ◄──────────────────────── "y"
//!  reads the tun device                  decrypts what comes out of the pipe, ends when nothing
//!                                        has come for two seconds
//! ```
//!
//! Sessions of both are told apart by the number of the process, which is in the index that each
//! datagram carries. If the new one dies before "t", the old one sees its connection end and goes
//! on alone; if the old one dies, the new one sees the same and takes the tun device at once.

use crate::{TunnelError, sys};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

/// How long the new process tries to get sessions with all live peers.
pub(crate) const HANDSHAKES: Duration = Duration::from_secs(5);
/// For how long nothing comes before the old process ends.
pub(crate) const QUIET: Duration = Duration::from_secs(2);
/// How long one step may take while both processes run.
const STEP: Duration = Duration::from_secs(2);

/// "I take the tun device."
const TAKE: u8 = b't';
/// "It is yours."
const YOURS: u8 = b'y';

/// Bytes before a datagram in the pipe: the sender's address (16, IPv4 mapped) and port.
const HEADER: usize = 18;

/// The pipe for datagrams, which keeps them apart.
#[derive(Debug)]
pub(crate) struct Pipe {
    socket: OwnedFd,
}

impl Pipe {
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (one, other) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        for end in [&one, &other] {
            sys::set_option(end.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 8 << 20)?;
        }
        Ok((Self { socket: one }, other))
    }

    /// Takes an end that came from the other process. Neither waits for the other for ever.
    pub(crate) fn adopt(socket: OwnedFd) -> io::Result<Self> {
        let patience = nix::sys::time::TimeVal::new(STEP.as_secs() as _, 0);
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::SendTimeout, &patience)?;
        Ok(Self { socket })
    }

    /// Puts a datagram in; waits while the pipe is full.
    pub(crate) fn put(&self, from: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        let ip = match from.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let mut header = [0; HEADER];
        header[..16].copy_from_slice(&ip.octets());
        header[16..].copy_from_slice(&from.port().to_be_bytes());
        let slices = [io::IoSlice::new(&header), io::IoSlice::new(datagram)];
        let flags = nix::sys::socket::MsgFlags::MSG_NOSIGNAL;
        nix::sys::socket::sendmsg::<()>(self.socket.as_raw_fd(), &slices, &[], flags, None)?;
        Ok(())
    }

    /// Takes a datagram out without waiting; `None` if there is none, an error if there will be
    /// none.
    pub(crate) fn take<'a>(
        &self,
        room: &'a mut [u8],
    ) -> io::Result<Option<(SocketAddr, &'a [u8])>> {
        let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        let size = match nix::sys::socket::recv(self.socket.as_raw_fd(), room, flags) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(size) => size,
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let Some((header, datagram)) = room[..size].split_first_chunk::<HEADER>() else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let (ip, port) = header.split_first_chunk::<16>().expect("18 bytes begin with 16");
        let ip = IpAddr::from(*ip).to_canonical();
        let port = u16::from_be_bytes([port[0], port[1]]);
        Ok(Some(((ip, port).into(), datagram)))
    }
}

impl AsFd for Pipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What the new process knows until it has the tun device, and after that while the old one lives.
pub(crate) struct Arrival {
    old: UnixStream,
    pub(crate) pipe: Pipe,
    /// Peers that sessions are wanted with.
    pub(crate) live: Vec<String>,
    pub(crate) deadline: Instant,
}

impl Arrival {
    pub(crate) fn new(old: UnixStream, pipe: Pipe, live: Vec<String>, now: Instant) -> Self {
        Self { old, pipe, live, deadline: now + HANDSHAKES }
    }

    /// Takes the tun device. If the old process is gone, it is ours as well.
    pub(crate) fn take(&self) -> Result<(), TunnelError> {
        let ask = || -> io::Result<()> {
            self.old.set_read_timeout(Some(STEP))?;
            let mut answer = [0];
            (&self.old).write_all(&[TAKE])?;
            (&self.old).read_exact(&mut answer)?;
            if answer[0] == YOURS { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
        };
        match ask() {
            Ok(()) => Ok(()),
            Err(e) if is_gone(&e) => {
                tracing::warn!("the process before this one is gone");
                Ok(())
            }
            Err(e) => Err(TunnelError::system("take the tun device from the process before")(e)),
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// What the old process knows once it has handed over.
pub(crate) struct Departure {
    new: UnixStream,
    pub(crate) pipe: Pipe,
    /// Set once the tun device is the new process's: when something last came out of the pipe.
    pub(crate) quiet_since: Option<Instant>,
    /// Says to the control thread, when dropped, that this process will not go on.
    pub(crate) outcome: std::sync::mpsc::SyncSender<crate::control::Kept>,
}

/// What the new process says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// Nothing yet.
    Nothing,
    /// It takes the tun device.
    Take,
    /// It is gone.
    Gone,
}

impl Departure {
    pub(crate) fn new(
        new: UnixStream,
        pipe: Pipe,
        outcome: std::sync::mpsc::SyncSender<crate::control::Kept>,
    ) -> io::Result<Self> {
        new.set_nonblocking(true)?;
        Ok(Self { new, pipe, quiet_since: None, outcome })
    }

    /// What does the new process say?
    pub(crate) fn hear(&self) -> Word {
        let mut byte = [0];
        match (&self.new).read(&mut byte) {
            Ok(1) if byte[0] == TAKE => Word::Take,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Word::Nothing,
            _ => Word::Gone,
        }
    }

    /// Says that the tun device is the new process's.
    pub(crate) fn give(&mut self, now: Instant) {
        // Should it be gone, nobody has the device; that is what it would be without us, too.
        let _ = (&self.new).write_all(&[YOURS]);
        self.quiet_since = Some(now);
    }

    /// Nothing has come for long enough.
    pub(crate) fn is_done(&self, now: Instant) -> bool {
        self.quiet_since.is_some_and(|since| now.duration_since(since) > QUIET)
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.new.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pipe_keeps_datagrams_and_senders_apart_and_says_its_end() {
        let (out, end) = Pipe::pair().unwrap();
        let into = Pipe::adopt(end).unwrap();
        let (v4, v6) = ("192.0.2.1:7".parse().unwrap(), "[fd00::1]:65535".parse().unwrap());
        into.put(v4, b"one").unwrap();
        into.put(v6, &vec![2; 60_000]).unwrap();
        let mut room = vec![0; 70_000];
        assert_eq!(out.take(&mut room).unwrap(), Some((v4, &b"one"[..])));
        let (from, bytes) = out.take(&mut room).unwrap().unwrap();
        assert_eq!((from, bytes.len()), (v6, 60_000));
        assert_eq!(out.take(&mut room).unwrap(), None);
        drop(into);
        assert!(out.take(&mut room).is_err());
    }
}
