//! The bytes between two silos. Each connection begins with a [`Preamble`]; then frames follow,
//! each a 32-byte header and a payload:
//!
//! ```text
//!   0  kind     u8     4  length  u32 (payload)     16  b      u64
//!   1  class    u8     8  a       u64               24  check  u64  XXH3-64 of bytes 0..24 and payload
//!   2  device   u16
//! ```
//!
//! Integers are little-endian. `check` is 0 under TLS, whose AEAD does the same work. What the
//! other fields are is said at each kind (`message::kind`, `control`).
//!
//! Callers: [`peer`](crate::peer) and the two ends. What must hold: every length is checked before
//! memory is taken for it, and memory is taken only for bytes that came; nothing panics on what a
//! peer sends; frames of a kind that this version does not know are skipped.

mod bytes;
mod control;
mod frame;
mod message;
mod preamble;
#[cfg(test)]
mod tests;

pub(crate) use bytes::{Put, Take};
pub use control::{
    fuzz_to_destination, fuzz_to_source, read_to_destination, read_to_source, write_to_destination,
    write_to_source,
};
pub use frame::{Frame, FrameReader, FrameWriter, Header, fuzz_frames};
pub use message::{Ask, Blocks, Found, fuzz_messages};
pub use preamble::{MAX_DATA, Preamble, Role, fuzz_preamble};

use std::io;

/// Version of this format; both ends must speak the same.
pub const VERSION: u16 = 1;
/// Largest payload of a frame, in bytes: the state in a token, and the lists beside it.
pub const MAX_PAYLOAD: u32 = (64 << 20) + (2 << 20);

/// Why bytes were not accepted.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed or ended.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Not our protocol.
    #[error("the peer does not speak silo's protocol (first bytes {0:02x?}); is this its address?")]
    Foreign([u8; 4]),
    /// Another version of it.
    #[error(
        "the peer speaks version {theirs} of silo's protocol, this is version {VERSION}; update \
         the older side"
    )]
    Version {
        /// The peer's version.
        theirs: u16,
    },
    /// Bytes changed on the way, or a peer that counts wrong.
    #[error("a frame is damaged: its checksum does not match")]
    Damaged,
    /// Breaks a rule of the format.
    #[error("the peer sent an invalid frame: {0}")]
    Invalid(String),
    /// Breaks a rule of the codec.
    #[error("the peer sent an invalid frame: {0}")]
    Codec(#[from] crate::codec::CodecError),
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(bytes);
    out
}
