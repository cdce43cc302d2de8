//! One client after its handshake.
//!
//! The threads of a connection take turns: one *receives*, the others work or wait for the turn.
//! The receiver does what it can do at once itself (a read from the page cache, a small write) and
//! goes on receiving: at queue depth 1 there is one thread, and no hand-over between threads. What
//! several requests that came together lead to goes out together. A request that may take longer
//! (a block that has not arrived, a flush, a read from the device) costs the turn: another thread
//! receives while this one works. So a read that waits for a block holds up nobody, and at most
//! [`MAX_WORKERS`] requests are in hand.

mod answer;

use super::{
    BlockDevice, Export, MAX_PAYLOAD,
    handshake::Agreement,
    line::{Input, Output},
    protocol::{
        Command, DATA_CHUNK_BYTES, MAX_RUNS, REPLY_BYTES, Request, WireError, encode_status,
    },
    receive::{End, Receiver, broken},
    server::{Client, ThreadGuard},
    sys,
};
use answer::{Answer, BATCH_BYTES, pieces, read_pieces};
use silo_block::io::{Allocation, Extent};
use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Most requests of one connection in hand; QEMU sends at most 16 at a time.
pub(super) const MAX_WORKERS: usize = 32;
/// Requests up to this length are done by the receiver even when others wait behind them.
const SMALL: u32 = 64 << 10;
/// Reads up to this length are copied by the receiver even when others wait behind them: handing
/// the turn over costs as much as the copy.
const MEDIUM: u32 = 256 << 10;
/// Longest payload that is skipped to answer that it is too long; beyond it the client is cut off.
const MAX_SKIPPED: u32 = 64 << 20;
/// Reads from this length on leave out holes, where the client can be told of them.
const HOLES_FROM: u32 = 128 << 10;
/// A device that needs longer to tell of its holes (in ns) is not asked before every read.
const LONG_LOOK: u64 = 20_000;

pub(super) struct Connection {
    client: Arc<Client>,
    export: Arc<Export>,
    structured: bool,
    status: bool,
    receiver: Mutex<Receiver>,
    sender: Mutex<Output>,
    /// Reads can be sent from a file or from memory, and writes received into memory.
    direct: bool,
    /// Nothing is received any more; requests in hand are still answered.
    ended: AtomicBool,
    workers: AtomicUsize,
    /// Workers that wait for the turn to receive.
    idle: AtomicUsize,
    began: Instant,
    /// When reads look for holes again, in ns since it began.
    look_again: AtomicU64,
}

/// A worker's buffers; they grow to the longest request and stay, so that requests allocate
/// nothing.
#[derive(Default)]
struct Desk {
    /// What is read or written.
    data: Vec<u8>,
    /// Answers that were not sent yet: its first `batched` bytes.
    batch: Vec<u8>,
    batched: usize,
}

impl Desk {
    fn data(&mut self, length: u32) -> &mut [u8] {
        if self.data.len() < length as usize {
            self.data.resize(length as usize, 0);
        }
        &mut self.data[..length as usize]
    }

    fn batch_space(&mut self, length: usize) -> &mut [u8] {
        let end = self.batched + length;
        if self.batch.len() < end {
            self.batch.resize(end.max(BATCH_BYTES), 0);
        }
        &mut self.batch[self.batched..end]
    }
}

/// What became of a request that the receiver looked at.
enum Quick {
    /// It is answered.
    Answered,
    /// It may take longer.
    Later,
}

impl Connection {
    pub(super) fn new(
        client: Arc<Client>,
        agreement: Agreement,
        input: Input,
        output: Output,
        poll: Duration,
    ) -> Self {
        Self {
            client,
            export: agreement.export,
            structured: agreement.structured,
            status: agreement.status,
            receiver: Mutex::new(Receiver::new(input, poll)),
            direct: output.is_direct(),
            sender: Mutex::new(output),
            ended: AtomicBool::new(false),
            workers: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
            began: Instant::now(),
            look_again: AtomicU64::new(0),
        }
    }

    fn nanos(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// A worker's life: returns when nothing more is to be received. The first worker is the thread
    /// that accepted the client; the last one to leave hangs up.
    pub(super) fn work(self: &Arc<Self>, threads: &ThreadGuard) {
        let mut desk = Desk::default();
        while !self.has_ended() {
            match self.turn(&mut desk, threads) {
                Ok(()) => {}
                Err(End::Closed) => {
                    self.ended.store(true, Ordering::Release);
                    // What is done is answered; the client may be gone, which is no news.
                    let _ = self.send_batch(&mut desk);
                }
                Err(End::Broken(error)) => {
                    // The first to notice tells; the others fail because it hung up.
                    if !self.ended.swap(true, Ordering::AcqRel) && !self.client.is_draining() {
                        tracing::warn!(%error, "an NBD client was cut off");
                    }
                    self.client.hang_up();
                }
            }
        }
        if self.workers.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.sender.lock().unwrap_or_else(PoisonError::into_inner).say_goodbye();
            self.client.hang_up();
        }
    }

    /// Waits for the turn, receives, and works on what costs the turn.
    fn turn(self: &Arc<Self>, desk: &mut Desk, threads: &ThreadGuard) -> Result<(), End> {
        self.idle.fetch_add(1, Ordering::AcqRel);
        let mut receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        self.idle.fetch_sub(1, Ordering::AcqRel);
        while !self.has_ended() {
            if !receiver.has_whole_request() {
                self.send_batch(desk)?;
            }
            let request = receiver.next()?;
            // A server that stops looks like a line that is cut, never like a disk that fails: a
            // client that can will send again, to the next server, what was not answered.
            if request.command == Command::Disconnect || self.client.is_draining() {
                return Err(End::Closed);
            }
            if let Err(error) = self.admit(&request) {
                if request.payload() > MAX_SKIPPED {
                    return Err(broken(format!("a write of {} bytes", request.length)));
                }
                receiver.skip(request.payload() as usize)?;
                self.batch_result(&request, Err(error), desk)?;
                continue;
            }
            if let Quick::Later = self.try_quickly(&request, &mut receiver, desk)? {
                self.send_batch(desk)?;
                self.keep_receiving(threads);
                drop(receiver);
                let answer = self.execute(&request, desk)?;
                return self.reply(&request, answer, desk);
            }
        }
        self.send_batch(desk)
    }

    /// Checks what can be checked before anything is done or allocated.
    fn admit(&self, request: &Request) -> Result<(), WireError> {
        let has_data = matches!(request.command, Command::Read | Command::Write);
        let known = match request.command {
            Command::Other(_) => false,
            Command::BlockStatus => self.status && request.length > 0,
            _ => true,
        };
        if !known || !request.flags_fit(self.structured) || has_data && request.length > MAX_PAYLOAD
        {
            return Err(WireError::Invalid);
        }
        if request.command.writes() && self.export.is_read_only() {
            return Err(WireError::NotPermitted);
        }
        if request.command == Command::Flush {
            return Ok(());
        }
        let end = request.offset.checked_add(u64::from(request.length));
        if end.is_some_and(|end| end <= self.export.size()) {
            return Ok(());
        }
        // The protocol's own distinction: a write past the end is out of space.
        match request.command {
            Command::Write | Command::WriteZeroes => Err(WireError::NoSpace),
            _ => Err(WireError::Invalid),
        }
    }

    /// Does what needs no waiting. A write's data is with the desk if this says "later".
    fn try_quickly(
        &self,
        request: &Request,
        receiver: &mut Receiver,
        desk: &mut Desk,
    ) -> Result<Quick, End> {
        let hold = self.export.hold(|| self.client.is_draining()).ok_or(End::Closed)?;
        let (device, length) = (&*hold.device, request.length);
        match request.command {
            Command::Read if length <= SMALL => self.read_into_batch(request, device, desk),
            Command::Read => {
                if let Some(runs) = self.holes(request, device) {
                    if runs.iter().any(|run| run.allocation == Allocation::Data) {
                        return Ok(Quick::Later);
                    }
                    self.reply(request, Ok(Answer::Pieces(runs)), desk)?;
                    return Ok(Quick::Answered);
                }
                if let Some((file, at)) = self.send_from_file(request, device) {
                    self.send_batch(desk)?;
                    self.send_file(request, file, at)?;
                    return Ok(Quick::Answered);
                }
                if let Some(place) = self.memory(request, device, false) {
                    self.send_batch(desk)?;
                    self.send_memory(request, place)?;
                    return Ok(Quick::Answered);
                }
                // Long ones are copied by several threads at a time, if there are several.
                if length > MEDIUM && !receiver.is_empty() {
                    return Ok(Quick::Later);
                }
                self.send_batch(desk)?;
                match device.try_read_at(request.offset, desk.data(length)) {
                    Ok(false) => return Ok(Quick::Later),
                    Ok(true) => self.reply(request, Ok(Answer::Data), desk)?,
                    Err(error) => self.reply(request, Err(tell(request, &error)), desk)?,
                }
                Ok(Quick::Answered)
            }
            Command::Write => {
                let quick = !request.has(Request::FUA)
                    && !device.may_wait(request.offset, u64::from(length));
                // From where it was received, if it is all there.
                let written = receiver.with_payload(length as usize, |data| {
                    quick.then(|| device.write_at(request.offset, data))
                });
                let written = match written {
                    Some(written) => written,
                    None if quick
                        && length > SMALL
                        && let Some(place) = self.memory(request, device, true) =>
                    {
                        receiver.payload_into(place)?;
                        Ok(())
                    }
                    None => {
                        let data = desk.data(length);
                        receiver.payload(data)?;
                        if !quick || length > SMALL && !receiver.is_empty() {
                            return Ok(Quick::Later);
                        }
                        device.write_at(request.offset, data)
                    }
                };
                let result = written.map_err(|error| tell(request, &error));
                self.batch_result(request, result, desk)?;
                Ok(Quick::Answered)
            }
            _ => Ok(Quick::Later),
        }
    }

    fn read_into_batch(
        &self,
        request: &Request,
        device: &dyn BlockDevice,
        desk: &mut Desk,
    ) -> Result<Quick, End> {
        let head = if self.structured { DATA_CHUNK_BYTES } else { REPLY_BYTES };
        let whole = head + request.length as usize;
        self.make_room(whole, desk)?;
        let space = desk.batch_space(whole);
        match device.try_read_at(request.offset, &mut space[head..]) {
            Ok(false) => return Ok(Quick::Later),
            Ok(true) => {
                if self.structured && request.length == 0 {
                    // A data chunk is never empty.
                    self.batch_result(request, Ok(()), desk)?;
                } else {
                    self.encode_head(request, &mut space[..head]);
                    desk.batched += whole;
                }
            }
            Err(error) => self.batch_result(request, Err(tell(request, &error)), desk)?,
        }
        Ok(Quick::Answered)
    }

    /// The runs of a read that has holes worth leaving out, if the client understands that. Some
    /// devices take long to tell (a full file in memory is searched to its end): looking in vain, or
    /// for long, takes at most a twentieth of the time.
    fn holes(&self, request: &Request, device: &dyn BlockDevice) -> Option<Vec<Extent>> {
        if !self.structured || request.length < HOLES_FROM || request.has(Request::DONT_FRAGMENT) {
            return None;
        }
        let start = self.nanos();
        if start < self.look_again.load(Ordering::Relaxed) {
            return None;
        }
        let found = device.extents(request.offset, u64::from(request.length));
        let runs = found.ok().and_then(|extents| pieces(&extents, request.length));
        let cost = self.nanos() - start;
        if runs.is_none() || cost > LONG_LOOK {
            self.look_again.store(start + cost * 20, Ordering::Relaxed);
        }
        runs
    }

    /// Does a request, waiting for what it needs.
    fn execute(
        &self,
        request: &Request,
        desk: &mut Desk,
    ) -> Result<Result<Answer, WireError>, End> {
        let hold = self.export.hold(|| self.client.is_draining()).ok_or(End::Closed)?;
        match self.execute_on(&*hold.device, request, desk) {
            Ok(answer) => Ok(Ok(answer)),
            // It failed because it was interrupted, most likely.
            Err(_) if self.client.is_draining() => Err(End::Closed),
            Err(error) => Ok(Err(tell(request, &error))),
        }
    }

    fn execute_on(
        &self,
        device: &dyn BlockDevice,
        request: &Request,
        desk: &mut Desk,
    ) -> io::Result<Answer> {
        let (offset, length) = (request.offset, u64::from(request.length));
        match request.command {
            Command::Read => {
                if let Some(runs) = self.holes(request, device) {
                    read_pieces(device, offset, &runs, desk.data(request.length))?;
                    return Ok(Answer::Pieces(runs));
                }
                device.read_at(offset, desk.data(request.length))?;
                return Ok(Answer::Data);
            }
            Command::BlockStatus => {
                let one = request.has(Request::REQUEST_ONE);
                let most = if one { 1 } else { MAX_RUNS };
                let extents = device.extents(offset, length)?;
                let status = encode_status(&extents, length, most);
                return status.map(Answer::Status).ok_or_else(|| {
                    io::Error::other("the device tells nothing of the bytes that were asked for")
                });
            }
            Command::Write => device.write_at(offset, desk.data(request.length))?,
            Command::Flush => device.flush()?,
            Command::Trim => device.trim(offset, length)?,
            Command::Cache => device.prefetch(offset, length)?,
            Command::WriteZeroes => {
                if request.has(Request::FAST_ZERO) && !device.zeroes_fast() {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                device.zero(offset, length, request.has(Request::NO_HOLE))?;
            }
            Command::Disconnect | Command::Other(_) => {
                return Err(io::ErrorKind::InvalidInput.into());
            }
        }
        if request.command.writes() && request.has(Request::FUA) {
            device.flush()?;
        }
        Ok(Answer::Done)
    }

    /// The file that a read is sent from without a copy: if there is one, and nothing has to be
    /// waited for, and the line can.
    fn send_from_file<'a>(
        &self,
        request: &Request,
        device: &'a dyn BlockDevice,
    ) -> Option<(BorrowedFd<'a>, u64)> {
        if !self.direct {
            return None;
        }
        let length = u64::from(request.length);
        let (file, at) = device.file_range(request.offset, length, false)?;
        sys::is_cached(file, at, length).then_some((file, at))
    }

    /// Where a request's bytes lie in memory, if it can be done there. What stands against it is told
    /// by the way that is gone instead.
    fn memory<'a>(
        &self,
        request: &Request,
        device: &'a dyn BlockDevice,
        write: bool,
    ) -> Option<&'a [AtomicU8]> {
        let length = u64::from(request.length);
        self.direct.then(|| device.mapped(request.offset, length, write).ok()?)?
    }

    /// Sees to it that somebody receives while this thread works.
    fn keep_receiving(self: &Arc<Self>, threads: &ThreadGuard) {
        if self.idle.load(Ordering::Acquire) > 0 {
            return;
        }
        if self.workers.fetch_add(1, Ordering::AcqRel) >= MAX_WORKERS {
            // Enough in hand: the next one that is done receives.
            self.workers.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let connection = self.clone();
        let guard = threads.clone();
        let spawned = thread::Builder::new()
            .name("silo-nbd".to_owned())
            .stack_size(256 << 10)
            .spawn(move || connection.work(&guard));
        if let Err(error) = spawned {
            self.workers.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "no thread for an NBD connection; it goes on with fewer");
        }
    }
}

/// The client gets a number; the sentence goes to the log.
fn tell(request: &Request, error: &io::Error) -> WireError {
    // A client that asks for fast zeros asks whether they are fast.
    if !request.has(Request::FAST_ZERO) || error.kind() != io::ErrorKind::Unsupported {
        tracing::warn!(
            command = ?request.command,
            offset = request.offset,
            length = request.length,
            %error,
            "a request failed"
        );
    }
    WireError::from(error)
}
