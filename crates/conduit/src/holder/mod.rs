//! The holder: a small process that keeps the frames of machines which nobody has at the moment, and
//! gives them back in order and at a pace.
//!
//! One per network namespace with a data path, beside the agent or the edge, which start it
//! ([`Keeper`]) and whose death and restart it does not notice. It owns the hold tap `cd-hold`: what
//! the programs put in there (entries on hold), it takes out at once and keeps in memory, bounded; and
//! when an entry says that somebody has the machine, it writes the frames back into the tap, where
//! `cd_replay` sends them on.
//!
//! ```text
//!            hold                       any of: local, remote
//!  entry ───────────► frames wait here ──────────────────────► given back, others behind them
//!                          │ too old, too many, entry gone              │ the last one left
//!                          ▼                                            ▼
//!                     thrown away, counted                         the way is open
//! ```
//!
//! At an edge it also keeps, for three seconds at most, what a machine says by its next host before the edge has heard
//! of that ([`early`]).
//!
//! Nobody tells it: the pinned map says all ([`conduit_bpf::HeldView`]), and the kernel keeps later
//! frames behind the held ones, so an agent or edge only ever changes the entry. What must hold: a
//! frame that was taken in is given back, thrown away and counted, or handed over to a successor;
//! memory is bounded; killed (SIGKILL), it loses the frames that it had taken out of the tap and no
//! others, because agent and edge keep a descriptor of the tap too, and the kernel is told.

mod cli;
mod early;
mod frame;
mod keeper;
mod process;
mod protocol;
mod queue;
mod take_over;

pub use cli::{HoldArgs, LimitArgs, ShowArgs, run, show};
pub(crate) use keeper::pid_at;
pub use keeper::{HoldSettings, Keeper, stats};

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Name of the hold tap.
pub const INTERFACE: &str = "cd-hold";

/// A bound on what is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    /// Frames; a large TCP segment counts as one.
    pub frames: u64,
    /// Bytes, with 64 for each frame.
    pub bytes: u64,
}

/// What a holder keeps at most, and how it gives it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// For one address of a machine.
    pub machine: Bound,
    /// For one network (tenant).
    pub network: Bound,
    /// Over all.
    pub total: Bound,
    /// What has waited longer is thrown away.
    pub age: Duration,
    /// Datagrams per second that are given back to one machine, at least; four times as many as come,
    /// if that is more.
    pub pace: u32,
}

impl Default for Limits {
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Self {
            machine: Bound { frames: 65_536, bytes: 64 * MIB },
            network: Bound { frames: 262_144, bytes: 256 * MIB },
            total: Bound { frames: 524_288, bytes: 512 * MIB },
            age: Duration::from_secs(30),
            pace: 8000,
        }
    }
}

/// What a holder (and those it took over from) did with frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Machines that have frames here.
    pub machines: u64,
    /// Frames that wait now.
    pub frames: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// Taken out of the hold tap.
    pub taken: u64,
    /// Given back.
    pub given: u64,
    /// Thrown away: too many for one machine.
    pub machine_full: u64,
    /// Thrown away: too many for one network.
    pub network_full: u64,
    /// Thrown away: too many over all.
    pub total_full: u64,
    /// Thrown away: too old.
    pub expired: u64,
    /// Thrown away: the machine's entry is gone, or says so.
    pub gone: u64,
    /// Never came: the hold tap was full, or a holder was killed.
    pub lost: u64,
    /// The kernel did not take them back.
    pub refused: u64,
    /// In the hold tap, but of no machine.
    pub stray: u64,
    /// Frames of machines that came before it was known that their host has them, thrown away: another had
    /// them, nothing was heard in time, or too many.
    #[serde(default)]
    pub early_lost: u64,
    /// Times that a holder was taken over from.
    pub handed_over: u64,
}

impl Stats {
    /// By name, for people and metrics.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 15] {
        [
            ("hold_machines", self.machines),
            ("hold_frames", self.frames),
            ("hold_bytes", self.bytes),
            ("hold_taken", self.taken),
            ("hold_given", self.given),
            ("hold_machine_full", self.machine_full),
            ("hold_network_full", self.network_full),
            ("hold_total_full", self.total_full),
            ("hold_expired", self.expired),
            ("hold_gone", self.gone),
            ("hold_lost", self.lost),
            ("hold_refused", self.refused),
            ("hold_stray", self.stray),
            ("hold_early_lost", self.early_lost),
            ("hold_handed_over", self.handed_over),
        ]
    }
}
