//! A monitor and the servers of its disks, where one of the two was away.
//!
//! A monitor whose runner died looks for the servers of its disks until it finds those of the next
//! one. Of a vhost-user disk that it lost while its machine stood still, QEMU says nothing to a server that
//! it finds, and takes it for the one before (silo's module `vhost::heir` has the why): it says everything when
//! the machine goes on, so [`Hosted::before_run`] has only to make sure that it is connected by then. But for
//! the rest of its life it does not notice either when it loses that disk's server while the machine runs. Then
//! what the guest asks of the disk waits until the machine has stood still for a moment, which
//! [`Hosted::rejoin_disks`] sees to.

use super::{Hosted, MachineError, fail};
use std::time::{Duration, Instant};

/// How long the monitor may take to be ready to go on after a pause: requests in hand keep it busy for as
/// long as a server lets them, then it has to find the server again.
const READY_LIMIT: Duration = Duration::from_secs(180);
/// How often it is asked.
const ASK_AGAIN: Duration = Duration::from_millis(5);

impl Hosted {
    /// Before the machine goes on after a pause: waits until its monitor is there for that. QEMU that is
    /// told to go on while it has lost a server does not look for it again.
    ///
    /// # Errors
    /// If it is not there in time.
    pub(super) fn before_run(&mut self) -> Result<(), MachineError> {
        if self.servers_were_away || self.servers.are_mistaken() {
            self.await_monitor(READY_LIMIT)?;
            self.servers_were_away = false;
        }
        self.servers.before_run(READY_LIMIT)
    }

    /// Waits until the monitor says that it has found the servers that are here now.
    ///
    /// # Errors
    /// If it has not in time, or does not say.
    pub(in super::super) fn await_monitor(&mut self, limit: Duration) -> Result<(), MachineError> {
        let deadline = Instant::now() + limit;
        loop {
            // It may say so of servers that are gone, until one that is here has been found by it.
            let found = self.vm.finds_disks().map_err(fail)? && self.servers.are_answering();
            if found && self.vm.finds_disks().map_err(fail)? {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(fail(format!(
                    "the monitor has not found the servers of its disks after {limit:?}; try again"
                )));
            }
            std::thread::park_timeout(ASK_AGAIN);
        }
    }

    /// Of a machine that runs: whether [`Hosted::rejoin_disks`] may be needed.
    pub(in super::super) fn may_have_to_rejoin(&self) -> bool {
        self.vm.is_running() && self.servers.are_mistaken()
    }

    /// Has a monitor that takes the servers of its disks for those before them say everything anew: its
    /// machine stands still for a moment, some 50 ms. Nothing is done to one that runs as it should.
    ///
    /// # Errors
    /// If it does not stop or go on; what the guest asks of its disks still waits then.
    pub(in super::super) fn rejoin_disks(&mut self) -> Result<(), MachineError> {
        // What a monitor says to a server that it finds, it says before it says that it has found it.
        let is_mistaken = self.may_have_to_rejoin()
            && self.vm.finds_disks().map_err(fail)?
            && self.servers.are_mistaken();
        if !is_mistaken {
            return Ok(());
        }
        tracing::warn!(
            machine = self.shape.name,
            "its monitor takes the servers of its disks for those before; it stands still for a moment"
        );
        let paused = self.vm.pause(&mut || {}).map_err(fail);
        let went = self.before_run().and_then(|()| self.vm.run().map_err(fail));
        paused.and(went)
    }
}
