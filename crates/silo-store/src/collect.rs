//! Garbage collection that runs beside writers, in two phases.
//!
//! ```text
//! mark   list packs and maps, then read all generations; what none refers to, and is older than
//!        the grace, is written down as condemned (collections/<n>/tombs)
//! sweep  when that is as old as the grace: put a barrier into the log of every line, read all
//!        generations again, delete what is condemned and still not referred to (…/done)
//! ```
//! Why that is safe, whatever stalls: a writer that refers to a condemned pack either commits before
//! the barrier is in its line's log, and then the second reading finds it; or it tries to commit
//! after, and then the number that it tries is taken by the barrier, and it looks at what is condemned
//! before it tries the next. A line that is begun after the barriers were put has looked at the
//! collections after its first entry, and finds this one. No clock is needed for safety; the grace
//! spares writers that are slow from storing again, and readers of generations that were just
//! pruned. Times compared are of the store's own clock.
//!
//! A generation that somebody reads may be pruned: its pin counts like an entry (see `pin.rs`).
//!
//! The model in `tests/collection_model.rs` tries every order of these steps with writers that stall.

use crate::{
    StoreError,
    error::Result,
    format::map::{Head as MapHead, MapRef},
    layout::{self, COLLECTIONS, LineName, MAPS, ObjectId, PACKS},
    log::{Head, encode_barrier},
    store::{Appended, Store},
    wire::{Malformed, Reader},
    writer::now,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    time::{Duration, SystemTime},
};

const MAGIC: &[u8; 8] = b"SILODEAD";
/// Largest list of condemned objects, in bytes: a million objects.
const MAX_TOMBS: u64 = 64 << 20;
/// Lists of so many collections are kept for writers that slept.
const KEPT: usize = 16;

/// A condemned object: `false` for a pack, `true` for a map.
type Tomb = (bool, ObjectId);

fn encode_tombs(tombs: &BTreeSet<Tomb>, nonce: [u8; 16]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&nonce);
    for (is_map, id) in tombs {
        out.push(u8::from(*is_map));
        out.extend_from_slice(&id.0);
    }
    let hash = blake3::hash(&out);
    out.extend_from_slice(hash.as_bytes());
    out
}

fn decode_tombs(bytes: &[u8]) -> Result<BTreeSet<Tomb>, Malformed> {
    let (content, hash) = bytes.split_last_chunk::<32>().ok_or("it ends too early")?;
    if blake3::hash(content).as_bytes() != hash {
        return Err("it is not what was stored");
    }
    let mut reader = Reader::new(content);
    if reader.array()? != *MAGIC {
        return Err("it is no list of condemned objects");
    }
    reader.array::<16>()?;
    let mut tombs = BTreeSet::new();
    while reader.left() > 0 {
        let is_map = reader.u8()? == 1;
        tombs.insert((is_map, ObjectId(reader.array()?)));
    }
    Ok(tombs)
}

/// Decodes any bytes as a list of condemned objects.
pub fn fuzz_tombs(bytes: &[u8]) {
    let _ = decode_tombs(bytes);
    let hash = blake3::hash(bytes);
    let _ = decode_tombs(&[bytes, hash.as_bytes()].concat());
}

/// What collections have deleted or are about to delete.
#[derive(Default)]
pub(crate) struct Condemned(HashSet<ObjectId>);

impl Condemned {
    pub(crate) fn has(&self, id: &ObjectId) -> bool {
        self.0.contains(id)
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.0.extend(&other.0);
    }

    /// Of one collection; an error if it is so old that nobody knows any more.
    pub(crate) fn of(store: &Store, number: u64) -> Result<Self> {
        let tombs = read_tombs(store, number)?.ok_or_else(|| {
            StoreError::Busy(format!(
                "collection {number} passed while this writer slept, and its list is gone; open the line again"
            ))
        })?;
        Ok(Self(tombs.into_iter().map(|(_, id)| id).collect()))
    }

    /// Of all collections that there are.
    pub(crate) fn all(store: &Store) -> Result<Self> {
        let mut all = Self::default();
        for number in numbers(store)?.into_keys() {
            if let Some(tombs) = read_tombs(store, number)? {
                all.0.extend(tombs.into_iter().map(|(_, id)| id));
            }
        }
        Ok(all)
    }
}

/// What a collection deleted, or else what it condemned.
fn read_tombs(store: &Store, number: u64) -> Result<Option<BTreeSet<Tomb>>> {
    for what in ["done", "tombs"] {
        let object = layout::collection(number, what);
        if let Some(bytes) = store.remote.get(&object, MAX_TOMBS)? {
            let tombs = decode_tombs(&bytes);
            return tombs.map(Some).map_err(|detail| StoreError::corrupt(object, detail));
        }
    }
    Ok(None)
}

/// Collections, and when each of their objects was written.
fn numbers(store: &Store) -> Result<BTreeMap<u64, BTreeMap<String, SystemTime>>> {
    let mut numbers: BTreeMap<u64, BTreeMap<String, SystemTime>> = BTreeMap::new();
    for listed in store.remote.list(COLLECTIONS, None)? {
        if let Some((number, what)) = layout::parse_collection(&listed.object) {
            numbers.entry(number).or_default().insert(what.to_owned(), listed.modified);
        }
    }
    Ok(numbers)
}

/// Everything that generations refer to.
#[derive(Default)]
struct Referred {
    packs: HashSet<ObjectId>,
    maps: HashSet<ObjectId>,
    generations: usize,
}

impl Referred {
    fn has(&self, tomb: &Tomb) -> bool {
        let (is_map, id) = tomb;
        if *is_map { self.maps.contains(id) } else { self.packs.contains(id) }
    }
}

/// What a collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Its number.
    pub number: u64,
    /// Generations that were read.
    pub generations: usize,
    /// Objects that no generation refers to: condemned by a mark, deleted by a sweep. Names, for a
    /// dry run.
    pub objects: Vec<String>,
    /// Their bytes, where known.
    pub bytes: u64,
    /// Objects that were condemned and are referred to again.
    pub spared: usize,
}

/// Where a sweep stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swept {
    /// Done.
    Done(Collected),
    /// The collection is younger than the grace: come back in so long.
    Wait(Duration),
    /// There is no collection to sweep.
    Nothing,
}

/// How often reading all generations of a line is tried while it is being written.
const TRIES: usize = 64;

impl Store {
    /// First phase: condemns what no generation refers to and is older than `grace`. With `dry_run`,
    /// only says what that would be. Gives `None` if there is nothing.
    ///
    /// # Errors
    /// If the store cannot be read; then nothing is condemned. A damaged entry stops it: what that
    /// refers to is not known.
    pub fn mark(&self, grace: Duration, dry_run: bool) -> Result<Option<Collected>> {
        if !dry_run {
            self.must_write()?;
        }
        let known = numbers(self)?;
        let number = known.keys().next_back().map_or(1, |last| last + 1);
        let began = self.store_time(number, "began", dry_run)?;
        // Objects first: what is written from here on is not looked at.
        let mut objects: BTreeMap<Tomb, u64> = BTreeMap::new();
        for (is_map, folder) in [(false, PACKS), (true, MAPS)] {
            for listed in self.remote.list(folder, None)? {
                let age = began.duration_since(listed.modified).unwrap_or_default();
                if let (Some(id), true) = (ObjectId::parse(&listed.object), age >= grace) {
                    objects.insert((is_map, id), listed.size);
                }
            }
        }
        let referred = self.referred(began)?;
        objects.retain(|tomb, _| !referred.has(tomb));
        let collected = Collected {
            number,
            generations: referred.generations,
            objects: objects.keys().map(name_of).collect(),
            bytes: objects.values().sum(),
            spared: 0,
        };
        if !dry_run {
            if objects.is_empty() {
                self.remote.delete(&layout::collection(number, "began"))?;
            } else {
                let tombs = objects.into_keys().collect();
                let bytes = encode_tombs(&tombs, crate::keys::random()?);
                let object = layout::collection(number, "tombs");
                if self.remote.create(&object, bytes.into())? != crate::remote::Created::New {
                    return Err(StoreError::Busy(format!(
                        "another collector is at work on {}; one at a time",
                        self.url()
                    )));
                }
            }
        }
        Ok((!collected.objects.is_empty()).then_some(collected))
    }

    /// How long ago, by this host's clock, somebody last worked on a collection; `None` if nobody did.
    /// For whoever decides whether it is time for another.
    ///
    /// # Errors
    /// If the store cannot be listed.
    pub fn collected_ago(&self, now: SystemTime) -> Result<Option<Duration>> {
        let known = numbers(self)?;
        let last = known.values().flat_map(|objects| objects.values()).max();
        Ok(last.map(|last| now.duration_since(*last).unwrap_or_default()))
    }

    /// Second phase, of the oldest collection that is not done: deletes what was condemned at least
    /// `grace` ago and is still not referred to. May be repeated after a crash at any point.
    ///
    /// # Errors
    /// If the store cannot be read or written; what was deleted by then is deleted.
    pub fn sweep(&self, grace: Duration) -> Result<Swept> {
        self.must_write()?;
        let known = numbers(self)?;
        let due = known
            .iter()
            .find(|(_, objects)| objects.contains_key("tombs") && !objects.contains_key("done"));
        let Some((number, objects)) = due else { return Ok(Swept::Nothing) };
        let number = *number;
        let now = self.store_time(number, "swept", false)?;
        let age = now.duration_since(objects["tombs"]).unwrap_or_default();
        if age < grace {
            return Ok(Swept::Wait(grace - age));
        }
        let Some(tombs) = read_tombs(self, number)? else { return Ok(Swept::Nothing) };
        for line in self.lines(None)? {
            self.barrier(&line, number)?;
        }
        let referred = self.referred(now)?;
        let (spared, dead): (BTreeSet<Tomb>, BTreeSet<Tomb>) =
            tombs.into_iter().partition(|tomb| referred.has(tomb));
        let names: Vec<String> = dead.iter().map(name_of).collect();
        for group in names.chunks(16) {
            let pending: Vec<_> =
                group.iter().map(|object| self.remote.start_delete(object)).collect();
            pending.into_iter().try_for_each(crate::remote::Pending::wait)?;
        }
        let list = encode_tombs(&dead, crate::keys::random()?);
        self.remote.create(&layout::collection(number, "done"), list.into())?;
        self.forget_collections(&known)?;
        Ok(Swept::Done(Collected {
            number,
            generations: referred.generations,
            objects: names,
            bytes: 0,
            spared: spared.len(),
        }))
    }

    /// Deletes the lists of all but the newest collections that are done.
    fn forget_collections(
        &self,
        known: &BTreeMap<u64, BTreeMap<String, SystemTime>>,
    ) -> Result<()> {
        let done: Vec<_> = known.iter().filter(|(_, o)| o.contains_key("done")).collect();
        for (number, objects) in &done[..done.len().saturating_sub(KEPT)] {
            for what in objects.keys() {
                self.remote.delete(&layout::collection(**number, what))?;
            }
        }
        Ok(())
    }

    /// What time it is by the store's clock: writes a small object and looks when that was.
    fn store_time(&self, number: u64, what: &str, dry_run: bool) -> Result<SystemTime> {
        if dry_run {
            // Without writing there is only this host's clock; nothing is deleted by it.
            return Ok(SystemTime::now());
        }
        let object = layout::collection(number, what);
        self.remote.start_put(&object, bytes::Bytes::from_static(b"silo")).wait()?;
        let listed = self.remote.list(&format!("{COLLECTIONS}/{number:016x}"), None)?;
        let found = listed.into_iter().find(|listed| listed.object == object);
        found.map(|listed| listed.modified).ok_or(StoreError::Missing { object })
    }

    /// Everything that the generations of all lines refer to, and those that somebody reads at `now`.
    fn referred(&self, now: SystemTime) -> Result<Referred> {
        let mut referred = Referred::default();
        for line in self.lines(None)? {
            self.referred_by(&line, &mut referred)?;
        }
        // After the lines: whoever pins a generation has seen it there afterwards.
        self.pinned(now, |packs, map| {
            referred.packs.extend(packs);
            map.map_or(Ok(()), |map| self.referred_by_map(&map, &mut referred))
        })?;
        Ok(referred)
    }

    fn referred_by(&self, line: &LineName, referred: &mut Referred) -> Result<()> {
        for _ in 0..TRIES {
            let entries = self.entries(line)?;
            let commits: Vec<u64> =
                entries.iter().filter(|found| found.is_commit).map(|found| found.number).collect();
            let mut maps: Vec<MapRef> = Vec::new();
            let read = self.read_entries(line, &commits)?;
            for entry in &read {
                if let Some(refers) = entry.commit() {
                    referred.packs.extend(&refers.packs);
                    maps.extend(refers.map.as_ref().map(|map| map.0));
                }
            }
            // Whether one came and an older one was pruned while this looked: the newest is never
            // pruned, so if it is still the same, nothing was missed that is still there.
            if self.newest(line)?.first() != entries.first() {
                continue;
            }
            referred.generations += read.len();
            return maps.into_iter().try_for_each(|map| self.referred_by_map(&map, referred));
        }
        Err(StoreError::Busy(format!(
            "line \"{line}\" changed in each of {TRIES} attempts to read it; collect again later"
        )))
    }

    fn referred_by_map(&self, map: &MapRef, referred: &mut Referred) -> Result<()> {
        if referred.maps.insert(map.id) {
            match self.remote.get_range(&map.id.map(), 0..map.head_length()) {
                Ok(head) => referred.packs.extend(MapHead::checked(map, &head)?.packs),
                // Only of a generation that was pruned a moment ago, or that is lost anyway.
                Err(StoreError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Puts the barrier of a collection into a line's log.
    fn barrier(&self, line: &LineName, collection: u64) -> Result<()> {
        for _ in 0..TRIES {
            let newest = self.newest(line)?;
            let Some(first) = newest.first() else { return Ok(()) };
            let before = match self.read_entry(line, first.number) {
                Err(StoreError::Missing { .. }) => continue,
                other => other?,
            };
            let head = Head {
                number: first.number + 1,
                epoch: before.head.epoch,
                writer: crate::keys::random()?,
                made: now(),
                last_commit: newest.iter().find(|found| found.is_commit).map_or(0, |f| f.number),
            };
            if let Appended::Taken(_) =
                self.append(line, head.number, encode_barrier(&head, collection))?
            {
                continue;
            }
            // As in taking a line: a number that pruning has freed stops nobody.
            if self.newest(line)?.first().is_some_and(|found| found.number == head.number) {
                return Ok(());
            }
            self.remote.delete(&line.entry(head.number))?;
        }
        Err(StoreError::Busy(format!(
            "line \"{line}\" was written in each of {TRIES} attempts to put a barrier; sweep again later"
        )))
    }
}

fn name_of(tomb: &Tomb) -> String {
    if tomb.0 { tomb.1.map() } else { tomb.1.pack() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_condemned_objects_come_back_and_a_changed_one_is_refused() {
        let tombs = BTreeSet::from([(false, ObjectId([1; 32])), (true, ObjectId([2; 32]))]);
        let bytes = encode_tombs(&tombs, [3; 16]);
        assert_eq!(decode_tombs(&bytes).unwrap(), tombs);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(decode_tombs(&changed).is_err(), "byte {at}");
        }
    }
}
