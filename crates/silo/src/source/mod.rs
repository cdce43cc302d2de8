//! Sources: what a device's bytes come from in the end.
//!
//! Each is a [`BlockDevice`](crate::io::BlockDevice) of any size in bytes. They keep no more than
//! they must: tracking, caching and copy-on-write are layers over them.
//!
//! | source | bytes lie | never written | durable after flush |
//! |---|---|---|---|
//! | [`MemoryDevice`] | in a memfd | zeros, takes no room | no: memory |
//! | [`FileDevice`] | in one file of the same size | holes | yes |
//! | [`SparseDevice`] | in a log of blocks, in one file | zeros, takes no room | yes |
//! | [`DirectoryDevice`] | in one file for each shard | zeros, no file | yes |
//! | [`ObjectDevice`] | in an object store, one object a block | zeros, no object | yes |
//! | [`ProcessDevice`] | in the memory of a process that runs | – | no: memory |

mod directory;
mod error;
mod file;
mod memory;
mod object;
mod process;
mod sparse;
mod sys;

pub use directory::DirectoryDevice;
pub use error::SourceError;
pub use file::{FileDevice, FileMode};
pub use memory::MemoryDevice;
pub use object::ObjectDevice;
pub use process::{MapChoice, Mapping, ProcessDevice, ProcessMode, ProcessScan, Stopped};
pub use sparse::SparseDevice;

pub(crate) use directory::fuzz_meta;
pub(crate) use object::fuzz_manifest;
pub(crate) use process::fuzz_maps;
pub(crate) use sparse::fuzz_sparse;

#[cfg(test)]
pub(crate) mod tests;
