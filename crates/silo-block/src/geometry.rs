//! How a device of any size is cut into blocks of any size.
//!
//! Machines use 4 KiB blocks throughout ([`block`](crate::block)); everything else in silo takes a
//! [`Geometry`]. Block numbers are the same [`BlockIndex`], counted in blocks of the geometry.

use crate::block::{BlockIndex, BlockRange};
use std::fmt;

/// Why a size or a block size is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Not a power of two in [`Geometry::MIN_BLOCK`]..=[`Geometry::MAX_BLOCK`].
    #[error("a block of {0} bytes; blocks are a power of two from 512 bytes to 16 MiB")]
    Block(u64),
    /// More blocks than can be counted.
    #[error(
        "a device of {bytes} bytes in blocks of {block} has more than 2^32 blocks; take larger blocks"
    )]
    Size {
        /// Size of the device.
        bytes: u64,
        /// Size of a block.
        block: u32,
    },
}

/// Size of a device and of its blocks. The last block may be short; a device may be empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    bytes: u64,
    shift: u32,
}

impl Geometry {
    /// Smallest block, in bytes.
    pub const MIN_BLOCK: u32 = 512;
    /// Largest block, in bytes.
    pub const MAX_BLOCK: u32 = 16 << 20;

    /// A device of `bytes` bytes in blocks of `block` bytes.
    ///
    /// # Errors
    /// If the block size is not a power of two in range, or there would be too many blocks.
    pub const fn new(bytes: u64, block: u32) -> Result<Self, GeometryError> {
        if !block.is_power_of_two() || block < Self::MIN_BLOCK || block > Self::MAX_BLOCK {
            return Err(GeometryError::Block(block as u64));
        }
        let geometry = Self { bytes, shift: block.trailing_zeros() };
        if geometry.blocks() > u32::MAX as u64 {
            return Err(GeometryError::Size { bytes, block });
        }
        Ok(geometry)
    }

    /// Size of the device in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// Size of a block in bytes.
    #[must_use]
    pub const fn block(self) -> u64 {
        1 << self.shift
    }

    /// How many blocks, the short one included.
    #[must_use]
    pub const fn blocks(self) -> u64 {
        self.bytes.div_ceil(self.block())
    }

    /// The block that holds byte `offset`.
    #[must_use]
    pub const fn containing(self, offset: u64) -> BlockIndex {
        BlockIndex(offset >> self.shift)
    }

    /// Where a block starts, in bytes.
    #[must_use]
    pub const fn offset(self, block: BlockIndex) -> u64 {
        block.0 << self.shift
    }

    /// Length of one block in bytes: shorter for the last, 0 past the end.
    #[must_use]
    pub const fn length(self, block: BlockIndex) -> u64 {
        let left = self.bytes.saturating_sub(self.offset(block));
        if left < self.block() { left } else { self.block() }
    }

    /// Bytes that `range` covers, cut at the end of the device.
    #[must_use]
    pub fn bytes_of(self, range: BlockRange) -> u64 {
        let end = (range.end() << self.shift).min(self.bytes);
        end.saturating_sub(self.offset(range.start))
    }

    /// The blocks that bytes `offset..offset + length` touch, cut at the end of the device.
    #[must_use]
    pub fn touched(self, offset: u64, length: u64) -> BlockRange {
        let end = offset.saturating_add(length).min(self.bytes);
        if offset >= end {
            return BlockRange::new(offset.min(self.bytes) >> self.shift, 0);
        }
        let first = offset >> self.shift;
        BlockRange::new(first, ((end - 1) >> self.shift) + 1 - first)
    }

    /// The blocks that bytes `offset..offset + length` cover whole (the short last block counts as
    /// whole when its end is reached).
    #[must_use]
    pub fn covered(self, offset: u64, length: u64) -> BlockRange {
        let end = offset.saturating_add(length).min(self.bytes);
        let first = offset.div_ceil(self.block());
        let last = if end == self.bytes { self.blocks() } else { end >> self.shift };
        BlockRange::new(first, last.saturating_sub(first))
    }
}

impl fmt::Debug for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Geometry({} bytes in blocks of {})", self.bytes, self.block())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn touched_and_covered_agree_with_counting_bytes(
            bytes in 0u64..9000, shift in 9u32..13, offset in 0u64..10_000, length in 0u64..10_000,
        ) {
            let geometry = Geometry::new(bytes, 1 << shift).unwrap();
            let end = offset.saturating_add(length).min(bytes);
            let inside = |b: u64| (b >= offset) && (b < end);
            let touched: Vec<u64> = (0..geometry.blocks()).filter(|b| {
                let start = b << shift;
                (start..start + geometry.length(BlockIndex(*b))).any(inside)
            }).collect();
            let covered: Vec<u64> = (0..geometry.blocks()).filter(|b| {
                let start = b << shift;
                (start..start + geometry.length(BlockIndex(*b))).all(inside)
            }).collect();
            let listed = |r: BlockRange| (r.start.0..r.end()).collect::<Vec<_>>();
            prop_assert_eq!(listed(geometry.touched(offset, length)), touched);
            prop_assert_eq!(listed(geometry.covered(offset, length)), covered);
        }
    }

    #[test]
    fn odd_block_sizes_and_too_many_blocks_are_refused() {
        for block in [0, 1, 511, 513, 4095, 32 << 20] {
            assert_eq!(Geometry::new(1, block), Err(GeometryError::Block(u64::from(block))));
        }
        assert!(Geometry::new(1 << 42, 512).is_err());
        assert!(Geometry::new(1 << 43, 4096).is_ok());
    }
}
