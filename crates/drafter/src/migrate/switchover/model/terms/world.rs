//! A state: an owner, a host that its machine may move to, a host that waits for it, and one store.

use super::{
    super::{Digest, Message},
    Scene,
    neglect::Neglect,
};
use crate::{
    lease::{
        AttemptId, Beat, BeatName, BeatRef, BootTime, Epoch, HostName, MachineName, Nonce, Outcome,
        Record,
    },
    migrate::switchover::{
        DestinationAuthority, DestinationParts, Holding, LeaseCall, Nonces, SourceAuthority,
        SourceParts, Terms, destination, source,
    },
    tenure::{
        Answer, Call, Content, Holder, HolderEvent, HolderParts, OperationId, Pulse, PulseParts,
        Taker, TakerEvent, TakerParts, Times, View,
    },
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// The hosts by number: the owner, the destination of its move, the one that takes.
pub(super) const OWNER: usize = 0;
pub(super) const DESTINATION: usize = 1;
pub(super) const TAKER: usize = 2;
const HOSTS: [&str; 3] = ["a", "b", "c"];

/// Whose state machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Who {
    /// Of a host.
    Pulse(usize),
    Holder(usize),
    Taker,
    Source,
    Destination,
    /// The owner's keeper gives its machine up.
    Surrender,
}

impl Who {
    pub(super) const ALL: [Self; 8] = [
        Self::Pulse(OWNER),
        Self::Pulse(DESTINATION),
        Self::Holder(OWNER),
        Self::Holder(DESTINATION),
        Self::Taker,
        Self::Source,
        Self::Destination,
        Self::Surrender,
    ];

    pub(super) const fn host(self) -> usize {
        match self {
            Self::Pulse(host) | Self::Holder(host) => host,
            Self::Taker => TAKER,
            Self::Source | Self::Surrender => OWNER,
            Self::Destination => DESTINATION,
        }
    }
}

/// What was asked of the store.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) operation: OperationId,
    pub(super) content: Content,
}

impl From<Call> for Asked {
    fn from(call: Call) -> Self {
        Self { operation: call.operation, content: call.content }
    }
}

impl From<LeaseCall> for Asked {
    fn from(call: LeaseCall) -> Self {
        let LeaseCall { operation, expected, new, .. } = call;
        Self { operation, content: Content::SetLease { expected, new } }
    }
}

/// … and what it has done, once it has.
#[derive(Clone)]
pub(super) struct Pending {
    pub(super) asked: Arc<Asked>,
    pub(super) answer: Option<Answer>,
}

/// What a host has of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Copy {
    pub(super) running: bool,
    /// By the move.
    pub(super) frozen: bool,
    /// By the term.
    pub(super) term_frozen: bool,
    pub(super) output: bool,
    pub(super) epoch: u64,
    pub(super) gone: bool,
}

impl Copy {
    pub(super) const fn executes(&self) -> bool {
        self.running && !self.frozen && !self.term_frozen && !self.gone
    }
}

/// What is under way on the hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Doings {
    pub(super) pausing: bool,
    pub(super) loading: bool,
    pub(super) to_say_running: bool,
    pub(super) source_over: bool,
    /// Whether the owner's machine shall be protected has been changed.
    pub(super) asked: bool,
    pub(super) offers: u8,
    pub(super) wants: u8,
    /// How often each sign of life may still be renewed; after that its host does not reach the store.
    pub(super) renewals: [u8; 2],
    /// How often the third host may still begin to watch.
    pub(super) watches: u8,
}

#[derive(Clone)]
pub(super) struct World {
    pub(super) times: Arc<Times>,
    pub(super) terms: Arc<Terms>,
    pub(super) now: [BootTime; 3],
    pub(super) lease: Arc<Record>,
    pub(super) beats: BTreeMap<usize, Arc<Beat>>,
    pub(super) pulses: [Option<Arc<Pulse>>; 2],
    pub(super) holders: [Option<Arc<Holder>>; 2],
    pub(super) taker: Option<Arc<Taker>>,
    pub(super) source: Option<Arc<SourceAuthority>>,
    pub(super) destination: Option<Arc<DestinationAuthority>>,
    pub(super) life: Option<BeatRef>,
    pub(super) pending: BTreeMap<Who, Pending>,
    pub(super) late: Vec<Arc<Asked>>,
    pub(super) messages: Vec<Arc<Message>>,
    pub(super) copies: [Copy; 3],
    pub(super) doings: Doings,
    pub(super) neglect: Neglect,
    pub(super) faults: u8,
    drawn: u8,
    pub(super) wrong: Option<Arc<str>>,
}

pub(super) fn host(index: usize) -> HostName {
    HostName::new(HOSTS[index]).unwrap()
}

pub(super) fn machine() -> MachineName {
    MachineName::new("m").unwrap()
}

fn beat_of(index: usize) -> BeatName {
    BeatName::of_host(host(index))
}

/// That of the machine's runner at its owner.
const OWN: usize = HOSTS.len();

fn index_of(name: &BeatName) -> usize {
    if name.machine().is_some() {
        return OWN;
    }
    HOSTS.iter().position(|host| *host == name.host().as_str()).unwrap()
}

impl World {
    pub(super) fn new(scene: &Scene) -> Self {
        let record = Record::first(machine(), host(OWNER), AttemptId(0), Nonce(1));
        let mut world = Self {
            times: Arc::new(scene.times()),
            terms: Arc::new(scene.terms()),
            now: [BootTime(super::super::LONG_AGO); 3],
            lease: Arc::new(record),
            beats: BTreeMap::new(),
            pulses: [None, None],
            holders: [None, None],
            taker: None,
            source: None,
            destination: None,
            life: None,
            pending: BTreeMap::new(),
            late: Vec::new(),
            messages: Vec::new(),
            copies: [Copy::default(); 3],
            doings: Doings {
                renewals: scene.renewals,
                watches: scene.watches,
                ..Doings::default()
            },
            neglect: Neglect { hangs: scene.hangs, ..Neglect::default() },
            faults: scene.faults,
            drawn: 0,
            wrong: None,
        };
        world.stage(scene);
        world.normalise();
        world
    }

    pub(super) fn nonces(&mut self) -> Nonces {
        self.drawn += 1;
        let mut next = u128::from(self.drawn) << 32;
        Box::new(move || {
            next += 1;
            Nonce(next)
        })
    }

    /// Begins to keep a host's sign of life.
    pub(super) fn keep(&mut self, index: usize) {
        let parts = PulseParts {
            name: beat_of(index),
            times: Times::clone(&self.times),
            nonces: self.nonces(),
        };
        let (pulse, actions) = Pulse::start(self.now[index], parts);
        self.pulses[index] = Some(Arc::new(pulse));
        self.do_pulse(index, actions);
        // Reads, then writes the first beat.
        self.serve(Who::Pulse(index));
        self.serve(Who::Pulse(index));
    }

    /// The store does what is asked and answers at once.
    pub(super) fn serve(&mut self, who: Who) {
        self.applied(who);
        self.answered(who);
    }

    pub(super) fn view(&self, index: usize) -> Option<View> {
        self.pulses.get(index)?.as_ref()?.view().cloned()
    }

    /// Bound to the present life of a host.
    pub(super) fn bound(&self, record: Record, index: usize) -> Record {
        record.bound(self.view(index).map(|view| view.of))
    }

    /// The machine runs at its owner, under the lease as it is.
    pub(super) fn run_at_owner(&mut self) {
        let record = Record::clone(&self.lease);
        let epoch = record.epoch.0;
        self.copies[OWNER] = Copy { running: true, output: true, epoch, ..Copy::default() };
        let parts = self.holder_parts(OWNER, record);
        let (holder, actions) = Holder::new(self.now[OWNER], parts);
        self.holders[OWNER] = Some(Arc::new(holder));
        self.do_holder(OWNER, actions);
    }

    pub(super) fn holder_parts(&mut self, index: usize, record: Record) -> HolderParts {
        HolderParts {
            record,
            here: host(index),
            view: self.view(index),
            given_up: None,
            times: Times::clone(&self.times),
            nonces: self.nonces(),
        }
    }

    /// The owner's machine begins to move.
    pub(super) fn move_away(&mut self) {
        let (attempt, terms) = (AttemptId(1), Terms::clone(&self.terms));
        let (source_nonces, destination_nonces) = (self.nonces(), self.nonces());
        self.life = self.view(DESTINATION).map(|view| view.of);
        self.source = Some(Arc::new(SourceAuthority::new(SourceParts {
            holding: Holding::new(Record::clone(&self.lease)),
            to: host(DESTINATION),
            attempt,
            view: self.view(OWNER),
            terms: terms.clone(),
            nonces: source_nonces,
        })));
        self.destination = Some(Arc::new(DestinationAuthority::new(DestinationParts {
            machine: machine(),
            here: host(DESTINATION),
            from: host(OWNER),
            attempt,
            beat: self.life.clone(),
            terms,
            nonces: destination_nonces,
        })));
        (self.doings.offers, self.doings.wants) = (1, 1);
        self.holder_event(OWNER, HolderEvent::Moving(true));
    }

    /// The third host begins to wait for the machine. Its own life holds, and it is always ready.
    pub(super) fn watch(&mut self) {
        let parts = TakerParts {
            machine: machine(),
            here: host(TAKER),
            attempt: AttemptId(9),
            times: Times::clone(&self.times),
            nonces: self.nonces(),
        };
        let now = self.now[TAKER];
        let (taker, actions) = Taker::start(now, parts);
        self.taker = Some(Arc::new(taker));
        self.do_taker(actions);
        let of = BeatRef { name: beat_of(TAKER), incarnation: 1 };
        let view = View { of, until: now + Duration::from_secs(1 << 30) };
        self.taker_event(TakerEvent::View(Some(view)));
        self.taker_event(TakerEvent::Prepared);
    }

    pub(super) fn fail(&mut self, what: &str) {
        self.wrong.get_or_insert_with(|| what.into());
    }

    pub(super) fn replace(&mut self, expected: &Record, new: &Record) -> Outcome {
        let old = Arc::clone(&self.lease);
        if *old != *expected {
            return Outcome::Lost(Some(Record::clone(&old)));
        }
        let same = new.epoch == old.epoch && new.owner == old.owner;
        let rebound = new.beat != old.beat && new.handing_to == old.handing_to && same;
        if !(rebound || new.epoch > old.epoch || (new.handing_to.is_some() && same)) {
            self.fail("an epoch was used again");
        }
        self.lease = Arc::new(new.clone());
        Outcome::Won
    }

    /// What the store does with a call.
    pub(super) fn perform(&mut self, content: &Content) -> Answer {
        match content {
            Content::ReadLease(_) => Answer::Lease(Some(Record::clone(&self.lease))),
            Content::ReadBeat(name) => {
                Answer::Beat(self.beats.get(&index_of(name)).map(|beat| Beat::clone(beat)))
            }
            Content::SetLease { expected, new } => match self.replace(expected, new) {
                Outcome::Won => Answer::Won,
                Outcome::Lost(found) => Answer::Lease(found),
            },
            Content::SetBeat { expected, new } => {
                let index = index_of(&new.of.name);
                let there = self.beats.get(&index).map(|beat| Beat::clone(beat));
                if there != *expected {
                    return Answer::Beat(there);
                }
                self.beats.insert(index, Arc::new(new.clone()));
                Answer::Won
            }
        }
    }

    /// Nobody waits for the answer any more.
    pub(super) fn forget(&mut self, who: Who) {
        if let Some(Pending { asked, answer: None }) = self.pending.remove(&who) {
            self.late.push(asked);
        }
    }

    fn awaits(&self, who: Who) -> Option<OperationId> {
        match who {
            Who::Pulse(index) => self.pulses[index].as_ref()?.asked(),
            Who::Holder(index) => self.holders[index].as_ref()?.asked(),
            Who::Taker => self.taker.as_ref()?.asked(),
            Who::Surrender => self.neglect.surrender.as_ref()?.asked(),
            Who::Source => match &self.source.as_ref()?.state {
                source::State::WritingHandOver { write, .. }
                | source::State::TakingBack { write } => write.asked(),
                _ => None,
            },
            Who::Destination => match &self.destination.as_ref()?.state {
                destination::State::Unconfirmed { take, .. }
                | destination::State::FrozenUnconfirmed { take } => take.asked(),
                _ => None,
            },
        }
    }

    /// What can never have an effect again is not part of the state.
    pub(super) fn normalise(&mut self) {
        for who in Who::ALL {
            let current = self.pending.get(&who).map(|pending| pending.asked.operation);
            if current != self.awaits(who) {
                self.forget(who);
            }
        }
        for index in 0..3 {
            if self.copies[index].gone {
                self.copies[index] = Copy { gone: true, ..Copy::default() };
            }
        }
        let mut late = std::mem::take(&mut self.late);
        late.retain(|asked| match &asked.content {
            Content::SetLease { expected, .. } => *expected == *self.lease,
            Content::SetBeat { expected, new } => {
                let there = self.beats.get(&index_of(&new.of.name)).map(|beat| &**beat);
                there == expected.as_ref()
            }
            Content::ReadLease(_) | Content::ReadBeat(_) => false,
        });
        late.sort_by_key(|asked| nonce(&asked.content));
        late.dedup_by_key(|asked| nonce(&asked.content));
        self.late = late;
        let mut messages = std::mem::take(&mut self.messages);
        messages.retain(|message| self.matters(message));
        self.messages = messages;
    }

    fn matters(&self, message: &Message) -> bool {
        use crate::migrate::switchover::{
            DestinationEvent as De, DestinationState as D, SourceEvent as Se, SourceState as S,
        };
        match message {
            Message::ToSource(event) => {
                let Some(source) = &self.source else { return false };
                let (state, known) = (source.state(), source.offer.map(|offer| offer.serial));
                let over = matches!(state, S::Released | S::Aborted | S::Resumed(_) | S::Stopped);
                let sent = matches!(state, S::AwaitingVerdict | S::TakingBack | S::ServingPages(_));
                match event {
                    Se::Offer(offer) => !over && !sent && known.is_none_or(|k| k < offer.serial),
                    Se::Refused { .. } => {
                        !over && !matches!(state, S::TakingBack | S::ServingPages(_))
                    }
                    Se::Confirmed { .. } => !over && !matches!(state, S::ServingPages(_)),
                    _ => !over,
                }
            }
            Message::ToDestination(event) => {
                let Some(destination) = &self.destination else { return false };
                let state = destination.state();
                let early = matches!(state, D::Preparing | D::Offering);
                match event {
                    De::Token(_) => early,
                    _ => early || state == D::Loading,
                }
            }
        }
    }

    pub(super) fn digest(&self) -> u64 {
        let mut d = Digest::new(&self.lease);
        d.count_lives_from(self.beats.values().map(|beat| beat.of.clone()).collect());
        d.record(&self.lease);
        let copies = self.copies.map(|copy| Copy { epoch: 0, ..copy });
        d.put(&(copies, &self.doings, self.faults, self.wrong.is_some()));
        d.epochs(&self.copies.map(|copy| Epoch(copy.epoch)));
        d.put(&self.beats.keys().fold(0, |all, index| all | (1 << index)));
        d.each("beats", self.beats.values().map(|beat| &**beat), Digest::beat);
        for index in 0..2 {
            d.put(&(self.pulses[index].is_some(), self.holders[index].is_some()));
            if let Some(pulse) = &self.pulses[index] {
                pulse.digest(&mut d, self.now[index]);
            }
            if let Some(holder) = &self.holders[index] {
                holder.digest(&mut d, self.now[index]);
            }
        }
        let Neglect { hangs, hung, deaf, surrender, .. } = &self.neglect;
        d.put(&(hangs, hung, deaf, surrender.is_some()));
        if *hangs > 0 || *hung {
            d.put(&self.neglect.told_until.since(self.now[OWNER]));
        }
        d.epochs(self.neglect.given.as_slice());
        if let Some(surrender) = surrender {
            surrender.digest(&mut d, self.now[OWNER]);
        }
        d.put(&(self.taker.is_some(), self.source.is_some(), self.destination.is_some()));
        if let Some(taker) = &self.taker {
            let longest = super::super::PATIENCE_OF_TAKERS;
            taker.digest(&mut d, self.now[TAKER], longest);
        }
        if let Some(source) = &self.source {
            d.source(source, self.now[OWNER], AttemptId(1));
            let view = source.parts.view.as_ref();
            d.lives(view.map(|view| &view.of));
            d.put(&view.map(|view| view.until.since(self.now[OWNER])));
        }
        if let Some(destination) = &self.destination {
            d.destination(destination, self.now[DESTINATION]);
            d.lives(&self.life);
        }
        d.put(&(self.pending.len(), self.late.len()));
        for (who, pending) in &self.pending {
            d.put(who);
            content(&mut d, &pending.asked.content);
            match &pending.answer {
                None => d.put(&"asked"),
                Some(Answer::Won) => d.put(&"won"),
                Some(Answer::Lease(found)) => d.each("lease", found, Digest::record),
                Some(Answer::Beat(found)) => d.each("beat", found, Digest::beat),
                Some(Answer::Unavailable(_)) => d.put(&"none"),
            }
        }
        for asked in &self.late {
            content(&mut d, &asked.content);
        }
        d.messages(&self.messages);
        d.end()
    }
}

fn nonce(content: &Content) -> u128 {
    match content {
        Content::SetLease { new, .. } => new.nonce.0,
        Content::SetBeat { new, .. } => new.nonce.0,
        Content::ReadLease(_) | Content::ReadBeat(_) => 0,
    }
}

fn content(d: &mut Digest, content: &Content) {
    match content {
        Content::ReadLease(_) => d.put(&3_u8),
        Content::ReadBeat(name) => d.put(&(4_u8, index_of(name))),
        Content::SetLease { new, .. } => d.record(new),
        Content::SetBeat { new, .. } => d.beat(new),
    }
}
