//! Mounts against the running kernel; the backend is memory with a distance, faults and a tap.

mod failing;
mod reading;
mod writing;

use super::*;
use silo_block::device::DeviceName;
use std::{
    sync::{
        Condvar, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

const BLOCK: u64 = BLOCK_SIZE as u64;
const MIB: u64 = 1 << 20;
/// Longer than anything here takes; a test that waits this long has failed.
const LONG: Duration = Duration::from_secs(60);

/// What happens to a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mood {
    Fine,
    /// Every request fails.
    Broken,
    /// Reads wait until the mood changes or somebody interrupts.
    Silent,
    /// As silent, and does not care for interrupts.
    Deaf,
}

/// A device in memory, far away.
struct Far {
    content: RwLock<Vec<u8>>,
    distance: Duration,
    mood: Mutex<Mood>,
    changed: Condvar,
    /// How often each block was read.
    reads: Mutex<Vec<u32>>,
    writes_begun: AtomicU64,
    writes: AtomicU64,
    written: AtomicU64,
    flushes: AtomicU64,
    flush_fails: AtomicBool,
    /// What a flush made durable.
    durable: Mutex<Vec<u8>>,
    interrupted: AtomicBool,
    read_only: bool,
    /// Answers at once what is asked by `try_read_at`.
    instant: bool,
}

impl Far {
    fn new(bytes: u64, distance: Duration) -> Self {
        let content = pattern(0, bytes as usize);
        Self {
            durable: Mutex::new(content.clone()),
            content: RwLock::new(content),
            distance,
            mood: Mutex::new(Mood::Fine),
            changed: Condvar::new(),
            reads: Mutex::new(vec![0; bytes.div_ceil(BLOCK) as usize]),
            writes_begun: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            written: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            flush_fails: AtomicBool::new(false),
            interrupted: AtomicBool::new(false),
            read_only: false,
            instant: false,
        }
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
        self.changed.notify_all();
    }

    /// Waits until so many reads of the block were begun.
    fn wait_for_read(&self, block: u64) {
        let deadline = Instant::now() + LONG;
        while self.reads.lock().unwrap()[block as usize] == 0 {
            assert!(Instant::now() < deadline, "block {block} was never asked for");
            thread::yield_now();
        }
    }

    fn arrive(&self) -> io::Result<()> {
        if !self.distance.is_zero() {
            thread::sleep(self.distance);
        }
        let mut mood = self.mood.lock().unwrap();
        while matches!(*mood, Mood::Silent | Mood::Deaf) {
            if *mood == Mood::Silent && self.interrupted.load(Ordering::Relaxed) {
                return Err(io::Error::from(io::ErrorKind::NotConnected));
            }
            mood = self.changed.wait_timeout(mood, Duration::from_millis(20)).unwrap().0;
        }
        match *mood {
            Mood::Broken => Err(io::Error::other("the far end is broken")),
            Mood::Fine | Mood::Silent | Mood::Deaf => Ok(()),
        }
    }
}

impl BlockDevice for Far {
    fn size(&self) -> u64 {
        self.content.read().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for block in offset / BLOCK..(offset + buf.len() as u64).div_ceil(BLOCK) {
            self.reads.lock().unwrap()[block as usize] += 1;
        }
        self.arrive()?;
        let at = offset as usize;
        buf.copy_from_slice(&self.content.read().unwrap()[at..at + buf.len()]);
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if !self.instant {
            return Ok(false);
        }
        self.read_at(offset, buf).map(|()| true)
    }

    fn may_wait(&self, _: u64, _: u64) -> bool {
        !self.instant
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writes_begun.fetch_add(1, Ordering::Relaxed);
        self.arrive()?;
        let at = offset as usize;
        self.content.write().unwrap()[at..at + data.len()].copy_from_slice(data);
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.flush_fails.load(Ordering::Relaxed) {
            return Err(io::Error::other("the far end cannot flush"));
        }
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.durable.lock().unwrap().clone_from(&self.content.read().unwrap());
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; length as usize])
    }

    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }
}

/// Bytes that say where they are.
fn pattern(offset: u64, length: usize) -> Vec<u8> {
    (offset..offset + length as u64)
        .map(|at| ((at / BLOCK).wrapping_mul(131) ^ at.wrapping_mul(7)) as u8 | 1)
        .collect()
}

fn options() -> Options {
    let mut options = Options::new(DeviceName::new("far").unwrap());
    options.deadline = LONG;
    options.write_back = None;
    options
}

/// Reads through the mapping.
fn peek(mount: &Mount, offset: u64, length: usize) -> Vec<u8> {
    assert!(offset as usize + length <= mount.mapped_len());
    let mut bytes = vec![0; length];
    // SAFETY: inside the mapping, which lives as long as the mount; where tests race with a writer
    // they compare only what is not being written.
    unsafe {
        let from = mount.address().as_ptr().add(offset as usize);
        std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), length);
    }
    bytes
}

/// Writes through the mapping.
fn poke(mount: &Mount, offset: u64, bytes: &[u8]) {
    assert!(offset as usize + bytes.len() <= mount.mapped_len());
    // SAFETY: inside the mapping, and no Rust reference to these bytes exists.
    unsafe {
        let to = mount.address().as_ptr().add(offset as usize);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
    }
}
