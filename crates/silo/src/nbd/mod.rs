//! A block server: NBD over a unix socket, for QEMU and for everything else that speaks it.
//!
//! Who calls it: the runner starts one [`NbdServer`] per disk and gives its socket to the driver;
//! `silo serve` does the same by hand. A vhost-user-blk server comes later behind the same
//! [`BlockDevice`].
//!
//! What holds:
//! - Fixed newstyle handshake (`GO`, `INFO`, `EXPORT_NAME`, `LIST`, `ABORT`), simple replies;
//!   read, write, flush, FUA, trim, write zeroes. Structured replies are declined.
//! - Several connections at once; a flush on one covers what was answered on any other.
//! - Requests of one connection run at the same time: one that waits for a block that has not
//!   arrived holds up none of the others.
//! - Nothing that a client sends makes it panic, allocate more than [`MAX_PAYLOAD`] per request in
//!   hand, or wait without end in the middle of a message.
//! - It answers before the device has its content. What reads return then is the device's affair:
//!   QEMU reads 512 bytes at offset 0 as soon as it connects, also with `-incoming defer`, and a
//!   [`Disk`](crate::disk::Disk) returns whatever is there before it is armed.

mod connection;
mod handshake;
mod protocol;
mod server;

pub use server::{NbdError, NbdOptions, NbdServer};

use std::io;

/// Longest read or write, in bytes; clients that ask are told, and split theirs.
pub const MAX_PAYLOAD: u32 = 2 << 20;
const MIN_BLOCK: u32 = 1;
const PREFERRED_BLOCK: u32 = crate::block::BLOCK_SIZE as u32;

/// Something that can be served as a disk. Every method may be called from many threads at once.
///
/// The kind of an error decides what the guest sees: `InvalidInput` EINVAL, `StorageFull` ENOSPC,
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

    /// Whether an access to these bytes may have to wait for something other than a file.
    fn may_wait(&self, offset: u64, length: u64) -> bool {
        let _ = (offset, length);
        true
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
}
