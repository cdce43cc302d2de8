//! A session's two connections, as frames.

use super::protocol::{Frame, FrameReader, FrameWriter, Preamble, Role, SessionId, WireError};
use identity::{Control, HostName, Security, Stream};
use std::{
    io::{self, BufReader, BufWriter, Write},
    net::SocketAddr,
    sync::mpsc,
    time::{Duration, Instant},
};

/// Reads frames from a peer.
pub type Incoming = FrameReader<BufReader<identity::Reader>>;
/// Writes frames to a peer.
pub type Outgoing = FrameWriter<BufWriter<identity::Writer>>;

/// How long a peer may take to accept the next byte before the connection counts as dead.
pub const WRITE_LIMIT: Duration = Duration::from_secs(30);
/// Headers are read ahead in pieces of this size; block data, which is larger, goes past it.
const READ_BUFFER: usize = 64 << 10;
/// Several frames of the largest size leave in one call.
const WRITE_BUFFER: usize = 1 << 20;
/// How long connecting and the handshake may take.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// One connection of a session.
pub struct Channel {
    /// From the peer.
    pub incoming: Incoming,
    /// To the peer.
    pub outgoing: Outgoing,
    /// The socket.
    pub control: Control,
}

impl Channel {
    fn new(stream: Stream, security: &Security) -> Self {
        let checked = matches!(security, Security::Plaintext);
        let control = stream.control();
        control.set_write_timeout(Some(WRITE_LIMIT));
        let (reader, writer) = stream.split();
        Self {
            incoming: FrameReader::new(BufReader::with_capacity(READ_BUFFER, reader), checked),
            outgoing: FrameWriter::new(BufWriter::with_capacity(WRITE_BUFFER, writer), checked),
            control,
        }
    }

    /// Opens one of the connections of a session, from the source.
    pub fn connect(
        address: SocketAddr,
        peer: &HostName,
        security: &Security,
        preamble: Preamble,
    ) -> Result<Self, identity::Error> {
        Self::connect_within(address, peer, security, preamble, CONNECT_LIMIT)
    }

    /// As [`Channel::connect`], with another limit.
    pub fn connect_within(
        address: SocketAddr,
        peer: &HostName,
        security: &Security,
        preamble: Preamble,
        limit: Duration,
    ) -> Result<Self, identity::Error> {
        let mut stream = Stream::connect(address, peer, security, limit)?;
        // A preamble that the peer does not get shows as a closed connection at the first read.
        let _ = stream.write_all(&preamble.encode());
        let _ = stream.flush();
        Ok(Self::new(stream, security))
    }

    /// Takes a connection that a source opened, after the handshake, and reads its preamble.
    pub fn accept(stream: Stream, security: &Security) -> Result<(Self, Preamble), WireError> {
        let mut stream = stream;
        stream.control().set_read_timeout(Some(CONNECT_LIMIT));
        let preamble = Preamble::read(&mut stream)?;
        stream.control().set_read_timeout(None);
        Ok((Self::new(stream, security), preamble))
    }
}

/// Opens both connections of a session, main and fault, side by side: on a long line each handshake
/// is several round trips.
pub fn connect_both(
    address: SocketAddr,
    peer: &HostName,
    security: &Security,
    session: SessionId,
    limit: Duration,
) -> Result<(Channel, Channel), String> {
    let connect = |role| {
        Channel::connect_within(address, peer, security, preamble(role, session), limit)
            .map_err(|e| e.to_string())
    };
    let (main, fault) = std::thread::scope(|scope| {
        let fault = std::thread::Builder::new()
            .name("connect-fault".into())
            .spawn_scoped(scope, || connect(Role::Fault));
        let main = connect(Role::Main);
        let fault = match fault {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err("the thread panicked".into())),
            Err(_) => connect(Role::Fault),
        };
        (main, fault)
    });
    Ok((main?, fault?))
}

/// A new session's name.
pub fn new_session() -> io::Result<SessionId> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(SessionId(bytes))
}

/// A session name as hex.
#[must_use]
pub fn session_hex(session: SessionId) -> String {
    session.0.iter().map(|b| format!("{b:02x}")).collect()
}

/// The preamble for a role.
#[must_use]
pub fn preamble(role: Role, session: SessionId) -> Preamble {
    Preamble { role, session }
}

/// What a reader thread hands over: a frame and when it arrived, or why there will be no more.
pub type Arrival = (Instant, Result<Frame, WireError>);

/// Reads a connection on a thread of its own until it ends; the thread ends with the connection.
pub fn pump(mut incoming: Incoming, name: &str) -> io::Result<mpsc::Receiver<Arrival>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        loop {
            let frame = incoming.read();
            let last = frame.is_err();
            if sender.send((Instant::now(), frame)).is_err() || last {
                return;
            }
        }
    })?;
    Ok(receiver)
}
