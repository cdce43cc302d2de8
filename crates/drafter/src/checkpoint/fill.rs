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
//! are not held up by more than one pack of bulk.
//!
//! What is touched is recorded, after the order that was followed: the next generations have both, for
//! the next start. An order is a hint; whatever it says, content is right.

use super::restore::whole;
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
/// Blocks that are brought for one that is waited for, itself included.
const CLUSTER: u64 = 16;
/// Threads that bring what an earlier start touched; they wait for the store nearly all of the time.
const AHEAD: usize = 16;
/// Most blocks that one of them brings at a time.
const STEP: u64 = 64;
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
            if fill.recording.load(Ordering::Relaxed) {
                lock(&fill.touched[device]).touched(range);
            }
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
            let near = self.near(device, range);
            if !self.patiently(|| self.bring(device, near)) {
                return;
            }
        }
    }

    /// What is brought for a demand: the blocks asked for, and those behind them.
    fn near(&self, device: usize, range: BlockRange) -> BlockRange {
        let device = &self.devices[device];
        let end = range.end().max(range.start.0 + CLUSTER).min(device.blocks());
        BlockRange::new(range.start.0, end - range.start.0)
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

    /// What an earlier start touched and is missing, all devices side by side as far as they are.
    fn expected(&self) -> Vec<(usize, BlockRange)> {
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
        expected.into_iter().map(|(_, device, range)| (device, range)).collect()
    }

    /// Brings what an earlier start touched; what this one waits for goes first. False if it was ended.
    fn run_ahead(&self) -> bool {
        let (expected, next) = (self.expected(), AtomicUsize::new(0));
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
    /// generation refers to is kept in the store until then, also if the generation is pruned.
    pub fn run(&self) -> bool {
        if let Err(error) = self.generation.pin_if_possible() {
            // What is missing of it is told when it is missing.
            tracing::error!(%error, "the generation that the machine is brought from is gone");
        }
        let all = self.bring_all();
        self.generation.unpin();
        all
    }

    fn bring_all(&self) -> bool {
        if !self.run_ahead() {
            return false;
        }
        for (device, name) in self.devices.iter().zip(&self.names) {
            let target = FillTarget(Arc::clone(device));
            let done = self.patiently(|| {
                if device.missing_blocks() == 0 {
                    return Ok(());
                }
                // One pack at a time: what is waited for comes first.
                let options = RestoreOptions { threads: 1, in_flight: 1, target_is_zero: true };
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
mod tests {
    use super::*;
    use silo::{
        block::BlockIndex,
        device::DeviceName,
        disk::{Disk, DiskOptions},
        source::MemoryDevice,
        store::{
            Access, CopyGroup, Environment, KeyRing, Limits, LineName, LineWriter, ScratchOptions,
            Store, Which, WriterOptions,
            capture::{Capture, Want},
        },
    };
    use std::{fs, path::Path, thread, time::Instant};

    const BLOCKS: u64 = 2000;
    const LIMIT: Duration = Duration::from_secs(60);

    /// Ends a filling, also when a check fails.
    struct End<'a>(&'a StoreFill);

    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.end();
        }
    }

    #[track_caller]
    fn wait_for_trouble(fill: &StoreFill) {
        let deadline = Instant::now() + LIMIT;
        while fill.trouble().is_none() {
            assert!(Instant::now() < deadline, "nobody said that the store is away");
            thread::yield_now();
        }
    }

    /// What block `at` holds; every seventh is zeros.
    fn content(at: u64) -> [u8; BLOCK_SIZE] {
        let mut block = [0; BLOCK_SIZE];
        if !at.is_multiple_of(7) {
            for (place, byte) in block.iter_mut().enumerate() {
                *byte = (at as usize * 31 + place * place) as u8;
            }
            block[0] = at as u8 | 1;
        }
        block
    }

    /// A generation with one device "disk-root" in a store below `folder`.
    fn generation(folder: &Path) -> Arc<Generation> {
        let device = Arc::new(MemoryDevice::new("root", BLOCKS * BLOCK_SIZE as u64).unwrap());
        for at in 0..BLOCKS {
            device.write_at(at * BLOCK_SIZE as u64, &content(at)).unwrap();
        }
        let parts = vec![("disk-root".to_owned(), 4096, device as Arc<dyn BlockDevice>)];
        let group = CopyGroup::new(parts, ScratchOptions::in_folder(folder)).unwrap();
        let url = format!("file://{}/store", folder.display()).parse().unwrap();
        let environment = Environment::of_process();
        let quick = Limits { attempts: 1, request: Duration::from_secs(2), ..Limits::default() };
        let open = |access| Store::open(&url, access, &environment, quick).unwrap();
        let keys = KeyRing::from_keys([("1", [7; 32])]).unwrap();
        let line = LineName::new("machines", "m").unwrap();
        let store = open(Access::Write);
        let mut writer = LineWriter::open(store, &keys, &line, WriterOptions::default()).unwrap();
        let frozen = group.freeze(Want::Everything).unwrap();
        let stop = AtomicBool::new(false);
        writer.store(&group.devices(), frozen.as_ref(), true, "", &stop).unwrap();
        frozen.release();
        Generation::open(&open(Access::Read), &keys, &line, Which::Newest, 1 << 20).unwrap()
    }

    /// A disk whose blocks are all in the store, and what brings them.
    fn armed(folder: &Path, touches: &FirstTouches) -> (Arc<Disk>, Arc<StoreFill>) {
        let mut options = DiskOptions::new(DeviceName::new("root").unwrap());
        options.arrival_limit = LIMIT;
        let bytes = BLOCKS * BLOCK_SIZE as u64;
        let disk = Arc::new(Disk::create(&folder.join("disk"), None, bytes, &options).unwrap());
        let devices = vec![("disk-root".to_owned(), disk.clone() as Arc<dyn Device>)];
        let fill = StoreFill::new(generation(folder), devices, touches).unwrap();
        let missing = fill.missing(0).unwrap();
        assert_eq!(missing.len(), BLOCKS - BLOCKS.div_ceil(7));
        disk.begin().unwrap();
        disk.arm(&missing, fill.demand(0)).unwrap();
        fill.serve().unwrap();
        (disk, fill)
    }

    fn block(disk: &Disk, at: u64) -> [u8; BLOCK_SIZE] {
        let mut block = [0; BLOCK_SIZE];
        disk.read_at(at * BLOCK_SIZE as u64, &mut block).unwrap();
        block
    }

    #[test]
    fn what_is_touched_comes_at_once_what_is_written_stays_and_all_else_follows() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, fill) = armed(folder.path(), &FirstTouches::new());
        for at in [1500, 3, 700, 1999] {
            assert!(block(&disk, at) == content(at), "block {at}");
        }
        assert!(disk.missing_blocks() > 1000, "only what is near was brought");
        disk.write_at(40 * BLOCK_SIZE as u64, &[9; BLOCK_SIZE]).unwrap();
        disk.write_at(50 * BLOCK_SIZE as u64 + 100, &[9; 8]).unwrap();
        assert!(fill.run());
        assert!(disk.is_complete());
        for at in 0..BLOCKS {
            let mut wanted = content(at);
            match at {
                40 => wanted = [9; BLOCK_SIZE],
                50 => wanted[100..108].fill(9),
                _ => {}
            }
            assert!(block(&disk, at) == wanted, "block {at}");
        }
        assert_eq!(fill.trouble(), None);
        fill.end();
    }

    fn order(ranges: &[(u64, u64)]) -> FirstTouches {
        let order = ranges.iter().map(|&(start, count)| BlockRange::new(start, count)).collect();
        BTreeMap::from([("disk-root".to_owned(), Manifest { blocks: BLOCKS, order })])
    }

    #[test]
    fn what_an_earlier_start_touched_comes_before_the_rest_and_is_recorded_with_what_this_one_touches()
     {
        let folder = tempfile::tempdir().unwrap();
        let touches = order(&[(1700, 90), (20, 1), (900, 3)]);
        let (disk, fill) = armed(folder.path(), &touches);
        assert!(fill.run_ahead());
        let missing = disk.missing();
        for range in &touches["disk-root"].order {
            assert!(!missing.intersects(*range), "{range:?} is not here");
        }
        let brought = BLOCKS - BLOCKS.div_ceil(7) - missing.len();
        assert!((70..=94).contains(&brought), "{brought} blocks were brought");
        assert!(block(&disk, 500) == content(500) && block(&disk, 20) == content(20));
        let recorded = fill.first_touches();
        assert_eq!(recorded, order(&[(1700, 90), (20, 1), (900, 3), (500, 1)]));
        // Whoever reads everything is no start.
        fill.stop_recording();
        assert!(block(&disk, 1200) == content(1200));
        assert_eq!(fill.first_touches(), recorded);
        assert!(fill.run());
        assert!((0..BLOCKS).all(|at| block(&disk, at) == content(at)));
        fill.end();
    }

    #[test]
    fn an_order_of_another_device_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let mut touches = order(&[(1, 5)]);
        touches.get_mut("disk-root").unwrap().blocks += 1;
        let (disk, fill) = armed(folder.path(), &touches);
        let before = disk.missing_blocks();
        assert!(fill.run_ahead() && disk.missing_blocks() == before);
        assert_eq!(fill.first_touches(), FirstTouches::new());
        fill.end();
    }

    #[test]
    fn a_store_that_is_away_makes_a_reader_wait_says_so_and_is_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, fill) = armed(folder.path(), &FirstTouches::new());
        let (packs, aside) = (folder.path().join("store/packs"), folder.path().join("aside"));
        fs::rename(&packs, &aside).unwrap();
        thread::scope(|scope| {
            let _end = End(&fill);
            let reader = scope.spawn(|| block(&disk, 1000));
            let filler = scope.spawn(|| fill.run());
            wait_for_trouble(&fill);
            assert!(!reader.is_finished() && !filler.is_finished());
            fs::rename(&aside, &packs).unwrap();
            assert!(reader.join().unwrap() == content(1000));
            assert!(filler.join().unwrap());
        });
        let missing = BlockSet::new(BLOCKS);
        assert_eq!(disk.missing(), missing);
        let mut all = vec![0; BLOCK_SIZE * 8];
        disk.read(BlockIndex(1), &mut all).unwrap();
        assert!(all[..BLOCK_SIZE] == content(1));
    }

    #[test]
    fn the_generation_is_pinned_while_it_is_brought_and_not_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let pins = || {
            let mut found = 0;
            let mut folders = vec![folder.path().join("store/pins")];
            while let Some(folder) = folders.pop() {
                for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                    match entry.file_type().unwrap().is_dir() {
                        true => folders.push(entry.path()),
                        false => found += 1,
                    }
                }
            }
            found
        };
        let (_disk, fill) = armed(folder.path(), &FirstTouches::new());
        let (packs, aside) = (folder.path().join("store/packs"), folder.path().join("aside"));
        fs::rename(&packs, &aside).unwrap();
        thread::scope(|scope| {
            let _end = End(&fill);
            let filler = scope.spawn(|| fill.run());
            wait_for_trouble(&fill);
            assert_eq!(pins(), 1);
            fs::rename(&aside, &packs).unwrap();
            assert!(filler.join().unwrap());
        });
        assert_eq!(pins(), 0);
    }

    #[test]
    fn it_ends_when_it_is_told_to_although_the_store_is_away() {
        let folder = tempfile::tempdir().unwrap();
        let (_disk, fill) = armed(folder.path(), &FirstTouches::new());
        fs::remove_dir_all(folder.path().join("store/packs")).unwrap();
        thread::scope(|scope| {
            let _end = End(&fill);
            let filler = scope.spawn(|| fill.run());
            wait_for_trouble(&fill);
            fill.end();
            assert!(!filler.join().unwrap());
        });
    }
}
