//! What callers see of the channel.

use super::{
    GuestError,
    connection::{Answer, Connection, SendError, random},
};
use drafter_guest::protocol::{
    Entry, ExecRequest, ExitStatus, GuestMessage, HostMessage, NewIdentity, ProbeKind, Stream,
};
use std::{
    io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Fresh random bytes for a guest that runs again.
const ENTROPY: usize = 64;

/// How much longer than a command's own limit its answer may take.
const EXEC_GRACE: Duration = Duration::from_secs(10);

/// Pause between two readiness probes: what the package wants, within these.
const PROBE_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// A piece of output of a command in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Where the command wrote to.
    pub stream: Stream,
    /// What it wrote; may end within a character.
    pub data: Vec<u8>,
}

/// What `after_resume` came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// By how much the guest's wall clock was set forward (back, if negative), in nanoseconds.
    pub clock_step_ns: i64,
}

fn opening(machine: &str, source: io::Error) -> GuestError {
    GuestError::Host { machine: machine.to_owned(), operation: "opening the guest channel", source }
}

/// The channel to one machine's agent while the machine runs on this host.
pub struct GuestChannel {
    machine: String,
    socket: PathBuf,
    connection: Arc<Connection>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for GuestChannel {
    fn drop(&mut self) {
        self.connection.close();
        if let Some(thread) = self.thread.take() {
            // It ends at once; a panic in it has been told on standard error already.
            let _ = thread.join();
        }
    }
}

impl GuestChannel {
    /// Opens the channel of `machine` over the monitor's unix socket. Returns at once; the
    /// connection is made, and made again, in the background.
    ///
    /// # Errors
    /// When this host gives no thread or descriptor.
    pub fn connect(socket: &Path, machine: &str) -> Result<Self, GuestError> {
        Self::open(socket, machine, None).map_err(|source| opening(machine, source))
    }

    /// Opens the channel of a machine that is still to arrive: is connected when this returns, and
    /// says nothing until [`GuestChannel::speak_in`]. The guest, whose channel was open where it
    /// comes from, then finds it open and sees no change.
    ///
    /// # Errors
    /// When the monitor does not take the connection, or this host gives no thread.
    pub fn attach(socket: &Path, machine: &str) -> Result<Self, GuestError> {
        let attached = UnixStream::connect(socket);
        attached
            .and_then(|stream| Self::open(socket, machine, Some(stream)))
            .map_err(|source| opening(machine, source))
    }

    fn open(socket: &Path, machine: &str, attached: Option<UnixStream>) -> io::Result<Self> {
        let silent = attached.is_some();
        let (connection, woken) = Connection::new(socket.to_owned(), machine.to_owned(), silent)?;
        let shared = Arc::clone(&connection);
        let thread = std::thread::Builder::new()
            .name(format!("guest-{machine}"))
            .spawn(move || shared.run(&woken, attached))?;
        Ok(Self {
            machine: machine.to_owned(),
            socket: socket.to_owned(),
            connection,
            thread: Some(thread),
        })
    }

    /// Hangs up for good, whoever else still holds the channel: what is asked from now on fails.
    /// Before a pause, so that nothing is written to the guest's memory behind its back.
    pub fn close(&self) {
        self.connection.close();
    }

    /// Lets an [attached](GuestChannel::attach) channel speak to the guest, which runs now: after
    /// `pause`, in which the guest has its processor to itself, or when somebody calls.
    pub fn speak_in(&self, pause: Duration) {
        self.connection.speak_at(Instant::now() + pause);
    }

    /// Waits until the agent has been spoken to, by whomever; false after `limit`.
    #[must_use]
    pub fn greeted_within(&self, limit: Duration) -> bool {
        self.connection.greeted_by(Instant::now() + limit)
    }

    /// Before a pause: says nothing more, and gives the monitor up to `limit` to take what was
    /// said, so that nothing is written to the guest's memory behind its back. The connection
    /// stays, so that the guest notices nothing; if the monitor does not take everything the
    /// channel is closed. What is asked from now on fails, and so does what was asked before.
    pub fn hush(&self, limit: Duration) {
        if !self.connection.hush(limit) {
            self.close();
        }
    }

    /// For a pause after which the machine goes on here: says nothing more until
    /// [`GuestChannel::release`], and gives the monitor up to `limit` to take what was said. Requests
    /// wait, those that were sent are answered after the pause, and the guest notices nothing. False
    /// if the monitor did not take everything: it may write to the guest's memory during the pause.
    pub fn hold(&self, limit: Duration) -> bool {
        self.connection.hold(limit)
    }

    /// Ends a [`GuestChannel::hold`].
    pub fn release(&self) {
        self.connection.release();
    }

    /// Whether it was closed or told to be silent: nothing can be asked by it any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.connection.is_over()
    }

    /// Sends the request that `build` makes of its id, and waits for its final answer. Output
    /// on the way is dropped; see [`GuestChannel::exec`].
    ///
    /// # Errors
    /// As [`GuestError`] says; a `failed` answer is [`GuestError::Failed`].
    pub fn call(
        &self,
        operation: &'static str,
        limit: Duration,
        build: impl FnOnce(u64) -> HostMessage,
    ) -> Result<GuestMessage, GuestError> {
        self.ask(operation, limit, build, &mut |_| {})
    }

    fn ask(
        &self,
        operation: &'static str,
        limit: Duration,
        build: impl FnOnce(u64) -> HostMessage,
        on_output: &mut dyn FnMut(Output),
    ) -> Result<GuestMessage, GuestError> {
        let deadline = Instant::now() + limit;
        let machine = || self.machine.clone();
        let sent = self.connection.send(deadline, build).map_err(|error| match error {
            SendError::NotConnected(detail) => GuestError::NotConnected {
                machine: machine(),
                operation,
                limit,
                socket: self.socket.clone(),
                detail,
            },
            SendError::Lost(detail) => GuestError::Lost { machine: machine(), operation, detail },
            SendError::Invalid(detail) => {
                GuestError::Invalid { machine: machine(), operation, detail }
            }
        });
        let (id, answers) = sent?;
        let result = final_answer(&answers, deadline, on_output);
        self.connection.forget(id);
        match result {
            Ok(GuestMessage::Failed { failure, .. }) => {
                Err(GuestError::Failed { machine: machine(), operation, failure })
            }
            Ok(message) => Ok(message),
            Err(End::Deadline) => {
                if operation == EXEC {
                    self.cancel(id);
                }
                Err(GuestError::Timeout { machine: machine(), operation, limit })
            }
            Err(End::Lost(detail)) => {
                Err(GuestError::Lost { machine: machine(), operation, detail })
            }
        }
    }

    /// Asks for the end of a command that nobody waits for any more.
    fn cancel(&self, exec: u64) {
        let sent = self.connection.send(Instant::now(), |id| HostMessage::Cancel { id, exec });
        if let Ok((id, _)) = sent {
            self.connection.forget(id);
        }
    }

    fn unexpected(&self, operation: &'static str, message: &GuestMessage) -> GuestError {
        let detail = format!("the agent gave an answer to something else: {message:?}");
        GuestError::Lost { machine: self.machine.clone(), operation, detail }
    }

    fn done(
        &self,
        operation: &'static str,
        limit: Duration,
        build: impl FnOnce(u64) -> HostMessage,
    ) -> Result<(), GuestError> {
        match self.call(operation, limit, build)? {
            GuestMessage::Done { .. } => Ok(()),
            other => Err(self.unexpected(operation, &other)),
        }
    }

    /// Waits until the agent answers.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn ping(&self, limit: Duration) -> Result<(), GuestError> {
        self.done("ping", limit, |id| HostMessage::Ping { id })
    }

    /// What the entry point does.
    ///
    /// # Errors
    /// When the agent does not answer within `limit`.
    pub fn status(&self, limit: Duration) -> Result<Entry, GuestError> {
        match self.call("status", limit, |id| HostMessage::Status { id })? {
            GuestMessage::Status { entry, .. } => Ok(entry),
            other => Err(self.unexpected("status", &other)),
        }
    }

    /// Runs the package's hook before the machine is paused, and syncs the guest's file systems
    /// after it if `sync`. `limit` should be above the hook's own.
    ///
    /// # Errors
    /// When the hook failed or the agent did not answer: the machine runs on, and the move should
    /// be called off.
    pub fn before_suspend(&self, sync: bool, limit: Duration) -> Result<(), GuestError> {
        self.done("before_suspend", limit, |id| HostMessage::BeforeSuspend { id, sync })
    }

    /// Tells the guest that it runs again: gives it this host's wall clock, fresh random bytes and,
    /// for a fork, a new name; runs the package's hook. Also right after a first boot, whose clock
    /// is only as good as a second.
    ///
    /// # Errors
    /// When a part failed (the others were tried) or the agent did not answer; the machine runs.
    pub fn after_resume(
        &self,
        host_name: Option<&str>,
        limit: Duration,
    ) -> Result<Resume, GuestError> {
        const OPERATION: &str = "after_resume";
        let entropy = self.entropy(OPERATION)?;
        let host_name = host_name.map(str::to_owned);
        let answer = self.call(OPERATION, limit, |id| {
            // Read here, when the agent is there to take it, and not before a wait for it.
            let wall_clock_ns = wall_clock_ns();
            HostMessage::AfterResume { id, wall_clock_ns, entropy, host_name }
        })?;
        match answer {
            GuestMessage::Resumed { clock_step_ns, .. } => Ok(Resume { clock_step_ns }),
            other => Err(self.unexpected(OPERATION, &other)),
        }
    }

    /// Tells a copy of a machine who it is from now on, with fresh random bytes and this host's wall
    /// clock; runs the package's hooks.
    ///
    /// # Errors
    /// When a part failed (the others were tried), or the agent did not answer or is too old: the copy
    /// still believes that it is the other machine.
    pub fn become_another(
        &self,
        identity: &NewIdentity,
        limit: Duration,
    ) -> Result<Resume, GuestError> {
        const OPERATION: &str = "become";
        let entropy = self.entropy(OPERATION)?;
        let identity = identity.clone();
        let answer = self.call(OPERATION, limit, |id| HostMessage::Become {
            id,
            wall_clock_ns: wall_clock_ns(),
            entropy,
            identity,
        })?;
        match answer {
            GuestMessage::Resumed { clock_step_ns, .. } => Ok(Resume { clock_step_ns }),
            other => Err(self.unexpected(OPERATION, &other)),
        }
    }

    /// Fresh random bytes.
    fn entropy(&self, operation: &'static str) -> Result<Vec<u8>, GuestError> {
        let mut entropy = vec![0; ENTROPY];
        random(&mut entropy).map_err(|source| GuestError::Host {
            machine: self.machine.clone(),
            operation,
            source,
        })?;
        Ok(entropy)
    }

    /// Runs a probe of the package once: whether it is well, and what it saw.
    ///
    /// # Errors
    /// When the agent does not answer within `limit`.
    pub fn probe(&self, kind: ProbeKind, limit: Duration) -> Result<(bool, String), GuestError> {
        self.probe_once(kind, limit).map(|(ok, detail, _)| (ok, detail))
    }

    fn probe_once(
        &self,
        kind: ProbeKind,
        limit: Duration,
    ) -> Result<(bool, String, Duration), GuestError> {
        match self.call("probe", limit, |id| HostMessage::Probe { id, kind })? {
            GuestMessage::Probed { ok, detail, interval_ms, .. } => {
                Ok((ok, detail, Duration::from_millis(interval_ms)))
            }
            other => Err(self.unexpected("probe", &other)),
        }
    }

    /// Waits until the package's readiness probe succeeds, over restarts of agent and entry point.
    ///
    /// # Errors
    /// [`GuestError::NotReady`] with the probe's last words, or the last failure to ask.
    pub fn wait_ready(&self, limit: Duration) -> Result<(), GuestError> {
        let deadline = Instant::now() + limit;
        let mut detail = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let pause = match self.probe_once(ProbeKind::Readiness, left) {
                Ok((true, ..)) => return Ok(()),
                Ok((false, said, interval)) => {
                    detail = said;
                    interval
                }
                Err(error @ GuestError::Lost { .. }) if left > Duration::ZERO => {
                    detail = error.to_string();
                    PROBE_PAUSE.0
                }
                // The probe itself was never answered: say that rather than "not ready".
                Err(error) if detail.is_empty() => return Err(error),
                Err(error) => {
                    detail = format!("{detail}; then {error}");
                    PROBE_PAUSE.0
                }
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let machine = self.machine.clone();
                return Err(GuestError::NotReady { machine, limit, detail });
            }
            std::thread::sleep(pause.clamp(PROBE_PAUSE.0, PROBE_PAUSE.1).min(left));
        }
    }

    /// Runs a command in the guest and hands on its output as it comes. The command's own timeout
    /// bounds the wait (and kills it in the guest), with some seconds for the way. A caller that is
    /// slow in `on_output` slows the whole channel.
    ///
    /// # Errors
    /// When it could not start, or the channel broke (then the guest kills it).
    pub fn exec(
        &self,
        request: &ExecRequest,
        mut on_output: impl FnMut(Output),
    ) -> Result<ExitStatus, GuestError> {
        let limit = request.timeout.saturating_add(EXEC_GRACE);
        let exec = request.clone();
        let answer = self.ask(EXEC, limit, |id| HostMessage::Exec { id, exec }, &mut on_output)?;
        match answer {
            GuestMessage::Exited { status, .. } => Ok(status),
            other => Err(self.unexpected(EXEC, &other)),
        }
    }

    /// Begins an orderly power-off; the machine's end shows at its monitor.
    ///
    /// # Errors
    /// When the agent does not answer within `limit` or could not begin.
    pub fn shut_down(&self, limit: Duration) -> Result<(), GuestError> {
        self.done("shutdown", limit, |id| HostMessage::Shutdown { id })
    }
}

const EXEC: &str = "exec";

fn wall_clock_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Why there is no final answer.
enum End {
    Deadline,
    Lost(String),
}

fn final_answer(
    answers: &Receiver<Answer>,
    deadline: Instant,
    on_output: &mut dyn FnMut(Output),
) -> Result<GuestMessage, End> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match answers.recv_timeout(left) {
            Ok(Answer::Message(GuestMessage::Output { stream, data, .. })) => {
                on_output(Output { stream, data });
            }
            Ok(Answer::Message(message)) => return Ok(message),
            Ok(Answer::Lost(why)) => return Err(End::Lost(why)),
            Err(RecvTimeoutError::Timeout) => return Err(End::Deadline),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(End::Lost("the connection broke".to_owned()));
            }
        }
        if Instant::now() >= deadline {
            // A flood of output must not hold the caller beyond its deadline.
            return Err(End::Deadline);
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
