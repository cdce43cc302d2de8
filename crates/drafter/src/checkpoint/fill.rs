//! A machine that runs while its content is still in a store: blocks that are touched come first, the
//! rest follows.
//!
//! ```text
//!   fault ──demand──▶ queue ──▶ threads: read the block, checked by its name ──▶ fill
//!   then: what an earlier start touched, in that order, by many threads ──▶ fill
//!   bulk: silo's restore, device by device, pack by pack, root compared at the end ──▶ fill
//! ```
//!
//! Called by the runner after a lazy restore has armed the devices with what is missing. What must
//! hold: only blocks that are missing are taken, so what the guest has written stays; a store that does
//! not answer makes the guest wait and is asked again, until it answers or the machine ends; demands
//! are not held up by more than one pack of bulk, or [`BULK`] of several.
//!
//! What is touched is recorded, after the order that was followed: the next generations have both, for
//! the next start. An order is a hint; whatever it says, content is right.

use super::restore::whole;
use crate::driver::give_way;
use silo::{
    block::{BLOCK_SIZE, BlockRange, BlockSet},
    device::{Demand, Device},
    io::BlockDevice,
    order::{FirstTouch, touch::Manifest},
    store::{Generation, GenerationDevice, RestoreOptions, StoreError},
};
use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// Threads that bring what is waited for.
const FETCHERS: usize = 4;
/// Blocks that are brought for one that is waited for, at least, itself included.
const CLUSTER: u64 = 16;
/// Threads that bring what an earlier start touched; they wait for the store nearly all of the time.
const AHEAD: usize = 16;
/// Most blocks that one of them brings at a time.
const STEP: u64 = 64;
/// What is brought so of a machine: this part of all that is missing, or so many blocks if that is more. One
/// whose starts have touched nearly everything is brought sooner pack by pack, which the rest of it is anyway.
const EXPECTED: (u64, u64) = (8, 8192);
/// Requests of bulk under way, and bytes of them, where somebody waits for all of it: what the machine waits
/// for is not held up by more. Else there is one, which leaves the processors to the machine.
const BULK: (usize, u64) = (8, 4 << 20);
/// How long one of them lets what is waited for go first before it looks again.
const YIELD: Duration = Duration::from_millis(5);
/// Pauses between two attempts at a store: the first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// In which order the blocks of devices were first touched, by their names in a generation.
pub type FirstTouches = BTreeMap<String, Manifest>;

/// Where the missing blocks of a group of devices are.
pub struct StoreFill {
    generation: Arc<Generation>,
    devices: Vec<Arc<dyn Device>>,
    /// Their names in the generation, in the same order.
    names: Vec<String>,
    sources: Vec<GenerationDevice>,
    wanted: Mutex<VecDeque<(usize, BlockRange)>>,
    changed: Condvar,
    stop: AtomicBool,
    trouble: Mutex<Option<String>>,
    /// The order of an earlier start, by device.
    order: Vec<Vec<BlockRange>>,
    /// That order, and what was touched besides.
    touched: Vec<Mutex<FirstTouch>>,
    recording: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn expected_at_most(missing: u64) -> u64 {
    (missing / EXPECTED.0).max(EXPECTED.1)
}

impl StoreFill {
    /// Devices, each with its name in the generation, and what an earlier start touched of them.
    ///
    /// # Errors
    /// If the generation has no such device, or one of another size.
    pub fn new(
        generation: Arc<Generation>,
        devices: Vec<(String, Arc<dyn Device>)>,
        touches: &FirstTouches,
    ) -> Result<Arc<Self>, StoreError> {
        let (names, devices): (Vec<_>, Vec<_>) = devices.into_iter().unzip();
        let order = |(name, device): (&String, &Arc<dyn Device>)| match touches.get(name) {
            Some(known) if known.blocks == device.blocks() => known.order.clone(),
            _ => Vec::new(),
        };
        let order: Vec<_> = names.iter().zip(&devices).map(order).collect();
        let touched = |(device, order): (&Arc<dyn Device>, &Vec<BlockRange>)| {
            let mut touched = FirstTouch::new(device.blocks());
            order.iter().for_each(|range| touched.touched(*range));
            Mutex::new(touched)
        };
        let touched = devices.iter().zip(&order).map(touched).collect();
        let source = |(name, device): (&String, &Arc<dyn Device>)| {
            let source = GenerationDevice::new(&generation, name, 0)?;
            let (bytes, target) = (source.size(), device.blocks() * BLOCK_SIZE as u64);
            if bytes == target {
                Ok(source)
            } else {
                Err(StoreError::Size { device: name.clone(), bytes, target })
            }
        };
        let sources = names.iter().zip(&devices).map(source).collect::<Result<_, _>>()?;
        Ok(Arc::new(Self {
            generation,
            devices,
            names,
            sources,
            wanted: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            trouble: Mutex::default(),
            order,
            touched,
            recording: AtomicBool::new(true),
        }))
    }

    /// The blocks of a device that are not zeros: those to arm it with.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn missing(&self, device: usize) -> Result<BlockSet, StoreError> {
        self.generation.data_blocks(&self.names[device])
    }

    /// What a device calls for a block that is waited for.
    #[must_use]
    pub fn demand(self: &Arc<Self>, device: usize) -> Demand {
        let fill = Arc::clone(self);
        Box::new(move |range| {
            fill.note(device, range);
            lock(&fill.wanted).push_back((device, range));
            // All: one that rests after an error takes none.
            fill.changed.notify_all();
        })
    }

    /// Somebody who reads everything asks for blocks from now on: that is no start.
    pub fn stop_recording(&self) {
        self.recording.store(false, Ordering::Relaxed);
    }

    /// What this start has touched so far, after what the one before had.
    #[must_use]
    pub fn first_touches(&self) -> FirstTouches {
        let manifest = |(name, touched): (&String, &Mutex<FirstTouch>)| {
            (name.clone(), lock(touched).manifest())
        };
        let all = self.names.iter().zip(&self.touched).map(manifest);
        all.filter(|(_, manifest)| !manifest.order.is_empty()).collect()
    }

    /// Why the store gives nothing just now.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    /// Ends it: the machine has ended, or will.
    pub fn end(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Starts to serve demands. To be called before the first can come.
    ///
    /// # Errors
    /// If this host gives no threads.
    pub fn serve(self: &Arc<Self>) -> io::Result<Vec<JoinHandle<()>>> {
        let fetcher = |number| {
            let fill = Arc::clone(self);
            let thread = std::thread::Builder::new().name(format!("fill-{number}"));
            thread.spawn(move || fill.fetch())
        };
        (0..FETCHERS).map(fetcher).collect()
    }

    fn fetch(&self) {
        let _urgent = crate::driver::Urgent::this_thread();
        loop {
            let mut wanted = lock(&self.wanted);
            let (device, range) = loop {
                if self.stop.load(Ordering::SeqCst) {
                    return;
                }
                if let Some(next) = wanted.pop_front() {
                    break next;
                }
                // The idle state of the thread, which `end` ends.
                wanted = self.changed.wait(wanted).unwrap_or_else(PoisonError::into_inner);
            };
            drop(wanted);
            let bring = || {
                let near = self.near(device, range)?;
                // Once it is here it is not asked for, and may be needed all the same.
                self.note(device, near);
                self.bring(device, near)
            };
            if !self.patiently(bring) {
                return;
            }
        }
    }

    /// What is brought for a demand: the blocks asked for, and those that come with the first of them at
    /// no cost; where these are few (their neighbours were stored at other times), also those behind.
    fn near(&self, device: usize, range: BlockRange) -> io::Result<BlockRange> {
        let (source, mut beside) = (&self.sources[device], range);
        if source.block() == BLOCK_SIZE as u64 {
            beside = source.beside(range.start).map_err(io::Error::other)?;
        }
        let behind = if beside.count * 2 < CLUSTER { CLUSTER } else { 0 };
        let end = range.end().max(beside.end()).max(range.start.0 + behind);
        let end = end.min(self.devices[device].blocks());
        Ok(BlockRange::new(beside.start.0, end - beside.start.0))
    }

    /// A start has needed these.
    fn note(&self, device: usize, range: BlockRange) {
        if self.recording.load(Ordering::Relaxed) {
            lock(&self.touched[device]).touched(range);
        }
    }

    /// Does `work` until it succeeds; false if it was ended before.
    fn patiently(&self, work: impl Fn() -> io::Result<()>) -> bool {
        let mut pause = PAUSES.0;
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return false;
            }
            match work() {
                Ok(()) => {
                    *lock(&self.trouble) = None;
                    return true;
                }
                Err(error) => {
                    tracing::warn!(%error, "content could not be brought from the store; again soon");
                    *lock(&self.trouble) = Some(error.to_string());
                }
            }
            let wanted = lock(&self.wanted);
            let waited = self
                .changed
                .wait_timeout_while(wanted, pause, |_| !self.stop.load(Ordering::SeqCst));
            drop(waited.unwrap_or_else(PoisonError::into_inner));
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// What an earlier start touched and is missing, all devices side by side as far as they are; the first
    /// `most` blocks of it.
    fn expected(&self, most: u64) -> Vec<(usize, BlockRange)> {
        let mut expected = Vec::new();
        for (device, order) in self.order.iter().enumerate() {
            if order.is_empty() {
                continue;
            }
            let missing = self.devices[device].missing();
            for (at, range) in order.iter().enumerate() {
                let place = at as f64 / order.len() as f64;
                let parts = missing.ranges_in(*range).flat_map(|part| part.chunks(STEP));
                expected.extend(parts.map(|part| (place, device, part)));
            }
        }
        expected.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut blocks = 0;
        let within = expected.into_iter().take_while(|(_, _, range)| {
            blocks += range.count;
            blocks <= most
        });
        within.map(|(_, device, range)| (device, range)).collect()
    }

    /// Brings what an earlier start touched; what this one waits for goes first. False if it was ended.
    fn run_ahead(&self) -> bool {
        let missing: u64 = self.devices.iter().map(|device| device.missing_blocks()).sum();
        let (expected, next) = (self.expected(expected_at_most(missing)), AtomicUsize::new(0));
        let bring = || {
            while let Some((device, range)) = expected.get(next.fetch_add(1, Ordering::Relaxed)) {
                let wanted = lock(&self.wanted);
                let busy = |wanted: &mut VecDeque<_>| !wanted.is_empty();
                drop(self.changed.wait_timeout_while(wanted, YIELD, busy));
                if !self.patiently(|| self.bring(*device, *range)) {
                    return;
                }
            }
        };
        std::thread::scope(|scope| {
            for number in 0..AHEAD.min(expected.len()) {
                let thread = std::thread::Builder::new().name(format!("ahead-{number}"));
                if let Err(error) = thread.spawn_scoped(scope, bring) {
                    tracing::warn!(%error, "no further thread to bring what will be touched");
                }
            }
        });
        !self.stop.load(Ordering::SeqCst)
    }

    /// Reads blocks from the store into their device.
    fn bring(&self, device: usize, range: BlockRange) -> io::Result<()> {
        let mut bytes = vec![0; range.bytes() as usize];
        self.sources[device].read_at(range.start.offset(), &mut bytes)?;
        self.devices[device].fill(range.start, &bytes).map(drop).map_err(io::Error::other)
    }

    /// Brings everything. Returns when nothing is missing, or when it was ended: then false. What the
    /// generation refers to is kept in the store until then, also if the generation is pruned. What the
    /// machine waits for is brought by others: unless all of it `is_awaited` by somebody, this thread and
    /// those that it starts give way to the machine.
    pub fn run(&self, is_awaited: bool) -> bool {
        if !is_awaited {
            give_way();
        }
        if let Err(error) = self.generation.pin_if_possible() {
            // What is missing of it is told when it is missing.
            tracing::error!(%error, "the generation that the machine is brought from is gone");
        }
        let all = self.bring_all(if is_awaited { BULK } else { (1, u64::MAX) });
        self.generation.unpin();
        all
    }

    fn bring_all(&self, (in_flight, in_flight_bytes): (usize, u64)) -> bool {
        if !self.run_ahead() {
            return false;
        }
        for (device, name) in self.devices.iter().zip(&self.names) {
            let target = FillTarget(Arc::clone(device));
            let done = self.patiently(|| {
                if device.missing_blocks() == 0 {
                    return Ok(());
                }
                let options =
                    RestoreOptions { threads: 1, in_flight, in_flight_bytes, target_is_zero: true };
                let done = AtomicU64::new(0);
                let restored = self.generation.restore(name, &target, options, &done, &self.stop);
                restored.map_err(io::Error::other)?;
                match device.missing_blocks() {
                    0 => Ok(()),
                    left => Err(io::Error::other(format!(
                        "{left} blocks of device \"{name}\" are missing after all was brought"
                    ))),
                }
            });
            if !done {
                return false;
            }
        }
        self.patiently(|| {
            self.devices.iter().try_for_each(|device| device.complete()).map_err(io::Error::other)
        })
    }
}

/// A device that runs and is filled: only what is missing is taken.
pub(crate) struct FillTarget(pub(crate) Arc<dyn Device>);

impl BlockDevice for FillTarget {
    fn size(&self) -> u64 {
        self.0.blocks() * BLOCK_SIZE as u64
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "what is being filled is only written"))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = whole(offset, data.len() as u64)?;
        self.0.fill(range.start, data).map(drop).map_err(io::Error::other)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.0.fill_zero(whole(offset, length)?).map(drop).map_err(io::Error::other)
    }
}

#[cfg(test)]
#[path = "fill_tests.rs"]
mod tests;
