//! The listening end: accepts front ends, one session with a thread each, and ends them all.

use super::{
    heir::{self, Beginning},
    pages::GuestPages,
    queue::Work,
    session::Session,
    sys,
};
use crate::{
    pool::Pool,
    socket::{self, Opened, SocketFile},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
    sys::socket::{MsgFlags, send},
};
use silo_block::io::BlockDevice;
use std::{
    fmt, io,
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, TryLockError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use vhost::vhost_user::{BackendReqHandler, Error};

/// `VHOST_USER_SET_BACKEND_REQ_FD`, and `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG` with the protocol's
/// version as flags and no payload (docs/interop/vhost-user.rst).
const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// How often [`VhostServer::comes_to_rest`] looks: somebody's machine stands still meanwhile.
const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// How a server behaves.
#[derive(Clone)]
pub struct VhostOptions {
    /// What the guest gets as the disk's serial number: its first 20 bytes.
    pub serial: String,
    /// Most queues that a front end may use.
    pub queues: u16,
    /// Refuse all writes, also to a device that takes them.
    pub read_only: bool,
    /// Most threads for requests that wait.
    pub workers: usize,
    /// Longest time that a queue's thread looks for requests before it sleeps; it learns by itself
    /// whether that is of use. Zero: it sleeps at once.
    pub poll: Duration,
    /// How long stopping a queue may wait for requests in hand.
    pub drain_limit: Duration,
    /// How long it waits before it ends waits at the device ([`BlockDevice::interrupt`]) and puts
    /// requests that fail because of that back into the driver's ring: they are done once more when
    /// the ring starts again, here or where the machine has moved to. `None`: it waits until all are
    /// done. Only for a device that nobody but this server waits at, since all waits end.
    pub put_back_after: Option<Duration>,
    /// Most front ends at a time; more are turned away.
    pub max_connections: usize,
    /// The pager and tracker of the guest's memory; none if it is ordinary memory.
    pub pages: Option<Arc<dyn GuestPages>>,
    /// Offer that memory is told region by region, of which there can be more than eight then. QEMU that
    /// loses its server while its machine stands still can go on with the next one only without it.
    pub memory_slots: bool,
}

impl Default for VhostOptions {
    fn default() -> Self {
        Self {
            serial: String::new(),
            queues: 16,
            read_only: false,
            workers: 32,
            poll: Duration::from_micros(32),
            drain_limit: Duration::from_secs(60),
            put_back_after: None,
            max_connections: 4,
            pages: None,
            memory_slots: true,
        }
    }
}

impl fmt::Debug for VhostOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostOptions")
            .field("serial", &self.serial)
            .field("queues", &self.queues)
            .field("read_only", &self.read_only)
            .field("workers", &self.workers)
            .field("poll", &self.poll)
            .field("drain_limit", &self.drain_limit)
            .field("put_back_after", &self.put_back_after)
            .field("max_connections", &self.max_connections)
            .field("pages", &self.pages.is_some())
            .field("memory_slots", &self.memory_slots)
            .finish()
    }
}

/// What a server could not do.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
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
    #[error("{threads} threads of the vhost-user server on {} were still at work after {limit:?}", path.display())]
    StillWorking {
        /// Where.
        path: PathBuf,
        /// How many.
        threads: usize,
        /// How long was waited.
        limit: Duration,
    },
}

/// A front end, from its acceptance until nothing of it is in hand.
struct Entry {
    number: u64,
    stream: Arc<UnixStream>,
    /// Where it listens for messages from us.
    channel: Option<OwnedFd>,
    session: Option<Arc<Mutex<Session>>>,
    /// It has said what it wants of us.
    introduced: bool,
}

#[derive(Default)]
struct Sessions {
    entries: Vec<Entry>,
    next: u64,
}

struct Server {
    work: Arc<Work>,
    options: Arc<VhostOptions>,
    sessions: Mutex<Sessions>,
    ended: Condvar,
}

impl Server {
    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        // Entries come and go in one step each.
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server. Dropping it stops it.
pub struct VhostServer {
    path: PathBuf,
    file: SocketFile,
    server: Arc<Server>,
    wake: Arc<EventFd>,
    accept: Option<JoinHandle<()>>,
}

impl VhostServer {
    /// Serves `device` on the unix socket `path`. A socket file that nobody serves any more is
    /// replaced; its mode is 0666 less the process's umask, as with the NBD server.
    ///
    /// # Errors
    /// If the path cannot be bound, or another server answers there.
    pub fn start(
        path: &Path,
        device: Arc<dyn BlockDevice>,
        options: VhostOptions,
    ) -> Result<Self, VhostError> {
        let failed = |source| VhostError::Listen { path: path.to_owned(), source };
        let (listener, file) = match socket::listen(path).map_err(failed)? {
            Opened::Served => return Err(VhostError::Taken { path: path.to_owned() }),
            Opened::Listens(listener, file) => (listener, file),
        };
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| failed(errno.into()))?;
        let wake = Arc::new(wake);
        let work = Work {
            device: RwLock::new(device),
            pool: Pool::new(options.workers),
            stopping: AtomicBool::new(false),
            called_off: AtomicU64::new(0),
            calling_off: AtomicU32::new(0),
            poll: options.poll,
        };
        let server = Arc::new(Server {
            work: Arc::new(work),
            options: Arc::new(options),
            sessions: Mutex::default(),
            ended: Condvar::new(),
        });
        let (serving, waking) = (server.clone(), wake.clone());
        let accept = thread::Builder::new()
            .name("silo-vhost-accept".to_owned())
            .spawn(move || accept(&listener, &waking, &serving))
            .map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, server, wake, accept: Some(accept) })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Front ends connected now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.server.sessions().entries.len()
    }

    /// Whether a front end is connected and the rings of all front ends are stopped: nothing is in
    /// hand, and neither the device nor a guest's memory is touched until a ring starts again. So
    /// it is when a monitor has stopped its machine. A ring that is just being stopped is not, and
    /// of a front end that is just being listened to nobody knows: see [`VhostServer::comes_to_rest`].
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        self.rest() == Some(true)
    }

    /// The same, but waits for what is being done for a front end just now, `limit` at most. A monitor
    /// that has had all the answers for which it waits has more to say, such as where it wants to be
    /// told of requests that are done, and does not wait until that has been heard.
    #[must_use]
    pub fn comes_to_rest(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            match self.rest() {
                Some(rests) => return rests,
                None if Instant::now() >= deadline => return false,
                None => thread::sleep(LOOK_AGAIN),
            }
        }
    }

    /// Whether all is at rest; `None` if a front end is being listened to and all others rest.
    fn rest(&self) -> Option<bool> {
        let sessions = self.server.sessions();
        let mut busy = sessions.entries.iter().any(|entry| entry.session.is_none());
        for session in sessions.entries.iter().filter_map(|entry| entry.session.as_ref()) {
            match session.try_lock() {
                Ok(session) if !session.is_at_rest() => return Some(false),
                Ok(_) => {}
                Err(TryLockError::WouldBlock) => busy = true,
                Err(TryLockError::Poisoned(_)) => return Some(false),
            }
        }
        if busy { None } else { Some(!sessions.entries.is_empty()) }
    }

    /// Whether a front end is connected, and waits for no answer of ours: one that stops its rings
    /// waits until their requests are done, and one that lost us until it has found us again.
    #[must_use]
    pub fn is_answering(&self) -> bool {
        self.server.sessions().entries.iter().any(|entry| {
            let session = entry.session.as_ref();
            !is_gone(&entry.stream) && session.is_some_and(|session| session.try_lock().is_ok())
        })
    }

    /// Whether a front end is connected that has not said what it wants of us. One that has just connected is
    /// about to. If it does not, it takes us for the server before us: its machine stands still, and
    /// it says what it wants when that goes on; or its machine runs, and it waits for answers to requests that
    /// nobody has told us of, until the machine has stood still for a moment.
    #[must_use]
    pub fn is_mistaken(&self) -> bool {
        let sessions = self.server.sessions();
        sessions.entries.iter().any(|entry| !entry.introduced && !is_gone(&entry.stream))
    }

    /// Serves `device` from now on, which holds the same content and may be larger, and tells the
    /// front ends to look at the size again. Requests in hand end on the device before.
    pub fn resize(&self, device: Arc<dyn BlockDevice>) {
        *self.server.work.device.write().unwrap_or_else(PoisonError::into_inner) = device;
        for entry in &self.server.sessions().entries {
            let Some(channel) = &entry.channel else { continue };
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            if let Err(error) = send(channel.as_raw_fd(), &CONFIG_CHANGE, flags) {
                tracing::warn!(%error, "a front end was not told of the new size");
            }
        }
    }

    /// Takes no more requests, ends waits for missing blocks, waits for the requests in hand, and
    /// hangs up. A request that fails because of that is left to the next daemon where the front
    /// end keeps a record of requests in hand; else the guest gets an error. Nothing touches the
    /// device once this has returned `Ok`.
    ///
    /// # Errors
    /// If requests are still in hand after `limit`.
    pub fn stop(mut self, limit: Duration) -> Result<(), VhostError> {
        self.shut(limit)
    }

    fn shut(&mut self, limit: Duration) -> Result<(), VhostError> {
        let Some(accept) = self.accept.take() else { return Ok(()) };
        let deadline = Instant::now() + limit;
        let work = &self.server.work;
        work.stopping.store(true, Ordering::SeqCst);
        if let Err(error) = self.wake.write(1) {
            tracing::warn!(%error, "cannot wake the vhost-user listener");
        }
        // It polls, and does nothing else that takes time.
        let _ = accept.join();
        self.file.remove();
        let mut sessions = self.server.sessions();
        while !sessions.entries.is_empty() {
            for entry in &sessions.entries {
                // It fails when the front end is gone already.
                let _ = entry.stream.shutdown(Shutdown::Both);
            }
            work.device().interrupt();
            if let Some(pages) = &self.server.options.pages {
                pages.interrupt();
            }
            if Instant::now() >= deadline {
                let threads = sessions.entries.len();
                return Err(VhostError::StillWorking { path: self.path.clone(), threads, limit });
            }
            // Again after a moment: a worker may begin to wait just after the interrupt.
            let waited = self.server.ended.wait_timeout(sessions, Duration::from_millis(10));
            sessions = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(sessions);
        work.pool.stop();
        match work.pool.wait(deadline) {
            0 => Ok(()),
            threads => Err(VhostError::StillWorking { path: self.path.clone(), threads, limit }),
        }
    }
}

impl Drop for VhostServer {
    fn drop(&mut self) {
        if let Err(error) = self.shut(Duration::from_secs(5)) {
            tracing::warn!(%error, "a vhost-user server did not end");
        }
    }
}

fn accept(listener: &UnixListener, wake: &EventFd, server: &Arc<Server>) {
    loop {
        let mut fds = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(wake.as_fd(), PollFlags::POLLIN),
        ];
        // No deadline: waiting for front ends is all this thread does, and `stop` wakes it.
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "the vhost-user server cannot wait for front ends");
                return;
            }
        }
        if server.work.stopping.load(Ordering::SeqCst) {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => admit(server, stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                // Out of descriptors, most likely: the front end waits in the queue meanwhile.
                tracing::warn!(%error, "cannot accept a front end; trying again");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Takes the entry out when the session's thread ends, also by a panic.
struct Leaving(Arc<Server>, u64);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.sessions().entries.retain(|entry| entry.number != self.1);
        self.0.ended.notify_all();
    }
}

fn admit(server: &Arc<Server>, stream: UnixStream) {
    let stream = Arc::new(stream);
    let number = {
        let mut sessions = server.sessions();
        if sessions.entries.len() >= server.options.max_connections {
            tracing::warn!(limit = server.options.max_connections, "too many front ends");
            return;
        }
        let number = sessions.next;
        sessions.next += 1;
        sessions.entries.push(Entry {
            number,
            stream: stream.clone(),
            channel: None,
            session: None,
            introduced: false,
        });
        number
    };
    let leaving = Leaving(server.clone(), number);
    let spawned = thread::Builder::new()
        .name("silo-vhost".to_owned())
        .stack_size(512 << 10)
        .spawn(move || serve(&leaving, &stream));
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for a front end");
    }
}

/// Whether the other end has hung up.
fn is_gone(stream: &UnixStream) -> bool {
    // POLLHUP is reported without being asked for.
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
}

/// Waits until no older session whose front end is gone has anything in hand: a front end that
/// comes back has us run what was in hand again, and the first run must not end after the second.
fn await_older(server: &Server, number: u64) -> bool {
    let deadline = Instant::now() + server.options.drain_limit;
    let mut sessions = server.sessions();
    while sessions.entries.iter().any(|entry| entry.number < number && is_gone(&entry.stream)) {
        if Instant::now() >= deadline || server.work.stopping.load(Ordering::SeqCst) {
            return false;
        }
        let waited = server.ended.wait_timeout(sessions, Duration::from_millis(10));
        sessions = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
    true
}

/// Waits for a front end's next request, and keeps in its entry what others want to know of it. `None`: it
/// says no more.
fn listen(Leaving(server, number): &Leaving, stream: &UnixStream) -> Option<u32> {
    let (request, descriptor) = match sys::peek_request(stream) {
        Ok(next) => next?,
        Err(error) => {
            tracing::debug!(%error, "a front end's socket cannot be read");
            return None;
        }
    };
    let mut sessions = server.sessions();
    if let Some(entry) = sessions.entries.iter_mut().find(|entry| entry.number == *number) {
        entry.introduced |= heir::introduces(request);
        if request == SET_BACKEND_REQ_FD && descriptor.is_some() {
            entry.channel = descriptor;
        }
    }
    Some(request)
}

/// What does a front end's requests, by the first of them.
fn handler_for(
    first: Option<u32>,
    stream: &UnixStream,
    session: &Arc<Mutex<Session>>,
    options: &VhostOptions,
) -> Result<BackendReqHandler<Mutex<Session>>, Error> {
    let session = Arc::clone(session);
    match first.map_or(Beginning::Anew, Beginning::of) {
        Beginning::Anew => {
            let socket = stream.try_clone().map_err(Error::SocketError)?;
            Ok(BackendReqHandler::from_stream(socket, session))
        }
        Beginning::GoesOn => {
            tracing::info!("a monitor goes on as it was with the server before");
            heir::handler(stream, session, options.memory_slots)
        }
        Beginning::AmidRings => {
            Err(Error::InvalidOperation("it takes this server for the one before"))
        }
    }
}

fn serve(leaving: &Leaving, stream: &Arc<UnixStream>) {
    let Leaving(server, number) = leaving;
    if let Err(error) = stream.set_nonblocking(false) {
        tracing::warn!(%error, "a front end's socket cannot be set up");
        return;
    }
    if !await_older(server, *number) {
        tracing::warn!("a front end came while requests of one that is gone were in hand");
        return;
    }
    let session = Arc::new(Mutex::new(Session::new(server.work.clone(), server.options.clone())));
    if let Some(entry) = server.sessions().entries.iter_mut().find(|e| e.number == *number) {
        entry.session = Some(session.clone());
    }
    let mut handler = None;
    loop {
        let request = listen(leaving, stream);
        let handler = match &mut handler {
            Some(handler) => handler,
            None => match handler_for(request, stream, &session, &server.options) {
                Ok(made) => handler.insert(made),
                Err(error) => {
                    tracing::warn!(%error, "a front end is cut off");
                    break;
                }
            },
        };
        match handler.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage) => break,
            Err(error) => {
                if !server.work.stopping.load(Ordering::SeqCst) {
                    tracing::warn!(%error, "a front end is cut off");
                }
                break;
            }
        }
    }
    // The front end sees the end of the connection once nothing of it is in hand any more.
    let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
    session.pause();
    if !session.drain(server.options.drain_limit) {
        tracing::error!(requests = session.in_hand(), "requests of a front end are abandoned");
    }
    session.abandon();
    drop(session);
    drop(handler);
    let _ = stream.shutdown(Shutdown::Both);
}
