//! The folder in which builds keep what they can use again.
//!
//! Everything in it is named by the hash of its content or of its inputs and appears by a rename,
//! so that processes may share a cache, and may die in the middle; it can be deleted at any time.
//!
//! ```text
//! debs/SHA256.deb         Debian packages
//! apt/                    apt's own caches, away from the host's
//! resolved/KEY.json       answers of apt, by package lists and request
//! kernels/KEY/            kernel and modules, extracted
//! builds/KEY/             finished packages by their inputs
//! unpacked/HASH/          unpacked archives by their content
//! verified/DEV-INODE.json hashes of files already checked
//! tmp/                    under construction
//! ```

use super::error::{Attempt, PackageError, Result};
use super::files;
use nix::fcntl::{Flock, FlockArg};
use std::{
    env, fs,
    fs::File,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Names the cache where no flag does.
pub const CACHE_VARIABLE: &str = "DRAFTER_CACHE";

/// How long one build waits for another of the same thing.
const LOCK_LIMIT: Duration = Duration::from_secs(600);

/// A folder with what builds can use again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// A cache in `root`, made when first needed.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The user's cache: `$DRAFTER_CACHE`, else `drafter` in `$XDG_CACHE_HOME` or `~/.cache`, else
    /// `/var/cache/drafter`.
    #[must_use]
    pub fn default_for_user() -> Self {
        let dir = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = dir(CACHE_VARIABLE)
            .or_else(|| dir("XDG_CACHE_HOME").map(|base| base.join("drafter")))
            .or_else(|| dir("HOME").map(|home| home.join(".cache/drafter")))
            .unwrap_or_else(|| PathBuf::from("/var/cache/drafter"));
        Self::at(root)
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A folder of the cache, which exists after this.
    pub(crate) fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root.join(name);
        files::make_dir(&dir)?;
        dir.canonicalize().attempt(|| format!("looking at {}", dir.display()))
    }

    /// A folder for something under construction, removed when dropped.
    pub(crate) fn scratch(&self) -> Result<tempfile::TempDir> {
        let dir = self.dir("tmp")?;
        tempfile::TempDir::new_in(&dir)
            .attempt(|| format!("creating a directory in {}", dir.display()))
    }

    /// The folder `kind/key`: as it is, or made by `make`, which fills an empty folder. Of several
    /// processes that ask at once, one makes it and the others wait.
    pub(crate) fn folder(
        &self,
        kind: &str,
        key: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<(PathBuf, Origin)> {
        let place = self.dir(kind)?.join(key);
        if place.is_dir() {
            return Ok((place, Origin::Cache));
        }
        let _lock = self.lock(&format!("{kind}-{key}"))?;
        if place.is_dir() {
            return Ok((place, Origin::Cache));
        }
        let scratch = self.scratch()?;
        let work = scratch.path().join("out");
        files::make_dir(&work)?;
        make(&work)?;
        fs::rename(&work, &place).attempt(|| format!("moving a finished {}", place.display()))?;
        Ok((place, Origin::Made))
    }

    /// Waits for the lock `name`; it is released when dropped, also by a crash.
    pub(crate) fn lock(&self, name: &str) -> Result<Flock<File>> {
        let path = self.dir("locks")?.join(name);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .attempt(|| format!("opening {}", path.display()))?;
        let begin = Instant::now();
        let mut file = file;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((back, nix::errno::Errno::EWOULDBLOCK)) => file = back,
                Err((_, errno)) => {
                    return Err(errno).attempt(|| format!("locking {}", path.display()));
                }
            }
            if begin.elapsed() > LOCK_LIMIT {
                return Err(PackageError::Timeout {
                    operation: format!("another process that holds {}", path.display()),
                    limit: LOCK_LIMIT,
                    hint: "see whether it hangs (`fuser` names it) and end it".to_owned(),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Where something came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// It was there.
    Cache,
    /// It was made now.
    Made,
}
