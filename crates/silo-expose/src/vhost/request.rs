//! One request of a virtio block device (virtio 1.2, 5.2.6): read from its chain, checked, done.
//!
//! Guest memory is touched by the kernel (where the device has a file to read or write directly)
//! or copied through a buffer of our own: a guest that changes what it wrote while a device hashes
//! or compresses it would otherwise get two contents under one name.

use super::{
    config::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR},
    memory::GuestMemory,
    ring::{Chain, RingError},
    sys::{self, Moved, Span},
};
use silo_block::io::BlockDevice;
use std::io;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

/// Bytes of `struct virtio_blk_outhdr`, and of a range of DISCARD and WRITE_ZEROES.
const HEADER: usize = 16;
const RANGE: usize = 16;
/// Bytes of the answer to GET_ID (`VIRTIO_BLK_ID_BYTES`).
pub(super) const ID_BYTES: usize = 20;
/// Longest piece that goes through a buffer at a time.
const PIECE: usize = 1 << 20;
/// A write up to this goes through the queue's thread even if it has to be copied.
const SMALL: u64 = 64 << 10;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Id,
    Discard,
    WriteZeroes,
    Unknown(u32),
    /// Its pages cannot be had.
    Unread,
}

/// A request whose chain holds together.
pub(super) struct Request {
    pub(super) kind: Kind,
    /// In bytes; `None` if it is beyond what can be counted.
    offset: Option<u64>,
    /// The data: for reads what is written to, else what is read from.
    data: Vec<Span>,
    length: u64,
    status: Span,
}

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Error,
    Unsupported,
}

impl Status {
    fn byte(self) -> u8 {
        let status = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::Error => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        status as u8
    }
}

/// Who does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// The queue's thread, which must not wait.
    Queue,
    /// A worker, which may.
    Worker,
}

/// What happens to a request that is tried.
pub(super) enum Tried {
    /// The status, and the bytes written to the data.
    Done(Status, u64),
    /// It has to wait: a worker's work.
    WouldWait,
    /// The device failed; nothing was told to the guest yet.
    Failed(io::Error),
}

/// How requests are done, from the options and from what the driver negotiated.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    pub(super) read_only: bool,
    /// The driver knows no FLUSH: each write is made durable.
    pub(super) write_through: bool,
    pub(super) id: [u8; ID_BYTES],
}

/// Takes `buf.len()` bytes from the front of the list. False if there are not so many.
fn take_front(spans: &mut Vec<Span>, buf: &mut [u8]) -> bool {
    let (mut got, mut whole) = (0, 0);
    for span in spans.iter_mut() {
        let count = span.copy_to(&mut buf[got..]);
        got += count;
        if count < span.len() {
            *span = span.part(count, usize::MAX);
            break;
        }
        whole += 1;
    }
    spans.drain(..whole);
    got == buf.len()
}

/// The status is the last byte that the device writes; gives the rest too.
fn split_status(chain: &mut Chain) -> Result<(Span, Vec<Span>), RingError> {
    let mut writable = std::mem::take(&mut chain.writable);
    while writable.last().is_some_and(|span| span.len() == 0) {
        writable.pop();
    }
    let last = writable.pop().ok_or(RingError::Short)?;
    if last.len() > 1 {
        writable.push(last.part(0, last.len() - 1));
    }
    Ok((last.part(last.len() - 1, 1), writable))
}

fn total(spans: &[Span]) -> u64 {
    // No overflow: at most 2^20 spans of less than 2^44 bytes each.
    spans.iter().map(|span| span.len() as u64).sum()
}

impl Request {
    /// Reads the header. The chain's lists are taken over; their pages must be present.
    pub(super) fn parse(chain: &mut Chain) -> Result<Self, RingError> {
        let mut readable = std::mem::take(&mut chain.readable);
        let (status, writable) = split_status(chain)?;
        let mut header = [0; HEADER];
        if !take_front(&mut readable, &mut header) {
            return Err(RingError::Short);
        }
        let word = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        let kind = match word {
            VIRTIO_BLK_T_IN => Kind::Read,
            VIRTIO_BLK_T_OUT => Kind::Write,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::Id,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            other => Kind::Unknown(other),
        };
        let data = if matches!(kind, Kind::Read | Kind::Id) { writable } else { readable };
        let length = total(&data);
        Ok(Self { kind, offset: sector.checked_mul(SECTOR), data, length, status })
    }

    /// A request whose header and data cannot be had: it can only fail.
    pub(super) fn unread(chain: &mut Chain) -> Result<Self, RingError> {
        let (status, _) = split_status(chain)?;
        Ok(Self { kind: Kind::Unread, offset: None, data: Vec::new(), length: 0, status })
    }

    /// The byte that takes the status.
    pub(super) fn status(&self) -> Span {
        self.status
    }

    /// Bytes of data.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Writes the status byte. Gives what the used ring says was written.
    pub(super) fn conclude(&self, memory: &GuestMemory, status: Status, written: u64) -> u32 {
        self.status.copy_from(&[status.byte()]);
        memory.wrote(self.status);
        u32::try_from(written + 1).unwrap_or(u32::MAX)
    }

    /// Does it, or as much as can be done without waiting.
    pub(super) fn run(
        &self,
        device: &dyn BlockDevice,
        memory: &GuestMemory,
        manner: &Manner,
        by: By,
        buffer: &mut Vec<u8>,
    ) -> Tried {
        let writes = matches!(self.kind, Kind::Write | Kind::Discard | Kind::WriteZeroes);
        if writes && manner.read_only {
            return Tried::Done(Status::Error, 0);
        }
        let result = match self.kind {
            Kind::Unknown(_) => return Tried::Done(Status::Unsupported, 0),
            Kind::Unread => return Tried::Done(Status::Error, 0),
            Kind::Id => {
                let mut left = &manner.id[..];
                for &span in &self.data {
                    left = &left[span.copy_from(left)..];
                }
                let written = (ID_BYTES - left.len()) as u64;
                memory.wrote_many(&self.data, written as usize);
                return Tried::Done(Status::Ok, written);
            }
            Kind::Read | Kind::Write => {
                let Some(offset) = self.place(device) else {
                    return Tried::Done(Status::Error, 0);
                };
                if self.kind == Kind::Read {
                    self.read(device, memory, offset, by, buffer)
                } else {
                    self.write(device, manner, offset, by, buffer)
                }
            }
            Kind::Flush | Kind::Discard | Kind::WriteZeroes if by == By::Queue => Ok(None),
            Kind::Flush => device.flush().map(|()| Some(0)),
            Kind::Discard | Kind::WriteZeroes => match self.ranges(device) {
                Err(status) => return Tried::Done(status, 0),
                Ok(ranges) => self.free(device, manner, &ranges).map(|()| Some(0)),
            },
        };
        match result {
            Ok(Some(written)) => Tried::Done(Status::Ok, written),
            Ok(None) => Tried::WouldWait,
            Err(error) => Tried::Failed(error),
        }
    }

    /// Where it starts, if it is whole sectors within the device.
    fn place(&self, device: &dyn BlockDevice) -> Option<u64> {
        let offset = self.offset?;
        let fits = offset.checked_add(self.length)? <= device.size() / SECTOR * SECTOR;
        (fits && self.length > 0 && self.length.is_multiple_of(SECTOR)).then_some(offset)
    }

    fn read(
        &self,
        device: &dyn BlockDevice,
        memory: &GuestMemory,
        offset: u64,
        by: By,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Option<u64>> {
        if let Some(mut place) = device.mapped(offset, self.length, false)? {
            for span in &self.data {
                place = &place[span.copy_from_device(place)..];
            }
            memory.wrote_many(&self.data, self.length as usize);
            return Ok(Some(self.length));
        }
        if let Some((file, at)) = device.file_range(offset, self.length, false) {
            let (mut done, mut rest) = (0, None::<Vec<Span>>);
            while done < self.length {
                let spans: &[Span] = rest.as_deref().unwrap_or(&self.data);
                let nowait = by == By::Queue;
                let moved = match sys::read_file(file, at + done, spans, nowait)? {
                    // A short read is what most such file systems would do at once.
                    Moved::CannotTell if self.length <= SMALL => {
                        sys::read_file(file, at + done, spans, false)?
                    }
                    moved => moved,
                };
                match moved {
                    Moved::Bytes(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Moved::Bytes(count) => {
                        done += count as u64;
                        if done < self.length {
                            advance(rest.get_or_insert_with(|| self.data.clone()), count);
                        }
                    }
                    // What was read already is read again: nobody was told of it.
                    Moved::WouldWait | Moved::CannotTell => return Ok(None),
                }
            }
            memory.wrote_many(&self.data, self.length as usize);
            return Ok(Some(self.length));
        }
        if by == By::Queue && self.length > PIECE as u64 {
            return Ok(None);
        }
        let mut left = self.data.clone();
        let mut done = 0;
        while done < self.length {
            let count = (self.length - done).min(PIECE as u64) as usize;
            if buffer.len() < count {
                buffer.resize(count, 0);
            }
            let piece = &mut buffer[..count];
            if by == By::Worker {
                device.read_at(offset + done, piece)?;
            } else if !device.try_read_at(offset + done, piece)? {
                return Ok(None);
            }
            let mut rest = &piece[..];
            for &span in &left {
                rest = &rest[span.copy_from(rest)..];
                if rest.is_empty() {
                    break;
                }
            }
            advance(&mut left, count);
            done += count as u64;
        }
        memory.wrote_many(&self.data, self.length as usize);
        Ok(Some(self.length))
    }

    fn write(
        &self,
        device: &dyn BlockDevice,
        manner: &Manner,
        offset: u64,
        by: By,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Option<u64>> {
        if by == By::Queue && manner.write_through {
            return Ok(None);
        }
        let mut done = 0;
        if let Some(mut place) = device.mapped(offset, self.length, true)? {
            for span in &self.data {
                place = &place[span.copy_to_device(place)..];
            }
        } else if let Some((file, at)) = device.file_range(offset, self.length, true) {
            let mut rest = None::<Vec<Span>>;
            while done < self.length {
                let spans: &[Span] = rest.as_deref().unwrap_or(&self.data);
                let count = sys::write_file(file, at + done, spans)?;
                if count == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                done += count as u64;
                if done < self.length {
                    advance(rest.get_or_insert_with(|| self.data.clone()), count);
                }
            }
        } else {
            let mut left = self.data.clone();
            if by == By::Queue {
                if self.length > SMALL {
                    return Ok(None);
                }
                let length = self.length as usize;
                if buffer.len() < length {
                    buffer.resize(length, 0);
                }
                let all = &mut buffer[..length];
                take_front(&mut left, all);
                // The queue's thread waits for nothing: it has to be there when the ring is stopped.
                let done = device.try_write_at(offset, all)?;
                return Ok(done.then_some(0));
            }
            while done < self.length {
                let count = (self.length - done).min(PIECE as u64) as usize;
                if buffer.len() < count {
                    buffer.resize(count, 0);
                }
                let piece = &mut buffer[..count];
                take_front(&mut left, piece);
                device.write_at(offset + done, piece)?;
                done += count as u64;
            }
        }
        if manner.write_through {
            device.flush()?;
        }
        Ok(Some(0))
    }

    /// The ranges of DISCARD or WRITE_ZEROES: offset, length, and whether room may be given up.
    fn ranges(&self, device: &dyn BlockDevice) -> Result<Vec<(u64, u64, bool)>, Status> {
        let count = self.length as usize / RANGE;
        if !self.length.is_multiple_of(RANGE as u64) || count == 0 || count > MAX_RANGES {
            return Err(Status::Error);
        }
        let mut bytes = vec![0; count * RANGE];
        take_front(&mut self.data.clone(), &mut bytes);
        let mut ranges = Vec::with_capacity(count);
        for range in bytes.chunks_exact(RANGE) {
            let sector = u64::from_le_bytes(range[..8].try_into().expect("8 bytes"));
            let sectors = u32::from_le_bytes(range[8..12].try_into().expect("4 bytes"));
            let flags = u32::from_le_bytes(range[12..].try_into().expect("4 bytes"));
            // 5.2.6.2: bit 0 is unmap, only for WRITE_ZEROES; all others are reserved.
            let known = if self.kind == Kind::WriteZeroes { 1 } else { 0 };
            if flags & !known != 0 {
                return Err(Status::Unsupported);
            }
            let end = sector.checked_add(sectors.into()).ok_or(Status::Error)?;
            if end > device.size() / SECTOR || sectors > MAX_RANGE_SECTORS {
                return Err(Status::Error);
            }
            if sectors > 0 {
                ranges.push((sector * SECTOR, u64::from(sectors) * SECTOR, flags & 1 != 0));
            }
        }
        Ok(ranges)
    }

    fn free(
        &self,
        device: &dyn BlockDevice,
        manner: &Manner,
        ranges: &[(u64, u64, bool)],
    ) -> io::Result<()> {
        for &(offset, length, unmap) in ranges {
            if self.kind == Kind::Discard {
                device.trim(offset, length)?;
            } else {
                device.zero(offset, length, !unmap)?;
            }
        }
        if manner.write_through { device.flush() } else { Ok(()) }
    }
}

/// Drops `count` bytes from the front.
fn advance(spans: &mut Vec<Span>, mut count: usize) {
    let mut whole = 0;
    for span in spans.iter_mut() {
        if count < span.len() {
            *span = span.part(count, usize::MAX);
            break;
        }
        count -= span.len();
        whole += 1;
    }
    spans.drain(..whole);
}
