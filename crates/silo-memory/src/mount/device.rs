//! A mount as a byte-addressed device, so that front ends and layers can stand on it.
//!
//! A write of whole blocks needs no fetch, wherever they are; a write of parts of blocks waits for
//! these blocks first and then merges.

use super::{Mount, shared::Shared};
use silo_block::{
    block::{BLOCK_SIZE, BlockRange},
    io::{Allocation, BlockDevice, Extent},
};
use std::{io, os::unix::fs::FileExt, time::Duration};

const BLOCK: u64 = BLOCK_SIZE as u64;

/// What a change puts where it is made.
enum Change<'a> {
    Data(&'a [u8]),
    Zeros(u64),
}

impl Change<'_> {
    fn length(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeros(length) => *length,
        }
    }
}

impl Mount {
    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.shared.size => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "mount \"{}\": {length} bytes at {offset} reach past its {} bytes",
                    self.shared.options.name, self.shared.size
                ),
            )),
        }
    }

    fn check_writable(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.shared.options.read_only {
            let text = format!("mount \"{}\" is read-only", self.shared.options.name);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        self.check(offset, length)
    }

    /// The whole blocks that bytes cover; a short last block counts when its end is reached.
    fn covered(&self, offset: u64, length: u64) -> BlockRange {
        let end = offset + length;
        let first = offset.div_ceil(BLOCK);
        let last = if end == self.shared.size { end.div_ceil(BLOCK) } else { end / BLOCK };
        BlockRange::new(first, last.saturating_sub(first))
    }

    fn change(&self, offset: u64, change: &Change<'_>) -> io::Result<()> {
        let length = change.length();
        self.check_writable(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        self.shared.wait_for_room()?;
        let touched = Shared::touched(offset, length);
        let covered = self.covered(offset, length);
        let shared = &self.shared;
        let claimed = loop {
            // Blocks at the edges that are changed in part.
            for edge in [BlockRange::new(touched.start.0, 1), BlockRange::new(touched.end() - 1, 1)]
            {
                if edge.start < covered.start || edge.end() > covered.end() {
                    shared.need(edge)?;
                }
            }
            let mut state = shared.lock();
            if state.phase != super::shared::Phase::Open || state.interrupted {
                return Err(shared.closed());
            }
            if let Some(claimed) = state.table.claim(covered) {
                break claimed;
            }
            // Somebody is just putting content in place there; that takes no backend.
            drop(Shared::wait_on(&shared.news, state, Duration::from_millis(100)));
        };
        let done = match change {
            Change::Data(data) => shared.file.write_all_at(data, offset),
            Change::Zeros(_) => self.clear(offset, length, covered),
        };
        let mut state = shared.lock();
        if let Err(error) = done {
            claimed.iter().for_each(|piece| state.table.not_landed(*piece));
            return Err(error);
        }
        for piece in &claimed {
            let waits = state.table.landed(*piece);
            state.stats.waited(std::time::Instant::now(), &waits);
            state.stats.local += shared.bytes_of(*piece) as u64;
        }
        state.table.written(touched);
        drop(state);
        shared.news.notify_all();
        claimed.iter().try_for_each(|piece| shared.expose(*piece))
    }

    /// Whole blocks become holes of the file, the edges are overwritten.
    fn clear(&self, offset: u64, length: u64, covered: BlockRange) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags, fallocate};
        const ZERO: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
        let end = offset + length;
        if covered.count == 0 {
            // Less than a block, or two parts.
            let middle = end.min((offset / BLOCK + 1) * BLOCK);
            self.shared.file.write_all_at(&ZERO[..(middle - offset) as usize], offset)?;
            return self.shared.file.write_all_at(&ZERO[..(end - middle) as usize], middle);
        }
        let (first, last) = (covered.start.offset(), (covered.end() * BLOCK).min(end));
        self.shared.file.write_all_at(&ZERO[..(first - offset) as usize], offset)?;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.shared.file, flags, first as i64, covered.bytes() as i64)?;
        self.shared.file.write_all_at(&ZERO[..(end - last) as usize], last)
    }
}

impl BlockDevice for Mount {
    fn size(&self) -> u64 {
        self.shared.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        self.shared.need(Shared::touched(offset, buf.len() as u64))?;
        self.shared.file.read_exact_at(buf, offset)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.check(offset, buf.len() as u64)?;
        if self.may_wait(offset, buf.len() as u64) {
            return Ok(false);
        }
        self.shared.file.read_exact_at(buf, offset).map(|()| true)
    }

    fn may_wait(&self, offset: u64, length: u64) -> bool {
        length > 0 && !self.shared.lock().table.is_here(Shared::touched(offset, length))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(offset, &Change::Data(data))
    }

    fn flush(&self) -> io::Result<()> {
        if self.shared.options.read_only {
            return Ok(());
        }
        if self.shared.lock().phase == super::shared::Phase::Closed {
            return Err(self.shared.closed());
        }
        self.shared.write_back(true)
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_writable(offset, length)?;
        // What is not a whole block keeps its bytes: trimming is a hint.
        let covered = self.covered(offset, length);
        if covered.count == 0 {
            return Ok(());
        }
        let bytes = self.shared.bytes_of(covered) as u64;
        self.change(covered.start.offset(), &Change::Zeros(bytes))
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        // Memory is not promised to anybody; room in the backend is, by asking it.
        if allocate && length > 0 {
            self.check_writable(offset, length)?;
            self.shared.backend.zero(offset, length, true)?;
        }
        self.change(offset, &Change::Zeros(length))
    }

    fn interrupt(&self) {
        self.shared.lock().interrupted = true;
        self.shared.news.notify_all();
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        self.check(offset, length)?;
        if length == 0 {
            return Ok(Vec::new());
        }
        let here = {
            let state = self.shared.lock();
            let touched = Shared::touched(offset, length);
            let absent = state.table.absent().ranges_in(touched).next();
            // Bytes from `offset` of one kind: to the first change between here and absent.
            match absent {
                None => Ok(length),
                Some(run) if run.start == touched.start => {
                    Err((run.end() * BLOCK).min(offset + length) - offset)
                }
                Some(run) => Ok(run.start.offset() - offset),
            }
        };
        match here {
            Ok(length) => Ok(vec![Extent { length, allocation: Allocation::Data }]),
            Err(length) => self.shared.backend.extents(offset, length),
        }
    }

    fn is_read_only(&self) -> bool {
        self.shared.options.read_only
    }
}
