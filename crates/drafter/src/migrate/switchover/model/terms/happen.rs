//! What can happen, and what comes of it: as the runner does it.

use super::{
    super::Message,
    neglect::Neglect,
    world::{Asked, Copy, DESTINATION, OWNER, Pending, TAKER, Who, World, host},
};
use crate::{
    lease::{BootTime, Record},
    migrate::switchover::{
        DestinationAction, DestinationEvent, DestinationState, LeaseAnswer, SourceAction,
        SourceEvent, SourceState,
    },
    tenure::{
        Answer, Content, Holder, HolderAction, HolderEvent, PulseAction, PulseEvent,
        SurrenderEvent, TakerAction, TakerEvent,
    },
};
use std::{sync::Arc, time::Duration};

/// One thing that happens. `NoAnswer` and what follows it are faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Timer(Who),
    Applied(Who),
    Answered(Who),
    AppliedLate(usize),
    /// The third host begins to watch.
    Watch,
    Protect(bool),
    Prepared,
    Want,
    Arrives(usize),
    Paused,
    Loaded,
    SaysRunning,
    AllPresent,
    Time,
    NoAnswer(Who),
    LinkLost,
    OwnerDies,
    /// The owner's runner takes nothing in any more.
    Hangs,
    GuardFreezes,
    GoesOn,
    /// Its keeper tells it what there is.
    Welcomed,
}

impl World {
    /// A freeze takes effect before its deadline, so at that instant it comes before all else.
    fn must_freeze(&self) -> Option<Who> {
        let over = |at: Option<BootTime>, index: usize| at.is_some_and(|at| self.now[index] >= at);
        for index in [OWNER, DESTINATION] {
            let hung = index == OWNER && self.neglect.hung;
            if !hung && over(self.holders[index].as_ref().and_then(|h| h.freeze_at()), index) {
                return Some(Who::Holder(index));
            }
        }
        over(self.destination.as_ref().and_then(|d| d.freeze_at()), DESTINATION)
            .then_some(Who::Destination)
    }

    pub(super) fn steps(&self, out: &mut Vec<Step>) {
        if let Some(who) = self.must_freeze() {
            return out.push(Step::Timer(who));
        }
        if self.must_guard() {
            return out.push(Step::GuardFreezes);
        }
        let deaf = |who: Who| who == Who::Holder(OWNER) && self.neglect.hung;
        let doings = &self.doings;
        for (who, pending) in &self.pending {
            let done = pending.answer.is_some();
            if !(done && deaf(*who)) {
                out.push(if done { Step::Answered(*who) } else { Step::Applied(*who) });
            }
            if self.faults > 0 && !deaf(*who) {
                out.push(Step::NoAnswer(*who));
            }
        }
        out.extend((0..self.late.len()).map(Step::AppliedLate));
        out.extend((0..self.messages.len()).map(Step::Arrives));
        for who in Who::ALL {
            let offering = self.destination_state() == Some(DestinationState::Offering);
            let more = doings.offers > 0 || !(who == Who::Destination && offering);
            let more = more && self.may_renew(who) && !deaf(who);
            if more && self.wake_at(who).is_some_and(|at| self.now[who.host()] >= at) {
                out.push(Step::Timer(who));
            }
        }
        let mut may = |step: Step, can: bool| {
            if can {
                out.push(step);
            }
        };
        may(Step::Watch, self.taker.is_none() && doings.watches > 0 && !self.copies[TAKER].running);
        let protects = self.holders[OWNER].is_some() && self.source.is_none() && !doings.asked;
        let protects = protects && !self.neglect.hung;
        may(Step::Protect(self.lease.beat.is_none()), protects);
        may(Step::Prepared, self.destination_state() == Some(DestinationState::Preparing));
        let copying = self.source_state() == Some(SourceState::Copying);
        may(Step::Want, copying && doings.wants > 0);
        may(Step::Paused, doings.pausing && !self.copies[OWNER].gone);
        may(Step::Loaded, doings.loading && !self.copies[DESTINATION].gone);
        may(Step::SaysRunning, doings.to_say_running);
        let owner = matches!(self.destination_state(), Some(DestinationState::Owner(_)));
        may(Step::AllPresent, owner && !self.copies[OWNER].gone);
        let moves = self.source.is_some() && self.faults > 0;
        may(Step::LinkLost, moves && !doings.source_over);
        may(Step::Hangs, self.may_hang());
        may(Step::GoesOn, self.neglect.may_go_on());
        may(Step::Welcomed, self.neglect.deaf);
        may(Step::OwnerDies, self.faults > 0 && !self.copies[OWNER].gone);
        may(Step::Time, true);
    }

    fn may_renew(&self, who: Who) -> bool {
        let Who::Pulse(index) = who else { return true };
        let retries = self.pulses[index].as_ref().is_some_and(|pulse| pulse.retries());
        retries || self.doings.renewals[index] > 0
    }

    fn wake_at(&self, who: Who) -> Option<BootTime> {
        match who {
            Who::Pulse(index) => self.pulses[index].as_ref()?.wake_at(),
            Who::Holder(index) => self.holders[index].as_ref()?.wake_at(),
            Who::Taker => self.taker.as_ref()?.wake_at(),
            Who::Surrender => self.neglect.surrender.as_ref()?.wake_at(),
            Who::Source => self.source.as_ref()?.wake_at(),
            Who::Destination => self.destination.as_ref()?.wake_at(),
        }
    }

    pub(super) fn source_state(&self) -> Option<SourceState> {
        self.source.as_ref().map(|source| source.state())
    }

    pub(super) fn destination_state(&self) -> Option<DestinationState> {
        self.destination.as_ref().map(|destination| destination.state())
    }

    #[must_use]
    pub(super) fn after(&self, step: Step, passes: [Duration; 3]) -> Self {
        let mut next = self.clone();
        next.take(step, passes);
        next.check();
        next.normalise();
        next
    }

    /// In words, for a trace.
    pub(super) fn tell(&self, step: Step) -> String {
        let what = match step {
            Step::Arrives(index) => match self.messages.get(index).map(|message| &**message) {
                Some(Message::ToSource(event)) => format!("source ← {event:?}"),
                Some(Message::ToDestination(event)) => format!("destination ← {event:?}"),
                None => String::new(),
            },
            Step::Applied(who) | Step::Answered(who) | Step::NoAnswer(who) => {
                let asked = self.pending.get(&who).map(|pending| match &pending.asked.content {
                    Content::ReadLease(_) => "read lease".to_owned(),
                    Content::ReadBeat(name) => format!("read beat {name}"),
                    Content::SetLease { new, .. } => format!("{} owns at {}", new.owner, new.epoch),
                    Content::SetBeat { new, .. } if new.fenced_by.is_some() => {
                        format!("fence {}", new.of)
                    }
                    Content::SetBeat { new, .. } => format!("{} serial {}", new.of, new.serial),
                });
                format!("{step:?}: {}", asked.unwrap_or_default())
            }
            _ => format!("{step:?}"),
        };
        let runs = self.copies.iter().zip(["a", "b", "c"]);
        let runs: String = runs.filter(|(copy, _)| copy.executes()).map(|(_, name)| name).collect();
        let ends = format!("{:?}", (self.source_state(), self.destination_state()));
        let taker = format!("{:?}", self.taker.as_ref().map(|taker| taker.state()));
        format!("runs on {runs:<3} {ends:<34} {taker:<10} {what}")
            .replace("Some(", "(")
            .replace("None", "-")
    }

    fn take(&mut self, step: Step, passes: [Duration; 3]) {
        match step {
            Step::Timer(who) => self.timer(who),
            Step::Applied(who) => self.applied(who),
            Step::Answered(who) => self.answered(who),
            Step::AppliedLate(index) => {
                let asked = self.late.remove(index);
                let _ = self.perform(&asked.content);
            }
            Step::Watch => {
                self.doings.watches -= 1;
                self.watch();
            }
            Step::Protect(protect) => {
                self.doings.asked = true;
                self.holder_event(OWNER, HolderEvent::Protect(protect));
            }
            Step::Prepared => self.destination_event(DestinationEvent::Prepared),
            Step::Want => {
                self.doings.wants -= 1;
                self.source_event(SourceEvent::WantSwitchover);
            }
            Step::Arrives(index) => match Message::clone(&self.messages[index]) {
                Message::ToSource(event) => self.source_event(event),
                Message::ToDestination(event) => self.destination_event(event),
            },
            Step::Paused => {
                self.doings.pausing = false;
                // A move that was given up meanwhile has resumed it.
                self.copies[OWNER].running = self.source_state() != Some(SourceState::Pausing);
                self.source_event(SourceEvent::Paused { flush_owed: false });
            }
            Step::Loaded => {
                (self.doings.loading, self.doings.to_say_running) = (false, true);
                self.copies[DESTINATION].running = true;
            }
            Step::SaysRunning => {
                self.doings.to_say_running = false;
                self.destination_event(DestinationEvent::Running);
            }
            Step::AllPresent => self.destination_event(DestinationEvent::AllPresent),
            Step::Time => {
                for (now, passes) in self.now.iter_mut().zip(passes) {
                    *now = *now + passes;
                }
            }
            Step::NoAnswer(who) => {
                self.faults -= 1;
                let operation = self.pending[&who].asked.operation;
                self.forget(who);
                self.hear(who, operation, Answer::Unavailable(String::new()));
            }
            Step::LinkLost => {
                self.faults -= 1;
                self.source_event(SourceEvent::PeerLost);
                self.destination_event(DestinationEvent::PeerLost);
            }
            Step::OwnerDies => {
                self.faults -= 1;
                self.copies[OWNER].gone = true;
                (self.pulses[OWNER], self.holders[OWNER], self.source) = (None, None, None);
                self.neglect = Neglect::default();
                self.doings.pausing = false;
                self.destination_event(DestinationEvent::PeerLost);
            }
            Step::Hangs => self.hangs(),
            Step::GuardFreezes => self.copies[OWNER].term_frozen = true,
            Step::GoesOn => self.goes_on(),
            Step::Welcomed => self.welcomed(),
        }
    }

    fn timer(&mut self, who: Who) {
        match who {
            Who::Pulse(index) => {
                let retries = self.pulses[index].as_ref().is_some_and(|pulse| pulse.retries());
                self.doings.renewals[index] -= u8::from(!retries);
                self.pulse_event(index, PulseEvent::Tick);
            }
            Who::Holder(index) => self.holder_event(index, HolderEvent::Tick),
            Who::Taker => self.taker_event(TakerEvent::Tick),
            Who::Surrender => self.surrender_event(SurrenderEvent::Tick),
            Who::Source => self.source_event(SourceEvent::Tick),
            Who::Destination => self.destination_event(DestinationEvent::Tick),
        }
    }

    pub(super) fn ask(&mut self, who: Who, asked: impl Into<Asked>) {
        self.forget(who);
        self.pending.insert(who, Pending { asked: Arc::new(asked.into()), answer: None });
    }

    pub(super) fn applied(&mut self, who: Who) {
        let Some(asked) = self.pending.get(&who).map(|pending| Arc::clone(&pending.asked)) else {
            return;
        };
        let answer = Some(self.perform(&asked.content));
        self.pending.insert(who, Pending { asked, answer });
    }

    pub(super) fn answered(&mut self, who: Who) {
        if let Some(Pending { asked, answer: Some(answer) }) = self.pending.remove(&who) {
            self.hear(who, asked.operation, answer);
        }
    }

    fn hear(&mut self, who: Who, operation: crate::tenure::OperationId, answer: Answer) {
        let of_lease = |answer| match answer {
            Answer::Won => LeaseAnswer::Won,
            Answer::Lease(found) => LeaseAnswer::Lost(found),
            _ => LeaseAnswer::Unavailable(String::new()),
        };
        match who {
            Who::Pulse(index) => self.pulse_event(index, PulseEvent::Answer { operation, answer }),
            Who::Holder(index) => {
                self.holder_event(index, HolderEvent::Answer { operation, answer });
            }
            Who::Taker => self.taker_event(TakerEvent::Answer { operation, answer }),
            Who::Surrender => self.surrender_event(SurrenderEvent::Answer { operation, answer }),
            Who::Source => {
                let answer = of_lease(answer);
                self.source_event(SourceEvent::LeaseAnswer { operation, answer });
            }
            Who::Destination => {
                let answer = of_lease(answer);
                self.destination_event(DestinationEvent::LeaseAnswer { operation, answer });
            }
        }
    }

    fn pulse_event(&mut self, index: usize, event: PulseEvent) {
        let Some(pulse) = &mut self.pulses[index] else { return };
        let actions = Arc::make_mut(pulse).on(self.now[index], event);
        self.do_pulse(index, actions);
    }

    pub(super) fn do_pulse(&mut self, index: usize, actions: Vec<PulseAction>) {
        for action in actions {
            match action {
                PulseAction::Store(call) => self.ask(Who::Pulse(index), call),
                PulseAction::Tell(view) => {
                    if index == OWNER {
                        if !self.neglect.is_told(view.as_ref()) {
                            continue;
                        }
                        self.source_event(SourceEvent::Term(view.clone()));
                    }
                    self.holder_event(index, HolderEvent::View(view));
                }
                PulseAction::Report(_) => {}
            }
        }
    }

    pub(super) fn holder_event(&mut self, index: usize, event: HolderEvent) {
        let Some(holder) = &mut self.holders[index] else { return };
        let actions = Arc::make_mut(holder).on(self.now[index], event);
        self.do_holder(index, actions);
    }

    pub(super) fn do_holder(&mut self, index: usize, actions: Vec<HolderAction>) {
        for action in actions {
            match action {
                HolderAction::Freeze => self.copies[index].term_frozen = true,
                HolderAction::Thaw => self.copies[index].term_frozen = false,
                HolderAction::Held(record) => self.copies[index].epoch = record.epoch.0,
                HolderAction::Store(call) => self.ask(Who::Holder(index), call),
                HolderAction::Discard { .. } => {
                    self.copies[index].gone = true;
                    self.holders[index] = None;
                }
                HolderAction::Report(_) => {}
            }
        }
    }

    pub(super) fn taker_event(&mut self, event: TakerEvent) {
        let Some(taker) = &mut self.taker else { return };
        let actions = Arc::make_mut(taker).on(self.now[TAKER], event);
        self.do_taker(actions);
    }

    pub(super) fn do_taker(&mut self, actions: Vec<TakerAction>) {
        for action in actions {
            match action {
                TakerAction::Store(call) => self.ask(Who::Taker, call),
                TakerAction::Taken(record) => {
                    self.taker = None;
                    let epoch = record.epoch.0;
                    self.copies[TAKER] =
                        Copy { running: true, output: true, epoch, ..Copy::default() };
                }
                TakerAction::Done(_) => self.taker = None,
                TakerAction::Orphaned(_) | TakerAction::Report(_) => {}
            }
        }
    }

    fn send(&mut self, message: Message) {
        if !self.messages.iter().any(|known| **known == message) {
            self.messages.push(Arc::new(message));
        }
    }

    pub(super) fn source_event(&mut self, event: SourceEvent) {
        let Some(source) = &mut self.source else { return };
        let actions = Arc::make_mut(source).on(self.now[OWNER], event);
        for action in actions {
            match action {
                SourceAction::Lease(call) => self.ask(Who::Source, call),
                SourceAction::PauseMachine { .. } => self.doings.pausing = true,
                SourceAction::SendToken(token) => {
                    self.send(Message::ToDestination(DestinationEvent::Token(token)));
                }
                SourceAction::ResumeHere { epoch, .. } => {
                    let copy = &mut self.copies[OWNER];
                    (copy.running, copy.output, copy.epoch) = (true, true, epoch.0);
                }
                SourceAction::SendCancel { .. } => {
                    self.send(Message::ToDestination(DestinationEvent::Cancel));
                }
                SourceAction::StayPaused { .. } => {
                    let taken = self.lease.owner != host(OWNER);
                    if !taken {
                        self.fail("the source gave up although the store is sound");
                    }
                    self.copies[OWNER].running = false;
                }
                SourceAction::Release => self.copies[OWNER].gone = true,
                SourceAction::ServePages | SourceAction::Report(_) => {}
            }
        }
        self.tell_source_holder();
    }

    /// The runner tells the holder what became of its lease.
    fn tell_source_holder(&mut self) {
        use SourceState as S;
        let Some(source) = &self.source else { return };
        let (state, record) = (source.state(), source.holding().record);
        let over = matches!(state, S::Aborted | S::Resumed(_) | S::Stopped);
        match state {
            S::ServingPages(_) | S::Released => self.holders[OWNER] = None,
            // Said once: later the lease is the holder's again.
            _ if self.doings.source_over => {}
            _ => {
                let known = self.holders[OWNER].as_ref().map(|holder| holder.record().clone());
                if state != S::Stopped && known.is_some_and(|known| known != record) {
                    self.holder_event(OWNER, HolderEvent::Holds(record));
                }
                if over {
                    self.doings.source_over = true;
                    self.holder_event(OWNER, HolderEvent::Moving(false));
                }
            }
        }
    }

    pub(super) fn destination_event(&mut self, event: DestinationEvent) {
        let Some(destination) = &mut self.destination else { return };
        let actions = Arc::make_mut(destination).on(self.now[DESTINATION], event);
        for action in actions {
            self.do_destination(action);
        }
    }

    fn do_destination(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::SendOffer(offer) => {
                self.doings.offers = self.doings.offers.saturating_sub(1);
                self.send(Message::ToSource(SourceEvent::Offer(offer)));
            }
            DestinationAction::LoadAndRun => {
                let handed = Record::clone(&self.lease);
                let (life, now) = (self.life.clone(), self.now[DESTINATION]);
                let parts = self.holder_parts(DESTINATION, handed);
                let (holder, actions) = Holder::arriving(now, parts, life);
                let may = holder.may_run(now);
                self.holders[DESTINATION] = Some(Arc::new(holder));
                self.do_holder(DESTINATION, actions);
                if may {
                    self.doings.loading = true;
                } else {
                    self.destination_event(DestinationEvent::LoadFailed(String::new()));
                }
            }
            DestinationAction::SendRefused { attempt, .. } => {
                let why = String::new();
                self.send(Message::ToSource(SourceEvent::Refused { attempt, why }));
            }
            DestinationAction::Lease(call) => self.ask(Who::Destination, call),
            DestinationAction::Resume { epoch, .. } => {
                let copy = &mut self.copies[DESTINATION];
                copy.epoch = copy.epoch.max(epoch.0);
                let holding = self.destination.as_ref().and_then(|d| d.holding());
                if let Some(holding) = holding {
                    self.holder_event(DESTINATION, HolderEvent::Holds(holding.record));
                    self.holder_event(DESTINATION, HolderEvent::Moving(false));
                }
            }
            DestinationAction::ReleaseOutput { epoch } => {
                let copy = &mut self.copies[DESTINATION];
                (copy.output, copy.epoch) = (true, copy.epoch.max(epoch.0));
            }
            DestinationAction::FreezeNow => self.copies[DESTINATION].frozen = true,
            DestinationAction::Thaw => self.copies[DESTINATION].frozen = false,
            DestinationAction::SendConfirmed { epoch } => {
                self.send(Message::ToSource(SourceEvent::Confirmed { epoch }));
            }
            DestinationAction::SendDurable { epoch } => {
                self.send(Message::ToSource(SourceEvent::Durable { epoch }));
            }
            DestinationAction::Discard => {
                self.copies[DESTINATION].gone = true;
                self.holders[DESTINATION] = None;
                (self.doings.loading, self.doings.to_say_running) = (false, false);
            }
            DestinationAction::Report(_) => {}
        }
    }

    pub(super) fn check(&mut self) {
        let executing = self.copies.map(|copy| copy.executes());
        if executing.iter().filter(|executes| **executes).count() > 1 {
            self.fail("two copies run");
        }
        for (index, copy) in self.copies.into_iter().enumerate() {
            let owns = self.lease.owner == host(index) && self.lease.epoch.0 == copy.epoch;
            if copy.executes() && copy.output && !owns {
                self.fail("a copy is heard, and the lease is not its own");
            }
        }
    }
}
