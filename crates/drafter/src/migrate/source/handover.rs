//! The switchover, seen from the source: permission, pause, flight. `after` sends the token.
//!
//! Every decision about authority is the state machine's; [`Session::step`] carries out what it
//! can by itself (lease calls, messages, reports) and returns the rest as [`Next`].

use super::{MoveError, Session, Stop, closed, flight::Flight};
use crate::{
    lease::{AttemptId, BootClock, BootTime, Clock, Epoch, OfferSerial},
    migrate::{
        planner::Reason,
        protocol::Frame,
        switchover::{
            FlipEpoch, LeaseAnswer, Offer, SourceAction, SourceEvent, SourceState, Token,
        },
    },
    runner::api::Phase,
};
use silo::block::BlockSet;
use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

/// What the engine must do next.
#[derive(Debug)]
pub(super) enum Next {
    Pause(FlipEpoch),
    SendToken(Token),
    GoOn { epoch: Epoch, flip: FlipEpoch },
    Release,
    StayPaused(String),
}

/// Everything that goes with the token.
pub(super) struct Ready {
    pub(super) flight: Flight,
    pub(super) token: Token,
    pub(super) reason: Reason,
    pub(super) precopied: Duration,
    pub(super) paused_at_ns: u64,
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
        self.offers_hold = self.offers_hold.max(offer.good_for);
        let actions = self.around.authority.on(received, SourceEvent::Offer(offer));
        let next = self.act(actions);
        self.pending.extend(next);
    }

    /// Feeds an event and everything that follows from it at once.
    pub(super) fn step(&mut self, event: SourceEvent) -> Vec<Next> {
        if let Some(protected) = &self.around.protection {
            // It only notes it.
            let view = (protected.view)();
            self.around.authority.on(now(), SourceEvent::Term(view));
        }
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

    /// From the end of pre-copy to the token.
    pub(super) fn hand_over(
        &mut self,
        left: Vec<BlockSet>,
        reason: Reason,
    ) -> Result<Ready, MoveError> {
        self.foretell(&left);
        (self.around.leaving)(self.session, self.offers_hold);
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
        Ok(Ready { flight, token, reason, precopied, paused_at_ns })
    }

    /// Tells the destination how long the machine will stand still, now that rounds have shown what the
    /// line carries. A connection that is lost shows at the next word.
    fn foretell(&mut self, left: &[BlockSet]) {
        let dirty = left.iter().map(BlockSet::bytes).sum();
        let expected = self.planner.expected_blackout(dirty, self.plan.last_blackout);
        let frame = Frame::Expect(u64::try_from(expected.as_millis()).unwrap_or(u64::MAX));
        let _ = self.main.write(&frame).and_then(|()| self.main.flush());
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
                    self.tell_holding();
                    // Before the machine goes on, which may take until its lease holds again.
                    self.control.shutdown();
                    let went = self.around.machine.go_on(epoch.0, flip.0);
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
}
