//! Taking a line, reading what it holds, and beginning a line from a generation of another.

use super::{Held, Limiter, LineWriter, Names, Places, Slot, Standing, State, WriterOptions, now};
use crate::{
    StoreError,
    collect::Condemned,
    error::Result,
    format::{
        map::Opener,
        pack::{Opened, PackRef},
        runs::{Content, Run},
    },
    keys::{KeySource, random},
    layout::LineName,
    log::{Entry, Head, encode_opened},
    root::Tags,
    store::{Appended, Store},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, atomic::AtomicBool},
    time::Instant,
};

/// How often taking a line is tried when others take it too.
const TRIES: usize = 16;

/// A line that was just taken.
struct Taken {
    number: u64,
    epoch: u64,
    nonce: [u8; 16],
    last_commit: u64,
}

/// Writes the entry that fences whoever wrote the line before. `fresh` asks for a line without one.
fn take(store: &Store, line: &LineName, fresh: bool) -> Result<Taken> {
    let nonce = random()?;
    for _ in 0..TRIES {
        let newest = store.newest(line)?;
        if fresh && !newest.is_empty() {
            return Err(StoreError::LineExists { line: line.to_string() });
        }
        let last_commit = newest.iter().find(|found| found.is_commit).map_or(0, |f| f.number);
        let (number, epoch) = match newest.first() {
            None => (1, 1),
            Some(found) => {
                let before = match store.read_entry(line, found.number) {
                    Err(StoreError::Missing { .. }) => continue,
                    other => other?,
                };
                (found.number + 1, before.head.epoch + 1)
            }
        };
        let head = Head { number, epoch, writer: nonce, made: now(), last_commit };
        match store.append(line, number, encode_opened(&head))? {
            Appended::Taken(_) => continue,
            Appended::Done => {}
        }
        // A number that pruning has freed lies behind newer entries and fences nobody.
        let newest = store.newest(line)?.first().map_or(0, |found| found.number);
        if newest == number {
            return Ok(Taken { number, epoch, nonce, last_commit });
        }
        store.remote.delete(&line.entry(number))?;
    }
    Err(StoreError::Busy(format!(
        "line \"{line}\" was written by others in each of {TRIES} attempts to take it; stop them, or try again"
    )))
}

impl LineWriter {
    /// Takes the line over: another writer of it stores nothing more from here on. A line that does
    /// not exist is begun.
    ///
    /// # Errors
    /// If the store cannot be reached, a key is lost, or what the line holds cannot be read.
    pub fn open(
        store: Arc<Store>,
        keys: &dyn KeySource,
        line: &LineName,
        options: WriterOptions,
    ) -> Result<Self> {
        store.must_write()?;
        // Before the line is touched: a lost key changes nothing.
        let (key, wrapped) = store.tenant_key(line.tenant(), keys)?;
        let taken = take(&store, line, false)?;
        let condemned = Condemned::all(&store)?;
        let mut writer = Self::new(store, line, &taken, (key, wrapped), condemned, options);
        if taken.last_commit > 0 {
            let entry = writer.store.read_entry(line, taken.last_commit)?;
            writer.load(line, &entry, keys)?;
            writer.newest_by = entry.head.writer;
            writer.referred = writer.used();
        }
        Ok(writer)
    }

    /// Begins line `to` with generation `number` of line `from` as its first: nothing is copied.
    /// Blocks may be sealed with another tenant's data key (a shared base): `keys` must have both.
    ///
    /// # Errors
    /// If `to` exists, `from` has no such generation, or a collection is about to delete it.
    pub fn fork(
        store: Arc<Store>,
        keys: &dyn KeySource,
        from: (&LineName, u64),
        to: &LineName,
        options: WriterOptions,
    ) -> Result<Self> {
        store.must_write()?;
        let (key, wrapped) = store.tenant_key(to.tenant(), keys)?;
        // Looked at twice: before, so that a mistake leaves no line behind, and after, for safety.
        store.read_entry(from.0, from.1)?;
        let taken = take(&store, to, true)?;
        let condemned = Condemned::all(&store)?;
        let mut writer = Self::new(store, to, &taken, (key, wrapped), condemned, options);
        let entry = writer.store.read_entry(from.0, from.1)?;
        writer.load(from.0, &entry, keys)?;
        let lost = writer
            .used()
            .iter()
            .any(|pack| writer.condemned.has(&writer.packs[*pack as usize].pack.id))
            || writer.map.as_ref().is_some_and(|map| writer.condemned.has(&map.0.id));
        if lost {
            return Err(StoreError::Busy(format!(
                "generation {} of line \"{}\" is part of a collection that is under way; fork it when that is done",
                from.1, from.0
            )));
        }
        writer.parent = Some((from.0.clone(), from.1));
        let mut stored = super::Stored::default();
        // A barrier now may condemn what the fork refers to: it is in no generation of this line.
        writer.commit("", &AtomicBool::new(false), &mut stored)?;
        Ok(writer)
    }

    fn new(
        store: Arc<Store>,
        line: &LineName,
        taken: &Taken,
        key: (crate::keys::DataKey, crate::log::KeyEntry),
        condemned: Condemned,
        options: WriterOptions,
    ) -> Self {
        let (key, wrapped) = key;
        Self {
            store,
            line: line.clone(),
            nonce: taken.nonce,
            epoch: taken.epoch,
            head: taken.number,
            last_commit: taken.last_commit,
            newest_by: [0; 16],
            standing: Standing::Owner,
            keys: BTreeMap::from([(key.id, wrapped)]),
            data_keys: HashMap::from([(key.id, key.clone())]),
            key,
            packs: Vec::new(),
            numbers: HashMap::new(),
            devices: Vec::new(),
            map: None,
            since_map: 0,
            names: Names::new(options.names),
            condemned,
            referred: BTreeSet::new(),
            incomplete: false,
            seeded: false,
            asked: false,
            parent: None,
            options,
            limiter: Limiter::new(options.rate),
            began: Instant::now(),
        }
    }

    /// Packs that blocks are in.
    fn used(&self) -> BTreeSet<u32> {
        let mut used = BTreeSet::new();
        self.devices.iter().for_each(|held| held.places.for_packs(|pack| _ = used.insert(pack)));
        used
    }

    fn number_of(&mut self, pack: &PackRef) -> u32 {
        let (packs, condemned) = (&mut self.packs, &self.condemned);
        *self.numbers.entry(pack.id).or_insert_with(|| {
            let state = if condemned.has(&pack.id) { State::Condemned } else { State::Stored };
            packs.push(Slot { pack: *pack, state });
            packs.len() as u32 - 1
        })
    }

    /// Takes the state of a generation.
    fn load(&mut self, line: &LineName, entry: &Entry, keys: &dyn KeySource) -> Result<()> {
        let object = line.entry(entry.head.number);
        let Some(refers) = entry.commit() else {
            return Err(StoreError::corrupt(object, "it is no generation"));
        };
        for entry in &refers.keys {
            let key = self.store.data_key(entry, keys)?;
            self.keys.entry(key.id).or_insert_with(|| entry.clone());
            self.data_keys.insert(key.id, key);
        }
        let missing = || {
            let detail = "it does not list the key that it is sealed with";
            StoreError::corrupt(&object, detail)
        };
        let key = self.data_keys.get(&refers.sealed_with).ok_or_else(missing)?.clone();
        let body = entry.open(line, &key)?;
        let table: Vec<u32> = body.packs.iter().map(|pack| self.number_of(pack)).collect();
        let opener = match &refers.map {
            None => None,
            Some((map, salt, id)) => {
                self.map = Some((*map, *salt, *id));
                let key = self.data_keys.get(id).ok_or_else(missing)?;
                Some(Opener::new(*map, *salt, key))
            }
        };
        let mut at = refers.map.as_ref().map_or(0, |map| map.0.head_length());
        let mut leaf = 0;
        for device in body.devices {
            let mut places = Places::new(device.geometry);
            let ranges: Vec<_> = places.leaf_ranges().map(|(range, _)| range).collect();
            for (blocks, length) in ranges.into_iter().zip(&device.leaves) {
                let end = at + u64::from(*length);
                if let (Some(opener), true) = (&opener, *length > 0) {
                    let id = refers.map.as_ref().map(|map| map.0.id.map()).unwrap_or_default();
                    let bytes = self.store.remote.get_range(&id, at..end)?;
                    let mut runs: Vec<Run> = Vec::new();
                    let packs = opener.leaf(leaf, &bytes, blocks, |run| runs.push(run))?;
                    let table: Vec<u32> = packs.iter().map(|pack| self.number_of(pack)).collect();
                    runs.iter_mut().for_each(|run| renumber(run, &table));
                    runs.iter().for_each(|run| places.load(run));
                }
                (at, leaf) = (end, leaf + 1);
            }
            let mut runs = device.runs;
            runs.iter_mut().for_each(|run| renumber(run, &table));
            places.apply(&runs);
            // Another tenant's names, and so its roots, say nothing here.
            let root = device.root.filter(|_| line.tenant() == self.line.tenant());
            let (name, leaves, tags) = (device.name, device.leaves, Tags::new(device.geometry));
            self.devices.push(Held { name, root, places, tags, leaves });
        }
        // As if it had been written just now: the next map comes as soon as this one is outgrown.
        self.since_map = 0;
        Ok(())
    }

    /// Learns the names of what the newest generation holds, so that storing all blocks again sends
    /// only those that are new.
    pub(super) fn seed(&mut self) -> Result<()> {
        const AT_ONCE: usize = 8;
        self.seeded = true;
        let mut wanted: VecDeque<u32> = self.used().into_iter().rev().collect();
        let mut pending = VecDeque::new();
        loop {
            while pending.len() < AT_ONCE && self.names.room() > 0 {
                let Some(number) = wanted.pop_front() else { break };
                let slot = &self.packs[number as usize];
                // Names under another tenant's key say nothing about this tenant's blocks.
                let ours = self.keys.get(&slot.pack.key);
                if slot.state == State::Stored
                    && ours.is_some_and(|k| k.tenant == self.line.tenant())
                {
                    let pack = slot.pack;
                    let tail = self.store.remote.start_get(&pack.id.pack(), pack.tail());
                    pending.push_back((number, pack, tail));
                }
            }
            let Some((number, pack, tail)) = pending.pop_front() else { return Ok(()) };
            let Some(key) = self.data_keys.get(&pack.key) else { continue };
            let opened = Opened::new(&pack, &tail.wait()?, key)?;
            for (slot, name) in opened.index.names.iter().enumerate() {
                self.names.insert(*name, number, slot as u32);
            }
        }
    }
}

fn renumber(run: &mut Run, table: &[u32]) {
    if let Content::At { pack, .. } = &mut run.content {
        *pack = table[*pack as usize];
    }
}
