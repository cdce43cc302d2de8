//! A lease store that fails: outages, answers that get lost, writes that happen after the caller
//! was told that nobody answers.

use super::Random;
use crate::{
    lease::{Beat, BeatName, Epoch, HostName, Outcome, Record},
    migrate::switchover::LeaseCall,
};
use std::collections::BTreeMap;

const MS: u64 = 1_000_000;

pub(super) struct Store {
    pub(super) record: Record,
    pub(super) beats: BTreeMap<BeatName, Beat>,
    pub(super) up: bool,
    /// Everyone who ever owned, by epoch.
    owners: BTreeMap<Epoch, HostName>,
    /// Percent of calls whose answer gets lost, and of calls that happen late.
    loss: u64,
    late: u64,
    /// Percent of calls that take up to 2.5 s.
    slow: u64,
}

/// How one call goes.
pub(super) struct Course {
    /// When the write happens, if it does; after now.
    pub(super) applied: Option<u64>,
    /// When the caller hears something, and whether it hears the outcome.
    pub(super) answered: u64,
    pub(super) told: bool,
}

impl Store {
    pub(super) fn new(record: Record, random: &mut Random) -> Self {
        let owners = BTreeMap::from([(record.epoch, record.owner.clone())]);
        let (loss, late) =
            if random.chance(60) { (0, 0) } else { (random.below(40), random.below(30)) };
        Self { record, beats: BTreeMap::new(), up: true, owners, loss, late, slow: 5 }
    }

    /// From now on every call is answered.
    pub(super) fn is_sound(&mut self) {
        (self.up, self.loss, self.late, self.slow) = (true, 0, 0, 0);
    }

    /// As seen from a host that may be cut off from it.
    pub(super) fn course_for(&self, cut_off: bool, random: &mut Random) -> Course {
        let quick = random.between(MS / 10, 20 * MS);
        if !self.up || cut_off {
            let applied = None;
            return Course { applied, answered: random.between(MS, 500 * MS), told: false };
        }
        if random.chance(self.late) {
            // In flight when the caller's patience ends; it may land much later.
            let applied = Some(random.between(50 * MS, 5000 * MS));
            return Course { applied, answered: random.between(MS, 50 * MS), told: false };
        }
        let applied =
            quick / 2 + if random.chance(self.slow) { random.below(2500 * MS) } else { 0 };
        let told = !random.chance(self.loss);
        let answered = applied + quick / 2 + random.below(50 * MS);
        Course { applied: Some(applied), answered, told }
    }

    /// The write itself; the error is a broken invariant.
    pub(super) fn apply(&mut self, call: &LeaseCall) -> Result<Outcome, String> {
        self.replace(&call.expected, &call.new)
    }

    pub(super) fn replace(&mut self, expected: &Record, new: &Record) -> Result<Outcome, String> {
        if self.record != *expected {
            return Ok(Outcome::Lost(Some(self.record.clone())));
        }
        let bound = new.beat != self.record.beat
            && Record { beat: new.beat.clone(), nonce: new.nonce, ..self.record.clone() } == *new;
        if bound {
            // Protected from now on, or no more: nothing else has changed.
        } else if new.handing_to.is_none() {
            if let Some(owner) = self.owners.insert(new.epoch, new.owner.clone()) {
                return Err(format!("{} of {owner} was used again by {}", new.epoch, new.owner));
            }
            if new.epoch <= self.record.epoch {
                return Err(format!("the lease went from {} to {}", self.record.epoch, new.epoch));
            }
        } else if new.epoch != self.record.epoch || new.owner != self.record.owner {
            return Err("a hand-over changed the owner or the epoch".to_owned());
        }
        self.record = new.clone();
        Ok(Outcome::Won)
    }
}
