//! From a TCP connection to a [`Stream`]: TLS if wanted, then a greeting both ways, all under one
//! deadline that no drip of bytes can stretch.
//!
//! ```text
//!  client                                   server
//!    ── ClientHello ──────────────────────────▶
//!    ◀─ ServerHello, certificate, Finished ────    the client checks name and authority
//!    ── certificate, Finished ────────────────▶    the server checks the authority
//!    ◀─ greeting ──────────────────────────────    only now does the client know it is accepted
//!    ── greeting ─────────────────────────────▶
//! ```
//!
//! In TLS 1.3 a client is done before the server has looked at its certificate; without the
//! greeting a refused client would learn of it at some later read. The greeting also tells two
//! versions, and plaintext from TLS, apart.

use super::{
    Secure, Security, Shared, Spill, Stream, Timeout, describe,
    engine::{Connection, Engine, Rest},
    plain, socket_failed,
};
use crate::{Error, HostName, Result, tls};
use nix::poll::PollFlags;
use rustls::{client::UnbufferedClientConnection, server::UnbufferedServerConnection};
use std::{
    io::{self, IoSlice},
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

/// Length of a greeting.
pub const GREETING_BYTES: usize = 16;

/// Sent by both ends as the first bytes; the last digit is the version of this layer.
const SECURE_GREETING: &[u8; GREETING_BYTES] = b"architect tls/1\n";
const PLAIN_GREETING: &[u8; GREETING_BYTES] = b"architect raw/1\n";

/// What the first byte of a TLS handshake or alert record is, and the second.
const TLS_FIRST: [u8; 2] = [22, 21];
const TLS_MAJOR: u8 = 3;

pub(super) struct Deadline {
    end: Instant,
    limit: Duration,
}

impl Deadline {
    pub(super) fn new(limit: Duration) -> Self {
        Self { end: Instant::now() + limit, limit }
    }

    fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }
}

/// One handshake in progress.
pub(super) struct Attempt<'a> {
    pub(super) socket: &'a OwnedFd,
    pub(super) who: String,
    pub(super) deadline: Deadline,
    /// The file of the authority that we trust, for messages.
    pub(super) authority: &'a Path,
}

pub(super) fn connect(
    address: SocketAddr,
    peer: &HostName,
    security: &Security,
    limit: Duration,
) -> Result<Stream> {
    let started = Instant::now();
    let socket = TcpStream::connect_timeout(&address, limit).map_err(|source| Error::Connect {
        who: describe(Some(address), Some(peer)),
        limit,
        source,
    })?;
    client(socket, peer, security, limit.saturating_sub(started.elapsed()))
}

pub(super) fn client(
    socket: TcpStream,
    peer: &HostName,
    security: &Security,
    limit: Duration,
) -> Result<Stream> {
    let (socket, address) = prepare(socket)?;
    let who = describe(address, Some(peer));
    let authority = match security {
        Security::Mutual(identity) => identity.authority(),
        Security::Plaintext => Path::new(""),
    };
    let attempt = Attempt { socket: &socket, who, deadline: Deadline::new(limit), authority };
    let Security::Mutual(identity) = security else {
        let spill = attempt.greet_plain()?;
        return Ok(finish(socket, address, None, None, spill));
    };
    let connection = UnbufferedClientConnection::new(identity.client(), tls::server_name(peer))
        .map_err(|e| attempt.translate(&e))?;
    let secure = Secure::new(Engine::new(Connection::Client(Box::new(connection))));
    let mut spill = Spill::default();
    attempt.shake_hands(&secure, &mut spill)?;
    attempt.hear_greeting(&secure, &mut spill)?;
    attempt.say_greeting(&secure)?;
    // rustls has checked that the certificate there is for this name.
    Ok(finish(socket, address, Some(peer.clone()), Some(secure), spill))
}

pub(super) fn server(socket: TcpStream, security: &Security, limit: Duration) -> Result<Stream> {
    let (socket, address) = prepare(socket)?;
    let who = describe(address, None);
    let authority = match security {
        Security::Mutual(identity) => identity.authority(),
        Security::Plaintext => Path::new(""),
    };
    let attempt = Attempt { socket: &socket, who, deadline: Deadline::new(limit), authority };
    let Security::Mutual(identity) = security else {
        let spill = attempt.greet_plain()?;
        return Ok(finish(socket, address, None, None, spill));
    };
    let connection =
        UnbufferedServerConnection::new(identity.server()).map_err(|e| attempt.translate(&e))?;
    let secure = Secure::new(Engine::new(Connection::Server(Box::new(connection))));
    let mut spill = Spill::default();
    attempt.shake_hands(&secure, &mut spill)?;
    let name = {
        let engine = secure.engine();
        let certificate = engine.peer_certificate().ok_or_else(|| Error::BadCertificate {
            who: attempt.who.clone(),
            detail: "it sent none; both sides must have one".to_owned(),
        })?;
        tls::peer_name(certificate, &attempt.who)?
    };
    attempt.say_greeting(&secure)?;
    attempt.hear_greeting(&secure, &mut spill)?;
    Ok(finish(socket, address, Some(name), Some(secure), spill))
}

fn prepare(socket: TcpStream) -> Result<(OwnedFd, Option<SocketAddr>)> {
    let address = socket.peer_addr().map_err(socket_failed("a peer", "look at the address"))?;
    let who = describe(Some(address), None);
    socket.set_nodelay(true).map_err(socket_failed(&who, "set TCP_NODELAY"))?;
    socket.set_nonblocking(false).map_err(socket_failed(&who, "set the mode"))?;
    Ok((socket.into(), Some(address)))
}

pub(super) fn finish(
    socket: OwnedFd,
    peer_address: Option<SocketAddr>,
    peer_name: Option<HostName>,
    secure: Option<Secure>,
    spill: Spill,
) -> Stream {
    let shared = Shared {
        socket,
        peer_address,
        peer_name,
        secure,
        read_timeout: Timeout::none(),
        write_timeout: Timeout::none(),
    };
    Stream::new(Arc::new(shared), spill)
}

impl Attempt<'_> {
    pub(super) fn shake_hands(&self, secure: &Secure, spill: &mut Spill) -> Result<()> {
        let done = |rest: Rest, _: &Spill| rest == Rest::Ready;
        self.drive(secure, spill, "the TLS handshake", done)
    }

    fn hear_greeting(&self, secure: &Secure, spill: &mut Spill) -> Result<()> {
        let done = |_: Rest, spill: &Spill| spill.len() >= GREETING_BYTES;
        self.drive(secure, spill, "its greeting", done)?;
        let mut found = [0; GREETING_BYTES];
        spill.take(&mut found);
        self.check_greeting(found, SECURE_GREETING)
    }

    fn say_greeting(&self, secure: &Secure) -> Result<()> {
        let sent =
            secure.write(self.socket, &[IoSlice::new(SECURE_GREETING)], Some(self.deadline.left()));
        sent.map(drop).map_err(|e| self.cut("our greeting to be taken", e))
    }

    /// Feeds the engine until `done`, within the deadline.
    fn drive(
        &self,
        secure: &Secure,
        spill: &mut Spill,
        phase: &'static str,
        done: impl Fn(Rest, &Spill) -> bool,
    ) -> Result<()> {
        loop {
            let (received, rest) = {
                let mut engine = secure.engine();
                let received = engine.receive(self.socket);
                (received, engine.pump(&mut |bytes| spill.bytes.extend_from_slice(bytes)))
            };
            secure.send_outbox(self.socket, Some(self.deadline.left()));
            let rest = rest.map_err(|e| self.translate(&e))?;
            if done(rest, spill) {
                return Ok(());
            }
            match received {
                Ok(Some(n)) if n > 0 => {
                    if self.deadline.left().is_zero() {
                        return Err(self.timed_out(phase));
                    }
                }
                Ok(None) => plain::wait(self.socket, PollFlags::POLLIN, Some(self.deadline.left()))
                    .map_err(|e| self.cut(phase, e))?,
                Ok(Some(_)) => {
                    let e = io::Error::new(io::ErrorKind::UnexpectedEof, "end of stream");
                    return Err(self.cut(phase, e));
                }
                Err(e) => return Err(self.cut(phase, e)),
            }
        }
    }

    fn greet_plain(&self) -> Result<Spill> {
        plain::write_all(self.socket, PLAIN_GREETING, Some(self.deadline.left()))
            .map_err(|e| self.cut("our greeting to be taken", e))?;
        let mut found = [0; GREETING_BYTES];
        let mut filled = 0;
        while filled < GREETING_BYTES {
            let n = plain::read(self.socket, &mut found[filled..], Some(self.deadline.left()))
                .map_err(|e| self.cut("its greeting", e))?;
            if n == 0 {
                let e = io::Error::new(io::ErrorKind::UnexpectedEof, "end of stream");
                return Err(self.cut("its greeting", e));
            }
            filled += n;
            if filled >= 2 && TLS_FIRST.contains(&found[0]) && found[1] == TLS_MAJOR {
                return Err(Error::PeerIsTls { who: self.who.clone() });
            }
        }
        self.check_greeting(found, PLAIN_GREETING)?;
        Ok(Spill::default())
    }

    fn check_greeting(
        &self,
        found: [u8; GREETING_BYTES],
        expected: &[u8; GREETING_BYTES],
    ) -> Result<()> {
        if &found == expected {
            return Ok(());
        }
        Err(Error::BadGreeting {
            who: self.who.clone(),
            expected: String::from_utf8_lossy(expected).into_owned(),
            found: String::from_utf8_lossy(&found).into_owned(),
        })
    }

    pub(super) fn translate(&self, e: &rustls::Error) -> Error {
        tls::translate(e, &self.who, self.authority, SystemTime::now())
    }

    fn timed_out(&self, phase: &'static str) -> Error {
        Error::HandshakeTimeout { who: self.who.clone(), phase, limit: self.deadline.limit }
    }

    fn cut(&self, phase: &'static str, source: io::Error) -> Error {
        if source.kind() == io::ErrorKind::TimedOut {
            return self.timed_out(phase);
        }
        Error::HandshakeCut { who: self.who.clone(), phase, source }
    }
}
