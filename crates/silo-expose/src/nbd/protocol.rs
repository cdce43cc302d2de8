//! The bytes of the NBD protocol (`doc/proto.md` of the NBD project): fixed newstyle handshake and
//! simple replies. Numbers are big endian. Pure functions; nothing here reads or writes a socket.

use std::io;

/// Bytes that open a connection, first half.
pub(super) const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Bytes that open a connection, second half, and those that start every option.
pub(super) const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;

/// Handshake flags of the server: fixed newstyle, no padding after `EXPORT_NAME`.
pub(super) const SERVER_FLAGS: u16 = 1 | 2;
/// The client agrees to fixed newstyle.
pub(super) const CLIENT_FIXED: u32 = 1;
/// The client wants no padding.
pub(super) const CLIENT_NO_ZEROES: u32 = 2;

/// What the export can do: flush, FUA, trim, write zeroes, and several connections whose flushes
/// cover each other's writes.
pub(super) const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;

pub(super) const REPLY_ACK: u32 = 1;
pub(super) const REPLY_SERVER: u32 = 2;
pub(super) const REPLY_INFO: u32 = 3;
pub(super) const ERROR_UNSUPPORTED: u32 = 0x8000_0001;
pub(super) const ERROR_INVALID: u32 = 0x8000_0003;
pub(super) const ERROR_UNKNOWN: u32 = 0x8000_0006;
pub(super) const ERROR_TOO_BIG: u32 = 0x8000_0009;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Bytes of a request's header.
pub(super) const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply's header.
pub(super) const REPLY_BYTES: usize = 16;
/// Bytes of an option's header.
pub(super) const OPTION_BYTES: usize = 16;

/// Options that a client may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OptionKind {
    ExportName,
    Abort,
    List,
    Info,
    Go,
    /// Anything else, by number.
    Other(u32),
}

impl OptionKind {
    pub(super) const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::ExportName,
            2 => Self::Abort,
            3 => Self::List,
            6 => Self::Info,
            7 => Self::Go,
            other => Self::Other(other),
        }
    }

    pub(super) const fn number(self) -> u32 {
        match self {
            Self::ExportName => 1,
            Self::Abort => 2,
            Self::List => 3,
            Self::Info => 6,
            Self::Go => 7,
            Self::Other(number) => number,
        }
    }
}

/// An option's header; `None` if the magic is wrong.
pub(super) fn decode_option(bytes: &[u8; OPTION_BYTES]) -> Option<(OptionKind, u32)> {
    let (magic, rest) = bytes.split_at(8);
    let number = u32::from_be_bytes([rest[0], rest[1], rest[2], rest[3]]);
    let length = u32::from_be_bytes([rest[4], rest[5], rest[6], rest[7]]);
    (magic == OPTION.to_be_bytes()).then(|| (OptionKind::from_number(number), length))
}

/// An option's reply.
pub(super) fn encode_option_reply(option: OptionKind, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend_from_slice(&OPTION_REPLY.to_be_bytes());
    bytes.extend_from_slice(&option.number().to_be_bytes());
    bytes.extend_from_slice(&reply.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// The payload of `INFO` and `GO`: the export's name. What the client asks to be told is ignored,
/// because it is told everything. `None` if the lengths inside do not add up.
pub(super) fn decode_go(data: &[u8]) -> Option<&[u8]> {
    let (length, rest) = data.split_at_checked(4)?;
    let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
    let (name, rest) = rest.split_at_checked(length)?;
    let (count, infos) = rest.split_at_checked(2)?;
    let count = usize::from(u16::from_be_bytes([count[0], count[1]]));
    (infos.len() == count * 2).then_some(name)
}

/// `NBD_INFO_EXPORT`.
pub(super) fn encode_info_export(size: u64) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..2].copy_from_slice(&INFO_EXPORT.to_be_bytes());
    bytes[2..10].copy_from_slice(&size.to_be_bytes());
    bytes[10..].copy_from_slice(&EXPORT_FLAGS.to_be_bytes());
    bytes
}

/// `NBD_INFO_BLOCK_SIZE`.
pub(super) fn encode_info_block_size(minimum: u32, preferred: u32, maximum: u32) -> [u8; 14] {
    let mut bytes = [0; 14];
    bytes[..2].copy_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    bytes[2..6].copy_from_slice(&minimum.to_be_bytes());
    bytes[6..10].copy_from_slice(&preferred.to_be_bytes());
    bytes[10..].copy_from_slice(&maximum.to_be_bytes());
    bytes
}

/// Commands of the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    /// Anything else, by number.
    Other(u16),
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: Command,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Request {
    /// The answer may come only when the bytes are durable.
    pub(super) const FUA: u16 = 1;
    /// Zeros must keep their place.
    pub(super) const NO_HOLE: u16 = 2;

    /// `None` if the magic is wrong: then nobody knows where the next request starts.
    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| (u32::from(u16_at(at)) << 16) | u32::from(u16_at(at + 2));
        let u64_at = |at: usize| (u64::from(u32_at(at)) << 32) | u64::from(u32_at(at + 4));
        if u32_at(0) != REQUEST {
            return None;
        }
        let command = match u16_at(6) {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            other => Command::Other(other),
        };
        Some(Self {
            flags: u16_at(4),
            command,
            cookie: u64_at(8),
            offset: u64_at(16),
            length: u32_at(24),
        })
    }

    /// Bytes that follow the header.
    pub(super) const fn payload(&self) -> u32 {
        match self.command {
            Command::Write => self.length,
            _ => 0,
        }
    }

    /// Whether the flags are ones that this command may carry.
    pub(super) const fn flags_fit(&self) -> bool {
        let allowed = match self.command {
            Command::WriteZeroes => Self::FUA | Self::NO_HOLE,
            // The flag is meaningless for reads and flushes, but QEMU may set it on any command.
            _ => Self::FUA,
        };
        self.flags & !allowed == 0
    }
}

/// Errors that a reply can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum WireError {
    NotPermitted = 1,
    Io = 5,
    NoMemory = 12,
    Invalid = 22,
    NoSpace = 28,
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

/// A simple reply's header.
pub(super) fn encode_reply(result: Result<(), WireError>, cookie: u64) -> [u8; REPLY_BYTES] {
    let error = result.map_or_else(|error| error as u32, |()| 0);
    let mut bytes = [0; REPLY_BYTES];
    bytes[..4].copy_from_slice(&REPLY.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_these_bytes() {
        let bytes = *b"\x25\x60\x95\x13\x00\x01\x00\x06\x01\x02\x03\x04\x05\x06\x07\x08\
                       \x00\x00\x00\x01\x00\x00\x10\x00\x00\x01\x00\x00";
        let request = Request::decode(&bytes).unwrap();
        let expected = Request {
            flags: Request::FUA,
            command: Command::WriteZeroes,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1_0000_1000,
            length: 65_536,
        };
        assert_eq!(request, expected);
        let mut wrong = bytes;
        wrong[3] ^= 1;
        assert_eq!(Request::decode(&wrong), None);
    }

    #[test]
    fn replies_have_these_bytes() {
        assert_eq!(
            encode_reply(Ok(()), 0x1122_3344_5566_7788),
            *b"\x67\x44\x66\x98\0\0\0\0\x11\x22\x33\x44\x55\x66\x77\x88"
        );
        assert_eq!(
            encode_reply(Err(WireError::Shutdown), 1),
            *b"\x67\x44\x66\x98\0\0\0\x6c\0\0\0\0\0\0\0\x01"
        );
    }

    #[test]
    fn handshake_messages_have_these_bytes() {
        assert_eq!(GREETING.to_be_bytes(), *b"NBDMAGIC");
        let option = *b"IHAVEOPT\0\0\0\x07\0\0\0\x0e";
        assert_eq!(decode_option(&option), Some((OptionKind::Go, 14)));
        assert_eq!(decode_option(b"IHAVEOPS\0\0\0\x07\0\0\0\x0e"), None);
        assert_eq!(
            encode_option_reply(OptionKind::Go, REPLY_INFO, &encode_info_export(0x10_0000)),
            b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\
              \0\0\0\0\0\0\0\x10\0\0\x01\x6d"
        );
        assert_eq!(
            encode_info_block_size(1, 4096, 2 << 20),
            *b"\0\x03\0\0\0\x01\0\0\x10\0\0\x20\0\0"
        );
        assert_eq!(
            encode_option_reply(OptionKind::Other(8), ERROR_UNSUPPORTED, b""),
            b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\x80\0\0\x01\0\0\0\0"
        );
    }

    #[test]
    fn a_go_whose_lengths_do_not_add_up_is_refused() {
        assert_eq!(decode_go(b"\0\0\0\x02hd\0\x01\0\x03"), Some(&b"hd"[..]));
        assert_eq!(decode_go(b"\0\0\0\0\0\0"), Some(&b""[..]));
        for bad in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\x03hd",
            b"\0\0\0\x02hd\0",
            b"\0\0\0\x02hd\0\x02\0\x03",
            b"\0\0\0\x02hd\0\0\0",
            b"\xff\xff\xff\xffhd\0\0",
        ] {
            assert_eq!(decode_go(bad), None, "{bad:?}");
        }
    }
}
