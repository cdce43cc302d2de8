//! Replies of the transmission phase: simple ones and chunks of structured ones.

use super::{u16_at, u32_at, u64_at};
use std::io;

const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;

/// Bytes of a simple reply's header.
pub(in crate::nbd) const REPLY_BYTES: usize = 16;
/// Bytes of a structured chunk's header.
pub(in crate::nbd) const CHUNK_BYTES: usize = 20;
/// Bytes before the data of an `OFFSET_DATA` chunk.
pub(in crate::nbd) const DATA_CHUNK_BYTES: usize = CHUNK_BYTES + 8;
/// Bytes of a whole `OFFSET_HOLE` chunk.
pub(in crate::nbd) const HOLE_CHUNK_BYTES: usize = CHUNK_BYTES + 12;

/// The last chunk of a reply.
const DONE: u16 = 1;

/// Errors that a reply can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(in crate::nbd) enum WireError {
    NotPermitted = 1,
    Io = 5,
    NoMemory = 12,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
    Unsupported = 95,
    Shutdown = 108,
}

impl From<&io::Error> for WireError {
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::NotPermitted
            }
            io::ErrorKind::OutOfMemory => Self::NoMemory,
            io::ErrorKind::InvalidInput => Self::Invalid,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            io::ErrorKind::Unsupported => Self::Unsupported,
            io::ErrorKind::NotConnected => Self::Shutdown,
            _ => Self::Io,
        }
    }
}

impl WireError {
    /// What a server's number means; numbers that the protocol does not know are I/O errors.
    pub(in crate::nbd) const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::NotPermitted,
            12 => Self::NoMemory,
            22 => Self::Invalid,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::Unsupported,
            108 => Self::Shutdown,
            _ => Self::Io,
        }
    }

    /// The kind of error that gives this number back when it is sent on.
    pub(in crate::nbd) const fn kind(self) -> io::ErrorKind {
        match self {
            Self::NotPermitted => io::ErrorKind::PermissionDenied,
            Self::NoMemory => io::ErrorKind::OutOfMemory,
            Self::Invalid | Self::Overflow => io::ErrorKind::InvalidInput,
            Self::NoSpace => io::ErrorKind::StorageFull,
            Self::Unsupported => io::ErrorKind::Unsupported,
            Self::Shutdown => io::ErrorKind::NotConnected,
            Self::Io => io::ErrorKind::Other,
        }
    }
}

/// A simple reply's header.
pub(in crate::nbd) fn encode_reply(
    result: Result<(), WireError>,
    cookie: u64,
) -> [u8; REPLY_BYTES] {
    let error = result.map_or_else(|error| error as u32, |()| 0);
    let mut bytes = [0; REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// What a chunk carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) enum ChunkKind {
    /// Nothing.
    None,
    /// Where, and bytes read.
    Data,
    /// Where, and how many zeros.
    Hole,
    /// Extents of one metadata context.
    Status,
    /// An error number and a message.
    Error,
    /// The same and where it happened.
    ErrorOffset,
    /// Anything else, by number.
    Other(u16),
}

impl ChunkKind {
    const fn number(self) -> u16 {
        match self {
            Self::None => 0,
            Self::Data => 1,
            Self::Hole => 2,
            Self::Status => 5,
            Self::Error => 1 << 15 | 1,
            Self::ErrorOffset => 1 << 15 | 2,
            Self::Other(number) => number,
        }
    }

    const fn from_number(number: u16) -> Self {
        match number {
            0 => Self::None,
            1 => Self::Data,
            2 => Self::Hole,
            5 => Self::Status,
            0x8001 => Self::Error,
            0x8002 => Self::ErrorOffset,
            other => Self::Other(other),
        }
    }

    /// Kinds that nobody knows yet are errors if this bit is set.
    pub(in crate::nbd) const fn is_error(self) -> bool {
        self.number() & 1 << 15 != 0
    }
}

/// Whether more chunks follow for the same request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) enum Position {
    Last,
    Inner,
}

/// A chunk's header.
pub(in crate::nbd) fn encode_chunk(
    kind: ChunkKind,
    position: Position,
    cookie: u64,
    length: u32,
) -> [u8; CHUNK_BYTES] {
    let flags = if position == Position::Last { DONE } else { 0 };
    let mut bytes = [0; CHUNK_BYTES];
    bytes[..4].copy_from_slice(&STRUCTURED.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.number().to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// What stands before `length` bytes of data read at `offset`.
pub(in crate::nbd) fn encode_data_chunk(
    position: Position,
    cookie: u64,
    offset: u64,
    length: u32,
) -> [u8; DATA_CHUNK_BYTES] {
    let mut bytes = [0; DATA_CHUNK_BYTES];
    let header = encode_chunk(ChunkKind::Data, position, cookie, length + 8);
    bytes[..CHUNK_BYTES].copy_from_slice(&header);
    bytes[CHUNK_BYTES..].copy_from_slice(&offset.to_be_bytes());
    bytes
}

/// `length` zeros at `offset`.
pub(in crate::nbd) fn encode_hole_chunk(
    position: Position,
    cookie: u64,
    offset: u64,
    length: u32,
) -> [u8; HOLE_CHUNK_BYTES] {
    let mut bytes = [0; HOLE_CHUNK_BYTES];
    let header = encode_chunk(ChunkKind::Hole, position, cookie, 12);
    bytes[..CHUNK_BYTES].copy_from_slice(&header);
    bytes[CHUNK_BYTES..CHUNK_BYTES + 8].copy_from_slice(&offset.to_be_bytes());
    bytes[CHUNK_BYTES + 8..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// The last chunk of a reply that failed. It carries no message: an error of the backend may name
/// paths of this host, which are no client's affair.
pub(in crate::nbd) fn encode_error_chunk(error: WireError, cookie: u64) -> [u8; CHUNK_BYTES + 6] {
    let mut bytes = [0; CHUNK_BYTES + 6];
    let header = encode_chunk(ChunkKind::Error, Position::Last, cookie, 6);
    bytes[..CHUNK_BYTES].copy_from_slice(&header);
    bytes[CHUNK_BYTES..CHUNK_BYTES + 4].copy_from_slice(&(error as u32).to_be_bytes());
    bytes
}

/// A reply's header as a client reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) enum Reply {
    Simple { cookie: u64, result: Result<(), WireError> },
    Chunk { cookie: u64, kind: ChunkKind, position: Position, length: u32 },
}

impl Reply {
    pub(in crate::nbd) const fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }

    /// How many bytes the header in `bytes` has, if its first four are there.
    pub(in crate::nbd) fn header_bytes(bytes: &[u8]) -> Option<usize> {
        if bytes.len() < 4 {
            return None;
        }
        Some(if u32_at(bytes, 0) == STRUCTURED { CHUNK_BYTES } else { REPLY_BYTES })
    }

    /// Decodes a whole header; `None` if the magic is wrong, and nobody knows where the next
    /// reply starts.
    pub(in crate::nbd) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < Self::header_bytes(bytes)? {
            return None;
        }
        match u32_at(bytes, 0) {
            SIMPLE => {
                let result = match u32_at(bytes, 4) {
                    0 => Ok(()),
                    number => Err(WireError::from_number(number)),
                };
                Some(Self::Simple { cookie: u64_at(bytes, 8), result })
            }
            STRUCTURED => Some(Self::Chunk {
                cookie: u64_at(bytes, 8),
                kind: ChunkKind::from_number(u16_at(bytes, 6)),
                position: if u16_at(bytes, 4) & DONE != 0 {
                    Position::Last
                } else {
                    Position::Inner
                },
                length: u32_at(bytes, 16),
            }),
            _ => None,
        }
    }
}

/// The number in the payload of an error chunk; an error that tells nothing is an I/O error.
pub(in crate::nbd) fn decode_error(payload: &[u8]) -> WireError {
    if payload.len() < 4 { WireError::Io } else { WireError::from_number(u32_at(payload, 0)) }
}

/// Offset and length in the payload of a hole chunk.
pub(in crate::nbd) fn decode_hole(payload: &[u8; 12]) -> (u64, u32) {
    (u64_at(payload, 0), u32_at(payload, 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_have_these_bytes() {
        let reply = encode_reply(Ok(()), 0x1122_3344_5566_7788);
        assert_eq!(reply, *b"\x67\x44\x66\x98\0\0\0\0\x11\x22\x33\x44\x55\x66\x77\x88");
        let reply = encode_reply(Err(WireError::Shutdown), 1);
        assert_eq!(reply, *b"\x67\x44\x66\x98\0\0\0\x6c\0\0\0\0\0\0\0\x01");
        let result = Err(WireError::Shutdown);
        assert_eq!(Reply::decode(&reply), Some(Reply::Simple { cookie: 1, result }));
    }

    #[test]
    fn chunks_have_these_bytes() {
        let data = encode_data_chunk(Position::Inner, 7, 4096, 512);
        assert_eq!(
            data,
            *b"\x66\x8e\x33\xef\0\0\0\x01\0\0\0\0\0\0\0\x07\0\0\x02\x08\0\0\0\0\0\0\x10\0"
        );
        assert_eq!(
            Reply::decode(&data),
            Some(Reply::Chunk {
                cookie: 7,
                kind: ChunkKind::Data,
                position: Position::Inner,
                length: 520
            })
        );
        let hole = encode_hole_chunk(Position::Last, 7, 1, 2);
        assert_eq!(
            hole,
            *b"\x66\x8e\x33\xef\0\x01\0\x02\0\0\0\0\0\0\0\x07\0\0\0\x0c\
               \0\0\0\0\0\0\0\x01\0\0\0\x02"
        );
        let payload = hole[CHUNK_BYTES..].try_into().unwrap();
        assert_eq!(decode_hole(payload), (1, 2));
        let error = encode_error_chunk(WireError::NoSpace, 7);
        assert_eq!(
            error,
            *b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x07\0\0\0\x06\0\0\0\x1c\0\0"
        );
        assert_eq!(decode_error(&error[CHUNK_BYTES..]), WireError::NoSpace);
        assert_eq!(decode_error(b"\0\0"), WireError::Io);
        assert!(ChunkKind::Other(0x8123).is_error() && !ChunkKind::Status.is_error());
    }

    #[test]
    fn an_error_survives_the_way_through_a_client_and_a_server() {
        for number in [1, 5, 12, 22, 28, 95, 108] {
            let error = WireError::from_number(number);
            assert_eq!(error as u32, number);
            assert_eq!(WireError::from(&io::Error::from(error.kind())), error);
        }
        assert_eq!(WireError::from_number(4711), WireError::Io);
    }
}
