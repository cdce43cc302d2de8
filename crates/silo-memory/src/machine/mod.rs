//! Machine memory as a device: a memfd that the monitor maps and this process owns.
//!
//! Content goes in and out through the file (`pread`, `pwrite`), never through a mapping of our
//! own: reading a hole through a mapping allocates a zero page, and the guest would then never
//! fault on it. Two kernel services work on the monitor's mapping, from outside, over one
//! userfaultfd:
//!
//! - *tracking*: pages are write-protected; the kernel lifts the protection at the first write
//!   without telling anybody (`WP_ASYNC`), and `PAGEMAP_SCAN` reports and re-protects such pages.
//! - *faults*: a page that is not in the file stops whoever touches it until [`Memory::fill`]
//!   brings it (`UFFDIO_COPY`, protected, so that a fill is not a guest write).
//!
//! After [`Device::arm`] a hole is in one of two states: *missing* (its content is elsewhere: the
//! guest waits and `demand` is called) or *zero* (served at once, here). Zero memory therefore
//! costs neither transfer nor room.
//!
//! A copy of a running machine has its memory mapped privately over a file that all copies share:
//! the part [`copy`] says what is different then.
//!
//! A third party, such as the server of a vhost-user disk, may touch the memory through a mapping
//! of its own, beside the guest: the part [`beside`] says what it has to call.

mod arrival;
mod beside;
mod copy;
mod faults;
#[cfg(test)]
mod tests;
mod watch;

pub use crate::sys;
pub use copy::seal_content;
pub use faults::{FaultStats, FaultSummary};
pub use watch::Watcher;

use beside::{Beside, Stage};
use silo_block::{
    block::{BLOCK_SIZE, BlockIndex, BlockRange, BlockSet},
    device::{Demand, Device, DeviceError, DeviceName, Result},
};
use std::{
    collections::HashMap,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{Arc, Condvar, Mutex, PoisonError, RwLock},
    time::Instant,
};
use sys::{CopyOutcome, Userfault, feature};
use watch::Watchers;

/// What the kernel can do for memory on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// `WP_ASYNC` and `PAGEMAP_SCAN` (Linux 6.7): pre-copy works.
    WriteProtect,
    /// Neither: only faults, so a machine can move by post-copy alone.
    None,
}

/// The monitor's mapping of the memfd.
#[derive(Debug)]
pub struct Mapping {
    /// Made inside the monitor's process.
    pub userfaultfd: OwnedFd,
    /// The monitor's process.
    pub pid: u32,
    /// Where offset 0 of the memfd is mapped there.
    pub address: u64,
    /// Whether pages may be missing: the monitor waits for its content (or did, see `adopted`).
    pub incoming: bool,
    /// The userfaultfd was set up by a process that is gone, as `incoming` says.
    pub adopted: bool,
    /// Whether to track writes, where the kernel can.
    pub track: bool,
}

/// Whether this kernel can track writes, by trying.
pub fn probe_tracking() -> io::Result<Tracking> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    let features = feature::WP_HUGETLBFS_SHMEM | feature::WP_UNPOPULATED | feature::WP_ASYNC;
    match Userfault::new(sys::new_userfaultfd(&device)?, features) {
        Ok(_) => Ok(Tracking::WriteProtect),
        Err(refused) if refused.raw_os_error() == Some(libc::EINVAL) => Ok(Tracking::None),
        Err(other) => Err(other),
    }
}

/// A machine's memory on this host.
pub struct Memory {
    name: DeviceName,
    blocks: u64,
    file: File,
    /// Blocks to report again after an abort.
    returned: Mutex<BlockSet>,
    /// Blocks whose content was dropped before [`Device::arm`] asks for it.
    discarded: Mutex<Option<BlockSet>>,
    shared: Arc<Shared>,
    attached: RwLock<Option<Attached>>,
    beside: Beside,
    watchers: Mutex<Watchers>,
    /// Blocks that are pages of the monitor alone, if the file is shared by several machines.
    own: Option<Mutex<BlockSet>>,
}

/// What the fault thread shares with the rest.
struct Shared {
    holes: Mutex<Holes>,
    /// Some of them were filled.
    arrived: Condvar,
    stats: Mutex<FaultStats>,
}

struct Holes {
    /// Content is elsewhere.
    missing: BlockSet,
    /// Missing, and just being put in place: the guest may have them already, and write to them.
    landing: BlockSet,
    /// Somebody waits, since when.
    waiting: HashMap<u64, Instant>,
    demand: Option<Arc<Demand>>,
    /// Grows when those who wait beside the guest shall give up.
    interrupted: u64,
}

struct Attached {
    userfault: Arc<Userfault>,
    pagemap: File,
    address: u64,
    tracking: Tracking,
    incoming: bool,
    /// The monitor's memory, where the file does not have it.
    pages: Option<File>,
    _faults: Option<faults::FaultThread>,
}

impl Memory {
    /// Empty (zero) memory of `bytes`, a multiple of the block size.
    pub fn new(name: DeviceName, bytes: u64) -> Result<Self> {
        let blocks = bytes / BLOCK_SIZE as u64;
        let fd = sys::memfd(name.as_str(), bytes).map_err(|source| DeviceError {
            device: name.clone(),
            operation: "create",
            at: format!("{} MiB", bytes >> 20),
            source,
        })?;
        Ok(Self::over(name, File::from(fd), blocks))
    }

    /// The memory of a monitor whose runner is gone: `file` is its memfd.
    pub fn adopt(name: DeviceName, file: File) -> Result<Self> {
        let blocks = match file.metadata() {
            Ok(facts) => facts.len() / BLOCK_SIZE as u64,
            Err(source) => {
                return Err(DeviceError {
                    device: name,
                    operation: "adopt",
                    at: "size".into(),
                    source,
                });
            }
        };
        Ok(Self::over(name, file, blocks))
    }

    fn over(name: DeviceName, file: File, blocks: u64) -> Self {
        Self {
            blocks,
            file,
            returned: Mutex::new(BlockSet::new(blocks)),
            discarded: Mutex::new(None),
            shared: Arc::new(Shared {
                holes: Mutex::new(Holes {
                    missing: BlockSet::new(blocks),
                    landing: BlockSet::new(blocks),
                    waiting: HashMap::new(),
                    demand: None,
                    interrupted: 0,
                }),
                arrived: Condvar::new(),
                stats: Mutex::new(FaultStats::default()),
            }),
            attached: RwLock::new(None),
            beside: Beside::new(blocks),
            watchers: Mutex::default(),
            own: None,
            name,
        }
    }

    /// Of adopted memory, before [`Memory::attach`]: these blocks are missing, as if it had been armed
    /// here. Whoever touches one waits, and `demand` is called for it.
    pub fn expect(&self, missing: BlockSet, demand: Demand) {
        let mut holes = self.holes();
        holes.missing = missing;
        holes.demand = Some(Arc::new(demand));
    }

    /// The memfd, for the monitor.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Takes the monitor's mapping. An incoming one is registered and protected at once and its
    /// faults are served from now on, so that nothing of this has to happen during the blackout.
    pub fn attach(&self, mapping: Mapping) -> Result<Tracking> {
        let error = |operation, source| self.error(operation, "attach".into(), source);
        let length = self.blocks * BLOCK_SIZE as u64;
        let tracking_features = feature::MISSING_SHMEM
            | feature::WP_HUGETLBFS_SHMEM
            | feature::WP_UNPOPULATED
            | feature::WP_ASYNC;
        // UFFDIO_API can be called once; a refused call (EINVAL) leaves the descriptor as it was.
        let duplicate = mapping.userfaultfd.try_clone().map_err(|e| error("duplicate", e))?;
        let plain = |descriptor| {
            Userfault::new(descriptor, feature::MISSING_SHMEM)
                .map(|plain| (plain, Tracking::None))
                .map_err(|e| error("UFFDIO_API", e))
        };
        let (userfault, tracking) = if mapping.adopted && !mapping.track {
            (Userfault::adopt(mapping.userfaultfd, false), Tracking::None)
        } else if mapping.adopted {
            // What the other process got, this kernel still gives: ask with a fresh descriptor.
            let tracking = probe_tracking().map_err(|e| error("open /dev/userfaultfd", e))?;
            let protects = tracking == Tracking::WriteProtect;
            (Userfault::adopt(mapping.userfaultfd, protects), tracking)
        } else if !mapping.track {
            plain(mapping.userfaultfd)?
        } else {
            match Userfault::new(mapping.userfaultfd, tracking_features) {
                Ok(userfault) => (userfault, Tracking::WriteProtect),
                Err(refused) if refused.raw_os_error() == Some(libc::EINVAL) => plain(duplicate)?,
                Err(other) => return Err(error("UFFDIO_API", other)),
            }
        };
        let (pid, incoming, adopted) = (mapping.pid, mapping.incoming, mapping.adopted);
        let pages = self.begin_copy(pid, incoming, adopted, tracking)?;
        let userfault = Arc::new(userfault);
        let pagemap = File::open(format!("/proc/{}/pagemap", mapping.pid))
            .map_err(|e| error("open pagemap", e))?;
        let mut mode = 0;
        if tracking == Tracking::WriteProtect {
            mode |= sys::REGISTER_WP;
        }
        if mapping.incoming {
            mode |= sys::REGISTER_MISSING;
        }
        if mode != 0 && !mapping.adopted {
            userfault.register(mapping.address, length, mode).map_err(|e| error("register", e))?;
        }
        let thread = if mapping.incoming {
            if tracking == Tracking::WriteProtect && !mapping.adopted {
                userfault
                    .write_protect(mapping.address, length)
                    .map_err(|e| error("write-protect", e))?;
            }
            let thread = faults::FaultThread::start(
                self.name.clone(),
                Arc::clone(&userfault),
                Arc::clone(&self.shared),
                mapping.address,
                self.blocks,
            )
            .map_err(|e| error("start the fault thread", e))?;
            if mapping.adopted {
                // Faults that the other process took and never answered do not come again.
                userfault.wake(mapping.address, length).map_err(|e| error("wake", e))?;
            }
            Some(thread)
        } else {
            None
        };
        let stage = match (mapping.incoming, mapping.adopted) {
            (false, _) => Stage::Here,
            (true, false) => Stage::Receiving,
            (true, true) => Stage::Armed,
        };
        if pages.is_some() && !mapping.adopted {
            let protected = userfault.write_protect(mapping.address, length);
            protected.map_err(|e| error("write-protect", e))?;
        }
        let protected = tracking == Tracking::WriteProtect && (mapping.incoming || pages.is_some());
        let mut watchers = self.watchers();
        let mut place = self.attached.write().unwrap_or_else(PoisonError::into_inner);
        self.beside.enter(stage);
        watchers.enter(protected);
        *place = Some(Attached {
            userfault,
            pagemap,
            address: mapping.address,
            tracking,
            incoming: mapping.incoming,
            pages,
            _faults: thread,
        });
        Ok(tracking)
    }

    /// The monitor is gone; the content stays.
    pub fn detach(&self) {
        let mut watchers = self.watchers();
        let mut place = self.attached.write().unwrap_or_else(PoisonError::into_inner);
        self.beside.enter(Stage::Detached);
        watchers.enter(false);
        place.take();
    }

    /// Fault statistics since the last [`Device::arm`].
    pub fn fault_summary(&self) -> FaultSummary {
        self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner).summary()
    }

    /// Bytes that the content takes on this host, without what it shares with other machines.
    pub fn resident_bytes(&self) -> u64 {
        if let Some(own) = self.own_blocks() {
            return own.bytes();
        }
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().map_or(0, |m| m.blocks() * 512)
    }

    fn error(&self, operation: &'static str, at: String, source: io::Error) -> DeviceError {
        DeviceError { device: self.name.clone(), operation, at, source }
    }

    fn discarded(&self) -> std::sync::MutexGuard<'_, Option<BlockSet>> {
        self.discarded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These blocks get content (again).
    fn keep(&self, range: BlockRange) {
        if let Some(discarded) = &mut *self.discarded() {
            discarded.remove_range(range);
        }
    }

    fn holes(&self) -> std::sync::MutexGuard<'_, Holes> {
        self.shared.holes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_attached<T>(
        &self,
        operation: &'static str,
        f: impl FnOnce(&Attached) -> io::Result<T>,
    ) -> Result<T> {
        let guard = self.attached.read().unwrap_or_else(PoisonError::into_inner);
        let attached = guard.as_ref().ok_or_else(|| {
            self.error(operation, "start".into(), io::Error::other("no monitor is attached"))
        })?;
        f(attached).map_err(|e| self.error(operation, "mapping".into(), e))
    }

    fn punch(&self, range: BlockRange) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags, fallocate};
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(self.file.as_fd(), flags, range.start.offset() as i64, range.bytes() as i64)
            .map_err(io::Error::from)
    }

    /// Copies whole blocks into holes of the mapping; blocks that are there already stay.
    fn copy(attached: &Attached, start: BlockIndex, data: &[u8]) -> io::Result<()> {
        let mut at = 0;
        while at < data.len() {
            let address = attached.address + start.offset() + at as u64;
            match attached.userfault.copy(address, &data[at..])? {
                CopyOutcome::Done => return Ok(()),
                CopyOutcome::Present(done) => {
                    at += done as usize;
                    // Somebody may wait for the page that is there already.
                    attached
                        .userfault
                        .wake(attached.address + start.offset() + at as u64, BLOCK_SIZE as u64)?;
                    at += BLOCK_SIZE;
                }
                CopyOutcome::Again(done) => at += done as usize,
            }
        }
        Ok(())
    }
}

impl Device for Memory {
    fn name(&self) -> &DeviceName {
        &self.name
    }

    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn start_tracking(&self) -> Result<()> {
        let mut watchers = self.watchers();
        if watchers.tracking && (watchers.any() || self.is_copy()) {
            // Others are told what was written before.
            self.look(&mut watchers)?;
        } else {
            self.beside.forget_written();
            self.protect()?;
            watchers.tracking = true;
        }
        *self.returned.lock().unwrap_or_else(PoisonError::into_inner) = BlockSet::new(self.blocks);
        Ok(())
    }

    fn take_dirty(&self) -> Result<BlockSet> {
        let mut watchers = self.watchers();
        let mut dirty = self.look(&mut watchers)?;
        let returned = std::mem::replace(
            &mut *self.returned.lock().unwrap_or_else(PoisonError::into_inner),
            BlockSet::new(self.blocks),
        );
        dirty.union_with(&returned);
        // What was given back before an arrival may be elsewhere by now.
        let holes = self.holes();
        let mut absent = holes.missing.clone();
        absent.subtract(&holes.landing);
        dirty.subtract(&absent);
        Ok(dirty)
    }

    fn put_back(&self, blocks: &BlockSet) {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner).union_with(blocks);
    }

    fn allocated(&self) -> Result<BlockSet> {
        let own = self.look_for_own()?;
        use nix::unistd::{Whence, lseek64};
        let mut set = BlockSet::new(self.blocks);
        let end = (self.blocks * BLOCK_SIZE as u64) as i64;
        let mut at = 0;
        while at < end {
            let data = match lseek64(&self.file, at, Whence::SeekData) {
                Ok(data) => data,
                Err(nix::errno::Errno::ENXIO) => break,
                Err(error) => return Err(self.error("list", format!("byte {at}"), error.into())),
            };
            let hole = lseek64(&self.file, data, Whence::SeekHole)
                .map_err(|e| self.error("list", format!("byte {data}"), e.into()))?;
            let first = data as u64 / BLOCK_SIZE as u64;
            let last = (hole as u64).div_ceil(BLOCK_SIZE as u64);
            set.insert_range(BlockRange::new(first, last - first));
            at = hole;
        }
        if let Some(own) = own {
            set.union_with(&own);
        }
        Ok(set)
    }

    fn read(&self, start: BlockIndex, buf: &mut [u8]) -> Result<()> {
        let range = BlockRange::new(start.0, (buf.len() / BLOCK_SIZE) as u64);
        {
            let holes = self.holes();
            if let Some(missing) = holes.missing.next_range(start, 1)
                && missing.start.0 < range.end()
            {
                let late = io::Error::new(io::ErrorKind::WouldBlock, "it has not arrived here yet");
                return Err(self.error("read", missing.start.to_string(), late));
            }
        }
        self.file
            .read_exact_at(buf, start.offset())
            .and_then(|()| self.read_own(range, buf))
            .map_err(|e| self.error("read", start.to_string(), e))
    }

    fn reset(&self) -> Result<()> {
        *self.discarded() = None;
        {
            let mut holes = self.holes();
            holes.missing = BlockSet::new(self.blocks);
            holes.waiting.clear();
            holes.demand = None;
        }
        *self.returned.lock().unwrap_or_else(PoisonError::into_inner) = BlockSet::new(self.blocks);
        self.beside.forget();
        self.punch(BlockRange::new(0, self.blocks))
            .map_err(|e| self.error("reset", "all".into(), e))
    }

    fn store(&self, start: BlockIndex, data: &[u8]) -> Result<()> {
        self.keep(BlockRange::new(start.0, (data.len() / BLOCK_SIZE) as u64));
        self.file
            .write_all_at(data, start.offset())
            .map_err(|e| self.error("store", start.to_string(), e))
    }

    fn store_zero(&self, range: BlockRange) -> Result<()> {
        self.punch(range).map_err(|e| self.error("store", range.start.to_string(), e))
    }

    fn discard(&self, range: BlockRange) -> Result<()> {
        self.punch(range).map_err(|e| self.error("discard", range.start.to_string(), e))?;
        self.discarded().get_or_insert_with(|| BlockSet::new(self.blocks)).insert_range(range);
        Ok(())
    }

    fn arm(&self, missing: &BlockSet, demand: Demand) -> Result<()> {
        let ready = self.with_attached("arm", |attached| Ok(attached.incoming))?;
        if !ready {
            let source = io::Error::other("the monitor is not waiting for memory");
            return Err(self.error("arm", "mapping".into(), source));
        }
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = FaultStats::default();
        {
            let mut holes = self.holes();
            holes.missing = missing.clone();
            holes.waiting.clear();
            holes.demand = Some(Arc::new(demand));
        }
        let mut stale = missing.clone();
        if let Some(discarded) = self.discarded().take() {
            stale.subtract(&discarded);
        }
        for range in stale.ranges() {
            self.punch(range).map_err(|e| self.error("arm", range.start.to_string(), e))?;
        }
        self.beside.enter(Stage::Armed);
        Ok(())
    }

    fn fill(&self, start: BlockIndex, data: &[u8]) -> Result<u64> {
        let range = BlockRange::new(start.0, (data.len() / BLOCK_SIZE) as u64);
        let wanted = self.wanted(range);
        let mut taken = 0;
        for piece in &wanted {
            let from = (piece.start.0 - start.0) as usize * BLOCK_SIZE;
            let bytes = &data[from..from + piece.bytes() as usize];
            self.holes().landing.insert_range(*piece);
            let copied =
                self.with_attached("fill", |attached| Self::copy(attached, piece.start, bytes));
            if let Err(error) = copied {
                self.holes().landing.remove_range(*piece);
                return Err(error);
            }
            taken += self.arrived(*piece);
        }
        Ok(taken)
    }

    fn fill_zero(&self, range: BlockRange) -> Result<u64> {
        // Without a waiter a zero block stays a hole: the fault thread serves it when touched.
        let (taken, waited) = {
            let mut holes = self.holes();
            let mut waited = Vec::new();
            let mut taken = 0;
            for block in range.start.0..range.end() {
                if holes.missing.remove(BlockIndex(block)) {
                    taken += 1;
                    if let Some(since) = holes.waiting.remove(&block) {
                        waited.push((BlockIndex(block), since));
                    }
                }
            }
            (taken, waited)
        };
        self.shared.arrived.notify_all();
        for (block, since) in waited {
            self.with_attached("fill", |attached| Self::copy(attached, block, &faults::ZERO))?;
            self.shared.served(since);
        }
        Ok(taken)
    }

    fn missing(&self) -> BlockSet {
        self.holes().missing.clone()
    }

    fn missing_blocks(&self) -> u64 {
        self.holes().missing.len()
    }

    fn complete(&self) -> Result<()> {
        let mut holes = self.holes();
        if holes.missing.is_empty() {
            holes.demand = None;
            return Ok(());
        }
        let left = io::Error::other(format!("{} blocks are still missing", holes.missing.len()));
        drop(holes);
        Err(self.error("complete", "end".into(), left))
    }
}

impl AsRawFd for Memory {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}
