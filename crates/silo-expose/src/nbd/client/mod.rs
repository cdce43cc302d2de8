//! A client for a server that speaks NBD: a block device that is somewhere else.
//!
//! Who calls it: mounts and moves, which read from `silo serve` on another host under mutual TLS;
//! everything that takes a [`BlockDevice`]. It works with any server of fixed newstyle.
//!
//! What holds:
//! - Any number of threads ask at the same time; each connection has as many requests in flight as
//!   are asked for. A long read or write leaves as several requests at once.
//! - A connection that breaks is made again within [`NbdClientOptions::reconnect`], and requests in
//!   flight are sent again. A server that was killed has perhaps lost what was written since the
//!   last flush: that is sent again too, or the next flush fails ([`Unflushed`]).
//! - A write that was sent and not answered when the connection broke is sent again, and so may be
//!   done twice. Whoever writes to a place that somebody else is writing to at the same time can see
//!   that; so can a server that still works on the first copy after it has answered the second. NBD
//!   has no way to tell. As long as no connection is lost every write is done once.
//! - No call waits longer than the silence and reconnect limits together;
//!   [`BlockDevice::interrupt`] ends those that wait.

mod device;
mod handshake;
mod kept;
mod link;
mod replies;

use super::{
    Endpoint, NbdError,
    line::Socket,
    protocol::{Command, ExportFlags, Request},
};
use handshake::{Facts, Wish, shake, shake_on};
use identity::TlsClient;
use kept::Kept;
use link::Link;
use replies::{Piece, Sink};
use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// First and longest pause between two attempts to connect.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];
/// Most connections to one server.
const MAX_CONNECTIONS: usize = 32;

/// What becomes of writes that no flush has made durable yet when the server is lost. It may have
/// been killed and have lost them; a client cannot know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unflushed {
    /// They may be lost: the next flush fails and says so.
    Fail,
    /// Up to so many bytes are kept here and written again to the next server; beyond that, as
    /// [`Unflushed::Fail`]. Only where nobody else writes to the device: what another client wrote
    /// meanwhile would be overwritten by what this one wrote before.
    WriteAgain {
        /// Most bytes that are kept.
        bytes: u64,
    },
}

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct NbdClientOptions {
    /// The export's name.
    pub export: String,
    /// Connections, 1 to 32, if the server allows more than one.
    pub connections: usize,
    /// TLS, which the server must grant; without it nothing is protected.
    pub tls: Option<TlsClient>,
    /// How long connecting and shaking hands may take.
    pub handshake_limit: Duration,
    /// How long the server may be silent while it owes an answer; then it counts as lost.
    pub silence_limit: Duration,
    /// How long a lost server is looked for before requests fail; zero fails at once.
    pub reconnect: Duration,
    /// What becomes of writes that were not flushed when a server is lost.
    pub unflushed: Unflushed,
}

impl Default for NbdClientOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            connections: 1,
            tls: None,
            handshake_limit: Duration::from_secs(10),
            silence_limit: Duration::from_secs(60),
            reconnect: Duration::from_secs(30),
            unflushed: Unflushed::Fail,
        }
    }
}

/// The connections to one life of the server.
struct Session {
    number: u64,
    links: Vec<Link>,
    next: AtomicUsize,
}

impl Session {
    fn link(&self) -> &Link {
        &self.links[self.next.fetch_add(1, Ordering::Relaxed) % self.links.len()]
    }
}

/// A block device on a server. Dropping it says goodbye; it does not flush.
pub struct NbdClient {
    endpoint: Endpoint,
    options: NbdClientOptions,
    facts: Facts,
    session: RwLock<Arc<Session>>,
    kept: Mutex<Kept>,
    /// Held by whoever looks for a lost server.
    looking: Mutex<()>,
    /// Held by whoever flushes.
    flushing: Mutex<()>,
    /// Held for reading by whole writes, and for writing by those that must read first.
    whole: RwLock<()>,
    /// How often the device was interrupted.
    interrupts: Mutex<u64>,
    interrupted: Condvar,
    sessions: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NbdClient {
    /// Connects to the server at `endpoint`.
    ///
    /// # Errors
    /// If it cannot be reached, refuses, or serves something that cannot be used. There is no
    /// second attempt.
    pub fn connect(endpoint: &Endpoint, options: NbdClientOptions) -> Result<Self, NbdError> {
        let target = describe(endpoint, &options.export);
        let failed = |source| NbdError::Connect { target: target.clone(), source };
        let deadline = Instant::now() + options.handshake_limit;
        let (facts, links) = open(endpoint, &options, deadline, None).map_err(failed)?;
        let session = Session { number: 1, links, next: AtomicUsize::new(0) };
        let mut kept = Kept::new(match options.unflushed {
            Unflushed::Fail => 0,
            Unflushed::WriteAgain { bytes } => bytes,
        });
        kept.session = session.number;
        Ok(Self {
            endpoint: endpoint.clone(),
            options,
            facts,
            session: RwLock::new(Arc::new(session)),
            kept: Mutex::new(kept),
            looking: Mutex::new(()),
            flushing: Mutex::new(()),
            whole: RwLock::new(()),
            interrupts: Mutex::new(0),
            interrupted: Condvar::new(),
            sessions: AtomicU64::new(1),
        })
    }

    /// Connections in use.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.session().links.len()
    }

    /// How often the server was lost and found again.
    #[must_use]
    pub fn reconnects(&self) -> u64 {
        self.sessions.load(Ordering::Relaxed) - 1
    }

    fn has(&self, flag: u16) -> bool {
        self.facts.flags.has(flag)
    }

    fn session(&self) -> Arc<Session> {
        self.session.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Does `pieces`, on another connection if one is lost; gives the number of the session that
    /// did them.
    fn run(&self, pieces: &mut [Piece<'_>]) -> io::Result<u64> {
        let interrupts = *lock(&self.interrupts);
        let mut deadline = None;
        loop {
            let session = self.session();
            match session.link().call(pieces) {
                Ok(()) => {
                    for piece in pieces.iter() {
                        piece.result().map_err(|error| self.told(piece, error.kind()))?;
                    }
                    return Ok(session.number);
                }
                Err(lost) => {
                    let now = Instant::now();
                    let deadline = *deadline.get_or_insert(now + self.options.reconnect);
                    self.find_again(&session, &lost, deadline, interrupts)?;
                    pieces.iter_mut().for_each(Piece::reset);
                }
            }
        }
    }

    fn told(&self, piece: &Piece<'_>, kind: io::ErrorKind) -> io::Error {
        let request = piece.request;
        io::Error::new(
            kind,
            format!(
                "{}: the server failed {:?} of {} bytes at {}: {kind}",
                describe(&self.endpoint, &self.options.export),
                request.command,
                request.length,
                request.offset,
            ),
        )
    }

    /// Connects again after `old` was lost, unless somebody did already.
    fn find_again(
        &self,
        old: &Session,
        lost: &io::Error,
        deadline: Instant,
        interrupts: u64,
    ) -> io::Result<()> {
        let _looking = lock(&self.looking);
        if self.session().number != old.number {
            return Ok(());
        }
        // Its other connections are left to themselves: what the server still answers there is done,
        // and is not done again.
        let target = describe(&self.endpoint, &self.options.export);
        if !self.options.reconnect.is_zero() {
            tracing::warn!(%target, error = %lost, "an NBD server is lost; looking for it");
        }
        let (mut pause, mut last) = (PAUSES[0], None);
        loop {
            if *lock(&self.interrupts) != interrupts {
                let message = format!("{target}: interrupted while the server was lost");
                return Err(io::Error::new(io::ErrorKind::Interrupted, message));
            }
            if Instant::now() >= deadline {
                let after = self.options.reconnect;
                let why = last.map_or_else(String::new, |error| format!("; last attempt: {error}"));
                return Err(io::Error::other(format!(
                    "{target}: the server is lost ({lost}), and was not found again within \
                     {after:?}{why}"
                )));
            }
            match self.open_again(deadline) {
                Ok(session) => {
                    *self.session.write().unwrap_or_else(PoisonError::into_inner) = session;
                    return Ok(());
                }
                Err(error) => last = Some(error),
            }
            let guard = lock(&self.interrupts);
            let rest = pause.min(deadline.saturating_duration_since(Instant::now()));
            drop(self.interrupted.wait_timeout(guard, rest));
            pause = (pause * 2).min(PAUSES[1]);
        }
    }

    /// A new session that has everything that was written since the last flush.
    fn open_again(&self, deadline: Instant) -> io::Result<Arc<Session>> {
        let limit = deadline.min(Instant::now() + self.options.handshake_limit);
        let (_, links) = open(&self.endpoint, &self.options, limit, Some(&self.facts))?;
        let number = self.sessions.load(Ordering::Relaxed) + 1;
        let session = Session { number, links, next: AtomicUsize::new(0) };
        // Nobody's write counts as answered meanwhile.
        let mut kept = lock(&self.kept);
        let again = kept.after_loss(number);
        if !again.is_empty() {
            tracing::info!(runs = again.len(), "writing again what was not flushed");
        }
        self.write_again(&session, &again)?;
        self.sessions.store(number, Ordering::Relaxed);
        Ok(Arc::new(session))
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        for link in &self.session().links {
            link.say_goodbye();
        }
    }
}

fn describe(endpoint: &Endpoint, export: &str) -> String {
    if export.is_empty() { endpoint.to_string() } else { format!("\"{export}\" at {endpoint}") }
}

/// Opens as many connections as are wanted and allowed. `known`: what the export was before.
fn open(
    endpoint: &Endpoint,
    options: &NbdClientOptions,
    deadline: Instant,
    known: Option<&Facts>,
) -> io::Result<(Facts, Vec<Link>)> {
    let (mut links, mut known) = (Vec::new(), known.copied());
    loop {
        let wish = Wish {
            endpoint,
            export: &options.export,
            tls: options.tls.as_ref(),
            limit: deadline.saturating_duration_since(Instant::now()),
            silence: options.silence_limit,
        };
        if wish.limit.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let shaken = shake(&wish)?;
        let facts = *known.get_or_insert(shaken.facts);
        if facts != shaken.facts {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the server's export has changed: {:?}, was {facts:?}", shaken.facts),
            ));
        }
        links.push(Link::new(shaken.line, shaken.input, shaken.output));
        let wanted = if facts.flags.has(ExportFlags::MULTI_CONN) {
            options.connections.clamp(1, MAX_CONNECTIONS)
        } else {
            1
        };
        if links.len() == wanted {
            return Ok((facts, links));
        }
    }
}

/// What a client makes of a server that sends what it likes: the handshake, and the answers to a
/// read, a status and a flush. For fuzzing.
pub(super) fn meet(socket: Socket) -> io::Result<()> {
    let endpoint = Endpoint::Unix(PathBuf::new());
    let limit = Duration::from_secs(5);
    let wish = Wish { endpoint: &endpoint, export: "", tls: None, limit, silence: limit };
    let shaken = shake_on(socket, &wish)?;
    let link = Link::new(shaken.line, shaken.input, shaken.output);
    let mut buf = [0; 5000];
    let (one, two) = buf.split_at_mut(4096);
    let request =
        |command, offset, length| Request { flags: 0, command, cookie: 0, offset, length };
    let id = shaken.facts.allocation.unwrap_or(1);
    link.call(&mut [
        Piece::new(request(Command::Read, 4096, 4096), &[], Sink::Data(one)),
        Piece::new(request(Command::Read, 100, 904), &[], Sink::Data(two)),
        Piece::new(request(Command::BlockStatus, 0, 1 << 30), &[], Sink::Status(id, Vec::new())),
        Piece::new(request(Command::Flush, 0, 0), &[], Sink::Nothing),
    ])
}
