//! Silo: data that moves.
//!
//! A [`device`] is a named byte range made of [`block`]s: a machine's memory, a disk. Silo tracks
//! which blocks change, serves blocks that have not arrived yet, layers a disk over a read-only
//! base, and speaks NBD to whoever wants to mount it. It knows nothing of machines, of QEMU, or of
//! how blocks travel between hosts: the `drafter` crate above it moves them.

pub mod block;
pub mod device;
pub mod disk;
pub mod hash;
pub mod memory;
pub mod nbd;
