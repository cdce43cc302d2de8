//! Machines under load in bad weather: see `e2e::soak`. SOAK_MINUTES says for how long (`make soak`), and
//! SEED what is done.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use e2e::soak;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What `make test` has time for, the same in every run, so that a failure is found again. A longer one
/// does more of the same.
const SHORT: (Duration, u64) = (Duration::from_secs(5 * 60), 7);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().filter(|text| !text.is_empty()).map(|text| text.parse().unwrap())
}

#[test]
fn hop_check_02_no_acknowledged_write_is_lost_whatever_is_done_to_the_machines_and_their_hosts() {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (time, seed) = match number("SOAK_MINUTES") {
        Some(minutes) => (Duration::from_secs(minutes * 60), now()),
        None => SHORT,
    };
    let seed = number("SEED").unwrap_or(seed);
    eprintln!("SEED={seed}");
    let Some(outcome) = soak::run(time, seed) else { return };
    let again = format!("SEED={seed}; the log and the history are in {}", soak::folder().display());
    assert!(outcome.violations.is_empty(), "{again}\n{:#?}", outcome.violations);
    assert!(outcome.failures.is_empty(), "{again}\n{}", outcome.failures.join("\n"));
    assert!(outcome.deeds.iter().all(|count| *count > 0), "{again}: {outcome:?}");
    assert!(outcome.operations.0 > 200, "{again}: hardly anything was asked: {outcome:?}");
}
