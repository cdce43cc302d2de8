//! The Internet checksum (RFC 1071), over words in the order of memory: sums are turned into bytes
//! with `to_ne_bytes` and need no swapping.

/// Adds `bytes` to a sum. All but the last piece of what is summed have an even length.
#[must_use]
pub(crate) fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    // 32 bits at a time into 64: no carry is lost below 16 GiB, and the compiler makes vectors of it.
    let (words, rest) = bytes.as_chunks::<4>();
    sum += words.iter().map(|w| u64::from(u32::from_ne_bytes(*w))).sum::<u64>();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum + u64::from(u32::from_ne_bytes(last))
}

/// A sum as 16 bits, not inverted.
#[must_use]
pub(crate) fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// The sum of the pseudo header of TCP or UDP: both addresses (as they follow each other in the
/// IP header), the protocol and the length.
#[must_use]
pub(crate) fn pseudo(addresses: &[u8], protocol: u8, length: usize) -> u64 {
    let length = (length as u32).to_be_bytes();
    add(0, addresses)
        + u64::from(u16::from_ne_bytes([0, protocol]))
        + u64::from(u32::from_ne_bytes(length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As RFC 1071 says it: 16 bits at a time, big-endian.
    fn plain(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    #[test]
    fn the_example_of_the_rfc_comes_out() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(add(0, &bytes)).to_ne_bytes(), [0xdd, 0xf2]);
    }

    proptest! {
        #[test]
        fn words_give_what_pairs_give(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            let ours = u16::from_be_bytes(fold(add(0, &bytes)).to_ne_bytes());
            let theirs = plain(&bytes);
            // Zero has two writings.
            prop_assert_eq!(ours % 0xffff, theirs % 0xffff);
            prop_assert_eq!(ours == 0, theirs == 0);
        }
    }
}
