//! The TLS engine between the two halves of a stream: one rustls connection, its input buffer and
//! what it wants sent, under one lock; and the lock that keeps records in order on the wire.
//!
//! The input buffer lives with the connection, so that rustls always sees the same bytes whoever
//! asks; the kernel copies into it directly (recv without waiting, under the lock).

use super::{Spill, plain};
use nix::poll::PollFlags;
use rustls::{
    client::UnbufferedClientConnection,
    pki_types::CertificateDer,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus},
};
use std::{
    io::{self, IoSlice},
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError, TryLockError},
    time::Duration,
};

/// The most that is encrypted or received under one hold of the lock: some 20 µs.
const PORTION: usize = 64 * 1024;

/// Header, tag, content type of a TLS 1.3 record, rounded up.
const RECORD_EXTRA: usize = 32;

/// Most records in a portion that comes in many slices; each slice starts a record.
const MAX_SLICES: usize = 64;

/// The largest record that a peer may send, with its header (RFC 8446, 5.2).
const MAX_RECORD: usize = 16 * 1024 + 256 + 5;

/// Room for a portion behind the unfinished record that came before it.
const INPUT_ROOM: usize = PORTION + MAX_RECORD;

pub(super) enum Connection {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// What the connection waits for when nothing more can be done with the bytes at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// The handshake goes on with the peer's next bytes.
    Handshaking,
    /// The handshake is done; application data may flow.
    Ready,
    /// The peer has said goodbye (which a peer may say while we still write).
    PeerClosed,
}

pub(super) struct Engine {
    connection: Connection,
    input: Vec<u8>,
    /// Where in `input` the bytes are that rustls has not consumed.
    start: usize,
    end: usize,
    /// Records that rustls made by itself (handshake, key updates, alerts), to be sent before
    /// anything encrypted later.
    outbox: Vec<u8>,
    peer_closed: bool,
    /// After an error the connection can only repeat it.
    failed: Option<rustls::Error>,
}

/// One step of the loop over rustls' states, the same for both kinds of connection.
enum Step {
    Again,
    Rest(Rest),
}

fn step<D>(
    status: UnbufferedStatus<'_, '_, D>,
    outbox: &mut Vec<u8>,
    deliver: &mut dyn FnMut(&[u8]),
) -> (usize, Result<Step, rustls::Error>) {
    let discard = status.discard;
    let state = match status.state {
        Ok(state) => state,
        Err(e) => return (discard, Err(e)),
    };
    let done = match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => deliver(record.payload),
                    Err(e) => return (discard, Err(e)),
                }
            }
            Step::Again
        }
        ConnectionState::EncodeTlsData(mut data) => {
            let at = outbox.len();
            let mut room = 1024;
            loop {
                outbox.resize(at + room, 0);
                match data.encode(&mut outbox[at..]) {
                    Ok(n) => {
                        outbox.truncate(at + n);
                        break;
                    }
                    Err(EncodeError::InsufficientSize(e)) => room = e.required_size,
                    Err(e @ EncodeError::AlreadyEncoded) => {
                        outbox.truncate(at);
                        return (discard, Err(rustls::Error::General(e.to_string())));
                    }
                }
            }
            Step::Again
        }
        // The outbox is sent by whoever called; from here on its bytes are ours.
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Step::Again
        }
        ConnectionState::BlockedHandshake => Step::Rest(Rest::Handshaking),
        ConnectionState::WriteTraffic(_) => Step::Rest(Rest::Ready),
        ConnectionState::PeerClosed | ConnectionState::Closed => Step::Rest(Rest::PeerClosed),
        other => return (discard, Err(rustls::Error::General(format!("unexpected {other:?}")))),
    };
    (discard, Ok(done))
}

impl Engine {
    pub(super) fn new(connection: Connection) -> Self {
        Self {
            connection,
            input: vec![0; INPUT_ROOM],
            start: 0,
            end: 0,
            outbox: Vec::new(),
            peer_closed: false,
            failed: None,
        }
    }

    fn one_step(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<Step, rustls::Error> {
        let input = &mut self.input[self.start..self.end];
        let (discard, result) = match &mut self.connection {
            Connection::Client(c) => step(c.process_tls_records(input), &mut self.outbox, deliver),
            Connection::Server(c) => step(c.process_tls_records(input), &mut self.outbox, deliver),
        };
        self.start += discard;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        result
    }

    /// Does everything that can be done with the bytes at hand.
    pub(super) fn pump(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<Rest, rustls::Error> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        loop {
            match self.one_step(deliver) {
                Ok(Step::Again) => {}
                Ok(Step::Rest(Rest::PeerClosed)) => {
                    self.peer_closed = true;
                    return Ok(Rest::PeerClosed);
                }
                Ok(Step::Rest(_)) if self.peer_closed => return Ok(Rest::PeerClosed),
                Ok(Step::Rest(rest)) => return Ok(rest),
                Err(e) => {
                    self.failed = Some(e.clone());
                    // The alert that tells the peer why is the next thing rustls hands out.
                    let _ = self.one_step(&mut |_| {});
                    return Err(e);
                }
            }
        }
    }

    /// Takes what the socket has, without waiting. `None`: it has nothing. `Some(0)`: it has ended.
    pub(super) fn receive(&mut self, socket: &OwnedFd) -> io::Result<Option<usize>> {
        if self.start > 0 && self.input.len() - self.end < PORTION {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let to = self.input.len().min(self.end + PORTION);
        if self.end == to {
            // rustls takes every complete record and refuses records that are too long.
            return Err(io::Error::other("the TLS engine did not take a full input buffer"));
        }
        let got = plain::try_read(socket, &mut self.input[self.end..to])?;
        self.end += got.unwrap_or(0);
        Ok(got)
    }

    /// Encrypts into `out` from `at` on; returns the end. The outbox goes first.
    fn encrypt(&mut self, data: &[u8], out: &mut Vec<u8>, at: usize) -> io::Result<usize> {
        let mut at = self.drain_outbox(out, at);
        loop {
            let room = data.len() + data.len().div_ceil(16 * 1024) * RECORD_EXTRA + 256;
            if out.len() < at + room {
                out.resize(at + room, 0);
            }
            // Nothing is decrypted here: the reader leaves at most an unfinished record behind.
            let result = match &mut self.connection {
                Connection::Client(c) => {
                    let input = &mut self.input[self.start..self.end];
                    seal(c.process_tls_records(input), data, &mut out[at..])
                }
                Connection::Server(c) => {
                    let input = &mut self.input[self.start..self.end];
                    seal(c.process_tls_records(input), data, &mut out[at..])
                }
            };
            match result {
                Seal::Done(n) => return Ok(at + n),
                Seal::Room(more) => out.resize(at + more, 0),
                Seal::NotYet => {
                    // rustls has something of its own to say first, or something to tell.
                    let mut lost = 0;
                    let rest = self.pump(&mut |bytes| lost += bytes.len());
                    debug_assert_eq!(lost, 0, "the reader leaves no complete record behind");
                    match rest {
                        Ok(Rest::Handshaking) | Err(_) => return Err(self.broken()),
                        Ok(Rest::Ready | Rest::PeerClosed) => {}
                    }
                    at = self.drain_outbox(out, at);
                }
                Seal::Failed(e) => return Err(io::Error::other(e)),
            }
        }
    }

    fn drain_outbox(&mut self, out: &mut Vec<u8>, at: usize) -> usize {
        let end = at + self.outbox.len();
        if end > at {
            if out.len() < end {
                out.resize(end, 0);
            }
            out[at..end].copy_from_slice(&self.outbox);
            self.outbox.clear();
        }
        end
    }

    fn queue_goodbye(&mut self) {
        let mut room = [0; 256];
        let input = &mut self.input[self.start..self.end];
        let n = match &mut self.connection {
            Connection::Client(c) => goodbye(c.process_tls_records(input), &mut room),
            Connection::Server(c) => goodbye(c.process_tls_records(input), &mut room),
        };
        self.outbox.extend_from_slice(&room[..n]);
    }

    fn broken(&self) -> io::Error {
        match &self.failed {
            Some(e) => io::Error::new(io::ErrorKind::InvalidData, e.clone()),
            None => io::Error::other("the TLS connection cannot be used any more"),
        }
    }

    /// The peer's own certificate, once the handshake has verified it.
    pub(super) fn peer_certificate(&self) -> Option<&CertificateDer<'static>> {
        let chain = match &self.connection {
            Connection::Client(c) => c.peer_certificates(),
            Connection::Server(c) => c.peer_certificates(),
        };
        chain.and_then(<[_]>::first)
    }
}

enum Seal {
    Done(usize),
    Room(usize),
    NotYet,
    Failed(EncryptError),
}

fn seal<D>(status: UnbufferedStatus<'_, '_, D>, data: &[u8], out: &mut [u8]) -> Seal {
    let Ok(ConnectionState::WriteTraffic(mut traffic)) = status.state else {
        return Seal::NotYet;
    };
    debug_assert_eq!(status.discard, 0, "the reader leaves no complete record behind");
    match traffic.encrypt(data, out) {
        Ok(n) => Seal::Done(n),
        Err(EncryptError::InsufficientSize(e)) => Seal::Room(e.required_size),
        Err(e) => Seal::Failed(e),
    }
}

fn goodbye<D>(status: UnbufferedStatus<'_, '_, D>, out: &mut [u8]) -> usize {
    match status.state {
        Ok(ConnectionState::WriteTraffic(mut traffic)) => {
            traffic.queue_close_notify(out).unwrap_or(0)
        }
        _ => 0,
    }
}

/// A TLS connection in use by two halves.
pub(super) struct Secure {
    engine: Mutex<Engine>,
    send: Mutex<SendSide>,
}

struct SendSide {
    out: Vec<u8>,
    /// Part of a record is out and the rest is lost.
    broken: bool,
}

impl Secure {
    pub(super) fn new(engine: Engine) -> Self {
        Self {
            engine: Mutex::new(engine),
            send: Mutex::new(SendSide { out: Vec::new(), broken: false }),
        }
    }

    /// A panic elsewhere leaves rustls in a state that it checks itself.
    pub(super) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read(
        &self,
        socket: &OwnedFd,
        buf: &mut [u8],
        spill: &mut Spill,
        limit: Option<Duration>,
    ) -> io::Result<usize> {
        loop {
            let mut filled = 0;
            let mut deliver = |bytes: &[u8]| {
                let n = bytes.len().min(buf.len() - filled);
                buf[filled..filled + n].copy_from_slice(&bytes[..n]);
                filled += n;
                spill.bytes.extend_from_slice(&bytes[n..]);
            };
            let mut engine = self.engine();
            let received = engine.receive(socket);
            let rest = engine.pump(&mut deliver);
            let to_send = !engine.outbox.is_empty();
            drop(engine);
            if to_send {
                // An alert, in all likelihood: a courtesy, not worth a long wait.
                let courtesy = Duration::from_secs(1);
                self.send_outbox(socket, Some(limit.unwrap_or(courtesy).min(courtesy)));
            }
            if filled > 0 {
                // An error or an end comes back at the next call: both stay as they are.
                return Ok(filled);
            }
            match rest {
                Err(e) => return Err(io::Error::new(io::ErrorKind::InvalidData, e)),
                Ok(Rest::PeerClosed) => return Ok(0),
                Ok(Rest::Ready | Rest::Handshaking) => {}
            }
            match received? {
                Some(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the connection was cut (it ended without a goodbye)",
                    ));
                }
                Some(_) => {}
                None => plain::wait(socket, PollFlags::POLLIN, limit)?,
            }
        }
    }

    pub(super) fn write(
        &self,
        socket: &OwnedFd,
        bufs: &[IoSlice<'_>],
        limit: Option<Duration>,
    ) -> io::Result<usize> {
        let mut send = self.send_side()?;
        let send_side = &mut *send;
        let mut engine = self.engine();
        let (mut taken, mut end) = (0, 0);
        // From here on a record that is not sent is a hole that the peer would refuse.
        send_side.broken = true;
        for part in bufs.iter().filter(|b| !b.is_empty()).take(MAX_SLICES) {
            let part = &part[..part.len().min(PORTION - taken)];
            end = engine.encrypt(part, &mut send_side.out, end)?;
            taken += part.len();
            if taken == PORTION {
                break;
            }
        }
        drop(engine);
        plain::write_all(socket, &send_side.out[..end], limit)?;
        send_side.broken = false;
        drop(send);
        self.send_outbox(socket, limit);
        Ok(taken)
    }

    pub(super) fn say_goodbye(&self, socket: &OwnedFd, limit: Option<Duration>) -> io::Result<()> {
        drop(self.send_side()?);
        self.engine().queue_goodbye();
        let mut send = self.send_side()?;
        self.send_now(&mut send, socket, limit)
    }

    fn send_side(&self) -> io::Result<MutexGuard<'_, SendSide>> {
        let send = self.send.lock().unwrap_or_else(PoisonError::into_inner);
        if send.broken {
            let message = "an earlier write to the peer failed half way";
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, message));
        }
        Ok(send)
    }

    /// Sends what rustls wants sent, unless a writer is busy: then that writer does, here, after
    /// it has let go of the send lock. What fails here fails again for whoever writes or reads.
    pub(super) fn send_outbox(&self, socket: &OwnedFd, limit: Option<Duration>) {
        while !self.engine().outbox.is_empty() {
            let mut send = match self.send.try_lock() {
                Ok(send) => send,
                Err(TryLockError::Poisoned(e)) => e.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            if send.broken || self.send_now(&mut send, socket, limit).is_err() {
                return;
            }
        }
    }

    fn send_now(
        &self,
        send: &mut SendSide,
        socket: &OwnedFd,
        limit: Option<Duration>,
    ) -> io::Result<()> {
        let end = self.engine().drain_outbox(&mut send.out, 0);
        send.broken = true;
        plain::write_all(socket, &send.out[..end], limit)?;
        send.broken = false;
        Ok(())
    }
}
