//! Silo: data that moves.
//!
//! A [`device`] is a named byte range made of [`block`]s: a machine's memory, a disk. Silo tracks
//! which blocks change, serves blocks that have not arrived yet, layers a disk over a read-only
//! base, backs it up, moves it while it is in use, and speaks NBD, vhost-user-blk and FUSE to
//! whoever wants to mount it. It knows nothing of machines and of QEMU.
//!
//! This crate has the devices and the `silo` command, and is the one door to the smaller crates,
//! which can be used alone; `docs/silo.md` says how they fit together.

pub use silo_block::{block, device, geometry, hash, io, order, times};
pub use silo_expose as expose;
pub use silo_expose::nbd;
pub use silo_memory as mapped;
pub use silo_memory::machine as memory;
pub use silo_move as moving;
pub use silo_store as store;

pub mod assist;
pub mod disk;
pub mod filter;
pub mod layer;
pub mod source;

mod files;
mod locks;
mod map;
pub mod mapped_group;
mod range;
mod shared_sync;

/// Entry points for a fuzzer: each reads any bytes as what its name says, and must return.
pub mod fuzz {
    /// An overlay's journal.
    pub fn fuzz_journal(bytes: &[u8]) {
        crate::map::fuzz_journal(bytes);
    }

    /// The manifest of a stack.
    pub fn fuzz_manifest(bytes: &[u8]) {
        crate::layer::fuzz_manifest(bytes);
    }

    /// The remembered hash of a base.
    pub fn fuzz_base_cache(bytes: &[u8]) {
        crate::layer::fuzz_cache(bytes);
    }

    /// The manifest of a device of objects.
    pub fn fuzz_object_manifest(bytes: &[u8]) {
        crate::source::fuzz_manifest(bytes);
    }

    /// The mappings of a process, as the kernel lists them.
    pub fn fuzz_maps(bytes: &[u8]) {
        crate::source::fuzz_maps(bytes);
    }

    /// The log of a sparse device.
    pub fn fuzz_sparse(bytes: &[u8]) {
        crate::source::fuzz_sparse(bytes);
    }

    /// A log of a device.
    pub fn fuzz_binlog(bytes: &[u8]) {
        crate::filter::binlog::fuzz_binlog(bytes);
    }

    /// The description of a directory device.
    pub fn fuzz_directory(bytes: &[u8]) {
        crate::source::fuzz_meta(bytes);
    }
}

#[cfg(test)]
mod tests;
