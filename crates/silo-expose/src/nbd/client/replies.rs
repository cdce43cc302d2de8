//! What a client's connection receives: headers of replies, and what follows them.
//!
//! What must hold: nothing that a server sends makes this panic, allocate more than
//! [`MAX_STATUS_BYTES`], or write outside of the buffer of the request that is answered.

use crate::nbd::protocol::{
    CHUNK_BYTES, ChunkKind, MAX_RUNS, Position, Reply, Request, WireError, decode_error,
    decode_hole, decode_status,
};
use silo_block::io::Extent;
use std::io::{self, Read};

/// Room for what comes in at a time: the answers to sixteen small reads.
const RECEIVE_BYTES: usize = 64 << 10;
/// Data from this length on is read to where it belongs and not into the buffer first.
const LONG: usize = 32 << 10;
/// The longest answer to `BLOCK_STATUS` that is read.
const MAX_STATUS_BYTES: usize = 4 + 8 * MAX_RUNS;
/// The longest description of an error that is read.
const MAX_ERROR_BYTES: usize = 8 << 10;

/// Where the answer to a request goes.
pub(super) enum Sink<'a> {
    /// It has no content.
    Nothing,
    /// The bytes read; as long as the request.
    Data(&'a mut [u8]),
    /// Extents, of the context with this number.
    Status(u32, Vec<Extent>),
}

/// One request and what became of it.
pub(super) struct Piece<'a> {
    pub(super) request: Request,
    /// What follows the request.
    pub(super) payload: &'a [u8],
    pub(super) sink: Sink<'a>,
    /// Bytes of the sink that the server has told.
    told: u64,
    error: Option<WireError>,
    done: bool,
}

impl<'a> Piece<'a> {
    pub(super) const fn new(request: Request, payload: &'a [u8], sink: Sink<'a>) -> Self {
        Self { request, payload, sink, told: 0, error: None, done: false }
    }

    pub(super) const fn is_done(&self) -> bool {
        self.done
    }

    pub(super) const fn result(&self) -> Result<(), WireError> {
        match self.error {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// As if it had never been sent.
    pub(super) fn reset(&mut self) {
        (self.told, self.error, self.done) = (0, None, false);
        if let Sink::Status(_, extents) = &mut self.sink {
            extents.clear();
        }
    }
}

fn broken(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

/// Reads replies from anything that gives bytes.
pub(super) struct Replies<R> {
    input: R,
    buf: Box<[u8]>,
    start: usize,
    end: usize,
    /// The last answer was long: only as much as a header is read at a time.
    long: bool,
}

impl<R: Read> Replies<R> {
    pub(super) fn new(input: R) -> Self {
        let buf = vec![0; RECEIVE_BYTES].into_boxed_slice();
        Self { input, buf, start: 0, end: 0, long: false }
    }

    /// The next header, if it is here already.
    pub(super) fn buffered(&mut self) -> Option<Reply> {
        let bytes = &self.buf[self.start..self.end];
        let length = Reply::header_bytes(bytes)?;
        let reply = Reply::decode(bytes.get(..length)?)?;
        self.start += length;
        Some(reply)
    }

    /// Waits for the next header.
    pub(super) fn next(&mut self) -> io::Result<Reply> {
        loop {
            if let Some(reply) = self.buffered() {
                return Ok(reply);
            }
            if self.end - self.start >= CHUNK_BYTES {
                return Err(broken("the server sent a reply without its magic"));
            }
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            let room = if self.long { CHUNK_BYTES } else { self.buf.len() };
            let count = self.input.read(&mut self.buf[self.end..room])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.end += count;
        }
    }

    fn exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.long = buf.len() >= LONG;
        let ready = (self.end - self.start).min(buf.len());
        buf[..ready].copy_from_slice(&self.buf[self.start..self.start + ready]);
        self.start += ready;
        self.input.read_exact(&mut buf[ready..])
    }

    /// Takes what follows `reply`, which answers `piece`.
    pub(super) fn take(&mut self, reply: Reply, piece: &mut Piece<'_>) -> io::Result<()> {
        let (kind, position, length) = match reply {
            Reply::Simple { result, .. } => return self.take_simple(result, piece),
            Reply::Chunk { kind, position, length, .. } => (kind, position, length as usize),
        };
        match (kind, &mut piece.sink) {
            (ChunkKind::None, _) if length == 0 && position == Position::Last => {}
            (ChunkKind::Data, Sink::Data(buf)) if length > 8 => {
                let mut offset = [0; 8];
                self.exact(&mut offset)?;
                let count = length - 8;
                let at = place(u64::from_be_bytes(offset), count, &piece.request)?;
                self.exact(&mut buf[at..at + count])?;
                piece.told += count as u64;
            }
            (ChunkKind::Hole, Sink::Data(buf)) if length == 12 => {
                let mut payload = [0; 12];
                self.exact(&mut payload)?;
                let (offset, count) = decode_hole(&payload);
                let at = place(offset, count as usize, &piece.request)?;
                buf[at..at + count as usize].fill(0);
                piece.told += u64::from(count);
            }
            (ChunkKind::Status, Sink::Status(id, extents)) if length <= MAX_STATUS_BYTES => {
                let mut payload = vec![0; length];
                self.exact(&mut payload)?;
                let asked = u64::from(piece.request.length);
                if let Some(found) = decode_status(&payload, *id, asked) {
                    *extents = found;
                }
            }
            (kind, _) if kind.is_error() && length <= MAX_ERROR_BYTES => {
                let mut payload = vec![0; length];
                self.exact(&mut payload)?;
                piece.error.get_or_insert(decode_error(&payload));
            }
            (kind, _) => {
                let command = piece.request.command;
                return Err(broken(format!(
                    "the server answers {command:?} with {kind:?} of {length} bytes"
                )));
            }
        }
        if position == Position::Last { finish(piece) } else { Ok(()) }
    }

    fn take_simple(
        &mut self,
        result: Result<(), WireError>,
        piece: &mut Piece<'_>,
    ) -> io::Result<()> {
        match (result, &mut piece.sink) {
            (Err(error), _) => piece.error = Some(error),
            (Ok(()), Sink::Data(buf)) => {
                self.exact(buf)?;
                piece.told = u64::from(piece.request.length);
            }
            (Ok(()), Sink::Nothing) => {}
            (Ok(()), Sink::Status(..)) => {
                return Err(broken("the server answers BLOCK_STATUS without telling anything"));
            }
        }
        finish(piece)
    }
}

/// Where in the buffer of `request` the bytes at `offset` go.
fn place(offset: u64, count: usize, request: &Request) -> io::Result<usize> {
    let at = offset.checked_sub(request.offset);
    at.and_then(|at| usize::try_from(at).ok())
        .filter(|at| at.checked_add(count).is_some_and(|end| end <= request.length as usize))
        .ok_or_else(|| broken("the server sent bytes that were not asked for"))
}

fn finish(piece: &mut Piece<'_>) -> io::Result<()> {
    piece.done = true;
    if piece.error.is_some() {
        return Ok(());
    }
    match &piece.sink {
        Sink::Data(_) if piece.told != u64::from(piece.request.length) => {
            Err(broken(format!("the server sent {} of {} bytes", piece.told, piece.request.length)))
        }
        Sink::Status(_, extents) if extents.is_empty() => {
            Err(broken("the server answers BLOCK_STATUS without telling anything"))
        }
        _ => Ok(()),
    }
}
