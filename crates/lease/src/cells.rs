//! What a store must be able to do, in bytes: the records' format and their comparison are the same
//! for all of them, and are done here.

use crate::{Beat, BeatName, LeaseStore, MachineName, Outcome, Record, StoreError};
use std::{fmt, sync::Arc};

/// No cell has more bytes than this: a record has a few hundred.
pub const MAX_CELL: usize = 64 * 1024;

/// Which cell of a store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A machine's lease.
    Lease(MachineName),
    /// A sign of life.
    Beat(BeatName),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lease(machine) => write!(f, "lease of machine \"{machine}\""),
            Self::Beat(name) => write!(f, "beat \"{name}\""),
        }
    }
}

impl Key {
    /// A path that no other key has: `lease/MACHINE`, `beat/HOST` or `runner/HOST/MACHINE`.
    #[must_use]
    pub fn path(&self) -> String {
        match self {
            Self::Lease(machine) => format!("lease/{machine}"),
            Self::Beat(name) => match name.machine() {
                None => format!("beat/{}", name.host()),
                Some(machine) => format!("runner/{}/{machine}", name.host()),
            },
        }
    }
}

/// What became of a [`Cells::swap`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swap {
    /// The new bytes are in the cell, durably.
    Done,
    /// The cell holds these and not the expected ones. A store that is elsewhere tries again what got no
    /// answer: the new bytes may have been there in between, as after an error.
    Found(Option<Vec<u8>>),
}

/// Cells of bytes, each linearizable by itself. Every [`Cells`] is a [`LeaseStore`]. Every call
/// returns within a bound that the implementation states; calls may come from several threads.
pub trait Cells: Send + Sync {
    /// What the cell holds.
    ///
    /// # Errors
    /// No answer, in time.
    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError>;

    /// Replaces the content if it is `expected`, byte by byte (`None`: if the cell is empty).
    ///
    /// # Errors
    /// No answer, in time: the write may have happened, or may still happen.
    fn swap(&self, key: &Key, expected: Option<&[u8]>, new: &[u8]) -> Result<Swap, StoreError>;

    /// Where the cell is, for messages; without secrets.
    fn place(&self, key: &Key) -> String;
}

impl<C: Cells + ?Sized> Cells for Arc<C> {
    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        (**self).get(key)
    }

    fn swap(&self, key: &Key, expected: Option<&[u8]>, new: &[u8]) -> Result<Swap, StoreError> {
        (**self).swap(key, expected, new)
    }

    fn place(&self, key: &Key) -> String {
        (**self).place(key)
    }
}

/// A kind of record that cells hold.
trait Content: Sized + PartialEq {
    fn bytes(&self) -> Vec<u8>;
    fn of_bytes(key: &Key, bytes: &[u8]) -> Result<Self, String>;
}

impl Content for Record {
    fn bytes(&self) -> Vec<u8> {
        self.encode()
    }

    fn of_bytes(key: &Key, bytes: &[u8]) -> Result<Self, String> {
        let record = Self::decode(bytes).map_err(|e| e.to_string())?;
        match key {
            Key::Lease(machine) if *machine == record.machine => Ok(record),
            _ => Err(format!("it is the lease of machine \"{}\"", record.machine)),
        }
    }
}

impl Content for Beat {
    fn bytes(&self) -> Vec<u8> {
        self.encode()
    }

    fn of_bytes(key: &Key, bytes: &[u8]) -> Result<Self, String> {
        let beat = Self::decode(bytes).map_err(|e| e.to_string())?;
        match key {
            Key::Beat(name) if *name == beat.of.name => Ok(beat),
            _ => Err(format!("it is the beat \"{}\"", beat.of.name)),
        }
    }
}

fn decoded<C: Cells + ?Sized, T: Content>(
    cells: &C,
    key: &Key,
    bytes: &[u8],
) -> Result<T, StoreError> {
    let found = if bytes.len() > MAX_CELL {
        Err(format!("it has {} bytes", bytes.len()))
    } else {
        T::of_bytes(key, bytes)
    };
    found.map_err(|detail| StoreError::Corrupt { of: key.clone(), place: cells.place(key), detail })
}

fn get<C: Cells + ?Sized, T: Content>(cells: &C, key: &Key) -> Result<Option<T>, StoreError> {
    cells.get(key)?.map(|bytes| decoded(cells, key, &bytes)).transpose()
}

fn swap<C: Cells + ?Sized, T: Content>(
    cells: &C,
    key: &Key,
    expected: Option<&T>,
    new: &T,
) -> Result<Outcome<T>, StoreError> {
    let mut bytes = expected.map(Content::bytes);
    // A second time only for a record that means the same and is written in another way.
    for _ in 0..2 {
        let found = match cells.swap(key, bytes.as_deref(), &new.bytes())? {
            Swap::Done => return Ok(Outcome::Won),
            Swap::Found(None) => return Ok(Outcome::Lost(None)),
            Swap::Found(Some(found)) => found,
        };
        let there: T = decoded(cells, key, &found)?;
        if Some(&there) != expected {
            return Ok(Outcome::Lost(Some(there)));
        }
        bytes = Some(found);
    }
    Err(StoreError::Unavailable {
        of: key.clone(),
        operation: format!("replace {}", cells.place(key)),
        detail: "it says that the expected record is there, and that it is not".to_owned(),
    })
}

impl<C: Cells + ?Sized> LeaseStore for C {
    fn read(&self, machine: &MachineName) -> Result<Option<Record>, StoreError> {
        get(self, &Key::Lease(machine.clone()))
    }

    fn compare_and_set(
        &self,
        machine: &MachineName,
        expected: Option<&Record>,
        new: &Record,
    ) -> Result<Outcome, StoreError> {
        swap(self, &Key::Lease(machine.clone()), expected, new)
    }

    fn read_beat(&self, name: &BeatName) -> Result<Option<Beat>, StoreError> {
        get(self, &Key::Beat(name.clone()))
    }

    fn compare_and_set_beat(
        &self,
        name: &BeatName,
        expected: Option<&Beat>,
        new: &Beat,
    ) -> Result<Outcome<Beat>, StoreError> {
        swap(self, &Key::Beat(name.clone()), expected, new)
    }
}
