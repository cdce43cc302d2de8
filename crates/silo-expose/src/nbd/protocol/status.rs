//! `base:allocation`: what `BLOCK_STATUS` says of a run of bytes.

use super::u32_at;
use silo_block::io::{Allocation, Extent};

/// The one metadata context that is spoken.
pub(in crate::nbd) const ALLOCATION: &[u8] = b"base:allocation";
/// The number that stands for it on a connection; a server may choose it.
pub(in crate::nbd) const ALLOCATION_ID: u32 = 1;
/// Most runs in one answer: 512 KiB of descriptors.
pub(in crate::nbd) const MAX_RUNS: usize = 1 << 16;

const HOLE: u32 = 1;
const ZERO: u32 = 1 << 1;

const fn flags(allocation: Allocation) -> u32 {
    match allocation {
        Allocation::Data => 0,
        Allocation::Zero => ZERO,
        Allocation::Hole => HOLE | ZERO,
    }
}

/// The payload of a `BLOCK_STATUS` chunk: neighbours of one kind become one run; the last is cut
/// at `length`. `None` if `extents` has no first byte to tell of.
pub(in crate::nbd) fn encode_status(
    extents: &[Extent],
    length: u64,
    most: usize,
) -> Option<Vec<u8>> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    let mut left = length.min(u64::from(u32::MAX));
    for extent in extents {
        let part = extent.length.min(left) as u32;
        if part == 0 {
            continue;
        }
        let count = runs.len();
        match runs.last_mut() {
            // No overflow: together they are at most `length`.
            Some((run, kind)) if *kind == flags(extent.allocation) => *run += part,
            _ if count == most.min(MAX_RUNS) => break,
            _ => runs.push((part, flags(extent.allocation))),
        }
        left -= u64::from(part);
    }
    if runs.is_empty() {
        return None;
    }
    let mut bytes = Vec::with_capacity(4 + runs.len() * 8);
    bytes.extend_from_slice(&ALLOCATION_ID.to_be_bytes());
    for (run, kind) in runs {
        bytes.extend_from_slice(&run.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
    }
    Some(bytes)
}

/// The runs in a `BLOCK_STATUS` chunk's payload for the context `id`, cut at `length`. `None` if
/// it is for another context, tells nothing, or does not add up.
pub(in crate::nbd) fn decode_status(bytes: &[u8], id: u32, length: u64) -> Option<Vec<Extent>> {
    let (head, runs) = bytes.split_at_checked(4)?;
    if u32_at(head, 0) != id || runs.is_empty() || runs.len() % 8 != 0 {
        return None;
    }
    let (mut extents, mut left) = (Vec::with_capacity(runs.len() / 8), length);
    for run in runs.chunks_exact(8) {
        let (bytes, kind) = (u64::from(u32_at(run, 0)), u32_at(run, 4));
        if bytes == 0 {
            return None;
        }
        // A hole whose content is not known to be zeros counts as data.
        let allocation = match kind & (HOLE | ZERO) {
            ZERO => Allocation::Zero,
            kind if kind == HOLE | ZERO => Allocation::Hole,
            _ => Allocation::Data,
        };
        let length = bytes.min(left);
        if length > 0 {
            extents.push(Extent { length, allocation });
            left -= length;
        }
    }
    (!extents.is_empty()).then_some(extents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_merged_cut_and_read_back() {
        let run = |length, allocation| Extent { length, allocation };
        let extents = [
            run(4096, Allocation::Data),
            run(4096, Allocation::Data),
            run(100, Allocation::Hole),
            run(1 << 40, Allocation::Zero),
        ];
        let bytes = encode_status(&extents, 10_000, usize::MAX).unwrap();
        assert_eq!(
            bytes,
            b"\0\0\0\x01\0\0\x20\0\0\0\0\0\0\0\0\x64\0\0\0\x03\0\0\x06\xac\0\0\0\x02"
        );
        let read = decode_status(&bytes, 1, 10_000).unwrap();
        assert_eq!(
            read,
            [run(8192, Allocation::Data), run(100, Allocation::Hole), run(1708, Allocation::Zero)]
        );
        assert_eq!(encode_status(&extents, 10_000, 1).unwrap().len(), 12, "one run");
        assert_eq!(encode_status(&[], 10, 9), None);
        assert_eq!(decode_status(&bytes, 2, 10_000), None, "another context");
        assert_eq!(decode_status(&bytes[..11], 1, 10_000), None);
        assert_eq!(decode_status(b"\0\0\0\x01\0\0\0\0\0\0\0\0", 1, 1), None, "an empty run");
        // A server may tell of more than was asked for.
        assert_eq!(decode_status(&bytes, 1, 10).unwrap(), [run(10, Allocation::Data)]);
    }
}
