//! A running machine as a device group that is backed up: memory, what the machine is, disks, all of
//! one instant.
//!
//! ```text
//!   guest runs    pages that were written are copied aside, in rounds, until little is left
//!   paused        the last pages; the driver's state; disks freeze; has anybody written meanwhile?
//!   guest runs    what was frozen is read and stored; a write to a frozen block copies it first
//! ```
//!
//! Called by silo's backup engine or by the runner, from one thread at a time. What must hold:
//! - Nobody writes to memory between the copy of its last page and the machine's going on: if somebody
//!   did, the state that was saved would not fit the memory, so the round is given up and nothing lost.
//! - After a freeze, however it ended, the machine runs as before, or whoever implements [`Machine`]
//!   has said why not.
//! - A round that is not stored counts as never taken.

#[cfg(test)]
mod tests;

use super::{MACHINE, MEMORY, description::DEVICE_BYTES, disk_device};
use crate::migrate::source::MachineError;
use silo::{
    block::{BLOCK_SIZE, BlockRange, BlockSet},
    geometry::{Geometry, GeometryError},
    io::BlockDevice,
    mapped::staging::{self, Pauser, Staged, Staging, StagingError, StagingOptions, Tracked},
    memory::{Memory, Watcher},
    store::{
        CopyBeforeWrite, CopyGroup, ScratchOptions,
        capture::{Capture, CaptureError, Changes, DeviceInfo, Frozen, Want},
    },
    times::{Histogram, Times},
};
use std::{
    cell::RefCell,
    io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

/// A machine that can stand still for a moment.
pub trait Machine: Send + Sync {
    /// Whether it could be stopped now, asked before anything is copied.
    ///
    /// # Errors
    /// Why not.
    fn ready(&self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Stops it: nobody writes to its memory and disks until it is resumed.
    ///
    /// # Errors
    /// If it cannot be stopped; it then runs.
    fn pause(&self) -> Result<Box<dyn Paused>, MachineError>;

    /// The instant of the last pause is durable: the machine can be brought back as it was then.
    fn stored(&self) {}
}

/// A machine that stands still. Dropping it resumes it.
pub trait Paused {
    /// The content of the device `machine`, in whole blocks.
    ///
    /// # Errors
    /// If the driver does not give its state.
    fn describe(&mut self) -> Result<Vec<u8>, MachineError>;

    /// Lets it go on. Returns how long it stood still.
    ///
    /// # Errors
    /// If it cannot.
    fn resume(self: Box<Self>) -> Result<Duration, MachineError>;
}

/// A machine's disks, served so that they can be frozen.
#[derive(Clone)]
pub struct DiskCopies(Arc<CopyGroup>);

impl DiskCopies {
    /// Disks by their names. Old content that waits for its upload lies in memory, then in an unnamed
    /// file in `folder`.
    ///
    /// # Errors
    /// If a disk has an impossible size.
    pub fn new(
        disks: Vec<(String, Arc<dyn BlockDevice>)>,
        folder: &Path,
    ) -> Result<Self, GeometryError> {
        let part = |(name, disk): (String, Arc<dyn BlockDevice>)| {
            (disk_device(&name), BLOCK_SIZE as u32, disk)
        };
        let parts = disks.into_iter().map(part).collect();
        Ok(Self(CopyGroup::new(parts, ScratchOptions::in_folder(folder))?))
    }

    /// The disks as a group.
    pub(super) fn group(&self) -> &Arc<CopyGroup> {
        &self.0
    }

    /// What the guest is to be served in place of disk number `disk`.
    #[must_use]
    pub fn served(&self, disk: usize) -> CopyBeforeWrite {
        self.0.device(disk)
    }
}

/// What freezing took, the last time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// How long the machine stood still, all pauses of the round together.
    pub paused: Duration,
    /// How often it did; more than once if a pause came too early.
    pub pauses: u32,
    /// How often memory was looked at and copied, the last time inside the pause.
    pub rounds: u32,
    /// Bytes of memory that were copied, by all rounds together.
    pub copied: u64,
    /// Bytes of memory that were copied inside the pause.
    pub copied_paused: u64,
    /// Bytes of the device `machine`.
    pub machine_bytes: u64,
}

/// Memory, with what is done to it counted.
struct Counted {
    watcher: Watcher,
    looks: AtomicU32,
    copied: AtomicU64,
}

impl Tracked for Counted {
    fn blocks(&self) -> u64 {
        self.watcher.blocks()
    }

    fn start_tracking(&self) -> io::Result<()> {
        self.watcher.start_tracking()
    }

    fn take_written(&self) -> io::Result<BlockSet> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.watcher.take_written()
    }

    fn populated(&self) -> io::Result<Option<BlockSet>> {
        self.watcher.populated()
    }

    fn read_present(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        self.copied.fetch_add(range.bytes(), Ordering::Relaxed);
        self.watcher.read_present(range, buf)
    }
}

/// See the module.
pub struct MachineCapture {
    machine: Arc<dyn Machine>,
    memory: Arc<Counted>,
    staging: Staging,
    disks: DiskCopies,
    infos: Vec<DeviceInfo>,
    /// Blocks at the beginning of the device `machine` that may not be zero in the store, if that is
    /// known.
    machine_used: Arc<Mutex<Option<u64>>>,
    taken: Mutex<Taken>,
    holds: Times,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MachineCapture {
    /// Starts to watch the machine's memory. The first round holds everything.
    ///
    /// # Errors
    /// If its memory cannot be tracked.
    pub fn new(
        machine: Arc<dyn Machine>,
        memory: &Arc<Memory>,
        disks: DiskCopies,
        options: StagingOptions,
    ) -> Result<Self, MachineError> {
        let watcher = memory.watch()?;
        let counted = Counted { watcher, looks: AtomicU32::new(0), copied: AtomicU64::new(0) };
        let memory = Arc::new(counted);
        let staging = Staging::new(memory.clone(), options)?;
        let geometry = |bytes| Geometry::new(bytes, BLOCK_SIZE as u32);
        let memory_bytes = memory.blocks() * BLOCK_SIZE as u64;
        let mut infos = vec![
            DeviceInfo { name: MEMORY.to_owned(), geometry: geometry(memory_bytes)? },
            DeviceInfo { name: MACHINE.to_owned(), geometry: geometry(DEVICE_BYTES)? },
        ];
        infos.extend(disks.0.devices());
        Ok(Self {
            machine,
            memory,
            staging,
            disks,
            infos,
            machine_used: Arc::default(),
            taken: Mutex::default(),
            holds: Times::default(),
        })
    }

    /// The store's newest generation differs from the machine in these blocks at most, of memory and then
    /// of each disk, and in what was written here since it came: a round need not list the rest.
    ///
    /// # Errors
    /// If a round is under way, the sets are of other devices, or the kernel does not tell what was
    /// written; then the next round lists everything.
    pub fn know(&self, changed: &[BlockSet]) -> Result<(), MachineError> {
        let sizes = std::iter::once(self.memory.blocks())
            .chain(self.infos[OWN..].iter().map(|info| info.geometry.blocks()));
        let fits = changed.iter().map(BlockSet::device_blocks).eq(sizes);
        let (Some((memory, disks)), true) = (changed.split_first(), fits) else {
            return Err("what has changed is told of other devices".into());
        };
        // The watching began before this is asked: what was written between is in both.
        let mut memory = memory.clone();
        memory.union_with(&self.memory.watcher.memory().dirty()?);
        self.staging.know(memory)?;
        self.disks.0.set_known_but(disks);
        Ok(())
    }

    /// In which blocks the newest generation that was stored may differ from the machine, of memory and
    /// then of each disk. The machine stands still, and no round is under way.
    ///
    /// # Errors
    /// If nothing was stored yet, or the kernel does not tell.
    pub fn changed(&self) -> Result<Vec<BlockSet>, MachineError> {
        let disks = self.disks.0.changed().ok_or("nothing of it was stored")?;
        let mut changed = vec![self.staging.changed()?];
        changed.extend(disks);
        Ok(changed)
    }

    /// What the last freeze took.
    #[must_use]
    pub fn taken(&self) -> Taken {
        *lock(&self.taken)
    }

    fn error(error: StagingError) -> CaptureError {
        match error {
            StagingError::Frozen => CaptureError::Frozen,
            // Its words say what failed; "the writer" there is the guest.
            StagingError::System { operation, source } => {
                CaptureError::Device { device: MEMORY.to_owned(), operation, source }
            }
            other => CaptureError::Device {
                device: MEMORY.to_owned(),
                operation: "stage it",
                source: io::Error::other(other),
            },
        }
    }

    /// The blocks of the device `machine` that a round lists, of which the first `used` have content.
    fn machine_changes(&self, used: u64, want: Want) -> BlockSet {
        let all = DEVICE_BYTES / BLOCK_SIZE as u64;
        match (want, *lock(&self.machine_used)) {
            (Want::Changed, Some(before)) => {
                let mut set = BlockSet::new(all);
                set.insert_range(BlockRange::new(0, before.max(used)));
                set
            }
            _ => BlockSet::full(all),
        }
    }
}

/// Stops the machine for [`staging::freeze_with`], and counts.
struct Stopper<'a> {
    machine: &'a dyn Machine,
    memory: &'a Counted,
    now: RefCell<Option<Stopped>>,
    taken: RefCell<Taken>,
}

/// A pause that is under way.
struct Stopped {
    machine: Box<dyn Paused>,
    copied_before: u64,
}

impl Pauser for Stopper<'_> {
    fn pause(&self) -> io::Result<()> {
        let copied_before = self.memory.copied.load(Ordering::Relaxed);
        let machine = self.machine.pause().map_err(io::Error::other)?;
        self.taken.borrow_mut().pauses += 1;
        *self.now.borrow_mut() = Some(Stopped { machine, copied_before });
        Ok(())
    }

    fn resume(&self) -> io::Result<()> {
        let Some(stopped) = self.now.borrow_mut().take() else { return Ok(()) };
        let copied = self.memory.copied.load(Ordering::Relaxed) - stopped.copied_before;
        let paused = stopped.machine.resume().map_err(io::Error::other)?;
        let mut taken = self.taken.borrow_mut();
        taken.paused += paused;
        taken.copied_paused += copied;
        Ok(())
    }
}

impl Stopper<'_> {
    fn describe(&self) -> io::Result<Vec<u8>> {
        match &mut *self.now.borrow_mut() {
            Some(stopped) => stopped.machine.describe().map_err(io::Error::other),
            None => Err(io::Error::other("the machine does not stand still")),
        }
    }
}

impl Capture for MachineCapture {
    fn devices(&self) -> Vec<DeviceInfo> {
        self.infos.clone()
    }

    /// A guest that runs always writes: looking how much would only make it fault again.
    fn changes(&self, _group_shift: u32) -> Changes {
        Changes { blocks: 1, fullest: 1 }
    }

    fn freeze(&self, want: Want) -> Result<Box<dyn Frozen>, CaptureError> {
        Ok(Box::new(self.freeze_machine(want)?))
    }

    /// Pauses of the machine.
    fn holds(&self) -> Histogram {
        self.holds.read()
    }
}

impl MachineCapture {
    fn freeze_machine(&self, want: Want) -> Result<FrozenMachine, CaptureError> {
        self.machine.ready().map_err(|why| {
            let (operation, source) = ("pause the writer", io::Error::other(why));
            Self::error(StagingError::System { operation, source })
        })?;
        if want == Want::Everything {
            self.staging.forget();
        }
        self.memory.looks.store(0, Ordering::Relaxed);
        self.memory.copied.store(0, Ordering::Relaxed);
        let stopper = Stopper {
            machine: &*self.machine,
            memory: &self.memory,
            now: RefCell::new(None),
            taken: RefCell::default(),
        };
        let mut frozen = None;
        let result = staging::freeze_with(&[&self.staging], &stopper, &mut || {
            let content = stopper.describe()?;
            let disks = Capture::freeze(&self.disks.0, want).map_err(io::Error::other)?;
            let late = self.memory.watcher.count().map_err(io::Error::other)?;
            if late > 0 {
                return Err(io::Error::other(format!(
                    "{late} blocks of memory were written while the machine stood still; it is \
                     tried again"
                )));
            }
            frozen = Some((content, disks));
            Ok(())
        });
        let mut taken = stopper.taken.into_inner();
        taken.rounds = self.memory.looks.load(Ordering::Relaxed);
        taken.copied = self.memory.copied.load(Ordering::Relaxed);
        if taken.pauses > 0 {
            self.holds.add(taken.paused);
        }
        let (mut staged, _) = result.map_err(Self::error)?;
        let (Some(staged), Some((content, disks))) = (staged.pop(), frozen) else {
            return Err(Self::error(StagingError::Frozen));
        };
        taken.machine_bytes = content.len() as u64;
        let machine_changed = self.machine_changes(blocks_of(&content), want);
        *lock(&self.taken) = taken;
        Ok(FrozenMachine {
            machine: Arc::clone(&self.machine),
            memory_changed: staged.changed(),
            staged,
            machine_changed,
            machine_used: Arc::clone(&self.machine_used),
            content,
            disks,
            held: taken.paused,
        })
    }
}

/// Devices before the disks.
const OWN: usize = 2;

/// A machine at one instant, to be copied on this host. Dropping it lets its disks go.
pub struct Image {
    /// All of its memory, in a file that nobody else writes.
    pub memory: std::fs::File,
    /// The content of the device `machine`.
    pub machine: Vec<u8>,
    /// How long it stood still.
    pub paused: Duration,
    /// `None` once it has been put back.
    disks: Option<Box<dyn Frozen>>,
}

impl Image {
    /// Reads blocks of a disk as they were.
    ///
    /// # Errors
    /// If they cannot be had.
    pub fn read_disk(&self, disk: usize, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        match &self.disks {
            Some(disks) => disks.read(disk, range, buf),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // For whoever backs them up nothing has happened.
        if let Some(disks) = self.disks.take() {
            disks.put_back();
        }
    }
}

impl MachineCapture {
    /// Freezes the machine to be copied. This capture is of no use afterwards.
    ///
    /// # Errors
    /// As [`Capture::freeze`]; the machine runs.
    pub fn into_image(self) -> Result<Image, CaptureError> {
        let FrozenMachine { staged, content, disks, held, .. } =
            self.freeze_machine(Want::Everything)?;
        match staged.into_area() {
            Ok(memory) => Ok(Image { memory, machine: content, paused: held, disks: Some(disks) }),
            Err(source) => {
                disks.put_back();
                let (device, operation) = (MEMORY.to_owned(), "take its copy");
                Err(CaptureError::Device { device, operation, source })
            }
        }
    }
}

struct FrozenMachine {
    machine: Arc<dyn Machine>,
    staged: Staged,
    memory_changed: BlockSet,
    content: Vec<u8>,
    machine_changed: BlockSet,
    machine_used: Arc<Mutex<Option<u64>>>,
    disks: Box<dyn Frozen>,
    held: Duration,
}

/// Blocks of a device that holds `content`, and zeros after it.
pub(super) fn read_padded(content: &[u8], range: BlockRange, buf: &mut [u8]) {
    buf.fill(0);
    let from = (range.start.offset() as usize).min(content.len());
    let part = &content[from..];
    let length = part.len().min(buf.len());
    buf[..length].copy_from_slice(&part[..length]);
}

fn blocks_of(content: &[u8]) -> u64 {
    content.len().div_ceil(BLOCK_SIZE) as u64
}

impl Frozen for FrozenMachine {
    fn changed(&self, device: usize) -> &BlockSet {
        match device {
            0 => &self.memory_changed,
            1 => &self.machine_changed,
            disk => self.disks.changed(disk - OWN),
        }
    }

    fn read(&self, device: usize, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        match device {
            0 => self.staged.read(range, buf),
            1 => {
                read_padded(&self.content, range, buf);
                Ok(())
            }
            disk => self.disks.read(disk - OWN, range, buf),
        }
    }

    fn held(&self) -> Duration {
        self.held
    }

    fn release(self: Box<Self>) {
        self.machine.stored();
        *lock(&self.machine_used) = Some(blocks_of(&self.content));
        self.staged.release();
        self.disks.release();
    }

    fn put_back(self: Box<Self>) {
        // Memory puts itself back when it is dropped.
        self.disks.put_back();
    }
}
