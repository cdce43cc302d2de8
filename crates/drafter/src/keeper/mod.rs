//! One sign of life for all machines of a host, kept by a process of its own.
//!
//! ```text
//!   keeper ── renews, one write however many machines ──▶ beat of the host         (`tenure::Pulse`)
//!     │ a socket in the state directory
//!     ├── until 81.250 s ──▶ runner ── its holder, its guard                        (`runner::tenure`)
//!     │ ◀────────── took it ──┘
//!     └── a runner is gone, or takes nothing in: its machine is given up            (`tenure::Surrender`)
//! ```
//!
//! The first runner that needs a keeper starts it; it ends when nobody has needed it for a while. When it
//! dies, machines stand still at the end of their term unless another has begun the next life by then, which
//! their runners see to. What must hold:
//! - A runner is told a new end only after it took the one before: one that stands still was told of no end
//!   later than that, and its machine is given up then, not before.
//! - A runner whose machine may have been given up hears so before it is told of any end.
//! - One keeper for each name of a host in a lease store; two of them end each other's lives for ever.

mod client;
mod server;
mod wire;

pub(crate) use client::{Client, Place, Said};
pub(crate) use server::serve;

use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// What a keeper is started with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// The host's state directory.
    pub(crate) state: PathBuf,
    /// The host, as in leases.
    pub(crate) host: String,
    /// Where leases are kept.
    pub(crate) leases: String,
    /// T, milliseconds.
    pub(crate) term_ms: u64,
    /// Between two renewals, milliseconds.
    pub(crate) renewal_ms: u64,
    /// It ends when nobody has needed it for so long, milliseconds; never if absent.
    pub(crate) linger_ms: Option<u64>,
}

impl Settings {
    fn term(&self) -> Duration {
        Duration::from_millis(self.term_ms)
    }

    fn renewal(&self) -> Duration {
        Duration::from_millis(self.renewal_ms)
    }
}

/// Where it listens.
fn socket(state: &Path) -> PathBuf {
    state.join("keeper.sock")
}

/// Who holds this is the keeper.
fn lock_file(state: &Path) -> PathBuf {
    state.join("keeper.lock")
}

/// Where one that a runner has started writes what happens.
fn log_file(state: &Path) -> PathBuf {
    state.join("keeper.log")
}

#[cfg(test)]
mod tests;
