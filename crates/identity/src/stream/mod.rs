//! A duplex byte stream between two hosts, for plain threads.
//!
//! Callers: everything that talks to another host. A stream is made by [`Stream::connect`],
//! [`Stream::client`] or [`Stream::server`] (all with a deadline), then used whole or
//! [split](Stream::split): one thread reads, another writes, at the same time, and a third may hold
//! a [`Control`] to set timeouts, look at the socket, or end both.
//!
//! ```text
//!  Writer ─ send lock ─┬─ engine lock: encrypt ≤ 64 KiB ─┐
//!                      └─ send(2), outside the engine lock ┴→ socket
//!  Reader ─ poll(2), no lock ─ engine lock: recv(2) without waiting, decrypt ≤ 64 KiB
//! ```
//!
//! What must hold: records leave in the order in which they were encrypted (the send lock is taken
//! before the engine lock and kept until the last byte is in the socket); the reader never waits
//! for the send lock, because two readers that wait for two full sockets would wait for ever; no
//! system call waits under the engine lock.
//!
//! The end of a stream is explicit: [`Writer::finish`] lets the peer read a clean end (`Ok(0)`).
//! A connection that ends without it, under TLS, is an `UnexpectedEof` error at the peer: a cut is
//! not an end.

mod engine;
mod handshake;
mod plain;
mod starttls;
#[cfg(test)]
mod tests;

use crate::{Error, HostName, Identity, Result};
use engine::Secure;
use nix::sys::socket::{self, Shutdown};
use std::{
    io::{self, IoSlice, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

pub use handshake::GREETING_BYTES;
pub use starttls::{PeerCheck, TlsClient, TlsServer};

/// How a stream is protected.
#[derive(Clone, Debug)]
pub enum Security {
    /// Both ends prove their name; everything is encrypted and authenticated.
    Mutual(Identity),
    /// Nothing is proved and nothing is hidden. Only for a network that is trusted as a whole, by
    /// explicit choice, and for measuring what protection costs.
    Plaintext,
}

/// A connection whose handshake is done.
pub struct Stream {
    reader: Reader,
    writer: Writer,
}

/// The reading half.
pub struct Reader {
    shared: Arc<Shared>,
    /// Decrypted bytes that did not fit into the caller's buffer.
    spill: Spill,
}

/// The writing half.
pub struct Writer {
    shared: Arc<Shared>,
}

/// A handle on the connection itself; cheap to clone and to send to other threads.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    socket: OwnedFd,
    /// None for a unix socket.
    peer_address: Option<SocketAddr>,
    peer_name: Option<HostName>,
    secure: Option<Secure>,
    read_timeout: Timeout,
    write_timeout: Timeout,
}

/// Nanoseconds, 0 for none.
struct Timeout(AtomicU64);

impl Timeout {
    const fn none() -> Self {
        Self(AtomicU64::new(0))
    }

    fn set(&self, limit: Option<Duration>) {
        // A limit of zero means "do not wait", not "wait for ever".
        let nanos = limit.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX).max(1));
        self.0.store(nanos, Ordering::Relaxed);
    }

    fn get(&self) -> Option<Duration> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }
}

/// Bytes waiting for their reader.
#[derive(Default)]
struct Spill {
    bytes: Vec<u8>,
    taken: usize,
}

impl Spill {
    fn len(&self) -> usize {
        self.bytes.len() - self.taken
    }

    fn take(&mut self, buf: &mut [u8]) -> usize {
        let rest = &self.bytes[self.taken..];
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        self.taken += n;
        if self.taken == self.bytes.len() {
            self.bytes.clear();
            self.taken = 0;
        }
        n
    }
}

impl Stream {
    /// Connects to `address` and proves both ends; `peer` is the name expected there. All of it
    /// within `limit`.
    ///
    /// # Errors
    /// No connection, no handshake in time, or a peer that is not who it should be.
    pub fn connect(
        address: SocketAddr,
        peer: &HostName,
        security: &Security,
        limit: Duration,
    ) -> Result<Self> {
        handshake::connect(address, peer, security, limit)
    }

    /// As [`Stream::connect`] over an open connection (one made in another network namespace, say).
    ///
    /// # Errors
    /// As [`Stream::connect`].
    pub fn client(
        socket: TcpStream,
        peer: &HostName,
        security: &Security,
        limit: Duration,
    ) -> Result<Self> {
        handshake::client(socket, peer, security, limit)
    }

    /// The listening end of a connection. Call it on a thread of its own: a peer that stalls keeps
    /// it busy until `limit`. Whether the peer may do what it asks is the caller's to decide, by
    /// [`Stream::peer_name`].
    ///
    /// # Errors
    /// No handshake in time, or a peer without a certificate of our authority.
    pub fn server(socket: TcpStream, security: &Security, limit: Duration) -> Result<Self> {
        handshake::server(socket, security, limit)
    }

    fn new(shared: Arc<Shared>, spill: Spill) -> Self {
        Self { reader: Reader { shared: shared.clone(), spill }, writer: Writer { shared } }
    }

    /// The two halves, each for its own thread.
    #[must_use]
    pub fn split(self) -> (Reader, Writer) {
        (self.reader, self.writer)
    }

    /// A handle on the connection itself.
    #[must_use]
    pub fn control(&self) -> Control {
        self.writer.control()
    }

    /// The name that the peer has proved; `None` under [`Security::Plaintext`], which proves none.
    #[must_use]
    pub fn peer_name(&self) -> Option<&HostName> {
        self.writer.shared.peer_name.as_ref()
    }

    /// Says goodbye: the peer reads a clean end after everything written before.
    ///
    /// # Errors
    /// The connection is broken already, or the write timeout passed.
    pub fn finish(&mut self) -> io::Result<()> {
        self.writer.finish()
    }
}

impl Control {
    /// See [`Stream::peer_name`].
    #[must_use]
    pub fn peer_name(&self) -> Option<&HostName> {
        self.shared.peer_name.as_ref()
    }

    /// The peer's socket address; `0.0.0.0:0` for a unix socket, which has none.
    #[must_use]
    pub fn peer_address(&self) -> SocketAddr {
        self.shared.peer_address.unwrap_or(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0))
    }

    /// The longest that a read waits; then it fails with `TimedOut` and may be tried again, nothing
    /// is lost. `None` waits for ever (until [`Control::shutdown`]).
    pub fn set_read_timeout(&self, limit: Option<Duration>) {
        self.shared.read_timeout.set(limit);
    }

    /// The longest that a write waits for the peer to take the next byte; then it fails with
    /// `TimedOut` and the stream cannot be written any more, because part of a record is out.
    pub fn set_write_timeout(&self, limit: Option<Duration>) {
        self.shared.write_timeout.set(limit);
    }

    /// Ends the connection now, both ways, and wakes whoever reads or writes.
    pub fn shutdown(&self) {
        // It fails only when the connection is gone already.
        let _ = socket::shutdown(self.shared.socket.as_raw_fd(), Shutdown::Both);
    }
}

impl AsFd for Control {
    /// The socket, for options and TCP_INFO. Reading or writing it breaks the stream.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }
}

impl AsRawFd for Control {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.socket.as_raw_fd()
    }
}

impl Reader {
    /// A handle on the connection itself.
    #[must_use]
    pub fn control(&self) -> Control {
        Control { shared: self.shared.clone() }
    }
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        if self.spill.len() > 0 {
            return Ok(self.spill.take(buf));
        }
        let shared = &*self.shared;
        let limit = shared.read_timeout.get();
        match &shared.secure {
            None => plain::read(&shared.socket, buf, limit),
            Some(secure) => secure.read(&shared.socket, buf, &mut self.spill, limit),
        }
    }
}

impl Writer {
    /// A handle on the connection itself.
    #[must_use]
    pub fn control(&self) -> Control {
        Control { shared: self.shared.clone() }
    }

    /// See [`Stream::finish`].
    ///
    /// # Errors
    /// See [`Stream::finish`].
    pub fn finish(&mut self) -> io::Result<()> {
        let shared = &*self.shared;
        if let Some(secure) = &shared.secure {
            secure.say_goodbye(&shared.socket, shared.write_timeout.get())?;
        }
        Ok(socket::shutdown(shared.socket.as_raw_fd(), Shutdown::Write)?)
    }
}

impl Write for Writer {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    /// Takes at least one byte, and at most as much as keeps the reader waiting for a few dozen
    /// microseconds; parts of one call leave in one system call.
    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let shared = &*self.shared;
        let limit = shared.write_timeout.get();
        match &shared.secure {
            None => plain::write(&shared.socket, bufs, limit),
            Some(secure) => secure.write(&shared.socket, bufs, limit),
        }
    }

    /// Nothing is kept back by [`Write::write`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buf)
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.writer.write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.writer.write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stream({})", self.writer.shared.who())
    }
}

impl Shared {
    fn who(&self) -> String {
        describe(self.peer_address, self.peer_name.as_ref())
    }
}

fn describe(address: Option<SocketAddr>, name: Option<&HostName>) -> String {
    match (name, address) {
        (Some(name), Some(address)) => format!("{name} at {address}"),
        (Some(name), None) => format!("{name} on a unix socket"),
        (None, Some(address)) => format!("the peer at {address}"),
        (None, None) => "the peer on a unix socket".to_owned(),
    }
}

fn socket_failed(who: &str, operation: &'static str) -> impl FnOnce(io::Error) -> Error {
    let who = who.to_owned();
    move |source| Error::Socket { who, operation, source }
}
