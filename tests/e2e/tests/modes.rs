//! Busy machines move, in every mode, and nobody notices: not the client, not the guest's own
//! connection, not the oracle that knows what memory and disk must hold.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use drafter::migrate::{
    messages::Mode,
    planner::{Budgets, Reason},
    timings::MoveReport,
};
use e2e::{
    Stage,
    busy::{Busy, Work},
    moves::{budgets, settled, there_and_back},
};
use std::time::Duration;

/// Ten moves of a machine of 256 MiB under every load there is; their reports, if this computer
/// can have machines.
fn ten_moves(mode: Mode, budgets: Budgets) -> Option<Vec<MoveReport>> {
    let mut stage = Stage::open()?;
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
    Some(reports)
}

#[test]
fn hop_check_01_15_ten_pre_copy_moves_under_load_lose_nothing() {
    // Writes never stop, so what is left at the pause is what was written in one round.
    ten_moves(Mode::PreCopy, Budgets { blackout: Duration::from_millis(100), ..budgets() });
}

#[test]
fn hop_check_01_03_15_ten_post_copy_moves_under_load_lose_nothing() {
    ten_moves(Mode::PostCopy, budgets());
}

#[test]
fn hop_check_01_15_ten_hybrid_moves_under_load_lose_nothing() {
    ten_moves(Mode::Hybrid, budgets());
}

#[test]
fn hop_check_14_a_guest_that_outpaces_the_line_is_handed_over_in_the_middle_of_a_round_and_loses_nothing()
 {
    // The oracle writes more than a quarter of this, and a whole move takes seconds.
    let narrow = Budgets { bandwidth: Some(60_000_000), ..budgets() };
    let Some(reports) = ten_moves(Mode::Hybrid, narrow) else { return };
    assert_eq!(reports[0].reason, Reason::Outpaced, "{:?}", reports[0].rounds);
    assert!(reports[0].faults.demanded > 0, "most of it came after the switchover");
    for report in &reports {
        assert_eq!((report.late_writes, report.early_faults), (0, 0));
    }
}

#[test]
fn hosts_that_cannot_track_writes_move_by_post_copy_alone_and_lose_nothing() {
    // As on a kernel before 6.7, which has neither WP_ASYNC nor PAGEMAP_SCAN.
    let Some(mut stage) = Stage::open() else { return };
    let mut spec = stage.spec("redis", 1);
    spec.extra.push("--no-tracking".into());
    let (mut from, mut to) = stage.pair(&spec);
    let busy = Busy::start(&stage, stage.fleet.runner(from), 1, Work::default());
    for _ in 0..4 {
        let report = stage.fleet.migrate(from, to, Mode::Hybrid, budgets(), |_| {}).unwrap();
        assert_eq!(report.mode, Mode::PostCopy, "{report}");
        assert!(report.rounds.is_empty(), "{report}");
        assert_eq!(report.early_faults, 0, "{report}");
        settled(&stage.fleet, to);
        (from, to) = (to, from);
    }
    busy.finish(stage.fleet.runner(from));
}
