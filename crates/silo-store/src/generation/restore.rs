//! Restoring a whole device: packs are fetched several at a time and decoded on several threads, each
//! block checked against its name before it is written.

use super::{Generation, Place};
use crate::{
    StoreError,
    error::Result,
    format::{
        map::LEAF_BLOCKS,
        pack::{Opened, PackRef},
        runs::Content,
    },
    remote::Pending,
    root::{self, Sum},
    writer::from_word,
};
use bytes::Bytes;
use silo_block::{
    block::{BlockIndex, BlockSet},
    io::BlockDevice,
};
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Bytes that nobody asked for between two chunks that are fetched together, at most.
const GAP: u64 = 64 << 10;
/// Most bytes of a pack that are fetched by one request, unless all of it is.
const AT_ONCE: u64 = 4 << 20;

/// How a device is restored.
#[derive(Clone, Copy, Debug)]
pub struct RestoreOptions {
    /// Threads that decode.
    pub threads: usize,
    /// Requests under way for each of them; memory is bounded by as many packs, and one more.
    pub in_flight: usize,
    /// Bytes of them all, unless there is but one: little ones wait for each other less than large ones.
    pub in_flight_bytes: u64,
    /// The target is all zeros: zeros are not written.
    pub target_is_zero: bool,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self { threads: 2, in_flight: 3, in_flight_bytes: u64::MAX, target_is_zero: false }
    }
}

/// What restoring did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Bytes of the device.
    pub bytes: u64,
    /// Of these, bytes that are zeros.
    pub zeros: u64,
    /// How long it took.
    pub took: Duration,
}

/// Neighbouring blocks that are neighbours in a pack too.
#[derive(Clone, Copy)]
struct Piece {
    pack: u32,
    slot: u32,
    block: u32,
    count: u32,
}

/// The pieces of one pack.
struct Job {
    pack: u32,
    pieces: Range<usize>,
    /// Bytes of the object to fetch; the pack's end is at their end.
    range: Range<u64>,
}

impl Job {
    fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

struct Work<'a> {
    generation: &'a Generation,
    name: &'a str,
    device: usize,
    target: &'a dyn BlockDevice,
    pieces: &'a [Piece],
    jobs: Mutex<VecDeque<Job>>,
    failed: Mutex<Option<StoreError>>,
    /// Of all blocks that were written.
    sum: Mutex<Sum>,
    stop: &'a AtomicBool,
    done: &'a AtomicU64,
}

impl Generation {
    /// Writes a whole device to `target`, and flushes. `done` counts bytes on the way, `stop` ends it.
    ///
    /// # Errors
    /// If the target is smaller, the store cannot be read, or something is damaged: then the target
    /// holds some of the content.
    pub fn restore(
        &self,
        name: &str,
        target: &dyn BlockDevice,
        options: RestoreOptions,
        done: &AtomicU64,
        stop: &AtomicBool,
    ) -> Result<Restored> {
        let restored = self.try_restore(name, target, options, done, stop);
        restored.map_err(|error| self.explained(error))
    }

    fn try_restore(
        &self,
        name: &str,
        target: &dyn BlockDevice,
        options: RestoreOptions,
        done: &AtomicU64,
        stop: &AtomicBool,
    ) -> Result<Restored> {
        let (device, start) = (self.find(name)?, Instant::now());
        let _span = tracing::info_span!("restore", line = %self.line, number = self.number(), name)
            .entered();
        let geometry = self.parts[device].entry.geometry;
        if target.size() < geometry.bytes() {
            let (bytes, target) = (geometry.bytes(), target.size());
            return Err(StoreError::Size { device: name.to_owned(), bytes, target });
        }
        let failed = |operation, offset| {
            move |source| StoreError::Device { operation, device: name.to_owned(), offset, source }
        };
        let (mut pieces, mut zeros) = (Vec::<Piece>::new(), 0);
        for leaf in 0..geometry.blocks().div_ceil(LEAF_BLOCKS) {
            // Not by way of the cache: each is needed once.
            let words = self.read_leaf(device, leaf)?;
            let mut empty = 0u64;
            for (at, word) in words.iter().enumerate() {
                let block = leaf * LEAF_BLOCKS + at as u64;
                match from_word(*word) {
                    Content::Zero => empty += 1,
                    Content::At { pack, slot } => match pieces.last_mut() {
                        Some(last)
                            if last.pack == pack
                                && last.slot + last.count == slot
                                && u64::from(last.block + last.count) == block =>
                        {
                            last.count += 1;
                        }
                        _ => pieces.push(Piece { pack, slot, block: block as u32, count: 1 }),
                    },
                }
                let ends = at + 1 == words.len() || from_word(words[at + 1]) != Content::Zero;
                if empty > 0 && ends {
                    let from = (block + 1 - empty) * geometry.block();
                    let length = (empty * geometry.block()).min(geometry.bytes() - from);
                    if !options.target_is_zero {
                        target.zero(from, length, false).map_err(failed("zero", from))?;
                    }
                    zeros += length;
                    done.fetch_add(length, Ordering::Relaxed);
                    empty = 0;
                }
            }
        }
        pieces.sort_unstable_by_key(|piece| (piece.pack, piece.slot));
        let sum = self.run_jobs(name, device, target, &pieces, options, done, stop)?;
        self.check_root(device, sum)?;
        target.flush().map_err(failed("flush", 0))?;
        Ok(Restored { bytes: geometry.bytes(), zeros, took: start.elapsed() })
    }

    /// Writes those blocks of a device to `target` that are in `only` and are not zeros, in few requests.
    /// Does not flush; the whole content is not checked, each block is.
    ///
    /// # Errors
    /// As [`Generation::restore`].
    pub fn restore_some(
        &self,
        name: &str,
        only: &BlockSet,
        target: &dyn BlockDevice,
        options: RestoreOptions,
        stop: &AtomicBool,
    ) -> Result<()> {
        let restored = self.try_restore_some(name, only, target, options, stop);
        restored.map_err(|error| self.explained(error))
    }

    fn try_restore_some(
        &self,
        name: &str,
        only: &BlockSet,
        target: &dyn BlockDevice,
        options: RestoreOptions,
        stop: &AtomicBool,
    ) -> Result<()> {
        let device = self.find(name)?;
        let geometry = self.parts[device].entry.geometry;
        let mut pieces = Vec::<Piece>::new();
        for range in only.ranges() {
            for block in range.start.0..range.end().min(geometry.blocks()) {
                if let Place::At { pack, slot } = self.place(device, BlockIndex(block))? {
                    pieces.push(Piece { pack, slot, block: block as u32, count: 1 });
                }
            }
        }
        pieces.sort_unstable_by_key(|piece| (piece.pack, piece.slot));
        let done = AtomicU64::new(0);
        self.run_jobs(name, device, target, &pieces, options, &done, stop).map(drop)
    }

    /// Fetches, decodes and writes pieces, which are in the order of packs and slots. Gives their sum.
    #[expect(clippy::too_many_arguments, reason = "a step of two functions")]
    fn run_jobs(
        &self,
        name: &str,
        device: usize,
        target: &dyn BlockDevice,
        pieces: &[Piece],
        options: RestoreOptions,
        done: &AtomicU64,
        stop: &AtomicBool,
    ) -> Result<Sum> {
        let work = Work {
            generation: self,
            name,
            device,
            target,
            pieces,
            jobs: Mutex::new(self.jobs(pieces)),
            failed: Mutex::default(),
            sum: Mutex::default(),
            stop,
            done,
        };
        std::thread::scope(|scope| {
            for _ in 0..options.threads.max(1) {
                scope.spawn(|| work.run(options));
            }
        });
        match work.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(work.sum.into_inner().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    /// One job for each pack.
    fn jobs(&self, pieces: &[Piece]) -> VecDeque<Job> {
        let mut jobs = VecDeque::new();
        let mut from = 0;
        while from < pieces.len() {
            let pack = pieces[from].pack;
            let to = from + pieces[from..].partition_point(|piece| piece.pack == pack);
            let blocks: u64 = pieces[from..to].iter().map(|piece| u64::from(piece.count)).sum();
            let reference = self.pack(pack);
            let length = u64::from(reference.length);
            // Where little of it is needed, the index first, and then what is needed.
            let whole = (blocks << reference.shift) >= length / 4;
            let range = if whole { 0..length } else { reference.tail() };
            jobs.push_back(Job { pack, pieces: from..to, range });
            from = to;
        }
        jobs
    }
}

impl Work<'_> {
    /// The next one, if it has no more bytes than `most`.
    fn next(&self, most: u64) -> Option<Job> {
        let stopped = self.failed.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if stopped {
            return None;
        }
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.pop_front_if(|job| job.bytes() <= most)
    }

    fn run(&self, options: RestoreOptions) {
        let mut pending: VecDeque<(Job, PackRef, Pending<Bytes>)> = VecDeque::new();
        loop {
            while pending.len() < options.in_flight.max(1) {
                let under_way: u64 = pending.iter().map(|(job, ..)| job.bytes()).sum();
                let left = match pending.is_empty() {
                    true => u64::MAX,
                    false => options.in_flight_bytes.saturating_sub(under_way),
                };
                let Some(job) = self.next(left) else { break };
                let pack = self.generation.pack(job.pack);
                let get =
                    self.generation.store.remote.start_get(&pack.id.pack(), job.range.clone());
                pending.push_back((job, pack, get));
            }
            let Some((job, pack, get)) = pending.pop_front() else { return };
            let result = if self.stop.load(Ordering::Relaxed) {
                Err(StoreError::Stopped)
            } else {
                get.wait().and_then(|bytes| self.decode(&job, &pack, Vec::from(bytes)))
            };
            if let Err(error) = result {
                let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert(error);
                return;
            }
        }
    }

    /// The chunks that pieces are in, neighbours by one request, with their offsets.
    fn fetch(
        &self,
        pack: &PackRef,
        opened: &Opened,
        pieces: &[Piece],
    ) -> Result<VecDeque<(u64, Vec<u8>)>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut next = 0;
        for chunk in &opened.index.chunks {
            while next < pieces.len() && pieces[next].slot + pieces[next].count <= chunk.first {
                next += 1;
            }
            let Some(piece) = pieces.get(next) else { break };
            if piece.slot >= chunk.first + chunk.blocks {
                continue;
            }
            let range = chunk.range();
            match ranges.last_mut() {
                Some(last)
                    if range.start <= last.end + GAP && range.end - last.start <= AT_ONCE =>
                {
                    last.end = range.end;
                }
                _ => ranges.push(range),
            }
        }
        let remote = &self.generation.store.remote;
        let gets: Vec<_> = ranges
            .into_iter()
            .map(|range| (range.start, remote.start_get(&pack.id.pack(), range)))
            .collect();
        gets.into_iter().map(|(from, get)| Ok((from, Vec::from(get.wait()?)))).collect()
    }

    fn decode(&self, job: &Job, pack: &PackRef, mut bytes: Vec<u8>) -> Result<()> {
        let (key, namer) = (self.generation.key(pack.key)?, self.generation.namer()?);
        let (known, mut sum) = (key.names_as(namer), Sum::default());
        let tail = pack.tail();
        let tail = (tail.start - job.range.start) as usize..(tail.end - job.range.start) as usize;
        let opened = Opened::new(pack, &bytes[tail], key)?;
        let pieces = &self.pieces[job.pieces.clone()];
        let (mut room, mut next) = (Vec::new(), 0);
        let geometry = self.generation.parts[self.device].entry.geometry;
        let whole = job.range.start == 0;
        let mut fetched = if whole { VecDeque::new() } else { self.fetch(pack, &opened, pieces)? };
        for chunk in &opened.index.chunks {
            let end = chunk.first + chunk.blocks;
            // Pieces are in order of slots; one may reach over several chunks, and several blocks of
            // the device may be one block of the pack.
            while next < pieces.len() && pieces[next].slot + pieces[next].count <= chunk.first {
                next += 1;
            }
            let ours = || pieces[next..].iter().take_while(|piece| piece.slot < end);
            let needed = |piece: &&Piece| piece.slot + piece.count > chunk.first;
            if !ours().any(|piece| needed(&piece)) {
                continue;
            }
            let range = chunk.range();
            let sealed = if whole {
                &mut bytes[range.start as usize..range.end as usize]
            } else {
                while fetched
                    .front()
                    .is_some_and(|(from, part)| from + (part.len() as u64) <= range.start)
                {
                    fetched.pop_front();
                }
                let part = fetched.front_mut().and_then(|(from, part)| {
                    let at = (range.start.checked_sub(*from)?) as usize;
                    part.get_mut(at..at + (range.end - range.start) as usize)
                });
                part.ok_or_else(|| StoreError::corrupt(pack.id.pack(), "it gave less than it has"))?
            };
            let content = opened.chunk(chunk, sealed, &mut room)?;
            opened.check(chunk, content, key)?;
            for piece in ours().filter(needed) {
                let from = piece.slot.max(chunk.first);
                let to = (piece.slot + piece.count).min(end);
                let block = u64::from(piece.block + (from - piece.slot));
                let offset = block * geometry.block();
                let start = ((from - chunk.first) as usize) << pack.shift;
                let length = (u64::from(to - from) << pack.shift).min(geometry.bytes() - offset);
                let part = &content[start..start + length as usize];
                self.target.write_at(offset, part).map_err(|source| StoreError::Device {
                    operation: "write",
                    device: self.name.to_owned(),
                    offset,
                    source,
                })?;
                self.done.fetch_add(length, Ordering::Relaxed);
                let whole = &content[start..start + (((to - from) as usize) << pack.shift)];
                for (at, content) in whole.chunks(1 << pack.shift).enumerate() {
                    let name = match opened.index.names.get(from as usize + at) {
                        Some(name) if known => *name,
                        // Of a base under another tenant's key.
                        _ => namer.name(content),
                    };
                    sum.add(block + at as u64, root::tag(&name));
                }
            }
        }
        self.sum.lock().unwrap_or_else(PoisonError::into_inner).merge(sum);
        let last = opened.index.names.len() as u32;
        if let Some(piece) = pieces.iter().find(|piece| piece.slot + piece.count > last) {
            return Err(self.generation.no_slot(&opened, piece.slot));
        }
        Ok(())
    }
}
