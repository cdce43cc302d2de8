//! Takes sources' connections, and brings them to their sessions: new ones, and those that were cut.
//!
//! What must hold (I8): the other end says what its devices are called and how large they are, and
//! nothing else is taken from it; which device of this host that is, whoever runs this says. A
//! session belongs to the name that began it.

use super::{
    DestinationHost, Inbound, Options,
    farewell::{LINGER, Outcome, Remembered},
};
use crate::{
    assist::{Lookup, serve_fetch},
    lane::lock,
    peer::{Arrival, Link, Listener},
    volume::Volume,
    wire,
};
use identity::HostName;
use silo_block::session::messages::{DeviceInfo, Reason, SessionId, ToDestination, ToSource};
use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

/// Messages that are read before a session is found: a greeting and a group.
const FIRST: usize = 2;
/// Messages of unknown kinds that are skipped before these.
const SKIPPED: usize = 16;
/// How often it is looked whether to stop.
const LOOK: Duration = Duration::from_millis(100);
/// How long a peer that fetches may think between two questions.
const IDLE: Duration = Duration::from_secs(60);
/// Peers that fetch at once.
const FETCHERS: usize = 64;

/// What a source wants to give away.
#[derive(Debug)]
pub struct Offer<'a> {
    /// The session.
    pub session: SessionId,
    /// The name that the source has proved; none without TLS.
    pub peer: Option<&'a HostName>,
    /// Its devices. Names and sizes come from outside; there is nothing else to obey in it.
    pub devices: &'a [DeviceInfo],
}

/// What this host answers.
pub struct Accepted {
    /// Its own devices, in the order of the offer.
    pub volumes: Vec<Arc<Volume>>,
    /// Who will use them.
    pub host: Arc<dyn DestinationHost>,
    /// How the session behaves.
    pub options: Options,
    /// The session ran here already before this process was started: its attempt.
    pub running: Option<u32>,
}

/// Decides what may come here, and where it goes.
pub trait Reception: Send + Sync {
    /// A source offers devices in a session that this process does not know.
    ///
    /// # Errors
    /// A sentence for people at the other end, without names of files of this host.
    fn receive(&self, offer: &Offer<'_>) -> Result<Accepted, String>;

    /// A new session has begun.
    fn began(&self, session: &Arc<Inbound>) {
        let _ = session;
    }
}

struct Session {
    inbound: Arc<Inbound>,
    owner: Option<HostName>,
}

#[derive(Default)]
struct Sessions {
    live: HashMap<SessionId, Session>,
    over: Remembered,
}

/// Whom a link is for.
enum Found {
    Live(Arc<Inbound>),
    Over(Outcome),
}

struct Shared {
    listener: Listener,
    reception: Arc<dyn Reception>,
    lookup: Option<Arc<dyn Lookup>>,
    sessions: Mutex<Sessions>,
    fetchers: Mutex<usize>,
    stop: AtomicBool,
}

/// Serves until it is dropped; sessions that run go on.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves what comes to `listener`. With `lookup` it also answers peers that ask by hash.
    ///
    /// # Errors
    /// If there is no thread.
    pub fn new(
        listener: Listener,
        reception: Arc<dyn Reception>,
        lookup: Option<Arc<dyn Lookup>>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            listener,
            reception,
            lookup,
            sessions: Mutex::default(),
            fetchers: Mutex::new(0),
            stop: AtomicBool::new(false),
        });
        let for_thread = shared.clone();
        let thread =
            Builder::new().name("silo-server".to_owned()).spawn(move || for_thread.serve())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> std::net::SocketAddr {
        self.shared.listener.address()
    }

    /// Takes a connection that was made in another way: a destination that cannot be reached
    /// connects to its source, and that begins to speak.
    pub fn take_socket(&self, socket: std::net::TcpStream) {
        self.shared.listener.take(socket);
    }

    /// A session that it knows.
    #[must_use]
    pub fn session(&self, id: SessionId) -> Option<Arc<Inbound>> {
        lock(&self.shared.sessions).live.get(&id).map(|session| session.inbound.clone())
    }

    /// Makes a session known that began before this process did, so that its source finds it.
    pub fn adopt(&self, inbound: Arc<Inbound>, owner: Option<HostName>) {
        let session = inbound.session();
        lock(&self.shared.sessions).live.insert(session, Session { inbound, owner });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // It looks ten times a second; what it panicked with was printed there.
            let _ = thread.join();
        }
    }
}

impl Sessions {
    /// Of those that are over, no more is kept than what their sources are to be told.
    fn retire(&mut self) {
        for (id, session) in self.live.extract_if(|_, session| session.inbound.is_over()) {
            if let Some(outcome) = session.inbound.shared.outcome() {
                self.over.add(id, session.owner, outcome);
            }
        }
    }
}

impl Shared {
    fn serve(self: &Arc<Self>) {
        while !self.stop.load(Ordering::Acquire) {
            let Ok(arrival) = self.listener.accept(LOOK) else { continue };
            let shared = self.clone();
            let run: Box<dyn FnOnce() + Send> = match arrival {
                Arrival::Session(link) => Box::new(move || shared.greet(*link)),
                Arrival::Fetch(connection) => Box::new(move || shared.answer(*connection)),
            };
            if let Err(error) = Builder::new().name("silo-greet".to_owned()).spawn(run) {
                tracing::warn!(%error, "no thread for a peer");
            }
        }
    }

    fn answer(&self, connection: crate::peer::Connection) {
        let Some(lookup) = self.lookup.clone() else { return };
        {
            let mut fetchers = lock(&self.fetchers);
            if *fetchers >= FETCHERS {
                return;
            }
            *fetchers += 1;
        }
        if let Err(error) = serve_fetch(connection, &*lookup, IDLE) {
            tracing::warn!(%error, "a peer that fetched by hash");
        }
        *lock(&self.fetchers) -= 1;
    }

    /// Brings a link to its session, or says why not.
    fn greet(&self, mut link: Link) {
        let reason = match self.try_greet(&mut link) {
            Ok((Found::Live(inbound), first)) => return inbound.shared.attach(link, first),
            Ok((Found::Over(outcome), first)) => {
                let group = first.iter().find_map(|message| match message {
                    ToDestination::Group(devices) => Some(&devices[..]),
                    _ => None,
                });
                return outcome.tell(link, group.unwrap_or_default());
            }
            Err(reason) => reason,
        };
        tracing::warn!(peer = link.peer, %reason, "a session was not taken");
        let outgoing = &mut link.control.outgoing;
        let said = wire::write_to_source(outgoing, &ToSource::Abort(reason));
        let _ = said.and_then(|()| outgoing.flush()).and_then(|()| outgoing.inner().finish());
        // Closing at once could reset the connection before the reason was read.
        wait_for_end(&mut link);
    }

    fn try_greet(&self, link: &mut Link) -> Result<(Found, Vec<ToDestination>), Reason> {
        let mut first = Vec::with_capacity(FIRST);
        for _ in 0..FIRST + SKIPPED {
            if first.len() == FIRST {
                break;
            }
            let frame = link.control.incoming.read();
            let message = frame.and_then(|frame| wire::read_to_destination(&frame));
            match message {
                Ok(Some(message)) => first.push(message),
                Ok(None) => {}
                Err(error) => return Err(Reason::Protocol(error.to_string())),
            }
        }
        let session = link.session;
        let [ToDestination::Hello { session: named, .. }, ToDestination::Group(devices)] =
            &first[..]
        else {
            return Err(Reason::Protocol("it did not begin with a greeting and a group".into()));
        };
        if *named != session {
            return Err(Reason::Protocol("it greets for another session".into()));
        }
        let peer = link.peer_name().cloned();
        let mut sessions = lock(&self.sessions);
        if let Some(known) = sessions.live.get(&session) {
            if known.owner != peer {
                return Err(Reason::UnknownSession(session));
            }
            let found = match known.inbound.shared.outcome() {
                Some(outcome) => Found::Over(outcome),
                None => Found::Live(known.inbound.clone()),
            };
            return Ok((found, first));
        }
        if let Some((owner, outcome)) = sessions.over.find(session) {
            if *owner != peer {
                return Err(Reason::UnknownSession(session));
            }
            return Ok((Found::Over(outcome.clone()), first));
        }
        sessions.retire();
        // A source that was started again knows its old session no more. What has come by that is
        // kept, and counts in the new one.
        for old in sessions.live.values().filter(|old| old.owner == peer) {
            old.inbound.shared.make_way(devices);
        }
        let offer = Offer { session, peer: peer.as_ref(), devices };
        let accepted = self.reception.receive(&offer).map_err(Reason::Cancelled)?;
        let fits = accepted.volumes.len() == devices.len()
            && accepted.volumes.iter().zip(devices).all(|(ours, info)| *ours.name() == info.name);
        if !fits {
            return Err(Reason::Cancelled("the destination has other devices".into()));
        }
        let Accepted { volumes, host, options, running } = accepted;
        let inbound = match running {
            None => Inbound::new(session, volumes, host, options),
            Some(attempt) => Inbound::running(session, attempt, volumes, host, options),
        };
        let inbound = Arc::new(inbound.map_err(|error| Reason::Cancelled(error.to_string()))?);
        sessions.live.insert(session, Session { inbound: inbound.clone(), owner: peer });
        drop(sessions);
        self.reception.began(&inbound);
        Ok((Found::Live(inbound), first))
    }
}

/// Waits for the peer to close a link over which nothing more is said.
fn wait_for_end(link: &mut Link) {
    link.control.control.set_read_timeout(Some(LINGER));
    let begin = Instant::now();
    while begin.elapsed() < LINGER && link.control.incoming.read().is_ok() {}
    link.hangup().hang_up();
}
