//! The source's half: hand-over, token, and when the machine may run here again.

use super::{
    Holding, Nonces, Offer, SourceAction, SourceEvent, SourceParts, SourceState, Terms, Token,
    terms::Rule,
    write::{LeaseAnswer, LeasePurpose, LeaseWrite, OperationId, Verdict, take_operation},
};
use crate::lease::{AttemptId, BootTime, Epoch, HostName, OfferSerial, Record};
use std::time::Duration;

#[cfg_attr(test, derive(Clone))]
pub(super) enum State {
    Copying,
    AwaitingOffer { until: BootTime, handed: bool },
    WritingHandOver { until: BootTime, write: LeaseWrite },
    Pausing { until: BootTime },
    AwaitingVerdict { expires: BootTime },
    TakingBack { write: LeaseWrite },
    ServingPages { epoch: Epoch },
    Released,
    Aborted,
    Resumed { epoch: Epoch },
    Stopped,
}

/// The newest offer, and when it was received.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received {
    pub(super) serial: OfferSerial,
    good_for: Duration,
    pub(super) at: BootTime,
}

/// The source's half of a switchover.
#[cfg_attr(test, derive(Clone))]
pub struct SourceAuthority {
    pub(super) parts: SourceParts,
    pub(super) state: State,
    pub(super) offer: Option<Received>,
    next_operation: u64,
    /// An earlier life of this runner may have asked the store to take the machine back.
    recovered: bool,
}

impl SourceAuthority {
    /// A source whose machine runs here and shall go to `parts.to`.
    #[must_use]
    pub fn new(parts: SourceParts) -> Self {
        Self { parts, state: State::Copying, offer: None, next_operation: 0, recovered: false }
    }

    /// For a runner that has come back and found its machine paused by a move, with the lease as
    /// the store shows it: whether a token went out is not known, so the longest offer is waited
    /// for, and the machine runs here again only at a new epoch (how often the network was flipped
    /// under the old one is not known either). `here` is this host.
    #[must_use]
    pub fn recover(
        now: BootTime,
        here: &HostName,
        record: Record,
        terms: Terms,
        nonces: Nonces,
    ) -> (Self, Vec<SourceAction>) {
        let to = record.handing_to.as_ref().map_or(here, |handing| &handing.to).clone();
        // It goes on with the attempt of the record: an earlier life of this runner may have asked
        // the store to take the machine back, and that answer shall be recognised.
        let attempt = record.attempt;
        let (owner, epoch) = (record.owner.clone(), record.epoch);
        let handing = record.handing_to.is_some();
        let holding = Holding::new(record);
        let mut this = Self::new(SourceParts { holding, to, attempt, view: None, terms, nonces });
        this.recovered = true;
        let mut out = Vec::new();
        if owner != *here {
            this.state = State::ServingPages { epoch };
            out.push(SourceAction::ServePages);
        } else if handing {
            // Received before we stopped, so at the latest now.
            let expires = now + this.parts.terms.expiry(this.parts.terms.longest_offer);
            this.state = State::AwaitingVerdict { expires };
            out.push(SourceAction::ServePages);
        } else {
            this.take_back(&mut out);
        }
        (this, out)
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> SourceState {
        match &self.state {
            State::Copying => SourceState::Copying,
            State::AwaitingOffer { .. } => SourceState::AwaitingOffer,
            State::WritingHandOver { .. } => SourceState::WritingHandOver,
            State::Pausing { .. } => SourceState::Pausing,
            State::AwaitingVerdict { .. } => SourceState::AwaitingVerdict,
            State::TakingBack { .. } => SourceState::TakingBack,
            State::ServingPages { epoch } => SourceState::ServingPages(*epoch),
            State::Released => SourceState::Released,
            State::Aborted => SourceState::Aborted,
            State::Resumed { epoch } => SourceState::Resumed(*epoch),
            State::Stopped => SourceState::Stopped,
        }
    }

    /// What this host holds, for the next attempt; meaningful while the machine runs here.
    #[must_use]
    pub fn holding(&self) -> Holding {
        self.parts.holding.clone()
    }

    /// When the next [`SourceEvent::Tick`] is due. Must be asked again after every event.
    #[must_use]
    pub fn wake_at(&self) -> Option<BootTime> {
        match &self.state {
            State::AwaitingOffer { until, .. } | State::Pausing { until } => Some(*until),
            State::WritingHandOver { until, write } => {
                Some(write.wake_at().map_or(*until, |retry| retry.min(*until)))
            }
            State::AwaitingVerdict { expires } => Some(*expires),
            State::TakingBack { write } => write.wake_at(),
            _ => None,
        }
    }

    /// Takes an event, returns what to do. `now` is this host's boot time.
    pub fn on(&mut self, now: BootTime, event: SourceEvent) -> Vec<SourceAction> {
        let mut out = Vec::new();
        match event {
            SourceEvent::Tick => self.on_tick(now, &mut out),
            SourceEvent::Offer(offer) => self.on_offer(now, offer, &mut out),
            SourceEvent::WantSwitchover => self.on_want(now, &mut out),
            SourceEvent::LeaseAnswer { operation, answer } => {
                self.on_answer(now, operation, answer, &mut out);
            }
            SourceEvent::Paused { flush_owed } => self.on_paused(now, flush_owed, &mut out),
            SourceEvent::PauseFailed(why) => {
                if matches!(self.state, State::Pausing { .. }) {
                    self.abort_paused(&format!("pausing failed: {why}"), &mut out);
                }
            }
            SourceEvent::TokenNotSent => {
                if matches!(self.state, State::AwaitingVerdict { .. }) {
                    self.abort_paused("the connection broke before the token was sent", &mut out);
                }
            }
            SourceEvent::Refused { attempt, why } => self.on_refused(attempt, &why, &mut out),
            SourceEvent::Confirmed { epoch } => self.on_confirmed(epoch, &mut out),
            SourceEvent::Durable { epoch } => self.on_durable(epoch, &mut out),
            SourceEvent::PeerLost => self.on_peer_lost(now, &mut out),
            SourceEvent::Term(view) => self.parts.view = view,
            SourceEvent::Cancel => self.on_cancel(&mut out),
        }
        out
    }

    /// Whether a machine that has a term is within it. A token sent later could name an offer that
    /// outlasts a taker's waiting.
    fn within_term(&self, now: BootTime) -> bool {
        let Some(life) = &self.parts.holding.record.beat else { return true };
        let view = self.parts.view.as_ref().filter(|view| view.of == *life);
        view.is_some_and(|view| now < view.until) || !self.parts.terms.keeps(Rule::NoTokenAfterTerm)
    }

    fn on_tick(&mut self, now: BootTime, out: &mut Vec<SourceAction>) {
        let next_operation = &mut self.next_operation;
        match &mut self.state {
            State::AwaitingOffer { until, .. } if now >= *until => {
                self.state = State::Copying;
                out.push(self.report(
                    "no switchover: the destination has made no fresh offer; the machine keeps \
                     running here",
                ));
            }
            State::WritingHandOver { until, .. } if now >= *until => {
                self.state = State::Copying;
                out.push(self.report(
                    "no switchover: the lease store does not answer; the machine keeps running here",
                ));
            }
            State::Pausing { until } if now >= *until => {
                self.abort_paused("the machine did not pause in time", out);
            }
            State::WritingHandOver { write, .. } | State::TakingBack { write } => {
                out.extend(write.retry(now, next_operation).map(SourceAction::Lease));
            }
            State::AwaitingVerdict { expires } if now >= *expires => self.take_back(out),
            _ => {}
        }
    }

    fn on_offer(&mut self, now: BootTime, offer: Offer, out: &mut Vec<SourceAction>) {
        let Offer { attempt, serial, good_for } = offer;
        if attempt != self.parts.attempt {
            return;
        }
        if good_for > self.parts.terms.longest_offer {
            let longest = self.parts.terms.longest_offer;
            out.push(self.report(&format!(
                "ignored an offer good for {good_for:?}: the longest that this host waits for a \
                 silent destination is {longest:?}"
            )));
            return;
        }
        // The first receipt of the newest: a copy that came later says nothing new.
        if self.offer.is_some_and(|known| known.serial >= serial) {
            return;
        }
        self.offer = Some(Received { serial, good_for, at: now });
        if let State::AwaitingOffer { handed, .. } = self.state {
            self.go_on(now, handed, out);
        }
    }

    fn on_want(&mut self, now: BootTime, out: &mut Vec<SourceAction>) {
        if !matches!(self.state, State::Copying) {
            return;
        }
        let handed = !self.parts.terms.keeps(Rule::HandOverBeforePause);
        if self.fresh_offer(now).is_some() {
            self.go_on(now, handed, out);
        } else {
            let until = now + self.parts.terms.patience;
            self.state = State::AwaitingOffer { until, handed };
        }
    }

    /// With a fresh offer at hand: writes the hand-over, or pauses if it is written.
    fn go_on(&mut self, now: BootTime, handed: bool, out: &mut Vec<SourceAction>) {
        if handed {
            if !self.parts.holding.has_flips() {
                return self.abort_running("too many moves were aborted under one epoch", out);
            }
            let flip = self.parts.holding.next_flip();
            self.state = State::Pausing { until: now + self.parts.terms.patience };
            out.push(SourceAction::PauseMachine { flip });
        } else {
            let until = now + self.parts.terms.patience;
            self.write_hand_over(until, out);
        }
    }

    fn write_hand_over(&mut self, until: BootTime, out: &mut Vec<SourceAction>) {
        let SourceParts { holding, to, attempt, terms, nonces, .. } = &mut self.parts;
        let new = holding.record.handing(*attempt, to.clone(), nonces());
        let expected = holding.record.clone();
        let operation = take_operation(&mut self.next_operation);
        let (write, call) =
            LeaseWrite::start(LeasePurpose::HandOver, expected, new, terms, operation);
        self.state = State::WritingHandOver { until, write };
        out.push(SourceAction::Lease(call));
    }

    fn take_back(&mut self, out: &mut Vec<SourceAction>) {
        let SourceParts { holding, attempt, terms, nonces, .. } = &mut self.parts;
        let here = holding.record.owner.clone();
        let mut new = holding.record.taken(here, *attempt, nonces());
        // Under the same life as before: whether that still holds is for its holder to know.
        new.beat.clone_from(&holding.record.beat);
        if !terms.keeps(Rule::NewEpoch) {
            new.epoch = holding.record.epoch;
        }
        let operation = take_operation(&mut self.next_operation);
        let expected = holding.record.clone();
        let (write, call) =
            LeaseWrite::start(LeasePurpose::TakeBack, expected, new, terms, operation);
        if !terms.keeps(Rule::ClaimBeforeResume) {
            return self.resume_at(call.new, out);
        }
        self.state = State::TakingBack { write };
        out.push(SourceAction::Lease(call));
    }

    fn on_answer(
        &mut self,
        now: BootTime,
        operation: OperationId,
        answer: LeaseAnswer,
        out: &mut Vec<SourceAction>,
    ) {
        match &mut self.state {
            State::WritingHandOver { until, write } => {
                let until = *until;
                match write.answer(now, operation, answer) {
                    Verdict::Stale => {}
                    Verdict::Unknown(why) => {
                        out.push(self.report(&format!("the hand-over is not written yet: {why}")));
                    }
                    Verdict::Won => {
                        self.parts.holding.record = write.new_record().clone();
                        if self.fresh_offer(now).is_some() {
                            self.go_on(now, true, out);
                        } else {
                            self.state = State::AwaitingOffer { until, handed: true };
                        }
                    }
                    Verdict::Lost(found) => self.hand_over_lost(found, until, out),
                }
            }
            State::TakingBack { write } => match write.answer(now, operation, answer) {
                Verdict::Stale => {}
                Verdict::Unknown(why) => {
                    if !self.parts.terms.keeps(Rule::SilenceIsNoVerdict) {
                        let record = write.new_record().clone();
                        return self.resume_at(record, out);
                    }
                    out.push(self.report(&format!(
                        "the machine stays paused here, its lease cannot be taken back yet: {why}"
                    )));
                }
                Verdict::Won => {
                    let record = write.new_record().clone();
                    self.resume_at(record, out);
                }
                Verdict::Lost(found) => self.take_back_lost(found, out),
            },
            _ => {}
        }
    }

    /// Another record than the one that we knew. Ours all the same if it has our name and epoch (a
    /// write of an earlier attempt whose answer never came): then that is the one to build on.
    fn hand_over_lost(&mut self, found: Record, until: BootTime, out: &mut Vec<SourceAction>) {
        let known = &self.parts.holding.record;
        if found.owner == known.owner && found.epoch == known.epoch {
            self.parts.holding.record = found;
            self.write_hand_over(until, out);
        } else {
            self.stop(&found, out);
        }
    }

    fn take_back_lost(&mut self, found: Record, out: &mut Vec<SourceAction>) {
        let known = &self.parts.holding.record;
        let ours = found.owner == known.owner
            && found.epoch == known.epoch.next()
            && found.attempt == self.parts.attempt;
        let given_up = found.owner == known.owner
            && found.epoch == known.epoch
            && found.handing_to == known.handing_to
            && found.beat != known.beat;
        if ours {
            // Asked for by an earlier life of this runner.
            self.resume_at(found, out);
        } else if given_up {
            // Whoever keeps this host's sign of life has, and nobody has taken it since.
            self.parts.holding.record = found;
            self.take_back(out);
        } else if found.owner != known.owner && found.epoch > known.epoch {
            out.push(self.report(&format!(
                "{} owns the machine at {}; its pages are served from here",
                found.owner, found.epoch
            )));
            self.state = State::ServingPages { epoch: found.epoch };
        } else {
            self.stop(&found, out);
        }
    }

    fn stop(&mut self, found: &Record, out: &mut Vec<SourceAction>) {
        let known = &self.parts.holding.record;
        if known.beat.is_some() && found.owner != known.owner && found.epoch > known.epoch {
            // Its holder learns the same, and drops the copy.
            let why = format!(
                "machine \"{}\" was taken over by {} at {} while this host was not heard: the copy \
                 here is over",
                known.machine, found.owner, found.epoch
            );
            self.state = State::Stopped;
            out.push(SourceAction::StayPaused { why });
            return;
        }
        let why = format!(
            "the lease of machine \"{}\" names {} at {}, but this host believed to own it at {}: \
             nothing runs here until a person has found out which copy is the right one",
            known.machine, found.owner, found.epoch, known.epoch
        );
        self.state = State::Stopped;
        out.push(SourceAction::StayPaused { why });
    }

    fn on_paused(&mut self, now: BootTime, flush_owed: bool, out: &mut Vec<SourceAction>) {
        if !matches!(self.state, State::Pausing { .. }) {
            return;
        }
        let Some(offer) = self.fresh_offer(now) else {
            return self.abort_paused("the destination's offer ended during the pause", out);
        };
        if !self.within_term(now) {
            return self.abort_paused("this host's term has ended", out);
        }
        let token = Token {
            attempt: self.parts.attempt,
            serial: offer.serial,
            handed: self.parts.holding.record.clone(),
            flush_owed,
        };
        let wait = self.parts.terms.expiry(offer.good_for);
        let named = self.parts.terms.keeps(Rule::WaitForNamedOffer);
        let from = if named { offer.at } else { offer.at - offer.good_for / 2 };
        self.state = State::AwaitingVerdict { expires: from + wait };
        out.push(SourceAction::SendToken(token));
        out.push(SourceAction::ServePages);
    }

    fn on_refused(&mut self, attempt: AttemptId, why: &str, out: &mut Vec<SourceAction>) {
        if attempt != self.parts.attempt {
            return;
        }
        let text = format!("the destination refused: {why}");
        match self.state {
            State::Copying | State::AwaitingOffer { .. } | State::WritingHandOver { .. } => {
                self.abort_running(&text, out);
            }
            // What an earlier life of this runner asked of the store may happen later: the machine runs
            // at the epoch that the store gives it, or at one that this host knows nothing of.
            State::AwaitingVerdict { .. }
                if self.recovered && self.parts.terms.keeps(Rule::SuccessorClaimsBack) =>
            {
                out.push(self.report(&format!("{text}; its lease is taken back")));
                self.take_back(out);
            }
            State::Pausing { .. } | State::AwaitingVerdict { .. } => self.abort_paused(&text, out),
            // The store has been asked already, and it will answer the same.
            _ => {}
        }
    }

    /// The epoch that the destination's lease has if it took it from us.
    fn next_owner(&self) -> Epoch {
        self.parts.holding.record.epoch.next()
    }

    fn on_confirmed(&mut self, epoch: Epoch, out: &mut Vec<SourceAction>) {
        if !matches!(self.state, State::AwaitingVerdict { .. } | State::TakingBack { .. }) {
            return;
        }
        if epoch == self.next_owner() {
            self.state = State::ServingPages { epoch };
        } else {
            // Not what the token led to: the store decides, as if nothing had been said.
            out.push(self.report(&format!("ignored a confirmation at {epoch}")));
        }
    }

    fn on_durable(&mut self, epoch: Epoch, out: &mut Vec<SourceAction>) {
        let expected = match self.state {
            State::AwaitingVerdict { .. } | State::TakingBack { .. } => self.next_owner(),
            State::ServingPages { epoch } => epoch,
            _ => return,
        };
        if epoch >= expected {
            self.state = State::Released;
            out.push(SourceAction::Release);
        } else {
            out.push(self.report(&format!("ignored a release at {epoch}")));
        }
    }

    fn on_peer_lost(&mut self, now: BootTime, out: &mut Vec<SourceAction>) {
        match self.state {
            State::Copying | State::AwaitingOffer { .. } | State::WritingHandOver { .. } => {
                self.abort_running("the connection broke", out);
            }
            State::Pausing { .. } => self.abort_paused("the connection broke", out),
            State::AwaitingVerdict { expires } => {
                if !self.parts.terms.keeps(Rule::WaitForExpiry) {
                    return self.take_back(out);
                }
                let left = expires.since(now);
                out.push(self.report(&format!(
                    "the connection broke after the token was sent: the machine stays paused for \
                     {left:?}, then the lease decides where it runs"
                )));
            }
            State::ServingPages { .. } => out.push(self.report(
                "the connection broke while the destination may need blocks from here; they are \
                 kept until it comes back or a person releases them",
            )),
            _ => {}
        }
    }

    fn on_cancel(&mut self, out: &mut Vec<SourceAction>) {
        match self.state {
            State::Copying | State::AwaitingOffer { .. } | State::WritingHandOver { .. } => {
                self.abort_running("it was cancelled", out);
            }
            State::Pausing { .. } => self.abort_paused("it was cancelled", out),
            State::AwaitingVerdict { .. } | State::TakingBack { .. } => out.push(
                self.report("too late to cancel: the destination may run the machine already"),
            ),
            _ => {}
        }
    }

    /// An offer that the destination can still use when the token arrives.
    fn fresh_offer(&self, now: BootTime) -> Option<Received> {
        let fresh_for = self.parts.terms.fresh_for;
        self.offer.filter(|offer| now.since(offer.at) <= fresh_for.min(offer.good_for / 2))
    }

    /// Ends an attempt whose machine has not been paused.
    fn abort_running(&mut self, why: &str, out: &mut Vec<SourceAction>) {
        self.state = State::Aborted;
        out.push(SourceAction::SendCancel { attempt: self.parts.attempt });
        out.push(self.report(&format!("the move was given up: {why}; the machine runs on here")));
    }

    /// Ends an attempt whose machine is paused and whose token is not out, or was refused.
    fn abort_paused(&mut self, why: &str, out: &mut Vec<SourceAction>) {
        self.state = State::Aborted;
        let epoch = self.parts.holding.record.epoch;
        let flip = self.parts.holding.next_flip();
        out.push(SourceAction::ResumeHere { epoch, flip });
        out.push(SourceAction::SendCancel { attempt: self.parts.attempt });
        out.push(
            self.report(&format!("the move was given up: {why}; the machine runs here again")),
        );
    }

    /// The store has given the machine back to us.
    fn resume_at(&mut self, record: Record, out: &mut Vec<SourceAction>) {
        let epoch = record.epoch;
        self.parts.holding = Holding::new(record);
        self.state = State::Resumed { epoch };
        out.push(SourceAction::ResumeHere { epoch, flip: self.parts.holding.flip() });
        out.push(SourceAction::SendCancel { attempt: self.parts.attempt });
        out.push(self.report(&format!(
            "the destination did not take the machine; it runs here again at {epoch}"
        )));
    }

    fn report(&self, text: &str) -> SourceAction {
        let SourceParts { holding, to, .. } = &self.parts;
        let machine = &holding.record.machine;
        SourceAction::Report(format!("machine \"{machine}\", move to {to}: {text}"))
    }
}
