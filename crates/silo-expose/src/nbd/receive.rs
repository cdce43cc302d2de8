//! What a server's connection receives: requests, and the bytes that follow them.

use super::{
    line::{Input, is_gone},
    protocol::{REQUEST_BYTES, Request},
    sys,
};
use crate::polling::Polling;
use std::{
    io::{self, Read},
    sync::atomic::AtomicU8,
    time::{Duration, Instant},
};

/// Room for what comes in at a time: sixteen small writes and more.
const RECEIVE_BYTES: usize = 128 << 10;

/// Why a connection ends.
pub(super) enum End {
    /// The client hung up or said goodbye.
    Closed,
    /// The client broke the protocol, stalled, or the socket failed.
    Broken(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        if is_gone(&error) { Self::Closed } else { Self::Broken(error) }
    }
}

pub(super) fn broken(message: String) -> End {
    End::Broken(io::Error::new(io::ErrorKind::InvalidData, message))
}

/// An error that happened in the middle of a message: silence is one there.
pub(super) fn stalled(error: io::Error, place: &str) -> End {
    if error.kind() == io::ErrorKind::TimedOut {
        return End::Broken(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the client stalled {place}"),
        ));
    }
    error.into()
}

/// Bytes that came in and were not taken yet.
pub(super) struct Receiver {
    input: Input,
    buf: Box<[u8]>,
    start: usize,
    end: usize,
    polling: Polling,
    /// The same in the middle of what is received into place.
    within: Polling,
    /// The last request was long and went into place: only the head of the next one is taken, because
    /// what follows it would be copied once more.
    long_ones: bool,
}

impl Receiver {
    /// `poll`: the longest that it looks for a request before it sleeps.
    pub(super) fn new(input: Input, poll: Duration) -> Self {
        let buf = vec![0; RECEIVE_BYTES].into_boxed_slice();
        let (polling, within) = (Polling::new(poll), Polling::new(poll));
        Self { input, buf, start: 0, end: 0, polling, within, long_ones: false }
    }

    fn available(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    /// Whether nothing is here that was not taken.
    pub(super) const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether the next request can be taken, with what follows it, without waiting.
    pub(super) fn has_whole_request(&self) -> bool {
        let Some((header, rest)) = self.available().split_first_chunk::<REQUEST_BYTES>() else {
            return false;
        };
        Request::decode(header).is_none_or(|request| rest.len() >= request.payload() as usize)
    }

    /// Waits for the next request; silence between requests is no error.
    pub(super) fn next(&mut self) -> Result<Request, End> {
        while self.available().len() < REQUEST_BYTES {
            if self.start > 0 {
                self.buf.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            let idle = self.end == 0;
            match self.read(idle) {
                Ok(0) if idle => return Err(End::Closed),
                Ok(0) => return Err(broken("the client hung up inside a request".to_owned())),
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::TimedOut && idle => {}
                Err(error) => return Err(stalled(error, "inside a request's header")),
            }
        }
        let header = self.available().first_chunk().expect("so many bytes are there");
        let request = Request::decode(header)
            .ok_or_else(|| broken("the client sent a request without its magic".to_owned()))?;
        self.take(REQUEST_BYTES);
        Ok(request)
    }

    /// Reads what comes next; between requests it looks for a while before it sleeps.
    fn read(&mut self, idle: bool) -> io::Result<usize> {
        let end = if self.long_ones { REQUEST_BYTES } else { self.buf.len() };
        self.long_ones = false;
        let room = &mut self.buf[self.end..end];
        if let Some(span) = self.polling.span().filter(|_| idle)
            && let Some(count) = self.input.look(room, span)?
        {
            return Ok(count);
        }
        let began = Instant::now();
        let read = self.input.read(room);
        if idle {
            self.polling.slept(began.elapsed());
        }
        read
    }

    fn take(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// The bytes that follow a request's header, if all of them are here: `work` looks at them, and
    /// they are taken if it is done with them (`Some`).
    pub(super) fn with_payload<T>(
        &mut self,
        length: usize,
        work: impl FnOnce(&[u8]) -> Option<T>,
    ) -> Option<T> {
        let done = work(self.available().get(..length)?)?;
        self.take(length);
        Some(done)
    }

    /// The bytes that follow a request's header.
    pub(super) fn payload(&mut self, buf: &mut [u8]) -> Result<(), End> {
        let ready = self.available().len().min(buf.len());
        buf[..ready].copy_from_slice(&self.available()[..ready]);
        self.take(ready);
        self.input
            .read_exact(&mut buf[ready..])
            .map_err(|error| stalled(error, "inside a write's data"))
    }

    /// The bytes that follow a request's header, to where they belong; not under TLS.
    pub(super) fn payload_into(&mut self, mut place: &[AtomicU8]) -> Result<(), End> {
        self.long_ones = place.len() > RECEIVE_BYTES;
        let ready = self.available().len().min(place.len());
        sys::copy_in(place, &self.available()[..ready]);
        self.take(ready);
        place = &place[ready..];
        while !place.is_empty() {
            let span = self.within.span().unwrap_or(Duration::ZERO);
            let read = self.input.read_into(place, span);
            let (count, slept) = read.map_err(|error| stalled(error, "inside a write's data"))?;
            if count == 0 {
                return Err(stalled(io::ErrorKind::UnexpectedEof.into(), "inside a write's data"));
            }
            if let Some(slept) = slept {
                self.within.slept(slept);
            }
            place = &place[count..];
        }
        Ok(())
    }

    pub(super) fn skip(&mut self, mut length: usize) -> Result<(), End> {
        let mut bin = [0; 4096];
        while length > 0 {
            let part = length.min(bin.len());
            self.payload(&mut bin[..part])?;
            length -= part;
        }
        Ok(())
    }
}
