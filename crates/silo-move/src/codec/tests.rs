use super::*;
use crate::codec::encode::Known;
use proptest::prelude::*;
use silo_block::block::BlockIndex;
use std::collections::HashMap;
use twox_hash::XxHash3_64;

/// What a destination holds: earlier blocks, by number and by hash.
#[derive(Default)]
struct Other {
    blocks: HashMap<u64, Vec<u8>>,
    advertised: HashMap<u64, BlockHash>,
    versions: HashMap<u64, Vec<u8>>,
}

impl Known for Other {
    fn advertised(&self, block: BlockIndex) -> Option<BlockHash> {
        self.advertised.get(&block.0).copied()
    }

    fn is_same(&self, earlier: BlockIndex, content: &[u8]) -> bool {
        self.blocks.get(&earlier.0).is_some_and(|block| block == content)
    }

    fn last_version(&self, block: BlockIndex, into: &mut [u8]) -> bool {
        match self.versions.get(&block.0) {
            Some(version) if version.len() == into.len() => {
                into.copy_from_slice(version);
                true
            }
            _ => false,
        }
    }
}

fn unpack(parcel: &[u8], length: usize, block: usize, other: &Other) -> Vec<u8> {
    let mut out = vec![0xee; length];
    let by_hash = |hash: &BlockHash| {
        let all = other.blocks.values().chain(other.versions.values());
        all.into_iter().find(|b| Naming::Plain.name(b) == *hash).cloned()
    };
    Decoder::default()
        .decode(parcel, length, block, |piece| {
            match piece {
                Piece::Zero { offset, length } => out[offset..offset + length].fill(0),
                Piece::Data { offset, content } => {
                    out[offset..offset + content.len()].copy_from_slice(content);
                }
                Piece::Same { offset, length, earlier, hash } => {
                    let content = &other.blocks[&earlier.0];
                    assert_eq!(Naming::Plain.name(content), hash);
                    out[offset..offset + length].copy_from_slice(content);
                }
                Piece::Held { offset, length, hash } => {
                    out[offset..offset + length].copy_from_slice(&by_hash(&hash).unwrap());
                }
                Piece::Delta { offset, difference, check } => {
                    for (index, part) in difference.chunks_mut(block).enumerate() {
                        xor(part, &other.versions[&((offset / block + index) as u64)]);
                    }
                    assert_eq!(XxHash3_64::oneshot(difference), check);
                    out[offset..offset + difference.len()].copy_from_slice(difference);
                }
            }
            Ok::<(), CodecError>(())
        })
        .unwrap();
    out
}

/// A block of one of the kinds of content that there are.
fn block_of(kind: u8, seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    match kind {
        0 => vec![0; length],
        1 => vec![seed as u8; length],
        2 => (0..length).map(|at| (seed >> (at % 8 * 8)) as u8).collect(),
        3 => (0..length).map(|at| b"the quick brown fox "[(at + seed as usize) % 20]).collect(),
        4 => (0..length).map(|at| if at % 512 < 40 { noise() } else { 0 }).collect(),
        _ => (0..length).map(|_| noise()).collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn check_29_every_codec_round_trips_and_never_exceeds_its_input_by_more_than_a_constant(
        shift in 9u32..13,
        blocks in proptest::collection::vec((0u8..6, 0u64..4, 0u8..8), 0..40),
        short in 0usize..512,
        method in 0u8..4,
    ) {
        let block = 1 << shift;
        let mut content = Vec::new();
        let mut other = Other::default();
        for (at, (kind, seed, how)) in blocks.iter().enumerate() {
            let at = at as u64;
            let length = if at + 1 == blocks.len() as u64 { block - short.min(block - 1) } else { block };
            let here = block_of(*kind, seed * 77 + 3, length);
            match how {
                0 => { other.advertised.insert(at, Naming::Plain.name(&here)); other.versions.insert(at, here.clone()); }
                1 => { other.advertised.insert(at, BlockHash([9; 32])); }
                2 | 3 => {
                    let mut version = here.clone();
                    for byte in version.iter_mut().step_by(700) { *byte ^= 0x55; }
                    other.versions.insert(at, version);
                }
                4 => { other.versions.insert(at, block_of(5, seed + 99, length)); }
                _ => {}
            }
            other.blocks.insert(at, here.clone());
            content.extend_from_slice(&here);
        }
        let forced = [None, Some(Method::Plain), Some(Method::Lz4), Some(Method::Zstd)][usize::from(method)];
        let mut encoder = Encoder::new(forced);
        let parcel = encoder.encode(3, BlockIndex(0), block, &content, &other);
        let tally = parcel.tally;
        let bytes = parcel.to_vec();
        prop_assert_eq!(bytes.len(), parcel.length());
        prop_assert!(bytes.len() <= content.len() + OVERHEAD, "{} of {}", bytes.len(), content.len());
        let counted = tally.zero + tally.fill + tally.same + tally.held + tally.plain + tally.packed + tally.delta;
        prop_assert_eq!(counted, blocks.len() as u64);
        prop_assert_eq!(unpack(&bytes, content.len(), block, &other), content);
    }

    #[test]
    fn check_30_no_bytes_make_the_decoder_panic_or_write_outside_the_run(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        fuzz_decode(&bytes);
    }

    #[test]
    fn check_30_a_damaged_parcel_is_refused_or_stays_inside_the_run(
        kind in 0u8..6, at in 0usize..2000, value in any::<u8>(), cut in 0usize..2000,
    ) {
        let content: Vec<u8> = (0..8).flat_map(|n| block_of((kind + n) % 6, 5, 1024)).collect();
        let mut encoder = Encoder::new(Some(if kind % 2 == 0 { Method::Lz4 } else { Method::Zstd }));
        let mut bytes = encoder.encode(0, BlockIndex(0), 1024, &content, &NothingKnown).to_vec();
        let at = at % bytes.len();
        bytes[at] = value;
        bytes.truncate(bytes.len() - cut % bytes.len() / 7);
        let mut framed = vec![1];
        framed.extend_from_slice(&(8191u16).to_le_bytes());
        framed.push(0);
        framed.extend_from_slice(&bytes);
        fuzz_decode(&framed);
    }
}

#[test]
fn check_29_plain_neighbours_are_one_span_however_they_were_found() {
    let content: Vec<u8> = (0..64).flat_map(|seed| block_of(5, seed, 512)).collect();
    let mut other = Other::default();
    for at in (0..64).step_by(2) {
        // A version from which the difference is noise.
        other.versions.insert(at, block_of(5, at + 1000, 512));
    }
    let mut encoder = Encoder::default();
    let parcel = encoder.encode(0, BlockIndex(0), 512, &content, &other);
    assert_eq!((parcel.tally.plain, parcel.length()), (64, COUNT + SPAN + content.len()));
    assert_eq!(unpack(&parcel.to_vec(), content.len(), 512, &other), content);
}

#[test]
fn check_14_only_the_hash_is_sent_while_the_content_has_it_and_the_content_once_it_changed() {
    let mut content = block_of(5, 1, 4096);
    let mut other = Other::default();
    other.advertised.insert(7, Naming::Plain.name(&content));
    let mut encoder = Encoder::default();
    let parcel = encoder.encode(0, BlockIndex(7), 4096, &content, &other);
    assert_eq!((parcel.tally.held, parcel.tally.plain), (1, 0));
    assert!(parcel.length() < 64);
    content[100] ^= 1;
    let parcel = encoder.encode(0, BlockIndex(7), 4096, &content, &other);
    assert_eq!((parcel.tally.held, parcel.tally.plain), (0, 1));
    let bytes = parcel.to_vec();
    assert_eq!(unpack(&bytes, 4096, 4096, &other), content);
}

#[test]
fn a_parcel_has_these_bytes() {
    let mut content = vec![0; 1024];
    content.extend([0xab; 512]);
    content.extend((0..512u32).map(|at| (at * 7 % 251) as u8));
    content.extend([1, 2, 3]);
    let mut encoder = Encoder::new(Some(Method::Plain));
    let bytes = encoder.encode(0, BlockIndex(0), 512, &content, &NothingKnown).to_vec();
    let head = [
        3, 0, //
        0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, //
        1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, //
        4, 0, 0, 0, 2, 0, 0, 0, 3, 2, 0, 0, //
        0xab, 0xab, 0xab, 0xab, 0xab, 0xab, 0xab, 0xab, //
    ];
    assert_eq!(bytes[..head.len()], head);
    assert_eq!(bytes[head.len()..], content[1536..]);
}

#[test]
fn check_02_zeros_of_any_length_are_one_span() {
    let parcel = zeros(1 << 30);
    let mut seen = 0;
    Decoder::default()
        .decode(&parcel, 1 << 42, 4096, |piece| {
            let Piece::Zero { offset: 0, length } = piece else { panic!("{piece:?}") };
            seen = length;
            Ok::<(), CodecError>(())
        })
        .unwrap();
    assert_eq!((parcel.len(), seen), (14, 1 << 42));
}

#[test]
fn a_few_changed_bytes_of_a_block_cost_a_few_bytes() {
    let old = block_of(5, 1, 4096);
    let mut new = old.clone();
    new[50] ^= 1;
    new[3000..3008].fill(7);
    let mut other = Other::default();
    other.versions.insert(0, old);
    for method in [None, Some(Method::Lz4), Some(Method::Zstd)] {
        let mut encoder = Encoder::new(method);
        let parcel = encoder.encode(0, BlockIndex(0), 4096, &new, &other);
        assert_eq!(parcel.tally.delta, 1);
        assert!(parcel.length() < 120, "{} bytes", parcel.length());
        let bytes = parcel.to_vec();
        assert_eq!(unpack(&bytes, 4096, 4096, &other), new);
    }
}
