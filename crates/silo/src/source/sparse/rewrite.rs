//! Writing a log anew, with what is needed only, beside those who write.
//!
//! From the beginning everything that is appended goes to both logs. What the old one has is copied
//! in slices: read without a lock, appended under the lock unless it was overwritten meanwhile. At
//! last the new log is synced, twice: the second time it has all that anybody may have been told is
//! durable, because flushes sync both logs from before that on. Then it gets the name, which is a
//! rename and the exchange of a pointer. So nobody waits longer than for one slice.
//!
//! A crash finds one of the two under the name, and each has what was flushed. What is left of a
//! new log that did not get the name is removed when the device is opened.

use super::{
    device::Inner,
    log::{Body, Fresh, Tail, record_bytes},
    record::{Header, Kind, RECORD, Record, data_matches},
};
use crate::source::SourceError;
use std::{
    io,
    ops::Range,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// Bytes that are appended in one hold of the lock, if no record is longer.
pub(super) const SLICE: usize = 256 << 10;

/// How far it is.
pub(super) struct Rewrite {
    old: Arc<Body>,
    fresh: Arc<Body>,
    /// Bytes of a slice.
    slice: usize,
    /// The next block to look at.
    next: u64,
    buffer: Vec<u8>,
}

/// A block's record in the old log, as it was read.
struct Found {
    block: u64,
    at: u64,
    place: Range<usize>,
}

impl Inner {
    /// The name of the log that is being written.
    pub(super) fn fresh_name(name: &str) -> String {
        format!("{name}.new")
    }

    /// Writes the log anew; durable on return. Ends with an error when `stop` is set.
    pub(super) fn rewrite(&self, stop: &AtomicBool) -> io::Result<()> {
        let _one = self.rewriting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rewrite = self.begin(SLICE)?;
        loop {
            if stop.load(Ordering::Acquire) {
                self.abandon();
                return Err(io::ErrorKind::Interrupted.into());
            }
            if !self.slice(&mut rewrite)? {
                break;
            }
        }
        self.switch(&rewrite)
    }

    fn unwritten(&self, error: io::Error) -> io::Error {
        self.abandon();
        SourceError::io("write anew", &self.path())(error).into()
    }

    /// Gives up; the old log stays in use.
    fn abandon(&self) {
        self.log().fresh = None;
        // Else it goes when the device is opened, or is written over.
        let _ = self.folder.remove(&Self::fresh_name(&self.name));
    }

    /// From here on what is appended goes to both.
    pub(super) fn begin(&self, slice: usize) -> io::Result<Rewrite> {
        let file = self.folder.create(&Self::fresh_name(&self.name));
        let file = file.map_err(|error| self.unwritten(error))?;
        let fresh = Arc::new(Body::new(file, self.geometry.blocks()));
        let mut log = self.log();
        let old = self.body();
        let before = log.tail.header;
        let header = Header { generation: before.generation.wrapping_add(1), ..before };
        let written = fresh.file.write_at(&header.encode(), 0);
        if written.is_ok() {
            let (body, tail) = (fresh.clone(), Tail::new(header));
            log.fresh = Some(Fresh { body, tail, switching: false });
        }
        drop(log);
        written.map_err(|error| self.unwritten(error))?;
        Ok(Rewrite { old, fresh, slice, next: 0, buffer: Vec::new() })
    }

    /// Copies some. False: there is no more.
    pub(super) fn slice(&self, rewrite: &mut Rewrite) -> io::Result<bool> {
        let found = self.read_slice(rewrite).map_err(|error| self.unwritten(error))?;
        let Rewrite { old, fresh: body, next, buffer, .. } = rewrite;
        let mut log = self.log();
        let Some(fresh) = &mut log.fresh else { return Err(gone(self)) };
        // What is still so is appended, in one call.
        let (mut out, mut places) = (Vec::with_capacity(buffer.len()), Vec::new());
        for Found { block, at, place } in found {
            // Overwritten meanwhile: the new one is there, or it is zeros.
            if old.at(block) != at || body.at(block) != 0 {
                continue;
            }
            let data = &buffer[place.start + RECORD..place.end];
            let record = Record { kind: Kind::Data, block, count: 1 };
            let sequence = fresh.tail.sequence + 1 + places.len() as u64;
            places.push((block, fresh.tail.end + out.len() as u64));
            out.extend_from_slice(&record.encode(&fresh.tail.header, sequence, data));
            out.extend_from_slice(data);
        }
        let appended = fresh.tail.append_encoded(&*body.file, &out, places.len() as u64);
        if appended.is_ok() {
            for (block, at) in places {
                body.set(block, at);
            }
        }
        drop(log);
        appended.map_err(|error| self.unwritten(error))?;
        Ok(*next < self.geometry.blocks())
    }

    /// Reads the records of the next blocks that are not in the new log.
    fn read_slice(&self, rewrite: &mut Rewrite) -> io::Result<Vec<Found>> {
        let Rewrite { old, fresh, slice, next, buffer } = rewrite;
        let (mut found, mut used) = (Vec::new(), 0);
        while *next < self.geometry.blocks() {
            let (block, at) = (*next, old.at(*next));
            let length = record_bytes(self.geometry, block) as usize;
            if at != 0 && fresh.at(block) == 0 {
                if used > 0 && used + length > *slice {
                    break;
                }
                if buffer.len() < used + length {
                    buffer.resize(used + length, 0);
                }
                let record = &mut buffer[used..used + length];
                old.file.read_at(record, at)?;
                let (head, data) = record.split_at(RECORD);
                if !data_matches(head.try_into().expect("split there"), data) {
                    let text = format!("block {block} does not match its checksum");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                found.push(Found { block, at, place: used..used + length });
                used += length;
            }
            *next += 1;
        }
        Ok(found)
    }

    /// Gives the new log the name.
    pub(super) fn switch(&self, rewrite: &Rewrite) -> io::Result<()> {
        let file = &rewrite.fresh.file;
        let failed = |error| self.unwritten(error);
        // Most of it, so that the next time is short.
        file.sync().map_err(failed)?;
        let durable = {
            let mut log = self.log();
            let Some(fresh) = &mut log.fresh else { return Err(gone(self)) };
            fresh.switching = true;
            fresh.tail.end
        };
        file.sync().map_err(failed)?;
        let mut log = self.log();
        let Some(mut fresh) = log.fresh.take() else { return Err(gone(self)) };
        if let Err(error) = self.folder.rename(&Self::fresh_name(&self.name), &self.name) {
            drop(log);
            self.abandon();
            return Err(SourceError::io("replace", &self.path())(error).into());
        }
        let mark = Record { kind: Kind::Mark, block: durable, count: 0 };
        // A log without this mark is as good, and longer to open.
        if fresh.tail.append(&**file, &mark, &[]).is_ok() {
            fresh.tail.dead += RECORD as u64;
        }
        *self.body.write().unwrap_or_else(PoisonError::into_inner) = fresh.body;
        log.tail = fresh.tail;
        // Also what came after the second sync.
        log.unmarked = true;
        log.name_unsynced = true;
        drop(log);
        // If it fails, the next sync of the folder may succeed without the new name.
        self.sync_name().inspect_err(|error| self.sync.lose(error))
    }
}

/// A write could not be appended to the new log, and it was given up by whoever wrote. The lock on
/// the log may be held.
fn gone(inner: &Inner) -> io::Error {
    // As in `abandon`.
    let _ = inner.folder.remove(&Inner::fresh_name(&inner.name));
    let text = "what is written meanwhile could not be appended to it";
    SourceError::io("write anew", &inner.path())(io::Error::other(text)).into()
}
