//! Is everything there, and is it what was stored?
//!
//! `Quick` compares listings with what generations refer to: existence and sizes. `Full` reads every
//! object, checks its name, opens every chunk, and checks every block against its name. `scrub` needs
//! no key: it checks that each object has the bytes that its name says. None of them writes.

use crate::{
    StoreError,
    error::Result,
    format::{
        map::MapRef,
        pack::{MAX_PACK, Opened, PackRef},
    },
    generation::{Generation, Which},
    keys::{DataKey, DataKeyId, KeySource},
    layout::{LineName, MAPS, ObjectId, PACKS},
    root,
    store::Store,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// How thoroughly to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Everything is there and has its size.
    Quick,
    /// Everything decrypts to the blocks that it names.
    Full,
}

/// How far a verification is, in bytes to read. Both grow: what there is to read is found on the way.
#[derive(Debug, Default)]
pub struct Reading {
    /// Read.
    pub done: AtomicU64,
    /// To be read, as far as known.
    pub total: AtomicU64,
}

/// Something that is wrong.
#[derive(Debug)]
pub struct Problem {
    /// The object.
    pub object: String,
    /// What is wrong with it.
    pub error: StoreError,
    /// Generations (line and number) that cannot be restored because of it, as far as known.
    pub affects: Vec<(LineName, u64)>,
}

/// What was looked at, and what was found.
#[derive(Debug, Default)]
pub struct Verified {
    /// Generations.
    pub generations: usize,
    /// Packs.
    pub packs: usize,
    /// Maps.
    pub maps: usize,
    /// Blocks whose content was checked.
    pub blocks: u64,
    /// Devices of generations of which the content was compared with the root.
    pub roots: usize,
    /// Bytes that were read for it.
    pub bytes: u64,
    /// What is wrong, by object.
    pub problems: Vec<Problem>,
}

impl Verified {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_well(&self) -> bool {
        self.problems.is_empty()
    }
}

/// What generations refer to, and which of them.
#[derive(Default)]
struct Wanted {
    packs: HashMap<ObjectId, (PackRef, BTreeSet<usize>)>,
    maps: HashMap<ObjectId, (MapRef, BTreeSet<usize>)>,
}

impl Store {
    /// Verifies generations: one, or all of a line. `reading` says how far it is, `stop` ends it.
    ///
    /// # Errors
    /// If the store cannot be reached or a key is lost. Damage is no error: see the result.
    pub fn verify(
        self: &Arc<Self>,
        keys: &dyn KeySource,
        line: &LineName,
        which: Option<Which>,
        depth: Depth,
        reading: &Reading,
        stop: &AtomicBool,
    ) -> Result<Verified> {
        let numbers: Vec<u64> = match which {
            Some(Which::Number(number)) => vec![number],
            Some(Which::Newest) | None => {
                let commits = self.entries(line)?.into_iter().filter(|found| found.is_commit);
                let all: Vec<u64> = commits.map(|found| found.number).collect();
                if all.is_empty() {
                    return Err(StoreError::NoGeneration { line: line.to_string() });
                }
                let count = if which.is_some() { 1 } else { all.len() };
                all[..count].to_vec()
            }
        };
        let (mut verified, mut wanted) = (Verified::default(), Wanted::default());
        let mut data_keys: HashMap<DataKeyId, DataKey> = HashMap::new();
        let mut namer = None;
        for (at, number) in numbers.iter().enumerate() {
            let looked = Generation::open(self, keys, line, Which::Number(*number), 0).and_then(
                |generation| {
                    generation.refers_to(|pack| {
                        wanted
                            .packs
                            .entry(pack.id)
                            .or_insert_with(|| (*pack, BTreeSet::new()))
                            .1
                            .insert(at);
                    })?;
                    if let Some(map) = generation.map() {
                        wanted
                            .maps
                            .entry(map.id)
                            .or_insert_with(|| (map, BTreeSet::new()))
                            .1
                            .insert(at);
                    }
                    Ok(generation)
                },
            );
            match looked {
                Ok(generation) => {
                    verified.generations += 1;
                    namer = Some(generation.namer()?.id);
                    data_keys
                        .extend(generation.data_keys().iter().map(|(id, key)| (*id, key.clone())));
                }
                Err(error) => {
                    let object = match &error {
                        StoreError::Missing { object }
                        | StoreError::Corrupt { object, .. }
                        | StoreError::Sealed { object, .. } => object.clone(),
                        _ => return Err(error),
                    };
                    let affects = vec![(line.clone(), *number)];
                    verified.problems.push(Problem { object, error, affects });
                }
            }
        }
        let affects = |which: &BTreeSet<usize>| -> Vec<(LineName, u64)> {
            which.iter().map(|at| (line.clone(), numbers[*at])).collect()
        };
        self.sizes(&wanted, &mut verified, affects)?;
        if depth == Depth::Full {
            let bad: BTreeSet<String> =
                verified.problems.iter().map(|problem| problem.object.clone()).collect();
            for (map, generations) in wanted.maps.values() {
                let object = map.id.map();
                if bad.contains(&object) {
                    continue;
                }
                let checked = self.check_bytes(&object, map.id, map.length, &mut verified);
                if let Err(error) = checked {
                    let affects = affects(generations);
                    verified.problems.push(Problem { object, error, affects });
                }
            }
            // Names of blocks in packs, as roots have them; those of too many blocks are not kept.
            let mut tags: HashMap<ObjectId, Vec<u32>> = HashMap::new();
            let mut room = MAX_TAGS;
            let namer = data_keys.get(&namer.unwrap_or(DataKeyId([0; 16]))).cloned();
            let mut packs: VecDeque<_> =
                wanted.packs.values().filter(|(pack, _)| !bad.contains(&pack.id.pack())).collect();
            let bytes = packs.iter().map(|(pack, _)| u64::from(pack.length)).sum();
            reading.total.fetch_add(bytes, Ordering::Relaxed);
            let mut pending = VecDeque::new();
            loop {
                while pending.len() < 3 && !stop.load(Ordering::Relaxed) {
                    let Some(next) = packs.pop_front() else { break };
                    let range = 0..u64::from(next.0.length);
                    pending.push_back((next, self.remote.start_get(&next.0.id.pack(), range)));
                }
                let Some(((pack, generations), get)) = pending.pop_front() else { break };
                let checked = get
                    .wait()
                    .and_then(|bytes| check_pack(pack, bytes.into(), &data_keys, namer.as_ref()));
                match checked {
                    Ok(found) => {
                        verified.blocks += found.len() as u64;
                        verified.bytes += u64::from(pack.length);
                        if let Some(left) = room.checked_sub(found.len()) {
                            room = left;
                            tags.insert(pack.id, found);
                        }
                    }
                    Err(error) if error.is_transient() => return Err(error),
                    Err(error) => {
                        let object = pack.id.pack();
                        verified.problems.push(Problem {
                            object,
                            error,
                            affects: affects(generations),
                        });
                    }
                }
                reading.done.fetch_add(u64::from(pack.length), Ordering::Relaxed);
            }
            if stop.load(Ordering::Relaxed) {
                return Err(StoreError::Stopped);
            }
            for number in numbers {
                self.roots(keys, line, number, &tags, &mut verified)?;
            }
        }
        verified.problems.sort_by(|a, b| a.object.cmp(&b.object));
        Ok(verified)
    }

    /// Compares what a generation's maps give with the roots of its devices.
    fn roots(
        self: &Arc<Self>,
        keys: &dyn KeySource,
        line: &LineName,
        number: u64,
        tags: &HashMap<ObjectId, Vec<u32>>,
        verified: &mut Verified,
    ) -> Result<()> {
        let affected = (line.clone(), number);
        // What is known to be damaged has another root, too.
        if verified.problems.iter().any(|problem| problem.affects.contains(&affected)) {
            return Ok(());
        }
        let generation = Generation::open(self, keys, line, Which::Number(number), 0)?;
        for (device, stored) in generation.devices().iter().enumerate() {
            let (true, Some(sum)) = (stored.root.is_some(), generation.sum(device, tags)?) else {
                continue;
            };
            verified.roots += 1;
            if let Err(error) = generation.check_root(device, sum) {
                let (object, affects) = (line.entry(number), vec![affected.clone()]);
                verified.problems.push(Problem { object, error, affects });
            }
        }
        Ok(())
    }

    /// Existence and sizes.
    fn sizes(
        &self,
        wanted: &Wanted,
        verified: &mut Verified,
        affects: impl Fn(&BTreeSet<usize>) -> Vec<(LineName, u64)>,
    ) -> Result<()> {
        (verified.packs, verified.maps) = (wanted.packs.len(), wanted.maps.len());
        let sizes = |folder: &str| -> Result<BTreeMap<ObjectId, u64>> {
            let listed = self.remote.list(folder, None)?;
            Ok(listed.iter().filter_map(|l| Some((ObjectId::parse(&l.object)?, l.size))).collect())
        };
        let packs = wanted.packs.values().map(|(p, g)| (p.id, p.id.pack(), u64::from(p.length), g));
        let maps = wanted.maps.values().map(|(m, g)| (m.id, m.id.map(), m.length, g));
        for (there, wanted) in
            [(sizes(PACKS)?, packs.collect::<Vec<_>>()), (sizes(MAPS)?, maps.collect::<Vec<_>>())]
        {
            for (id, object, length, generations) in wanted {
                let error = match there.get(&id) {
                    Some(size) if *size == length => continue,
                    Some(size) => {
                        let detail = format!("it has {size} bytes instead of {length}");
                        StoreError::corrupt(&object, detail)
                    }
                    None => StoreError::Missing { object: object.clone() },
                };
                verified.problems.push(Problem { object, error, affects: affects(generations) });
            }
        }
        Ok(())
    }

    /// Whether an object has the bytes that its name says.
    fn check_bytes(
        &self,
        object: &str,
        id: ObjectId,
        most: u64,
        verified: &mut Verified,
    ) -> Result<()> {
        let bytes = self.remote.get(object, most)?;
        let bytes = bytes.ok_or_else(|| StoreError::Missing { object: object.to_owned() })?;
        verified.bytes += bytes.len() as u64;
        if ObjectId::of(&bytes) == id {
            return Ok(());
        }
        Err(StoreError::corrupt(object, "its bytes are not those that its name says"))
    }

    /// Reads every pack and map in the store and compares it with its name. Needs no key; says nothing
    /// of what is missing. `rate` is the most bytes per second.
    ///
    /// # Errors
    /// If the store cannot be reached. Damage is no error: see the result.
    pub fn scrub(
        &self,
        rate: Option<u64>,
        reading: &Reading,
        stop: &AtomicBool,
    ) -> Result<Verified> {
        let mut verified = Verified::default();
        let (began, mut limiter) = (std::time::Instant::now(), crate::writer::Limiter::new(rate));
        for (folder, most) in [(PACKS, MAX_PACK), (MAPS, 1 << 40)] {
            let objects = self.remote.list(folder, None)?;
            reading.total.fetch_add(objects.iter().map(|o| o.size).sum(), Ordering::Relaxed);
            for listed in objects {
                let Some(id) = ObjectId::parse(&listed.object) else { continue };
                let listed_size = listed.size;
                if stop.load(Ordering::Relaxed) {
                    return Err(StoreError::Stopped);
                }
                crate::writer::wait(limiter.reserve(began.elapsed(), listed.size), stop)?;
                *(if folder == PACKS { &mut verified.packs } else { &mut verified.maps }) += 1;
                match self.check_bytes(&listed.object, id, most.min(listed.size), &mut verified) {
                    // Missing: deleted since it was listed.
                    Ok(()) | Err(StoreError::Missing { .. }) => {}
                    Err(error) if error.is_transient() => return Err(error),
                    Err(error) => {
                        let (object, affects) = (listed.object, Vec::new());
                        verified.problems.push(Problem { object, error, affects });
                    }
                }
                reading.done.fetch_add(listed_size, Ordering::Relaxed);
            }
        }
        Ok(verified)
    }
}

/// Blocks of which tags are kept for roots: 256 MiB of memory, 256 GiB of 4 KiB blocks.
const MAX_TAGS: usize = 64 << 20;

/// Opens every chunk of a pack and checks every block; gives tags of their names under `namer`.
fn check_pack(
    pack: &PackRef,
    mut bytes: Vec<u8>,
    keys: &HashMap<DataKeyId, DataKey>,
    namer: Option<&DataKey>,
) -> Result<Vec<u32>> {
    let object = pack.id.pack();
    if ObjectId::of(&bytes) != pack.id {
        return Err(StoreError::corrupt(object, "its bytes are not those that its name says"));
    }
    let key = keys.get(&pack.key).ok_or_else(|| {
        StoreError::corrupt(&object, format!("no generation lists its data key {}", pack.key))
    })?;
    let tail = pack.tail();
    let opened = Opened::new(pack, &bytes[tail.start as usize..tail.end as usize], key)?;
    let (mut room, mut tags) = (Vec::new(), Vec::new());
    let foreign = namer.filter(|namer| !namer.names_as(key));
    for chunk in &opened.index.chunks {
        let range = chunk.range();
        let sealed = &mut bytes[range.start as usize..range.end as usize];
        let content = opened.chunk(chunk, sealed, &mut room)?;
        opened.check(chunk, content, key)?;
        if let Some(namer) = foreign {
            tags.extend(content.chunks(1 << pack.shift).map(|block| root::tag(&namer.name(block))));
        }
    }
    if foreign.is_none() {
        tags = opened.index.names.iter().map(root::tag).collect();
    }
    Ok(tags)
}
