//! Connections between two silos: opened together, closed together, opened again after a cut.
//!
//! A session has one *control* connection, several *data* connections and one *demand* connection,
//! all opened by the source, so that a fault never waits behind bulk (I5) and one slow stream never
//! holds the others. [`Dial`] opens a [`Link`] of them; [`Listener`] sorts what comes in.
//!
//! What must hold: every wait has a deadline ([`Limits`]); under mutual TLS nothing is read before
//! the peer has proved its name, and all connections of a link have proved the same one; a cut of
//! one connection ends all of its link, and the session (which lives longer) asks for a new one.

mod connection;
mod link;
mod listener;
#[cfg(test)]
mod tests;
mod throttle;

pub use connection::{Connection, Incoming, Outgoing};
pub use link::{Dial, Hangup, Link};
pub use listener::{Arrival, Listener};
pub use throttle::Throttle;

use std::time::Duration;

/// How long things may take, and how much they may use.
#[derive(Clone, Debug)]
pub struct Limits {
    /// To open a connection and shake hands.
    pub connect: Duration,
    /// Between two signs of life.
    pub heartbeat: Duration,
    /// A peer that is silent for this long is gone; several heartbeats.
    pub silence: Duration,
    /// For a peer to take the next byte.
    pub write: Duration,
    /// Data connections of a session, 1 to 32.
    pub data: u8,
    /// Bytes per second that all data connections of a session may use together.
    pub bandwidth: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            heartbeat: Duration::from_secs(1),
            silence: Duration::from_secs(6),
            write: Duration::from_secs(10),
            data: 2,
            bandwidth: None,
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// No connection, or the other end is not who it should be.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// The first bytes were not right.
    #[error("{peer}: {source}")]
    Wire {
        /// Which peer.
        peer: String,
        /// What was wrong.
        source: crate::wire::WireError,
    },
    /// The peer may not do this.
    #[error("{peer} is not allowed to move devices to or from this host; see the list of peers")]
    NotAllowed {
        /// Which peer.
        peer: String,
    },
    /// Nobody came in time.
    #[error(
        "no connection within {0:?}; does the source still run, and can it reach this address?"
    )]
    Nobody(Duration),
    /// Something here.
    #[error("cannot {operation}: {source}")]
    Here {
        /// What was attempted.
        operation: &'static str,
        /// The cause.
        source: std::io::Error,
    },
}
