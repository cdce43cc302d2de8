//! A step taken: events reach the authorities, and their actions are done as the runner does them.

use super::{
    Message,
    steps::Step,
    world::{Copy, Left, Pending, World, host},
};
use crate::{
    lease::{Nonce, Outcome, Record},
    migrate::switchover::{
        DestinationAction, DestinationAuthority, DestinationEvent, DestinationState, LeaseAnswer,
        SourceAction, SourceAuthority, SourceEvent, SourceState, Terms, Token, terms::Rule,
    },
};
use std::{sync::Arc, time::Duration};

impl World {
    pub(super) fn take(&mut self, step: Step, passes: [Duration; 2]) {
        let (from, to) = (self.from, self.to());
        match step {
            Step::Prepared => self.destination_event(DestinationEvent::Prepared),
            Step::Want => {
                self.doings.wants -= 1;
                self.source_event(SourceEvent::WantSwitchover);
            }
            Step::SourceTimer => self.source_event(SourceEvent::Tick),
            Step::DestinationTimer => self.destination_event(DestinationEvent::Tick),
            Step::Arrives(index) => match Message::clone(&self.messages[index]) {
                Message::ToSource(event) => self.source_event(event),
                Message::ToDestination(event) => self.destination_event(event),
            },
            Step::Applied(end) => self.applied(end),
            Step::Answered(end) => {
                if let Some(Pending { call, answer: Some(answer) }) = self.calls[end].take() {
                    self.answer(end, call.operation, answer);
                }
            }
            Step::NoAnswer(end) => {
                if self.store_up {
                    self.faults -= 1;
                }
                if let Some(Pending { call, answer }) = self.calls[end].take() {
                    let operation = call.operation;
                    if answer.is_none() {
                        self.late.push(call);
                    }
                    self.answer(end, operation, LeaseAnswer::Unavailable(String::new()));
                }
            }
            Step::AppliedLate(index) => {
                let call = self.late.remove(index);
                self.replace(&call.expected, &call.new);
            }
            Step::StoreUp => self.store_up = true,
            Step::Paused { flush_owed } => {
                self.paused(false);
                self.source_event(SourceEvent::Paused { flush_owed });
            }
            Step::Loaded => {
                self.doings.loading = false;
                (self.doings.loaded, self.doings.to_say_running) = (true, true);
                self.copies[to].running = true;
            }
            Step::SaysRunning => {
                self.doings.to_say_running = false;
                self.destination_event(DestinationEvent::Running);
            }
            Step::TokenNotSent => {
                self.doings.not_sent = false;
                self.source_event(SourceEvent::TokenNotSent);
            }
            Step::CopyEnded => self.copies[to].discarded = true,
            Step::SourceSynced => {
                self.doings.synced = true;
                self.destination_event(DestinationEvent::SourceDurable);
            }
            Step::AllPresent => {
                self.doings.all_present = true;
                self.destination_event(DestinationEvent::AllPresent);
            }
            Step::SourceNotices => {
                self.doings.to_notice[0] = false;
                self.source_event(SourceEvent::PeerLost);
            }
            Step::DestinationNotices => {
                self.doings.to_notice[1] = false;
                self.destination_event(DestinationEvent::PeerLost);
            }
            Step::Joined => {
                // Also what a source's next runner was deaf to comes by the new connection.
                (self.doings.cut, self.doings.deaf) = (false, false);
                self.destination_event(DestinationEvent::PeerBack);
            }
            Step::SourceRunnerBack => self.source_runner_back(),
            Step::ReceiverReads => self.found = Some(Arc::clone(&self.record)),
            Step::ReceiverDecides => self.receiver_decides(),
            Step::GuardFreezes => self.copies[to].frozen = true,
            Step::NextAttempt => {
                if let Some((from, holding)) = self.movable() {
                    self.begin(from, holding);
                }
            }
            Step::Time => {
                self.now[from] = self.now[from] + passes[0];
                self.now[to] = self.now[to] + passes[1];
            }
            fault => {
                self.faults -= 1;
                self.fault(fault);
            }
        }
    }

    fn fault(&mut self, step: Step) {
        let (from, to) = (self.from, self.to());
        match step {
            Step::StoreDown => self.store_up = false,
            Step::PauseFails { runs } => {
                self.paused(runs);
                self.source_event(SourceEvent::PauseFailed(String::new()));
            }
            Step::LoadFails => {
                self.doings.loading = false;
                self.destination_event(DestinationEvent::LoadFailed(String::new()));
            }
            Step::Cut => {
                self.doings.cut = true;
                self.doings.to_notice = [true; 2];
            }
            Step::CancelledAtSource => self.source_event(SourceEvent::Cancel),
            Step::CancelledAtDestination => self.destination_event(DestinationEvent::Cancel),
            Step::SourceHostDies => {
                self.copies[from].crashed = true;
                self.doings.pausing = false;
                self.source_gone();
                self.doings.runner_dead = false;
            }
            Step::SourceRunnerDies => self.source_gone(),
            Step::DestinationHostDies => {
                self.copies[to].crashed = true;
                self.destination_gone();
            }
            Step::ReceiverDies => {
                let Some(destination) = self.destination.take() else { return };
                let asked = matches!(
                    destination.state(),
                    DestinationState::Unconfirmed | DestinationState::FrozenUnconfirmed
                );
                self.left = Some(Left { until: destination.freeze_at(), asked });
                // Whatever it had still to end is left as it is.
                self.copies[to].ending = false;
                self.destination_gone();
            }
            _ => {}
        }
    }

    /// The machine is paused, or it failed and `runs`.
    fn paused(&mut self, runs: bool) {
        self.doings.pausing = false;
        let resume = std::mem::take(&mut self.doings.resume_when_paused);
        self.copies[self.from].running = resume || runs;
    }

    fn source_gone(&mut self) {
        self.source = None;
        self.forget_call(0);
        self.doings.not_sent = false;
        self.doings.runner_dead = true;
        self.doings.deaf = true;
        self.doings.cut = true;
        self.doings.to_notice[1] = true;
    }

    fn destination_gone(&mut self) {
        self.destination = None;
        self.forget_call(1);
        self.doings.to_say_running = false;
        self.doings.cut = true;
        self.doings.to_notice[0] = true;
        self.messages.retain(|message| matches!(**message, Message::ToSource(_)));
    }

    fn applied(&mut self, end: usize) {
        let Some(call) = self.calls[end].as_ref().map(|pending| Arc::clone(&pending.call)) else {
            return;
        };
        let outcome = self.replace(&call.expected, &call.new);
        self.calls[end] = Some(Pending { call, answer: Some(LeaseAnswer::from(Ok(outcome))) });
    }

    fn answer(
        &mut self,
        end: usize,
        operation: crate::migrate::switchover::OperationId,
        answer: LeaseAnswer,
    ) {
        if end == 0 {
            self.source_event(SourceEvent::LeaseAnswer { operation, answer });
        } else {
            self.destination_event(DestinationEvent::LeaseAnswer { operation, answer });
        }
    }

    /// Nothing that is said after a cut arrives; everything else may, at any time from now on.
    fn send(&mut self, message: Message) {
        if !self.doings.cut && !self.messages.iter().any(|known| **known == message) {
            self.messages.push(Arc::new(message));
        }
    }

    fn source_event(&mut self, event: SourceEvent) {
        let Some(source) = &mut self.source else { return };
        let actions = Arc::make_mut(source).on(self.now[self.from], event);
        self.do_source(actions);
    }

    fn do_source(&mut self, actions: Vec<SourceAction>) {
        let from = self.from;
        for action in actions {
            match action {
                SourceAction::Lease(call) => self.ask(0, call),
                SourceAction::PauseMachine { .. } => self.doings.pausing = true,
                SourceAction::SendToken(token) => self.send_token(token),
                SourceAction::ResumeHere { epoch, .. } => {
                    self.doings.resume_when_paused |= self.doings.pausing;
                    let copy = &mut self.copies[from];
                    (copy.running, copy.output, copy.epoch) = (true, true, epoch.0);
                }
                SourceAction::SendCancel { .. } => {
                    self.send(Message::ToDestination(DestinationEvent::Cancel));
                }
                SourceAction::StayPaused { .. } => {
                    self.fail("the source gave up although the store is sound");
                }
                SourceAction::Release => self.copies[from].discarded = true,
                SourceAction::ServePages | SourceAction::Report(_) => {}
            }
        }
    }

    fn ask(&mut self, end: usize, call: crate::migrate::switchover::LeaseCall) {
        self.forget_call(end);
        self.calls[end] = Some(Pending { call: Arc::new(call), answer: None });
    }

    fn send_token(&mut self, token: Token) {
        let handing = self.record.handing_to.as_ref();
        let written = handing
            .is_some_and(|h| h.attempt == token.attempt && h.to == host(self.to()))
            && *self.record == token.handed;
        if !written {
            self.fail("a token is out, but the lease does not say where the machine goes");
        }
        if self.copies[self.from].executes() {
            self.fail("a token is out while the source runs");
        }
        self.doings.owed = token.flush_owed;
        self.doings.not_sent = self.doings.cut;
        self.send(Message::ToDestination(DestinationEvent::Token(token)));
    }

    fn destination_event(&mut self, event: DestinationEvent) {
        let Some(destination) = &mut self.destination else { return };
        let actions = Arc::make_mut(destination).on(self.now[1 - self.from], event);
        self.do_destination(actions);
    }

    fn do_destination(&mut self, actions: Vec<DestinationAction>) {
        let to = self.to();
        for action in actions {
            match action {
                DestinationAction::SendOffer(offer) => {
                    self.doings.offers = self.doings.offers.saturating_sub(1);
                    self.send(Message::ToSource(SourceEvent::Offer(offer)));
                }
                DestinationAction::LoadAndRun => {
                    if self.doings.refused {
                        self.fail("an attempt that was refused goes on");
                    }
                    self.doings.loading = true;
                }
                DestinationAction::SendRefused { attempt, .. } => {
                    self.doings.refused = true;
                    let why = String::new();
                    self.send(Message::ToSource(SourceEvent::Refused { attempt, why }));
                }
                DestinationAction::Lease(call) => self.ask(1, call),
                DestinationAction::Resume { epoch, .. } => self.copies[to].epoch = epoch.0,
                DestinationAction::ReleaseOutput { epoch } => {
                    let durable = self.doings.synced || self.doings.all_present;
                    if self.doings.owed && !durable {
                        self.fail("output was released before the source's flushes were durable");
                    }
                    let copy = &mut self.copies[to];
                    (copy.output, copy.epoch) = (true, copy.epoch.max(epoch.0));
                }
                DestinationAction::FreezeNow => self.copies[to].frozen = true,
                DestinationAction::Thaw => self.copies[to].frozen = false,
                DestinationAction::SendConfirmed { epoch } => {
                    self.send(Message::ToSource(SourceEvent::Confirmed { epoch }));
                }
                DestinationAction::SendDurable { epoch } => {
                    self.send(Message::ToSource(SourceEvent::Durable { epoch }));
                }
                DestinationAction::Discard => self.copies[to].ending = true,
                DestinationAction::Report(_) => {}
            }
        }
    }

    fn source_runner_back(&mut self) {
        let from = self.from;
        let (nonces, terms) = (self.nonces(), Terms::clone(&self.terms));
        let record = Record::clone(&self.record);
        let (source, actions) =
            SourceAuthority::recover(self.now[from], &host(from), record, terms, nonces);
        self.source = Some(Arc::new(source));
        self.doings.runner_dead = false;
        self.do_source(actions);
    }

    /// By the lease as it was a moment ago (`runner::take_over`).
    fn receiver_decides(&mut self) {
        let (Some(found), Some(left)) = (self.found.take(), self.left) else { return };
        let (attempt, to) = (self.attempt, self.to());
        let here = host(to);
        let owned = |record: &Record| {
            record.owner == here && record.handing_to.is_none() && record.attempt == attempt
        };
        let handing = found.handing_to.as_ref();
        let handed = handing.is_some_and(|h| h.to == here && h.attempt == attempt);
        let asked = left.asked || !self.terms.keeps(Rule::SuccessorTakesWhatWasAsked);
        if owned(&found) {
            return self.receiver_owns(Record::clone(&found));
        }
        if handed && asked && self.terms.keeps(Rule::SuccessorAsksOn) {
            let nonce: Nonce = (self.nonces())();
            let new = found.taken(here.clone(), attempt, nonce);
            match self.replace(&found, &new) {
                Outcome::Won => return self.receiver_owns(new),
                Outcome::Lost(Some(now)) if owned(&now) => return self.receiver_owns(now),
                Outcome::Lost(_) => {}
            }
        }
        self.left = None;
        self.copies[to].discarded = true;
    }

    fn receiver_owns(&mut self, record: Record) {
        let to = self.to();
        self.left = None;
        let parts = self.destination_parts();
        let copy = &mut self.copies[to];
        *copy = Copy { running: true, frozen: false, epoch: record.epoch.0, ..*copy };
        self.destination = Some(Arc::new(DestinationAuthority::owner(parts, record)));
        // It does not know what the source owes, and waits for it.
        (self.doings.owed, self.doings.synced) = (true, false);
        if self.doings.all_present {
            self.destination_event(DestinationEvent::AllPresent);
        }
    }

    /// The invariants.
    pub(super) fn check(&mut self) {
        let executing = self.copies.map(|copy| copy.executes());
        if executing == [true; 2] {
            self.fail("both copies run");
        }
        for (index, copy) in self.copies.into_iter().enumerate() {
            let lease = &self.record;
            let owns = lease.owner == host(index) && lease.epoch.0 == copy.epoch;
            if copy.executes() && copy.output && !owns {
                self.fail("a copy is heard, and the lease is not its own");
            }
        }
        if self.doings.refused && executing[self.to()] {
            self.fail("an attempt that was refused runs");
        }
    }

    /// Everything has come to rest: the owner's copy runs and is heard, unless its host is lost.
    pub(super) fn at_rest(&self) -> Result<(), String> {
        let owner = usize::from(self.record.owner == host(1));
        let copy = self.copies[owner];
        if copy.crashed {
            return Ok(());
        }
        if copy.discarded {
            return Err(format!("{} owns the machine and has thrown it away", host(owner)));
        }
        if !copy.executes() {
            return Err(format!("{} owns the machine and does not run it", host(owner)));
        }
        // What its source owes is lost with that source's host: a person is told.
        let lost = self.doings.owed && !self.doings.synced && self.copies[self.from].crashed;
        let waits = matches!(self.destination_state(), Some(DestinationState::Owner(_))) && lost;
        if !copy.output && !waits {
            return Err(format!("the machine runs on {} and is never heard", host(owner)));
        }
        let open = matches!(
            self.source_state(),
            Some(SourceState::AwaitingVerdict | SourceState::TakingBack | SourceState::Pausing)
        );
        if open { Err("the source never learns where the machine is".to_owned()) } else { Ok(()) }
    }
}
