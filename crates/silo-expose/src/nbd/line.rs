//! The line between a client and a server: a unix socket or TCP, plain or under TLS. Both ends of
//! the protocol use it: whole while hands are shaken ([`Channel`]), then cut into what is read
//! ([`Input`]) and what is written ([`Output`]), which different threads may hold.
//!
//! What must hold: no call waits longer than the limits that were set; a [`Line`] ends whatever
//! waits on the socket, from any thread, at any time.

use super::sys;
use identity::{Control, Reader, Stream, Writer};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            self, MsgFlags, SockType, recv, sendmsg, setsockopt,
            sockopt::{ReceiveTimeout, SendTimeout, TcpNoDelay},
        },
        time::TimeVal,
    },
};
use std::{
    fmt, io,
    io::{IoSlice, Read, Write},
    net::{SocketAddr, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU8},
    time::{Duration, Instant},
};

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl Endpoint {
    /// A unix socket at `path`.
    #[must_use]
    pub fn unix(path: &Path) -> Self {
        Self::Unix(path.to_owned())
    }

    pub(super) fn connect(&self, limit: Duration) -> io::Result<Socket> {
        match self {
            // It answers at once, or waits while the server's queue of clients is full.
            Self::Unix(path) => connect_unix(path, limit),
            Self::Tcp(address) => Ok(TcpStream::connect_timeout(address, limit)?.into()),
        }
    }
}

fn connect_unix(path: &Path, limit: Duration) -> io::Result<Socket> {
    let flags = socket::SockFlag::SOCK_CLOEXEC;
    let fd = socket::socket(socket::AddressFamily::Unix, SockType::Stream, flags, None)?;
    let address = socket::UnixAddr::new(path)?;
    let socket = Socket(fd);
    socket.set_limits(None, Some(limit))?;
    loop {
        match socket::connect(socket.0.as_raw_fd(), &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// A connected stream socket in blocking mode.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self(stream.into())
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        let socket = Self(stream.into());
        // Without it the connection is slower, and works.
        let _ = setsockopt(&socket.0, TcpNoDelay, &true);
        socket
    }
}

impl Socket {
    /// The longest that a read and a write may wait; `None` waits for ever.
    fn set_limits(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        let value = |limit: Option<Duration>| {
            // Zero would mean to wait for ever.
            let limit = limit.map_or(Duration::ZERO, |limit| limit.max(Duration::from_micros(1)));
            TimeVal::new(limit.as_secs() as i64, i64::from(limit.subsec_micros()))
        };
        setsockopt(&self.0, ReceiveTimeout, &value(read))?;
        Ok(setsockopt(&self.0, SendTimeout, &value(write))?)
    }

    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(self.0.as_raw_fd(), buf, MsgFlags::empty()) {
                Ok(count) => return Ok(count),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads what is there; `None` if nothing is.
    fn try_read(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        match recv(self.0.as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT) {
            Ok(count) => Ok(Some(count)),
            Err(Errno::EINTR | Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn write(&self, parts: &[IoSlice<'_>], flags: MsgFlags) -> io::Result<usize> {
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), parts, &[], flags, None) {
                Ok(count) => return Ok(count),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub(super) fn line(&self) -> io::Result<Line> {
        Ok(Line(self.0.try_clone()?))
    }
}

/// A handle on a socket, to end what waits on it.
#[derive(Debug)]
pub(super) struct Line(OwnedFd);

impl Line {
    /// Ends both directions.
    pub(super) fn hang_up(&self) {
        // It fails when the other end is gone already.
        let _ = socket::shutdown(self.0.as_raw_fd(), socket::Shutdown::Both);
    }

    /// Ends reading; answers still go out.
    pub(super) fn stop_reading(&self) {
        let _ = socket::shutdown(self.0.as_raw_fd(), socket::Shutdown::Read);
    }
}

/// A whole connection while hands are shaken: everything on it ends by one deadline.
pub(super) struct Channel {
    kind: Kind,
    deadline: Instant,
    /// What is said when time is up.
    late: &'static str,
}

enum Kind {
    Plain(Socket),
    Secure(Box<Stream>),
}

impl Channel {
    pub(super) fn new(socket: Socket, limit: Duration, late: &'static str) -> Self {
        Self { kind: Kind::Plain(socket), deadline: Instant::now() + limit, late }
    }

    pub(super) const fn is_secure(&self) -> bool {
        matches!(self.kind, Kind::Secure(_))
    }

    /// Who the other end has proved to be.
    pub(super) fn peer_name(&self) -> Option<&identity::HostName> {
        match &self.kind {
            Kind::Plain(_) => None,
            Kind::Secure(stream) => stream.peer_name(),
        }
    }

    /// Starts TLS; nothing was read beyond the message that asked for it.
    pub(super) fn secure(
        self,
        start: impl FnOnce(OwnedFd, Duration) -> identity::Result<Stream>,
    ) -> io::Result<Self> {
        let left = self.left()?;
        let Self { kind: Kind::Plain(socket), deadline, late } = self else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "TLS is there already"));
        };
        // TLS sets limits of its own, and every read and write of this socket obeys them.
        socket.set_limits(None, None)?;
        let stream = start(socket.0, left)
            .map_err(|error| io::Error::new(io::ErrorKind::PermissionDenied, error.to_string()))?;
        Ok(Self { kind: Kind::Secure(Box::new(stream)), deadline, late })
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, self.late));
        }
        Ok(left)
    }

    pub(super) fn read_array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn skip(&mut self, length: u64) -> io::Result<()> {
        let skipped = io::copy(&mut self.take(length), &mut io::sink())?;
        if skipped < length { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// The two directions, each with its own limit.
    pub(super) fn split(
        self,
        read: Option<Duration>,
        write: Option<Duration>,
    ) -> io::Result<(Input, Output)> {
        match self.kind {
            Kind::Plain(socket) => {
                socket.set_limits(read, write)?;
                let socket = Arc::new(socket);
                Ok((Input::Plain(socket.clone()), Output::Plain(socket)))
            }
            Kind::Secure(stream) => {
                let control: Control = stream.control();
                control.set_read_timeout(read);
                control.set_write_timeout(write);
                let (reader, writer) = stream.split();
                Ok((Input::Secure(reader), Output::Secure(writer)))
            }
        }
    }
}

impl Read for Channel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.left()?;
        match &mut self.kind {
            Kind::Plain(socket) => {
                socket.set_limits(Some(left), Some(left))?;
                socket.read(buf)
            }
            Kind::Secure(stream) => {
                stream.control().set_read_timeout(Some(left));
                stream.read(buf)
            }
        }
    }
}

impl Write for Channel {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let left = self.left()?;
        match &mut self.kind {
            Kind::Plain(socket) => {
                socket.set_limits(Some(left), Some(left))?;
                socket.write(&[IoSlice::new(buf)], MsgFlags::empty())
            }
            Kind::Secure(stream) => {
                stream.control().set_write_timeout(Some(left));
                stream.write(buf)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What comes in. A read that waits too long fails with `TimedOut` and loses nothing.
pub(super) enum Input {
    Plain(Arc<Socket>),
    Secure(Reader),
}

impl Input {
    /// Looks whether something has come, without waiting, for so long; `None` if nothing has, or if
    /// it cannot be told without waiting (TLS).
    pub(super) fn look(&mut self, buf: &mut [u8], span: Duration) -> io::Result<Option<usize>> {
        let Self::Plain(socket) = self else { return Ok(None) };
        let start = Instant::now();
        while start.elapsed() < span {
            if let Some(count) = socket.try_read(buf)? {
                return Ok(Some(count));
            }
            // Whoever is to ask next may wait for this processor.
            std::thread::yield_now();
        }
        Ok(None)
    }

    /// Reads into memory that others may read and write meanwhile, without a copy on the way. Looks
    /// for `span` whether something has come before it sleeps, as [`Input::look`]; also says how long
    /// it slept, if it did. Not under TLS.
    pub(super) fn read_into(
        &mut self,
        place: &[AtomicU8],
        span: Duration,
    ) -> io::Result<(usize, Option<Duration>)> {
        let Self::Plain(socket) = self else { return Err(io::ErrorKind::Unsupported.into()) };
        let began = Instant::now();
        loop {
            match sys::receive_into(socket.0.as_fd(), place, false) {
                Ok(count) => return Ok((count, None)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if began.elapsed() >= span {
                        break;
                    }
                    std::thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
        let began = Instant::now();
        loop {
            match sys::receive_into(socket.0.as_fd(), place, true) {
                Ok(count) => return Ok((count, Some(began.elapsed()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Read for Input {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buf),
            Self::Secure(reader) => reader.read(buf),
        }
    }
}

/// What goes out.
pub(super) enum Output {
    Plain(Arc<Socket>),
    Secure(Writer),
}

impl Output {
    /// Sends all of `parts`, in as few system calls as there can be.
    pub(super) fn send(&mut self, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        loop {
            // Empty slices too, so that the loop ends.
            IoSlice::advance_slices(&mut parts, 0);
            if parts.is_empty() {
                return Ok(());
            }
            let count = match self {
                Self::Plain(socket) => socket.write(parts, MsgFlags::empty())?,
                Self::Secure(writer) => writer.write_vectored(parts)?,
            };
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut parts, count);
        }
    }

    /// Whether [`Output::send_file`] and [`Output::send_memory`] work.
    pub(super) const fn is_direct(&self) -> bool {
        matches!(self, Self::Plain(_))
    }

    /// Sends `head` and then `length` bytes of `file` at `offset`, which are not copied on the way.
    pub(super) fn send_file(
        &mut self,
        head: &[u8],
        file: BorrowedFd<'_>,
        mut offset: u64,
        length: usize,
    ) -> io::Result<()> {
        let Self::Plain(socket) = self else { return Err(io::ErrorKind::Unsupported.into()) };
        // Not in a packet of its own; the crate has no name for it.
        let more = MsgFlags::from_bits_retain(libc::MSG_MORE);
        let mut sent = 0;
        while sent < head.len() {
            sent += socket.write(&[IoSlice::new(&head[sent..])], more)?;
        }
        let mut left = length;
        while left > 0 {
            match sys::send_file(socket.0.as_fd(), file, offset, left) {
                // The answer has begun: only hanging up can tell that it goes wrong.
                Ok(0) => return Err(io::Error::other("a file that is served ended too early")),
                Ok(count) => {
                    offset += count as u64;
                    left -= count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends `head` and then memory that others may read and write meanwhile, which is not copied on
    /// the way.
    pub(super) fn send_memory(
        &mut self,
        mut head: &[u8],
        mut place: &[AtomicU8],
    ) -> io::Result<()> {
        let Self::Plain(socket) = self else { return Err(io::ErrorKind::Unsupported.into()) };
        while !head.is_empty() || !place.is_empty() {
            match sys::send_from(socket.0.as_fd(), head, place) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    let of_head = count.min(head.len());
                    (head, place) = (&head[of_head..], &place[count - of_head..]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells the other end that nothing more comes, if TLS is there to tell it.
    pub(super) fn say_goodbye(&mut self) {
        if let Self::Secure(writer) = self {
            // A courtesy: the other end may be gone.
            let _ = writer.finish();
        }
    }
}

/// Whether an error says that the other end is gone.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
    )
}
