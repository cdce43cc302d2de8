//! The tunnel as a process runs it: one thread that reads the tun device and the socket, asks
//! [`Engine`] what to do, and writes. One thread, because boringtun's sessions need exclusive access
//! for either direction; the kernel's part (TCP, the cut of large datagrams) runs beside it.
//!
//! Started by `conduit tunnel run`. What must hold: it never waits for anything but its devices
//! while it is the one who reads the tun device.

mod answers;

use crate::{
    TunnelError,
    control::{self, Answer, Question, Reply},
    engine::{Engine, Fate, OVERHEAD},
    handover::{Arrival, Departure, Pipe},
    packet::{LARGEST, VNET},
    state::{Keys, KnownPeer, State},
    sys::{self, BATCH, Inbox},
    tun::Tun,
    udp::{Outer, Wire},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use std::{
    io,
    net::SocketAddr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

/// How a tunnel is started.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The interface's name.
    pub interface: String,
    /// Where to listen for UDP.
    pub listen: SocketAddr,
    /// The state folder: keys and peers.
    pub state: PathBuf,
    /// The control socket.
    pub control: PathBuf,
    /// The interface's MTU becomes no larger; smaller where a path to a peer is narrow.
    pub mtu: u32,
    /// How long a key pair is used; forever if none.
    pub rotate_every: Option<Duration>,
}

/// Why a tunnel ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was stopped; its interface stays, so that the next one finds addresses and routes.
    Stopped,
    /// It was stopped, and the interface is gone.
    Removed,
    /// Another process has it now.
    HandedOver,
}

/// Stops a tunnel from another thread.
#[derive(Clone, Debug)]
pub struct Stopper {
    stop: Arc<AtomicBool>,
    wake: Arc<EventFd>,
}

impl Stopper {
    /// Stops it; its interface stays.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.wake.write(1);
    }
}

/// How often timers are looked at.
const TICK: Duration = Duration::from_millis(100);
/// Bytes that are read from the tun device before they are sent: large enough for one system call
/// to carry much, small enough for the other end to work at the same time.
const TURN: usize = 128 << 10;
/// Frames that are read before they are sent.
const TURN_FRAMES: usize = 64;
/// What UDP and IP add to a message: 8 and 20, or 8 and 40 bytes.
const UDP_IPV4: u32 = 28;
const UDP_IPV6: u32 = 48;
/// No path is narrower (RFC 8200), so the interface's MTU never becomes less.
const LEAST_MTU: u32 = 1280;
/// For how long everybody has used the new key before the old one goes.
const SETTLING: Duration = Duration::from_secs(5);

enum Phase {
    /// One process, or the old one is of no concern any more.
    Alone,
    /// The old process still reads the tun device.
    Arriving(Arrival),
    /// This one reads it; the old one still decrypts.
    Arrived(Arrival),
    /// The new process has the socket, later the tun device.
    Leaving(Departure),
}

/// A job for the thread that writes files.
enum Job {
    Peers(Vec<KnownPeer>, Option<mpsc::SyncSender<Reply>>),
}

/// A tunnel; see [`Tunnel::run`].
pub struct Tunnel {
    settings: Settings,
    tun: Tun,
    engine: Engine,
    inbox: Inbox,
    keys: Keys,
    state: Arc<State>,
    jobs: mpsc::Sender<Job>,
    listener: UnixListener,
    questions: mpsc::Receiver<Question>,
    wake: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    phase: Phase,
    frame: Box<[u8]>,
    /// For the interface's MTU.
    mtu: u32,
    next_path: usize,
    too_large: u64,
    /// Since when everybody has used the next key.
    settled: Option<Instant>,
}

impl Tunnel {
    /// Sets a tunnel up in this thread's network namespace, with the keys and peers that its state
    /// folder remembers.
    pub fn open(settings: Settings) -> Result<Self, TunnelError> {
        let listener = control::listen(&settings.control)?;
        let state = State::open(&settings.state)?;
        let tun = Tun::open(&settings.interface)?;
        let outer = Outer::bind(settings.listen)?;
        let generation = state.next_generation()?;
        let start = (state, generation);
        let mut this = Self::build(settings, start, tun, outer, listener, Phase::Alone)?;
        this.mtu = sys::mtu(this.engine.wire.outer.as_fd(), this.tun.name())
            .map_err(TunnelError::system("read the interface's MTU"))?;
        this.set_mtu(this.settings.mtu);
        Ok(this)
    }

    /// Takes the place of the tunnel that answers at the control socket, without a packet lost.
    /// Where nobody answers, it is [`Tunnel::open`].
    pub fn take_over(settings: Settings) -> Result<Self, TunnelError> {
        // What takes time first: nobody reads the socket from here on until this process does.
        let state = State::open(&settings.state)?;
        let generation = state.next_generation()?;
        let (old, handed, descriptors) = match control::take(&settings.control) {
            Err(TunnelError::System { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Self::open(settings);
            }
            other => other?,
        };
        let four: Result<[OwnedFd; sys::DESCRIPTORS], _> = descriptors.try_into();
        let [tun, outer, listener, pipe] =
            four.map_err(|_| TunnelError::invalid("what is handed over", "descriptors miss"))?;
        let tun = Tun::adopt(tun, &handed.interface)?;
        let outer = Outer::adopt(outer).map_err(TunnelError::system("take the socket over"))?;
        let pipe = Pipe::adopt(pipe).map_err(TunnelError::system("take the pipe over"))?;
        let arrival = Arrival::new(old, pipe, handed.live, Instant::now());
        let phase = Phase::Arriving(arrival);
        let start = (state, generation);
        let mut this = Self::build(settings, start, tun, outer, listener.into(), phase)?;
        this.mtu = handed.mtu;
        Ok(this)
    }

    fn build(
        settings: Settings,
        (state, generation): (State, u8),
        tun: Tun,
        outer: Outer,
        listener: UnixListener,
        phase: Phase,
    ) -> Result<Self, TunnelError> {
        let keys = state.keys()?;
        let mut engine = Engine::new(Wire::new(outer), generation, tun.takes_datagrams());
        engine.set_keys(&keys)?;
        engine.set_peers(state.peers()?)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|e| TunnelError::system("make an eventfd")(e.into()))?;
        let wake = Arc::new(wake);
        let state = Arc::new(state);
        let (asking, questions) = mpsc::channel();
        let fail = || "serve the control socket";
        let accepting = listener.try_clone().map_err(TunnelError::system(fail()))?;
        let waking = wake.clone();
        let wake_loop = move || {
            let _ = waking.write(1);
        };
        control::serve(accepting, asking, wake_loop).map_err(TunnelError::system(fail()))?;
        Ok(Self {
            settings,
            tun,
            engine,
            inbox: Inbox::new(),
            keys,
            jobs: keep_files(state.clone())?,
            state,
            listener,
            questions,
            wake,
            stop: Arc::default(),
            phase,
            frame: vec![0; VNET + LARGEST + 1].into_boxed_slice(),
            mtu: 0,
            next_path: 0,
            too_large: 0,
            settled: None,
        })
    }

    /// The interface's name.
    #[must_use]
    pub fn interface(&self) -> &str {
        self.tun.name()
    }

    /// For stopping it while it runs.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper { stop: self.stop.clone(), wake: self.wake.clone() }
    }

    /// Runs it to its end, on this thread.
    pub fn run(mut self) -> Result<End, TunnelError> {
        let mut next_tick = Instant::now();
        self.engine.seek_all(next_tick);
        loop {
            self.engine.wire.send();
            let ready = self.wait(next_tick)?;
            let now = Instant::now();
            if ready.outer {
                self.receive(now)?;
            }
            if ready.pipe {
                self.receive_passed(now);
            }
            if ready.tun {
                self.transmit(now)?;
            }
            if ready.wake {
                let _ = self.wake.read();
            }
            if ready.wake || ready.word {
                if let Some(end) = self.hear(now)? {
                    return self.end(end);
                }
                if self.stop.load(Ordering::Acquire) {
                    return self.end(End::Stopped);
                }
            }
            if now >= next_tick {
                if let Phase::Leaving(departure) = &self.phase
                    && departure.is_done(now)
                {
                    return Ok(End::HandedOver);
                }
                self.tick(now)?;
                next_tick = now + TICK;
            }
        }
    }

    fn end(self, end: End) -> Result<End, TunnelError> {
        if matches!(self.phase, Phase::Leaving(_)) {
            return Ok(End::HandedOver);
        }
        let _ = std::fs::remove_file(&self.settings.control);
        if end == End::Removed {
            self.tun.remove()?;
        }
        Ok(end)
    }

    fn wait(&self, until: Instant) -> Result<Ready, TunnelError> {
        let (outer, tun) = match &self.phase {
            Phase::Alone | Phase::Arrived(_) => (true, true),
            Phase::Arriving(_) => (true, false),
            Phase::Leaving(departure) => (false, departure.quiet_since.is_none()),
        };
        let events = |wanted| if wanted { PollFlags::POLLIN } else { PollFlags::empty() };
        let absent = || PollFd::new(self.wake.as_fd(), PollFlags::empty());
        let mut set = [
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.engine.wire.outer.as_fd(), events(outer)),
            PollFd::new(self.tun.as_fd(), events(tun)),
            absent(),
            absent(),
        ];
        if let Phase::Leaving(departure) = &self.phase {
            set[3] = PollFd::new(departure.pipe.as_fd(), PollFlags::POLLIN);
            if departure.quiet_since.is_none() {
                set[4] = PollFd::new(departure.descriptor(), PollFlags::POLLIN);
            }
        }
        let left = until.saturating_duration_since(Instant::now()).as_millis() as u16;
        match poll(&mut set, PollTimeout::from(left.saturating_add(1))) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(TunnelError::system("wait for packets")(e.into())),
        }
        let is = |n: usize| set.get(n).is_some_and(|fd| fd.any() == Some(true));
        Ok(Ready {
            wake: is(0),
            outer: outer && is(1),
            tun: tun && is(2),
            pipe: is(3),
            word: is(4),
        })
    }

    /// Datagrams from the socket.
    fn receive(&mut self, now: Instant) -> Result<(), TunnelError> {
        let Self { engine, inbox, tun, phase, .. } = self;
        let mut writer = Writer { tun, written: 0, refused: 0 };
        let count = match inbox.receive(engine.wire.outer.as_fd()) {
            Ok(count) => count,
            Err(e) if is_passing(&e) => return Ok(()),
            Err(e) => return Err(TunnelError::system("receive datagrams")(e)),
        };
        engine.wire.counters.receive_calls += 1;
        for n in 0..count {
            let (bytes, segment, from) = inbox.message(n);
            let Some(from) = from else {
                engine.wire.counters.dropped_malformed += 1;
                continue;
            };
            for datagram in bytes.chunks(segment) {
                let fate = engine.incoming(from, datagram, now, &mut |f| writer.write(f));
                if fate == Fate::Foreign {
                    pass_back(engine, phase, from, datagram);
                }
            }
        }
        engine.flush(&mut |frame| writer.write(frame));
        writer.count(engine);
        Ok(())
    }

    /// Datagrams of our sessions that the new process received.
    fn receive_passed(&mut self, now: Instant) {
        let Self { engine, tun, phase, frame, .. } = self;
        let Phase::Leaving(departure) = phase else { return };
        let mut writer = Writer { tun, written: 0, refused: 0 };
        for _ in 0..4 * BATCH {
            let Ok(Some((from, datagram))) = departure.pipe.take(frame) else { break };
            if departure.quiet_since.is_some() {
                departure.quiet_since = Some(now);
            }
            if engine.incoming(from, datagram, now, &mut |f| writer.write(f)) == Fate::Foreign {
                engine.wire.counters.dropped_unknown_session += 1;
            }
        }
        engine.flush(&mut |frame| writer.write(frame));
        writer.count(engine);
    }

    /// Frames from the tun device.
    fn transmit(&mut self, now: Instant) -> Result<(), TunnelError> {
        let Self { engine, tun, frame, .. } = self;
        let mut bytes = 0;
        for _ in 0..TURN_FRAMES {
            let size = match tun.read(frame) {
                Ok(size) => size,
                Err(e) if is_passing(&e) => break,
                Err(e) => {
                    return Err(TunnelError::system(format!("read from {}", tun.name()))(e));
                }
            };
            engine.wire.counters.tun_read += 1;
            engine.outgoing(&mut frame[..size], now);
            bytes += size;
            if bytes >= TURN {
                break;
            }
        }
        Ok(())
    }

    fn tick(&mut self, now: Instant) -> Result<(), TunnelError> {
        if let Phase::Leaving(departure) = &self.phase
            && departure.quiet_since.is_some()
        {
            return Ok(());
        }
        self.engine.tick(now);
        self.arrive(now)?;
        if matches!(self.phase, Phase::Leaving(_) | Phase::Arriving(_)) {
            return Ok(());
        }
        if std::mem::take(&mut self.engine.moved) {
            let _ = self.jobs.send(Job::Peers(self.engine.peers.known(), None));
        }
        self.look_at_paths();
        self.rotate_if_due(now)
    }

    /// Takes the tun device, once there are sessions.
    fn arrive(&mut self, now: Instant) -> Result<(), TunnelError> {
        let Phase::Arriving(arrival) = &mut self.phase else { return Ok(()) };
        let peers = &self.engine.peers;
        let ready: Vec<_> = peers
            .ids()
            .into_iter()
            .filter_map(|id| peers.peer(id))
            .filter(|p| p.best.is_some())
            .map(|p| p.config.name.clone())
            .collect();
        arrival.live.retain(|name| !ready.contains(name));
        if !arrival.live.is_empty() && now < arrival.deadline {
            return Ok(());
        }
        if !arrival.live.is_empty() {
            tracing::warn!(peers = ?arrival.live, "no handshake with them during the upgrade");
        }
        arrival.take()?;
        let Phase::Arriving(arrival) = std::mem::replace(&mut self.phase, Phase::Alone) else {
            return Ok(());
        };
        self.phase = Phase::Arrived(arrival);
        self.engine.greet_all();
        tracing::info!("the tunnel is this process's");
        Ok(())
    }

    /// The interface's MTU follows the narrowest path.
    fn look_at_paths(&mut self) {
        let too_large = self.engine.wire.counters.dropped_too_large;
        let ids = self.engine.peers.ids();
        let turn = if too_large == self.too_large { ids.len().min(4) } else { ids.len() };
        self.too_large = too_large;
        for n in 0..turn {
            let id = ids[(self.next_path + n) % ids.len()];
            if let Some(peer) = self.engine.peers.peer_mut(id) {
                let live = peer.endpoint.filter(|_| peer.best.is_some());
                peer.path = live.and_then(|to| sys::path_mtu(to).ok());
            }
        }
        self.next_path = self.next_path.wrapping_add(turn);
        let peers = ids.iter().filter_map(|id| self.engine.peers.peer(*id));
        let inner = |path: u32, to: SocketAddr| {
            let outer = if to.is_ipv4() { UDP_IPV4 } else { UDP_IPV6 };
            path.saturating_sub(outer + OVERHEAD as u32)
        };
        let narrowest = peers.filter_map(|p| Some(inner(p.path?, p.endpoint?))).min();
        let least = LEAST_MTU.min(self.settings.mtu);
        self.set_mtu(narrowest.unwrap_or(self.mtu).clamp(least, self.settings.mtu));
    }

    fn set_mtu(&mut self, mtu: u32) {
        if mtu == self.mtu {
            return;
        }
        let socket = self.engine.wire.outer.as_fd();
        match sys::set_mtu(socket, self.tun.name(), mtu) {
            Ok(()) => tracing::info!(interface = self.tun.name(), mtu, "MTU set"),
            Err(error) => tracing::warn!(interface = self.tun.name(), mtu, %error, "MTU not set"),
        }
        // Not tried again every tenth of a second if it is refused.
        self.mtu = mtu;
    }

    fn rotate_if_due(&mut self, now: Instant) -> Result<(), TunnelError> {
        let Some(next) = self.keys.next.as_ref().map(crate::PrivateKey::public) else {
            let age = self.keys.age(SystemTime::now());
            return match self.settings.rotate_every {
                Some(every) if age >= every => self.rotate(now),
                _ => Ok(()),
            };
        };
        if !self.everybody_uses(next) {
            self.settled = None;
            return Ok(());
        }
        if now.duration_since(*self.settled.get_or_insert(now)) < SETTLING {
            return Ok(());
        }
        self.settled = None;
        self.keys.promote(SystemTime::now());
        self.state.save_keys(&self.keys)?;
        self.engine.set_keys(&self.keys)?;
        tracing::info!(key = %next, "the new key is the only one");
        Ok(())
    }

    fn everybody_uses(&mut self, key: crate::PublicKey) -> bool {
        let peers = &mut self.engine.peers;
        peers.ids().into_iter().all(|id| {
            let best = peers.peer(id).and_then(|p| p.best);
            best.and_then(|best| peers.link_mut(best)).is_none_or(|link| link.own == key)
        })
    }

    fn rotate(&mut self, now: Instant) -> Result<(), TunnelError> {
        let next = crate::PrivateKey::generate()?;
        tracing::info!(key = %next.public(), "a new key, used with each peer once it knows it");
        let mut keys = self.keys.clone();
        keys.set_next(next);
        self.state.save_keys(&keys)?;
        self.keys = keys;
        self.engine.set_keys(&self.keys)?;
        self.engine.seek_all(now);
        Ok(())
    }
}

/// What can be read.
struct Ready {
    wake: bool,
    outer: bool,
    tun: bool,
    pipe: bool,
    word: bool,
}

/// Writes frames to the tun device and counts.
struct Writer<'a> {
    tun: &'a Tun,
    written: u64,
    refused: u64,
}

impl Writer<'_> {
    fn write(&mut self, frame: &[u8]) {
        match self.tun.write(frame) {
            Ok(_) => self.written += 1,
            Err(error) => {
                tracing::debug!(%error, bytes = frame.len(), "the tun device refuses a frame");
                self.refused += 1;
            }
        }
    }

    fn count(self, engine: &mut Engine) {
        engine.wire.counters.tun_written += self.written;
        engine.wire.counters.dropped_by_tun += self.refused;
    }
}

/// Gives a datagram to the process whose session it belongs to.
fn pass_back(engine: &mut Engine, phase: &mut Phase, from: SocketAddr, datagram: &[u8]) {
    let counters = &mut engine.wire.counters;
    let (Phase::Arriving(arrival) | Phase::Arrived(arrival)) = phase else {
        counters.dropped_unknown_session += 1;
        return;
    };
    if arrival.pipe.put(from, datagram).is_ok() {
        counters.passed_back += 1;
        return;
    }
    counters.dropped_unknown_session += 1;
    match phase {
        // It has ended, as it should once nobody needs it.
        Phase::Arrived(_) => *phase = Phase::Alone,
        // It has ended too early: its part is ours at once.
        Phase::Arriving(arrival) => arrival.deadline = Instant::now(),
        Phase::Alone | Phase::Leaving(_) => {}
    }
}

/// Errors after which the next call may well work: nothing there, or what an earlier datagram met.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, Interrupted, NetworkUnreachable};
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock
            | Interrupted
            | ConnectionRefused
            | HostUnreachable
            | NetworkUnreachable
    ) || matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::ENETDOWN))
}

/// Writes files on a thread of its own, because packets must not wait for a disk.
fn keep_files(state: Arc<State>) -> Result<mpsc::Sender<Job>, TunnelError> {
    let (jobs, todo) = mpsc::channel();
    let work = move || {
        for Job::Peers(peers, reply) in todo {
            let answer = match state.save_peers(peers) {
                Ok(()) => Answer::Done,
                Err(error) => {
                    tracing::warn!(%error, "the peers are not written down");
                    Answer::Failed(error.to_string())
                }
            };
            if let Some(reply) = reply {
                let _ = reply.send(Reply::Say(answer));
            }
        }
    };
    thread::Builder::new()
        .name("state".into())
        .spawn(work)
        .map_err(TunnelError::system("start a thread"))?;
    Ok(jobs)
}
