//! What a connection sends: answers of both kinds, whole or in pieces, together or alone.

use super::{Connection, Desk};
use crate::nbd::{
    BlockDevice,
    protocol::{
        CHUNK_BYTES, ChunkKind, Command, DATA_CHUNK_BYTES, Position, REPLY_BYTES, Request,
        WireError, encode_chunk, encode_data_chunk, encode_error_chunk, encode_hole_chunk,
        encode_reply,
    },
    receive::{End, stalled},
};
use silo_block::io::{Allocation, Extent};
use std::{
    io::{self, IoSlice},
    os::fd::BorrowedFd,
    sync::{PoisonError, atomic::AtomicU8},
};

/// Answers wait for each other up to this many bytes, while more requests are at hand.
pub(super) const BATCH_BYTES: usize = 128 << 10;
/// Most pieces in which a read is answered.
const MAX_PIECES: usize = 64;

/// What a request led to.
pub(super) enum Answer {
    Done,
    /// The desk's data.
    Data,
    /// The desk's data, less the holes.
    Pieces(Vec<Extent>),
    /// The payload of a status chunk.
    Status(Vec<u8>),
}

impl Connection {
    /// What stands before data that was read in one piece.
    pub(super) fn encode_head(&self, request: &Request, head: &mut [u8]) {
        let cookie = request.cookie;
        if self.structured {
            let (offset, length) = (request.offset, request.length);
            let chunk = encode_data_chunk(Position::Last, cookie, offset, length);
            head.copy_from_slice(&chunk);
        } else {
            head.copy_from_slice(&encode_reply(Ok(()), cookie));
        }
    }

    /// Sends what a request led to.
    pub(super) fn reply(
        &self,
        request: &Request,
        answer: Result<Answer, WireError>,
        desk: &mut Desk,
    ) -> Result<(), End> {
        let cookie = request.cookie;
        match answer {
            Ok(Answer::Data) if request.length > 0 => {
                let mut head = [0; DATA_CHUNK_BYTES];
                let head = if self.structured { &mut head } else { &mut head[..REPLY_BYTES] };
                self.encode_head(request, head);
                let data = &desk.data[..request.length as usize];
                self.send(&mut [IoSlice::new(head), IoSlice::new(data)])
            }
            Ok(Answer::Pieces(runs)) => self.send_pieces(request, &runs, &desk.data),
            Ok(Answer::Status(status)) => {
                let length = status.len() as u32;
                let head = encode_chunk(ChunkKind::Status, Position::Last, cookie, length);
                self.send(&mut [IoSlice::new(&head), IoSlice::new(&status)])
            }
            Ok(Answer::Done | Answer::Data) => {
                self.batch_result(request, Ok(()), desk)?;
                self.send_batch(desk)
            }
            Err(error) => {
                self.batch_result(request, Err(error), desk)?;
                self.send_batch(desk)
            }
        }
    }

    pub(super) fn send_pieces(
        &self,
        request: &Request,
        runs: &[Extent],
        data: &[u8],
    ) -> Result<(), End> {
        let mut heads = Vec::with_capacity(runs.len());
        let mut at = 0;
        for (index, run) in runs.iter().enumerate() {
            let last = index + 1 == runs.len();
            let position = if last { Position::Last } else { Position::Inner };
            // A read is at most MAX_PAYLOAD long, and so is each of its runs.
            let (offset, length) = (request.offset + at, run.length as u32);
            heads.push(match run.allocation {
                Allocation::Data => {
                    encode_data_chunk(position, request.cookie, offset, length).to_vec()
                }
                _ => encode_hole_chunk(position, request.cookie, offset, length).to_vec(),
            });
            at += run.length;
        }
        let mut parts = Vec::with_capacity(runs.len() * 2);
        let mut at = 0;
        for (head, run) in heads.iter().zip(runs) {
            let end = at + run.length as usize;
            parts.push(IoSlice::new(head));
            if run.allocation == Allocation::Data {
                parts.push(IoSlice::new(&data[at..end]));
            }
            at = end;
        }
        self.send(&mut parts)
    }

    /// Adds an answer without data to those that go out together.
    pub(super) fn batch_result(
        &self,
        request: &Request,
        result: Result<(), WireError>,
        desk: &mut Desk,
    ) -> Result<(), End> {
        let wants_chunks =
            self.structured && matches!(request.command, Command::Read | Command::BlockStatus);
        let mut put = |bytes: &[u8]| {
            self.make_room(bytes.len(), desk)?;
            desk.batch_space(bytes.len()).copy_from_slice(bytes);
            desk.batched += bytes.len();
            Ok(())
        };
        match result {
            Err(error) if wants_chunks => put(&encode_error_chunk(error, request.cookie)),
            Ok(()) if wants_chunks => {
                let chunk: [u8; CHUNK_BYTES] =
                    encode_chunk(ChunkKind::None, Position::Last, request.cookie, 0);
                put(&chunk)
            }
            result => put(&encode_reply(result, request.cookie)),
        }
    }

    pub(super) fn make_room(&self, length: usize, desk: &mut Desk) -> Result<(), End> {
        if desk.batched + length > BATCH_BYTES { self.send_batch(desk) } else { Ok(()) }
    }

    pub(super) fn send_file(
        &self,
        request: &Request,
        file: BorrowedFd<'_>,
        at: u64,
    ) -> Result<(), End> {
        let mut head = [0; DATA_CHUNK_BYTES];
        let head = if self.structured { &mut head } else { &mut head[..REPLY_BYTES] };
        self.encode_head(request, head);
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender
            .send_file(head, file, at, request.length as usize)
            .map_err(|error| stalled(error, "and does not take its replies"))
    }

    pub(super) fn send_memory(&self, request: &Request, place: &[AtomicU8]) -> Result<(), End> {
        let mut head = [0; DATA_CHUNK_BYTES];
        let head = if self.structured { &mut head } else { &mut head[..REPLY_BYTES] };
        self.encode_head(request, head);
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender
            .send_memory(head, place)
            .map_err(|error| stalled(error, "and does not take its replies"))
    }

    pub(super) fn send_batch(&self, desk: &mut Desk) -> Result<(), End> {
        let batched = std::mem::take(&mut desk.batched);
        if batched == 0 {
            return Ok(());
        }
        self.send(&mut [IoSlice::new(&desk.batch[..batched])])
    }

    pub(super) fn send(&self, parts: &mut [IoSlice<'_>]) -> Result<(), End> {
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender.send(parts).map_err(|error| stalled(error, "and does not take its replies"))
    }
}

/// The runs of zeros and of data in a read, if there are zeros and not too many runs.
pub(super) fn pieces(extents: &[Extent], length: u32) -> Option<Vec<Extent>> {
    let mut runs: Vec<Extent> = Vec::new();
    for extent in extents {
        // Zeros are zeros on the wire, whatever room they take.
        let allocation = match extent.allocation {
            Allocation::Data => Allocation::Data,
            Allocation::Zero | Allocation::Hole => Allocation::Hole,
        };
        let count = runs.len();
        match runs.last_mut() {
            Some(run) if run.allocation == allocation => run.length += extent.length,
            _ if count == MAX_PIECES => return None,
            _ => runs.push(Extent { length: extent.length, allocation }),
        }
    }
    let covered: u64 = runs.iter().map(|run| run.length).sum();
    let any = runs.iter().any(|run| run.allocation == Allocation::Hole);
    (any && covered == u64::from(length)).then_some(runs)
}

/// Reads what is not a hole, to where it belongs in `data`.
pub(super) fn read_pieces(
    device: &dyn BlockDevice,
    offset: u64,
    runs: &[Extent],
    data: &mut [u8],
) -> io::Result<()> {
    let mut at = 0;
    for run in runs {
        let end = at + run.length as usize;
        if run.allocation == Allocation::Data {
            device.read_at(offset + at as u64, &mut data[at..end])?;
        }
        at = end;
    }
    Ok(())
}
