//! Time on one host, as leases and offers count it.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

/// Time since this host booted, suspend included. Never compared with another host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

/// ρ: how far any host's clock may run fast or slow, in parts per million of true time. All hosts
/// must use the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drift {
    /// At most 500 000 of it count.
    pub ppm: u32,
}

impl Default for Drift {
    /// A thousandth: some twenty times what NTP tolerates of a clock before it gives up on it.
    fn default() -> Self {
        Self { ppm: 1000 }
    }
}

impl Drift {
    /// How long to wait by one's own clock until `d` has passed on any other clock that keeps the
    /// bound: d(1+ρ)/(1−ρ), rounded up.
    ///
    /// The other clock's d lasts at most d/(1−ρ) of true time, of which ours counts at most (1+ρ).
    #[must_use]
    pub fn outlast(self, d: Duration) -> Duration {
        let million = 1_000_000_u128;
        let drift = u128::from(self.ppm.min(500_000));
        let nanos = (d.as_nanos() * (million + drift)).div_ceil(million - drift);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_waiting_outlasts_the_slowest_clock_by_the_fastest() {
        let two = Duration::from_secs(2);
        // 2 s × 1.001 / 0.999 = 2.004 004 004 004 … s
        assert_eq!(Drift::default().outlast(two), Duration::from_nanos(2_004_004_005));
        assert_eq!(Drift { ppm: u32::MAX }.outlast(two), two * 3);
    }

    #[test]
    fn the_boot_clock_moves_forward() {
        let first = BootClock.now();
        std::thread::sleep(Duration::from_millis(2));
        assert!(BootClock.now().since(first) >= Duration::from_millis(2));
    }
}
