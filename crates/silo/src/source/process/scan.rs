//! Which pages of a process changed, found by looking at all of them.

use super::ProcessDevice;
use crate::{
    block::{BLOCK_SIZE, BlockIndex, BlockRange, BlockSet},
    geometry::Geometry,
    io::BlockDevice,
};
use std::io;
use twox_hash::XxHash3_64;

/// Bytes that are read at once.
const STEP: u64 = 1 << 20;

/// Rounds over a process's memory: each compares every page of 4 KiB with its hash of the round
/// before. 8 bytes a page (0.2 %). The hash is seeded at random, so that nobody can make pages that
/// look unchanged; by chance one change in 2^64 is missed.
pub struct ProcessScan {
    geometry: Geometry,
    seed: u64,
    /// `None` before the first round.
    hashes: Option<Vec<u64>>,
}

impl ProcessScan {
    /// For a device. The first round finds every page changed.
    ///
    /// # Errors
    /// If it is too large, or the kernel has no random bytes.
    pub fn new(device: &ProcessDevice) -> io::Result<Self> {
        let geometry = Geometry::new(device.size(), BLOCK_SIZE as u32).map_err(io::Error::other)?;
        let seed = getrandom::u64().map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self { geometry, seed, hashes: None })
    }

    /// Pages that changed since the last round. With the process running this is true of each page
    /// at the moment when it was looked at; what is written later is found by the next round.
    ///
    /// # Errors
    /// If the process ended or unmapped its memory. Then the next round finds at least what this
    /// one would have.
    pub fn round(&mut self, device: &ProcessDevice) -> io::Result<BlockSet> {
        let pages = self.geometry.blocks();
        let mut changed = BlockSet::new(pages);
        let first = self.hashes.is_none();
        let mut fresh = Vec::with_capacity(pages as usize);
        let mut buf = vec![0; STEP as usize];
        for part in BlockRange::new(0, pages).chunks(STEP / BLOCK_SIZE as u64) {
            let bytes = &mut buf[..self.geometry.bytes_of(part) as usize];
            device.read_at(self.geometry.offset(part.start), bytes)?;
            for (page, content) in (part.start.0..).zip(bytes.chunks(BLOCK_SIZE)) {
                let hash = XxHash3_64::oneshot_with_seed(self.seed, content);
                let old = self.hashes.as_ref().map(|hashes| hashes[page as usize]);
                if first || old != Some(hash) {
                    changed.insert(BlockIndex(page));
                }
                fresh.push(hash);
            }
        }
        // Only now: a round that fails forgets nothing.
        self.hashes = Some(fresh);
        Ok(changed)
    }
}
