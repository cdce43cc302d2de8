//! The world: hosts, clocks, copies of the machine, moves, the network between their ends, and the
//! loop that makes things happen in order.

use super::{
    Random, Tally,
    receiver::Left,
    store::Store,
    terms::{Keeper, TermEvent},
};
use crate::{
    lease::{
        AttemptId, BeatRef, BootTime, Epoch, HostName, MachineName, Nonce, OfferSerial, Record,
    },
    migrate::switchover::{
        DestinationAction, DestinationAuthority, DestinationEvent, DestinationParts, Holding,
        LeaseCall, Nonces, SourceAuthority, SourceEvent, SourceParts, Terms, terms::Rule,
    },
    tenure::{Holder, HolderEvent, Rule as TermRule},
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    time::Duration,
};

pub(super) const MS: u64 = 1_000_000;
pub(super) const SECOND: u64 = 1000 * MS;

/// A move begins every so often; by then the one before has come to rest or never will.
const MOVE_EVERY: u64 = 60 * SECOND;
const MOVES: usize = 4;

/// A clock that runs wrong by `ppm` and started at another time.
pub(super) struct Host {
    pub(super) name: HostName,
    ppm: i64,
    offset: u64,
}

impl Host {
    pub(super) fn local(&self, now: u64) -> BootTime {
        let run = i128::from(now) * i128::from(1_000_000 + self.ppm) / 1_000_000;
        BootTime(Duration::from_nanos(self.offset + run as u64))
    }

    /// The first true time at which the clock shows `at`.
    pub(super) fn true_time(&self, at: BootTime) -> u64 {
        let run = (at.0.as_nanos() as i128 - i128::from(self.offset)).max(0);
        let mut now = (run * 1_000_000 / i128::from(1_000_000 + self.ppm)) as u64;
        while self.local(now) < at {
            now += 1;
        }
        now
    }
}

/// One copy of the machine on one host.
pub(super) struct Copy {
    pub(super) host: usize,
    pub(super) running: bool,
    pub(super) frozen: bool,
    pub(super) output: bool,
    pub(super) epoch: Epoch,
    pub(super) crashed: bool,
    pub(super) discarded: bool,
    /// Until the lease is known to be won: the end of the offer, on the host's clock.
    pub(super) unconfirmed_until: Option<BootTime>,
    /// Of a protected machine.
    pub(super) holder: Option<Holder>,
    pub(super) holder_wake: Option<BootTime>,
    pub(super) freeze_wanted: bool,
    pub(super) term_frozen: bool,
}

impl Copy {
    /// One that does not run yet.
    pub(super) fn at(host: usize, epoch: Epoch) -> Self {
        Self {
            host,
            running: false,
            frozen: false,
            output: false,
            epoch,
            crashed: false,
            discarded: false,
            unconfirmed_until: None,
            holder: None,
            holder_wake: None,
            freeze_wanted: false,
            term_frozen: false,
        }
    }

    pub(super) fn executes(&self) -> bool {
        let stands = self.frozen || self.term_frozen;
        self.running && !stands && !self.crashed && !self.discarded
    }
}

/// A message between the ends.
#[derive(Clone, Debug)]
pub(super) enum Message {
    ToSource(SourceEvent),
    ToDestination(DestinationEvent),
}

/// The connection of one move.
pub(super) struct Link {
    /// In order and whole until it is cut; else every message for itself, lost or doubled at will.
    pub(super) ordered: bool,
    pub(super) loss: u64,
    pub(super) slow: u64,
    pub(super) last: [u64; 2],
    pub(super) cut: bool,
}

/// One attempt to move the machine.
pub(super) struct Move {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) attempt: AttemptId,
    pub(super) source: Option<SourceAuthority>,
    pub(super) destination: Option<DestinationAuthority>,
    pub(super) source_copy: usize,
    pub(super) copy: usize,
    pub(super) link: Link,
    /// Their ends on the destination's clock.
    pub(super) offers: BTreeMap<OfferSerial, BootTime>,
    pub(super) pausing: bool,
    pub(super) resume_when_paused: bool,
    pub(super) named: Option<OfferSerial>,
    pub(super) flush_owed: bool,
    pub(super) flush_durable: bool,
    pub(super) all_present: bool,
    /// The connection of a runner that died is not its successor's.
    pub(super) source_deaf: bool,
    pub(super) to_do: VecDeque<DestinationAction>,
    pub(super) freezing: bool,
    /// What the destination's dead runner has left.
    pub(super) left: Left,
    /// The destination's life that a protected machine is held under.
    pub(super) life: Option<BeatRef>,
    /// The source's holder was told that the machine stays.
    pub(super) source_over: bool,
    wake: [Option<BootTime>; 2],
}

#[derive(Clone, Debug)]
pub(super) enum Event {
    StartMove,
    Source(usize, SourceEvent),
    Destination(usize, DestinationEvent),
    Arrives(usize, Message),
    Wake(usize, usize, BootTime),
    StoreApplies(usize, usize, LeaseCall, Option<u64>),
    MachinePaused(usize, bool),
    MachineLoaded(usize, bool),
    MachineFrozen(usize),
    Cut(usize),
    Joined(usize),
    CrashHost(usize, usize),
    CrashRunner(usize),
    RunnerBack(usize),
    CrashReceiver(usize),
    ReceiverBack(usize),
    ReceiverDecides(usize, Record),
    GuardFreezes(usize),
    StoreGoes(bool),
    Term(TermEvent),
}

struct Entry(u64, u64, Event);

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// One rule that a test breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    Move(Rule),
    Term(TermRule),
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) now: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    sequence: u64,
    pub(super) hosts: Vec<Host>,
    pub(super) copies: Vec<Copy>,
    pub(super) moves: Vec<Move>,
    pub(super) store: Store,
    pub(super) terms: Terms,
    pub(super) machine: MachineName,
    story: Vec<String>,
    pub(super) tally: Tally,
    /// This world's weather, in percent.
    pub(super) faults: u64,
    /// The machine may be taken over when its host is lost.
    pub(super) protected: bool,
    pub(super) broken_term: Option<TermRule>,
    pub(super) keepers: Vec<Keeper>,
}

impl World {
    pub(super) fn new(seed: u64, broken: Option<Broken>) -> Self {
        let (broken, broken_term) = match broken {
            Some(Broken::Move(rule)) => (Some(rule), None),
            Some(Broken::Term(rule)) => (None, Some(rule)),
            None => (None, None),
        };
        let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5eed);
        let drift_ppm = [1000, 10_000, 50_000][random.below(3) as usize];
        let terms = Terms {
            drift_ppm,
            stop_margin: Duration::from_millis(random.between(2, 100)),
            broken,
            ..Terms::default()
        };
        let hosts = (0..3)
            .map(|i| {
                let extreme = [-i64::from(drift_ppm), i64::from(drift_ppm)];
                let ppm = if random.chance(70) {
                    extreme[random.below(2) as usize]
                } else {
                    random.below(2 * u64::from(drift_ppm)) as i64 - i64::from(drift_ppm)
                };
                let offset = random.below(1000 * SECOND);
                let name = HostName::new(["a", "b", "c"][i]).unwrap();
                Host { name, ppm, offset }
            })
            .collect::<Vec<_>>();
        let machine = MachineName::new("redis").unwrap();
        let nonce = Nonce(u128::from(random.next()));
        let attempt = AttemptId(random.next());
        let record = Record::first(machine.clone(), hosts[0].name.clone(), attempt, nonce);
        let store = Store::new(record.clone(), &mut random);
        let first = Copy { running: true, output: true, ..Copy::at(0, record.epoch) };
        let (faults, protected) = ([0, 20, 60][random.below(3) as usize], random.chance(50));
        // What breaks a rule of terms is looked for where there are terms, and in bad weather.
        let terms_matter = broken_term.is_some() || broken == Some(Rule::NoTokenAfterTerm);
        let (faults, protected) = if terms_matter { (60, true) } else { (faults, protected) };
        let mut world = Self {
            random,
            now: SECOND,
            queue: BinaryHeap::new(),
            sequence: 0,
            hosts,
            copies: vec![first],
            moves: Vec::new(),
            store,
            terms,
            machine,
            story: Vec::new(),
            tally: Tally { runs: 1, ..Tally::default() },
            faults,
            protected,
            broken_term,
            keepers: (0..3).map(|_| Keeper::default()).collect(),
        };
        if world.protected {
            world.protect();
        }
        for i in 0..MOVES as u64 {
            world.at(i * MOVE_EVERY + SECOND, Event::StartMove);
        }
        world
    }

    pub(super) fn run(&mut self) -> Result<(), String> {
        let end = (MOVES as u64 + 1) * MOVE_EVERY;
        let mut steps = 0;
        while let Some(Reverse(Entry(at, _, event))) = self.queue.pop() {
            if at > end {
                break;
            }
            steps += 1;
            if steps > 200_000 {
                return Err("the simulation does not come to an end".to_owned());
            }
            self.now = at;
            // Time passed: what ran on in the meantime counts.
            self.check()?;
            self.happens(event)?;
            self.check()?;
        }
        self.check_rest()
    }

    pub(super) fn at(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse(Entry(at, self.sequence, event)));
    }

    pub(super) fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    pub(super) fn local(&self, host: usize) -> BootTime {
        self.hosts[host].local(self.now)
    }

    pub(super) fn tell(&mut self, text: &str) {
        self.story.push(format!("{:9.3} ms  {text}", self.now as f64 / MS as f64));
    }

    pub(super) fn story(&self) -> String {
        self.story.join("\n")
    }

    pub(super) fn nonces(&mut self) -> Nonces {
        let mut random = Random(self.random.next());
        Box::new(move || Nonce(u128::from(random.next())))
    }

    pub(super) fn count(&self, sum: &mut Tally) {
        let t = &self.tally;
        let moved = t.moved;
        sum.runs += 1;
        sum.moved += u64::from(moved > 0);
        sum.three_hops += u64::from(moved >= 3);
        sum.aborted += t.aborted;
        sum.taken_back += t.taken_back;
        sum.refused += t.refused;
        sum.frozen += t.frozen;
        sum.thawed += t.thawed;
        sum.settled_by_nonce += t.settled_by_nonce;
        sum.recovered += t.recovered;
        sum.lost_to_source += t.lost_to_source;
        sum.served_after_expiry += t.served_after_expiry;
        sum.crashed += t.crashed;
        sum.protected += u64::from(self.protected);
        sum.terms_ended += t.terms_ended;
        sum.fenced += t.fenced;
        sum.taken_over += t.taken_over;
        sum.got_back += t.got_back;
        sum.taken_from_source += t.taken_from_source;
        sum.receivers_died += t.receivers_died;
        sum.receivers_back += t.receivers_back;
        sum.guarded += t.guarded;
        sum.hung += t.hung;
        sum.given_up += t.given_up;
    }

    /// The copy that may move on, with what its host holds; `None` while nothing is settled.
    fn movable(&self) -> Option<(usize, Holding)> {
        if self.protected {
            let settled =
                |copy: &&Copy| copy.executes() && copy.holder.as_ref().is_some_and(Holder::settled);
            let index = self.copies.iter().position(|copy| settled(&copy))?;
            let record = self.copies[index].holder.as_ref()?.record();
            let ours = record.owner == self.hosts[self.copies[index].host].name;
            return ours.then(|| (index, Holding::new(record.clone())));
        }
        let Some(last) = self.moves.last() else {
            return Some((0, Holding::new(self.store.record.clone())));
        };
        let stays = last.source.as_ref().filter(|source| {
            use crate::migrate::switchover::SourceState as S;
            matches!(source.state(), S::Aborted | S::Resumed(_))
        });
        if let Some(source) = stays {
            let copy = last.source_copy;
            return self.copies[copy].executes().then(|| (copy, source.holding()));
        }
        let settled = last.destination.as_ref().filter(|destination| {
            use crate::migrate::switchover::DestinationState as D;
            matches!(destination.state(), D::Settled(_))
        });
        let holding = settled?.holding()?;
        self.copies[last.copy].executes().then_some((last.copy, holding))
    }

    pub(super) fn start_move(&mut self) -> Result<(), String> {
        if self.anyone_hangs() {
            return Ok(());
        }
        self.end_earlier_moves()?;
        let Some((source_copy, holding)) = self.movable() else { return Ok(()) };
        let from = self.copies[source_copy].host;
        let to = (from + 1 + self.random.below(2) as usize) % 3;
        if self.keepers[to].dead {
            return Ok(());
        }
        let life = self.life_of(to);
        let view = self.view_of(from);
        let attempt = AttemptId(self.random.next());
        let (source_nonces, destination_nonces) = (self.nonces(), self.nonces());
        let source = SourceAuthority::new(SourceParts {
            holding: holding.clone(),
            to: self.hosts[to].name.clone(),
            attempt,
            view,
            terms: self.terms.clone(),
            nonces: source_nonces,
        });
        let destination = DestinationAuthority::new(DestinationParts {
            machine: self.machine.clone(),
            here: self.hosts[to].name.clone(),
            from: self.hosts[from].name.clone(),
            attempt,
            beat: life.clone(),
            terms: self.terms.clone(),
            nonces: destination_nonces,
        });
        // What an earlier move left on that host makes room.
        for copy in &mut self.copies {
            if copy.host == to && !copy.executes() {
                (copy.discarded, copy.holder) = (true, None);
            }
        }
        let copy = self.copies.len();
        self.copies.push(Copy::at(to, holding.record.epoch));
        let ordered = self.random.chance(70);
        let rough = self.random.chance(self.faults);
        let link = Link {
            ordered,
            loss: if ordered || !rough { 0 } else { self.random.below(30) },
            slow: if rough { self.random.below(30) } else { 0 },
            last: [0; 2],
            cut: false,
        };
        let m = self.moves.len();
        let (flush_owed, text) =
            (self.random.chance(50), format!("move {m}: {from} to {to}, ordered {ordered}"));
        self.tell(&text);
        self.moves.push(Move {
            from,
            to,
            attempt,
            source: Some(source),
            destination: Some(destination),
            source_copy,
            copy,
            link,
            offers: BTreeMap::new(),
            pausing: false,
            resume_when_paused: false,
            named: None,
            flush_owed,
            flush_durable: false,
            all_present: false,
            source_deaf: false,
            to_do: VecDeque::new(),
            freezing: false,
            left: Left::default(),
            life,
            source_over: false,
            wake: [None, None],
        });
        if self.protected {
            self.stop_watching(from);
            self.stop_watching(to);
            self.holder(source_copy, HolderEvent::Moving(true));
        }
        let prepared = self.random.between(MS, 200 * MS);
        self.after(prepared, Event::Destination(m, DestinationEvent::Prepared));
        for _ in 0..2 {
            let want = self.random.between(50 * MS, 3 * SECOND);
            self.after(want, Event::Source(m, SourceEvent::WantSwitchover));
        }
        self.bad_weather(m);
        Ok(())
    }

    /// Faults around the switchover, which happens in the first seconds.
    fn bad_weather(&mut self, m: usize) {
        let faults = self.faults;
        type Kind = fn(usize) -> Event;
        let kinds: [(u64, Kind); 6] = [
            (40, Event::Cut),
            (15, |m| Event::CrashHost(m, 0)),
            (15, |m| Event::CrashHost(m, 1)),
            (20, Event::CrashRunner),
            (10, |m| Event::Source(m, SourceEvent::Cancel)),
            (15, |m| Event::Destination(m, DestinationEvent::Cancel)),
        ];
        for (percent, event) in kinds {
            if self.random.chance(faults * percent / 100) {
                let when = self.random.between(MS, 6 * SECOND);
                self.after(when, event(m));
            }
        }
        if !self.protected && self.random.chance(faults / 2) {
            let when = self.random.between(MS, 4 * SECOND);
            self.after(when, Event::CrashReceiver(m));
        }
        for _ in 0..2 {
            if self.random.chance(faults / 2) {
                let down = self.random.between(MS, 5 * SECOND);
                let length = self.random.between(10 * MS, 15 * SECOND);
                self.after(down, Event::StoreGoes(false));
                self.after(down + length, Event::StoreGoes(true));
            }
        }
    }

    /// Puts the alarm of one end (0 source, 1 destination) where its state machine wants it.
    pub(super) fn set_alarm(&mut self, m: usize, end: usize) {
        let mv = &self.moves[m];
        let (host, wanted) = if end == 0 {
            (mv.from, mv.source.as_ref().and_then(SourceAuthority::wake_at))
        } else {
            (mv.to, mv.destination.as_ref().and_then(DestinationAuthority::wake_at))
        };
        if wanted == mv.wake[end] {
            return;
        }
        self.moves[m].wake[end] = wanted;
        let Some(at) = wanted else { return };
        let due = self.hosts[host].true_time(at).max(self.now);
        // The destination's deadline thread may be late by half of what it has for a freeze.
        let late = if end == 0 { 50 * MS } else { self.half_margin() };
        let late = self.random.below(late);
        self.at(due + late, Event::Wake(m, end, at));
    }

    /// Rings, unless it was set anew since.
    pub(super) fn rings(&mut self, m: usize, end: usize, at: BootTime) -> bool {
        let rings = self.moves[m].wake[end] == Some(at);
        if rings {
            self.moves[m].wake[end] = None;
        }
        rings
    }

    /// A little less than half the stop margin on the fastest clock.
    pub(super) fn half_margin(&self) -> u64 {
        self.terms.stop_margin.as_nanos() as u64 * 47 / 100
    }

    pub(super) fn send(&mut self, m: usize, message: &Message) {
        let way = usize::from(matches!(message, Message::ToDestination(_)));
        let random = &mut self.random;
        let link = &mut self.moves[m].link;
        if random.chance(link.loss) || (link.cut && link.ordered) {
            return;
        }
        let copies = if !link.ordered && random.chance(link.loss / 2) { 2 } else { 1 };
        for _ in 0..copies {
            let slow = random.chance(link.slow);
            let delay =
                if slow { random.below(3 * SECOND) } else { random.between(MS / 20, 40 * MS) };
            let mut at = self.now + delay;
            if link.ordered {
                at = at.max(link.last[way] + 1);
                link.last[way] = at;
            }
            self.sequence += 1;
            let event = Event::Arrives(m, message.clone());
            self.queue.push(Reverse(Entry(at, self.sequence, event)));
        }
    }
}
