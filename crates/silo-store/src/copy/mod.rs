//! Devices that silo serves, made ready for backup: a group freezes at one instant, in constant
//! time, and who writes to a frozen block copies it first.
//!
//! ```text
//! write:  in the gate (shared): note the blocks in the open round's set, count oneself in
//!         frozen block, not saved yet? copy it to the scratch space
//!         write to the device; count oneself out
//! freeze: in the gate (alone): the open round's set becomes the frozen one, for all devices
//! read:   when writes from before the freeze are out: saved? from scratch : from the device, and
//!         it counts as saved
//! ```
//! What must hold: a write counts itself in before it touches the device, so the frozen content is
//! all writes that began before the freeze and none that began after. Between looking whether a
//! block is saved and saving it, nobody else does either (a lock per some blocks). A writer is never
//! held by the upload: only by copying what it is about to overwrite, or by the reading of 128 KiB.
//! Nobody waits for writes of a round whose freeze is over: their place counts the writes of the
//! round after the next by then, and those wait for the ones of the round between.

mod bits;
mod scratch;

pub use scratch::ScratchOptions;

use crate::capture::{Capture, CaptureError, Changes, DeviceInfo, Frozen, Want};
use bits::Bits;
use scratch::Scratch;
use silo_block::{
    block::{BlockIndex, BlockRange, BlockSet},
    geometry::{Geometry, GeometryError},
    io::{BlockDevice, Extent},
    times::{Histogram, Times},
};
use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Blocks per lock, as a power of two.
const STRIPE: u32 = 5;
/// Locks of a device.
const STRIPES: usize = 256;
/// How long reading the frozen content waits for writes from before the freeze.
const PATIENCE: Duration = Duration::from_secs(30);

/// A group of devices that are backed up together.
pub struct CopyGroup {
    parts: Vec<Part>,
    /// The open round; alone for a freeze, shared for the beginning of a write.
    gate: RwLock<Vec<Arc<Bits>>>,
    round: AtomicU64,
    active: RwLock<Option<Arc<Freeze>>>,
    frozen: AtomicBool,
    scratch: ScratchOptions,
    /// A round was released: what is not noted is in the store.
    known: AtomicBool,
    /// Writers that copied what they were about to overwrite, and freezes.
    holds: Times,
}

struct Part {
    info: DeviceInfo,
    inner: Arc<dyn BlockDevice>,
    stripes: Vec<Mutex<()>>,
    /// Writes under way, of even and of odd rounds.
    inside: [AtomicU64; 2],
}

struct Freeze {
    round: u64,
    dirty: Vec<Arc<Bits>>,
    saved: Vec<Bits>,
    scratch: Scratch,
    /// A copy could not be kept: the round cannot be stored.
    spoiled: Mutex<Option<(io::ErrorKind, String)>>,
    is_spoiled: AtomicBool,
    held: AtomicU64,
    /// Released or put back: nobody reads the frozen content any more.
    over: AtomicBool,
}

impl Freeze {
    fn note_held(&self, since: Instant) {
        self.held.fetch_max(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    fn spoil(&self, error: &io::Error) {
        let mut spoiled = self.spoiled.lock().unwrap_or_else(PoisonError::into_inner);
        spoiled.get_or_insert_with(|| (error.kind(), error.to_string()));
        self.is_spoiled.store(true, Ordering::Release);
    }

    fn check(&self) -> io::Result<()> {
        if !self.is_spoiled.load(Ordering::Acquire) {
            return Ok(());
        }
        let spoiled = self.spoiled.lock().unwrap_or_else(PoisonError::into_inner);
        let (kind, text) = spoiled.clone().unwrap_or((io::ErrorKind::Other, String::new()));
        Err(io::Error::new(kind, text))
    }
}

impl CopyGroup {
    /// Devices with their names and the block sizes in which they are tracked and stored.
    ///
    /// # Errors
    /// If a block size is not possible.
    pub fn new(
        devices: Vec<(String, u32, Arc<dyn BlockDevice>)>,
        scratch: ScratchOptions,
    ) -> Result<Arc<Self>, GeometryError> {
        let mut parts = Vec::new();
        for (name, block, inner) in devices {
            let geometry = Geometry::new(inner.size(), block)?;
            parts.push(Part {
                info: DeviceInfo { name, geometry },
                inner,
                stripes: (0..STRIPES).map(|_| Mutex::new(())).collect(),
                inside: [AtomicU64::new(0), AtomicU64::new(0)],
            });
        }
        let open = parts.iter().map(|part| Arc::new(Bits::new(part.blocks()))).collect();
        Ok(Arc::new(Self {
            parts,
            gate: RwLock::new(open),
            round: AtomicU64::new(1),
            active: RwLock::new(None),
            frozen: AtomicBool::new(false),
            scratch,
            known: AtomicBool::new(false),
            holds: Times::default(),
        }))
    }

    /// The device to serve instead of the one that was given.
    ///
    /// # Panics
    /// If there are not so many devices.
    #[must_use]
    pub fn device(self: &Arc<Self>, device: usize) -> CopyBeforeWrite {
        assert!(device < self.parts.len(), "the group has {} devices", self.parts.len());
        CopyBeforeWrite { group: self.clone(), device }
    }

    /// Bytes that wait in memory and in the scratch file.
    #[must_use]
    pub fn scratch_used(&self) -> (u64, u64) {
        let active = self.active.read().unwrap_or_else(PoisonError::into_inner).clone();
        active.map_or((0, 0), |freeze| freeze.scratch.used())
    }

    /// The store is known to hold the devices' content, less what is written from here on: the first
    /// round need not list all blocks.
    pub fn set_known(&self) {
        self.known.store(true, Ordering::Release);
    }

    /// As [`CopyGroup::set_known`], of a store that differs in these blocks too, one set for each
    /// device; and in what was written since this group was made.
    ///
    /// # Panics
    /// If there are not as many sets as devices.
    pub fn set_known_but(&self, changed: &[BlockSet]) {
        assert_eq!(changed.len(), self.parts.len(), "a set for each device");
        let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        for (bits, set) in gate.iter().zip(changed) {
            set.ranges().for_each(|range| bits.insert(range));
        }
        drop(gate);
        self.set_known();
    }

    /// What a round taken now would list of each device; `None` before anything is known of the store.
    #[must_use]
    pub fn changed(&self) -> Option<Vec<BlockSet>> {
        let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let known = self.known.load(Ordering::Acquire);
        known.then(|| gate.iter().map(|bits| bits.to_set()).collect())
    }

    /// Waits until no write of `round` is under way, or what it is waited for is `over`.
    fn drain(&self, device: usize, round: u64, over: impl Fn() -> bool) -> io::Result<()> {
        let (inside, begun) = (&self.parts[device].inside[(round & 1) as usize], Instant::now());
        for turn in 0u32.. {
            if inside.load(Ordering::Acquire) == 0 || over() {
                break;
            }
            if begun.elapsed() > PATIENCE {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("writes from before the freeze have not ended in {PATIENCE:?}"),
                ));
            }
            if turn < 64 {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        Ok(())
    }

    /// Forgets a round, after its set was dealt with.
    fn thaw(&self, freeze: &Freeze) {
        // Before another freeze can begin: its writers count in the place that a writer of this one
        // may still be waiting for.
        freeze.over.store(true, Ordering::Release);
        *self.active.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.frozen.store(false, Ordering::Release);
    }
}

impl Part {
    fn blocks(&self) -> u64 {
        self.info.geometry.blocks()
    }

    fn lock(&self, stripe: u64) -> MutexGuard<'_, ()> {
        let stripe = &self.stripes[stripe as usize % STRIPES];
        stripe.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A write that counted itself in.
struct Inside<'a>(&'a AtomicU64);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// A device of a [`CopyGroup`], as front ends serve it.
#[derive(Clone)]
pub struct CopyBeforeWrite {
    group: Arc<CopyGroup>,
    device: usize,
}

impl CopyBeforeWrite {
    fn part(&self) -> &Part {
        &self.group.parts[self.device]
    }

    /// Does `write` to blocks that it touches, in a round.
    fn change(
        &self,
        offset: u64,
        length: u64,
        write: impl FnOnce(&dyn BlockDevice) -> io::Result<()>,
    ) -> io::Result<()> {
        let (part, group) = (self.part(), &self.group);
        let range = part.info.geometry.touched(offset, length);
        let begun = Instant::now();
        let gate = group.gate.read().unwrap_or_else(PoisonError::into_inner);
        gate[self.device].insert(range);
        // Changes only while the gate is held alone.
        let round = group.round.load(Ordering::Relaxed);
        let inside = &part.inside[(round & 1) as usize];
        inside.fetch_add(1, Ordering::AcqRel);
        drop(gate);
        let _inside = Inside(inside);
        if group.frozen.load(Ordering::Acquire) {
            let active = group.active.read().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(freeze) = active.filter(|freeze| freeze.round + 1 == round) {
                if self.save(&freeze, range) {
                    group.holds.add(begun.elapsed());
                }
                freeze.note_held(begun);
            }
        }
        write(part.inner.as_ref())
    }

    /// Copies frozen blocks of a range that are not saved yet; false if there are none.
    fn save(&self, freeze: &Freeze, range: BlockRange) -> bool {
        let (part, geometry) = (self.part(), self.part().info.geometry);
        let (dirty, saved) = (&freeze.dirty[self.device], &freeze.saved[self.device]);
        if freeze.is_spoiled.load(Ordering::Acquire) || !dirty.any_without(range, saved) {
            return false;
        }
        let over = || freeze.over.load(Ordering::Acquire);
        let result = self.group.drain(self.device, freeze.round, over).and_then(|()| {
            let mut content = vec![0; geometry.block() as usize];
            let mut at = range.start.0;
            while at < range.end() && !over() {
                let stop = ((at >> STRIPE) + 1) << STRIPE;
                let _lock = part.lock(at >> STRIPE);
                for block in at..stop.min(range.end()) {
                    if !dirty.contains(block) || saved.contains(block) {
                        continue;
                    }
                    let index = BlockIndex(block);
                    let content = &mut content[..geometry.length(index) as usize];
                    part.inner.read_at(geometry.offset(index), content)?;
                    freeze.scratch.put(self.device, block, content)?;
                    saved.insert(BlockRange::new(block, 1));
                }
                at = stop;
            }
            Ok(())
        });
        // The machine goes on writing; it is the backup that failed.
        if let Err(error) = result {
            freeze.spoil(&error);
        }
        true
    }
}

impl BlockDevice for CopyBeforeWrite {
    fn size(&self) -> u64 {
        self.part().inner.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.part().inner.read_at(offset, buf)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.part().inner.try_read_at(offset, buf)
    }

    fn may_wait(&self, offset: u64, length: u64) -> bool {
        self.part().inner.may_wait(offset, length)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(offset, data.len() as u64, |inner| inner.write_at(offset, data))
    }

    fn flush(&self) -> io::Result<()> {
        self.part().inner.flush()
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(offset, length, |inner| inner.trim(offset, length))
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.change(offset, length, |inner| inner.zero(offset, length, allocate))
    }

    fn interrupt(&self) {
        self.part().inner.interrupt();
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        self.part().inner.extents(offset, length)
    }

    fn is_read_only(&self) -> bool {
        self.part().inner.is_read_only()
    }
}

impl Capture for Arc<CopyGroup> {
    fn devices(&self) -> Vec<DeviceInfo> {
        self.parts.iter().map(|part| part.info.clone()).collect()
    }

    fn changes(&self, group_shift: u32) -> Changes {
        let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner).clone();
        if !self.known.load(Ordering::Acquire) {
            let blocks = self.parts.iter().map(Part::blocks).sum();
            let largest = self.parts.iter().map(Part::blocks).max().unwrap_or(0);
            return Changes { blocks, fullest: largest.min(1 << group_shift.min(40)) };
        }
        Changes {
            blocks: gate.iter().map(|bits| bits.len()).sum(),
            fullest: gate.iter().map(|bits| bits.fullest(group_shift)).max().unwrap_or(0),
        }
    }

    fn freeze(&self, want: Want) -> Result<Box<dyn Frozen>, CaptureError> {
        if self.frozen.swap(true, Ordering::AcqRel) {
            return Err(CaptureError::Frozen);
        }
        let everything = want == Want::Everything || !self.known.load(Ordering::Acquire);
        let fresh = || self.parts.iter().map(|part| Bits::new(part.blocks()));
        // Made before anybody is held.
        let (saved, next): (Vec<Bits>, Vec<Arc<Bits>>) =
            (fresh().collect(), fresh().map(Arc::new).collect());
        let round = self.round.load(Ordering::Relaxed);
        for (device, part) in self.parts.iter().enumerate() {
            // Writes of the round before the last count in the same place as those of the next.
            if let Err(source) = self.drain(device, round + 1, || false) {
                self.frozen.store(false, Ordering::Release);
                let (device, operation) = (part.info.name.clone(), "end writes");
                return Err(CaptureError::Device { device, operation, source });
            }
        }
        if everything {
            // Beside writers, whose own notes make no difference to a full set.
            let open = self.gate.read().unwrap_or_else(PoisonError::into_inner).clone();
            for (bits, part) in open.iter().zip(&self.parts) {
                bits.insert(BlockRange::new(0, part.blocks()));
            }
        }
        let mut active = self.active.write().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        let mut gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let dirty = std::mem::replace(&mut *gate, next);
        self.round.store(round + 1, Ordering::Relaxed);
        let freeze = Arc::new(Freeze {
            round,
            dirty,
            saved,
            scratch: Scratch::new(self.scratch.clone()),
            spoiled: Mutex::default(),
            is_spoiled: AtomicBool::new(false),
            held: AtomicU64::new(0),
            over: AtomicBool::new(false),
        });
        *active = Some(freeze.clone());
        drop(gate);
        freeze.note_held(begun);
        self.holds.add(begun.elapsed());
        drop(active);
        let changed = freeze.dirty.iter().map(|bits| bits.to_set()).collect();
        Ok(Box::new(FrozenGroup { group: self.clone(), freeze, changed, released: false }))
    }

    fn holds(&self) -> Histogram {
        self.holds.read()
    }
}

struct FrozenGroup {
    group: Arc<CopyGroup>,
    freeze: Arc<Freeze>,
    changed: Vec<BlockSet>,
    released: bool,
}

impl Drop for FrozenGroup {
    fn drop(&mut self) {
        if !self.released {
            // Beside writers: a set that is being replaced by a freeze cannot be, as this is the freeze.
            let gate = self.group.gate.read().unwrap_or_else(PoisonError::into_inner);
            gate.iter().zip(&self.freeze.dirty).for_each(|(open, old)| open.add(old));
        }
        self.group.thaw(&self.freeze);
    }
}

impl Frozen for FrozenGroup {
    fn changed(&self, device: usize) -> &BlockSet {
        &self.changed[device]
    }

    fn read(&self, device: usize, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        let (part, freeze) = (&self.group.parts[device], &self.freeze);
        let (geometry, saved) = (part.info.geometry, &freeze.saved[device]);
        if buf.len() as u64 != geometry.bytes_of(range) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the buffer is not as long as the range",
            ));
        }
        freeze.check()?;
        self.group.drain(device, freeze.round, || false)?;
        let start = geometry.offset(range.start);
        let mut at = range.start.0;
        while at < range.end() {
            let stop = (((at >> STRIPE) + 1) << STRIPE).min(range.end());
            let _lock = part.lock(at >> STRIPE);
            while at < stop {
                let is_saved = saved.contains(at);
                let mut until = at + 1;
                while !is_saved && until < stop && !saved.contains(until) {
                    until += 1;
                }
                let run = BlockRange::new(at, until - at);
                let from = (geometry.offset(run.start) - start) as usize;
                let out = &mut buf[from..from + geometry.bytes_of(run) as usize];
                if is_saved {
                    freeze.scratch.take(device, at, out)?;
                } else {
                    part.inner.read_at(geometry.offset(run.start), out)?;
                    saved.insert(run);
                }
                at = until;
            }
        }
        // A copy that could not be kept may be one of these.
        freeze.check()
    }

    fn held(&self) -> Duration {
        Duration::from_nanos(self.freeze.held.load(Ordering::Relaxed))
    }

    fn release(mut self: Box<Self>) {
        self.released = true;
        self.group.known.store(true, Ordering::Release);
    }

    fn put_back(self: Box<Self>) {}
}
