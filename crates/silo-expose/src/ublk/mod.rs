//! ublk: a device as a block device of this kernel, `/dev/ublkbN`, without a socket in between.
//! The kernel's driver hands requests over by io_uring and copies the data to and from buffers of
//! this process.
//!
//! Who calls it: `silo expose ublk` and `silo serve` start one [`UblkServer`] per device.
//!
//! How a device lives (Documentation/block/ublk.rst of the kernel):
//!
//! ```text
//! add ── describe ── queues take every entry ── start ── served ── stop ── queues end ── delete
//!                                                  │ server dies, with `recover`
//!                       look: quiesced ── take over begins ── queues take … ── take over ends
//! ```
//!
//! What holds:
//! - An entry's buffer is either the driver's or ours, never both: who has it, holds it ([`sys`]).
//! - Requests of a queue run at the same time; one that waits for a block that has not arrived
//!   holds up none of the others. FLUSH and FUA are durable when they are answered.
//! - With [`UblkOptions::recover`] a server may be killed: users of the device wait, and whoever
//!   starts a server with the same number goes on. Requests that were in hand are done once more.
//! - Nothing that comes from the driver makes it panic or leave a buffer.
//!
//! The kernels that this is developed on do not have the driver. What is said to it is tested byte
//! by byte ([`abi`]), what is done for it against real devices ([`request`]), and the life of a
//! server against a driver made for that (`fake`). `scripts/kernel-vm.sh` runs all of it in a
//! virtual machine whose kernel has it.

mod abi;
#[cfg(test)]
mod fake;
mod queue;
mod request;
mod server;
mod sys;
#[cfg(test)]
mod tests;

pub use server::{UblkError, UblkOptions, UblkServer};
