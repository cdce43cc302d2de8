//! What can go wrong with packages, in sentences a person can act on.

use std::{io, path::PathBuf, time::Duration};

/// Why a package could not be built, opened, checked, packed or unpacked.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// The operating system refused.
    #[error("{operation}: {source}")]
    Io {
        /// What was attempted, with its path.
        operation: String,
        /// The cause.
        source: io::Error,
    },
    /// Something that was never a package.
    #[error("{path} is not a drafter package: {why}; make one with `drafter package build`")]
    Foreign {
        /// What was opened.
        path: PathBuf,
        /// What gave it away.
        why: String,
    },
    /// A package of a later drafter.
    #[error(
        "{path}: the package has format version {found}, this drafter reads up to {known}; take a \
         newer drafter, or build the package again with this one"
    )]
    NewerFormat {
        /// What was opened.
        path: PathBuf,
        /// What its manifest says.
        found: u64,
        /// What this code reads.
        known: u32,
    },
    /// A manifest that breaks a rule.
    #[error("{path}: the manifest's {field} {problem}; build the package again")]
    Manifest {
        /// Which manifest.
        path: PathBuf,
        /// Which field, as a path.
        field: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A file that the manifest names is not there.
    #[error("package {package}: {file} is missing; copy the whole directory again, or rebuild it")]
    Missing {
        /// The package's directory.
        package: PathBuf,
        /// The file's name in it.
        file: String,
    },
    /// A file is not as long as the manifest says: a copy that broke off, or an edit.
    #[error(
        "package {package}: {file} has {found} bytes, its manifest says {expected}: {}; copy the \
         package again, or rebuild it",
        if found < expected { "it is truncated" } else { "something was appended" }
    )]
    WrongSize {
        /// The package's directory.
        package: PathBuf,
        /// The file's name in it.
        file: String,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
    /// A file's content is not what was built.
    #[error(
        "package {package}: {file} has been tampered with or damaged: its BLAKE3 is {found}, its \
         manifest says {expected}; do not run it; copy or build the package again"
    )]
    Tampered {
        /// The package's directory.
        package: PathBuf,
        /// The file's name in it.
        file: String,
        /// Hash by the manifest.
        expected: String,
        /// Hash of the content.
        found: String,
    },
    /// The archive ends early or cannot be decoded.
    #[error("archive {archive} is truncated or damaged: {detail}; copy it again")]
    Damaged {
        /// Which archive.
        archive: PathBuf,
        /// What was noticed.
        detail: String,
    },
    /// An entry of an archive or a layer that is never taken.
    #[error("{archive}: refused the entry {entry:?}: {why}; do not trust this file")]
    Entry {
        /// Which archive.
        archive: PathBuf,
        /// The entry's name as it stands there.
        entry: String,
        /// What is wrong with it.
        why: String,
    },
    /// More data than was allowed; noticed before it was written.
    #[error("{what} has {found} bytes, at most {limit} are allowed; {hint}")]
    TooLarge {
        /// What.
        what: String,
        /// Declared or counted bytes.
        found: u64,
        /// The limit in bytes.
        limit: u64,
        /// How to go on.
        hint: String,
    },
    /// The build was asked for something impossible or unclear.
    #[error("cannot build package \"{name}\": {problem}")]
    Request {
        /// The package's name.
        name: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// An input of the build is not what it should be.
    #[error("{input}: {problem}")]
    Input {
        /// Which file, package or layout.
        input: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A content does not have the digest by which it was named.
    #[error(
        "{input}: its content has SHA-256 {found}, it was named by {expected}; it is damaged, \
         download or export it again"
    )]
    Digest {
        /// Which blob.
        input: String,
        /// The digest that named it.
        expected: String,
        /// The digest it has.
        found: String,
    },
    /// A program that the build needs is not installed.
    #[error("{program} is not installed; on Debian it comes with `apt-get install {package}`")]
    ToolMissing {
        /// The program.
        program: String,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program said no.
    #[error("{operation}: {program} failed ({status}): {detail}; {hint}")]
    Tool {
        /// What was attempted.
        operation: String,
        /// The program.
        program: String,
        /// Its exit status or signal.
        status: String,
        /// The last lines of its error output.
        detail: String,
        /// How to go on.
        hint: &'static str,
    },
    /// A program or another build took too long.
    #[error("{operation} did not finish within {limit:?}; {hint}")]
    Timeout {
        /// What was waited for.
        operation: String,
        /// For how long.
        limit: Duration,
        /// How to go on.
        hint: String,
    },
}

/// Result of everything here.
pub type Result<T, E = PackageError> = std::result::Result<T, E>;

/// Says what an I/O call was for.
pub(crate) trait Attempt<T> {
    /// Wraps the error with the operation, which is built only if needed.
    fn attempt(self, operation: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Attempt<T> for io::Result<T> {
    fn attempt(self, operation: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| PackageError::Io { operation: operation(), source })
    }
}

impl<T> Attempt<T> for nix::Result<T> {
    fn attempt(self, operation: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| PackageError::Io { operation: operation(), source: errno.into() })
    }
}
