//! The switchover and what follows, seen from the source: pause, flight, token, pages, release.
//!
//! Every decision about authority is the state machine's; [`Session::step`] carries out what it
//! can by itself (lease calls, messages, reports) and returns the rest as [`Next`].

use super::{
    MoveError, Moved, Session, Stop, closed,
    flight::{Flight, ms},
    pages::PageServer,
    send::send_run,
};
use crate::{
    lease::{AttemptId, BootClock, BootTime, Clock, Epoch, OfferSerial},
    migrate::{
        link,
        messages::{Confirmation, DurableReport, TokenMeta},
        planner::Reason,
        protocol::{Frame, WireError},
        switchover::{
            FlipEpoch, LeaseAnswer, Offer, SourceAction, SourceEvent, SourceState, Token,
        },
        timings::MoveReport,
    },
    runner::api::Phase,
};
use silo::block::BlockSet;
use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

/// How long the destination may take to make everything durable once it has all blocks.
const DURABLE_LIMIT: Duration = Duration::from_secs(120);
/// How long a FLUSH that was answered early may take to become durable.
const FLUSH_LIMIT: Duration = Duration::from_secs(60);

/// What the engine must do next.
#[derive(Debug)]
pub(super) enum Next {
    Pause(FlipEpoch),
    SendToken(Token),
    GoOn { epoch: Epoch, flip: FlipEpoch },
    Release,
    StayPaused(String),
}

/// What arrived after the token.
#[derive(Default)]
struct After {
    confirmation: Option<(Instant, Confirmation)>,
    durable: Option<DurableReport>,
    lost: Option<String>,
    end: Option<Next>,
    refusal: Option<String>,
}

fn now() -> BootTime {
    BootClock.now()
}

fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| Duration::from(t).as_nanos() as u64)
}

impl Session<'_> {
    /// An offer came; `at` is when the reader got it.
    pub(super) fn offer(&mut self, at: Instant, attempt: u64, serial: u64, good_for_ms: u32) {
        let received = now() - at.elapsed();
        let offer = Offer {
            attempt: AttemptId(attempt),
            serial: OfferSerial(serial),
            good_for: Duration::from_millis(u64::from(good_for_ms)),
        };
        let actions = self.around.authority.on(received, SourceEvent::Offer(offer));
        let next = self.act(actions);
        self.pending.extend(next);
    }

    /// Feeds an event and everything that follows from it at once.
    pub(super) fn step(&mut self, event: SourceEvent) -> Vec<Next> {
        let actions = self.around.authority.on(now(), event);
        let mut next = std::mem::take(&mut self.pending);
        next.extend(self.act(actions));
        next
    }

    fn act(&mut self, actions: Vec<SourceAction>) -> Vec<Next> {
        let mut next = Vec::new();
        for action in actions {
            match action {
                SourceAction::Lease(call) => {
                    let machine = &call.new.machine;
                    let answer =
                        self.around.store.compare_and_set(machine, Some(&call.expected), &call.new);
                    let answer = LeaseAnswer::from(answer);
                    let event = SourceEvent::LeaseAnswer { operation: call.operation, answer };
                    let actions = self.around.authority.on(now(), event);
                    next.extend(self.act(actions));
                }
                SourceAction::PauseMachine { flip } => next.push(Next::Pause(flip)),
                SourceAction::SendToken(token) => next.push(Next::SendToken(token)),
                SourceAction::ResumeHere { epoch, flip } => next.push(Next::GoOn { epoch, flip }),
                SourceAction::Release => next.push(Next::Release),
                SourceAction::StayPaused { why } => next.push(Next::StayPaused(why)),
                // The page server starts with the token.
                SourceAction::ServePages => {}
                SourceAction::SendCancel { .. } => {
                    let _ = self.main.write(&Frame::Abort("the source gave up".into()));
                    let _ = self.main.flush();
                }
                SourceAction::Report(line) => {
                    tracing::info!("{line}");
                    self.last_report = line;
                }
            }
        }
        next
    }

    /// From the end of pre-copy to the end of the move.
    pub(super) fn hand_over(
        &mut self,
        left: Vec<BlockSet>,
        reason: Reason,
    ) -> Result<Moved, MoveError> {
        let ready = self.around.machine.before_pause().map_err(|e| Stop::Peer(e.to_string()));
        let blocks = ready.and_then(|()| {
            self.around.machine.state_blocks().map_err(|e| Stop::Peer(e.to_string()))
        });
        let permitted = blocks.and_then(|blocks| Ok((blocks, self.permission()?)));
        let (state_blocks, flip) = match permitted {
            Ok(permitted) => permitted,
            Err(stop) => {
                self.step(SourceEvent::Cancel);
                return Err(self.give_up("switchover", &stop));
            }
        };
        let (left, told) = match self.close(left) {
            Ok(closed) => closed,
            Err(stop) => {
                // It never stood still; going on is what remains to be said to all parts of it.
                let next = self.step(SourceEvent::Cancel);
                let cancelled = matches!(stop, Stop::Cancelled);
                return Err(match self.back(next, stop.to_string()) {
                    MoveError::Aborted { phase, .. } if cancelled => MoveError::Cancelled { phase },
                    other => other,
                });
            }
        };
        self.progress(Phase::Switchover, left.iter().map(BlockSet::bytes).sum());
        let precopied = self.started.elapsed();
        let paused_at_ns = monotonic_ns();
        let all = self.planner_mode == crate::migrate::messages::Mode::PreCopy;
        let flight = match self.fly(left, &told, &state_blocks, flip.0, all) {
            Ok(flight) => flight,
            Err(error) => {
                let why = error.to_string();
                let next = self.step(SourceEvent::PauseFailed(why.clone()));
                return Err(self.back(next, why));
            }
        };
        // A cancel that came during the pause still counts: the token has not left.
        if self.cancelled() {
            let next = self.step(SourceEvent::Cancel);
            return Err(match self.back(next, "cancelled".into()) {
                MoveError::Aborted { phase, .. } => MoveError::Cancelled { phase },
                other => other,
            });
        }
        let flush_owed = self.around.machine.flush_pending();
        let mut token = None;
        let mut other = Vec::new();
        for next in self.step(SourceEvent::Paused { flush_owed }) {
            match next {
                Next::SendToken(t) => token = Some(t),
                next => other.push(next),
            }
        }
        let Some(token) = token else {
            let why = self.last_report.clone();
            return Err(self.back(other, why));
        };
        self.after_token(flight, &token, reason, precopied, paused_at_ns)
    }

    /// Waits until the lease names the destination and a fresh offer is at hand.
    fn permission(&mut self) -> Result<FlipEpoch, Stop> {
        let mut next = self.step(SourceEvent::WantSwitchover);
        loop {
            for next in next {
                match next {
                    Next::Pause(flip) => return Ok(flip),
                    Next::StayPaused(why) => return Err(Stop::Peer(why)),
                    _ => {}
                }
            }
            let waiting = matches!(
                self.around.authority.state(),
                SourceState::AwaitingOffer | SourceState::WritingHandOver
            );
            if !waiting {
                return Err(Stop::Peer(self.last_report.clone()));
            }
            if self.cancelled() {
                return Err(Stop::Cancelled);
            }
            let wait = self.until_wake().min(Duration::from_millis(50));
            match self.arrivals.recv_timeout(wait) {
                Ok((at, frame)) => {
                    self.note(at, frame?)?;
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(closed()),
            }
            next = self.step(SourceEvent::Tick);
        }
    }

    fn until_wake(&self) -> Duration {
        self.around.authority.wake_at().map_or(Duration::from_secs(1), |at| at.since(now()))
    }

    /// The machine is paused and shall go on here, if the authority says so.
    fn back(&mut self, next: Vec<Next>, why: String) -> MoveError {
        for next in next {
            match next {
                Next::GoOn { epoch, flip } => {
                    // What a parked token might have owed is ours again.
                    self.give_back();
                    let went = self.around.machine.go_on(epoch.0, flip.0);
                    self.control.shutdown();
                    return match went {
                        Ok(()) => MoveError::Aborted { phase: "switchover", reason: why },
                        Err(cause) => MoveError::Stuck { reason: why, cause: cause.to_string() },
                    };
                }
                Next::StayPaused(reason) => return MoveError::Undecided { reason },
                _ => {}
            }
        }
        MoveError::Undecided { reason: why }
    }

    fn after_token(
        &mut self,
        mut flight: Flight,
        token: &Token,
        reason: Reason,
        precopied: Duration,
        paused_at_ns: u64,
    ) -> Result<Moved, MoveError> {
        let send = Instant::now();
        let state_bytes = flight.state_bytes;
        let meta = serde_json::to_vec(&TokenMeta::of(token, state_bytes)).unwrap_or_default();
        let state = std::mem::take(&mut flight.state);
        let sent = self.main.write(&Frame::Token { meta, state }).and_then(|()| self.main.flush());
        flight.parts.send_ms += ms(send.elapsed());
        let mut after = After::default();
        if let Err(error) = sent {
            after.lost = Some(error.to_string());
        }
        let pages =
            Arc::new(PageServer::new(self.devices.clone(), std::mem::take(&mut flight.missing)));
        self.serve_faults(&pages);
        let handed = Instant::now();
        if token.flush_owed && after.lost.is_none() {
            self.tell_durable(token, &mut after);
        }
        self.push(&pages, &mut after);
        self.see_through(&pages, &mut after);
        self.late_writes = self.count_late_writes();
        self.conclude(&flight, after, &pages, |this, flight, after| {
            let (at, confirmation) = after.confirmation.clone()?;
            Some(this.report(
                flight,
                at,
                &confirmation,
                after,
                &pages,
                reason,
                precopied,
                paused_at_ns,
                state_bytes,
                handed,
            ))
        })
    }

    /// Faults are served on their own connection and thread from now on.
    fn serve_faults(&mut self, pages: &Arc<PageServer>) {
        let Some(fault) = self.fault.take() else { return };
        let pages = Arc::clone(pages);
        self.fault_control = Some(fault.control);
        let served = std::thread::Builder::new().name("source-faults".into()).spawn(move || {
            let _urgent = crate::driver::Urgent::this_thread();
            // It ends when the connection does; that this happened shows on the main connection.
            if let Err(error) = pages.serve(fault.incoming, fault.outgoing) {
                tracing::debug!(%error, "the fault connection ended");
            }
        });
        if let Err(error) = served {
            // Bulk still brings every block; only faults wait for it.
            tracing::error!(%error, "no thread for the fault connection");
        }
    }

    /// Nothing may write to a paused machine: the last scan was the last word. Looked at when all
    /// else is done, because looking costs time in proportion to the memory, and a processor that
    /// a destination on the same computer needs for its first instructions.
    fn count_late_writes(&mut self) -> u64 {
        let mut late = 0;
        for at in 0..self.devices.len() {
            match self.take_if_tracked(at) {
                Ok(set) => late += set.len(),
                Err(error) => tracing::debug!(%error, "no last look at the tracking"),
            }
        }
        if late > 0 {
            tracing::error!(late, "blocks were written after the pause: please report this");
        }
        late
    }

    /// The flushes that were answered early are durable now: the destination may let frames go.
    fn tell_durable(&mut self, token: &Token, after: &mut After) {
        match self.around.machine.wait_flushed(FLUSH_LIMIT) {
            Ok(()) => {
                let frame = Frame::SourceDurable { attempt: token.attempt.0 };
                if let Err(error) = self.main.write(&frame).and_then(|()| self.main.flush()) {
                    after.lost = Some(error.to_string());
                }
            }
            // The destination keeps frames held until it has everything itself.
            Err(error) => tracing::error!(%error, "a flush that was answered early failed"),
        }
    }

    /// Sends what is missing, looking at what arrives between runs.
    fn push(&mut self, pages: &PageServer, after: &mut After) {
        if after.lost.is_some() {
            return;
        }
        let mut reported = Instant::now();
        let mut cursor = (0, 0);
        let mut buffer = Vec::new();
        while let Some((number, range)) = pages.next(&mut cursor) {
            let device = Arc::clone(&self.devices[usize::from(number.0)]);
            let before = self.main.sent();
            if let Err(e) = send_run(&mut self.main, number, device.as_ref(), range, &mut buffer) {
                after.lost = Some(e.to_string());
                return;
            }
            self.pacer.sent(self.main.sent() - before);
            self.arrived(after);
            if after.end.is_some() || after.lost.is_some() {
                return;
            }
            if reported.elapsed() > Duration::from_millis(50) {
                reported = Instant::now();
                self.progress(Phase::PostCopy, pages.remaining() * 4096);
            }
        }
        let ended = self.main.write(&Frame::BulkEnd).and_then(|()| self.main.flush());
        if let Err(error) = ended {
            after.lost = Some(error.to_string());
        }
    }

    /// Takes what has arrived after the token, without waiting.
    fn arrived(&mut self, after: &mut After) {
        loop {
            match self.arrivals.try_recv() {
                Ok((at, Ok(frame))) => self.take_late(at, frame, after),
                Ok((_, Err(error))) => Self::lose(after, &error),
                Err(mpsc::TryRecvError::Empty) => return,
                Err(mpsc::TryRecvError::Disconnected) => {
                    after.lost.get_or_insert_with(|| "the connection closed".into());
                    return;
                }
            }
        }
    }

    fn lose(after: &mut After, error: &WireError) {
        after.lost.get_or_insert_with(|| error.to_string());
    }

    fn take_late(&mut self, at: Instant, frame: Frame, after: &mut After) {
        let event = match frame {
            Frame::Confirmed(json) => match serde_json::from_slice::<Confirmation>(&json) {
                Ok(confirmation) => {
                    let epoch = Epoch(confirmation.epoch);
                    after.confirmation = Some((at, confirmation));
                    SourceEvent::Confirmed { epoch }
                }
                Err(error) => {
                    tracing::warn!(%error, "a confirmation that cannot be read");
                    return;
                }
            },
            Frame::Durable(json) => match serde_json::from_slice::<DurableReport>(&json) {
                Ok(report) => {
                    let epoch = Epoch(report.epoch);
                    after.durable = Some(report);
                    SourceEvent::Durable { epoch }
                }
                Err(error) => {
                    tracing::warn!(%error, "a release that cannot be read");
                    return;
                }
            },
            Frame::Refused { attempt, reason } => {
                after.refusal = Some(reason.clone());
                SourceEvent::Refused { attempt: AttemptId(attempt), why: reason }
            }
            Frame::Offer { attempt, serial, good_for_ms } => {
                return self.offer(at, attempt, serial, good_for_ms);
            }
            _ => return,
        };
        let next = self.step(event);
        Self::settle(next, after);
    }

    fn settle(next: Vec<Next>, after: &mut After) {
        for next in next {
            if matches!(next, Next::GoOn { .. } | Next::Release | Next::StayPaused(_)) {
                after.end = Some(next);
            }
        }
    }

    /// Waits until the authority has decided and, if the destination owns the machine, until it is
    /// durable there or the connection is lost.
    fn see_through(&mut self, pages: &PageServer, after: &mut After) {
        let mut told_lost = false;
        let mut deadline = None;
        while after.end.is_none() {
            if after.lost.is_some() && !told_lost {
                told_lost = true;
                let next = self.step(SourceEvent::PeerLost);
                Self::settle(next, after);
                continue;
            }
            match self.around.authority.state() {
                SourceState::ServingPages(_) if told_lost => return,
                SourceState::ServingPages(_) => {
                    let limit = *deadline.get_or_insert_with(|| Instant::now() + DURABLE_LIMIT);
                    if Instant::now() > limit && pages.remaining() == 0 {
                        after.lost = Some(format!(
                            "the destination did not say within {DURABLE_LIMIT:?} that everything is durable there"
                        ));
                        return;
                    }
                }
                _ => {}
            }
            let wait = self.until_wake().min(Duration::from_millis(20));
            if told_lost {
                std::thread::park_timeout(wait);
            } else {
                match self.arrivals.recv_timeout(wait) {
                    Ok((at, Ok(frame))) => self.take_late(at, frame, after),
                    Ok((_, Err(error))) => Self::lose(after, &error),
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => {
                        after.lost.get_or_insert_with(|| "the connection closed".into());
                    }
                }
            }
            let next = self.step(SourceEvent::Tick);
            Self::settle(next, after);
        }
    }

    fn conclude(
        &mut self,
        flight: &Flight,
        mut after: After,
        pages: &PageServer,
        report: impl FnOnce(&Self, &Flight, &After) -> Option<MoveReport>,
    ) -> Result<Moved, MoveError> {
        let end = after.end.take();
        self.progress(Phase::Ended, 0);
        if let Some(control) = &self.fault_control {
            control.shutdown();
        }
        let why = after
            .refusal
            .clone()
            .map(|why| format!("the destination refused the token: {why}"))
            .or_else(|| after.lost.clone())
            .unwrap_or_else(|| self.last_report.clone());
        match end {
            Some(Next::Release) => {
                self.control.shutdown();
                let lost = || MoveError::HandedOver {
                    epoch: after.durable.as_ref().map_or(0, |d| d.epoch),
                    reason: "it released this host without having confirmed".into(),
                    left: 0,
                };
                let report = report(self, flight, &after).ok_or_else(lost)?;
                Ok(Moved::Released(Box::new(report)))
            }
            Some(end @ (Next::GoOn { .. } | Next::StayPaused(_))) => Err(self.back(vec![end], why)),
            _ => {
                self.control.shutdown();
                let epoch = match self.around.authority.state() {
                    SourceState::ServingPages(epoch) => epoch.0,
                    _ => 0,
                };
                Err(MoveError::HandedOver { epoch, reason: why, left: pages.remaining() })
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the pieces of one record")]
    fn report(
        &self,
        flight: &Flight,
        confirmed_at: Instant,
        confirmation: &Confirmation,
        after: &After,
        pages: &PageServer,
        reason: Reason,
        precopied: Duration,
        paused_at_ns: u64,
        state_bytes: u64,
        handed: Instant,
    ) -> MoveReport {
        let request = &self.plan.request;
        let same_clock = !request.boot_id.is_empty() && request.boot_id == self.verdict.boot_id;
        let blackout_ms = if same_clock {
            confirmation.running_at_ns.saturating_sub(paused_at_ns) as f64 / 1e6
        } else {
            // One way there and one way back surround what the destination did meanwhile.
            let total = ms(confirmed_at.duration_since(flight.paused_at));
            let later =
                confirmation.released_us.saturating_sub(confirmation.running_us) as f64 / 1e3;
            total - later - ms(self.round_trip) / 2.0
        };
        let mut parts = flight.parts;
        let us = |to: u64, from: u64| to.saturating_sub(from) as f64 / 1e3;
        parts.arm_ms = us(confirmation.armed_us, 0);
        parts.load_ms = us(confirmation.loaded_us, confirmation.armed_us);
        parts.run_ms = us(confirmation.running_us, confirmation.loaded_us);
        MoveReport {
            machine: request.shape.name.clone(),
            from: request.host.clone(),
            to: self.verdict.host.clone(),
            mode: self.planner_mode,
            returned: self.verdict.holds_stay,
            reason,
            rounds: self.planner.rounds().to_vec(),
            bytes_sent: self.main.sent() + pages.fault_bytes(),
            memory_bytes: request.shape.memory_bytes,
            dirty_bytes: flight.dirty_bytes,
            flight_bytes: flight.flight_bytes,
            state_bytes,
            round_trip_ms: ms(self.round_trip),
            total_ms: ms(self.started.elapsed()),
            prepare_ms: ms(self.prepared),
            precopy_ms: ms(precopied),
            blackout_ms,
            blackout_exact: same_clock,
            blackout: parts,
            confirmed_ms: ms(confirmed_at.duration_since(flight.paused_at)),
            postcopy_ms: ms(handed.elapsed()),
            paused_at_ns,
            faults: after.durable.as_ref().map(|d| d.faults).unwrap_or_default(),
            late_writes: self.late_writes,
            early_faults: confirmation.early_faults,
            epoch: confirmation.epoch,
            session: link::session_hex(self.session),
        }
    }
}
