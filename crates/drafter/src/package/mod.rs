//! Packages: what a machine boots from.
//!
//! A package is a directory (or the same as one `.tar.zst`, see [`archive`]):
//!
//! ```text
//! manifest.json    see [`manifest`]
//! kernel           ELF
//! initramfs.cpio   uncompressed: drafter-guest as /init, modules in /modules, their order in
//!                  /modules/order
//! root.ext4        read-only base of the first disk
//! ```
//!
//! [`build()`] makes one from Debian packages, a directory or an OCI image layout; a machine's runner
//! opens it with [`Package::open`] and checks it with [`Package::verify`]; a destination compares
//! [`Package::id`] with what the source runs.
//!
//! What must hold: a package never changes after it was built; the same inputs give the same
//! bytes; nothing in a package is trusted before it was verified, and nothing that comes from
//! outside names a path outside the package's directory.

pub mod archive;
pub mod build;
mod cache;
mod compression;
mod error;
mod files;
pub mod manifest;
mod verify;

pub use build::{BuildRequest, Built, Progress, build};
pub use cache::{CACHE_VARIABLE, Cache, Origin};
pub use error::{PackageError, Result};
pub use manifest::{Blake3, Manifest, PackageId};
pub use verify::Verified;

use error::Attempt as _;
use manifest::{MANIFEST_FILE, MAX_MANIFEST_BYTES};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// An opened package: its manifest is valid and all its files are there with their lengths. Their
/// content is known to be right only after [`Package::verify`].
#[derive(Clone, Debug)]
pub struct Package {
    dir: PathBuf,
    manifest: Manifest,
    id: PackageId,
}

impl Package {
    /// Opens a package directory, or a `.tar.zst`, which is unpacked into the user's cache.
    ///
    /// # Errors
    /// Says whether it is foreign, of a newer format, incomplete, truncated or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, &Cache::default_for_user())
    }

    /// As [`Package::open`], with another cache.
    ///
    /// # Errors
    /// As [`Package::open`].
    pub fn open_with(path: &Path, cache: &Cache) -> Result<Self> {
        let facts = fs::metadata(path).attempt(|| format!("opening package {}", path.display()))?;
        if facts.is_dir() {
            return Self::open_dir(path);
        }
        if !facts.is_file() {
            return Err(PackageError::Foreign {
                path: path.to_owned(),
                why: "it is neither a directory nor a file".to_owned(),
            });
        }
        archive::open_cached(path, cache)
    }

    fn open_dir(dir: &Path) -> Result<Self> {
        let dir = dir.canonicalize().attempt(|| format!("opening package {}", dir.display()))?;
        let path = dir.join(MANIFEST_FILE);
        if !path.exists() {
            return Err(PackageError::Foreign {
                path: dir,
                why: format!("it has no {MANIFEST_FILE}"),
            });
        }
        let text = files::read_bounded(&path, MAX_MANIFEST_BYTES)?;
        let (manifest, id) = Manifest::from_json(&text, &dir)?;
        for entry in manifest.files() {
            verify::check_size(&dir, &entry)?;
        }
        Ok(Self { dir, manifest, id })
    }

    /// Checks the content of every file against the manifest. What was checked before and has not
    /// changed since is not read again.
    ///
    /// # Errors
    /// Names the first file that is not what was built.
    pub fn verify(&self, cache: &Cache) -> Result<Verified> {
        verify::verify(&self.dir, &self.manifest.files(), cache)
    }

    /// Its directory, absolute.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its identity: equal on two hosts exactly if everything in it is equal.
    #[must_use]
    pub fn id(&self) -> PackageId {
        self.id
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(&self.manifest.kernel.file)
    }

    /// The initramfs.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join(&self.manifest.initramfs.file)
    }

    /// The base of the disk `name`.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<PathBuf> {
        let device = self.manifest.devices.iter().find(|device| device.name == name)?;
        Some(self.dir.join(&device.file))
    }

    /// Bytes of all files, and those that they take on disk (they have holes).
    ///
    /// # Errors
    /// When a file cannot be looked at.
    pub fn sizes(&self) -> Result<(u64, u64)> {
        self.manifest.files().iter().try_fold((0, 0), |(bytes, taken), entry| {
            Ok((bytes + entry.bytes, taken + files::allocated(&self.dir.join(&entry.file))?))
        })
    }
}

#[cfg(test)]
mod tests;
