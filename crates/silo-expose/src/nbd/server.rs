//! The listening end: accepts clients, counts their threads, stops them all.

use super::{
    BlockDevice, Endpoint, ExportOptions, Exports, NbdError,
    connection::Connection,
    handshake::{self, Handshake, NbdSecurity},
    line::{Channel, Line, Socket, is_gone},
};
use crate::socket::{self, Opened, SocketFile};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixListener,
    },
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU8, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long clients get to take the last answers when the server stops.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// The export's name, for [`NbdServer::start`]; clients that ask for the default export ("")
    /// get it too.
    pub export: String,
    /// How long a handshake may take.
    pub handshake_limit: Duration,
    /// How long a client may pause in the middle of a message or not take its replies. A monitor
    /// that is frozen does that; after this time it has to connect again.
    pub stall_limit: Duration,
    /// Most connections at a time; more are turned away.
    pub max_connections: usize,
    /// Whether the line is protected.
    pub security: NbdSecurity,
    /// Longest time that a connection's thread looks for requests before it sleeps; it learns by
    /// itself whether that is of use. Zero: it sleeps at once. Lines under TLS always do.
    pub poll: Duration,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            handshake_limit: Duration::from_secs(10),
            stall_limit: Duration::from_secs(600),
            max_connections: 64,
            security: NbdSecurity::Plain,
            poll: Duration::from_micros(32),
        }
    }
}

/// What a client is at.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Stage {
    Shaking,
    Asking,
    /// The server stops: requests in hand are answered, no new ones are taken.
    Draining,
}

/// One connection, as others see it.
pub(super) struct Client {
    line: Line,
    stage: AtomicU8,
}

impl Client {
    pub(super) fn is_draining(&self) -> bool {
        self.stage.load(Ordering::Acquire) == Stage::Draining as u8
    }

    pub(super) fn hang_up(&self) {
        self.line.hang_up();
    }

    /// The handshake is over. False if the server stops.
    fn begin_asking(&self) -> bool {
        let (from, to) = (Stage::Shaking as u8, Stage::Asking as u8);
        self.stage.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn drain(&self) {
        let before = self.stage.swap(Stage::Draining as u8, Ordering::AcqRel);
        if before == Stage::Shaking as u8 {
            self.line.hang_up();
        } else {
            self.line.stop_reading();
        }
    }
}

#[derive(Default)]
struct Clients {
    threads: usize,
    clients: Vec<Weak<Client>>,
    /// Threads with a client, handshake included.
    connected: usize,
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

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens, and says which file that made.
    fn bind(endpoint: &Endpoint) -> Result<(Self, Option<SocketFile>), NbdError> {
        let failed = |source| NbdError::Listen { endpoint: endpoint.clone(), source };
        match endpoint {
            Endpoint::Unix(path) => match socket::listen(path).map_err(failed)? {
                Opened::Served => Err(NbdError::Taken { endpoint: endpoint.clone() }),
                Opened::Listens(listener, file) => Ok((Self::Unix(listener), Some(file))),
            },
            Endpoint::Tcp(address) => {
                let listener = TcpListener::bind(address).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok((Self::Tcp(listener), None))
            }
        }
    }

    fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// A running server. Dropping it stops it.
pub struct NbdServer {
    endpoint: Endpoint,
    file: Option<SocketFile>,
    exports: Arc<Exports>,
    shared: Arc<Shared>,
    wake: Arc<EventFd>,
    accept: Option<JoinHandle<()>>,
}

impl NbdServer {
    /// Serves `device` alone on the unix socket `path`, as [`NbdServer::serve`] does.
    ///
    /// # Errors
    /// If the path cannot be bound, or another server answers there.
    pub fn start(
        path: &Path,
        device: Arc<dyn BlockDevice>,
        options: NbdOptions,
    ) -> Result<Self, NbdError> {
        let exports = Arc::new(Exports::new());
        exports.add(&options.export, device, ExportOptions::default())?;
        Self::serve(&Endpoint::unix(path), exports, options)
    }

    /// Serves `exports` on `endpoint`. A socket file that nobody serves any more is replaced. The
    /// file has mode 0666 less the process's umask: who may connect is decided by its folder, or by
    /// its owner and mode, which the caller may change once this has returned.
    ///
    /// # Errors
    /// If the endpoint cannot be bound, or another server answers there.
    pub fn serve(
        endpoint: &Endpoint,
        exports: Arc<Exports>,
        options: NbdOptions,
    ) -> Result<Self, NbdError> {
        let (listener, file) = Listener::bind(endpoint)?;
        let failed = |source| NbdError::Listen { endpoint: endpoint.clone(), source };
        let endpoint = match &listener {
            Listener::Unix(_) => endpoint.clone(),
            // The port that was chosen, where 0 was asked for.
            Listener::Tcp(tcp) => Endpoint::Tcp(tcp.local_addr().map_err(failed)?),
        };
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| failed(errno.into()))?;
        let (wake, shared) = (Arc::new(wake), Arc::new(Shared::default()));
        let acceptor = Acceptor {
            listener,
            exports: exports.clone(),
            shared: shared.clone(),
            wake: wake.clone(),
            options: Arc::new(options),
        };
        let accept = thread::Builder::new()
            .name("silo-nbd-accept".to_owned())
            .spawn(move || acceptor.run())
            .map_err(failed)?;
        Ok(Self { endpoint, file, exports, shared, wake, accept: Some(accept) })
    }

    /// Where it listens.
    #[must_use]
    pub const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The unix socket on which it listens; the empty path for a TCP port.
    #[must_use]
    pub fn path(&self) -> &Path {
        match &self.endpoint {
            Endpoint::Unix(path) => path,
            Endpoint::Tcp(_) => Path::new(""),
        }
    }

    /// The TCP port on which it listens.
    #[must_use]
    pub const fn address(&self) -> Option<SocketAddr> {
        match self.endpoint {
            Endpoint::Unix(_) => None,
            Endpoint::Tcp(address) => Some(address),
        }
    }

    /// What it offers.
    #[must_use]
    pub const fn exports(&self) -> &Arc<Exports> {
        &self.exports
    }

    /// Clients connected now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.clients().connected
    }

    /// Takes no more requests, ends waits for missing blocks, answers what succeeds of the requests
    /// in hand, and hangs up: to a client it is a line that is cut, and one that connects again will
    /// send again what was not answered. Clients get half a second for that; then it hangs up on
    /// them whatever the devices do. No request touches a device once this has returned `Ok`. What
    /// was written and not flushed is as durable as before.
    ///
    /// # Errors
    /// If requests are still in hand after `limit`.
    pub fn stop(mut self, limit: Duration) -> Result<(), NbdError> {
        self.shut(limit)
    }

    /// As [`NbdServer::stop`], and then flushes every device: what clients wrote is durable before
    /// whoever owns the device closes it.
    ///
    /// # Errors
    /// As [`NbdServer::stop`], or if a device cannot be flushed.
    pub fn stop_and_flush(mut self, limit: Duration) -> Result<(), NbdError> {
        self.shut(limit)?;
        for export in self.exports.all() {
            let device = export.device();
            if !device.is_read_only() {
                device.flush().map_err(|source| NbdError::LastFlush {
                    export: export.name().to_owned(),
                    source,
                })?;
            }
        }
        Ok(())
    }

    fn shut(&mut self, limit: Duration) -> Result<(), NbdError> {
        let Some(accept) = self.accept.take() else { return Ok(()) };
        let start = Instant::now();
        self.shared.clients().stopping = true;
        if let Err(error) = self.wake.write(1) {
            tracing::warn!(%error, "cannot wake the block server's listener");
        }
        // It polls, and does nothing else that takes time.
        let _ = accept.join();
        if let Some(file) = &self.file {
            file.remove();
        }
        let mut clients = self.shared.clients();
        while clients.threads > 0 {
            let waited = start.elapsed();
            for client in clients.clients.iter().filter_map(Weak::upgrade) {
                client.drain();
                if waited >= LAST_ANSWERS.min(limit / 2) {
                    client.hang_up();
                }
            }
            for export in self.exports.all() {
                export.device().interrupt();
            }
            if waited >= limit {
                return Err(NbdError::StillWorking {
                    endpoint: self.endpoint.clone(),
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
    listener: Listener,
    exports: Arc<Exports>,
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
            let admitted = match self.listener.accept() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                accepted => accepted.and_then(|socket| self.admit(socket)),
            };
            if let Err(error) = admitted {
                // Out of descriptors, most likely: the next client waits in the queue meanwhile.
                tracing::warn!(%error, "cannot take an NBD client; trying again");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }

    fn admit(&self, socket: Socket) -> io::Result<()> {
        let stage = AtomicU8::new(Stage::Shaking as u8);
        let client = Arc::new(Client { line: socket.line()?, stage });
        {
            let mut clients = self.shared.clients();
            if clients.connected >= self.options.max_connections {
                tracing::warn!(limit = self.options.max_connections, "too many NBD clients");
                return Ok(());
            }
            clients.connected += 1;
            clients.clients.retain(|other| other.strong_count() > 0);
            clients.clients.push(Arc::downgrade(&client));
        }
        let counted = ClientGuard(self.shared.clone());
        let guard = ThreadGuard::new(self.shared.clone());
        let (exports, options) = (self.exports.clone(), self.options.clone());
        thread::Builder::new()
            .name("silo-nbd".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                serve(client, socket, &exports, &options, &guard);
                drop(counted);
            })
            .map(drop)
    }
}

/// Counts a client from its acceptance until its first thread ends.
struct ClientGuard(Arc<Shared>);

impl Drop for ClientGuard {
    fn drop(&mut self) {
        self.0.clients().connected -= 1;
    }
}

fn serve(
    client: Arc<Client>,
    socket: Socket,
    exports: &Exports,
    options: &NbdOptions,
    guard: &ThreadGuard,
) {
    let late = "the client did not finish the handshake in time";
    let channel = Channel::new(socket, options.handshake_limit, late);
    let (agreement, channel) = match handshake::shake(channel, exports, &options.security) {
        Ok(Handshake::Transmission(agreement, channel)) => (agreement, channel),
        Ok(Handshake::Done) => return,
        // It hung up: somebody looked whether there is a server.
        Err(error) if is_gone(&error) => return,
        Err(error) => {
            tracing::warn!(%error, "an NBD handshake failed");
            return;
        }
    };
    let stall = Some(options.stall_limit);
    let (input, output) = match channel.split(stall, stall) {
        Ok(halves) => halves,
        Err(error) => {
            tracing::warn!(%error, "an NBD client's socket cannot be set up");
            return;
        }
    };
    if client.begin_asking() {
        Arc::new(Connection::new(client, agreement, input, output, options.poll)).work(guard);
    }
}

/// Serves one client until it is through, on this thread and those that it needs. For fuzzing.
pub(super) fn serve_one(socket: Socket, exports: &Exports) {
    let Ok(line) = socket.line() else { return };
    let stage = AtomicU8::new(Stage::Shaking as u8);
    let client = Arc::new(Client { line, stage });
    let shared = Arc::new(Shared::default());
    let guard = ThreadGuard::new(shared.clone());
    serve(client, socket, exports, &NbdOptions::default(), &guard);
    drop(guard);
    let mut clients = shared.clients();
    while clients.threads > 0 {
        clients = shared.ended.wait(clients).unwrap_or_else(PoisonError::into_inner);
    }
}
