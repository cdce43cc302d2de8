//! A device that takes no writes.

use crate::{io::BlockDevice, range::refuse_write};
use std::{io, sync::Arc};

/// Reads pass, writes are refused with `PermissionDenied`.
pub struct ReadOnly {
    inner: Arc<dyn BlockDevice>,
}

impl ReadOnly {
    /// Over `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>) -> Self {
        Self { inner }
    }
}

impl BlockDevice for ReadOnly {
    forward!(inner: size read_at try_read_at may_wait interrupt extents prefetch);

    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        refuse_write("the device")
    }

    /// There is nothing of ours to make durable.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, _offset: u64, _length: u64) -> io::Result<()> {
        refuse_write("the device")
    }

    fn zero(&self, _offset: u64, _length: u64, _allocate: bool) -> io::Result<()> {
        refuse_write("the device")
    }

    fn is_read_only(&self) -> bool {
        true
    }
}
