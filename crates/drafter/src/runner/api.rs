//! The runner's API: one JSON object a line over a unix socket. A request gets any number of
//! [`Reply::Progress`] and [`Reply::Output`] lines and then one [`Reply::Done`] or
//! [`Reply::Failed`]; then the connection may carry the next request.

use crate::migrate::{messages::Mode, planner::Budgets, timings::MoveReport};
use serde::{Deserialize, Serialize};
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
    /// Stores a generation of the running machine, or does so from now on; answers with a
    /// [`BackupReport`] when it is durable.
    Backup(BackupRequest),
    /// Ends a continuous backup; what was stored stays.
    EndBackup,
    /// Ends the machine: orderly if it answers in time, else at once.
    Stop {
        /// How long the guest may take, seconds; 0 means at once.
        grace_s: u64,
    },
    /// Drops what is kept of an earlier stay.
    DropStay,
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
    /// Generations that it has stored.
    pub generations: u64,
    /// The newest of them.
    pub newest: Option<u64>,
    /// How old that is, seconds.
    pub age_s: Option<f64>,
    /// How long the machine stood still for it, milliseconds.
    pub pause_ms: Option<f64>,
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
    /// One word: standby, booting, running, saving, moving, receiving, paused, stopped, failed.
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
