//! What the guest does: reads, writes, zeros. No allocation, one system call where one is enough.

use super::{Disk, DiskError};
use crate::{
    block::{BLOCK_SIZE, BlockRange},
    io::BlockDevice,
    locks::Who,
    map::{BlockState, DiskStatus},
    range::ZEROS,
};
use std::io;

const BLOCK: u64 = BLOCK_SIZE as u64;

/// The blocks that an access touches.
fn touched(offset: u64, length: u64) -> BlockRange {
    let start = offset / BLOCK;
    BlockRange::new(start, (offset + length).div_ceil(BLOCK) - start)
}

impl Disk {
    /// The blocks of an access that is inside the disk; `None` for an empty one.
    fn check(&self, offset: u64, length: u64) -> Result<Option<BlockRange>, DiskError> {
        let size = self.size();
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok((length > 0).then(|| touched(offset, length))),
            _ => Err(DiskError::OutOfRange { offset, length, size }),
        }
    }

    /// Reads, and waits for blocks that have not arrived.
    ///
    /// # Errors
    /// Past the end, if a file fails, or if a block does not arrive.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let Some(range) = self.check(offset, buf.len() as u64)? else { return Ok(()) };
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let (state, stop) = self.store.states().run(at / BLOCK, range.end());
            if state == BlockState::Missing {
                // Ask for all of them, then wait for the first.
                let rest = BlockRange::new(at / BLOCK, range.end() - at / BLOCK);
                self.arrivals.ask(self.store.states(), rest)?;
                let first = BlockRange::new(at / BLOCK, stop - at / BLOCK);
                self.arrivals.wait(self.store.states(), first)?;
                continue;
            }
            let stop = end.min(stop * BLOCK);
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            self.store.read(state, at, part)?;
            at = stop;
        }
        Ok(())
    }

    /// Reads if nothing has to be waited for, neither a block nor the file system; false if not
    /// (then `buf` is of no use).
    fn read_quickly(&self, offset: u64, buf: &mut [u8]) -> Result<bool, DiskError> {
        let Some(range) = self.check(offset, buf.len() as u64)? else { return Ok(true) };
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let (state, stop) = self.store.states().run(at / BLOCK, range.end());
            let stop = end.min(stop * BLOCK);
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            if state == BlockState::Missing || !self.store.read_cached(state, at, part)? {
                return Ok(false);
            }
            at = stop;
        }
        Ok(true)
    }

    /// Writes. A block that is written only in part is fetched first if it has not arrived.
    ///
    /// # Errors
    /// Past the end, if a file fails, if the disk is frozen or being received.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let length = data.len() as u64;
        let Some(range) = self.check(offset, length)? else { return Ok(()) };
        loop {
            let guard = self.locks.lock(range, Who::Guest)?;
            self.check_running()?;
            if let Some(block) = self.missing_edge(range, offset, length) {
                drop(guard);
                self.arrivals.wait(self.store.states(), BlockRange::new(block, 1))?;
                continue;
            }
            let result = self.write_locked(range, offset, data);
            // After the content, before the guard goes: a freeze waits for the guard, and the
            // mover that takes the mark must see the content.
            self.dirty.insert(range);
            return result;
        }
    }

    /// The guest may write only where its machine runs.
    fn check_running(&self) -> Result<(), DiskError> {
        match self.store.status() {
            DiskStatus::Receiving => Err(DiskError::NotRunningHere),
            DiskStatus::Whole | DiskStatus::Armed => Ok(()),
        }
    }

    /// A missing block that the access covers only in part: at most its first and its last.
    fn missing_edge(&self, range: BlockRange, offset: u64, length: u64) -> Option<u64> {
        let end = offset + length;
        let head = (!offset.is_multiple_of(BLOCK)).then_some(range.start.0);
        let tail = (!end.is_multiple_of(BLOCK)).then_some(range.end() - 1);
        let missing = |block: &u64| self.store.states().get(*block) == BlockState::Missing;
        head.filter(missing).or_else(|| tail.filter(missing))
    }

    fn write_locked(&self, range: BlockRange, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let states = self.store.states();
        let (first, last) = (range.start.0, range.end() - 1);
        let was_missing =
            self.status() == DiskStatus::Armed && states.any(range, BlockState::Missing);
        let (mut offset, mut data) = (offset, data);
        // A block that is not in the overlay goes there as a whole.
        if !offset.is_multiple_of(BLOCK) && states.get(first) != BlockState::Data {
            let length = data.len().min((BLOCK - offset % BLOCK) as usize);
            let (head, rest) = data.split_at(length);
            self.write_merged(first, (offset % BLOCK) as usize, head)?;
            (offset, data) = (offset + length as u64, rest);
        }
        let tail = ((offset + data.len() as u64) % BLOCK) as usize;
        if tail != 0 && !data.is_empty() && states.get(last) != BlockState::Data {
            // The start of the last block is inside the access, or it was the head above, or the
            // access starts in it at its first byte.
            let (rest, end) = data.split_at(data.len() - tail);
            self.write_merged(last, 0, end)?;
            data = rest;
        }
        if !data.is_empty() {
            self.store.write(offset, data)?;
        }
        self.store.set_state(range, BlockState::Data)?;
        if was_missing {
            self.arrivals.wake();
        }
        Ok(())
    }

    /// Writes a block that is in the base or zero, with `part` put into it at `within`.
    fn write_merged(&self, block: u64, within: usize, part: &[u8]) -> Result<(), DiskError> {
        let mut whole = [0; BLOCK_SIZE];
        self.store.read(self.store.states().get(block), block * BLOCK, &mut whole)?;
        whole[within..within + part.len()].copy_from_slice(part);
        self.store.write(block * BLOCK, &whole)
    }

    /// Makes bytes zero. With `allocate` the blocks keep their place in the overlay.
    ///
    /// # Errors
    /// As [`Disk::write_at`].
    pub fn zero(&self, offset: u64, length: u64, allocate: bool) -> Result<(), DiskError> {
        self.check(offset, length)?;
        let end = offset + length;
        let middle = offset.next_multiple_of(BLOCK)..end / BLOCK * BLOCK;
        if allocate || middle.is_empty() {
            return self.write_zeros(offset, end);
        }
        self.write_zeros(offset, middle.start)?;
        self.drop_blocks(touched(middle.start, middle.end - middle.start))?;
        self.write_zeros(middle.end, end)
    }

    /// Makes those blocks zero that are inside as a whole; the rest keeps its content.
    ///
    /// # Errors
    /// As [`Disk::write_at`].
    pub fn trim(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check(offset, length)?;
        let middle = offset.next_multiple_of(BLOCK)..(offset + length) / BLOCK * BLOCK;
        if middle.is_empty() {
            return Ok(());
        }
        self.drop_blocks(touched(middle.start, middle.end - middle.start))
    }

    fn write_zeros(&self, mut at: u64, end: u64) -> Result<(), DiskError> {
        while at < end {
            let length = (end - at).min(ZEROS.len() as u64);
            self.write_at(at, &ZEROS[..length as usize])?;
            at += length;
        }
        Ok(())
    }

    fn drop_blocks(&self, range: BlockRange) -> Result<(), DiskError> {
        let _guard = self.locks.lock(range, Who::Guest)?;
        self.check_running()?;
        let had_data = self.store.states().any(range, BlockState::Data);
        let result = self.store.set_state(range, BlockState::Zero);
        self.dirty.insert(range);
        result?;
        if had_data {
            // After the state: whoever sees the hole sees zeros either way.
            self.store.punch(range);
        }
        if self.status() == DiskStatus::Armed {
            self.arrivals.wake();
        }
        Ok(())
    }
}

impl BlockDevice for Disk {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        Ok(Self::read_at(self, offset, buf)?)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        Ok(self.read_quickly(offset, buf)?)
    }

    fn may_wait(&self, offset: u64, length: u64) -> bool {
        self.status() == DiskStatus::Armed
            && matches!(self.check(offset, length), Ok(Some(range))
                if self.store.states().any(range, BlockState::Missing))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        Ok(Self::write_at(self, offset, data)?)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(Self::flush(self)?)
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        Ok(Self::trim(self, offset, length)?)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        Ok(Self::zero(self, offset, length, allocate)?)
    }

    fn interrupt(&self) {
        Self::interrupt(self);
    }
}
