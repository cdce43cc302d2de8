//! What of a state counts, written down so that equal states are equal.

use super::Message;
use crate::{
    lease::{AttemptId, Beat, BeatRef, BootTime, Epoch, HostName, Nonce, Record},
    migrate::switchover::{
        DestinationAuthority, DestinationEvent, LeaseAnswer, SourceAuthority, SourceEvent,
        destination::State as D, source::State as S, write::LeaseWrite,
    },
};
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

/// Enough of a name, where they are a, b and c.
fn initial(name: &HostName) -> u8 {
    name.as_str().as_bytes()[0]
}

/// What is left of a time, or that it is over.
pub(crate) fn left(now: BootTime, at: BootTime) -> (bool, Duration) {
    (at < now, at.since(now))
}

pub(crate) struct Digest {
    hasher: DefaultHasher,
    nonces: Vec<Nonce>,
    base: Epoch,
    /// Lives are told from those that the store shows.
    lives: Vec<BeatRef>,
}

impl Digest {
    /// Epochs are told from the store's: only their order and distance matter.
    pub(super) fn new(record: &Record) -> Self {
        Self {
            hasher: DefaultHasher::new(),
            nonces: Vec::new(),
            base: record.epoch,
            lives: Vec::new(),
        }
    }

    pub(super) fn count_lives_from(&mut self, lives: Vec<BeatRef>) {
        self.lives = lives;
    }

    pub(super) fn end(&self) -> u64 {
        self.hasher.finish()
    }

    pub(crate) fn put(&mut self, what: &impl Hash) {
        what.hash(&mut self.hasher);
    }

    fn epoch(&mut self, epoch: Epoch) {
        let from = epoch.0.wrapping_sub(self.base.0);
        self.put(&from);
    }

    pub(super) fn epochs(&mut self, epochs: &[Epoch]) {
        for epoch in epochs {
            self.epoch(*epoch);
        }
    }

    /// A record is known by its nonce; the first time, all that it says.
    pub(crate) fn record(&mut self, record: &Record) {
        let known = self.nonces.iter().position(|nonce| *nonce == record.nonce);
        let index = known.unwrap_or(self.nonces.len());
        self.put(&(index as u8));
        if known.is_some() {
            return;
        }
        self.nonces.push(record.nonce);
        self.epoch(record.epoch);
        self.put(&(initial(&record.owner), record.attempt));
        let handing = record.handing_to.as_ref();
        self.put(&handing.map(|handing| (handing.attempt, initial(&handing.to))));
        self.lives(&record.beat);
    }

    /// As a record.
    pub(crate) fn beat(&mut self, beat: &Beat) {
        let known = self.nonces.iter().position(|nonce| *nonce == beat.nonce);
        let index = known.unwrap_or(self.nonces.len());
        self.put(&(index as u8));
        if known.is_none() {
            self.nonces.push(beat.nonce);
            self.life(&beat.of);
            self.put(&(beat.term, beat.fenced_by.is_some()));
        }
    }

    /// All of a kind, and how many.
    pub(crate) fn each<'a, T: 'a + ?Sized>(
        &mut self,
        kind: &str,
        all: impl IntoIterator<Item = &'a T>,
        put: impl Fn(&mut Self, &'a T),
    ) {
        self.put(&kind);
        let mut number = 0_u8;
        for one in all {
            put(self, one);
            number += 1;
        }
        self.put(&(kind.len(), number));
    }

    pub(crate) fn life(&mut self, life: &BeatRef) {
        let base = self.lives.iter().find(|known| known.name == life.name);
        let from = base.map_or(0, |known| known.incarnation);
        let own = life.name.machine().is_some();
        self.put(&(initial(life.name.host()), own, life.incarnation.wrapping_sub(from)));
    }

    pub(crate) fn lives<'a>(&mut self, lives: impl IntoIterator<Item = &'a BeatRef>) {
        self.each("lives", lives, Self::life);
    }

    pub(super) fn answer(&mut self, answer: Option<&LeaseAnswer>) {
        match answer {
            None => self.put(&0_u8),
            Some(LeaseAnswer::Won) => self.put(&1_u8),
            Some(LeaseAnswer::Lost(found)) => {
                self.put(&2_u8);
                self.each("found", found, Self::record);
            }
            Some(LeaseAnswer::Unavailable(_)) => self.put(&3_u8),
        }
    }

    /// A retry is due as soon as there was no answer.
    fn write(&mut self, write: &LeaseWrite) {
        self.record(&write.expected);
        self.record(write.new_record());
        self.put(&write.asked().is_some());
    }

    pub(super) fn source(&mut self, source: &SourceAuthority, now: BootTime, attempt: AttemptId) {
        self.put(&(std::mem::discriminant(&source.state()), source.parts.attempt == attempt));
        let offer = |this: &mut Self| {
            let fresh = super::FRESH + Duration::from_nanos(1);
            this.put(&source.offer.map(|offer| (offer.serial, now.since(offer.at).min(fresh))));
        };
        match &source.state {
            S::Copying => offer(self),
            S::AwaitingOffer { until, handed } => {
                offer(self);
                self.put(&(until.since(now), handed));
            }
            S::WritingHandOver { until, write } => {
                offer(self);
                self.put(&until.since(now));
                self.write(write);
            }
            S::Pausing { until } => {
                offer(self);
                self.put(&until.since(now));
            }
            S::AwaitingVerdict { expires } => self.put(&expires.since(now)),
            S::TakingBack { write } => self.write(write),
            S::ServingPages { epoch } | S::Resumed { epoch } => self.epoch(*epoch),
            S::Released | S::Aborted | S::Stopped => {}
        }
        self.record(&source.parts.holding.record);
    }

    pub(super) fn destination(&mut self, destination: &DestinationAuthority, now: BootTime) {
        let this = destination;
        self.put(&std::mem::discriminant(&this.state()));
        self.put(&(this.flush_owed, this.source_durable, this.output_released, this.all_present));
        match &this.state {
            D::Offering { next } => {
                self.put(&next.since(now));
                self.put(&this.sent.len());
                for (serial, at) in &this.sent {
                    self.put(&(serial, left(now, *at + super::GOOD_FOR)));
                }
            }
            D::Loading { until, handed } => {
                self.put(&left(now, *until));
                self.record(handed);
            }
            D::Unconfirmed { until, take } => {
                self.put(&left(now, *until));
                self.write(take);
            }
            D::FrozenUnconfirmed { take } => self.write(take),
            D::Owner { epoch } | D::Settled { epoch } => self.epoch(*epoch),
            D::Preparing | D::Refused | D::Discarded | D::Lost => {}
        }
        self.each("owned", &this.record, Self::record);
    }

    /// In no order: each may come at any time.
    pub(super) fn messages(&mut self, messages: &[Arc<Message>]) {
        let mut names: Vec<_> = messages.iter().map(|message| name(message)).collect();
        names.sort_unstable();
        self.put(&names.len());
        for (kind, number) in names {
            self.put(&(kind, number));
        }
        for message in messages {
            if let Message::ToDestination(DestinationEvent::Token(token)) = &**message {
                self.put(&token.flush_owed);
                self.record(&token.handed);
            }
        }
    }
}

fn name(message: &Message) -> (u8, u64) {
    use {DestinationEvent as De, SourceEvent as Se};
    match message {
        Message::ToSource(Se::Offer(offer)) => (1, offer.serial.0),
        Message::ToSource(Se::Refused { .. }) => (2, 0),
        Message::ToSource(Se::Confirmed { .. }) => (3, 0),
        Message::ToSource(_) => (4, 0),
        Message::ToDestination(De::Token(token)) => (5, token.serial.0),
        Message::ToDestination(De::Cancel) => (6, 0),
        Message::ToDestination(_) => (7, 0),
    }
}
