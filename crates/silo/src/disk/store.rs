//! The parts that lie on the file system, and the order in which they are written: base, overlay
//! data, runtime map, journal. See the module documentation of [`disk`](super) for the layout.

use super::{
    BootId, DiskOptions, MAX_BLOCKS,
    below::{Below, Place},
    error::DiskError,
};
use crate::{
    block::{BLOCK_SIZE, BlockRange, BlockSet},
    files::{Folder, RealFolder, read_cached},
    geometry::Geometry,
    map::{BlockState, DiskStatus, FileNames, Overlay, Shape, StateMap, Tidy},
};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// The read-only file below the overlay.
struct Base {
    file: File,
    path: PathBuf,
    bytes: u64,
}

/// An open disk's files and maps.
pub(super) struct Store {
    dir: PathBuf,
    base: Option<Base>,
    below: Option<Below>,
    overlay: Overlay,
    cache_reads: AtomicBool,
    /// Held for as long as the disk is open; the kernel lets go of it when the process ends.
    _lock: File,
}

fn names() -> FileNames {
    FileNames::prefixed("")
}

fn lock(dir: &Path) -> Result<File, DiskError> {
    let path = dir.join("lock");
    let held = crate::files::lock(&path).map_err(DiskError::io("lock", &path))?;
    held.ok_or_else(|| DiskError::InUse { path: dir.to_owned() })
}

fn open_base(path: Option<&Path>) -> Result<Option<Base>, DiskError> {
    let Some(path) = path else { return Ok(None) };
    let open = || -> io::Result<Base> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("a base must be a regular file"));
        }
        Ok(Base { file, path: path.to_owned(), bytes: metadata.len() })
    };
    open().map(Some).map_err(DiskError::io("open base", path))
}

fn size_in_blocks(base_bytes: u64, bytes: u64) -> Result<u64, DiskError> {
    let blocks = base_bytes.max(bytes).div_ceil(BLOCK_SIZE as u64);
    if bytes != 0 && bytes < base_bytes {
        return Err(DiskError::Size { bytes, detail: "it would be smaller than its base" });
    }
    match blocks {
        0 => Err(DiskError::Size { bytes, detail: "it needs a base or a size" }),
        1..=MAX_BLOCKS => Ok(blocks),
        _ => Err(DiskError::Size { bytes, detail: "1 TiB is the most that is supported" }),
    }
}

/// Calls `read` for each part of an access that lies in one place; false as soon as one is.
fn pieces(
    below: &Below,
    offset: u64,
    buf: &mut [u8],
    mut read: impl FnMut(Place, u64, &mut [u8]) -> Result<bool, DiskError>,
) -> Result<bool, DiskError> {
    const BLOCK: u64 = BLOCK_SIZE as u64;
    let end = offset + buf.len() as u64;
    let mut at = offset;
    while at < end {
        let (place, stop) = below.run(at / BLOCK, end.div_ceil(BLOCK));
        let stop = end.min(stop * BLOCK);
        let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
        if !read(place, at, part)? {
            return Ok(false);
        }
        at = stop;
    }
    Ok(true)
}

impl Store {
    pub(super) fn create(
        dir: &Path,
        base: Option<&Path>,
        bytes: u64,
        options: &DiskOptions,
    ) -> Result<Self, DiskError> {
        let base = open_base(base)?;
        let base_bytes = base.as_ref().map_or(0, |base| base.bytes);
        let blocks = size_in_blocks(base_bytes, bytes)?;
        fs::create_dir_all(dir).map_err(DiskError::io("create", dir))?;
        let held = lock(dir)?;
        if dir.join(names().journal).exists() {
            return Err(DiskError::Exists { path: dir.to_owned() });
        }
        let instance = getrandom::u64().map_err(|error| {
            DiskError::io("draw random bytes for", dir)(io::Error::other(error.to_string()))
        })?;
        let geometry = Geometry::new(blocks * BLOCK_SIZE as u64, BLOCK_SIZE as u32)
            .expect("the number of blocks was checked");
        let folder: Arc<dyn Folder> = RealFolder::new(dir);
        let shape = Shape { geometry, base_bytes, instance };
        let overlay = Overlay::create(&folder, names(), shape, &options.boot()?)?;
        let below = Below::open(dir, blocks)?;
        Ok(Self::assemble(dir, base, below, overlay, held))
    }

    /// Opens what [`Store::create`] made. The second value: whether the disk was frozen.
    pub(super) fn open(
        dir: &Path,
        base: Option<&Path>,
        options: &DiskOptions,
    ) -> Result<(Self, bool), DiskError> {
        if !dir.join(names().journal).exists() {
            return Err(DiskError::NotADisk { path: dir.to_owned() });
        }
        let held = lock(dir)?;
        let folder: Arc<dyn Folder> = RealFolder::new(dir);
        let base = open_base(base)?;
        let (overlay, frozen) = Overlay::open(&folder, names(), &options.boot()?)?;
        let (found, geometry) = (overlay.shape().base_bytes, overlay.geometry());
        if geometry.block() != BLOCK_SIZE as u64 || geometry.bytes() % BLOCK_SIZE as u64 != 0 {
            return Err(DiskError::Corrupt {
                path: dir.join(names().journal),
                at: 12,
                detail: "this is a layer of a stack, not a disk of a machine".to_owned(),
            });
        }
        let base_bytes = base.as_ref().map_or(0, |base| base.bytes);
        if base_bytes != found {
            return Err(DiskError::WrongBase {
                path: dir.to_owned(),
                base: base.map_or_else(|| PathBuf::from("no base"), |base| base.path),
                created: format!("one of {found} bytes"),
                given: format!("{base_bytes} bytes"),
            });
        }
        let below = Below::open(dir, geometry.blocks())?;
        Ok((Self::assemble(dir, base, below, overlay, held), frozen))
    }

    fn assemble(
        dir: &Path,
        base: Option<Base>,
        below: Option<Below>,
        overlay: Overlay,
        held: File,
    ) -> Self {
        let cache_reads = AtomicBool::new(true);
        Self { dir: dir.to_owned(), base, below, overlay, cache_reads, _lock: held }
    }

    /// The layer between base and overlay, while there is one.
    fn below(&self) -> Option<&Below> {
        self.below.as_ref().filter(|below| below.is_there())
    }

    /// Blocks that differ from the base although they are not in the overlay.
    pub(super) fn below_blocks(&self) -> Option<BlockSet> {
        self.below().map(Below::blocks)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) const fn blocks(&self) -> u64 {
        self.overlay.geometry().blocks()
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.overlay.geometry().bytes()
    }

    pub(super) const fn states(&self) -> &StateMap {
        self.overlay.states()
    }

    /// Blocks that the base reaches into.
    pub(super) fn base_blocks(&self) -> u64 {
        self.base.as_ref().map_or(0, |base| base.bytes.div_ceil(BLOCK_SIZE as u64))
    }

    pub(super) fn status(&self) -> DiskStatus {
        self.overlay.status()
    }

    pub(super) fn set_status(&self, status: DiskStatus) -> Result<(), DiskError> {
        Ok(self.overlay.set_status(status)?)
    }

    pub(super) fn set_frozen(&self, frozen: bool) -> Result<(), DiskError> {
        Ok(self.overlay.set_frozen(frozen)?)
    }

    pub(super) fn allocated_bytes(&self) -> Result<u64, DiskError> {
        Ok(self.overlay.allocated_bytes()?)
    }

    // ---- content

    /// Reads bytes of blocks that are all in `state`, which is not `Missing`.
    pub(super) fn read(
        &self,
        state: BlockState,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), DiskError> {
        match (state, self.below()) {
            (BlockState::Data, _) => Ok(self.overlay.read(offset, buf)?),
            (BlockState::Base, None) => self.read_base(offset, buf),
            (BlockState::Base, Some(below)) => {
                pieces(below, offset, buf, |place, offset, part| match place {
                    Place::Layer => below.read(offset, part).map(|()| true),
                    Place::Zero => {
                        part.fill(0);
                        Ok(true)
                    }
                    Place::Base => self.read_base(offset, part).map(|()| true),
                })
                .map(drop)
            }
            _ => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    fn read_base(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let Some(base) = &self.base else {
            buf.fill(0);
            return Ok(());
        };
        let inside = base.bytes.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (content, beyond) = buf.split_at_mut(inside);
        beyond.fill(0);
        base.file.read_exact_at(content, offset).map_err(DiskError::io("read base", &base.path))
    }

    /// As [`Store::read`], but only what is in the page cache; false if it is not.
    pub(super) fn read_cached(
        &self,
        state: BlockState,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<bool, DiskError> {
        match (state, self.below()) {
            (BlockState::Data, _) => Ok(self.overlay.try_read(offset, buf)?),
            (BlockState::Base, None) => self.try_read_base(offset, buf),
            (BlockState::Base, Some(below)) => {
                pieces(below, offset, buf, |place, offset, part| match place {
                    Place::Layer => below.try_read(offset, part),
                    Place::Zero => {
                        part.fill(0);
                        Ok(true)
                    }
                    Place::Base => self.try_read_base(offset, part),
                })
            }
            _ => self.read(state, offset, buf).map(|()| true),
        }
    }

    fn try_read_base(&self, offset: u64, buf: &mut [u8]) -> Result<bool, DiskError> {
        let Some(base) = &self.base else {
            return self.read_base(offset, buf).map(|()| true);
        };
        let length = base.bytes.saturating_sub(offset).min(buf.len() as u64) as usize;
        if length > 0 && self.cache_reads.load(Ordering::Relaxed) {
            match read_cached(&base.file, offset, &mut buf[..length]) {
                Ok(Some(count)) if count == length => {
                    buf[length..].fill(0);
                    return Ok(true);
                }
                Ok(_) => return Ok(false),
                // The file system cannot tell, so it is one in memory or a rare one: just read.
                Err(_) => self.cache_reads.store(false, Ordering::Relaxed),
            }
        }
        self.read_base(offset, buf).map(|()| true)
    }

    /// Writes bytes into the overlay; no state changes.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        Ok(self.overlay.write(offset, data)?)
    }

    /// Changes the state of blocks whose content is where the new state says. The caller holds the
    /// blocks' range lock.
    pub(super) fn set_state(&self, range: BlockRange, state: BlockState) -> Result<(), DiskError> {
        Ok(self.overlay.set_state(range, state)?)
    }

    /// As [`Store::set_state`] for many blocks at once, quick: one write of the whole span.
    pub(super) fn set_states(&self, set: &BlockSet, state: BlockState) -> Result<(), DiskError> {
        Ok(self.overlay.set_states(set, state)?)
    }

    /// Gives the overlay's space back; whoever reads these blocks must see zeros or nothing.
    pub(super) fn punch(&self, range: BlockRange) {
        self.overlay.punch(range);
    }

    // ---- durability

    /// Keeps every sync from going on while the guard lives.
    #[cfg(test)]
    pub(super) fn hold_journal(&self) -> impl Drop + '_ {
        self.overlay.hold_journal()
    }

    /// As if a sync had failed.
    #[cfg(test)]
    pub(super) fn lose_sync(&self, cause: &str) {
        self.overlay.lose_sync(cause);
    }

    /// Makes everything durable that was written before the call.
    pub(super) fn sync(&self, tidy: Tidy) -> Result<(), DiskError> {
        Ok(self.overlay.sync(tidy)?)
    }

    /// Makes everything durable, and with it that the disk is in `status`.
    pub(super) fn sync_status(&self, status: DiskStatus) -> Result<(), DiskError> {
        Ok(self.overlay.sync_status(status)?)
    }

    /// Back to a disk of which every block is in the base, and that is being received.
    pub(super) fn reset(&self) -> Result<(), DiskError> {
        if let Some(below) = self.below() {
            // First that nobody takes what is left for a disk.
            self.overlay.sync_status(DiskStatus::Receiving)?;
            below.remove()?;
        }
        Ok(self.overlay.reset()?)
    }
}

impl DiskOptions {
    fn boot(&self) -> Result<BootId, DiskError> {
        let current = || {
            BootId::current().map_err(DiskError::io("ask the kernel for", Path::new("its boot id")))
        };
        self.boot.clone().map_or_else(current, Ok)
    }
}
