//! Checks that a package is what was built, byte by byte, and remembers what was checked.
//!
//! A hash is remembered in the cache of this host, never beside the package, by device, inode,
//! length, modification and change time of the file. The change time cannot be set by a user, so
//! an edit that restores the modification time is seen.

use super::{
    cache::Cache,
    error::{Attempt, PackageError, Result},
    files,
    manifest::{Blake3, FileEntry},
};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime},
};

/// A file that changed less than this before it was hashed is not remembered: a second change
/// could carry the same time stamp.
const SETTLED: Duration = Duration::from_millis(100);

/// What a verification did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Files checked.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that had to be hashed; the rest was known from before.
    pub hashed_bytes: u64,
}

/// What identifies the content of a file without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    stamp: Stamp,
    blake3: Blake3,
}

impl Stamp {
    fn of(facts: &fs::Metadata) -> Self {
        Self {
            device: facts.dev(),
            inode: facts.ino(),
            bytes: facts.size(),
            modified: (facts.mtime(), facts.mtime_nsec()),
            changed: (facts.ctime(), facts.ctime_nsec()),
        }
    }

    fn settled(&self) -> bool {
        let changed = Duration::new(self.changed.0.max(0) as u64, self.changed.1 as u32);
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH + changed)
            .is_ok_and(|age| age > SETTLED)
    }
}

/// Checks that a file of a package is there and as long as its manifest says.
pub(super) fn check_size(package: &Path, entry: &FileEntry) -> Result<()> {
    let path = package.join(&entry.file);
    let facts = match fs::symlink_metadata(&path) {
        Ok(facts) => facts,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(PackageError::Missing {
                package: package.to_owned(),
                file: entry.file.clone(),
            });
        }
        Err(error) => return Err(error).attempt(|| format!("looking at {}", path.display())),
    };
    if !facts.is_file() {
        return Err(PackageError::Foreign {
            path: package.to_owned(),
            why: format!("its {} is not a regular file", entry.file),
        });
    }
    if facts.size() != entry.bytes {
        return Err(PackageError::WrongSize {
            package: package.to_owned(),
            file: entry.file.clone(),
            expected: entry.bytes,
            found: facts.size(),
        });
    }
    Ok(())
}

/// Checks the content of all files.
pub(super) fn verify(package: &Path, entries: &[FileEntry], cache: &Cache) -> Result<Verified> {
    let mut done = Verified::default();
    for entry in entries {
        check_size(package, entry)?;
        let (found, hashed) = hash_remembered(&package.join(&entry.file), cache)?;
        if found != entry.blake3 {
            return Err(PackageError::Tampered {
                package: package.to_owned(),
                file: entry.file.clone(),
                expected: entry.blake3.to_string(),
                found: found.to_string(),
            });
        }
        done.files += 1;
        done.bytes += entry.bytes;
        done.hashed_bytes += hashed;
    }
    Ok(done)
}

/// The hash of a file, and how many bytes were read for it. A cache that cannot be used costs
/// time, never the answer.
pub(super) fn hash_remembered(path: &Path, cache: &Cache) -> Result<(Blake3, u64)> {
    let look = || {
        let facts = fs::metadata(path).attempt(|| format!("looking at {}", path.display()))?;
        Ok::<_, PackageError>(Stamp::of(&facts))
    };
    let stamp = look()?;
    let memory = cache
        .dir("verified")
        .inspect_err(|error| tracing::debug!(%error, "no memory of verified files"))
        .map(|dir| dir.join(format!("{:x}-{:x}.json", stamp.device, stamp.inode)));
    if let Ok(memory) = &memory
        && let Ok(text) = fs::read(memory)
        && let Ok(known) = serde_json::from_slice::<Remembered>(&text)
        && known.stamp == stamp
    {
        return Ok((known.blake3, 0));
    }
    let settled = stamp.settled();
    let (blake3, bytes) = files::hash_file(path)?;
    if let Ok(memory) = &memory
        && settled
        && look()? == stamp
    {
        let text = serde_json::to_vec(&Remembered { stamp, blake3 })
            .expect("numbers and hashes always serialise");
        if let Err(error) = files::write_atomically(memory, &text) {
            tracing::debug!(%error, "verified hash not remembered");
        }
    }
    Ok((blake3, bytes))
}
