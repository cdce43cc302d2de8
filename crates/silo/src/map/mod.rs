//! An overlay: blocks that are kept apart from what lies below, and the map that says which.
//!
//! Three files, under names that the caller chooses:
//!
//! | file | what |
//! |---|---|
//! | data | the content, sparse, each block at its own place |
//! | [`journal`] | which block is where as of the last flush; survives a crash of the host |
//! | [`runtime`] | which block is where right now; survives the death of this process |
//!
//! Called by [`disk`](crate::disk), which adds a base, arrivals and the life of a disk that moves,
//! and by [`layer`](crate::layer), which stacks several. What they get: a write that was answered
//! survives `kill -9` of this process, one that was flushed survives a crash of the host, and a
//! block changes its state only after the content that the new state promises is in place.

mod error;
mod journal;
mod overlay;
mod runtime;
mod state;

pub(crate) use error::MapError;
pub(crate) use journal::{Journal, JournalHeader, fuzz_journal};
pub(crate) use overlay::{FileNames, Overlay, Shape, Tidy};
pub(crate) use runtime::Runtime;
pub(crate) use state::{AtomicBits, StateMap};

pub use runtime::BootId;
pub use state::{BlockState, DiskStatus};

/// The most blocks that an overlay may have: 1 TiB in blocks of 4 KiB. The maps in memory cost a
/// byte per block.
pub(crate) const MAX_BLOCKS: u64 = 1 << 28;
