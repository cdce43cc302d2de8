//! A device in a file, and one that fails when it is told to.

use silo_block::io::BlockDevice;
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::Mutex,
};

/// A file; what it does not cover reads as zeros.
pub struct FileDevice {
    file: File,
    size: u64,
}

impl FileDevice {
    /// Opens or makes the file.
    pub fn open(path: &Path, size: u64) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        file.set_len(size)?;
        Ok(Self { file, size })
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.size);
        fits.then_some(()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.check(offset, length)?;
        let zeros = vec![0; length.min(1 << 20) as usize];
        let mut at = 0;
        while at < length {
            let step = (length - at).min(zeros.len() as u64);
            self.file.write_all_at(&zeros[..step as usize], offset + at)?;
            at += step;
        }
        Ok(())
    }
}

type Rule = Box<dyn FnMut(Op, u64, u64) -> Option<io::Error> + Send>;

/// What is being done to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reading.
    Read,
    /// Writing, or making zero.
    Write,
    /// Flushing.
    Flush,
}

/// A device that fails, or waits, by rule.
pub struct Faulty<D> {
    inner: D,
    rule: Mutex<Option<Rule>>,
}

impl<D: BlockDevice> Faulty<D> {
    /// Does all as `inner` until there is a rule.
    pub fn new(inner: D) -> Self {
        Self { inner, rule: Mutex::new(None) }
    }

    /// From now on `rule` says for each operation, with offset and length, whether it fails.
    pub fn set(&self, rule: impl FnMut(Op, u64, u64) -> Option<io::Error> + Send + 'static) {
        *self.rule.lock().unwrap() = Some(Box::new(rule));
    }

    /// Never fails again.
    pub fn heal(&self) {
        *self.rule.lock().unwrap() = None;
    }

    fn judge(&self, op: Op, offset: u64, length: u64) -> io::Result<()> {
        let error = self.rule.lock().unwrap().as_mut().and_then(|rule| rule(op, offset, length));
        error.map_or(Ok(()), Err)
    }
}

impl<D: BlockDevice> BlockDevice for Faulty<D> {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.judge(Op::Read, offset, buf.len() as u64)?;
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.judge(Op::Write, offset, data.len() as u64)?;
        self.inner.write_at(offset, data)
    }

    fn flush(&self) -> io::Result<()> {
        self.judge(Op::Flush, 0, 0)?;
        self.inner.flush()
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.judge(Op::Write, offset, length)?;
        self.inner.trim(offset, length)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.judge(Op::Write, offset, length)?;
        self.inner.zero(offset, length, allocate)
    }
}
