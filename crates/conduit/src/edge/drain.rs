//! A planned drain: the homes that an edge serves go to another one, with every connection that is
//! tracked for them, so that no client and no machine sees anything.
//!
//! ```text
//!  this edge                                       the other
//!  offer {home}                 ─────────────────► knows its machines; drops what it does not know
//!  flows …, again what changed  ─────────────────► made by ctnetlink, not used yet
//!  leaves the addresses
//!  flip                         ─────────────────► takes the lease (epoch + 1), the addresses, and tells
//!                                                  hosts: one word, all machines
//!  flows that changed meanwhile ─────────────────► made
//!  settle                       ─────────────────► what it does not know is refused again
//!  translates what comes late, for a moment; then forgets
//! ```
//!
//! Until the flip nothing has changed, and an end of the conversation undoes what the other has made.
//! A flip that failed is decided by the lease: if it is still this edge's, it serves on. Connections that
//! began around the flip and are not known at the other edge yet are dropped there, not refused: their
//! segments are repeated.

use super::{
    Shared,
    beside::{Call, Health, Neighbour},
    fronts::Fronts,
};
use crate::{
    conntrack::{self, Flow, FlowId},
    exec::KernelError,
    homes::HomeWord,
    wire::{Beside, BesideAnswer, Drained},
};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// Longest wait for one answer of the other edge.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Connections in one message: they must fit a line.
const MESSAGE: usize = 80;
/// Copies before the flip, while much still changes, and what is little.
const ROUNDS: usize = 4;
const LITTLE: usize = 64;
/// More connections than this are not taken from another edge.
const FLOWS: usize = 1 << 20;

/// What is to be drained.
pub(super) struct Order<'a> {
    pub(super) to: &'a str,
    /// A home's name or overlay address.
    pub(super) home: Option<&'a str>,
    pub(super) dry_run: bool,
    pub(super) limit: Duration,
}

fn fail(detail: impl ToString) -> KernelError {
    KernelError::new("drain this edge", detail)
}

/// Does it, one home after the other. Those that were done stay done if a later one fails.
pub(super) fn drain(shared: &Shared, order: &Order<'_>) -> Result<Vec<Drained>, KernelError> {
    let deadline = Instant::now() + order.limit;
    let fronts = shared
        .fronts
        .as_ref()
        .ok_or_else(|| fail("it is the only one; start the edges with --beside"))?;
    let neighbour = fronts.neighbour(order.to).ok_or_else(|| {
        let others: Vec<_> = fronts.neighbours.iter().map(|n| n.name()).collect();
        fail(format!("no edge is called \"{}\" here; there are: {}", order.to, others.join(", ")))
    })?;
    let wanted = |word: &HomeWord| {
        order.home.is_none_or(|name| name == word.name || name == word.home.to_string())
    };
    let words: Vec<_> = fronts.words().into_iter().filter(wanted).collect();
    if let (Some(home), true) = (order.home, words.is_empty()) {
        return Err(fail(format!("no home is called \"{home}\"; conduit status lists them")));
    }
    let serving = fronts.serving();
    let mut all = Vec::new();
    for word in words {
        if serving.contains(&word.home) {
            all.push(drain_home(shared, fronts, neighbour, &word, order.dry_run, deadline)?);
        } else if order.home.is_some() && fronts.is_at(&word, order.to) {
            all.push(Drained { machines: machines(shared, word.home), ..of(&word, order.to) });
        } else if order.home.is_some() {
            return Err(fail(format!("home {} is not served here", word.name)));
        }
    }
    Ok(all)
}

fn of(word: &HomeWord, to: &str) -> Drained {
    Drained {
        home: word.name.clone(),
        public: word.public.to_string(),
        to: to.to_owned(),
        ..Drained::default()
    }
}

fn machines(shared: &Shared, home: Ipv4Addr) -> usize {
    let core = shared.core();
    core.ledger.machines().filter(|e| e.home.map(|h| h.edge) == Some(home)).count()
}

fn drain_home(
    shared: &Shared,
    fronts: &Fronts,
    neighbour: &Arc<Neighbour>,
    word: &HomeWord,
    dry_run: bool,
    deadline: Instant,
) -> Result<Drained, KernelError> {
    let addresses: Vec<IpAddr> = word.addresses().collect();
    let mut drained =
        Drained { machines: machines(shared, word.home), ..of(word, neighbour.name()) };
    if dry_run {
        let health = neighbour.health(Instant::now());
        if health != Health::Alive {
            return Err(fail(format!("edge {} is {health}", neighbour.name())));
        }
        drained.flows = conntrack::taken(&addresses)?.len();
        return Ok(drained);
    }
    let start = Instant::now();
    let mut call = neighbour.call(shared, ANSWER_LIMIT)?;
    let offer = Beside::Offer { home: word.clone(), machines: drained.machines };
    call.ask(&offer)?;
    let mut handing = Handing { said: BTreeMap::new(), addresses, made: 0, failed: 0 };
    for round in 0..ROUNDS {
        let changed = handing.copy(&mut call, Some(deadline))?;
        if changed <= LITTLE && round > 0 {
            break;
        }
    }
    let flip = flip(shared, fronts, neighbour, word, &mut call, deadline)?;
    // The addresses are the other's now, whatever happens from here on.
    let rest = handing.copy(&mut call, None).and_then(|_| call.ask(&Beside::Settle));
    shared.forget_flows(word);
    drained.flip_seconds = flip.elapsed().as_secs_f64();
    drained.seconds = start.elapsed().as_secs_f64();
    (drained.flows, drained.failed, drained.changed) = (handing.made, handing.failed, true);
    let counts = &fronts.counts;
    counts.drained.fetch_add(1, Ordering::Relaxed);
    counts.flows_out.fetch_add(drained.flows as u64, Ordering::Relaxed);
    counts.flows_failed.fetch_add(drained.failed as u64, Ordering::Relaxed);
    tracing::info!(home = word.name, to = neighbour.name(), ?drained, "drained");
    rest.map_err(|e| {
        fail(format!(
            "home {} is served by {} now, but connections that began last were not handed over: {e}",
            word.name,
            neighbour.name()
        ))
    })?;
    Ok(drained)
}

/// The other edge serves the home from here on, or this one still does. Returns when it was.
fn flip(
    shared: &Shared,
    fronts: &Fronts,
    neighbour: &Neighbour,
    word: &HomeWord,
    call: &mut Call,
    deadline: Instant,
) -> Result<Instant, KernelError> {
    let _changing = fronts.changing();
    let flipped = Instant::now();
    // Somebody may have taken it meanwhile.
    let now = fronts.word(word.home).filter(|now| now.epoch == word.epoch && now.by == word.by);
    let Some(word) = now else { return Err(fail("its home went elsewhere meanwhile")) };
    if Instant::now() >= deadline {
        return Err(fail("the time given is over; nothing was changed (--limit)"));
    }
    let done =
        shared.leave(fronts, &word).and_then(|()| call.ask(&Beside::Flip { epoch: word.epoch }));
    if let Err(error) = done {
        fronts.counts.drains_undone.fetch_add(1, Ordering::Relaxed);
        // The lease says whose it is; the other may have taken it and died with its answer.
        let after = match shared.follow_lease(fronts, word.home) {
            Ok(()) if fronts.serving().contains(&word.home) => {
                "it is served here, as before".into()
            }
            Ok(()) => "the other edge has its lease".into(),
            Err(e) => format!("its lease is read again as soon as it can be: {e}"),
        };
        return Err(fail(format!("{error}; {after}")));
    }
    let by = fronts.peer(neighbour.name()).ok_or_else(|| fail("the other edge is not known"))?;
    shared.follow(fronts, &HomeWord { by, epoch: word.epoch + 1, ..word })?;
    Ok(flipped)
}

/// What the other edge has been told.
struct Handing {
    said: BTreeMap<FlowId, Flow>,
    addresses: Vec<IpAddr>,
    made: usize,
    failed: usize,
}

impl Handing {
    /// Tells it what has changed since; says how much that was.
    fn copy(&mut self, call: &mut Call, deadline: Option<Instant>) -> Result<usize, KernelError> {
        let now = conntrack::taken(&self.addresses)?;
        let news: Vec<Flow> = now
            .values()
            .filter(|flow| self.said.get(&flow.id()).is_none_or(|known| flow.differs(known)))
            .copied()
            .collect();
        let ended: Vec<Flow> =
            self.said.values().filter(|flow| !now.contains_key(&flow.id())).copied().collect();
        for flows in news.chunks(MESSAGE) {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(fail("the time given is over; nothing was changed (--limit)"));
            }
            let answer = call.ask(&Beside::Flows { flows: flows.to_vec() })?;
            let BesideAnswer::Taken { made, failed } = answer else {
                return Err(fail(format!("an unexpected answer: {answer:?}")));
            };
            let again = flows.iter().filter(|f| self.said.contains_key(&f.id())).count();
            self.made += made.saturating_sub(again);
            self.failed += failed;
            self.said.extend(flows.iter().map(|flow| (flow.id(), *flow)));
        }
        for flows in ended.chunks(MESSAGE) {
            call.ask(&Beside::Ended { flows: flows.to_vec() })?;
            for flow in flows {
                self.said.remove(&flow.id());
            }
        }
        Ok(news.len() + ended.len())
    }
}

/// The other side: a drain that comes here, over one conversation.
pub(super) struct Incoming {
    from: String,
    state: State,
}

enum State {
    Idle,
    /// Nothing is served yet, and all of it can be undone.
    Offered {
        word: HomeWord,
        made: BTreeMap<FlowId, Flow>,
    },
    /// Served here; the last connections are on their way.
    Flipped {
        word: HomeWord,
    },
}

impl Incoming {
    pub(super) fn new(from: &str) -> Self {
        Self { from: from.to_owned(), state: State::Idle }
    }

    /// The answer to a question; an error ends the conversation.
    pub(super) fn answer(
        &mut self,
        shared: &Shared,
        question: Beside,
    ) -> Result<BesideAnswer, String> {
        let fronts = shared.fronts.as_ref().ok_or("this edge is the only one")?;
        match (&mut self.state, question) {
            (State::Idle, Beside::Offer { home, machines }) => {
                self.state = offered(shared, fronts, &self.from, &home, machines)?;
                Ok(BesideAnswer::Done)
            }
            (State::Offered { word, made }, Beside::Flows { flows }) => {
                let done = take(fronts, word, &flows)?;
                made.extend(flows.iter().map(|flow| (flow.id(), *flow)));
                if made.len() > FLOWS {
                    return Err(format!("more than {FLOWS} connections are not taken"));
                }
                Ok(done)
            }
            (State::Flipped { word }, Beside::Flows { flows }) => take(fronts, word, &flows),
            (State::Offered { word, .. } | State::Flipped { word }, Beside::Ended { flows }) => {
                check(word, &flows)?;
                let done = conntrack::ended(flows.iter()).map_err(|e| e.to_string())?;
                Ok(BesideAnswer::Taken { made: done.done, failed: done.failed })
            }
            (State::Offered { word, .. }, Beside::Flip { epoch }) => {
                let _changing = fronts.changing();
                shared
                    .take_from(fronts, word.home, &self.from, epoch)
                    .map_err(|e| e.to_string())?;
                self.state = State::Flipped { word: word.clone() };
                Ok(BesideAnswer::Done)
            }
            (State::Flipped { word }, Beside::Settle) => {
                let home = word.home;
                self.state = State::Idle;
                shared.nat.settle(home, false).map_err(|e| e.to_string())?;
                Ok(BesideAnswer::Done)
            }
            (_, question) => Err(format!("{question:?} is out of turn")),
        }
    }

    /// The conversation is over.
    pub(super) fn end(self, shared: &Shared) {
        let (word, undo) = match &self.state {
            State::Idle => return,
            State::Offered { word, made } => (word, Some(made)),
            State::Flipped { word } => (word, None),
        };
        if let Some(made) = undo {
            let undone = conntrack::ended(made.values());
            tracing::warn!(home = word.name, from = self.from, ?undone, "a drain was not finished");
        }
        if let Err(error) = shared.nat.settle(word.home, false) {
            tracing::warn!(%error, "unknown connections of a home are still dropped");
        }
    }
}

fn offered(
    shared: &Shared,
    fronts: &Fronts,
    from: &str,
    word: &HomeWord,
    machines_there: usize,
) -> Result<State, String> {
    let known = fronts.word(word.home).ok_or("this edge has not heard of that home yet")?;
    if known.addresses().ne(word.addresses()) {
        return Err("this edge knows other addresses of that home".into());
    }
    if fronts.serving().contains(&word.home) {
        return Err("it is served here already".into());
    }
    {
        let _changing = fronts.changing();
        fronts.arrive(word.home);
    }
    let here = machines(shared, word.home);
    if here != machines_there {
        return Err(format!(
            "it has {machines_there} machines and this edge knows {here} of them; are all agents \
             connected to both edges (conduit status)?"
        ));
    }
    tracing::info!(home = word.name, from, "a drain begins");
    // What is left of a time when it was served here would be in the way of those that come.
    let addresses: Vec<IpAddr> = word.addresses().collect();
    let left = conntrack::taken(&addresses).and_then(|old| conntrack::ended(old.values()));
    left.map_err(|e| e.to_string())?;
    shared.nat.settle(word.home, true).map_err(|e| e.to_string())?;
    Ok(State::Offered { word: word.clone(), made: BTreeMap::new() })
}

fn check(word: &HomeWord, flows: &[Flow]) -> Result<(), String> {
    let addresses: Vec<IpAddr> = word.addresses().collect();
    if flows.iter().all(|flow| flow.is_sound() && flow.is_of(&addresses)) {
        return Ok(());
    }
    Err(format!("a connection among them is none of home {}'s", word.name))
}

fn take(fronts: &Fronts, word: &HomeWord, flows: &[Flow]) -> Result<BesideAnswer, String> {
    check(word, flows)?;
    let done = conntrack::made(flows).map_err(|e| e.to_string())?;
    fronts.counts.flows_in.fetch_add(done.done as u64, Ordering::Relaxed);
    fronts.counts.flows_failed.fetch_add(done.failed as u64, Ordering::Relaxed);
    Ok(BesideAnswer::Taken { made: done.done, failed: done.failed })
}
