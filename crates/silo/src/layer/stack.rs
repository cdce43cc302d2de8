//! The stack as a device: made, opened, read, written, flushed.

use super::{
    Base, LayerError, StackInfo,
    content::Content,
    manifest::{self, BaseRecord, Manifest},
};
use crate::{
    files::{Folder, RealFolder},
    geometry::Geometry,
    io::{BlockDevice, Extent},
    locks::{LockError, RangeGuard, RangeLocks, Who},
    map::{BootId, FileNames, Overlay, Shape, Tidy},
    range::check,
    shared_sync::{AfterFailure, SharedSync},
};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Longest wait for a sync that another thread runs.
const SYNC_LIMIT: Duration = Duration::from_secs(3600);

/// What a stack is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackOptions {
    /// Size of the device in bytes; 0 takes that of the base.
    pub bytes: u64,
    /// Block size of its layers in bytes: a power of two from 512.
    pub block: u32,
}

impl Default for StackOptions {
    fn default() -> Self {
        Self { bytes: 0, block: 4096 }
    }
}

/// One overlay of a stack.
pub(super) struct Layer {
    pub(super) id: u64,
    pub(super) overlay: Overlay,
    /// Writers of the top; frozen from the push of the next layer on.
    pub(super) locks: RangeLocks,
    /// Views that need this layer to stay as it is.
    pub(super) views: AtomicUsize,
    /// Frozen, and durable since.
    settled: AtomicBool,
}

impl Layer {
    fn new(id: u64, overlay: Overlay, frozen: bool) -> Arc<Self> {
        let (views, settled) = (AtomicUsize::new(0), AtomicBool::new(false));
        Arc::new(Self { id, overlay, locks: RangeLocks::new(frozen), views, settled })
    }

    pub(super) fn sync(&self) -> Result<(), LayerError> {
        if self.settled.load(Ordering::Acquire) {
            return Ok(());
        }
        let frozen = self.locks.is_frozen();
        self.overlay.sync(Tidy::Yes)?;
        if frozen {
            self.settled.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The layer is written to after all: by a merge.
    pub(super) fn unsettle(&self) {
        self.settled.store(false, Ordering::Release);
    }
}

/// What changes when layers come and go.
pub(super) struct Structure {
    pub(super) manifest: Manifest,
    /// A layer that the manifest lists already, and that is not in use yet.
    pub(super) spare: Option<Arc<Layer>>,
}

/// See the [module](super). Dropping it closes its files without a sync, as the death of the
/// process would.
pub struct Stack {
    pub(super) folder: Arc<dyn Folder>,
    pub(super) geometry: Geometry,
    pub(super) boot: BootId,
    base: Option<Arc<dyn BlockDevice>>,
    layers: RwLock<Arc<[Arc<Layer>]>>,
    pub(super) structure: Mutex<Structure>,
    /// Held while the top is exchanged: writers that find it frozen wait here.
    pub(super) exchange: Mutex<()>,
    /// Held while a layer is merged down.
    pub(super) merging: Mutex<()>,
    sync: SharedSync,
    /// Held for as long as the stack is open; none for a simulated one.
    _lock: Option<File>,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stack({}, {:?})", self.folder.path().display(), self.geometry)
    }
}

fn lock(dir: &Path) -> Result<File, LayerError> {
    let path = dir.join("lock");
    let held = crate::files::lock(&path).map_err(LayerError::io("lock", &path))?;
    held.ok_or_else(|| LayerError::InUse { path: dir.to_owned() })
}

fn boot(dir: &Path) -> Result<BootId, LayerError> {
    BootId::current().map_err(LayerError::io("find out the boot id for", dir))
}

pub(super) fn names(id: u64) -> FileNames {
    FileNames::prefixed(&format!("{id}."))
}

impl Stack {
    /// Makes a stack of one layer in the folder `dir`, over `base` or over zeros.
    ///
    /// # Errors
    /// If there is a stack already, the size is impossible, or a file cannot be written.
    pub fn create(
        dir: &Path,
        base: Option<&Base>,
        options: StackOptions,
    ) -> Result<Self, LayerError> {
        fs::create_dir_all(dir).map_err(LayerError::io("create", dir))?;
        let held = lock(dir)?;
        Self::create_in(RealFolder::new(dir), base, options, boot(dir)?, Some(held))
    }

    pub(super) fn create_in(
        folder: Arc<dyn Folder>,
        base: Option<&Base>,
        options: StackOptions,
        boot: BootId,
        held: Option<File>,
    ) -> Result<Self, LayerError> {
        match Manifest::read(&*folder) {
            Err(LayerError::NotAStack { .. }) => {}
            Ok(_) => return Err(LayerError::Exists { path: folder.path().to_owned() }),
            Err(error) => return Err(error),
        }
        let below = base.map_or(0, |base| base.device().size());
        let StackOptions { bytes, block } = options;
        let size = |detail: String| LayerError::Size { bytes, block, detail };
        if bytes != 0 && bytes < below {
            return Err(size(format!("its base has {below} bytes, and would be cut")));
        }
        if bytes.max(below) == 0 {
            return Err(size("it needs a size or a base".to_owned()));
        }
        let geometry =
            Geometry::new(bytes.max(below), block).map_err(|error| size(error.to_string()))?;
        if geometry.blocks() > crate::map::MAX_BLOCKS {
            return Err(size("it has more than 2^28 blocks; take larger ones".to_owned()));
        }
        let record = base.map(|base| BaseRecord { bytes: below, root: base.root() });
        let manifest = Manifest::new(geometry, record);
        let overlay = new_overlay(&folder, &manifest, 1, &boot)?;
        manifest.write(&*folder)?;
        let layers = vec![Layer::new(1, overlay, false)];
        Ok(Self::assemble(folder, geometry, boot, base, layers, manifest, held))
    }

    /// Opens a stack, over the base that it was made over.
    ///
    /// # Errors
    /// If another process has it open, its files are damaged, or the base is another one.
    pub fn open(dir: &Path, base: Option<&Base>) -> Result<Self, LayerError> {
        if !dir.join(manifest::FILE_NAME).exists() {
            return Err(LayerError::NotAStack { path: dir.to_owned() });
        }
        let held = lock(dir)?;
        Self::open_in(RealFolder::new(dir), base, boot(dir)?, Some(held))
    }

    pub(super) fn open_in(
        folder: Arc<dyn Folder>,
        base: Option<&Base>,
        boot: BootId,
        held: Option<File>,
    ) -> Result<Self, LayerError> {
        let manifest = Manifest::read(&*folder)?;
        let geometry = manifest.geometry()?;
        check_base(manifest.base, base)?;
        let mut layers = Vec::new();
        for id in &manifest.layers {
            let (overlay, _) = Overlay::open(&folder, names(*id), &boot)?;
            if overlay.geometry() != geometry {
                return Err(LayerError::Corrupt {
                    path: folder.path().join(&overlay.names().journal),
                    at: 12,
                    detail: "the layer has another size than the stack".to_owned(),
                });
            }
            let frozen = Some(id) != manifest.layers.last();
            layers.push(Layer::new(*id, overlay, frozen));
        }
        remove_leftovers(&*folder, &manifest)?;
        Ok(Self::assemble(folder, geometry, boot, base, layers, manifest, held))
    }

    fn assemble(
        folder: Arc<dyn Folder>,
        geometry: Geometry,
        boot: BootId,
        base: Option<&Base>,
        layers: Vec<Arc<Layer>>,
        manifest: Manifest,
        held: Option<File>,
    ) -> Self {
        Self {
            folder,
            geometry,
            boot,
            base: base.map(|base| base.device().clone()),
            layers: RwLock::new(layers.into()),
            structure: Mutex::new(Structure { manifest, spare: None }),
            exchange: Mutex::new(()),
            merging: Mutex::new(()),
            sync: SharedSync::new(AfterFailure::Retry, SYNC_LIMIT),
            _lock: held,
        }
    }

    /// The stacks in the folders in `dir`, by name; damaged ones as errors.
    ///
    /// # Errors
    /// If `dir` itself cannot be read.
    pub fn discover(dir: &Path) -> Result<Vec<Result<StackInfo, LayerError>>, LayerError> {
        let list = || -> io::Result<Vec<PathBuf>> {
            let mut paths = Vec::new();
            for entry in fs::read_dir(dir)? {
                let path = entry?.path();
                if path.join(manifest::FILE_NAME).is_file() {
                    paths.push(path);
                }
            }
            paths.sort();
            Ok(paths)
        };
        let paths = list().map_err(LayerError::io("list", dir))?;
        Ok(paths.iter().map(|path| Self::inspect(path)).collect())
    }

    /// What the stack in `dir` is, without opening it.
    ///
    /// # Errors
    /// If there is none, or its manifest is damaged.
    pub fn inspect(dir: &Path) -> Result<StackInfo, LayerError> {
        let folder = RealFolder::new(dir);
        Ok(StackInfo::of(&Manifest::read(&*folder)?, dir))
    }

    /// Size and blocks.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The folder that it lies in.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// How many layers it has now.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.content().layers.len()
    }

    /// Bytes that its layers take on this host.
    ///
    /// # Errors
    /// If the file system does not say.
    pub fn allocated_bytes(&self) -> Result<u64, LayerError> {
        let content = self.content();
        let sizes = content.layers.iter().map(|layer| layer.overlay.allocated_bytes());
        Ok(sizes.sum::<Result<u64, _>>()?)
    }

    pub(super) fn content(&self) -> Content {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner).clone();
        Content { geometry: self.geometry, base: self.base.clone(), layers }
    }

    pub(super) fn set_layers(&self, layers: Vec<Arc<Layer>>) {
        *self.layers.write().unwrap_or_else(PoisonError::into_inner) = layers.into();
    }

    pub(super) fn structure(&self) -> MutexGuard<'_, Structure> {
        // Changed only after the manifest was, field by field.
        self.structure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn new_layer(&self, manifest: &Manifest, id: u64) -> Result<Arc<Layer>, LayerError> {
        let overlay = new_overlay(&self.folder, manifest, id, &self.boot)?;
        Ok(Layer::new(id, overlay, false))
    }

    /// Does something to the top with the blocks of an access locked; waits while the top is being
    /// exchanged.
    fn change<T>(
        &self,
        (offset, length): (u64, u64),
        work: impl Fn(&Content) -> io::Result<T>,
    ) -> io::Result<T> {
        let range = self.geometry.touched(offset, length);
        loop {
            let content = self.content();
            let guard: Result<RangeGuard<'_>, _> = content.top().locks.lock(range, Who::Guest);
            match guard {
                Ok(_guard) => return work(&content),
                Err(LockError::Frozen) => {
                    // Whoever froze it holds this until there is a new top or the old one is
                    // thawed, and has a deadline.
                    drop(self.exchange.lock().unwrap_or_else(PoisonError::into_inner));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn new_overlay(
    folder: &Arc<dyn Folder>,
    manifest: &Manifest,
    id: u64,
    boot: &BootId,
) -> Result<Overlay, LayerError> {
    let instance = getrandom::u64().map_err(|error| {
        let error = io::Error::other(error.to_string());
        LayerError::io("draw random bytes for", folder.path())(error)
    })?;
    let base_bytes = manifest.base.map_or(0, |base| base.bytes);
    let shape = Shape { geometry: manifest.geometry()?, base_bytes, instance };
    Ok(Overlay::create(folder, names(id), shape, boot)?)
}

fn check_base(created: Option<BaseRecord>, given: Option<&Base>) -> Result<(), LayerError> {
    let words = |record: Option<BaseRecord>| match record {
        None => "no base".to_owned(),
        Some(BaseRecord { bytes, root: None }) => format!("{bytes} bytes without a known root"),
        Some(BaseRecord { bytes, root: Some(root) }) => format!("{root} ({bytes} bytes)"),
    };
    let found = given.map(|base| BaseRecord { bytes: base.device().size(), root: base.root() });
    let same = match (created, found) {
        (None, None) => true,
        // A base whose root was recorded must show it; one without can only be measured.
        (Some(a), Some(b)) => a.bytes == b.bytes && (a.root.is_none() || a.root == b.root),
        _ => false,
    };
    if same {
        return Ok(());
    }
    let base = given.map_or_else(|| "(none)".to_owned(), |base| base.name().to_owned());
    Err(LayerError::WrongBase { base, wanted: words(created), found: words(found) })
}

/// Files of layers that the manifest does not list: a crash came between.
fn remove_leftovers(folder: &dyn Folder, manifest: &Manifest) -> Result<(), LayerError> {
    let found = folder.names().map_err(LayerError::io("list", folder.path()))?;
    let mut ids: Vec<u64> = found
        .iter()
        .filter_map(|name| name.split_once('.')?.0.parse().ok())
        .filter(|id| !manifest.layers.contains(id))
        .collect();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        tracing::info!(stack = %folder.path().display(), layer = id, "removes an unfinished layer");
        Overlay::remove(folder, &names(id))
            .map_err(LayerError::io("remove an unfinished layer of", folder.path()))?;
    }
    Ok(())
}

impl BlockDevice for Stack {
    fn size(&self) -> u64 {
        self.geometry.bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check(self.geometry.bytes(), offset, buf.len() as u64)?;
        self.content().read(offset, buf)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        check(self.geometry.bytes(), offset, buf.len() as u64)?;
        let content = self.content();
        content.try_read(content.layers.len(), offset, buf)
    }

    fn may_wait(&self, offset: u64, length: u64) -> bool {
        let content = self.content();
        check(self.geometry.bytes(), offset, length).is_ok()
            && content.may_wait(content.layers.len(), offset, length)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let length = data.len() as u64;
        check(self.geometry.bytes(), offset, length)?;
        if data.is_empty() {
            return Ok(());
        }
        self.change((offset, length), |content| content.write(offset, data))
    }

    fn flush(&self) -> io::Result<()> {
        self.sync.run(|| {
            for layer in self.content().layers.iter() {
                layer.sync()?;
            }
            Ok(())
        })
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        let covered = self.geometry.covered(offset, length);
        if covered.count == 0 {
            return Ok(());
        }
        self.change((offset, length), |content| Ok(content.drop_blocks(covered)?))
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        if length == 0 {
            return Ok(());
        }
        self.change((offset, length), |content| content.zero(offset, length, allocate))
    }

    /// Only maps change.
    fn zeroes_fast(&self) -> bool {
        true
    }

    /// Of the base: layers are files, which the kernel reads ahead.
    fn prefetch(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        match &self.base {
            Some(base) => {
                let inside = base.size().saturating_sub(offset).min(length);
                if inside > 0 { base.prefetch(offset, inside) } else { Ok(()) }
            }
            None => Ok(()),
        }
    }

    fn interrupt(&self) {
        if let Some(base) = &self.base {
            base.interrupt();
        }
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        check(self.geometry.bytes(), offset, length)?;
        self.content().extents(offset, length)
    }
}
