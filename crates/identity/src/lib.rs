//! Who a host is, and how two hosts talk.
//!
//! Three things, each usable without the others:
//!
//! * [`Authority`]: a small certificate authority in a directory, for people who have none. It
//!   issues one certificate per host; the host's name is the certificate's only DNS name.
//! * [`Identity`]: one host's certificate, key and the authority it trusts, checked when loaded, so
//!   that an expired or mismatched file is found at start and not in the middle of a move.
//! * [`Stream`]: a duplex byte stream between two hosts for plain threads: one thread reads while
//!   another writes. Mutual TLS 1.3, or plaintext by explicit choice ([`Security`]).
//!   [`TlsServer`] and [`TlsClient`] make one inside another protocol (NBD's STARTTLS).
//!
//! Callers: drafter's runner and commands. What must hold: under [`Security::Mutual`] no byte of a
//! caller is sent or delivered before both ends have proved a name that the same authority signed;
//! the caller then decides what that name may do ([`Stream::peer_name`]). Every wait has a
//! deadline. Nothing here panics on what a peer sends.

mod authority;
mod error;
mod files;
mod name;
mod stream;
mod tls;

pub use authority::{Authority, Validity};
pub use error::Error;
pub use name::HostName;
pub use stream::{
    Control, GREETING_BYTES, PeerCheck, Reader, Security, Stream, TlsClient, TlsServer, Writer,
};
pub use tls::Identity;

/// Short form for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
