//! Frames over any byte stream: few system calls, one copy.

use super::{MAX_PAYLOAD, WireError, array};
use std::{
    hash::Hasher,
    io::{self, IoSlice, Read, Write},
    ops::Range,
};
use twox_hash::XxHash3_64;

/// Length of a header.
pub(super) const HEADER: usize = 32;
/// Memory that is taken ahead of bytes that came.
const STEP: usize = 512 << 10;
/// What is read beyond a frame: many small frames then cost few calls.
const AHEAD: usize = 16 << 10;
/// Frames up to this length are gathered before they are written.
const GATHER: usize = 16 << 10;
/// Slices in one vectored write; half of what the kernel takes.
const SLICES: usize = 512;

/// A frame's header, less length and check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: u8,
    /// Of blocks: why they were sent; else 0.
    pub class: u8,
    /// A device's number in the session; 0 where it means nothing.
    pub device: u16,
    /// By kind.
    pub a: u64,
    /// By kind.
    pub b: u64,
}

/// A frame in the reader's buffer.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its header.
    pub header: Header,
    /// Its payload.
    pub payload: &'a [u8],
}

/// A frame with a buffer of its own: the connection can be read on before it is done with.
#[derive(Debug)]
pub struct WholeFrame {
    header: Header,
    buffer: Vec<u8>,
    payload: Range<usize>,
}

impl WholeFrame {
    /// The frame.
    pub fn frame(&self) -> Frame<'_> {
        Frame { header: self.header, payload: &self.buffer[self.payload.clone()] }
    }

    /// The buffer, for [`FrameReader::read_whole`].
    pub fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }
}

/// Writes frames; counts bytes.
pub struct FrameWriter<W> {
    to: W,
    checked: bool,
    pending: Vec<u8>,
    sent: u64,
}

impl<W: Write> FrameWriter<W> {
    /// `checked`: add checksums (a plaintext connection).
    pub fn new(to: W, checked: bool) -> Self {
        Self { to, checked, pending: Vec::with_capacity(2 * GATHER), sent: 0 }
    }

    /// Bytes written so far, those that wait for [`FrameWriter::flush`] included.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// The stream below.
    pub fn inner(&mut self) -> &mut W {
        &mut self.to
    }

    /// Adds a frame. Small frames wait for the next large one or for [`FrameWriter::flush`].
    ///
    /// # Errors
    /// Those of the stream; a payload over [`MAX_PAYLOAD`].
    pub fn write(&mut self, header: Header, parts: &[&[u8]]) -> io::Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let Some(short) = u32::try_from(length).ok().filter(|l| *l <= MAX_PAYLOAD) else {
            let text = format!("a frame of {length} bytes exceeds {MAX_PAYLOAD}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        let mut bytes = [0; HEADER];
        (bytes[0], bytes[1]) = (header.kind, header.class);
        bytes[2..4].copy_from_slice(&header.device.to_le_bytes());
        bytes[4..8].copy_from_slice(&short.to_le_bytes());
        bytes[8..16].copy_from_slice(&header.a.to_le_bytes());
        bytes[16..24].copy_from_slice(&header.b.to_le_bytes());
        if self.checked {
            let mut hash = XxHash3_64::new();
            hash.write(&bytes[..24]);
            parts.iter().for_each(|part| hash.write(part));
            bytes[24..32].copy_from_slice(&hash.finish().to_le_bytes());
        }
        self.sent += (HEADER + length) as u64;
        if HEADER + length <= GATHER {
            self.pending.extend_from_slice(&bytes);
            parts.iter().for_each(|part| self.pending.extend_from_slice(part));
            if self.pending.len() > GATHER {
                self.flush()?;
            }
            return Ok(());
        }
        let all = [&self.pending[..], &bytes[..]];
        let result = write_all(&mut self.to, all.into_iter().chain(parts.iter().copied()));
        self.pending.clear();
        result
    }

    /// Sends what was gathered.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let result = self.to.write_all(&self.pending);
        self.pending.clear();
        result
    }
}

fn write_all<'a>(to: &mut impl Write, parts: impl Iterator<Item = &'a [u8]>) -> io::Result<()> {
    let slices: Vec<&[u8]> = parts.filter(|part| !part.is_empty()).collect();
    for group in slices.chunks(SLICES) {
        let mut slices: Vec<IoSlice<'_>> = group.iter().map(|part| IoSlice::new(part)).collect();
        let mut rest = &mut slices[..];
        while !rest.is_empty() {
            match to.write_vectored(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(taken) => IoSlice::advance_slices(&mut rest, taken),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Reads frames.
pub struct FrameReader<R> {
    from: R,
    checked: bool,
    buffer: Vec<u8>,
    /// Bytes in `buffer` that were not given out yet.
    have: Range<usize>,
    received: u64,
}

impl<R: Read> FrameReader<R> {
    /// `checked`: the connection is plaintext and frames carry checksums.
    pub fn new(from: R, checked: bool) -> Self {
        Self { from, checked, buffer: Vec::new(), have: 0..0, received: 0 }
    }

    /// Bytes of frames given out.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether the next frame is here already, at least its header.
    pub fn has_more(&self) -> bool {
        self.have.len() >= HEADER
    }

    /// The next frame; any error ends the connection, except `TimedOut` before the first byte of a
    /// frame, after which reading may go on.
    ///
    /// # Errors
    /// The end of the stream, and every frame that breaks a rule.
    pub fn read(&mut self) -> Result<Frame<'_>, WireError> {
        if self.have.is_empty() {
            self.have = 0..0;
        }
        self.fill(HEADER)?;
        let bytes: [u8; HEADER] = array(&self.buffer[self.have.start..][..HEADER]);
        let length = u32::from_le_bytes(array(&bytes[4..8]));
        if length > MAX_PAYLOAD {
            return Err(WireError::Invalid(format!("a payload of {length} bytes")));
        }
        self.fill(HEADER + length as usize)?;
        let start = self.have.start + HEADER;
        let end = start + length as usize;
        self.have.start = end;
        self.received += (HEADER + length as usize) as u64;
        let payload = &self.buffer[start..end];
        if self.checked {
            let mut hash = XxHash3_64::new();
            hash.write(&bytes[..24]);
            hash.write(payload);
            if hash.finish() != u64::from_le_bytes(array(&bytes[24..32])) {
                return Err(WireError::Damaged);
            }
        }
        let header = Header {
            kind: bytes[0],
            class: bytes[1],
            device: u16::from_le_bytes(array(&bytes[2..4])),
            a: u64::from_le_bytes(array(&bytes[8..16])),
            b: u64::from_le_bytes(array(&bytes[16..24])),
        };
        Ok(Frame { header, payload })
    }

    /// As [`FrameReader::read`]. The reader goes on with `spare`; only what it has read beyond the
    /// frame is copied.
    ///
    /// # Errors
    /// As [`FrameReader::read`].
    pub fn read_whole(&mut self, mut spare: Vec<u8>) -> Result<WholeFrame, WireError> {
        let frame = self.read()?;
        let (header, length) = (frame.header, frame.payload.len());
        let payload = self.have.start - length..self.have.start;
        let ahead = &self.buffer[self.have.clone()];
        // It keeps its length: growing it again would fill it with zeros.
        if spare.len() < ahead.len() {
            spare.resize(ahead.len(), 0);
        }
        spare[..ahead.len()].copy_from_slice(ahead);
        self.have = 0..ahead.len();
        let buffer = std::mem::replace(&mut self.buffer, spare);
        Ok(WholeFrame { header, buffer, payload })
    }

    /// Reads until `want` bytes are there.
    fn fill(&mut self, want: usize) -> Result<(), WireError> {
        if self.have.len() >= want {
            return Ok(());
        }
        if self.have.start > 0 && self.have.start + want + AHEAD > self.buffer.len() {
            self.buffer.copy_within(self.have.clone(), 0);
            self.have = 0..self.have.len();
        }
        while self.have.len() < want {
            // In steps, so that a length that lies costs no more memory than bytes that came.
            let room = (self.have.start + want + AHEAD).min(self.have.end + STEP);
            if self.buffer.len() < room {
                self.buffer.resize(room, 0);
            }
            let untouched = self.have.is_empty();
            match self.from.read(&mut self.buffer[self.have.end..room]) {
                Ok(0) => return Err(WireError::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => self.have.end += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::TimedOut && !untouched => {
                    let stalled = io::Error::other("it stalled in the middle of a frame");
                    return Err(WireError::Io(stalled));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// For fuzzing: a stream of frames, with and without checksums.
pub fn fuzz_frames(bytes: &[u8]) {
    for checked in [false, true] {
        let mut reader = FrameReader::new(bytes, checked);
        while let Ok(frame) = reader.read() {
            let _ = super::Blocks::read(&frame);
            let _ = super::read_to_destination(&frame);
            let _ = super::read_to_source(&frame);
        }
        assert!(
            reader.buffer.len() <= bytes.len() + STEP + AHEAD + HEADER,
            "memory ahead of bytes"
        );
    }
}
