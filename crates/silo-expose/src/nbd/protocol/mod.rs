//! The bytes of the NBD protocol (`doc/proto.md` of the NBD project): fixed newstyle handshake,
//! simple and structured replies, `base:allocation`. Numbers are big endian. Pure functions, for
//! server and client alike; nothing here reads or writes a socket.
//!
//! Not spoken: extended headers (64-bit lengths), which no client or server in Debian 12 speaks,
//! so that they could not be tried against anybody else's.

mod options;
mod replies;
mod requests;
mod status;

pub(super) use options::*;
pub(super) use replies::*;
pub(super) use requests::*;
pub(super) use status::*;

/// A number in `bytes` at `at`; the caller has checked the length.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    (u32::from(u16_at(bytes, at)) << 16) | u32::from(u16_at(bytes, at + 2))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    (u64::from(u32_at(bytes, at)) << 32) | u64::from(u32_at(bytes, at + 4))
}
