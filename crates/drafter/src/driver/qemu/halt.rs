//! Stopping a QEMU without asking it: what the owner of a machine and the thread that enforces its
//! deadlines share.

use super::{
    cgroup::Cgroup,
    process::{Identity, Process, signal_by},
    record::Record,
};
use crate::driver::{DriverError, Fence};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// What freezes and kills, shared with other threads.
pub(super) struct Halt {
    machine: String,
    identity: Identity,
    process: Arc<OwnedFd>,
    cgroup: Cgroup,
    killed: AtomicBool,
}

impl Halt {
    pub(super) fn of(record: &Record, process: &Process) -> Self {
        Self {
            machine: record.shape.name.clone(),
            identity: process.identity(),
            process: process.shared_descriptor(),
            cgroup: record.cgroup.clone(),
            killed: AtomicBool::new(false),
        }
    }

    /// Whether we are why it ended.
    pub(super) fn has_killed(&self) -> bool {
        self.killed.load(Ordering::Acquire)
    }

    fn failed(&self, operation: &str, source: io::Error) -> DriverError {
        let operation =
            format!("{operation} machine \"{}\" (process {})", self.machine, self.identity.pid);
        DriverError::Host { operation, source }
    }
}

impl Fence for Halt {
    fn freeze(&self) -> Result<(), DriverError> {
        self.cgroup
            .freeze(self.identity, self.process.as_fd())
            .map_err(|error| self.failed("freezing", error))
    }

    fn thaw(&self) -> Result<(), DriverError> {
        self.cgroup.thaw(self.process.as_fd()).map_err(|error| self.failed("thawing", error))
    }

    fn kill(&self) -> Result<(), DriverError> {
        self.killed.store(true, Ordering::Release);
        signal_by(self.process.as_fd(), nix::sys::signal::SIGKILL)
            .and_then(|()| self.cgroup.release_killed())
            .map_err(|error| self.failed("killing", error))
    }
}
