//! The messages, and their text.

use super::{ENTROPY_BYTES, MAX_LINE};
use crate::config::MAX_HOST_NAME;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

/// What a host says to its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum HostMessage {
    /// A conversation begins; the one before, if any, is over.
    Hello {
        /// [`PROTOCOL_VERSION`](super::PROTOCOL_VERSION) of the host.
        version: u32,
        /// Random; the guest repeats it, so that the host knows where its conversation begins.
        nonce: u64,
    },
    /// Is the agent there? Answer: `done`.
    Ping {
        /// Id of the request.
        id: u64,
    },
    /// What does the entry point do? Answer: `status`.
    Status {
        /// Id of the request.
        id: u64,
    },
    /// The machine will be paused: runs the package's hook, within its limit. Answer: `done` or
    /// `failed`, and then the host does not pause.
    BeforeSuspend {
        /// Id of the request.
        id: u64,
        /// Whether the guest's file systems are synced after the hook.
        #[serde(default)]
        sync: bool,
    },
    /// The machine runs again, perhaps elsewhere, perhaps later, perhaps as one of several copies.
    /// Sets the clock, mixes in the entropy, sets the name, runs the package's hook; all are
    /// tried even if one fails. Answer: `resumed` or `failed`.
    AfterResume {
        /// Id of the request.
        id: u64,
        /// The host's wall clock, nanoseconds since 1970.
        wall_clock_ns: u64,
        /// Fresh random bytes, [`ENTROPY_BYTES`] of them, in base64.
        #[serde(with = "base64_bytes")]
        entropy: Vec<u8>,
        /// A new host name (a fork), or none to keep the present one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        host_name: Option<String>,
    },
    /// The machine is a copy of another that runs elsewhere under its own name: it becomes a machine of
    /// its own. Mixes in the entropy, sets the clock, the names and the addresses, raises the
    /// generation, runs the package's hooks; all are tried even if one fails. Nothing that the copy
    /// sends leaves its host before the answer. Answer: `resumed` or `failed`. Older agents do not know
    /// it, and a copy of theirs is given up.
    Become {
        /// Id of the request.
        id: u64,
        /// The host's wall clock, nanoseconds since 1970.
        wall_clock_ns: u64,
        /// Fresh random bytes, [`ENTROPY_BYTES`] of them, in base64.
        #[serde(with = "base64_bytes")]
        entropy: Vec<u8>,
        /// Who it is from now on.
        #[serde(flatten)]
        identity: NewIdentity,
    },
    /// Runs a probe of the package once. Answer: `probed`.
    Probe {
        /// Id of the request.
        id: u64,
        /// Which one.
        kind: ProbeKind,
    },
    /// Runs a command. Answers: `output`…, then `exited`, or `failed` if it could not start.
    Exec {
        /// Id of the request.
        id: u64,
        /// What to run.
        #[serde(flatten)]
        exec: ExecRequest,
    },
    /// Kills the command that `exec` started. Answer: `done`, also if it had ended already; the
    /// command's own final answer comes too.
    Cancel {
        /// Id of this request.
        id: u64,
        /// Id of the exec request.
        exec: u64,
    },
    /// Powers the machine off in order: SIGTERM to the entry point, SIGKILL after its stop timeout,
    /// sync, power off. Answer: `done` when that has begun.
    Shutdown {
        /// Id of the request.
        id: u64,
    },
}

/// Who a copy of a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewIdentity {
    /// Its host name.
    pub host_name: String,
    /// The machine that it is a copy of, for people.
    pub copy_of: String,
    /// Its address, in place of the one that it has; none if it has no network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// The same for IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_v6: Option<Ipv6Addr>,
    /// Random, different for every copy ever made.
    pub instance: String,
}

/// Longest [`NewIdentity::instance`] and [`NewIdentity::copy_of`], bytes.
const LONGEST_NAME: usize = 128;

impl NewIdentity {
    fn check(&self) -> Result<(), String> {
        let mut names = vec![("host_name", &self.host_name, MAX_HOST_NAME)];
        names.push(("copy_of", &self.copy_of, LONGEST_NAME));
        names.push(("instance", &self.instance, LONGEST_NAME));
        for (name, value, most) in names {
            let fits = (1..=most).contains(&value.len())
                && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
            if !fits {
                return Err(format!("{name} is 1 to {most} letters, digits, \"-\" and \".\""));
            }
        }
        Ok(())
    }
}

/// A command to run in the guest; its standard input is empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program (looked up in `PATH` if it has no slash) and arguments.
    pub argv: Vec<String>,
    /// Variables on top of the package's environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Where it starts; the root directory by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// Who it runs as, in the form of `MachineConfig::user`; root by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// After this it is killed.
    #[serde(with = "crate::config::millis", rename = "timeout_ms")]
    pub timeout: Duration,
}

impl ExecRequest {
    /// `argv` as root in the root directory.
    #[must_use]
    pub fn new(argv: Vec<String>, timeout: Duration) -> Self {
        Self { argv, env: BTreeMap::new(), working_dir: None, user: None, timeout }
    }
}

/// A probe of the package.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeKind {
    /// Is it alive?
    Liveness,
    /// Does it serve?
    Readiness,
}

impl fmt::Display for ProbeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Liveness => "liveness",
            Self::Readiness => "readiness",
        })
    }
}

/// What a guest says to its host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum GuestMessage {
    /// The agent has just started. After its hello, a host learns by this that the agent it talked
    /// to is gone and knows nothing of the conversation: it must begin anew.
    Started {},
    /// The answer to the host's hello.
    Hello {
        /// [`PROTOCOL_VERSION`](super::PROTOCOL_VERSION) of the agent.
        version: u32,
        /// The host's nonce.
        nonce: u64,
        /// The agent's own version, for people.
        agent: String,
    },
    /// Done.
    Done {
        /// Id of the request.
        id: u64,
    },
    /// Not done.
    Failed {
        /// Id of the request.
        id: u64,
        /// Why.
        #[serde(flatten)]
        failure: Failure,
    },
    /// The answer to `status`.
    Status {
        /// Id of the request.
        id: u64,
        /// The entry point.
        entry: Entry,
        /// How long the guest's kernel has run, by its own clock.
        uptime_ms: u64,
    },
    /// The answer to `after_resume` and `become`.
    Resumed {
        /// Id of the request.
        id: u64,
        /// By how much the wall clock was set forward (or back, if negative); 0 if it was right.
        clock_step_ns: i64,
    },
    /// The answer to `probe`.
    Probed {
        /// Id of the request.
        id: u64,
        /// Whether it is well.
        ok: bool,
        /// What was seen, for people.
        detail: String,
        /// How often the package wants to be asked.
        interval_ms: u64,
    },
    /// A command wrote something.
    Output {
        /// Id of the exec request.
        id: u64,
        /// Where it wrote to.
        stream: Stream,
        /// What, in base64; at most [`MAX_OUTPUT`](super::MAX_OUTPUT) bytes.
        #[serde(with = "base64_bytes")]
        data: Vec<u8>,
    },
    /// A command ended.
    Exited {
        /// Id of the exec request.
        id: u64,
        /// How.
        status: ExitStatus,
    },
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs.
    pub code: FailureCode,
    /// For people.
    pub message: String,
}

/// The kind of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The agent does not know this message.
    Unsupported,
    /// The message is known but its content cannot be used.
    Invalid,
    /// Too much at once; try again when something has ended.
    Busy,
    /// A hook of the package failed or took too long.
    Hook,
    /// A command could not start.
    Start,
    /// The guest's system refused.
    System,
    /// A code that this version does not know.
    #[serde(other)]
    Other,
}

/// Where a command writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a command or the entry point ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Killed at its timeout.
    TimedOut,
    /// Killed because the host asked for it or went away.
    Cancelled,
}

impl ExitStatus {
    /// Whether it is a success in the sense of a shell.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with status {code}"),
            Self::Signal(signal) => write!(f, "was ended by signal {signal}"),
            Self::TimedOut => f.write_str("was killed at its time limit"),
            Self::Cancelled => f.write_str("was cancelled"),
        }
    }
}

/// The machine's entry point, as its init sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Now.
    #[serde(flatten)]
    pub state: EntryState,
    /// How often it was started again.
    pub restarts: u32,
    /// How it ended the last time, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<String>,
}

/// What the entry point does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum EntryState {
    /// The package has none.
    None,
    /// It runs.
    Running {
        /// Its process in the guest.
        pid: i32,
    },
    /// It ended and will start again soon.
    Waiting,
    /// It ended for good.
    Ended,
}

/// Why a line is not a message.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// It is not JSON of the expected shape.
    #[error("not a message of the guest channel: {0}")]
    Json(#[from] serde_json::Error),
    /// A known message with a field that breaks a rule.
    #[error("a message of the guest channel breaks a rule: {0}")]
    Rule(String),
    /// It would not fit into a line.
    #[error("a message of {bytes} bytes does not fit into a line of {MAX_LINE}; send less at once")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
}

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded<M> {
    /// A message.
    Known(M),
    /// A message of a type that this version does not know.
    Unknown {
        /// Its type.
        name: String,
        /// Its id, if it has one.
        id: Option<u64>,
    },
}

const HOST_TYPES: &[&str] = &[
    "hello",
    "ping",
    "status",
    "before_suspend",
    "after_resume",
    "become",
    "probe",
    "exec",
    "cancel",
    "shutdown",
];

const GUEST_TYPES: &[&str] =
    &["started", "hello", "done", "failed", "status", "resumed", "probed", "output", "exited"];

impl HostMessage {
    /// The message as a line, with its newline.
    ///
    /// # Errors
    /// When it is too long for a line (an `exec` with very long arguments).
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        encode(self)
    }

    /// Reads a line without its newline.
    ///
    /// # Errors
    /// When it is not JSON, or a known message with missing, wrong or forbidden content.
    pub fn decode(line: &[u8]) -> Result<Decoded<Self>, ProtocolError> {
        let decoded: Decoded<Self> = decode(line, HOST_TYPES)?;
        if let Decoded::Known(Self::AfterResume { entropy, .. } | Self::Become { entropy, .. }) =
            &decoded
            && !ENTROPY_BYTES.contains(&entropy.len())
        {
            return Err(ProtocolError::Rule(format!(
                "it brings {} bytes of entropy, allowed are {ENTROPY_BYTES:?}",
                entropy.len()
            )));
        }
        if let Decoded::Known(Self::Become { identity, .. }) = &decoded {
            identity.check().map_err(ProtocolError::Rule)?;
        }
        Ok(decoded)
    }

    /// The id of a request; a hello has none.
    #[must_use]
    pub const fn id(&self) -> Option<u64> {
        match self {
            Self::Hello { .. } => None,
            Self::Ping { id }
            | Self::Status { id }
            | Self::BeforeSuspend { id, .. }
            | Self::AfterResume { id, .. }
            | Self::Become { id, .. }
            | Self::Probe { id, .. }
            | Self::Exec { id, .. }
            | Self::Cancel { id, .. }
            | Self::Shutdown { id } => Some(*id),
        }
    }
}

impl GuestMessage {
    /// The message as a line, with its newline.
    ///
    /// # Errors
    /// When it is too long for a line.
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        encode(self)
    }

    /// Reads a line without its newline.
    ///
    /// # Errors
    /// When it is not JSON, or a known message with missing or wrong content.
    pub fn decode(line: &[u8]) -> Result<Decoded<Self>, ProtocolError> {
        decode(line, GUEST_TYPES)
    }

    /// The id of the request that this answers; a start and a hello have none.
    #[must_use]
    pub const fn id(&self) -> Option<u64> {
        match self {
            Self::Started {} | Self::Hello { .. } => None,
            Self::Done { id }
            | Self::Failed { id, .. }
            | Self::Status { id, .. }
            | Self::Resumed { id, .. }
            | Self::Probed { id, .. }
            | Self::Output { id, .. }
            | Self::Exited { id, .. } => Some(*id),
        }
    }

    /// Whether no further answer to the same request follows.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        !matches!(self, Self::Started {} | Self::Hello { .. } | Self::Output { .. })
    }
}

fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, ProtocolError> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > MAX_LINE {
        return Err(ProtocolError::TooLong { bytes: line.len() });
    }
    Ok(line)
}

fn decode<M: DeserializeOwned>(line: &[u8], known: &[&str]) -> Result<Decoded<M>, ProtocolError> {
    #[derive(Deserialize)]
    struct Head {
        r#type: String,
        #[serde(default)]
        id: Option<u64>,
    }
    let head: Head = serde_json::from_slice(line)?;
    if !known.contains(&head.r#type.as_str()) {
        return Ok(Decoded::Unknown { name: head.r#type, id: head.id });
    }
    Ok(Decoded::Known(serde_json::from_slice(line)?))
}

mod base64_bytes {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use serde::{Deserialize, de::Error};

    pub(super) fn serialize<S: serde::Serializer>(data: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&STANDARD.encode(data))
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(d)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
