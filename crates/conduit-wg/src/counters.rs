//! What the tunnel counts, by name: shown by `conduit tunnel status`.

use std::collections::BTreeMap;

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Everything that is counted. Numbers begin anew with each process.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl Counters {
            /// Names and numbers.
            #[must_use]
            pub fn by_name(&self) -> BTreeMap<String, u64> {
                [$((stringify!($name).to_owned(), self.$name),)+].into()
            }
        }
    };
}

counters! {
    /// Frames read from the tun device.
    tun_read,
    /// Frames written to it.
    tun_written,
    /// Packets sent encrypted.
    packets_sent,
    /// Their bytes, before encryption.
    bytes_sent,
    /// Calls that sent them, each up to 16 messages.
    send_calls,
    /// Packets received and decrypted.
    packets_received,
    /// Their bytes.
    bytes_received,
    /// Calls that received something.
    receive_calls,
    /// Handshakes completed, as either side.
    handshakes,
    /// Datagrams that the process before this one was given, during an upgrade.
    passed_back,
    /// Dropped: no peer has that destination.
    dropped_no_peer,
    /// Dropped: nothing is known of where the peer is.
    dropped_no_endpoint,
    /// Dropped: too much waits already for a handshake with that peer.
    dropped_queue_full,
    /// Dropped: the peer did not answer for ten seconds.
    dropped_no_answer,
    /// Dropped: a frame from the kernel contradicts itself.
    dropped_malformed_frame,
    /// Dropped: not a message of WireGuard.
    dropped_malformed,
    /// Dropped: of a session that is not known.
    dropped_unknown_session,
    /// Dropped: a handshake for another key than ours, or a forged one.
    dropped_wrong_mac,
    /// Dropped: a handshake of somebody who is no peer.
    dropped_unknown_key,
    /// Dropped: not encrypted by the peer.
    dropped_not_authentic,
    /// Dropped: received before, or too old to tell.
    dropped_replayed,
    /// Dropped: from an address that the peer may not use.
    dropped_foreign_source,
    /// Dropped: a handshake at a time of too many.
    dropped_under_load,
    /// Dropped: a handshake message that does not fit what was said before.
    dropped_handshake,
    /// Dropped: larger than the path to the peer.
    dropped_too_large,
    /// Dropped: the socket refused it (no route, for one).
    dropped_by_socket,
    /// Dropped: the tun device refused it (it is down, for one).
    dropped_by_tun,
}
