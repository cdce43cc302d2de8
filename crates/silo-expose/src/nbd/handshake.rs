//! The handshake: fixed newstyle, one export, under a deadline.

use super::protocol::{
    CLIENT_FIXED, CLIENT_NO_ZEROES, ERROR_INVALID, ERROR_TOO_BIG, ERROR_UNKNOWN, ERROR_UNSUPPORTED,
    EXPORT_FLAGS, GREETING, OPTION, OPTION_BYTES, OptionKind, REPLY_ACK, REPLY_INFO, REPLY_SERVER,
    SERVER_FLAGS, decode_go, decode_option, encode_info_block_size, encode_info_export,
    encode_option_reply,
};
use super::{MAX_PAYLOAD, MIN_BLOCK, PREFERRED_BLOCK};
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// The most options that a client may ask for; QEMU asks for four.
const MAX_OPTIONS: usize = 64;
/// The longest option that is read: a name of 4096 bytes and what goes with it.
const MAX_OPTION_BYTES: usize = 4096 + 256;
/// The longest option that is skipped to answer that it is too long.
const MAX_SKIPPED_BYTES: u32 = 1 << 20;

/// How a handshake ended that broke no rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handshake {
    /// The client wants the export: requests follow.
    Transmission,
    /// The client only looked.
    Done,
}

/// A socket whose every read and write ends by one deadline.
struct Timed<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the client did not finish the handshake in time",
            ));
        }
        Ok(left)
    }

    fn read_array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn skip(&mut self, length: u64) -> io::Result<()> {
        let skipped = io::copy(&mut self.take(length), &mut io::sink())?;
        if skipped < length { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buf)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn broken(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// Shakes hands with a client that wants the export called `export`, or the default one ("").
pub(super) fn shake(
    stream: &UnixStream,
    export: &str,
    size: u64,
    limit: Duration,
) -> io::Result<Handshake> {
    let mut peer = Timed { stream, deadline: Instant::now() + limit };
    let mut greeting = [0; 18];
    greeting[..8].copy_from_slice(&GREETING.to_be_bytes());
    greeting[8..16].copy_from_slice(&OPTION.to_be_bytes());
    greeting[16..].copy_from_slice(&SERVER_FLAGS.to_be_bytes());
    peer.write_all(&greeting)?;

    let flags = u32::from_be_bytes(peer.read_array()?);
    if flags & CLIENT_FIXED == 0 || flags & !(CLIENT_FIXED | CLIENT_NO_ZEROES) != 0 {
        return Err(broken("the client does not speak fixed newstyle"));
    }
    let known = |name: &[u8]| name.is_empty() || name == export.as_bytes();
    for _ in 0..MAX_OPTIONS {
        let header: [u8; OPTION_BYTES] = peer.read_array()?;
        let (option, length) =
            decode_option(&header).ok_or_else(|| broken("an option without its magic"))?;
        if length as usize > MAX_OPTION_BYTES {
            if length > MAX_SKIPPED_BYTES || option == OptionKind::ExportName {
                return Err(broken("an option that is far too long"));
            }
            peer.skip(u64::from(length))?;
            peer.write_all(&encode_option_reply(option, ERROR_TOO_BIG, b""))?;
            continue;
        }
        let mut data = vec![0; length as usize];
        peer.read_exact(&mut data)?;
        match option {
            OptionKind::ExportName => {
                // This option has no way to say no but to hang up.
                if !known(&data) {
                    return Err(broken("the client asks for an export that is not here"));
                }
                let mut reply = Vec::with_capacity(134);
                reply.extend_from_slice(&size.to_be_bytes());
                reply.extend_from_slice(&EXPORT_FLAGS.to_be_bytes());
                if flags & CLIENT_NO_ZEROES == 0 {
                    reply.extend_from_slice(&[0; 124]);
                }
                peer.write_all(&reply)?;
                return Ok(Handshake::Transmission);
            }
            OptionKind::Abort => {
                peer.write_all(&encode_option_reply(option, REPLY_ACK, b""))?;
                return Ok(Handshake::Done);
            }
            OptionKind::List if !data.is_empty() => {
                peer.write_all(&encode_option_reply(option, ERROR_INVALID, b"LIST takes no data"))?;
            }
            OptionKind::List => {
                let mut entry = (export.len() as u32).to_be_bytes().to_vec();
                entry.extend_from_slice(export.as_bytes());
                peer.write_all(&encode_option_reply(option, REPLY_SERVER, &entry))?;
                peer.write_all(&encode_option_reply(option, REPLY_ACK, b""))?;
            }
            OptionKind::Info | OptionKind::Go => {
                let reply = match decode_go(&data) {
                    None => encode_option_reply(option, ERROR_INVALID, b"lengths do not add up"),
                    Some(name) if !known(name) => {
                        encode_option_reply(option, ERROR_UNKNOWN, b"no such export here")
                    }
                    Some(_) => {
                        let sizes = encode_info_block_size(MIN_BLOCK, PREFERRED_BLOCK, MAX_PAYLOAD);
                        let mut all =
                            encode_option_reply(option, REPLY_INFO, &encode_info_export(size));
                        all.extend(encode_option_reply(option, REPLY_INFO, &sizes));
                        all.extend(encode_option_reply(option, REPLY_ACK, b""));
                        peer.write_all(&all)?;
                        if option == OptionKind::Go {
                            return Ok(Handshake::Transmission);
                        }
                        continue;
                    }
                };
                peer.write_all(&reply)?;
            }
            OptionKind::Other(_) => {
                peer.write_all(&encode_option_reply(option, ERROR_UNSUPPORTED, b""))?;
            }
        }
    }
    Err(broken("the client asked for too many options"))
}
