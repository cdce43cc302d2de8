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
//!   ([`SparseDevice::compact`]; a flush does it when more is dead than alive). Readers go on
//!   meanwhile, writers wait.
//!
//! A log cannot hold room for writes to come: zeros that shall hold room are written as blocks.

mod record;
#[cfg(test)]
mod tests;

use super::SourceError;
use crate::{
    block::{BlockIndex, BlockRange},
    files::{Folder, RealFolder, Stored, folder_of},
    geometry::Geometry,
    io::{Allocation, BlockDevice, Extent},
    locks::{RangeLocks, Who},
    map::MAX_BLOCKS,
    range::{add_extent, check, parts},
    shared_sync::{AfterFailure, SharedSync},
};
use record::{HEADER, Header, Kind, RECORD, Record};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

pub(crate) use record::fuzz_sparse;

/// Longest wait for a sync that another thread runs.
const SYNC_LIMIT: Duration = Duration::from_secs(3600);
/// Less than this is not worth writing a log anew for.
const MIN_DEAD: u64 = 64 << 20;

/// Where the log ends, and what is in it.
struct Log {
    header: Header,
    end: u64,
    sequence: u64,
    /// Bytes of records that nobody needs any more.
    dead: u64,
    /// Appended since the last mark.
    unmarked: bool,
    /// The log was replaced, and a crash could bring the old one back.
    name_unsynced: bool,
}

/// See the comment of its module.
pub struct SparseDevice {
    folder: Arc<dyn Folder>,
    name: String,
    geometry: Geometry,
    /// Exchanged, with the index, when the log was written anew.
    file: RwLock<Arc<dyn Stored>>,
    /// Per block, where its record begins; 0: zeros.
    index: Box<[AtomicU64]>,
    log: Mutex<Log>,
    locks: RangeLocks,
    sync: SharedSync,
    _lock: Option<File>,
}

impl std::fmt::Debug for SparseDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SparseDevice({}, {:?})", self.path().display(), self.geometry)
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
        let log = Log {
            header,
            end: HEADER as u64,
            sequence: 0,
            dead: 0,
            unmarked: false,
            name_unsynced: false,
        };
        Ok(Self::assemble(folder, name, file, log, held))
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
        let walked = record::walk(&*file, length, &path)?;
        if walked.end < length {
            tracing::info!(
                file = %path.display(),
                bytes = length - walked.end,
                "dropped the torn end of a sparse device's log"
            );
            file.set_len(walked.end)
                .and_then(|()| file.sync())
                .map_err(SourceError::io("cut the torn end of", &path))?;
        }
        let log = Log {
            header: walked.header,
            end: walked.end,
            sequence: walked.sequence,
            dead: 0,
            // What the process before this one wrote may not be durable.
            unmarked: true,
            name_unsynced: true,
        };
        let device = Self::assemble(folder, name, file, log, held);
        for (kind, block, count, at) in walked.records {
            match kind {
                Kind::Data => device.index[block as usize].store(at, Ordering::Relaxed),
                Kind::Zero => {
                    for slot in &device.index[block as usize..(block + count) as usize] {
                        slot.store(0, Ordering::Relaxed);
                    }
                }
                Kind::Mark => {}
            }
        }
        let mut log = device.log();
        log.dead = (log.end - HEADER as u64).saturating_sub(device.live());
        drop(log);
        Ok(device)
    }

    fn assemble(
        folder: Arc<dyn Folder>,
        name: &str,
        file: Arc<dyn Stored>,
        log: Log,
        held: Option<File>,
    ) -> Self {
        let geometry = log.header.geometry;
        Self {
            folder,
            name: name.to_owned(),
            geometry,
            file: RwLock::new(file),
            index: (0..geometry.blocks()).map(|_| AtomicU64::new(0)).collect(),
            log: Mutex::new(log),
            locks: RangeLocks::new(false),
            sync: SharedSync::new(AfterFailure::Sticky, SYNC_LIMIT),
            _lock: held,
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // Changed only after the file was, field by field.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self) -> Arc<dyn Stored> {
        self.file.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn at(&self, block: u64) -> u64 {
        self.index[block as usize].load(Ordering::Acquire)
    }

    fn record_bytes(&self, block: u64) -> u64 {
        RECORD as u64 + self.geometry.length(BlockIndex(block))
    }

    /// Bytes of the records that are needed.
    fn live(&self) -> u64 {
        let held = (0..self.geometry.blocks()).filter(|block| self.at(*block) != 0);
        held.map(|block| self.record_bytes(block)).sum()
    }

    /// Size of the device and of its blocks.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Length of the file in bytes, and how many of them nobody needs.
    #[must_use]
    pub fn log_bytes(&self) -> (u64, u64) {
        let log = self.log();
        (log.end, log.dead)
    }

    /// Appends a record; where it begins. On an error the log is as it was.
    fn append(&self, log: &mut Log, record: &Record, data: &[u8]) -> io::Result<u64> {
        let mut bytes = Vec::with_capacity(RECORD + data.len());
        bytes.extend_from_slice(&record.encode(&log.header, log.sequence + 1, data));
        bytes.extend_from_slice(data);
        let (file, at) = (self.file(), log.end);
        if let Err(error) = file.write_at(&bytes, at) {
            // What of it is there is behind the end, and is cut off or written over.
            let _ = file.set_len(at);
            return Err(SourceError::io("append to", &self.path())(error).into());
        }
        log.end += bytes.len() as u64;
        log.sequence += 1;
        log.unmarked = true;
        Ok(at)
    }

    fn append_block(&self, block: u64, data: &[u8]) -> io::Result<()> {
        let mut log = self.log();
        let at = self.append(&mut log, &Record { kind: Kind::Data, block, count: 1 }, data)?;
        if self.index[block as usize].swap(at, Ordering::AcqRel) != 0 {
            log.dead += self.record_bytes(block);
        }
        Ok(())
    }

    fn append_zeros(&self, range: BlockRange) -> io::Result<()> {
        let held = (range.start.0..range.end()).filter(|block| self.at(*block) != 0).count();
        if held == 0 {
            return Ok(());
        }
        let mut log = self.log();
        let record = Record { kind: Kind::Zero, block: range.start.0, count: range.count };
        self.append(&mut log, &record, &[])?;
        log.dead += RECORD as u64;
        for block in range.start.0..range.end() {
            if self.index[block as usize].swap(0, Ordering::AcqRel) != 0 {
                log.dead += self.record_bytes(block);
            }
        }
        Ok(())
    }

    /// Reads part of a block; a whole one is checked.
    fn read_block(&self, block: u64, within: u64, buf: &mut [u8]) -> io::Result<()> {
        // Held over the read: the index goes with the file.
        let file = self.file.read().unwrap_or_else(PoisonError::into_inner);
        let at = self.at(block);
        if at == 0 {
            buf.fill(0);
            return Ok(());
        }
        let named = |error| io::Error::from(SourceError::io("read", &self.path())(error));
        file.read_at(buf, at + RECORD as u64 + within).map_err(named)?;
        if buf.len() as u64 == self.geometry.length(BlockIndex(block)) {
            let mut head = [0; RECORD];
            file.read_at(&mut head, at).map_err(named)?;
            if !record::data_matches(&head, buf) {
                let detail = format!("block {block} does not match its checksum; restore it");
                return Err(SourceError::Corrupt { path: self.path(), at, detail }.into());
            }
        }
        Ok(())
    }

    fn write_part(&self, block: u64, within: u64, data: &[u8]) -> io::Result<()> {
        let _guard = self.locks.lock(BlockRange::new(block, 1), Who::Guest)?;
        let length = self.geometry.length(BlockIndex(block));
        if data.len() as u64 == length {
            return self.append_block(block, data);
        }
        let mut whole = vec![0; length as usize];
        self.read_block(block, 0, &mut whole)?;
        whole[within as usize..][..data.len()].copy_from_slice(data);
        self.append_block(block, &whole)
    }

    fn sync_log(&self) -> io::Result<()> {
        let (end, unmarked, generation) = {
            let mut log = self.log();
            self.sync_name(&mut log)?;
            (log.end, log.unmarked, log.header.generation)
        };
        if !unmarked {
            return Ok(());
        }
        self.file().sync().map_err(SourceError::io("sync", &self.path()))?;
        let mut log = self.log();
        if log.header.generation != generation {
            // Written anew meanwhile, durably, with all that was appended before. `end` is a place in
            // the old log: a mark with it would call durable what was appended to the new one since.
            return self.sync_name(&mut log);
        }
        let mark = Record { kind: Kind::Mark, block: end, count: 0 };
        let more = log.end > end;
        // A log without this mark is as good, and longer to open.
        if self.append(&mut log, &mark, &[]).is_ok() {
            log.dead += RECORD as u64;
            log.unmarked = more;
        }
        Ok(())
    }

    /// Writes the log anew, with what is needed only; durable on return. Writers wait.
    ///
    /// # Errors
    /// If there is no room for a second log, or a file fails; then the old log stays in use.
    pub fn compact(&self) -> io::Result<()> {
        let path = self.path();
        let mut log = self.log();
        let header = Header { generation: log.header.generation.wrapping_add(1), ..log.header };
        let fresh_name = format!("{}.new", self.name);
        let fresh =
            self.copy_alive(header, &fresh_name).map_err(SourceError::io("write anew", &path))?;
        self.folder.rename(&fresh_name, &self.name).map_err(SourceError::io("replace", &path))?;
        let mut file = self.file.write().unwrap_or_else(PoisonError::into_inner);
        *file = fresh.file;
        for (block, at) in fresh.moved {
            self.index[block as usize].store(at, Ordering::Release);
        }
        drop(file);
        let (end, sequence, dead) = (fresh.end, fresh.sequence, RECORD as u64);
        *log = Log { header, end, sequence, dead, unmarked: false, name_unsynced: true };
        // If it fails, the next sync of the folder may succeed without the new name.
        self.sync_name(&mut log).inspect_err(|error| self.sync.lose(error))
    }

    /// Makes durable which file has the name. Until that is done nothing else is.
    fn sync_name(&self, log: &mut Log) -> io::Result<()> {
        if log.name_unsynced {
            self.folder.sync().map_err(SourceError::io("sync the folder of", &self.path()))?;
            log.name_unsynced = false;
        }
        Ok(())
    }

    /// Writes what is needed into a new log, durably.
    fn copy_alive(&self, header: Header, name: &str) -> io::Result<Fresh> {
        let old = self.file();
        let file = self.folder.create(name)?;
        let mut fresh = Fresh { file, moved: Vec::new(), end: HEADER as u64, sequence: 0 };
        fresh.file.write_at(&header.encode(), 0)?;
        let mut buf = vec![0; RECORD + self.geometry.block() as usize];
        for block in 0..self.geometry.blocks() {
            let at = self.at(block);
            if at == 0 {
                continue;
            }
            let length = self.record_bytes(block) as usize;
            old.read_at(&mut buf[..length], at)?;
            let (head, data) = buf[..length].split_at_mut(RECORD);
            let old_head: [u8; RECORD] = (&*head).try_into().expect("split there");
            if !record::data_matches(&old_head, data) {
                let text = format!("block {block} does not match its checksum");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            fresh.sequence += 1;
            let record = Record { kind: Kind::Data, block, count: 1 };
            head.copy_from_slice(&record.encode(&header, fresh.sequence, data));
            fresh.file.write_at(&buf[..length], fresh.end)?;
            fresh.moved.push((block, fresh.end));
            fresh.end += length as u64;
        }
        fresh.file.sync()?;
        fresh.sequence += 1;
        let mark = Record { kind: Kind::Mark, block: fresh.end, count: 0 };
        fresh.file.write_at(&mark.encode(&header, fresh.sequence, &[]), fresh.end)?;
        fresh.end += RECORD as u64;
        fresh.file.sync()?;
        Ok(fresh)
    }
}

/// A log that was written anew.
struct Fresh {
    file: Arc<dyn Stored>,
    moved: Vec<(u64, u64)>,
    end: u64,
    sequence: u64,
}

impl BlockDevice for SparseDevice {
    fn size(&self) -> u64 {
        self.geometry.bytes()
    }

    fn read_at(&self, offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check(self.geometry.bytes(), offset, buf.len() as u64)?;
        for (block, within, length) in parts(self.geometry.block(), offset, buf.len() as u64) {
            let (part, rest) = buf.split_at_mut(length as usize);
            self.read_block(block, within, part)?;
            buf = rest;
        }
        Ok(())
    }

    fn may_wait(&self, _offset: u64, _length: u64) -> bool {
        false
    }

    fn write_at(&self, offset: u64, mut data: &[u8]) -> io::Result<()> {
        check(self.geometry.bytes(), offset, data.len() as u64)?;
        for (block, within, length) in parts(self.geometry.block(), offset, data.len() as u64) {
            let (part, rest) = data.split_at(length as usize);
            self.write_part(block, within, part)?;
            data = rest;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.sync.run(|| self.sync_log())?;
        let (end, dead) = self.log_bytes();
        if dead > MIN_DEAD
            && dead > end - dead
            && let Err(error) = self.compact()
        {
            // What was flushed is durable; the next flush tries again.
            tracing::warn!(%error, file = %self.path().display(), "a log was not written anew");
        }
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        let range = self.geometry.covered(offset, length);
        if range.count == 0 {
            return Ok(());
        }
        let _guard = self.locks.lock(range, Who::Guest)?;
        self.append_zeros(range)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        let covered = self.geometry.covered(offset, length);
        let zeros = vec![0; self.geometry.block() as usize];
        for (block, within, length) in parts(self.geometry.block(), offset, length) {
            let whole = block >= covered.start.0 && block < covered.end();
            if allocate || (!whole && self.at(block) != 0) {
                self.write_part(block, within, &zeros[..length as usize])?;
            }
        }
        if allocate || covered.count == 0 {
            return Ok(());
        }
        let _guard = self.locks.lock(covered, Who::Guest)?;
        self.append_zeros(covered)
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        check(self.geometry.bytes(), offset, length)?;
        let mut found = Vec::new();
        for (block, _, length) in parts(self.geometry.block(), offset, length) {
            let held = self.at(block) != 0;
            let allocation = if held { Allocation::Data } else { Allocation::Hole };
            if !add_extent(&mut found, length, allocation) {
                break;
            }
        }
        Ok(found)
    }
}
