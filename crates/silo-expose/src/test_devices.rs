//! Devices for tests of the front ends.

use silo_block::io::BlockDevice;
use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// A plain file; with `direct`, its place is given away.
pub(crate) struct Plain {
    file: File,
    direct: bool,
    flushes: AtomicU64,
}

impl Plain {
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Flushes so far.
    pub(crate) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::SeqCst)
    }

    pub(crate) fn new(bytes: u64, direct: bool) -> Arc<Self> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        Arc::new(Self { file, direct, flushes: AtomicU64::new(0) })
    }
}

impl BlockDevice for Plain {
    fn size(&self) -> u64 {
        self.file.metadata().unwrap().len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn file_range(&self, offset: u64, _: u64, _: bool) -> Option<(BorrowedFd<'_>, u64)> {
        self.direct.then(|| (self.file.as_fd(), offset))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.file.sync_data()
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn may_wait(&self, _: u64, _: u64) -> bool {
        false
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.file.write_all_at(&vec![0; length as usize], offset)
    }
}

/// A disk whose requests wait at a gate, which loses at a power cut what was not flushed, and whose
/// flushes can fail.
#[derive(Default)]
pub(crate) struct Gated {
    open: Mutex<bool>,
    opened: Condvar,
    interrupted: AtomicBool,
    waiting: AtomicU64,
    now: Mutex<Vec<u8>>,
    durable: Mutex<Vec<u8>>,
    fails: AtomicBool,
}

impl Gated {
    pub(crate) fn new(open: bool) -> Arc<Self> {
        Arc::new(Self {
            open: Mutex::new(open),
            now: Mutex::new(vec![0; 1 << 20]),
            durable: Mutex::new(vec![0; 1 << 20]),
            ..Self::default()
        })
    }

    pub(crate) fn set_open(&self, open: bool) {
        *self.open.lock().unwrap() = open;
        self.opened.notify_all();
    }

    /// The content as reads see it.
    pub(crate) fn now(&self) -> MutexGuard<'_, Vec<u8>> {
        self.now.lock().unwrap()
    }

    /// The content that a power cut would leave.
    pub(crate) fn durable(&self) -> MutexGuard<'_, Vec<u8>> {
        self.durable.lock().unwrap()
    }

    pub(crate) fn fail_flushes(&self, fails: bool) {
        self.fails.store(fails, Ordering::SeqCst);
    }

    fn pass(&self) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut open = self.open.lock().unwrap();
        while !*open {
            if self.interrupted.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            open = self.opened.wait_timeout(open, Duration::from_millis(5)).unwrap().0;
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    pub(crate) fn await_waiting(&self, count: u64) {
        let deadline = Instant::now() + LIMIT;
        while self.waiting.load(Ordering::SeqCst) < count {
            assert!(Instant::now() < deadline, "the requests never came");
            thread::yield_now();
        }
    }
}

impl BlockDevice for Gated {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        // The second half is always here.
        if offset < 512 << 10 {
            self.pass()?;
        }
        buf.copy_from_slice(&self.now.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if offset < 512 << 10 {
            return Ok(false);
        }
        self.read_at(offset, buf).map(|()| true)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.pass()?;
        self.now.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(io::Error::other("the disk is broken"));
        }
        self.durable.lock().unwrap().copy_from_slice(&self.now.lock().unwrap());
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::SeqCst);
        self.opened.notify_all();
    }
}
