//! A base: the device below the lowest layer, and the proof that it is the right one.
//!
//! A shared base is hashed once: the verdict lies beside it, for the very file that was hashed
//! (device, inode, size, times of content and of inode). A file that was changed in the last
//! seconds is not remembered, because a second change could hide in the same tick of the clock.

use super::LayerError;
use crate::{
    hash::{RootHash, hash_file},
    io::BlockDevice,
    source::{FileDevice, FileMode},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// What is added to a base's file name for the file that remembers its verdict.
pub const CACHE_SUFFIX: &str = ".silo-verified";
const VERSION: u32 = 1;
/// A file changed less than this ago is hashed again the next time.
const SETTLED: Duration = Duration::from_secs(2);
/// Longest cache file that is read.
const MAX_CACHE: u64 = 4096;

/// What the kernel says of a file, as far as it changes when the content does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    /// Whether the last change is long enough ago for a later one to be seen.
    fn is_settled(&self, now: SystemTime) -> bool {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let newest = self.modified.max(self.changed);
        let newest = Duration::new(newest.0.max(0) as u64, newest.1.clamp(0, 999_999_999) as u32);
        since.checked_sub(newest).is_some_and(|age| age >= SETTLED)
    }
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Cached {
    version: u32,
    stamp: Stamp,
    root: RootHash,
}

fn decode(bytes: &[u8]) -> Option<Cached> {
    let cached: Cached = serde_json::from_slice(bytes).ok()?;
    (cached.version == VERSION).then_some(cached)
}

/// Reads any bytes as a remembered verdict; for a fuzzer.
pub(crate) fn fuzz_cache(bytes: &[u8]) {
    let _ = decode(bytes);
}

/// A device that stacks may lie over.
#[derive(Clone)]
pub struct Base {
    device: Arc<dyn BlockDevice>,
    root: Option<RootHash>,
    name: String,
    hashed: bool,
}

impl std::fmt::Debug for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Base({}, {} bytes, root {:?})", self.name, self.device.size(), self.root)
    }
}

impl Base {
    /// A file, whose root hash must be `wanted`; `now` is the time of day.
    ///
    /// # Errors
    /// If it cannot be read, changes meanwhile, or is another one.
    pub fn verified(path: &Path, wanted: RootHash, now: SystemTime) -> Result<Self, LayerError> {
        let base = Self::identified(path, now)?;
        match base.root {
            Some(found) if found == wanted => Ok(base),
            found => Err(LayerError::WrongBase {
                base: base.name,
                wanted: wanted.to_string(),
                found: found.map_or_else(|| "unknown".to_owned(), |root| root.to_string()),
            }),
        }
    }

    /// A file, and what its root hash is: to make the first stack over it.
    ///
    /// # Errors
    /// If it cannot be read or changes meanwhile.
    pub fn identified(path: &Path, now: SystemTime) -> Result<Self, LayerError> {
        let open = LayerError::io("open base", path);
        let device = FileDevice::open(path, FileMode::ReadOnly)
            .map_err(|error| open(io::Error::from(error)))?;
        let (root, hashed) =
            root_of(device.file(), path, now).map_err(LayerError::io("verify base", path))?;
        let name = path.display().to_string();
        Ok(Self { device: Arc::new(device), root: Some(root), name, hashed })
    }

    /// A device whose content was verified by other means (a store checks each block by its name),
    /// or cannot be (`root` is `None`, and then nobody can tell whether it is the right one).
    #[must_use]
    pub fn trusted(device: Arc<dyn BlockDevice>, name: &str, root: Option<RootHash>) -> Self {
        Self { device, root, name: name.to_owned(), hashed: false }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// Its root hash, if it is known.
    #[must_use]
    pub fn root(&self) -> Option<RootHash> {
        self.root
    }

    /// What it is called in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether its content was hashed to make this, and not remembered from an earlier time.
    #[must_use]
    pub fn was_hashed(&self) -> bool {
        self.hashed
    }
}

fn cache_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(CACHE_SUFFIX);
    PathBuf::from(name)
}

/// The root of an open file, and whether it had to be hashed.
fn root_of(file: &File, path: &Path, now: SystemTime) -> io::Result<(RootHash, bool)> {
    let before = Stamp::of(file)?;
    let cache = cache_path(path);
    let remembered = fs::metadata(&cache)
        .ok()
        .filter(|metadata| metadata.is_file() && metadata.len() <= MAX_CACHE)
        .and_then(|_| fs::read(&cache).ok())
        .and_then(|bytes| decode(&bytes));
    if let Some(remembered) = remembered.filter(|found| found.stamp == before) {
        return Ok((remembered.root, false));
    }
    // By the descriptor: what has the path's name may be another file by now.
    let root = hash_file(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))?;
    if Stamp::of(file)? != before {
        return Err(io::Error::other("it was changed while it was hashed; bases must not change"));
    }
    if before.is_settled(now)
        && let Err(error) = remember(&cache, &Cached { version: VERSION, stamp: before, root })
    {
        // A folder that is read-only: it is hashed again next time.
        tracing::debug!(%error, cache = %cache.display(), "cannot remember a base's hash");
    }
    Ok((root, true))
}

fn remember(cache: &Path, cached: &Cached) -> io::Result<()> {
    let name =
        cache.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidInput)?;
    let folder = crate::files::RealFolder::new(crate::files::folder_of(cache));
    let bytes = serde_json::to_vec(cached).expect("plain fields have a JSON form");
    crate::files::replace(&*folder, name, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_22_a_base_is_hashed_once_and_again_when_anything_about_it_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        fs::write(&path, b"the right base").unwrap();
        let root = crate::hash::hash_reader(&b"the right base"[..]).unwrap();
        let now = SystemTime::now();
        let later = now + Duration::from_secs(60);

        // Too fresh to be remembered.
        assert!(Base::verified(&path, root, now).unwrap().was_hashed());
        assert!(Base::verified(&path, root, later).unwrap().was_hashed());
        assert!(!Base::verified(&path, root, later).unwrap().was_hashed());

        // Other content of the same size, with the old time of change put back.
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, b"the wrong base").unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        let error = Base::verified(&path, root, later).unwrap_err();
        assert!(matches!(error, LayerError::WrongBase { .. }), "{error}");

        // Another file under the same name.
        let other = dir.path().join("other");
        fs::write(&other, b"the right base").unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(Base::verified(&path, root, later).unwrap().was_hashed());

        // Nonsense in the cache is no verdict.
        fs::write(cache_path(&path), b"{\"version\":1}").unwrap();
        assert!(Base::verified(&path, root, later).unwrap().was_hashed());
    }
}
