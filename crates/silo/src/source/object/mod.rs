//! A device whose blocks are objects of a store: read-mostly, written through.
//!
//! | object | what |
//! |---|---|
//! | `blocks/<block>-<generation>` | one block, written once under this name and never changed |
//! | `manifest/<number>` | which generation of which block, as of a flush; made once |
//!
//! # What holds
//!
//! - A write is in the store when it is answered, and part of the device after a crash once it was
//!   flushed: the next manifest lists it. After a crash the device is as of its last flush.
//! - A block that no manifest lists was never written, and is zeros. One that is listed and not in
//!   the store is an error that names it, never zeros; so is one whose bytes do not match.
//! - One writer: opening for writing makes a manifest, and a writer that finds the next number
//!   taken knows that another one came, and stops.
//!
//! Put a [`WriteCache`](crate::filter::WriteCache) over it to write in batches. Blocks of 256 KiB to
//! 4 MiB suit stores; a partial write reads the block first.

mod manifest;

use super::SourceError;
use crate::{
    block::{BlockIndex, BlockRange},
    geometry::Geometry,
    io::{Allocation, BlockDevice, Extent},
    locks::{RangeLocks, Who},
    range::{add_extent, check, refuse_write},
    shared_sync::{AfterFailure, SharedSync},
    store::Objects,
};
use bytes::{BufMut, Bytes, BytesMut};
use manifest::{MANIFEST_BYTES, MAX_BLOCKS, Manifest};
use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use twox_hash::XxHash3_64;

pub(crate) use manifest::fuzz_manifest;

/// Checksum before the bytes of a block.
const BLOCK_HEAD: usize = 8;
/// Largest number of a manifest that is believed: it is the upper half of generations, and one more
/// has to fit.
const MAX_MANIFEST: u64 = (1 << 31) - 1;
/// Blocks that are read or written at once for one access.
const AT_ONCE: usize = 64;
/// Longest wait for a flush that another thread runs.
const FLUSH_LIMIT: Duration = Duration::from_secs(3600);

/// Whose the next manifest is.
enum Made {
    /// This commit's.
    Now,
    /// An earlier commit's, which failed because the answer was lost: it lists what was then.
    Before,
    /// Another writer's.
    ByAnother,
}

/// What changes with writes and flushes.
struct State {
    /// Of the newest manifest.
    manifest: u64,
    /// Of the next block that is written; its upper half is the manifest this writer opened with,
    /// so that no two writers ever use the same.
    generation: u64,
    /// Something is not in the manifest.
    dirty: bool,
    /// Objects that no later manifest lists.
    garbage: Vec<String>,
    fenced: bool,
}

/// See the comment of its module.
pub struct ObjectDevice {
    objects: Objects,
    geometry: Geometry,
    writable: bool,
    nonce: [u8; 16],
    /// Per block its generation; 0: never written.
    index: Box<[AtomicU64]>,
    state: Mutex<State>,
    locks: RangeLocks,
    sync: SharedSync,
}

impl std::fmt::Debug for ObjectDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ObjectDevice({}, {:?})", self.objects.url(), self.geometry)
    }
}

fn block_name(block: u64, generation: u64) -> String {
    format!("blocks/{block:08x}-{generation:016x}")
}

fn manifest_name(number: u64) -> String {
    format!("manifest/{number:016x}")
}

fn checksum(block: u64, generation: u64, data: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(block ^ generation.rotate_left(32), data)
}

impl ObjectDevice {
    /// Makes an empty device.
    ///
    /// # Errors
    /// If there is one already, the sizes are impossible, or the store fails.
    pub fn create(objects: Objects, bytes: u64, block: u32) -> Result<Self, SourceError> {
        let geometry = Geometry::new(bytes, block)?;
        let path = PathBuf::from(objects.url());
        if geometry.blocks() > MAX_BLOCKS {
            let detail = format!("it has more than {MAX_BLOCKS} blocks; take larger ones");
            return Err(SourceError::NotA { path, wanted: "a size for objects", detail });
        }
        objects.probe().map_err(named("probe", &path))?;
        let found = objects.list("manifest").map_err(named("list", &path))?;
        if !found.is_empty() {
            return Err(SourceError::Exists { path });
        }
        let manifest = Manifest { geometry, generations: Vec::new() };
        Self::claim(objects, &manifest, 1)?.ok_or(SourceError::Exists { path })
    }

    /// Opens a device; for writing, writers that have it open are fenced off.
    ///
    /// # Errors
    /// If there is none, its manifest is damaged, or the store fails.
    pub fn open(objects: Objects, writable: bool) -> Result<Self, SourceError> {
        let path = PathBuf::from(objects.url());
        let mut objects = objects;
        // Again, if another writer comes in between.
        for _ in 0..16 {
            let names = objects.list("manifest").map_err(named("list", &path))?;
            let newest = names
                .last()
                .and_then(|name| u64::from_str_radix(name.strip_prefix("manifest/")?, 16).ok());
            if let Some(number) = newest.filter(|number| *number > MAX_MANIFEST) {
                let detail = format!(
                    "no device has so many flushes as {number}; remove it if something else put it there"
                );
                let path = path.join(manifest_name(number));
                return Err(SourceError::Corrupt { path, at: 0, detail });
            }
            let Some(number) = newest else {
                let detail = "no manifest in it".to_owned();
                return Err(SourceError::NotA { path, wanted: "a device of objects", detail });
            };
            let read = objects
                .read(&[manifest_name(number)], MANIFEST_BYTES)
                .map_err(named("read", &path))?;
            let Some(bytes) = read.into_iter().next().flatten() else { continue };
            let manifest = Manifest::decode(&bytes, &path.join(manifest_name(number)))?;
            if !writable {
                return Ok(Self::with(objects, &manifest, number, [0; 16], false));
            }
            // The same content under the next number: from here on nobody else can commit.
            match Self::claim_or_back(objects, &manifest, number + 1)? {
                Ok(device) => {
                    device.sweep(&manifest)?;
                    return Ok(device);
                }
                Err(back) => objects = back,
            }
        }
        let detail = "other writers keep taking it over".to_owned();
        Err(SourceError::NotA { path, wanted: "a device of one writer", detail })
    }

    fn claim(
        objects: Objects,
        manifest: &Manifest,
        number: u64,
    ) -> Result<Option<Self>, SourceError> {
        Ok(Self::claim_or_back(objects, manifest, number)?.ok())
    }

    /// Makes a manifest with this writer's nonce; the store back if the number is taken.
    fn claim_or_back(
        objects: Objects,
        manifest: &Manifest,
        number: u64,
    ) -> Result<Result<Self, Objects>, SourceError> {
        let path = PathBuf::from(objects.url());
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(|error| {
            SourceError::io("draw random bytes for", &path)(io::Error::other(error.to_string()))
        })?;
        let made = objects
            .create(&manifest_name(number), manifest.encode(&nonce))
            .map_err(named("write", &path))?;
        Ok(match made {
            true => Ok(Self::with(objects, manifest, number, nonce, true)),
            false => Err(objects),
        })
    }

    fn with(
        objects: Objects,
        manifest: &Manifest,
        number: u64,
        nonce: [u8; 16],
        writable: bool,
    ) -> Self {
        let index: Box<[AtomicU64]> =
            (0..manifest.geometry.blocks()).map(|_| AtomicU64::new(0)).collect();
        for (block, generation) in &manifest.generations {
            index[*block as usize].store(*generation, Ordering::Relaxed);
        }
        let state = State {
            manifest: number,
            generation: (number << 32) + 1,
            dirty: false,
            garbage: Vec::new(),
            fenced: false,
        };
        Self {
            objects,
            geometry: manifest.geometry,
            writable,
            nonce,
            index,
            state: Mutex::new(state),
            locks: RangeLocks::new(false),
            sync: SharedSync::new(AfterFailure::Retry, FLUSH_LIMIT),
        }
    }

    /// Removes what earlier writers left that no manifest lists.
    fn sweep(&self, manifest: &Manifest) -> Result<(), SourceError> {
        let path = PathBuf::from(self.objects.url());
        let listed: BTreeSet<String> = manifest
            .generations
            .iter()
            .map(|(block, generation)| block_name(u64::from(*block), *generation))
            .collect();
        let mut unlisted = self.objects.list("blocks").map_err(named("list", &path))?;
        unlisted.retain(|name| !listed.contains(name));
        for part in unlisted.chunks(AT_ONCE) {
            self.objects.delete(part).map_err(named("clean up", &path))?;
        }
        Ok(())
    }

    /// Size, and the size of an object.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Requests made to the store so far.
    #[must_use]
    pub fn requests(&self) -> crate::store::Requests {
        self.objects.requests()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(self.objects.url())
    }

    fn writable(&self) -> io::Result<()> {
        if !self.writable {
            return refuse_write(self.objects.url());
        }
        if self.state().fenced {
            let text = format!(
                "another writer took {} over; open it again, which takes it from that one",
                self.objects.url()
            );
            return Err(io::Error::new(io::ErrorKind::NotConnected, text));
        }
        Ok(())
    }

    /// Whole blocks, at most [`AT_ONCE`]: requests go out together.
    fn read_blocks(&self, range: BlockRange) -> io::Result<Vec<Option<Bytes>>> {
        let generation = |block: u64| self.index[block as usize].load(Ordering::Acquire);
        let wanted: Vec<(u64, u64)> =
            (range.start.0..range.end()).map(|block| (block, generation(block))).collect();
        let held = wanted.iter().filter(|(_, generation)| *generation != 0);
        let names: Vec<String> = held.map(|(block, number)| block_name(*block, *number)).collect();
        let most = self.geometry.block() + BLOCK_HEAD as u64;
        let mut found =
            self.objects.read(&names, most).map_err(named("read", &self.path()))?.into_iter();
        let mut blocks = Vec::with_capacity(wanted.len());
        for (block, number) in wanted {
            if number == 0 {
                blocks.push(None);
                continue;
            }
            let corrupt = |detail: &str| SourceError::Corrupt {
                path: self.path().join(block_name(block, number)),
                at: 0,
                detail: detail.to_owned(),
            };
            let Some(bytes) = found.next().flatten() else {
                if self.index[block as usize].load(Ordering::Acquire) != number {
                    // Written and cleaned up meanwhile: the newer one it is.
                    blocks.extend(self.read_blocks(BlockRange::new(block, 1))?);
                    continue;
                }
                return Err(corrupt("the store does not have it any more; restore it").into());
            };
            let length = self.geometry.length(BlockIndex(block)) as usize;
            if bytes.len() != length + BLOCK_HEAD
                || bytes[..BLOCK_HEAD]
                    != checksum(block, number, &bytes[BLOCK_HEAD..]).to_le_bytes()
            {
                return Err(corrupt("its bytes are not those that were written").into());
            }
            blocks.push(Some(bytes.slice(BLOCK_HEAD..)));
        }
        Ok(blocks)
    }

    /// Puts whole blocks into the store, then into the index. The caller holds their lock.
    fn write_blocks(&self, blocks: &[(u64, Bytes)]) -> io::Result<()> {
        let first = {
            let mut state = self.state();
            state.generation += blocks.len() as u64;
            state.generation - blocks.len() as u64
        };
        let mut objects = Vec::with_capacity(blocks.len());
        for (number, (block, data)) in (first..).zip(blocks) {
            let mut bytes = BytesMut::with_capacity(BLOCK_HEAD + data.len());
            bytes.put_u64_le(checksum(*block, number, data));
            bytes.put_slice(data);
            objects.push((block_name(*block, number), bytes.freeze()));
        }
        let names: Vec<String> = objects.iter().map(|(name, _)| name.clone()).collect();
        if let Err(error) = self.objects.write(objects) {
            // Some may be there, and nothing refers to them.
            self.state().garbage.extend(names);
            return Err(named("write", &self.path())(error).into());
        }
        for (number, (block, _)) in (first..).zip(blocks) {
            self.replace(*block, number);
        }
        Ok(())
    }

    fn replace(&self, block: u64, generation: u64) {
        let old = self.index[block as usize].swap(generation, Ordering::AcqRel);
        let mut state = self.state();
        state.dirty = true;
        if old != 0 {
            state.garbage.push(block_name(block, old));
        }
    }

    /// Who made the manifest that has the next number.
    fn who_made(&self, number: u64) -> Result<Made, crate::store::StoreError> {
        let read = self.objects.read(&[manifest_name(number)], MANIFEST_BYTES)?;
        let nonce = read
            .into_iter()
            .flatten()
            .next()
            .and_then(|bytes| Manifest::nonce_of(&bytes).map(|nonce| nonce == self.nonce));
        Ok(if nonce == Some(true) { Made::Before } else { Made::ByAnother })
    }

    /// Makes a manifest of what is in the index, then removes what it replaced.
    fn commit(&self) -> io::Result<()> {
        self.writable()?;
        // Garbage before the index: what is in it is no longer there.
        let (number, garbage) = {
            let mut state = self.state();
            if !state.dirty {
                return Ok(());
            }
            state.dirty = false;
            (state.manifest + 1, std::mem::take(&mut state.garbage))
        };
        let generations = (0u32..)
            .zip(&self.index)
            .map(|(block, slot)| (block, slot.load(Ordering::Acquire)))
            .filter(|(_, generation)| *generation != 0)
            .collect();
        let manifest = Manifest { geometry: self.geometry, generations };
        let made = self.objects.create(&manifest_name(number), manifest.encode(&self.nonce));
        let made = made.and_then(|new| if new { Ok(Made::Now) } else { self.who_made(number) });
        let mut state = self.state();
        match made {
            Ok(Made::Now) => state.manifest = number,
            Ok(Made::Before) => {
                state.manifest = number;
                state.dirty = true;
                state.garbage.extend(garbage);
                drop(state);
                return self.commit();
            }
            Ok(Made::ByAnother) => {
                state.fenced = true;
                drop(state);
                return self.writable();
            }
            Err(error) => {
                state.dirty = true;
                state.garbage.extend(garbage);
                return Err(named("commit", &self.path())(error).into());
            }
        }
        drop(state);
        let mut old = garbage;
        if number > 2 {
            old.push(manifest_name(number - 2));
        }
        for part in old.chunks(AT_ONCE) {
            if let Err(error) = self.objects.delete(part) {
                // Swept by the next open.
                tracing::debug!(%error, "objects that nobody needs stay for now");
            }
        }
        Ok(())
    }

    fn pieces(&self, offset: u64, length: u64) -> impl Iterator<Item = BlockRange> + use<> {
        self.geometry.touched(offset, length).chunks(AT_ONCE as u64)
    }
}

fn named(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(crate::store::StoreError) -> SourceError {
    let io = SourceError::io(operation, path);
    move |error| io(error.into())
}

impl BlockDevice for ObjectDevice {
    fn size(&self) -> u64 {
        self.geometry.bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check(self.geometry.bytes(), offset, buf.len() as u64)?;
        let end = offset + buf.len() as u64;
        for range in self.pieces(offset, buf.len() as u64) {
            let blocks = self.read_blocks(range)?;
            for (block, content) in (range.start.0..).zip(blocks) {
                let start = self.geometry.offset(BlockIndex(block));
                let from = start.max(offset);
                let to = (start + self.geometry.length(BlockIndex(block))).min(end);
                let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
                match content {
                    None => part.fill(0),
                    Some(bytes) => {
                        part.copy_from_slice(
                            &bytes[(from - start) as usize..(to - start) as usize],
                        );
                    }
                }
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check(self.geometry.bytes(), offset, data.len() as u64)?;
        self.writable()?;
        let end = offset + data.len() as u64;
        let covered = self.geometry.covered(offset, data.len() as u64);
        for range in self.pieces(offset, data.len() as u64) {
            let _guard = self.locks.lock(range, Who::Guest)?;
            let mut blocks = Vec::with_capacity(range.count as usize);
            for block in range.start.0..range.end() {
                let start = self.geometry.offset(BlockIndex(block));
                let from = start.max(offset);
                let to = (start + self.geometry.length(BlockIndex(block))).min(end);
                let part = &data[(from - offset) as usize..(to - offset) as usize];
                if block >= covered.start.0 && block < covered.end() {
                    blocks.push((block, Bytes::copy_from_slice(part)));
                    continue;
                }
                let mut whole = BytesMut::zeroed(self.geometry.length(BlockIndex(block)) as usize);
                if let Some(Some(old)) = self.read_blocks(BlockRange::new(block, 1))?.first() {
                    whole.copy_from_slice(old);
                }
                whole[(from - start) as usize..(to - start) as usize].copy_from_slice(part);
                blocks.push((block, whole.freeze()));
            }
            self.write_blocks(&blocks)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.writable { self.sync.run(|| self.commit()) } else { Ok(()) }
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        self.writable()?;
        let range = self.geometry.covered(offset, length);
        if range.count == 0 {
            return Ok(());
        }
        let _guard = self.locks.lock(range, Who::Guest)?;
        for block in range.start.0..range.end() {
            if self.index[block as usize].load(Ordering::Acquire) != 0 {
                self.replace(block, 0);
            }
        }
        Ok(())
    }

    /// A store has no room to hold: `allocate` changes nothing.
    fn zero(&self, offset: u64, length: u64, _allocate: bool) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        self.writable()?;
        let (covered, end) = (self.geometry.covered(offset, length), offset + length);
        self.trim(offset, length)?;
        for block in [offset, end.saturating_sub(1)].map(|at| self.geometry.containing(at)) {
            let inside = block.0 >= covered.start.0 && block.0 < covered.end();
            let held = block.0 < self.geometry.blocks()
                && self.index[block.0 as usize].load(Ordering::Acquire) != 0;
            if !inside && held {
                let start = self.geometry.offset(block).max(offset);
                let stop = (self.geometry.offset(block) + self.geometry.length(block)).min(end);
                self.write_at(start, &vec![0; stop.saturating_sub(start) as usize])?;
            }
        }
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        check(self.geometry.bytes(), offset, length)?;
        let (mut found, end, mut at) = (Vec::new(), offset + length, offset);
        while at < end {
            let block = self.geometry.containing(at);
            let stop = (self.geometry.offset(block) + self.geometry.block()).min(end);
            let held = self.index[block.0 as usize].load(Ordering::Acquire) != 0;
            let allocation = if held { Allocation::Data } else { Allocation::Hole };
            if !add_extent(&mut found, stop - at, allocation) {
                break;
            }
            at = stop;
        }
        Ok(found)
    }

    fn is_read_only(&self) -> bool {
        !self.writable
    }
}

#[cfg(test)]
mod tests;
