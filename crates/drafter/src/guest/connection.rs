//! The thread that holds the connection: connects, says hello, hands answers to their callers.

use super::OUTPUT_QUEUE;
use crate::socket::untaken;
use drafter_guest::protocol::{
    Decoded, GuestMessage, HostMessage, PROTOCOL_VERSION,
    line::{Line, LineReader},
};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};
use tracing::{debug, warn};

/// Wait before connecting again: at first, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// A hello that is not answered for this long is said again on a new connection: the agent may
/// have started after the old one's bytes were thrown away.
const HELLO_LIMIT: Duration = Duration::from_secs(2);

/// A monitor that takes no byte for this long counts as gone.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// What a caller gets.
#[derive(Debug)]
pub(super) enum Answer {
    Message(GuestMessage),
    /// The connection broke; nothing follows.
    Lost(String),
}

/// Why a request could not be sent.
pub(super) enum SendError {
    /// No agent in time; what happened last.
    NotConnected(String),
    /// Sent in part or not at all; the connection is gone.
    Lost(String),
    /// It does not fit into a line.
    Invalid(String),
}

struct State {
    /// The connection for writing, once the agent has answered the hello.
    greeted: Option<Arc<UnixStream>>,
    waiting: HashMap<u64, SyncSender<Answer>>,
    next_id: u64,
    /// What happened last, for messages.
    last: String,
    voice: Voice,
    /// Nothing is said just now: the guest stands still for a moment.
    held: bool,
    /// Lines that are being written, or are about to be.
    writers: u32,
    closed: bool,
}

/// Whether this end says anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Voice {
    /// Not until it is told when: the guest does not run here yet.
    Listening,
    /// From then on, or as soon as somebody wants something of the guest.
    From(Instant),
    /// Yes.
    Speaking,
    /// Never again: the guest is about to stand still.
    Hushed,
}

/// Shared by the callers and the thread.
pub(super) struct Connection {
    socket: PathBuf,
    machine: String,
    state: Mutex<State>,
    changed: Condvar,
    /// One line at a time.
    writing: Mutex<()>,
    /// Closed to wake the thread for the end.
    stop: Mutex<Option<OwnedFd>>,
}

impl Connection {
    /// A connection and the end of the pipe by which [`Connection::close`] wakes its thread.
    /// `silent`: it says nothing until [`Connection::speak_at`].
    pub(super) fn new(
        socket: PathBuf,
        machine: String,
        silent: bool,
    ) -> io::Result<(Arc<Self>, OwnedFd)> {
        let (woken, stop) = pipe2(OFlag::O_CLOEXEC)?;
        let state = State {
            greeted: None,
            waiting: HashMap::new(),
            next_id: 1,
            last: "not tried yet".to_owned(),
            voice: if silent { Voice::Listening } else { Voice::Speaking },
            held: false,
            writers: 0,
            closed: false,
        };
        let connection = Self {
            socket,
            machine,
            state: Mutex::new(state),
            changed: Condvar::new(),
            writing: Mutex::new(()),
            stop: Mutex::new(Some(stop)),
        };
        Ok((Arc::new(connection), woken))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics with the lock held, and every field is whole between statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the thread soon.
    pub(super) fn close(&self) {
        self.state().closed = true;
        drop(self.stop.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.changed.notify_all();
    }

    /// Whether nothing will be said any more.
    pub(super) fn is_over(&self) -> bool {
        let state = self.state();
        state.closed || state.voice == Voice::Hushed
    }

    /// A silent connection speaks from `at` on, or earlier if somebody wants something.
    pub(super) fn speak_at(&self, at: Instant) {
        let mut state = self.state();
        if state.voice == Voice::Listening {
            state.voice = Voice::From(at);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until this end may speak; false if that will not be.
    fn may_speak(&self) -> bool {
        let mut state = self.state();
        loop {
            let left = match state.voice {
                _ if state.closed => return false,
                Voice::Hushed => return false,
                _ if state.held => Duration::from_secs(3600),
                Voice::Speaking => return true,
                Voice::Listening => Duration::from_secs(3600),
                Voice::From(at) => at.saturating_duration_since(Instant::now()),
            };
            if left.is_zero() {
                state.voice = Voice::Speaking;
                return true;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the agent has answered a hello, without asking for one; false at the deadline
    /// or at the end.
    pub(super) fn greeted_by(&self, deadline: Instant) -> bool {
        let mut state = self.state();
        while state.greeted.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.closed || state.voice == Voice::Hushed {
                return false;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Says nothing more, gives up every request, and waits until the monitor has taken all that
    /// was said; the connection stays. False if that cannot be had within `limit`.
    pub(super) fn hush(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        let stream = state.greeted.take();
        state.voice = Voice::Hushed;
        "the machine is about to stand still here".clone_into(&mut state.last);
        let why = state.last.clone();
        for (_, answers) in state.waiting.drain() {
            let _ = answers.try_send(Answer::Lost(why.clone()));
        }
        drop(state);
        self.changed.notify_all();
        // Without a greeting a hello may be on its way.
        let Some(stream) = stream else { return false };
        self.is_quiet_by(&stream, deadline)
    }

    /// Waits until the monitor has taken every line; a line that is being written ends first. False
    /// at the deadline.
    fn is_quiet_by(&self, stream: &UnixStream, deadline: Instant) -> bool {
        // The kernel tells nobody when bytes are taken.
        while self.state().writers > 0 || untaken(stream) > 0 {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        true
    }

    /// Says nothing until [`Connection::release`]; requests wait. False if the monitor has not taken
    /// all that was said within `limit`, or no agent is there, to whom a hello may be on its way.
    pub(super) fn hold(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        state.held = true;
        let Some(stream) = state.greeted.clone() else { return false };
        drop(state);
        self.is_quiet_by(&stream, deadline)
    }

    /// Ends a [`Connection::hold`].
    pub(super) fn release(&self) {
        self.state().held = false;
        self.changed.notify_all();
    }

    /// Waits for an agent, then sends the request that `build` makes of its id. Answers come by
    /// the receiver until the request is [forgotten](Connection::forget).
    pub(super) fn send(
        &self,
        deadline: Instant,
        build: impl FnOnce(u64) -> HostMessage,
    ) -> Result<(u64, Receiver<Answer>), SendError> {
        let mut state = self.state();
        let stream = loop {
            if let (Some(stream), false) = (&state.greeted, state.held) {
                break Arc::clone(stream);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.closed || state.voice == Voice::Hushed {
                return Err(SendError::NotConnected(state.last.clone()));
            }
            if matches!(state.voice, Voice::From(_)) {
                state.voice = Voice::Speaking;
                self.changed.notify_all();
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        let id = state.next_id;
        let line = build(id).encode().map_err(|error| SendError::Invalid(error.to_string()))?;
        state.next_id += 1;
        let (answers, receiver) = sync_channel(OUTPUT_QUEUE);
        state.waiting.insert(id, answers);
        // With the lock: whoever wants silence from here on sees that this line is still to come.
        state.writers += 1;
        drop(state);
        let writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let written = (&*stream).write_all(&line);
        drop(writing);
        self.state().writers -= 1;
        if let Err(error) = written {
            // Half a line may be out there: nothing more can be said on this connection.
            let _ = stream.shutdown(std::net::Shutdown::Both);
            self.forget(id);
            return Err(SendError::Lost(format!("sending: {error}")));
        }
        Ok((id, receiver))
    }

    /// Drops whatever else comes for a request.
    pub(super) fn forget(&self, id: u64) {
        self.state().waiting.remove(&id);
    }

    /// The thread: until [`Connection::close`]. `attached`: a connection that stands already.
    pub(super) fn run(&self, woken: &OwnedFd, attached: Option<UnixStream>) {
        let mut backoff = BACKOFF.0;
        let mut attached = attached;
        while self.may_speak() {
            let stream = attached.take().map_or_else(|| UnixStream::connect(&self.socket), Ok);
            let why = match stream.and_then(|stream| self.converse(stream, woken)) {
                Ok(why) => why,
                Err(error) => error.to_string(),
            };
            if self.broken(&why) {
                backoff = BACKOFF.0;
            }
            if wait_readable(None, woken, backoff).is_ok_and(|woken| woken.stop) {
                return;
            }
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    /// The connection is gone: tells everybody who waits for an answer. True if an agent was there.
    fn broken(&self, why: &str) -> bool {
        let mut state = self.state();
        if state.last != why {
            debug!(machine = self.machine, why, "guest channel");
            state.last = why.to_owned();
        }
        let greeted = state.greeted.take().is_some();
        for (_, answers) in state.waiting.drain() {
            // A full queue means a caller that does not listen; it finds the queue closed.
            let _ = answers.try_send(Answer::Lost(why.to_owned()));
        }
        greeted
    }

    /// One connection from its beginning to its end; returns why it ended.
    fn converse(&self, stream: UnixStream, woken: &OwnedFd) -> io::Result<String> {
        let stream = Arc::new(stream);
        stream.set_write_timeout(Some(WRITE_LIMIT))?;
        stream.set_nonblocking(false)?;
        let nonce = nonce()?;
        // The newline ends whatever half line the host before has left behind.
        let hello = HostMessage::Hello { version: PROTOCOL_VERSION, nonce };
        let mut bytes = vec![b'\n'];
        bytes.extend(hello.encode().map_err(io::Error::other)?);
        (&*stream).write_all(&bytes)?;
        let said = Instant::now();
        let mut greeted = false;
        let mut lines = LineReader::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let limit = if greeted {
                Duration::from_secs(3600)
            } else {
                HELLO_LIMIT.saturating_sub(said.elapsed())
            };
            if limit.is_zero() {
                return Ok("connected to the monitor, but the agent is silent".to_owned());
            }
            let ready = wait_readable(Some(&stream), woken, limit)?;
            if ready.stop {
                return Ok("the channel was closed".to_owned());
            }
            if !ready.data {
                continue;
            }
            let read = (&*stream).read(&mut buffer)?;
            if read == 0 {
                return Ok("the monitor closed the connection".to_owned());
            }
            lines.push(&buffer[..read]);
            while let Some(line) = lines.next_line() {
                match (self.understand(line), greeted) {
                    (Some(GuestMessage::Hello { version, nonce: heard, .. }), _)
                        if heard == nonce =>
                    {
                        if version != PROTOCOL_VERSION {
                            return Ok(format!(
                                "the agent speaks version {version} of the guest channel, this \
                                 drafter {PROTOCOL_VERSION}; build the package again"
                            ));
                        }
                        greeted = true;
                        let mut state = self.state();
                        if state.voice == Voice::Speaking {
                            state.greeted = Some(Arc::clone(&stream));
                        }
                        drop(state);
                        self.changed.notify_all();
                    }
                    (Some(GuestMessage::Started {}), true) => {
                        return Ok("the agent ended and started again".to_owned());
                    }
                    // An answer to a host before us.
                    (_, false) | (None, _) => {}
                    (Some(message), true) => {
                        if let Some(why) = self.hand_on(message, woken) {
                            return Ok(why);
                        }
                    }
                }
            }
        }
    }

    /// Reads a line; nonsense is dropped, since the guest is not trusted to make sense.
    fn understand(&self, line: Line) -> Option<GuestMessage> {
        let Line::Text(text) = line else {
            warn!(machine = self.machine, "the guest sent a line that is too long; dropped");
            return None;
        };
        match GuestMessage::decode(&text) {
            Ok(Decoded::Known(message)) => Some(message),
            Ok(Decoded::Unknown { name, .. }) => {
                debug!(machine = self.machine, name, "the guest sent an unknown message; ignored");
                None
            }
            Err(error) => {
                debug!(machine = self.machine, %error, "the guest sent nonsense; ignored");
                None
            }
        }
    }

    /// Gives an answer to who waits for it, and waits while that one is busy: so a flood of output
    /// stops at its source. Returns why the connection must end, if it must.
    fn hand_on(&self, message: GuestMessage, woken: &OwnedFd) -> Option<String> {
        let id = message.id()?;
        let mut answer = Answer::Message(message);
        loop {
            let answers = self.state().waiting.get(&id).cloned()?;
            match answers.try_send(answer) {
                Ok(()) => return None,
                Err(std::sync::mpsc::TrySendError::Disconnected(_)) => {
                    self.forget(id);
                    return None;
                }
                Err(std::sync::mpsc::TrySendError::Full(back)) => answer = back,
            }
            if wait_readable(None, woken, Duration::from_millis(2)).is_ok_and(|ready| ready.stop) {
                return Some("the channel was closed".to_owned());
            }
        }
    }
}

struct Woken {
    data: bool,
    stop: bool,
}

/// Waits for bytes, for the end of the channel, or for `limit`.
fn wait_readable(
    stream: Option<&UnixStream>,
    stop: &OwnedFd,
    limit: Duration,
) -> io::Result<Woken> {
    let mut fds = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    if let Some(stream) = stream {
        fds.push(PollFd::new(stream.as_fd(), PollFlags::POLLIN));
    }
    // Rounded up, so that the last wait does not spin.
    let limit = PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, limit) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let seen = |at: usize| fds.get(at).is_some_and(|fd| fd.any() == Some(true));
    Ok(Woken { stop: seen(0), data: seen(1) })
}

/// Fills `bytes` from the host's random generator.
pub(super) fn random(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes).map_err(|error| io::Error::other(format!("no random bytes: {error}")))
}

fn nonce() -> io::Result<u64> {
    let mut bytes = [0; 8];
    random(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
