//! What the source engine needs from the machine that leaves; the runner implements it, tests
//! implement it without a monitor.

use crate::migrate::protocol::DeviceNumber;
use conduit::HostEndpoint;
use silo::{block::BlockRange, device::Device};
use std::{sync::Arc, time::Duration};

/// Any failure, as a sentence.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// A machine that leaves this host.
pub trait SourceMachine: Send {
    /// The device group, in the order of the device numbers.
    fn devices(&self) -> Vec<Arc<dyn Device>>;

    /// Blocks that loading the state reads; they travel in the flight if they are not there yet.
    fn state_blocks(&mut self) -> Result<Vec<(DeviceNumber, BlockRange)>, MachineError>;

    /// The guest's hook, and everything that makes the pause short (disks synced). The guest runs.
    fn before_pause(&mut self) -> Result<(), MachineError>;

    /// Stops the guest. Frames for it go to `to` from now on, under the network epoch `flip`.
    fn pause(&mut self, to: Option<&HostEndpoint>, flip: u64) -> Result<(), MachineError>;

    /// The device state of the paused machine.
    fn save(&mut self) -> Result<Vec<u8>, MachineError>;

    /// Whether a FLUSH was answered before it was durable.
    fn flush_pending(&self) -> bool;

    /// Waits until no FLUSH is pending any more.
    fn wait_flushed(&mut self, limit: Duration) -> Result<(), MachineError>;

    /// The move failed: the guest goes on here, owner at `epoch`; the network leads here under `flip`.
    fn go_on(&mut self, epoch: u64, flip: u64) -> Result<(), MachineError>;
}
