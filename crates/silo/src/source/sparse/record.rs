//! The log of a sparse device as bytes.
//!
//! Layout (little endian), version 1. Header, 64 bytes: `SILOSPR\0`, version (4), block size (4),
//! size in bytes (8), instance (8, random), generation (8, one more each time the log is written
//! anew), 16 zeros, XXH3-64 of the 56 bytes before (8).
//!
//! Record, 48 bytes and its bytes:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 4 | `SPRR` |
//! | 4 | 1 | kind: 1 a block, 2 zeros, 3 a mark |
//! | 5 | 3 | zero |
//! | 8 | 8 | sequence number, from 1 |
//! | 16 | 8 | number of the block; of a mark: the log is durable up to this byte |
//! | 24 | 8 | number of blocks |
//! | 32 | 8 | XXH3-64 of the bytes that follow |
//! | 40 | 8 | XXH3-64 of the 40 bytes before, seeded with instance XOR generation |

use crate::{
    block::BlockIndex, files::Stored, geometry::Geometry, map::MAX_BLOCKS, source::SourceError,
};
use std::{io, path::Path};
use twox_hash::XxHash3_64;

const MAGIC: &[u8; 8] = b"SILOSPR\0";
const VERSION: u32 = 1;
pub(super) const HEADER: usize = 64;
const RECORD_MAGIC: &[u8; 4] = b"SPRR";
pub(super) const RECORD: usize = 48;

/// Said of more than [`MAX_BLOCKS`] blocks.
pub(super) const TOO_MANY: &str = "it has more than 2^28 blocks; take larger ones";

/// What the file header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) geometry: Geometry,
    pub(super) instance: u64,
    pub(super) generation: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Data = 1,
    Zero = 2,
    Mark = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) kind: Kind,
    pub(super) block: u64,
    pub(super) count: u64,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes were sliced"))
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.geometry.block() as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.geometry.bytes().to_le_bytes());
        bytes[24..32].copy_from_slice(&self.instance.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.generation.to_le_bytes());
        let sum = XxHash3_64::oneshot(&bytes[..56]);
        bytes[56..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER], path: &Path) -> Result<Self, SourceError> {
        let not = |detail: &str| SourceError::NotA {
            path: path.to_owned(),
            wanted: "a sparse device",
            detail: detail.to_owned(),
        };
        if bytes[..8] != *MAGIC {
            return Err(not("it does not begin with SILOSPR"));
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if version != VERSION {
            let (found, known) = (version, VERSION);
            return Err(SourceError::Version { path: path.to_owned(), found, known });
        }
        if XxHash3_64::oneshot(&bytes[..56]) != u64_at(bytes, 56) {
            return Err(not("its header's checksum does not match"));
        }
        let block = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        let geometry = Geometry::new(u64_at(bytes, 16), block)?;
        // Before the index is made, which takes 8 bytes of memory for each.
        if geometry.blocks() > MAX_BLOCKS {
            return Err(not(TOO_MANY));
        }
        Ok(Self { geometry, instance: u64_at(bytes, 24), generation: u64_at(bytes, 32) })
    }
}

impl Record {
    pub(super) fn encode(&self, header: &Header, sequence: u64, data: &[u8]) -> [u8; RECORD] {
        let mut head = [0; RECORD];
        head[..4].copy_from_slice(RECORD_MAGIC);
        head[4] = self.kind as u8;
        head[8..16].copy_from_slice(&sequence.to_le_bytes());
        head[16..24].copy_from_slice(&self.block.to_le_bytes());
        head[24..32].copy_from_slice(&self.count.to_le_bytes());
        head[32..40].copy_from_slice(&XxHash3_64::oneshot(data).to_le_bytes());
        let seed = header.instance ^ header.generation;
        let sum = XxHash3_64::oneshot_with_seed(seed, &head[..40]);
        head[40..].copy_from_slice(&sum.to_le_bytes());
        head
    }

    /// The record and its sequence number, if these bytes are a good head of this log.
    fn decode(header: &Header, head: &[u8; RECORD]) -> Option<(Self, u64)> {
        if head[..4] != *RECORD_MAGIC {
            return None;
        }
        let seed = header.instance ^ header.generation;
        if XxHash3_64::oneshot_with_seed(seed, &head[..40]) != u64_at(head, 40) {
            return None;
        }
        let (block, count) = (u64_at(head, 16), u64_at(head, 24));
        let kind = match head[4] {
            1 => Kind::Data,
            2 => Kind::Zero,
            3 => Kind::Mark,
            _ => return None,
        };
        let end = block.checked_add(count)?;
        let fits = match kind {
            Kind::Data => count == 1 && end <= header.geometry.blocks(),
            Kind::Zero => end <= header.geometry.blocks(),
            Kind::Mark => count == 0,
        };
        fits.then_some((Self { kind, block, count }, u64_at(head, 8)))
    }

    /// Bytes that follow the head.
    fn data_bytes(&self, geometry: Geometry) -> u64 {
        match self.kind {
            Kind::Data => geometry.length(BlockIndex(self.block)),
            Kind::Zero | Kind::Mark => 0,
        }
    }
}

/// Whether bytes are those that the head was made for.
pub(super) fn data_matches(head: &[u8; RECORD], data: &[u8]) -> bool {
    XxHash3_64::oneshot(data) == u64_at(head, 32)
}

/// What a log says.
pub(super) struct Walked {
    pub(super) header: Header,
    /// Kind, block, count, place: in order.
    pub(super) records: Vec<(Kind, u64, u64, u64)>,
    pub(super) end: u64,
    pub(super) sequence: u64,
}

/// Reads a log of `length` bytes.
pub(super) fn walk(file: &dyn Stored, length: u64, path: &Path) -> Result<Walked, SourceError> {
    let read =
        |at: u64, buf: &mut [u8]| file.read_at(buf, at).map_err(SourceError::io("read", path));
    let mut bytes = [0; HEADER];
    if length < HEADER as u64 {
        let detail = "it is shorter than a header".to_owned();
        let wanted = "a sparse device";
        return Err(SourceError::NotA { path: path.to_owned(), wanted, detail });
    }
    read(0, &mut bytes)?;
    let header = Header::decode(&bytes, path)?;
    let (mut records, mut at, mut sequence) = (Vec::new(), HEADER as u64, 0);
    let (mut durable, mut head) = (HEADER as u64, [0; RECORD]);
    while at + RECORD as u64 <= length {
        read(at, &mut head)?;
        let Some((record, number)) = Record::decode(&header, &head) else { break };
        let end = at + RECORD as u64 + record.data_bytes(header.geometry);
        if number != sequence + 1 || end > length {
            break;
        }
        if record.kind == Kind::Mark {
            durable = durable.max(record.block.min(at));
        }
        records.push((record.kind, record.block, record.count, at));
        (at, sequence) = (end, number);
    }
    if let Some(mark) = mark_behind(file, &header, at, length, path)? {
        let detail =
            format!("no good record begins here, and byte {mark} says that it was flushed");
        return Err(SourceError::Corrupt { path: path.to_owned(), at, detail });
    }
    // What nobody was told to be durable is checked byte by byte.
    let mut data = vec![0; header.geometry.block() as usize];
    let mut keep = records.partition_point(|(.., place)| *place < durable);
    let mut end = at;
    while keep < records.len() {
        let (kind, block, _, place) = records[keep];
        if kind == Kind::Data {
            let data = &mut data[..header.geometry.length(BlockIndex(block)) as usize];
            read(place, &mut head)?;
            read(place + RECORD as u64, data)?;
            if !data_matches(&head, data) {
                end = place;
                break;
            }
        }
        keep += 1;
    }
    sequence -= (records.len() - keep) as u64;
    records.truncate(keep);
    Ok(Walked { header, records, end, sequence })
}

/// A good mark behind `from` that says that `from` was durable: then what is there is no torn end.
fn mark_behind(
    file: &dyn Stored,
    header: &Header,
    from: u64,
    length: u64,
    path: &Path,
) -> Result<Option<u64>, SourceError> {
    const STEP: u64 = 1 << 20;
    let mut at = from;
    let mut buf = vec![0; STEP as usize + RECORD];
    while at + RECORD as u64 <= length {
        let part = &mut buf[..(length - at).min(STEP + RECORD as u64 - 1) as usize];
        file.read_at(part, at).map_err(SourceError::io("read", path))?;
        for (index, window) in part.windows(RECORD).enumerate() {
            if window[..4] != *RECORD_MAGIC {
                continue;
            }
            let head = window.try_into().expect("windows have this length");
            if let Some((record, _)) = Record::decode(header, head)
                && record.kind == Kind::Mark
                && record.block > from
            {
                return Ok(Some(at + index as u64));
            }
        }
        at += STEP;
    }
    Ok(None)
}

/// Bytes in memory as a file that is only read.
struct Bytes<'a>(&'a [u8]);

impl Stored for Bytes<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let part = self.0.get(start..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn set_len(&self, _bytes: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn allocate_zeros(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }
}

/// Reads any bytes as a sparse device's log; for a fuzzer.
pub(crate) fn fuzz_sparse(bytes: &[u8]) {
    let _ = walk(&Bytes(bytes), bytes.len() as u64, Path::new("fuzz"));
}
