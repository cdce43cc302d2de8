//! Encryption of what hosts and edges send each other: WireGuard under the overlay.
//!
//! Each host has an address of its own in the tunnel's network, made of its overlay address; the
//! vxlan device runs between these addresses instead of the underlay's. Keys are made by each host
//! in its state folder, and public ones go over the connection between agent and edge, which proves
//! who says them. The edge tells every host of all others. Edges tell each other over the connections
//! that they keep, and hosts what they have heard: a host that hears one edge knows all of them.
//!
//! | | by | keys |
//! |---|---|---|
//! | `userspace` | `conduit tunnel run`, a process of its own that outlives the agent | sessions every two minutes; the key pair by `rotate_every` or `conduit tunnel rotate`, without a packet lost |
//! | `kernel` | the kernel's WireGuard ([`kernel`]) | sessions every two minutes; a preshared key for each pair of ends by `rotate_every` or `conduit rotate` ([`pairs`]); the key pair when its host is empty |
//! | `off` | nobody | – |
//!
//! The agent may be killed at any time: the tunnel goes on with the peers that it was told last.

mod kernel;
mod pair_key;
mod pairs;
mod userspace;

pub use pair_key::Proof;
pub use pairs::Note;

use crate::{
    datapath::NetError,
    exec::KernelError,
    overlay,
    wire::{Answer, PairStatus, Peer, TunnelEnd},
};
use conduit_wg::{Ask, PeerConfig, PrivateKey, PublicKey};
use kernel::PairFiles;
use pair_key::Secret;
use pairs::Pairs;
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// The tunnel's network: 198.18.0.0/15, which no network outside of a laboratory has (RFC 2544).
const NETWORK: (Ipv4Addr, u8) = (Ipv4Addr::new(198, 18, 0, 0), 15);
/// Name of the tunnel's interface.
pub const INTERFACE: &str = "cd-wg";
/// The UDP port unless told otherwise.
pub const PORT: u16 = 7451;
/// What WireGuard adds to a packet over IPv4: 20 + 8 + 32 bytes.
const OVERHEAD: u32 = 60;
/// How often the process is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Seconds between signs of life, so that a firewall or translator before a host keeps the way open.
const KEEPALIVE: u16 = 20;

/// How packets between hosts and edges are protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Encrypt {
    /// By the kernel's WireGuard where there is one, else in user space.
    #[default]
    Auto,
    /// By the kernel's WireGuard.
    Kernel,
    /// By `conduit tunnel run`.
    Userspace,
    /// Not at all: only on a network that is trusted as a whole.
    Off,
}

/// How encryption is set up.
#[derive(Clone, Debug)]
pub struct SecureConfig {
    /// By whom.
    pub encrypt: Encrypt,
    /// The UDP port; the same at both ends of a firewall's rule.
    pub port: u16,
    /// Folder for keys and the control socket.
    pub state: PathBuf,
    /// The `conduit` command, with what stands before its subcommands.
    pub program: Vec<OsString>,
    /// How long keys are used: the key pair in user space, a pair's preshared key in the kernel.
    pub rotate_every: Option<Duration>,
}

impl SecureConfig {
    /// Without encryption.
    #[must_use]
    pub fn off() -> Self {
        let (state, program) = (PathBuf::new(), Vec::new());
        Self { encrypt: Encrypt::Off, port: PORT, state, program, rotate_every: None }
    }

    fn control(&self) -> PathBuf {
        self.state.join("tunnel.sock")
    }
}

/// The address in the tunnel of the host with an overlay address: the low 17 bits are its.
#[must_use]
pub fn address(overlay: Ipv4Addr) -> Ipv4Addr {
    let low = u32::from(overlay) & (u32::MAX >> NETWORK.1);
    Ipv4Addr::from(u32::from(NETWORK.0) | low)
}

/// By whom packets are encrypted.
enum Way {
    Kernel { key: PrivateKey, files: PairFiles },
    Userspace,
}

/// What the thread that looks after the tunnel is told.
enum Event {
    /// Another end says something of the key with it.
    Note(Ipv4Addr, Note),
    /// The way to an end (to all, if none is named) is new.
    Greet(Option<Ipv4Addr>),
    /// There are other ends.
    Ends,
    /// Preshared keys are to be changed now.
    Rotate,
}

/// Events that may wait; what comes after is said again by whoever said it.
const EVENTS: usize = 1024;

/// Sends a note to another end, or loses it.
type Post = Box<dyn Fn(Ipv4Addr, Note) + Send + Sync>;

/// Encryption at work on this host.
pub(crate) struct Secure {
    way: Way,
    config: SecureConfig,
    /// Where this host really is.
    real: Peer,
    mtu: u32,
    /// Of its own, as the next but one: whoever tells the edge of a move asks for it.
    own: Mutex<Own>,
    known: Mutex<Known>,
    /// Addresses in the tunnel that it has been told of. Of its own, so that a flip waits for nobody who
    /// tells it.
    reached: Mutex<BTreeSet<Ipv4Addr>>,
    told: Condvar,
    events: SyncSender<Event>,
    post: OnceLock<Post>,
}

/// How this end is known.
#[derive(Default)]
struct Own {
    keys: Vec<PublicKey>,
    /// When they became these.
    since: u64,
}

struct Known {
    peers: Ends,
    /// The tunnel has taken them.
    told: bool,
    /// The preshared keys, in the kernel.
    pairs: Option<Pairs>,
    /// Those that the kernel has.
    installed: BTreeMap<Ipv4Addr, Option<Secret>>,
}

/// Who is reached how by encrypted packets, by overlay address.
pub(crate) type Ends = BTreeMap<Ipv4Addr, TunnelEnd>;

/// What several edges say, as one: of two words on one end the newer one.
pub(crate) fn newest(words: impl IntoIterator<Item = (Ipv4Addr, TunnelEnd)>) -> Ends {
    let mut ends = Ends::new();
    for (overlay, end) in words {
        if ends.get(&overlay).is_none_or(|known| known.since < end.since) {
            ends.insert(overlay, end);
        }
    }
    ends
}

/// Whether a list of keys can be an end's: one pair, or two while they change.
pub(crate) fn check_keys(end: &TunnelEnd) -> Result<(), String> {
    match end.keys.len() {
        1 | 2 => Ok(()),
        other => Err(format!("{other} keys are not one or two")),
    }
}

/// Leaves ends out that claim somebody else's key, so that all others are still reached: whoever was
/// known by it before has it.
fn without_claims(ends: Ends, before: &Ends) -> Ends {
    let owns = |overlay: &Ipv4Addr, end: &TunnelEnd| {
        let known = before.get(overlay);
        known.is_some_and(|known| end.keys.iter().any(|key| known.keys.contains(key)))
    };
    let (first, then): (Vec<_>, Vec<_>) =
        ends.into_iter().partition(|(overlay, end)| owns(overlay, end));
    let mut taken = BTreeSet::new();
    let mut sound = |(overlay, end): &(Ipv4Addr, TunnelEnd)| {
        let sound = check_keys(end).is_ok() && end.keys.iter().all(|key| taken.insert(*key));
        if !sound {
            tracing::warn!(%overlay, "its keys are another's: nothing is sent there");
        }
        sound
    };
    first.into_iter().chain(then).filter(&mut sound).collect()
}

impl Secure {
    /// Sets encryption up as `config` says; `None` if it is off. `this` becomes where the host is
    /// within the tunnel. Must be called in the host's network namespace.
    pub(crate) fn open(
        config: &SecureConfig,
        this: &mut Peer,
    ) -> Result<Option<Arc<Self>>, KernelError> {
        let by_kernel = || {
            let (key, files) = (kernel::own_key(&config.state)?, PairFiles::of(&config.state));
            Ok(Way::Kernel { key, files })
        };
        let way = match config.encrypt {
            Encrypt::Off => return Ok(None),
            Encrypt::Userspace => Way::Userspace,
            Encrypt::Kernel => kernel::can().and_then(|()| by_kernel())?,
            Encrypt::Auto => match kernel::can() {
                Ok(()) => by_kernel()?,
                Err(error) => {
                    tracing::info!(%error, "packets are encrypted in user space");
                    Way::Userspace
                }
            },
        };
        let mtu = overlay::underlay_mtu(this.underlay.into())?.saturating_sub(OVERHEAD);
        let mtu = mtu.min(65_000);
        let mut pairs = None;
        if let Way::Kernel { key, files } = &way {
            let known = pairs.insert(Pairs::new(this.overlay, key.clone(), config.rotate_every));
            for (at, saved) in files.load() {
                known.restore(at, saved, now_ms());
            }
        }
        let (peers, installed) = (Ends::new(), BTreeMap::new());
        let known = Known { peers, told: false, pairs, installed };
        let (events, inbox) = mpsc::sync_channel(EVENTS);
        let secure = Arc::new(Self {
            way,
            config: config.clone(),
            real: *this,
            mtu,
            own: Mutex::default(),
            known: Mutex::new(known),
            reached: Mutex::default(),
            told: Condvar::new(),
            events,
            post: OnceLock::new(),
        });
        secure.look()?;
        *secure.reached() = secure.remembered();
        let looking = Arc::downgrade(&secure);
        crate::agent::spawn("secure", move || Self::look_after(&looking, &inbox));
        this.underlay = address(this.overlay);
        Ok(Some(secure))
    }

    /// Looks after the tunnel for as long as somebody has it.
    fn look_after(looking: &Weak<Self>, inbox: &mpsc::Receiver<Event>) {
        let mut look_at = Instant::now() + LOOK;
        loop {
            let event = match inbox.recv_timeout(look_at.saturating_duration_since(Instant::now()))
            {
                Ok(event) => Some(event),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let Some(secure) = looking.upgrade() else { return };
            if Instant::now() >= look_at {
                if let Err(error) = secure.look() {
                    tracing::warn!(%error, "the tunnel is not well");
                }
                look_at = Instant::now() + LOOK;
            }
            // What waits is taken together: one file, one change of the kernel.
            let events = event.into_iter().chain(std::iter::from_fn(|| inbox.try_recv().ok()));
            if let Err(error) = secure.agree(events.take(EVENTS)) {
                tracing::warn!(%error, "preshared keys are behind");
            }
        }
    }

    /// How notes get to other ends. Set once, before anything is heard.
    pub(crate) fn set_post(&self, post: impl Fn(Ipv4Addr, Note) + Send + Sync + 'static) {
        let _ = self.post.set(Box::new(post));
        self.greet(None);
    }

    /// Another end says something of the key with it; `from` is who really said it.
    pub(crate) fn hear(&self, from: Ipv4Addr, note: Note) {
        self.notify(Event::Note(from, note));
    }

    /// The way to an end is new; to all, if none is named.
    pub(crate) fn greet(&self, at: Option<Ipv4Addr>) {
        self.notify(Event::Greet(at));
    }

    fn notify(&self, event: Event) {
        if matches!(self.way, Way::Kernel { .. }) {
            let _ = self.events.try_send(event);
        }
    }

    /// Changes keys now: in user space the key pair, in the kernel the preshared key of every pair.
    pub(crate) fn rotate(&self) -> Result<(), KernelError> {
        match self.way {
            Way::Kernel { .. } => self
                .events
                .try_send(Event::Rotate)
                .map_err(|e| KernelError::new("change preshared keys", e)),
            Way::Userspace => conduit_wg::tell(&self.config.control(), &Ask::Rotate)
                .map_err(|e| KernelError::new("change the tunnel's keys", e)),
        }
    }

    /// What was heard, and that time passes: written down first, then told to the kernel, then said.
    fn agree(&self, events: impl Iterator<Item = Event>) -> Result<(), KernelError> {
        let Way::Kernel { files, .. } = &self.way else { return Ok(()) };
        let now = now_ms();
        let mut known = self.known();
        let Some(pairs) = &mut known.pairs else { return Ok(()) };
        for event in events {
            match event {
                Event::Note(from, note) => pairs.hear(from, &note, now),
                Event::Greet(at) => pairs.greet(at),
                Event::Rotate => pairs.rotate(),
                Event::Ends => {}
            }
        }
        pairs.tick(now);
        for (at, file) in pairs.files() {
            files.put(at, &file)?;
        }
        pairs.saved();
        self.install(&mut known, now)?;
        let out = known.pairs.as_mut().map(Pairs::take_out).unwrap_or_default();
        drop(known);
        if let Some(post) = self.post.get() {
            for (to, note) in out {
                post(to, note);
            }
        }
        Ok(())
    }

    /// Gives the kernel the preshared keys that have changed.
    fn install(&self, known: &mut Known, now: u64) -> Result<(), KernelError> {
        let Known { pairs: Some(pairs), peers, installed, told: true, .. } = known else {
            return Ok(());
        };
        for (at, has) in installed.iter_mut() {
            let secret = pairs.secret(*at, now);
            if secret != *has
                && let Some(key) = peers.get(at).and_then(|end| end.keys.first())
            {
                kernel::set_secret(key, secret)?;
                *has = secret;
            }
        }
        Ok(())
    }

    /// How the preshared keys are; nothing in user space.
    pub(crate) fn pairs(&self) -> Vec<PairStatus> {
        if matches!(self.way, Way::Userspace) {
            return Vec::new();
        }
        let handshakes = kernel::handshakes();
        let (known, now) = (self.known(), now_ms());
        let states = known.pairs.iter().flat_map(Pairs::states);
        states
            .map(|(peer, key, state)| PairStatus {
                peer,
                generation: state.generation,
                age: state.since.map(|since| now.saturating_sub(since) / 1000),
                changing: state.changing,
                handshake: handshakes.get(&key).map(|at| (now / 1000).saturating_sub(*at)),
            })
            .collect()
    }

    /// What others must know to reach this host; changes when its keys do.
    pub(crate) fn this(&self) -> TunnelEnd {
        let endpoint = SocketAddr::from((self.real.underlay, self.config.port));
        let own = self.own();
        TunnelEnd { keys: own.keys.clone(), endpoint, since: own.since }
    }

    /// Tells the tunnel who is where.
    pub(crate) fn set_peers(&self, peers: Ends) -> Result<(), KernelError> {
        self.set_peers_by(|| peers)
    }

    /// Likewise; `peers` is asked while nobody else sets them.
    pub(crate) fn set_peers_by(&self, peers: impl FnOnce() -> Ends) -> Result<(), KernelError> {
        let mut known = self.known();
        let peers = without_claims(peers(), &known.peers);
        if known.peers != peers {
            known.peers = peers;
            known.told = false;
            let Known { pairs, peers, .. } = &mut *known;
            if let Some(pairs) = pairs {
                let first = |(at, end): (&Ipv4Addr, &TunnelEnd)| Some((*at, *end.keys.first()?));
                pairs.set_ends(peers.iter().filter_map(first));
            }
            let told = self.tell_now(&mut known);
            self.notify(Event::Ends);
            told?;
        }
        Ok(())
    }

    fn tell_now(&self, known: &mut Known) -> Result<(), KernelError> {
        known.installed = self.tell(known)?;
        known.told = true;
        *self.reached() = known.peers.keys().copied().map(address).collect();
        self.told.notify_all();
        Ok(())
    }

    fn reached(&self) -> MutexGuard<'_, BTreeSet<Ipv4Addr>> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the tunnel knows an end; false if it does not in time. What is sent before is dropped,
    /// and what is sent from then on waits for a session.
    pub(crate) fn await_end(&self, overlay: Ipv4Addr, limit: Duration) -> bool {
        let inside = address(overlay);
        let unknown = |reached: &mut BTreeSet<Ipv4Addr>| !reached.contains(&inside);
        let waited = self.told.wait_timeout_while(self.reached(), limit, unknown);
        waited.unwrap_or_else(PoisonError::into_inner).0.contains(&inside)
    }

    /// The addresses that a tunnel remembers of an earlier agent.
    fn remembered(&self) -> BTreeSet<Ipv4Addr> {
        match self.way {
            Way::Userspace => {
                let peers = conduit_wg::status(&self.config.control()).map(|status| status.peers);
                let overlay = |peer: conduit_wg::PeerStatus| peer.config.name.parse().ok();
                peers.into_iter().flatten().filter_map(overlay).map(address).collect()
            }
            Way::Kernel { .. } => kernel::remembered(),
        }
    }

    /// How, for people.
    pub(crate) fn describe(&self) -> &'static str {
        match self.way {
            Way::Kernel { .. } => "encrypted by the kernel's WireGuard",
            Way::Userspace => "encrypted by WireGuard in user space",
        }
    }

    /// What the tunnel counts, and how old its keys are; nothing if the one in user space does not answer.
    pub(crate) fn read_figures(&self, readings: &mut scrape::Readings) {
        match self.way {
            Way::Userspace => {
                if let Ok(status) = conduit_wg::status(&self.config.control()) {
                    crate::metrics::encrypted(readings, &status);
                }
            }
            Way::Kernel { .. } => {
                let pairs = self.pairs();
                let changes = self.known().pairs.as_ref().map_or(0, Pairs::changes);
                crate::metrics::encrypted_by_the_kernel(
                    readings,
                    (&pairs, changes),
                    kernel::transfer(),
                );
            }
        }
    }

    /// Takes the tunnel away.
    pub(crate) fn remove(&self) -> Result<(), KernelError> {
        match self.way {
            Way::Kernel { .. } => kernel::remove(),
            Way::Userspace => conduit_wg::tell(&self.config.control(), &Ask::Stop { remove: true })
                .map_err(|e| KernelError::new("remove the tunnel", e)),
        }
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is the tunnel there? Makes it, if not; notes its keys.
    fn look(&self) -> Result<(), KernelError> {
        let keys = match self.way {
            Way::Kernel { ref key, .. } => {
                let made = kernel::ensure(self.real.overlay, self.mtu)?;
                if made {
                    self.tell_now(&mut self.known())?;
                } else if self.own().keys.is_empty() {
                    kernel::set_key(key)?;
                }
                vec![key.public()]
            }
            Way::Userspace => match conduit_wg::status(&self.config.control()) {
                Ok(status) => status.keys,
                Err(_) => self.start()?,
            },
        };
        let mut own = self.own();
        if own.keys != keys {
            tracing::info!(?keys, "keys of this host's tunnel");
            let since = now_ms().max(own.since + 1);
            *own = Own { keys, since };
        }
        drop(own);
        let mut known = self.known();
        // It may have been between two processes when it was told. Before anybody has said who is where,
        // it keeps what it remembers.
        if !known.told && !known.peers.is_empty() {
            self.tell_now(&mut known)?;
        }
        Ok(())
    }

    /// The peers, as the tunnel takes them; returns which preshared keys it has then.
    fn tell(&self, known: &Known) -> Result<BTreeMap<Ipv4Addr, Option<Secret>>, KernelError> {
        let others = || known.peers.iter().filter(|(overlay, _)| **overlay != self.real.overlay);
        let peer = |(overlay, end): (&Ipv4Addr, &TunnelEnd)| PeerConfig {
            name: overlay.to_string(),
            keys: end.keys.clone(),
            allowed: vec![std::net::IpAddr::from(address(*overlay)).into()],
            endpoint: Some(end.endpoint),
            keepalive: Some(KEEPALIVE),
        };
        match &self.way {
            Way::Userspace => {
                let peers: Vec<PeerConfig> = others().map(peer).collect();
                // One that was told nothing yet keeps what it remembers.
                if !peers.is_empty() {
                    conduit_wg::tell(&self.config.control(), &Ask::Peers { peers })
                        .map_err(|e| KernelError::new("tell the tunnel its peers", e))?;
                }
                Ok(BTreeMap::new())
            }
            Way::Kernel { key, .. } => {
                let now = now_ms();
                let secret = |at| known.pairs.as_ref().and_then(|pairs| pairs.secret(at, now));
                let secrets: BTreeMap<_, _> = others().map(|(at, _)| (*at, secret(*at))).collect();
                let peers: Vec<_> =
                    others().map(|(at, end)| (peer((at, end)), secrets[at])).collect();
                let file = self.config.state.join("wg.conf");
                kernel::set_peers(&file, (key, self.config.port), &peers)?;
                Ok(secrets)
            }
        }
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// [`Secure::rotate`], as it is asked for at an agent's or edge's socket.
pub(crate) fn rotate(secure: Option<&Secure>) -> Answer {
    let fail = |KernelError { operation, detail }| {
        Answer::Failed(NetError::Failed { machine: String::new(), operation, detail })
    };
    match secure.map(Secure::rotate) {
        Some(Ok(())) => Answer::Done,
        Some(Err(error)) => fail(error),
        None => fail(KernelError::new("change keys", "packets are not encrypted here")),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
