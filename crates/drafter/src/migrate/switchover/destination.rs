//! The destination's half: offers, the token, the lease, and when frames may leave.

use super::{
    FlipEpoch, Holding, Nonces, Offer, Terms, Token,
    terms::Rule,
    write::{
        LeaseAnswer, LeaseCall, LeasePurpose, LeaseWrite, OperationId, Verdict, take_operation,
    },
};
use crate::lease::{
    AttemptId, BeatRef, BootTime, Epoch, HostName, MachineName, OfferSerial, Record,
};
use std::{collections::VecDeque, time::Duration};

/// More offers than can be valid at one time.
const OFFERS_KEPT: usize = 8;

/// Where a test needs a deadline that does not come.
const NEVER: Duration = Duration::from_secs(1 << 30);

/// What a destination is made of.
#[cfg_attr(test, derive(Clone))]
pub struct DestinationParts {
    /// The machine that comes.
    pub machine: MachineName,
    /// This host.
    pub here: HostName,
    /// The host that it comes from, by its proven name.
    pub from: HostName,
    /// The source's number for this move.
    pub attempt: AttemptId,
    /// The life that is kept here: a protected machine is held under it, and refused without. Its
    /// [`Holder`](crate::tenure::Holder) is made with the same, before the machine runs.
    pub beat: Option<BeatRef>,
    /// The times.
    pub terms: Terms,
    /// For writes to the lease.
    pub nonces: Nonces,
}

/// What happens to a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationEvent {
    /// Everything is built that does not need the source: offers may start.
    Prepared,
    /// [`DestinationAuthority::wake_at`] has come (or any other time).
    Tick,
    /// The whole switchover message is here: state, dirty lists of all devices, token.
    Token(Token),
    /// The guest runs, its output held.
    Running,
    /// Loading or starting failed, with the reason; no instruction runs.
    LoadFailed(String),
    /// The store's answer to a [`DestinationAction::Lease`].
    LeaseAnswer {
        /// The call.
        operation: OperationId,
        /// The answer.
        answer: LeaseAnswer,
    },
    /// The source says: every flush that it acknowledged is durable.
    SourceDurable,
    /// The connection is gone.
    PeerLost,
    /// A new connection to the source (post-copy goes on).
    PeerBack,
    /// Every block of every device is here, disks synced.
    AllPresent,
    /// A person or the source calls it off.
    Cancel,
}

/// What a destination wants done, in this order.
#[expect(clippy::large_enum_variant, reason = "a few dozen per move")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Send this offer now; it counts from this call.
    SendOffer(Offer),
    /// Hold output, apply all dirty lists, load the state and run; then [`DestinationEvent::Running`]
    /// or [`DestinationEvent::LoadFailed`].
    LoadAndRun,
    /// Tell the source that this attempt will never run here.
    SendRefused {
        /// The attempt.
        attempt: AttemptId,
        /// Why, for people.
        why: String,
    },
    /// Ask the store.
    Lease(LeaseCall),
    /// The lease is ours at `epoch`: frames for the machine come here, under `flip`.
    Resume {
        /// The lease's epoch.
        epoch: Epoch,
        /// The network's.
        flip: FlipEpoch,
    },
    /// Held frames and all later ones may leave.
    ReleaseOutput {
        /// The lease's epoch.
        epoch: Epoch,
    },
    /// Stop every instruction of the guest, without asking its monitor, and keep it stopped even if
    /// a [`DestinationAction::LoadAndRun`] is still at work. It must have taken effect before the
    /// next action is done (a refusal lets the source run at once), within [`Terms::stop_margin`].
    FreezeNow,
    /// Undoes [`DestinationAction::FreezeNow`].
    Thaw,
    /// Tell the source that the lease is ours.
    SendConfirmed {
        /// The lease's epoch.
        epoch: Epoch,
    },
    /// Tell the source that it may forget the machine.
    SendDurable {
        /// The lease's epoch.
        epoch: Epoch,
    },
    /// Kill and forget the copy here.
    Discard,
    /// Tell people.
    Report(String),
}

/// Where a destination is; see the drawing in the [module](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationState {
    /// Building.
    Preparing,
    /// Receives blocks, renews offers.
    Offering,
    /// Has the token, loads.
    Loading,
    /// Runs with output held, while the lease is being taken.
    Unconfirmed,
    /// The offer has ended; waits for the store.
    FrozenUnconfirmed,
    /// The machine runs here.
    Owner(Epoch),
    /// … and needs its source no more.
    Settled(Epoch),
    /// Told the source that it will never run this attempt.
    Refused,
    /// Given up before any token.
    Discarded,
    /// The source has taken the machine back.
    Lost,
}

#[cfg_attr(test, derive(Clone))]
pub(super) enum State {
    Preparing,
    Offering { next: BootTime },
    Loading { until: BootTime, handed: Record },
    Unconfirmed { until: BootTime, take: LeaseWrite },
    FrozenUnconfirmed { take: LeaseWrite },
    Owner { epoch: Epoch },
    Settled { epoch: Epoch },
    Refused,
    Discarded,
    Lost,
}

/// The destination's half of a switchover.
#[cfg_attr(test, derive(Clone))]
pub struct DestinationAuthority {
    parts: DestinationParts,
    pub(super) state: State,
    pub(super) sent: VecDeque<(OfferSerial, BootTime)>,
    next_serial: u64,
    next_operation: u64,
    /// Frames wait for the source's flushes.
    pub(super) flush_owed: bool,
    pub(super) source_durable: bool,
    pub(super) output_released: bool,
    pub(super) all_present: bool,
    pub(super) record: Option<Record>,
}

impl DestinationAuthority {
    /// A destination that has accepted to prepare.
    #[must_use]
    pub fn new(parts: DestinationParts) -> Self {
        Self {
            parts,
            state: State::Preparing,
            sent: VecDeque::new(),
            next_serial: 1,
            next_operation: 0,
            flush_owed: false,
            source_durable: false,
            output_released: false,
            all_present: false,
            record: None,
        }
    }

    /// For a runner that has come back and found the lease naming this host by the attempt that it was
    /// receiving: the machine is its own, and lacks blocks.
    #[must_use]
    pub fn owner(parts: DestinationParts, record: Record) -> Self {
        Self {
            state: State::Owner { epoch: record.epoch },
            record: Some(record),
            // Whether it was heard is not known: it is said again.
            flush_owed: true,
            ..Self::new(parts)
        }
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> DestinationState {
        match &self.state {
            State::Preparing => DestinationState::Preparing,
            State::Offering { .. } => DestinationState::Offering,
            State::Loading { .. } => DestinationState::Loading,
            State::Unconfirmed { .. } => DestinationState::Unconfirmed,
            State::FrozenUnconfirmed { .. } => DestinationState::FrozenUnconfirmed,
            State::Owner { epoch } => DestinationState::Owner(*epoch),
            State::Settled { epoch } => DestinationState::Settled(*epoch),
            State::Refused => DestinationState::Refused,
            State::Discarded => DestinationState::Discarded,
            State::Lost => DestinationState::Lost,
        }
    }

    /// What the owner holds, once it is the owner: the next move starts from it.
    #[must_use]
    pub fn holding(&self) -> Option<Holding> {
        self.record.clone().map(Holding::new)
    }

    /// When the machine must be frozen here unless something happens before: for a deadline thread
    /// that nothing can block, set anew after every event. A machine that it froze is thawed by
    /// [`DestinationAction::Thaw`] only; afterwards the thread sends a Tick.
    #[must_use]
    pub fn freeze_at(&self) -> Option<BootTime> {
        match &self.state {
            State::Loading { until, .. } | State::Unconfirmed { until, .. } => Some(*until),
            _ => None,
        }
    }

    /// When the next [`DestinationEvent::Tick`] is due. Must be asked again after every event.
    #[must_use]
    pub fn wake_at(&self) -> Option<BootTime> {
        match &self.state {
            State::Offering { next } => Some(*next),
            State::Loading { until, .. } => Some(*until),
            State::Unconfirmed { until, take } => {
                Some(take.wake_at().map_or(*until, |retry| retry.min(*until)))
            }
            State::FrozenUnconfirmed { take } => take.wake_at(),
            _ => None,
        }
    }

    /// Takes an event, returns what to do. `now` is this host's boot time.
    pub fn on(&mut self, now: BootTime, event: DestinationEvent) -> Vec<DestinationAction> {
        let mut out = Vec::new();
        // What is overdue comes first: an event that arrives after the end of the offer finds the
        // machine frozen, even if the timer was late.
        self.catch_up(now, &mut out);
        match event {
            DestinationEvent::Tick => {}
            DestinationEvent::Prepared => self.on_prepared(now, &mut out),
            DestinationEvent::Token(token) => self.on_token(now, token, &mut out),
            DestinationEvent::Running => self.on_running(&mut out),
            DestinationEvent::LoadFailed(why) => self.on_load_failed(&why, &mut out),
            DestinationEvent::LeaseAnswer { operation, answer } => {
                self.on_answer(now, operation, answer, &mut out);
            }
            DestinationEvent::SourceDurable => self.on_source_durable(&mut out),
            DestinationEvent::PeerLost => self.on_peer_lost(&mut out),
            DestinationEvent::PeerBack => self.on_peer_back(&mut out),
            DestinationEvent::AllPresent => self.on_all_present(&mut out),
            DestinationEvent::Cancel => self.on_cancel(&mut out),
        }
        out
    }

    fn catch_up(&mut self, now: BootTime, out: &mut Vec<DestinationAction>) {
        match &self.state {
            State::Offering { next } if now >= *next => self.offer(now, out),
            State::Loading { until, .. } if now >= *until => {
                out.push(DestinationAction::FreezeNow);
                self.refuse("the offer ended before the machine was loaded", out);
            }
            State::Unconfirmed { until, .. } if now >= *until => self.freeze(out),
            _ => {}
        }
        if let State::Unconfirmed { take, .. } | State::FrozenUnconfirmed { take } = &mut self.state
            && let Some(call) = take.retry(now, &mut self.next_operation)
        {
            out.push(DestinationAction::Lease(call));
        }
    }

    fn on_prepared(&mut self, now: BootTime, out: &mut Vec<DestinationAction>) {
        if matches!(self.state, State::Preparing) {
            self.offer(now, out);
        }
    }

    fn offer(&mut self, now: BootTime, out: &mut Vec<DestinationAction>) {
        let (attempt, good_for) = (self.parts.attempt, self.parts.terms.good_for);
        let serial = OfferSerial(self.next_serial);
        self.next_serial += 1;
        if self.sent.len() == OFFERS_KEPT {
            self.sent.pop_front();
        }
        self.sent.push_back((serial, now));
        self.state = State::Offering { next: now + self.parts.terms.renewal() };
        out.push(DestinationAction::SendOffer(Offer { attempt, serial, good_for }));
    }

    fn on_token(&mut self, now: BootTime, token: Token, out: &mut Vec<DestinationAction>) {
        match self.state {
            State::Preparing | State::Offering { .. } => {}
            // Said once more, because the first refusal may have been lost.
            State::Refused | State::Discarded => return self.send_refused("it was given up", out),
            _ => return,
        }
        if let Err(why) = self.check_token(&token) {
            return self.refuse(&why, out);
        }
        let terms = &self.parts.terms;
        let sent = self.sent.iter().find(|(serial, _)| *serial == token.serial);
        // A test shows what happens if any token will do.
        let any = (OfferSerial(0), now);
        let sent = if terms.keeps(Rule::RunOnlyInOffer) { sent } else { Some(&any) };
        let Some(until) = sent.map(|(_, at)| *at + terms.good_for - terms.stop_margin) else {
            return self.refuse(&format!("it names {}, which is over", token.serial), out);
        };
        if now + terms.start_margin > until {
            return self.refuse(&format!("it came too late for {}", token.serial), out);
        }
        let until = if terms.keeps(Rule::FreezeAtEnd) { until } else { until + NEVER };
        self.flush_owed = token.flush_owed;
        self.state = State::Loading { until, handed: token.handed };
        out.push(DestinationAction::LoadAndRun);
    }

    fn check_token(&self, token: &Token) -> Result<(), String> {
        let DestinationParts { machine, here, from, attempt, .. } = &self.parts;
        if token.attempt != *attempt {
            return Err(format!("it is for attempt {}, this is {attempt}", token.attempt));
        }
        let handed = &token.handed;
        let to_us = handed
            .handing_to
            .as_ref()
            .is_some_and(|handing| handing.attempt == *attempt && handing.to == *here);
        if handed.machine != *machine || handed.owner != *from || !to_us {
            return Err(format!("its lease does not hand \"{machine}\" from {from} to {here}"));
        }
        if handed.beat.is_some() && self.parts.beat.is_none() {
            return Err(format!(
                "\"{machine}\" is protected against the loss of its host, and {here} keeps no sign of \
                 life"
            ));
        }
        Ok(())
    }

    fn on_running(&mut self, out: &mut Vec<DestinationAction>) {
        let State::Loading { until, handed } = &self.state else { return };
        let DestinationParts { here, attempt, beat, terms, nonces, .. } = &mut self.parts;
        let mut new = handed.taken(here.clone(), *attempt, nonces());
        // Protected here if it was there.
        new.beat = handed.beat.as_ref().and(beat.clone());
        if !terms.keeps(Rule::NewEpoch) {
            new.epoch = handed.epoch;
        }
        let operation = take_operation(&mut self.next_operation);
        let (take, call) =
            LeaseWrite::start(LeasePurpose::Take, handed.clone(), new, terms, operation);
        self.state = State::Unconfirmed { until: *until, take };
        out.push(DestinationAction::Lease(call));
        if !self.parts.terms.keeps(Rule::HoldOutput)
            && let State::Unconfirmed { take, .. } = &self.state
        {
            out.push(DestinationAction::ReleaseOutput { epoch: take.new_record().epoch });
        }
    }

    fn on_load_failed(&mut self, why: &str, out: &mut Vec<DestinationAction>) {
        if matches!(self.state, State::Loading { .. }) {
            self.refuse(&format!("the machine could not be loaded: {why}"), out);
        }
    }

    fn on_answer(
        &mut self,
        now: BootTime,
        operation: OperationId,
        answer: LeaseAnswer,
        out: &mut Vec<DestinationAction>,
    ) {
        let (State::Unconfirmed { take, .. } | State::FrozenUnconfirmed { take }) = &mut self.state
        else {
            return;
        };
        match take.answer(now, operation, answer) {
            Verdict::Stale => {}
            Verdict::Unknown(why) => {
                if !self.parts.terms.keeps(Rule::SilenceIsNoVerdict) {
                    return self.refuse("the store is silent", out);
                }
                out.push(self.report(&format!("the lease cannot be taken yet: {why}")));
            }
            Verdict::Won => {
                let record = take.new_record().clone();
                self.become_owner(record, out);
            }
            // Ours was there, and whoever keeps this host's sign of life has bound it to another beat since:
            // nobody has taken it, and its holder gets it back before it runs.
            Verdict::Lost(found)
                if found.owner == take.new_record().owner
                    && found.epoch == take.new_record().epoch
                    && found.attempt == take.new_record().attempt
                    && found.beat.is_some() =>
            {
                self.become_owner(found, out);
            }
            Verdict::Lost(found) => {
                if !self.parts.terms.keeps(Rule::DiscardWhenLost) {
                    let record = take.new_record().clone();
                    return self.become_owner(record, out);
                }
                out.push(self.report(&format!(
                    "{} has taken the machine back ({}), the copy here is dropped",
                    found.owner, found.epoch
                )));
                self.state = State::Lost;
                out.push(DestinationAction::FreezeNow);
                out.push(DestinationAction::Discard);
            }
        }
    }

    fn become_owner(&mut self, record: Record, out: &mut Vec<DestinationAction>) {
        let epoch = record.epoch;
        let frozen = matches!(self.state, State::FrozenUnconfirmed { .. });
        self.state = State::Owner { epoch };
        self.record = Some(record);
        out.push(DestinationAction::Resume { epoch, flip: FlipEpoch::of(epoch, 0) });
        if frozen {
            out.push(DestinationAction::Thaw);
        }
        out.push(DestinationAction::SendConfirmed { epoch });
        self.release_output(out);
        if self.all_present {
            self.settle(epoch, out);
        }
    }

    fn release_output(&mut self, out: &mut Vec<DestinationAction>) {
        let State::Owner { epoch } = self.state else { return };
        // Blocks that are all here, synced, cover the source's flushes too.
        let owed = self.flush_owed && !self.source_durable && !self.all_present;
        if self.output_released || (owed && self.parts.terms.keeps(Rule::HoldOutputForFlush)) {
            return;
        }
        self.output_released = true;
        out.push(DestinationAction::ReleaseOutput { epoch });
    }

    fn settle(&mut self, epoch: Epoch, out: &mut Vec<DestinationAction>) {
        self.state = State::Settled { epoch };
        out.push(DestinationAction::SendDurable { epoch });
    }

    fn on_source_durable(&mut self, out: &mut Vec<DestinationAction>) {
        // Remembered in every state: it may overtake the store's answer, and on several connections
        // even the token.
        self.source_durable = true;
        self.release_output(out);
    }

    fn on_all_present(&mut self, out: &mut Vec<DestinationAction>) {
        if self.all_present {
            return;
        }
        self.all_present = true;
        if let State::Owner { epoch } = self.state {
            self.release_output(out);
            self.settle(epoch, out);
        }
    }

    fn on_peer_lost(&mut self, out: &mut Vec<DestinationAction>) {
        match self.state {
            State::Preparing | State::Offering { .. } => {
                out.push(self.report("the source is gone before the switchover"));
                self.state = State::Discarded;
                out.push(DestinationAction::Discard);
            }
            // Nothing is taken yet, and without its source the machine would stall here: the
            // source, if it lives, resumes when the offer is over.
            State::Loading { .. } if !self.all_present => {
                out.push(DestinationAction::FreezeNow);
                self.refuse("the connection broke while blocks are missing", out);
            }
            State::Owner { .. } if !self.all_present => {
                let text = "the source is gone while blocks are missing: the machine stalls at \
                            the first of them until the source or another copy is reached";
                out.push(self.report(text));
            }
            _ => {}
        }
    }

    fn on_peer_back(&mut self, out: &mut Vec<DestinationAction>) {
        match self.state {
            State::Owner { epoch } => out.push(DestinationAction::SendConfirmed { epoch }),
            // The confirmation may have been lost with the line, too.
            State::Settled { epoch } => out.extend([
                DestinationAction::SendConfirmed { epoch },
                DestinationAction::SendDurable { epoch },
            ]),
            State::Refused | State::Discarded => self.send_refused("it was given up", out),
            _ => {}
        }
    }

    fn on_cancel(&mut self, out: &mut Vec<DestinationAction>) {
        match self.state {
            State::Preparing | State::Offering { .. } => self.refuse("it was cancelled", out),
            State::Loading { .. } => {
                out.push(DestinationAction::FreezeNow);
                self.refuse("it was cancelled", out);
            }
            State::Unconfirmed { .. } | State::FrozenUnconfirmed { .. } | State::Owner { .. } => {
                if self.parts.terms.keeps(Rule::NoRefusalAfterTake) {
                    let text =
                        "too late to cancel: the machine has been started here; move it back";
                    out.push(self.report(text));
                } else {
                    self.send_refused("it was cancelled", out);
                }
            }
            _ => {}
        }
    }

    fn freeze(&mut self, out: &mut Vec<DestinationAction>) {
        let state = std::mem::replace(&mut self.state, State::Lost);
        let State::Unconfirmed { take, .. } = state else {
            self.state = state;
            return;
        };
        self.state = State::FrozenUnconfirmed { take };
        out.push(DestinationAction::FreezeNow);
        let text = "the offer ended before the store confirmed the lease: the machine is frozen \
                    here until the store answers";
        out.push(self.report(text));
    }

    /// The end, for an attempt that has not begun to take the lease.
    fn refuse(&mut self, why: &str, out: &mut Vec<DestinationAction>) {
        self.state = State::Refused;
        self.send_refused(why, out);
        out.push(DestinationAction::Discard);
    }

    fn send_refused(&self, why: &str, out: &mut Vec<DestinationAction>) {
        let attempt = self.parts.attempt;
        out.push(DestinationAction::SendRefused { attempt, why: why.to_owned() });
    }

    fn report(&self, text: &str) -> DestinationAction {
        let DestinationParts { machine, from, .. } = &self.parts;
        DestinationAction::Report(format!("machine \"{machine}\", move from {from}: {text}"))
    }
}
