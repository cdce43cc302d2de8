//! Copies of a running machine on its host, by the command that a person types.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::{
    fleet::RunnerId,
    load::{Load, LoadConfig, LoadHandle},
};
use drafter::runner::state::process_start;
use e2e::{
    Stage,
    busy::{OracleReport, Work, sh, start_oracle, verify_oracle},
    command::{Said, say},
    eventually,
    place::Place,
    writers::{busy_machine, verify_all, works_on},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use std::{collections::BTreeSet, fs, time::Duration};

const LIMIT: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 256;
/// A small part of the memory is written all the time.
const WORK: Work = Work { memory_mib: 96, hot_mib: 4, rate_mb_s: 5, file_mib: 8 };

/// A command of ours on host a.
#[track_caller]
fn on_a(stage: &Stage, words: &[&str]) -> Said {
    say(stage.drafter(0).arg("--json").args(words), LIMIT)
}

/// A command in a machine on host a.
#[track_caller]
fn inside(stage: &Stage, machine: &str, script: &str) -> String {
    let said = on_a(stage, &["exec", machine, "--", "/bin/dash", "-c", script]);
    said.json()["stdout"].as_str().unwrap_or_default().trim().to_owned()
}

/// Has the oracle of a machine check all of its pages and blocks, of memory and disk.
#[track_caller]
fn verify(stage: &Stage, machine: &str) {
    let report: Value = serde_json::from_str(&inside(stage, machine, "oracle verify")).unwrap();
    assert_eq!(report["ok"], true, "{machine}: {report}");
    assert!(report["pages_checked"].as_u64().unwrap() > 0, "{machine}: {report}");
}

/// What of a copy's memory is its own, and the size of the mapping, in bytes, as its kernel says.
#[track_caller]
fn own_memory(pid: u64) -> (u64, u64) {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut of_memory, mut own, mut size) = (false, 0, 0);
    for line in maps.lines() {
        let kib = |rest: &str| rest.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap();
        if line.contains("/memfd:staging") {
            assert!(line.contains("rw-p"), "the mapping is shared: {line}");
            of_memory = true;
        } else if line.split_whitespace().next().is_some_and(|word| word.contains('-')) {
            of_memory = false;
        } else if of_memory && let Some(rest) = line.strip_prefix("Size:") {
            size += kib(rest) << 10;
        } else if of_memory && let Some(rest) = line.strip_prefix("Anonymous:") {
            own += kib(rest) << 10;
        }
    }
    (own, size)
}

fn state_is(stage: &Stage, machine: &str, state: &str) -> bool {
    let rows = on_a(stage, &["list"]).json();
    rows.as_array().unwrap().iter().any(|row| row["machine"] == machine && row["state"] == state)
}

/// How a machine on host a reaches its disks.
#[track_caller]
fn kind_of(stage: &Stage, machine: &str) -> String {
    let inspected = on_a(stage, &["inspect", machine]).json();
    inspected["machine"]["shape"]["disk_kind"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn hop_check_28_three_copies_of_a_busy_machine_are_machines_of_their_own_and_it_goes_on() {
    three_copies("vhost-user-blk");
}

#[test]
fn so_are_copies_of_a_machine_with_nbd_disks() {
    three_copies("nbd");
}

/// A machine on host a with something in memory and on disk, that works, and whose Redis a client uses. A
/// copy's connections end with its old address; the machine's own one is kept and asked after.
fn used_machine(stage: &mut Stage, kind: &str) -> (RunnerId, LoadHandle) {
    let mut spec = stage.spec("redis", 2);
    spec.memory_mib = Some(MEMORY_MIB);
    spec.extra_boot = vec!["--disk-kind".into(), kind.into()];
    let source = stage.fleet.run(0, &spec).unwrap();
    stage.fleet.runner(source).wait_ready(e2e::BOOT).unwrap();
    start_oracle(stage.fleet.runner(source), WORK);
    sh(stage.fleet.runner(source), "redis-cli set k before; echo disk > /var/lib/note; sync");
    let load = {
        let client = stage.fleet.rig().client();
        let config = LoadConfig { think: Duration::from_millis(1), ..LoadConfig::default() };
        client.run(|| Load::start(Stage::public(2), config)).unwrap().unwrap()
    };
    assert!(load.wait_for(100, LIMIT), "{:?}", load.progress());
    (source, load)
}

fn three_copies(kind: &str) {
    let Some(mut stage) = Stage::open() else { return };
    let (source, load) = used_machine(&mut stage, kind);

    on_a(&stage, &["fork", "redis"]).fails_with(&["each copy needs an address of its own"]);
    let report = on_a(
        &stage,
        &["fork", "redis", "--copies", "3", "--prefix", "copy", "--address", "10.77.0.101"],
    )
    .json();
    eprintln!("{report}");
    let again = ["fork", "redis", "--prefix", "copy", "--address", "10.77.0.110"];
    on_a(&stage, &again).fails_with(&["has a machine \"copy-1\" already"]);
    assert!(report["pause_ms"].as_f64().unwrap() > 0.0, "{report}");
    let copies = report["copies"].as_array().unwrap();
    let names = ["copy-1", "copy-2", "copy-3"];
    assert_eq!(copies.iter().map(|c| c["name"].as_str().unwrap()).collect::<Vec<_>>(), names);
    let state = stage.fleet.state_of(0);
    let forks = fs::read_dir(state.join("forks")).unwrap();
    assert_eq!(forks.count(), 0, "the image goes with the command");

    // The machine's server of disks is not the copies': it could not reach their memory.
    assert_eq!(kind_of(&stage, "redis"), kind);
    for name in names {
        assert_eq!(kind_of(&stage, name), "nbd", "{name}");
    }
    // Each has what the machine had, memory and disk of one instant, and its own identity.
    let (mut random, mut instances) = (BTreeSet::new(), BTreeSet::new());
    random.insert(inside(&stage, "redis", "head -c 16 /dev/urandom | od -An -tx1"));
    for (at, (name, copy)) in names.into_iter().zip(copies).enumerate() {
        assert_eq!(copy["error"], Value::Null, "{copy}");
        let address = format!("10.77.0.{}", 101 + at);
        assert_eq!(inside(&stage, name, "redis-cli get k; cat /var/lib/note"), "before\ndisk");
        assert_eq!(
            inside(&stage, name, "cat /proc/sys/kernel/hostname /etc/hostname"),
            format!("{name}\n{name}")
        );
        let identity: Value =
            serde_json::from_str(&inside(&stage, name, "cat /run/drafter/identity.json")).unwrap();
        assert_eq!(identity["generation"], 1, "{identity}");
        assert_eq!(
            (&identity["copy_of"], &identity["address"]),
            (&"redis".into(), &address.as_str().into())
        );
        instances.insert(identity["instance"].as_str().unwrap().to_owned());
        random.insert(inside(&stage, name, "head -c 16 /dev/urandom | od -An -tx1"));
        let routes = inside(&stage, name, "cat /proc/net/fib_trie");
        assert!(routes.contains(&address) && !routes.contains("10.77.0.2\n"), "{routes}");
        verify(&stage, name);
        let status = on_a(&stage, &["status", name]).json();
        assert_eq!(
            (&status["epoch"], &status["lease_owner"]),
            (&1.into(), &"a".into()),
            "{status}"
        );
        let (own, size) = own_memory(copy["monitor_pid"].as_u64().unwrap());
        eprintln!(
            "{name} has {} MiB of its own, {} MiB are shared",
            own / MIB,
            report["memory_bytes"].as_u64().unwrap() / MIB
        );
        assert_eq!(size, MEMORY_MIB * MIB);
        assert!(own < 112 * MIB, "{name} has {own} bytes of its own");
    }
    assert_eq!((random.len(), instances.len()), (4, 3), "{random:?} {instances:?}");
    // By the network, from the machine itself, at their own addresses; and what one writes no other sees.
    for (at, name) in names.into_iter().enumerate() {
        let address = format!("10.77.0.{}", 101 + at);
        eventually("the copy answers at its address", LIMIT, || {
            inside(&stage, "redis", &format!("redis-cli -h {address} set k {name} || true")) == "OK"
        });
    }
    for name in names {
        assert_eq!(inside(&stage, name, "redis-cli get k"), name);
    }
    assert_eq!(inside(&stage, "redis", "redis-cli get k"), "before");

    // Nobody who used the machine noticed.
    assert!(load.wait_for(100, LIMIT), "{:?}", load.progress());
    let loaded = load.finish().unwrap();
    assert!(loaded.is_clean(), "the client noticed: {loaded:?}");
    verify_oracle(stage.fleet.runner(source));

    // A copy moves like any machine, and is one of its own memory from then on.
    let mut there = stage.plain_spec("copy-1");
    there.on_agent = true;
    let to = stage.fleet.receive(1, &there).unwrap();
    let address = stage.fleet.runner(to).address.to_string();
    on_a(&stage, &["migrate", "copy-1", "--to", &address, "--peer", "b"]).succeeds();
    let moved = stage.fleet.runner(to);
    verify_oracle(moved);
    assert_eq!(sh(moved, "redis-cli get k").trim(), "copy-1");
    // Another is suspended and goes on as what it is.
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("saved").display().to_string();
    on_a(&stage, &["suspend", "copy-2", "--to", &saved]).succeeds();
    assert!(state_is(&stage, "copy-2", "stopped"));
    let mut resumed = stage.plain_spec("copy-2");
    resumed.on_agent = true;
    let package = stage.package().display().to_string();
    let words = ["resume", "copy-2", "--from", &saved, "--package", &package].map(String::from);
    let resumed = stage.fleet.start(0, &resumed, words.to_vec()).unwrap();
    verify_oracle(stage.fleet.runner(resumed));
    assert_eq!(sh(stage.fleet.runner(resumed), "redis-cli get k").trim(), "copy-2");

    // The third loses its runner, and is copied itself: what it shares and what it has of its own.
    let third = &copies[2];
    let runner = third["runner_pid"].as_u64().unwrap() as u32;
    kill(Pid::from_raw(runner.cast_signed()), Signal::SIGKILL).unwrap();
    eventually("its runner is gone", LIMIT, || process_start(runner).is_none());
    let mut recovered = stage.drafter(0).args(["recover", "copy-3"]).spawn().unwrap();
    eventually("another runner has it", LIMIT, || {
        let status = on_a(&stage, &["status", "copy-3"]);
        status.code == Some(0) && status.json()["state"] == "running"
    });
    assert_eq!(inside(&stage, "copy-3", "redis-cli get k"), "copy-3");
    let fork = ["fork", "copy-3", "--prefix", "second", "--address", "10.77.0.120"];
    on_a(&stage, &fork).succeeds();
    verify(&stage, "second-1");
    verify(&stage, "copy-3");
    assert_eq!(inside(&stage, "second-1", "redis-cli get k; cat /var/lib/note"), "copy-3\ndisk");
    let generation = inside(&stage, "second-1", "cat /run/drafter/identity.json");
    assert!(generation.contains("\"generation\":2"), "{generation}");
    on_a(&stage, &["stop", "copy-3", "--grace-s", "0"]).succeeds();
    recovered.wait().unwrap();
}

/// The words that begin a copy of "redis" from its history.
fn copy_words(stage: &Stage, place: &Place, name: &str, more: &[&str]) -> Vec<String> {
    let package = stage.package().display().to_string();
    let words = ["restore", name, "--copy-of", "redis", "--package", &package];
    let mut words: Vec<String> = words.map(String::from).into();
    words.extend(place.words());
    words.extend(more.iter().map(|word| (*word).to_owned()));
    words
}

#[test]
fn copies_on_another_host_begin_as_a_generation_of_the_machine_which_runs_on() {
    let Some(mut stage) = Stage::open() else { return };
    let place = Place::new();
    let (source, load) = used_machine(&mut stage, "vhost-user-blk");
    say(stage.drafter(0).args(["backup", "redis"]).args(place.words()), LIMIT).succeeds();
    sh(stage.fleet.runner(source), "redis-cli set k after");

    let refused = |stage: &Stage, name: &str, more: &[&str], why: &str| {
        let mut command = stage.drafter(1);
        command.args(copy_words(stage, &place, name, more));
        command.args(["--host", "b", "--plaintext", "--lease"]).arg(stage.leases());
        say(&mut command, LIMIT).fails_with(&[why]);
    };
    refused(&stage, "redis", &[], "needs a name of its own");
    refused(&stage, "copy-1", &[], "a copy needs an address of its own");
    refused(&stage, "copy-1", &["--address", "auto"], "--address auto needs an edge");
    refused(
        &stage,
        "copy-1",
        &["--address", "10.77.0.101", "--take-from", "a"],
        "cannot be used with",
    );

    let mut copies = Vec::new();
    for (number, lazy) in [(1, None), (2, Some("--lazy"))] {
        let (name, address) = (format!("copy-{number}"), format!("10.77.0.{}", 100 + number));
        let more: Vec<&str> = ["--address", &address].into_iter().chain(lazy).collect();
        let mut own = stage.plain_spec(&name);
        own.on_agent = true;
        let words = copy_words(&stage, &place, &name, &more);
        let copy = stage.fleet.start(1, &own, words).unwrap();
        let runner = stage.fleet.runner(copy);
        let status = runner.status().unwrap();
        assert_eq!((status.state.as_str(), status.epoch), ("running", Some(1)), "{status:?}");
        assert_eq!(status.lease_owner.as_deref(), Some("b"), "{status:?}");
        // The instant of the generation, and an identity of its own.
        assert_eq!(sh(runner, "redis-cli get k; cat /var/lib/note").trim(), "before\ndisk");
        let names = sh(runner, "cat /proc/sys/kernel/hostname /etc/hostname");
        assert_eq!(names.trim(), format!("{name}\n{name}"));
        let identity: Value =
            serde_json::from_str(&sh(runner, "cat /run/drafter/identity.json")).unwrap();
        assert_eq!((&identity["generation"], &identity["copy_of"]), (&1.into(), &"redis".into()));
        assert_eq!(identity["address"], address.as_str(), "{identity}");
        verify_oracle(runner);
        // From the other host, by the network.
        eventually("the copy answers at its address", LIMIT, || {
            let script = format!("redis-cli -h {address} set k {name} || true");
            sh(stage.fleet.runner(source), &script).trim() == "OK"
        });
        copies.push(copy);
    }
    // None is another, or the machine, nobody of whose clients noticed.
    for (copy, name) in copies.iter().zip(["copy-1", "copy-2"]) {
        assert_eq!(sh(stage.fleet.runner(*copy), "redis-cli get k").trim(), name);
    }
    assert_eq!(sh(stage.fleet.runner(source), "redis-cli get k").trim(), "after");
    assert!(load.wait_for(100, LIMIT), "{:?}", load.progress());
    let loaded = load.finish().unwrap();
    assert!(loaded.is_clean(), "the client noticed: {loaded:?}");
    verify_oracle(stage.fleet.runner(source));

    // It is a machine like any other: another of its name is refused, it moves, and is backed up.
    let other = ["--address", "10.77.0.111"];
    refused(&stage, "copy-2", &other, "it has a runner on this host already");
    say(stage.drafter(1).args(["stop", "copy-2", "--grace-s", "0"]), LIMIT).succeeds();
    refused(&stage, "copy-2", &other, "this host has a machine \"copy-2\" already");
    let mut there = stage.plain_spec("copy-1");
    there.on_agent = true;
    let to = stage.fleet.receive(0, &there).unwrap();
    let address = stage.fleet.runner(to).address.to_string();
    let words = ["migrate", "copy-1", "--to", &address, "--peer", "a"];
    say(stage.drafter(1).args(words), LIMIT).succeeds();
    verify_oracle(stage.fleet.runner(to));
    say(stage.drafter(0).args(["backup", "copy-1"]).args(place.words()), LIMIT).succeeds();

    // A machine that sleeps is copied as it sleeps, and wakes as if nothing had been.
    say(stage.drafter(0).args(["suspend", "redis"]).args(place.words()), LIMIT).succeeds();
    let mut own = stage.plain_spec("copy-3");
    own.on_agent = true;
    let more = ["--line", "machines/redis.suspended", "--address", "10.77.0.103", "--lazy"];
    let words = copy_words(&stage, &place, "copy-3", &more);
    let third = stage.fleet.start(1, &own, words).unwrap();
    let mut itself = stage.plain_spec("redis");
    itself.on_agent = true;
    let package = stage.package().display().to_string();
    let mut words: Vec<String> = ["resume", "redis", "--package", &package].map(Into::into).into();
    words.extend(place.words());
    let woken = stage.fleet.start(0, &itself, words).unwrap();
    for (runner, name) in [(third, "copy-3"), (woken, "redis")] {
        let runner = stage.fleet.runner(runner);
        let said = sh(runner, "redis-cli get k; cat /proc/sys/kernel/hostname");
        assert_eq!(said.trim(), format!("after\n{name}"));
        verify_oracle(runner);
    }
}

#[test]
fn a_copy_that_cannot_begin_is_told_by_name_and_harms_neither_the_others_nor_the_machine() {
    let Some(mut stage) = Stage::open() else { return };
    let source = stage.fleet.run(0, &stage.plain_spec("redis")).unwrap();
    stage.fleet.runner(source).wait_ready(e2e::BOOT).unwrap();
    start_oracle(stage.fleet.runner(source), WORK);
    // Another host has a machine of that name.
    stage.fleet.run(1, &stage.plain_spec("redis-2")).unwrap();
    let said = on_a(&stage, &["fork", "redis", "--copies", "3"]);
    said.fails_with(&["1 of 3 copies do not run: redis-2"]);
    let report: Value = serde_json::from_str(&said.out).unwrap();
    let errors: Vec<&Value> =
        report["copies"].as_array().unwrap().iter().map(|copy| &copy["error"]).collect();
    assert!(errors[1].as_str().unwrap().contains("host \"b\" owns it"), "{report}");
    assert_eq!((errors[0], errors[2]), (&Value::Null, &Value::Null), "{report}");
    assert!(!stage.fleet.state_of(0).join("machines/redis-2").exists(), "nothing of it stays");
    for name in ["redis", "redis-1", "redis-3"] {
        verify(&stage, name);
    }

    // The machine's runner dies while it forks: whatever came of the copies, the machine goes on.
    let mut fork = stage.drafter(0);
    let mut fork =
        fork.args(["fork", "redis", "--copies", "4", "--prefix", "late"]).spawn().unwrap();
    let forks = stage.fleet.state_of(0).join("forks");
    eventually("an image is there", LIMIT, || fs::read_dir(&forks).unwrap().next().is_some());
    stage.fleet.runner_mut(source).kill();
    let _ = fork.wait().unwrap();
    stage.fleet.recover(source).unwrap();
    verify_oracle(stage.fleet.runner(source));
    for number in 1..=4 {
        let name = format!("late-{number}");
        if state_is(&stage, &name, "running") {
            verify(&stage, &name);
        }
    }
    // What the runner could not remove any more, the next fork does.
    let report = on_a(&stage, &["fork", "redis", "--prefix", "last"]).json();
    assert_eq!(report["copies"][0]["error"], Value::Null, "{report}");
    assert_eq!(fs::read_dir(&forks).unwrap().count(), 0, "images are left");
}

/// What the writers in a machine on host a have written, all of it right so far.
#[track_caller]
fn written(stage: &Stage, machine: &str, ask: &str) -> u64 {
    let writer = |number| {
        let script = format!("oracle {ask} --socket /run/oracle-disk{number}.sock");
        let out = inside(stage, machine, &script);
        let report: OracleReport =
            serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: oracle said {out}"));
        assert!(report.ok, "{machine}: {report:?}");
        assert_eq!((report.file_mismatches, report.file_errors), (0, 0), "{machine}: {report:?}");
        report.file_writes
    };
    (0..2).map(writer).sum()
}

#[test]
fn copies_of_a_machine_under_disk_load_go_on_with_what_was_in_its_rings() {
    let Some(mut stage) = Stage::open() else { return };
    let source = busy_machine(&mut stage, "vhost-user-blk");
    for round in 0..3 {
        works_on(stage.fleet.runner(source));
        let prefix = format!("round{round}");
        on_a(&stage, &["fork", "redis", "--copies", "2", "--prefix", &prefix]).succeeds();
        for number in 1..=2 {
            let name = format!("{prefix}-{number}");
            let before = written(&stage, &name, "status");
            eventually("the copy's writers go on", LIMIT, || {
                written(&stage, &name, "status") > before + 500
            });
            verify(&stage, &name);
            written(&stage, &name, "verify");
            let run = stage.fleet.state_of(0).join("machines").join(&name).join("run");
            let console = fs::read_to_string(run.join("console.log")).unwrap();
            for words in ["I/O error", "EXT4-fs error", "blocked for more than"] {
                assert!(!console.contains(words), "{console}");
            }
            on_a(&stage, &["stop", &name, "--grace-s", "0"]).succeeds();
        }
    }
    works_on(stage.fleet.runner(source));
    verify_all(stage.fleet.runner(source));
}
