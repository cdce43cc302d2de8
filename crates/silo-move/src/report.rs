//! What a move reports: why it failed, how long its phases took, what travelled which way.

use crate::codec::Tally;
use silo_block::{
    block::BlockRange,
    device::DeviceName,
    order::Class,
    session::messages::{DeviceIndex, Reason, SessionId},
};
use std::{fmt, time::Duration};

/// Which end of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It gives devices away.
    Source,
    /// It receives them.
    Destination,
}

/// Where a move stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// No link yet.
    Connecting,
    /// Rounds, while writers write.
    Filling,
    /// Writers pause.
    Quiescing,
    /// The token is out; nobody has confirmed it.
    Switching,
    /// The destination runs; what is missing follows.
    Following,
    /// Everything is at the destination and durable.
    Durable,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connecting => "connecting",
            Self::Filling => "pre-copy",
            Self::Quiescing => "pausing writers",
            Self::Switching => "switchover",
            Self::Following => "post-copy",
            Self::Durable => "release",
        })
    }
}

/// A move that failed. Says which devices, when, with whom and why, and who owns them now.
#[derive(Debug)]
pub struct MoveError {
    /// Which end says this.
    pub end: End,
    /// The devices of the group.
    pub devices: Vec<DeviceName>,
    /// When it failed.
    pub phase: Phase,
    /// The peer.
    pub peer: String,
    /// Why.
    pub reason: Box<Reason>,
    /// The last error of the connection, if that was the trouble.
    pub link: Option<String>,
    /// Whether the devices are this side's, and usable.
    pub owned: bool,
}

impl fmt::Display for MoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |device: DeviceIndex| {
            let name = self.devices.get(usize::from(device.0));
            name.map_or_else(|| device.to_string(), |name| format!("device \"{name}\""))
        };
        let way = if self.end == End::Source { "to" } else { "from" };
        write!(f, "moving ")?;
        for (at, device) in self.devices.iter().enumerate() {
            write!(f, "{}\"{device}\"", if at > 0 { ", " } else { "" })?;
        }
        write!(f, " {way} {} failed during {}: ", self.peer, self.phase)?;
        match &*self.reason {
            Reason::Read { device, range, what } => write!(
                f,
                "{}: the source could not read {} blocks from {}: {what}",
                name(*device),
                range.count,
                range.start.0
            )?,
            Reason::Store { device, range, what } => write!(
                f,
                "{}: the destination could not store {} blocks from {}: {what}",
                name(*device),
                range.count,
                range.start.0
            )?,
            Reason::Lost { device, kept } => write!(
                f,
                "{}: the source lost what was written after {kept}; restore a generation",
                name(*device)
            )?,
            other => write!(f, "{other}")?,
        }
        if let Some(link) = &self.link {
            write!(f, " (last trouble with the connection: {link})")?;
        }
        f.write_str(match (self.end, self.owned) {
            (End::Source, true) => "; the devices are still here and usable",
            (End::Source, false) => "; the devices were given away and are not usable here",
            (End::Destination, true) => "; the devices are here, and not complete",
            (End::Destination, false) => "; the devices are not usable here",
        })
    }
}

impl std::error::Error for MoveError {}

/// What a destination lacks of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lacking {
    /// The device.
    pub device: DeviceName,
    /// Blocks that a store has promised.
    pub in_store: Vec<BlockRange>,
    /// Blocks that only the source has.
    pub at_source: Vec<BlockRange>,
}

/// Ranges that are named in a text; of more, the count has to do.
const NAMED: usize = 8;

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |ranges: &[BlockRange]| ranges.iter().map(|range| range.count).sum::<u64>();
        write!(f, "device \"{}\" lacks ", self.device)?;
        let parts =
            [(&self.at_source, "that only the source has"), (&self.in_store, "that a store has")];
        let mut first = true;
        for (ranges, where_) in parts.into_iter().filter(|(ranges, _)| !ranges.is_empty()) {
            let and = if std::mem::take(&mut first) { "" } else { " and " };
            write!(f, "{and}{} blocks {where_} (", count(ranges))?;
            for (at, range) in ranges.iter().take(NAMED).enumerate() {
                let (comma, start) = (if at > 0 { ", " } else { "" }, range.start.0);
                match range.count {
                    1 => write!(f, "{comma}{start}")?,
                    _ => write!(f, "{comma}{start}-{}", range.end() - 1)?,
                }
            }
            f.write_str(if ranges.len() > NAMED { ", …)" } else { ")" })?;
        }
        Ok(())
    }
}

/// How long the phases of a move took, at the end that reports. Zero for one that did not happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// From the start to the first link on which both ends know what is missing.
    pub connect: Duration,
    /// From there until writers were asked to pause (or the token came).
    pub filling: Duration,
    /// Pausing writers.
    pub quiesce: Duration,
    /// From writers paused to the other end's confirmation that it runs.
    pub switch: Duration,
    /// From there until everything was durable at the destination.
    pub following: Duration,
    /// All of it.
    pub total: Duration,
}

impl fmt::Display for Timings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        write!(
            f,
            "total {:.0} ms (connect {:.1}, pre-copy {:.1}, pause {:.1}, switch {:.1}, post-copy {:.1})",
            ms(self.total),
            ms(self.connect),
            ms(self.filling),
            ms(self.quiesce),
            ms(self.switch),
            ms(self.following)
        )
    }
}

/// Bytes of frames by connection, headers included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WireBytes {
    /// Control connections, sent from here.
    pub control_sent: u64,
    /// … and received here.
    pub control_received: u64,
    /// Runs of blocks on data connections, whichever way they go.
    pub data: u64,
    /// Runs of blocks on demand connections.
    pub demand: u64,
}

impl WireBytes {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.control_sent + self.control_received + self.data + self.demand
    }
}

/// A move that went well, as the source saw it.
#[derive(Clone, Debug)]
pub struct SourceReport {
    /// The session.
    pub session: SessionId,
    /// The peer.
    pub peer: String,
    /// Size of the group in bytes.
    pub size: u64,
    /// Phases.
    pub timings: Timings,
    /// Rounds closed.
    pub rounds: u32,
    /// Links used: 1 without a cut.
    pub links: u64,
    /// Blocks sent, by class in the order of [`Class::ALL`].
    pub sent: [u64; Class::ALL.len()],
    /// Blocks by path, and their bytes.
    pub paths: Tally,
    /// Bytes of frames.
    pub wire: WireBytes,
    /// Blocks that came to the destination otherwise.
    pub spared: u64,
}

/// How far a move is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Where it stands.
    pub phase: Phase,
    /// Size of the group in bytes.
    pub size: u64,
    /// Bytes that the destination still lacks, of those known to be needed.
    pub remaining: u64,
    /// Rounds closed.
    pub rounds: u32,
    /// Bytes of blocks per second, lately.
    pub rate: f64,
    /// How long the rest would take at that rate; none without a rate.
    pub left: Option<Duration>,
    /// Bytes of frames so far.
    pub wire: WireBytes,
}

/// Bytes per second over the last while, from a count that only grows.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    at: Duration,
    bytes: u64,
    rate: f64,
}

impl Rate {
    /// The count is `bytes` at `now`.
    pub(crate) fn update(&mut self, now: Duration, bytes: u64) -> f64 {
        let passed = now.saturating_sub(self.at);
        if passed >= Duration::from_millis(100) {
            let measured = bytes.saturating_sub(self.bytes) as f64 / passed.as_secs_f64();
            // Half of what is shown is of the last second.
            let weight = 1.0 - 0.5f64.powf(passed.as_secs_f64());
            self.rate = if self.rate == 0.0 {
                measured
            } else {
                self.rate + weight * (measured - self.rate)
            };
            (self.at, self.bytes) = (now, bytes);
        }
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_device_phase_peer_and_who_owns_the_devices() {
        let error = MoveError {
            end: End::Source,
            devices: vec![DeviceName::new("memory").unwrap(), DeviceName::new("root").unwrap()],
            phase: Phase::Filling,
            peer: "host b".into(),
            reason: Box::new(Reason::Store {
                device: DeviceIndex(1),
                range: BlockRange::new(7, 2),
                what: "No space left on device".into(),
            }),
            link: None,
            owned: true,
        };
        assert_eq!(
            error.to_string(),
            "moving \"memory\", \"root\" to host b failed during pre-copy: device \"root\": the \
             destination could not store 2 blocks from 7: No space left on device; the devices are \
             still here and usable"
        );
    }

    #[test]
    fn what_is_missing_is_named_by_device_and_block() {
        let lacking = Lacking {
            device: DeviceName::new("root").unwrap(),
            in_store: (0..20).map(|at| BlockRange::new(at * 10 + 100, 3)).collect(),
            at_source: vec![BlockRange::new(7, 1), BlockRange::new(9, 2)],
        };
        assert_eq!(
            lacking.to_string(),
            "device \"root\" lacks 3 blocks that only the source has (7, 9-10) and 60 blocks that a \
             store has (100-102, 110-112, 120-122, 130-132, 140-142, 150-152, 160-162, 170-172, …)"
        );
    }

    #[test]
    fn a_rate_follows_what_is_sent() {
        let mut rate = Rate::default();
        for second in 1..20 {
            rate.update(Duration::from_secs(second), second * 1_000_000);
        }
        assert!((rate.rate - 1e6).abs() < 1.0, "{}", rate.rate);
        for second in 20..40 {
            rate.update(Duration::from_secs(second), 19_000_000);
        }
        assert!(rate.rate < 1e4, "{}", rate.rate);
    }
}
