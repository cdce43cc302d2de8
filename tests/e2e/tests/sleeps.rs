//! Machines that are suspended to a store and resumed anywhere, under load in memory and on disk, with
//! the oracle knowing what every page and block must hold ([`e2e::writers`]).
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::{
    fleet::{Runner, RunnerId},
    rig::RigConfig,
};
use drafter::{driver::qemu, runner::api::SuspendReport};
use e2e::{
    Stage,
    busy::sh,
    command::{Said, say},
    place::Place,
    writers::{busy_machine, verify_all, works_on},
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(120);

#[track_caller]
fn suspend_said(stage: &Stage, host: usize, place: &Place) -> Said {
    say(stage.drafter(host).args(["--json", "suspend", "redis"]).args(place.words()), LIMIT)
}

/// Suspends the machine of a host; it must leave nothing there.
#[track_caller]
fn suspend(stage: &mut Stage, at: RunnerId, host: usize, place: &Place) -> SuspendReport {
    let monitor = stage.fleet.runner(at).status().unwrap().monitor_pid.unwrap();
    let report: SuspendReport =
        serde_json::from_value(suspend_said(stage, host, place).json()).unwrap();
    eprintln!("{report:?}");
    let dir = stage.fleet.runner(at).dir();
    assert!(!dir.read_record().unwrap().unwrap().alive(), "its runner is left");
    assert!(!Path::new(&format!("/proc/{monitor}")).exists(), "its monitor is left");
    assert!(!dir.disks().exists(), "its disks are left");
    assert_eq!(qemu::monitor_without_runner(&dir.run()), None);
    let record = dir.read_record().unwrap().unwrap();
    assert!(record.detail.contains("suspended as generation"), "{}", record.detail);
    report
}

fn resume_words(stage: &Stage, place: &Place, more: &[&str]) -> Vec<String> {
    let package = stage.package().display().to_string();
    let mut words: Vec<String> = ["resume", "redis", "--package", &package].map(Into::into).into();
    words.extend(place.words());
    words.extend(more.iter().map(|word| (*word).to_owned()));
    words
}

#[track_caller]
fn resume(stage: &mut Stage, host: usize, place: &Place, more: &[&str]) -> RunnerId {
    let words = resume_words(stage, place, more);
    let plain = stage.plain_spec("redis");
    let id = stage.fleet.start(host, &plain, words).unwrap();
    assert_eq!(stage.fleet.runner(id).status().unwrap().state, "running");
    id
}

/// A resume that is to fail; it never becomes a runner.
#[track_caller]
fn refused(stage: &Stage, host: usize, place: &Place, more: &[&str]) -> Said {
    let name = &stage.fleet.rig().hosts()[host].name;
    let mut command = stage.drafter(host);
    command.args(resume_words(stage, place, more)).args(["--host", name, "--plaintext"]);
    command.arg("--lease").arg(stage.leases());
    say(&mut command, LIMIT)
}

/// Ends machine and runner the hard way.
fn die(stage: &mut Stage, at: RunnerId) {
    let run = stage.fleet.runner(at).dir().run();
    stage.fleet.runner_mut(at).kill();
    assert!(qemu::stop_without_runner(&run).unwrap(), "its monitor was gone before");
}

fn get(runner: &Runner, key: &str) -> String {
    sh(runner, &format!("redis-cli get {key}")).trim().to_owned()
}

fn boot_id(runner: &Runner) -> String {
    sh(runner, "cat /proc/sys/kernel/random/boot_id")
}

#[test]
fn hop_check_23_a_machine_sleeps_in_a_store_wakes_once_at_any_host_and_goes_back_to_where_it_slept()
{
    let Some(mut stage) = Stage::with(RigConfig { hosts: 3, ..RigConfig::default() }) else {
        return;
    };
    let place = Place::new();
    let a = busy_machine(&mut stage, "vhost-user-blk");
    let boot = boot_id(stage.fleet.runner(a));
    works_on(stage.fleet.runner(a));
    sh(stage.fleet.runner(a), "redis-cli set when first");
    let first = suspend(&mut stage, a, 0, &place);
    assert!(first.new_bytes < 400 << 20, "the package's disk was stored: {first:?}");

    // Every block of it is damaged: named, and nothing is lost by trying.
    let packs = place.packs();
    let contents: Vec<Vec<u8>> = packs.iter().map(|pack| fs::read(pack).unwrap()).collect();
    for (pack, content) in packs.iter().zip(&contents) {
        let mut content = content.clone();
        let at = content.len() - 60;
        content[at] ^= 1;
        fs::write(pack, content).unwrap();
    }
    refused(&stage, 1, &place, &[]).fails_with(&["packs/"]);
    for (pack, content) in packs.iter().zip(&contents) {
        fs::write(pack, content).unwrap();
    }

    let b = resume(&mut stage, 1, &place, &[]);
    assert_eq!(boot_id(stage.fleet.runner(b)), boot, "it was not booted");
    works_on(stage.fleet.runner(b));
    assert_eq!(get(stage.fleet.runner(b), "when"), "first");
    verify_all(stage.fleet.runner(b));
    // It runs, so it is resumed nowhere else, whatever is asked for.
    refused(&stage, 2, &place, &[]).fails_with(&["it has run at host \"b\" since"]);
    refused(&stage, 0, &place, &[]).fails_with(&["it has run at host \"b\" since"]);
    let number = first.number.to_string();
    refused(&stage, 2, &place, &["--generation", &number]).fails_with(&["host \"b\" owns it"]);

    sh(stage.fleet.runner(b), "redis-cli set when second");
    let second = suspend(&mut stage, b, 1, &place);
    assert!(second.known > 0 && second.number > first.number, "{second:?}");
    // It runs nowhere: the older one is to be had at any host, and says what is forgotten.
    let c = resume(&mut stage, 2, &place, &["--generation", &number]);
    let detail = stage.fleet.runner(c).status().unwrap().detail;
    assert!(detail.contains("it went back to generation"), "{detail}");
    works_on(stage.fleet.runner(c));
    assert_eq!(get(stage.fleet.runner(c), "when"), "first");
    verify_all(stage.fleet.runner(c));
    // The other generation is no last state any more, and stays.
    refused(&stage, 0, &place, &[]).fails_with(&["it has run at host \"c\" since"]);
    die(&mut stage, c);
    let number = second.number.to_string();
    let more = ["--generation", &number, "--take-from", "c"];
    let a = resume(&mut stage, 0, &place, &more);
    works_on(stage.fleet.runner(a));
    assert_eq!(get(stage.fleet.runner(a), "when"), "second");
    verify_all(stage.fleet.runner(a));
}

/// Moves a folder of the store away, with a file in its place; what it returns brings it back.
fn take_away(folder: PathBuf) -> impl FnOnce() {
    let aside = folder.with_extension("aside");
    fs::rename(&folder, &aside).unwrap();
    fs::write(&folder, "no folder").unwrap();
    move || {
        fs::remove_file(&folder).unwrap();
        fs::rename(&aside, &folder).unwrap();
    }
}

#[test]
fn a_suspend_that_fails_or_loses_its_runner_loses_nothing_and_never_makes_two_of_the_machine() {
    let Some(mut stage) = Stage::open() else { return };
    let place = Place::new();
    let mut at = busy_machine(&mut stage, "nbd");
    works_on(stage.fleet.runner(at));
    // A first one makes the store; how long it takes says when to strike.
    let mut took = Duration::from_secs_f64(suspend(&mut stage, at, 0, &place).total_ms / 1e3);
    let mut host = 1;
    at = resume(&mut stage, host, &place, &[]);
    works_on(stage.fleet.runner(at));
    let epoch = |stage: &Stage, at| stage.fleet.runner(at).status().unwrap().epoch.unwrap();

    // Content cannot be stored: the machine runs on under the same lease, as if nothing had happened.
    let before = epoch(&stage, at);
    let back = take_away(place.store().join("packs"));
    suspend_said(&stage, host, &place).fails_with(&["the machine runs on"]);
    back();
    assert_eq!(epoch(&stage, at), before);
    works_on(stage.fleet.runner(at));
    verify_all(stage.fleet.runner(at));

    // Killed at any moment, and somebody tries to resume it elsewhere before its host is back.
    for turn in 0..8u32 {
        let marker = format!("turn-{turn}");
        sh(stage.fleet.runner(at), &format!("redis-cli set when {marker}"));
        let mut command = stage.drafter(host);
        command.args(["suspend", "redis"]).args(place.words());
        let mut suspending = command.spawn().unwrap();
        let strike = Instant::now() + took.mul_f64(f64::from(turn) / 6.0);
        while Instant::now() < strike {
            std::thread::park_timeout(strike.saturating_duration_since(Instant::now()));
        }
        stage.fleet.runner_mut(at).kill();
        let done = suspending.wait().unwrap().success();
        let run = stage.fleet.runner(at).dir().run();
        let other = 1 - host;
        let words = resume_words(&stage, &place, &[]);
        let plain = stage.plain_spec("redis");
        let left = qemu::monitor_without_runner(&run);
        let elsewhere = stage.fleet.start(other, &plain, words);
        eprintln!("turn {turn}: done {done}, monitor left {left:?}, resumed {}", elsewhere.is_ok());
        match elsewhere {
            Ok(next) => {
                // What was left of it must not run, and goes.
                if left.is_some() {
                    assert!(stage.fleet.recover(at).is_err(), "two of the machine");
                    assert_eq!(qemu::monitor_without_runner(&run), None);
                }
                (at, host) = (next, other);
            }
            Err(_) => {
                assert!(!done, "it said that it was suspended");
                assert!(left.is_some(), "the machine is nowhere");
                stage.fleet.recover(at).unwrap();
                refused(&stage, other, &place, &[]).fails_with(&["host \""]);
            }
        }
        works_on(stage.fleet.runner(at));
        assert_eq!(get(stage.fleet.runner(at), "when"), marker);
        took = took.max(Duration::from_millis(100));
    }
    verify_all(stage.fleet.runner(at));
}
