//! All connections of a session, opened together by the source.

use super::{Connection, Limits, PeerError, connection::label};
use crate::wire::{Preamble, Role};
use identity::{Control, HostName, Security, Stream};
use silo_block::session::messages::SessionId;
use std::{
    io,
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// The connections of one attempt of a session.
pub struct Link {
    /// Messages both ways.
    pub control: Connection,
    /// Blocks.
    pub data: Vec<Connection>,
    /// Demands and their blocks.
    pub demand: Connection,
    /// The session.
    pub session: SessionId,
    /// Counts up with every reconnection.
    pub attempt: u64,
    /// The peer, for messages.
    pub peer: String,
}

impl Link {
    /// The name that the peer proved on all connections; none without TLS.
    #[must_use]
    pub fn peer_name(&self) -> Option<&HostName> {
        self.control.peer_name()
    }

    /// Ends all connections, from any thread.
    #[must_use]
    pub fn hangup(&self) -> Hangup {
        let blocks = self.data.iter().chain([&self.demand]);
        Hangup {
            control: self.control.control.clone(),
            blocks: blocks.map(|connection| connection.control.clone()).collect(),
            done: Arc::new(AtomicBool::new(false)),
        }
    }
}

/// Ends all connections of a link.
#[derive(Clone)]
pub struct Hangup {
    control: Control,
    blocks: Arc<[Control]>,
    done: Arc<AtomicBool>,
}

impl Hangup {
    /// Now; whoever reads or writes gets an error.
    pub fn hang_up(&self) {
        self.done.store(true, Ordering::Release);
        self.hang_up_blocks();
        self.control.shutdown();
    }

    /// Ends those for blocks now: what was said on the control connection can be heard still.
    pub(crate) fn hang_up_blocks(&self) {
        self.blocks.iter().for_each(Control::shutdown);
    }

    /// Whether somebody did.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }
}

/// Opens a TCP connection within a limit.
type Open = dyn Fn(Duration) -> io::Result<TcpStream> + Send + Sync;

/// How to reach a peer.
#[derive(Clone)]
pub struct Dial {
    open: Arc<Open>,
    peer: HostName,
    security: Security,
    limits: Limits,
}

impl Dial {
    /// By address. `peer` is the name that it must prove.
    #[must_use]
    pub fn new(address: SocketAddr, peer: HostName, security: Security, limits: Limits) -> Self {
        let open = move |limit| TcpStream::connect_timeout(&address, limit);
        Self::by(open, peer, security, limits)
    }

    /// By any way to a TCP connection: in another network namespace, through a proxy.
    #[must_use]
    pub fn by(
        open: impl Fn(Duration) -> io::Result<TcpStream> + Send + Sync + 'static,
        peer: HostName,
        security: Security,
        limits: Limits,
    ) -> Self {
        Self { open: Arc::new(open), peer, security, limits }
    }

    /// The limits of its connections.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The peer's name as it is expected.
    #[must_use]
    pub fn peer(&self) -> &HostName {
        &self.peer
    }

    /// Opens all connections of a session, side by side.
    ///
    /// # Errors
    /// If one of them cannot be had within the limit.
    pub fn link(&self, session: SessionId, attempt: u64) -> Result<Link, PeerError> {
        let data = self.limits.data.clamp(1, crate::wire::MAX_DATA);
        let roles = [Role::Control, Role::Demand].into_iter().chain((0..data).map(Role::Data));
        let opened: Vec<Result<Connection, PeerError>> = std::thread::scope(|scope| {
            let threads: Vec<_> = roles
                .map(|role| {
                    let preamble = Preamble { role, data, session, attempt };
                    scope.spawn(move || self.connect(&preamble))
                })
                .collect();
            let joined = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
            joined
                .map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let mut opened = opened.into_iter().collect::<Result<Vec<_>, _>>()?;
        let data = opened.split_off(2);
        let mut first = opened.into_iter();
        let (Some(control), Some(demand)) = (first.next(), first.next()) else {
            unreachable!("two roles were opened before the data connections")
        };
        Ok(Link { control, data, demand, session, attempt, peer: format!("host {}", self.peer) })
    }

    /// Opens a connection for content by hash.
    ///
    /// # Errors
    /// If it cannot be had within the limit.
    pub fn fetch(&self) -> Result<Connection, PeerError> {
        let session = SessionId([0; 16]);
        self.connect(&Preamble { role: Role::Fetch, data: 0, session, attempt: 0 })
    }

    fn connect(&self, preamble: &Preamble) -> Result<Connection, PeerError> {
        let started = Instant::now();
        let limit = self.limits.connect;
        let socket = (self.open)(limit).map_err(|source| PeerError::Wire {
            peer: format!("host {}", self.peer),
            source: source.into(),
        })?;
        let left = limit.saturating_sub(started.elapsed()).max(Duration::from_millis(1));
        let stream = Stream::client(socket, &self.peer, &self.security, left)?;
        tracing::debug!(peer = label(&stream), role = ?preamble.role, "connected");
        Connection::open(stream, &self.security, preamble, &self.limits)
    }
}
