//! Lists of blocks that a peer lacks, as they come in frames.

use super::protocol::DeviceNumber;
use silo::block::{BlockRange, BlockSet};

/// The sets of a group's devices. Lists of a hostile peer cost no more than those, and nothing outside the
/// devices gets in.
#[derive(Debug)]
pub struct Lists {
    sets: Vec<BlockSet>,
    /// Blocks that may still be listed: each once.
    left: u64,
}

impl Lists {
    /// For devices of so many blocks.
    #[must_use]
    pub fn new(blocks: impl IntoIterator<Item = u64>) -> Self {
        let sets: Vec<_> = blocks.into_iter().map(BlockSet::new).collect();
        let left = sets.iter().map(BlockSet::device_blocks).sum();
        Self { sets, left }
    }

    /// Takes a list.
    ///
    /// # Errors
    /// If the peer breaks the rules: the connection is of no use.
    pub fn take(&mut self, device: DeviceNumber, ranges: &[BlockRange]) -> Result<(), String> {
        let set = self
            .sets
            .get_mut(usize::from(device.0))
            .ok_or_else(|| format!("it lists blocks of device number {}", device.0))?;
        for range in ranges {
            if range.end() > set.device_blocks() {
                return Err(format!(
                    "it lists blocks {}..{} of device number {}, which has {}",
                    range.start.0,
                    range.end(),
                    device.0,
                    set.device_blocks()
                ));
            }
            self.left =
                self.left.checked_sub(range.count).ok_or("it lists more blocks than there are")?;
            set.insert_range(*range);
        }
        Ok(())
    }

    /// What was listed, of each device.
    #[must_use]
    pub fn into_sets(self) -> Vec<BlockSet> {
        self.sets
    }
}
