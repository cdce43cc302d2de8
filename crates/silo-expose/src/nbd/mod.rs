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
//!   disk that moves returns whatever is there before it is armed.

mod connection;
mod handshake;
mod protocol;
mod server;

pub use server::{NbdError, NbdOptions, NbdServer};

pub use silo_block::io::BlockDevice;

/// Longest read or write, in bytes; clients that ask are told, and split theirs.
pub const MAX_PAYLOAD: u32 = 2 << 20;
const MIN_BLOCK: u32 = 1;
const PREFERRED_BLOCK: u32 = silo_block::block::BLOCK_SIZE as u32;
