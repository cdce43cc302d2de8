//! What a destination has of a machine already is not sent once more: of a move that came to nothing, of a
//! stay that is long over, of a store.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::{fleet::RunnerId, rig::RigConfig};
use drafter::{
    migrate::{messages::Mode, timings::MoveReport},
    runner::api::{Phase, Progress},
};
use e2e::{
    Stage,
    busy::{Work, start_oracle, verify_oracle},
    eventually,
    moves::{budgets, cancel, follow, go, settled, slow},
    place::Place,
    reception::on,
};
use std::{fs, time::Duration};

const MIB: u64 = 1 << 20;
/// Of what the guest holds, the most is written once.
const WORK: Work = Work { memory_mib: 64, hot_mib: 1, rate_mb_s: 1, file_mib: 8 };
const LIMIT: Duration = Duration::from_secs(60);

/// What was not sent, and what was, say what the move was.
#[track_caller]
fn mostly_known(report: &MoveReport) {
    assert!(report.known_bytes > 48 * MIB, "it was sent again: {report}");
    let written: u64 = report.rounds.iter().map(|round| round.set_bytes).sum();
    let names = report.memory_bytes / 64;
    let most = written + report.dirty_bytes + report.state_bytes + names + 4 * MIB;
    assert!(report.bytes_sent < most, "more was sent than was lacking: {report}");
}

#[test]
fn what_came_by_a_move_that_was_cancelled_is_not_sent_again() {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.plain_spec("redis"));
    start_oracle(stage.fleet.runner(a), WORK);
    let fleet = &stage.fleet;
    let standby = || {
        eventually("it waits again", LIMIT, || {
            fleet.runner(b).status().unwrap().state == "standby"
        });
        fleet.runner(b).status().unwrap().stay_bytes
    };

    // Once with most of it there, and once more, which must not spoil what is there.
    for least in [64 * MIB, MIB / 2] {
        let job = fleet.start_move(a, b, Mode::Hybrid, slow(40_000_000), false).unwrap();
        let progress = || -> Progress {
            let status = fleet.runner(a).status().unwrap();
            status.job.filter(|progress| progress.job == job).unwrap()
        };
        eventually("much has come", LIMIT, || {
            let now = progress();
            assert!(now.phase <= Phase::PreCopy, "it was not met in the middle: {now:?}");
            now.sent_bytes > least
        });
        cancel(fleet, a, job);
        let why = follow(fleet, a, job).unwrap_err();
        assert!(why.contains("cancelled during pre-copy"), "{why}");
        let kept = standby();
        assert!(kept > 56 * MIB, "{} MiB were kept", kept / MIB);
        verify_oracle(fleet.runner(a));
    }

    // Copied after the switchover, too, nothing comes that is there.
    let there = go(fleet, a, b, Mode::Hybrid, budgets());
    mostly_known(&there);
    verify_oracle(fleet.runner(b));

    // A return goes by what has changed since, as ever; also after a try that brought nothing.
    let job = fleet.start_move(b, a, Mode::Hybrid, slow(400_000), false).unwrap();
    eventually("the destination is ready", LIMIT, || {
        fleet.runner(a).status().unwrap().state == "receiving"
    });
    cancel(fleet, b, job);
    follow(fleet, b, job).unwrap_err();
    eventually("it waits again", LIMIT, || fleet.runner(a).status().unwrap().state == "standby");
    let back = go(fleet, b, a, Mode::PostCopy, budgets());
    if back.returned {
        assert_eq!(back.known_bytes, 0, "{back}");
        assert!(back.bytes_sent < 32 * MIB, "{back}");
    } else {
        // Something was written before it was cancelled.
        mostly_known(&back);
    }
    verify_oracle(fleet.runner(a));
}

#[test]
fn a_return_over_a_third_host_sends_what_has_changed() {
    let Some(mut stage) = Stage::with(RigConfig { hosts: 3, ..RigConfig::default() }) else {
        return;
    };
    let spec = stage.plain_spec("redis");
    let (a, b) = stage.pair(&spec);
    let c = stage.fleet.receive(2, &spec).unwrap();
    start_oracle(stage.fleet.runner(a), WORK);
    let fleet = &stage.fleet;
    for (from, to) in [(a, b), (b, c)] {
        let report = go(fleet, from, to, Mode::Hybrid, budgets());
        assert_eq!((report.known_bytes, report.returned), (0, false), "{report}");
    }
    let back = go(fleet, c, a, Mode::Hybrid, budgets());
    assert!(!back.returned, "{back}");
    mostly_known(&back);
    verify_oracle(fleet.runner(a));
    // All at once: what is there need not follow.
    let onward = go(fleet, a, b, Mode::PostCopy, budgets());
    assert!(!onward.returned, "{onward}");
    mostly_known(&onward);
    verify_oracle(fleet.runner(b));
}

#[test]
fn what_the_destinations_store_has_is_not_sent_and_a_damaged_store_costs_no_data() {
    let Some(mut stage) = Stage::with(RigConfig { hosts: 3, ..RigConfig::default() }) else {
        return;
    };
    let place = Place::new();
    let spec = stage.plain_spec("redis");
    let a = stage.fleet.run(0, &spec).unwrap();
    stage.fleet.runner(a).wait_ready(e2e::BOOT).unwrap();
    start_oracle(stage.fleet.runner(a), WORK);
    let words = |first: &[&str]| -> Vec<String> {
        first.iter().map(|&word| word.to_owned()).chain(place.words()).collect()
    };
    let package = spec.package.display().to_string();
    let [b, c] = [1, 2].map(|host| {
        let words = words(&["receive", "redis", "--package", &package]);
        stage.fleet.start(host, &spec, words).unwrap()
    });
    let moves = |host: usize, to: RunnerId| -> MoveReport {
        let runner = stage.fleet.runner(to);
        let (address, peer) = (runner.address.to_string(), runner.host.clone());
        let words = ["migrate", "redis", "--to", &address, "--peer", &peer, "--from-store"]
            .map(String::from);
        let report: MoveReport = serde_json::from_value(on(&stage, host, &words).json()).unwrap();
        settled(&stage.fleet, to);
        verify_oracle(stage.fleet.runner(to));
        eprintln!("{report}");
        report
    };
    on(&stage, 0, &words(&["backup", "redis", "--every", "2s"])).succeeds();
    mostly_known(&moves(0, b));

    // Most of what the store has is damaged: what it had written here until that was found out is not taken
    // for the machine's.
    on(&stage, 1, &words(&["backup", "redis", "--every", "10s"])).succeeds();
    for pack in place.packs() {
        let mut content = fs::read(&pack).unwrap();
        let from = content.len() / 2;
        for at in (from..content.len() * 3 / 4).step_by(1000) {
            content[at] ^= 0x55;
        }
        fs::write(&pack, content).unwrap();
    }
    let there = moves(1, c);
    let log = stage.fleet.runner(c).log();
    assert!(
        log.contains("not all of a generation was brought"),
        "nothing was damaged: {there}\n{log}"
    );

    // Nor is one that has nothing of it a reason not to move: here it goes by what has changed.
    let back = moves(2, b);
    assert!(back.returned && back.known_bytes == 0, "{back}");
}
