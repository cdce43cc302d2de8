//! What can go wrong with a stack, as sentences for people.

use crate::{locks::LockError, map::MapError};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// An operation on a stack that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A system call failed.
    #[error("could not {operation} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The folder holds no stack.
    #[error("{} holds no stack of layers (no stack.json in it)", path.display())]
    NotAStack {
        /// The folder.
        path: PathBuf,
    },
    /// There is a stack already where one was to be made.
    #[error("{} already holds a stack; open it, or remove the folder first", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// Another process has it open.
    #[error("stack {} is open in another process; one at a time may open it", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// Written by another version of silo.
    #[error("{} has format version {found}, this silo reads version {known}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: u32,
        /// What is understood here.
        known: u32,
    },
    /// A file does not say what silo wrote.
    #[error("{} is damaged at byte {at}: {detail}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where.
        at: u64,
        /// What is wrong.
        detail: String,
    },
    /// The base is not the one that was asked for.
    #[error("base {base}: its root is {found}, {wanted} is wanted; nothing of it is used")]
    WrongBase {
        /// The base, for people.
        base: String,
        /// What must be.
        wanted: String,
        /// What is.
        found: String,
    },
    /// The size asked for is not possible.
    #[error("a stack of {bytes} bytes in blocks of {block} is not possible: {detail}")]
    Size {
        /// Bytes asked for.
        bytes: u64,
        /// Block size asked for.
        block: u32,
        /// Why not.
        detail: String,
    },
    /// A sync failed earlier, so nobody can know what is durable.
    #[error(
        "an earlier sync failed ({cause}); what was written since is of unknown durability, so every further flush is refused until the stack is opened again"
    )]
    SyncLost {
        /// The first failure.
        cause: String,
    },
    /// Something that did not end in time.
    #[error("{what} did not end within {limit:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// More layers than are sensible.
    #[error("the stack has {layers} layers, which is the most; merge them first")]
    TooDeep {
        /// How many it has.
        layers: usize,
    },
}

impl LayerError {
    /// For `map_err`: names the operation and the file.
    pub(super) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }
}

impl From<MapError> for LayerError {
    fn from(error: MapError) -> Self {
        match error {
            MapError::Io { operation, path, source } => Self::Io { operation, path, source },
            MapError::NotThere { path } => Self::Corrupt {
                path,
                at: 0,
                detail: "a layer that the stack lists is not there".to_owned(),
            },
            MapError::Version { path, found, known } => Self::Version { path, found, known },
            MapError::Corrupt { path, at, detail } => Self::Corrupt { path, at, detail },
            MapError::SyncLost { cause } => Self::SyncLost { cause },
        }
    }
}

impl From<LockError> for LayerError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Frozen => {
                Self::Timeout { what: "a freeze of the stack", limit: Duration::ZERO }
            }
            LockError::Timeout { what, limit } => Self::Timeout { what, limit },
        }
    }
}

impl From<LayerError> for io::Error {
    fn from(error: LayerError) -> Self {
        let kind = match &error {
            LayerError::Io { source, .. } => source.kind(),
            LayerError::Corrupt { .. } | LayerError::WrongBase { .. } => io::ErrorKind::InvalidData,
            LayerError::Timeout { .. } => io::ErrorKind::TimedOut,
            LayerError::Size { .. } => io::ErrorKind::InvalidInput,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
