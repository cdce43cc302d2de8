//! Other edges: a connection to each, over which both say that they live and what they know of homes; and
//! the answers to what others ask here. Whether an edge is dead is judged by its kernel, like a host
//! ([`super::health`]): a connection that is refused, or accepted by nobody, was answered by a kernel
//! that lives, and whose connection tracking does its work.

use super::{Shared, drain::Incoming};
use crate::{
    agent::spawn,
    exec::KernelError,
    homes::EdgeAt,
    wire::{self, Beside, BesideAnswer, HostSays},
};
use identity::{HostName, Stream};
use std::{
    fmt,
    io::{self, BufReader},
    net::TcpStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

const PING_EVERY: Duration = Duration::from_millis(100);
/// How long a kernel may take to answer a connection, and an edge a question.
const KNOCK_LIMIT: Duration = Duration::from_millis(300);
const ANSWER_LIMIT: Duration = Duration::from_millis(500);
const DIAL_LIMIT: Duration = Duration::from_secs(1);
/// An edge whose kernel was not heard for this long is silent.
const SILENCE: Duration = Duration::from_millis(700);
/// An edge whose process was not heard for this long hangs, or is not running.
const HUNG: Duration = Duration::from_millis(1500);

/// How another edge is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// It answers.
    Alive,
    /// Its kernel answers, its process does not: it goes on serving.
    Hung,
    /// Nothing answers.
    Silent,
    /// It is not in this edge's settings.
    Unknown,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Alive => "alive",
            Self::Hung => "hung",
            Self::Silent => "silent",
            Self::Unknown => "unknown",
        })
    }
}

/// Another edge.
pub(super) struct Neighbour {
    at: EdgeAt,
    life: Mutex<Life>,
}

#[derive(Clone, Copy)]
struct Life {
    /// When its kernel last answered, and its process.
    kernel: Instant,
    process: Instant,
}

impl Neighbour {
    /// Nothing is held against one that nobody has spoken to yet.
    pub(super) fn new(at: EdgeAt) -> Self {
        let now = Instant::now();
        Self { at, life: Mutex::new(Life { kernel: now, process: now }) }
    }

    pub(super) fn name(&self) -> &str {
        self.at.name.as_ref().map_or("", HostName::as_str)
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn health(&self, now: Instant) -> Health {
        let Life { kernel, process } = *self.life();
        if now.saturating_duration_since(kernel) > SILENCE {
            Health::Silent
        } else if now.saturating_duration_since(process) > HUNG {
            Health::Hung
        } else {
            Health::Alive
        }
    }

    /// Whether a kernel answers there.
    fn knock(&self) -> io::Result<()> {
        match TcpStream::connect_timeout(&self.at.address, KNOCK_LIMIT) {
            Err(e) if e.kind() != io::ErrorKind::ConnectionRefused => Err(e),
            _ => {
                self.life().kernel = Instant::now();
                Ok(())
            }
        }
    }

    /// A connection of its own, for a conversation.
    pub(super) fn call(&self, shared: &Shared, limit: Duration) -> Result<Call, KernelError> {
        let fail = |e: String| KernelError::new(format!("speak to edge {}", self.name()), e);
        let name = self.at.name.as_ref().ok_or_else(|| fail("it has no name".into()))?;
        let stream = Stream::connect(self.at.address, name, &shared.security, DIAL_LIMIT)
            .map_err(|e| fail(e.to_string()))?;
        let control = stream.control();
        control.set_read_timeout(Some(limit));
        control.set_write_timeout(Some(limit));
        let (reader, mut writer) = stream.split();
        let fronts = shared.fronts.as_ref().ok_or_else(|| fail("this is the only one".into()))?;
        let hello = HostSays::Edge {
            version: wire::VERSION,
            name: fronts.config.name.to_string(),
            peer: shared.this,
        };
        wire::send(&mut writer, &hello).map_err(|e| fail(e.to_string()))?;
        Ok(Call { reader: BufReader::new(reader), writer, with: self.name().to_owned() })
    }
}

/// A conversation with another edge: questions of this one, answers of the other.
pub(super) struct Call {
    reader: BufReader<identity::Reader>,
    writer: identity::Writer,
    with: String,
}

impl Call {
    pub(super) fn ask(&mut self, question: &Beside) -> Result<BesideAnswer, KernelError> {
        let fail = |e: String| KernelError::new(format!("ask edge {}", self.with), e);
        wire::send(&mut self.writer, question).map_err(|e| fail(e.to_string()))?;
        match wire::receive(&mut self.reader).map_err(|e| fail(e.to_string()))? {
            Some(BesideAnswer::Refused { detail }) => Err(fail(detail)),
            Some(answer) => Ok(answer),
            None => Err(fail("it ended the conversation; its log says why".into())),
        }
    }
}

/// Keeps a connection to each other edge from now on.
pub(super) fn keep(shared: &Arc<Shared>) {
    let Some(fronts) = &shared.fronts else { return };
    for neighbour in &fronts.neighbours {
        let (neighbour, shared) = (neighbour.clone(), shared.clone());
        spawn("edge-beside", move || {
            let mut last = String::new();
            loop {
                let ended = neighbour
                    .knock()
                    .map_err(|e| KernelError::new("reach it", e))
                    .and_then(|()| converse(&neighbour, &shared));
                if let Err(error) = ended {
                    let error = error.to_string();
                    if error != last {
                        tracing::warn!(edge = neighbour.name(), error, "another edge is not heard");
                        last = error;
                    }
                }
                thread::sleep(PING_EVERY);
            }
        });
    }
}

fn converse(neighbour: &Neighbour, shared: &Shared) -> Result<(), KernelError> {
    let mut call = neighbour.call(shared, ANSWER_LIMIT)?;
    // Where it is, once it has said so.
    let mut at = None;
    loop {
        let tunnel = shared.secure.as_ref().map(|secure| secure.this());
        let fronts = shared.fronts.as_ref();
        let notes = fronts.zip(at).map(|(fronts, at)| fronts.take_notes(at)).unwrap_or_default();
        match call.ask(&Beside::Ping { homes: shared.words(), tunnel, notes })? {
            BesideAnswer::Words { edge, homes, tunnel } => {
                if at.replace(edge.overlay).is_none()
                    && let Some(secure) = &shared.secure
                {
                    secure.greet(Some(edge.overlay));
                }
                let now = Instant::now();
                *neighbour.life() = Life { kernel: now, process: now };
                shared.hear_edge(neighbour.name(), edge, (homes, tunnel))?;
            }
            other => return Err(KernelError::new("ask for homes", format!("{other:?}"))),
        }
        thread::sleep(PING_EVERY);
    }
}

/// Answers another edge, which has said hello as `name` and proved to be `proved`.
pub(super) fn answer(
    (reader, pen): (&mut BufReader<identity::Reader>, &super::server::Pen),
    (version, name, peer): (u32, &str, wire::Peer),
    proved: Option<&HostName>,
    shared: &Shared,
) -> io::Result<()> {
    let allowed = check(version, name, proved, shared);
    let mut incoming = Incoming::new(name);
    let ended = converse_with((reader, pen), (name, peer), &allowed, &mut incoming, shared);
    incoming.end(shared);
    ended
}

fn converse_with(
    (reader, pen): (&mut BufReader<identity::Reader>, &super::server::Pen),
    (name, peer): (&str, wire::Peer),
    allowed: &Result<(), String>,
    incoming: &mut Incoming,
    shared: &Shared,
) -> io::Result<()> {
    while let Some(question) = wire::receive::<Beside>(reader)? {
        let answer = match (allowed, question) {
            (Err(detail), _) => Err(detail.clone()),
            (Ok(()), Beside::Ping { homes, tunnel, notes }) => shared
                .hear_edge(name, peer, (homes, tunnel))
                .map(|()| {
                    for note in notes {
                        shared.pass_note(peer.overlay, shared.this.overlay, note);
                    }
                    BesideAnswer::Words {
                        edge: shared.this,
                        homes: shared.words(),
                        tunnel: shared.secure.as_ref().map(|secure| secure.this()),
                    }
                })
                .map_err(|e| e.to_string()),
            (Ok(()), question) => incoming.answer(shared, question),
        };
        let refused = answer.is_err();
        let answer = answer.unwrap_or_else(|detail| BesideAnswer::Refused { detail });
        let mut pen = pen.lock().unwrap_or_else(PoisonError::into_inner);
        wire::send(&mut *pen, &answer)?;
        if refused {
            break;
        }
    }
    Ok(())
}

fn check(
    version: u32,
    name: &str,
    proved: Option<&HostName>,
    shared: &Shared,
) -> Result<(), String> {
    let Some(fronts) = &shared.fronts else {
        return Err("this edge is the only one; start it with --beside".into());
    };
    if version != wire::VERSION {
        return Err(format!("this edge speaks version {}, that one {version}", wire::VERSION));
    }
    if let Some(proved) = proved.filter(|proved| proved.as_str() != name) {
        return Err(format!("it calls itself {name}, but its certificate is for {proved}"));
    }
    if fronts.neighbour(name).is_none() {
        return Err(format!("no edge {name} is in this one's settings (--beside)"));
    }
    Ok(())
}
