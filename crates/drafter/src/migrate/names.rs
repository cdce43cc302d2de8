//! What a destination has already, found out by name.
//!
//! A destination may have content that could be the machine's: of an attempt that came to nothing, of an
//! earlier stay, or of what a store has of the machine. It cannot know which of that is right. So before the
//! first round the source names every block that it would send, and the destination says which it lacks:
//!
//! ```text
//!   Names …, RoundEnd(n) ──▶  compares each name with its own block
//!                        ◀──  Missing lists, RoundApplied(n)
//! ```
//!
//! A name is the block's BLAKE3 hash: 32 bytes for 4096. What must hold:
//!
//! - The source watches writes before it reads the first block that it names, so that whatever is written
//!   after that is sent by a later round.
//! - What the destination has in blocks that the source does not name is asked for, too: there the machine
//!   has what an untouched destination starts with.
//! - Nothing is written by a comparison; what was compared stays as it is until blocks overwrite it.

use super::protocol::{DeviceNumber, NAME_BYTES};
use silo::{
    block::{BLOCK_SIZE, BlockIndex, BlockRange, BlockSet},
    device::{Device, DeviceError},
};
use std::sync::Arc;

/// Blocks that are named by one frame: 1 MiB of content, 8 KiB of names.
pub(super) const RUN: u64 = 256;

/// What a block is called.
fn name(block: &[u8]) -> [u8; NAME_BYTES] {
    *blake3::hash(block).as_bytes()
}

/// Names the blocks of `range`, which is at most [`RUN`] long; `buffer` is used for their content.
///
/// # Errors
/// If one of them cannot be read.
pub(super) fn names_of(
    device: &dyn Device,
    range: BlockRange,
    buffer: &mut Vec<u8>,
) -> Result<Vec<u8>, DeviceError> {
    debug_assert!(range.count <= RUN);
    buffer.resize(range.bytes() as usize, 0);
    device.read(range.start, buffer)?;
    Ok(buffer.chunks(BLOCK_SIZE).flat_map(name).collect())
}

/// The destination's side: compares its blocks with names.
pub(super) struct Comparison {
    devices: Vec<Arc<dyn Device>>,
    named: Vec<BlockSet>,
    lacking: Vec<BlockSet>,
    buffer: Vec<u8>,
}

impl Comparison {
    /// Nothing was named yet.
    pub(super) fn new(devices: &[Arc<dyn Device>]) -> Self {
        let none: Vec<_> = devices.iter().map(|device| BlockSet::new(device.blocks())).collect();
        Self { devices: devices.to_vec(), named: none.clone(), lacking: none, buffer: Vec::new() }
    }

    /// Takes the names of blocks from `start` on.
    ///
    /// # Errors
    /// If there are no such blocks, or one cannot be read.
    pub(super) fn take(
        &mut self,
        number: DeviceNumber,
        start: BlockIndex,
        names: &[u8],
    ) -> Result<(), String> {
        let at = usize::from(number.0);
        let range = BlockRange::new(start.0, (names.len() / NAME_BYTES) as u64);
        let device =
            self.devices.get(at).filter(|device| range.end() <= device.blocks()).ok_or_else(
                || {
                    format!(
                        "the source names blocks {}..{} of device number {}, which are not there",
                        range.start.0,
                        range.end(),
                        number.0
                    )
                },
            )?;
        self.named[at].insert_range(range);
        for (piece, names) in range.chunks(RUN).zip(names.chunks(RUN as usize * NAME_BYTES)) {
            self.buffer.resize(piece.bytes() as usize, 0);
            device.read(piece.start, &mut self.buffer).map_err(|error| error.to_string())?;
            let blocks = self.buffer.chunks(BLOCK_SIZE).zip(names.chunks(NAME_BYTES));
            for ((block, wanted), number) in blocks.zip(piece.start.0..) {
                if name(block) != wanted {
                    self.lacking[at].insert(BlockIndex(number));
                }
            }
        }
        Ok(())
    }

    /// All was named: what the source is to send, of each device.
    ///
    /// # Errors
    /// If a device does not say what it has.
    pub(super) fn lacking(self) -> Result<Vec<BlockSet>, DeviceError> {
        let Self { devices, named, mut lacking, .. } = self;
        for ((device, named), lacking) in devices.iter().zip(&named).zip(&mut lacking) {
            let mut others = device.allocated()?;
            others.subtract(named);
            lacking.union_with(&others);
        }
        Ok(lacking)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use silo::{
        device::DeviceName,
        disk::{Disk, DiskOptions},
        memory::Memory,
    };
    use std::{fs, path::Path};

    const BLOCKS: u64 = 1000;

    fn memory() -> Arc<Memory> {
        let name = DeviceName::new("memory").unwrap();
        Arc::new(Memory::new(name, BLOCKS * BLOCK_SIZE as u64).unwrap())
    }

    /// A disk over a base of so many blocks, each full of nines.
    fn disk(folder: &Path, base: u64) -> Arc<Disk> {
        fs::create_dir_all(folder).unwrap();
        let path = folder.join("base");
        fs::write(&path, vec![9; base as usize * BLOCK_SIZE]).unwrap();
        let options = DiskOptions::new(DeviceName::new("root").unwrap());
        let size = BLOCKS * BLOCK_SIZE as u64;
        Arc::new(Disk::create(&folder.join("disk"), Some(&path), size, &options).unwrap())
    }

    fn put(device: &dyn Device, blocks: impl IntoIterator<Item = u64>, content: u8) {
        for block in blocks {
            device.store(BlockIndex(block), &[content; BLOCK_SIZE]).unwrap();
        }
    }

    fn set(blocks: impl IntoIterator<Item = u64>) -> BlockSet {
        let mut set = BlockSet::new(BLOCKS);
        blocks.into_iter().for_each(|block| {
            set.insert(BlockIndex(block));
        });
        set
    }

    /// Names all that the source has, and takes what is lacking; then both are the same, block by block.
    fn mended(source: &[Arc<dyn Device>], here: &[Arc<dyn Device>]) -> Vec<BlockSet> {
        let mut comparison = Comparison::new(here);
        let mut buffer = Vec::new();
        for (at, device) in source.iter().enumerate() {
            for range in device.allocated().unwrap().ranges() {
                for piece in range.chunks(RUN) {
                    let names = names_of(&**device, piece, &mut buffer).unwrap();
                    comparison.take(DeviceNumber(at as u8), piece.start, &names).unwrap();
                }
            }
        }
        let lacking = comparison.lacking().unwrap();
        let mut block = [0; BLOCK_SIZE];
        for ((source, here), lacking) in source.iter().zip(here).zip(&lacking) {
            for range in lacking.ranges() {
                for at in range.start.0..range.end() {
                    source.read(BlockIndex(at), &mut block).unwrap();
                    here.store(BlockIndex(at), &block).unwrap();
                }
            }
            let mut other = [0; BLOCK_SIZE];
            for at in 0..BLOCKS {
                source.read(BlockIndex(at), &mut block).unwrap();
                here.read(BlockIndex(at), &mut other).unwrap();
                assert!(block == other, "block {at} of {}", source.name());
            }
        }
        lacking
    }

    #[test]
    fn what_is_the_same_is_not_asked_for_and_all_else_is_also_what_the_source_does_not_have() {
        let folder = tempfile::tempdir().unwrap();
        let (source, here) = (memory(), memory());
        put(&*source, 0..600, 1);
        put(&*here, 0..600, 1);
        put(&*source, 10..12, 2);
        // Zeros with a name, a block that only the source has, one that only the destination has.
        put(&*source, [20, 700], 0);
        put(&*source, [710], 7);
        put(&*here, [720, 999], 3);
        let disks = [disk(&folder.path().join("a"), 500), disk(&folder.path().join("b"), 500)];
        disks.iter().for_each(|disk| disk.begin().unwrap());
        put(&*disks[0], 100..110, 5);
        put(&*disks[1], 100..110, 5);
        put(&*disks[0], [490], 9); // as its base
        put(&*disks[1], [300], 6); // where the source has its base
        disks[0].store_zero(BlockRange::new(400, 3)).unwrap();
        let [one, other] = disks;
        let lacking = mended(&[source, one], &[here, other]);
        assert_eq!(lacking[0], set([10, 11, 20, 710, 720, 999]));
        assert_eq!(lacking[1], set([300, 400, 401, 402]));
    }

    #[test]
    fn names_of_blocks_that_are_not_there_are_refused() {
        let devices: [Arc<dyn Device>; 1] = [memory()];
        let mut comparison = Comparison::new(&devices);
        let two = [0; 2 * NAME_BYTES];
        for (number, start) in [(0, BLOCKS - 1), (0, BLOCKS), (1, 0), (255, u64::MAX - 2)] {
            let why = comparison.take(DeviceNumber(number), BlockIndex(start), &two).unwrap_err();
            assert!(why.contains("which are not there"), "{why}");
        }
        comparison.take(DeviceNumber(0), BlockIndex(BLOCKS - 2), &two).unwrap();
        assert_eq!(comparison.lacking().unwrap()[0], set([BLOCKS - 2, BLOCKS - 1]));
    }
}
