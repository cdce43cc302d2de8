//! The right to run a protected machine whose runner is gone: what a runner that comes after it does before
//! the machine may execute another instruction.
//!
//! The machine is within the term of a life that has ended with its runner: its guard lets it run to the end
//! of that, or has frozen it. It is frozen here first, so that between one guard and the next there is no
//! moment at which it runs unguarded; then the lease is got back under a new life, by the same rules as after
//! a fence ([`Holder`](crate::tenure::Holder)), and only then it goes on. If another host has taken it, the
//! copy here is over.

use super::text;
use crate::{
    driver::{Fence, qemu},
    lease::Record,
    migrate::switchover::Holding,
    runner::{Runner, guard::Left, tenure::Known},
};
use std::sync::Arc;

/// Why the machine of a runner that protected it on request only is not protected any more.
const NOT_KEPT: &str =
    "it was protected by a command, whose keys no runner keeps: ask again (`drafter protect`)";

impl Runner {
    /// Gets the lease back, which names a life that is over, and lets the machine go on. `None`: another host
    /// has it, and the copy here has been ended.
    pub(super) fn regain(self: &Arc<Self>, record: &Record) -> Result<Option<Holding>, String> {
        let fence = self.driver.fence(&self.dir.run()).map_err(text)?;
        let fence = fence.ok_or(
            "its monitor is gone too; a stand-in takes the machine when its lease is over, or restore it \
             from its last generation",
        )?;
        let Some(config) = self.config.protect.clone() else {
            return self.unprotect(&*fence).map(Some);
        };
        fence.freeze().map_err(text)?;
        self.lock().holding = Some(Holding::new(record.clone()));
        let tenure = self.tenure(config.pace())?;
        let protection =
            self.install_protection(Arc::clone(&fence), config.pace(), config.output_commit)?;
        if config.output_commit {
            // What waits at the monitor was sent before the last generation, or after it: it waits on.
            protection.hold_output();
        }
        // Until the holder has looked at the lease.
        protection.freeze();
        // Where its host's life went on, it may have been given up: it is got back in any case.
        tenure.hold(record.clone(), Known::Perhaps, self.hands(&protection));
        match protection.wait_for_time(|| self.lock().state.over()) {
            Ok(()) => {}
            Err(_) if protection.is_over() => {
                self.forget_lost()?;
                return Ok(None);
            }
            Err(why) => return Err(why),
        }
        let holding = self.lock().holding.clone();
        Ok(Some(holding.ok_or("this host holds no lease of the machine")?))
    }

    /// Takes the lease without an end: nobody can take the machine any more.
    fn unprotect(&self, fence: &dyn Fence) -> Result<Holding, String> {
        let holding = self.acquire()?;
        if let Some(left) = Left::find(&self.dir.run()) {
            left.end().map_err(text)?;
        }
        fence.thaw().map_err(text)?;
        self.lock().unprotected = Some(NOT_KEPT.to_owned());
        Ok(holding)
    }

    /// It came out while the lease was being got back that another host has it: its holder has ended the
    /// copy.
    fn forget_lost(&self) -> Result<(), String> {
        qemu::stop_without_runner(&self.dir.run()).map_err(text)?;
        super::forget(&self.dir);
        Ok(())
    }
}
