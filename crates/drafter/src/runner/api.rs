//! The runner's API: one JSON object a line over a unix socket. A request gets any number of
//! [`Reply::Progress`] and [`Reply::Output`] lines and then one [`Reply::Done`] or
//! [`Reply::Failed`]; then the connection may carry the next request.

pub use super::held::{CompareRequest, HeldReport};
use crate::migrate::{
    messages::{Mode, StoredAs},
    planner::Budgets,
    timings::MoveReport,
};
use serde::{Deserialize, Serialize};
use silo::store::Stored;
use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// Longest request or reply line, bytes.
pub const MAX_LINE: u64 = 4 << 20;

/// What a command asks a runner.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Where the machine is and how it does.
    Status,
    /// Everything that the runner knows about the machine.
    Inspect,
    /// Runs a command in the guest.
    Exec {
        /// Program and arguments.
        argv: Vec<String>,
        /// Added to the guest's environment.
        env: BTreeMap<String, String>,
        /// Killed after this many seconds.
        timeout_s: u64,
    },
    /// Waits until the machine runs and its readiness probe succeeds.
    WaitReady {
        /// At most this many seconds.
        timeout_s: u64,
    },
    /// Asks another host's reception for a runner that takes this machine; answers with its address.
    AskHost {
        /// Where it listens.
        to: std::net::SocketAddr,
        /// The name in its certificate.
        peer: String,
    },
    /// Starts a move; answers with the job's number at once.
    Migrate(MigrateRequest),
    /// Follows a job until it ends: progress lines, then its result.
    Follow {
        /// Which job.
        job: u64,
    },
    /// Cancels a job; it goes on if its token has left.
    Cancel {
        /// Which job.
        job: u64,
    },
    /// Saves memory, device state and disks to a directory and ends the machine here.
    Suspend {
        /// An empty or absent directory on the runner's host.
        directory: PathBuf,
    },
    /// Stores the machine as a generation and ends it here; answers with a [`SuspendReport`] when that is
    /// durable. [`BackupRequest::every_ms`] and [`BackupRequest::keep`] say nothing.
    SuspendToStore(BackupRequest),
    /// Stores a generation of the running machine, or does so from now on; answers with a
    /// [`BackupReport`] when it is durable.
    Backup(BackupRequest),
    /// Ends a continuous backup; what was stored stays.
    EndBackup,
    /// Protects the running machine: a continuous backup, and a lease that ends; answers with the
    /// [`BackupReport`] of the first generation.
    Protect(ProtectRequest),
    /// Ends that: the lease has no end any more, and nothing is stored.
    EndProtect,
    /// Ends the machine: orderly if it answers in time, else at once.
    Stop {
        /// How long the guest may take, seconds; 0 means at once.
        grace_s: u64,
    },
    /// Takes an image of the running machine, to begin copies from on this host; answers with a
    /// [`ForkReport`]. The image is kept until this connection asks for something else or ends.
    Fork,
    /// Drops what is kept of an earlier stay.
    DropStay,
    /// Measures what a move would take; answers with a [`LoadReport`].
    Load {
        /// How long the guest's writes are watched, milliseconds, at most 10,000.
        sample_ms: u64,
        /// Histories, to be told what each has of the machine already, in this order.
        #[serde(default)]
        compare: Vec<CompareRequest>,
    },
}

/// An image of a machine, on its host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForkReport {
    /// The machine.
    pub machine: String,
    /// The folder with what it was.
    pub folder: PathBuf,
    /// Its memory, by a descriptor of the runner.
    pub memory: PathBuf,
    /// Its package.
    pub package: PathBuf,
    /// Its network, if it has one.
    pub network: Option<conduit::MachineNet>,
    /// What this host offers, as of now.
    pub facts: crate::driver::HostFacts,
    /// What its runner was started with.
    pub config: super::config::RunnerConfig,
    /// How long it stood still, milliseconds.
    pub pause_ms: f64,
    /// From the request until the image was complete, milliseconds.
    pub total_ms: f64,
    /// Memory that all copies share, bytes.
    pub memory_bytes: u64,
    /// What all copies share of the disks beyond the package, bytes.
    pub disk_bytes: u64,
}

/// What it would take to move a machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadReport {
    /// The machine.
    pub machine: String,
    /// Memory that it has touched, bytes.
    pub memory_bytes: u64,
    /// Blocks of its disks that its package has not, bytes.
    pub disk_bytes: u64,
    /// What has not arrived here yet, bytes.
    pub missing_bytes: u64,
    /// Memory that it wrote during the sample, bytes, each page once; unknown where writes are not
    /// tracked.
    pub written_bytes: Option<u64>,
    /// The length of the sample, milliseconds.
    pub sample_ms: u64,
    /// How old the newest generation of its continuous backup is, seconds.
    pub generation_age_s: Option<f64>,
    /// It is protected, so that it is not suspended.
    #[serde(default)]
    pub protected: bool,
    /// What the histories have of it that were asked about.
    #[serde(default)]
    pub held: Vec<HeldReport>,
}

/// Parameters of a move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrateRequest {
    /// Where the destination's runner listens.
    pub to: std::net::SocketAddr,
    /// The name in the destination's certificate.
    pub peer: String,
    /// How.
    pub mode: Mode,
    /// Limits.
    pub budgets: Budgets,
    /// Prepare only, and say what would happen.
    pub dry_run: bool,
    /// A history of which the destination may bring what it has from its own store.
    #[serde(default)]
    pub stored_as: Option<StoredAs>,
}

/// Text that is not shown: keys and credentials on their way from a command to its runner.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(secret)")
    }
}

/// Parameters of a backup.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackupRequest {
    /// The store's address, as silo takes it.
    pub store: String,
    /// The history in it, `tenant/line`.
    pub line: String,
    /// The tenant's keys, as the text of a key file.
    pub keys: Secret,
    /// Where the keys were read, for messages.
    pub keys_from: String,
    /// The variables with the store's credentials.
    pub environment: Vec<(String, Secret)>,
    /// A generation at least this often from now on, milliseconds; else one generation.
    pub every_ms: Option<u64>,
    /// What to call the generation.
    pub label: String,
    /// Of a continuous backup: what of the history stays; else all of it does.
    #[serde(default)]
    pub keep: Option<KeepPolicy>,
}

/// A machine that was suspended to a store.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SuspendReport {
    /// The machine.
    pub machine: String,
    /// The store.
    pub store: String,
    /// The history.
    pub line: String,
    /// The generation.
    pub number: u64,
    /// From the request until it was durable, milliseconds.
    pub total_ms: f64,
    /// From the pause until then, milliseconds.
    pub paused_ms: f64,
    /// Blocks that were looked at.
    pub blocks: u64,
    /// Of these, blocks of zeros.
    pub zeros: u64,
    /// Of these, blocks whose content was in the history already.
    pub known: u64,
    /// Content that was not, bytes.
    pub new_bytes: u64,
    /// Bytes that it took in the store.
    pub stored_bytes: u64,
    /// Requests to the store.
    pub requests: u64,
}

impl SuspendReport {
    /// What the store got.
    pub(super) fn tell(&mut self, stored: &Stored) {
        (self.number, self.blocks, self.zeros) = (stored.number, stored.blocks, stored.zeros);
        (self.known, self.new_bytes) = (stored.known, stored.content);
        (self.stored_bytes, self.requests) = (stored.bytes(), stored.requests.total());
    }
}

/// What stays of a history that grows all the time. A generation stays if any rule keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepPolicy {
    /// The newest so many.
    pub last: usize,
    /// All that are younger than this, seconds.
    pub within_s: u64,
    /// One of each of the newest so many hours in which there is one.
    pub hourly: usize,
    /// Of days.
    pub daily: usize,
    /// Content that nothing refers to goes when it is this old, seconds; `None`: whoever runs
    /// `silo collect` deletes it.
    pub collect_after_s: Option<u64>,
}

/// Parameters of protection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProtectRequest {
    /// The continuous backup; [`BackupRequest::every_ms`] is given.
    pub backup: BackupRequest,
    /// T: how long a lease that is not renewed holds, milliseconds.
    pub term_ms: u64,
    /// What the guest sends waits until the generation that it is of is durable.
    pub output_commit: bool,
    /// Its lease refers to the one sign of life that all machines of the host share; if absent, where the
    /// lease store bills requests.
    #[serde(default)]
    pub host_beat: Option<bool>,
}

/// How protection does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProtectionState {
    /// One word: starting, protected, frozen.
    pub word: String,
    /// What is to be known besides, for people.
    pub detail: String,
    /// T, milliseconds.
    pub term_ms: u64,
    /// How long the lease holds if it is not renewed, milliseconds.
    pub left_ms: u64,
    /// How often the machine was frozen at the end of its lease, and went on.
    pub freezes: u64,
    /// What the guest sends waits for its generation.
    pub output_commit: bool,
    /// The sign of life that its lease refers to: HOST, or HOST/MACHINE for one of its own.
    #[serde(default)]
    pub beat: Option<String>,
    /// The process that guards the lease's end.
    pub guard_pid: Option<u32>,
    /// How this host came to have the machine, if it took it over.
    pub taken_over: Option<TakenOver>,
}

/// A machine that a stand-in took over.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TakenOver {
    /// From which host.
    pub from: String,
    /// The generation that runs on.
    pub generation: u64,
    /// The host's sign of life before the lease ended, to the end of the lease, milliseconds.
    pub detected_ms: f64,
    /// From there until the lease was this host's, milliseconds.
    pub taken_ms: f64,
    /// From there until the machine ran, milliseconds.
    pub restored_ms: f64,
    /// Work since the generation that is lost, at most, milliseconds; `None` if this host saw too
    /// little of it to tell.
    pub lost_ms: Option<f64>,
    /// When the generation was, by its host's `CLOCK_BOOTTIME`, nanoseconds.
    pub paused_at_ns: u64,
    /// When the machine ran here, by this host's.
    pub ran_at_ns: u64,
}

/// A generation that was stored.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct BackupReport {
    /// The machine.
    pub machine: String,
    /// The store.
    pub store: String,
    /// The history, `tenant/line`.
    pub line: String,
    /// The generation's number.
    pub number: u64,
    /// Only what was written since the generation before was looked at; else everything was compared.
    pub changes_only: bool,
    /// How long the machine stood still, all pauses together, milliseconds.
    pub pause_ms: f64,
    /// How often it did: more than once if a pause came too early.
    pub pauses: u32,
    /// How often written memory was looked for and copied aside.
    pub rounds: u32,
    /// Memory that was copied aside, bytes.
    pub copied_bytes: u64,
    /// Of it, during the pause.
    pub copied_paused_bytes: u64,
    /// Blocks of 4 KiB that were read for it.
    pub blocks: u64,
    /// Of them, zeros.
    pub zeros: u64,
    /// Of them, content that the store had.
    pub known: u64,
    /// Content that it had not, bytes before compression.
    pub new_bytes: u64,
    /// Bytes that the generation cost in the store.
    pub stored_bytes: u64,
    /// Requests to the store.
    pub requests: u64,
    /// From the freeze to the commit, milliseconds.
    pub stored_ms: f64,
    /// From the request to the commit, milliseconds.
    pub total_ms: f64,
    /// Another follows this long after, milliseconds.
    pub every_ms: Option<u64>,
}

/// How a continuous backup does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackupState {
    /// The store.
    pub store: String,
    /// The history, `tenant/line`.
    pub line: String,
    /// A generation at least this often, milliseconds.
    pub every_ms: u64,
    /// The first of them looked only at what the generation before lacked: after a move, what the
    /// source told of.
    #[serde(default)]
    pub from_changes: bool,
    /// Generations that it has stored.
    pub generations: u64,
    /// The newest of them.
    pub newest: Option<u64>,
    /// How old that is, seconds.
    pub age_s: Option<f64>,
    /// How long the machine stood still for it, milliseconds.
    pub pause_ms: Option<f64>,
    /// From that pause until it was durable, milliseconds.
    #[serde(default)]
    pub durable_ms: Option<f64>,
    /// How long it stood still for each so far: median and longest, milliseconds.
    #[serde(default)]
    pub pauses_ms: Option<(f64, f64)>,
    /// Generations that were deleted because no rule keeps them.
    #[serde(default)]
    pub pruned: u64,
    /// Rounds that failed.
    pub failures: u64,
    /// What went wrong last, until something goes well again.
    pub error: Option<String>,
    /// It stores nothing more: another writer has taken the history.
    pub ended: bool,
}

/// What a runner answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// How far a job is.
    Progress(Progress),
    /// Output of a command in the guest.
    Output {
        /// `stdout` or `stderr`.
        stream: OutputStream,
        /// As text; bytes that are not UTF-8 are replaced.
        text: String,
    },
    /// The request succeeded.
    Done {
        /// The result.
        value: serde_json::Value,
    },
    /// The request failed.
    Failed {
        /// What happened, where the machine is now, and what to do.
        message: String,
    },
}

/// Which of a command's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Phases of a move, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Connecting, and building the destination.
    Prepare,
    /// Rounds.
    PreCopy,
    /// Paused, token on its way.
    Switchover,
    /// The machine runs at the destination; blocks follow.
    PostCopy,
    /// Over.
    Ended,
}

/// How far a move is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// The job.
    pub job: u64,
    /// The phase.
    pub phase: Phase,
    /// Round of pre-copy.
    pub round: u32,
    /// Bytes on the wire so far.
    pub sent_bytes: u64,
    /// Bytes left in this round or to fill.
    pub left_bytes: u64,
}

/// Where a machine is, in one record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The machine.
    pub machine: String,
    /// This host.
    pub host: String,
    /// Process id of the runner.
    pub runner_pid: u32,
    /// Process id of the monitor, if one runs.
    pub monitor_pid: Option<u32>,
    /// What the monitor runs without that should keep it within bounds, each with its cause.
    #[serde(default)]
    pub monitor_without: Vec<String>,
    /// One word: standby, stand-in, booting, running, saving, moving, receiving, paused, frozen, stopped,
    /// failed.
    pub state: String,
    /// Why, for people, where the word is not enough.
    pub detail: String,
    /// Who holds the lease.
    pub lease_owner: Option<String>,
    /// Its epoch.
    pub epoch: Option<u64>,
    /// Blocks that have not arrived here, per device.
    pub missing: BTreeMap<String, u64>,
    /// Bytes kept of an earlier stay.
    pub stay_bytes: u64,
    /// Where this runner takes machines from peers.
    pub listen: Option<std::net::SocketAddr>,
    /// The running or last job.
    pub job: Option<Progress>,
    /// Moves that this runner has sent.
    pub moves: Vec<MoveReport>,
    /// The continuous backup, if there is one.
    #[serde(default)]
    pub backup: Option<BackupState>,
    /// Whether it survives the loss of this host, and how that does.
    #[serde(default)]
    pub protection: Option<ProtectionState>,
}

/// What a client could not do.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No runner there.
    #[error("no runner answers at {socket}: {source}; `drafter list` shows what runs on this host")]
    NotThere {
        /// Where.
        socket: String,
        /// The cause.
        source: io::Error,
    },
    /// The runner stopped answering.
    #[error("the runner stopped answering: {0}")]
    Broken(#[from] io::Error),
    /// The runner said no.
    #[error("{0}")]
    Failed(String),
    /// Not JSON, or not ours.
    #[error("the runner answered something else: {0}")]
    Foreign(String),
}

/// A connection to a runner.
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the socket of a runner.
    pub fn connect(socket: &Path) -> Result<Self, ClientError> {
        let not_there =
            |source| ClientError::NotThere { socket: socket.display().to_string(), source };
        let stream = UnixStream::connect(socket).map_err(not_there)?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// The longest that a single reply may take; `None` waits for as long as the runner lives.
    pub fn set_deadline(&self, limit: Option<Duration>) -> Result<(), ClientError> {
        Ok(self.reader.get_ref().set_read_timeout(limit)?)
    }

    /// Asks, hands over what comes in between, and returns the result.
    pub fn call(
        &mut self,
        request: &Request,
        mut on_reply: impl FnMut(&Reply),
    ) -> Result<serde_json::Value, ClientError> {
        send_line(self.reader.get_mut(), request)?;
        loop {
            let line = read_line(&mut self.reader)?
                .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
            let reply: Reply =
                serde_json::from_str(&line).map_err(|e| ClientError::Foreign(e.to_string()))?;
            match reply {
                Reply::Done { value } => return Ok(value),
                Reply::Failed { message } => return Err(ClientError::Failed(message)),
                other => on_reply(&other),
            }
        }
    }

    /// Asks for something whose result has a type.
    pub fn get<T: serde::de::DeserializeOwned>(
        &mut self,
        request: &Request,
    ) -> Result<T, ClientError> {
        let value = self.call(request, |_| {})?;
        serde_json::from_value(value).map_err(|e| ClientError::Foreign(e.to_string()))
    }
}

/// Writes one line.
pub fn send_line(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Reads one line; `None` at a clean end.
pub fn read_line(from: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    let read = from.take(MAX_LINE).read_line(&mut line)?;
    match read {
        0 => Ok(None),
        _ if !line.ends_with('\n') => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a line that does not end within {MAX_LINE} bytes"),
        )),
        _ => Ok(Some(line)),
    }
}
