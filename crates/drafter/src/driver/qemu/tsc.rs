//! The rate of this host's time stamp counter, which a TCG guest sees and must be told at boot:
//! microvm has no clock that the guest's kernel could measure it against on a busy host. It is kept for as
//! long as this host runs, because even 30 ms are a part of a start.

use super::sys;
use nix::time::{ClockId, clock_gettime};
use std::{fs, path::Path, thread, time::Duration};

const ROUNDS: usize = 3;
/// How long it is measured at once: for as long as makes it exact.
const ROUND: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(60));
/// What counts as exact, parts per million. Where both clocks are read together within 0.1 µs, as where
/// the kernel itself goes by this counter, the shorter time is; 0.3 µs at each end of the longer are 10.
const EXACT: u64 = 10;
/// How often both clocks are read, to take the closest two.
const TRIES: usize = 32;

/// How long a rate that is known is looked at again: an error of 0.3 µs at each end is 120 parts per
/// million.
const GLANCE: Duration = Duration::from_millis(5);
/// A known rate that differs by more parts per million is measured anew.
const AGREES: u64 = 500;
/// The file that keeps the rate, for as long as this host runs.
const FILE: &str = "tsc";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The rate in kHz: as it is kept in a folder, if that is of this boot and agrees with the clock; else it
/// is measured, which takes 30 ms (0.2 s where clocks are slow to read), and kept there.
pub(super) fn khz(folder: &Path) -> nix::Result<u64> {
    let boot = fs::read_to_string(BOOT_ID).unwrap_or_default();
    let path = folder.join(FILE);
    let kept = fs::read_to_string(&path).ok().and_then(|text| kept(&text, boot.trim()));
    if let Some(kept) = kept
        && agree(kept, rate_over(GLANCE)?)
    {
        return Ok(kept);
    }
    let measured = measure_khz()?;
    let new = folder.join(format!("{FILE}.{}", std::process::id()));
    let write = fs::create_dir_all(folder)
        .and_then(|()| fs::write(&new, format!("{} {measured}\n", boot.trim())));
    if let Err(error) = write.and_then(|()| fs::rename(&new, &path)) {
        tracing::debug!(%error, "the processor's clock is measured again by the next runner");
    }
    Ok(measured)
}

/// The rate that was kept during this boot.
fn kept(text: &str, boot: &str) -> Option<u64> {
    let (of, khz) = text.trim().split_once(' ')?;
    (!boot.is_empty() && of == boot).then(|| khz.parse().ok())?
}

fn agree(kept: u64, seen: u64) -> bool {
    u128::from(kept.abs_diff(seen)) * 1_000_000 <= u128::from(AGREES) * u128::from(kept)
}

/// One reading of both clocks, as close together as some tries allow: the counter, nanoseconds, and how
/// many ticks lay between, at most.
fn reading() -> nix::Result<(u64, u64, u64)> {
    let mut best: Option<(u64, u64, u64)> = None;
    for _ in 0..TRIES {
        let before = sys::tsc();
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC_RAW)?);
        let after = sys::tsc();
        let width = after.wrapping_sub(before);
        if best.is_none_or(|(narrowest, ..)| width < narrowest) {
            best = Some((width, before.wrapping_add(width / 2), now.as_nanos() as u64));
        }
    }
    let (width, tsc, nanos) = best.expect("some readings were taken");
    Ok((tsc, nanos, width))
}

/// Measures the rate in kHz. Not /proc/cpuinfo, whose MHz is the present core clock on many hosts.
pub(super) fn measure_khz() -> nix::Result<u64> {
    let mut rates = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        rates.push(match rate_and_error(ROUND.0)? {
            (rate, error) if error <= EXACT => rate,
            _ => rate_over(ROUND.1)?,
        });
    }
    rates.sort_unstable();
    Ok(rates[ROUNDS / 2])
}

fn rate_over(time: Duration) -> nix::Result<u64> {
    rate_and_error(time).map(|(rate, _)| rate)
}

/// The rate in kHz, and by how many parts per million it may be wrong.
fn rate_and_error(time: Duration) -> nix::Result<(u64, u64)> {
    let (tsc, nanos, width) = reading()?;
    thread::sleep(time);
    let (tsc_later, nanos_later, width_later) = reading()?;
    let ticks = u128::from(tsc_later.wrapping_sub(tsc).max(1));
    let nanos = u128::from((nanos_later - nanos).max(1));
    // Each reading is off by half of its width at most.
    let off = u128::from(width) + u128::from(width_later);
    let error = (off * 500_000).div_ceil(ticks);
    Ok(((ticks * 1_000_000 / nanos) as u64, u64::try_from(error).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_for_this_boot_and_measured_again_where_it_cannot_be_true() {
        let folder = tempfile::tempdir().unwrap();
        let first = khz(folder.path()).unwrap();
        let file = folder.path().join(FILE);
        let boot = fs::read_to_string(BOOT_ID).unwrap();
        assert_eq!(kept(&fs::read_to_string(&file).unwrap(), boot.trim()), Some(first));
        assert_eq!(kept(&format!("another {first}"), boot.trim()), None);
        for wrong in
            [format!("{} {}", boot.trim(), first * 2), format!("{} x", boot.trim()), String::new()]
        {
            fs::write(&file, &wrong).unwrap();
            let again = khz(folder.path()).unwrap();
            assert!(agree(first, again), "{first} and {again} kHz after {wrong:?}");
        }
        assert!(agree(1_000_000, 1_000_499) && !agree(1_000_000, 999_400));
        assert!(!agree(0, 1));
    }

    #[test]
    fn two_measurements_of_the_tsc_agree_within_200_ppm() {
        let (a, b) = (measure_khz().unwrap(), measure_khz().unwrap());
        assert!(a > 100_000, "{a} kHz is slower than any x86-64 processor");
        assert!(a.abs_diff(b) * 1_000_000 / a < 200, "{a} and {b} kHz");
    }
}
