//! A map: where every block of a device group is, as an immutable object that log entries refer to.
//! An entry says what differs from its map, so a generation is read from one entry and one map,
//! however many there were before. A map is written again when the differences since have cost as
//! much as it did.
//!
//! ```text
//! head, in the clear: "SILOMAP1" | version u16 = 1 | id of the data key [16] | salt [16]
//!     | packs u32 | id of each pack [32]          so that collection needs no key
//! leaves, sealed, for 65,536 blocks each; a leaf of zeros alone has length 0:
//!     zstd( packs v, for each: id [32], length v, length of index v, data key [16], salt [16],
//!           block size u8
//!           | runs )
//! ```
//! Key: `derive_key("silo-store 1 map", data key | salt)`; nonce: the leaf's number, counted over all
//! devices. Lengths of leaves are in the entry, so a leaf takes one request.

use crate::{
    StoreError,
    error::Result,
    format::{
        pack::PackRef,
        runs::{self, Content, Run},
    },
    keys::{DataKey, DataKeyId, ObjectKey},
    layout::ObjectId,
    wire::{Malformed, Reader, put_varint, unzstd},
};
use bytes::Bytes;
use std::{collections::BTreeSet, ops::Range};

const MAGIC: &[u8; 8] = b"SILOMAP1";
const VERSION: u16 = 1;
const FIXED: usize = 8 + 2 + 16 + 16 + 4;
const KEY_USE: &str = "silo-store 1 map";
/// Blocks per leaf.
pub(crate) const LEAF_BLOCKS: u64 = 1 << 16;
/// Largest opened leaf, in bytes: a pack and a run for each block.
const MAX_LEAF: usize = 8 << 20;
/// Most packs in one map.
pub(crate) const MAX_PACKS: u64 = 1 << 24;

/// What has to be known of a map to read from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapRef {
    pub(crate) id: ObjectId,
    /// Of the whole object, in bytes.
    pub(crate) length: u64,
    /// How many packs are listed in its head.
    pub(crate) packs: u32,
    /// BLAKE3 of the head.
    pub(crate) head: [u8; 32],
}

impl MapRef {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        put_varint(out, self.length);
        put_varint(out, u64::from(self.packs));
        out.extend_from_slice(&self.head);
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let id = ObjectId(reader.array()?);
        let length = reader.bounded(1 << 40)?;
        let packs = reader.bounded(MAX_PACKS)? as u32;
        let map = Self { id, length, packs, head: reader.array()? };
        if map.head_length() > length {
            return Err("a map is shorter than its head");
        }
        Ok(map)
    }

    pub(crate) fn head_length(&self) -> u64 {
        FIXED as u64 + u64::from(self.packs) * 32
    }
}

/// The part of a map that is in the clear.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) packs: Vec<ObjectId>,
}

impl Head {
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        if reader.array()? != *MAGIC {
            return Err("it is no map");
        }
        if reader.u16()? != VERSION {
            return Err("it is a map of another version than 1");
        }
        // Data key and salt are in the entry, too.
        reader.bytes(32)?;
        let count = reader.u32()? as usize;
        if reader.left() != count.saturating_mul(32) {
            return Err("its list of packs has another length than it says");
        }
        let packs = (0..count).map(|_| reader.array().map(ObjectId)).collect::<Result<_, _>>()?;
        Ok(Self { packs })
    }

    /// The head, checked against what refers to it.
    pub(crate) fn checked(map: &MapRef, bytes: &[u8]) -> Result<Self> {
        if *blake3::hash(bytes).as_bytes() != map.head {
            return Err(StoreError::corrupt(
                map.id.map(),
                "its head is not the one that was stored",
            ));
        }
        Self::decode(bytes).map_err(|detail| StoreError::corrupt(map.id.map(), detail))
    }
}

/// One leaf to be written: its runs count packs in `packs`.
pub(crate) struct Leaf {
    pub(crate) blocks: Range<u64>,
    pub(crate) runs: Vec<Run>,
}

/// Encodes a map from all leaves of all devices, made one by one; `used` are the numbers of all
/// packs that they speak of. Gives the sealed length of each leaf too.
pub(crate) fn encode(
    leaves: impl Iterator<Item = Leaf>,
    used: &BTreeSet<u32>,
    packs: &[PackRef],
    key: &DataKey,
) -> Result<(MapRef, Bytes, Vec<u32>)> {
    encode_salted(leaves, used, packs, key, crate::keys::random()?)
}

fn encode_salted(
    leaves: impl Iterator<Item = Leaf>,
    used: &BTreeSet<u32>,
    packs: &[PackRef],
    key: &DataKey,
    salt: [u8; 16],
) -> Result<(MapRef, Bytes, Vec<u32>)> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&key.id.0);
    out.extend_from_slice(&salt);
    out.extend_from_slice(&(used.len() as u32).to_le_bytes());
    used.iter().for_each(|pack| out.extend_from_slice(&packs[*pack as usize].id.0));
    let head = out.len();
    let sealer = key.object_key(KEY_USE, &salt);
    let mut lengths = Vec::new();
    for (number, leaf) in leaves.enumerate() {
        if leaf.runs.iter().all(|run| run.content == Content::Zero) {
            lengths.push(0);
            continue;
        }
        let plain = encode_leaf(leaf, packs);
        let packed = zstd::bulk::compress(&plain, 3)
            .map_err(|source| StoreError::Local { operation: "compress a map", source })?;
        let from = out.len();
        out.extend_from_slice(&packed);
        sealer.seal(number as u64, &salt, &mut out, from);
        lengths.push((out.len() - from) as u32);
    }
    let head_hash = *blake3::hash(&out[..head]).as_bytes();
    let bytes = Bytes::from(out);
    let map = MapRef {
        id: ObjectId::of(&bytes),
        length: bytes.len() as u64,
        packs: used.len() as u32,
        head: head_hash,
    };
    Ok((map, bytes, lengths))
}

/// Numbers of packs in the table that a list of runs gets, in the order in which they come.
pub(crate) fn localize<'a>(runs: impl IntoIterator<Item = &'a mut Run>) -> Vec<u32> {
    let mut table = Vec::new();
    let mut numbers = std::collections::HashMap::new();
    for run in runs {
        if let Content::At { pack, .. } = &mut run.content {
            *pack = *numbers.entry(*pack).or_insert_with(|| {
                table.push(*pack);
                table.len() as u32 - 1
            });
        }
    }
    table
}

fn encode_leaf(leaf: Leaf, packs: &[PackRef]) -> Vec<u8> {
    let mut runs = leaf.runs;
    let table = localize(&mut runs);
    let mut out = Vec::new();
    put_varint(&mut out, table.len() as u64);
    table.iter().for_each(|pack| packs[*pack as usize].encode(&mut out));
    runs::encode(&runs, leaf.blocks.start, &mut out);
    out
}

/// Reads an opened leaf; its runs count in the table that it returns.
pub(crate) fn decode_leaf(
    plain: &[u8],
    blocks: Range<u64>,
    each: impl FnMut(Run),
) -> Result<Vec<PackRef>, Malformed> {
    let mut reader = Reader::new(plain);
    let count = reader.count(PackRef::LEAST)?;
    let packs: Vec<PackRef> =
        (0..count).map(|_| PackRef::decode(&mut reader)).collect::<Result<_, _>>()?;
    runs::decode(&mut reader, blocks, packs.len(), each)?;
    reader.end()?;
    Ok(packs)
}

/// What opens the leaves of one map.
pub(crate) struct Opener {
    map: MapRef,
    key: ObjectKey,
    salt: [u8; 16],
    key_id: DataKeyId,
}

impl Opener {
    /// `salt` is in the entry that refers to the map.
    pub(crate) fn new(map: MapRef, salt: [u8; 16], key: &DataKey) -> Self {
        Self { map, key: key.object_key(KEY_USE, &salt), salt, key_id: key.id }
    }

    /// Opens leaf `number`, which covers `blocks`.
    pub(crate) fn leaf(
        &self,
        number: u64,
        bytes: &[u8],
        blocks: Range<u64>,
        each: impl FnMut(Run),
    ) -> Result<Vec<PackRef>> {
        let object = || format!("{} (leaf {number})", self.map.id.map());
        let mut sealed = bytes.to_vec();
        let plain = self
            .key
            .open(number, &self.salt, &mut sealed)
            .ok_or_else(|| StoreError::Sealed { object: object(), key: self.key_id.to_string() })?;
        let corrupt = |detail| StoreError::corrupt(object(), detail);
        let plain = unzstd(plain, MAX_LEAF).map_err(corrupt)?;
        decode_leaf(&plain, blocks, each).map_err(corrupt)
    }
}

/// The salt of an encoded map.
pub(crate) fn salt_of(bytes: &[u8]) -> [u8; 16] {
    let mut salt = [0; 16];
    salt.copy_from_slice(&bytes[26..42]);
    salt
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pack(n: u8) -> PackRef {
        let id = ObjectId([n; 32]);
        PackRef { id, length: 5000, index: 100, key: DataKeyId([1; 16]), salt: [2; 16], shift: 12 }
    }

    fn sample() -> (MapRef, Bytes, Vec<u32>) {
        let at = |pack, slot| Content::At { pack, slot };
        let leaves = [
            Leaf {
                blocks: 0..LEAF_BLOCKS,
                runs: vec![Run { start: 3, count: 100, content: at(2, 7) }],
            },
            Leaf { blocks: LEAF_BLOCKS..LEAF_BLOCKS + 9, runs: vec![] },
            Leaf {
                blocks: 0..50,
                runs: vec![
                    Run { start: 0, count: 1, content: at(0, 0) },
                    Run { start: 49, count: 1, content: at(2, 0) },
                ],
            },
        ];
        let packs = [pack(10), pack(11), pack(12)];
        encode_salted(
            leaves.into_iter(),
            &BTreeSet::from([0, 2]),
            &packs,
            &DataKey::fixed(1),
            [4; 16],
        )
        .unwrap()
    }

    #[test]
    fn leaves_come_back_one_by_one_and_the_head_lists_packs_that_are_used() {
        let (map, bytes, lengths) = sample();
        let head = Head::checked(&map, &bytes[..map.head_length() as usize]).unwrap();
        assert_eq!(head.packs, [ObjectId([10; 32]), ObjectId([12; 32])]);
        assert_eq!((salt_of(&bytes), lengths[1]), ([4; 16], 0));
        let opener = Opener::new(map, [4; 16], &DataKey::fixed(1));
        let from = map.head_length() as usize + lengths[0] as usize;
        let mut runs = Vec::new();
        let packs = opener
            .leaf(2, &bytes[from..from + lengths[2] as usize], 0..50, |run| runs.push(run))
            .unwrap();
        assert_eq!(packs, [pack(10), pack(12)]);
        assert_eq!(runs[1], Run { start: 49, count: 1, content: Content::At { pack: 1, slot: 0 } });
        let wrong = opener.leaf(0, &bytes[from..from + lengths[2] as usize], 0..50, |_| ());
        assert!(matches!(wrong, Err(StoreError::Sealed { .. })));
    }

    #[test]
    fn the_format_is_what_it_was() {
        let (map, bytes, _) = sample();
        assert_eq!(bytes[..10], *b"SILOMAP1\x01\x00");
        assert_eq!(map.head_length(), 46 + 64);
        // Sealed parts depend on zstd's version; what zstd packs does not.
        let leaf = Leaf {
            blocks: 0..9,
            runs: vec![Run { start: 2, count: 3, content: Content::At { pack: 0, slot: 5 } }],
        };
        let golden = [
            &[1][..],
            &[7; 32],
            &[0x88, 0x27, 100],
            &[1; 16],
            &[2; 16],
            &[12, 1, 2, 2 << 2 | 3, 0, 5],
        ]
        .concat();
        assert_eq!(encode_leaf(leaf, &[pack(7)]), golden);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_map_or_an_error(bytes: Vec<u8>) {
            crate::format::fuzz_map(&bytes);
        }
    }
}
