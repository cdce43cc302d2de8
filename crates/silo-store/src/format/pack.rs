//! A pack: up to some megabytes of blocks, compressed in groups ("chunks") and sealed.
//!
//! ```text
//! header, 16 bytes, in the clear: "SILOPACK" | version u16 = 1 | block size as power of two u8 | 0 × 5
//! chunks, one after the other: AES-256-GCM(content) and its tag
//! index, sealed: chunks v, for each: sealed length v, blocks × 2 + (1 if zstd) v
//!     then the name of each block [16]
//! trailer, 48 bytes, in the clear: id of the data key [16] | salt [16] | sealed length of the index
//!     u32 | blocks u32 | "SILOPEND"
//! ```
//! Key: BLAKE3 `derive_key("silo-store 1 pack", data key | salt)`. Nonce: the chunk's number, for the
//! index 2^64 - 1; 8 bytes little-endian and 4 zeros. Bound to each: header, id of the data key, salt.
//! A chunk that does not get smaller is stored as it is. The object's name is BLAKE3 of all its
//! bytes, so bytes can be checked without a key; names of blocks say what comes out with the key.
//! All that is needed to read a block is at the end: two requests, the second for one chunk.

use crate::{
    StoreError,
    error::Result,
    format::runs::MAX_SLOTS,
    keys::{BlockName, DataKey, DataKeyId, ObjectKey, TAG},
    layout::ObjectId,
    wire::{Malformed, Reader, put_varint, unzstd},
    writer::{PackKey, Sealed, Sealers, Squeezer},
};
use bytes::Bytes;
use std::{collections::VecDeque, ops::Range, sync::Arc};

const MAGIC: &[u8; 8] = b"SILOPACK";
const END: &[u8; 8] = b"SILOPEND";
const VERSION: u16 = 1;
const HEADER: usize = 16;
const TRAILER: usize = 48;
pub(crate) const BOUND: usize = HEADER + 32;
const INDEX_NONCE: u64 = u64::MAX;
const KEY_USE: &str = "silo-store 1 pack";
/// Blocks are grouped up to this many bytes, to compress well and to read little for one block.
pub(crate) const CHUNK: usize = 64 << 10;
/// No pack is longer, in bytes.
pub(crate) const MAX_PACK: u64 = 48 << 20;
/// No pack holds more content, in bytes.
const MAX_CONTENT: usize = 64 << 20;

/// What has to be known of a pack to read from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackRef {
    pub(crate) id: ObjectId,
    /// Of the whole object, in bytes.
    pub(crate) length: u32,
    /// Of the sealed index, in bytes.
    pub(crate) index: u32,
    pub(crate) key: DataKeyId,
    /// Of its key; also tells it from every other pack, without reading all of it.
    pub(crate) salt: [u8; 16],
    /// Block size as a power of two.
    pub(crate) shift: u8,
}

impl PackRef {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        put_varint(out, u64::from(self.length));
        put_varint(out, u64::from(self.index));
        out.extend_from_slice(&self.key.0);
        out.extend_from_slice(&self.salt);
        out.push(self.shift);
    }

    /// Smallest encoding, in bytes.
    pub(crate) const LEAST: usize = 32 + 1 + 1 + 16 + 16 + 1;

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let id = ObjectId(reader.array()?);
        let length = reader.bounded(MAX_PACK)?;
        let index = reader.bounded(MAX_PACK)?;
        if length < index + (HEADER + TRAILER) as u64 {
            return Err("a pack is shorter than its index");
        }
        let key = DataKeyId(reader.array()?);
        let salt = reader.array()?;
        let shift = reader.u8()?;
        if !(9..=24).contains(&shift) {
            return Err("a block size is out of bounds");
        }
        Ok(Self { id, length: length as u32, index: index as u32, key, salt, shift })
    }

    /// The bytes to fetch to open the index.
    pub(crate) fn tail(&self) -> Range<u64> {
        let length = u64::from(self.length);
        length - TRAILER as u64 - u64::from(self.index)..length
    }
}

fn header(shift: u8) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..10].copy_from_slice(&VERSION.to_le_bytes());
    header[10] = shift;
    header
}

/// What everything in a pack is bound to.
fn bound(shift: u8, key: DataKeyId, salt: &[u8; 16]) -> [u8; BOUND] {
    let mut bound = [0; BOUND];
    bound[..HEADER].copy_from_slice(&header(shift));
    bound[HEADER..HEADER + 16].copy_from_slice(&key.0);
    bound[HEADER + 16..].copy_from_slice(salt);
    bound
}

/// Blocks on their way into a pack.
pub(crate) struct Builder {
    key: Arc<PackKey>,
    data_key: DataKeyId,
    salt: [u8; 16],
    shift: u8,
    out: Vec<u8>,
    chunk: Vec<u8>,
    chunks: Vec<(u32, u32, bool)>,
    /// Chunks behind those in `out`, with their blocks.
    coming: VecDeque<(u32, Sealed)>,
    names: Vec<BlockName>,
    content: usize,
    squeezer: Squeezer,
}

impl Builder {
    pub(crate) fn new(key: &DataKey, shift: u8, level: i32) -> Result<Self> {
        Self::with_salt(key, shift, level, crate::keys::random()?)
    }

    fn with_salt(key: &DataKey, shift: u8, level: i32, salt: [u8; 16]) -> Result<Self> {
        let bound = bound(shift, key.id, &salt);
        Ok(Self {
            key: Arc::new(PackKey { key: key.object_key(KEY_USE, &salt), bound }),
            data_key: key.id,
            salt,
            shift,
            out: header(shift).to_vec(),
            chunk: Vec::with_capacity(CHUNK.max(1 << shift)),
            chunks: Vec::new(),
            coming: VecDeque::new(),
            names: Vec::new(),
            content: 0,
            squeezer: Squeezer::new(level)?,
        })
    }

    /// Adds a block; gives its slot. Chunks are sealed by `sealers`, or here.
    pub(crate) fn push(
        &mut self,
        name: BlockName,
        block: &[u8],
        sealers: Option<&Sealers>,
    ) -> Result<u32> {
        debug_assert_eq!(block.len(), 1 << self.shift);
        let slot = self.names.len() as u32;
        self.names.push(name);
        self.chunk.extend_from_slice(block);
        self.content += block.len();
        if self.chunk.len() >= CHUNK {
            self.seal_chunk(sealers)?;
        }
        Ok(slot)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Whether the pack is to be finished once it has `target` bytes.
    pub(crate) fn is_full(&self, target: usize) -> bool {
        self.out.len() + self.chunk.len() >= target
            || self.content + (1 << self.shift) + CHUNK > MAX_CONTENT
            || self.names.len() + (CHUNK >> self.shift) + 1 >= MAX_SLOTS as usize
    }

    fn seal_chunk(&mut self, sealers: Option<&Sealers>) -> Result<()> {
        let blocks = (self.chunk.len() >> self.shift) as u32;
        let number = (self.chunks.len() + self.coming.len()) as u64;
        match sealers {
            Some(sealers) => {
                let room = Vec::with_capacity(self.chunk.capacity());
                let chunk = std::mem::replace(&mut self.chunk, room);
                let sealed = sealers.seal(&self.key, number, chunk, &mut self.squeezer);
                self.coming.push_back((blocks, sealed));
            }
            None => {
                self.settle(true)?;
                let from = self.out.len();
                let packed =
                    self.key.append(number, &self.chunk, &mut self.squeezer, &mut self.out);
                self.chunks.push(((self.out.len() - from) as u32, blocks, packed));
                self.chunk.clear();
            }
        }
        self.settle(false)
    }

    /// Puts the chunks that are sealed in their places; `all`: waits for each.
    fn settle(&mut self, all: bool) -> Result<()> {
        while let Some((blocks, mut sealed)) = self.coming.pop_front() {
            if !all && !sealed.look() {
                self.coming.push_front((blocks, sealed));
                break;
            }
            let (bytes, packed) = sealed.wait()?;
            self.out.extend_from_slice(&bytes);
            self.chunks.push((bytes.len() as u32, blocks, packed));
        }
        Ok(())
    }

    /// The object.
    pub(crate) fn finish(mut self) -> Result<(PackRef, Bytes)> {
        if !self.chunk.is_empty() {
            self.seal_chunk(None)?;
        }
        self.settle(true)?;
        let from = self.out.len();
        put_varint(&mut self.out, self.chunks.len() as u64);
        for (length, blocks, packed) in &self.chunks {
            put_varint(&mut self.out, u64::from(*length));
            put_varint(&mut self.out, u64::from(*blocks) << 1 | u64::from(*packed));
        }
        for name in &self.names {
            self.out.extend_from_slice(&name.0);
        }
        self.key.key.seal(INDEX_NONCE, &self.key.bound, &mut self.out, from);
        let index = (self.out.len() - from) as u32;
        self.out.extend_from_slice(&self.data_key.0);
        self.out.extend_from_slice(&self.salt);
        self.out.extend_from_slice(&index.to_le_bytes());
        self.out.extend_from_slice(&(self.names.len() as u32).to_le_bytes());
        self.out.extend_from_slice(END);
        let bytes = Bytes::from(self.out);
        let pack = PackRef {
            id: ObjectId::of(&bytes),
            length: bytes.len() as u32,
            index,
            key: self.data_key,
            salt: self.salt,
            shift: self.shift,
        };
        Ok((pack, bytes))
    }
}

/// A chunk's place in its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Number of the chunk, which is its nonce.
    pub(crate) number: u32,
    /// In the object, in bytes.
    pub(crate) offset: u32,
    /// Sealed length in bytes.
    pub(crate) length: u32,
    /// Slot of its first block.
    pub(crate) first: u32,
    /// How many blocks.
    pub(crate) blocks: u32,
    packed: bool,
}

impl Chunk {
    pub(crate) fn range(&self) -> Range<u64> {
        u64::from(self.offset)..u64::from(self.offset) + u64::from(self.length)
    }
}

/// What is in a pack.
pub(crate) struct Index {
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) names: Vec<BlockName>,
}

impl Index {
    /// Reads an opened index of a pack with blocks of `1 << shift` bytes and `room` bytes of chunks.
    pub(crate) fn decode(bytes: &[u8], shift: u8, room: u64) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let count = reader.count(2)?;
        let most = (CHUNK >> shift).max(1) as u64;
        let (mut chunks, mut offset, mut first) = (Vec::with_capacity(count), HEADER as u64, 0u64);
        for number in 0..count {
            let length = reader.bounded(room)?;
            let about = reader.bounded(most << 1 | 1)?;
            let (blocks, packed) = (about >> 1, about & 1 == 1);
            let content = blocks << shift;
            if blocks == 0 || length <= TAG as u64 || (!packed && length != content + TAG as u64) {
                return Err("a chunk has a length that it cannot have");
            }
            let number = number as u32;
            let (at, blocks) = (offset as u32, blocks as u32);
            chunks.push(Chunk {
                number,
                offset: at,
                length: length as u32,
                first: first as u32,
                blocks,
                packed,
            });
            offset += length;
            first += u64::from(blocks);
            if offset > HEADER as u64 + room || first > u64::from(MAX_SLOTS) {
                return Err("its chunks are longer than the pack");
            }
        }
        if offset != HEADER as u64 + room {
            return Err("its chunks are shorter than the pack");
        }
        if reader.left() as u64 != first * BlockName::BYTES as u64 {
            return Err("it does not name each block");
        }
        let names = (0..first).map(|_| reader.array().map(BlockName)).collect::<Result<_, _>>()?;
        Ok(Self { chunks, names })
    }

    /// The chunk that holds a slot.
    pub(crate) fn chunk_of(&self, slot: u32) -> Option<&Chunk> {
        let after = self.chunks.partition_point(|chunk| chunk.first <= slot);
        let chunk = &self.chunks[after.checked_sub(1)?];
        (slot - chunk.first < chunk.blocks).then_some(chunk)
    }

    /// Bytes of memory that this takes.
    pub(crate) fn memory(&self) -> usize {
        self.chunks.len() * size_of::<Chunk>() + self.names.len() * BlockName::BYTES
    }
}

/// A pack whose index was opened.
pub(crate) struct Opened {
    pub(crate) pack: PackRef,
    pub(crate) index: Index,
    key: ObjectKey,
    bound: [u8; BOUND],
}

impl Opened {
    /// Opens the index, given the bytes of [`PackRef::tail`].
    pub(crate) fn new(pack: &PackRef, tail: &[u8], key: &DataKey) -> Result<Self> {
        let corrupt = |detail: Malformed| StoreError::corrupt(pack.id.pack(), detail);
        let (sealed, trailer) = tail
            .split_at_checked(pack.index as usize)
            .ok_or_else(|| corrupt("it is shorter than its index"))?;
        let mut reader = Reader::new(trailer);
        Self::check_trailer(&mut reader, pack).map_err(corrupt)?;
        let bound = bound(pack.shift, pack.key, &pack.salt);
        let object_key = key.object_key(KEY_USE, &pack.salt);
        let mut sealed = sealed.to_vec();
        let plain = object_key.open(INDEX_NONCE, &bound, &mut sealed).ok_or_else(|| {
            StoreError::Sealed { object: pack.id.pack(), key: key.id.to_string() }
        })?;
        let room = u64::from(pack.length) - (HEADER + TRAILER) as u64 - u64::from(pack.index);
        let index = Index::decode(plain, pack.shift, room).map_err(corrupt)?;
        Ok(Self { pack: *pack, index, key: object_key, bound })
    }

    fn check_trailer(reader: &mut Reader<'_>, pack: &PackRef) -> Result<(), Malformed> {
        let (key, salt) = (DataKeyId(reader.array()?), reader.array()?);
        if key != pack.key || salt != pack.salt {
            return Err("it is another pack than what refers to it says");
        }
        let (index, _blocks) = (reader.u32()?, reader.u32()?);
        if index != pack.index || reader.bytes(8)? != END {
            return Err("its end is not that of a pack");
        }
        reader.end()
    }

    /// Opens a chunk: its blocks, one after the other, in `bytes` or in `room`. `bytes` are those of
    /// [`Chunk::range`].
    pub(crate) fn chunk<'a>(
        &self,
        chunk: &Chunk,
        bytes: &'a mut [u8],
        room: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        let object = || format!("{} (chunk {})", self.pack.id.pack(), chunk.number);
        let plain =
            self.key.open(u64::from(chunk.number), &self.bound, bytes).ok_or_else(|| {
                StoreError::Sealed { object: object(), key: self.pack.key.to_string() }
            })?;
        let size = (chunk.blocks as usize) << self.pack.shift;
        let content: &[u8] = if chunk.packed {
            *room = unzstd(plain, size).map_err(|detail| StoreError::corrupt(object(), detail))?;
            room
        } else {
            plain
        };
        if content.len() == size {
            return Ok(content);
        }
        Err(StoreError::corrupt(object(), "its content has another length than its blocks"))
    }

    /// Checks the content of a chunk against the names of its blocks.
    pub(crate) fn check(&self, chunk: &Chunk, content: &[u8], key: &DataKey) -> Result<()> {
        let names = &self.index.names[chunk.first as usize..];
        for (at, block) in content.chunks(1 << self.pack.shift).enumerate() {
            if key.name(block) != names[at] {
                let object = format!("{} (chunk {})", self.pack.id.pack(), chunk.number);
                return Err(StoreError::corrupt(
                    object,
                    format!("block {at} has not the content that its name says"),
                ));
            }
        }
        Ok(())
    }
}

/// Decodes any bytes as a whole pack.
pub(super) fn fuzz(bytes: &[u8]) {
    let key = DataKey::generate(None);
    let (Ok(key), Some(trailer)) = (key, bytes.len().checked_sub(TRAILER)) else { return };
    let index =
        u32::from_le_bytes(bytes[trailer + 32..trailer + 36].try_into().unwrap_or_default());
    let length = bytes.len() as u32;
    if u64::from(index) + (HEADER + TRAILER) as u64 > u64::from(length) {
        return;
    }
    let (mut id, mut salt) = ([0; 16], [0; 16]);
    id.copy_from_slice(&bytes[trailer..trailer + 16]);
    salt.copy_from_slice(&bytes[trailer + 16..trailer + 32]);
    let pack =
        PackRef { id: ObjectId([0; 32]), length, index, key: DataKeyId(id), salt, shift: 12 };
    let _ = Opened::new(&pack, &bytes[pack.tail().start as usize..], &key);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn build(shift: u8, blocks: &[Vec<u8>]) -> (PackRef, Bytes, DataKey) {
        let key = DataKey::fixed(1);
        let mut builder = Builder::with_salt(&key, shift, 1, [9; 16]).unwrap();
        for (slot, block) in blocks.iter().enumerate() {
            assert_eq!(builder.push(key.name(block), block, None).unwrap(), slot as u32);
        }
        let (pack, bytes) = builder.finish().unwrap();
        (pack, bytes, key)
    }

    #[test]
    fn chunks_that_threads_seal_are_in_their_places() {
        let block = |at: usize| {
            let mut x = at as u64;
            let noise = std::iter::repeat_with(move || {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(at as u64 | 1);
                (x >> 56) as u8
            });
            // Every third does not get smaller.
            let noise = noise.take(if at.is_multiple_of(3) { 4096 } else { 100 });
            let mut block: Vec<u8> = noise.collect();
            block.resize(4096, at as u8);
            block
        };
        let blocks: Vec<_> = (0..1000).map(block).collect();
        let key = DataKey::fixed(1);
        for threads in [0, 1, 3] {
            let sealers = Sealers::start(threads, 1).unwrap();
            let mut builder = Builder::with_salt(&key, 12, 1, [9; 16]).unwrap();
            for (slot, block) in blocks.iter().enumerate() {
                let at = builder.push(key.name(block), block, sealers.as_ref()).unwrap();
                assert_eq!(at, slot as u32);
            }
            let (pack, bytes) = builder.finish().unwrap();
            assert!(read(&pack, &bytes, &key).unwrap() == blocks, "{threads} threads");
        }
    }

    fn read(pack: &PackRef, bytes: &[u8], key: &DataKey) -> Result<Vec<Vec<u8>>> {
        let tail = pack.tail();
        let opened = Opened::new(pack, &bytes[tail.start as usize..tail.end as usize], key)?;
        let mut blocks = Vec::new();
        for chunk in &opened.index.chunks {
            let range = chunk.range();
            let mut sealed = bytes[range.start as usize..range.end as usize].to_vec();
            let mut room = Vec::new();
            let content = opened.chunk(chunk, &mut sealed, &mut room)?;
            opened.check(chunk, content, key)?;
            blocks.extend(content.chunks(1 << pack.shift).map(<[u8]>::to_vec));
        }
        Ok(blocks)
    }

    fn block(shift: u8, seed: u64, noise: bool) -> Vec<u8> {
        let mut block = vec![seed as u8; 1 << shift];
        if noise {
            blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut block);
        }
        block
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn blocks_come_back_from_a_pack(shift in 9u8..17, kinds in proptest::collection::vec(any::<bool>(), 1..60)) {
            let blocks: Vec<_> = kinds.iter().enumerate().map(|(i, n)| block(shift, i as u64, *n)).collect();
            let (pack, bytes, key) = build(shift, &blocks);
            prop_assert_eq!(ObjectId::of(&bytes), pack.id);
            prop_assert_eq!(read(&pack, &bytes, &key).unwrap(), blocks);
        }

        #[test]
        fn a_changed_byte_anywhere_is_an_error_and_never_other_content(at: prop::sample::Index, bit in 0u8..8) {
            let blocks: Vec<_> = (0..20).map(|i| block(12, i, i % 2 == 0)).collect();
            let (pack, bytes, key) = build(12, &blocks);
            let mut changed = bytes.to_vec();
            let at = at.index(changed.len());
            changed[at] ^= 1 << bit;
            match read(&pack, &changed, &key) {
                // Header and count of blocks are for people; the header's truth is bound to all.
                Ok(same) => prop_assert!(same == blocks && (at < HEADER || (changed.len() - 12..changed.len() - 8).contains(&at))),
                Err(error) => prop_assert!(matches!(error, StoreError::Corrupt { .. } | StoreError::Sealed { .. }), "{}", error),
            }
        }

        #[test]
        fn any_bytes_are_a_pack_or_an_error(bytes: Vec<u8>) {
            crate::format::fuzz_pack(&bytes);
            crate::format::fuzz_pack_index(&bytes);
        }
    }

    #[test]
    fn the_format_is_what_it_was() {
        // Content that stays as it is: what zstd makes of others may change with its version.
        let (pack, bytes, _) = build(9, &[block(9, 1, true), block(9, 2, true)]);
        let golden = "cf73ba92753573d441acf45e10b4e3fcdfc93f0ec426183b26d7a602d3c203ad";
        assert_eq!(bytes[..11], *b"SILOPACK\x01\x00\x09");
        assert_eq!(pack.id.to_string(), golden, "{} bytes", bytes.len());
    }

    #[test]
    fn a_whole_other_pack_of_the_same_tenant_is_recognised_by_its_end() {
        let key = DataKey::fixed(1);
        let other = |salt| {
            let mut builder = Builder::with_salt(&key, 12, 1, [salt; 16]).unwrap();
            builder.push(key.name(&[salt; 4096]), &[salt; 4096], None).unwrap();
            builder.finish().unwrap()
        };
        let ((pack, _), (_, bytes)) = (other(1), other(2));
        assert!(matches!(read(&pack, &bytes, &key), Err(StoreError::Corrupt { .. })));
    }

    #[test]
    fn incompressible_content_costs_names_and_tags_and_nothing_else() {
        let blocks: Vec<_> = (0..1024).map(|i| block(12, i, true)).collect();
        let (_, bytes, _) = build(12, &blocks);
        let content = 1024 * 4096;
        assert!(bytes.len() < content + content / 200, "{}", bytes.len() - content);
    }

    #[test]
    fn another_key_is_named_and_nothing_comes_out() {
        let (pack, bytes, _) = build(12, &[vec![1; 4096]]);
        let mut other = DataKey::fixed(2);
        other.id = pack.key;
        assert!(matches!(read(&pack, &bytes, &other), Err(StoreError::Sealed { .. })));
    }
}
