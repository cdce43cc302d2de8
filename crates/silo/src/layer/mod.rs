//! Layers: a device that is written here and lies over one that is not.
//!
//! A [`Stack`] is a folder with overlays, the lowest over a shared base, each over the one below:
//!
//! ```text
//!   stack.json     size, block size, the base's identity, which layers, in order
//!   9.data 9.journal 9.runtime     the top: all writes go here
//!   7.data 7.journal 7.runtime     frozen by a backup; merged down when that is done
//!   ( base )                       any device, shared, read-only, verified by its BLAKE3 root
//! ```
//!
//! Who calls it: the `silo` command and front ends through
//! [`BlockDevice`](crate::io::BlockDevice), backups through [`StackGroup`].
//!
//! # What holds
//!
//! - A write that was answered survives `kill -9`; one that was flushed survives a crash of the
//!   host that tears and reorders everything else. After a crash each sector holds what it held at
//!   the last flush, or something written since.
//! - A frozen layer never changes for who looks at it: a [`View`] is the device at one instant.
//! - A push takes constant time: the new layer was made before, and only the top is exchanged
//!   while writers wait. Writers are held until writes under way have ended, no longer.
//! - A merge can end at any point, by an error or a crash, and nothing changes: what is copied down
//!   is hidden by the layer that it comes from until that layer is taken off the list, durably.
//! - A base is trusted when its root hash is the one that the stack was made over ([`Base`]).
//! - Block sizes of the stack, of its base and of whoever moves it have nothing to do with each
//!   other.

mod base;
mod capture;
mod content;
mod error;
mod freeze;
mod manifest;
mod stack;

#[cfg(test)]
mod tests;

pub use base::{Base, CACHE_SUFFIX};
pub use capture::StackGroup;
pub(crate) use capture::fullest;
pub use error::LayerError;
pub use freeze::View;
pub use manifest::StackInfo;
pub use stack::{Stack, StackOptions};

pub(crate) use base::fuzz_cache;
pub(crate) use manifest::fuzz_manifest;
