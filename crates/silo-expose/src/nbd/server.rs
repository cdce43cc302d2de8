//! The listening end: accepts clients, counts their threads, stops them all.

use super::{
    BlockDevice,
    connection::Connection,
    handshake::{self, Handshake},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use std::{
    fs, io,
    net::Shutdown,
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// The export's name; clients that ask for the default export ("") get it too.
    pub export: String,
    /// How long a handshake may take.
    pub handshake_limit: Duration,
    /// How long a client may pause in the middle of a message or not take its replies. A monitor
    /// that is frozen does that; after this time it has to connect again.
    pub stall_limit: Duration,
    /// Most connections at a time; more are turned away.
    pub max_connections: usize,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            handshake_limit: Duration::from_secs(10),
            stall_limit: Duration::from_secs(600),
            max_connections: 16,
        }
    }
}

/// What a server could not do.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The socket cannot be made.
    #[error("could not listen on {}: {source}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another process serves there.
    #[error("another server answers on {}; stop it, or choose another path", path.display())]
    Taken {
        /// Where.
        path: PathBuf,
    },
    /// Requests did not end in time.
    #[error("{threads} threads of the block server on {} were still at work after {limit:?}", path.display())]
    StillWorking {
        /// Where.
        path: PathBuf,
        /// How many.
        threads: usize,
        /// How long was waited.
        limit: Duration,
    },
}

#[derive(Default)]
struct Clients {
    threads: usize,
    streams: Vec<Weak<UnixStream>>,
    /// Threads with a client, handshake included.
    clients: usize,
    stopping: bool,
}

#[derive(Default)]
struct Shared {
    clients: Mutex<Clients>,
    ended: Condvar,
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        // Counts change in one step each; a panic elsewhere leaves them right.
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a thread for as long as it lives.
pub(super) struct ThreadGuard(Arc<Shared>);

impl ThreadGuard {
    fn new(shared: Arc<Shared>) -> Self {
        shared.clients().threads += 1;
        Self(shared)
    }
}

impl Clone for ThreadGuard {
    fn clone(&self) -> Self {
        Self::new(self.0.clone())
    }
}

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        self.0.clients().threads -= 1;
        self.0.ended.notify_all();
    }
}

/// A running server. Dropping it stops it.
pub struct NbdServer {
    path: PathBuf,
    device: Arc<dyn BlockDevice>,
    shared: Arc<Shared>,
    wake: Arc<EventFd>,
    accept: Option<JoinHandle<()>>,
}

impl NbdServer {
    /// Serves `device` on the unix socket `path`. A socket file that nobody serves any more is
    /// replaced. The file has mode 0666 less the process's umask: who may connect is decided by
    /// its folder, or by its owner and mode, which the caller may change once this has returned.
    ///
    /// # Errors
    /// If the path cannot be bound, or another server answers there.
    pub fn start(
        path: &Path,
        device: Arc<dyn BlockDevice>,
        options: NbdOptions,
    ) -> Result<Self, NbdError> {
        let failed = |source| NbdError::Listen { path: path.to_owned(), source };
        match UnixStream::connect(path) {
            Ok(_) => return Err(NbdError::Taken { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        // A client that gives up between poll and accept must not block the thread.
        listener.set_nonblocking(true).map_err(failed)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| failed(errno.into()))?;
        let (wake, shared) = (Arc::new(wake), Arc::new(Shared::default()));
        let acceptor = Acceptor {
            listener,
            device: device.clone(),
            shared: shared.clone(),
            wake: wake.clone(),
            options: Arc::new(options),
        };
        let accept = thread::Builder::new()
            .name("silo-nbd-accept".to_owned())
            .spawn(move || acceptor.run())
            .map_err(failed)?;
        Ok(Self { path: path.to_owned(), device, shared, wake, accept: Some(accept) })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Clients connected now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.clients().clients
    }

    /// Hangs up on all clients, ends waits for missing blocks with an error, and waits for the
    /// requests in hand. No request touches the device once this has returned `Ok`.
    ///
    /// # Errors
    /// If requests are still in hand after `limit`.
    pub fn stop(mut self, limit: Duration) -> Result<(), NbdError> {
        self.shut(limit)
    }

    fn shut(&mut self, limit: Duration) -> Result<(), NbdError> {
        let Some(accept) = self.accept.take() else { return Ok(()) };
        let deadline = Instant::now() + limit;
        self.shared.clients().stopping = true;
        if let Err(error) = self.wake.write(1) {
            tracing::warn!(%error, "cannot wake the block server's listener");
        }
        // It polls, and does nothing else that takes time.
        let _ = accept.join();
        // Another server may have taken the path over; then its file stays.
        let _ = fs::remove_file(&self.path);
        let mut clients = self.shared.clients();
        while clients.threads > 0 {
            for stream in clients.streams.iter().filter_map(Weak::upgrade) {
                // It fails when the client is gone already.
                let _ = stream.shutdown(Shutdown::Both);
            }
            self.device.interrupt();
            if Instant::now() >= deadline {
                return Err(NbdError::StillWorking {
                    path: self.path.clone(),
                    threads: clients.threads,
                    limit,
                });
            }
            // Again after a moment: a worker may begin to wait just after the interrupt.
            let pause = Duration::from_millis(10);
            let waited = self.shared.ended.wait_timeout(clients, pause);
            clients = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        if let Err(error) = self.shut(Duration::from_secs(5)) {
            tracing::warn!(%error, "a block server did not end");
        }
    }
}

struct Acceptor {
    listener: UnixListener,
    device: Arc<dyn BlockDevice>,
    shared: Arc<Shared>,
    wake: Arc<EventFd>,
    options: Arc<NbdOptions>,
}

impl Acceptor {
    fn run(&self) {
        loop {
            let mut fds = [
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            // No deadline: waiting for clients is all this thread does, and `stop` wakes it.
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the block server cannot wait for clients");
                    return;
                }
            }
            if self.shared.clients().stopping {
                return;
            }
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    // Out of descriptors, most likely: the client waits in the queue meanwhile.
                    tracing::warn!(%error, "cannot accept an NBD client; trying again");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn admit(&self, stream: UnixStream) {
        let stream = Arc::new(stream);
        {
            let mut clients = self.shared.clients();
            if clients.clients >= self.options.max_connections {
                tracing::warn!(limit = self.options.max_connections, "too many NBD clients");
                return;
            }
            clients.clients += 1;
            clients.streams.retain(|other| other.strong_count() > 0);
            clients.streams.push(Arc::downgrade(&stream));
        }
        let client = ClientGuard(self.shared.clone());
        let guard = ThreadGuard::new(self.shared.clone());
        let (device, options) = (self.device.clone(), self.options.clone());
        let spawned = thread::Builder::new()
            .name("silo-nbd".to_owned())
            .stack_size(256 << 10)
            .spawn(move || serve(stream, device, &options, client, &guard));
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for an NBD client");
        }
    }
}

/// Counts a client from its acceptance until its first thread ends.
struct ClientGuard(Arc<Shared>);

impl Drop for ClientGuard {
    fn drop(&mut self) {
        self.0.clients().clients -= 1;
    }
}

fn serve(
    stream: Arc<UnixStream>,
    device: Arc<dyn BlockDevice>,
    options: &NbdOptions,
    client: ClientGuard,
    guard: &ThreadGuard,
) {
    let shaken = stream.set_nonblocking(false).and_then(|()| {
        handshake::shake(&stream, &options.export, device.size(), options.handshake_limit)
    });
    match shaken {
        Ok(Handshake::Transmission) => {}
        Ok(Handshake::Done) => return,
        // It hung up: somebody looked whether there is a server.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::BrokenPipe
            ) =>
        {
            return;
        }
        Err(error) => {
            tracing::warn!(%error, "an NBD handshake failed");
            return;
        }
    }
    let connection = match Connection::new(stream, device, options.stall_limit) {
        Ok(connection) => Arc::new(connection),
        Err(error) => {
            tracing::warn!(%error, "an NBD client's socket cannot be set up");
            return;
        }
    };
    connection.work(guard);
    drop(client);
}
