//! vhost-user-blk: a disk in another process for QEMU and other monitors, without a copy through a
//! socket. The monitor shares the guest's memory, we read requests from the guest's own rings and
//! move the data straight between a file and the guest's pages where the device allows it.
//!
//! Who calls it: the runner, or `silo expose`, starts one [`VhostServer`] per disk; the benchmark
//! and the tests drive it by [`client`].
//!
//! What holds:
//! - Features: FLUSH, DISCARD, WRITE_ZEROES, read-only, several queues, indirect descriptors, event
//!   indices; a driver without FLUSH gets each write made durable.
//! - Requests of a queue run at the same time; one that waits for a block that has not arrived, or
//!   for a page of the guest that is absent, holds up none of the others.
//! - Requests in hand are recorded in memory that the front end keeps (`INFLIGHT_SHMFD`). After
//!   `kill -9` and a new start on the same path, a front end that connects again (QEMU's
//!   `reconnect`) has them run once more, in their order; the guest sees a pause, no error.
//! - So does one that lost its server while its machine stood still, which connects again and takes
//!   the new server for the old one: QEMU cannot do better. See [`VhostServer::is_mistaken`].
//! - Where it is asked for ([`VhostOptions::put_back_after`]), a front end can stop its rings while
//!   requests wait for room: they are put back into the ring, and done by whoever starts it next.
//! - [`VhostServer::resize`] tells the guest of a new size while it runs.
//! - Every guest page is made present through [`GuestPages`] before it is touched, and every write
//!   is reported to it and to QEMU's own dirty log: post-copy, onward moves and QEMU's `migrate`
//!   work with it.
//! - Nothing that a guest or a front end sends makes it panic, touch memory that was not shared, or
//!   allocate more than a few megabytes. A chain of descriptors against the rules stops its queue.
//!   What cannot be held off is a front end that shrinks the file of its memory later: that is
//!   SIGBUS here, as it is in the front end.

pub mod client;
mod config;
mod fuzz;
mod heir;
#[cfg(test)]
mod heir_tests;
mod inflight;
mod memory;
mod pages;
#[cfg(test)]
mod pages_tests;
#[cfg(test)]
mod put_back_tests;
mod queue;
mod request;
mod ring;
mod server;
mod session;
mod sys;
#[cfg(test)]
mod tests;

pub use pages::{GuestPages, GuestRange, MemoryId};
pub use server::{VhostError, VhostOptions, VhostServer};

/// For fuzzing: a record of requests in hand that is any bytes.
#[doc(hidden)]
pub fn fuzz_inflight(bytes: &[u8]) {
    inflight::fuzz(bytes);
}

/// For fuzzing: guest memory that is any bytes, with a ring in it.
#[doc(hidden)]
pub fn fuzz_chains(bytes: &[u8]) {
    fuzz::chains(bytes);
}
