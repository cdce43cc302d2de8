//! The side that listens: shakes hands on threads of their own, and puts the connections of one
//! attempt of a session together, in whatever order they come.

use super::{Connection, Limits, Link, PeerError, connection::label};
use crate::wire::{Preamble, Role};
use identity::{HostName, Security, Stream};
use silo_block::session::messages::SessionId;
use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

/// Handshakes at once; more callers wait in the kernel's queue.
const HANDSHAKES: usize = 64;
/// Links that are not whole yet, at once.
const PARTIAL: usize = 64;
/// How often the listener looks whether it should stop.
const LOOK: u16 = 100;

/// What came in.
pub enum Arrival {
    /// All connections of a session.
    Session(Box<Link>),
    /// One that asks for content by hash.
    Fetch(Box<Connection>),
}

/// Which peers may connect; none stands for a peer without TLS.
pub(super) type Allow = dyn Fn(Option<&HostName>) -> bool + Send + Sync;

#[derive(Default)]
struct Partial {
    control: Option<Connection>,
    demand: Option<Connection>,
    data: Vec<Option<Connection>>,
    since: Option<Instant>,
}

type Key = (SessionId, u64, Option<HostName>);

struct Shared {
    security: Security,
    limits: Limits,
    allow: Box<Allow>,
    partial: Mutex<HashMap<Key, Partial>>,
    handshakes: AtomicUsize,
    stop: AtomicBool,
    arrived: mpsc::Sender<Arrival>,
}

/// Listens until it is dropped.
pub struct Listener {
    shared: Arc<Shared>,
    arrivals: Mutex<mpsc::Receiver<Arrival>>,
    thread: Option<JoinHandle<()>>,
    address: SocketAddr,
}

impl Listener {
    /// Listens on a bound socket. `allow` decides by the name that a peer has proved.
    ///
    /// # Errors
    /// If the socket or a thread cannot be had.
    pub fn new(
        socket: TcpListener,
        security: Security,
        limits: Limits,
        allow: impl Fn(Option<&HostName>) -> bool + Send + Sync + 'static,
    ) -> Result<Self, PeerError> {
        let here = |operation| move |source| PeerError::Here { operation, source };
        let address = socket.local_addr().map_err(here("look at the address listened on"))?;
        socket.set_nonblocking(true).map_err(here("set the mode of the socket"))?;
        let (arrived, arrivals) = mpsc::channel();
        let shared = Arc::new(Shared {
            security,
            limits,
            allow: Box::new(allow),
            partial: Mutex::default(),
            handshakes: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            arrived,
        });
        let for_thread = shared.clone();
        let thread = Builder::new()
            .name("silo-listen".to_owned())
            .spawn(move || for_thread.listen(&socket))
            .map_err(here("start a thread"))?;
        Ok(Self { shared, arrivals: Mutex::new(arrivals), thread: Some(thread), address })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes a connection that was made in another way, as if it had been accepted here.
    pub fn take(&self, socket: TcpStream) {
        self.shared.begin(socket);
    }

    /// The next link or fetch connection.
    ///
    /// # Errors
    /// If none came within `limit`.
    pub fn accept(&self, limit: Duration) -> Result<Arrival, PeerError> {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.recv_timeout(limit).map_err(|_| PeerError::Nobody(limit))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // The thread looks ten times a second; a panic there was reported there.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn listen(self: &Arc<Self>, socket: &TcpListener) {
        while !self.stop.load(Ordering::Acquire) {
            self.drop_old_partial();
            match socket.accept() {
                Ok((stream, _)) => self.begin(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait_readable(socket),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    wait_readable(socket);
                }
            }
        }
    }

    fn begin(self: &Arc<Self>, socket: TcpStream) {
        if self.handshakes.fetch_add(1, Ordering::AcqRel) >= HANDSHAKES {
            self.handshakes.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!("more than {HANDSHAKES} peers connect at once: one is turned away");
            return;
        }
        let shared = self.clone();
        let started = Builder::new().name("silo-handshake".to_owned()).spawn(move || {
            if let Err(error) = shared.shake_hands(socket) {
                tracing::warn!(%error, "a connection was not taken");
            }
            shared.handshakes.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = started {
            self.handshakes.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "no thread for a connection");
        }
    }

    fn shake_hands(&self, socket: TcpStream) -> Result<(), PeerError> {
        let stream = Stream::server(socket, &self.security, self.limits.connect)?;
        let peer = label(&stream);
        if !(self.allow)(stream.peer_name()) {
            return Err(PeerError::NotAllowed { peer });
        }
        let (connection, preamble) = Connection::accept(stream, &self.security, &self.limits)?;
        let arrival = match preamble.role {
            Role::Fetch => Some(Arrival::Fetch(Box::new(connection))),
            _ => self.add(connection, &preamble, peer).map(|link| Arrival::Session(Box::new(link))),
        };
        if let Some(arrival) = arrival {
            // Fails only when the listener is gone; then nobody wants it.
            let _ = self.arrived.send(arrival);
        }
        Ok(())
    }

    /// Puts a connection to the others of its attempt; gives the link when it is whole.
    fn add(&self, connection: Connection, preamble: &Preamble, peer: String) -> Option<Link> {
        let key = (preamble.session, preamble.attempt, connection.peer_name().cloned());
        let mut partial = self.partial();
        if partial.len() >= PARTIAL && !partial.contains_key(&key) {
            tracing::warn!(peer, "too many sessions connect at once: one is turned away");
            return None;
        }
        let entry = partial.entry(key.clone()).or_default();
        entry.since.get_or_insert_with(Instant::now);
        if entry.data.is_empty() {
            entry.data.resize_with(usize::from(preamble.data), || None);
        }
        let place = match preamble.role {
            Role::Control => Some(&mut entry.control),
            Role::Demand => Some(&mut entry.demand),
            Role::Data(number) => entry.data.get_mut(usize::from(number)),
            Role::Fetch => None,
        };
        // A second connection for one place replaces the first: the peer gave that up.
        *place? = Some(connection);
        let whole = entry.control.is_some()
            && entry.demand.is_some()
            && entry.data.iter().all(Option::is_some);
        if !whole {
            return None;
        }
        let entry = partial.remove(&key)?;
        let data = entry.data.into_iter().flatten().collect();
        let (session, attempt) = (preamble.session, preamble.attempt);
        Some(Link { control: entry.control?, demand: entry.demand?, data, session, attempt, peer })
    }

    fn drop_old_partial(&self) {
        let limit = self.limits.connect;
        let young = |partial: &Partial| partial.since.is_none_or(|since| since.elapsed() < limit);
        self.partial().retain(|_, partial| young(partial));
    }

    fn partial(&self) -> MutexGuard<'_, HashMap<Key, Partial>> {
        self.partial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait_readable(socket: &TcpListener) {
    use nix::poll::{PollFd, PollFlags, poll};
    // Woken by a caller or by the clock; an error is the next accept's.
    let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], LOOK);
}
