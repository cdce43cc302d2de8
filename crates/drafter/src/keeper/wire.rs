//! What runners and the keeper say to each other: a line of JSON each.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    io::{self, BufRead, Read as _},
    os::{fd::AsRawFd as _, unix::net::UnixStream},
};

use nix::sys::socket::{MsgFlags, send};

/// Longest line.
const LONGEST: u64 = 64 * 1024;

/// A runner's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "say")]
pub(super) enum ToKeeper {
    /// Looks after this machine from here on. First.
    Hello {
        /// Of the host.
        host: String,
        /// Where its leases are kept.
        leases: String,
        /// The machine's name.
        machine: String,
        /// T, milliseconds.
        term_ms: u64,
    },
    /// The holder and the guard of the machine know what was said under this number.
    Took {
        /// Which.
        number: u64,
    },
    /// It looks after nothing any more that the host's sign of life means something to.
    Goodbye,
}

/// A life, and until when it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Life {
    /// Which.
    pub(super) incarnation: u64,
    /// Until when, by `CLOCK_BOOTTIME`, nanoseconds.
    pub(super) until_ns: u64,
    /// Of its newest renewal; the first beat of a life has 0.
    pub(super) serial: u64,
    /// When the store was known to have that, as `until_ns`.
    pub(super) told_ns: u64,
}

/// The keeper's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "say")]
pub(super) enum FromKeeper {
    /// First, if it takes the runner.
    Welcome {
        /// Between two renewals, microseconds.
        renewal_us: u64,
        /// Leases of the machine up to this epoch were given up, or may have been.
        given_up: Option<u64>,
    },
    /// First, if it does not.
    Refused {
        /// For people.
        why: String,
        /// It may if it is asked again.
        again: bool,
    },
    /// Until when the host's life holds; said again and again, with rising numbers.
    View {
        /// To be given back.
        number: u64,
        /// Absent before it has begun, and after somebody has declared it over.
        life: Option<Life>,
        /// What keeps it from being renewed.
        trouble: Option<String>,
    },
}

/// Sends a line; never waits: whoever takes nothing in is as one that is gone.
pub(super) fn say(to: &UnixStream, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = send(to.as_raw_fd(), &line, flags)?;
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
}

/// The next line; `None` at the end.
pub(super) fn hear<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.by_ref().take(LONGEST).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a line without an end"));
    }
    Ok(Some(serde_json::from_slice(&line)?))
}
