//! Gives up the lease of one machine that its own host does not look after any more, where the sign of life
//! that the lease refers to goes on for the host's other machines.
//!
//! The lease is bound, by compare-and-set, to a life of the machine's own beat that is over already; so a
//! taker need not wait. What must hold:
//! - Nothing is written before the end of what whoever looked after the machine was last told
//!   ([`SurrenderParts::not_before`]): by then the machine stands still, or its host is as one that was fenced.
//! - While a token may be out it waits for the end of the offers too, so that a destination that has the
//!   machine wins.
//! - Whoever comes back after [`SurrenderAction::GivingUp`] is told ([`HolderEvent::GivenUp`]
//!   (super::HolderEvent::GivenUp)) before it sees the life again under which it held the machine.

use super::{
    Answer, Call, Content, Nonces, OperationId, Times,
    store::{Read, Verdict, Write},
    times::Rule,
};
use crate::lease::{Beat, BeatName, BeatRef, BootTime, Epoch, HostName, MachineName, Record};
use std::time::Duration;

/// How late a write may come that somebody made who has died since.
const LATE_WRITE: Duration = Duration::from_secs(10);

/// What a surrender is made of.
#[cfg_attr(test, derive(Clone))]
pub struct SurrenderParts {
    /// Which machine.
    pub machine: MachineName,
    /// This host, whose beat the machine's lease may refer to.
    pub here: HostName,
    /// The end of what whoever looked after it was told.
    pub not_before: BootTime,
    /// The times.
    pub times: Times,
    /// For writes.
    pub nonces: Nonces,
}

/// What happens to a surrender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SurrenderEvent {
    /// [`Surrender::wake_at`] has come (or any other time).
    Tick,
    /// The store's answer to a [`SurrenderAction::Store`].
    Answer {
        /// The call.
        operation: OperationId,
        /// The answer.
        answer: Answer,
    },
}

/// What a surrender wants done, in this order.
#[expect(clippy::large_enum_variant, reason = "a handful each")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SurrenderAction {
    /// Ask the store.
    Store(Call),
    /// From here on the lease may be given up, if it is of this epoch or an earlier one: remember it.
    GivingUp(Epoch),
    /// It is over, and what became of it.
    Done(String),
    /// Tell people.
    Report(String),
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) enum State {
    Waiting,
    /// What is there of the machine's own beat?
    Looking(Read),
    /// Writes a life of it that is over.
    Ending(Write<Beat>),
    /// What does the lease say?
    Reading(Read),
    /// It is being handed over, until no offer holds; or not bound, until no late write binds it.
    Clearing(BootTime),
    Binding(Write<Record>),
    Done,
}

/// See the [module](self).
#[cfg_attr(test, derive(Clone))]
pub struct Surrender {
    pub(super) parts: SurrenderParts,
    pub(super) state: State,
    /// The life that is over.
    pub(super) over: Option<BeatRef>,
    /// It was not bound when it was looked at first.
    pub(super) unbound: bool,
    next_operation: u64,
    told: bool,
}

impl Surrender {
    /// Begins to wait; ask [`Surrender::wake_at`].
    #[must_use]
    pub const fn new(parts: SurrenderParts) -> Self {
        Self {
            parts,
            state: State::Waiting,
            over: None,
            unbound: false,
            next_operation: 0,
            told: false,
        }
    }

    /// Whether the lease has not been written yet: it can be dropped, and whoever held the machine goes on.
    #[must_use]
    pub const fn may_be_dropped(&self) -> bool {
        !matches!(self.state, State::Binding(_))
    }

    /// When the next [`SurrenderEvent::Tick`] is due. Must be asked again after every event.
    #[must_use]
    pub fn wake_at(&self) -> Option<BootTime> {
        match &self.state {
            State::Waiting => Some(self.parts.not_before),
            State::Looking(read) | State::Reading(read) => read.wake_at(),
            State::Ending(write) => write.wake_at(),
            State::Clearing(until) => Some(*until),
            State::Binding(write) => write.wake_at(),
            State::Done => None,
        }
    }

    /// Takes an event, returns what to do. `now` is this host's boot time.
    pub fn on(&mut self, now: BootTime, event: SurrenderEvent) -> Vec<SurrenderAction> {
        let mut out = Vec::new();
        match event {
            SurrenderEvent::Tick => self.on_tick(now, &mut out),
            SurrenderEvent::Answer { operation, answer } => {
                self.on_answer(now, operation, answer, &mut out);
            }
        }
        out
    }

    fn on_tick(&mut self, now: BootTime, out: &mut Vec<SurrenderAction>) {
        let next_operation = &mut self.next_operation;
        let call = match &mut self.state {
            State::Waiting => {
                let waits = self.parts.times.keeps(Rule::GiveUpAfterTerm);
                if !waits || now >= self.parts.not_before {
                    self.look(now, out);
                }
                return;
            }
            State::Clearing(until) if now >= *until => return self.read(now, out),
            State::Clearing(_) | State::Done => None,
            State::Looking(read) | State::Reading(read) => read.retry(now, next_operation),
            State::Ending(write) => write.retry(now, next_operation),
            State::Binding(write) => write.retry(now, next_operation),
        };
        out.extend(call.map(SurrenderAction::Store));
    }

    fn own(&self) -> BeatName {
        BeatName::of_runner(self.parts.here.clone(), self.parts.machine.clone())
    }

    fn look(&mut self, now: BootTime, out: &mut Vec<SurrenderAction>) {
        let content = Content::ReadBeat(self.own());
        let (read, call) = Read::start(now, content, &self.parts.times, &mut self.next_operation);
        self.state = State::Looking(read);
        out.push(SurrenderAction::Store(call));
    }

    fn read(&mut self, now: BootTime, out: &mut Vec<SurrenderAction>) {
        let content = Content::ReadLease(self.parts.machine.clone());
        let (read, call) = Read::start(now, content, &self.parts.times, &mut self.next_operation);
        self.state = State::Reading(read);
        out.push(SurrenderAction::Store(call));
    }

    fn on_answer(
        &mut self,
        now: BootTime,
        operation: OperationId,
        answer: Answer,
        out: &mut Vec<SurrenderAction>,
    ) {
        match &mut self.state {
            State::Waiting | State::Clearing(_) | State::Done => {}
            State::Looking(read) => match read.answer::<Beat>(now, operation, answer) {
                None => {}
                Some(Err(why)) => self.silence(&why, out),
                Some(Ok(found)) => self.end_own(now, found, out),
            },
            State::Ending(write) => match write.answer(now, operation, answer) {
                Verdict::Stale => {}
                Verdict::Unknown(why) => self.silence(&why, out),
                Verdict::Lost(found) => self.end_own(now, found, out),
                Verdict::Won => {
                    self.over = Some(write.new_record().of.clone());
                    self.read(now, out);
                }
            },
            State::Reading(read) => match read.answer::<Record>(now, operation, answer) {
                None => {}
                Some(Err(why)) => self.silence(&why, out),
                Some(Ok(found)) => self.bind(now, found, out),
            },
            State::Binding(write) => match write.answer(now, operation, answer) {
                Verdict::Stale => {}
                Verdict::Unknown(why) => self.silence(&why, out),
                Verdict::Lost(found) => self.bind(now, found, out),
                Verdict::Won => {
                    let epoch = write.new_record().epoch;
                    self.done(&format!("given up at {epoch}: any host may take it"), out);
                }
            },
        }
    }

    /// A life of its own beat begins and ends in one write.
    fn end_own(&mut self, now: BootTime, found: Option<Beat>, out: &mut Vec<SurrenderAction>) {
        let name = self.own();
        let before = found.as_ref().map(|beat| beat.of.incarnation);
        let SurrenderParts { here, times, nonces, .. } = &mut self.parts;
        let nonce = nonces();
        let new = Beat::begun(name, before, times.term, nonce).fenced(here.clone(), nonce);
        let (write, call) = Write::start(now, found, new, times, &mut self.next_operation);
        self.state = State::Ending(write);
        out.push(SurrenderAction::Store(call));
    }

    fn bind(&mut self, now: BootTime, found: Option<Record>, out: &mut Vec<SurrenderAction>) {
        let Some(record) = found else { return self.done("it has no lease", out) };
        let giving_up = SurrenderAction::GivingUp(record.epoch);
        if record.owner != self.parts.here {
            let why = format!("{} owns it at {}", record.owner, record.epoch);
            out.push(giving_up);
            return self.done(&why, out);
        }
        let Some(life) = &record.beat else {
            // Nobody can take it; but whoever looked after it may have been about to bind it.
            if std::mem::replace(&mut self.unbound, true) {
                return self.done("it is not protected", out);
            }
            self.state = State::Clearing(now + LATE_WRITE);
            return;
        };
        if life.name != BeatName::of_host(self.parts.here.clone()) {
            out.push(giving_up);
            return self.done("its lease does not refer to this host's sign of life", out);
        }
        let SurrenderParts { not_before, times, nonces, .. } = &mut self.parts;
        // Its last token was sent before that time, under an offer that holds no longer than this.
        let clear = *not_before + times.drift.outlast(times.longest_offer);
        if record.handing_to.is_some() && now < clear {
            self.state = State::Clearing(clear);
            return;
        }
        let new = record.rebound(self.over.clone(), nonces());
        let (write, call) = Write::start(now, Some(record), new, times, &mut self.next_operation);
        self.state = State::Binding(write);
        out.extend([giving_up, SurrenderAction::Store(call)]);
    }

    fn done(&mut self, what: &str, out: &mut Vec<SurrenderAction>) {
        self.state = State::Done;
        out.push(SurrenderAction::Done(what.to_owned()));
    }

    /// Told once.
    fn silence(&mut self, why: &str, out: &mut Vec<SurrenderAction>) {
        if !std::mem::replace(&mut self.told, true) {
            out.push(SurrenderAction::Report(format!(
                "machine \"{}\" cannot be given up yet: {why}",
                self.parts.machine
            )));
        }
    }
}
