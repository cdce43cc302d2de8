//! One write to the lease, tried until the store says what became of it.

use super::terms::{Rule, Terms};
use crate::lease::{BootTime, Outcome, Record, StoreError};
use std::time::Duration;

/// Tells the answers to different calls apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OperationId(pub u64);

/// Why the lease is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeasePurpose {
    /// Source, before the pause: say where the machine goes.
    HandOver,
    /// Destination: become the owner.
    Take,
    /// Source: become the owner again.
    TakeBack,
}

/// A compare-and-set that the runner asks of the store, off the thread that runs the state machine.
/// Exactly one answer comes back, as an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseCall {
    /// To be given back with the answer.
    pub operation: OperationId,
    /// Why.
    pub purpose: LeasePurpose,
    /// What must be there.
    pub expected: Record,
    /// What shall be there.
    pub new: Record,
}

/// What the store answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseAnswer {
    /// The new record is in the store.
    Won,
    /// The store holds this record instead of the expected one.
    Lost(Option<Record>),
    /// No answer, with the reason for people: the write may have happened, may happen later, or not.
    Unavailable(String),
}

impl From<Result<Outcome, StoreError>> for LeaseAnswer {
    fn from(result: Result<Outcome, StoreError>) -> Self {
        match result {
            Ok(Outcome::Won) => Self::Won,
            Ok(Outcome::Lost(found)) => Self::Lost(found),
            Err(e) => Self::Unavailable(e.to_string()),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Asked(OperationId),
    RetryAt(BootTime),
}

/// A write under way. Every try writes the same record with the same nonce.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct LeaseWrite {
    purpose: LeasePurpose,
    pub(super) expected: Record,
    new: Record,
    phase: Phase,
    pause: Duration,
    longest_pause: Duration,
    settle_by_nonce: bool,
}

/// What an answer means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Not the answer that we wait for.
    Stale,
    /// The record is ours.
    Won,
    /// Another record is there, so that this write can never succeed.
    Lost(Record),
    /// Nothing is known; it is tried again. With the reason.
    Unknown(String),
}

impl LeaseWrite {
    pub(super) fn start(
        purpose: LeasePurpose,
        expected: Record,
        new: Record,
        terms: &Terms,
        operation: OperationId,
    ) -> (Self, LeaseCall) {
        let phase = Phase::Asked(operation);
        let pause = terms.store_retry;
        let longest_pause = pause * 10;
        let settle_by_nonce = terms.keeps(Rule::SettleByNonce);
        let write = Self { purpose, expected, new, phase, pause, longest_pause, settle_by_nonce };
        let call = write.call(operation);
        (write, call)
    }

    fn call(&self, operation: OperationId) -> LeaseCall {
        let (expected, new) = (self.expected.clone(), self.new.clone());
        LeaseCall { operation, purpose: self.purpose, expected, new }
    }

    /// The call whose answer is awaited.
    #[cfg(test)]
    pub(super) const fn asked(&self) -> Option<OperationId> {
        match self.phase {
            Phase::Asked(operation) => Some(operation),
            Phase::RetryAt(_) => None,
        }
    }

    pub(super) fn new_record(&self) -> &Record {
        &self.new
    }

    pub(super) fn answer(
        &mut self,
        now: BootTime,
        operation: OperationId,
        answer: LeaseAnswer,
    ) -> Verdict {
        if !matches!(self.phase, Phase::Asked(asked) if asked == operation) {
            return Verdict::Stale;
        }
        let silent = match answer {
            LeaseAnswer::Won => return Verdict::Won,
            LeaseAnswer::Lost(Some(found))
                if self.settle_by_nonce && found.is_same_write(&self.new) =>
            {
                return Verdict::Won;
            }
            LeaseAnswer::Lost(Some(found)) if found != self.expected => {
                return Verdict::Lost(found);
            }
            LeaseAnswer::Lost(Some(_)) => {
                "the store contradicts itself: it holds the expected record and says that it does \
                 not"
                .to_owned()
            }
            LeaseAnswer::Lost(None) => {
                "the store has no lease for the machine any more; restore it, nothing runs until \
                 then"
                    .to_owned()
            }
            LeaseAnswer::Unavailable(reason) => reason,
        };
        self.phase = Phase::RetryAt(now + self.pause);
        self.pause = (self.pause * 2).min(self.longest_pause);
        Verdict::Unknown(silent)
    }

    /// The next try, when it is due.
    pub(super) fn retry(&mut self, now: BootTime, next_operation: &mut u64) -> Option<LeaseCall> {
        let Phase::RetryAt(at) = self.phase else { return None };
        if now < at {
            return None;
        }
        let operation = take_operation(next_operation);
        self.phase = Phase::Asked(operation);
        Some(self.call(operation))
    }

    pub(super) fn wake_at(&self) -> Option<BootTime> {
        match self.phase {
            Phase::Asked(_) => None,
            Phase::RetryAt(at) => Some(at),
        }
    }
}

pub(super) fn take_operation(next: &mut u64) -> OperationId {
    *next += 1;
    OperationId(*next)
}
