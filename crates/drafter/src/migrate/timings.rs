//! What a move reports: one record for both ends, stored and printed.

use super::{
    messages::Mode,
    planner::{Reason, Round},
};
use serde::{Deserialize, Serialize};
use silo::memory::FaultSummary;
use std::fmt;

/// A finished move, as the source saw it. Times in milliseconds, sizes in bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MoveReport {
    /// The machine.
    pub machine: String,
    /// Host it left.
    pub from: String,
    /// Host it went to.
    pub to: String,
    /// How.
    pub mode: Mode,
    /// Only changes since an earlier stay were sent.
    pub returned: bool,
    /// Why the switchover came when it did.
    pub reason: Reason,
    /// Rounds of pre-copy.
    pub rounds: Vec<Round>,
    /// Bytes of blocks that the destination had already, of an earlier attempt or stay, or of a store.
    #[serde(default)]
    pub known_bytes: u64,
    /// Bytes on the wire, both connections, from source to destination.
    pub bytes_sent: u64,
    /// Size of the machine's memory.
    pub memory_bytes: u64,
    /// Dirty bytes at the pause, of all devices.
    pub dirty_bytes: u64,
    /// Of these, bytes that travelled in the flight.
    pub flight_bytes: u64,
    /// Size of the device state.
    pub state_bytes: u64,
    /// Round trip of the link.
    pub round_trip_ms: f64,
    /// From the request until the source was released.
    pub total_ms: f64,
    /// Building everything at the destination.
    pub prepare_ms: f64,
    /// Until the pause.
    pub precopy_ms: f64,
    /// Source's last instruction to destination's first.
    pub blackout_ms: f64,
    /// Whether `blackout_ms` was measured on one clock (else estimated with half a round trip).
    pub blackout_exact: bool,
    /// The parts of the blackout.
    pub blackout: BlackoutParts,
    /// Until frames left the destination.
    pub confirmed_ms: f64,
    /// From the token until every block was durable at the destination.
    pub postcopy_ms: f64,
    /// CLOCK_MONOTONIC of the pause, nanoseconds; means something on the same host only.
    pub paused_at_ns: u64,
    /// Faults at the destination until all was there, as it reported with `Durable`.
    pub faults: FaultSummary,
    /// Blocks that were written at the source after the pause: must be 0.
    pub late_writes: u64,
    /// Blocks that had to be fetched before the machine ran there: must be 0.
    pub early_faults: u64,
    /// The new epoch.
    pub epoch: u64,
    /// The session, hex: with the epoch it names what stayed behind.
    pub session: String,
}

/// Where the blackout went, milliseconds. Source: until the token had been handed to the kernel.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct BlackoutParts {
    /// Stopping the processors and draining I/O.
    pub pause_ms: f64,
    /// Collecting the last dirty blocks; part of `save_ms`.
    pub scan_ms: f64,
    /// Saving the device state, and meanwhile collecting the last dirty blocks and sending the
    /// lists and the hot ones.
    pub save_ms: f64,
    /// Sending the token.
    pub send_ms: f64,
    /// Destination: token received to everything armed.
    pub arm_ms: f64,
    /// Destination: loading the state.
    pub load_ms: f64,
    /// Destination: first instruction.
    pub run_ms: f64,
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl fmt::Display for MoveReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "moved \"{}\" {} to {} ({}, {} rounds): {:.1} MiB sent{}, blackout {:.1} ms \
             (pause {:.1}, scan {:.1}, save {:.1}, send {:.1}, arm {:.1}, load {:.1}, run {:.1}), \
             total {:.0} ms",
            self.machine,
            self.from,
            self.to,
            self.mode,
            self.rounds.len(),
            mib(self.bytes_sent),
            match self.known_bytes {
                0 => String::new(),
                known => format!(" ({:.1} MiB were there already)", mib(known)),
            },
            self.blackout_ms,
            self.blackout.pause_ms,
            self.blackout.scan_ms,
            self.blackout.save_ms,
            self.blackout.send_ms,
            self.blackout.arm_ms,
            self.blackout.load_ms,
            self.blackout.run_ms,
            self.total_ms,
        )
    }
}
