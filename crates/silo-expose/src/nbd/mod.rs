//! NBD: a block server for QEMU and for everything else that speaks it, and a client for every
//! server that speaks it.
//!
//! Who calls it: the runner starts one [`NbdServer`] per disk and gives its socket to the driver;
//! `silo serve` does the same by hand; mounts read from a server on another host.
//!
//! What holds of the server:
//! - Fixed newstyle handshake (`GO`, `INFO`, `EXPORT_NAME`, `LIST`, `ABORT`, `STARTTLS`, structured
//!   replies, `base:allocation`) over unix sockets and TCP; read, write, flush, FUA, trim, write
//!   zeroes (no hole, fast), cache, block status. Holes are left out of long reads.
//! - Several exports, several connections; a flush on one covers what was answered on any other.
//! - Requests of one connection run at the same time: one that waits for a block that has not
//!   arrived holds up none of the others.
//! - The device behind an export can be exchanged under its clients ([`Export::swap`]).
//! - Nothing that a client sends makes it panic, allocate more than [`MAX_PAYLOAD`] per request in
//!   hand, or wait without end in the middle of a message.
//! - It answers before the device has its content. What reads return then is the device's affair:
//!   QEMU reads 512 bytes at offset 0 as soon as it connects, also with `-incoming defer`, and a
//!   disk that moves returns whatever is there before it is armed.

mod attach;
mod client;
mod connection;
mod error;
mod export;
mod fuzz;
mod gate;
mod handshake;
mod line;
mod protocol;
mod receive;
mod server;
mod sys;
mod uri;

pub use attach::{Attach, attach, detach};
pub use client::{NbdClient, NbdClientOptions, Unflushed};
pub use error::NbdError;
pub use export::{Access, Export, ExportOptions, Exports, MAX_TEXT, Peers};
pub use handshake::NbdSecurity;
pub use line::Endpoint;
pub use server::{NbdOptions, NbdServer};
pub use uri::{NBD_PORT, NbdUri, Server, Transport};

#[doc(hidden)]
pub use fuzz::{fuzz_nbd_client, fuzz_nbd_messages, fuzz_nbd_server};

pub use silo_block::io::BlockDevice;

/// Longest read or write, in bytes; clients that ask are told, and split theirs.
pub const MAX_PAYLOAD: u32 = 2 << 20;
const MIN_BLOCK: u32 = 1;
const PREFERRED_BLOCK: u32 = silo_block::block::BLOCK_SIZE as u32;
