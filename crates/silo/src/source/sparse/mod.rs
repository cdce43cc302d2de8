//! A sparse device in one file: a log of blocks, each written behind the last.
//!
//! For devices of which little is written, on file systems without holes, and for copies that are
//! sent on: the file is as long as what was written.
//!
//! # What holds
//!
//! - A write is a whole block (a partial one is completed with what is there, zeros at first) with
//!   checksums, so after a crash a block is old or new and never torn.
//! - What was flushed is there after a crash. A flush syncs the log and then appends a mark that
//!   says up to where it is durable.
//! - Opening walks the log. Behind the last mark every record's bytes are checked, and the first bad
//!   one ends the log: nobody was told that it is durable. A bad record before the mark is damage,
//!   and an error that says where.
//! - Reading a whole block checks it.
//! - Blocks that were overwritten or trimmed take room until the log is written anew
//!   ([`SparseDevice::compact`]; a thread does it when a flush finds more dead than alive). Readers,
//!   writers and flushes go on meanwhile: see [`rewrite`].
//!
//! A log cannot hold room for writes to come: zeros that shall hold room are written as blocks.

mod device;
mod log;
mod record;
mod rewrite;
#[cfg(test)]
mod tests;

use super::SourceError;
use crate::{
    files::{Folder, RealFolder, folder_of},
    geometry::Geometry,
    io::{BlockDevice, Extent},
    map::MAX_BLOCKS,
};
use device::Inner;
use log::{Body, Log, Tail};
use record::{HEADER, Header, Kind, Walked};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

pub(crate) use record::fuzz_sparse;

/// Less than this is not worth writing a log anew for.
const MIN_DEAD: u64 = 64 << 20;

/// See the comment of its module. Dropping it ends a rewrite that is under way.
pub struct SparseDevice {
    inner: Arc<Inner>,
    /// Writes the log anew because a flush found that it is due.
    rewriter: Mutex<Option<JoinHandle<()>>>,
    stop: Arc<AtomicBool>,
}

impl std::fmt::Debug for SparseDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SparseDevice({}, {:?})", self.inner.path().display(), self.inner.geometry)
    }
}

fn split(path: &Path) -> Result<(Arc<dyn Folder>, String), SourceError> {
    let name = path.file_name().and_then(|name| name.to_str());
    let Some(name) = name else {
        let detail = "its name is no text".to_owned();
        return Err(SourceError::NotA { path: path.to_owned(), wanted: "a file", detail });
    };
    Ok((RealFolder::new(folder_of(path)), name.to_owned()))
}

/// One process at a time: the lock is beside the log, because the log is replaced.
fn lock(path: &Path) -> Result<File, SourceError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let at = PathBuf::from(name);
    let held = crate::files::lock(&at).map_err(SourceError::io("lock", &at))?;
    held.ok_or_else(|| SourceError::InUse { path: path.to_owned() })
}

impl SparseDevice {
    /// Makes an empty device of `bytes` bytes in blocks of `block` bytes.
    ///
    /// # Errors
    /// If there is a file already, the sizes are impossible, or it cannot be written.
    pub fn create(path: &Path, bytes: u64, block: u32) -> Result<Self, SourceError> {
        let (folder, name) = split(path)?;
        let held = lock(path)?;
        if path.exists() {
            return Err(SourceError::Exists { path: path.to_owned() });
        }
        Self::create_in(folder, &name, bytes, block, Some(held))
    }

    fn create_in(
        folder: Arc<dyn Folder>,
        name: &str,
        bytes: u64,
        block: u32,
        held: Option<File>,
    ) -> Result<Self, SourceError> {
        let geometry = Geometry::new(bytes, block)?;
        let path = folder.path().join(name);
        if geometry.blocks() > MAX_BLOCKS {
            let (wanted, detail) = ("a size for a sparse device", record::TOO_MANY.to_owned());
            return Err(SourceError::NotA { path, wanted, detail });
        }
        let instance = getrandom::u64().map_err(|error| {
            SourceError::io("draw random bytes for", &path)(io::Error::other(error.to_string()))
        })?;
        let header = Header { geometry, instance, generation: 1 };
        crate::files::replace(&*folder, name, &header.encode())
            .map_err(SourceError::io("create", &path))?;
        let file = folder.open(name).map_err(SourceError::io("open", &path))?;
        let body = Body::new(file, geometry.blocks());
        Ok(Self::of(Inner::new(folder, name, body, Log::new(Tail::new(header)), held)))
    }

    /// Opens a device; what a crash tore off the end of its log is dropped.
    ///
    /// # Errors
    /// If it is no such file, is open elsewhere, or is damaged before what was flushed last.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let (folder, name) = split(path)?;
        fs::metadata(path).map_err(SourceError::io("open", path))?;
        let held = lock(path)?;
        Self::open_in(folder, &name, Some(held))
    }

    fn open_in(
        folder: Arc<dyn Folder>,
        name: &str,
        held: Option<File>,
    ) -> Result<Self, SourceError> {
        let path = folder.path().join(name);
        let file = folder.open(name).map_err(SourceError::io("open", &path))?;
        let length = file.len().map_err(SourceError::io("inspect", &path))?;
        let Walked { header, records, end, sequence } = record::walk(&*file, length, &path)?;
        if end < length {
            tracing::info!(
                file = %path.display(),
                bytes = length - end,
                "dropped the torn end of a sparse device's log"
            );
            file.set_len(end)
                .and_then(|()| file.sync())
                .map_err(SourceError::io("cut the torn end of", &path))?;
        }
        // A new log that a crash kept from getting the name; mostly there is none.
        let _ = folder.remove(&Inner::fresh_name(name));
        let geometry = header.geometry;
        let body = Body::new(file, geometry.blocks());
        for (kind, block, count, at) in records {
            match kind {
                Kind::Data => {
                    body.set(block, at);
                }
                Kind::Zero => {
                    for block in block..block + count {
                        body.set(block, 0);
                    }
                }
                Kind::Mark => {}
            }
        }
        let dead = (end - HEADER as u64).saturating_sub(body.live(geometry));
        let mut log = Log::new(Tail { header, end, sequence, dead });
        // What the process before this one wrote may not be durable.
        (log.unmarked, log.name_unsynced) = (true, true);
        Ok(Self::of(Inner::new(folder, name, body, log, held)))
    }

    fn of(inner: Inner) -> Self {
        Self { inner: Arc::new(inner), rewriter: Mutex::default(), stop: Arc::default() }
    }

    /// Size of the device and of its blocks.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.inner.geometry
    }

    /// Length of the file in bytes, and how many of them nobody needs.
    #[must_use]
    pub fn log_bytes(&self) -> (u64, u64) {
        let log = self.inner.log();
        (log.tail.end, log.tail.dead)
    }

    /// Writes the log anew, with what is needed only; durable on return. Readers and writers go on.
    ///
    /// # Errors
    /// If there is no room for a second log, or a file fails; then the old log stays in use.
    pub fn compact(&self) -> io::Result<()> {
        self.inner.rewrite(&self.stop)
    }

    /// Has the log written anew if that is due and nobody does it.
    fn compact_if_due(&self) {
        let (end, dead) = self.log_bytes();
        if dead <= MIN_DEAD || dead <= end - dead {
            return;
        }
        let mut rewriter = self.rewriter.lock().unwrap_or_else(PoisonError::into_inner);
        if rewriter.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        let (inner, stop) = (self.inner.clone(), self.stop.clone());
        let run = move || {
            // What was flushed is durable; the next flush tries again.
            if let Err(error) = inner.rewrite(&stop) {
                let file = inner.path();
                tracing::warn!(%error, file = %file.display(), "a log was not written anew");
            }
        };
        match thread::Builder::new().name("silo-sparse".to_owned()).spawn(run) {
            Ok(thread) => *rewriter = Some(thread),
            Err(error) => tracing::warn!(%error, "no thread to write a log anew"),
        }
    }
}

impl Drop for SparseDevice {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let rewriter = self.rewriter.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = rewriter {
            // It looks at `stop` between slices; a panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl BlockDevice for SparseDevice {
    fn size(&self) -> u64 {
        self.inner.geometry.bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buf)
    }

    fn may_wait(&self, _offset: u64, _length: u64) -> bool {
        false
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write_at(offset, data)
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()?;
        self.compact_if_due();
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.trim(offset, length)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.inner.zero(offset, length, allocate)
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        self.inner.extents(offset, length)
    }
}
