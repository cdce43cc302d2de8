//! Leases: who may run a machine.
//!
//! One [`Record`] per machine, in a [`LeaseStore`] that can do two things, both linearizable: read
//! one record, and replace it if it is still the one expected. The store needs no clock and knows
//! no rule; the rules are those of drafter's `migrate::switchover`, which is also the only caller
//! that changes a record during a move. A runner makes the first one when it boots a machine.
//!
//! What must hold: an epoch never goes back and never belongs to two owners, because every change
//! of owner is one compare-and-set from a whole record to one with the next epoch. A write whose
//! answer got lost is settled by its nonce: whoever finds it in the store has won.
//!
//! A record that names a [`Beat`] is that of a *protected* machine: another host may start it when
//! that beat has ended, so its owner must stop it when the beat is not renewed. A record without one
//! never expires.

#[cfg(any(feature = "postgres", feature = "_http"))]
mod address;
mod beat;
mod cells;
mod clock;
#[cfg(feature = "etcd")]
mod etcd;
mod file;
mod format;
#[cfg(feature = "_http")]
mod http;
mod ids;
#[cfg(feature = "kubernetes")]
mod kubernetes;
#[cfg(feature = "object")]
mod object;
mod open;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "_remote")]
mod remote;
#[cfg(feature = "sqlite")]
mod sqlite;
#[cfg(feature = "_tls")]
mod tls;

pub use beat::{Beat, BeatName, BeatRef, LONGEST_TERM};
pub use cells::{Cells, Key, MAX_CELL, Swap};
pub use clock::{BootClock, BootTime, Clock, Drift};
pub use file::FileStore;
pub use format::BadRecord;
pub use identity::HostName;
pub use ids::{AttemptId, BadMachineName, Epoch, MachineName, Nonce, OfferSerial};
#[cfg(feature = "object")]
pub use open::open_bucket;
pub use open::{OpenError, bills_requests, open, open_cells};
#[cfg(feature = "sqlite")]
pub use sqlite::SqliteStore;

use std::{path::PathBuf, time::Duration};

/// The machine is being handed over: written by its owner before it pauses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandingTo {
    /// By which attempt.
    pub attempt: AttemptId,
    /// To which host.
    pub to: HostName,
}

/// Who may run a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which machine.
    pub machine: MachineName,
    /// Rises by one with every change of owner, and when an owner takes back what it had begun to
    /// hand over.
    pub epoch: Epoch,
    /// The host that may run it.
    pub owner: HostName,
    /// Set while the owner hands it over.
    pub handing_to: Option<HandingTo>,
    /// The attempt (a boot, a move) that wrote this record.
    pub attempt: AttemptId,
    /// The owner's sign of life, if the machine is protected: it runs only while this holds, and may
    /// be taken when this has ended. `None`: it runs without a term, and nobody may take it.
    pub beat: Option<BeatRef>,
    /// Different in every record ever written.
    pub nonce: Nonce,
}

impl Record {
    /// The first record of a machine that boots at `owner`.
    #[must_use]
    pub fn first(machine: MachineName, owner: HostName, attempt: AttemptId, nonce: Nonce) -> Self {
        Self { machine, epoch: Epoch(1), owner, handing_to: None, attempt, beat: None, nonce }
    }

    /// What the owner writes before it pauses: same epoch, same owner.
    #[must_use]
    pub fn handing(&self, attempt: AttemptId, to: HostName, nonce: Nonce) -> Self {
        Self { handing_to: Some(HandingTo { attempt, to }), attempt, nonce, ..self.clone() }
    }

    /// What the next owner writes: the next epoch, without a beat (see [`Record::bound`]). Also the
    /// old owner, when it takes the machine back.
    #[must_use]
    pub fn taken(&self, owner: HostName, attempt: AttemptId, nonce: Nonce) -> Self {
        let epoch = self.epoch.next();
        let machine = self.machine.clone();
        Self { machine, epoch, owner, handing_to: None, attempt, beat: None, nonce }
    }

    /// The same, bound to a beat of its owner (`None`: to none).
    #[must_use]
    pub fn bound(self, beat: Option<BeatRef>) -> Self {
        Self { beat, ..self }
    }

    /// What the owner writes to protect its machine, or to protect it no more: same epoch.
    #[must_use]
    pub fn rebound(&self, beat: Option<BeatRef>, nonce: Nonce) -> Self {
        Self { beat, nonce, ..self.clone() }
    }

    /// This very write, found in the store.
    #[must_use]
    pub fn is_same_write(&self, other: &Self) -> bool {
        self.nonce == other.nonce && self.epoch == other.epoch && self.owner == other.owner
    }
}

/// What became of a compare-and-set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<T = Record> {
    /// The new record is in the store, durably.
    Won,
    /// The store holds this record and not the expected one. If it carries the nonce of the new
    /// one, an earlier try has won. (One that has won and was replaced since leaves no trace.)
    Lost(Option<T>),
}

/// Why a store did not answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No answer. A write may have happened or may still happen: only reading back tells.
    #[error("{of}: cannot {operation}: {detail}; it is tried again")]
    Unavailable {
        /// Of what.
        of: Key,
        /// What was attempted, on what.
        operation: String,
        /// The cause.
        detail: String,
    },
    /// Somebody else held the store's lock all the time.
    #[error(
        "{of}: {path} was locked by another process for {limit:?}; see who holds it with fuser"
    )]
    Locked {
        /// Of what.
        of: Key,
        /// The lock file.
        path: PathBuf,
        /// How long we waited.
        limit: Duration,
    },
    /// The store refuses, and will until somebody changes something: a wrong password, no right, no such
    /// database. An earlier try of the same write may have happened all the same.
    #[error("{of}: cannot {operation}: {detail}")]
    Refused {
        /// Of what.
        of: Key,
        /// What was attempted, on what.
        operation: String,
        /// The cause.
        detail: String,
    },
    /// What is stored is no record. Never repaired by itself: it decides who may run.
    #[error(
        "{of}: {place} is damaged: {detail}; no host may start or move the machine until it is \
         restored, or removed by someone who knows that it runs nowhere"
    )]
    Corrupt {
        /// Of what.
        of: Key,
        /// Where it is stored.
        place: String,
        /// What is wrong with it.
        detail: String,
    },
}

/// Where records are kept. All calls are linearizable for one machine or beat, return within a bound
/// that the implementation states, and may be made by several threads.
pub trait LeaseStore: Send + Sync {
    /// The record as it is, `None` if the machine has never had one.
    ///
    /// # Errors
    /// The store does not answer, or holds something that is no record.
    fn read(&self, machine: &MachineName) -> Result<Option<Record>, StoreError>;

    /// Replaces the record if it equals `expected` (`None`: if there is none). `Won` is durable.
    ///
    /// # Errors
    /// As [`LeaseStore::read`]; the write may have happened all the same. Calling again with the
    /// same records is safe, and settles it.
    fn compare_and_set(
        &self,
        machine: &MachineName,
        expected: Option<&Record>,
        new: &Record,
    ) -> Result<Outcome, StoreError>;

    /// The beat as it is, `None` if there has never been one.
    ///
    /// # Errors
    /// As [`LeaseStore::read`].
    fn read_beat(&self, name: &BeatName) -> Result<Option<Beat>, StoreError>;

    /// As [`LeaseStore::compare_and_set`], of a beat.
    ///
    /// # Errors
    /// As there.
    fn compare_and_set_beat(
        &self,
        name: &BeatName,
        expected: Option<&Beat>,
        new: &Beat,
    ) -> Result<Outcome<Beat>, StoreError>;
}
