//! What can happen in a state.

use super::{Message, world::World};
use crate::{
    lease::BootTime,
    migrate::switchover::{
        DestinationAuthority, DestinationState, SourceAuthority, SourceState, terms::Rule,
    },
};
use std::time::Duration;

/// One thing that happens. Those named under "faults" are counted; everything else is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The destination is ready to make offers.
    Prepared,
    /// Pre-copy is done.
    Want,
    SourceTimer,
    DestinationTimer,
    /// A message arrives: the first time, once more, early, late; those that never do are lost.
    Arrives(usize),
    /// The store does what the source (0), the destination (1) asked.
    Applied(usize),
    Answered(usize),
    /// A write whose author does not wait any more.
    AppliedLate(usize),
    StoreUp,
    Paused {
        flush_owed: bool,
    },
    Loaded,
    SaysRunning,
    TokenNotSent,
    CopyEnded,
    /// … and the destination hears of it.
    SourceSynced,
    AllPresent,
    SourceNotices,
    DestinationNotices,
    Joined,
    SourceRunnerBack,
    ReceiverReads,
    ReceiverDecides,
    GuardFreezes,
    NextAttempt,
    Time,
    // Faults.
    /// The caller hears that nobody answers; what it asked for has happened, happens later, or never.
    NoAnswer(usize),
    StoreDown,
    PauseFails {
        runs: bool,
    },
    LoadFails,
    Cut,
    CancelledAtSource,
    CancelledAtDestination,
    SourceHostDies,
    DestinationHostDies,
    SourceRunnerDies,
    ReceiverDies,
}

impl World {
    /// Everything that can happen but for faults.
    pub(super) fn steps(&self, out: &mut Vec<Step>) {
        let (doings, from, to) = (&self.doings, self.from, self.to());
        let mut may = |step: Step, can: bool| {
            if can {
                out.push(step);
            }
        };
        may(Step::StoreUp, !self.store_up);
        for end in 0..2 {
            if let Some(pending) = &self.calls[end] {
                may(Step::Applied(end), pending.answer.is_none() && self.store_up);
                may(Step::Answered(end), pending.answer.is_some());
                may(Step::NoAnswer(end), !self.store_up);
            }
        }
        let copies = &self.copies;
        let loads = doings.loading && !copies[to].gone();
        may(Step::Paused { flush_owed: true }, doings.pausing && !copies[from].crashed);
        may(Step::Paused { flush_owed: false }, doings.pausing && !copies[from].crashed);
        may(Step::Loaded, loads);
        may(Step::SaysRunning, doings.to_say_running && self.destination.is_some());
        may(Step::CopyEnded, copies[to].ending);
        may(Step::TokenNotSent, doings.not_sent && self.source.is_some());
        may(Step::SourceNotices, doings.to_notice[0] && self.source.is_some());
        may(Step::DestinationNotices, doings.to_notice[1] && self.destination.is_some());
        let both = self.source.is_some() && self.destination.is_some();
        let told = doings.to_notice == [false; 2];
        may(Step::Joined, doings.cut && told && both && !copies[from].gone());
        for index in 0..self.messages.len() {
            may(Step::Arrives(index), true);
        }
        let comes_back = doings.runner_dead && !doings.pausing && !copies[from].running;
        may(Step::SourceRunnerBack, comes_back && !copies[from].gone() && self.store_up);
        let dead = self.left.is_some() && !copies[to].gone();
        may(Step::ReceiverReads, dead && self.found.is_none() && self.store_up);
        may(Step::ReceiverDecides, dead && self.found.is_some() && self.store_up);
        let reached = !doings.cut && !copies[from].gone();
        may(
            Step::SourceSynced,
            doings.owed && !doings.synced && reached && self.destination.is_some(),
        );
        may(
            Step::AllPresent,
            doings.loaded && !doings.all_present && reached && !copies[to].gone(),
        );
        let due = |at: Option<BootTime>, end: usize| at.is_some_and(|at| self.now[end] >= at);
        let source = self.source.as_ref().and_then(|s| s.wake_at());
        // A freeze takes effect before the end of the offer, so at that instant it comes first.
        may(Step::SourceTimer, due(source, from) && !self.must_freeze());
        let destination = self.destination.as_ref().and_then(|d| d.wake_at());
        let offers = self.destination_state() == Some(DestinationState::Offering);
        may(Step::DestinationTimer, due(destination, to) && (!offers || doings.offers > 0));
        may(Step::GuardFreezes, self.guard_is_due() && !copies[to].frozen);
        may(Step::Time, !self.must_freeze());
    }

    /// What people, and the next move, do.
    pub(super) fn wishes(&self, out: &mut Vec<Step>) {
        if self.destination_state() == Some(DestinationState::Preparing) && self.doings.offers > 0 {
            out.push(Step::Prepared);
        }
        if self.source_state() == Some(SourceState::Copying) && self.doings.wants > 0 {
            out.push(Step::Want);
        }
        for index in 0..self.late.len() {
            if self.store_up {
                out.push(Step::AppliedLate(index));
            }
        }
        if self.attempts > 0 && self.movable().is_some() {
            out.push(Step::NextAttempt);
        }
    }

    pub(super) fn possible_faults(&self, out: &mut Vec<Step>) {
        if self.faults == 0 {
            return;
        }
        use {DestinationState as D, SourceState as S};
        let (doings, from, to) = (&self.doings, self.from, self.to());
        let mut may = |step: Step, can: bool| {
            if can {
                out.push(step);
            }
        };
        may(Step::StoreDown, self.store_up);
        for end in 0..2 {
            may(Step::NoAnswer(end), self.store_up && self.calls[end].is_some());
        }
        let pauses = doings.pausing && !self.copies[from].crashed;
        may(Step::PauseFails { runs: true }, pauses);
        may(Step::PauseFails { runs: false }, pauses);
        may(Step::LoadFails, doings.loading && !self.copies[to].gone());
        let source = self.source_state();
        let destination = self.destination_state();
        let source_done = source
            .is_none_or(|s| matches!(s, S::Released | S::Aborted | S::Resumed(_) | S::Stopped));
        let destination_done = destination
            .is_none_or(|d| matches!(d, D::Refused | D::Discarded | D::Lost | D::Settled(_)));
        may(Step::Cut, !(doings.cut || source_done && destination_done));
        may(Step::CancelledAtSource, !source_done && !matches!(source, Some(S::ServingPages(_))));
        may(Step::CancelledAtDestination, !destination_done);
        may(Step::SourceHostDies, !self.copies[from].gone());
        may(Step::DestinationHostDies, !self.copies[to].gone());
        may(Step::SourceRunnerDies, self.source.is_some() && !self.copies[from].gone());
        may(Step::ReceiverDies, self.destination.is_some() && !self.copies[to].gone());
    }

    /// A copy that nobody has confirmed stands still at the end of its offer, whoever sees to it: its
    /// runner's deadline, or the guard when that runner is dead. No time passes before that.
    fn must_freeze(&self) -> bool {
        let now = self.now[self.to()];
        let deadline = self.destination.as_ref().and_then(|d| d.freeze_at());
        deadline.is_some_and(|at| now >= at)
            || (self.guard_is_due() && !self.copies[self.to()].frozen)
    }

    fn guard_is_due(&self) -> bool {
        let until = self.left.as_ref().and_then(|left| left.until);
        let guards = self.terms.keeps(Rule::GuardOutlivesRunner);
        until.is_some_and(|until| self.now[self.to()] >= until) && guards
    }

    /// One step, of which the state is left as it is if nothing can come of it.
    #[must_use]
    pub(super) fn after(&self, step: Step, passes: [Duration; 2]) -> Self {
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
            Step::Applied(end) | Step::NoAnswer(end) => {
                let purpose = self.calls[end].as_ref().map(|pending| pending.call.purpose);
                format!("{step:?} {purpose:?}")
            }
            Step::Answered(end) => {
                let answer = self.calls[end].as_ref().and_then(|pending| pending.answer.clone());
                format!("{step:?} {answer:?}")
            }
            _ => format!("{step:?}"),
        };
        let name = |s: &dyn std::fmt::Debug| format!("{s:?}");
        let source = self.source.as_deref().map(SourceAuthority::state);
        let destination = self.destination.as_deref().map(DestinationAuthority::state);
        format!("{:<14} {:<20} {what}", name(&source), name(&destination))
            .replace("Some(", "(")
            .replace("None", "-")
    }
}
