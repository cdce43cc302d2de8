//! What can go wrong with a store, as sentences for people.

use crate::{capture::CaptureError, keys::KeyError};
use std::{io, time::Duration};

/// Results of this crate.
pub(crate) type Result<T, E = StoreError> = std::result::Result<T, E>;

/// A store operation that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The address of the store makes no sense.
    #[error(
        "\"{url}\" is no store: {detail}; write s3://bucket/folder, gs://bucket/folder, az://container/folder or file:///folder"
    )]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The store lets two creates of one object win.
    #[error(
        "store {url} is not safe to share: {detail}; use a store that has create-if-absent (S3, GCS, Azure, a local folder)"
    )]
    NoCreateIfAbsent {
        /// The store.
        url: String,
        /// What the probe saw.
        detail: String,
    },
    /// The store holds something else, or another version.
    #[error("{url} holds format {found}; this silo reads and writes \"{known}\"")]
    Format {
        /// The store.
        url: String,
        /// What its marker says.
        found: String,
        /// What is understood here.
        known: &'static str,
    },
    /// A request failed, and again when it was repeated.
    #[error("could not {operation} {object} in the store after {attempts} attempts: {source}")]
    Request {
        /// What was attempted, as a verb.
        operation: &'static str,
        /// The object or prefix.
        object: String,
        /// How often it was tried.
        attempts: u32,
        /// The cause.
        source: Box<object_store::Error>,
    },
    /// The store did not answer in time.
    #[error(
        "the store did not {operation} {object} within {limit:?}; what became of the request is unknown"
    )]
    Timeout {
        /// What was attempted, as a verb.
        operation: &'static str,
        /// The object or prefix.
        object: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// An object that is referred to is not there.
    #[error("{object} is missing in the store; `silo verify` lists what depends on it")]
    Missing {
        /// The object.
        object: String,
    },
    /// An object is there where a new one was to be created.
    #[error("{object} exists already in the store")]
    Exists {
        /// The object.
        object: String,
    },
    /// An object does not hold what was stored.
    #[error("{object} is damaged: {detail}")]
    Corrupt {
        /// The object.
        object: String,
        /// What is wrong.
        detail: String,
    },
    /// An object does not decrypt: another key, or changed bytes.
    #[error(
        "{object} does not decrypt with key \"{key}\": the key is another one, or the object was changed"
    )]
    Sealed {
        /// The object.
        object: String,
        /// The id of the key.
        key: String,
    },
    /// A key is missing or not usable.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A name that cannot be part of an object's name.
    #[error(
        "\"{name}\" cannot name a {what}: 1 to 64 characters of a-z A-Z 0-9 . _ - that do not begin with a dot"
    )]
    Name {
        /// Line, tenant or device.
        what: &'static str,
        /// What was given.
        name: String,
    },
    /// Another writer has taken the line.
    #[error(
        "line \"{line}\" was taken over by another writer (entry {number}, epoch {epoch}); this one stores nothing more"
    )]
    Fenced {
        /// The line.
        line: String,
        /// The entry that the other wrote.
        number: u64,
        /// Its epoch.
        epoch: u64,
    },
    /// There is no such line, or nothing was ever committed to it.
    #[error("line \"{line}\" has no generation; `silo generations` lists what there is")]
    NoGeneration {
        /// The line.
        line: String,
    },
    /// A generation went while it was being read.
    #[error(
        "generation {number} of line \"{line}\" was pruned while it was in use here, and what it refers to is not kept; `silo generations` lists the others"
    )]
    Pruned {
        /// The line.
        line: String,
        /// The generation.
        number: u64,
    },
    /// A line that was to be created is there.
    #[error("line \"{line}\" exists already; choose another name")]
    LineExists {
        /// The line.
        line: String,
    },
    /// The generation has no such device.
    #[error("generation {number} of line \"{line}\" has no device \"{device}\", but {has}")]
    NoDevice {
        /// The line.
        line: String,
        /// The generation.
        number: u64,
        /// What was asked for.
        device: String,
        /// What there is.
        has: String,
    },
    /// The place to restore to does not fit.
    #[error("device \"{device}\" has {bytes} bytes, the target {target}")]
    Size {
        /// The device.
        device: String,
        /// Its size in bytes.
        bytes: u64,
        /// The target's size in bytes.
        target: u64,
    },
    /// The group of devices is not the one that the line holds.
    #[error("line \"{line}\": {detail}")]
    Group {
        /// The line.
        line: String,
        /// What differs.
        detail: String,
    },
    /// The devices could not be frozen or read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Reading a device or writing to one failed.
    #[error("could not {operation} device \"{device}\" at byte {offset}: {source}")]
    Device {
        /// What was attempted, as a verb.
        operation: &'static str,
        /// The device.
        device: String,
        /// Where.
        offset: u64,
        /// The cause.
        source: io::Error,
    },
    /// Something on this host failed.
    #[error("could not {operation}: {source}")]
    Local {
        /// What was attempted.
        operation: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Two things that must not run together.
    #[error("{0}")]
    Busy(String),
    /// The work was told to stop.
    #[error("the backup was stopped before the generation was committed")]
    Stopped,
}

impl StoreError {
    /// An object that does not hold what was stored.
    pub(crate) fn corrupt(object: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Corrupt { object: object.into(), detail: detail.into() }
    }

    /// Whether the same work may succeed a little later: the store was not reached, or was slow.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Request { .. } | Self::Timeout { .. })
    }

    /// The kind by which a block server answers its client.
    #[must_use]
    pub fn io_kind(&self) -> io::ErrorKind {
        match self {
            Self::Timeout { .. } => io::ErrorKind::TimedOut,
            Self::Missing { .. } | Self::NoGeneration { .. } | Self::Pruned { .. } => {
                io::ErrorKind::NotFound
            }
            Self::Corrupt { .. } | Self::Sealed { .. } => io::ErrorKind::InvalidData,
            Self::Key(_) => io::ErrorKind::PermissionDenied,
            _ => io::ErrorKind::Other,
        }
    }
}

impl From<StoreError> for io::Error {
    fn from(error: StoreError) -> Self {
        io::Error::new(error.io_kind(), error)
    }
}
