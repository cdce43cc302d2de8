//! What benchmarks write and find again: each block's words tell which block it is and the round of
//! its last write. Made and compared as fast as memory is, so that a client does not become what is
//! measured.

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// Every word of a block.
#[must_use]
pub fn word(block: u64, round: u64) -> [u8; 8] {
    (block.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round << 1 | 1).to_le_bytes()
}

/// Fills whole blocks, of which `first` is the first one's number.
pub fn fill(bytes: &mut [u8], first: u64, round: u64) {
    for (index, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
        block.as_chunks_mut().0.fill(word(first + index as u64, round));
    }
}

/// Whether every word of a block is what it should be.
#[must_use]
pub fn is(bytes: &[u8], block: u64, round: u64) -> bool {
    let wanted = u64::from_ne_bytes(word(block, round));
    let (words, rest) = bytes.as_chunks::<8>();
    let differ = words.iter().fold(0, |all, found| all | (u64::from_ne_bytes(*found) ^ wanted));
    rest.is_empty() && differ == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_told_from_its_neighbour_and_from_its_last_round() {
        let mut bytes = vec![0; 2 * BLOCK];
        fill(&mut bytes, 7, 3);
        assert!(is(&bytes[..BLOCK], 7, 3) && is(&bytes[BLOCK..], 8, 3));
        assert!(!is(&bytes[..BLOCK], 8, 3) && !is(&bytes[..BLOCK], 7, 2));
        bytes[BLOCK - 1] ^= 1;
        assert!(!is(&bytes[..BLOCK], 7, 3));
    }
}
