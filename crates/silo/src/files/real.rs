//! A folder of the file system.

use super::{Folder, Stored, is_unsupported, read_cached};
use crate::range::ZEROS;
use nix::fcntl::{FallocateFlags, fallocate};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// See the [module](self).
pub(crate) struct RealFolder(PathBuf);

impl RealFolder {
    /// The folder at `path`, which exists.
    pub(crate) fn new(path: &Path) -> Arc<Self> {
        Arc::new(Self(path.to_owned()))
    }
}

/// Locks an open file against other processes until it is closed; false if another one has it.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(fs::TryLockError::WouldBlock) => Ok(false),
        Err(fs::TryLockError::Error(error)) => Err(error),
    }
}

/// The file that keeps other processes out, made if it is not there; `None` if one of them is in.
pub(crate) fn lock(path: &Path) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).open(path)?;
    Ok(try_lock(&file)?.then_some(file))
}

/// A file, and whether its file system can tell what the cache holds.
struct RealFile(File, AtomicBool);

impl Folder for RealFolder {
    fn path(&self) -> &Path {
        &self.0
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Stored>> {
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(true).open(self.0.join(name))?;
        Ok(Arc::new(RealFile(file, AtomicBool::new(true))))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn Stored>> {
        let file = OpenOptions::new().read(true).write(true).open(self.0.join(name))?;
        Ok(Arc::new(RealFile(file, AtomicBool::new(true))))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.0.join(from), self.0.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.0.join(name))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }
}

impl RealFile {
    fn fallocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let flags = flags | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.0, flags, offset as i64, length as i64)?)
    }
}

impl Stored for RealFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        if self.1.load(Ordering::Relaxed) {
            match read_cached(&self.0, offset, buf) {
                Ok(count) => return Ok(count == Some(buf.len())),
                Err(_) => self.1.store(false, Ordering::Relaxed),
            }
        }
        self.read_at(buf, offset).map(|()| true)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.0.set_len(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        // The length is part of what fdatasync makes durable where reading needs it.
        self.0.sync_data()
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, length)
    }

    fn allocate_zeros(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, length) {
            Err(error) if is_unsupported(&error) => {
                let mut at = offset;
                while at < offset + length {
                    let part = (offset + length - at).min(ZEROS.len() as u64);
                    self.write_at(&ZEROS[..part as usize], at)?;
                    at += part;
                }
                Ok(())
            }
            other => other,
        }
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.blocks() * 512)
    }
}
