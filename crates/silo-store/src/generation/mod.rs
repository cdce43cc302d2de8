//! A generation that was opened for reading: which devices it has, and every block of them, read
//! when it is asked for, opened with its key and checked against its name.
//!
//! Requests for the first block: list, entry, leaf of the map, index of a pack, chunk.

mod cache;
mod device;
mod restore;
#[cfg(test)]
mod tests;

pub use device::GenerationDevice;
pub use restore::{RestoreOptions, Restored};

use crate::{
    StoreError,
    error::Result,
    format::{
        map::{LEAF_BLOCKS, MapRef, Opener},
        pack::{Chunk, Opened, PackRef},
        runs::{Content, Run},
    },
    keys::{BlockName, DataKey, DataKeyId, KeySource},
    layout::{LineName, ObjectId},
    log::{DeviceEntry, Entry, Refers},
    pin::Pin,
    root::Sum,
    store::Store,
    writer::{from_word, to_word},
};
use cache::{Cache, Key, Value};
use silo_block::{
    block::{BlockIndex, BlockSet},
    geometry::Geometry,
};
use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Which generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The newest.
    Newest,
    /// That of this number.
    Number(u64),
}

/// A device of a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDevice {
    /// Its name.
    pub name: String,
    /// Size and blocks.
    pub geometry: Geometry,
    /// A hash of all of its content, which is equal for equal content of one tenant; not known of a
    /// generation whose writer had not read the whole device.
    pub root: Option<[u8; 32]>,
}

struct Part {
    entry: DeviceEntry,
    /// Number of its first leaf in the map, and where that begins in the object.
    first_leaf: u64,
    leaf_offsets: Vec<u64>,
}

/// Packs that were heard of, with a number each.
#[derive(Default)]
struct Packs {
    refs: Vec<PackRef>,
    numbers: HashMap<ObjectId, u32>,
}

impl Packs {
    fn number(&mut self, pack: &PackRef) -> u32 {
        let refs = &mut self.refs;
        *self.numbers.entry(pack.id).or_insert_with(|| {
            refs.push(*pack);
            refs.len() as u32 - 1
        })
    }
}

/// A generation. Share it by [`Arc`].
pub struct Generation {
    pub(crate) store: Arc<Store>,
    pub(crate) line: LineName,
    entry: Entry,
    pub(crate) refers: Refers,
    keys: HashMap<DataKeyId, DataKey>,
    label: String,
    parent: Option<(LineName, u64)>,
    parts: Vec<Part>,
    packs: RwLock<Packs>,
    opener: Option<(MapRef, Opener)>,
    cache: Cache,
    /// What it refers to is kept in the store, for as long as this is open.
    pub(crate) pin: Mutex<Option<Pin>>,
}

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Zero,
    At { pack: u32, slot: u32 },
}

impl Generation {
    /// Opens a generation with room for `cache` bytes of what was read.
    ///
    /// # Errors
    /// If there is no such generation, its key is lost, or it is damaged.
    pub fn open(
        store: &Arc<Store>,
        keys: &dyn KeySource,
        line: &LineName,
        which: Which,
        cache: usize,
    ) -> Result<Arc<Self>> {
        let none = || StoreError::NoGeneration { line: line.to_string() };
        let entry = match which {
            Which::Number(number) => {
                store.read_entry(line, number).map_err(|error| match error {
                    StoreError::Missing { .. } => none(),
                    other => other,
                })?
            }
            Which::Newest => {
                let newest = store.newest(line)?;
                let found = newest.iter().find(|found| found.is_commit).ok_or_else(none)?;
                store.read_entry(line, found.number)?
            }
        };
        let refers = entry.commit().cloned().ok_or_else(none)?;
        let object = line.entry(entry.head.number);
        let mut opened = HashMap::new();
        for key in &refers.keys {
            opened.insert(key.wrapped.id, store.data_key(key, keys)?);
        }
        let key = opened.get(&refers.sealed_with).ok_or_else(|| {
            StoreError::corrupt(&object, "it does not list the key that it is sealed with")
        })?;
        let body = entry.open(line, key)?;
        let mut packs = Packs::default();
        let table: Vec<u32> = body.packs.iter().map(|pack| packs.number(pack)).collect();
        let opener = match &refers.map {
            None => None,
            Some((map, salt, id)) => {
                let key = opened.get(id).ok_or_else(|| {
                    StoreError::corrupt(&object, "it does not list the key of its map")
                })?;
                Some((*map, Opener::new(*map, *salt, key)))
            }
        };
        let mut offset = refers.map.as_ref().map_or(0, |map| map.0.head_length());
        let mut first_leaf = 0;
        let mut parts = Vec::new();
        for mut device in body.devices {
            for run in &mut device.runs {
                if let Content::At { pack, .. } = &mut run.content {
                    *pack = table[*pack as usize];
                }
            }
            let leaf_offsets = device
                .leaves
                .iter()
                .map(|length| {
                    offset += u64::from(*length);
                    offset - u64::from(*length)
                })
                .collect();
            let count = device.leaves.len() as u64;
            parts.push(Part { entry: device, first_leaf, leaf_offsets });
            first_leaf += count;
        }
        Ok(Arc::new(Self {
            store: store.clone(),
            line: line.clone(),
            entry,
            refers,
            keys: opened,
            label: body.label,
            parent: body.parent,
            parts,
            packs: RwLock::new(packs),
            opener,
            cache: Cache::new(cache, Duration::from_secs(300)),
            pin: Mutex::default(),
        }))
    }

    /// Its line.
    #[must_use]
    pub fn line(&self) -> &LineName {
        &self.line
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.entry.head.number
    }

    /// Who wrote it: different for each writer that a line ever had.
    #[must_use]
    pub fn writer(&self) -> [u8; 16] {
        self.entry.head.writer
    }

    /// When it was written, by the writer's clock.
    #[must_use]
    pub fn made(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.entry.head.made.min(1 << 50))
    }

    /// What whoever made it called it.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The generation that the line was forked from here, if this is the first of a fork.
    #[must_use]
    pub fn parent(&self) -> Option<(&LineName, u64)> {
        self.parent.as_ref().map(|(line, number)| (line, *number))
    }

    /// Ids of the tenant keys that its data keys are wrapped with in the entry.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.refers.keys.iter().map(|key| key.wrapped.by.as_str())
    }

    /// Its devices.
    #[must_use]
    pub fn devices(&self) -> Vec<StoredDevice> {
        let stored = |part: &Part| StoredDevice {
            name: part.entry.name.clone(),
            geometry: part.entry.geometry,
            root: part.entry.root,
        };
        self.parts.iter().map(stored).collect()
    }

    /// Memory taken for what was read, in bytes.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.cache.memory()
    }

    /// The place of a device in [`Generation::devices`].
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn find(&self, device: &str) -> Result<usize> {
        self.parts.iter().position(|part| part.entry.name == device).ok_or_else(|| {
            let names: Vec<_> = self.parts.iter().map(|part| part.entry.name.as_str()).collect();
            StoreError::NoDevice {
                line: self.line.to_string(),
                number: self.number(),
                device: device.to_owned(),
                has: names.join(", "),
            }
        })
    }

    /// The name of a block's content; `None` for zeros. Whoever gets the block from somewhere else can
    /// check it with [`Generation::name`].
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn block_name(
        &self,
        device: usize,
        block: BlockIndex,
    ) -> Result<Option<(DataKeyId, BlockName)>> {
        let Place::At { pack, slot } = self.place(device, block)? else { return Ok(None) };
        let opened = self.index(pack)?;
        let name = opened.index.names.get(slot as usize).copied();
        name.map(|name| Some((opened.pack.key, name))).ok_or_else(|| self.no_slot(&opened, slot))
    }

    /// Names content as [`Generation::block_name`] does under `key`, a whole block padded with zeros.
    #[must_use]
    pub fn name(&self, key: DataKeyId, block: &[u8]) -> Option<BlockName> {
        self.keys.get(&key).map(|key| key.name(block))
    }

    fn no_slot(&self, opened: &Opened, slot: u32) -> StoreError {
        StoreError::corrupt(
            opened.pack.id.pack(),
            format!(
                "it has no block {slot}, which generation {} of {} refers to",
                self.number(),
                self.line
            ),
        )
    }

    fn key(&self, id: DataKeyId) -> Result<&DataKey> {
        self.keys.get(&id).ok_or_else(|| {
            StoreError::corrupt(
                self.line.entry(self.number()),
                format!("it does not list data key {id}"),
            )
        })
    }

    fn pack(&self, number: u32) -> PackRef {
        self.packs.read().unwrap_or_else(PoisonError::into_inner).refs[number as usize]
    }

    fn leaf_range(&self, device: usize, leaf: u64) -> Range<u64> {
        let blocks = self.parts[device].entry.geometry.blocks();
        leaf * LEAF_BLOCKS..((leaf + 1) * LEAF_BLOCKS).min(blocks)
    }

    /// The words of a leaf: the map's, with what the entry says over them.
    fn leaf(&self, device: usize, leaf: u64) -> Result<Arc<[u64]>> {
        let value = self
            .cache
            .get(Key::Leaf(device, leaf), || Ok(Value::Leaf(self.read_leaf(device, leaf)?)))?;
        match value {
            Value::Leaf(words) => Ok(words),
            Value::Index(_) | Value::Chunk(_) => {
                unreachable!("leaves are kept under keys of leaves")
            }
        }
    }

    fn read_leaf(&self, device: usize, leaf: u64) -> Result<Arc<[u64]>> {
        let (part, range) = (&self.parts[device], self.leaf_range(device, leaf));
        let mut words = vec![0; (range.end - range.start) as usize];
        let mut put = |run: &Run| {
            let (from, to) = (run.start.max(range.start), run.end().min(range.end));
            for block in from..to {
                let content = match run.content {
                    Content::Zero => Content::Zero,
                    Content::At { pack, slot } => {
                        Content::At { pack, slot: slot + (block - run.start) as u32 }
                    }
                };
                words[(block - range.start) as usize] = to_word(content);
            }
        };
        let length = part.entry.leaves.get(leaf as usize).copied().unwrap_or(0);
        if let (Some((map, opener)), true) = (&self.opener, length > 0) {
            let offset = part.leaf_offsets[leaf as usize];
            let bytes =
                self.store.remote.get_range(&map.id.map(), offset..offset + u64::from(length))?;
            let mut runs = Vec::new();
            let number = part.first_leaf + leaf;
            let table = opener.leaf(number, &bytes, range.clone(), |run| runs.push(run))?;
            let mut packs = self.packs.write().unwrap_or_else(PoisonError::into_inner);
            let table: Vec<u32> = table.iter().map(|pack| packs.number(pack)).collect();
            for mut run in runs {
                if let Content::At { pack, .. } = &mut run.content {
                    *pack = table[*pack as usize];
                }
                put(&run);
            }
        }
        let runs = &part.entry.runs;
        let first = runs.partition_point(|run| run.end() <= range.start);
        runs[first..].iter().take_while(|run| run.start < range.end).for_each(put);
        Ok(words.into())
    }

    fn place(&self, device: usize, block: BlockIndex) -> Result<Place> {
        let leaf = self.leaf(device, block.0 / LEAF_BLOCKS)?;
        Ok(match from_word(leaf[(block.0 % LEAF_BLOCKS) as usize]) {
            Content::Zero => Place::Zero,
            Content::At { pack, slot } => Place::At { pack, slot },
        })
    }

    /// The blocks of a device that are not zeros.
    ///
    /// # Errors
    /// If there is no such device, or the store cannot be read.
    pub fn data_blocks(&self, name: &str) -> Result<BlockSet> {
        let device = self.find(name)?;
        let blocks = self.parts[device].entry.geometry.blocks();
        let mut data = BlockSet::new(blocks);
        for leaf in 0..blocks.div_ceil(LEAF_BLOCKS) {
            for (at, word) in self.leaf(device, leaf)?.iter().enumerate() {
                if from_word(*word) != Content::Zero {
                    data.insert(BlockIndex(leaf * LEAF_BLOCKS + at as u64));
                }
            }
        }
        Ok(data)
    }

    /// Calls `each` with every pack that blocks of this are in.
    pub(crate) fn refers_to(&self, mut each: impl FnMut(&PackRef)) -> Result<()> {
        let mut seen = std::collections::BTreeSet::new();
        for device in 0..self.parts.len() {
            let blocks = self.parts[device].entry.geometry.blocks();
            for leaf in 0..blocks.div_ceil(LEAF_BLOCKS) {
                for word in self.read_leaf(device, leaf)?.iter() {
                    if let Content::At { pack, .. } = from_word(*word) {
                        seen.insert(pack);
                    }
                }
            }
        }
        seen.into_iter().for_each(|pack| each(&self.pack(pack)));
        Ok(())
    }

    /// The key of the tenant that wrote it: names of blocks in roots are under this one.
    pub(crate) fn namer(&self) -> Result<&DataKey> {
        self.key(self.refers.sealed_with)
    }

    /// The sum of a device's blocks by the maps, with the tags of blocks in packs; none if they are
    /// not known of all packs.
    pub(crate) fn sum(
        &self,
        device: usize,
        tags: &HashMap<ObjectId, Vec<u32>>,
    ) -> Result<Option<Sum>> {
        let blocks = self.parts[device].entry.geometry.blocks();
        let mut sum = Sum::default();
        for leaf in 0..blocks.div_ceil(LEAF_BLOCKS) {
            for (at, word) in self.read_leaf(device, leaf)?.iter().enumerate() {
                let Content::At { pack, slot } = from_word(*word) else { continue };
                let id = self.pack(pack).id;
                let Some(tags) = tags.get(&id) else { return Ok(None) };
                let tag = tags.get(slot as usize).copied();
                // No such block: another one than any that was backed up.
                sum.add(leaf * LEAF_BLOCKS + at as u64, tag.unwrap_or(u32::MAX));
            }
        }
        Ok(Some(sum))
    }

    /// An error if a device has another content than its writer had.
    pub(crate) fn check_root(&self, device: usize, sum: Sum) -> Result<()> {
        let DeviceEntry { name, geometry, root, .. } = &self.parts[device].entry;
        if root.is_none_or(|root| root == sum.root(*geometry)) {
            return Ok(());
        }
        let object = self.line.entry(self.number());
        let detail = format!(
            "the content that it gives for device \"{name}\" is not what was backed up (the root is \
             another one); use another generation"
        );
        Err(StoreError::corrupt(object, detail))
    }

    /// Data keys of everything that it refers to.
    pub(crate) fn data_keys(&self) -> &HashMap<DataKeyId, DataKey> {
        &self.keys
    }

    /// The map that the entry refers to.
    pub(crate) fn map(&self) -> Option<MapRef> {
        self.opener.as_ref().map(|(map, _)| *map)
    }

    /// The opened index of a pack.
    fn index(&self, pack: u32) -> Result<Arc<Opened>> {
        let value = self.cache.get(Key::Index(pack), || {
            let reference = self.pack(pack);
            let key = self.key(reference.key)?;
            let tail = self.store.remote.get_range(&reference.id.pack(), reference.tail())?;
            Ok(Value::Index(Arc::new(Opened::new(&reference, &tail, key)?)))
        })?;
        match value {
            Value::Index(opened) => Ok(opened),
            Value::Leaf(_) | Value::Chunk(_) => {
                unreachable!("indexes are kept under keys of indexes")
            }
        }
    }

    /// Opens a chunk and checks it against the names of its blocks.
    fn opened_chunk(&self, opened: &Opened, chunk: &Chunk, bytes: &mut [u8]) -> Result<Arc<[u8]>> {
        let mut room = Vec::new();
        let content = opened.chunk(chunk, bytes, &mut room)?;
        opened.check(chunk, content, self.key(opened.pack.key)?)?;
        Ok(content.into())
    }

    /// The content of a chunk.
    fn chunk(&self, pack: u32, opened: &Opened, chunk: &Chunk) -> Result<Arc<[u8]>> {
        let value = self.cache.get(Key::Chunk(pack, chunk.number), || {
            let bytes = self.store.remote.get_range(&opened.pack.id.pack(), chunk.range())?;
            Ok(Value::Chunk(self.opened_chunk(opened, chunk, &mut Vec::from(bytes))?))
        })?;
        match value {
            Value::Chunk(content) => Ok(content),
            Value::Leaf(_) | Value::Index(_) => {
                unreachable!("chunks are kept under keys of chunks")
            }
        }
    }

    /// Reads whole blocks: `buf` is a multiple of the block size.
    pub(crate) fn read_blocks(&self, device: usize, first: u64, buf: &mut [u8]) -> Result<()> {
        self.try_read_blocks(device, first, buf).map_err(|error| self.explained(error))
    }

    fn try_read_blocks(&self, device: usize, first: u64, buf: &mut [u8]) -> Result<()> {
        let size = self.parts[device].entry.geometry.block() as usize;
        for (at, out) in buf.chunks_mut(size).enumerate() {
            match self.place(device, BlockIndex(first + at as u64))? {
                Place::Zero => out.fill(0),
                Place::At { pack, slot } => {
                    let opened = self.index(pack)?;
                    let chunk =
                        *opened.index.chunk_of(slot).ok_or_else(|| self.no_slot(&opened, slot))?;
                    let content = self.chunk(pack, &opened, &chunk)?;
                    let from = (slot - chunk.first) as usize * size;
                    let block = content.get(from..from + out.len());
                    out.copy_from_slice(block.ok_or_else(|| self.no_slot(&opened, slot))?);
                }
            }
        }
        Ok(())
    }
}
