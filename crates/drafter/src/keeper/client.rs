//! A runner's connection to the keeper of its host, made anew for as long as it is needed.

use super::{
    Settings, log_file, socket,
    wire::{FromKeeper, ToKeeper, hear, say},
};
use crate::{
    lease::{BeatName, BeatRef, BootTime, Epoch, HostName, MachineName},
    tenure::View,
};
use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{getsockopt, sockopt::PeerCredentials},
    },
    unistd::Pid,
};
use std::{
    fs::File,
    io::{self, BufReader, Write as _},
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A keeper that says nothing for so long stands still; it says something every second.
const SILENCE: Duration = Duration::from_secs(5);
/// Pauses between two tries to reach it.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Between two starts of one.
const START_AGAIN: Duration = Duration::from_secs(1);
/// How long it may take until one is there, before that is told.
const APPEARS: Duration = Duration::from_secs(3);
/// How long one that a runner starts stays when nobody needs it any more.
const LINGER: Duration = Duration::from_secs(5);

/// Whose keeper, and for which machine.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The host's state directory.
    pub(crate) state: PathBuf,
    /// This host.
    pub(crate) host: HostName,
    /// Where leases are kept.
    pub(crate) leases: String,
    /// The machine that the runner looks after.
    pub(crate) machine: MachineName,
    /// T.
    pub(crate) term: Duration,
    /// Between two renewals, if this is who starts the keeper.
    pub(crate) renewal: Duration,
}

/// What came of the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// There is a new one.
    Welcome {
        /// How often the host's life is renewed.
        renewal: Duration,
        /// Up to which epoch the machine's lease may have been given up.
        given_up: Option<Epoch>,
    },
    /// How the host's life is.
    View {
        /// For [`Client::took`].
        number: u64,
        /// Until when it holds.
        view: Option<View>,
        /// Of its newest renewal.
        serial: u64,
        /// When the store was known to have that.
        told: BootTime,
        /// What keeps it from being renewed.
        trouble: Option<String>,
    },
    /// There is none; for people.
    Trouble(String),
}

#[derive(Default)]
struct Line {
    stream: Option<UnixStream>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    line: Mutex<Line>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module. Dropping it ends the connection without a word: what the runner held is given up when
/// all that was said of it is over.
pub(crate) struct Client(Arc<Shared>);

impl Drop for Client {
    fn drop(&mut self) {
        let mut line = self.0.lock();
        line.ended = true;
        if let Some(stream) = line.stream.take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        drop(line);
        self.0.changed.notify_all();
    }
}

impl Client {
    /// Connects, on a thread of its own, which tells what is said until it is told `false`.
    ///
    /// # Errors
    /// If this host gives no thread.
    pub(crate) fn begin(
        place: Place,
        said: impl Fn(Said) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let other = Arc::clone(&shared);
        std::thread::Builder::new().name("keeper".into()).spawn(move || {
            Connecting { place, shared: other, started: None, missing: None }.go_on(&said);
        })?;
        Ok(Self(shared))
    }

    /// The holder and the guard of the machine know what was said under this number.
    pub(crate) fn took(&self, number: u64) {
        self.tell(&ToKeeper::Took { number });
    }

    /// Nothing here means the host's life any more.
    pub(crate) fn goodbye(self) {
        // It is not connected anew.
        self.0.lock().ended = true;
        self.tell(&ToKeeper::Goodbye);
    }

    fn tell(&self, what: &ToKeeper) {
        let line = self.0.lock();
        if let Some(stream) = &line.stream {
            // One that is gone is noticed by whoever reads.
            let _ = say(stream, what);
        }
    }
}

struct Connecting {
    place: Place,
    shared: Arc<Shared>,
    started: Option<Instant>,
    /// Since when there is none.
    missing: Option<Instant>,
}

impl Connecting {
    fn go_on(&mut self, said: &dyn Fn(Said) -> bool) {
        let mut pause = PAUSES.0;
        loop {
            let trouble = match self.converse(said, &mut pause) {
                Ok(true) => None,
                Ok(false) => return,
                Err(error) => Some(format!("this host's keeper of its sign of life: {error}")),
            };
            if trouble.is_some_and(|trouble| !said(Said::Trouble(trouble))) {
                return;
            }
            let line = self.shared.lock();
            let waited = self.shared.changed.wait_timeout_while(line, pause, |line| !line.ended);
            if waited.unwrap_or_else(PoisonError::into_inner).0.ended {
                return;
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// One connection until its end; false if nobody wants another.
    fn converse(&mut self, said: &dyn Fn(Said) -> bool, pause: &mut Duration) -> io::Result<bool> {
        let stream = match UnixStream::connect(socket(&self.place.state)) {
            Ok(stream) => stream,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                self.start()?;
                let since = *self.missing.get_or_insert_with(Instant::now);
                if since.elapsed() > APPEARS {
                    let log = log_file(&self.place.state);
                    let why = format!("it does not come up ({error}): see {}", log.display());
                    return Err(io::Error::other(why));
                }
                return Ok(true);
            }
            Err(error) => return Err(error),
        };
        self.missing = None;
        let Place { host, leases, machine, term, .. } = &self.place;
        say(
            &stream,
            &ToKeeper::Hello {
                host: host.to_string(),
                leases: leases.clone(),
                machine: machine.to_string(),
                term_ms: term.as_millis() as u64,
            },
        )?;
        stream.set_read_timeout(Some(SILENCE))?;
        let mut reader = BufReader::new(stream.try_clone()?);
        match self.hear(&mut reader)? {
            None => return Ok(true),
            Some(FromKeeper::Welcome { renewal_us, given_up }) => {
                let renewal = Duration::from_micros(renewal_us);
                if !said(Said::Welcome { renewal, given_up: given_up.map(Epoch) }) {
                    return Ok(false);
                }
            }
            Some(FromKeeper::Refused { again: true, .. }) => {
                *pause = PAUSES.0;
                return Ok(true);
            }
            Some(FromKeeper::Refused { why, .. }) => return Err(io::Error::other(why)),
            Some(FromKeeper::View { .. }) => return Err(foreign()),
        }
        {
            let mut line = self.shared.lock();
            if line.ended {
                return Ok(false);
            }
            line.stream = Some(stream);
        }
        *pause = PAUSES.0;
        let name = BeatName::of_host(self.place.host.clone());
        let result = loop {
            let (number, life, trouble) = match self.hear(&mut reader) {
                Ok(Some(FromKeeper::View { number, life, trouble })) => (number, life, trouble),
                Ok(Some(_)) => break Err(foreign()),
                Ok(None) => break Ok(true),
                Err(error) => break Err(error),
            };
            let time = |ns| BootTime(Duration::from_nanos(ns));
            let (serial, told) = life.as_ref().map_or((0, 0), |life| (life.serial, life.told_ns));
            let view = life.map(|life| View {
                of: BeatRef { name: name.clone(), incarnation: life.incarnation },
                until: time(life.until_ns),
            });
            if !said(Said::View { number, view, serial, told: time(told), trouble }) {
                break Ok(false);
            }
        };
        self.shared.lock().stream = None;
        result
    }

    /// The next word of one that lives; one that stands still is ended, so that there is another.
    fn hear(&self, reader: &mut BufReader<UnixStream>) -> io::Result<Option<FromKeeper>> {
        let heard = hear(reader);
        let silent = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
        };
        if heard.as_ref().err().is_some_and(silent) {
            let peer = getsockopt(reader.get_ref(), PeerCredentials)?.pid();
            if self.shared.lock().ended || peer <= 1 || peer.unsigned_abs() == std::process::id() {
                return Ok(None);
            }
            tracing::error!(
                peer,
                "the keeper of this host's sign of life stands still: it is ended"
            );
            let _ = kill(Pid::from_raw(peer), Signal::SIGKILL);
            return Ok(None);
        }
        heard
    }

    /// Starts one, unless that was done just now. Of several that are started one stays.
    fn start(&mut self) -> io::Result<()> {
        if self.started.is_some_and(|at| at.elapsed() < START_AGAIN) {
            return Ok(());
        }
        self.started = Some(Instant::now());
        let Place { state, host, leases, term, renewal, .. } = &self.place;
        let settings = Settings {
            state: state.clone(),
            host: host.to_string(),
            leases: leases.clone(),
            term_ms: term.as_millis() as u64,
            renewal_ms: renewal.as_millis() as u64,
            linger_ms: Some(LINGER.as_millis() as u64),
        };
        let log = File::options().create(true).append(true).open(log_file(state))?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["keeper", "--settings", "-"])
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Out of reach of what ends this runner and all that it started.
            .process_group(0);
        let mut child = command.spawn()?;
        let given = child
            .stdin
            .take()
            .map_or(Ok(()), |mut stdin| stdin.write_all(&serde_json::to_vec(&settings)?));
        // Nobody but its parent can take its exit status.
        std::thread::Builder::new().name("keeper-end".into()).spawn(move || child.wait())?;
        given
    }
}

fn foreign() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it says what no keeper says")
}
