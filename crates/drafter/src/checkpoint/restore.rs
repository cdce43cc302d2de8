//! A generation's content into memory and disks that no machine uses yet.
//!
//! Silo's restore writes whole devices, on several threads, and compares the root of what it wrote
//! with what was backed up. These targets let it write into what a machine is made of: memory that is
//! fresh, so that zeros need no writing, and disks over their package's base, of which only the blocks
//! that differ go into the overlay.

use silo::{
    block::{BLOCK_SIZE, BlockIndex, BlockRange, is_zero},
    device::{Device, DeviceError},
    disk::Disk,
    io::BlockDevice,
    memory::Memory,
};
use std::{io, sync::Arc};

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Blocks of a base that are looked at by one read.
const LOOK: u64 = 64;

fn refused() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "what is being restored is only written")
}

/// Whole blocks; a store's blocks of 4 KiB are.
pub(super) fn whole(offset: u64, length: u64) -> io::Result<BlockRange> {
    if offset.is_multiple_of(BLOCK) && length.is_multiple_of(BLOCK) {
        return Ok(BlockRange::new(offset / BLOCK, length / BLOCK));
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{length} bytes at {offset} are not whole blocks of {BLOCK_SIZE} bytes"),
    ))
}

fn device_error(error: DeviceError) -> io::Error {
    io::Error::other(error)
}

/// Fresh memory that is filled.
pub struct MemoryTarget(pub Arc<Memory>);

impl BlockDevice for MemoryTarget {
    fn size(&self) -> u64 {
        self.0.blocks() * BLOCK
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(refused())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = whole(offset, data.len() as u64)?;
        self.0.store(range.start, data).map_err(device_error)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.0.store_zero(whole(offset, length)?).map_err(device_error)
    }
}

/// A new disk over its base that is filled.
pub struct DiskTarget(pub Arc<Disk>);

impl DiskTarget {
    /// Calls `put` for the runs of blocks of `range` whose present content is not what `same` wants of
    /// it, which gets a block's place in the range.
    fn differing(
        &self,
        range: BlockRange,
        same: impl Fn(usize, &[u8]) -> bool,
        put: impl Fn(BlockRange) -> Result<(), DeviceError>,
    ) -> io::Result<()> {
        let mut here = vec![0; BLOCK_SIZE * LOOK.min(range.count) as usize];
        for piece in range.chunks(LOOK) {
            let here = &mut here[..piece.bytes() as usize];
            self.0.read(piece.start, here).map_err(device_error)?;
            let mut run = BlockRange::new(piece.start.0, 0);
            for (at, block) in here.chunks(BLOCK_SIZE).enumerate() {
                let number = piece.start.0 + at as u64;
                if !same((number - range.start.0) as usize, block) {
                    if run.count == 0 {
                        run.start = BlockIndex(number);
                    }
                    run.count += 1;
                } else if run.count > 0 {
                    put(run).map_err(device_error)?;
                    run.count = 0;
                }
            }
            if run.count > 0 {
                put(run).map_err(device_error)?;
            }
        }
        Ok(())
    }
}

impl BlockDevice for DiskTarget {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(refused())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = whole(offset, data.len() as u64)?;
        let wanted = |at: usize| &data[at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE];
        self.differing(
            range,
            |at, here| here == wanted(at),
            |run| {
                let from = (run.start.0 - range.start.0) as usize * BLOCK_SIZE;
                self.0.store(run.start, &data[from..from + run.bytes() as usize])
            },
        )
    }

    /// The machine's start makes it durable, when all has come.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.differing(
            whole(offset, length)?,
            |_, here| is_zero(here),
            |run| self.0.store_zero(run),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use silo::{device::DeviceName, disk::DiskOptions};
    use std::{fs, path::Path};

    const BLOCKS: usize = 300;

    /// Block `at` of an image: zeros, or the block's number in every byte.
    fn image(zeros: impl Fn(usize) -> bool, add: u8) -> Vec<u8> {
        (0..BLOCKS)
            .flat_map(|at| {
                [if zeros(at) { 0 } else { (at as u8).wrapping_add(add) | 1 }; BLOCK_SIZE]
            })
            .collect()
    }

    fn disk(folder: &Path, base: &[u8]) -> Arc<Disk> {
        let path = folder.join("base");
        fs::write(&path, base).unwrap();
        let options = DiskOptions::new(DeviceName::new("root").unwrap());
        let bytes = (BLOCKS * BLOCK_SIZE) as u64;
        Arc::new(Disk::create(&folder.join("disk"), Some(&path), bytes, &options).unwrap())
    }

    #[test]
    fn a_disk_is_what_was_restored_and_its_overlay_holds_only_what_the_base_has_not() {
        let folder = tempfile::tempdir().unwrap();
        let base = image(|at| at % 5 == 0, 0);
        let disk = disk(folder.path(), &base[..200 * BLOCK_SIZE]);
        // Blocks 50 to 59 differ, 60 to 69 are zeros now, the rest is the base's (none behind 200).
        let mut wanted = base.clone();
        wanted[50 * BLOCK_SIZE..60 * BLOCK_SIZE].fill(0xee);
        wanted[60 * BLOCK_SIZE..70 * BLOCK_SIZE].fill(0);
        wanted[200 * BLOCK_SIZE..].fill(0);
        wanted[250 * BLOCK_SIZE..251 * BLOCK_SIZE].fill(0xdd);
        let target = DiskTarget(disk.clone());
        for (at, piece) in wanted.chunks(96 * BLOCK_SIZE).enumerate() {
            let offset = (at * 96 * BLOCK_SIZE) as u64;
            if is_zero(piece) {
                target.zero(offset, piece.len() as u64, false).unwrap();
            } else {
                target.write_at(offset, piece).unwrap();
            }
        }
        target.zero(60 * BLOCK, 10 * BLOCK, false).unwrap();
        let mut read = vec![0; wanted.len()];
        disk.read(BlockIndex(0), &mut read).unwrap();
        assert!(read == wanted);
        let kept: Vec<_> =
            disk.allocated().unwrap().ranges().map(|r| (r.start.0, r.count)).collect();
        // 60 and 65 are zeros in the base, too.
        assert_eq!(kept, [(50, 10), (61, 4), (66, 4), (250, 1)]);
    }

    #[test]
    fn memory_holds_what_was_restored_and_no_page_of_zeros() {
        let memory = Memory::new(DeviceName::new("memory").unwrap(), 64 * BLOCK).unwrap();
        let target = MemoryTarget(Arc::new(memory));
        target.write_at(3 * BLOCK, &[7; 2 * BLOCK_SIZE]).unwrap();
        target.zero(4 * BLOCK, BLOCK, false).unwrap();
        assert_eq!(target.0.allocated().unwrap().len(), 1);
        assert!(target.write_at(1, &[0; BLOCK_SIZE]).is_err(), "no whole block");
        assert!(target.read_at(0, &mut [0; 8]).is_err());
    }
}
