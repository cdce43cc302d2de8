//! Takes a protected machine whose owner shows no sign of life.

use super::{
    Answer, Call, Content, Nonces, OperationId, Times, View,
    store::{Read, Verdict, Write},
    times::Rule,
};
use crate::lease::{AttemptId, Beat, BeatRef, BootTime, HostName, MachineName, Record};

/// What a taker is made of.
#[cfg_attr(test, derive(Clone))]
pub struct TakerParts {
    /// Which machine.
    pub machine: MachineName,
    /// This host.
    pub here: HostName,
    /// This try, a number never used before.
    pub attempt: AttemptId,
    /// The times.
    pub times: Times,
    /// For writes.
    pub nonces: Nonces,
}

/// What happens to a taker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TakerEvent {
    /// [`Taker::wake_at`] has come (or any other time).
    Tick,
    /// This host's own pulse says until when its life holds: the machine is taken under it.
    View(Option<View>),
    /// Everything is ready to start the machine here. May be said at any time.
    Prepared,
    /// The store's answer to a [`TakerAction::Store`].
    Answer {
        /// The call.
        operation: OperationId,
        /// The answer.
        answer: Answer,
    },
}

/// What a taker wants done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TakerAction {
    /// Ask the store.
    Store(Call),
    /// The owner's life is over, and the machine can be taken: prepare it, if that is not done
    /// ([`TakerEvent::Prepared`]). Another host may be faster.
    Orphaned(Record),
    /// The machine is this host's: start it under a [`Holder`](super::Holder) of this record.
    Taken(Record),
    /// There is nothing to take now, and this taker is done: the machine is not protected, is this
    /// host's already, or has no lease.
    Done(String),
    /// Tell people.
    Report(String),
}

/// Where a taker is; see the drawing in the [module](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakerState {
    /// Reads the lease.
    Looking,
    /// Looks at the owner's beat again and again.
    Watching,
    /// The beat has stood still for long enough: it is being fenced.
    Fencing,
    /// A move was under way: its offers must end first.
    Clearing,
    /// Waits until the machine is prepared and this host's own life holds.
    Ready,
    /// Writes the lease.
    Taking,
    /// The machine is this host's.
    Taken,
    /// Nothing to do.
    Done,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) enum State {
    Looking(Read),
    Watching { record: Record, read: Option<Read>, next: BootTime },
    Fencing { record: Record, write: Write<Beat> },
    Clearing { record: Record, until: BootTime },
    Ready { record: Record },
    Taking { write: Write<Record> },
    Taken,
    Done,
}

/// A life that has ended, whoever ended it.
#[derive(Clone, Debug)]
pub(super) struct Dead {
    pub(super) life: BeatRef,
    /// Since when that is known here.
    pub(super) known: BootTime,
    /// When its last term is over too. A fence comes after that; the next life of the same keeper may
    /// begin while a machine of the one before runs to the end of its term.
    pub(super) over: BootTime,
}

/// See the [module](super).
#[cfg_attr(test, derive(Clone))]
pub struct Taker {
    parts: TakerParts,
    pub(super) state: State,
    /// The beat seen last, and since when.
    pub(super) seen: Option<(Beat, BootTime)>,
    /// A life that is known to be over.
    pub(super) dead: Option<Dead>,
    view: Option<View>,
    pub(super) prepared: bool,
    told: Option<BeatRef>,
    next_operation: u64,
    silent: bool,
}

impl Taker {
    /// Begins to watch.
    #[must_use]
    pub fn start(now: BootTime, parts: TakerParts) -> (Self, Vec<TakerAction>) {
        let mut this = Self {
            parts,
            state: State::Done,
            seen: None,
            dead: None,
            view: None,
            prepared: false,
            told: None,
            next_operation: 0,
            silent: false,
        };
        let mut out = Vec::new();
        this.look(now, &mut out);
        (this, out)
    }

    /// Where it is.
    #[must_use]
    pub const fn state(&self) -> TakerState {
        match &self.state {
            State::Looking(_) => TakerState::Looking,
            State::Watching { .. } => TakerState::Watching,
            State::Fencing { .. } => TakerState::Fencing,
            State::Clearing { .. } => TakerState::Clearing,
            State::Ready { .. } => TakerState::Ready,
            State::Taking { .. } => TakerState::Taking,
            State::Taken => TakerState::Taken,
            State::Done => TakerState::Done,
        }
    }

    /// When the next [`TakerEvent::Tick`] is due. Must be asked again after every event.
    #[must_use]
    pub fn wake_at(&self) -> Option<BootTime> {
        match &self.state {
            State::Looking(read) | State::Watching { read: Some(read), .. } => read.wake_at(),
            State::Watching { read: None, next, .. } => Some(*next),
            State::Fencing { write, .. } => write.wake_at(),
            State::Taking { write } => write.wake_at(),
            State::Clearing { until, .. } => Some(*until),
            State::Ready { .. } | State::Taken | State::Done => None,
        }
    }

    /// Takes an event, returns what to do. `now` is this host's boot time.
    pub fn on(&mut self, now: BootTime, event: TakerEvent) -> Vec<TakerAction> {
        let mut out = Vec::new();
        match event {
            TakerEvent::Tick => self.on_tick(now, &mut out),
            TakerEvent::View(view) => {
                self.view = view;
                self.take_if_ready(now, &mut out);
            }
            TakerEvent::Prepared => {
                self.prepared = true;
                self.take_if_ready(now, &mut out);
            }
            TakerEvent::Answer { operation, answer } => {
                self.on_answer(now, operation, answer, &mut out);
            }
        }
        out
    }

    fn on_tick(&mut self, now: BootTime, out: &mut Vec<TakerAction>) {
        let next_operation = &mut self.next_operation;
        let call = match &mut self.state {
            State::Looking(read) | State::Watching { read: Some(read), .. } => {
                read.retry(now, next_operation)
            }
            State::Fencing { write, .. } => write.retry(now, next_operation),
            State::Taking { write } => write.retry(now, next_operation),
            // Both again: the machine may have moved to another host.
            State::Watching { read: None, next, .. } if now >= *next => {
                return self.look(now, out);
            }
            State::Clearing { record, until } if now >= *until => {
                self.state = State::Ready { record: record.clone() };
                return self.take_if_ready(now, out);
            }
            _ => None,
        };
        out.extend(call.map(TakerAction::Store));
    }

    fn look(&mut self, now: BootTime, out: &mut Vec<TakerAction>) {
        let content = Content::ReadLease(self.parts.machine.clone());
        let (read, call) = Read::start(now, content, &self.parts.times, &mut self.next_operation);
        self.state = State::Looking(read);
        out.push(TakerAction::Store(call));
    }

    fn on_answer(
        &mut self,
        now: BootTime,
        operation: OperationId,
        answer: Answer,
        out: &mut Vec<TakerAction>,
    ) {
        match &mut self.state {
            State::Looking(read) => match read.answer::<Record>(now, operation, answer) {
                Some(Ok(found)) => self.examine(now, found, out),
                Some(Err(why)) => self.silence("its lease cannot be read", &why, out),
                None => {}
            },
            State::Watching { read: Some(read), .. } => {
                let asked_at = read.asked_at;
                match read.answer::<Beat>(now, operation, answer) {
                    Some(Ok(Some(beat))) => self.on_beat(now, asked_at, beat, out),
                    // A store that has lost it proves nothing; a person must decide.
                    Some(Ok(None)) => self.watch_on(now),
                    Some(Err(_)) | None => {}
                }
            }
            State::Fencing { write, .. } => match write.answer(now, operation, answer) {
                Verdict::Stale | Verdict::Unknown(_) => {}
                Verdict::Won => {
                    let beat = write.new_record().clone();
                    self.on_beat(now, now, beat, out);
                }
                Verdict::Lost(Some(found)) => self.on_beat(now, now, found, out),
                Verdict::Lost(None) => self.watch_on(now),
            },
            State::Taking { write } => match write.answer(now, operation, answer) {
                Verdict::Stale => {}
                Verdict::Unknown(why) => {
                    self.silence("its lease cannot be taken yet", &why, out);
                }
                Verdict::Won => {
                    let record = write.new_record().clone();
                    self.state = State::Taken;
                    out.push(self.report(&format!("taken over by this host at {}", record.epoch)));
                    out.push(TakerAction::Taken(record));
                }
                Verdict::Lost(Some(found)) if Self::is_given_up(write.new_record(), &found) => {
                    self.state = State::Taken;
                    out.push(self.report("taken over by this host, which has given it up since"));
                    out.push(TakerAction::Taken(found));
                }
                Verdict::Lost(found) => self.examine(now, found, out),
            },
            _ => {}
        }
    }

    /// Whether what we wrote was there, and was bound to another beat since, by whoever keeps this host's
    /// ([`Surrender`](super::Surrender)): its holder gets it back, unless somebody is faster.
    fn is_given_up(written: &Record, found: &Record) -> bool {
        found.owner == written.owner
            && found.epoch == written.epoch
            && found.attempt == written.attempt
            && found.beat != written.beat
    }

    /// The lease as it is.
    fn examine(&mut self, now: BootTime, found: Option<Record>, out: &mut Vec<TakerAction>) {
        self.silent = false;
        let Some(record) = found else {
            return self.end("it has no lease", out);
        };
        if record.owner == self.parts.here {
            return self.end("this host owns it already", out);
        }
        let Some(life) = record.beat.clone() else {
            let why = format!("{} holds it without a term: it is not protected", record.owner);
            return self.end(&why, out);
        };
        match &self.dead {
            Some(dead)
                if dead.life.name == life.name && dead.life.incarnation >= life.incarnation =>
            {
                let dead = dead.clone();
                self.orphaned(now, record, &dead, out);
            }
            _ => {
                self.state = State::Watching { record, read: None, next: now };
                self.read_beat(now, out);
            }
        }
    }

    fn end(&mut self, why: &str, out: &mut Vec<TakerAction>) {
        self.state = State::Done;
        out.push(TakerAction::Done(why.to_owned()));
    }

    fn read_beat(&mut self, now: BootTime, out: &mut Vec<TakerAction>) {
        let State::Watching { record, read, .. } = &mut self.state else { return };
        let Some(life) = &record.beat else { return };
        let content = Content::ReadBeat(life.name.clone());
        let (asked, call) = Read::start(now, content, &self.parts.times, &mut self.next_operation);
        *read = Some(asked);
        out.push(TakerAction::Store(call));
    }

    fn watch_on(&mut self, now: BootTime) {
        let record = match &self.state {
            State::Watching { record, .. } | State::Fencing { record, .. } => record.clone(),
            _ => return,
        };
        let mut next = now + self.parts.times.poll;
        if let Some((beat, since)) = &self.seen {
            // The end of its term is not slept through.
            next = next.min((*since + self.parts.times.patience(beat.term)).max(now));
        }
        self.state = State::Watching { record, read: None, next };
    }

    /// The beat as it is.
    fn on_beat(
        &mut self,
        now: BootTime,
        asked_at: BootTime,
        beat: Beat,
        out: &mut Vec<TakerAction>,
    ) {
        let (State::Watching { record, .. } | State::Fencing { record, .. }) = &self.state else {
            return;
        };
        let Some(life) = record.beat.clone() else { return };
        if beat.ends(&life) {
            self.seen = None;
            let incarnation = beat.of.incarnation - u64::from(beat.fenced_by.is_none());
            let life = BeatRef { name: beat.of.name.clone(), incarnation };
            let fenced = beat.fenced_by.is_some() || !self.parts.times.keeps(Rule::WaitTermOut);
            let left = self.parts.times.patience(beat.term);
            let over = if fenced { now } else { now + left };
            // Known already: it is not waited for a second time.
            if self.dead.as_ref().is_none_or(|dead| dead.life != life || dead.over > over) {
                self.dead = Some(Dead { life, known: now, over });
            }
            // What was bound to it may have moved on: the lease is read after its life has ended.
            return self.look(now, out);
        }
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != beat) {
            let answered = self.parts.times.keeps(Rule::SeenWhenAnswered);
            self.seen = Some((beat, if answered { now } else { asked_at }));
            return self.watch_on(now);
        }
        let Some((beat, since)) = self.seen.clone() else { return };
        // A life that is older than the lease's: an old copy of the store. It proves nothing.
        let same = beat.of == life;
        if !same || now.since(since) < self.parts.times.patience(beat.term) {
            return self.watch_on(now);
        }
        let record = record.clone();
        let TakerParts { here, times, nonces, .. } = &mut self.parts;
        if !times.keeps(Rule::FenceBeforeTake) {
            self.dead = Some(Dead { life, known: now, over: now });
            return self.look(now, out);
        }
        let fence = beat.fenced(here.clone(), nonces());
        let (write, call) = Write::start(now, Some(beat), fence, times, &mut self.next_operation);
        self.state = State::Fencing { record, write };
        out.push(TakerAction::Store(call));
        out.push(self.report(&format!("{life} has not been renewed: its end is declared")));
    }

    fn orphaned(&mut self, now: BootTime, record: Record, dead: &Dead, out: &mut Vec<TakerAction>) {
        if self.told != record.beat {
            self.told.clone_from(&record.beat);
            out.push(TakerAction::Orphaned(record.clone()));
        }
        let times = &self.parts.times;
        // The owner sent no token after its term, which had ended before its life was over; so the
        // last offer that one can name ends this long after.
        let offers = dead.known + times.drift.outlast(times.longest_offer);
        let offered = record.handing_to.is_some() && times.keeps(Rule::WaitForOffers);
        let until = if offered { offers.max(dead.over) } else { dead.over };
        if now < until {
            self.state = State::Clearing { record, until };
        } else {
            self.state = State::Ready { record };
            self.take_if_ready(now, out);
        }
    }

    fn take_if_ready(&mut self, now: BootTime, out: &mut Vec<TakerAction>) {
        let State::Ready { record } = &self.state else { return };
        let TakerParts { here, attempt, times, nonces, .. } = &mut self.parts;
        let margin = times.stop_margin + times.start_margin;
        let Some(view) = self.view.as_ref().filter(|view| now + margin < view.until) else {
            return;
        };
        if !self.prepared {
            return;
        }
        let new = record.taken(here.clone(), *attempt, nonces()).bound(Some(view.of.clone()));
        let expected = Some(record.clone());
        let (write, call) = Write::start(now, expected, new, times, &mut self.next_operation);
        self.state = State::Taking { write };
        out.push(TakerAction::Store(call));
    }

    /// Told once, until the store has answered.
    fn silence(&mut self, what: &str, why: &str, out: &mut Vec<TakerAction>) {
        if !std::mem::replace(&mut self.silent, true) {
            out.push(self.report(&format!("{what}: {why}")));
        }
    }

    fn report(&self, text: &str) -> TakerAction {
        TakerAction::Report(format!("machine \"{}\", take-over: {text}", self.parts.machine))
    }
}
