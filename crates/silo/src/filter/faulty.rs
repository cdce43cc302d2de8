//! A device that fails when told to: what tests put under everything that must survive it.

use crate::io::BlockDevice;
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

/// What is about to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush; its range is empty.
    Flush,
    /// A trim.
    Trim,
    /// A write of zeros.
    Zero,
}

/// What happens instead.
#[derive(Debug)]
pub enum Fault {
    /// The operation fails and has done nothing.
    Error(io::ErrorKind),
    /// A write stores this many of its bytes, then fails. Other operations fail at once.
    Torn {
        /// Bytes from its start that are stored.
        bytes: usize,
        /// What it fails with.
        error: io::ErrorKind,
    },
    /// A read returns without an error, but with one bit turned. Other operations pass.
    Corrupt,
}

type Decide = Box<dyn Fn(Op, u64, u64) -> Option<Fault> + Send + Sync>;

/// Asks a rule before each operation. The rule may also wait, which holds the operation.
pub struct Faulty {
    inner: Arc<dyn BlockDevice>,
    rule: Mutex<Arc<Decide>>,
}

impl Faulty {
    /// Over `inner`; nothing fails yet.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>) -> Self {
        Self { inner, rule: Mutex::new(Arc::new(Box::new(|_, _, _| None))) }
    }

    /// From now on `rule` decides, by operation, offset and length.
    pub fn set(&self, rule: impl Fn(Op, u64, u64) -> Option<Fault> + Send + Sync + 'static) {
        *self.rule.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(Box::new(rule));
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.set(|_, _, _| None);
    }

    fn decide(&self, op: Op, offset: u64, length: u64) -> Option<Fault> {
        let rule = self.rule.lock().unwrap_or_else(PoisonError::into_inner).clone();
        rule(op, offset, length)
    }

    fn check(&self, op: Op, offset: u64, length: u64) -> io::Result<()> {
        match self.decide(op, offset, length) {
            None | Some(Fault::Corrupt) => Ok(()),
            Some(Fault::Error(error) | Fault::Torn { error, .. }) => Err(injected(op, error)),
        }
    }
}

fn injected(op: Op, kind: io::ErrorKind) -> io::Error {
    io::Error::new(kind, format!("{op:?} failed because a test asked for it"))
}

impl BlockDevice for Faulty {
    forward!(inner: size interrupt extents prefetch zeroes_fast is_read_only);

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self.decide(Op::Read, offset, buf.len() as u64) {
            None => self.inner.read_at(offset, buf),
            Some(Fault::Corrupt) => {
                self.inner.read_at(offset, buf)?;
                if let Some(byte) = buf.first_mut() {
                    *byte ^= 1;
                }
                Ok(())
            }
            Some(Fault::Error(error) | Fault::Torn { error, .. }) => Err(injected(Op::Read, error)),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self.decide(Op::Write, offset, data.len() as u64) {
            None | Some(Fault::Corrupt) => self.inner.write_at(offset, data),
            Some(Fault::Torn { bytes, error }) => {
                self.inner.write_at(offset, &data[..bytes.min(data.len())])?;
                Err(injected(Op::Write, error))
            }
            Some(Fault::Error(error)) => Err(injected(Op::Write, error)),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.check(Op::Flush, 0, 0)?;
        self.inner.flush()
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(Op::Trim, offset, length)?;
        self.inner.trim(offset, length)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.check(Op::Zero, offset, length)?;
        self.inner.zero(offset, length, allocate)
    }
}
