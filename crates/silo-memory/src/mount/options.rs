//! How a mount behaves, and how it says what went wrong.

use silo_block::device::DeviceName;
use std::{io, ops::Range, sync::Arc, time::Duration};

/// What has to be here before a mount opens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PullFirst {
    /// Nothing: the first access may wait.
    #[default]
    Nothing,
    /// These bytes.
    Ranges(Vec<Range<u64>>),
    /// This many bytes, the first in the order of pulling (of a direct mount: of the device).
    Bytes(u64),
}

/// Order of pulling: for the byte offset of each piece of 1 MiB its priority, higher first; pieces of
/// equal priority go in ascending order.
pub type Order = Arc<dyn Fn(u64) -> i64 + Send + Sync>;

/// How a mount behaves. [`Options::new`] has the defaults.
#[derive(Clone)]
pub struct Options {
    /// For messages and the name of the memfd.
    pub name: DeviceName,
    /// Refuse writes.
    pub read_only: bool,
    /// What has to be here before the mount opens.
    pub pull_first: PullFirst,
    /// Order in which a managed mount pulls the rest; ascending without.
    pub order: Option<Order>,
    /// How far ahead of a walker to fetch, in bytes; 0 turns read-ahead off.
    pub read_ahead: u64,
    /// Bytes that background work keeps in flight at most. Demands come on top.
    pub budget: u64,
    /// How often what was written here goes to the backend; without, only at a flush, at the close
    /// and when there is more of it than `dirty_limit`.
    pub write_back: Option<Duration>,
    /// Bytes written through the library (not the mapping) that may wait for write-back before
    /// writers are slowed to the backend's speed.
    pub dirty_limit: u64,
    /// How long an access waits for the backend, errors included, before it fails (SIGBUS in the
    /// mapping); also how long opening waits for each new piece of `pull_first`.
    pub deadline: Duration,
    /// How long closing tries to write back.
    pub close_deadline: Duration,
}

impl Options {
    /// The defaults: writable, 64 MiB in flight, read-ahead of 32 MiB, write-back each 5 s and at
    /// 256 MiB, waits of 30 s.
    #[must_use]
    pub fn new(name: DeviceName) -> Self {
        Self {
            name,
            read_only: false,
            pull_first: PullFirst::Nothing,
            order: None,
            read_ahead: 32 << 20,
            budget: 64 << 20,
            write_back: Some(Duration::from_secs(5)),
            dirty_limit: 256 << 20,
            deadline: Duration::from_secs(30),
            close_deadline: Duration::from_secs(30),
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("name", &self.name)
            .field("read_only", &self.read_only)
            .field("pull_first", &self.pull_first)
            .field("ordered", &self.order.is_some())
            .field("read_ahead", &self.read_ahead)
            .field("budget", &self.budget)
            .field("write_back", &self.write_back)
            .field("dirty_limit", &self.dirty_limit)
            .field("deadline", &self.deadline)
            .field("close_deadline", &self.close_deadline)
            .finish()
    }
}

/// Why a mount could not be opened, flushed or closed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel is too old.
    #[error(
        "this kernel's userfaultfd lacks what mounts need (Linux 6.7: minor faults, poison, \
         asynchronous write protection); use an NBD or FUSE export instead"
    )]
    Unsupported,
    /// A call to the system failed.
    #[error("could not {operation} for a mount: {source}")]
    System {
        /// What was attempted, as a verb.
        operation: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// What was to be here before opening did not come.
    #[error(
        "mount \"{name}\": {left} bytes that must be here before it opens did not come: {source}"
    )]
    PullFirst {
        /// The mount.
        name: DeviceName,
        /// Bytes still missing.
        left: u64,
        /// The backend's last error, or that it was silent.
        source: io::Error,
    },
    /// What was written could not be made durable.
    #[error(
        "mount \"{name}\": {left} bytes that were written here are not known to be durable in the \
         backend: {source}"
    )]
    WriteBack {
        /// The mount.
        name: DeviceName,
        /// Bytes that are newer here than what the backend confirmed.
        left: u64,
        /// The cause.
        source: io::Error,
    },
}
