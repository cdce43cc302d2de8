//! What of the three counts for the model (`migrate::switchover::model`): everything that can matter
//! later, with times from now.

use super::{
    Holder, HolderState, OperationId, Pulse, Surrender, Taker, View,
    holder::Purpose,
    pulse,
    store::{Read, Write, Written},
    surrender, taker,
};
use crate::{
    lease::{Beat, BootTime, Record},
    migrate::switchover::model::{Digest, left},
};
use std::time::Duration;

/// Something whose age counts up to a limit.
fn age(now: BootTime, since: BootTime, limit: Duration) -> Duration {
    now.since(since).min(limit)
}

fn view(d: &mut Digest, now: BootTime, view: Option<&View>) {
    d.lives(view.map(|view| &view.of));
    d.put(&view.map(|view| view.until.since(now)));
}

fn beats(d: &mut Digest, now: BootTime, write: &Write<Beat>) {
    d.each("expected", write.expected(), Digest::beat);
    let new = write.new_record();
    d.beat(new);
    d.put(&(write.asked().is_some(), age(now, write.first_sent, new.term)));
}

fn records<T: Written>(d: &mut Digest, write: &Write<T>, put: fn(&mut Digest, &T)) {
    d.each("expected", write.expected(), put);
    put(d, write.new_record());
    d.put(&write.asked().is_some());
}

impl Pulse {
    /// Its next timer asks once more what was asked already.
    pub(crate) fn retries(&self) -> bool {
        !matches!(self.state, pulse::State::Alive { .. })
    }

    pub(crate) fn asked(&self) -> Option<OperationId> {
        match &self.state {
            pulse::State::Reading(read) => read.asked(),
            pulse::State::Beginning(write) | pulse::State::Renewing(write) => write.asked(),
            pulse::State::Alive { .. } => None,
        }
    }

    pub(crate) fn digest(&self, d: &mut Digest, now: BootTime) {
        d.put(&std::mem::discriminant(&self.state));
        view(d, now, self.view());
        match &self.state {
            pulse::State::Reading(read) => d.put(&read.asked().is_some()),
            pulse::State::Beginning(write) | pulse::State::Renewing(write) => beats(d, now, write),
            pulse::State::Alive { beat, next } => {
                d.beat(beat);
                d.put(&next.since(now));
            }
        }
    }
}

impl Holder {
    pub(crate) fn asked(&self) -> Option<OperationId> {
        self.write.as_ref().and_then(|(_, write)| write.asked())
    }

    pub(crate) fn digest(&self, d: &mut Digest, now: BootTime) {
        d.put(&(self.state() as u8, self.moving, self.protect, self.is_given_up()));
        if self.state() == HolderState::Gone {
            return;
        }
        d.record(self.record());
        d.lives(&self.record().beat);
        d.lives(&self.arriving);
        view(d, now, self.parts.view.as_ref());
        d.put(&self.write.is_some());
        if let Some((purpose, write)) = &self.write {
            d.put(&matches!(purpose, Purpose::Bind));
            records(d, write, |d, record: &Record| d.record(record));
        }
    }
}

impl Taker {
    pub(crate) fn asked(&self) -> Option<OperationId> {
        match &self.state {
            taker::State::Looking(read) | taker::State::Watching { read: Some(read), .. } => {
                read.asked()
            }
            taker::State::Fencing { write, .. } => write.asked(),
            taker::State::Taking { write } => write.asked(),
            _ => None,
        }
    }

    /// `longest`: no wait of a taker is longer.
    pub(crate) fn digest(&self, d: &mut Digest, now: BootTime, longest: Duration) {
        let asked = |read: &Read| (read.asked().is_some(), age(now, read.asked_at, longest));
        d.put(&(self.state() as u8, self.prepared));
        match &self.state {
            taker::State::Looking(read) => d.put(&asked(read)),
            taker::State::Watching { record, read, next } => {
                d.record(record);
                d.put(&(read.as_ref().map(asked), next.since(now)));
            }
            taker::State::Fencing { record, write } => {
                d.record(record);
                records(d, write, |d, beat: &Beat| d.beat(beat));
            }
            taker::State::Clearing { record, until } => {
                d.record(record);
                d.put(&until.since(now));
            }
            taker::State::Ready { record } => d.record(record),
            taker::State::Taking { write } => {
                records(d, write, |d, record: &Record| d.record(record));
            }
            taker::State::Taken | taker::State::Done => {}
        }
        d.put(&(self.seen.is_some(), self.dead.is_some()));
        if let Some((beat, since)) = &self.seen {
            d.beat(beat);
            d.put(&age(now, *since, longest));
        }
        if let Some(dead) = &self.dead {
            d.life(&dead.life);
            d.put(&(age(now, dead.known, longest), dead.over.since(now)));
        }
    }
}

impl Surrender {
    pub(crate) fn asked(&self) -> Option<OperationId> {
        match &self.state {
            surrender::State::Looking(read) | surrender::State::Reading(read) => read.asked(),
            surrender::State::Ending(write) => write.asked(),
            surrender::State::Binding(write) => write.asked(),
            _ => None,
        }
    }

    pub(crate) fn digest(&self, d: &mut Digest, now: BootTime) {
        d.put(&(std::mem::discriminant(&self.state), self.unbound));
        // Until then it waits; after that it tells how long offers may hold.
        d.put(&left(now, self.parts.not_before));
        d.lives(&self.over);
        match &self.state {
            surrender::State::Looking(read) | surrender::State::Reading(read) => {
                d.put(&read.asked().is_some());
            }
            surrender::State::Ending(write) => records(d, write, |d, beat: &Beat| d.beat(beat)),
            surrender::State::Binding(write) => {
                records(d, write, |d, record: &Record| d.record(record));
            }
            surrender::State::Clearing(until) => d.put(&until.since(now)),
            surrender::State::Waiting | surrender::State::Done => {}
        }
    }
}
