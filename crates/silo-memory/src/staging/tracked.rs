//! Memories that can be staged: a machine's, and a mount's.

use crate::{machine::Memory, mount::Mount};
use silo_block::{
    block::{BlockRange, BlockSet},
    device::Device,
};
use std::{io, time::Duration};

/// How long content that is elsewhere may take to come for a backup.
const PAGER: Duration = Duration::from_secs(30);

/// Mapped memory that knows what was written to it. One at a time asks it.
pub trait Tracked: Send + Sync {
    /// Size in blocks of 4 KiB.
    fn blocks(&self) -> u64;

    /// Every write from now on is seen by a later [`Tracked::take_written`].
    ///
    /// # Errors
    /// If the kernel cannot track.
    fn start_tracking(&self) -> io::Result<()>;

    /// What was written since tracking started or since the last call.
    ///
    /// # Errors
    /// If the kernel cannot tell; nothing is lost then.
    fn take_written(&self) -> io::Result<BlockSet>;

    /// The blocks that may be anything but zeros, if that can be told: the rest need not be read when all
    /// of it is wanted. Asked once writes are tracked.
    ///
    /// # Errors
    /// If it could be told and was not.
    fn populated(&self) -> io::Result<Option<BlockSet>> {
        Ok(None)
    }

    /// Reads whole blocks; content that is elsewhere comes here first, the way a fault brings it.
    ///
    /// # Errors
    /// If it cannot be had.
    fn read_present(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()>;
}

impl Tracked for Memory {
    fn blocks(&self) -> u64 {
        Device::blocks(self)
    }

    fn start_tracking(&self) -> io::Result<()> {
        Device::start_tracking(self).map_err(io::Error::other)
    }

    fn take_written(&self) -> io::Result<BlockSet> {
        self.take_dirty().map_err(io::Error::other)
    }

    fn read_present(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        self.bring(range, PAGER).map_err(io::Error::other)?;
        self.read(range.start, buf).map_err(io::Error::other)
    }
}

impl Tracked for Mount {
    fn blocks(&self) -> u64 {
        self.block_count()
    }

    fn start_tracking(&self) -> io::Result<()> {
        self.note_changes()
    }

    fn take_written(&self) -> io::Result<BlockSet> {
        self.take_changes()
    }

    fn read_present(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        self.read_blocks(range, buf)
    }
}
