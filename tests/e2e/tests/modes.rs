//! Busy machines move, in every mode, and nobody notices: not the client, not the guest's own
//! connection, not the oracle that knows what memory and disk must hold.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use drafter::migrate::{messages::Mode, planner::Budgets};
use e2e::{
    Stage,
    busy::{Busy, Work},
    moves::{budgets, there_and_back},
};
use std::time::Duration;

/// Ten moves of a machine of 256 MiB under every load there is.
fn ten_moves(mode: Mode, budgets: Budgets) {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.spec("redis", 1));
    let busy = Busy::start(&stage, stage.fleet.runner(a), 1, Work::default());
    let (end, reports) = there_and_back(&stage.fleet, (a, b), 10, mode, budgets);
    assert_eq!(end, a, "an even number of moves ends where it began");
    let (load, oracle) = busy.finish(stage.fleet.runner(end));
    let mut blackouts: Vec<f64> = reports.iter().map(|r| r.blackout_ms).collect();
    blackouts.sort_by(f64::total_cmp);
    eprintln!(
        "blackout median {:.1} ms, maximum {:.1} ms; {} operations, longest silence {:.0} ms; {} pages checked",
        blackouts[4], blackouts[9], load.operations, load.longest_gap_ms, oracle.pages_checked
    );
}

#[test]
fn ten_pre_copy_moves_under_load_lose_nothing() {
    // Writes never stop, so what is left at the pause is what was written in one round.
    ten_moves(Mode::PreCopy, Budgets { blackout: Duration::from_millis(100), ..budgets() });
}

#[test]
fn ten_post_copy_moves_under_load_lose_nothing() {
    ten_moves(Mode::PostCopy, budgets());
}

#[test]
fn ten_hybrid_moves_under_load_lose_nothing() {
    ten_moves(Mode::Hybrid, budgets());
}
