//! What the whole of a device is at one generation, in 32 bytes: its root.
//!
//! ```text
//! root = BLAKE3("silo-store root 1" | size | block size | sum)
//! sum  = over all blocks that are not zeros, of a mix of their number and of 32 bits of their name
//! ```
//! Names are the tenant's (BLAKE3 of the content under its name key), so a root does not depend on
//! where blocks lie, and is equal for equal content of one tenant. It is a sum so that a round which
//! changes little costs little: the writer keeps 4 bytes a block to take out what was there.
//!
//! It finds mistakes: a map, an entry or their reader that puts a block where it does not belong,
//! which every other check lets pass. What somebody changed is found by seals and names, not by this.

use crate::{format::map::LEAF_BLOCKS, keys::BlockName};
use silo_block::geometry::Geometry;

/// Hash of a device.
pub(crate) type Root = [u8; 32];

/// 32 bits of a name; 0 is that of zeros.
pub(crate) fn tag(name: &BlockName) -> u32 {
    let [a, b, c, d, ..] = name.0;
    u32::from_le_bytes([a, b, c, d])
}

/// The finalizer of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A sum over blocks, in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum([u64; 2]);

impl Sum {
    fn of(block: u64, tag: u32) -> Self {
        if tag == 0 {
            return Self::default();
        }
        let both = block << 32 | u64::from(tag);
        Self([mix(both), mix(both ^ 0x9e37_79b9_7f4a_7c15)])
    }

    /// Adds a block.
    pub(crate) fn add(&mut self, block: u64, tag: u32) {
        self.merge(Self::of(block, tag));
    }

    /// Adds all that another has.
    pub(crate) fn merge(&mut self, other: Self) {
        self.0 = [0, 1].map(|lane| self.0[lane].wrapping_add(other.0[lane]));
    }

    fn remove(&mut self, block: u64, tag: u32) {
        let other = Self::of(block, tag);
        self.0 = [0, 1].map(|lane| self.0[lane].wrapping_sub(other.0[lane]));
    }

    /// The root of a device with these blocks.
    pub(crate) fn root(&self, geometry: Geometry) -> Root {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"silo-store root 1");
        for number in [geometry.bytes(), geometry.block(), self.0[0], self.0[1]] {
            hasher.update(&number.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }
}

/// What a writer has read of each block of a device, and their sum. 4 bytes a block, in leaves that are
/// only there once something is in them.
///
/// Blocks of a round that failed are listed again by the next, so what was noted of them is replaced
/// before it counts.
pub(crate) struct Tags {
    leaves: Vec<Option<Box<[u32]>>>,
    sum: Sum,
    /// Every block was read by this writer.
    known: bool,
}

impl Tags {
    pub(crate) fn new(geometry: Geometry) -> Self {
        let leaves = geometry.blocks().div_ceil(LEAF_BLOCKS) as usize;
        Self { leaves: (0..leaves).map(|_| None).collect(), sum: Sum::default(), known: false }
    }

    /// All blocks are about to be read.
    pub(crate) fn begin(&mut self) {
        self.leaves.iter_mut().for_each(|leaf| *leaf = None);
        (self.sum, self.known) = (Sum::default(), false);
    }

    /// All were read.
    pub(crate) fn complete(&mut self) {
        self.known = true;
    }

    /// A block was read; the tag is 0 if it is zeros.
    pub(crate) fn set(&mut self, block: u64, tag: u32) {
        let leaf = &mut self.leaves[(block / LEAF_BLOCKS) as usize];
        if leaf.is_none() && tag == 0 {
            return;
        }
        let leaf = leaf.get_or_insert_with(|| vec![0; LEAF_BLOCKS as usize].into_boxed_slice());
        let old = std::mem::replace(&mut leaf[(block % LEAF_BLOCKS) as usize], tag);
        self.sum.remove(block, old);
        self.sum.add(block, tag);
    }

    /// The device's root, if all of it is known.
    pub(crate) fn root(&self, geometry: Geometry) -> Option<Root> {
        self.known.then(|| self.sum.root(geometry))
    }

    /// Bytes of memory that this takes.
    pub(crate) fn memory(&self) -> usize {
        self.leaves.iter().flatten().count() * LEAF_BLOCKS as usize * 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn changes_one_by_one_give_the_root_of_what_is_there_in_the_end(
            writes in proptest::collection::vec((0u64..200_000, 0u32..5), 1..200),
        ) {
            let geometry = Geometry::new(200_000 * 4096, 4096).unwrap();
            let mut tags = Tags::new(geometry);
            prop_assert_eq!(tags.root(geometry), None);
            tags.begin();
            tags.complete();
            let mut content = std::collections::BTreeMap::new();
            for (block, tag) in writes {
                tags.set(block, tag);
                content.insert(block, tag);
            }
            let mut sum = Sum::default();
            content.iter().rev().for_each(|(block, tag)| sum.add(*block, *tag));
            prop_assert_eq!(tags.root(geometry), Some(sum.root(geometry)));
        }
    }

    #[test]
    fn two_blocks_that_change_places_or_another_size_give_another_root() {
        let geometry = |bytes| Geometry::new(bytes, 4096).unwrap();
        let of = |blocks: &[(u64, u32)], bytes| {
            let mut sum = Sum::default();
            blocks.iter().for_each(|(block, tag)| sum.add(*block, *tag));
            sum.root(geometry(bytes))
        };
        let root = of(&[(0, 7), (1, 8)], 8192);
        assert_eq!(root, of(&[(1, 8), (0, 7)], 8192));
        for other in [
            of(&[(0, 8), (1, 7)], 8192),
            of(&[(0, 7)], 8192),
            of(&[(0, 7), (1, 8)], 8191),
            of(&[(0, 15)], 8192),
        ] {
            assert_ne!(root, other);
        }
    }
}
