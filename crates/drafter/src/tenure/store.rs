//! Calls to the store, and writes that are tried until the store says what became of them.

use super::{Times, times::Rule};
use crate::lease::{
    Beat, BeatName, BootTime, LeaseStore, MachineName, Outcome, Record, StoreError,
};
use std::{fmt::Debug, time::Duration};

pub use crate::migrate::switchover::OperationId;

/// A question to the store. Exactly one answer comes back, as an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// To be given back with the answer.
    pub operation: OperationId,
    /// What is asked.
    pub content: Content,
}

/// See [`Call::content`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// What does the machine's lease say?
    ReadLease(MachineName),
    /// What does the beat say?
    ReadBeat(BeatName),
    /// Compare and set a lease.
    SetLease {
        /// What must be there.
        expected: Record,
        /// What shall be there.
        new: Record,
    },
    /// Compare and set a beat.
    SetBeat {
        /// What must be there.
        expected: Option<Beat>,
        /// What shall be there.
        new: Beat,
    },
}

/// What the store answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The lease as it is: what was asked for, or what was found instead of the expected.
    Lease(Option<Record>),
    /// The beat as it is, in the same way.
    Beat(Option<Beat>),
    /// The new record is in the store.
    Won,
    /// No answer, with the reason for people: a write may have happened, may happen later, or not.
    Unavailable(String),
}

impl Call {
    /// Asks. Blocks as long as the store's calls may.
    #[must_use]
    pub fn perform(&self, store: &dyn LeaseStore) -> Answer {
        fn answer<T>(
            result: Result<Outcome<T>, StoreError>,
            found: fn(Option<T>) -> Answer,
        ) -> Answer {
            match result {
                Ok(Outcome::Won) => Answer::Won,
                Ok(Outcome::Lost(there)) => found(there),
                Err(e) => Answer::Unavailable(e.to_string()),
            }
        }
        match &self.content {
            Content::ReadLease(machine) => {
                answer(store.read(machine).map(Outcome::Lost), Answer::Lease)
            }
            Content::ReadBeat(name) => {
                answer(store.read_beat(name).map(Outcome::Lost), Answer::Beat)
            }
            Content::SetLease { expected, new } => {
                answer(store.compare_and_set(&new.machine, Some(expected), new), Answer::Lease)
            }
            Content::SetBeat { expected, new } => {
                let set = store.compare_and_set_beat(&new.of.name, expected.as_ref(), new);
                answer(set, Answer::Beat)
            }
        }
    }
}

/// What a [`Write`] writes.
pub(super) trait Written: Clone + Debug + PartialEq {
    fn same_write(&self, other: &Self) -> bool;
    fn content(expected: Option<Self>, new: Self) -> Content;
    /// What the answer shows to be in the store, or why nothing is known.
    fn found(answer: Answer) -> Result<Option<Self>, String>;
}

impl Written for Record {
    fn same_write(&self, other: &Self) -> bool {
        self.is_same_write(other)
    }

    fn content(expected: Option<Self>, new: Self) -> Content {
        // A lease that is not there is never replaced here.
        Content::SetLease { expected: expected.unwrap_or_else(|| new.clone()), new }
    }

    fn found(answer: Answer) -> Result<Option<Self>, String> {
        match answer {
            Answer::Lease(found) => Ok(found),
            other => Err(unknown(other)),
        }
    }
}

impl Written for Beat {
    fn same_write(&self, other: &Self) -> bool {
        self.is_same_write(other)
    }

    fn content(expected: Option<Self>, new: Self) -> Content {
        Content::SetBeat { expected, new }
    }

    fn found(answer: Answer) -> Result<Option<Self>, String> {
        match answer {
            Answer::Beat(found) => Ok(found),
            other => Err(unknown(other)),
        }
    }
}

fn unknown(answer: Answer) -> String {
    match answer {
        Answer::Unavailable(why) => why,
        other => format!("an answer to another question: {other:?}"),
    }
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Asked(OperationId),
    RetryAt(BootTime),
}

/// When something was asked, and when it is asked again after silence.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Asking {
    phase: Phase,
    pause: Duration,
    longest_pause: Duration,
}

impl Asking {
    fn start(times: &Times, next: &mut u64) -> (Self, OperationId) {
        let (operation, pause) = (take_operation(next), times.store_retry);
        (Self { phase: Phase::Asked(operation), pause, longest_pause: pause * 10 }, operation)
    }

    #[cfg(test)]
    const fn asked(&self) -> Option<OperationId> {
        match self.phase {
            Phase::Asked(operation) => Some(operation),
            Phase::RetryAt(_) => None,
        }
    }

    fn awaits(&self, operation: OperationId) -> bool {
        matches!(self.phase, Phase::Asked(asked) if asked == operation)
    }

    fn silence(&mut self, now: BootTime) {
        self.phase = Phase::RetryAt(now + self.pause);
        self.pause = (self.pause * 2).min(self.longest_pause);
    }

    fn retry(&mut self, now: BootTime, next: &mut u64) -> Option<OperationId> {
        let Phase::RetryAt(at) = self.phase else { return None };
        if now < at {
            return None;
        }
        let operation = take_operation(next);
        self.phase = Phase::Asked(operation);
        Some(operation)
    }

    fn wake_at(&self) -> Option<BootTime> {
        match self.phase {
            Phase::Asked(_) => None,
            Phase::RetryAt(at) => Some(at),
        }
    }
}

fn take_operation(next: &mut u64) -> OperationId {
    *next += 1;
    OperationId(*next)
}

/// A question that is asked until it is answered.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Read {
    content: Content,
    asking: Asking,
    /// When the try under way was sent.
    pub(super) asked_at: BootTime,
}

impl Read {
    pub(super) fn start(
        now: BootTime,
        content: Content,
        times: &Times,
        next: &mut u64,
    ) -> (Self, Call) {
        let (asking, operation) = Asking::start(times, next);
        let call = Call { operation, content: content.clone() };
        (Self { content, asking, asked_at: now }, call)
    }

    /// The call whose answer is awaited.
    #[cfg(test)]
    pub(super) const fn asked(&self) -> Option<OperationId> {
        self.asking.asked()
    }

    /// `None`: not the answer that is awaited. Else what is there, or the reason for silence.
    pub(super) fn answer<T: Written>(
        &mut self,
        now: BootTime,
        operation: OperationId,
        answer: Answer,
    ) -> Option<Result<Option<T>, String>> {
        if !self.asking.awaits(operation) {
            return None;
        }
        let found = T::found(answer);
        if found.is_err() {
            self.asking.silence(now);
        }
        Some(found)
    }

    pub(super) fn retry(&mut self, now: BootTime, next: &mut u64) -> Option<Call> {
        let operation = self.asking.retry(now, next)?;
        self.asked_at = now;
        Some(Call { operation, content: self.content.clone() })
    }

    pub(super) fn wake_at(&self) -> Option<BootTime> {
        self.asking.wake_at()
    }
}

/// What an answer to a write means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict<T> {
    /// Not the answer that we wait for.
    Stale,
    /// The record is in the store.
    Won,
    /// Another record is there (or none), so that this write can never succeed.
    Lost(Option<T>),
    /// Nothing is known; it is tried again. With the reason.
    Unknown(String),
}

/// A write under way. Every try writes the same record with the same nonce.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Write<T> {
    expected: Option<T>,
    new: T,
    asking: Asking,
    /// When the first try was sent: the write may have happened from then on.
    pub(super) first_sent: BootTime,
}

impl<T: Written> Write<T> {
    pub(super) fn start(
        now: BootTime,
        expected: Option<T>,
        new: T,
        times: &Times,
        next: &mut u64,
    ) -> (Self, Call) {
        let (asking, operation) = Asking::start(times, next);
        let write = Self { expected, new, asking, first_sent: now };
        let call = write.call(operation);
        (write, call)
    }

    fn call(&self, operation: OperationId) -> Call {
        Call { operation, content: T::content(self.expected.clone(), self.new.clone()) }
    }

    pub(super) fn new_record(&self) -> &T {
        &self.new
    }

    pub(super) fn answer(
        &mut self,
        now: BootTime,
        operation: OperationId,
        answer: Answer,
    ) -> Verdict<T> {
        if !self.asking.awaits(operation) {
            return Verdict::Stale;
        }
        let silent = match answer {
            Answer::Won => return Verdict::Won,
            answer => match T::found(answer) {
                Ok(Some(found)) if found.same_write(&self.new) => return Verdict::Won,
                Ok(found) if found != self.expected => return Verdict::Lost(found),
                Ok(_) => {
                    "the store contradicts itself: it holds the expected record and says that \
                          it does not"
                        .to_owned()
                }
                Err(reason) => reason,
            },
        };
        self.asking.silence(now);
        Verdict::Unknown(silent)
    }

    pub(super) fn retry(&mut self, now: BootTime, next: &mut u64) -> Option<Call> {
        let operation = self.asking.retry(now, next)?;
        Some(self.call(operation))
    }

    pub(super) fn wake_at(&self) -> Option<BootTime> {
        self.asking.wake_at()
    }

    /// The call whose answer is awaited.
    #[cfg(test)]
    pub(super) const fn asked(&self) -> Option<OperationId> {
        self.asking.asked()
    }

    /// What it expects to find.
    #[cfg(test)]
    pub(super) const fn expected(&self) -> Option<&T> {
        self.expected.as_ref()
    }

    /// From when on a term counts that this write began.
    pub(super) fn counts_from(&self, now: BootTime, times: &Times) -> BootTime {
        if times.keeps(Rule::CountFromSending) { self.first_sent } else { now }
    }
}
