//! The client's thread: one connection, commands in flight, deadlines, reconnection.

use super::{
    ABANDON, FINISH, GO_ON, LoadConfig, LoadError, LoadReport, Shared, TcpReport,
    model::{Model, Operation},
    resp::Decoder,
    sys,
    timeline::Timeline,
};
use hdrhistogram::Histogram;
use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, atomic::Ordering, mpsc::SyncSender},
    time::{Duration, Instant},
};

/// How often a waiting client looks at what it is asked to do.
const TICK: Duration = Duration::from_millis(50);
/// Commands in flight while all keys are read or cleared.
const BATCH: usize = 64;
/// Pause after a refused command or a failed connection, so that neither becomes a storm.
const BREATH: Duration = Duration::from_millis(10);
/// Highest latency that is told apart, in microseconds.
const LATENCY_MAX: u64 = 600_000_000;

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the server closed the connection")]
    Closed,
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("{0}")]
    Unreadable(#[from] super::resp::RespError),
    #[error("{0}")]
    OutOfStep(#[from] super::model::OutOfStep),
    #[error("an answer that nobody asked for")]
    Unasked,
    #[error("the load was abandoned")]
    Abandoned,
}

struct Connection {
    stream: TcpStream,
    decoder: Decoder,
    out: Vec<u8>,
    /// Key and time of sending of every command in flight, oldest first.
    in_flight: VecDeque<(usize, Instant)>,
}

pub(super) struct Client {
    address: SocketAddr,
    config: LoadConfig,
    shared: Arc<Shared>,
    timeline: Timeline,
    model: Model,
    latency: Histogram<u64>,
    tcp: TcpReport,
    broken: u64,
    reconnects: u64,
}

impl Client {
    pub(super) fn new(
        address: SocketAddr,
        config: LoadConfig,
        shared: Arc<Shared>,
        timeline: Timeline,
    ) -> Client {
        let model = Model::new(&config.prefix, config.keys, config.value_bytes, config.seed);
        let latency = Histogram::new_with_bounds(1, LATENCY_MAX, 3).expect("bounds are constants");
        Client {
            address,
            config,
            shared,
            timeline,
            model,
            latency,
            tcp: TcpReport::default(),
            broken: 0,
            reconnects: 0,
        }
    }

    /// The thread's whole life.
    pub(super) fn run(mut self, ready: &SyncSender<Result<(), LoadError>>) -> LoadReport {
        let started = Instant::now();
        let connection = match self.begin() {
            Ok(connection) => {
                let _ = ready.send(Ok(()));
                connection
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                return LoadReport::default();
            }
        };
        let mut connection = self.work(connection);
        let verified = self.wish() == FINISH && self.read_everything_at_last(&mut connection);
        self.timeline.end();
        if let Some(connection) = &connection {
            self.note_tcp(connection);
        }
        self.report(started.elapsed(), verified)
    }

    fn wish(&self) -> u8 {
        self.shared.wish.load(Ordering::Relaxed)
    }

    /// Enters the namespace, connects, and clears the keys.
    fn begin(&mut self) -> Result<Connection, LoadError> {
        if let Some(enter) = self.config.enter.take() {
            enter().map_err(|source| LoadError::Host {
                operation: "entering the client's network namespace",
                source,
            })?;
        }
        let deadline = Instant::now() + self.config.connect_within;
        loop {
            let attempt =
                self.connect(deadline).map_err(Broken::from).and_then(|mut connection| {
                    self.all_keys(&mut connection, Operation::Clear, deadline).map(|()| connection)
                });
            let error = match attempt {
                Ok(connection) if self.model.findings.refused == 0 => return Ok(connection),
                Ok(_) => self.model.findings.sentences.join("; "),
                Err(error) => error.to_string(),
            };
            if Instant::now() >= deadline || self.wish() != GO_ON {
                return Err(LoadError::Unreachable {
                    address: self.address,
                    within: self.config.connect_within,
                    detail: error,
                });
            }
            // Nothing was acknowledged that matters yet: begin from nothing.
            let LoadConfig { keys, value_bytes, seed, ref prefix, .. } = self.config;
            self.model = Model::new(prefix, keys, value_bytes, seed);
            std::thread::sleep(BREATH);
        }
    }

    fn connect(&self, deadline: Instant) -> io::Result<Connection> {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let stream = TcpStream::connect_timeout(&self.address, left.min(Duration::from_secs(3)))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(self.config.answer_within))?;
        Ok(Connection {
            stream,
            decoder: Decoder::default(),
            out: Vec::new(),
            in_flight: VecDeque::new(),
        })
    }

    /// Keeps the connection busy until somebody asks for the end. `None`: there is no connection
    /// any more, and none could be made.
    fn work(&mut self, connection: Connection) -> Option<Connection> {
        let mut connection = connection;
        let mut next = 0;
        loop {
            match self.keep_busy(&mut connection, &mut next) {
                Ok(()) => return Some(connection),
                Err(Broken::Abandoned) => return None,
                Err(error) => {
                    self.lost_connection(&connection, &error);
                    let within = self.config.reconnect_within;
                    connection = self.reconnect(Instant::now() + within)?;
                }
            }
        }
    }

    fn keep_busy(&mut self, connection: &mut Connection, next: &mut usize) -> Result<(), Broken> {
        loop {
            if self.wish() == GO_ON {
                while connection.in_flight.len() < self.config.pipeline {
                    let operation = self.model.choose(*next);
                    self.send(connection, *next, operation);
                    *next = (*next + 1) % self.model.len();
                }
            } else if connection.in_flight.is_empty() {
                return Ok(());
            }
            let refused = self.exchange(connection, Instant::now() + self.config.answer_within)?;
            if refused {
                std::thread::sleep(BREATH);
            } else if !self.config.think.is_zero() {
                std::thread::sleep(self.config.think);
            }
        }
    }

    fn send(&mut self, connection: &mut Connection, key: usize, operation: Operation) {
        self.model.send(key, operation, &mut connection.out);
        connection.in_flight.push_back((key, Instant::now()));
    }

    /// Sends what is waiting and takes at least one answer. True if one was a refusal.
    fn exchange(&mut self, connection: &mut Connection, deadline: Instant) -> Result<bool, Broken> {
        if !connection.out.is_empty() {
            connection.stream.write_all(&connection.out)?;
            connection.out.clear();
        }
        let mut bytes = [0; 16384];
        loop {
            let read = match connection.stream.read(&mut bytes) {
                Ok(0) => return Err(Broken::Closed),
                Ok(read) => read,
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) =>
                {
                    if self.wish() == ABANDON {
                        return Err(Broken::Abandoned);
                    }
                    if Instant::now() >= deadline {
                        return Err(Broken::Silent(self.config.answer_within));
                    }
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let now = Instant::now();
            connection.decoder.extend(&bytes[..read]);
            let (mut answers, mut refused) = (0, false);
            while let Some(reply) = connection.decoder.next_reply()? {
                let (key, sent) = connection.in_flight.pop_front().ok_or(Broken::Unasked)?;
                refused |= self.model.answer(key, &reply)?;
                self.timeline.answered(now);
                self.latency
                    .saturating_record(now.saturating_duration_since(sent).as_micros() as u64);
                answers += 1;
            }
            if answers > 0 {
                let findings = &self.model.findings;
                let operations = findings.reads + findings.writes;
                self.shared.operations.store(operations, Ordering::Relaxed);
                self.publish_errors();
                return Ok(refused);
            }
        }
    }

    fn publish_errors(&self) {
        let errors = self.broken + self.model.findings.refused;
        self.shared.errors.store(errors, Ordering::Relaxed);
        self.shared.reconnects.store(self.reconnects, Ordering::Relaxed);
    }

    /// Performs `operation` on every key, many in flight.
    fn all_keys(
        &mut self,
        connection: &mut Connection,
        operation: Operation,
        deadline: Instant,
    ) -> Result<(), Broken> {
        let mut next = 0;
        while next < self.model.len() || !connection.in_flight.is_empty() {
            while next < self.model.len() && connection.in_flight.len() < BATCH {
                self.send(connection, next, operation);
                next += 1;
            }
            self.exchange(connection, deadline)?;
        }
        Ok(())
    }

    /// Reads every key until none of the reads is refused: a server that still loads its data refuses
    /// them, and what the old connection had in flight is not known before. False if it still
    /// refuses at the deadline.
    fn read_all_keys(
        &mut self,
        connection: &mut Connection,
        deadline: Instant,
    ) -> Result<bool, Broken> {
        loop {
            let refused = self.model.findings.refused;
            self.all_keys(connection, Operation::Read, deadline)?;
            if self.model.findings.refused == refused {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            if self.wish() == ABANDON {
                return Err(Broken::Abandoned);
            }
            std::thread::sleep(BREATH);
        }
    }

    fn lost_connection(&mut self, connection: &Connection, error: &Broken) {
        self.note_tcp(connection);
        self.model.broken();
        self.broken += 1;
        let sentence = format!("connection to {} broke: {error}", self.address);
        tracing::warn!(address = %self.address, %error, "load: connection broke");
        self.model.findings.say(sentence);
        self.publish_errors();
    }

    /// A new connection on which every key has been read again.
    fn reconnect(&mut self, deadline: Instant) -> Option<Connection> {
        loop {
            match self.connect(deadline) {
                Ok(mut connection) => {
                    self.reconnects += 1;
                    self.publish_errors();
                    match self.read_all_keys(&mut connection, deadline) {
                        Ok(_) => return Some(connection),
                        Err(Broken::Abandoned) => return None,
                        Err(error) => self.lost_connection(&connection, &error),
                    }
                }
                Err(error) if Instant::now() >= deadline => {
                    let address = self.address;
                    self.model.findings.say(format!("no new connection to {address}: {error}"));
                    return None;
                }
                Err(_) => {}
            }
            if Instant::now() >= deadline || self.wish() == ABANDON {
                return None;
            }
            std::thread::sleep(BREATH);
        }
    }

    /// The last reading. True if every key was read and none of the reads was refused.
    fn read_everything_at_last(&mut self, connection: &mut Option<Connection>) -> bool {
        let deadline = Instant::now() + self.config.verify_within;
        for _ in 0..2 {
            if connection.is_none() {
                *connection = self.reconnect(deadline);
            }
            let Some(current) = connection else { break };
            match self.read_all_keys(current, deadline) {
                Ok(answered) => return answered,
                Err(error) => self.lost_connection(current, &error),
            }
            *connection = None;
        }
        false
    }

    fn note_tcp(&mut self, connection: &Connection) {
        let Ok(info) = sys::tcp_info(&connection.stream) else { return };
        let sum = |before: Option<u64>, more: Option<u64>| Some(before.unwrap_or(0) + more?);
        let tcp = &mut self.tcp;
        tcp.retransmits += u64::from(info.total_retransmits);
        tcp.bytes_retransmitted = sum(tcp.bytes_retransmitted, info.bytes_retransmitted);
        tcp.rto = sum(tcp.rto, info.total_rto.map(u64::from));
        tcp.retransmits_unanswered += u64::from(info.retransmits_now);
        tcp.rtt_us = u64::from(info.rtt_us);
    }

    fn report(self, ran: Duration, verified: bool) -> LoadReport {
        let findings = self.model.findings;
        let operations = findings.reads + findings.writes;
        let mut problems = findings.sentences;
        if !verified {
            problems.push("the last reading of all keys was not completed".into());
        }
        LoadReport {
            operations,
            writes: findings.writes,
            reads: findings.reads,
            errors: findings.refused + self.broken,
            reconnects: self.reconnects,
            lost_writes: findings.lost,
            doubled_writes: findings.doubled,
            wrong_answers: findings.wrong,
            verified,
            seconds: ran.as_secs_f64(),
            operations_per_second: operations as f64 / ran.as_secs_f64().max(1e-9),
            latency_p50_us: self.latency.value_at_quantile(0.5),
            latency_p99_us: self.latency.value_at_quantile(0.99),
            latency_max_us: self.latency.max(),
            longest_gap_ms: self.timeline.longest().as_secs_f64() * 1e3,
            tcp: self.tcp,
            problems,
        }
    }
}
