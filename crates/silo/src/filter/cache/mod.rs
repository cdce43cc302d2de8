//! A write-back cache in memory: writes are answered when they are in memory, and go to the device
//! behind in the background, several at a time.
//!
//! Who uses it: whoever writes to something far away. A write costs a copy for as long as there is
//! room in the budget; beyond it a writer is slowed to what the device behind takes, and not
//! failed.
//!
//! # What holds
//!
//! - A read sees every write that was answered before it began. Each sector of 512 bytes is
//!   linearisable: reads and writes of it happen in one order that everybody agrees on.
//! - A flush is answered when all that was written before it is behind, and was flushed there. If
//!   that fails, the flush fails, what was not written stays here, and the next flush tries again.
//! - Memory is bounded by the budget; every wait has a deadline that begins anew whenever
//!   something gets done.
//!
//! # How
//!
//! Written bytes are kept as *pieces*, cut at regions of 1 MiB and at whole sectors, newest on top
//! (what is covered is dropped). A piece stays readable until the device behind has it; a read
//! takes the pieces first and what they leave from the device then, so it never misses a piece that
//! went behind in between. Regions are written oldest first: when more than
//! [`CacheOptions::start`] is held until [`CacheOptions::keep`] is left, when they are older than
//! [`CacheOptions::age`], and for a flush.

mod pieces;
mod pool;
#[cfg(test)]
mod tests;
mod work;

use crate::{
    block::BlockRange,
    io::{Allocation, BlockDevice, Extent},
    locks::{RangeLocks, Who},
    range::{add_extent, check, parts, same_error},
};
use bytes::Bytes;
use pieces::{Content, Piece};
use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};
use work::{Shared, Workers};

/// Unit of reading, writing and of what is linearisable.
const SECTOR: u64 = 512;
/// Pieces are cut at multiples of this.
const REGION: u64 = 1 << 20;
/// A longer range of zeros goes to the device at once: it is one call there.
const LONG_ZEROS: u64 = 16 << 20;

/// How much is cached, and when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// The most bytes that are held; at least 4 MiB are.
    pub budget: u64,
    /// Above this much, writing back begins …
    pub start: u64,
    /// … and ends when only this much is left.
    pub keep: u64,
    /// Nothing stays unwritten for longer.
    pub age: Duration,
    /// Writes under way to the device behind: as many as its bandwidth times its round trip hold
    /// megabytes.
    pub writers: usize,
    /// How long a writer or a flush waits while nothing gets done at all, before it fails.
    pub patience: Duration,
}

impl CacheOptions {
    /// The usual, for a budget.
    #[must_use]
    pub const fn with_budget(budget: u64) -> Self {
        Self {
            budget,
            start: budget / 2,
            keep: budget / 4,
            age: Duration::from_secs(1),
            writers: 32,
            patience: Duration::from_secs(3600),
        }
    }
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self::with_budget(256 << 20)
    }
}

/// What a cache holds and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheStatus {
    /// Bytes held, with what it costs to hold them.
    pub held: u64,
    /// Bytes that went to the device behind.
    pub written_back: u64,
    /// Writes to the device behind that failed; each is tried again.
    pub failures: u64,
    /// Writers that wait for room now.
    pub waiting: u64,
}

/// See the comment of its module. Dropping it loses what was not flushed, as the death of the process
/// would.
pub struct WriteCache {
    shared: Arc<Shared>,
    /// Writers of the same sectors come one after the other, in sectors.
    locks: RangeLocks,
    _workers: Workers,
}

/// The parts of a byte range, cut at regions: region, offset in it, length.
fn regions(offset: u64, length: u64) -> impl Iterator<Item = (u64, u32, u32)> {
    parts(REGION, offset, length).map(|(region, at, length)| (region, at as u32, length as u32))
}

impl WriteCache {
    /// Over `inner`, which nobody else may write to.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn new(inner: Arc<dyn BlockDevice>, options: CacheOptions) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(inner, options));
        let workers = Workers::start(&shared, options.writers.clamp(1, 1024))?;
        Ok(Self { shared, locks: RangeLocks::new(false), _workers: workers })
    }

    /// What it holds and did.
    #[must_use]
    pub fn status(&self) -> CacheStatus {
        self.shared.state().status()
    }

    fn size(&self) -> u64 {
        self.shared.inner.size()
    }

    /// The whole sectors around a range; the last one of a device may be short.
    fn sectors(&self, offset: u64, length: u64) -> (u64, u64) {
        let end = (offset + length).next_multiple_of(SECTOR).min(self.size());
        (offset / SECTOR * SECTOR, end)
    }

    fn locked(&self, start: u64, end: u64) -> io::Result<impl Drop + '_> {
        let first = start / SECTOR;
        let range = BlockRange::new(first, end.div_ceil(SECTOR) - first);
        Ok(self.locks.lock(range, Who::Guest)?)
    }

    /// Takes the pieces of a range into `buf` and says what they leave: offset and length.
    fn take_pieces(&self, offset: u64, buf: &mut [u8]) -> Vec<(u64, u64)> {
        let found = self.shared.state().pieces(offset, buf.len() as u64);
        let end = offset + buf.len() as u64;
        let (mut at, mut gaps) = (offset, Vec::new());
        for (start, piece) in found {
            let from = start.max(offset);
            let to = (start + u64::from(piece.length())).min(end);
            if from > at {
                gaps.push((at, from - at));
            }
            let target = &mut buf[(from - offset) as usize..(to - offset) as usize];
            match &piece.content {
                Content::Data(bytes) => {
                    let skip = (from - start) as usize;
                    target.copy_from_slice(&bytes[skip..skip + target.len()]);
                }
                Content::Zero { .. } => target.fill(0),
            }
            at = to;
        }
        if at < end {
            gaps.push((at, end - at));
        }
        gaps
    }

    /// Puts whole sectors in, part by part; waits for room. The caller holds their lock.
    fn put(&self, start: u64, data: &[u8]) -> io::Result<()> {
        let mut rest = data;
        for (region, within, length) in regions(start, data.len() as u64) {
            let (part, tail) = rest.split_at(length as usize);
            // The copy is made without any lock.
            let copy = match part.len() as u64 {
                REGION => self.shared.pool.copy(part),
                _ => Bytes::copy_from_slice(part),
            };
            let piece = Content::Data(copy);
            self.shared.put(region, within, piece)?;
            rest = tail;
        }
        Ok(())
    }

    fn put_zeros(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        for (region, within, length) in regions(offset, length) {
            self.shared.put(region, within, Content::Zero { length, allocate })?;
        }
        Ok(())
    }

    /// Zeros in whole sectors. The caller holds their lock.
    fn zero_sectors(&self, start: u64, end: u64, allocate: bool) -> io::Result<()> {
        let (first, last) = (start.next_multiple_of(REGION), end / REGION * REGION);
        if last.saturating_sub(first) < LONG_ZEROS {
            return self.put_zeros(start, end - start, allocate);
        }
        self.put_zeros(start, first - start, allocate)?;
        self.put_zeros(last, end - last, allocate)?;
        // Written first, then made zero: nobody may see what was there before the last write. No
        // new piece comes, because the sectors are locked.
        self.shared.drain(first / REGION..last / REGION)?;
        self.shared.inner.zero(first, last - first, allocate)
    }
}

impl BlockDevice for WriteCache {
    fn size(&self) -> u64 {
        self.shared.inner.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check(self.size(), offset, buf.len() as u64)?;
        for (at, length) in self.take_pieces(offset, buf) {
            let part = &mut buf[(at - offset) as usize..][..length as usize];
            self.shared.inner.read_at(at, part)?;
        }
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        check(self.size(), offset, buf.len() as u64)?;
        for (at, length) in self.take_pieces(offset, buf) {
            let part = &mut buf[(at - offset) as usize..][..length as usize];
            if !self.shared.inner.try_read_at(at, part)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let length = data.len() as u64;
        check(self.size(), offset, length)?;
        if data.is_empty() {
            return Ok(());
        }
        let (start, end) = self.sectors(offset, length);
        let _guard = self.locked(start, end)?;
        if (start, end) == (offset, offset + length) {
            return self.put(start, data);
        }
        // Sectors at the edges are completed with what is there; nobody else changes them now.
        let mut whole = vec![0; (end - start) as usize];
        let tail = end - SECTOR.min(end - start);
        let tail = tail / SECTOR * SECTOR;
        for sector in [start, tail.max(start)] {
            let stop = (sector + SECTOR).min(end);
            let inside = sector >= offset && stop <= offset + length;
            if !inside {
                let at = (sector - start) as usize;
                self.read_at(sector, &mut whole[at..(stop - start) as usize])?;
            }
        }
        whole[(offset - start) as usize..][..data.len()].copy_from_slice(data);
        self.put(start, &whole)
    }

    fn flush(&self) -> io::Result<()> {
        self.shared.flush()
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.size(), offset, length)?;
        let start = offset.next_multiple_of(SECTOR);
        let mut end = (offset + length) / SECTOR * SECTOR;
        if offset + length == self.size() {
            end = self.size();
        }
        if start >= end {
            return Ok(());
        }
        let _guard = self.locked(start, end)?;
        self.zero_sectors(start, end, false)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        check(self.size(), offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let (start, stop) = (offset.next_multiple_of(SECTOR), offset + length);
        let end = if stop == self.size() { stop } else { stop / SECTOR * SECTOR };
        if start >= end {
            return self.write_at(offset, &vec![0; length as usize]);
        }
        if start > offset {
            self.write_at(offset, &vec![0; (start - offset) as usize])?;
        }
        if stop > end {
            self.write_at(end, &vec![0; (stop - end) as usize])?;
        }
        let _guard = self.locked(start, end)?;
        self.zero_sectors(start, end, allocate)
    }

    fn interrupt(&self) {
        self.shared.interrupt();
        self.shared.inner.interrupt();
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        check(self.size(), offset, length)?;
        // Pieces first: one that is written back in between is in both, never in none.
        let pieces = self.shared.state().pieces(offset, length);
        let below = self.shared.inner.extents(offset, length)?;
        Ok(laid_over(offset, &below, &pieces))
    }

    fn prefetch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.shared.inner.prefetch(offset, length)
    }

    /// Zeros are noted, and made when they are written back.
    fn zeroes_fast(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        self.shared.inner.is_read_only()
    }
}

/// Extents of the device behind, with pieces over them.
fn laid_over(offset: u64, below: &[Extent], pieces: &[(u64, Piece)]) -> Vec<Extent> {
    let (mut found, mut at) = (Vec::new(), offset);
    let mut pieces = pieces.iter().peekable();
    for extent in below {
        let end = at + extent.length;
        while at < end {
            while pieces.peek().is_some_and(|(start, p)| start + u64::from(p.length()) <= at) {
                pieces.next();
            }
            let (stop, allocation) = match pieces.peek() {
                Some((start, piece)) if *start <= at => {
                    let stop = (start + u64::from(piece.length())).min(end);
                    let allocation = match piece.content {
                        Content::Data(_) => Allocation::Data,
                        Content::Zero { allocate: true, .. } => Allocation::Zero,
                        Content::Zero { allocate: false, .. } => Allocation::Hole,
                    };
                    (stop, allocation)
                }
                Some((start, _)) => ((*start).min(end), extent.allocation),
                None => (end, extent.allocation),
            };
            if !add_extent(&mut found, stop - at, allocation) {
                return found;
            }
            at = stop;
        }
    }
    found
}

/// What a wait says when nothing gets done.
fn nothing_done(patience: Duration, last: Option<&io::Error>) -> io::Error {
    match last {
        Some(error) => same_error(error),
        None => io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the device behind the write cache has taken nothing for {patience:?}"),
        ),
    }
}

/// When a wait that began at `from` is over.
fn until(from: Instant, patience: Duration) -> Instant {
    from.checked_add(patience).unwrap_or_else(|| from + Duration::from_secs(365 * 24 * 3600))
}
