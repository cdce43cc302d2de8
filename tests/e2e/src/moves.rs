//! Moves with what every one of them must keep.

use architect::fleet::{Fleet, RunnerId};
use drafter::{
    migrate::{messages::Mode, planner::Budgets, timings::MoveReport},
    runner::api::{Phase, Progress, Request},
};
use std::time::{Duration, Instant};

/// Limits for a guest under translation beside other work on the computer: what must be quick is
/// judged by the benchmarks, on a quiet one.
#[must_use]
pub fn budgets() -> Budgets {
    Budgets::default()
}

/// Limits that make a move slow enough to be met in the middle: bytes per second at most.
#[must_use]
pub fn slow(bytes_per_second: u64) -> Budgets {
    Budgets { bandwidth: Some(bytes_per_second), ..Budgets::default() }
}

/// Moves a machine and wants what holds for every move.
#[track_caller]
pub fn go(fleet: &Fleet, from: RunnerId, to: RunnerId, mode: Mode, budgets: Budgets) -> MoveReport {
    let report = fleet.migrate(from, to, mode, budgets, |_| {}).unwrap();
    assert_eq!(report.mode, mode);
    assert_eq!(report.early_faults, 0, "a fault before the machine ran: {report}");
    assert_eq!(report.to, fleet.runner(to).host);
    assert!(report.blackout_ms > 0.0 && report.blackout_ms < 5000.0, "{report}");
    if mode == Mode::PostCopy {
        assert!(report.rounds.is_empty(), "post-copy sends nothing before: {report}");
    }
    eprintln!("{report}, faults {}", report.faults.demanded);
    // The record of both ends.
    let (left, here) = (fleet.runner(from).status().unwrap(), fleet.runner(to).status().unwrap());
    assert_eq!(left.state, "standby");
    assert_eq!(left.moves.last().map(|m| m.session.clone()), Some(report.session.clone()));
    assert_eq!(here.lease_owner.as_deref(), Some(fleet.runner(to).host.as_str()));
    assert_eq!(here.epoch, Some(report.epoch));
    settled(fleet, to);
    report
}

/// Waits until a machine that arrived has everything and may leave again.
#[track_caller]
pub fn settled(fleet: &Fleet, at: RunnerId) {
    crate::eventually("the machine has settled", Duration::from_secs(60), || {
        let status = fleet.runner(at).status().unwrap();
        assert!(status.state != "failed", "{}", status.detail);
        status.state == "running" && status.missing.values().all(|n| *n == 0)
    });
}

/// Moves a machine there and back again, `count` times in all, and leaves it where the last move
/// took it. Between moves the machine works for a moment.
#[track_caller]
pub fn there_and_back(
    fleet: &Fleet,
    (mut from, mut to): (RunnerId, RunnerId),
    count: usize,
    mode: Mode,
    budgets: Budgets,
) -> (RunnerId, Vec<MoveReport>) {
    let mut reports = Vec::new();
    for _ in 0..count {
        reports.push(go(fleet, from, to, mode, budgets));
        (from, to) = (to, from);
        std::thread::sleep(Duration::from_millis(100));
    }
    (from, reports)
}

/// Waits until a job is in `phase` (or later), and returns how far it was.
#[track_caller]
pub fn wait_phase(fleet: &Fleet, at: RunnerId, job: u64, phase: Phase) -> Progress {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(progress) = fleet.runner(at).status().unwrap().job
            && progress.job == job
            && progress.phase >= phase
        {
            return progress;
        }
        assert!(Instant::now() < deadline, "job {job} did not get to {phase:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Follows a job to its end: its result, or the sentence that it failed with.
pub fn follow(fleet: &Fleet, at: RunnerId, job: u64) -> Result<serde_json::Value, String> {
    let mut client = fleet.runner(at).client().map_err(|e| e.to_string())?;
    client.set_deadline(Some(Duration::from_secs(90))).map_err(|e| e.to_string())?;
    client.call(&Request::Follow { job }, |_| {}).map_err(|e| e.to_string())
}

/// Cancels a job; the answer, for people.
#[track_caller]
pub fn cancel(fleet: &Fleet, at: RunnerId, job: u64) -> String {
    fleet.runner(at).client().unwrap().get(&Request::Cancel { job }).unwrap()
}
