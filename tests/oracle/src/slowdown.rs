//! How much of the processor this guest got: a loop of known work, timed in slices.
//!
//! The fastest slice is the measure; a slice in which the guest was stopped, waited for pages or
//! shared its processor did less. Compare runs with and without a move. What slows all slices alike is seen
//! by the speed only: batches of the loop a second.

use crate::{args::Args, print};
use std::{
    hint::black_box,
    process::ExitCode,
    time::{Duration, Instant},
};

/// Rounds of the loop between two looks at the clock: about 10 µs on a translated guest.
const ROUNDS: u64 = 1000;

pub(crate) fn run(mut args: Args) -> Result<ExitCode, String> {
    let seconds: u64 = args.or("seconds", 10)?;
    let slice_ms: u64 = args.or("slice-ms", 100)?;
    args.end()?;
    if slice_ms == 0 || seconds == 0 {
        return Err("--seconds and --slice-ms must be above 0".to_owned());
    }
    let slice = Duration::from_millis(slice_ms);
    let slices = measure(Duration::from_secs(seconds), slice);
    print(&format!("{}\n", summary(&slices, slice)));
    Ok(ExitCode::SUCCESS)
}

/// What one slice did.
struct Slice {
    /// Batches of the loop.
    batches: u64,
    /// Longest batch: the guest did nothing else than this loop meanwhile, if anything.
    longest: Duration,
}

/// Spins for `total`, in slices of `slice` by the monotonic clock. A slice that was overslept
/// (the guest was stopped) counts as the empty slices it covers.
fn measure(total: Duration, slice: Duration) -> Vec<Slice> {
    let start = Instant::now();
    let mut slices = Vec::new();
    let (mut value, mut last) = (1u64, start);
    let mut current = Slice { batches: 0, longest: Duration::ZERO };
    loop {
        for _ in 0..ROUNDS {
            value = black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
        current.batches += 1;
        let now = Instant::now();
        current.longest = current.longest.max(now - last);
        last = now;
        let number = (now - start).as_nanos() / slice.as_nanos();
        while (slices.len() as u128) < number {
            let next = Slice { batches: 0, longest: Duration::ZERO };
            slices.push(std::mem::replace(&mut current, next));
        }
        if now - start >= total {
            return slices;
        }
    }
}

fn summary(slices: &[Slice], slice: Duration) -> serde_json::Value {
    let best = slices.iter().map(|slice| slice.batches).max().unwrap_or(0).max(1);
    let share = |batches: u64| (batches as f64 / best as f64 * 1000.0).round() / 1000.0;
    let shares: Vec<f64> = slices.iter().map(|slice| share(slice.batches)).collect();
    let mean = shares.iter().sum::<f64>() / shares.len().max(1) as f64;
    let longest = slices.iter().map(|slice| slice.longest).max().unwrap_or_default();
    let batches = slices.iter().map(|slice| slice.batches).sum::<u64>() as f64;
    let seconds = slice.as_secs_f64() * slices.len().max(1) as f64;
    serde_json::json!({
        "batches_per_second": (batches / seconds).round(),
        "slice_ms": slice.as_millis() as u64,
        "slices": shares.len(),
        "share": shares,
        "mean_share": (mean * 1000.0).round() / 1000.0,
        "lowest_share": shares.iter().copied().fold(1.0, f64::min),
        "longest_gap_us": longest.as_micros() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_the_time_and_the_best_is_the_measure() {
        let slices = measure(Duration::from_millis(60), Duration::from_millis(10));
        assert!(slices.len() >= 6);
        let json = summary(&slices, Duration::from_millis(10));
        let shares: Vec<f64> =
            json["share"].as_array().unwrap().iter().map(|share| share.as_f64().unwrap()).collect();
        assert!(shares.iter().all(|share| (0.0..=1.0).contains(share)));
        assert!(shares.contains(&1.0));
    }

    #[test]
    fn lost_time_shows_as_low_shares() {
        let slice = |batches, us| Slice { batches, longest: Duration::from_micros(us) };
        let slices = [slice(100, 10), slice(25, 75_000), slice(0, 0), slice(100, 11)];
        let json = summary(&slices, Duration::from_millis(100));
        assert_eq!(json["share"], serde_json::json!([1.0, 0.25, 0.0, 1.0]));
        assert_eq!(json["lowest_share"], 0.0);
        assert_eq!(json["longest_gap_us"], 75_000);
        assert_eq!(json["mean_share"], 0.563);
        // 225 in 0.4 s.
        assert_eq!(json["batches_per_second"], 563.0);
    }
}
