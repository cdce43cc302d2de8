//! A device that is one file of the same size: an image, or a real block device.
//!
//! The file's size is fixed when it is opened; a file that somebody cuts afterwards gives errors,
//! not zeros. A failed sync stays failed ([`AfterFailure::Sticky`]).

use super::SourceError;
use crate::{
    files::{extents_of, folder_of, is_unsupported, read_cached, try_lock},
    io::{BlockDevice, Extent},
    range::{ZEROS, check, refuse_write},
    shared_sync::{AfterFailure, SharedSync},
};
use nix::fcntl::{FallocateFlags, fallocate};
use std::{
    fs::{File, OpenOptions},
    io::{self, Seek as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

/// Longest wait for a sync that another thread runs.
const SYNC_LIMIT: Duration = Duration::from_secs(3600);

/// Whether a file may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileMode {
    /// Opened for reading; writes are refused.
    ReadOnly,
    /// Opened for both, and locked against a second process that would write.
    ReadWrite,
}

/// See the comment of its module.
pub struct FileDevice {
    file: File,
    path: PathBuf,
    bytes: u64,
    mode: FileMode,
    sync: SharedSync,
    /// The file system can tell what its cache holds.
    cache_tells: AtomicBool,
}

impl std::fmt::Debug for FileDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileDevice({}, {} bytes, {:?})", self.path.display(), self.bytes, self.mode)
    }
}

impl FileDevice {
    /// Makes a file of `bytes` bytes that takes no room yet.
    ///
    /// # Errors
    /// If there is a file already, or it cannot be made.
    pub fn create(path: &Path, bytes: u64) -> Result<Self, SourceError> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = match file {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(SourceError::Exists { path: path.to_owned() });
            }
            other => other.map_err(SourceError::io("create", path))?,
        };
        file.set_len(bytes).map_err(SourceError::io("set the size of", path))?;
        // Its name too: a flush promises that the content is found again.
        File::open(folder_of(path))
            .and_then(|folder| folder.sync_all())
            .map_err(SourceError::io("sync the folder of", path))?;
        Self::with(file, path, FileMode::ReadWrite)
    }

    /// Opens a file, or a block device of the kernel; its size now is the device's size.
    ///
    /// # Errors
    /// If it cannot be opened, is no file, or is open for writing elsewhere.
    pub fn open(path: &Path, mode: FileMode) -> Result<Self, SourceError> {
        let file = OpenOptions::new()
            .read(true)
            .write(mode == FileMode::ReadWrite)
            .open(path)
            .map_err(SourceError::io("open", path))?;
        Self::with(file, path, mode)
    }

    /// Takes a file that is open; `path` is for messages.
    ///
    /// # Errors
    /// As [`FileDevice::open`].
    pub fn with(mut file: File, path: &Path, mode: FileMode) -> Result<Self, SourceError> {
        let inspect = SourceError::io("inspect", path);
        let kind = file.metadata().map_err(inspect)?.file_type();
        let block = std::os::unix::fs::FileTypeExt::is_block_device(&kind);
        if !kind.is_file() && !block {
            let detail = "it is a folder, a pipe or the like".to_owned();
            return Err(SourceError::NotA {
                path: path.to_owned(),
                wanted: "a file or a block device",
                detail,
            });
        }
        if mode == FileMode::ReadWrite && !try_lock(&file).map_err(SourceError::io("lock", path))? {
            return Err(SourceError::InUse { path: path.to_owned() });
        }
        // Not the metadata's length, which is 0 for block devices.
        let bytes = file.seek(io::SeekFrom::End(0)).map_err(SourceError::io("measure", path))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            bytes,
            mode,
            sync: SharedSync::new(AfterFailure::Sticky, SYNC_LIMIT),
            cache_tells: AtomicBool::new(true),
        })
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn named(&self, operation: &'static str) -> impl FnOnce(io::Error) -> io::Error {
        move |source| SourceError::io(operation, &self.path)(source).into()
    }

    fn writable(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.bytes, offset, length)?;
        match self.mode {
            FileMode::ReadWrite => Ok(()),
            FileMode::ReadOnly => refuse_write(&self.path.display().to_string()),
        }
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        let keep = flags | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, keep, offset as i64, length as i64)?)
    }

    fn write_zeros(&self, mut at: u64, end: u64) -> io::Result<()> {
        while at < end {
            let length = (end - at).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..length as usize], at)?;
            at += length;
        }
        Ok(())
    }
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check(self.bytes, offset, buf.len() as u64)?;
        self.file.read_exact_at(buf, offset).map_err(self.named("read"))
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        check(self.bytes, offset, buf.len() as u64)?;
        if self.cache_tells.load(Ordering::Relaxed) {
            match read_cached(&self.file, offset, buf) {
                Ok(Some(count)) if count == buf.len() => return Ok(true),
                Ok(_) => return Ok(false),
                Err(_) => self.cache_tells.store(false, Ordering::Relaxed),
            }
        }
        // A file system in memory or a rare one: just read.
        self.read_at(offset, buf).map(|()| true)
    }

    fn may_wait(&self, _offset: u64, _length: u64) -> bool {
        false
    }

    fn file_range(&self, offset: u64, length: u64, write: bool) -> Option<(BorrowedFd<'_>, u64)> {
        let allowed = !write || self.mode == FileMode::ReadWrite;
        (allowed && check(self.bytes, offset, length).is_ok()).then(|| (self.file.as_fd(), offset))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writable(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset).map_err(self.named("write"))
    }

    fn flush(&self) -> io::Result<()> {
        match self.mode {
            FileMode::ReadOnly => Ok(()),
            FileMode::ReadWrite => {
                self.sync.run(|| self.file.sync_data().map_err(self.named("sync")))
            }
        }
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.writable(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        match self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, length) {
            // No room is freed, and nothing else was promised.
            Err(error) if is_unsupported(&error) => Ok(()),
            other => other.map_err(self.named("punch a hole into")),
        }
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.writable(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let flags = match allocate {
            true => FallocateFlags::FALLOC_FL_ZERO_RANGE,
            false => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
        };
        match self.fallocate(flags, offset, length) {
            Err(error) if is_unsupported(&error) => self.write_zeros(offset, offset + length),
            other => other,
        }
        .map_err(self.named("make zeros in"))
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        check(self.bytes, offset, length)?;
        extents_of(&self.file, offset, length).map_err(self.named("find holes in"))
    }

    fn is_read_only(&self) -> bool {
        self.mode == FileMode::ReadOnly
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_cut_gives_an_error_that_names_it_and_no_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let device = FileDevice::create(&path, 10_000).unwrap();
        device.write_at(9_000, &[1; 1000]).unwrap();
        device.file().set_len(9_500).unwrap();
        let error = device.read_at(9_000, &mut [0; 1000]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("disk"), "{error}");
    }

    #[test]
    fn one_writer_at_a_time_and_read_only_means_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let device = FileDevice::create(&path, 4096).unwrap();
        assert!(matches!(FileDevice::create(&path, 1), Err(SourceError::Exists { .. })));
        let second = FileDevice::open(&path, FileMode::ReadWrite);
        assert!(matches!(second, Err(SourceError::InUse { .. })));
        let reader = FileDevice::open(&path, FileMode::ReadOnly).unwrap();
        device.write_at(0, b"hello").unwrap();
        let mut buf = [0; 5];
        reader.read_at(0, &mut buf).unwrap();
        assert_eq!(&buf, b"hello");
        for result in [reader.write_at(0, b"x"), reader.trim(0, 1), reader.zero(0, 1, true)] {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
        assert!(FileDevice::open(dir.path(), FileMode::ReadOnly).is_err());
    }

    #[test]
    fn trim_gives_room_back() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let device = FileDevice::create(&dir.path().join("disk"), 4 << 20).unwrap();
        device.write_at(0, &vec![1; 4 << 20]).unwrap();
        device.flush().unwrap();
        let before = device.file().metadata().unwrap().blocks();
        device.trim(0, 3 << 20).unwrap();
        device.flush().unwrap();
        let after = device.file().metadata().unwrap().blocks();
        assert!(after * 3 < before, "{before} {after}");
    }
}
