//! An agent with several edges: it tells all of them everything, and an answer counts when all that can
//! be reached have given theirs. Which of them a machine's frames go to is its home's business
//! ([`crate::homes`]).

use super::{Core, Link, LinkState, Shared};
use crate::{
    book::{EdgeView, Place, Record},
    datapath::{MachineKey, MachineNet, NetError},
    exec::KernelError,
    homes::{self, EdgeAt, Home, HomeWord},
    host::HostNet,
    plane::PathKind,
    secure::{self, Ends, Note},
    store::Store,
    wire::HomeStatus,
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::Ipv4Addr,
    sync::Arc,
};

/// Notes that may wait for one connection; what comes after is lost, and said again.
const NOTES: usize = 1024;

/// Whether this host can have such edges.
pub(super) fn check(edges: &[EdgeAt], path: PathKind) -> Result<(), KernelError> {
    let fail = |detail: String| Err(KernelError::new("use several edges", detail));
    if edges.len() > 1 && path == PathKind::Routes {
        return fail("routes know one edge only; use BPF (--path bpf)".into());
    }
    if edges.len() > homes::HOMES {
        return fail(format!("{} are more than {}", edges.len(), homes::HOMES));
    }
    let addresses: BTreeSet<_> = edges.iter().map(|e| e.address).collect();
    if addresses.len() < edges.len() {
        return fail("one of them was given twice (--edge)".into());
    }
    Ok(())
}

/// What the last agent had heard of homes.
pub(super) fn take_up(store: &Store, host: &HostNet, core: &mut Core) -> Result<(), KernelError> {
    for word in store.load::<HomeWord>()? {
        host.let_edge_in(&word.by)?;
        host.set_front(word.home, &word.by, word.epoch)?;
        homes::hear(&mut core.words, word);
    }
    Ok(())
}

/// From now on, what this end of the tunnel tells others goes by the edges.
pub(super) fn pass_notes(shared: &Arc<Shared>) {
    let Some(secure) = &shared.secure else { return };
    let me = Arc::downgrade(shared);
    secure.set_post(move |to, note| {
        if let Some(shared) = me.upgrade() {
            shared.pass_note(to, note);
        }
    });
}

impl Link {
    pub(super) fn new() -> Self {
        Self {
            state: LinkState::Connecting { last_error: "not tried yet".into() },
            news: BTreeSet::new(),
            questions: VecDeque::new(),
            said: BTreeMap::new(),
            edge: None,
            tunnels: BTreeMap::new(),
            notes: VecDeque::new(),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.state == LinkState::Up
    }
}

impl Core {
    /// Something is new about a machine: every edge may have to be told.
    pub(super) fn note(&mut self, key: MachineKey) {
        for link in &mut self.links {
            link.news.insert(key);
        }
    }

    /// Whether any edge can be told.
    pub(super) fn is_connected(&self) -> bool {
        self.links.iter().any(Link::is_up)
    }

    /// Connections that are up, and all.
    pub(super) fn count_links(&self) -> (usize, usize) {
        (self.links.iter().filter(|link| link.is_up()).count(), self.links.len())
    }

    /// Whether all edges that can be told have been told of an epoch.
    pub(super) fn is_said(&self, key: MachineKey, epoch: u64) -> bool {
        let said = |link: &Link| link.said.get(&key).is_some_and(|&said| said >= epoch);
        self.links.iter().filter(|link| link.is_up()).all(said)
    }

    /// Whether there is an edge at this overlay address.
    pub(super) fn is_edge(&self, overlay: Ipv4Addr) -> bool {
        self.edge.is_some_and(|e| e.overlay == overlay)
            || self.words.contains_key(&overlay)
            || self.links.iter().any(|link| link.edge == Some(overlay))
    }

    fn have_all_answered(&self, key: MachineKey, epoch: u64) -> bool {
        let answered = self.answers.get(&key).filter(|(of, _)| *of == epoch);
        let up = || self.links.iter().enumerate().filter(|(_, link)| link.is_up());
        up().next().is_some()
            && answered.is_some_and(|(_, by)| up().all(|(number, _)| by.contains(&number)))
    }

    /// Whether an edge serves the machine's home, or that is not known.
    fn serves(&self, number: usize, key: MachineKey) -> bool {
        let home = self.book.get(key).and_then(|record| record.home);
        let word = home.and_then(|home| self.words.get(&home.edge));
        word.is_none_or(|word| self.links[number].edge == Some(word.by.overlay))
    }

    /// The connections, for people.
    pub(super) fn link(&self) -> String {
        if let [link] = self.links.as_slice() {
            return link.state.to_string();
        }
        let up = self.links.iter().filter(|link| link.is_up()).count();
        let errors: Vec<_> = self
            .links
            .iter()
            .filter_map(|link| match &link.state {
                LinkState::Up => None,
                LinkState::Connecting { last_error } => Some(last_error.as_str()),
            })
            .collect();
        let errors = errors.join("; ");
        match (up, self.links.len()) {
            (0, _) => format!("no connection to any edge: {errors}"),
            (up, all) if up == all => format!("connected to {all} edges"),
            (up, all) => format!("connected to {up} of {all} edges: {errors}"),
        }
    }

    /// The homes, for people.
    pub(super) fn homes(&self) -> Vec<HomeStatus> {
        let health = |word: &HomeWord| {
            let link = self.links.iter().find(|link| link.edge == Some(word.home));
            link.map_or_else(|| "not in this agent's settings".to_owned(), |l| l.state.to_string())
        };
        let status = |word: &HomeWord| {
            let at_home = |r: &&Record| r.home.map(|h| h.edge) == Some(word.home);
            HomeStatus {
                health: health(word),
                machines: self.book.records().filter(at_home).count(),
                word: word.clone(),
            }
        };
        self.words.values().map(status).collect()
    }
}

impl Shared {
    /// By the edge itself if it is for one, else by each in turn: not every one reaches everybody.
    fn pass_note(&self, to: Ipv4Addr, note: Note) {
        let mut core = self.core();
        core.turn += 1;
        let turn = core.turn;
        let mut up: Vec<_> = core.links.iter_mut().filter(|link| link.is_up()).collect();
        let direct = up.iter().position(|link| link.edge == Some(to));
        let by = direct.unwrap_or_else(|| turn % up.len().max(1));
        let Some(link) = up.get_mut(by).filter(|link| link.notes.len() < NOTES) else { return };
        link.notes.push_back((to, note));
        drop(core);
        self.changed.notify_all();
    }

    /// The home of a machine that has none yet: chosen among the edges that are heard.
    pub(super) fn home_of_new(&self, net: &MachineNet, epoch: u64) -> Option<Home> {
        let core = self.core();
        if core.book.get(net.key()).is_some_and(|record| record.home.is_some()) {
            return None;
        }
        let up: BTreeSet<_> =
            core.links.iter().filter(|l| l.is_up()).filter_map(|l| l.edge).collect();
        // One that lives and is served by another edge was drained: nothing new goes there.
        let alive = |w: &&HomeWord| up.contains(&w.home) && w.by.overlay == w.home;
        let edge = homes::choose(net, core.words.values().filter(alive))
            .or_else(|| homes::choose(net, core.words.values()))?;
        Some(Home { edge, since: epoch })
    }

    /// A connection to an edge is up, or not.
    pub(super) fn set_link(&self, number: usize, state: LinkState) {
        let mut core = self.core();
        core.links[number].state = state;
        // What only this one had not answered is answered now; who is back is asked again.
        for (_, by) in core.answers.values_mut() {
            by.remove(&number);
        }
        let waiting: Vec<_> = core
            .book
            .records()
            .filter(|r| r.edge == EdgeView::Pending)
            .map(|r| (r.net.key(), r.epoch))
            .filter(|&(key, epoch)| core.have_all_answered(key, epoch))
            .collect();
        drop(core);
        for (key, epoch) in waiting {
            self.edge_answered(self.core(), key, epoch, Ok(()));
        }
        self.changed.notify_all();
    }

    /// One edge answered about a machine. What counts is that all that can be reached have; a refusal
    /// counts at once if it is the edge's that serves the machine.
    pub(super) fn answered(
        &self,
        number: usize,
        key: MachineKey,
        epoch: u64,
        answer: Result<(), NetError>,
    ) {
        let mut core = self.core();
        if let Err(error) = &answer {
            if core.serves(number, key) {
                return self.edge_answered(core, key, epoch, answer);
            }
            tracing::warn!(%error, "an edge that does not serve the machine has refused");
        }
        let answers = core.answers.entry(key).or_default();
        if answers.0 != epoch {
            *answers = (epoch, BTreeSet::new());
        }
        answers.1.insert(number);
        if core.have_all_answered(key, epoch) {
            self.edge_answered(core, key, epoch, Ok(()));
        }
    }

    /// An edge knows the home of a machine.
    pub(super) fn at_home(&self, key: MachineKey, home: Home) {
        let mut core = self.core();
        let Some(record) = core.book.at_home(key, home).cloned() else { return };
        // All edges are told, or told again.
        core.answers.remove(&key);
        core.note(key);
        let applied = self.host.apply(&record);
        self.machines.note(key, record);
        drop(core);
        self.changed.notify_all();
        self.machines.wake();
        if let Err(error) = applied {
            tracing::warn!(%error, "a machine's home is not set");
        }
    }

    /// Edges' words on homes.
    pub(super) fn hear_of_homes(&self, words: Vec<HomeWord>) -> Result<(), KernelError> {
        let mut core = self.core();
        for word in words {
            if !homes::hear(&mut core.words, word.clone()) {
                continue;
            }
            self.host.let_edge_in(&word.by)?;
            self.host.set_front(word.home, &word.by, word.epoch)?;
            self.homes.save(word.home, &word)?;
            tracing::info!(home = word.name, by = %word.by.overlay, epoch = word.epoch, "home is served");
        }
        // Machines of a time when there was one edge stay where they are.
        let edge = core.edge.filter(|e| core.words.contains_key(&e.overlay));
        let without: Vec<_> = core
            .book
            .records()
            .filter(|r| r.home.is_none() && r.place == Place::Here && !r.retiring)
            .map(|r| r.net.key())
            .collect();
        drop(core);
        if let Some(edge) = edge {
            for key in without {
                self.at_home(key, Home { edge: edge.overlay, since: 0 });
            }
        }
        self.changed.notify_all();
        Ok(())
    }

    /// An edge says how everybody is reached by encrypted packets. What another one said last stays,
    /// also while that one is not heard: of one end the newest word counts.
    pub(super) fn hear_of_tunnels(&self, number: usize, tunnels: Ends) -> Result<(), KernelError> {
        let Some(secure) = &self.secure else { return Ok(()) };
        self.core().links[number].tunnels = tunnels;
        // Of two edges that speak at once, the second one to be told of knows both words.
        let all =
            || self.core().links.iter().flat_map(|link| link.tunnels.clone()).collect::<Vec<_>>();
        secure.set_peers_by(|| secure::newest(all()))
    }
}
