//! Which homes this edge serves ([`crate::homes`]), where there are several edges.
//!
//! ```text
//!            lease is ours                      lease is another's
//!  (elsewhere) ───────────► served here ───────────────────────────► (elsewhere)
//!       │                        ▲                                        ▲
//!       │ its edge is silent,    │ compare-and-set: epoch + 1             │ a drain: the other
//!       └ the lease unchanged ───┘                                        └ takes the lease
//! ```
//!
//! A home has a lease, like a machine, in the same store: it says which edge serves it, at which epoch, and
//! its edge writes it anew several times a second. Another edge takes it only if it has not been written
//! for [`UNCHANGED`] *and* the kernel of its edge answers nothing: an edge whose process was killed, or
//! hangs, goes on serving, because its kernel does the work; an edge that cannot be reached from here
//! but writes its lease is alive. One that hears no host and no edge writes none.
//!
//! An edge whose lease cannot be written goes on serving until it reads that another has it. Two that
//! serve one home for a while (a partition) do no harm: hosts believe the newer epoch, so what a machine
//! says leaves by one of them; what comes in is translated the same way by both.

use super::{
    Core, Shared,
    beside::{Health, Neighbour},
    config::open_leases,
    ends::Notes,
    nat::Publics,
    outside,
};
use crate::{
    conntrack,
    exec::KernelError,
    homes::{self, EdgeAt, HomeWord, Words},
    secure::Ends,
    store::Store,
    wire::{EdgeSays, HomeStatus, Peer, TunnelEnd},
};
use identity::HostName;
use lease::{AttemptId, Cells, Epoch, LeaseStore, MachineName, Nonce, Outcome, Record};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// How often leases are looked at, and those of this edge written.
const EVERY: Duration = Duration::from_millis(200);
/// A lease that was not written for this long may be taken, with a clock that is a thousandth off.
const UNCHANGED: Duration = Duration::from_millis(1003);
/// A host that has said something within this time is heard; agents do ten times a second.
const HEARD: Duration = Duration::from_millis(500);
/// How long an edge that serves a home no more translates what still comes for it.
const GRACE: Duration = Duration::from_secs(5);

/// The other edges of a fleet.
#[derive(Clone, Debug)]
pub struct BesideConfig {
    /// This edge's name, different from the others'.
    pub name: HostName,
    /// The others, with their names.
    pub edges: Vec<EdgeAt>,
    /// The interface that public addresses are on, of whichever home is served here. Conduit adds them
    /// and takes them away.
    pub interface: String,
}

/// Where an edge is, as remembered over a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KnownEdge {
    name: String,
    #[serde(flatten)]
    peer: Peer,
    /// How it is reached by encrypted packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tunnel: Option<TunnelEnd>,
}

/// A lease as it was last seen.
struct SeenLease {
    nonce: Nonce,
    since: Instant,
}

#[derive(Default)]
struct Known {
    /// Everything is being removed.
    stopped: bool,
    words: Words,
    serving: BTreeSet<Ipv4Addr>,
    /// By name.
    edges: BTreeMap<String, Peer>,
    /// How other edges are reached by encrypted packets, by overlay address.
    tunnels: Ends,
    leases: BTreeMap<Ipv4Addr, SeenLease>,
    /// How often connections of a home have begun to come here: by a drain, or because it is served.
    arrivals: BTreeMap<Ipv4Addr, u64>,
}

/// What happened, for people.
#[derive(Default)]
pub(super) struct FrontCounts {
    pub(super) taken_over: AtomicU64,
    pub(super) given_up: AtomicU64,
    pub(super) drained: AtomicU64,
    pub(super) drains_undone: AtomicU64,
    pub(super) flows_out: AtomicU64,
    pub(super) flows_in: AtomicU64,
    pub(super) flows_failed: AtomicU64,
}

/// See the module.
pub(super) struct Fronts {
    pub(super) config: BesideConfig,
    store: Arc<dyn Cells>,
    homes: Store,
    edges: Store,
    known: Mutex<Known>,
    /// Held while it changes who serves a home. Taken before `known`, and before the edge's core.
    changing: Mutex<()>,
    pub(super) neighbours: Vec<Arc<Neighbour>>,
    /// What the tunnel here tells other edges' tunnels.
    pub(super) notes: Mutex<Notes>,
    pub(super) counts: FrontCounts,
}

fn lease_name(home: Ipv4Addr) -> MachineName {
    let name = format!("conduit-home-{}", home.to_string().replace('.', "-"));
    MachineName::new(&name).expect("digits and hyphens name a lease")
}

fn nonce() -> Result<Nonce, KernelError> {
    Nonce::random().map_err(|e| KernelError::new("make a number that nobody else has", e))
}

fn attempt() -> Result<AttemptId, KernelError> {
    AttemptId::random().map_err(|e| KernelError::new("make a number that nobody else has", e))
}

impl Fronts {
    /// Takes up what the last edge knew. `own`: this edge's home.
    pub(super) fn open(
        config: &BesideConfig,
        leases: &Path,
        state: &Path,
        this: Peer,
        own: HomeWord,
    ) -> Result<Self, KernelError> {
        let fail = |detail: String| KernelError::new("be one of several edges", detail);
        for other in &config.edges {
            let name = other.name.as_ref().ok_or_else(|| {
                fail(format!("the edge at {} needs its name: NAME=ADDRESS:PORT", other.address))
            })?;
            if *name == config.name {
                return Err(fail(format!("another one is called {name} too (--name)")));
            }
        }
        outside::prepare(&config.interface)?;
        let store = open_leases(leases)?;
        let (homes, edges) =
            (Store::open(&state.join("homes"))?, Store::open(&state.join("edges"))?);
        let mut known = Known::default();
        for word in homes.load::<HomeWord>()? {
            if word.by.overlay == this.overlay {
                known.serving.insert(word.home);
            }
            homes::hear(&mut known.words, word);
        }
        // Its addresses are what this start says.
        let (by, epoch) = known.words.get(&own.home).map_or((own.by, 0), |w| (w.by, w.epoch));
        known.words.insert(own.home, HomeWord { by, epoch, ..own });
        for edge in edges.load::<KnownEdge>()? {
            known.tunnels.extend(edge.tunnel.map(|end| (edge.peer.overlay, end)));
            known.edges.insert(edge.name, edge.peer);
        }
        known.edges.insert(config.name.to_string(), this);
        let neighbours = config.edges.iter().cloned().map(|at| Arc::new(Neighbour::new(at)));
        Ok(Self {
            store,
            homes,
            edges,
            known: Mutex::new(known),
            changing: Mutex::new(()),
            neighbours: neighbours.collect(),
            notes: Mutex::default(),
            counts: FrontCounts::default(),
            config: config.clone(),
        })
    }

    /// Whether an edge has never been one of several before.
    pub(super) fn is_new(&self) -> bool {
        self.homes.load::<HomeWord>().is_ok_and(|words| words.is_empty())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves nothing from now on. The caller holds [`Fronts::changing`].
    pub(super) fn stop(&self) {
        self.known().stopped = true;
    }

    /// Nobody else changes who serves what, while this is held.
    pub(super) fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections of a home come here: what was to be forgotten of it is not any more. The caller holds
    /// [`Fronts::changing`].
    pub(super) fn arrive(&self, home: Ipv4Addr) {
        *self.known().arrivals.entry(home).or_default() += 1;
    }

    fn arrivals(&self, home: Ipv4Addr) -> u64 {
        self.known().arrivals.get(&home).copied().unwrap_or(0)
    }

    /// What is known of homes.
    pub(super) fn words(&self) -> Vec<HomeWord> {
        self.known().words.values().cloned().collect()
    }

    pub(super) fn word(&self, home: Ipv4Addr) -> Option<HomeWord> {
        self.known().words.get(&home).cloned()
    }

    /// Where an edge is.
    pub(super) fn peer(&self, name: &str) -> Option<Peer> {
        self.known().edges.get(name).copied()
    }

    /// Notes where an edge is; true if that is news.
    pub(super) fn set_peer(&self, name: &str, peer: Peer) -> bool {
        self.known().edges.insert(name.to_owned(), peer) != Some(peer)
    }

    /// Remembers an edge over a restart.
    pub(super) fn remember(&self, name: &str, peer: Peer) -> Result<(), KernelError> {
        let edge = KnownEdge { name: name.to_owned(), peer, tunnel: self.tunnel(peer.overlay) };
        self.edges.save(peer.overlay, &edge)
    }

    /// Everybody's overlay address, this edge's included.
    pub(super) fn overlays(&self) -> Vec<Ipv4Addr> {
        self.known().edges.values().map(|peer| peer.overlay).collect()
    }

    /// Where all edges are, this one included.
    pub(super) fn peers(&self) -> Vec<Peer> {
        self.known().edges.values().copied().collect()
    }

    /// How another edge is reached by encrypted packets, as far as it has said so.
    pub(super) fn tunnel(&self, edge: Ipv4Addr) -> Option<TunnelEnd> {
        self.known().tunnels.get(&edge).cloned()
    }

    /// The same of all others.
    pub(super) fn tunnels(&self) -> Ends {
        self.known().tunnels.clone()
    }

    pub(super) fn set_tunnel(&self, edge: Ipv4Addr, end: TunnelEnd) {
        self.known().tunnels.insert(edge, end);
    }

    /// Remembers a word on a home, and over a restart.
    pub(super) fn note_word(&self, word: HomeWord) -> Result<(), KernelError> {
        self.homes.save(word.home, &word)?;
        self.known().words.insert(word.home, word);
        Ok(())
    }

    /// Whether a home is served by an edge.
    pub(super) fn is_at(&self, word: &HomeWord, name: &str) -> bool {
        self.peer(name).is_some_and(|peer| peer.overlay == word.by.overlay)
    }

    /// The homes that are served here.
    pub(super) fn serving(&self) -> Vec<Ipv4Addr> {
        self.known().serving.iter().copied().collect()
    }

    pub(super) fn neighbour(&self, name: &str) -> Option<&Arc<Neighbour>> {
        self.neighbours.iter().find(|n| n.name() == name)
    }

    fn health(&self, name: &str) -> Health {
        match self.neighbour(name) {
            _ if name == self.config.name.as_str() => Health::Alive,
            Some(neighbour) => neighbour.health(Instant::now()),
            // Nobody here can tell.
            None => Health::Unknown,
        }
    }

    /// The homes, for people.
    pub(super) fn status(&self, core: &Core) -> Vec<HomeStatus> {
        let machines = |home| {
            let of = |e: &&super::Entry| e.home.map(|h| h.edge) == Some(home);
            core.ledger.machines().filter(of).count()
        };
        self.words()
            .into_iter()
            .map(|word| {
                let here = word.name == self.config.name.as_str();
                let health = if here { "here".into() } else { self.health(&word.name).to_string() };
                HomeStatus { health, machines: machines(word.home), word }
            })
            .collect()
    }

    /// The other edges by how they are.
    pub(super) fn healths(&self) -> [(&'static str, usize); 3] {
        let now = Instant::now();
        let of = |health| self.neighbours.iter().filter(|n| n.health(now) == health).count();
        [("alive", of(Health::Alive)), ("hung", of(Health::Hung)), ("silent", of(Health::Silent))]
    }

    pub(super) fn counts(&self) -> BTreeMap<String, u64> {
        let FrontCounts {
            taken_over,
            given_up,
            drained,
            drains_undone,
            flows_out,
            flows_in,
            flows_failed,
        } = &self.counts;
        let all = [
            ("homes_taken_over", taken_over),
            ("homes_given_up", given_up),
            ("homes_drained", drained),
            ("drains_undone", drains_undone),
            ("drain_flows_out", flows_out),
            ("drain_flows_in", flows_in),
            ("drain_flows_failed", flows_failed),
        ];
        all.map(|(name, n)| (name.to_owned(), n.load(Ordering::Relaxed))).into()
    }
}

impl HomeWord {
    pub(super) fn publics(&self) -> Publics {
        Publics { v4: self.public, v6: self.public_v6, spare: self.spare.clone() }
    }
}

/// Serves what this edge is to serve, from the start and from now on.
pub(super) fn begin(shared: &Arc<Shared>) {
    let Some(fronts) = &shared.fronts else { return };
    for word in fronts.words() {
        shared.look_at_home(fronts, word.home);
        if !fronts.serving().contains(&word.home) {
            // A drain that ended with the last process, perhaps.
            shared.forget_flows(&word);
        }
    }
    let shared = shared.clone();
    crate::agent::spawn("edge-homes", move || {
        let Some(fronts) = &shared.fronts else { return };
        loop {
            thread::sleep(EVERY);
            for word in fronts.words() {
                shared.look_at_home(fronts, word.home);
            }
        }
    });
}

impl Shared {
    /// What is to be told to everybody who connects.
    pub(super) fn words(&self) -> Vec<HomeWord> {
        self.fronts.as_ref().map_or_else(Vec::new, Fronts::words)
    }

    pub(super) fn tell_homes(&self) {
        self.lines.tell_all(&EdgeSays::Homes { homes: self.words() });
    }

    /// Looks at a home's lease, and does what follows of it.
    fn look_at_home(&self, fronts: &Fronts, home: Ipv4Addr) {
        let _changing = fronts.changing();
        if let Err(error) = self.follow_lease(fronts, home) {
            tracing::warn!(%home, %error, "who serves it is left as it is");
        }
    }

    /// The caller holds [`Fronts::changing`].
    pub(super) fn follow_lease(&self, fronts: &Fronts, home: Ipv4Addr) -> Result<(), KernelError> {
        if fronts.known().stopped {
            return Ok(());
        }
        let name = lease_name(home);
        let fail = |e: lease::StoreError| KernelError::new("follow the lease of a home", e);
        let own = fronts.config.name.clone();
        let Some(record) = fronts.store.read(&name).map_err(fail)? else {
            if home != self.this.overlay {
                return Ok(());
            }
            let first = Record::first(name.clone(), own, attempt()?, nonce()?);
            fronts.store.compare_and_set(&name, None, &first).map_err(fail)?;
            return self.serve(fronts, home, first.epoch.0);
        };
        if record.owner == own {
            if fronts.known().serving.contains(&home) && !self.is_isolated(fronts) {
                let renewed = Record { nonce: nonce()?, ..record.clone() };
                // Lost: somebody else has written; it is read next time.
                fronts.store.compare_and_set(&name, Some(&record), &renewed).map_err(fail)?;
            }
            return self.serve(fronts, home, record.epoch.0);
        }
        self.yield_home(fronts, home, &record)?;
        if !self.may_take(fronts, home, &record) {
            return Ok(());
        }
        let taken = record.taken(own, attempt()?, nonce()?);
        match fronts.store.compare_and_set(&name, Some(&record), &taken).map_err(fail)? {
            Outcome::Lost(_) => Ok(()),
            Outcome::Won => {
                tracing::warn!(%home, from = %record.owner, epoch = taken.epoch.0,
                    "its edge is dead: this one serves it now");
                fronts.counts.taken_over.fetch_add(1, Ordering::Relaxed);
                self.serve(fronts, home, taken.epoch.0)
            }
        }
    }

    /// Whether nobody is heard here, no host and no edge: then this edge serves nobody either, and says
    /// so by not writing its leases.
    fn is_isolated(&self, fronts: &Fronts) -> bool {
        let now = Instant::now();
        let edges = fronts.neighbours.iter().any(|n| n.health(now) == Health::Alive);
        !edges && !self.lines.hears(now, HEARD)
    }

    /// Whether another edge's lease may be taken, because that edge is dead.
    fn may_take(&self, fronts: &Fronts, home: Ipv4Addr, record: &Record) -> bool {
        let now = Instant::now();
        let mut known = fronts.known();
        let seen =
            known.leases.entry(home).or_insert(SeenLease { nonce: record.nonce, since: now });
        if seen.nonce != record.nonce {
            *seen = SeenLease { nonce: record.nonce, since: now };
        }
        if now.saturating_duration_since(seen.since) < UNCHANGED {
            return false;
        }
        let edges = known.edges.clone();
        drop(known);
        if fronts.health(record.owner.as_str()) != Health::Silent {
            return false;
        }
        let alive: Vec<Ipv4Addr> = edges
            .iter()
            .filter(|(name, _)| fronts.health(name) == Health::Alive)
            .map(|(_, peer)| peer.overlay)
            .collect();
        homes::heir(home, &alive) == Some(self.this.overlay)
    }

    /// Serves a home, from now on or again. The caller holds [`Fronts::changing`].
    pub(super) fn serve(
        &self,
        fronts: &Fronts,
        home: Ipv4Addr,
        epoch: u64,
    ) -> Result<(), KernelError> {
        let Some(word) = fronts.word(home) else { return Ok(()) };
        let said = word.epoch == epoch && word.by == self.this;
        if said && fronts.known().serving.contains(&home) && self.is_announced(home) {
            return Ok(());
        }
        fronts.arrive(home);
        self.nat.serve(home, true)?;
        outside::take(&fronts.config.interface, word.addresses())?;
        if let Some(plane) = &self.plane {
            plane.set_front(home, &self.this, epoch)?;
        }
        let word = HomeWord { by: self.this, epoch, ..word };
        {
            let mut known = fronts.known();
            known.serving.insert(home);
            known.words.insert(home, word.clone());
        }
        self.announced().insert(home);
        self.tell_homes();
        fronts.homes.save(home, &word)?;
        tracing::info!(home = word.name, public = %word.public, epoch, "served here");
        Ok(())
    }

    /// Homes whose addresses this process has taken: after a restart it does so once more.
    fn announced(&self) -> MutexGuard<'_, BTreeSet<Ipv4Addr>> {
        self.announced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_announced(&self, home: Ipv4Addr) -> bool {
        self.announced().contains(&home)
    }

    /// No connection to a home begins here any more, and its addresses are somebody else's. The caller
    /// holds [`Fronts::changing`].
    pub(super) fn leave(&self, fronts: &Fronts, word: &HomeWord) -> Result<(), KernelError> {
        fronts.known().serving.remove(&word.home);
        self.announced().remove(&word.home);
        outside::leave(&fronts.config.interface, word.addresses())?;
        self.nat.serve(word.home, false)
    }

    /// Another edge has a home, its lease says.
    fn yield_home(
        &self,
        fronts: &Fronts,
        home: Ipv4Addr,
        record: &Record,
    ) -> Result<(), KernelError> {
        let (word, by, served) = {
            let known = fronts.known();
            let Some(word) = known.words.get(&home).cloned() else { return Ok(()) };
            let by = known.edges.get(record.owner.as_str()).copied();
            (word, by, known.serving.contains(&home))
        };
        if served {
            tracing::warn!(%home, to = %record.owner, epoch = record.epoch.0,
                "another edge serves it now: this one stops");
            fronts.counts.given_up.fetch_add(1, Ordering::Relaxed);
            self.leave(fronts, &word)?;
            self.forget_flows(&word);
        }
        let Epoch(epoch) = record.epoch;
        match by {
            Some(by) if word.by != by || word.epoch != epoch => {
                self.follow(fronts, &HomeWord { by, epoch, ..word })
            }
            _ => Ok(()),
        }
    }

    /// A home is served by another edge: what its machines say is led there.
    pub(super) fn follow(&self, fronts: &Fronts, word: &HomeWord) -> Result<(), KernelError> {
        if let Some(plane) = &self.plane {
            plane.let_edge_in(&word.by)?;
            plane.set_front(word.home, &word.by, word.epoch)?;
        }
        fronts.known().words.insert(word.home, word.clone());
        self.tell_homes();
        fronts.homes.save(word.home, word)
    }

    /// A moment later, connections of a home that is not served here any more are forgotten: they are
    /// another edge's, and would be in the way of those that come back.
    pub(super) fn forget_flows(&self, word: &HomeWord) {
        let addresses: Vec<IpAddr> = word.addresses().collect();
        let (home, weak) = (word.home, self.me.clone());
        let before = self.fronts.as_ref().map_or(0, |fronts| fronts.arrivals(home));
        crate::agent::spawn("edge-grace", move || {
            thread::sleep(GRACE);
            let Some(shared) = weak.upgrade() else { return };
            let Some(fronts) = &shared.fronts else { return };
            // Served here again meanwhile, or about to be: then they are this edge's.
            let _changing = fronts.changing();
            if fronts.arrivals(home) != before {
                return;
            }
            let ended = conntrack::taken(&addresses).and_then(|f| conntrack::ended(f.values()));
            match ended {
                Ok(done) => tracing::info!(%home, flows = done.done, "left to its edge"),
                Err(error) => tracing::warn!(%home, %error, "some connections stay"),
            }
        });
    }

    /// The lease of a home becomes this edge's: its edge has asked for it. The caller holds
    /// [`Fronts::changing`].
    pub(super) fn take_from(
        &self,
        fronts: &Fronts,
        home: Ipv4Addr,
        from: &str,
        epoch: u64,
    ) -> Result<(), KernelError> {
        let name = lease_name(home);
        let fail =
            |detail: String| KernelError::new(format!("take the lease of home {home}"), detail);
        let record = fronts.store.read(&name).map_err(|e| fail(e.to_string()))?;
        let Some(record) = record else { return Err(fail("it has none".into())) };
        if record.owner != fronts.config.name {
            if record.owner.as_str() != from || record.epoch.0 != epoch {
                return Err(fail(format!(
                    "it is edge {}'s at {}, not {from}'s at {epoch}",
                    record.owner, record.epoch.0
                )));
            }
            let taken = record.taken(fronts.config.name.clone(), attempt()?, nonce()?);
            let done = fronts.store.compare_and_set(&name, Some(&record), &taken);
            match done.map_err(|e| fail(e.to_string()))? {
                Outcome::Won => {}
                Outcome::Lost(_) => return Err(fail("somebody else was faster".into())),
            }
            return self.serve(fronts, home, taken.epoch.0);
        }
        self.serve(fronts, home, record.epoch.0)
    }
}
