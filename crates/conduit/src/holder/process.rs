//! The process: one thread, one loop. It takes frames out of the hold tap, asks the map where they may
//! go, writes them back, and answers who connects.

use super::{
    INTERFACE, Limits, Stats,
    early::Early,
    frame::{self, Kind},
    protocol::{Answer, Ask, Channel, VERSION},
    queue::{Full, Queues},
    take_over::{self, Luggage},
};
use crate::{
    exec::{self, KernelError},
    netlink::{Netlink, interface_index},
    overlay::no_ipv6,
    sys::rights,
    tap,
};
use conduit_bpf::{Belief, HeldView, Key, Way};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Write},
    ops::Bound::{Excluded, Unbounded},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Frames that the hold tap itself keeps while this process is not running.
const TAP_QUEUE: u32 = 8192;
/// Bytes before each frame in the hold tap.
const HEADER: usize = 10;
/// Frames taken in, or given back to one machine, in one round of the loop.
const BATCH: usize = 256;
/// Between two rounds while frames wait.
const TICK: Duration = Duration::from_millis(1);
/// Between two rounds otherwise.
const REST: Duration = Duration::from_millis(250);
/// Machines on hold that are looked at in one round.
const LOOKS: usize = 256;
/// A frame that was counted is in the tap's queue after this, if it ever is.
const IN_FLIGHT: Duration = Duration::from_millis(2);
/// Times that missing frames may hide behind new ones before the way is opened all the same.
const PATIENCE: u32 = 50;
/// Without anybody connected for this long, and with nothing on hold, it ends.
const ALONE: Duration = Duration::from_secs(60);
/// How long an answer may wait to be taken.
const ANSWER_LIMIT: Duration = Duration::from_millis(200);
const CLIENTS: usize = 64;
/// How long the interface may take to run.
const RUNNING_LIMIT: Duration = Duration::from_secs(3);
/// A holder that was killed keeps tap and lock until it is gone.
const GONE_LIMIT: Duration = Duration::from_secs(2);

/// A machine that has, or may have, frames waiting.
#[derive(Default)]
struct Follow {
    /// Frames of it that were taken out of the tap.
    taken: u64,
    /// The kernel counts frames that are not here: since when, how many, and `taken` at that time.
    missing: Option<(Instant, u32, u64)>,
    /// Times that the question stayed open.
    tries: u32,
}

/// See the module.
pub(super) struct Holder {
    pins: PathBuf,
    view: Option<HeldView>,
    tap: File,
    index: u32,
    lock: OwnedFd,
    socket: PathBuf,
    listener: OwnedFd,
    clients: Vec<Channel>,
    limits: Limits,
    queues: Queues,
    /// What came before its sender was known to have the machine.
    early: Early,
    /// Machines that somebody has: their frames are being given back.
    open: BTreeMap<Key, Follow>,
    /// Machines that nobody has.
    waiting: BTreeMap<Key, Follow>,
    cursor: Option<Key>,
    next_look: Instant,
    alone_since: Option<Instant>,
    stats: Stats,
    scratch: Vec<u8>,
}

enum End {
    Asked,
    HandedOver,
}

impl Holder {
    /// A first holder. `inherited`: a descriptor of the hold tap that somebody kept. Must be called in
    /// the network namespace.
    pub(super) fn start(
        pins: PathBuf,
        socket: PathBuf,
        limits: Limits,
        inherited: Option<OwnedFd>,
    ) -> Result<Self, KernelError> {
        let lock = take_over::lock(&socket, GONE_LIMIT)?;
        let tap = match inherited {
            Some(tap) => tap,
            None => open_tap()?,
        };
        Self::with(
            pins,
            socket,
            limits,
            Luggage { tap, lock, frames: Vec::new(), stats: Stats::default() },
        )
    }

    /// A holder with what another one had.
    pub(super) fn with(
        pins: PathBuf,
        socket: PathBuf,
        limits: Limits,
        luggage: Luggage,
    ) -> Result<Self, KernelError> {
        let index = prepare_tap(&luggage.tap)?;
        let listener = listen(&socket)?;
        let now = Instant::now();
        let mut this = Self {
            pins,
            view: None,
            tap: File::from(luggage.tap),
            index,
            lock: luggage.lock,
            socket,
            listener,
            clients: Vec::new(),
            limits,
            queues: Queues::new(limits),
            early: Early::default(),
            open: BTreeMap::new(),
            waiting: BTreeMap::new(),
            cursor: None,
            next_look: now,
            alone_since: Some(now),
            stats: luggage.stats,
            scratch: vec![0; 256 * 1024],
        };
        for (at, frame) in luggage.frames {
            this.keep(&frame, at);
        }
        this.look_again();
        Ok(this)
    }

    /// Runs to its end.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            let busy = !self.open.is_empty() || !self.waiting.is_empty() || !self.early.is_empty();
            let (tap, called) = self.wait(if busy { TICK } else { REST })?;
            let now = Instant::now();
            let dry = if tap { self.take_in(now)? } else { true };
            self.round(now, dry);
            match self.answer_all(&called) {
                Some(End::HandedOver) => return Ok(()),
                Some(End::Asked) => return self.remove(),
                None => {}
            }
            if self.is_over(now) {
                return self.remove();
            }
        }
    }

    /// Waits for something to do: whether the tap has frames, and which clients have spoken.
    fn wait(&mut self, limit: Duration) -> io::Result<(bool, Vec<bool>)> {
        let mut all = vec![
            PollFd::new(self.tap.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        all.extend(self.clients.iter().map(|c| PollFd::new(c.as_fd(), PollFlags::POLLIN)));
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut all, limit) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ready: Vec<bool> = all.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        drop(all);
        let called = ready[2..].to_vec();
        if ready[1] {
            self.welcome();
        }
        Ok((ready[0], called))
    }

    fn welcome(&mut self) {
        let Ok(socket) = rights::accept(self.listener.as_fd()) else { return };
        let client = Channel::of(socket);
        if self.clients.len() < CLIENTS && client.set_limit(ANSWER_LIMIT).is_ok() {
            self.clients.push(client);
        } else {
            tracing::warn!(limit = CLIENTS, "too many connections, one refused");
        }
    }

    /// Takes frames out of the tap; true if none is left there.
    fn take_in(&mut self, now: Instant) -> io::Result<bool> {
        for _ in 0..BATCH {
            let mut scratch = std::mem::take(&mut self.scratch);
            let read = self.tap.read(&mut scratch);
            if let Ok(size) = read {
                self.stats.taken += 1;
                self.keep(&scratch[..size], now);
            }
            self.scratch = scratch;
            match read {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(false)
    }

    fn keep(&mut self, bytes: &[u8], at: Instant) {
        let (key, class) = match frame::read(bytes, HEADER) {
            Some((key, Kind::Held(class))) => (key, class),
            Some((key, Kind::Early(sender))) => {
                let taken = self.early.push(key, sender, bytes.into(), at);
                self.stats.early_lost += u64::from(!taken);
                return;
            }
            None => {
                self.stats.stray += 1;
                return;
            }
        };
        let follow = match self.open.get_mut(&key) {
            Some(follow) => follow,
            None => self.waiting.entry(key).or_default(),
        };
        follow.taken += 1;
        let full = match self.queues.push(key, class, bytes.into(), at) {
            Ok(()) => return,
            Err(full) => full,
        };
        match full {
            Full::Machine => self.stats.machine_full += 1,
            Full::Network => self.stats.network_full += 1,
            Full::Total => self.stats.total_full += 1,
        }
        self.never_comes(key, 1);
    }

    /// Tells the kernel that frames which it counts will not come back.
    fn never_comes(&self, key: Key, frames: u64) {
        let Some(view) = &self.view else { return };
        let frames = u32::try_from(frames).unwrap_or(u32::MAX);
        if let Err(error) = view.lost(key, frames) {
            tracing::warn!(%key, %error, "the kernel still waits for frames that are gone");
        }
    }

    /// Opens the map (again), and follows every address that the kernel counts frames of.
    fn look_again(&mut self) {
        match HeldView::open(&self.pins) {
            Ok(view) => {
                match view.waiting() {
                    Ok(keys) => {
                        for key in keys {
                            if !self.open.contains_key(&key) {
                                self.waiting.entry(key).or_default();
                            }
                        }
                    }
                    Err(error) => tracing::warn!(%error, "frames may wait for nobody"),
                }
                self.view = Some(view);
            }
            Err(error) => tracing::warn!(%error, "frames wait until the data path is there"),
        }
    }

    /// Gives back what came early and is believed by now.
    fn give_early(&mut self, now: Instant) {
        let Self { early, view: Some(view), tap, stats, .. } = self else { return };
        let believes = |key, sender: super::early::Sender| {
            view.believes(key, sender.outer, sender.wire).unwrap_or(Belief::NotYet)
        };
        stats.early_lost += early.round(now, believes, |bytes| match tap.write_all(bytes) {
            Ok(()) => stats.given += 1,
            Err(error) => {
                tracing::warn!(%error, bytes = bytes.len(), "an early frame was refused");
                stats.refused += 1;
            }
        });
    }

    /// Gives back what may go, and looks whether more may.
    fn round(&mut self, now: Instant, dry: bool) {
        if !self.early.is_empty() {
            self.give_early(now);
        }
        if now >= self.next_look {
            self.next_look = now + TICK;
            self.look(now);
        }
        let open: Vec<Key> = self.open.keys().copied().collect();
        for key in open {
            self.give(key, now, dry);
        }
    }

    /// Looks at some of the machines that wait, in turns.
    fn look(&mut self, now: Instant) {
        let from = self.cursor.map_or(Unbounded, Excluded);
        let mut keys: Vec<Key> =
            self.waiting.range((from, Unbounded)).map(|(key, _)| *key).take(LOOKS).collect();
        self.cursor = if keys.len() < LOOKS { None } else { keys.last().copied() };
        if keys.len() < LOOKS && from != Unbounded {
            let rest = LOOKS - keys.len();
            keys.extend(self.waiting.keys().copied().take(rest));
        }
        for key in keys {
            let Some(view) = &self.view else { return };
            let (way, counted) = match view.look(key) {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(%error, "its frames wait");
                    continue;
                }
            };
            match way {
                Way::Open => {
                    let follow = self.waiting.remove(&key).unwrap_or_default();
                    self.open.insert(key, follow);
                }
                Way::Wait => {
                    let old = self.queues.expire(key, now);
                    if old > 0 {
                        self.stats.expired += old;
                        self.never_comes(key, old);
                    } else if counted == 0 && self.queues.len(key) == 0 {
                        self.leave(key);
                    }
                }
                Way::Gone => self.throw_away(key),
            }
        }
    }

    fn throw_away(&mut self, key: Key) {
        let gone = self.queues.discard(key);
        self.stats.gone += gone;
        self.never_comes(key, gone);
        self.leave(key);
    }

    fn leave(&mut self, key: Key) {
        self.queues.close(key);
        self.waiting.remove(&key);
        self.open.remove(&key);
    }

    /// Gives a machine what it may have now.
    fn give(&mut self, key: Key, now: Instant, dry: bool) {
        let Some(view) = &self.view else { return };
        match view.look(key) {
            Ok((Way::Open, _)) => {}
            Ok((Way::Wait, _)) => {
                let follow = self.open.remove(&key).unwrap_or_default();
                self.waiting.insert(key, follow);
                return;
            }
            Ok((Way::Gone, _)) => return self.throw_away(key),
            Err(error) => return tracing::warn!(%error, "its frames wait"),
        }
        for _ in 0..BATCH {
            let Some(bytes) = self.queues.take(key, now) else { break };
            match self.tap.write_all(&bytes) {
                Ok(()) => self.stats.given += 1,
                Err(error) => {
                    tracing::warn!(%key, %error, bytes = bytes.len(), "a held frame was refused");
                    self.stats.refused += 1;
                    self.never_comes(key, 1);
                }
            }
        }
        if self.queues.len(key) > 0 {
            return;
        }
        let Some(Ok((_, counted))) = self.view.as_ref().map(|view| view.look(key)) else { return };
        if counted == 0 {
            return self.leave(key);
        }
        self.miss(key, counted, now, dry);
    }

    /// The kernel counts frames, and there are none here. They are in the tap's queue; or they were lost
    /// in it, or with a holder that was killed, and the way would stay closed.
    fn miss(&mut self, key: Key, counted: u32, now: Instant, dry: bool) {
        let Some(follow) = self.open.get_mut(&key) else { return };
        let Some((since, missing, taken)) = follow.missing else {
            follow.missing = Some((now, counted, follow.taken));
            return;
        };
        if !dry || now.saturating_duration_since(since) < IN_FLIGHT {
            return;
        }
        // The queue is in order: what was in it then has come by now. Some of what came is younger.
        let came = u32::try_from(follow.taken - taken).unwrap_or(u32::MAX);
        follow.missing = None;
        follow.tries += 1;
        let never = if follow.tries > PATIENCE { counted } else { missing.saturating_sub(came) };
        if never > 0 {
            self.stats.lost += u64::from(never);
            tracing::warn!(%key, frames = never, "held frames were lost: the hold tap was full, or a \
                holder was killed");
            self.never_comes(key, never.into());
        }
    }

    fn stats(&self) -> Stats {
        let (held, early) = (self.queues.total(), self.early.load());
        let (frames, bytes) = (held.frames + early.frames, held.bytes + early.bytes);
        let machines = (self.open.len() + self.waiting.len()) as u64;
        Stats { machines, frames, bytes, ..self.stats }
    }

    /// Answers the clients that have spoken.
    fn answer_all(&mut self, called: &[bool]) -> Option<End> {
        let mut clients = std::mem::take(&mut self.clients).into_iter();
        let mut kept = Vec::new();
        let mut end = None;
        for &called in called {
            let Some(client) = clients.next() else { break };
            match called.then(|| self.answer(&client)) {
                None | Some(Ok(None)) => kept.push(client),
                Some(Ok(Some(ending))) => end = Some(ending),
                Some(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                Some(Err(error)) => tracing::info!(%error, "a connection ended"),
            }
        }
        // Those that came while we waited.
        kept.extend(clients);
        self.clients = kept;
        end
    }

    fn answer(&mut self, client: &Channel) -> io::Result<Option<End>> {
        let Some((ask, _)) = client.hear::<Ask>()? else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let refuse = |detail: &str| Answer::Refused { detail: detail.to_owned() };
        match ask {
            Ask::Attach { version } | Ask::HandOver { version } if version != VERSION => {
                let detail = format!("this holder speaks version {VERSION}, not {version}");
                client.say(&refuse(&detail), &[])?;
            }
            Ask::Attach { .. } => {
                // Whoever comes may have made the data path anew.
                self.look_again();
                let answer = Answer::Attached {
                    version: VERSION,
                    build: env!("CARGO_PKG_VERSION").to_owned(),
                    pid: std::process::id(),
                    index: self.index,
                };
                client.say(&answer, &[self.tap.as_fd()])?;
            }
            Ask::Stats => {
                client.say(&Answer::Stats { stats: self.stats(), limits: self.limits }, &[])?;
            }
            Ask::HandOver { .. } => return self.hand_over(client),
            Ask::Taken => client.say(&refuse("nothing was handed over"), &[])?,
            Ask::Stop => {
                client.say(&Answer::Done, &[])?;
                return Ok(Some(End::Asked));
            }
        }
        Ok(None)
    }

    /// Gives everything to a successor. Until it has said that it has all, this one stays the holder.
    fn hand_over(&mut self, client: &Channel) -> io::Result<Option<End>> {
        let mut frames = self.queues.drain(Instant::now());
        frames.extend(self.early.drain(Instant::now()));
        let stats = Stats { handed_over: self.stats.handed_over + 1, ..self.stats() };
        let given = take_over::give(client, self.tap.as_fd(), self.lock.as_fd(), stats, &frames);
        let Err(error) = given else { return Ok(Some(End::HandedOver)) };
        tracing::warn!(%error, frames = frames.len(), "a successor did not take over");
        // It may have put its own socket in place of ours.
        match listen(&self.socket) {
            Ok(listener) => self.listener = listener,
            Err(error) => tracing::warn!(%error, "this holder cannot be reached"),
        }
        let now = Instant::now();
        for (age, frame) in frames {
            // They are in no other order than they were, and fit as they did.
            self.keep(&frame, now.checked_sub(age).unwrap_or(now));
        }
        Ok(None)
    }

    fn is_over(&mut self, now: Instant) -> bool {
        if !self.clients.is_empty() {
            self.alone_since = None;
            return false;
        }
        let since = *self.alone_since.get_or_insert(now);
        let Some(view) = &self.view else {
            return now.saturating_duration_since(since) > ALONE;
        };
        if view.removed() {
            tracing::info!("the data path was removed");
            return true;
        }
        if self.queues.total().frames > 0 || !self.early.is_empty() {
            return false;
        }
        // With the state folder gone, nobody will find it.
        let lost = !self.socket.exists();
        let alone = now.saturating_duration_since(since) > ALONE;
        lost || alone && view.is_idle().unwrap_or(false)
    }

    /// Ends for good: the tap goes too, as soon as nobody else has it open.
    fn remove(self) -> io::Result<()> {
        tap::let_go(self.tap.as_fd())?;
        match std::fs::remove_file(&self.socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

/// Listens in place of whoever did: who connects meets the old one or the new one.
fn listen(socket: &Path) -> Result<OwnedFd, KernelError> {
    let fail = |e: io::Error| KernelError::new(format!("listen on {}", socket.display()), e);
    let beside = socket.with_extension("new");
    match std::fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let listener = rights::listen_at(&beside).map_err(fail)?;
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    std::fs::rename(&beside, socket).map_err(fail)?;
    Ok(listener)
}

/// Opens the hold tap; a holder that was killed may have it for a moment.
fn open_tap() -> Result<OwnedFd, KernelError> {
    let deadline = Instant::now() + GONE_LIMIT;
    loop {
        match tap::open_persistent(INTERFACE) {
            Ok(tap) => return Ok(tap.fd),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(KernelError::new(format!("open {INTERFACE}"), e)),
        }
    }
}

/// Makes the tap hold what comes. One that is so already is left alone.
fn prepare_tap(tap: &OwnedFd) -> Result<u32, KernelError> {
    let header = tap::header_size(tap.as_fd())
        .map_err(|e| KernelError::new(format!("use {INTERFACE}"), e))?;
    if header != HEADER {
        let detail = format!("its frames have a header of {header} bytes, not {HEADER}");
        return Err(KernelError::new(format!("use {INTERFACE}"), detail));
    }
    exec::sysctl(&format!("net/ipv6/conf/{INTERFACE}/disable_ipv6"), "1").or_else(no_ipv6)?;
    // Large frames come in here whatever the MTU; it must be no less than that of any tunnel.
    let script = format!("link set dev {INTERFACE} mtu 65521 txqueuelen {TAP_QUEUE} up\n");
    exec::run("ip", &["-batch", "-"], &script)?;
    let index = interface_index(INTERFACE)?;
    Netlink::open()?.wait_running(index, RUNNING_LIMIT)?;
    Ok(index)
}

/// Where a holder is found, below an agent's or edge's state folder.
pub(super) fn socket_in(state: &Path) -> PathBuf {
    state.join("hold.sock")
}
