//! The edge's two listeners: TCP for agents (under mutual TLS unless plaintext was chosen), a unix
//! socket for status. A thread per connection; claims of one agent are answered in order.

use super::Shared;
use crate::{
    agent::spawn,
    datapath::NetError,
    wire::{self, Answer, Ask, EdgeSays, HostSays, Peer},
};
use identity::{Control, HostName, Security, Stream, Writer};
use std::{
    collections::BTreeMap,
    io::{self, BufReader},
    net::{TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// From the connection to the end of the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Agents ping every second.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
const WRITE_LIMIT: Duration = Duration::from_secs(2);
const CONNECTIONS: usize = 4096;

type Pen = Arc<Mutex<Writer>>;

/// The agents that are connected: where to send news of the fleet.
#[derive(Default)]
struct Agents {
    next: AtomicU64,
    pens: Mutex<BTreeMap<u64, (Pen, Control)>>,
}

/// Starts both listeners.
pub(super) fn serve(
    tcp: TcpListener,
    unix: UnixListener,
    security: Security,
    shared: &Arc<Shared>,
) {
    let for_agents = shared.clone();
    spawn("edge-listen", move || {
        let agents = Arc::new(Agents::default());
        let open = Arc::new(AtomicUsize::new(0));
        for socket in tcp.incoming() {
            let Ok(socket) = socket else {
                thread::sleep(Duration::from_millis(50));
                continue;
            };
            if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS {
                tracing::warn!(limit = CONNECTIONS, "too many connections, one refused");
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (shared, agents, open) = (for_agents.clone(), agents.clone(), open.clone());
            let security = security.clone();
            spawn("edge-agent", move || {
                if let Err(error) = converse(socket, &security, &shared, &agents) {
                    tracing::info!(%error, "an agent's connection ended");
                }
                open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    let shared = shared.clone();
    spawn("edge-status", move || {
        for stream in unix.incoming().flatten() {
            if let Err(error) = tell_status(&stream, &shared) {
                tracing::debug!(%error, "a status connection ended");
            }
        }
    });
}

fn tell_status(stream: &UnixStream, shared: &Shared) -> io::Result<()> {
    stream.set_read_timeout(Some(WRITE_LIMIT))?;
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    let mut writer = stream;
    match wire::receive::<Ask>(&mut BufReader::new(stream))? {
        Some(Ask::Status) => wire::send(&mut writer, &Answer::Status(shared.status())),
        _ => Err(io::Error::other("an edge answers only status on this socket")),
    }
}

fn converse(
    socket: TcpStream,
    security: &Security,
    shared: &Shared,
    agents: &Agents,
) -> io::Result<()> {
    let from = socket.peer_addr()?;
    let stream = Stream::server(socket, security, HANDSHAKE_LIMIT).map_err(io::Error::other)?;
    let control = stream.control();
    control.set_read_timeout(Some(SILENCE_LIMIT));
    control.set_write_timeout(Some(WRITE_LIMIT));
    let proved = stream.peer_name().cloned();
    let (reader, writer) = stream.split();
    let mut reader = BufReader::new(reader);
    let pen = Arc::new(Mutex::new(writer));

    let hello = wire::receive::<HostSays>(&mut reader)?;
    let peer = match enter(hello, proved.as_ref(), shared) {
        Ok(entered) => entered,
        Err(reason) => {
            let error = NetError::Failed {
                machine: String::new(),
                operation: format!("join the fleet from {from}"),
                detail: reason.clone(),
            };
            say(&pen, &EdgeSays::Refused { id: 0, error })?;
            return Err(io::Error::other(reason));
        }
    };
    say(
        &pen,
        &EdgeSays::Welcome { version: wire::VERSION, edge: shared.this, peers: shared.peers() },
    )?;
    let number = agents.next.fetch_add(1, Ordering::Relaxed);
    agents.lock().insert(number, (pen.clone(), control.clone()));
    // Said after this agent is on the list: of two that join at once, each hears of the other.
    agents.tell_others(number, &EdgeSays::Peers { peers: shared.peers() });

    let end = answer_all(&mut reader, &pen, peer, shared);
    agents.lock().remove(&number);
    control.shutdown();
    end
}

/// Who is this, and may it be here?
fn enter(
    hello: Option<HostSays>,
    proved: Option<&HostName>,
    shared: &Shared,
) -> Result<Peer, String> {
    let Some(HostSays::Hello { version, host, peer, path }) = hello else {
        return Err(format!("the first message must be a hello of version {}", wire::VERSION));
    };
    if version != wire::VERSION {
        return Err(format!(
            "this edge speaks version {}, the agent {version}; update the older one",
            wire::VERSION
        ));
    }
    let name = HostName::new(&host).map_err(|e| e.to_string())?;
    if let Some(proved) = proved
        && *proved != name
    {
        return Err(format!("it calls itself {name}, but its certificate is for {proved}"));
    }
    if path != shared.path() {
        return Err(format!(
            "its frames find their way by {path}, this edge's by {}; start all hosts and edges with \
             the same --path",
            shared.path()
        ));
    }
    shared.join(&name, peer)?;
    Ok(peer)
}

fn answer_all(
    reader: &mut BufReader<identity::Reader>,
    pen: &Pen,
    peer: Peer,
    shared: &Shared,
) -> io::Result<()> {
    while let Some(message) = wire::receive::<HostSays>(reader)? {
        let (id, done) = match message {
            HostSays::Ping { id } => (id, Ok(())),
            HostSays::Claim { id, net, owner, epoch } => {
                (id, shared.claim(peer.overlay, &net, owner, epoch))
            }
            HostSays::Candidate { id, net } => (id, shared.candidate(peer.overlay, &net)),
            HostSays::Release { id, net, epoch } => (id, shared.release(peer.overlay, &net, epoch)),
            HostSays::Hello { .. } => return Err(io::Error::other("a second hello")),
        };
        let answer = match done {
            Ok(()) => EdgeSays::Done { id },
            Err(error) => EdgeSays::Refused { id, error },
        };
        say(pen, &answer)?;
    }
    Ok(())
}

fn say(pen: &Pen, message: &EdgeSays) -> io::Result<()> {
    wire::send(&mut *pen.lock().unwrap_or_else(PoisonError::into_inner), message)
}

impl Agents {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, (Pen, Control)>> {
        self.pens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_others(&self, except: u64, message: &EdgeSays) {
        let others: Vec<_> =
            self.lock().iter().filter(|(n, _)| **n != except).map(|(_, p)| p.clone()).collect();
        for (pen, control) in others {
            if say(&pen, message).is_err() {
                // It dials again and hears all of it with the welcome.
                control.shutdown();
            }
        }
    }
}
