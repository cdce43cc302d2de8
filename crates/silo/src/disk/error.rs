//! What can go wrong with a disk, as sentences for people.

use crate::{block::BlockRange, locks::LockError, map::MapError};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// A disk operation that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A system call on one of the disk's files failed.
    #[error("could not {operation} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb: "open", "sync", …
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The folder holds no disk.
    #[error("{} holds no disk (no journal in it); create one with `silo create`", path.display())]
    NotADisk {
        /// The folder.
        path: PathBuf,
    },
    /// There is a disk already where one was to be created.
    #[error("{} already holds a disk; open it, or remove the folder first", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// Another process has the disk open.
    #[error("disk {} is open in another process; one process at a time may open a disk", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// The disk was written by another version of silo.
    #[error("{} has format version {found}, this silo reads version {known}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: u32,
        /// What is understood here.
        known: u32,
    },
    /// A file of the disk does not say what silo wrote.
    #[error("{} is damaged at byte {at}: {detail}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where.
        at: u64,
        /// What is wrong, and what can be done if anything can.
        detail: String,
    },
    /// The base is not the one that the disk was created over.
    #[error("disk {} belongs to another base: it was created over {created}, {} is {given}", path.display(), base.display())]
    WrongBase {
        /// The disk's folder.
        path: PathBuf,
        /// The base that was given.
        base: PathBuf,
        /// What the disk knows of its base.
        created: String,
        /// The same of the base that was given.
        given: String,
    },
    /// The size asked for is not possible.
    #[error("a disk of {bytes} bytes is not possible: {detail}")]
    Size {
        /// What was asked for.
        bytes: u64,
        /// Why not.
        detail: &'static str,
    },
    /// The disk was being received when its process or host ended.
    #[error(
        "disk {} is incomplete ({state}): it must not be used as the machine's disk; receive it again, or arm it with its source", path.display()
    )]
    Incomplete {
        /// The folder.
        path: PathBuf,
        /// How far it got.
        state: String,
    },
    /// An access that reaches past the end.
    #[error("{length} bytes at {offset} reach past the end of a disk of {size} bytes")]
    OutOfRange {
        /// First byte of the access.
        offset: u64,
        /// Its length.
        length: u64,
        /// Size of the disk.
        size: u64,
    },
    /// A write after the disk was handed over.
    #[error("the disk is frozen: its machine was handed to another host, nothing may write here")]
    Frozen,
    /// A write while the disk is still being received.
    #[error("the disk is still being received: its machine does not run here yet")]
    NotRunningHere,
    /// An access to blocks that have not arrived, where waiting is not possible.
    #[error("blocks {} to {} have not arrived here, and no source is connected", range.start.0, range.end())]
    NotArrived {
        /// The blocks.
        range: BlockRange,
    },
    /// An access to blocks that did not arrive in time.
    #[error("blocks {} to {} did not arrive within {limit:?}", range.start.0, range.end())]
    ArrivalTimeout {
        /// The blocks.
        range: BlockRange,
        /// How long was waited.
        limit: Duration,
    },
    /// Something else that did not end in time.
    #[error("{what} did not end within {limit:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// A wait that was called off, because the server or the move ended.
    #[error("the wait for a block was called off: the disk's server stops, or the disk was reset")]
    Interrupted,
    /// A sync failed earlier, so nobody can know what is durable.
    #[error(
        "an earlier sync failed ({cause}); what was written since is of unknown durability, so every further flush is refused until the disk is opened again"
    )]
    SyncLost {
        /// The first failure.
        cause: String,
    },
    /// A sync that other threads waited for failed.
    #[error("{cause}")]
    Sync {
        /// The failure.
        cause: String,
        /// Of what kind it was.
        kind: io::ErrorKind,
    },
    /// The call does not fit the state of the disk.
    #[error("{operation} does not fit the disk's state: {detail}")]
    State {
        /// What was attempted.
        operation: &'static str,
        /// Why it does not fit.
        detail: String,
    },
}

impl DiskError {
    /// For `map_err`: names the operation and the file.
    pub(super) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }

    /// Of what kind it is, as an error of the system.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Io { source, .. } => source.kind(),
            Self::Sync { kind, .. } => *kind,
            Self::OutOfRange { .. } | Self::Size { .. } => io::ErrorKind::InvalidInput,
            Self::Frozen => io::ErrorKind::NotConnected,
            Self::NotRunningHere => io::ErrorKind::PermissionDenied,
            Self::ArrivalTimeout { .. } | Self::Timeout { .. } => io::ErrorKind::TimedOut,
            Self::Interrupted => io::ErrorKind::Interrupted,
            Self::Corrupt { .. } => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::Other,
        }
    }

    /// Whether it failed for lack of room: the file system, or the quota.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

impl From<MapError> for DiskError {
    fn from(error: MapError) -> Self {
        match error {
            MapError::Io { operation, path, source } => Self::Io { operation, path, source },
            MapError::NotThere { path } => {
                Self::NotADisk { path: path.parent().unwrap_or(&path).to_owned() }
            }
            MapError::Version { path, found, known } => Self::Version { path, found, known },
            MapError::Corrupt { path, at, detail } => Self::Corrupt { path, at, detail },
            MapError::SyncLost { cause } => Self::SyncLost { cause },
        }
    }
}

impl From<LockError> for DiskError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Frozen => Self::Frozen,
            LockError::Timeout { what, limit } => Self::Timeout { what, limit },
        }
    }
}

impl From<DiskError> for io::Error {
    /// Keeps the sentence and gives it the kind that the block server turns into a protocol error.
    fn from(error: DiskError) -> Self {
        let kind = error.kind();
        Self::new(kind, error)
    }
}
