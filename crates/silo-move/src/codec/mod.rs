//! How the content of a run of blocks travels: zeros, repeats, differences, compressed or plain.
//!
//! The source's senders call [`Encoder::encode`] with a run of neighbouring blocks of one device;
//! the destination's receivers call [`Decoder::decode`] and get [`Piece`]s. What travels is a
//! *parcel*: a table of spans, then their payloads in order.
//!
//! ```text
//!  count u16, count × { kind u8, 0 u8, 0 u16, blocks u32, length u32 }, payloads
//!
//!  kind         payload
//!  0 zero       –
//!  1 fill       8 bytes, repeated through every block
//!  2 same       number of an earlier block of the device u64, BLAKE3 of the content (one block)
//!  3 held       BLAKE3 of each block: the destination has it, or fetches it elsewhere
//!  4 plain      the content
//!  5 lz4        the content, LZ4 block format
//!  6 zstd       the content, one zstd frame
//!  7 delta lz4  XXH3-64 of the content u64, then content XOR the last version sent, LZ4
//!  8 delta zstd the same, zstd
//! ```
//!
//! Only a span of zeros may be longer than [`MAX_BLOCKS`] or 16 MiB.
//!
//! What must hold: a parcel is never longer than its content by more than [`OVERHEAD`]; decoding
//! writes no more than the content's length, which the receiver knows beforehand, and never
//! panics; whatever refers to bytes that the destination should have (same, held, delta) names
//! their hash, so that a wrong guess costs a round trip and never a wrong block.

use silo_block::session::messages::BlockHash;

mod choose;
mod decode;
mod encode;
mod repeats;
#[cfg(test)]
mod tests;
mod versions;

pub use choose::{Chooser, Method};
pub(crate) use decode::refers;
pub use decode::{Decoder, Piece, fuzz_decode};
pub use encode::{Encoder, Known, NothingKnown, Parcel, Tally, zeros};
pub use versions::Versions;

/// How the content of a block is named: BLAKE3, plain, or keyed as the owner of a store says. Both
/// ends of a session must be told the same by those who configure them; a key never travels.
#[derive(Clone, Copy, Default)]
pub enum Naming {
    /// Plain BLAKE3.
    #[default]
    Plain,
    /// Keyed.
    Keyed([u8; 32]),
}

impl Naming {
    /// The name of `content`.
    #[must_use]
    pub fn name(&self, content: &[u8]) -> BlockHash {
        BlockHash(match self {
            Self::Plain => *blake3::hash(content).as_bytes(),
            Self::Keyed(key) => *blake3::keyed_hash(key, content).as_bytes(),
        })
    }
}

impl std::fmt::Debug for Naming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain => "Plain",
            Self::Keyed(_) => "Keyed(…)",
        })
    }
}

/// The most by which a parcel exceeds its content, in bytes: its table, when every block is plain but
/// a last one of a few bytes.
pub const OVERHEAD: usize = COUNT + 2 * SPAN;
/// Blocks in one encoded run at most: a mebibyte of the smallest blocks. Zeros may be more.
pub const MAX_BLOCKS: usize = 2048;
/// The most content of a span that is not zeros, in bytes: one block of the largest size.
pub(crate) const MAX_CONTENT: u64 = 16 << 20;

/// Bytes of the count of spans.
const COUNT: usize = 2;
/// Bytes of one span in the table.
const SPAN: usize = 12;
/// Bytes of the pattern of a fill.
const PATTERN: usize = 8;
/// Bytes of a hash.
const HASH: usize = 32;
/// Payload of one `same` span.
const SAME: usize = 8 + HASH;
/// Bytes of the check in front of a difference.
const CHECK: usize = 8;

mod kind {
    pub(super) const ZERO: u8 = 0;
    pub(super) const FILL: u8 = 1;
    pub(super) const SAME: u8 = 2;
    pub(super) const HELD: u8 = 3;
    pub(super) const PLAIN: u8 = 4;
    pub(super) const LZ4: u8 = 5;
    pub(super) const ZSTD: u8 = 6;
    pub(super) const DELTA_LZ4: u8 = 7;
    pub(super) const DELTA_ZSTD: u8 = 8;
}

/// Why a parcel was not taken. All mean a peer that is broken: the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Shorter than its table says.
    #[error("a run of blocks is cut short")]
    Short,
    /// Longer than its table says.
    #[error("a run of blocks has bytes behind its end")]
    Trailing,
    /// The spans do not add up to the run.
    #[error("the spans of a run cover {spans} blocks, the run has {run}")]
    Count {
        /// In the table.
        spans: u64,
        /// As announced.
        run: u64,
    },
    /// A kind of a later version.
    #[error("a span of unknown kind {0}; update the older side")]
    Kind(u8),
    /// A payload of the wrong length for its kind.
    #[error("a span of kind {kind} over {blocks} blocks has a payload of {length} bytes")]
    Length {
        /// The kind.
        kind: u8,
        /// Blocks.
        blocks: u32,
        /// Bytes.
        length: u32,
    },
    /// Compressed bytes that are none, or that decompress to another length.
    #[error("compressed blocks cannot be decompressed")]
    Compressed,
}

/// `target[i] ^= other[i]`.
pub(crate) fn xor(target: &mut [u8], other: &[u8]) {
    for (a, b) in target.iter_mut().zip(other) {
        *a ^= b;
    }
}
