//! What is measured: a guest, its load and the link that it moves over.

use crate::rig::RigConfig;
use std::{fmt, time::Duration};

/// The link between hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    /// Round trip.
    pub(super) delay_ms: u64,
    /// Megabits per second; `None`: what the computer can do.
    pub(super) megabits: Option<u64>,
}

impl Link {
    /// As fast as the computer.
    pub(super) const FAST: Link = Link { delay_ms: 0, megabits: None };

    /// A rig with this link; its names begin with `prefix`.
    pub(super) fn rig(self, prefix: &str) -> RigConfig {
        RigConfig {
            prefix: prefix.to_owned(),
            leases: true,
            delay: (self.delay_ms > 0).then(|| Duration::from_millis(self.delay_ms)),
            bandwidth: self.megabits.map(|megabits| megabits * 1_000_000),
            ..RigConfig::default()
        }
    }

    /// The longest blackout that is good enough here, in milliseconds: 10, and over a long line
    /// half the round trip, because the state has to get there; at 80 ms this is the promised
    /// 40 + 20.
    pub(super) fn blackout_limit(self) -> f64 {
        match self.delay_ms {
            0 => 10.0,
            80 => 60.0,
            delay => 10.0 + delay as f64 / 2.0,
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.delay_ms, self.megabits) {
            (0, None) => f.write_str("fast"),
            (delay, None) => write!(f, "{delay}ms"),
            (0, Some(megabits)) => write!(f, "{megabits}mbit"),
            (delay, Some(megabits)) => write!(f, "{delay}ms-{megabits}mbit"),
        }
    }
}

/// A guest and its load, over a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    /// The guest's memory, MiB.
    pub(super) memory_mib: u64,
    /// What the oracle writes in it, 10^6 bytes a second.
    pub(super) rate_mb_s: u64,
    /// The link.
    pub(super) link: Link,
    /// Mutual TLS, or plaintext.
    pub(super) tls: bool,
}

impl Cell {
    /// A cell over the fast link, over TLS.
    pub(super) fn new(memory_mib: u64, rate_mb_s: u64) -> Cell {
        Cell { memory_mib, rate_mb_s, link: Link::FAST, tls: true }
    }

    /// MiB that the oracle watches: most of the memory; what is left is the kernel's and Redis'.
    pub(super) fn watched_mib(self) -> u64 {
        (self.memory_mib * 3 / 4).min(self.memory_mib.saturating_sub(112)).max(16)
    }

    /// MiB that the oracle writes again and again.
    pub(super) fn hot_mib(self) -> u64 {
        (self.memory_mib / 4).min(self.watched_mib())
    }
}

impl fmt::Display for Cell {
    /// As in the names of bars: `1gib.100mbs.fast.tls`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.memory_mib {
            mib if mib.is_multiple_of(1024) => write!(f, "{}gib", mib / 1024)?,
            mib => write!(f, "{mib}mib")?,
        }
        match self.rate_mb_s {
            0 => f.write_str(".idle")?,
            rate => write!(f, ".{rate}mbs")?,
        }
        write!(f, ".{}.{}", self.link, if self.tls { "tls" } else { "plain" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cells_name_says_all_of_it() {
        assert_eq!(Cell::new(1024, 100).to_string(), "1gib.100mbs.fast.tls");
        let link = Link { delay_ms: 80, megabits: Some(1000) };
        let cell = Cell { memory_mib: 256, rate_mb_s: 0, link, tls: false };
        assert_eq!(cell.to_string(), "256mib.idle.80ms-1000mbit.plain");
    }

    #[test]
    fn the_oracle_leaves_a_small_guest_room_to_live() {
        let parts = |mib| (Cell::new(mib, 100).watched_mib(), Cell::new(mib, 100).hot_mib());
        assert_eq!(parts(256), (144, 64));
        assert_eq!(parts(1024), (768, 256));
        assert_eq!(parts(4096), (3072, 1024));
    }

    #[test]
    fn a_longer_line_allows_a_longer_blackout_and_80_ms_what_was_promised() {
        let limit = |delay_ms| Link { delay_ms, megabits: None }.blackout_limit();
        assert_eq!((limit(0), limit(20), limit(80)), (10.0, 20.0, 60.0));
    }
}
