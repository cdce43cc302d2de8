//! A front end that takes us for the server before us: it goes on where it was with that one, and
//! says nothing of what the two had agreed on.
//!
//! So does QEMU whose server went away while its machine stood still (read in 7.2; the functions are
//! those of hw/virtio/vhost-user.c, hw/virtio/vhost.c, hw/block/vhost-user-blk.c and
//! chardev/char-socket.c):
//!
//! - `vhost_dev_stop`, at the pause, sets `hdev->vdev` to NULL. When the connection closes after that,
//!   `vhost_user_async_close` takes the device's handlers off its socket, and
//!   `vhost_user_async_close_bh`, which is to put them on again, takes the NULL for a device that was
//!   cleaned up already, and does nothing. (From 8.2 on it puts them on, but `vhost_user_blk_connect`
//!   still returns at once: `s->connected` was never reset.)
//! - The socket itself connects again (`tcp_chr_disconnect_locked` starts the timer): to the next server, and to
//!   each one after that, for the rest of the monitor's life. Nothing is said then.
//! - When the machine goes on, `vhost_user_blk_set_status` starts the device on whatever connection there is:
//!   `SET_FEATURES`, the record of requests in hand, memory, rings. What is not said is what
//!   `vhost_user_backend_init` says: owner, protocol features, and the channel for messages from us.
//! - If the server goes away again while the machine runs, the device does not learn of it either. Its
//!   rings are served by nobody until the machine has been stopped and has gone on: `vhost_virtqueue_stop`
//!   then asks for `GET_VRING_BASE`, and where it gets no answer (only then) it goes by the used ring, as
//!   after any other loss of a server. So a ring that we were never told of must not get an answer.
//!
//! Memory is told again as a whole only where regions are not told one by one
//! ([`VhostOptions::memory_slots`](super::VhostOptions)): of those QEMU remembers which it has told.

use super::{config, session::Session, sys};
use std::{
    io::Write,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
};
use vhost::vhost_user::{BackendReqHandler, Error, Result};

/// Requests of vhost-user (docs/interop/vhost-user.rst).
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const GET_VRING_BASE: u32 = 11;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;

/// What a front end's first request says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beginning {
    /// It does not know us yet.
    Anew,
    /// It takes us for the server before us, and says everything but what that one agreed to.
    GoesOn,
    /// It takes us for the server before us, which knew its rings.
    AmidRings,
}

impl Beginning {
    pub(super) fn of(first: u32) -> Self {
        match first {
            // Everybody else asks first what is offered.
            SET_FEATURES => Self::GoesOn,
            GET_VRING_BASE | SET_VRING_ENABLE => Self::AmidRings,
            _ => Self::Anew,
        }
    }
}

/// Whether a front end that says this has said what it wants of us.
pub(super) fn introduces(request: u32) -> bool {
    [GET_FEATURES, SET_FEATURES].contains(&request)
}

fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    /// The protocol's version, as the header's flags have it.
    const VERSION: u32 = 1;
    let header = [request, VERSION, payload.len() as u32].map(u32::to_le_bytes);
    [header.as_flattened(), payload].concat()
}

/// A handler for a front end that agreed with our predecessor on all that is offered, which is what QEMU
/// takes. What is offered may grow: such a front end does not use what it was not offered.
///
/// The protocol crate has no other way to such a state than a negotiation, so it gets one, from us.
///
/// # Errors
/// If the host has no descriptors left.
pub(super) fn handler(
    socket: &UnixStream,
    session: Arc<Mutex<Session>>,
    memory_slots: bool,
) -> Result<BackendReqHandler<Mutex<Session>>> {
    let features = config::protocol_features(memory_slots).bits().to_le_bytes();
    let negotiation =
        [message(GET_FEATURES, &[]), message(SET_PROTOCOL_FEATURES, &features)].concat();
    let (theirs, mut ours) = UnixStream::pair().map_err(Error::SocketError)?;
    ours.write_all(&negotiation).map_err(Error::SocketError)?;
    let mut handler = BackendReqHandler::from_stream(theirs, session);
    for _ in [GET_FEATURES, SET_PROTOCOL_FEATURES] {
        handler.handle_request()?;
    }
    sys::replace(&handler, socket).map_err(Error::SocketError)?;
    Ok(handler)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_the_specification() {
        assert_eq!(message(GET_FEATURES, &[]), [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            message(SET_PROTOCOL_FEATURES, &7u64.to_le_bytes()),
            [16, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]
        );
    }
}
