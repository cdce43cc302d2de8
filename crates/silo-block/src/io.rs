//! Byte-addressed access to a device: what block servers serve, and what layers and sources are
//! made of. (How blocks of a device move is [`device`](crate::device).)

use std::{io, os::fd::BorrowedFd, sync::atomic::AtomicU8};

/// What a run of bytes is made of, as `BLOCK_STATUS` and `SEEK_DATA` report it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Content that may be anything.
    Data,
    /// Reads as zeros, and room for it is held.
    Zero,
    /// Reads as zeros, and takes no room.
    Hole,
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// In bytes; never 0.
    pub length: u64,
    /// What it is made of.
    pub allocation: Allocation,
}

/// Something that is read and written like a disk. Every method may be called from many threads at
/// once.
///
/// The kind of an error decides what a client sees: `InvalidInput` EINVAL, `StorageFull` ENOSPC,
/// `PermissionDenied` EPERM, `NotConnected` ESHUTDOWN (the device was handed over), others EIO.
pub trait BlockDevice: Send + Sync {
    /// Size in bytes; does not change while the device is served.
    fn size(&self) -> u64;

    /// Reads; may wait for as long as it takes.
    ///
    /// # Errors
    /// Past the end, or if the content cannot be had.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Reads if that needs no waiting; false if it does, and then `buf` holds anything.
    ///
    /// # Errors
    /// As [`BlockDevice::read_at`].
    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let _ = (offset, buf);
        Ok(false)
    }

    /// Writes if that needs no waiting; false if it does, or might: then nothing is known of the bytes, and
    /// they are to be written again by whoever may wait.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    fn try_write_at(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        if self.may_wait(offset, data.len() as u64) {
            return Ok(false);
        }
        self.write_at(offset, data).map(|()| true)
    }

    /// Whether an access to these bytes may have to wait for something other than a file.
    fn may_wait(&self, offset: u64, length: u64) -> bool {
        let _ = (offset, length);
        true
    }

    /// Where these bytes lie in a file, if an access may go there directly: nothing has to be
    /// waited for, tracked or translated, and the place stays as long as the device lives. With
    /// `write`, bytes may be written there, and [`BlockDevice::flush`] makes them durable.
    fn file_range(&self, offset: u64, length: u64, write: bool) -> Option<(BorrowedFd<'_>, u64)> {
        let _ = (offset, length, write);
        None
    }

    /// These bytes in the memory of this process, if an access may go there directly: nothing has to
    /// be waited for, tracked or translated, all of it is present, and it stays as long as the
    /// device lives. With `write`, what is stored there is written. Others read and write the same
    /// bytes at any time, so that nothing may be decided by what was seen there.
    ///
    /// # Errors
    /// If there is no room for them to be written.
    fn mapped(&self, offset: u64, length: u64, write: bool) -> io::Result<Option<&[AtomicU8]>> {
        let _ = (offset, length, write);
        Ok(None)
    }

    /// Writes; the bytes are readable when this returns, and durable after a flush.
    ///
    /// # Errors
    /// Past the end, if the device takes no writes, or if storing fails.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes everything durable that was written, on any connection, before the call.
    ///
    /// # Errors
    /// If that failed; then nothing is known about those writes.
    fn flush(&self) -> io::Result<()>;

    /// The content is no longer needed; reads of it return the old bytes or zeros.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    fn trim(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes bytes zero; with `allocate` a later write there must not fail for lack of space.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()>;

    /// Makes calls that wait return an error soon: the server stops.
    fn interrupt(&self) {}

    /// What `length` bytes from `offset` are made of, in order, without waiting for content; the
    /// runs together cover the range, or its beginning (at least one run) if there are very many.
    ///
    /// # Errors
    /// Past the end, or if the backend cannot tell.
    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        let _ = offset;
        Ok(if length == 0 {
            Vec::new()
        } else {
            vec![Extent { length, allocation: Allocation::Data }]
        })
    }

    /// Whether [`BlockDevice::zero`] is always faster than writing zeros: it changes maps and
    /// writes none.
    fn zeroes_fast(&self) -> bool {
        false
    }

    /// These bytes will be read soon: a hint, which may return at once and need not be taken.
    ///
    /// # Errors
    /// As [`BlockDevice::read_at`]; nothing has to be done about one.
    fn prefetch(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Ok(())
    }

    /// Whether writes are refused, always.
    fn is_read_only(&self) -> bool {
        false
    }
}
