//! Machines in a store: backed up while memory and disk are under load, killed, and restored to run on
//! from the instant of a generation. The oracle in the guest knows what every page and block must hold
//! at that instant ([`e2e::writers`]).
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::{
    fleet::{Runner, RunnerId},
    rig::RigConfig,
};
use drafter::{
    driver::qemu,
    migrate::messages::Mode,
    runner::api::{BackupReport, Status},
};
use e2e::{
    Stage,
    busy::sh,
    command::{Said, say},
    eventually, full,
    moves::{budgets, follow, go, settled, slow},
    place::Place,
    writers::{busy_machine, receiver, verify_all, works_on, written},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use silo::store::{
    Access, Environment, Generation, KeyRing, Limits, LineName, RestoreOptions, Store, Which,
};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

const LIMIT: Duration = Duration::from_secs(120);

/// A generation of the machine in a store.
fn open(place: &Place, which: Which) -> Arc<Generation> {
    let (url, environment) = (place.url().parse().unwrap(), Environment::of_process());
    let store = Store::open(&url, Access::Read, &environment, Limits::default()).unwrap();
    let keys = KeyRing::from_file(&place.keys()).unwrap();
    let line = LineName::parse("machines/redis").unwrap();
    Generation::open(&store, &keys, &line, which, 16 << 20).unwrap()
}

/// `drafter --json WORDS` on a host.
#[track_caller]
fn on(stage: &Stage, host: usize, words: &[&str], more: &[String]) -> Said {
    say(stage.drafter(host).arg("--json").args(words).args(more), LIMIT)
}

/// One generation of the machine that runs on a host.
#[track_caller]
fn back_up(stage: &Stage, host: usize, place: &Place) -> BackupReport {
    let said = on(stage, host, &["backup", "redis"], &place.words());
    let report: BackupReport = serde_json::from_value(said.json()).unwrap();
    eprintln!("{report:?}");
    assert!(report.pause_ms > 0.0 && report.pause_ms < 5000.0, "{report:?}");
    assert!(report.copied_paused_bytes <= 8 << 20, "{report:?}");
    report
}

/// Ends machine and runner the hard way, as if their host had died.
fn die(stage: &mut Stage, at: RunnerId) {
    let run = stage.fleet.runner(at).dir().run();
    stage.fleet.runner_mut(at).kill();
    assert!(qemu::stop_without_runner(&run).unwrap(), "its monitor was gone before");
}

/// The words that restore the machine; `more`: which generation, from whom.
fn restore_words(stage: &Stage, place: &Place, more: &[&str]) -> Vec<String> {
    let package = stage.package().display().to_string();
    let mut words: Vec<String> = ["restore", "redis", "--package", &package].map(Into::into).into();
    words.extend(place.words());
    words.extend(more.iter().map(|word| (*word).to_owned()));
    words
}

/// Restores the machine on a host; returns when it runs.
#[track_caller]
fn restore(stage: &mut Stage, host: usize, place: &Place, more: &[&str]) -> RunnerId {
    let words = restore_words(stage, place, more);
    let plain = stage.plain_spec("redis");
    let id = stage.fleet.start(host, &plain, words).unwrap();
    assert_eq!(stage.fleet.runner(id).status().unwrap().state, "running");
    id
}

/// A restore that is to fail; it never becomes a runner.
#[track_caller]
fn refused(stage: &Stage, host: usize, place: &Place, more: &[&str]) -> Said {
    let name = &stage.fleet.rig().hosts()[host].name;
    let mut command = stage.drafter(host);
    command.args(restore_words(stage, place, more)).args(["--host", name, "--plaintext"]);
    command.arg("--lease").arg(stage.leases());
    say(&mut command, LIMIT)
}

#[track_caller]
fn boot_id(runner: &Runner) -> String {
    sh(runner, "cat /proc/sys/kernel/random/boot_id")
}

/// The image of the machine's disk in a generation, as `silo restore` writes it, is a file system as
/// a crash would leave it.
#[track_caller]
fn disk_is_sound(place: &Place, which: Which) {
    let generation = open(place, which);
    let devices = generation.devices();
    let disk = devices.iter().find(|device| device.name.starts_with("disk-")).unwrap();
    let image = place.folder().join("image");
    let _ = fs::remove_file(&image);
    let target = silo::source::FileDevice::create(&image, disk.geometry.bytes()).unwrap();
    let options = RestoreOptions { target_is_zero: true, ..RestoreOptions::default() };
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    generation.restore(&disk.name, &target, options, &done, &stop).unwrap();
    drop(target);
    // Replays the journal, and mends only what a crash may leave; more than that is an error.
    let checked = say(Command::new("e2fsck").args(["-f", "-p"]).arg(&image), LIMIT);
    assert!(matches!(checked.code, Some(0 | 1)), "the file system is damaged: {checked:?}");
}

fn backed_up_killed_and_restored(kind: &str) {
    let Some(mut stage) = Stage::with(RigConfig { hosts: 3, ..RigConfig::default() }) else {
        return;
    };
    let place = Place::new();
    let a = busy_machine(&mut stage, kind);
    let boot = boot_id(stage.fleet.runner(a));
    works_on(stage.fleet.runner(a));
    sh(stage.fleet.runner(a), "redis-cli set when first");
    let first = back_up(&stage, 0, &place);
    assert!(!first.changes_only);
    works_on(stage.fleet.runner(a));
    sh(stage.fleet.runner(a), "redis-cli set when second");
    let before = written(stage.fleet.runner(a));
    let second = back_up(&stage, 0, &place);
    sh(stage.fleet.runner(a), "redis-cli set when never");
    assert!(second.changes_only, "its writes were known: {second:?}");
    assert!(second.number > first.number);
    assert!(second.blocks < first.blocks / 2, "{} of {}", second.blocks, first.blocks);
    assert!(second.stored_bytes < first.stored_bytes);
    // The machine has noticed nothing.
    works_on(stage.fleet.runner(a));
    verify_all(stage.fleet.runner(a));
    let listed = on(&stage, 0, &["generations", "redis"], &place.words()[..2]).json();
    let numbers: Vec<_> = listed["generations"].as_array().unwrap().iter().collect();
    assert_eq!(numbers.len(), 2, "{listed}");
    assert_eq!(numbers[0]["number"], second.number);

    // It has an owner, who may be alive for all that is known.
    refused(&stage, 1, &place, &[]).fails_with(&["host \"a\" owns it", "--take-from a"]);
    refused(&stage, 0, &place, &[]).fails_with(&["has a runner on this host already"]);
    stage.fleet.runner_mut(a).kill();
    refused(&stage, 0, &place, &[]).fails_with(&["its monitor runs on this host"]);
    assert!(qemu::stop_without_runner(&stage.fleet.runner(a).dir().run()).unwrap());
    refused(&stage, 1, &place, &["--take-from", "c"]).fails_with(&["host \"a\" owns it"]);

    let b = restore(&mut stage, 1, &place, &["--take-from", "a"]);
    let runner = stage.fleet.runner(b);
    assert_eq!(boot_id(runner), boot, "it was not booted");
    assert_eq!(sh(runner, "redis-cli get when").trim(), "second");
    assert!(written(runner) >= before, "it goes on from the second generation");
    works_on(runner);
    verify_all(runner);
    disk_is_sound(&place, Which::Number(first.number));
    disk_is_sound(&place, Which::Newest);

    // It moves like any other.
    let c = receiver(&mut stage, 2);
    let report = go(&stage.fleet, b, c, Mode::Hybrid, budgets());
    assert_eq!(report.late_writes, 0, "{report}");
    works_on(stage.fleet.runner(c));

    // And the older generation is one, too; where the machine ran last nobody has to be named.
    die(&mut stage, c);
    let first = first.number.to_string();
    let c = restore(&mut stage, 2, &place, &["--generation", &first]);
    let runner = stage.fleet.runner(c);
    assert_eq!(sh(runner, "redis-cli get when").trim(), "first");
    works_on(runner);
    verify_all(runner);
}

#[test]
fn a_machine_under_load_is_backed_up_killed_and_restored_elsewhere_from_either_generation() {
    backed_up_killed_and_restored("vhost-user-blk");
}

#[test]
fn the_same_with_nbd_disks() {
    backed_up_killed_and_restored("nbd");
}

#[test]
fn a_machine_is_backed_up_while_it_still_fills_and_its_generation_lacks_nothing() {
    let Some(mut stage) = Stage::with(RigConfig { hosts: 3, ..RigConfig::default() }) else {
        return;
    };
    let place = Place::new();
    let a = busy_machine(&mut stage, "vhost-user-blk");
    let b = receiver(&mut stage, 1);
    works_on(stage.fleet.runner(a));
    let fleet = &stage.fleet;
    // Slow enough that b runs for seconds with most of its pages elsewhere.
    let job = fleet.start_move(a, b, Mode::PostCopy, slow(30_000_000), false).unwrap();
    let missing = |status: &Status| status.missing.values().sum::<u64>();
    eventually("it runs at b", Duration::from_secs(60), || {
        fleet.runner(b).status().unwrap().state == "running"
    });
    let left = missing(&fleet.runner(b).status().unwrap());
    assert!(left > 1000, "only {left} blocks were still to come");
    let report = back_up(&stage, 1, &place);
    eprintln!("{left} blocks were still to come when the backup began");
    assert!(report.number > 0);
    follow(&stage.fleet, a, job).unwrap();
    settled(&stage.fleet, b);
    // What came by the move counts as written for a move back, and was not taken from it.
    let second = back_up(&stage, 1, &place);
    assert!(second.changes_only, "{second:?}");
    works_on(stage.fleet.runner(b));
    verify_all(stage.fleet.runner(b));
    go(&stage.fleet, b, a, Mode::Hybrid, budgets());
    works_on(stage.fleet.runner(a));
    verify_all(stage.fleet.runner(a));
    die(&mut stage, a);
    for number in [report.number, second.number] {
        let number = number.to_string();
        let c = restore(&mut stage, 2, &place, &["--take-from", "a", "--generation", &number]);
        works_on(stage.fleet.runner(c));
        verify_all(stage.fleet.runner(c));
        if number == report.number.to_string() {
            die(&mut stage, c);
        }
    }
}

/// A small file system; unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, size: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        let options = format!("size={size},mode=0755");
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Self(at.to_owned())
    }

    fn resize(&self, size: &str) {
        let options = format!("size={size}");
        let none: Option<&str> = None;
        mount(none, &self.0, none, MsFlags::MS_REMOUNT, Some(options.as_str())).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn is_backed_up_while_its_disk_waits(kind: &str) {
    let Some(stage) = Stage::open() else { return };
    let full = full::Small::mount(&stage);
    let mut stage = stage;
    let place = Place::new();
    let a = full::waiting_machine(&mut stage, &full, kind);
    let first = back_up(&stage, 0, &place);
    // It goes on as before: it waits.
    full::await_trouble(stage.fleet.runner(a));
    let second = back_up(&stage, 0, &place);
    assert!(second.changes_only && second.number > first.number, "{second:?}");
    full.make_room();
    full::ends_well(stage.fleet.runner(a));
    disk_is_sound(&place, Which::Number(second.number));
    die(&mut stage, a);
    // Of that instant: the write waits there, and ends on a host that has room.
    let b = restore(&mut stage, 1, &place, &["--take-from", "a"]);
    full::ends_well(stage.fleet.runner(b));
}

#[test]
fn a_machine_whose_disk_waits_for_room_is_backed_up_and_its_write_ends_here_and_in_the_restored_one()
 {
    is_backed_up_while_its_disk_waits("vhost-user-blk");
}

#[test]
fn a_store_that_fails_half_way_harms_no_machine_and_the_next_backup_has_everything() {
    let Some(mut stage) = Stage::open() else { return };
    let place = Place::new();
    let small = Small::mount(&place.store(), "12m");
    let a = busy_machine(&mut stage, "vhost-user-blk");
    works_on(stage.fleet.runner(a));
    let failed = on(&stage, 0, &["backup", "redis"], &place.words());
    failed.fails_with(&["no generation was stored", "the machine runs on"]);
    eprintln!("{}", failed.err);
    assert_eq!(stage.fleet.runner(a).status().unwrap().state, "running");
    works_on(stage.fleet.runner(a));

    small.resize("4g");
    let first = back_up(&stage, 0, &place);
    works_on(stage.fleet.runner(a));
    // Once more, in the middle of a history: what the failed one had taken is in the next.
    let used: u64 = fs::read_dir(place.store().join("packs")).unwrap().count() as u64;
    assert!(used > 0);
    fs::set_permissions(place.store(), fs::Permissions::from_mode(0o755)).unwrap();
    let packs = place.store().join("packs");
    let aside = place.store().join("packs-aside");
    fs::rename(&packs, &aside).unwrap();
    fs::write(&packs, "no folder").unwrap();
    on(&stage, 0, &["backup", "redis"], &place.words()).fails_with(&["the machine runs on"]);
    fs::remove_file(&packs).unwrap();
    fs::rename(&aside, &packs).unwrap();
    works_on(stage.fleet.runner(a));
    let second = back_up(&stage, 0, &place);
    assert!(second.changes_only && second.number > first.number, "{second:?}");
    works_on(stage.fleet.runner(a));
    verify_all(stage.fleet.runner(a));
    die(&mut stage, a);
    let b = restore(&mut stage, 1, &place, &["--take-from", "a"]);
    works_on(stage.fleet.runner(b));
    verify_all(stage.fleet.runner(b));

    // Wrong keys open nothing, and leave what this host has alone.
    die(&mut stage, b);
    place.new_keys();
    refused(&stage, 1, &place, &[]).fails_with(&["key"]);
    let disks = stage.fleet.runner(b).dir().disks();
    assert!(fs::read_dir(disks).unwrap().next().is_some());
}

#[test]
fn a_machine_moves_while_it_is_backed_up_continuously_and_is_backed_up_further_where_it_is() {
    let Some(mut stage) = Stage::open() else { return };
    let place = Place::new();
    let a = busy_machine(&mut stage, "vhost-user-blk");
    let b = receiver(&mut stage, 1);
    let mut words = place.words();
    words.extend(["--every".into(), "300ms".into()]);
    let said = on(&stage, 0, &["backup", "redis"], &words);
    let first: BackupReport = serde_json::from_value(said.json()).unwrap();
    assert_eq!(first.every_ms, Some(300));
    let newest = |at: RunnerId| {
        let status = stage.fleet.runner(at).status().unwrap();
        status.backup.and_then(|backup| backup.newest).unwrap_or(0)
    };
    eventually("generations follow", Duration::from_secs(60), || newest(a) > first.number + 3);
    // One that is asked for comes out of turn.
    let asked = back_up(&stage, 0, &place);
    assert!(asked.changes_only && asked.number > first.number + 3);
    let report = go(&stage.fleet, a, b, Mode::Hybrid, budgets());
    assert_eq!(report.late_writes, 0, "{report}");
    assert!(stage.fleet.runner(a).status().unwrap().backup.is_none(), "it has left");
    works_on(stage.fleet.runner(b));
    // What the store has is not stored again, though everything is compared.
    let there = back_up(&stage, 1, &place);
    assert!(!there.changes_only && there.new_bytes < first.new_bytes, "{there:?}");
    on(&stage, 1, &["backup", "redis"], &words).succeeds();
    let after = there.number;
    eventually("generations follow at b", Duration::from_secs(60), || newest(b) > after + 2);
    on(&stage, 1, &["backup", "redis", "--end"], &[]).succeeds();
    assert!(stage.fleet.runner(b).status().unwrap().backup.is_none());
    on(&stage, 1, &["backup", "redis", "--end"], &[]).fails_with(&["no continuous backup"]);
    let last = back_up(&stage, 1, &place);
    assert!(last.changes_only, "known since the continuous one ended: {last:?}");
    verify_all(stage.fleet.runner(b));
    die(&mut stage, b);
    let b = restore(&mut stage, 1, &place, &[]);
    works_on(stage.fleet.runner(b));
    verify_all(stage.fleet.runner(b));
}

#[test]
fn a_machine_that_was_restored_elsewhere_although_it_ran_is_stopped_at_its_next_backup() {
    let Some(mut stage) = Stage::open() else { return };
    let place = Place::new();
    let a = busy_machine(&mut stage, "vhost-user-blk");
    let mut words = place.words();
    words.extend(["--every".into(), "200ms".into()]);
    on(&stage, 0, &["backup", "redis"], &words).succeeds();
    // Somebody says that a is gone, and it is not.
    let b = restore(&mut stage, 1, &place, &["--take-from", "a"]);
    eventually("the copy at a has been stopped", Duration::from_secs(30), || {
        let status = stage.fleet.runner(a).status().unwrap();
        status.state == "paused" && status.detail.contains("host \"b\" owns the machine now")
    });
    works_on(stage.fleet.runner(b));
    verify_all(stage.fleet.runner(b));
    let from_a = on(&stage, 0, &["backup", "redis"], &place.words());
    from_a.fails_with(&["paused"]);
}

#[test]
fn hop_check_22_a_machine_runs_while_it_is_still_in_the_store_and_waits_for_a_store_that_is_away() {
    let Some(mut stage) = Stage::open() else { return };
    let place = Place::new();
    let a = busy_machine(&mut stage, "vhost-user-blk");
    works_on(stage.fleet.runner(a));
    back_up(&stage, 0, &place);
    die(&mut stage, a);
    let (packs, aside) = (place.store().join("packs"), place.store().join("packs-aside"));
    let mut tries = 0;
    let b = loop {
        let words: &[&str] = if tries == 0 { &["--take-from", "a", "--lazy"] } else { &["--lazy"] };
        let b = restore(&mut stage, 1, &place, words);
        fs::rename(&packs, &aside).unwrap();
        let missing: u64 = stage.fleet.runner(b).status().unwrap().missing.values().sum();
        if missing > 1000 {
            break b;
        }
        // Everything had come before the store went: again.
        tries += 1;
        assert!(tries < 5, "{missing} blocks were still in the store: nothing is proved");
        fs::rename(&aside, &packs).unwrap();
        die(&mut stage, b);
    };
    let status = || stage.fleet.runner(b).status().unwrap();
    eventually("the status says what the guest waits for", Duration::from_secs(60), || {
        status().detail.contains("the store that holds the rest of it gives nothing")
    });
    fs::rename(&aside, &packs).unwrap();
    works_on(stage.fleet.runner(b));
    settled(&stage.fleet, b);
    eventually("nothing is said of the store any more", Duration::from_secs(20), || {
        status().detail.is_empty()
    });
    verify_all(stage.fleet.runner(b));
    // It is a machine like any other: it can be backed up, and move.
    assert!(!back_up(&stage, 1, &place).changes_only);
    let a = receiver(&mut stage, 0);
    go(&stage.fleet, b, a, Mode::Hybrid, budgets());
    works_on(stage.fleet.runner(a));
    verify_all(stage.fleet.runner(a));
}
