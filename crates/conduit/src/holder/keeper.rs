//! The holder as its agent or edge sees it: found or started, attached to, kept alive; and a
//! descriptor of the hold tap, so that frames which wait in it outlive the holder.

use super::{
    INTERFACE, Limits, Stats,
    process::socket_in,
    protocol::{Answer, Ask, Channel, VERSION},
};
use crate::{agent::spawn, exec, exec::KernelError, netlink::interface_index};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// From the start of a holder until it must answer.
const START_LIMIT: Duration = Duration::from_secs(5);
/// One question to it.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
/// Wait before a holder is started again: the first, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(2));
/// How often the thread looks whether it is to end.
const LOOK: Duration = Duration::from_millis(500);
/// How long a holder may take to end when asked to.
const END_LIMIT: Duration = Duration::from_secs(2);

/// How a holder is started.
#[derive(Clone, Debug)]
pub struct HoldSettings {
    /// The program, and what comes before our own arguments.
    pub program: (PathBuf, Vec<OsString>),
    /// What it keeps at most.
    pub limits: Limits,
}

impl HoldSettings {
    /// The running program is `conduit`.
    pub fn of_this_program(limits: Limits) -> io::Result<Self> {
        Ok(Self { program: (std::env::current_exe()?, vec!["hold".into()]), limits })
    }

    /// A `conduit` elsewhere.
    #[must_use]
    pub fn of(program: &Path, limits: Limits) -> Self {
        Self { program: (program.to_owned(), vec!["hold".into()]), limits }
    }
}

/// What is done with the ifindex of the hold tap when a holder has been attached to.
type Tell = Box<dyn Fn(u32) -> Result<(), KernelError> + Send + Sync>;

struct Shared {
    settings: HoldSettings,
    socket: PathBuf,
    pins: PathBuf,
    tell: Tell,
    kept: Mutex<Kept>,
    ends: AtomicBool,
}

#[derive(Default)]
struct Kept {
    tap: Option<OwnedFd>,
    channel: Option<Channel>,
    child: Option<Child>,
    pid: Option<u32>,
}

/// See the module. Dropped, it leaves the holder running.
pub struct Keeper {
    shared: Arc<Shared>,
}

impl Keeper {
    /// Finds the holder of the state folder `state` or starts one, and keeps one from then on. `tell`
    /// gets the ifindex of the hold tap each time. Must be called in the network namespace. If there
    /// is no holder yet when this returns, frames are not held, which is said in the log.
    pub fn start(
        settings: HoldSettings,
        state: &Path,
        pins: &Path,
        tell: impl Fn(u32) -> Result<(), KernelError> + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            settings,
            socket: socket_in(state),
            pins: pins.to_owned(),
            tell: Box::new(tell),
            kept: Mutex::default(),
            ends: AtomicBool::new(false),
        });
        if let Err(error) = shared.attach(&mut shared.kept()) {
            tracing::warn!(%error, "no holder yet: frames are not held");
        }
        let keeping = shared.clone();
        spawn("holder-keeper", move || keeping.keep());
        Self { shared }
    }

    /// What the holder did with frames; `None` if it does not answer.
    #[must_use]
    pub fn stats(&self) -> Option<Stats> {
        stats(&self.shared.socket).ok().map(|(stats, _)| stats)
    }

    /// The same by name; empty if it does not answer.
    #[must_use]
    pub fn counts(&self) -> Vec<(String, u64)> {
        let named = self.stats().map(|stats| stats.named());
        named.into_iter().flatten().map(|(name, n)| (name.to_owned(), n)).collect()
    }

    /// The holder's process, if there is one.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        let kept = self.shared.kept();
        kept.channel.is_some().then_some(kept.pid).flatten()
    }

    /// Ends the holder, whose frames are lost, and removes the hold tap.
    pub fn stop(&self) -> Result<(), KernelError> {
        let shared = &self.shared;
        shared.ends.store(true, Ordering::Release);
        let mut kept = shared.kept();
        kept.channel = None;
        kept.tap = None;
        let fail = |e: io::Error| {
            KernelError::new(format!("end the holder at {}", shared.socket.display()), e)
        };
        match Channel::connect(&shared.socket, END_LIMIT) {
            Ok(channel) => {
                channel.ask(Ask::Stop).map_err(fail)?;
                // Its end ends the connection.
                match channel.hear::<Answer>() {
                    Ok(None) => {}
                    Ok(Some(_)) => return Err(fail(io::Error::other("it goes on"))),
                    Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
                    Err(e) => return Err(fail(e)),
                }
            }
            Err(e) if not_there(&e) => {}
            Err(e) => return Err(fail(e)),
        }
        kept.reap(END_LIMIT);
        if interface_index(INTERFACE).is_ok() {
            exec::run("ip", &["link", "del", INTERFACE], "")?;
        }
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Release);
    }
}

/// Asks a holder what it did and what its limits are.
pub fn stats(socket: &Path) -> io::Result<(Stats, Limits)> {
    match Channel::connect(socket, ANSWER_LIMIT)?.ask(Ask::Stats)?.0 {
        Answer::Stats { stats, limits } => Ok((stats, limits)),
        other => Err(io::Error::other(format!("an unexpected answer: {other:?}"))),
    }
}

/// The process of the holder at `socket`.
pub(crate) fn pid_at(socket: &Path) -> io::Result<u32> {
    match Channel::connect(socket, ANSWER_LIMIT)?.ask(Ask::Attach { version: VERSION })?.0 {
        Answer::Attached { pid, .. } => Ok(pid),
        other => Err(io::Error::other(format!("an unexpected answer: {other:?}"))),
    }
}

fn not_there(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

impl Kept {
    /// Waits for a child that has ended or is about to.
    fn reap(&mut self, limit: Duration) {
        let Some(mut child) = self.child.take() else { return };
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
        // It runs on, as somebody else's holder.
        self.child = Some(child);
    }
}

impl Shared {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ends(&self) -> bool {
        self.ends.load(Ordering::Acquire)
    }

    fn keep(&self) {
        let mut backoff = BACKOFF.0;
        while !self.ends() {
            if self.is_well() {
                backoff = BACKOFF.0;
                continue;
            }
            let mut kept = self.kept();
            if self.ends() {
                return;
            }
            if kept.channel.take().is_some() {
                tracing::warn!("the holder has ended: another one is started");
                kept.reap(Duration::from_millis(200));
            }
            let attached = self.attach(&mut kept);
            drop(kept);
            if let Err(error) = attached {
                tracing::warn!(%error, again_in = ?backoff, "no holder: frames are not held");
                thread::sleep(backoff);
                backoff = (backoff * 2).min(BACKOFF.1);
            }
        }
    }

    /// Waits a while, or until the holder has ended.
    fn is_well(&self) -> bool {
        // Not under the lock: whoever stops it must not wait for us.
        let socket = {
            let kept = self.kept();
            let Some(channel) = &kept.channel else { return false };
            match channel.as_fd().try_clone_to_owned() {
                Ok(socket) => socket,
                Err(_) => return false,
            }
        };
        let mut fd = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX);
        // It says nothing that was not asked for: what comes is its end.
        matches!(poll(&mut fd, limit), Ok(0) | Err(nix::errno::Errno::EINTR))
    }

    fn attach(&self, kept: &mut Kept) -> Result<(), KernelError> {
        let operation = || format!("reach the holder at {}", self.socket.display());
        let deadline = Instant::now() + START_LIMIT;
        let (mut started, mut replaced) = (false, false);
        loop {
            let error = match Channel::connect(&self.socket, ANSWER_LIMIT) {
                Ok(channel) => match self.greet(channel, kept) {
                    Ok(build) if build == env!("CARGO_PKG_VERSION") || replaced => return Ok(()),
                    Ok(build) => {
                        tracing::info!(build, "an older holder is replaced");
                        (started, replaced) = (true, true);
                        kept.child = Some(self.start(kept, true)?);
                        continue;
                    }
                    Err(e) => e,
                },
                Err(e) if not_there(&e) && !started => {
                    started = true;
                    kept.child = Some(self.start(kept, false)?);
                    continue;
                }
                Err(e) => KernelError::new(operation(), e),
            };
            let ended = kept.child.as_mut().and_then(|c| c.try_wait().ok().flatten());
            if let Some(status) = ended {
                // It may have been because of the tap that we gave it.
                (kept.child, kept.tap) = (None, None);
                let log = self.socket.with_extension("log");
                let detail = format!("it ended with {status}; see {}", log.display());
                return Err(KernelError::new(operation(), detail));
            }
            if Instant::now() >= deadline {
                return Err(error);
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Attaches to a holder; says which build it is.
    fn greet(&self, channel: Channel, kept: &mut Kept) -> Result<String, KernelError> {
        let operation = || format!("attach to the holder at {}", self.socket.display());
        let (answer, mut rights) = channel
            .ask(Ask::Attach { version: VERSION })
            .map_err(|e| KernelError::new(operation(), e))?;
        let (Answer::Attached { index, build, pid, .. }, Some(tap)) = (answer, rights.pop()) else {
            return Err(KernelError::new(operation(), "an unexpected answer"));
        };
        (self.tell)(index)?;
        kept.tap = Some(tap);
        kept.channel = Some(channel);
        kept.pid = Some(pid);
        Ok(build)
    }

    fn start(&self, kept: &Kept, take_over: bool) -> Result<Child, KernelError> {
        let (program, first) = &self.settings.program;
        let fail = |e: io::Error| KernelError::new(format!("start {}", program.display()), e);
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.socket.with_extension("log"))
            .map_err(fail)?;
        let mut command = Command::new(program);
        command.args(first).arg("--socket").arg(&self.socket).arg("--pins").arg(&self.pins);
        command.args(super::cli::limit_args(&self.settings.limits));
        command.stdin(Stdio::null());
        if take_over {
            command.arg("--take-over");
        } else if let Some(tap) = &kept.tap {
            command.arg("--tap-on-stdin").stdin(tap.try_clone().map_err(fail)?);
        }
        // It outlives us, and what ends us at a terminal is not meant for it.
        command.process_group(0).stdout(Stdio::null()).stderr(log);
        command.spawn().map_err(fail)
    }
}
