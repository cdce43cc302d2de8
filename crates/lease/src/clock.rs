//! Time on one host, as leases and offers count it.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

/// Time since this host booted, suspend included. Never compared with another host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootTime(pub Duration);

impl BootTime {
    /// How long after `earlier` this is; zero if it is not.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for BootTime {
    type Output = Self;

    fn add(self, d: Duration) -> Self {
        Self(self.0.saturating_add(d))
    }
}

impl Sub<Duration> for BootTime {
    type Output = Self;

    fn sub(self, d: Duration) -> Self {
        Self(self.0.saturating_sub(d))
    }
}

/// Where time comes from; the simulator has its own.
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> BootTime;
}

/// The kernel's `CLOCK_BOOTTIME`: steady, never set, and counting while the host sleeps (a copy
/// that slept through its deadline must know).
#[derive(Clone, Copy, Debug, Default)]
pub struct BootClock;

impl Clock for BootClock {
    fn now(&self) -> BootTime {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
            .expect("every Linux since 2.6.39 has CLOCK_BOOTTIME");
        BootTime(Duration::from(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_clock_moves_forward() {
        let first = BootClock.now();
        std::thread::sleep(Duration::from_millis(2));
        assert!(BootClock.now().since(first) >= Duration::from_millis(2));
    }
}
