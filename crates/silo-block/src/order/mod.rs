//! Which block goes next: demand before prefetch before dirty before bulk, and within the last two
//! the least volatile first, because a block that is about to be written again is sent in vain.
//!
//! Called by the two ends of a move ([`session`](crate::session)) and by backups. What must hold:
//! the next block is found in constant time whatever the size of the device; a block is in at most
//! one class and is given once; a removed block is never given.
//!
//! - [`Order`]: one device's queue. [`Heat`]: how often its chunks are written, decaying.
//! - [`Fair`]: whose turn it is in a group.
//! - [`FirstTouch`], [`Manifest`](touch::Manifest): the recorded order of first use.
//! - [`Prefetch`]: what faults say about the blocks to come.

mod fair;
mod heat;
mod prefetch;
mod queue;
#[cfg(test)]
mod tests;
pub mod touch;

pub use fair::Fair;
pub use heat::Heat;
pub use prefetch::Prefetch;
pub use queue::Order;
pub use touch::FirstTouch;

/// Why a block is sent, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Somebody waits for it.
    Demand,
    /// Somebody will probably need it soon.
    Prefetch,
    /// It was sent before and has been written since.
    Dirty,
    /// It was never sent.
    Bulk,
}

impl Class {
    /// All, most urgent first.
    pub const ALL: [Self; 4] = [Self::Demand, Self::Prefetch, Self::Dirty, Self::Bulk];
}
