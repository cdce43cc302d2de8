//! Several writers of one device, of which some know better: by block, by version, and for the same
//! version by priority.
//!
//! Where late blocks come from a peer and from a store, the newer version wins whoever brings it,
//! and of one version the more trusted writer. Sessions use the block model itself
//! ([`silo_block`]); this is for whoever fills a device from several places without one.

use crate::{
    block::{BlockIndex, BlockRange},
    geometry::Geometry,
    io::BlockDevice,
    locks::{RangeLocks, Who},
};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Who writes, and what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// Version of the content; higher is newer.
    pub version: u32,
    /// Of the writer; of one version the higher wins.
    pub priority: u8,
}

impl Mark {
    /// 0 is for blocks that nobody wrote.
    fn packed(self) -> u64 {
        u64::from(self.version) << 9 | u64::from(self.priority) << 1 | 1
    }
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Blocks that were written.
    pub written: u64,
    /// Blocks where somebody with a newer version or a higher priority was first.
    pub superseded: u64,
}

/// See the comment of its module.
pub struct Combinator {
    inner: Arc<dyn BlockDevice>,
    geometry: Geometry,
    marks: Box<[AtomicU64]>,
    /// Deciding and writing are one step.
    locks: RangeLocks,
}

impl Combinator {
    /// Over `inner`, in blocks of `block` bytes; nobody has written yet. Takes 8 bytes a block.
    ///
    /// # Errors
    /// If the block size is not possible.
    pub fn new(
        inner: Arc<dyn BlockDevice>,
        block: u32,
    ) -> Result<Self, crate::geometry::GeometryError> {
        let geometry = Geometry::new(inner.size(), block)?;
        let marks = (0..geometry.blocks()).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { inner, geometry, marks, locks: RangeLocks::new(false) })
    }

    /// Writes whole blocks (the last of the device may be short), each if nobody with a newer
    /// version, or a higher priority and the same version, has written it. The same mark again
    /// writes again.
    ///
    /// # Errors
    /// If the bytes are not whole blocks of the device, or writing fails. Blocks of a failed write
    /// count as not written by anybody new.
    pub fn write(&self, start: BlockIndex, mark: Mark, data: &[u8]) -> io::Result<Taken> {
        let offset = self.geometry.offset(start);
        let length = data.len() as u64;
        let range = self.geometry.covered(offset, length);
        if range.start != start || self.geometry.bytes_of(range) != length {
            let text = format!(
                "{length} bytes at {start} are not whole blocks of {} bytes",
                self.geometry.block()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        if range.count == 0 {
            return Ok(Taken { written: 0, superseded: 0 });
        }
        let _guard = self.locks.lock(range, Who::Guest)?;
        let mine = mark.packed();
        let slots = &self.marks[range.start.0 as usize..range.end() as usize];
        let wins = |slot: &AtomicU64| slot.load(Ordering::Relaxed) <= mine;
        let (mut at, mut written) = (range.start.0, 0);
        for run in slots.chunk_by(|a, b| wins(a) == wins(b)) {
            let count = run.len() as u64;
            if wins(&run[0]) {
                let blocks = BlockRange::new(at, count);
                let from = (self.geometry.offset(blocks.start) - offset) as usize;
                let bytes = &data[from..from + self.geometry.bytes_of(blocks) as usize];
                self.inner.write_at(self.geometry.offset(blocks.start), bytes)?;
                run.iter().for_each(|slot| slot.store(mine, Ordering::Relaxed));
                written += count;
            }
            at += count;
        }
        Ok(Taken { written, superseded: range.count - written })
    }

    /// The device, for reading.
    #[must_use]
    pub fn inner(&self) -> &Arc<dyn BlockDevice> {
        &self.inner
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{source::MemoryDevice, tests::random::Random};

    #[test]
    fn the_newest_version_wins_and_then_the_priority_in_any_order_of_arrival() {
        const BLOCKS: u64 = 8;
        let size = BLOCKS * 512 - 100;
        for seed in 0..50 {
            let random = &mut Random(seed);
            let memory = Arc::new(MemoryDevice::new("test", size).unwrap());
            let combinator = Combinator::new(memory, 512).unwrap();
            let mut best: Vec<Option<(Mark, u8)>> = vec![None; BLOCKS as usize];
            for byte in 1..=40u8 {
                let start = random.below(BLOCKS);
                let count = 1 + random.below(BLOCKS - start);
                let version = random.below(4) as u32;
                let mark = Mark { version, priority: random.below(3) as u8 };
                let range = BlockRange::new(start, count);
                let bytes = combinator.geometry.bytes_of(range) as usize;
                let taken = combinator.write(BlockIndex(start), mark, &vec![byte; bytes]).unwrap();
                let mut written = 0;
                for slot in &mut best[start as usize..(start + count) as usize] {
                    if slot.is_none_or(|(old, _)| old <= mark) {
                        *slot = Some((mark, byte));
                        written += 1;
                    }
                }
                assert_eq!(taken, Taken { written, superseded: count - written });
            }
            let mut all = vec![0; size as usize];
            combinator.inner().read_at(0, &mut all).unwrap();
            for (block, want) in all.chunks(512).zip(&best) {
                let want = want.map_or(0, |(_, byte)| byte);
                assert!(block.iter().all(|byte| *byte == want), "seed {seed}");
            }
            assert!(
                combinator
                    .write(BlockIndex(0), Mark { version: 9, priority: 0 }, &[1; 100])
                    .is_err()
            );
        }
    }
}
