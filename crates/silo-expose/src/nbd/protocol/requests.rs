//! Requests of the transmission phase.

use super::{u16_at, u32_at, u64_at};

const REQUEST: u32 = 0x2560_9513;

/// Bytes of a request's header.
pub(in crate::nbd) const REQUEST_BYTES: usize = 28;

/// Commands of the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    /// Anything else, by number.
    Other(u16),
}

impl Command {
    const fn from_number(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Other(other),
        }
    }

    const fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Other(number) => number,
        }
    }

    /// Whether it changes the device.
    pub(in crate::nbd) const fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) struct Request {
    pub(in crate::nbd) flags: u16,
    pub(in crate::nbd) command: Command,
    pub(in crate::nbd) cookie: u64,
    pub(in crate::nbd) offset: u64,
    pub(in crate::nbd) length: u32,
}

impl Request {
    /// The answer may come only when the bytes are durable.
    pub(in crate::nbd) const FUA: u16 = 1;
    /// Zeros must keep their place.
    pub(in crate::nbd) const NO_HOLE: u16 = 1 << 1;
    /// What is read must come in one piece.
    pub(in crate::nbd) const DONT_FRAGMENT: u16 = 1 << 2;
    /// One extent is enough.
    pub(in crate::nbd) const REQUEST_ONE: u16 = 1 << 3;
    /// Zeros only if that is faster than writing them.
    pub(in crate::nbd) const FAST_ZERO: u16 = 1 << 4;

    /// `None` if the magic is wrong: then nobody knows where the next request starts.
    pub(in crate::nbd) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        (u32_at(bytes, 0) == REQUEST).then(|| Self {
            flags: u16_at(bytes, 4),
            command: Command::from_number(u16_at(bytes, 6)),
            cookie: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            length: u32_at(bytes, 24),
        })
    }

    pub(in crate::nbd) fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.number().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Bytes that follow the header.
    pub(in crate::nbd) const fn payload(&self) -> u32 {
        match self.command {
            Command::Write => self.length,
            _ => 0,
        }
    }

    pub(in crate::nbd) const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether the flags are ones that this command may carry. `structured`: what only makes sense
    /// with structured replies may come.
    pub(in crate::nbd) const fn flags_fit(&self, structured: bool) -> bool {
        let allowed = match self.command {
            Command::WriteZeroes => Self::FUA | Self::NO_HOLE | Self::FAST_ZERO,
            Command::Read if structured => Self::FUA | Self::DONT_FRAGMENT,
            Command::BlockStatus if structured => Self::FUA | Self::REQUEST_ONE,
            // The flag is meaningless for reads and flushes, but QEMU may set it on any command.
            _ => Self::FUA,
        };
        self.flags & !allowed == 0
    }
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
        assert_eq!(request.encode(), bytes);
        let mut wrong = bytes;
        wrong[3] ^= 1;
        assert_eq!(Request::decode(&wrong), None);
        for number in 0..20 {
            assert_eq!(Command::from_number(number).number(), number);
        }
    }
}
