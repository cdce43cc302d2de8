//! The edge's two listeners: TCP for agents (under mutual TLS unless plaintext was chosen), a unix
//! socket for status. A thread per connection; claims of one agent are answered in order.

use super::{
    Shared,
    authority::Refusal,
    beside, drain,
    health::{self, ASK_AFTER, Signs},
};
use crate::{
    agent::spawn,
    datapath::{MachineKey, NetError},
    exec::KernelError,
    sys,
    wire::{self, Answer, Ask, EdgeSays, HostSays, Peer},
};
use identity::{Control, HostName, Security, Stream, Writer};
use std::{
    collections::BTreeMap,
    io::{self, BufReader},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// From the connection to the end of the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Agents ping several times a second.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
const WRITE_LIMIT: Duration = Duration::from_secs(2);
const CONNECTIONS: usize = 4096;
/// People and commands that ask at the same time.
const STATUS_CONNECTIONS: usize = 64;
/// How often this edge looks whether its keys have changed.
const KEYS_EVERY: Duration = Duration::from_millis(500);

pub(super) type Pen = Arc<Mutex<Writer>>;

/// An agent that is connected.
#[derive(Clone)]
struct Line {
    host: Ipv4Addr,
    pen: Pen,
    control: Control,
    life: Arc<Mutex<Life>>,
}

/// Signs of life of one connection.
#[derive(Clone, Copy, Debug)]
struct Life {
    /// When its agent last said something.
    heard: Instant,
    /// Since when something that was said to it has not been acknowledged by its kernel.
    open: Option<Instant>,
}

/// The agents that are connected: where to send news of the fleet.
#[derive(Default)]
pub(super) struct Agents {
    next: AtomicU64,
    lines: Mutex<BTreeMap<u64, Line>>,
}

/// Starts both listeners.
pub(super) fn serve(
    tcp: TcpListener,
    unix: UnixListener,
    security: Security,
    shared: &Arc<Shared>,
) {
    let for_agents = shared.clone();
    let agents = shared.lines.clone();
    health::watch(agents.clone(), shared.clone());
    if shared.secure.is_some() {
        let (shared, agents) = (shared.clone(), agents.clone());
        spawn("edge-keys", move || tell_of_own_keys(&shared, &agents));
    }
    spawn("edge-listen", move || {
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
        let open = Arc::new(AtomicUsize::new(0));
        for stream in unix.incoming().flatten() {
            if open.fetch_add(1, Ordering::Relaxed) >= STATUS_CONNECTIONS {
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            // A drain takes its time, and others look on.
            let (shared, open) = (shared.clone(), open.clone());
            spawn("edge-asked", move || {
                if let Err(error) = tell_status(&stream, &shared) {
                    tracing::debug!(%error, "a status connection ended");
                }
                open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
}

fn tell_status(stream: &UnixStream, shared: &Shared) -> io::Result<()> {
    stream.set_read_timeout(Some(WRITE_LIMIT))?;
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    let mut writer = stream;
    let mut reader = BufReader::new(stream);
    while let Some(ask) = wire::receive::<Ask>(&mut reader)? {
        let answer = match ask {
            Ask::Status => Answer::Status(shared.status()),
            Ask::Machines { after } => Answer::Machines(shared.machines_after(after)),
            Ask::Drain { to, home, dry_run, limit_ms } => {
                let limit = Duration::from_millis(limit_ms);
                let order = drain::Order { to: &to, home: home.as_deref(), dry_run, limit };
                match drain::drain(shared, &order) {
                    Ok(drained) => Answer::Drained(drained),
                    Err(KernelError { operation, detail }) => {
                        let machine = String::new();
                        Answer::Failed(NetError::Failed { machine, operation, detail })
                    }
                }
            }
            Ask::Rotate => crate::secure::rotate(shared.secure.as_deref()),
            _ => return Err(io::Error::other("an edge answers only status on this socket")),
        };
        wire::send(&mut writer, &answer)?;
    }
    Ok(())
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
    sys::repeat_steadily(control.as_fd())?;
    let proved = stream.peer_name().cloned();
    let (reader, writer) = stream.split();
    let mut reader = BufReader::new(reader);
    let pen = Arc::new(Mutex::new(writer));

    let hello = wire::receive::<HostSays>(&mut reader)?;
    if let Some(HostSays::Edge { version, name, peer }) = &hello {
        let who = (*version, name.as_str(), *peer);
        return beside::answer((&mut reader, &pen), who, proved.as_ref(), shared);
    }
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
        &EdgeSays::Welcome {
            version: wire::VERSION,
            edge: shared.this,
            peers: shared.peers(),
            domain: Some(shared.domain.clone()),
            homes: shared.words(),
        },
    )?;
    let number = agents.next.fetch_add(1, Ordering::Relaxed);
    let life = Arc::new(Mutex::new(Life { heard: Instant::now(), open: None }));
    let line =
        Line { host: peer.overlay, pen: pen.clone(), control: control.clone(), life: life.clone() };
    agents.lock().insert(number, line);
    // Said after this agent is on the list: of two that join at once, each hears of the other.
    agents.tell_others(number, &EdgeSays::Peers { peers: shared.peers() });
    // They may have changed since the welcome.
    let homes = shared.words();
    if !homes.is_empty() {
        say(&pen, &EdgeSays::Homes { homes })?;
    }
    if let Some(tunnels) = shared.news_of_tunnels() {
        say(&pen, &tunnels)?;
    }
    if let Some(secure) = &shared.secure {
        secure.greet(Some(peer.overlay));
    }

    shared.agents.fetch_add(1, Ordering::Relaxed);
    let end = answer_all(&mut reader, &pen, peer, shared, (agents, &life));
    shared.agents.fetch_sub(1, Ordering::Relaxed);
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
    (agents, life): (&Agents, &Mutex<Life>),
) -> io::Result<()> {
    while let Some(message) = wire::receive::<HostSays>(reader)? {
        life.lock().unwrap_or_else(PoisonError::into_inner).heard = Instant::now();
        shared.heard(peer.overlay);
        let (asked, mut operation, mut moved) = (Instant::now(), "", None);
        let mut at_home = None;
        let (id, done) = match message {
            HostSays::Ping { id } => (id, Ok(())),
            HostSays::Claim { id, net, owner, epoch, home } => {
                operation = "claim";
                let claimed = shared.claim(peer.overlay, &net, owner, epoch, home);
                if let Ok((_, stands)) = &claimed {
                    at_home = stands.filter(|_| *stands != home).map(|home| (net.key(), home));
                }
                if matches!(&claimed, Ok((change, _)) if change.route) {
                    moved = Some((net, owner, epoch));
                }
                (id, settle(claimed.map(drop))?)
            }
            HostSays::Candidate { id, net, host, long } => {
                operation = "candidate";
                at_home = shared.home_of(&net).map(|home| (net.key(), home));
                (id, shared.candidate(peer.overlay, &net, host, long))
            }
            HostSays::Release { id, net, epoch } => {
                operation = "release";
                (id, settle(shared.release(peer.overlay, &net, epoch))?)
            }
            HostSays::Tunnel { id, tunnel } => {
                let joined = shared.join_tunnel(peer.overlay, tunnel);
                if joined.is_ok()
                    && let Some(tunnels) = shared.news_of_tunnels()
                {
                    agents.tell_all(&tunnels);
                }
                (
                    id,
                    joined.map_err(|detail| NetError::Failed {
                        machine: String::new(),
                        operation: format!("take the keys of host {}", peer.overlay),
                        detail,
                    }),
                )
            }
            HostSays::Address { id, machine, network } => {
                let answer = match shared.give_address(&machine, network) {
                    Ok((address, address_v6)) => EdgeSays::Given { id, address, address_v6 },
                    Err(error) => EdgeSays::Refused { id, error },
                };
                say(pen, &answer)?;
                continue;
            }
            HostSays::Resolve { id, network, question, stream } => {
                let pen = pen.clone();
                let question = wire::from_text(&question).unwrap_or_default();
                shared.resolve(question, network, stream, move |bytes| {
                    let answer = wire::to_text(&bytes);
                    // If it is lost, so is the connection, and the guest asks again.
                    let _ = say(&pen, &EdgeSays::Resolved { id, answer });
                });
                continue;
            }
            HostSays::Note { to, note } => {
                shared.pass_note(peer.overlay, to, note);
                continue;
            }
            HostSays::Hello { .. } | HostSays::Edge { .. } => {
                return Err(io::Error::other("a second hello"));
            }
        };
        if let Some((MachineKey { network, address }, home)) = at_home {
            say(pen, &EdgeSays::Home { network, address, home })?;
        }
        let answer = match done {
            Ok(()) => EdgeSays::Done { id },
            Err(error) => EdgeSays::Refused { id, error },
        };
        let said = say(pen, &answer);
        shared.changes.count(operation, matches!(answer, EdgeSays::Done { .. }), asked);
        if let Some((net, owner, epoch)) = moved {
            shared.claimed(&net, owner, epoch);
        }
        said?;
    }
    Ok(())
}

/// What cannot be judged now ends the connection: the agent dials again and says it again.
fn settle(done: Result<(), Refusal>) -> io::Result<Result<(), NetError>> {
    match done {
        Ok(()) => Ok(Ok(())),
        Err(Refusal::Final(error)) => Ok(Err(error)),
        Err(Refusal::Later(error)) => Err(io::Error::other(error)),
    }
}

/// Tells every agent when this edge's own keys change.
fn tell_of_own_keys(shared: &Shared, agents: &Agents) {
    let Some(secure) = &shared.secure else { return };
    let mut told = secure.this();
    loop {
        thread::sleep(KEYS_EVERY);
        let now = secure.this();
        if now != told
            && let Some(tunnels) = shared.news_of_tunnels()
        {
            agents.tell_all(&tunnels);
            told = now;
        }
    }
}

fn say(pen: &Pen, message: &EdgeSays) -> io::Result<()> {
    wire::send(&mut *pen.lock().unwrap_or_else(PoisonError::into_inner), message)
}

impl Agents {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Line>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The signs of life of every host that is connected. Speaks to those that were not heard lately.
    pub(super) fn signs(&self, now: Instant) -> BTreeMap<Ipv4Addr, Vec<Signs>> {
        let lines: Vec<Line> = self.lock().values().cloned().collect();
        let mut signs = BTreeMap::<Ipv4Addr, Vec<Signs>>::new();
        for line in lines {
            let mut life = line.life.lock().unwrap_or_else(PoisonError::into_inner);
            let heard = now.saturating_duration_since(life.heard);
            let mut unanswered = None;
            if heard < ASK_AFTER {
                life.open = None;
            } else if let Ok(open) = sys::is_unacknowledged(line.control.as_fd()) {
                if open {
                    let since = *life.open.get_or_insert(now);
                    unanswered = Some(now.saturating_duration_since(since));
                } else {
                    (life.open, unanswered) = (None, Some(Duration::ZERO));
                    // One at a time; it answers no question of the agent's, and is passed over.
                    if let Ok(mut pen) = line.pen.try_lock() {
                        let _ = wire::send(&mut *pen, &EdgeSays::Done { id: 0 });
                    }
                }
            }
            drop(life);
            signs.entry(line.host).or_default().push(Signs { heard, unanswered });
        }
        signs
    }

    /// Whether any host has said something lately.
    pub(super) fn hears(&self, now: Instant, within: Duration) -> bool {
        let lines: Vec<Line> = self.lock().values().cloned().collect();
        lines.iter().any(|line| {
            let heard = line.life.lock().unwrap_or_else(PoisonError::into_inner).heard;
            now.saturating_duration_since(heard) < within
        })
    }

    pub(super) fn tell_all(&self, message: &EdgeSays) {
        self.tell_others(u64::MAX, message);
    }

    /// Tells one host something, if it is connected.
    pub(super) fn tell_host(&self, host: Ipv4Addr, message: &EdgeSays) -> bool {
        let line = self.lock().values().rev().find(|line| line.host == host).cloned();
        let Some(line) = line else { return false };
        if say(&line.pen, message).is_err() {
            line.control.shutdown();
        }
        true
    }

    fn tell_others(&self, except: u64, message: &EdgeSays) {
        let others: Vec<Line> =
            self.lock().iter().filter(|(n, _)| **n != except).map(|(_, l)| l.clone()).collect();
        for line in others {
            if say(&line.pen, message).is_err() {
                // It dials again and hears all of it with the welcome.
                line.control.shutdown();
            }
        }
    }
}
