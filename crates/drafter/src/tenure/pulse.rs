//! Keeps a sign of life in the store.

use super::{
    Answer, Call, Content, Nonces, OperationId, Times,
    store::{Read, Verdict, Write},
    times::Rule,
};
use crate::lease::{Beat, BeatName, BeatRef, BootTime};

/// Until when a life holds, as far as its keeper knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Which life.
    pub of: BeatRef,
    /// The end of its term by this host's clock.
    pub until: BootTime,
}

/// What a pulse is made of.
#[cfg_attr(test, derive(Clone))]
pub struct PulseParts {
    /// Whose sign of life. No other process keeps it.
    pub name: BeatName,
    /// The times.
    pub times: Times,
    /// For writes.
    pub nonces: Nonces,
}

/// What happens to a pulse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PulseEvent {
    /// [`Pulse::wake_at`] has come (or any other time).
    Tick,
    /// The store's answer to a [`PulseAction::Store`].
    Answer {
        /// The call.
        operation: OperationId,
        /// The answer.
        answer: Answer,
    },
}

/// What a pulse wants done, in this order.
#[expect(clippy::large_enum_variant, reason = "a few per second")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PulseAction {
    /// Ask the store.
    Store(Call),
    /// Tell every holder on this host (and sources and takers): `None` if this life has ended before
    /// its time, because somebody fenced it.
    Tell(Option<View>),
    /// Tell people.
    Report(String),
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) enum State {
    /// What is there from an earlier life?
    Reading(Read),
    /// Writes the first beat of a life.
    Beginning(Write<Beat>),
    Alive {
        beat: Beat,
        next: BootTime,
    },
    Renewing(Write<Beat>),
}

/// See the [module](super).
#[cfg_attr(test, derive(Clone))]
pub struct Pulse {
    parts: PulseParts,
    pub(super) state: State,
    view: Option<View>,
    next_operation: u64,
    /// The silence of the store has been told.
    told: bool,
}

impl Pulse {
    /// Begins a new life: what refers to an earlier one is over.
    #[must_use]
    pub fn start(now: BootTime, parts: PulseParts) -> (Self, Vec<PulseAction>) {
        let mut next_operation = 0;
        let content = Content::ReadBeat(parts.name.clone());
        let (read, call) = Read::start(now, content, &parts.times, &mut next_operation);
        let state = State::Reading(read);
        let this = Self { parts, state, view: None, next_operation, told: false };
        (this, vec![PulseAction::Store(call)])
    }

    /// Until when the present life holds; `None` before it has begun and after it was fenced. It may
    /// be over: the reader compares.
    #[must_use]
    pub fn view(&self) -> Option<&View> {
        self.view.as_ref()
    }

    /// When the next [`PulseEvent::Tick`] is due. Must be asked again after every event.
    #[must_use]
    pub fn wake_at(&self) -> Option<BootTime> {
        match &self.state {
            State::Reading(read) => read.wake_at(),
            State::Beginning(write) | State::Renewing(write) => write.wake_at(),
            State::Alive { next, .. } => Some(*next),
        }
    }

    /// Takes an event, returns what to do. `now` is this host's boot time.
    pub fn on(&mut self, now: BootTime, event: PulseEvent) -> Vec<PulseAction> {
        let mut out = Vec::new();
        match event {
            PulseEvent::Tick => self.on_tick(now, &mut out),
            PulseEvent::Answer { operation, answer } => {
                self.on_answer(now, operation, answer, &mut out);
            }
        }
        out
    }

    fn on_tick(&mut self, now: BootTime, out: &mut Vec<PulseAction>) {
        let next_operation = &mut self.next_operation;
        let call = match &mut self.state {
            State::Reading(read) => read.retry(now, next_operation),
            State::Beginning(write) | State::Renewing(write) => write.retry(now, next_operation),
            State::Alive { beat, next } if now >= *next => {
                let PulseParts { times, nonces, .. } = &mut self.parts;
                let new = beat.renewed(times.term, nonces());
                let expected = Some(beat.clone());
                let (write, call) = Write::start(now, expected, new, times, next_operation);
                self.state = State::Renewing(write);
                Some(call)
            }
            State::Alive { .. } => None,
        };
        out.extend(call.map(PulseAction::Store));
    }

    fn on_answer(
        &mut self,
        now: BootTime,
        operation: OperationId,
        answer: Answer,
        out: &mut Vec<PulseAction>,
    ) {
        match &mut self.state {
            State::Alive { .. } => {}
            State::Reading(read) => match read.answer::<Beat>(now, operation, answer) {
                None => {}
                Some(Err(why)) => self.silence(&why, out),
                Some(Ok(found)) => self.begin(now, found, out),
            },
            State::Beginning(write) | State::Renewing(write) => {
                match write.answer(now, operation, answer) {
                    Verdict::Stale => {}
                    Verdict::Unknown(why) => self.silence(&why, out),
                    Verdict::Won => {
                        let beat = write.new_record().clone();
                        let since = write.counts_from(now, &self.parts.times);
                        self.alive(beat, since, out);
                    }
                    Verdict::Lost(found) => self.lost(now, found, out),
                }
            }
        }
    }

    fn silence(&mut self, why: &str, out: &mut Vec<PulseAction>) {
        if !std::mem::replace(&mut self.told, true) {
            let name = &self.parts.name;
            out.push(PulseAction::Report(format!(
                "the sign of life of {name} cannot be renewed: {why}; protected machines stand still \
                 here when its term ends, until the store answers"
            )));
        }
    }

    fn alive(&mut self, beat: Beat, since: BootTime, out: &mut Vec<PulseAction>) {
        if std::mem::take(&mut self.told) {
            let name = &self.parts.name;
            out.push(PulseAction::Report(format!("the sign of life of {name} is renewed again")));
        }
        let view = View { of: beat.of.clone(), until: since + beat.term };
        self.state = State::Alive { beat, next: since + self.parts.times.renew_every };
        self.view = Some(view);
        out.push(PulseAction::Tell(self.view.clone()));
    }

    /// Somebody else has written.
    fn lost(&mut self, now: BootTime, found: Option<Beat>, out: &mut Vec<PulseAction>) {
        let own = match &self.state {
            State::Renewing(write) => Some(write.new_record().of.clone()),
            _ => None,
        };
        if let (Some(own), Some(fence)) = (&own, &found)
            && fence.of == *own
            && !self.parts.times.keeps(Rule::FenceEndsLife)
        {
            let PulseParts { times, nonces, .. } = &mut self.parts;
            let new = Beat { fenced_by: None, ..fence.renewed(times.term, nonces()) };
            let (write, call) = Write::start(now, found, new, times, &mut self.next_operation);
            self.state = State::Renewing(write);
            out.push(PulseAction::Store(call));
            return;
        }
        if let Some(own) = own {
            let who = match &found {
                Some(Beat { fenced_by: Some(by), of, .. }) if *of == own => {
                    format!("host {by} has declared it over")
                }
                Some(_) => "another process keeps it too: only one may".to_owned(),
                None => "the store has lost it".to_owned(),
            };
            out.push(PulseAction::Report(format!(
                "{own} has ended: {who}; protected machines stand still here until their leases are \
                 got back"
            )));
            self.view = None;
            out.push(PulseAction::Tell(None));
        }
        self.begin(now, found, out);
    }

    fn begin(&mut self, now: BootTime, found: Option<Beat>, out: &mut Vec<PulseAction>) {
        let PulseParts { name, times, nonces } = &mut self.parts;
        // Also a store that has forgotten never sees a life again that was there.
        let own = match &self.state {
            State::Beginning(write) | State::Renewing(write) => write.new_record().of.incarnation,
            _ => 0,
        };
        let before = found.as_ref().map(|beat| beat.of.incarnation).max(Some(own));
        let new = Beat::begun(name.clone(), before, times.term, nonces());
        let (write, call) = Write::start(now, found, new, times, &mut self.next_operation);
        self.state = State::Beginning(write);
        out.push(PulseAction::Store(call));
    }
}
