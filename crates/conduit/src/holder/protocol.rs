//! What is said to a holder and by it: one message of a `SOCK_SEQPACKET` socket each, JSON but for the
//! frames of a hand-over.
//!
//! ```text
//!  agent, edge → holder                 holder →
//!  attach {version}                     attached {version, build, pid, index}   + the hold tap
//!  stats                                stats {…}
//!  hand-over {version}                  handing-over {version, frames, …}       + tap and lock
//!                                       [0, age, frame]  each; then done
//!  taken                                (ends)
//!  stop                                 done, and the tap goes with its last descriptor
//! ```

use super::{Limits, Stats};
use crate::sys::rights;
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::TimeVal,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

/// Version of these messages.
pub(super) const VERSION: u32 = 1;
/// Longest message: a frame of the largest kind, with its headers.
pub(super) const LONGEST: usize = 128 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub(super) enum Ask {
    Attach { version: u32 },
    Stats,
    HandOver { version: u32 },
    Taken,
    Stop,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub(super) enum Answer {
    Attached { version: u32, build: String, pid: u32, index: u32 },
    Stats { stats: Stats, limits: Limits },
    HandingOver { version: u32, frames: u64, stats: Stats },
    Done,
    Refused { detail: String },
}

/// What comes in a hand-over after its first message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    Frame { age: Duration, bytes: Box<[u8]> },
    Done,
}

/// One end of a connection.
pub(super) struct Channel {
    socket: OwnedFd,
}

impl Channel {
    pub(super) fn connect(path: &Path, limit: Duration) -> io::Result<Self> {
        let channel = Self { socket: rights::connect_to(path)? };
        channel.set_limit(limit)?;
        Ok(channel)
    }

    pub(super) fn of(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// How long one call may wait.
    pub(super) fn set_limit(&self, limit: Duration) -> io::Result<()> {
        let limit = TimeVal::new(limit.as_secs().cast_signed(), i64::from(limit.subsec_micros()));
        setsockopt(&self.socket, sockopt::ReceiveTimeout, &limit)?;
        setsockopt(&self.socket, sockopt::SendTimeout, &limit)?;
        Ok(())
    }

    pub(super) fn say(&self, message: &impl Serialize, with: &[BorrowedFd<'_>]) -> io::Result<()> {
        rights::send(self.socket.as_fd(), &serde_json::to_vec(message)?, with)
    }

    /// `None` at the end.
    pub(super) fn hear<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut buffer = [0; 4096];
        let (size, with) = rights::receive(self.socket.as_fd(), &mut buffer)?;
        if size == 0 {
            return Ok(None);
        }
        Ok(Some((serde_json::from_slice(&buffer[..size])?, with)))
    }

    /// Asks, and hears the answer.
    pub(super) fn ask(&self, ask: Ask) -> io::Result<(Answer, Vec<OwnedFd>)> {
        self.say(&ask, &[])?;
        match self.hear()? {
            Some((Answer::Refused { detail }, _)) => Err(io::Error::other(detail)),
            Some(answer) => Ok(answer),
            None => {
                Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the holder ended the connection"))
            }
        }
    }

    pub(super) fn say_part(&self, part: &Part) -> io::Result<()> {
        match part {
            Part::Done => self.say(&Answer::Done, &[]),
            Part::Frame { age, bytes } => {
                let age = u32::try_from(age.as_millis()).unwrap_or(u32::MAX);
                let mut message = Vec::with_capacity(5 + bytes.len());
                message.push(0);
                message.extend(age.to_be_bytes());
                message.extend(bytes);
                rights::send(self.socket.as_fd(), &message, &[])
            }
        }
    }

    pub(super) fn hear_part(&self, buffer: &mut Vec<u8>) -> io::Result<Part> {
        buffer.resize(LONGEST, 0);
        let (size, _) = rights::receive(self.socket.as_fd(), buffer)?;
        match &buffer[..size] {
            [0, a, b, c, d, frame @ ..] => Ok(Part::Frame {
                age: Duration::from_millis(u32::from_be_bytes([*a, *b, *c, *d]).into()),
                bytes: frame.into(),
            }),
            [] => Err(io::ErrorKind::UnexpectedEof.into()),
            text => match serde_json::from_slice(text)? {
                Answer::Done => Ok(Part::Done),
                other => Err(io::Error::other(format!("no frame but {other:?}"))),
            },
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_their_fixed_form() {
        let text = |ask: Ask| serde_json::to_string(&ask).unwrap();
        assert_eq!(text(Ask::Attach { version: 1 }), r#"{"ask":"attach","version":1}"#);
        assert_eq!(text(Ask::HandOver { version: 1 }), r#"{"ask":"hand-over","version":1}"#);
        let answer = Answer::Attached { version: 1, build: "0.1".into(), pid: 7, index: 3 };
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            r#"{"answer":"attached","version":1,"build":"0.1","pid":7,"index":3}"#
        );
    }
}
