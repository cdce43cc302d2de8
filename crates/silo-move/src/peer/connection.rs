//! One connection: a stream with a preamble in front and frames behind.

use super::{Limits, PeerError};
use crate::wire::{FrameReader, FrameWriter, Preamble};
use identity::{Control, HostName, Reader, Security, Stream, Writer};
use std::io::Write;

/// Frames that come in.
pub type Incoming = FrameReader<Reader>;
/// Frames that go out.
pub type Outgoing = FrameWriter<Writer>;

/// One connection.
pub struct Connection {
    /// Reads.
    pub incoming: Incoming,
    /// Writes.
    pub outgoing: Outgoing,
    /// Ends both.
    pub control: Control,
}

impl Connection {
    /// Over a stream that has shaken hands, from the side that opened it.
    ///
    /// # Errors
    /// If the preamble cannot be sent.
    pub fn open(
        mut stream: Stream,
        security: &Security,
        preamble: &Preamble,
        limits: &Limits,
    ) -> Result<Self, PeerError> {
        let peer = label(&stream);
        stream.control().set_write_timeout(Some(limits.write));
        stream
            .write_all(&preamble.encode())
            .map_err(|source| PeerError::Wire { peer, source: source.into() })?;
        Ok(Self::new(stream, security, limits))
    }

    /// Over a stream that has shaken hands, at the side that listens.
    ///
    /// # Errors
    /// If no good preamble comes in time.
    pub fn accept(
        mut stream: Stream,
        security: &Security,
        limits: &Limits,
    ) -> Result<(Self, Preamble), PeerError> {
        let peer = label(&stream);
        stream.control().set_read_timeout(Some(limits.connect));
        let preamble =
            Preamble::read(&mut stream).map_err(|source| PeerError::Wire { peer, source })?;
        Ok((Self::new(stream, security, limits), preamble))
    }

    fn new(stream: Stream, security: &Security, limits: &Limits) -> Self {
        let checked = matches!(security, Security::Plaintext);
        let control = stream.control();
        control.set_write_timeout(Some(limits.write));
        control.set_read_timeout(Some(limits.silence));
        let (reader, writer) = stream.split();
        Self {
            incoming: FrameReader::new(reader, checked),
            outgoing: FrameWriter::new(writer, checked),
            control,
        }
    }

    /// The name that the peer proved; none without TLS.
    #[must_use]
    pub fn peer_name(&self) -> Option<&HostName> {
        self.control.peer_name()
    }
}

/// A peer, for messages.
pub(super) fn label(stream: &Stream) -> String {
    let control = stream.control();
    match control.peer_name() {
        Some(name) => format!("host {name}"),
        None => format!("the peer at {:?}", control.peer_address()),
    }
}
