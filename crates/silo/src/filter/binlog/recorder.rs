//! Recording: a device that writes down what passes, and logs made from images.

use super::{
    BinlogError, Kind,
    record::{Header, MAX_BYTES, encode},
};
use crate::{
    block::{BlockRange, is_zero},
    geometry::Geometry,
    io::BlockDevice,
    locks::{RangeLocks, Who},
};
use std::{
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Unit of the lock that keeps the log in the order of effect.
const UNIT: u64 = 512;

/// What is recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordOptions {
    /// Reads too (where and when, not what).
    pub reads: bool,
}

struct Log {
    sink: Box<dyn Write + Send>,
    first: Option<Instant>,
    records: u64,
    failed: Option<io::Error>,
}

/// A device that records what happens to it. If the log cannot be written, the device goes on and
/// [`Recorder::finish`] tells.
pub struct Recorder {
    inner: Arc<dyn BlockDevice>,
    options: RecordOptions,
    log: Mutex<Log>,
    /// Operations on the same bytes are written down in the order in which they took effect.
    locks: RangeLocks,
}

impl Recorder {
    /// Over `inner`, into `sink`, which should be buffered.
    ///
    /// # Errors
    /// If the header cannot be written.
    pub fn new(
        inner: Arc<dyn BlockDevice>,
        mut sink: Box<dyn Write + Send>,
        options: RecordOptions,
    ) -> Result<Self, BinlogError> {
        let header = Header { bytes: inner.size(), reads: options.reads };
        sink.write_all(&header.encode()).map_err(BinlogError::Write)?;
        let log = Mutex::new(Log { sink, first: None, records: 0, failed: None });
        Ok(Self { inner, options, log, locks: RangeLocks::new(false) })
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // A panic inside leaves at worst half a record, which a reader finds.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes out what is buffered; how many records there are.
    ///
    /// # Errors
    /// If the log is not complete.
    pub fn finish(&self) -> Result<u64, BinlogError> {
        let mut log = self.log();
        if let Some(error) = &log.failed {
            return Err(BinlogError::Write(crate::range::same_error(error)));
        }
        log.sink.flush().map_err(BinlogError::Write)?;
        Ok(log.records)
    }

    fn note(&self, kind: Kind, offset: u64, length: u64, data: &[u8]) {
        let mut log = self.log();
        if log.failed.is_some() {
            return;
        }
        let now = Instant::now();
        let at = now - *log.first.get_or_insert(now);
        let mut write = || -> io::Result<u64> {
            if data.is_empty() {
                log.sink.write_all(&encode(kind, at, offset, length, &[]))?;
                return Ok(1);
            }
            let mut records = 0;
            for (index, part) in data.chunks(MAX_BYTES).enumerate() {
                let offset = offset + (index * MAX_BYTES) as u64;
                log.sink.write_all(&encode(kind, at, offset, part.len() as u64, part))?;
                log.sink.write_all(part)?;
                records += 1;
            }
            Ok(records)
        };
        match write() {
            Ok(records) => log.records += records,
            Err(error) => {
                tracing::error!(%error, "the log of a device ends here; the device goes on");
                log.failed = Some(error);
            }
        }
    }

    fn locked(&self, offset: u64, length: u64) -> io::Result<impl Drop + '_> {
        let first = offset / UNIT;
        let end = offset.saturating_add(length).div_ceil(UNIT);
        let range = BlockRange::new(first, end.saturating_sub(first));
        Ok(self.locks.lock(range, Who::Guest)?)
    }
}

impl BlockDevice for Recorder {
    forward!(inner: size may_wait interrupt extents prefetch zeroes_fast is_read_only);

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buf)?;
        if self.options.reads {
            self.note(Kind::Read, offset, buf.len() as u64, &[]);
        }
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let done = self.inner.try_read_at(offset, buf)?;
        if done && self.options.reads {
            self.note(Kind::Read, offset, buf.len() as u64, &[]);
        }
        Ok(done)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let _guard = self.locked(offset, data.len() as u64)?;
        self.inner.write_at(offset, data)?;
        if !data.is_empty() {
            self.note(Kind::Write, offset, data.len() as u64, data);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()?;
        self.note(Kind::Flush, 0, 0, &[]);
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        let _guard = self.locked(offset, length)?;
        self.inner.trim(offset, length)?;
        self.note(Kind::Trim, offset, length, &[]);
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        let _guard = self.locked(offset, length)?;
        self.inner.zero(offset, length, allocate)?;
        let kind = if allocate { Kind::ZeroAllocate } else { Kind::Zero };
        self.note(kind, offset, length, &[]);
        Ok(())
    }
}

/// Makes a log that writes what `image` holds: its blocks of `block` bytes that are not zero.
/// Returns how many.
///
/// # Errors
/// If the block size is not possible, the image cannot be read or the log not written.
pub fn create(
    image: &dyn BlockDevice,
    block: u32,
    sink: &mut dyn Write,
) -> Result<u64, BinlogError> {
    let bytes = image.size();
    let geometry = Geometry::new(bytes, block)
        .map_err(|_| BinlogError::NotALog("its blocks would have an impossible size"))?;
    sink.write_all(&Header { bytes, reads: false }.encode()).map_err(BinlogError::Write)?;
    let mut buf = vec![0; geometry.block() as usize];
    let mut records = 0;
    for part in BlockRange::new(0, geometry.blocks()).chunks(1) {
        let (offset, length) = (geometry.offset(part.start), geometry.length(part.start));
        let data = &mut buf[..length as usize];
        image.read_at(offset, data).map_err(|source| BinlogError::Read { at: offset, source })?;
        if is_zero(data) {
            continue;
        }
        for (index, piece) in data.chunks(MAX_BYTES).enumerate() {
            let offset = offset + (index * MAX_BYTES) as u64;
            let head = encode(Kind::Write, Duration::ZERO, offset, piece.len() as u64, piece);
            sink.write_all(&head)
                .and_then(|()| sink.write_all(piece))
                .map_err(BinlogError::Write)?;
        }
        records += 1;
    }
    sink.flush().map_err(BinlogError::Write)?;
    Ok(records)
}
