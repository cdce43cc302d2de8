//! The rate of this host's time stamp counter, which a TCG guest sees and must be told at boot:
//! microvm has no clock that the guest's kernel could measure it against on a busy host.

use super::sys;
use nix::time::{ClockId, clock_gettime};
use std::{thread, time::Duration};

const ROUNDS: usize = 5;
/// An error of 0.3 µs at each end of 60 ms is 10 parts per million.
const ROUND: Duration = Duration::from_millis(60);

/// One reading of both clocks, as close together as eight tries allow.
fn reading() -> nix::Result<(u64, u64)> {
    let mut best: Option<(u64, u64, u64)> = None;
    for _ in 0..8 {
        let before = sys::tsc();
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC_RAW)?);
        let after = sys::tsc();
        let width = after.wrapping_sub(before);
        if best.is_none_or(|(narrowest, ..)| width < narrowest) {
            best = Some((width, before.wrapping_add(width / 2), now.as_nanos() as u64));
        }
    }
    let (_, tsc, nanos) = best.expect("eight readings were taken");
    Ok((tsc, nanos))
}

/// Measures the rate in kHz: takes 0.3 s. Not /proc/cpuinfo, whose MHz is the present core clock
/// on many hosts.
pub(super) fn measure_khz() -> nix::Result<u64> {
    let mut rates = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let (tsc, nanos) = reading()?;
        thread::sleep(ROUND);
        let (tsc_later, nanos_later) = reading()?;
        let (ticks, nanos) = (tsc_later.wrapping_sub(tsc), (nanos_later - nanos).max(1));
        rates.push((u128::from(ticks) * 1_000_000 / u128::from(nanos)) as u64);
    }
    rates.sort_unstable();
    Ok(rates[ROUNDS / 2])
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_measurements_of_the_tsc_agree_within_200_ppm() {
        let (a, b) = (super::measure_khz().unwrap(), super::measure_khz().unwrap());
        assert!(a > 100_000, "{a} kHz is slower than any x86-64 processor");
        assert!(a.abs_diff(b) * 1_000_000 / a < 200, "{a} and {b} kHz");
    }
}
