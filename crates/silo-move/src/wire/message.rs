//! Frames that carry content: runs of blocks on data and demand connections, content by hash on
//! fetch connections.

use super::{
    Frame, FrameWriter, Header, WireError, array,
    control::{class_number, class_of},
};
use crate::codec::{self, Parcel};
use silo_block::{
    block::BlockRange,
    rounds::Epoch,
    session::messages::{BlockHash, BlockHeader, DeviceIndex},
};
use std::io::{self, Write};

/// Kinds of frames: what `a`, `b` and the payload are.
pub(super) mod kind {
    /// Blocks of `device`: a = first block, b = epoch | count << 32, payload a parcel.
    pub(crate) const BLOCKS: u8 = 1;
    /// Content by hash: a = number, b = length, payload the hash.
    pub(crate) const ASK: u8 = 2;
    /// The answer: a = number, b = 1 if found, payload the content.
    pub(crate) const FOUND: u8 = 3;
}

/// Largest content that is asked for by hash: the largest block.
const MAX_ASK: u64 = 16 << 20;

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks<'a> {
    /// Which blocks, of what.
    pub header: BlockHeader,
    /// Their content, encoded.
    pub parcel: &'a [u8],
}

impl<'a> Blocks<'a> {
    /// Sends a run.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn write<W: Write>(
        to: &mut FrameWriter<W>,
        header: &BlockHeader,
        parcel: &Parcel<'_>,
    ) -> io::Result<()> {
        let parts: Vec<&[u8]> = parcel.slices().collect();
        to.write(frame_header(header), &parts)
    }

    /// Sends a run that is known to be zero.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn write_zeros<W: Write>(to: &mut FrameWriter<W>, header: &BlockHeader) -> io::Result<()> {
        to.write(frame_header(header), &[&codec::zeros(header.range.count as u32)])
    }

    /// Reads one; none for another kind.
    ///
    /// # Errors
    /// Numbers out of range. Whether the blocks are in the device is the caller's to check.
    pub fn read(frame: &Frame<'a>) -> Result<Option<Self>, WireError> {
        let Header { kind, device, a, b, class } = frame.header;
        if kind != kind::BLOCKS {
            return Ok(None);
        }
        let count = b >> 32;
        if count == 0 || a.saturating_add(count) > u64::from(u32::MAX) {
            return Err(WireError::Invalid(format!("a run of {count} blocks from {a}")));
        }
        let header = BlockHeader {
            device: DeviceIndex(device),
            range: BlockRange::new(a, count),
            epoch: Epoch(b as u32),
            class: class_of(class)?,
        };
        Ok(Some(Self { header, parcel: frame.payload }))
    }
}

fn frame_header(header: &BlockHeader) -> Header {
    let b = u64::from(header.epoch.0) | header.range.count << 32;
    let class = class_number(header.class);
    Header { kind: kind::BLOCKS, class, device: header.device.0, a: header.range.start.0, b }
}

/// Asks for content by hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Counts up on a connection.
    pub number: u64,
    /// Length of the content in bytes, at most 16 MiB.
    pub length: u32,
    /// BLAKE3 of the content.
    pub hash: BlockHash,
}

impl Ask {
    /// Sends it.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn write<W: Write>(&self, to: &mut FrameWriter<W>) -> io::Result<()> {
        let b = u64::from(self.length);
        to.write(
            Header { kind: kind::ASK, class: 0, device: 0, a: self.number, b },
            &[&self.hash.0],
        )
    }

    /// Reads it.
    ///
    /// # Errors
    /// Any other frame, and lengths out of range.
    pub fn read(frame: &Frame<'_>) -> Result<Self, WireError> {
        let Header { kind, a, b, .. } = frame.header;
        if kind != kind::ASK || frame.payload.len() != 32 || b == 0 || b > MAX_ASK {
            let text = format!("kind {kind} with {} bytes for a question", frame.payload.len());
            return Err(WireError::Invalid(text));
        }
        Ok(Self { number: a, length: b as u32, hash: BlockHash(array(frame.payload)) })
    }
}

/// The answer to [`Ask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// Of the question.
    pub number: u64,
    /// The content, if it is there.
    pub content: Option<&'a [u8]>,
}

impl<'a> Found<'a> {
    /// Sends it.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn write<W: Write>(&self, to: &mut FrameWriter<W>) -> io::Result<()> {
        let b = u64::from(self.content.is_some());
        let header = Header { kind: kind::FOUND, class: 0, device: 0, a: self.number, b };
        to.write(header, &[self.content.unwrap_or_default()])
    }

    /// Reads it.
    ///
    /// # Errors
    /// Any other frame.
    pub fn read(frame: &Frame<'a>) -> Result<Self, WireError> {
        let Header { kind, a, b, .. } = frame.header;
        if kind != kind::FOUND || b > 1 {
            return Err(WireError::Invalid(format!("kind {kind} for an answer")));
        }
        Ok(Self { number: a, content: (b == 1).then_some(frame.payload) })
    }
}

/// For fuzzing: a header's fields and a payload.
pub fn fuzz_messages(bytes: &[u8]) {
    let Some((head, payload)) = bytes.split_first_chunk::<20>() else { return };
    let header = Header {
        kind: head[0] % 4,
        class: head[1],
        device: u16::from_le_bytes(array(&head[2..4])),
        a: u64::from_le_bytes(array(&head[4..12])),
        b: u64::from_le_bytes(array(&head[12..20])),
    };
    let frame = Frame { header, payload };
    if let Ok(Some(blocks)) = Blocks::read(&frame) {
        assert_eq!(frame_header(&blocks.header), header);
    }
    let _ = (Ask::read(&frame), Found::read(&frame));
}
