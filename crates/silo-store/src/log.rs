//! The log of a line: numbered entries, each created if absent, so that there is one order that
//! everybody agrees on. It carries the generations, and it is the fence: who cannot create the next
//! number was overtaken.
//!
//! ```text
//! "SILOLOG1" | version u16 = 1 | kind u8 | number v | epoch v | writer [16] | made (ms since 1970) v
//!     | number of the newest commit before, or 0, v
//! kind 1, opened: a writer takes the line; its epoch is one more than that of the entry before
//! kind 2, commit: keys v, for each: tenant, data key (wrapped)
//!     | data key that seals the rest [16] | salt [16] | packs v, id of each [32]
//!     | map: 0, or 1 and id [32], length v, packs v, hash of head [32], salt [16], data key [16]
//!     | length v and sealed zstd of: label, parent line, parent number v, for each pack above:
//!       its record; devices v, for each: name, bytes v, block size u8, root: 0 or 1 and hash [32],
//!       leaves v and their lengths v, runs that differ from the map
//!     | zeros up to 512 bytes
//! kind 3, barrier: collection v; whoever commits after it has looked at what it is about to delete
//! BLAKE3 of all before [32]
//! ```
//! Lists of packs and maps are in the clear, so that collection and pruning need no key. Only commits
//! have 512 bytes or more: a listing, which has sizes, tells the newest generation. The sealed part is
//! bound to all before it and to the line's name.

use crate::{
    StoreError,
    error::Result,
    format::{
        map::{LEAF_BLOCKS, MAX_PACKS, MapRef},
        pack::PackRef,
        runs::{self, Run},
    },
    keys::{DataKey, DataKeyId, Wrapped},
    layout::{LineName, ObjectId, check_name},
    root::Root,
    wire::{Malformed, Reader, put_text, put_varint, unzstd},
};
use silo_block::geometry::Geometry;

const MAGIC: &[u8; 8] = b"SILOLOG1";
const VERSION: u16 = 1;
const HASH: usize = 32;
const KEY_USE: &str = "silo-store 1 entry";
/// Largest entry, in bytes.
pub(crate) const MAX_ENTRY: u64 = 64 << 20;
/// Largest opened part of an entry, in bytes.
const MAX_BODY: usize = 256 << 20;
/// Commits are at least this long, other entries shorter, in bytes.
pub(crate) const LEAST_COMMIT: u64 = 512;
/// Devices of a group.
const MAX_DEVICES: u64 = 4096;

/// What every entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) number: u64,
    pub(crate) epoch: u64,
    pub(crate) writer: [u8; 16],
    /// Milliseconds since 1970 by the writer's clock: for people and for retention, never for safety.
    pub(crate) made: u64,
    pub(crate) last_commit: u64,
}

/// A data key of some tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyEntry {
    pub(crate) tenant: String,
    pub(crate) wrapped: Wrapped,
}

/// The part of a commit that is in the clear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refers {
    pub(crate) keys: Vec<KeyEntry>,
    pub(crate) sealed_with: DataKeyId,
    salt: [u8; 16],
    pub(crate) packs: Vec<ObjectId>,
    /// The map, its salt, and the data key that it is sealed with.
    pub(crate) map: Option<(MapRef, [u8; 16], DataKeyId)>,
}

/// Which kind of entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Opened,
    Commit(Refers),
    Barrier { collection: u64 },
}

/// A device of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeviceEntry {
    pub(crate) name: String,
    pub(crate) geometry: Geometry,
    /// Of its whole content, if the writer knew it.
    pub(crate) root: Option<Root>,
    /// Sealed length of each of its leaves in the map.
    pub(crate) leaves: Vec<u32>,
    /// What differs from the map; packs count in the entry's list.
    pub(crate) runs: Vec<Run>,
}

/// The sealed part of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Body {
    pub(crate) label: String,
    /// What the line was forked from.
    pub(crate) parent: Option<(LineName, u64)>,
    pub(crate) packs: Vec<PackRef>,
    pub(crate) devices: Vec<DeviceEntry>,
}

fn head_bytes(head: &Head, kind: u8) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.push(kind);
    put_varint(&mut out, head.number);
    put_varint(&mut out, head.epoch);
    out.extend_from_slice(&head.writer);
    put_varint(&mut out, head.made);
    put_varint(&mut out, head.last_commit);
    out
}

fn closed(mut out: Vec<u8>) -> Vec<u8> {
    let hash = blake3::hash(&out);
    out.extend_from_slice(hash.as_bytes());
    out
}

pub(crate) fn encode_opened(head: &Head) -> Vec<u8> {
    closed(head_bytes(head, 1))
}

pub(crate) fn encode_barrier(head: &Head, collection: u64) -> Vec<u8> {
    let mut out = head_bytes(head, 3);
    put_varint(&mut out, collection);
    closed(out)
}

/// What the sealed part is bound to: where it lies, and all in the clear.
fn bound(line: &LineName, clear: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(line.prefix().as_bytes()).update(&[0]).update(clear);
    *hasher.finalize().as_bytes()
}

/// Encodes a commit; `keys` hold the data keys of all packs and of the map.
pub(crate) fn encode_commit(
    line: &LineName,
    head: &Head,
    keys: &[KeyEntry],
    map: Option<(MapRef, [u8; 16], DataKeyId)>,
    body: &Body,
    key: &DataKey,
) -> Result<Vec<u8>> {
    let salt = crate::keys::random()?;
    let mut out = head_bytes(head, 2);
    put_varint(&mut out, keys.len() as u64);
    for entry in keys {
        put_text(&mut out, &entry.tenant);
        entry.wrapped.encode(&mut out);
    }
    out.extend_from_slice(&key.id.0);
    out.extend_from_slice(&salt);
    put_varint(&mut out, body.packs.len() as u64);
    body.packs.iter().for_each(|pack| out.extend_from_slice(&pack.id.0));
    match &map {
        None => out.push(0),
        Some((map, salt, key)) => {
            out.push(1);
            map.encode(&mut out);
            out.extend_from_slice(salt);
            out.extend_from_slice(&key.0);
        }
    }
    let packed = zstd::bulk::compress(&encode_body(body), 3)
        .map_err(|source| StoreError::Local { operation: "compress an entry", source })?;
    put_varint(&mut out, (packed.len() + crate::keys::TAG) as u64);
    let from = out.len();
    let bound = bound(line, &out);
    out.extend_from_slice(&packed);
    key.object_key(KEY_USE, &salt).seal(0, &bound, &mut out, from);
    if out.len() + HASH < LEAST_COMMIT as usize {
        out.resize(LEAST_COMMIT as usize - HASH, 0);
    }
    Ok(closed(out))
}

fn encode_body(body: &Body) -> Vec<u8> {
    let mut out = Vec::new();
    put_text(&mut out, &body.label);
    match &body.parent {
        None => put_text(&mut out, ""),
        Some((line, _)) => put_text(&mut out, &line.to_string()),
    }
    put_varint(&mut out, body.parent.as_ref().map_or(0, |(_, number)| *number));
    body.packs.iter().for_each(|pack| pack.encode(&mut out));
    put_varint(&mut out, body.devices.len() as u64);
    for device in &body.devices {
        put_text(&mut out, &device.name);
        put_varint(&mut out, device.geometry.bytes());
        out.push(device.geometry.block().trailing_zeros() as u8);
        match device.root {
            None => out.push(0),
            Some(root) => {
                out.push(1);
                out.extend_from_slice(&root);
            }
        }
        put_varint(&mut out, device.leaves.len() as u64);
        device.leaves.iter().for_each(|length| put_varint(&mut out, u64::from(*length)));
        runs::encode(&device.runs, 0, &mut out);
    }
    out
}

fn decode_body(bytes: &[u8], packs: &[ObjectId]) -> Result<Body, Malformed> {
    let mut reader = Reader::new(bytes);
    let label = reader.text(1024)?.to_owned();
    let line = reader.text(129)?;
    let number = reader.varint()?;
    let parent = match line {
        "" => None,
        line => Some((LineName::parse(line).map_err(|_| "its parent is no line")?, number)),
    };
    let mut records = Vec::with_capacity(packs.len());
    for id in packs {
        let record = PackRef::decode(&mut reader)?;
        if record.id != *id {
            return Err("its packs are not those that it lists");
        }
        records.push(record);
    }
    let count = reader.bounded(MAX_DEVICES)?;
    let mut devices = Vec::new();
    for _ in 0..count {
        let name = reader.text(64)?.to_owned();
        check_name("device", &name).map_err(|_| "a device's name is none")?;
        let bytes = reader.varint()?;
        let shift = reader.bounded(24)?;
        let geometry =
            Geometry::new(bytes, 1 << shift).map_err(|_| "a device's size is out of bounds")?;
        let root = match reader.u8()? {
            0 => None,
            1 => Some(reader.array()?),
            _ => return Err("a device's root is neither there nor not"),
        };
        let leaves = reader.count(1)?;
        if leaves != 0 && leaves as u64 != geometry.blocks().div_ceil(LEAF_BLOCKS) {
            return Err("a device has another number of leaves than its size asks for");
        }
        let leaves = (0..leaves)
            .map(|_| reader.bounded(1 << 30).map(|v| v as u32))
            .collect::<Result<_, _>>()?;
        let mut runs = Vec::new();
        runs::decode(&mut reader, 0..geometry.blocks(), records.len(), |run| runs.push(run))?;
        devices.push(DeviceEntry { name, geometry, root, leaves, runs });
    }
    reader.end()?;
    Ok(Body { label, parent, packs: records, devices })
}

/// A decoded entry.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) head: Head,
    pub(crate) kind: Kind,
    sealed: Vec<u8>,
    clear: Vec<u8>,
}

impl Entry {
    /// Reads the entry that lies at `object`.
    pub(crate) fn decode(object: &str, bytes: &[u8]) -> Result<Self> {
        Self::read(bytes).map_err(|detail| StoreError::corrupt(object, detail))
    }

    fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let (content, hash) =
            bytes.split_last_chunk::<HASH>().ok_or("it is too short for an entry")?;
        if blake3::hash(content).as_bytes() != hash {
            return Err("it is not what was stored");
        }
        let mut reader = Reader::new(content);
        if reader.array()? != *MAGIC {
            return Err("it is no entry of a line's log");
        }
        if reader.u16()? != VERSION {
            return Err("it is an entry of another version than 1");
        }
        let kind = reader.u8()?;
        let head = Head {
            number: reader.varint()?,
            epoch: reader.varint()?,
            writer: reader.array()?,
            made: reader.varint()?,
            last_commit: reader.varint()?,
        };
        let (kind, sealed, clear) = match kind {
            1 => (Kind::Opened, Vec::new(), Vec::new()),
            2 => {
                let refers = Self::refers(&mut reader)?;
                let length = reader.count(1)?;
                let clear = content[..content.len() - reader.left()].to_vec();
                let sealed = reader.bytes(length)?.to_vec();
                if reader.bytes(reader.left())?.iter().any(|byte| *byte != 0) {
                    return Err("something follows its end");
                }
                (Kind::Commit(refers), sealed, clear)
            }
            3 => (Kind::Barrier { collection: reader.varint()? }, Vec::new(), Vec::new()),
            _ => return Err("it is an entry of an unknown kind"),
        };
        if !matches!(kind, Kind::Commit(_)) {
            reader.end()?;
        }
        Ok(Self { head, kind, sealed, clear })
    }

    fn refers(reader: &mut Reader<'_>) -> Result<Refers, Malformed> {
        let count = reader.count(18)?;
        let mut keys = Vec::new();
        for _ in 0..count {
            let tenant = reader.text(64)?.to_owned();
            check_name("tenant", &tenant).map_err(|_| "a tenant's name is none")?;
            keys.push(KeyEntry { tenant, wrapped: Wrapped::decode(reader)? });
        }
        let sealed_with = DataKeyId(reader.array()?);
        let salt = reader.array()?;
        let count = reader.count(32)?;
        if count as u64 > MAX_PACKS {
            return Err("it lists too many packs");
        }
        let packs = (0..count).map(|_| reader.array().map(ObjectId)).collect::<Result<_, _>>()?;
        let map = match reader.u8()? {
            0 => None,
            1 => Some((MapRef::decode(reader)?, reader.array()?, DataKeyId(reader.array()?))),
            _ => return Err("its map is neither there nor not"),
        };
        Ok(Refers { keys, sealed_with, salt, packs, map })
    }

    /// The commit's part in the clear.
    pub(crate) fn commit(&self) -> Option<&Refers> {
        match &self.kind {
            Kind::Commit(refers) => Some(refers),
            Kind::Opened | Kind::Barrier { .. } => None,
        }
    }

    /// Opens the sealed part.
    pub(crate) fn open(&self, line: &LineName, key: &DataKey) -> Result<Body> {
        let object = line.entry(self.head.number);
        let Kind::Commit(refers) = &self.kind else {
            return Err(StoreError::corrupt(object, "it is no generation"));
        };
        let mut sealed = self.sealed.clone();
        let plain = key
            .object_key(KEY_USE, &refers.salt)
            .open(0, &bound(line, &self.clear), &mut sealed)
            .map(|plain| unzstd(plain, MAX_BODY));
        let corrupt = |detail| StoreError::corrupt(object.clone(), detail);
        match plain {
            None => Err(StoreError::Sealed { object, key: key.id.to_string() }),
            Some(plain) => decode_body(&plain.map_err(corrupt)?, &refers.packs).map_err(corrupt),
        }
    }
}

/// Decodes any bytes as an entry and as the opened part of one.
pub fn fuzz_entry(bytes: &[u8]) {
    let _ = Entry::read(bytes);
    // The hash keeps a fuzzer out: give it one that fits, too.
    let _ = Entry::read(&closed(bytes.to_vec()));
    let _ = decode_body(bytes, &[]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        format::runs::Content,
        keys::{KeyId, KeyRing},
    };
    use proptest::prelude::*;

    fn head(number: u64) -> Head {
        Head { number, epoch: 2, writer: [8; 16], made: 1_700_000_000_000, last_commit: 1 }
    }

    fn commit() -> (LineName, Vec<u8>, Body, DataKey) {
        let ring = KeyRing::from_keys([("one", [1; 32])]).unwrap();
        let key = DataKey::fixed(5);
        let wrapped = key.wrap(&ring, &KeyId::new("one").unwrap()).unwrap();
        let pack = PackRef {
            id: ObjectId([3; 32]),
            length: 9000,
            index: 90,
            key: key.id,
            salt: [4; 16],
            shift: 12,
        };
        let run = Run { start: 1, count: 2, content: Content::At { pack: 0, slot: 0 } };
        let device = DeviceEntry {
            name: "disk".into(),
            geometry: Geometry::new(20_000, 4096).unwrap(),
            root: Some([9; 32]),
            leaves: vec![77],
            runs: vec![run],
        };
        let line = LineName::new("acme", "vm").unwrap();
        let body = Body {
            label: "before the upgrade".into(),
            parent: Some((LineName::new("acme", "old").unwrap(), 4)),
            packs: vec![pack],
            devices: vec![device],
        };
        let map = MapRef { id: ObjectId([6; 32]), length: 1000, packs: 2, head: [7; 32] };
        let keys = [KeyEntry { tenant: "acme".into(), wrapped }];
        let bytes =
            encode_commit(&line, &head(7), &keys, Some((map, [1; 16], key.id)), &body, &key)
                .unwrap();
        (line, bytes, body, key)
    }

    #[test]
    fn entries_come_back_and_only_commits_are_long() {
        let (line, bytes, body, key) = commit();
        assert!(bytes.len() as u64 >= LEAST_COMMIT);
        let entry = Entry::decode("x", &bytes).unwrap();
        assert_eq!(entry.head, head(7));
        assert_eq!(entry.commit().unwrap().packs, [ObjectId([3; 32])]);
        assert_eq!(entry.open(&line, &key).unwrap(), body);

        let opened = encode_opened(&head(u64::MAX));
        assert_eq!(Entry::decode("x", &opened).unwrap().kind, Kind::Opened);
        let barrier = encode_barrier(&head(3), u64::MAX);
        let kind = Entry::decode("x", &barrier).unwrap().kind;
        assert_eq!(kind, Kind::Barrier { collection: u64::MAX });
        assert!((opened.len().max(barrier.len()) as u64) < LEAST_COMMIT);
    }

    #[test]
    fn an_entry_opens_only_in_its_own_line_and_with_its_own_key() {
        let (_, bytes, _, key) = commit();
        let entry = Entry::decode("x", &bytes).unwrap();
        let other = LineName::new("acme", "other").unwrap();
        assert!(matches!(entry.open(&other, &key), Err(StoreError::Sealed { .. })));
        let (line, ..) = commit();
        assert!(matches!(entry.open(&line, &DataKey::fixed(6)), Err(StoreError::Sealed { .. })));
    }

    #[test]
    fn the_format_is_what_it_was() {
        let bytes = encode_barrier(&head(300), 5);
        let golden = [
            b"SILOLOG1\x01\x00\x03\xac\x02\x02".as_slice(),
            &[8; 16],
            &[0x80, 0xd0, 0x95, 0xff, 0xbc, 0x31, 1, 5],
        ]
        .concat();
        assert_eq!(bytes[..bytes.len() - HASH], golden);
    }

    proptest! {
        #[test]
        fn a_changed_byte_anywhere_is_an_error(at: prop::sample::Index, bit in 0u8..8) {
            let (_, mut bytes, ..) = commit();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let is_refused = matches!(Entry::decode("x", &bytes), Err(StoreError::Corrupt { .. }));
            prop_assert!(is_refused);
        }

        #[test]
        fn any_bytes_are_an_entry_or_an_error(bytes: Vec<u8>) {
            fuzz_entry(&bytes);
        }
    }
}
