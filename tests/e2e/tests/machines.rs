//! Moves of more than one plain machine: several processors, several machines, several stays.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use drafter::{migrate::messages::Mode, runner::api::Phase};
use e2e::{
    Stage,
    busy::{Busy, Work, sh},
    command::say,
    moves::{budgets, follow, go, settled, there_and_back, wait_phase},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    process::Stdio,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;

#[test]
fn a_machine_with_two_processors_moves_under_load() {
    let Some(mut stage) = Stage::open() else { return };
    let mut spec = stage.spec("redis", 1);
    spec.vcpus = Some(2);
    let (a, b) = stage.pair(&spec);
    assert_eq!(sh(stage.fleet.runner(a), "nproc").trim(), "2");
    let work = Work { memory_mib: 96, ..Work::default() };
    let busy = Busy::start(&stage, stage.fleet.runner(a), 1, work);
    let (end, _) = there_and_back(&stage.fleet, (a, b), 4, Mode::Hybrid, budgets());
    busy.finish(stage.fleet.runner(end));
}

#[test]
fn hop_check_31_two_machines_move_at_once_in_opposite_directions() {
    let Some(mut stage) = Stage::open() else { return };
    let (one, two) = (stage.spec("one", 1), stage.spec("two", 2));
    let (one_a, one_b) = stage.pair(&one);
    let two_b = stage.fleet.run(1, &two).unwrap();
    let two_a = stage.fleet.receive(0, &two).unwrap();
    stage.fleet.runner(two_b).wait_ready(e2e::BOOT).unwrap();
    let work = Work { memory_mib: 64, hot_mib: 16, rate_mb_s: 50, file_mib: 8 };
    let first = Busy::start(&stage, stage.fleet.runner(one_a), 1, work);
    let second = Busy::start(&stage, stage.fleet.runner(two_b), 2, work);
    let fleet = &stage.fleet;
    let (mut from, mut to) = ((one_a, two_b), (one_b, two_a));
    for _ in 0..2 {
        let jobs = [(from.0, to.0), (from.1, to.1)]
            .map(|(from, to)| fleet.start_move(from, to, Mode::Hybrid, budgets(), false).unwrap());
        for (job, from, to) in [(jobs[0], from.0, to.0), (jobs[1], from.1, to.1)] {
            follow(fleet, from, job).unwrap();
            settled(fleet, to);
        }
        (from, to) = (to, from);
    }
    first.finish(fleet.runner(from.0));
    second.finish(fleet.runner(from.1));
}

#[test]
fn hop_check_21_34_a_machine_that_comes_back_sends_what_changed_unless_the_stay_was_not_kept() {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.plain_spec("redis"));
    let fleet = &stage.fleet;
    let stay = |at| fleet.runner(at).status().unwrap().stay_bytes;
    let all = go(fleet, a, b, Mode::Hybrid, budgets());
    assert!(!all.returned && stay(a) > 32 * MIB, "{all}; {} kept", stay(a));

    // Eight MiB of what cannot be compressed, in a file and so in the page cache too.
    sh(fleet.runner(b), "dd if=/dev/urandom of=/var/lib/changed bs=1M count=8 conv=fsync");
    let back = go(fleet, b, a, Mode::Hybrid, budgets());
    let changed = back.rounds[0].set_bytes + back.dirty_bytes;
    assert!(back.returned);
    assert!(
        back.bytes_sent <= changed + changed / 50 + MIB,
        "{} bytes sent for {changed} changed: {back}",
        back.bytes_sent
    );
    assert!(back.bytes_sent >= 8 * MIB, "what changed was not sent: {back}");
    assert!(changed < 48 * MIB, "hardly anything changed, but not {changed} bytes: {back}");

    // Emptied by hand: the way back is as long as the way there.
    assert!(stay(b) > 32 * MIB);
    let said =
        say(stage.drafter(1).args(["--json", "stay", "drop", "redis"]), Duration::from_secs(20));
    assert!(said.json().as_u64().unwrap() > 32 * MIB, "{said:?}");
    assert_eq!(stay(b), 0);
    let again = go(fleet, a, b, Mode::Hybrid, budgets());
    assert!(!again.returned && again.bytes_sent > 3 * back.bytes_sent.min(10 * MIB), "{again}");
}

#[test]
fn a_stay_limit_of_zero_keeps_nothing() {
    let Some(mut stage) = Stage::open() else { return };
    let mut spec = stage.plain_spec("redis");
    spec.extra = vec!["--keep-stay-mib".into(), "0".into()];
    let (a, b) = stage.pair(&spec);
    let fleet = &stage.fleet;
    let all = go(fleet, a, b, Mode::Hybrid, budgets());
    assert_eq!(fleet.runner(a).status().unwrap().stay_bytes, 0);
    let back = go(fleet, b, a, Mode::Hybrid, budgets());
    assert!(!back.returned && back.bytes_sent > all.bytes_sent / 2, "{back}");
}

#[test]
fn a_move_goes_on_when_the_command_that_asked_for_it_is_interrupted() {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.plain_spec("redis"));
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let (from, to) = if signal == Signal::SIGINT { (a, b) } else { (b, a) };
        let (host, there) = if signal == Signal::SIGINT { (0, "b") } else { (1, "a") };
        if signal == Signal::SIGKILL {
            // So that there is something to be in the middle of.
            say(stage.drafter(0).args(["stay", "drop", "redis"]), Duration::from_secs(20))
                .succeeds();
        }
        let mut client = stage
            .drafter(host)
            .args(["migrate", "redis", "--bandwidth-mb-s", "40", "--peer", there, "--to"])
            .arg(stage.fleet.runner(to).address.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let progress = wait_phase(&stage.fleet, from, 1, Phase::PreCopy);
        assert!(progress.phase == Phase::PreCopy, "too quick to be interrupted: {progress:?}");
        kill(Pid::from_raw(client.id() as i32), signal).unwrap();
        let ended = Instant::now();
        assert!(!client.wait().unwrap().success());
        assert!(ended.elapsed() < Duration::from_secs(30), "the command did not end at once");
        follow(&stage.fleet, from, progress.job).unwrap();
        settled(&stage.fleet, to);
        sh(stage.fleet.runner(to), "true");
    }
}
