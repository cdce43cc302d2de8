//! What can go wrong with a source, as sentences for people.

use std::{
    io,
    path::{Path, PathBuf},
};

/// A source that could not be made, opened or used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A system call failed.
    #[error("could not {operation} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb: "open", "sync", …
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There is something already where a source was to be made.
    #[error("{} exists already; open it, or remove it first", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// Another process has it open for writing.
    #[error("{} is open in another process; one at a time may write to it", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// It is not what it should be.
    #[error("{} is not {wanted}: {detail}", path.display())]
    NotA {
        /// Where.
        path: PathBuf,
        /// What was wanted, with its article.
        wanted: &'static str,
        /// What was found instead.
        detail: String,
    },
    /// It was written by another version of silo.
    #[error("{} has format version {found}, this silo reads version {known}", path.display())]
    Version {
        /// Where.
        path: PathBuf,
        /// What it says.
        found: u32,
        /// What is understood here.
        known: u32,
    },
    /// It does not hold what silo wrote.
    #[error("{} is damaged at byte {at}: {detail}", path.display())]
    Corrupt {
        /// Where.
        path: PathBuf,
        /// At which byte of the file.
        at: u64,
        /// What is wrong.
        detail: String,
    },
    /// A size or a block size that is not possible.
    #[error(transparent)]
    Geometry(#[from] crate::geometry::GeometryError),
    /// A process whose memory was to be read.
    #[error("process {pid}: {detail}")]
    Process {
        /// Its number.
        pid: i32,
        /// What is wrong, and what can be done.
        detail: String,
    },
}

impl SourceError {
    /// For `map_err`: names the operation and the file.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }
}

impl From<SourceError> for io::Error {
    /// Keeps the sentence and gives it the kind that a block server turns into a protocol error.
    fn from(error: SourceError) -> Self {
        let kind = match &error {
            SourceError::Io { source, .. } => source.kind(),
            SourceError::Corrupt { .. } => io::ErrorKind::InvalidData,
            SourceError::Geometry(_) => io::ErrorKind::InvalidInput,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
