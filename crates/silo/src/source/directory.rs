//! A device whose bytes lie in a folder, one file for each block ("shard").
//!
//! | file | what |
//! |---|---|
//! | `device.json` | size and block size; written once |
//! | `00000000` … | a shard, by its number in hexadecimal; made when it is first written |
//!
//! What holds: a shard is there as a whole or not at all (it is made beside its place and renamed);
//! one that was never written, or was trimmed, is zeros and no file; one of another length is an
//! error that names it, never zeros. A failed sync stays failed.

use super::SourceError;
use crate::{
    block::{BlockIndex, BlockRange},
    geometry::Geometry,
    io::{Allocation, BlockDevice, Extent},
    locks::{RangeLocks, Who},
    range::{add_extent, check, parts},
    shared_sync::{AfterFailure, SharedSync},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

const META: &str = "device.json";
const VERSION: u32 = 1;
/// Longest description that is read.
const MAX_META: u64 = 4096;
/// Shards that are kept open.
const OPEN_FILES: usize = 256;
/// Longest wait for a sync that another thread runs.
const SYNC_LIMIT: Duration = Duration::from_secs(3600);

#[derive(Serialize, Deserialize)]
struct Meta {
    version: u32,
    bytes: u64,
    block: u32,
}

#[derive(Default)]
struct Open {
    /// With the moment of its last use.
    files: HashMap<u64, (Arc<File>, u64)>,
    uses: u64,
}

/// What a flush has to sync.
#[derive(Default)]
struct Dirty {
    shards: BTreeSet<u64>,
    names: bool,
}

/// See the comment of its module.
pub struct DirectoryDevice {
    dir: PathBuf,
    geometry: Geometry,
    locks: RangeLocks,
    open: Mutex<Open>,
    dirty: Mutex<Dirty>,
    sync: SharedSync,
    _lock: File,
}

impl std::fmt::Debug for DirectoryDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DirectoryDevice({}, {:?})", self.dir.display(), self.geometry)
    }
}

fn plain<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is one call on one field.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads any bytes as a description of a device; for a fuzzer.
pub(crate) fn fuzz_meta(bytes: &[u8]) {
    let _ = decode(bytes, Path::new(META));
}

fn decode(bytes: &[u8], path: &Path) -> Result<Geometry, SourceError> {
    let corrupt = |error: serde_json::Error| SourceError::Corrupt {
        path: path.to_owned(),
        at: 0,
        detail: error.to_string(),
    };
    let meta: Meta = serde_json::from_slice(bytes).map_err(corrupt)?;
    if meta.version != VERSION {
        let (found, known) = (meta.version, VERSION);
        return Err(SourceError::Version { path: path.to_owned(), found, known });
    }
    Ok(Geometry::new(meta.bytes, meta.block)?)
}

impl DirectoryDevice {
    /// Makes an empty device in `dir`, which may exist.
    ///
    /// # Errors
    /// If there is one already, the sizes are impossible, or a file cannot be written.
    pub fn create(dir: &Path, bytes: u64, block: u32) -> Result<Self, SourceError> {
        let geometry = Geometry::new(bytes, block)?;
        fs::create_dir_all(dir).map_err(SourceError::io("create", dir))?;
        let held = lock(dir)?;
        let path = dir.join(META);
        if path.exists() {
            return Err(SourceError::Exists { path });
        }
        let text = serde_json::to_vec(&Meta { version: VERSION, bytes, block })
            .expect("plain fields have a JSON form");
        let folder = crate::files::RealFolder::new(dir);
        crate::files::replace(&*folder, META, &text).map_err(SourceError::io("write", &path))?;
        Ok(Self::with(dir, geometry, held))
    }

    /// Opens the device in `dir`.
    ///
    /// # Errors
    /// If there is none, it is open elsewhere, or its description is damaged.
    pub fn open(dir: &Path) -> Result<Self, SourceError> {
        let path = dir.join(META);
        let length = fs::metadata(&path).map_err(SourceError::io("open", &path))?.len();
        if length > MAX_META {
            let detail = format!("{length} bytes");
            return Err(SourceError::NotA { path, wanted: "a device's description", detail });
        }
        let bytes = fs::read(&path).map_err(SourceError::io("read", &path))?;
        let geometry = decode(&bytes, &path)?;
        Ok(Self::with(dir, geometry, lock(dir)?))
    }

    fn with(dir: &Path, geometry: Geometry, held: File) -> Self {
        Self {
            dir: dir.to_owned(),
            geometry,
            locks: RangeLocks::new(false),
            open: Mutex::default(),
            dirty: Mutex::default(),
            sync: SharedSync::new(AfterFailure::Sticky, SYNC_LIMIT),
            _lock: held,
        }
    }

    /// Size, and the size of a shard.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn shard_path(&self, shard: u64) -> PathBuf {
        self.dir.join(format!("{shard:08x}"))
    }

    /// A shard's file, if there is one.
    fn shard(&self, shard: u64) -> io::Result<Option<Arc<File>>> {
        let mut open = plain(&self.open);
        open.uses += 1;
        let now = open.uses;
        if let Some((file, used)) = open.files.get_mut(&shard) {
            *used = now;
            return Ok(Some(file.clone()));
        }
        let path = self.shard_path(shard);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(SourceError::io("open shard", &path)(error).into()),
        };
        let found = file.metadata()?.len();
        let wanted = self.geometry.length(BlockIndex(shard));
        if found != wanted {
            let detail = format!("the shard has {found} bytes and not {wanted}; restore it");
            return Err(SourceError::Corrupt { path, at: found.min(wanted), detail }.into());
        }
        let file = Arc::new(file);
        Self::keep(&mut open, shard, file.clone());
        Ok(Some(file))
    }

    /// Keeps a file open, and closes the one that was not used for longest.
    fn keep(open: &mut Open, shard: u64, file: Arc<File>) {
        if open.files.len() >= OPEN_FILES
            && let Some(oldest) =
                open.files.iter().min_by_key(|(_, (_, used))| *used).map(|(shard, _)| *shard)
        {
            open.files.remove(&oldest);
        }
        let now = open.uses;
        open.files.insert(shard, (file, now));
    }

    /// Makes a shard with `data` at `within`, whole or not at all. The caller holds its lock.
    fn make(&self, shard: u64, within: u64, data: &[u8]) -> io::Result<()> {
        let (path, fresh) = (self.shard_path(shard), self.dir.join(format!("{shard:08x}.new")));
        let write = || -> io::Result<File> {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(true).open(&fresh)?;
            file.set_len(self.geometry.length(BlockIndex(shard)))?;
            file.write_all_at(data, within)?;
            fs::rename(&fresh, &path)?;
            Ok(file)
        };
        let file = write().inspect_err(|_| {
            // Room on a full disk; if it stays, the next write of the shard replaces it.
            let _ = fs::remove_file(&fresh);
        });
        let file =
            file.map_err(|error| io::Error::from(SourceError::io("make shard", &path)(error)))?;
        Self::keep(&mut plain(&self.open), shard, Arc::new(file));
        let mut dirty = plain(&self.dirty);
        dirty.shards.insert(shard);
        dirty.names = true;
        Ok(())
    }

    fn remove(&self, shard: u64) -> io::Result<()> {
        let path = self.shard_path(shard);
        match fs::remove_file(&path) {
            Ok(()) => plain(&self.dirty).names = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(SourceError::io("remove shard", &path)(error).into()),
        }
        // After its name is gone: a reader, which takes no lock, would else open it again, and the
        // next write would go to a file without a name.
        plain(&self.open).files.remove(&shard);
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        let dirty = std::mem::take(&mut *plain(&self.dirty));
        for shard in dirty.shards {
            // One that was removed since needs no sync.
            if let Some(file) = self.shard(shard)? {
                file.sync_data().map_err(SourceError::io("sync shard", &self.shard_path(shard)))?;
            }
        }
        if dirty.names {
            File::open(&self.dir)
                .and_then(|dir| dir.sync_all())
                .map_err(SourceError::io("sync", &self.dir))?;
        }
        Ok(())
    }
}

fn lock(dir: &Path) -> Result<File, SourceError> {
    let path = dir.join("lock");
    let held = crate::files::lock(&path).map_err(SourceError::io("lock", &path))?;
    held.ok_or_else(|| SourceError::InUse { path: dir.to_owned() })
}

impl BlockDevice for DirectoryDevice {
    fn size(&self) -> u64 {
        self.geometry.bytes()
    }

    fn read_at(&self, offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check(self.geometry.bytes(), offset, buf.len() as u64)?;
        for (shard, within, length) in parts(self.geometry.block(), offset, buf.len() as u64) {
            let (part, rest) = buf.split_at_mut(length as usize);
            match self.shard(shard)? {
                None => part.fill(0),
                Some(file) => file
                    .read_exact_at(part, within)
                    .map_err(SourceError::io("read shard", &self.shard_path(shard)))?,
            }
            buf = rest;
        }
        Ok(())
    }

    fn may_wait(&self, _offset: u64, _length: u64) -> bool {
        false
    }

    fn write_at(&self, offset: u64, mut data: &[u8]) -> io::Result<()> {
        check(self.geometry.bytes(), offset, data.len() as u64)?;
        for (shard, within, length) in parts(self.geometry.block(), offset, data.len() as u64) {
            let (part, rest) = data.split_at(length as usize);
            // A shard is made and removed by one at a time.
            let _guard = self.locks.lock(BlockRange::new(shard, 1), Who::Guest)?;
            match self.shard(shard)? {
                None => self.make(shard, within, part)?,
                Some(file) => {
                    plain(&self.dirty).shards.insert(shard);
                    let result = file.write_all_at(part, within);
                    // Again: a flush may have taken the mark before these bytes were written.
                    plain(&self.dirty).shards.insert(shard);
                    result.map_err(SourceError::io("write shard", &self.shard_path(shard)))?;
                }
            }
            data = rest;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.sync.run(|| self.sync_all())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        for shard in self.geometry.covered(offset, length).chunks(1) {
            let _guard = self.locks.lock(shard, Who::Guest)?;
            self.remove(shard.start.0)?;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        for (shard, within, length) in parts(self.geometry.block(), offset, length) {
            let _guard = self.locks.lock(BlockRange::new(shard, 1), Who::Guest)?;
            let whole = length == self.geometry.length(BlockIndex(shard));
            if whole && !allocate {
                self.remove(shard)?;
                continue;
            }
            let file = match self.shard(shard)? {
                Some(file) => file,
                None if !allocate => continue,
                None => {
                    self.make(shard, 0, &[])?;
                    self.shard(shard)?.ok_or(io::ErrorKind::NotFound)?
                }
            };
            let zeros = vec![0; length.min(1 << 20) as usize];
            let mut at = 0;
            while at < length {
                let part = &zeros[..(length - at).min(1 << 20) as usize];
                file.write_all_at(part, within + at)
                    .map_err(SourceError::io("write shard", &self.shard_path(shard)))?;
                at += part.len() as u64;
            }
            plain(&self.dirty).shards.insert(shard);
        }
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        check(self.geometry.bytes(), offset, length)?;
        let mut found = Vec::new();
        for (shard, _, length) in parts(self.geometry.block(), offset, length) {
            let path = self.shard_path(shard);
            // An error is not a hole: who copies by this would leave the shard out.
            let there = path.try_exists().map_err(SourceError::io("look for shard", &path))?;
            let allocation = match there {
                true => Allocation::Data,
                false => Allocation::Hole,
            };
            if !add_extent(&mut found, length, allocation) {
                break;
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_of_another_size_is_an_error_that_names_it_and_never_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let device = DirectoryDevice::create(dir.path(), 10_000, 4096).unwrap();
        device.write_at(4096, &[1; 5904]).unwrap();
        device.flush().unwrap();
        drop(device);
        assert_eq!(fs::metadata(dir.path().join("00000002")).unwrap().len(), 10_000 - 8192);
        let shard = File::options().write(true).open(dir.path().join("00000001")).unwrap();
        shard.set_len(4000).unwrap();
        let device = DirectoryDevice::open(dir.path()).unwrap();
        for result in [device.read_at(4096, &mut [0; 10]), device.write_at(4096, &[2; 10])] {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(error.to_string().contains("00000001"), "{error}");
        }
        device.read_at(8192, &mut [0; 100]).unwrap();
    }

    #[test]
    fn a_write_after_a_trim_is_in_the_folder_while_others_read_the_same_shard() {
        let dir = tempfile::tempdir().unwrap();
        let device = DirectoryDevice::create(dir.path(), 4096, 4096).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    device.read_at(0, &mut [0; 8]).unwrap();
                }
            });
            let lost = (0..3000u32).find(|round| {
                device.write_at(0, &round.to_le_bytes()).unwrap();
                device.trim(0, 4096).unwrap();
                device.write_at(0, &round.to_le_bytes()).unwrap();
                let found = fs::read(dir.path().join("00000000")).unwrap_or_default();
                found.get(..4) != Some(&round.to_le_bytes()[..])
            });
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(lost, None, "the write of this round is in no file");
        });
    }

    #[test]
    fn a_shard_that_cannot_be_looked_at_is_an_error_and_no_hole() {
        let dir = tempfile::tempdir().unwrap();
        let device = DirectoryDevice::create(dir.path(), 8192, 4096).unwrap();
        let shard = dir.path().join("00000001");
        std::os::unix::fs::symlink(&shard, &shard).unwrap();
        let error = device.extents(0, 8192).unwrap_err();
        assert!(error.to_string().contains("00000001"), "{error}");
    }

    #[test]
    fn shards_are_made_when_written_and_go_when_trimmed_and_few_files_are_open() {
        let dir = tempfile::tempdir().unwrap();
        let device = DirectoryDevice::create(dir.path(), 512 * 600, 512).unwrap();
        let count = || fs::read_dir(dir.path()).unwrap().count() - 2;
        assert_eq!(count(), 0);
        for shard in 0..600u64 {
            device.write_at(shard * 512 + 3, &[shard as u8; 5]).unwrap();
        }
        assert_eq!((count(), plain(&device.open).files.len()), (600, OPEN_FILES));
        device.flush().unwrap();
        let mut buf = [0; 5];
        for shard in 0..600u64 {
            device.read_at(shard * 512 + 3, &mut buf).unwrap();
            assert_eq!(buf, [shard as u8; 5]);
        }
        device.trim(0, 512 * 599).unwrap();
        assert_eq!(count(), 1);
        assert!(matches!(DirectoryDevice::open(dir.path()), Err(SourceError::InUse { .. })));
    }
}
