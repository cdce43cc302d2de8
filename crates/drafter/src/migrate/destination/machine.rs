//! What the destination engine needs from the machine that arrives.

use crate::{lease::BootTime, migrate::source::MachineError};
use silo::{device::Device, memory::FaultSummary};
use std::{sync::Arc, time::Duration};

/// A machine that arrives at this host: paused, empty, with everything built around it.
pub trait DestinationMachine: Send {
    /// The device group, in the order of the device numbers.
    fn devices(&self) -> Vec<Arc<dyn Device>>;

    /// It will stand still for about this long. What comes of it is its network's matter.
    fn expect(&mut self, blackout: Duration);

    /// Loads the device state.
    fn load(&mut self, state: &[u8]) -> Result<(), MachineError>;

    /// First instruction. What the guest sends is held. Its [`Freezer`] has been told by then until when
    /// it may run.
    fn run(&mut self) -> Result<(), MachineError>;

    /// This host owns the machine at `epoch`; the network leads here under `flip`, if not yet, then as soon
    /// as it answers.
    fn own(&mut self, epoch: u64, flip: u64);

    /// What the guest has sent and sends may leave.
    fn release_output(&mut self) -> Result<(), MachineError>;

    /// Tells the memory faults so far; outlives the machine's stay in the session.
    fn faults(&self) -> Box<dyn Fn() -> FaultSummary + Send + Sync>;

    /// Stops and resumes the machine without asking its monitor; usable while another call hangs.
    fn freezer(&self) -> Arc<dyn Freezer>;
}

/// Stops a machine from outside.
pub trait Freezer: Send + Sync {
    /// No instruction runs after this returns, also none that a load under way would start.
    fn freeze(&self) -> Result<(), String>;

    /// Undoes it.
    fn thaw(&self) -> Result<(), String>;

    /// Has the machine frozen at that time, whatever has become of this process by then, unless
    /// something else is said before. `None`: it runs in this host's own right. Quick: called in the
    /// blackout.
    ///
    /// # Errors
    /// If nobody would freeze it: it must not run.
    fn run_until(&self, end: Option<BootTime>) -> Result<(), String>;

    /// From here on its lease may be asked for, so that this attempt is not refused any more: whoever
    /// comes after this process must know.
    fn lease_asked(&self);
}
