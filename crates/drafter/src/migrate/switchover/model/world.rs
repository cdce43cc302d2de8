//! A state: two hosts, one store, one attempt to move the machine and what is under way for it.

use super::{Message, Size, digest::Digest};
use crate::{
    lease::{AttemptId, BootTime, Epoch, HostName, MachineName, Nonce, Outcome, Record},
    migrate::switchover::{
        DestinationAuthority, DestinationParts, DestinationState, Holding, LeaseAnswer, LeaseCall,
        Nonces, SourceAuthority, SourceParts, SourceState, Terms, destination, source,
    },
};
use std::sync::Arc;

/// The hosts, by number.
pub(super) const HOSTS: [&str; 2] = ["a", "b"];

/// What a host has of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Copy {
    pub(super) running: bool,
    pub(super) frozen: bool,
    pub(super) output: bool,
    /// The epoch under which it is heard.
    pub(super) epoch: u64,
    pub(super) crashed: bool,
    /// Its end was ordered.
    pub(super) ending: bool,
    pub(super) discarded: bool,
}

impl Copy {
    pub(super) const fn executes(&self) -> bool {
        self.running && !self.frozen && !self.crashed && !self.discarded
    }

    pub(super) const fn gone(&self) -> bool {
        self.crashed || self.discarded
    }
}

/// A call to the store whose answer an authority awaits.
#[derive(Clone)]
pub(super) struct Pending {
    pub(super) call: Arc<LeaseCall>,
    /// What the store has done, once it has.
    pub(super) answer: Option<LeaseAnswer>,
}

/// What outlives a destination's runner: the guard with its page.
#[derive(Clone, Copy)]
pub(super) struct Left {
    /// Until when the machine may run, by its host's clock.
    pub(super) until: Option<BootTime>,
    /// The lease was asked for.
    pub(super) asked: bool,
}

/// What the hosts do for the attempt under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Doings {
    pub(super) pausing: bool,
    pub(super) resume_when_paused: bool,
    pub(super) loading: bool,
    /// It runs, and its runner has not noticed.
    pub(super) to_say_running: bool,
    /// No byte of the token's message has left.
    pub(super) not_sent: bool,
    /// Flushes are owed with the token, and the source has not synced.
    pub(super) owed: bool,
    pub(super) synced: bool,
    pub(super) all_present: bool,
    /// The copy here was made of the token.
    pub(super) loaded: bool,
    /// The destination has said so.
    pub(super) refused: bool,
    pub(super) cut: bool,
    /// Who has still to notice: the source, the destination.
    pub(super) to_notice: [bool; 2],
    /// The connection of a runner that died is not its successor's.
    pub(super) deaf: bool,
    /// The source's runner is dead.
    pub(super) runner_dead: bool,
    pub(super) wants: u8,
    pub(super) offers: u8,
}

/// Everything. The authorities are the ones that run.
#[derive(Clone)]
pub(super) struct World {
    pub(super) terms: Arc<Terms>,
    pub(super) now: [BootTime; 2],
    pub(super) record: Arc<Record>,
    pub(super) store_up: bool,
    /// Writes whose author has been told that nobody answers, or does not wait any more.
    pub(super) late: Vec<Arc<LeaseCall>>,
    pub(super) copies: [Copy; 2],
    pub(super) from: usize,
    pub(super) attempt: AttemptId,
    pub(super) source: Option<Arc<SourceAuthority>>,
    pub(super) destination: Option<Arc<DestinationAuthority>>,
    pub(super) calls: [Option<Pending>; 2],
    pub(super) messages: Vec<Arc<Message>>,
    pub(super) doings: Doings,
    /// The destination's runner is dead.
    pub(super) left: Option<Left>,
    /// What its successor has read.
    pub(super) found: Option<Arc<Record>>,
    /// For every attempt.
    offers: u8,
    wants: u8,
    pub(super) attempts: u8,
    pub(super) faults: u8,
    authorities: u8,
    /// The invariant that is broken.
    pub(super) wrong: Option<Arc<str>>,
}

pub(super) fn host(index: usize) -> HostName {
    HostName::new(HOSTS[index]).unwrap()
}

fn machine() -> MachineName {
    MachineName::new("m").unwrap()
}

impl World {
    pub(super) fn new(size: &Size) -> Self {
        let record = Record::first(machine(), host(0), AttemptId(0), Nonce(1));
        let here = Copy { running: true, output: true, epoch: record.epoch.0, ..Copy::default() };
        let mut world = Self {
            terms: Arc::new(super::times_of_a_move(size.broken)),
            now: [BootTime(super::LONG_AGO); 2],
            record: Arc::new(record.clone()),
            store_up: true,
            late: Vec::new(),
            copies: [here, Copy::default()],
            from: 0,
            attempt: AttemptId(0),
            source: None,
            destination: None,
            calls: [None, None],
            messages: Vec::new(),
            doings: Doings::default(),
            left: None,
            found: None,
            offers: size.offers,
            wants: size.wants,
            attempts: size.attempts,
            faults: size.faults,
            authorities: 0,
            wrong: None,
        };
        world.begin(0, Holding::new(record));
        world
    }

    pub(super) const fn to(&self) -> usize {
        1 - self.from
    }

    /// Every authority draws from numbers of its own.
    pub(super) fn nonces(&mut self) -> Nonces {
        self.authorities += 1;
        let mut next = u128::from(self.authorities) << 32;
        Box::new(move || {
            next += 1;
            Nonce(next)
        })
    }

    /// The next attempt. What the one before has left at its destination makes room.
    pub(super) fn begin(&mut self, from: usize, holding: Holding) {
        self.attempts -= 1;
        self.from = from;
        self.attempt = AttemptId(self.attempt.0 + 1);
        for end in 0..2 {
            self.forget_call(end);
        }
        let to = self.to();
        let (attempt, terms) = (self.attempt, Terms::clone(&self.terms));
        let (source_nonces, destination_nonces) = (self.nonces(), self.nonces());
        self.source = Some(Arc::new(SourceAuthority::new(SourceParts {
            holding,
            to: host(to),
            attempt,
            view: None,
            terms: terms.clone(),
            nonces: source_nonces,
        })));
        self.destination = Some(Arc::new(DestinationAuthority::new(DestinationParts {
            machine: machine(),
            here: host(to),
            from: host(from),
            attempt,
            beat: None,
            terms,
            nonces: destination_nonces,
        })));
        self.copies[to] = Copy::default();
        self.messages.clear();
        self.doings = Doings { wants: self.wants, offers: self.offers, ..Doings::default() };
        (self.left, self.found) = (None, None);
    }

    /// What a destination that comes back is made of.
    pub(super) fn destination_parts(&mut self) -> DestinationParts {
        DestinationParts {
            machine: machine(),
            here: host(self.to()),
            from: host(self.from),
            attempt: self.attempt,
            beat: None,
            terms: Terms::clone(&self.terms),
            nonces: self.nonces(),
        }
    }

    pub(super) fn source_state(&self) -> Option<SourceState> {
        self.source.as_ref().map(|source| source.state())
    }

    pub(super) fn destination_state(&self) -> Option<DestinationState> {
        self.destination.as_ref().map(|destination| destination.state())
    }

    /// Who can begin the next attempt, with what its host holds.
    pub(super) fn movable(&self) -> Option<(usize, Holding)> {
        use {DestinationState as D, SourceState as S};
        let (from, to) = (self.from, self.to());
        if self.copies[from].executes() && !self.doings.pausing {
            return match &self.source {
                // The next runner reads the lease.
                None => (self.store_up && self.record.owner == host(from))
                    .then(|| (from, Holding::new(Record::clone(&self.record)))),
                Some(source) => matches!(source.state(), S::Aborted | S::Resumed(_))
                    .then(|| (from, source.holding())),
            };
        }
        let settled = self.destination.as_ref().filter(|d| matches!(d.state(), D::Settled(_)));
        let holding = settled?.holding()?;
        self.copies[to].executes().then_some((to, holding))
    }

    /// The compare-and-set itself.
    pub(super) fn replace(&mut self, expected: &Record, new: &Record) -> Outcome {
        if *self.record != *expected {
            return Outcome::Lost(Some(Record::clone(&self.record)));
        }
        let old = &self.record;
        if new.handing_to.is_some() {
            if new.epoch != old.epoch || new.owner != old.owner {
                self.fail("a hand-over changed the owner or the epoch");
            }
        } else if new.epoch <= old.epoch {
            self.fail("an epoch was used again");
        }
        self.record = Arc::new(new.clone());
        Outcome::Won
    }

    pub(super) fn fail(&mut self, what: &str) {
        self.wrong.get_or_insert_with(|| what.into());
    }

    /// An authority does not wait for its call any more: a write may be on its way all the same.
    pub(super) fn forget_call(&mut self, end: usize) {
        if let Some(Pending { call, answer: None }) = self.calls[end].take() {
            self.late.push(call);
        }
    }

    /// What can never have an effect again is not part of the state.
    pub(super) fn normalise(&mut self) {
        let awaited = [
            self.source.as_ref().and_then(|source| asked_by_source(&source.state)),
            self.destination.as_ref().and_then(|dest| asked_by_destination(&dest.state)),
        ];
        for (end, awaited) in awaited.into_iter().enumerate() {
            let current = self.calls[end].as_ref().map(|pending| pending.call.operation);
            if current != awaited {
                self.forget_call(end);
            }
        }
        for copy in &mut self.copies {
            if copy.gone() {
                let Copy { crashed, discarded, .. } = *copy;
                *copy = Copy { crashed, discarded, ..Copy::default() };
            }
        }
        self.forget_doings();
        // A record is never written twice, so a write that expects an earlier one is lost for ever.
        let mut late = std::mem::take(&mut self.late);
        late.retain(|call| call.expected == *self.record);
        late.sort_by_key(|call| call.new.nonce.0);
        late.dedup_by_key(|call| call.new.nonce.0);
        self.late = late;
        let mut messages = std::mem::take(&mut self.messages);
        messages.retain(|message| self.matters(message));
        self.messages = messages;
    }

    fn forget_doings(&mut self) {
        use {DestinationState as D, SourceState as S};
        let (source, destination) = (self.source_state(), self.destination_state());
        let (from, to) = (self.copies[self.from], self.copies[self.to()]);
        let doings = &mut self.doings;
        if !matches!(source, Some(S::Copying | S::AwaitingOffer | S::WritingHandOver)) {
            doings.wants = 0;
        }
        if !matches!(destination, Some(D::Preparing | D::Offering)) {
            doings.offers = 0;
        }
        let source_over = source
            .is_some_and(|s| matches!(s, S::Released | S::Aborted | S::Resumed(_) | S::Stopped))
            || from.gone();
        let destination_over = to.gone()
            || destination
                .is_some_and(|d| matches!(d, D::Refused | D::Discarded | D::Lost | D::Settled(_)));
        if source_over {
            (doings.not_sent, doings.to_notice[0]) = (false, false);
        }
        if from.gone() {
            (doings.pausing, doings.runner_dead) = (false, false);
        }
        if destination_over {
            doings.to_notice[1] = false;
            (doings.owed, doings.synced, doings.loaded) = (false, false, false);
            (doings.loading, doings.to_say_running) = (false, false);
            doings.all_present &= matches!(destination, Some(D::Settled(_)));
        }
        if to.gone() {
            (self.left, self.found) = (None, None);
        }
    }

    /// Whether a message can still change its receiver (states are never entered again).
    fn matters(&self, message: &Message) -> bool {
        use crate::migrate::switchover::{DestinationEvent as De, SourceEvent as Se};
        use {DestinationState as D, SourceState as S};
        match message {
            Message::ToSource(event) => {
                let Some(source) = self.source.as_ref().filter(|_| !self.doings.deaf) else {
                    return false;
                };
                let state = source.state();
                let before_token = matches!(
                    state,
                    S::Copying | S::AwaitingOffer | S::WritingHandOver | S::Pausing
                );
                let open = before_token || matches!(state, S::AwaitingVerdict | S::TakingBack);
                match event {
                    Se::Offer(offer) => {
                        before_token && source.offer.is_none_or(|known| known.serial < offer.serial)
                    }
                    Se::Refused { .. } => before_token || state == S::AwaitingVerdict,
                    Se::Confirmed { .. } => open,
                    _ => open || matches!(state, S::ServingPages(_)),
                }
            }
            Message::ToDestination(event) => {
                let Some(destination) = &self.destination else { return false };
                let state = destination.state();
                match event {
                    De::Token(_) => {
                        matches!(state, D::Preparing | D::Offering)
                            || (matches!(state, D::Refused | D::Discarded) && !self.doings.refused)
                    }
                    De::SourceDurable => !destination.source_durable,
                    _ => !matches!(state, D::Refused | D::Discarded | D::Lost | D::Settled(_)),
                }
            }
        }
    }

    /// What makes two states one: everything that can matter later, with times from now, and names of
    /// records by their first appearance.
    pub(super) fn digest(&self) -> u64 {
        let mut d = Digest::new(&self.record);
        d.record(&self.record);
        let copies = self.copies.map(|copy| Copy { epoch: 0, ..copy });
        d.put(&(self.store_up, copies, self.from, &self.doings));
        d.put(&(self.attempts, self.faults, self.wrong.is_some()));
        d.epochs(&self.copies.map(|copy| Epoch(copy.epoch)));
        match &self.source {
            None => d.put(&"no source"),
            Some(source) => d.source(source, self.now[self.from], self.attempt),
        }
        match &self.destination {
            None => d.put(&"no destination"),
            Some(destination) => d.destination(destination, self.now[self.to()]),
        }
        let now = self.now[self.to()];
        let until = |left: &Left| left.until.map(|until| (until < now, until.since(now)));
        d.put(&self.left.as_ref().map(|left| (until(left), left.asked)));
        d.each("found", self.found.as_deref(), Digest::record);
        for pending in &self.calls {
            d.put(&pending.is_some());
            if let Some(pending) = pending {
                d.record(&pending.call.new);
                d.answer(pending.answer.as_ref());
            }
        }
        d.each("late", self.late.iter().map(|call| &call.new), Digest::record);
        d.messages(&self.messages);
        d.end()
    }
}

fn asked_by_source(state: &source::State) -> Option<crate::migrate::switchover::OperationId> {
    match state {
        source::State::WritingHandOver { write, .. } | source::State::TakingBack { write } => {
            write.asked()
        }
        _ => None,
    }
}

fn asked_by_destination(
    state: &destination::State,
) -> Option<crate::migrate::switchover::OperationId> {
    match state {
        destination::State::Unconfirmed { take, .. }
        | destination::State::FrozenUnconfirmed { take } => take.asked(),
        _ => None,
    }
}
