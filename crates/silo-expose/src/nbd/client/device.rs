//! The client as a block device: requests of any length and place, cut into what the server takes.

use super::{
    NbdClient, Session,
    kept::Content,
    lock,
    replies::{Piece, Sink},
};
use crate::nbd::{
    BlockDevice,
    protocol::{Command, ExportFlags, Request},
};
use silo_block::io::{Allocation, Extent};
use std::{io, sync::PoisonError, time::Duration};

/// Requests of one call that are in flight at the same time.
const MAX_PIECES: usize = 16;
/// The longest request of a call that is cut, so that the pieces of a long one overlap.
const PIECE_BYTES: usize = 1 << 20;
/// The longest range that is trimmed, zeroed or fetched at a time: no server is silent for long.
const RANGE_BYTES: u64 = 64 << 20;
/// The longest range whose status is asked at a time.
const STATUS_BYTES: u64 = 1 << 31;
/// Most extents that are collected in one call.
const MAX_EXTENTS: usize = 1 << 16;

/// A server that owes an answer for so long is not waited for when the device is interrupted.
const STUCK: Duration = Duration::from_millis(300);

const fn request(command: Command, flags: u16, offset: u64, length: u32) -> Request {
    Request { flags, command, cookie: 0, offset, length }
}

impl NbdClient {
    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length);
        if end.is_some_and(|end| end <= self.facts.size) {
            return Ok(());
        }
        let message = format!("{length} bytes at {offset} of a device of {}", self.facts.size);
        Err(io::Error::new(io::ErrorKind::InvalidInput, message))
    }

    fn piece_bytes(&self) -> usize {
        PIECE_BYTES.clamp(self.facts.minimum as usize, self.facts.maximum as usize)
    }

    /// The range of whole blocks around `length` bytes at `offset`, if the server needs those.
    fn widen(&self, offset: u64, length: u64) -> Option<(u64, u64)> {
        let block = u64::from(self.facts.minimum);
        let (start, end) = (offset / block * block, (offset + length).next_multiple_of(block));
        (start != offset || end != offset + length).then_some((start, end - start))
    }

    fn read_whole(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (step, mut at) = (self.piece_bytes(), offset);
        for group in buf.chunks_mut(step * MAX_PIECES) {
            let mut pieces: Vec<_> = Vec::with_capacity(group.len().div_ceil(step));
            for part in group.chunks_mut(step) {
                let length = part.len();
                let read = request(Command::Read, 0, at, length as u32);
                pieces.push(Piece::new(read, &[], Sink::Data(part)));
                at += length as u64;
            }
            self.run(&mut pieces)?;
        }
        Ok(())
    }

    fn write_whole(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (step, mut at) = (self.piece_bytes(), offset);
        for group in data.chunks(step * MAX_PIECES) {
            self.write_kept(
                at,
                group.len() as u64,
                || Content::data(group),
                || {
                    let starts = (at..).step_by(step);
                    let parts = group.chunks(step).zip(starts);
                    let pieces = parts.map(|(part, at)| {
                        let write = request(Command::Write, 0, at, part.len() as u32);
                        Piece::new(write, part, Sink::Nothing)
                    });
                    pieces.collect()
                },
            )?;
            at += group.len() as u64;
        }
        Ok(())
    }

    /// Does requests that write, until a server has them that also has all that was written before.
    fn write_kept<'a>(
        &self,
        offset: u64,
        length: u64,
        content: impl Fn() -> Content,
        pieces: impl Fn() -> Vec<Piece<'a>>,
    ) -> io::Result<()> {
        loop {
            let session = self.run(&mut pieces())?;
            // If the server that answered is lost already, it is done once more.
            if lock(&self.kept).put(session, offset, length, &content) {
                return Ok(());
            }
        }
    }

    /// A command that has a range and no data, in parts that do not take long.
    fn range(&self, command: Command, flags: u16, offset: u64, length: u64) -> io::Result<()> {
        let mut at = offset;
        while at < offset + length {
            let part = (offset + length - at).min(RANGE_BYTES);
            let ranged = request(command, flags, at, part as u32);
            let pieces = || vec![Piece::new(ranged, &[], Sink::Nothing)];
            match command {
                Command::WriteZeroes => {
                    let allocate = flags & Request::NO_HOLE != 0;
                    self.write_kept(at, part, || Content::Zeros(part, allocate), pieces)?;
                }
                _ => drop(self.run(&mut pieces())?),
            }
            at += part;
        }
        Ok(())
    }

    /// Reads the blocks around a write, puts the new bytes in, and writes them whole; nobody else
    /// of this client writes meanwhile.
    fn write_partly(&self, offset: u64, data: &[u8], start: u64, length: u64) -> io::Result<()> {
        let _alone = self.whole.write().unwrap_or_else(PoisonError::into_inner);
        let mut blocks = vec![0; length as usize];
        self.read_whole(start, &mut blocks)?;
        let at = (offset - start) as usize;
        blocks[at..at + data.len()].copy_from_slice(data);
        self.write_whole(start, &blocks)
    }

    /// Writes to a new server what the old one has perhaps lost.
    pub(super) fn write_again(&self, session: &Session, runs: &[(u64, Content)]) -> io::Result<()> {
        let step = self.piece_bytes();
        let mut pieces = Vec::new();
        for (offset, content) in runs {
            match content {
                Content::Data(..) => {
                    for (part, at) in content.bytes().chunks(step).zip((*offset..).step_by(step)) {
                        let write = request(Command::Write, 0, at, part.len() as u32);
                        pieces.push(Piece::new(write, part, Sink::Nothing));
                    }
                }
                Content::Zeros(length, allocate) => {
                    let flags = if *allocate { Request::NO_HOLE } else { 0 };
                    // As long as it was when it was first asked for, or shorter.
                    let zeros = request(Command::WriteZeroes, flags, *offset, *length as u32);
                    pieces.push(Piece::new(zeros, &[], Sink::Nothing));
                }
            }
        }
        for group in pieces.chunks_mut(MAX_PIECES) {
            session.link().call(group)?;
            for piece in group.iter() {
                piece.result().map_err(|error| self.told(piece, error.kind()))?;
            }
        }
        Ok(())
    }

    fn status(&self, offset: u64, length: u64, id: u32) -> io::Result<Vec<Extent>> {
        let ask = request(Command::BlockStatus, 0, offset, length as u32);
        let mut pieces = [Piece::new(ask, &[], Sink::Status(id, Vec::new()))];
        self.run(&mut pieces)?;
        let [piece] = pieces;
        match piece.sink {
            Sink::Status(_, extents) => Ok(extents),
            _ => Ok(Vec::new()),
        }
    }
}

impl BlockDevice for NbdClient {
    fn size(&self) -> u64 {
        self.facts.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        let Some((start, length)) = self.widen(offset, buf.len() as u64) else {
            return self.read_whole(offset, buf);
        };
        let mut blocks = vec![0; length as usize];
        self.read_whole(start, &mut blocks)?;
        let at = (offset - start) as usize;
        buf.copy_from_slice(&blocks[at..at + buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        if let Some((start, length)) = self.widen(offset, data.len() as u64) {
            return self.write_partly(offset, data, start, length);
        }
        let _whole = self.whole.read().unwrap_or_else(PoisonError::into_inner);
        self.write_whole(offset, data)
    }

    /// A server that knows no flush promises that what it answered is durable.
    fn flush(&self) -> io::Result<()> {
        if !self.has(ExportFlags::FLUSH) {
            return Ok(());
        }
        let _flushing = lock(&self.flushing);
        lock(&self.kept).begin_flush();
        let flush = request(Command::Flush, 0, 0, 0);
        // If it fails, what it was to make durable stays kept.
        self.run(&mut [Piece::new(flush, &[], Sink::Nothing)])?;
        if lock(&self.kept).end_flush() {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "{}: the server was lost after writes that had not been flushed, and they could not be \
             written again: what is there is unknown",
            self.endpoint
        )))
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        if !self.has(ExportFlags::TRIM) || self.widen(offset, length).is_some() {
            // It is a hint.
            return Ok(());
        }
        self.range(Command::Trim, 0, offset, length)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.check(offset, length)?;
        if self.has(ExportFlags::WRITE_ZEROES) && self.widen(offset, length).is_none() {
            let _whole = self.whole.read().unwrap_or_else(PoisonError::into_inner);
            let flags = if allocate { Request::NO_HOLE } else { 0 };
            return self.range(Command::WriteZeroes, flags, offset, length);
        }
        let zeros = vec![0; PIECE_BYTES.min(length as usize)];
        let mut at = offset;
        while at < offset + length {
            let part = (offset + length - at).min(PIECE_BYTES as u64);
            self.write_at(at, &zeros[..part as usize])?;
            at += part;
        }
        Ok(())
    }

    fn interrupt(&self) {
        *lock(&self.interrupts) += 1;
        self.interrupted.notify_all();
        // A server that answers is left alone: what was written there is not lost.
        for link in &self.session().links {
            link.close_if_silent(STUCK, "the device was interrupted");
        }
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        self.check(offset, length)?;
        let data = |length| Extent { length, allocation: Allocation::Data };
        let Some(id) = self.facts.allocation.filter(|_| length > 0) else {
            return Ok(if length == 0 { Vec::new() } else { vec![data(length)] });
        };
        let (start, whole) = self.widen(offset, length).unwrap_or((offset, length));
        let (mut extents, mut at) = (Vec::<Extent>::new(), start);
        while at < start + whole && extents.len() < MAX_EXTENTS {
            let asked = (start + whole - at).min(STATUS_BYTES);
            for mut extent in self.status(at, asked, id)? {
                let end = at + extent.length;
                // What lies outside of the range that was asked for is cut off.
                let (from, to) = (at.max(offset), end.min(offset + length));
                at = end;
                if to <= from {
                    continue;
                }
                extent.length = to - from;
                match extents.last_mut() {
                    Some(last) if last.allocation == extent.allocation => {
                        last.length += extent.length;
                    }
                    _ => extents.push(extent),
                }
            }
        }
        Ok(extents)
    }

    fn prefetch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        if !self.has(ExportFlags::CACHE) {
            return Ok(());
        }
        let (start, whole) = self.widen(offset, length).unwrap_or((offset, length));
        self.range(Command::Cache, 0, start, whole)
    }

    fn is_read_only(&self) -> bool {
        self.has(ExportFlags::READ_ONLY)
    }
}
