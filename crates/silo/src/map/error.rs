//! What can go wrong with an overlay's files.

use std::{
    io,
    path::{Path, PathBuf},
};

/// An overlay operation that did not succeed. [`disk`](crate::disk) and [`layer`](crate::layer)
/// have the same sentences in their own errors.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MapError {
    /// A system call on one of the files failed.
    #[error("could not {operation} {}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    /// There is no journal.
    #[error("{} holds no overlay (no journal)", path.display())]
    NotThere { path: PathBuf },
    /// Written by another version.
    #[error("{} has format version {found}, this silo reads version {known}", path.display())]
    Version { path: PathBuf, found: u32, known: u32 },
    /// A file does not say what silo wrote.
    #[error("{} is damaged at byte {at}: {detail}", path.display())]
    Corrupt { path: PathBuf, at: u64, detail: String },
    /// A sync failed earlier, so nobody can know what is durable.
    #[error(
        "an earlier sync failed ({cause}); what was written since is of unknown durability, so every further flush is refused until the device is opened again"
    )]
    SyncLost { cause: String },
}

impl MapError {
    /// For `map_err`: names the operation and the file.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }
}

impl From<MapError> for io::Error {
    fn from(error: MapError) -> Self {
        let kind = match &error {
            MapError::Io { source, .. } => source.kind(),
            MapError::Corrupt { .. } => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
