//! The seeded simulator of moves: three hosts, a store, a guest that reads, writes and flushes, and
//! everything that can go wrong, around the same [`Source`](silo_block::session::source::Source) and
//! [`Destination`](silo_block::session::destination::Destination) that run over real connections.
//!
//! One seed is one world; the same seed is the same world always. `SIM_SEEDS=200000` runs more of
//! them, `SIM_SEED=1234` runs one and prints what happens:
//!
//! ```text
//!  SIM_SEED=1234 cargo test -p silo-block --test simulator worlds -- --nocapture
//! ```
//!
//! What is checked is said in [`world`] and [`reference`]; that the checks can fail is shown by
//! breaking one rule at a time ([`world::Broken`]).

#![allow(clippy::unwrap_used, reason = "a test")]

mod guest;
mod host;
mod random;
mod reference;
mod world;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, Ordering},
    thread,
};
use world::{Broken, Outcome, World};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs seeds on all processors; gives the first that failed and what was counted in the others.
fn run(seeds: u64, broken: Broken) -> (Outcome, Option<(u64, String)>) {
    let next = AtomicU64::new(0);
    let threads = thread::available_parallelism().map_or(2, usize::from);
    let work = || {
        let (mut sum, mut failed) = (Outcome::default(), None);
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds || failed.is_some() {
                return (sum, failed);
            }
            let result = catch_unwind(AssertUnwindSafe(|| World::new(seed, broken, false).run()));
            match result {
                Ok(Ok(outcome)) => sum.add(&outcome),
                Ok(Err(error)) => failed = Some((seed, error)),
                Err(panic) => failed = Some((seed, text_of(panic.as_ref()))),
            }
            if failed.is_some() {
                next.store(seeds, Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        let runs: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut all = (Outcome::default(), None);
        for run in runs {
            let (sum, failed) = run.join().expect("panics were caught");
            all.0.add(&sum);
            all.1 = all.1.or(failed);
        }
        all
    })
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "a panic without a text".to_owned())
}

#[test]
fn check_03_worlds_in_which_everything_goes_wrong_lose_nothing() {
    if let Some(seed) = number("SIM_SEED") {
        let outcome = World::new(seed, Broken::Nothing, true).run();
        panic!("seed {seed}: {outcome:?}");
    }
    let seeds = number("SIM_SEEDS").unwrap_or(10_000);
    let (sum, failed) = run(seeds, Broken::Nothing);
    if let Some((seed, error)) = failed {
        panic!(
            "seed {seed}: {error}\nreplay: SIM_SEED={seed} cargo test -p silo-block --test \
             simulator worlds -- --nocapture"
        );
    }
    println!("{seeds} seeds: {sum:?}");
    sum.check_that_everything_happened(seeds);
}

/// Each rule broken by itself is found, in far fewer worlds than are run without.
#[test]
fn the_simulator_finds_each_rule_that_is_broken() {
    for broken in Broken::RULES {
        let (_, failed) = run(20_000, broken);
        let (seed, error) = failed.unwrap_or_else(|| panic!("{broken:?} is not found"));
        println!("{broken:?}: seed {seed}: {error}");
    }
}
