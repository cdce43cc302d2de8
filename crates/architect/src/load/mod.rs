//! The client that must notice nothing: one TCP connection to a Redis server inside a machine,
//! busy from before the first move until after the last.
//!
//! Used by `architect demo`, the end-to-end tests and the benchmarks. It proves four things about
//! the connection and the data behind it: it never broke (`reconnects`), no acknowledged write was
//! lost or applied twice (`model`), how long the longest silence was ([`Timeline`]), and what the
//! client's kernel had to send again ([`TcpReport`]).
//!
//! Beside it stand flows of other kinds: [`Questions`] by UDP, a [`Stream`] of bulk, and [`Increments`],
//! which tell what a machine remembers that lost its host.
//!
//! What must hold: every wait has a deadline; a broken connection is counted, re-made and every key
//! is read again; at the end every key is read once more. A load whose last reading did not finish
//! says so (`verified: false`) instead of reporting zeros.

mod client;
mod datagrams;
mod increments;
mod model;
mod resp;
mod stream;
mod sys;
mod timeline;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

pub use datagrams::{Answered, Questions};
pub use increments::{Increment, Increments, PATIENCE};
pub use stream::{Sent, Stream};
pub use timeline::{Silence, Timeline};

/// Called on the client's own thread before it connects, to enter a network namespace.
pub type Enter = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// How the load behaves.
pub struct LoadConfig {
    /// Number of keys, at least 3 (there are three kinds). Each is read again at the end.
    pub keys: usize,
    /// Commands in flight at a time, at most one per key. 1 waits for each answer.
    pub pipeline: usize,
    /// Size of the `SET` values in bytes, 64 to 65536.
    pub value_bytes: usize,
    /// Pause after each answer; zero keeps the connection as busy as it gets. A silence includes it.
    pub think: Duration,
    /// Names of keys begin with this. They are deleted at the start.
    pub prefix: String,
    /// Seed of the choice of operations.
    pub seed: u64,
    /// How long the first connection may take, retries included.
    pub connect_within: Duration,
    /// An answer that takes longer counts as a broken connection.
    pub answer_within: Duration,
    /// How long to try again after a broken connection.
    pub reconnect_within: Duration,
    /// How long the last reading of every key may take.
    pub verify_within: Duration,
    /// See [`Enter`].
    pub enter: Option<Enter>,
}

impl Default for LoadConfig {
    fn default() -> Self {
        LoadConfig {
            keys: 300,
            pipeline: 1,
            value_bytes: 200,
            think: Duration::ZERO,
            prefix: "load:".into(),
            seed: 1,
            connect_within: Duration::from_secs(10),
            answer_within: Duration::from_secs(20),
            reconnect_within: Duration::from_secs(20),
            verify_within: Duration::from_secs(30),
            enter: None,
        }
    }
}

/// Why there is no load.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The configuration contradicts itself.
    #[error("load: {0}")]
    Config(String),
    /// The hook failed, or there is no thread to be had.
    #[error("load: {operation}: {source}")]
    Host {
        /// What was attempted.
        operation: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Nobody answered.
    #[error(
        "load: no Redis at {address} within {within:?} ({detail}); is the machine up, and the way \
         to it?"
    )]
    Unreachable {
        /// Where it was sought.
        address: SocketAddr,
        /// How long.
        within: Duration,
        /// The last thing that happened.
        detail: String,
    },
    /// The client's thread panicked: a defect here.
    #[error("load: the client's thread panicked; its report is lost")]
    Panicked,
}

/// What the kernel on the client's side had to do for its connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TcpReport {
    /// Segments that the client sent again.
    pub retransmits: u64,
    /// Bytes that the client sent again; `None` before Linux 4.19.
    pub bytes_retransmitted: Option<u64>,
    /// How often the client's retransmission timer fired; `None` before Linux 6.7.
    pub rto: Option<u64>,
    /// Unanswered retransmissions at the moment of asking (at the end, or when a connection broke).
    pub retransmits_unanswered: u64,
    /// Smoothed round-trip time at the end, in microseconds.
    pub rtt_us: u64,
}

impl TcpReport {
    /// Of one connection.
    fn of(info: &sys::TcpInfo) -> Self {
        Self {
            retransmits: info.total_retransmits.into(),
            bytes_retransmitted: info.bytes_retransmitted,
            rto: info.total_rto.map(u64::from),
            retransmits_unanswered: info.retransmits_now.into(),
            rtt_us: info.rtt_us.into(),
        }
    }
}

/// What the client saw.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LoadReport {
    /// Answers completed, the last reading included.
    pub operations: u64,
    /// Of these, writes that the server acknowledged.
    pub writes: u64,
    /// Of these, reads that were compared with what must be there.
    pub reads: u64,
    /// Refused commands and broken connections.
    pub errors: u64,
    /// Connections made after the first; 0 if the client noticed nothing.
    pub reconnects: u64,
    /// Acknowledged writes that were not there later.
    pub lost_writes: u64,
    /// Writes that were applied more often than they were sent.
    pub doubled_writes: u64,
    /// Keys that held what nobody wrote.
    pub wrong_answers: u64,
    /// Whether every key was read at the end.
    pub verified: bool,
    /// Time from the first connection to the end.
    pub seconds: f64,
    /// `operations` per second.
    pub operations_per_second: f64,
    /// Latency of an operation, in microseconds.
    pub latency_p50_us: u64,
    /// See above.
    pub latency_p99_us: u64,
    /// See above.
    pub latency_max_us: u64,
    /// The longest silence of all.
    pub longest_gap_ms: f64,
    /// See [`TcpReport`].
    pub tcp: TcpReport,
    /// The first problems, as sentences.
    pub problems: Vec<String>,
}

impl LoadReport {
    /// Whether the client noticed anything but time.
    pub fn is_clean(&self) -> bool {
        self.verified
            && self.operations > 0
            && self.errors + self.reconnects == 0
            && self.lost_writes + self.doubled_writes + self.wrong_answers == 0
    }
}

/// Counts of a running load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Answers completed.
    pub operations: u64,
    /// Refused commands and broken connections.
    pub errors: u64,
    /// Connections made after the first.
    pub reconnects: u64,
}

#[derive(Default)]
struct Shared {
    wish: AtomicU8,
    operations: AtomicU64,
    errors: AtomicU64,
    reconnects: AtomicU64,
}

const GO_ON: u8 = 0;
const FINISH: u8 = 1;
const ABANDON: u8 = 2;

/// A Redis client under load; see the module.
pub struct Load;

impl Load {
    /// Connects to `address` and keeps the connection busy on a thread of its own. Returns when
    /// the first connection stands and its keys are cleared.
    pub fn start(address: SocketAddr, config: LoadConfig) -> Result<LoadHandle, LoadError> {
        check(&config)?;
        let shared = Arc::new(Shared::default());
        let timeline = Timeline::new(Instant::now());
        let (ready, readiness) = mpsc::sync_channel(1);
        // The thread's own deadlines are shorter; this one is for a hook that hangs.
        let limit = config.connect_within + config.answer_within + Duration::from_secs(5);
        let client = client::Client::new(address, config, shared.clone(), timeline.clone());
        let thread = std::thread::Builder::new()
            .name("load".into())
            .spawn(move || client.run(&ready))
            .map_err(|source| LoadError::Host { operation: "starting its thread", source })?;
        let handle = LoadHandle { shared, timeline, thread: Some(thread) };
        match readiness.recv_timeout(limit) {
            Ok(Ok(())) => Ok(handle),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(LoadError::Unreachable {
                address,
                within: limit,
                detail: "the client's thread did not get as far as connecting".into(),
            }),
        }
    }
}

fn check(config: &LoadConfig) -> Result<(), LoadError> {
    let problem = if !(3..=1_000_000).contains(&config.keys) {
        format!("{} keys, must be 3 to 1000000", config.keys)
    } else if !(1..=config.keys).contains(&config.pipeline) {
        format!("pipeline of {}, must be 1 to the number of keys", config.pipeline)
    } else if !(64..=65536).contains(&config.value_bytes) {
        format!("values of {} bytes, must be 64 to 65536", config.value_bytes)
    } else {
        return Ok(());
    };
    Err(LoadError::Config(problem))
}

/// A running load. Dropping it abandons the load without its last reading.
pub struct LoadHandle {
    shared: Arc<Shared>,
    timeline: Timeline,
    thread: Option<JoinHandle<LoadReport>>,
}

impl LoadHandle {
    /// Counts so far.
    pub fn progress(&self) -> Progress {
        Progress {
            operations: self.shared.operations.load(Ordering::Relaxed),
            errors: self.shared.errors.load(Ordering::Relaxed),
            reconnects: self.shared.reconnects.load(Ordering::Relaxed),
        }
    }

    /// Waits until `more` further operations were answered; false if that took longer than `limit`.
    pub fn wait_for(&self, more: u64, limit: Duration) -> bool {
        let goal = self.progress().operations + more;
        let deadline = Instant::now() + limit;
        while self.progress().operations < goal {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// The record of silences; it outlives the load.
    pub fn timeline(&self) -> Timeline {
        self.timeline.clone()
    }

    /// The client gap of a move that lasted from `from` to `to`: the longest time between two
    /// consecutive completed answers that overlaps it.
    pub fn gap_between(&self, from: Instant, to: Instant) -> Duration {
        self.timeline.longest_between(from, to)
    }

    /// Stops, reads every key again, and reports.
    pub fn finish(mut self) -> Result<LoadReport, LoadError> {
        self.shared.wish.store(FINISH, Ordering::Relaxed);
        let thread = self.thread.take().expect("taken only here and on drop");
        thread.join().map_err(|_| LoadError::Panicked)
    }
}

impl Drop for LoadHandle {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.shared.wish.store(ABANDON, Ordering::Relaxed);
            // The client looks at the wish every 50 ms; a panic in it has been reported already.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_that_contradicts_itself_is_refused_with_its_reason() {
        let address = "127.0.0.1:1".parse().unwrap();
        let config = LoadConfig { keys: 9, pipeline: 10, ..LoadConfig::default() };
        let error = Load::start(address, config).err().unwrap().to_string();
        assert!(error.contains("pipeline of 10"), "{error}");
    }

    #[test]
    fn a_report_that_was_not_verified_is_not_clean() {
        let report = LoadReport { operations: 1, verified: true, ..LoadReport::default() };
        assert!(report.is_clean());
        assert!(!LoadReport { verified: false, ..report.clone() }.is_clean());
        assert!(!LoadReport { doubled_writes: 1, ..report.clone() }.is_clean());
        assert!(!LoadReport { operations: 0, ..report }.is_clean());
    }
}
