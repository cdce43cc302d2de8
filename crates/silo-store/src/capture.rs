//! What the backup asks of a group of devices: stop at one instant, say what changed, let the
//! content of that instant be read while writing goes on.
//!
//! Implemented by `CopyBeforeWrite` for devices that silo serves, by
//! disks that push an overlay, and by memory that is copied to a staging area in rounds. Called by
//! the backup engine from one thread; `read` also from several at once.
//!
//! What must hold:
//! - All devices of the group freeze at one instant: if a write was acknowledged before another
//!   was issued, on whichever devices, then the frozen content has the first or lacks the second.
//! - Each write is in exactly one round: what a [`Frozen`] does not list as changed is equal to
//!   the content of the last frozen round that was released.
//! - A round that was not released counts as never taken: its changes are listed again.

use silo_block::{
    block::{BlockRange, BlockSet},
    geometry::Geometry,
    times::Histogram,
};
use std::{io, time::Duration};

/// One device of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name, unique in the group: 1 to 64 characters of `a-z A-Z 0-9 . _ -`.
    pub name: String,
    /// Size, and the blocks that it is tracked and stored in.
    pub geometry: Geometry,
}

/// How much was written since the last round that was released.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Changed blocks in all devices together.
    pub blocks: u64,
    /// Changed blocks in the group of blocks that has most of them.
    pub fullest: u64,
}

/// Which blocks a round is to list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Those written since the last round that was released; all, if there was none yet.
    Changed,
    /// All: the store does not know this content, or not surely.
    Everything,
}

/// A group that could not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The round before has been neither released nor put back.
    #[error("the device group is frozen already; one backup at a time can run")]
    Frozen,
    /// A device did what it should not.
    #[error("device \"{device}\": could not {operation} for a backup: {source}")]
    Device {
        /// The device.
        device: String,
        /// What was attempted, as a verb.
        operation: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// A group of devices that can be backed up.
pub trait Capture: Send + Sync {
    /// The devices, always the same and in the same order.
    fn devices(&self) -> Vec<DeviceInfo>;

    /// How much a round taken now would list; a group is `1 << group_shift` neighbouring blocks.
    /// Cheap: called every check period.
    fn changes(&self, group_shift: u32) -> Changes;

    /// Freezes all devices at one instant, in constant time.
    ///
    /// # Errors
    /// If a round is under way, or a device cannot be frozen; then nothing is.
    fn freeze(&self, want: Want) -> Result<Box<dyn Frozen>, CaptureError>;

    /// How long writers were held by the rounds so far, each that was; where that is not known, how
    /// long each freeze held all of them.
    fn holds(&self) -> Histogram;
}

/// The content of a group at one instant. Dropping it without [`Frozen::release`] is
/// [`Frozen::put_back`].
pub trait Frozen: Send + Sync {
    /// The blocks of a device that this round has to store.
    fn changed(&self, device: usize) -> &BlockSet;

    /// Blocks of which it is known that they are zeros: those are not read.
    fn zeros(&self, _device: usize) -> Option<&BlockSet> {
        None
    }

    /// Listed blocks that whoever starts from this generation will read first, in that order: they are
    /// stored together, also where their content is stored already.
    fn early(&self, _device: usize) -> &[BlockRange] {
        &[]
    }

    /// Reads blocks that [`Frozen::changed`] lists, as they were at the instant; `buf` is as long
    /// as the range (shorter if the device's last block is). Each block is read at most once, those of
    /// [`Frozen::early`] once more.
    ///
    /// # Errors
    /// If the content cannot be had any more; the round is then to be put back.
    fn read(&self, device: usize, range: BlockRange, buf: &mut [u8]) -> io::Result<()>;

    /// The longest time that a writer was held by this round so far.
    fn held(&self) -> Duration;

    /// Everything is durable in the store: forget the round.
    fn release(self: Box<Self>);

    /// The round was not stored: its changes count as not backed up again.
    fn put_back(self: Box<Self>);
}
