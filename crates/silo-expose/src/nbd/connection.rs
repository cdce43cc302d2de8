//! One client after its handshake.
//!
//! The threads of a connection take turns: one *receives*, the others work or wait for the turn.
//! The receiver does what it can do at once itself (a read from the page cache, a small write) and
//! goes on receiving: at queue depth 1 there is one thread, and no hand-over between threads. A
//! request that may take longer (a block that has not arrived, a flush, a read from the device)
//! costs the turn: another thread receives while this one works. So a read that waits for a block
//! holds up nobody, and at most [`MAX_WORKERS`] requests are in hand.

use super::{
    BlockDevice, MAX_PAYLOAD,
    protocol::{Command, REPLY_BYTES, REQUEST_BYTES, Request, WireError, encode_reply},
    server::ThreadGuard,
};
use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// Most requests of one connection in hand; QEMU sends at most 16 at a time.
pub(super) const MAX_WORKERS: usize = 32;
/// Requests up to this length are done by the receiver even when others wait behind them.
const SMALL: u32 = 64 << 10;
/// Longest payload that is skipped to answer that it is too long; beyond it the client is cut off.
const MAX_SKIPPED: u32 = 64 << 20;
const RECEIVE_BYTES: usize = 64 << 10;

pub(super) struct Connection {
    stream: Arc<UnixStream>,
    device: Arc<dyn BlockDevice>,
    receiver: Mutex<Receiver>,
    sender: Mutex<()>,
    closed: AtomicBool,
    workers: AtomicUsize,
    /// Workers that wait for the turn to receive.
    idle: AtomicUsize,
}

/// Why a connection ends.
enum End {
    /// The client hung up or said goodbye.
    Closed,
    /// The client broke the protocol, stalled, or the socket failed.
    Broken(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Broken(error),
        }
    }
}

fn broken(message: String) -> End {
    End::Broken(io::Error::new(io::ErrorKind::InvalidData, message))
}

/// Bytes that came in and were not taken yet.
struct Receiver {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Receiver {
    fn available(&self) -> usize {
        self.end - self.start
    }

    /// Waits for the next request; silence between requests is no error.
    fn next(&mut self, stream: &UnixStream) -> Result<Request, End> {
        while self.available() < REQUEST_BYTES {
            if self.start > 0 {
                self.buf.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            let idle = self.end == 0;
            match (&mut &*stream).read(&mut self.buf[self.end..]) {
                Ok(0) if idle => return Err(End::Closed),
                Ok(0) => return Err(broken("the client hung up inside a request".to_owned())),
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && idle => {}
                Err(error) => return Err(stalled(error, "inside a request's header")),
            }
        }
        let header = &self.buf[self.start..self.start + REQUEST_BYTES];
        let header = header.try_into().expect("a slice of the header's length");
        let request = Request::decode(header)
            .ok_or_else(|| broken("the client sent a request without its magic".to_owned()))?;
        self.start += REQUEST_BYTES;
        Ok(request)
    }

    /// The bytes that follow a request's header.
    fn payload(&mut self, stream: &UnixStream, buf: &mut [u8]) -> Result<(), End> {
        let ready = self.available().min(buf.len());
        buf[..ready].copy_from_slice(&self.buf[self.start..self.start + ready]);
        self.start += ready;
        (&mut &*stream)
            .read_exact(&mut buf[ready..])
            .map_err(|error| stalled(error, "inside a write's data"))
    }

    fn skip(&mut self, stream: &UnixStream, mut length: usize) -> Result<(), End> {
        let mut bin = [0; 4096];
        while length > 0 {
            let part = length.min(bin.len());
            self.payload(stream, &mut bin[..part])?;
            length -= part;
        }
        Ok(())
    }
}

fn stalled(error: io::Error, place: &str) -> End {
    if error.kind() == io::ErrorKind::WouldBlock {
        return End::Broken(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the client stalled {place}"),
        ));
    }
    error.into()
}

/// A worker's buffer: room for a reply's header, then data. It grows to the longest request and
/// stays, so that requests allocate nothing.
struct Scratch(Vec<u8>);

impl Scratch {
    fn data(&mut self, length: u32) -> &mut [u8] {
        let end = REPLY_BYTES + length as usize;
        if self.0.len() < end {
            self.0.resize(end, 0);
        }
        &mut self.0[REPLY_BYTES..end]
    }
}

/// What became of a request that the receiver looked at.
enum Quick {
    Done(Result<(), WireError>),
    /// It may take longer.
    Later,
}

impl Connection {
    /// `stall`: longest time that the client may take in the middle of a message.
    pub(super) fn new(
        stream: Arc<UnixStream>,
        device: Arc<dyn BlockDevice>,
        stall: Duration,
    ) -> io::Result<Self> {
        stream.set_read_timeout(Some(stall))?;
        stream.set_write_timeout(Some(stall))?;
        let buf = vec![0; RECEIVE_BYTES].into_boxed_slice();
        Ok(Self {
            stream,
            device,
            receiver: Mutex::new(Receiver { buf, start: 0, end: 0 }),
            sender: Mutex::new(()),
            closed: AtomicBool::new(false),
            workers: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
        })
    }

    /// Ends the connection: whoever receives or sends on it comes back.
    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // It fails when the client is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// A worker's life: returns when the connection has ended. The first worker is the thread that
    /// accepted the client.
    pub(super) fn work(self: &Arc<Self>, threads: &ThreadGuard) {
        let mut scratch = Scratch(Vec::new());
        while !self.closed.load(Ordering::Acquire) {
            match self.turn(&mut scratch, threads) {
                Ok(()) => {}
                Err(End::Closed) => self.close(),
                Err(End::Broken(error)) => {
                    // The first to notice tells; the others fail because it closed.
                    if !self.closed.swap(true, Ordering::AcqRel) {
                        tracing::warn!(%error, "an NBD client was cut off");
                    }
                    self.close();
                }
            }
        }
        self.workers.fetch_sub(1, Ordering::AcqRel);
    }

    /// Waits for the turn, receives, and works on what costs the turn.
    fn turn(self: &Arc<Self>, scratch: &mut Scratch, threads: &ThreadGuard) -> Result<(), End> {
        self.idle.fetch_add(1, Ordering::AcqRel);
        let mut receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        self.idle.fetch_sub(1, Ordering::AcqRel);
        while !self.closed.load(Ordering::Acquire) {
            let request = receiver.next(&self.stream)?;
            if request.command == Command::Disconnect {
                return Err(End::Closed);
            }
            if let Err(error) = self.admit(&request) {
                self.refuse(&mut receiver, &request, error)?;
                continue;
            }
            let data = scratch.data(if self.has_data(&request) { request.length } else { 0 });
            if request.payload() > 0 {
                receiver.payload(&self.stream, data)?;
            }
            let alone = receiver.available() == 0;
            match self.try_quickly(&request, data, alone) {
                Quick::Done(result) => self.reply(&request, result, scratch)?,
                Quick::Later => {
                    self.keep_receiving(threads);
                    drop(receiver);
                    let result = self.execute(&request, data);
                    return self.reply(&request, result, scratch);
                }
            }
        }
        Ok(())
    }

    const fn has_data(&self, request: &Request) -> bool {
        matches!(request.command, Command::Read | Command::Write)
    }

    /// Checks what can be checked before anything is done or allocated.
    fn admit(&self, request: &Request) -> Result<(), WireError> {
        if let Command::Other(_) = request.command {
            return Err(WireError::Invalid);
        }
        if !request.flags_fit() {
            return Err(WireError::Invalid);
        }
        if self.has_data(request) && request.length > MAX_PAYLOAD {
            return Err(WireError::Invalid);
        }
        if request.command == Command::Flush {
            return Ok(());
        }
        let end = request.offset.checked_add(u64::from(request.length));
        if end.is_some_and(|end| end <= self.device.size()) {
            return Ok(());
        }
        // The protocol's own distinction: a write past the end is out of space.
        match request.command {
            Command::Write | Command::WriteZeroes => Err(WireError::NoSpace),
            _ => Err(WireError::Invalid),
        }
    }

    fn refuse(
        &self,
        receiver: &mut Receiver,
        request: &Request,
        error: WireError,
    ) -> Result<(), End> {
        if request.payload() > MAX_SKIPPED {
            return Err(broken(format!("the client sent a write of {} bytes", request.length)));
        }
        receiver.skip(&self.stream, request.payload() as usize)?;
        self.send(&encode_reply(Err(error), request.cookie))
    }

    /// Does what needs no waiting.
    fn try_quickly(&self, request: &Request, data: &mut [u8], alone: bool) -> Quick {
        // Long ones are copied by several threads at a time, if there are several.
        if request.length > SMALL && !alone {
            return Quick::Later;
        }
        match request.command {
            Command::Read => match self.device.try_read_at(request.offset, data) {
                Ok(true) => Quick::Done(Ok(())),
                Ok(false) => Quick::Later,
                Err(error) => Quick::Done(Err(self.tell(request, &error))),
            },
            Command::Write
                if request.flags & Request::FUA == 0
                    && !self.device.may_wait(request.offset, u64::from(request.length)) =>
            {
                Quick::Done(self.execute(request, data))
            }
            _ => Quick::Later,
        }
    }

    fn execute(&self, request: &Request, data: &mut [u8]) -> Result<(), WireError> {
        let (device, offset, length) = (&self.device, request.offset, u64::from(request.length));
        let done = match request.command {
            Command::Read => device.read_at(offset, data),
            Command::Write => device.write_at(offset, data),
            Command::Flush => device.flush(),
            Command::Trim => device.trim(offset, length),
            Command::WriteZeroes => {
                device.zero(offset, length, request.flags & Request::NO_HOLE != 0)
            }
            Command::Disconnect | Command::Other(_) => return Err(WireError::Invalid),
        };
        let writes = !matches!(request.command, Command::Read | Command::Flush);
        done.and_then(|()| {
            if writes && request.flags & Request::FUA != 0 { device.flush() } else { Ok(()) }
        })
        .map_err(|error| self.tell(request, &error))
    }

    /// The guest gets a number; the sentence goes to the log.
    fn tell(&self, request: &Request, error: &io::Error) -> WireError {
        tracing::warn!(
            command = ?request.command,
            offset = request.offset,
            length = request.length,
            %error,
            "a request failed"
        );
        WireError::from(error)
    }

    fn reply(
        &self,
        request: &Request,
        result: Result<(), WireError>,
        scratch: &mut Scratch,
    ) -> Result<(), End> {
        let data = match (request.command, result) {
            (Command::Read, Ok(())) => request.length as usize,
            _ => 0,
        };
        let message = &mut scratch.0[..REPLY_BYTES + data];
        message[..REPLY_BYTES].copy_from_slice(&encode_reply(result, request.cookie));
        self.send(message)
    }

    fn send(&self, message: &[u8]) -> Result<(), End> {
        let _turn = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        (&mut &*self.stream)
            .write_all(message)
            .map_err(|error| stalled(error, "and does not take its replies"))
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
