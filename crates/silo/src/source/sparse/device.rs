//! What a sparse device does for readers, writers and flushes.

use super::{
    log::{Body, Fresh, Log},
    record::{Kind, RECORD, Record, data_matches},
};
use crate::{
    block::{BlockIndex, BlockRange},
    files::{Folder, Stored},
    geometry::Geometry,
    io::{Allocation, Extent},
    locks::{RangeLocks, Who},
    range::{add_extent, check, parts},
    shared_sync::{AfterFailure, SharedSync},
    source::SourceError,
};
use std::{
    fs::File,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

/// Longest wait for a sync that another thread runs.
const SYNC_LIMIT: Duration = Duration::from_secs(3600);

/// An open device.
pub(super) struct Inner {
    pub(super) folder: Arc<dyn Folder>,
    pub(super) name: String,
    pub(super) geometry: Geometry,
    /// Exchanged, under the lock on the log, when that was written anew. Who reads holds the one
    /// that he found: it stays as it is.
    pub(super) body: RwLock<Arc<Body>>,
    log: Mutex<Log>,
    locks: RangeLocks,
    pub(super) sync: SharedSync,
    /// One at a time writes the log anew.
    pub(super) rewriting: Mutex<()>,
    _lock: Option<File>,
}

impl Inner {
    pub(super) fn new(
        folder: Arc<dyn Folder>,
        name: &str,
        body: Body,
        log: Log,
        held: Option<File>,
    ) -> Self {
        Self {
            folder,
            name: name.to_owned(),
            geometry: log.tail.header.geometry,
            body: RwLock::new(Arc::new(body)),
            log: Mutex::new(log),
            locks: RangeLocks::new(false),
            sync: SharedSync::new(AfterFailure::Sticky, SYNC_LIMIT),
            rewriting: Mutex::default(),
            _lock: held,
        }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    pub(super) fn log(&self) -> MutexGuard<'_, Log> {
        // Changed only after the file was, field by field.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn body(&self) -> Arc<Body> {
        self.body.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn put(&self, log: &mut Log, record: &Record, data: &[u8]) -> io::Result<()> {
        // The lock on the log is held: it is the one that is appended to.
        let body = self.body();
        log.put(&body, self.geometry, record, data)
            .map_err(|error| SourceError::io("append to", &self.path())(error).into())
    }

    fn append_block(&self, block: u64, data: &[u8]) -> io::Result<()> {
        let record = Record { kind: Kind::Data, block, count: 1 };
        self.put(&mut self.log(), &record, data)
    }

    fn append_zeros(&self, range: BlockRange) -> io::Result<()> {
        if !self.body().any(range) {
            return Ok(());
        }
        let record = Record { kind: Kind::Zero, block: range.start.0, count: range.count };
        self.put(&mut self.log(), &record, &[])
    }

    /// Reads part of a block; a whole one is checked.
    fn read_block(&self, block: u64, within: u64, buf: &mut [u8]) -> io::Result<()> {
        let body = self.body();
        let at = body.at(block);
        if at == 0 {
            buf.fill(0);
            return Ok(());
        }
        let named = |error| io::Error::from(SourceError::io("read", &self.path())(error));
        body.file.read_at(buf, at + RECORD as u64 + within).map_err(named)?;
        if buf.len() as u64 == self.geometry.length(BlockIndex(block)) {
            let mut head = [0; RECORD];
            body.file.read_at(&mut head, at).map_err(named)?;
            if !data_matches(&head, buf) {
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

    pub(super) fn flush(&self) -> io::Result<()> {
        self.sync.run(|| self.sync_log())
    }

    fn sync_log(&self) -> io::Result<()> {
        self.sync_name()?;
        let (file, fresh, end, generation) = {
            let log = self.log();
            if !log.unmarked {
                return Ok(());
            }
            let switching = log.fresh.as_ref().filter(|fresh| fresh.switching);
            let fresh: Option<Arc<dyn Stored>> =
                switching.map(|Fresh { body, .. }| body.file.clone());
            (self.body().file.clone(), fresh, log.tail.end, log.tail.header.generation)
        };
        let sync = |file: &Arc<dyn Stored>| {
            file.sync()
                .map_err(|error| io::Error::from(SourceError::io("sync", &self.path())(error)))
        };
        sync(&file)?;
        // After a crash it may be the one that has the name.
        fresh.iter().try_for_each(sync)?;
        let mut log = self.log();
        if log.tail.header.generation != generation {
            // Written anew meanwhile, durably, with all that was appended before. `end` is a place in
            // the old log: a mark with it would call durable what was appended to the new one since.
            drop(log);
            return self.sync_name();
        }
        let more = log.tail.end > end;
        let mark = Record { kind: Kind::Mark, block: end, count: 0 };
        // A log without this mark is as good, and longer to open.
        if log.tail.append(&*file, &mark, &[]).is_ok() {
            log.tail.dead += RECORD as u64;
            log.unmarked = more;
        }
        Ok(())
    }

    /// Makes durable which file has the name. Until that is done nothing else is.
    pub(super) fn sync_name(&self) -> io::Result<()> {
        let generation = {
            let log = self.log();
            if !log.name_unsynced {
                return Ok(());
            }
            log.tail.header.generation
        };
        self.folder.sync().map_err(SourceError::io("sync the folder of", &self.path()))?;
        let mut log = self.log();
        if log.tail.header.generation == generation {
            log.name_unsynced = false;
        }
        Ok(())
    }

    pub(super) fn read_at(&self, offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check(self.geometry.bytes(), offset, buf.len() as u64)?;
        for (block, within, length) in parts(self.geometry.block(), offset, buf.len() as u64) {
            let (part, rest) = buf.split_at_mut(length as usize);
            self.read_block(block, within, part)?;
            buf = rest;
        }
        Ok(())
    }

    pub(super) fn write_at(&self, offset: u64, mut data: &[u8]) -> io::Result<()> {
        check(self.geometry.bytes(), offset, data.len() as u64)?;
        for (block, within, length) in parts(self.geometry.block(), offset, data.len() as u64) {
            let (part, rest) = data.split_at(length as usize);
            self.write_part(block, within, part)?;
            data = rest;
        }
        Ok(())
    }

    pub(super) fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        let range = self.geometry.covered(offset, length);
        if range.count == 0 {
            return Ok(());
        }
        let _guard = self.locks.lock(range, Who::Guest)?;
        self.append_zeros(range)
    }

    pub(super) fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        check(self.geometry.bytes(), offset, length)?;
        let covered = self.geometry.covered(offset, length);
        let zeros = vec![0; self.geometry.block() as usize];
        for (block, within, length) in parts(self.geometry.block(), offset, length) {
            let whole = block >= covered.start.0 && block < covered.end();
            if allocate || (!whole && self.body().at(block) != 0) {
                self.write_part(block, within, &zeros[..length as usize])?;
            }
        }
        if allocate || covered.count == 0 {
            return Ok(());
        }
        let _guard = self.locks.lock(covered, Who::Guest)?;
        self.append_zeros(covered)
    }

    pub(super) fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        check(self.geometry.bytes(), offset, length)?;
        let (body, mut found) = (self.body(), Vec::new());
        for (block, _, length) in parts(self.geometry.block(), offset, length) {
            let held = body.at(block) != 0;
            let allocation = if held { Allocation::Data } else { Allocation::Hole };
            if !add_extent(&mut found, length, allocation) {
                break;
            }
        }
        Ok(found)
    }
}
