//! Which block was sent before with the same content, for one connection.
//!
//! A guess by a fingerprint of a few words of the block; the caller compares the bytes, and the
//! destination checks a hash. One connection's blocks arrive in order, so that a block in this
//! table is at the destination before whatever refers to it.

use silo_block::block::BlockIndex;

/// Slots of the table: one mebibyte.
const SLOTS: usize = 1 << 16;
/// Words that a fingerprint looks at.
const WORDS: usize = 16;

#[derive(Clone, Copy, Default)]
struct Slot {
    /// 0 for an empty slot.
    tag: u32,
    device: u16,
    block: u64,
}

/// The table. Bounded; newer blocks replace older ones.
pub(super) struct Repeats {
    slots: Box<[Slot]>,
}

impl Repeats {
    pub(super) fn new() -> Self {
        Self { slots: vec![Slot::default(); SLOTS].into_boxed_slice() }
    }

    /// Notes that `block` has this content and returns which block of the device had it before.
    pub(super) fn note(
        &mut self,
        device: u16,
        block: BlockIndex,
        content: &[u8],
    ) -> Option<BlockIndex> {
        let print = fingerprint(content);
        let slot = &mut self.slots[(print as usize) % SLOTS];
        let tag = (print >> 32) as u32 | 1;
        let before = (slot.tag == tag && slot.device == device && slot.block != block.0)
            .then_some(BlockIndex(slot.block));
        if before.is_none() {
            *slot = Slot { tag, device, block: block.0 };
        }
        before
    }

    /// The last [`Repeats::note`] was wrong: this block takes the place.
    pub(super) fn replace(&mut self, device: u16, block: BlockIndex, content: &[u8]) {
        let print = fingerprint(content);
        let tag = (print >> 32) as u32 | 1;
        self.slots[(print as usize) % SLOTS] = Slot { tag, device, block: block.0 };
    }
}

/// Mixes words from all over the block; blocks that differ elsewhere only look the same.
fn fingerprint(content: &[u8]) -> u64 {
    let stride = (content.len() / WORDS).max(8);
    let mut mixed = content.len() as u64;
    for word in content.chunks(stride).filter_map(|chunk| chunk.first_chunk::<8>()) {
        mixed = (mixed ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^= mixed >> 29;
    }
    mixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_blocks_are_found_within_their_device_only() {
        let mut repeats = Repeats::new();
        let content = vec![7; 4096];
        assert_eq!(repeats.note(0, BlockIndex(3), &content), None);
        assert_eq!(repeats.note(0, BlockIndex(9), &content), Some(BlockIndex(3)));
        assert_eq!(repeats.note(1, BlockIndex(9), &content), None);
        assert_eq!(repeats.note(1, BlockIndex(9), &content), None, "a block is not its own copy");
    }
}
