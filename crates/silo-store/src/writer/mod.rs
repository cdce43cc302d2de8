//! The one that stores generations of a line.
//!
//! ```text
//! open ─ take the line (entry "opened") ─ look at tombstones ─ read the newest generation
//!   │
//! store ─ read blocks, name them ─ known? refer : pack, seal, send ─ all sent? ─ map due? write it
//!   │                                                                  │
//!   │   create entry n + 1 ── done ──▶ committed                       └ failed: take back, blocks
//!   │        │                                                           stay to be stored
//!   │        ├── taken by a collection's barrier: drop what it will delete, create n + 2
//!   │        ├── taken by ourselves: an earlier create, thought lost, took effect; n + 2
//!   │        └── taken by another writer: fenced, for good
//! ```
//!
//! What must hold:
//! - An entry refers only to packs that the store said it has, and to none that a collection whose
//!   barrier is in the log before it has condemned.
//! - After an error the writer says what the line's newest generation says; a create of which the
//!   outcome is unknown is found out about before the next.
//! - Safety does not depend on clocks or on how long anything takes.

mod names;
mod open;
mod places;
mod round;
mod sealing;
mod upload;

pub(crate) use places::{from_word, to_word};
pub use round::Rest;
pub(crate) use sealing::{PackKey, Sealed, Sealers, Squeezer};
pub use upload::PackOptions;
pub(crate) use upload::{Limiter, wait};

use crate::{
    StoreError,
    capture::DeviceInfo,
    collect::Condemned,
    error::Result,
    format::{
        map::{self, Leaf, MapRef},
        runs::Run,
    },
    keys::{DataKey, DataKeyId},
    layout::{LineName, ObjectId},
    log::{self, Body, DeviceEntry, Head, KeyEntry, Kind},
    remote::Requests,
    root::{Root, Tags},
    store::{Appended, Store},
};
use names::Names;
use places::Places;
use silo_block::block::BlockRange;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use upload::{Slot, State};

/// How a writer works.
#[derive(Clone, Copy, Debug)]
pub struct WriterOptions {
    /// Of packs.
    pub packs: PackOptions,
    /// Memory for remembering which content is stored already, in bytes.
    pub names: usize,
    /// Most bytes per second to the store.
    pub rate: Option<u64>,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self { packs: PackOptions::default(), names: 64 << 20, rate: None }
    }
}

/// A generation that was committed.
#[derive(Clone, Debug, Default)]
pub struct Stored {
    /// Its number.
    pub number: u64,
    /// The writer that stored it, by the name that it drew when it took the line.
    pub writer: [u8; 16],
    /// Blocks that the round listed.
    pub blocks: u64,
    /// Of these, zeros.
    pub zeros: u64,
    /// Of these, blocks whose content was stored already.
    pub known: u64,
    /// Content of the others, in bytes, before compression.
    pub content: u64,
    /// Bytes of packs.
    pub pack_bytes: u64,
    /// Packs.
    pub packs: u64,
    /// Bytes of the map, if one was written.
    pub map_bytes: u64,
    /// Bytes of the entry.
    pub entry_bytes: u64,
    /// Requests made for it.
    pub requests: Requests,
    /// Longest time that a writer to the devices was held by the round.
    pub held: Duration,
    /// From the freeze to the commit.
    pub took: Duration,
}

impl Stored {
    /// All bytes that the generation cost in the store.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pack_bytes + self.map_bytes + self.entry_bytes
    }
}

/// A device as the line knows it.
struct Held {
    name: String,
    /// Of the content that the next entry tells of, if that is known.
    root: Option<Root>,
    places: Places,
    /// What its blocks were when they were read.
    tags: Tags,
    /// Sealed lengths of its leaves in the map.
    leaves: Vec<u32>,
}

/// Whether the writer still owns the line.
enum Standing {
    /// As far as it knows.
    Owner,
    /// Another has entry `number`.
    Fenced { number: u64, epoch: u64 },
}

/// Writes generations of one line. Takes the line over from whoever wrote it before.
pub struct LineWriter {
    store: Arc<Store>,
    line: LineName,
    nonce: [u8; 16],
    epoch: u64,
    /// Newest entry that is known, which is this writer's or a barrier that it has seen.
    head: u64,
    last_commit: u64,
    /// Whoever wrote that.
    newest_by: [u8; 16],
    standing: Standing,
    key: DataKey,
    /// Wrapped data keys of everything that is referred to, and of what is new.
    keys: BTreeMap<DataKeyId, KeyEntry>,
    /// Those that were unwrapped.
    data_keys: HashMap<DataKeyId, DataKey>,
    packs: Vec<Slot>,
    numbers: HashMap<ObjectId, u32>,
    devices: Vec<Held>,
    map: Option<(MapRef, [u8; 16], DataKeyId)>,
    /// Bytes of entries since the map was written.
    since_map: u64,
    names: Names,
    condemned: Condemned,
    /// Packs that the newest generation refers to.
    referred: BTreeSet<u32>,
    /// Content that the line says it has may be gone: the next round has to list all blocks.
    incomplete: bool,
    /// Names of the newest generation's blocks are known.
    seeded: bool,
    /// The store was asked to commit the last round.
    asked: bool,
    parent: Option<(LineName, u64)>,
    options: WriterOptions,
    limiter: Limiter,
    began: Instant,
}

/// Entries smaller than this do not ask for a new map.
const SMALL: u64 = 128 << 10;

/// How often an entry is tried under the next number before the round is given up.
const TRIES: usize = 16;

impl LineWriter {
    /// The line.
    #[must_use]
    pub fn line(&self) -> &LineName {
        &self.line
    }

    /// The store that it lies in.
    #[must_use]
    pub fn store_of(&self) -> &Arc<Store> {
        &self.store
    }

    /// The number of the newest generation; 0 if there is none.
    #[must_use]
    pub fn newest(&self) -> u64 {
        self.last_commit
    }

    /// Names of the devices that the line holds; none of a new line.
    #[must_use]
    pub fn device_names(&self) -> Vec<&str> {
        self.devices.iter().map(|held| held.name.as_str()).collect()
    }

    /// Whether the last round that failed may be in the store all the same, or come to be there: the
    /// store was asked to commit it.
    #[must_use]
    pub fn may_have_committed(&self) -> bool {
        self.asked
    }

    /// The writer that stored the newest generation ([`Stored::writer`]).
    #[must_use]
    pub fn newest_by(&self) -> [u8; 16] {
        self.newest_by
    }

    /// Whether a round must list all blocks: nothing is known to be stored, or not surely.
    #[must_use]
    pub fn needs_everything(&self) -> bool {
        self.incomplete || self.last_commit == 0
    }

    /// Bytes of memory that places of blocks and names take.
    #[must_use]
    pub fn memory(&self) -> usize {
        let device = |held: &Held| held.places.memory() + held.tags.memory();
        self.devices.iter().map(device).sum::<usize>() + self.packs.len() * size_of::<Slot>()
    }

    fn check_owner(&self) -> Result<()> {
        match self.standing {
            Standing::Owner => Ok(()),
            Standing::Fenced { number, epoch } => {
                Err(StoreError::Fenced { line: self.line.to_string(), number, epoch })
            }
        }
    }

    /// Makes the writer's devices those of `infos`.
    fn fit(&mut self, infos: &[DeviceInfo]) -> Result<()> {
        let wrong = |detail: String| StoreError::Group { line: self.line.to_string(), detail };
        for (at, info) in infos.iter().enumerate() {
            crate::layout::check_name("device", &info.name)?;
            if infos[..at].iter().any(|other| other.name == info.name) {
                return Err(wrong(format!("two devices have the name \"{}\"", info.name)));
            }
        }
        if self.devices.is_empty() {
            self.devices = infos.iter().map(Held::new).collect();
            return Ok(());
        }
        let same = self.devices.len() == infos.len()
            && self.devices.iter().zip(infos).all(|(held, info)| held.name == info.name);
        if !same {
            let names = |names: Vec<&str>| names.join(", ");
            return Err(wrong(format!(
                "it holds devices {}, not {}; back this group up to another line",
                names(self.devices.iter().map(|held| held.name.as_str()).collect()),
                names(infos.iter().map(|info| info.name.as_str()).collect()),
            )));
        }
        let (line, mut changed) = (self.line.to_string(), false);
        for (held, info) in self.devices.iter_mut().zip(infos) {
            if held.places.geometry() != info.geometry {
                (changed, held.tags) = (true, Tags::new(info.geometry));
            }
            if !held.places.resize(info.geometry) {
                let detail = format!(
                    "device \"{}\" is stored in blocks of {} bytes, not of {}",
                    info.name,
                    held.places.geometry().block(),
                    info.geometry.block()
                );
                return Err(StoreError::Group { line, detail });
            }
        }
        if changed {
            self.forget_map();
        }
        Ok(())
    }

    fn commit(&mut self, label: &str, stop: &AtomicBool, stored: &mut Stored) -> Result<u64> {
        let map_due = self.since_map > self.map.as_ref().map_or(SMALL, |m| m.0.length.max(SMALL));
        let mut map = None;
        for _ in 0..TRIES {
            if stop.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(StoreError::Stopped);
            }
            if map_due && map.is_none() {
                map = Some(self.write_map(stored)?);
            }
            let number = self.head + 1;
            let (entry, used) = self.encode(number, label, map.as_ref())?;
            let length = entry.len() as u64;
            self.asked = true;
            match self.store.append(&self.line, number, entry)? {
                Appended::Done => {
                    self.committed(number, length, used, map);
                    stored.entry_bytes = length;
                    return Ok(number);
                }
                Appended::Taken(other) => {
                    self.taken(&other)?;
                    // What the new map lies in may be condemned as well.
                    if map.as_ref().is_some_and(|map| self.condemned.has(&map.0.0.id)) {
                        map = None;
                    }
                }
            }
        }
        Err(StoreError::Busy(format!(
            "line \"{}\": {TRIES} collections came in between one commit; try again later",
            self.line
        )))
    }

    fn committed(&mut self, number: u64, length: u64, used: BTreeSet<u32>, map: Option<NewMap>) {
        (self.head, self.last_commit, self.referred) = (number, number, used);
        self.newest_by = self.nonce;
        self.since_map += length;
        self.parent = None;
        if let Some((reference, mut lengths)) = map {
            for held in &mut self.devices {
                let count = held.places.leaf_ranges().count();
                let rest = lengths.split_off(count.min(lengths.len()));
                held.leaves = std::mem::replace(&mut lengths, rest);
                held.places.differs =
                    silo_block::block::BlockSet::new(held.places.geometry().blocks());
            }
            (self.map, self.since_map) = (Some(reference), 0);
        }
    }

    /// Another entry has the next number.
    fn taken(&mut self, other: &log::Entry) -> Result<()> {
        let Head { number, epoch, writer, .. } = other.head;
        match &other.kind {
            Kind::Barrier { collection } => {
                let news = Condemned::of(&self.store, *collection)?;
                self.head = number;
                self.condemn(&news)
            }
            Kind::Commit(_) if writer == self.nonce => {
                // A create of ours whose answer was lost. What it refers to stays as long as it is
                // the newest, but the state here is the one before it: exempt nothing.
                (self.head, self.last_commit) = (number, number);
                self.newest_by = self.nonce;
                self.referred.clear();
                Ok(())
            }
            Kind::Commit(_) | Kind::Opened => {
                self.standing = Standing::Fenced { number, epoch };
                self.check_owner()
            }
        }
    }

    /// A collection is about to delete these.
    fn condemn(&mut self, news: &Condemned) -> Result<()> {
        let mut needed = false;
        let mut used: BTreeSet<u32> = BTreeSet::new();
        self.devices.iter().for_each(|held| held.places.for_packs(|pack| _ = used.insert(pack)));
        for (number, slot) in self.packs.iter_mut().enumerate() {
            if slot.state == State::Stored && news.has(&slot.pack.id) {
                let number = number as u32;
                slot.state = State::Condemned;
                // What the newest generation refers to is found by the collection, and stays.
                needed |= used.contains(&number) && !self.referred.contains(&number);
            }
        }
        let packs = &self.packs;
        self.names.forget(|pack| packs[pack as usize].state != State::Stored);
        if self.map.as_ref().is_some_and(|map| news.has(&map.0.id)) && self.referred.is_empty() {
            self.forget_map();
        }
        self.condemned.add(news);
        if needed {
            self.incomplete = true;
            return Err(StoreError::Busy(format!(
                "line \"{}\": a collection deletes content that this generation was to refer to; the next one stores it again",
                self.line
            )));
        }
        Ok(())
    }

    /// The next entry says all by itself.
    fn forget_map(&mut self) {
        (self.map, self.since_map) = (None, u64::MAX / 2);
        for held in &mut self.devices {
            held.leaves.clear();
            let blocks = held.places.geometry().blocks();
            held.places.differs.insert_range(BlockRange::new(0, blocks));
        }
    }

    fn write_map(&mut self, stored: &mut Stored) -> Result<NewMap> {
        let mut used = BTreeSet::new();
        self.devices.iter().for_each(|held| held.places.for_packs(|pack| _ = used.insert(pack)));
        let refs: Vec<_> = self.packs.iter().map(|slot| slot.pack).collect();
        let leaves = self.devices.iter().flat_map(|held| {
            let places = &held.places;
            places.leaf_ranges().map(|(blocks, any)| {
                let runs = if any { places.runs(blocks.clone(), false) } else { Vec::new() };
                Leaf { blocks, runs }
            })
        });
        let (reference, bytes, lengths) = map::encode(leaves, &used, &refs, &self.key)?;
        let salt = map::salt_of(&bytes);
        stored.map_bytes += bytes.len() as u64;
        self.store.remote.start_put(&reference.id.map(), bytes).wait()?;
        Ok(((reference, salt, self.key.id), lengths))
    }

    /// The next entry, and the packs that it or its map refers to.
    fn encode(
        &self,
        number: u64,
        label: &str,
        new_map: Option<&NewMap>,
    ) -> Result<(Vec<u8>, BTreeSet<u32>)> {
        let mut all = BTreeSet::new();
        self.devices.iter().for_each(|held| held.places.for_packs(|pack| _ = all.insert(pack)));
        let mut runs: Vec<Vec<Run>> = self
            .devices
            .iter()
            .map(|held| if new_map.is_some() { Vec::new() } else { held.places.difference() })
            .collect();
        let table = map::localize(runs.iter_mut().flatten());
        let packs: Vec<_> = table.iter().map(|pack| self.packs[*pack as usize].pack).collect();
        let mut lengths = new_map.map(|map| map.1.as_slice());
        let devices = self
            .devices
            .iter()
            .zip(runs)
            .map(|(held, runs)| {
                let leaves = match &mut lengths {
                    None => held.leaves.clone(),
                    Some(all) => {
                        let count = held.places.leaf_ranges().count();
                        let (ours, rest) = all.split_at(count.min(all.len()));
                        *all = rest;
                        ours.to_vec()
                    }
                };
                let (name, geometry) = (held.name.clone(), held.places.geometry());
                DeviceEntry { name, geometry, root: held.root, leaves, runs }
            })
            .collect();
        let map = new_map.map(|map| map.0).or(self.map);
        let mut ids: BTreeSet<DataKeyId> =
            all.iter().map(|pack| self.packs[*pack as usize].pack.key).collect();
        ids.insert(self.key.id);
        ids.extend(map.map(|map| map.2));
        let keys: Vec<KeyEntry> = ids.iter().filter_map(|id| self.keys.get(id)).cloned().collect();
        let label: String = label.chars().take(200).collect();
        let body = Body { label, parent: self.parent.clone(), packs, devices };
        let head = Head {
            number,
            epoch: self.epoch,
            writer: self.nonce,
            made: now(),
            last_commit: self.last_commit,
        };
        let bytes = log::encode_commit(&self.line, &head, &keys, map, &body, &self.key)?;
        Ok((bytes, all))
    }
}

/// A map that was just written, and the lengths of its leaves.
type NewMap = ((MapRef, [u8; 16], DataKeyId), Vec<u32>);

impl Held {
    fn new(info: &DeviceInfo) -> Self {
        let (name, places) = (info.name.clone(), Places::new(info.geometry));
        Self { name, root: None, places, tags: Tags::new(info.geometry), leaves: Vec::new() }
    }
}

/// Milliseconds since 1970, for people.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
