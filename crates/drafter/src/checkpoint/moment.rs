//! A machine that is stored to go on elsewhere: all of it while it runs, then, when it stands still for
//! good, what was written meanwhile.
//!
//! Unlike [`super::capture`] this copies nothing aside: after the pause nobody writes any more, and what
//! is read before and written to is read again. Called by the runner (`runner/sleep.rs`). What must hold:
//! - Memory is watched, and the disks' round is begun, before the first block is read.
//! - The second moment is taken when nobody writes to memory and disks, and after the driver's state.

use super::{
    MACHINE, MEMORY, capture::DiskCopies, description::DEVICE_BYTES, disk_device, overlay_device,
};
use crate::migrate::source::MachineError;
use silo::{
    block::{BLOCK_SIZE, BlockRange, BlockSet},
    device::Device,
    geometry::Geometry,
    memory::{Memory, Watcher},
    store::capture::{Capture as _, DeviceInfo, Frozen, Want},
};
use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Devices before the disks.
const OWN: usize = 2;

/// How disks are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// What differs from the package.
    Overlay,
    /// All of each.
    Whole,
}

impl Form {
    /// That of a history which holds these devices; of a new one, what differs.
    #[must_use]
    pub fn of(devices: &[&str]) -> Self {
        let whole = devices.iter().any(|name| name.starts_with(&disk_device("")));
        if whole { Self::Whole } else { Self::Overlay }
    }
}

/// What of one device a moment lists.
struct Listed {
    changed: BlockSet,
    zeros: Option<BlockSet>,
}

impl Listed {
    fn all(blocks: u64, data: &BlockSet) -> Self {
        let mut zeros = BlockSet::full(blocks);
        zeros.subtract(data);
        Self { changed: BlockSet::full(blocks), zeros: Some(zeros) }
    }

    fn some(changed: BlockSet) -> Self {
        Self { changed, zeros: None }
    }
}

/// A machine that is about to stand still for good.
pub struct Sleeper {
    memory: Arc<Memory>,
    /// None where writes cannot be watched: all is listed a second time.
    watcher: Option<Watcher>,
    /// Written since `first`, as far as somebody has looked.
    seen: Mutex<BlockSet>,
    disks: Vec<Arc<dyn Device>>,
    copies: DiskCopies,
    form: Form,
}

fn geometry(blocks: u64) -> Result<Geometry, MachineError> {
    Ok(Geometry::new(blocks * BLOCK_SIZE as u64, BLOCK_SIZE as u32)?)
}

impl Sleeper {
    /// Begins to watch its writes.
    #[must_use]
    pub fn new(
        memory: &Arc<Memory>,
        disks: Vec<Arc<dyn Device>>,
        copies: DiskCopies,
        form: Form,
    ) -> Self {
        let watcher = match memory.watch() {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::info!(%error, "the machine stands still while all of it is looked at");
                None
            }
        };
        let seen = Mutex::new(BlockSet::new(memory.blocks()));
        Self { memory: Arc::clone(memory), watcher, seen, disks, copies, form }
    }

    /// The devices of the generation.
    ///
    /// # Errors
    /// If one has an impossible size.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>, MachineError> {
        let own = |name: &str, blocks| {
            Ok::<_, MachineError>(DeviceInfo { name: name.to_owned(), geometry: geometry(blocks)? })
        };
        let mut infos = vec![
            own(MEMORY, self.memory.blocks())?,
            own(MACHINE, DEVICE_BYTES / BLOCK_SIZE as u64)?,
        ];
        for disk in &self.disks {
            let name = disk.name().as_str();
            let name = match self.form {
                Form::Overlay => overlay_device(name),
                Form::Whole => disk_device(name),
            };
            infos.push(own(&name, disk.blocks())?);
        }
        Ok(infos)
    }

    /// The blocks that each disk has beside its package, for the description.
    ///
    /// # Errors
    /// If a disk does not know.
    pub fn overlays(&self) -> Result<BTreeMap<String, Vec<(u64, u64)>>, MachineError> {
        let mut overlays = BTreeMap::new();
        if self.form == Form::Overlay {
            for disk in &self.disks {
                let held = disk.allocated()?;
                let ranges = held.ranges().map(|range| (range.start.0, range.count)).collect();
                overlays.insert(disk.name().as_str().to_owned(), ranges);
            }
        }
        Ok(overlays)
    }

    /// Everything, while the machine runs. What it writes from here on may be torn.
    ///
    /// # Errors
    /// If a disk cannot be frozen, or is unreadable.
    ///
    /// `early`: the blocks of memory that will be touched first.
    pub fn first(&self, early: Vec<BlockRange>) -> Result<Moment, MachineError> {
        if let Some(watcher) = &self.watcher {
            watcher.take()?;
        }
        let frozen = self.copies.group().freeze(Want::Everything)?;
        let own = DEVICE_BYTES / BLOCK_SIZE as u64;
        let mut listed = vec![
            Listed::all(self.memory.blocks(), &self.memory.allocated()?),
            Listed::all(own, &BlockSet::new(own)),
        ];
        for disk in &self.disks {
            let data = match self.form {
                Form::Overlay => disk.allocated()?,
                Form::Whole => BlockSet::full(disk.blocks()),
            };
            listed.push(Listed::all(disk.blocks(), &data));
        }
        Ok(Moment { early, ..self.moment(listed, Vec::new(), frozen) })
    }

    /// The blocks of memory that were written since `first`; none where that is not known.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn written(&self) -> Result<BlockSet, MachineError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(watcher) = &self.watcher {
            seen.union_with(&watcher.take()?);
        }
        Ok(seen.clone())
    }

    /// What was written since `first`, of a machine that stands still; `machine` is the content of the
    /// device of that name.
    ///
    /// # Errors
    /// If the writes are not known, or a disk cannot be frozen.
    pub fn rest(&self, first: &Moment, machine: Vec<u8>) -> Result<Moment, MachineError> {
        let memory = match &self.watcher {
            Some(_) => self.written()?,
            None => {
                let mut both = self.memory.allocated()?;
                let Listed { changed, zeros } = &first.listed[0];
                let mut before = changed.clone();
                zeros.iter().for_each(|zeros| before.subtract(zeros));
                both.union_with(&before);
                both
            }
        };
        let mut own = BlockSet::new(DEVICE_BYTES / BLOCK_SIZE as u64);
        own.insert_range(BlockRange::new(0, machine.len().div_ceil(BLOCK_SIZE) as u64));
        let mut listed = vec![Listed::some(memory), Listed::some(own)];
        if let Some(before) = first.disks().take() {
            before.release();
        }
        let frozen = self.copies.group().freeze(Want::Changed)?;
        for at in 0..self.disks.len() {
            listed.push(Listed::some(frozen.changed(at).clone()));
        }
        Ok(self.moment(listed, machine, frozen))
    }

    fn moment(&self, listed: Vec<Listed>, machine: Vec<u8>, disks: Box<dyn Frozen>) -> Moment {
        let (memory, disks) = (Arc::clone(&self.memory), Mutex::new(Some(disks)));
        Moment { memory, listed, early: Vec::new(), machine, disks }
    }
}

/// See the module.
pub struct Moment {
    memory: Arc<Memory>,
    listed: Vec<Listed>,
    early: Vec<BlockRange>,
    machine: Vec<u8>,
    disks: Mutex<Option<Box<dyn Frozen>>>,
}

impl Moment {
    fn disks(&self) -> MutexGuard<'_, Option<Box<dyn Frozen>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Frozen for Moment {
    fn changed(&self, device: usize) -> &BlockSet {
        &self.listed[device].changed
    }

    fn zeros(&self, device: usize) -> Option<&BlockSet> {
        self.listed[device].zeros.as_ref()
    }

    fn early(&self, device: usize) -> &[BlockRange] {
        if device == 0 { &self.early } else { &[] }
    }

    fn read(&self, device: usize, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        match device {
            0 => self.memory.read(range.start, buf).map_err(io::Error::other),
            1 => {
                super::capture::read_padded(&self.machine, range, buf);
                Ok(())
            }
            disk => match &*self.disks() {
                Some(disks) => disks.read(disk - OWN, range, buf),
                None => Err(io::Error::other("its disks' round is over")),
            },
        }
    }

    fn held(&self) -> Duration {
        Duration::ZERO
    }

    fn release(self: Box<Self>) {}

    fn put_back(self: Box<Self>) {}
}
