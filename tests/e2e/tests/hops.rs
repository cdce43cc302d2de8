//! What may go wrong around a move, of the [36 checks](../../../docs/hop-checks.md) those that need a whole
//! machine and have no other home: the guest's own hook, a state that cannot be saved, secrets, a notice.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::{
    fleet::{Fleet, MachineSpec, RunnerId},
    rig::RigConfig,
};
use drafter::migrate::messages::Mode;
use e2e::{
    Stage,
    busy::{Work, sh, start_oracle, verify_oracle},
    command::say,
    eventually,
    moves::{budgets, follow, go, slow},
    place::Place,
    sys::break_state_channel,
    wire::{Secrets, Tap, files_below},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

const IDLE: Work = Work { memory_mib: 64, hot_mib: 8, rate_mb_s: 20, file_mib: 8 };

/// The machine runs at `at`, answers, and nothing in it is wrong.
#[track_caller]
fn runs_at(fleet: &Fleet, at: RunnerId) {
    let status = fleet.runner(at).status().unwrap();
    assert_eq!(status.state, "running", "{}", status.detail);
    assert_eq!(status.lease_owner.as_deref(), Some(fleet.runner(at).host.as_str()));
    verify_oracle(fleet.runner(at));
}

/// A move that fails: its sentence.
#[track_caller]
fn fails(fleet: &Fleet, from: RunnerId, to: RunnerId, mode: Mode) -> String {
    let job = fleet.start_move(from, to, mode, budgets(), false).unwrap();
    let why = follow(fleet, from, job).unwrap_err();
    assert!(why.contains("still running here"), "{why}");
    eventually("the destination waits again", Duration::from_secs(60), || {
        fleet.runner(to).status().unwrap().state == "standby"
    });
    why
}

/// What the guest calls before each pause: as it is told by a file.
const HOOK: &str = "echo called >> /tmp/calls; case $(cat /tmp/hook) in \
    fail) echo no room for the dump >&2; exit 3;; hang) sleep 600;; esac";

#[test]
fn hop_check_07_a_hook_before_the_pause_that_fails_or_hangs_ends_the_move_and_the_machine_runs_on()
{
    let Some(mut stage) = Stage::open() else { return };
    let package = stage.package_with("hooked", |recipe| {
        let hook = json!({ "argv": ["/bin/dash", "-c", HOOK], "timeout_ms": 1500 });
        recipe["entry"]["hooks"] = json!({ "before_suspend": hook });
    });
    let (a, b) = stage.pair(&MachineSpec::new("redis", &package));
    let fleet = &stage.fleet;
    // The hook is not root.
    sh(fleet.runner(a), "touch /tmp/calls; chmod 666 /tmp/calls; echo well > /tmp/hook");
    start_oracle(fleet.runner(a), IDLE);
    let calls = |at| sh(fleet.runner(at), "cat /tmp/calls").lines().count();

    for (tried, (hook, words)) in
        [("fail", "no room for the dump"), ("hang", "killed at its time limit")].iter().enumerate()
    {
        sh(fleet.runner(a), &format!("echo {hook} > /tmp/hook"));
        let began = Instant::now();
        let why = fails(fleet, a, b, Mode::Hybrid);
        assert!(why.contains("before_suspend") && why.contains(words), "{why}");
        assert!(began.elapsed() < Duration::from_secs(60), "a hook is waited for without end");
        runs_at(fleet, a);
        assert_eq!(calls(a), tried + 1, "it is called once in each attempt");
    }
    sh(fleet.runner(a), "echo well > /tmp/hook");
    go(fleet, a, b, Mode::Hybrid, budgets());
    runs_at(fleet, b);
    assert_eq!(calls(b), 3);
}

#[test]
fn hop_check_08_a_machine_whose_state_cannot_be_saved_after_the_pause_goes_on_where_it_is() {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.plain_spec("redis"));
    let fleet = &stage.fleet;
    start_oracle(fleet.runner(a), IDLE);
    for mode in [Mode::Hybrid, Mode::PostCopy] {
        let monitor = fleet.runner(a).status().unwrap().monitor_pid.unwrap();
        assert_eq!(break_state_channel(monitor), 1, "sockets into which a state is written");
        let why = fails(fleet, a, b, mode);
        assert!(why.contains("saving its state"), "{why}");
        runs_at(fleet, a);
    }
    // What was broken is made anew: it moves, and back.
    go(fleet, a, b, Mode::Hybrid, budgets());
    go(fleet, b, a, Mode::Hybrid, budgets());
    runs_at(fleet, a);
}

/// All that processes of ours were started with and have in their environment.
fn spoken_to(pids: &[u32]) -> Vec<u8> {
    let files =
        pids.iter().flat_map(|pid| ["cmdline", "environ"].map(|f| format!("/proc/{pid}/{f}")));
    files.flat_map(|file| fs::read(file).unwrap_or_default()).collect()
}

#[test]
fn hop_check_13_no_key_is_on_the_wire_in_a_log_in_a_file_or_in_a_store_and_no_memory_in_clear() {
    let Some(mut stage) = Stage::open() else { return };
    let identity = stage.fleet.rig().identity().unwrap();
    let place = Place::new();
    let line = place.new_keys();
    let mut secrets = Secrets::default();
    for file in fs::read_dir(&identity).unwrap().map(|entry| entry.unwrap().path()) {
        if file.extension().is_some_and(|kind| kind == "key") {
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            secrets.pem(&name, &fs::read_to_string(&file).unwrap());
        }
    }
    let digits = line.split_whitespace().last().unwrap().as_bytes();
    let digit = |d: u8| char::from(d).to_digit(16).unwrap() as u8;
    let key: Vec<u8> = digits.chunks_exact(2).map(|d| digit(d[0]) << 4 | digit(d[1])).collect();
    secrets.bytes("the store's key", &key);
    // Who looks must find: where they are, they are found.
    let there: Vec<u8> = fs::read_dir(&identity)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .chain([place.keys()])
        .filter(|path| path.is_file())
        .flat_map(|path| fs::read(path).unwrap())
        .collect();
    let mut known = secrets.found_in(&there);
    known.sort_unstable();
    assert!(
        ["a.key", "b.key", "ca.key", "the store's key"].iter().all(|k| known.contains(k)),
        "{known:?}"
    );

    let (a, b) = stage.pair(&stage.spec("redis", 1));
    let marker = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap().trim().repeat(2);
    sh(stage.fleet.runner(a), &format!("redis-cli set marker '{marker}'"));
    let mut memory = Secrets::default();
    memory.bytes("the guest's memory", marker.as_bytes());
    assert_eq!(memory.found_in(format!("x{marker}").as_bytes()).len(), 1);

    // Slow enough that whoever reads along misses nothing.
    let wire = Tap::on(&stage.fleet.rig().hosts()[0].namespace);
    let there = go(&stage.fleet, a, b, Mode::Hybrid, slow(40_000_000));
    let back = go(&stage.fleet, b, a, Mode::PostCopy, slow(40_000_000));
    let frames = wire.bytes();
    let moved = there.bytes_sent + back.bytes_sent;
    assert!(frames.len() as u64 > moved, "{} bytes seen, {moved} moved", frames.len());
    assert_eq!(secrets.found_in(&frames), Vec::<&str>::new(), "on the wire");
    assert_eq!(memory.found_in(&frames), Vec::<&str>::new(), "on the wire");

    let status = [a, b].map(|id| stage.fleet.runner(id).status().unwrap());
    let pids: Vec<u32> =
        status.iter().flat_map(|s| [Some(s.runner_pid), s.monitor_pid]).flatten().collect();
    assert_eq!(secrets.found_in(&spoken_to(&pids)), Vec::<&str>::new(), "of processes");
    assert_eq!(
        secrets.found_in(serde_json::to_string(&status).unwrap().as_bytes()),
        Vec::<&str>::new()
    );

    // Asleep in a store: sealed, and its key is with nobody but its owner.
    let asleep =
        stage.drafter(0).args(["--json", "suspend", "redis"]).args(place.words()).output().unwrap();
    assert!(asleep.status.success(), "{}", String::from_utf8_lossy(&asleep.stderr));
    for words in [&asleep.stdout, &asleep.stderr] {
        assert_eq!(secrets.found_in(words), Vec::<&str>::new(), "said by suspend");
    }
    let stored = files_below(&place.folder(), &[place.keys()]);
    let folder = stage.fleet.rig().folder();
    let kept = files_below(folder, &[identity]);
    assert!(kept.iter().any(|path| path.extension().is_some_and(|kind| kind == "log")), "no logs");
    let mut sealed = 0;
    for path in stored.iter().chain(&kept) {
        // A socket's file or one that is gone is nothing to read.
        let Ok(bytes) = fs::read(path) else { continue };
        assert_eq!(secrets.found_in(&bytes), Vec::<&str>::new(), "in {}", path.display());
        if stored.contains(path) {
            sealed += bytes.len();
            assert_eq!(memory.found_in(&bytes), Vec::<&str>::new(), "in {}", path.display());
        }
    }
    assert!(sealed > 10 << 20, "{sealed} bytes are in the store");
}

#[test]
fn hop_check_35_a_host_that_is_given_notice_is_empty_in_time_and_its_machines_go_on_elsewhere() {
    const LINE_MBIT: u64 = 400;
    const DEADLINE_S: f64 = 90.0;
    let config = RigConfig { bandwidth: Some(LINE_MBIT * 1_000_000), ..RigConfig::default() };
    let Some(mut stage) = Stage::with(config) else { return };
    let mut machines = Vec::new();
    let mut destinations = String::new();
    for number in 1..=3 {
        let mut spec = stage.plain_spec(&format!("small-{number}"));
        spec.memory_mib = Some(128);
        let (from, to) = stage.pair(&spec);
        sh(stage.fleet.runner(from), &format!("echo {number} > /tmp/note"));
        let runner = stage.fleet.runner(to);
        destinations += &format!("{} {} {}\n", spec.name, runner.host, runner.address);
        machines.push((from, to));
    }
    let file = stage.fleet.rig().folder().join("destinations");
    fs::write(&file, destinations).unwrap();
    let evacuate = |deadline: &str| {
        let mut command = stage.drafter(0);
        command.args(["evacuate", "--json", "--to"]).arg(&file);
        command.args(["--deadline", deadline, "--line", &LINE_MBIT.to_string()]);
        say(&mut command, Duration::from_secs(240))
    };
    let report: Value = evacuate(&format!("{DEADLINE_S}s")).json();
    let outcomes = report["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), machines.len(), "{report}");
    for outcome in outcomes {
        assert_eq!(outcome["error"], Value::Null, "{outcome}");
        assert_eq!(
            (&outcome["expected"], &outcome["in_time"]),
            (&json!(true), &json!(true)),
            "{outcome}"
        );
        assert!(outcome["safe_s"].as_f64().unwrap() < DEADLINE_S, "{outcome}");
    }
    for (number, (from, to)) in (1..).zip(machines) {
        let (left, here) = (stage.fleet.runner(from), stage.fleet.runner(to));
        // Nothing of it is here any more: the host may go.
        let status = left.status().unwrap();
        assert_eq!((status.state.as_str(), status.monitor_pid), ("standby", None));
        let status = here.status().unwrap();
        assert_eq!(status.state, "running", "{}", status.detail);
        assert!(status.missing.values().all(|left| *left == 0), "{:?}", status.missing);
        assert_eq!(sh(here, "cat /tmp/note").trim(), number.to_string());
    }
    assert!(Path::new(&file).exists());
}
