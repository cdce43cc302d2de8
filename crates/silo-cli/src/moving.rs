//! Devices that move: `silo serve` gives them away, `silo connect` takes them.
//!
//! The destination connects, because it is the one that knows when it is ready, and because it may
//! sit behind a router; the move's own connections go the other way round inside:
//!
//! ```text
//!  source (listens)                               destination
//!  pool of sockets  ◄── TCP, parked ────────────  keeps a few open
//!      │ Dial takes one: TLS as client ─────────► first byte: Listener takes it, TLS as server
//! ```
//!
//! What must hold: nothing is read from a parked socket before the library's own handshake, which
//! proves names under mutual TLS; what a stranger can do is take places in the pool, which is
//! bounded; a socket whose other end has gone is never handed out.

use crate::{config::MigrateConfig, stack::Host};
use anyhow::{Context, Result};
use identity::{HostName, Security};
use nix::poll::{PollFd, PollFlags, poll};
use silo::moving::{
    Server,
    peer::{Dial, Limits},
};
use std::{
    collections::VecDeque,
    io,
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::fd::AsFd,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Sockets that wait at a source; the oldest gives way.
const POOL: usize = 64;
/// Sockets that a destination keeps open beyond those of one link.
const SPARE: usize = 2;
/// How often is looked whether to stop.
const LOOK: Duration = Duration::from_millis(100);
/// Between two attempts to reach a source.
const AGAIN: Duration = Duration::from_millis(500);

/// How the connections of a move are protected, and how they behave.
///
/// # Errors
/// If there is to be TLS and there is no certificate.
pub(crate) fn security(config: &MigrateConfig, host: &Host) -> Result<(Security, Limits)> {
    let security = if config.plaintext {
        Security::Plaintext
    } else {
        let identity = host.identity.clone();
        Security::Mutual(identity.context("moving needs TLS, and this host has no certificate")?)
    };
    let limits = Limits {
        data: u8::try_from(config.connections)?,
        bandwidth: config.bandwidth.map(|rate| rate.0),
        ..Limits::default()
    };
    Ok((security, limits))
}

/// The peer's name as it must be proved; any word will do without TLS.
///
/// # Errors
/// If it is no name.
pub(crate) fn peer_name(config: &MigrateConfig) -> Result<HostName> {
    Ok(config.peer_name.as_deref().unwrap_or("peer").parse()?)
}

#[derive(Default)]
struct Pool {
    sockets: Mutex<VecDeque<TcpStream>>,
    changed: Condvar,
}

impl Pool {
    fn sockets(&self) -> std::sync::MutexGuard<'_, VecDeque<TcpStream>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a socket whose other end is there.
    fn take(&self, limit: Duration) -> io::Result<TcpStream> {
        let deadline = Instant::now() + limit;
        let mut sockets = self.sockets();
        loop {
            while let Some(socket) = sockets.pop_front() {
                if is_parked(&socket) {
                    socket.set_nonblocking(false)?;
                    return Ok(socket);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = "no destination is connected";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            let waited = self.changed.wait_timeout(sockets, left);
            sockets = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn is_empty(&self) -> bool {
        let mut sockets = self.sockets();
        sockets.retain(is_parked);
        sockets.is_empty()
    }
}

/// Whether the other end is there and has said nothing.
fn is_parked(socket: &TcpStream) -> bool {
    let silent = socket.set_nonblocking(true).and_then(|()| socket.peek(&mut [0]));
    matches!(silent, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// Where a source waits for its destination.
pub(crate) struct Waiting {
    address: SocketAddr,
    pool: Arc<Pool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Waiting {
    /// Listens.
    ///
    /// # Errors
    /// If the address is taken or not this host's.
    pub(crate) fn start(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address)
            .with_context(|| format!("could not listen on {address} for a destination"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (pool, stop) = (Arc::new(Pool::default()), Arc::new(AtomicBool::new(false)));
        let (filled, stopped) = (pool.clone(), stop.clone());
        let thread = thread::Builder::new().name("silo-wait".to_owned()).spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                let Ok((socket, _)) = listener.accept() else {
                    // Nobody, or out of descriptors: the clock tries again.
                    let ready = PollFd::new(listener.as_fd(), PollFlags::POLLIN);
                    let _ = poll(&mut [ready], 100_u16);
                    continue;
                };
                let mut sockets = filled.sockets();
                if sockets.len() >= POOL {
                    sockets.pop_front();
                }
                sockets.push_back(socket);
                filled.changed.notify_all();
            }
        })?;
        Ok(Self { address, pool, stop, thread: Some(thread) })
    }

    /// Where.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether a destination is connected.
    pub(crate) fn has_caller(&self) -> bool {
        !self.pool.is_empty()
    }

    /// The way to whoever is connected.
    pub(crate) fn dial(&self, peer: HostName, security: Security, limits: Limits) -> Dial {
        let pool = self.pool.clone();
        Dial::by(move |limit| pool.take(limit), peer, security, limits)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // It looks ten times a second.
            let _ = thread.join();
        }
    }
}

/// Keeps sockets to a source open, and gives those to the server that it begins to use.
pub(crate) struct Parking {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Parking {
    /// Connects to `source` (`host:port`) as often as one link of `limits` needs, and again.
    ///
    /// # Errors
    /// If there is no thread.
    pub(crate) fn start(source: String, limits: &Limits, server: Arc<Server>) -> Result<Self> {
        let wanted = usize::from(limits.data) + 2 + SPARE;
        let (limit, stop) = (limits.connect, Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("silo-park".to_owned()).spawn(move || {
            let mut parked: Vec<TcpStream> = Vec::new();
            let mut trouble = None;
            while !stopped.load(Ordering::Acquire) {
                if parked.len() < wanted {
                    match connect(&source, limit) {
                        Ok(socket) => {
                            trouble = None;
                            parked.push(socket);
                            continue;
                        }
                        Err(error) => {
                            let text = error.to_string();
                            if trouble.as_ref() != Some(&text) {
                                tracing::warn!(source, error = text, "the source is not reached");
                                trouble = Some(text);
                            }
                            thread::park_timeout(AGAIN);
                        }
                    }
                }
                hand_over(&mut parked, &server);
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It looks ten times a second, or after one attempt to connect.
            let _ = thread.join();
        }
    }
}

fn connect(source: &str, limit: Duration) -> io::Result<TcpStream> {
    let none = || io::Error::new(io::ErrorKind::NotFound, format!("{source} has no address"));
    let address = source.to_socket_addrs()?.next().ok_or_else(none)?;
    TcpStream::connect_timeout(&address, limit)
}

/// Waits a moment for the source to use a socket; those that it does use go to the server.
fn hand_over(parked: &mut Vec<TcpStream>, server: &Server) {
    let mut ready: Vec<PollFd<'_>> =
        parked.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
    let limit = u16::try_from(LOOK.as_millis()).unwrap_or(u16::MAX);
    if poll(&mut ready, limit).is_err() {
        return;
    }
    let used: Vec<bool> = ready.iter().map(|one| one.any().unwrap_or(false)).collect();
    let all = std::mem::take(parked);
    for (socket, used) in all.into_iter().zip(used) {
        if !used {
            parked.push(socket);
        } else if socket.peek(&mut [0]).is_ok_and(|read| read > 0) {
            server.take_socket(socket);
        }
        // Else the source has closed it.
    }
}
