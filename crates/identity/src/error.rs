//! What can go wrong, in sentences that name the file or the peer and say what to do.

use crate::HostName;
use std::{io, path::PathBuf, time::Duration};

/// Why an identity or a stream could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A host name breaks the rule of [`crate::HostName`].
    #[error("\"{name}\" cannot name a host: {rule}")]
    BadName {
        /// What was given.
        name: String,
        /// The broken rule.
        rule: &'static str,
    },
    /// A file that should be there is not.
    #[error("{what} {path} is missing: {hint}")]
    MissingFile {
        /// What the file holds.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// How to get one.
        hint: &'static str,
    },
    /// A file is there and must not be overwritten.
    #[error("{path} exists already: to start a new authority, choose an empty directory")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The host refused a file operation.
    #[error("cannot {operation} {path}: {source}")]
    File {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} is not {expected}: {detail}")]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        expected: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// Everyone on the host can read a private key.
    #[error(
        "private key {path} has mode {mode:04o}, every user can read it: chmod 0600 it, and \
             issue a new one if others use this host"
    )]
    ExposedKey {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Certificate and key do not belong together.
    #[error(
        "private key {key} does not belong to certificate {certificate}: copy both from the \
             same issue"
    )]
    KeyMismatch {
        /// The certificate.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
    },
    /// A certificate's time is over, or has not come.
    #[error("the certificate of {who} {problem}: issue a new one, or set the clock that is wrong")]
    OutOfTime {
        /// Whose certificate: a file or a peer.
        who: String,
        /// `expired 3 d ago`, `is not valid for another 2 h`.
        problem: String,
    },
    /// A certificate was signed by somebody else.
    #[error(
        "the certificate of {who} was not issued by the authority in {authority}: both hosts \
             must have the same ca.crt"
    )]
    UnknownAuthority {
        /// Whose certificate: a file or a peer.
        who: String,
        /// The authority that we trust.
        authority: PathBuf,
    },
    /// A certificate is fine but for another name.
    #[error("expected {expected} at {who}, but the certificate there is for {presented}")]
    WrongName {
        /// Where.
        who: String,
        /// The name asked for.
        expected: String,
        /// The names found.
        presented: String,
    },
    /// A certificate was revoked.
    #[error(
        "the certificate of {who} was revoked by its authority: issue a new one if the host is to be \
             trusted again"
    )]
    Revoked {
        /// Whose certificate: a file or a peer.
        who: String,
    },
    /// The list of revoked certificates that is here says nothing of this certificate's authority.
    #[error(
        "whether the certificate of {who} was revoked is not known: the list beside {authority} is of \
             another authority; copy revoked.crl of the right one"
    )]
    NoRevocationList {
        /// Whose certificate: a file or a peer.
        who: String,
        /// The authority that we trust.
        authority: PathBuf,
    },
    /// The authority knows of no certificate of that name.
    #[error("the authority in {dir} has issued no certificate for \"{name}\": nothing to revoke")]
    NeverIssued {
        /// The name.
        name: HostName,
        /// The authority.
        dir: PathBuf,
    },
    /// Any other fault of a certificate.
    #[error("the certificate of {who} cannot be used: {detail}")]
    BadCertificate {
        /// Whose certificate: a file or a peer.
        who: String,
        /// What is wrong.
        detail: String,
    },
    /// No TCP connection.
    #[error("cannot connect to {who} within {limit:?}: {source}")]
    Connect {
        /// The address and the name expected there.
        who: String,
        /// How long we tried.
        limit: Duration,
        /// The cause.
        source: io::Error,
    },
    /// The peer went silent before the stream was ready.
    #[error(
        "{who} did not finish the handshake within {limit:?} (waiting for {phase}): it may be \
             overloaded, or not one of ours"
    )]
    HandshakeTimeout {
        /// The peer.
        who: String,
        /// What we waited for.
        phase: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The peer closed or reset before the stream was ready.
    #[error("{who} closed the connection during the handshake (waiting for {phase}): {source}")]
    HandshakeCut {
        /// The peer.
        who: String,
        /// What we waited for.
        phase: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// We want TLS, the peer sends something else.
    #[error("{who} does not speak TLS: it may be set to plaintext, or is not one of ours")]
    PeerNotTls {
        /// The peer.
        who: String,
    },
    /// We want plaintext, the peer wants TLS.
    #[error("{who} speaks TLS but this side was set to plaintext: set both sides alike")]
    PeerIsTls {
        /// The peer.
        who: String,
    },
    /// The peer talks, but not our protocol or not our version of it.
    #[error(
        "{who} greeted with {found:?} instead of {expected:?}: it is another program or \
             another version"
    )]
    BadGreeting {
        /// The peer.
        who: String,
        /// What it should have sent.
        expected: String,
        /// What it sent.
        found: String,
    },
    /// The peer refused us and said why.
    #[error("{who} refused this host: {reason}")]
    Refused {
        /// The peer.
        who: String,
        /// Its reason.
        reason: String,
    },
    /// TLS failed in another way.
    #[error("TLS with {who} failed: {detail}")]
    Tls {
        /// The peer.
        who: String,
        /// What is wrong.
        detail: String,
    },
    /// The random source or the key generator failed.
    #[error("cannot make a {what}: {detail}")]
    Generate {
        /// Key or certificate.
        what: &'static str,
        /// The cause.
        detail: String,
    },
    /// A socket option or duplicate was refused.
    #[error("cannot {operation} on the connection with {who}: {source}")]
    Socket {
        /// The peer.
        who: String,
        /// What was attempted.
        operation: &'static str,
        /// The cause.
        source: io::Error,
    },
}
