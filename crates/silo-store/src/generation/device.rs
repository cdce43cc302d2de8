//! A device of a generation as a block device that is read only: blocks come when they are asked for,
//! and what follows a sequential reader comes before it is.

use super::{Generation, Key, Place, Value};
use crate::{
    error::{Result, StoreError},
    format::{map::LEAF_BLOCKS, runs::Content},
    writer::from_word,
};
use silo_block::{
    block::{BlockIndex, BlockRange},
    geometry::Geometry,
    io::{Allocation, BlockDevice, Extent},
};
use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

/// Bytes that are fetched at once for a sequential reader.
const AHEAD: u64 = 2 << 20;
/// Ranges that may wait to be fetched; more are dropped, oldest first.
const WAITING: usize = 64;

struct Ahead {
    ranges: std::collections::VecDeque<BlockRange>,
    /// Where the last read ended, and how far was asked for ahead of it, in blocks.
    last: u64,
    asked: u64,
    closed: bool,
}

struct Shared {
    generation: Arc<Generation>,
    device: usize,
    geometry: Geometry,
    ahead: Mutex<Ahead>,
    work: Condvar,
    interrupted: AtomicBool,
}

/// A device of a generation, to be read. Threads that fetch ahead end when it is dropped.
pub struct GenerationDevice {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for GenerationDevice {
    fn drop(&mut self) {
        self.shared.ahead.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic of the thread has been reported by then.
            let _ = thread.join();
        }
    }
}

impl GenerationDevice {
    /// Device `name` of a generation, with `fetchers` threads that fetch ahead (0 for none).
    ///
    /// # Errors
    /// If there is no such device, or no threads.
    pub fn new(generation: &Arc<Generation>, name: &str, fetchers: usize) -> Result<Self> {
        let device = generation.find(name)?;
        let geometry = generation.parts[device].entry.geometry;
        let ahead = Ahead { ranges: Default::default(), last: 0, asked: 0, closed: false };
        let shared = Arc::new(Shared {
            generation: generation.clone(),
            device,
            geometry,
            ahead: Mutex::new(ahead),
            work: Condvar::new(),
            interrupted: AtomicBool::new(false),
        });
        let mut this = Self { shared, threads: Vec::new() };
        for number in 0..fetchers {
            let shared = this.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("ahead-{number}"))
                .spawn(move || shared.fetch())
                .map_err(|source| StoreError::Local { operation: "start a thread", source })?;
            this.threads.push(thread);
        }
        Ok(this)
    }

    /// Size of its blocks, bytes.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.shared.geometry.block()
    }

    /// Asks for ranges before they are read, in this order, as a recorded first-touch order says.
    pub fn prefetch(&self, ranges: impl IntoIterator<Item = BlockRange>) {
        let mut ahead = self.shared.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        ahead.ranges.extend(ranges);
        drop(ahead);
        self.shared.work.notify_all();
    }

    /// The blocks around `block`, itself included, that lie in the same chunk of a pack: to read them
    /// with it costs nothing more.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn beside(&self, block: BlockIndex) -> Result<BlockRange> {
        let (generation, device) = (&self.shared.generation, self.shared.device);
        let alone = BlockRange::new(block.0, 1);
        let Place::At { pack, slot } = generation.place(device, block)? else { return Ok(alone) };
        let opened = generation.index(pack)?;
        let Some(chunk) = opened.index.chunk_of(slot) else { return Ok(alone) };
        let slots = chunk.first..chunk.first + chunk.blocks;
        let same = |at: u64| -> Result<bool> {
            Ok(match generation.place(device, BlockIndex(at))? {
                Place::At { pack: other, slot } => other == pack && slots.contains(&slot),
                Place::Zero => false,
            })
        };
        let (mut first, mut end) = (block.0, block.0 + 1);
        // A block of the pack may be many of the device.
        let most = u64::from(chunk.blocks);
        while first > 0 && end - first < most && same(first - 1)? {
            first -= 1;
        }
        while end < self.shared.geometry.blocks() && end - first < most && same(end)? {
            end += 1;
        }
        Ok(BlockRange::new(first, end - first))
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length);
        if end.is_some_and(|end| end <= self.shared.geometry.bytes()) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "bytes {offset}+{length} lie past the end of a device of {}",
                self.shared.geometry.bytes()
            ),
        ))
    }

    fn read_only() -> io::Error {
        let message = "a generation cannot be written; put an overlay over it, or fork it";
        io::Error::new(io::ErrorKind::PermissionDenied, message)
    }
}

impl Shared {
    fn fetch(&self) {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        while !ahead.closed {
            let Some(range) = ahead.ranges.pop_front() else {
                ahead = self.work.wait(ahead).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(ahead);
            if let Err(error) = self.fetch_range(range) {
                // Whoever reads it meets the error, if it is still there then.
                tracing::debug!(%error, "could not fetch ahead");
            }
            ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Fetches what is not here of a range, neighbouring chunks in one request.
    fn fetch_range(&self, range: BlockRange) -> Result<()> {
        let generation = &self.generation;
        let mut wanted: Vec<(u32, u32, u32)> = Vec::new();
        for block in range.start.0..range.end().min(self.geometry.blocks()) {
            let Place::At { pack, slot } = generation.place(self.device, BlockIndex(block))? else {
                continue;
            };
            let opened = generation.index(pack)?;
            let Some(chunk) = opened.index.chunk_of(slot) else { continue };
            if generation.cache.peek(Key::Chunk(pack, chunk.number)).is_some() {
                continue;
            }
            match wanted.last_mut() {
                Some((p, _, last)) if *p == pack && *last == chunk.number => {}
                Some((p, _, last)) if *p == pack && *last + 1 == chunk.number => *last += 1,
                _ => wanted.push((pack, chunk.number, chunk.number)),
            }
        }
        for (pack, first, last) in wanted {
            let opened = generation.index(pack)?;
            let chunks = &opened.index.chunks[first as usize..=last as usize];
            let (from, to) = (chunks[0].range().start, chunks[chunks.len() - 1].range().end);
            let bytes = generation.store.remote.get_range(&opened.pack.id.pack(), from..to)?;
            let mut bytes = Vec::from(bytes);
            for chunk in chunks {
                let range = chunk.range();
                let part = &mut bytes[(range.start - from) as usize..(range.end - from) as usize];
                let content = generation.opened_chunk(&opened, chunk, part)?;
                generation.cache.put(Key::Chunk(pack, chunk.number), Value::Chunk(content));
            }
        }
        Ok(())
    }

    /// Notes a read of `blocks`, and asks ahead for a sequential reader.
    fn note(&self, blocks: BlockRange) {
        let step = (AHEAD / self.geometry.block()).max(1);
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let sequential = blocks.start.0 == ahead.last || blocks.start.0 + 1 == ahead.last;
        ahead.last = blocks.end();
        if !sequential || blocks.start.0 == 0 {
            ahead.asked = blocks.end();
            return;
        }
        let mut asked = ahead.asked.max(blocks.end());
        let limit = (blocks.end() + 2 * step).min(self.geometry.blocks());
        let mut any = false;
        while asked < limit && (limit - asked >= step || limit == self.geometry.blocks()) {
            let count = step.min(limit - asked);
            ahead.ranges.push_back(BlockRange::new(asked, count));
            (asked, any) = (asked + count, true);
        }
        ahead.asked = asked;
        while ahead.ranges.len() > WAITING {
            ahead.ranges.pop_front();
        }
        drop(ahead);
        if any {
            self.work.notify_all();
        }
    }
}

impl BlockDevice for GenerationDevice {
    fn size(&self) -> u64 {
        self.shared.geometry.bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        if self.shared.interrupted.load(Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the device is being closed"));
        }
        if buf.is_empty() {
            return Ok(());
        }
        let geometry = self.shared.geometry;
        let blocks = geometry.touched(offset, buf.len() as u64);
        if !self.threads.is_empty() {
            self.shared.note(blocks);
        }
        let (size, generation) = (geometry.block() as usize, &self.shared.generation);
        let skip = (offset - geometry.offset(blocks.start)) as usize;
        if skip == 0 && buf.len().is_multiple_of(size) {
            return Ok(generation.read_blocks(self.shared.device, blocks.start.0, buf)?);
        }
        let mut block = vec![0; size];
        let mut done = 0;
        for number in blocks.start.0..blocks.end() {
            let from = if done == 0 { skip } else { 0 };
            let count = (size - from).min(buf.len() - done);
            generation.read_blocks(self.shared.device, number, &mut block)?;
            buf[done..done + count].copy_from_slice(&block[from..from + count]);
            done += count;
        }
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(Self::read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Err(Self::read_only())
    }

    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(Self::read_only())
    }

    fn interrupt(&self) {
        self.shared.interrupted.store(true, Ordering::Relaxed);
    }

    /// Where the map is not here yet, everything counts as data: this does not wait.
    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        self.check(offset, length)?;
        let (geometry, generation) = (self.shared.geometry, &self.shared.generation);
        let (mut extents, end) = (Vec::<Extent>::new(), offset + length);
        let mut at = offset;
        while at < end {
            let block = at / geometry.block();
            let key = Key::Leaf(self.shared.device, block / LEAF_BLOCKS);
            let (until, allocation) = match generation.cache.peek(key) {
                Some(Value::Leaf(words)) => {
                    let word = words[(block % LEAF_BLOCKS) as usize];
                    let allocation = match from_word(word) {
                        Content::Zero => Allocation::Hole,
                        Content::At { .. } => Allocation::Data,
                    };
                    ((block + 1) * geometry.block(), allocation)
                }
                _ => ((block / LEAF_BLOCKS + 1) * LEAF_BLOCKS * geometry.block(), Allocation::Data),
            };
            let length = until.min(end) - at;
            match extents.last_mut() {
                Some(last) if last.allocation == allocation => last.length += length,
                _ => extents.push(Extent { length, allocation }),
            }
            at += length;
        }
        Ok(extents)
    }

    fn is_read_only(&self) -> bool {
        true
    }
}
