//! A device in memory for tests: bytes in shards, each under a lock of its own, so that readers and
//! writers of different places do not wait for each other.

use silo_block::io::{Allocation, BlockDevice, Extent};
use std::{
    io,
    sync::{
        RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

const SHARD: u64 = 1 << 20;

/// See the module.
pub struct Memory {
    size: u64,
    shards: Vec<RwLock<Option<Box<[u8]>>>>,
    /// Bytes that were written with [`BlockDevice::write_at`].
    pub written: AtomicU64,
}

impl Memory {
    /// `size` zero bytes.
    pub fn new(size: u64) -> Self {
        let shards = (0..size.div_ceil(SHARD)).map(|_| RwLock::new(None)).collect();
        Self { size, shards, written: AtomicU64::new(0) }
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.size);
        fits.then_some(()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Calls `each` with shard, offset in it, offset in the request, and length.
    fn parts(offset: u64, length: u64, mut each: impl FnMut(usize, usize, usize, usize)) {
        let mut at = 0;
        while at < length {
            let place = offset + at;
            let step = (SHARD - place % SHARD).min(length - at);
            each((place / SHARD) as usize, (place % SHARD) as usize, at as usize, step as usize);
            at += step;
        }
    }
}

impl BlockDevice for Memory {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        Self::parts(offset, buf.len() as u64, |shard, from, at, length| {
            match &*self.shards[shard].read().unwrap() {
                Some(bytes) => buf[at..at + length].copy_from_slice(&bytes[from..from + length]),
                None => buf[at..at + length].fill(0),
            }
        });
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buf).map(|()| true)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Self::parts(offset, data.len() as u64, |shard, from, at, length| {
            let mut shard = self.shards[shard].write().unwrap();
            let bytes = shard.get_or_insert_with(|| vec![0; SHARD as usize].into_boxed_slice());
            bytes[from..from + length].copy_from_slice(&data[at..at + length]);
        });
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.check(offset, length)?;
        Self::parts(offset, length, |shard, from, _, length| {
            if let Some(bytes) = &mut *self.shards[shard].write().unwrap() {
                bytes[from..from + length].fill(0);
            }
        });
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        self.check(offset, length)?;
        let mut runs: Vec<Extent> = Vec::new();
        Self::parts(offset, length, |shard, _, _, length| {
            let here = self.shards[shard].read().unwrap().is_some();
            let allocation = if here { Allocation::Data } else { Allocation::Hole };
            match runs.last_mut() {
                Some(last) if last.allocation == allocation => last.length += length as u64,
                _ => runs.push(Extent { length: length as u64, allocation }),
            }
        });
        Ok(runs)
    }
}
