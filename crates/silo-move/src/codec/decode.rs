//! From parcel to content. Every byte comes from outside.

use super::{CHECK, COUNT, CodecError, HASH, MAX_CONTENT, PATTERN, SAME, SPAN, kind};
use silo_block::{block::BlockIndex, session::messages::BlockHash};

/// A part of a run, in order. Offsets are bytes from the run's start.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// So many zero bytes.
    Zero {
        /// Where.
        offset: usize,
        /// How many.
        length: usize,
    },
    /// Content.
    Data {
        /// Where.
        offset: usize,
        /// What.
        content: &'a [u8],
    },
    /// One block with the content of an earlier one, if that still has this hash.
    Same {
        /// Where.
        offset: usize,
        /// Length of the block.
        length: usize,
        /// The earlier block.
        earlier: BlockIndex,
        /// Hash of the content.
        hash: BlockHash,
    },
    /// One block that is here or elsewhere under this hash.
    Held {
        /// Where.
        offset: usize,
        /// Length of the block.
        length: usize,
        /// Hash of the content.
        hash: BlockHash,
    },
    /// Content XOR what is there now; right only if XXH3-64 of the result is `check`.
    Delta {
        /// Where.
        offset: usize,
        /// The difference. May be used as scratch space.
        difference: &'a mut [u8],
        /// Check of the result.
        check: u64,
    },
}

/// Decodes the parcels of one connection. Keeps its buffers.
#[derive(Default)]
pub struct Decoder {
    scratch: Vec<u8>,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

struct Span {
    kind: u8,
    blocks: u32,
    length: u32,
}

impl Decoder {
    /// Decodes a run of `length` bytes in blocks of `block` bytes (the last may be short), and
    /// gives its pieces to `take` until that fails.
    ///
    /// # Errors
    /// A parcel that breaks a rule of the format, before anything is written past `length`; or
    /// what `take` returned.
    pub fn decode<E: From<CodecError>>(
        &mut self,
        parcel: &[u8],
        length: usize,
        block: usize,
        mut take: impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let (spans, mut payload) = check(parcel, length, block)?;
        let mut offset = 0;
        for span in spans {
            let (here, rest) = payload.split_at(span.length as usize);
            payload = rest;
            let end = (offset + span.blocks as usize * block).min(length);
            self.span(&span, here, offset..end, block, &mut take)?;
            offset = end;
        }
        Ok(())
    }

    fn span<E: From<CodecError>>(
        &mut self,
        span: &Span,
        payload: &[u8],
        bytes: std::ops::Range<usize>,
        block: usize,
        take: &mut impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let offset = bytes.start;
        let cut = |index: usize| {
            let at = offset + index * block;
            (at, (at + block).min(bytes.end) - at)
        };
        match span.kind {
            kind::ZERO => take(Piece::Zero { offset, length: bytes.len() }),
            kind::FILL => {
                let content = self.scratch(bytes.len());
                for chunk in content.chunks_mut(PATTERN) {
                    chunk.copy_from_slice(&payload[..chunk.len()]);
                }
                take(Piece::Data { offset, content })
            }
            kind::SAME => {
                let (earlier, hash) = payload.split_at(8);
                let earlier = BlockIndex(u64::from_le_bytes(array(earlier)));
                let length = bytes.len();
                take(Piece::Same { offset, length, earlier, hash: BlockHash(array(hash)) })
            }
            kind::HELD => payload.chunks_exact(HASH).enumerate().try_for_each(|(index, hash)| {
                let (offset, length) = cut(index);
                take(Piece::Held { offset, length, hash: BlockHash(array(hash)) })
            }),
            kind::PLAIN => take(Piece::Data { offset, content: payload }),
            kind::LZ4 | kind::ZSTD => {
                let content = self.unpack(span.kind == kind::ZSTD, payload, bytes.len())?;
                take(Piece::Data { offset, content })
            }
            // `check` let nothing else through.
            _ => {
                let (check, packed) = payload.split_at(CHECK);
                let check = u64::from_le_bytes(array(check));
                let zstd = span.kind == kind::DELTA_ZSTD;
                let difference = self.unpack(zstd, packed, bytes.len())?;
                take(Piece::Delta { offset, difference, check })
            }
        }
    }

    fn scratch(&mut self, length: usize) -> &mut [u8] {
        if self.scratch.len() < length {
            self.scratch.resize(length, 0);
        }
        &mut self.scratch[..length]
    }

    fn unpack(
        &mut self,
        zstd: bool,
        packed: &[u8],
        length: usize,
    ) -> Result<&mut [u8], CodecError> {
        self.scratch(length);
        let target = &mut self.scratch[..length];
        let got = if zstd {
            if self.zstd.is_none() {
                self.zstd = zstd::bulk::Decompressor::new().ok();
            }
            let zstd = self.zstd.as_mut().ok_or(CodecError::Compressed)?;
            zstd.decompress_to_buffer(packed, target).map_err(|_| CodecError::Compressed)?
        } else {
            lz4_flex::block::decompress_into(packed, target).map_err(|_| CodecError::Compressed)?
        };
        if got == length { Ok(target) } else { Err(CodecError::Compressed) }
    }
}

/// Whether a parcel has a span that refers to bytes outside of it.
pub(crate) fn refers(parcel: &[u8]) -> bool {
    let Some((count, rest)) = parcel.split_first_chunk::<COUNT>() else { return false };
    let table = usize::from(u16::from_le_bytes(*count)) * SPAN;
    let own = [kind::ZERO, kind::FILL, kind::PLAIN, kind::LZ4, kind::ZSTD];
    rest.chunks_exact(SPAN).take(table / SPAN).any(|entry| !own.contains(&entry[0]))
}

/// Checks the whole table against the run before anything is used.
fn check(
    parcel: &[u8],
    length: usize,
    block: usize,
) -> Result<(impl Iterator<Item = Span> + use<'_>, &[u8]), CodecError> {
    let (count, rest) = parcel.split_first_chunk::<COUNT>().ok_or(CodecError::Short)?;
    let table = usize::from(u16::from_le_bytes(*count)) * SPAN;
    let (table, payload) = rest.split_at_checked(table).ok_or(CodecError::Short)?;
    let spans = table.chunks_exact(SPAN).map(|entry| Span {
        kind: entry[0],
        blocks: u32::from_le_bytes(array(&entry[4..8])),
        length: u32::from_le_bytes(array(&entry[8..12])),
    });

    let run = length.div_ceil(block) as u64;
    let (mut covered, mut bytes) = (0, 0);
    for span in spans.clone() {
        let Span { kind, blocks, length: given } = span;
        let before = (covered * block as u64).min(length as u64);
        covered += u64::from(blocks);
        if covered > run || blocks == 0 {
            return Err(CodecError::Count { spans: covered, run });
        }
        let content = (covered * block as u64).min(length as u64) - before;
        let size = u64::from(given);
        let fits = match kind {
            kind::ZERO => size == 0,
            _ if content > MAX_CONTENT => false,
            kind::FILL => size == PATTERN as u64,
            kind::SAME => blocks == 1 && size == SAME as u64,
            kind::HELD => size == u64::from(blocks) * HASH as u64,
            kind::PLAIN => size == content,
            kind::LZ4 | kind::ZSTD => size > 0 && size < content,
            kind::DELTA_LZ4 | kind::DELTA_ZSTD => size > CHECK as u64 && size < content,
            other => return Err(CodecError::Kind(other)),
        };
        if !fits {
            return Err(CodecError::Length { kind, blocks, length: given });
        }
        bytes += size;
    }
    if covered != run {
        return Err(CodecError::Count { spans: covered, run });
    }
    match (payload.len() as u64).cmp(&bytes) {
        std::cmp::Ordering::Less => Err(CodecError::Short),
        std::cmp::Ordering::Greater => Err(CodecError::Trailing),
        std::cmp::Ordering::Equal => Ok((spans, payload)),
    }
}

/// `bytes` must have exactly `N` bytes, as all callers made sure.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(bytes);
    out
}

/// For fuzzing: the first bytes choose the run, the rest is a parcel. Nothing may panic, and no
/// piece may lie outside the run.
pub fn fuzz_decode(bytes: &[u8]) {
    let Some((head, parcel)) = bytes.split_first_chunk::<4>() else { return };
    let block = 512 << (head[0] % 4);
    let length = usize::from(u16::from_le_bytes([head[1], head[2]])) + 1;
    let mut next = 0;
    let result = Decoder::default().decode(parcel, length, block, |piece| {
        let (offset, size) = match &piece {
            Piece::Zero { offset, length }
            | Piece::Same { offset, length, .. }
            | Piece::Held { offset, length, .. } => (*offset, *length),
            Piece::Data { offset, content } => (*offset, content.len()),
            Piece::Delta { offset, difference, .. } => (*offset, difference.len()),
        };
        assert_eq!(offset, next, "pieces follow each other");
        next += size;
        Ok::<(), CodecError>(())
    });
    assert!(next <= length && (result.is_err() || next == length));
}
