//! Where a move stands, and how long its phases took. The same on both ends.

use crate::{
    lane::lock,
    report::{Phase, Timings},
};
use silo_block::session::messages::SessionId;
use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

struct State {
    phase: Phase,
    since: Duration,
    timings: Timings,
    /// Open as long as the phase.
    span: tracing::Span,
}

fn span(session: SessionId, phase: Phase) -> tracing::Span {
    tracing::info_span!("phase", %session, %phase)
}

impl State {
    /// What the phases took if the one that goes on ends at `now`.
    fn until(&self, now: Duration) -> Timings {
        let (mut timings, spent) = (self.timings, now.saturating_sub(self.since));
        match self.phase {
            Phase::Connecting => timings.connect += spent,
            Phase::Filling => timings.filling += spent,
            Phase::Quiescing => timings.quiesce += spent,
            Phase::Switching => timings.switch += spent,
            Phase::Following => timings.following += spent,
            Phase::Durable => return timings,
        }
        timings.total = now;
        timings
    }
}

/// See the module. Times are since the session began in this process.
pub(crate) struct Clock {
    session: SessionId,
    began: Instant,
    state: Mutex<State>,
}

impl Clock {
    pub(crate) fn new(session: SessionId, began: Instant, phase: Phase) -> Self {
        let (since, timings, span) = (Duration::ZERO, Timings::default(), span(session, phase));
        let state = State { phase, since, timings, span };
        Self { session, began, state: Mutex::new(state) }
    }

    pub(crate) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    pub(crate) fn phase(&self) -> Phase {
        lock(&self.state).phase
    }

    /// What the phases have taken so far, the one that goes on included.
    pub(crate) fn timings(&self) -> Timings {
        let state = lock(&self.state);
        state.until(self.now())
    }

    /// The move is in this phase, or in a later one already.
    pub(crate) fn enter(&self, phase: Phase) {
        let mut state = lock(&self.state);
        if phase <= state.phase {
            return;
        }
        let now = self.now();
        state.timings = state.until(now);
        (state.phase, state.since) = (phase, now);
        state.span = span(self.session, phase);
        tracing::info!(session = %self.session, %phase, "a move enters a phase");
    }

    /// All is done: what the phases took.
    pub(crate) fn end(&self) -> Timings {
        self.enter(Phase::Durable);
        let mut state = lock(&self.state);
        state.timings.total = self.now();
        state.timings
    }
}
