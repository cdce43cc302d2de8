//! The wire between two runners: frames over two connections, and nothing about machines.
//!
//! A session has a *main* connection (control both ways, and all bulk data, so that what the
//! switchover says comes in order behind the blocks that it refers to) and a *fault* connection
//! (demands one way, blocks the other way, so that a fault never waits behind bulk data). Each
//! starts with a [`Preamble`]; then frames follow, each a 32-byte header and a payload:
//!
//! ```text
//!   0  kind     u8     4  length  u32 (payload)     16  b      u64
//!   1  device   u8     8  a       u64               24  check  u64  XXH3-64 of bytes 0..24 and payload
//!   2  zero     u16
//! ```
//!
//! Integers are little-endian. `check` is 0 under TLS, whose AEAD does the same work. Control
//! payloads are JSON, so that fields can be added; block payloads are raw. All bounds are checked
//! before anything is allocated.

use silo::block::{BLOCK_SIZE, BlockIndex, BlockRange, BlockSet};
use std::{
    hash::Hasher,
    io::{self, Read, Write},
};
use twox_hash::XxHash3_64;

/// Version of this wire format; both ends must speak the same.
/// Version 1 knew lists in the flight only, version 2 machines with NBD disks only.
pub const VERSION: u16 = 3;
/// Largest payload of a frame, in bytes.
pub const MAX_PAYLOAD: u32 = 16 << 20;
/// Bytes of a block's name.
pub const NAME_BYTES: usize = 32;
/// Blocks in one frame at most: 256 KiB of data.
pub const MAX_RUN: u64 = 64;
const MAGIC: [u8; 4] = *b"DRFT";
const HEADER: usize = 32;
const PREAMBLE: usize = 24;
/// Memory that is taken for a payload before its bytes have come.
const READ_STEP: usize = 512 << 10;
/// Ranges in one list frame: 12 bytes each.
const RANGES_PER_FRAME: usize = 65_536;

/// A device's number in a session: its position in the group that `Prepare` lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceNumber(pub u8);

/// A session's name, drawn at random by the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

/// What a connection of a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Control and bulk.
    Main,
    /// Demands and their answers.
    Fault,
}

/// The first bytes on each connection, from the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// What for.
    pub role: Role,
    /// Which session.
    pub session: SessionId,
}

/// Why bytes were not accepted.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed or ended.
    #[error("the connection to the peer failed: {0}")]
    Io(#[from] io::Error),
    /// Not our protocol.
    #[error("the peer does not speak drafter's migration protocol (first bytes {0:02x?})")]
    Foreign([u8; 4]),
    /// Another version of it.
    #[error(
        "the peer speaks version {theirs} of the migration protocol, this is version {VERSION}; update the older side"
    )]
    Version {
        /// The peer's version.
        theirs: u16,
    },
    /// Bytes changed on the way, or a peer that counts wrong.
    #[error("a frame from the peer is damaged: its checksum does not match")]
    Damaged,
    /// Breaks a rule of the format.
    #[error("the peer sent an invalid frame: {0}")]
    Invalid(String),
}

impl Preamble {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE] {
        let mut bytes = [0; PREAMBLE];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = match self.role {
            Role::Main => 0,
            Role::Fault => 1,
        };
        bytes[8..24].copy_from_slice(&self.session.0);
        bytes
    }

    /// Reads one.
    pub fn read(from: &mut impl Read) -> Result<Self, WireError> {
        let mut bytes = [0; PREAMBLE];
        from.read_exact(&mut bytes)?;
        let magic = array(&bytes[0..4]);
        if magic != MAGIC {
            return Err(WireError::Foreign(magic));
        }
        let theirs = u16::from_le_bytes(array(&bytes[4..6]));
        if theirs != VERSION {
            return Err(WireError::Version { theirs });
        }
        let role = match bytes[6] {
            0 => Role::Main,
            1 => Role::Fault,
            other => return Err(WireError::Invalid(format!("connection role {other}"))),
        };
        Ok(Self { role, session: SessionId(array(&bytes[8..24])) })
    }
}

/// One frame, as received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// S→D. What is to move (JSON of `PrepareRequest`).
    Prepare(Vec<u8>),
    /// D→S. Refusals, or what the destination has ready (JSON of `Verdict`).
    Verdict(Vec<u8>),
    /// Whole blocks.
    Blocks {
        /// Of which device.
        device: DeviceNumber,
        /// The first block.
        start: BlockIndex,
        /// Their content.
        data: Vec<u8>,
    },
    /// Blocks that are zero.
    Zero {
        /// Of which device.
        device: DeviceNumber,
        /// Which.
        range: BlockRange,
    },
    /// S→D, before the first round, to a destination that compares. What blocks are called (see
    /// [`names`](super::names)), one name after the other.
    Names {
        /// Of which device.
        device: DeviceNumber,
        /// The first block.
        start: BlockIndex,
        /// Their names.
        names: Vec<u8>,
    },
    /// S→D. A batch ends here: names, a round of pre-copy, or the lists before the pause.
    RoundEnd(u64),
    /// D→S. Everything before that `RoundEnd` is in place. After names: the `Missing` lists before it say
    /// which blocks the destination lacks.
    RoundApplied(u64),
    /// S→D, before the token. Blocks whose latest content has not been sent. One that is sent after
    /// it was listed, and before the token, is not missing any more. (D→S: what the destination lacks, as an
    /// answer to names and to a source that connects again.)
    Missing {
        /// Of which device.
        device: DeviceNumber,
        /// Which.
        ranges: Vec<BlockRange>,
    },
    /// S→D, ends the flight: authority, and the machine's device state.
    Token {
        /// JSON of `TokenMeta`.
        meta: Vec<u8>,
        /// The driver's state.
        state: Vec<u8>,
    },
    /// D→S. "Attempt, serial, good for this many milliseconds from sending, on my clock."
    Offer {
        /// Attempt of this session.
        attempt: u64,
        /// Counts up.
        serial: u64,
        /// Validity.
        good_for_ms: u32,
    },
    /// D→S. The destination will not run this attempt.
    Refused {
        /// Which attempt.
        attempt: u64,
        /// For people.
        reason: String,
    },
    /// D→S. The destination owns the machine (JSON of `Confirmation`).
    Confirmed(Vec<u8>),
    /// S→D. What the source answered to a FLUSH is durable.
    SourceDurable {
        /// Of which attempt.
        attempt: u64,
    },
    /// S→D. Every missing block has been sent once.
    BulkEnd,
    /// D→S. Every block is durable at the destination: the source may die (JSON of
    /// `DurableReport`).
    Durable(Vec<u8>),
    /// Either way: this attempt ends, with the reason for people.
    Abort(String),
    /// S→D, before the pause. The machine will stand still for about this many milliseconds: what the
    /// request said of it was less exact.
    Expect(u64),
    /// S→D, once the destination owns a machine that has a continuous backup, or is protected. In which blocks
    /// it differed from the last generation that its source stored; then [`Frame::History`]. Again over each
    /// new connection.
    Changed {
        /// Of which device.
        device: DeviceNumber,
        /// Which.
        ranges: Vec<BlockRange>,
    },
    /// S→D, after all of the `Changed` lists: which generation that is (JSON of `BackupMark`). A destination
    /// that is not told compares everything with the history, and has no other source of missing blocks.
    History(Vec<u8>),
    /// D→S on the fault connection.
    Demand {
        /// Of which device.
        device: DeviceNumber,
        /// Which blocks.
        range: BlockRange,
    },
    /// Either way.
    Ping(u64),
    /// The answer.
    Pong(u64),
    /// S→D. The first frame of a source that connects again after the token, in place of `Prepare`
    /// (JSON of `ResumeRequest`).
    Resume(Vec<u8>),
    /// D→S. The answer (JSON of `ResumeAnswer`). If blocks are missing, `Missing` lists of all of
    /// them follow and a `RoundEnd`, which the source gives back as `RoundApplied`; then bulk and
    /// demands go on as before.
    Resumed(Vec<u8>),
    /// A kind that this version does not know; skipped by readers.
    Unknown(u8),
}

mod kind {
    pub(super) const PREPARE: u8 = 1;
    pub(super) const VERDICT: u8 = 2;
    pub(super) const BLOCKS: u8 = 3;
    pub(super) const ZERO: u8 = 4;
    pub(super) const ROUND_END: u8 = 5;
    pub(super) const ROUND_APPLIED: u8 = 6;
    pub(super) const MISSING: u8 = 7;
    pub(super) const TOKEN: u8 = 8;
    pub(super) const OFFER: u8 = 9;
    pub(super) const REFUSED: u8 = 10;
    pub(super) const CONFIRMED: u8 = 11;
    pub(super) const SOURCE_DURABLE: u8 = 12;
    pub(super) const BULK_END: u8 = 13;
    pub(super) const DURABLE: u8 = 14;
    pub(super) const ABORT: u8 = 15;
    pub(super) const DEMAND: u8 = 16;
    pub(super) const PING: u8 = 17;
    pub(super) const PONG: u8 = 18;
    pub(super) const EXPECT: u8 = 19;
    pub(super) const RESUME: u8 = 20;
    pub(super) const RESUMED: u8 = 21;
    pub(super) const CHANGED: u8 = 22;
    pub(super) const HISTORY: u8 = 23;
    pub(super) const NAMES: u8 = 24;
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(bytes);
    out
}

/// Writes frames; counts bytes.
pub struct FrameWriter<W> {
    to: W,
    checked: bool,
    sent: u64,
}

impl<W: Write> FrameWriter<W> {
    /// `checked`: add checksums (a plaintext connection).
    pub fn new(to: W, checked: bool) -> Self {
        Self { to, checked, sent: 0 }
    }

    /// Bytes written so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Sends what is buffered.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    fn put(&mut self, kind: u8, device: u8, a: u64, b: u64, parts: &[&[u8]]) -> io::Result<()> {
        let length: usize = parts.iter().map(|p| p.len()).sum();
        let Some(length) = u32::try_from(length).ok().filter(|l| *l <= MAX_PAYLOAD) else {
            let text = format!("a frame of {length} bytes exceeds {MAX_PAYLOAD}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        let mut header = [0; HEADER];
        header[0] = kind;
        header[1] = device;
        header[4..8].copy_from_slice(&length.to_le_bytes());
        header[8..16].copy_from_slice(&a.to_le_bytes());
        header[16..24].copy_from_slice(&b.to_le_bytes());
        if self.checked {
            let mut hash = XxHash3_64::new();
            hash.write(&header[..24]);
            parts.iter().for_each(|part| hash.write(part));
            header[24..32].copy_from_slice(&hash.finish().to_le_bytes());
        }
        self.to.write_all(&header)?;
        for part in parts {
            self.to.write_all(part)?;
        }
        self.sent += (HEADER + length as usize) as u64;
        Ok(())
    }

    /// Sends whole blocks without copying them into a [`Frame`] first.
    pub fn blocks(
        &mut self,
        device: DeviceNumber,
        start: BlockIndex,
        data: &[u8],
    ) -> io::Result<()> {
        self.put(kind::BLOCKS, device.0, start.0, 0, &[data])
    }

    /// Sends a set as as many `Missing` frames as it takes.
    pub fn missing(&mut self, device: DeviceNumber, set: &BlockSet) -> io::Result<()> {
        let ranges: Vec<BlockRange> = set.ranges().collect();
        for piece in ranges.chunks(RANGES_PER_FRAME) {
            self.write(&Frame::Missing { device, ranges: piece.to_vec() })?;
        }
        Ok(())
    }

    /// Sends a set as as many `Changed` frames as it takes.
    pub fn changed(&mut self, device: DeviceNumber, set: &BlockSet) -> io::Result<()> {
        let ranges: Vec<BlockRange> = set.ranges().collect();
        for piece in ranges.chunks(RANGES_PER_FRAME) {
            self.write(&Frame::Changed { device, ranges: piece.to_vec() })?;
        }
        Ok(())
    }

    /// Sends any frame.
    pub fn write(&mut self, frame: &Frame) -> io::Result<()> {
        match frame {
            Frame::Prepare(json) => self.put(kind::PREPARE, 0, 0, 0, &[json]),
            Frame::Verdict(json) => self.put(kind::VERDICT, 0, 0, 0, &[json]),
            Frame::Blocks { device, start, data } => self.blocks(*device, *start, data),
            Frame::Zero { device, range } => {
                self.put(kind::ZERO, device.0, range.start.0, range.count, &[])
            }
            Frame::Names { device, start, names } => {
                self.put(kind::NAMES, device.0, start.0, 0, &[names])
            }
            Frame::RoundEnd(round) => self.put(kind::ROUND_END, 0, *round, 0, &[]),
            Frame::RoundApplied(round) => self.put(kind::ROUND_APPLIED, 0, *round, 0, &[]),
            Frame::Missing { device, ranges } => {
                self.put(kind::MISSING, device.0, 0, 0, &[&encode_list(ranges)?])
            }
            Frame::Changed { device, ranges } => {
                self.put(kind::CHANGED, device.0, 0, 0, &[&encode_list(ranges)?])
            }
            Frame::History(json) => self.put(kind::HISTORY, 0, 0, 0, &[json]),
            Frame::Token { meta, state } => {
                self.put(kind::TOKEN, 0, meta.len() as u64, 0, &[meta, state])
            }
            Frame::Offer { attempt, serial, good_for_ms } => {
                self.put(kind::OFFER, 0, *attempt, *serial, &[&good_for_ms.to_le_bytes()])
            }
            Frame::Refused { attempt, reason } => {
                self.put(kind::REFUSED, 0, *attempt, 0, &[reason.as_bytes()])
            }
            Frame::Confirmed(json) => self.put(kind::CONFIRMED, 0, 0, 0, &[json]),
            Frame::SourceDurable { attempt } => self.put(kind::SOURCE_DURABLE, 0, *attempt, 0, &[]),
            Frame::BulkEnd => self.put(kind::BULK_END, 0, 0, 0, &[]),
            Frame::Durable(json) => self.put(kind::DURABLE, 0, 0, 0, &[json]),
            Frame::Abort(reason) => self.put(kind::ABORT, 0, 0, 0, &[reason.as_bytes()]),
            Frame::Expect(ms) => self.put(kind::EXPECT, 0, *ms, 0, &[]),
            Frame::Demand { device, range } => {
                self.put(kind::DEMAND, device.0, range.start.0, range.count, &[])
            }
            Frame::Ping(nonce) => self.put(kind::PING, 0, *nonce, 0, &[]),
            Frame::Pong(nonce) => self.put(kind::PONG, 0, *nonce, 0, &[]),
            Frame::Resume(json) => self.put(kind::RESUME, 0, 0, 0, &[json]),
            Frame::Resumed(json) => self.put(kind::RESUMED, 0, 0, 0, &[json]),
            Frame::Unknown(kind) => self.put(*kind, 0, 0, 0, &[]),
        }
    }
}

/// Reads frames.
pub struct FrameReader<R> {
    from: R,
    checked: bool,
    spare: Vec<u8>,
}

impl<R: Read> FrameReader<R> {
    /// `checked`: the connection is plaintext and frames carry checksums.
    pub fn new(from: R, checked: bool) -> Self {
        Self { from, checked, spare: Vec::new() }
    }

    /// Gives a payload's memory back, for the next frame: bulk data comes in equal pieces, and
    /// fresh memory for each costs a page fault per block.
    pub fn recycle(&mut self, payload: Vec<u8>) {
        if payload.capacity() > self.spare.capacity() {
            self.spare = payload;
        }
    }

    /// The next frame; an error ends the connection, except a time-out before the first byte of a
    /// frame, after which reading may go on.
    pub fn read(&mut self) -> Result<Frame, WireError> {
        let mut header = [0; HEADER];
        let first = loop {
            match self.from.read(&mut header) {
                Ok(0) => return Err(WireError::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => break read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        };
        self.rest_of_frame(header, first).map_err(|error| match error {
            WireError::Io(stall) if stall.kind() == io::ErrorKind::TimedOut => {
                WireError::Io(io::Error::other("it stalled in the middle of a frame"))
            }
            other => other,
        })
    }

    fn rest_of_frame(
        &mut self,
        mut header: [u8; HEADER],
        first: usize,
    ) -> Result<Frame, WireError> {
        self.from.read_exact(&mut header[first..])?;
        let length = u32::from_le_bytes(array(&header[4..8]));
        if length > MAX_PAYLOAD {
            return Err(WireError::Invalid(format!("a payload of {length} bytes")));
        }
        let mut payload = std::mem::take(&mut self.spare);
        // In steps, so that a length that lies costs no more memory than bytes that came.
        let mut read = 0;
        while read < length as usize {
            let step = (length as usize).min(read + READ_STEP);
            payload.resize(step, 0);
            self.from.read_exact(&mut payload[read..step])?;
            read = step;
        }
        payload.truncate(length as usize);
        if self.checked {
            let mut hash = XxHash3_64::new();
            hash.write(&header[..24]);
            hash.write(&payload);
            if hash.finish() != u64::from_le_bytes(array(&header[24..32])) {
                return Err(WireError::Damaged);
            }
        }
        decode(&header, payload)
    }
}

fn text(payload: Vec<u8>) -> Result<String, WireError> {
    String::from_utf8(payload).map_err(|_| WireError::Invalid("text that is not UTF-8".into()))
}

fn run(a: u64, b: u64) -> Result<BlockRange, WireError> {
    if b == 0 || a.checked_add(b).is_none() {
        return Err(WireError::Invalid(format!("{b} blocks from block {a}")));
    }
    Ok(BlockRange::new(a, b))
}

fn encode_list(ranges: &[BlockRange]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(ranges.len() * 12);
    for range in ranges {
        bytes.extend_from_slice(&range.start.0.to_le_bytes());
        let count =
            u32::try_from(range.count).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        bytes.extend_from_slice(&count.to_le_bytes());
    }
    Ok(bytes)
}

fn decode_list(payload: &[u8]) -> Result<Vec<BlockRange>, WireError> {
    if !payload.len().is_multiple_of(12) {
        return Err(WireError::Invalid(format!("a list of {} bytes", payload.len())));
    }
    let range = |bytes: &[u8]| {
        let start = u64::from_le_bytes(array(&bytes[0..8]));
        run(start, u64::from(u32::from_le_bytes(array(&bytes[8..12]))))
    };
    payload.chunks_exact(12).map(range).collect()
}

fn decode(header: &[u8; HEADER], mut payload: Vec<u8>) -> Result<Frame, WireError> {
    let device = DeviceNumber(header[1]);
    let a = u64::from_le_bytes(array(&header[8..16]));
    let b = u64::from_le_bytes(array(&header[16..24]));
    Ok(match header[0] {
        kind::PREPARE => Frame::Prepare(payload),
        kind::VERDICT => Frame::Verdict(payload),
        kind::BLOCKS => {
            if payload.is_empty() || !payload.len().is_multiple_of(BLOCK_SIZE) {
                let text = format!("{} bytes are not whole blocks", payload.len());
                return Err(WireError::Invalid(text));
            }
            run(a, (payload.len() / BLOCK_SIZE) as u64)?;
            Frame::Blocks { device, start: BlockIndex(a), data: payload }
        }
        kind::ZERO => Frame::Zero { device, range: run(a, b)? },
        kind::NAMES => {
            if payload.is_empty() || !payload.len().is_multiple_of(NAME_BYTES) {
                let text = format!("{} bytes are not whole names", payload.len());
                return Err(WireError::Invalid(text));
            }
            run(a, (payload.len() / NAME_BYTES) as u64)?;
            Frame::Names { device, start: BlockIndex(a), names: payload }
        }
        kind::ROUND_END => Frame::RoundEnd(a),
        kind::ROUND_APPLIED => Frame::RoundApplied(a),
        kind::MISSING => Frame::Missing { device, ranges: decode_list(&payload)? },
        kind::CHANGED => Frame::Changed { device, ranges: decode_list(&payload)? },
        kind::HISTORY => Frame::History(payload),
        kind::TOKEN => {
            let split = usize::try_from(a).ok().filter(|at| *at <= payload.len());
            let Some(split) = split else {
                return Err(WireError::Invalid("a token shorter than it says".into()));
            };
            let state = payload.split_off(split);
            Frame::Token { meta: payload, state }
        }
        kind::OFFER => {
            let Ok(good) = <[u8; 4]>::try_from(payload.as_slice()) else {
                return Err(WireError::Invalid("an offer without validity".into()));
            };
            Frame::Offer { attempt: a, serial: b, good_for_ms: u32::from_le_bytes(good) }
        }
        kind::REFUSED => Frame::Refused { attempt: a, reason: text(payload)? },
        kind::CONFIRMED => Frame::Confirmed(payload),
        kind::SOURCE_DURABLE => Frame::SourceDurable { attempt: a },
        kind::BULK_END => Frame::BulkEnd,
        kind::DURABLE => Frame::Durable(payload),
        kind::ABORT => Frame::Abort(text(payload)?),
        kind::EXPECT => Frame::Expect(a),
        kind::DEMAND => Frame::Demand { device, range: run(a, b)? },
        kind::PING => Frame::Ping(a),
        kind::PONG => Frame::Pong(a),
        kind::RESUME => Frame::Resume(payload),
        kind::RESUMED => Frame::Resumed(payload),
        other => Frame::Unknown(other),
    })
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
