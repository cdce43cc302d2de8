//! A log in use: its file, where each block's record is, where it ends; and the one that replaces
//! it while that is being written.

use super::record::{HEADER, Header, Kind, RECORD, Record};
use crate::{
    block::{BlockIndex, BlockRange},
    files::Stored,
    geometry::Geometry,
};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Bytes of a block's record.
pub(super) fn record_bytes(geometry: Geometry, block: u64) -> u64 {
    RECORD as u64 + geometry.length(BlockIndex(block))
}

/// What readers need of a log.
pub(super) struct Body {
    pub(super) file: Arc<dyn Stored>,
    /// Per block, where its record begins; 0: zeros.
    index: Box<[AtomicU64]>,
}

impl Body {
    /// Of which all is zeros.
    pub(super) fn new(file: Arc<dyn Stored>, blocks: u64) -> Self {
        Self { file, index: (0..blocks).map(|_| AtomicU64::new(0)).collect() }
    }

    pub(super) fn at(&self, block: u64) -> u64 {
        self.index[block as usize].load(Ordering::Acquire)
    }

    /// Says where a block's record is now; where it was.
    pub(super) fn set(&self, block: u64, at: u64) -> u64 {
        self.index[block as usize].swap(at, Ordering::AcqRel)
    }

    /// Whether any of these blocks has a record.
    pub(super) fn any(&self, range: BlockRange) -> bool {
        (range.start.0..range.end()).any(|block| self.at(block) != 0)
    }

    /// Bytes of the records that are needed.
    pub(super) fn live(&self, geometry: Geometry) -> u64 {
        let held = (0..geometry.blocks()).filter(|block| self.at(*block) != 0);
        held.map(|block| record_bytes(geometry, block)).sum()
    }
}

/// Where a log ends, and how much of it nobody needs.
pub(super) struct Tail {
    pub(super) header: Header,
    pub(super) end: u64,
    pub(super) sequence: u64,
    /// Bytes of records that nobody needs any more.
    pub(super) dead: u64,
}

impl Tail {
    /// Of a log without records.
    pub(super) fn new(header: Header) -> Self {
        Self { header, end: HEADER as u64, sequence: 0, dead: 0 }
    }

    /// Appends a record; where it begins. On an error the log is as it was.
    pub(super) fn append(
        &mut self,
        file: &dyn Stored,
        record: &Record,
        data: &[u8],
    ) -> io::Result<u64> {
        let mut bytes = Vec::with_capacity(RECORD + data.len());
        bytes.extend_from_slice(&record.encode(&self.header, self.sequence + 1, data));
        bytes.extend_from_slice(data);
        self.append_encoded(file, &bytes, 1)
    }

    /// As [`Tail::append`], of records that were encoded with the next sequence numbers.
    pub(super) fn append_encoded(
        &mut self,
        file: &dyn Stored,
        bytes: &[u8],
        records: u64,
    ) -> io::Result<u64> {
        let at = self.end;
        if let Err(error) = file.write_at(bytes, at) {
            // What of it is there is behind the end, and is cut off or written over.
            let _ = file.set_len(at);
            return Err(error);
        }
        self.end += bytes.len() as u64;
        self.sequence += records;
        Ok(at)
    }

    /// Appends a block, or zeros (which have no data), and says so in the index.
    pub(super) fn put(
        &mut self,
        body: &Body,
        geometry: Geometry,
        record: &Record,
        data: &[u8],
    ) -> io::Result<()> {
        let at = self.append(&*body.file, record, data)?;
        let at = if record.kind == Kind::Data {
            at
        } else {
            self.dead += RECORD as u64;
            0
        };
        for block in record.block..record.block + record.count {
            if body.set(block, at) != 0 {
                self.dead += record_bytes(geometry, block);
            }
        }
        Ok(())
    }
}

/// The log that is to replace the one in use. It gets everything that is appended to that.
pub(super) struct Fresh {
    pub(super) body: Arc<Body>,
    pub(super) tail: Tail,
    /// It may get the name at any time now: a flush syncs it too.
    pub(super) switching: bool,
}

/// The log in use, as who appends knows it.
pub(super) struct Log {
    pub(super) tail: Tail,
    /// Appended since the last mark.
    pub(super) unmarked: bool,
    /// The log was replaced, and a crash could bring the old one back.
    pub(super) name_unsynced: bool,
    pub(super) fresh: Option<Fresh>,
}

impl Log {
    pub(super) fn new(tail: Tail) -> Self {
        Self { tail, unmarked: false, name_unsynced: false, fresh: None }
    }

    /// Appends what was written, also to the log that is being written.
    pub(super) fn put(
        &mut self,
        body: &Body,
        geometry: Geometry,
        record: &Record,
        data: &[u8],
    ) -> io::Result<()> {
        self.tail.put(body, geometry, record, data)?;
        self.unmarked = true;
        let Some(fresh) = &mut self.fresh else { return Ok(()) };
        // Zeros over what has not been copied: it will not be.
        let range = BlockRange::new(record.block, record.count);
        if record.kind == Kind::Zero && !fresh.body.any(range) {
            return Ok(());
        }
        if let Err(error) = fresh.tail.put(&fresh.body, geometry, record, data) {
            // The write is in the log that is in use. Who writes the other one finds it gone.
            tracing::warn!(%error, "a log is not written anew");
            self.fresh = None;
        }
        Ok(())
    }
}
