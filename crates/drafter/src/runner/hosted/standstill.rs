//! A machine that stands still for a moment, for a backup, and goes on here.
//!
//! Less than a pause for a move: nothing is handed over, so frames are not led away (they wait in the
//! tap), disks are not frozen for good, and no flush is answered before it is durable. What must hold:
//! after [`Hosted::stand_still`] nobody writes to memory and disks; after [`Hosted::go_further`] the
//! guest has noticed nothing.

use super::{HOOK_LIMIT, Hosted, MachineError, fail, unless_full};
use std::time::Duration;

/// How long the monitor may take for what was said to the guest before.
const QUIET_LIMIT: Duration = Duration::from_millis(50);

impl Hosted {
    /// Calls the guest's hook before a pause that is its last here, if its package has one.
    ///
    /// # Errors
    /// If it fails: the machine runs.
    pub(in super::super) fn call_before_suspend(&mut self) -> Result<(), MachineError> {
        if self.has_suspend_hook()
            && let Some(guest) = &self.guest
        {
            guest.before_suspend(false, HOOK_LIMIT).map_err(fail)?;
        }
        Ok(())
    }

    /// What can be done while the guest runs, so that the standstill is short.
    ///
    /// # Errors
    /// If a disk's read waits for help, a server is not found, or a disk cannot be synced: the
    /// machine runs.
    pub(in super::super) fn before_standstill(&mut self) -> Result<(), MachineError> {
        self.rejoin_disks()?;
        self.servers.before_pause()?;
        self.helpers = self.servers.helpers();
        // A flush of the guest that is under way is waited for: let little be left for it.
        for disk in &self.content.disks {
            unless_full(disk, disk.sync())?;
        }
        if let Some(guest) = &self.guest
            && !guest.hold(QUIET_LIMIT)
        {
            // If it writes to memory after the last look, that is seen and the round given up.
            tracing::debug!("the monitor may have words for the guest during the standstill");
        }
        Ok(())
    }

    /// Stops the guest and everything that works for it.
    ///
    /// # Errors
    /// If the monitor does not stop it, or a disk's requests do not end; [`Hosted::go_further`] is
    /// owed all the same.
    pub(in super::super) fn stand_still(&mut self) -> Result<(), MachineError> {
        let _first = self.helpers.go_first();
        self.vm.pause(&mut || {}).map_err(fail)?;
        self.servers.at_rest()
    }

    /// Output commit, of a machine that stands still: what it has sent goes when this instant is
    /// durable.
    ///
    /// # Errors
    /// If the monitor does not hold it.
    pub(in super::super) fn seal_output(&mut self) -> Result<(), MachineError> {
        self.commit_output(true)?;
        self.vm.seal_output().map_err(fail)
    }

    /// Lets it go on, whether or not it stood still.
    ///
    /// # Errors
    /// If it cannot.
    pub(in super::super) fn go_further(&mut self) -> Result<(), MachineError> {
        let _first = self.helpers.go_first();
        let went = self.before_run().and_then(|()| self.vm.run().map_err(fail));
        self.end_quiet();
        went
    }

    /// Requests to the guest may be said again.
    pub(in super::super) fn end_quiet(&self) {
        if let Some(guest) = &self.guest {
            guest.release();
        }
    }
}
