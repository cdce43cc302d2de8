//! Records of a log as bytes.

use super::BinlogError;
use std::{
    hash::Hasher,
    io::{self, Read},
    time::Duration,
};
use twox_hash::XxHash3_64;

const MAGIC: &[u8; 8] = b"SILOBIN\0";
const VERSION: u32 = 1;
pub(super) const HEADER: usize = 32;
const FLAG_READS: u32 = 1;
const RECORD_MAGIC: &[u8; 4] = b"SBLR";
pub(super) const RECORD: usize = 40;
/// The most bytes that one record holds; a longer write becomes several.
pub(super) const MAX_BYTES: usize = 8 << 20;

/// What an operation was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A write, with its bytes.
    Write = 0,
    /// A read, without.
    Read = 1,
    /// A flush.
    Flush = 2,
    /// A trim.
    Trim = 3,
    /// Zeros that may be a hole.
    Zero = 4,
    /// Zeros that hold room.
    ZeroAllocate = 5,
}

impl Kind {
    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Write),
            1 => Some(Self::Read),
            2 => Some(Self::Flush),
            3 => Some(Self::Trim),
            4 => Some(Self::Zero),
            5 => Some(Self::ZeroAllocate),
            _ => None,
        }
    }
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it was.
    pub kind: Kind,
    /// When, since the first one.
    pub at: Duration,
    /// First byte on the device.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// The bytes of a write.
    pub data: Vec<u8>,
}

/// What the log says of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) bytes: u64,
    pub(super) reads: bool,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes were sliced"))
}

impl Header {
    pub(super) fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(if self.reads { FLAG_READS } else { 0 }).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.bytes.to_le_bytes());
        let sum = XxHash3_64::oneshot(&bytes[..24]);
        bytes[24..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Result<Self, BinlogError> {
        if bytes[..8] != *MAGIC {
            return Err(BinlogError::NotALog("it does not begin with SILOBIN"));
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if version != VERSION {
            return Err(BinlogError::Version(version));
        }
        if XxHash3_64::oneshot(&bytes[..24]) != u64_at(bytes, 24) {
            return Err(BinlogError::NotALog("its header's checksum does not match"));
        }
        Ok(Self { bytes: u64_at(bytes, 16), reads: bytes[12] & FLAG_READS as u8 != 0 })
    }
}

fn checksum(head: &[u8], data: &[u8]) -> u64 {
    let mut sum = XxHash3_64::new();
    sum.write(head);
    sum.write(data);
    sum.finish()
}

/// A record's head; the bytes of a write follow it.
pub(super) fn encode(
    kind: Kind,
    at: Duration,
    offset: u64,
    length: u64,
    data: &[u8],
) -> [u8; RECORD] {
    let mut head = [0; RECORD];
    head[..4].copy_from_slice(RECORD_MAGIC);
    head[4] = kind as u8;
    let nanoseconds = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
    head[8..16].copy_from_slice(&nanoseconds.to_le_bytes());
    head[16..24].copy_from_slice(&offset.to_le_bytes());
    head[24..32].copy_from_slice(&length.to_le_bytes());
    let sum = checksum(&head[..32], data);
    head[32..].copy_from_slice(&sum.to_le_bytes());
    head
}

/// Reads a log, record by record.
pub struct Reader<R> {
    from: R,
    header: Header,
    at: u64,
    records: u64,
}

/// Fills `buf` as far as the log goes.
fn fill(from: &mut impl Read, buf: &mut [u8], at: u64) -> Result<usize, BinlogError> {
    let mut filled = 0;
    while filled < buf.len() {
        match from.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(BinlogError::Read { at: at + filled as u64, source }),
        }
    }
    Ok(filled)
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// If it is no log, or one of another version.
    pub fn new(mut from: R) -> Result<Self, BinlogError> {
        let mut bytes = [0; HEADER];
        if fill(&mut from, &mut bytes, 0)? < HEADER {
            return Err(BinlogError::NotALog("it is shorter than a log's header"));
        }
        let header = Header::decode(&bytes)?;
        Ok(Self { from, header, at: HEADER as u64, records: 0 })
    }

    /// Size of the device that was recorded, in bytes.
    #[must_use]
    pub fn device_bytes(&self) -> u64 {
        self.header.bytes
    }

    /// Whether reads were recorded too.
    #[must_use]
    pub fn has_reads(&self) -> bool {
        self.header.reads
    }

    /// The next record; `None` at the end.
    ///
    /// # Errors
    /// If the log was cut or damaged here.
    pub fn read(&mut self) -> Result<Option<Entry>, BinlogError> {
        let (at, records) = (self.at, self.records);
        let damaged = |detail| BinlogError::Damaged { at, detail, records };
        let mut head = [0; RECORD];
        match fill(&mut self.from, &mut head, at)? {
            0 => return Ok(None),
            RECORD => {}
            _ => return Err(BinlogError::Truncated { at, records }),
        }
        if head[..4] != *RECORD_MAGIC {
            return Err(damaged("no record begins here"));
        }
        let kind = Kind::from_byte(head[4]).ok_or_else(|| damaged("an unknown kind"))?;
        let (offset, length) = (u64_at(&head, 16), u64_at(&head, 24));
        if offset.checked_add(length).is_none_or(|end| end > self.header.bytes) {
            return Err(damaged("it reaches past the end of the device"));
        }
        let mut data = Vec::new();
        if kind == Kind::Write {
            if length > MAX_BYTES as u64 {
                return Err(damaged("it is longer than a record may be"));
            }
            data = vec![0; length as usize];
            if fill(&mut self.from, &mut data, at + RECORD as u64)? < data.len() {
                return Err(BinlogError::Truncated { at, records });
            }
        }
        if checksum(&head[..32], &data) != u64_at(&head, 32) {
            return Err(damaged("its checksum does not match"));
        }
        self.at += (RECORD + data.len()) as u64;
        self.records += 1;
        let time = Duration::from_nanos(u64_at(&head, 8));
        Ok(Some(Entry { kind, at: time, offset, length, data }))
    }
}

/// Reads any bytes as a log; for a fuzzer.
pub(crate) fn fuzz_binlog(bytes: &[u8]) {
    let Ok(mut reader) = Reader::new(bytes) else { return };
    while let Ok(Some(_)) = reader.read() {}
}
