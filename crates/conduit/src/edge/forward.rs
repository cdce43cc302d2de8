//! Asks others for names that are none of this edge's. A few threads, a bounded queue: when all of them
//! wait for servers that do not answer, further questions are answered with a failure, and names of
//! machines as ever.

use crate::agent::spawn;
use hickory_proto::op::{Message, ResponseCode};
use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

const THREADS: usize = 16;
const QUEUE: usize = 256;
/// How long a server may take. A client asks again after about five seconds.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Longest answer that is brought back: it goes through the connection to the agent.
pub(super) const LONGEST: usize = 32 * 1024;

/// Brings the answer to whom it is for.
type Answer = Box<dyn FnOnce(Vec<u8>) + Send>;

struct Job {
    question: Vec<u8>,
    stream: bool,
    datagram: usize,
    answer: Answer,
}

/// Whom to ask.
pub(super) struct Forwarder {
    jobs: Option<SyncSender<Job>>,
}

impl Forwarder {
    /// Asks these servers, in this order.
    pub(super) fn start(servers: Vec<SocketAddr>) -> Self {
        if servers.is_empty() {
            return Self { jobs: None };
        }
        let (jobs, waiting) = sync_channel(QUEUE);
        let (waiting, servers) = (Arc::new(Mutex::new(waiting)), Arc::new(servers));
        for _ in 0..THREADS {
            let (waiting, servers) = (waiting.clone(), servers.clone());
            spawn("edge-names", move || work(&waiting, &servers));
        }
        Self { jobs: Some(jobs) }
    }

    /// Asks for an answer, of at most `datagram` bytes unless it is for a `stream`.
    pub(super) fn ask(
        &self,
        question: Vec<u8>,
        stream: bool,
        datagram: usize,
        answer: impl FnOnce(Vec<u8>) + Send + 'static,
    ) {
        let job = Job { question, stream, datagram, answer: Box::new(answer) };
        let Some(jobs) = &self.jobs else { return fail(job, ResponseCode::Refused) };
        if let Err(error) = jobs.try_send(job) {
            use std::sync::mpsc::TrySendError::{Disconnected, Full};
            let (Full(job) | Disconnected(job)) = error;
            fail(job, ResponseCode::ServFail);
        }
    }
}

fn fail(job: Job, code: ResponseCode) {
    if let Some(said) = super::names::failure(&job.question, code) {
        (job.answer)(said);
    }
}

fn work(waiting: &Mutex<Receiver<Job>>, servers: &[SocketAddr]) {
    loop {
        let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        let found = servers.iter().find_map(|&server| match ask_one(server, &job) {
            Ok(answer) => Some(answer),
            Err(error) => {
                tracing::debug!(%server, %error, "a name server gave no answer");
                None
            }
        });
        match found {
            Some(answer) => (job.answer)(answer),
            None => fail(job, ResponseCode::ServFail),
        }
    }
}

/// Asks one server, from a port and with a number that nobody can guess.
fn ask_one(server: SocketAddr, job: &Job) -> io::Result<Vec<u8>> {
    let [high, low, ..] = RandomState::new().hash_one(Instant::now()).to_be_bytes();
    let mut question = job.question.clone();
    let Some(id) = question.first_chunk_mut::<2>() else {
        return Err(io::Error::other("no question"));
    };
    let own = std::mem::replace(id, [high, low]);
    let answer =
        if job.stream { by_stream(server, &question) } else { by_datagram(server, &question) };
    let mut answer = answer?;
    if let Some(id) = answer.first_chunk_mut::<2>() {
        *id = own;
    }
    if job.stream || answer.len() <= job.datagram {
        return Ok(answer);
    }
    let whole = Message::from_vec(&answer).map_err(io::Error::other)?;
    whole.truncate().to_vec().map_err(io::Error::other)
}

fn by_datagram(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    socket.send(question)?;
    let deadline = Instant::now() + PATIENCE;
    let mut bytes = vec![0; LONGEST];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let size = socket.recv(&mut bytes)?;
        if answers(question, &bytes[..size]) {
            bytes.truncate(size);
            return Ok(bytes);
        }
    }
}

fn by_stream(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let deadline = Instant::now() + 2 * PATIENCE;
    let size = u16::try_from(question.len()).map_err(io::Error::other)?;
    stream.write_all(&[&size.to_be_bytes(), question].concat())?;
    let mut size = [0; 2];
    read_within(&mut stream, &mut size, deadline)?;
    let size = usize::from(u16::from_be_bytes(size));
    if size > LONGEST {
        return Err(io::Error::other("its answer is too long"));
    }
    let mut bytes = vec![0; size];
    read_within(&mut stream, &mut bytes, deadline)?;
    if answers(question, &bytes) {
        Ok(bytes)
    } else {
        Err(io::Error::other("it answered something else"))
    }
}

/// Fills `bytes` from a server that may send them one by one.
fn read_within(stream: &mut TcpStream, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let size = stream.read(bytes)?;
        if size == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[size..];
    }
    Ok(())
}

/// Whether these bytes answer that question, and no other.
fn answers(question: &[u8], answer: &[u8]) -> bool {
    if question.get(..2) != answer.get(..2) {
        return false;
    }
    let (Ok(asked), Ok(said)) = (Message::from_vec(question), Message::from_vec(answer)) else {
        return false;
    };
    said.metadata.message_type == hickory_proto::op::MessageType::Response
        && said.queries == asked.queries
}
