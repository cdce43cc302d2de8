//! Machines whose disks are vhost-user-blk: the disk's server works on the guest's own rings and
//! pages, while those move, arrive, and are tracked. The oracle in the guest knows what memory and
//! files must hold ([`e2e::writers`]).
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::{fleet::MachineSpec, rig::RigConfig};
use drafter::{migrate::messages::Mode, runner::api::Request};
use e2e::{
    Stage,
    busy::sh,
    command::say,
    eventually,
    full::{Small, ends_well, waiting_machine},
    moves::{budgets, follow, go, settled, slow},
    writers::{busy_machine, receiver, verify_all, works_on},
};
use std::time::Duration;

#[track_caller]
fn kind_at(stage: &Stage, host: usize) -> String {
    let said =
        say(stage.drafter(host).args(["--json", "inspect", "redis"]), Duration::from_secs(30));
    said.json()["machine"]["shape"]["disk_kind"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn hop_check_02_a_machine_under_disk_load_moves_in_every_mode_and_keeps_its_kind_of_disks() {
    let Some(mut stage) = Stage::open() else { return };
    let a = busy_machine(&mut stage, "vhost-user-blk");
    let b = receiver(&mut stage, 1);
    let (mut from, mut to) = (a, b);
    for mode in [Mode::PostCopy, Mode::Hybrid, Mode::PostCopy, Mode::PostCopy, Mode::Hybrid] {
        works_on(stage.fleet.runner(from));
        let report = go(&stage.fleet, from, to, mode, budgets());
        assert_eq!(report.late_writes, 0, "something wrote after the rings had stopped: {report}");
        (from, to) = (to, from);
    }
    assert_eq!(kind_at(&stage, 1), "vhost-user-blk", "at b, which was told nothing");
    works_on(stage.fleet.runner(from));
    verify_all(stage.fleet.runner(from));
}

#[test]
fn a_machine_under_disk_load_moves_on_while_it_still_fills_and_loses_nothing() {
    let Some(mut stage) = Stage::with(RigConfig { hosts: 3, ..RigConfig::default() }) else {
        return;
    };
    let a = busy_machine(&mut stage, "vhost-user-blk");
    let (b, c) = (receiver(&mut stage, 1), receiver(&mut stage, 2));
    works_on(stage.fleet.runner(a));
    let fleet = &stage.fleet;
    // Slow enough that b runs for seconds with most of its pages elsewhere.
    let first = fleet.start_move(a, b, Mode::PostCopy, slow(12_000_000), false).unwrap();
    let mut missing = 0;
    eventually("it runs at b", Duration::from_secs(60), || {
        let status = fleet.runner(b).status().unwrap();
        missing = status.missing.values().sum();
        status.state == "running"
    });
    assert!(missing > 1000, "only {missing} blocks are still to come");
    // The disk works in pages that have to be brought for it, and its writes are tracked.
    works_on(fleet.runner(b));
    let second = fleet.start_move(b, c, Mode::Hybrid, budgets(), false).unwrap();
    let missing: u64 = fleet.runner(b).status().unwrap().missing.values().sum();
    eprintln!("{missing} blocks were still to come when it moved on");
    assert!(missing > 0, "b was filled before it moved on: nothing is proved");
    follow(fleet, a, first).unwrap();
    let report = follow(fleet, b, second).unwrap();
    assert_eq!(report["late_writes"], 0, "{report}");
    settled(fleet, c);
    works_on(fleet.runner(c));
    verify_all(fleet.runner(c));
}

#[test]
fn a_machine_whose_runner_is_killed_under_disk_load_sees_a_pause_and_no_error() {
    let Some(mut stage) = Stage::open() else { return };
    let mut at = busy_machine(&mut stage, "vhost-user-blk");
    let package = stage.package().display().to_string();
    let words = ["run", "redis", "--take-over", "--package", &package].map(str::to_owned);
    let plain = stage.plain_spec("redis");
    for round in 0..4 {
        let host = round / 2;
        works_on(stage.fleet.runner(at));
        stage.fleet.runner_mut(at).kill();
        at = stage.fleet.start(host, &plain, words.to_vec()).unwrap();
        works_on(stage.fleet.runner(at));
        if round == 1 {
            // And once more where it arrived: there its memory has a pager.
            let b = receiver(&mut stage, 1);
            go(&stage.fleet, at, b, Mode::PostCopy, budgets());
            at = b;
        }
    }
    assert_eq!(kind_at(&stage, 1), "vhost-user-blk");
    verify_all(stage.fleet.runner(at));
}

#[test]
fn a_machine_is_suspended_and_resumed_under_disk_load() {
    let Some(mut stage) = Stage::open() else { return };
    let a = busy_machine(&mut stage, "vhost-user-blk");
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("saved");
    works_on(stage.fleet.runner(a));
    let mut client = stage.fleet.runner(a).client().unwrap();
    client.set_deadline(Some(Duration::from_secs(120))).unwrap();
    client.call(&Request::Suspend { directory: saved.clone() }, |_| {}).unwrap();
    let package = stage.package().display().to_string();
    let from = saved.display().to_string();
    let words = ["resume", "redis", "--from", &from, "--package", &package].map(str::to_owned);
    let plain = stage.plain_spec("redis");
    let b = stage.fleet.start(1, &plain, words.to_vec()).unwrap();
    assert_eq!(kind_at(&stage, 1), "vhost-user-blk");
    works_on(stage.fleet.runner(b));
    // A machine that was resumed moves like any other.
    let a = receiver(&mut stage, 0);
    go(&stage.fleet, b, a, Mode::Hybrid, budgets());
    works_on(stage.fleet.runner(a));
    verify_all(stage.fleet.runner(a));
}

#[test]
fn the_same_load_moves_with_nbd_disks() {
    let Some(mut stage) = Stage::open() else { return };
    let a = busy_machine(&mut stage, "nbd");
    let b = receiver(&mut stage, 1);
    let (mut from, mut to) = (a, b);
    for mode in [Mode::PostCopy, Mode::Hybrid] {
        works_on(stage.fleet.runner(from));
        let report = go(&stage.fleet, from, to, mode, budgets());
        assert_eq!(report.late_writes, 0, "{report}");
        (from, to) = (to, from);
    }
    assert_eq!(kind_at(&stage, 0), "nbd");
    verify_all(stage.fleet.runner(from));
}

fn moves_while_its_disk_waits(kind: &str, mode: Mode) {
    let Some(stage) = Stage::open() else { return };
    let small = Small::mount(&stage);
    // Ends before the mount does: the machine's files are on it.
    let mut stage = stage;
    let a = waiting_machine(&mut stage, &small, kind);
    let b = receiver(&mut stage, 1);
    let report = go(&stage.fleet, a, b, mode, budgets());
    assert_eq!(report.late_writes, 0, "{report}");
    ends_well(stage.fleet.runner(b));
    // A machine like any other, which goes back once there is room.
    small.make_room();
    go(&stage.fleet, b, a, Mode::Hybrid, budgets());
    ends_well(stage.fleet.runner(a));
}

#[test]
fn a_machine_whose_disk_waits_for_room_moves_to_a_host_that_has_some_and_its_write_ends_there() {
    moves_while_its_disk_waits("vhost-user-blk", Mode::Hybrid);
}

#[test]
fn the_same_by_post_copy() {
    moves_while_its_disk_waits("vhost-user-blk", Mode::PostCopy);
}

#[test]
fn a_machine_whose_nbd_disk_waits_for_room_moves_too() {
    moves_while_its_disk_waits("nbd", Mode::Hybrid);
}

fn is_suspended_while_its_disk_waits(kind: &str) {
    let Some(stage) = Stage::open() else { return };
    let small = Small::mount(&stage);
    let mut stage = stage;
    let a = waiting_machine(&mut stage, &small, kind);
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("saved");
    let mut client = stage.fleet.runner(a).client().unwrap();
    client.set_deadline(Some(Duration::from_secs(120))).unwrap();
    client.call(&Request::Suspend { directory: saved.clone() }, |_| {}).unwrap();
    let package = stage.package().display().to_string();
    let from = saved.display().to_string();
    let words = ["resume", "redis", "--from", &from, "--package", &package].map(str::to_owned);
    let plain = stage.plain_spec("redis");
    let b = stage.fleet.start(1, &plain, words.to_vec()).unwrap();
    ends_well(stage.fleet.runner(b));
}

#[test]
fn a_machine_whose_disk_waits_for_room_is_suspended_and_its_write_ends_where_it_is_resumed() {
    is_suspended_while_its_disk_waits("vhost-user-blk");
}

#[test]
fn a_machine_whose_nbd_disk_waits_for_room_is_suspended_too() {
    is_suspended_while_its_disk_waits("nbd");
}

/// A line for each kind of request: what it does in the guest, and how many.
const REQUESTS: [(&str, &str, u64); 6] = [
    ("read 4 KiB", "dd if=/dev/vda of=/dev/null bs=4k iflag=direct skip=$(($ROUND * 2500))", 2000),
    ("read 1 MiB", "dd if=/dev/vda of=/dev/null bs=1M iflag=direct skip=$(($ROUND * 7))", 64),
    ("write 4 KiB", "dd if=/dev/zero of=/var/lib/bench bs=4k oflag=direct conv=notrunc", 2000),
    ("write 1 MiB", "dd if=/dev/zero of=/var/lib/bench bs=1M oflag=direct conv=notrunc", 64),
    (
        "write and sync 4 KiB",
        "dd if=/dev/zero of=/var/lib/bench bs=4k oflag=direct,dsync conv=notrunc",
        300,
    ),
    ("no disk", "dd if=/dev/zero of=/dev/null bs=4k", 2000),
];

/// The figures of decision 7: two machines that differ in nothing but the kind of their disks, asked
/// in turns. `cargo test -p e2e --test disks -- --ignored --nocapture kinds_side_by_side`.
#[test]
#[ignore = "a measurement"]
fn kinds_side_by_side() {
    let Some(mut stage) = Stage::open() else { return };
    let mut machines = Vec::new();
    for kind in ["nbd", "vhost-user-blk"] {
        let mut spec = MachineSpec::new(kind.split('-').next().unwrap(), stage.package());
        spec.extra = vec!["--disk-kind".into(), kind.into()];
        let there = stage.fleet.run(0, &spec).unwrap();
        spec.extra.clear();
        let empty = stage.fleet.receive(1, &spec).unwrap();
        stage.fleet.runner(there).wait_ready(e2e::BOOT).unwrap();
        sh(
            stage.fleet.runner(there),
            "dd if=/dev/zero of=/var/lib/bench bs=1M count=64 conv=fsync",
        );
        machines.push((kind, there, empty));
    }
    for (name, command, count) in REQUESTS {
        let mut took = [Vec::new(), Vec::new()];
        for round in 0..9 {
            for (at, (_, there, _)) in machines.iter().enumerate() {
                let script = format!(
                    "ROUND={round}; t0=$(date +%s%N); {command} count={count} 2> /dev/null; \
                     t1=$(date +%s%N); echo $(((t1 - t0) / 1000))"
                );
                let us: u64 = sh(stage.fleet.runner(*there), &script).trim().parse().unwrap();
                took[at].push(us as f64 / count as f64);
            }
        }
        for times in &mut took {
            times.sort_by(f64::total_cmp);
        }
        eprintln!("{name}: nbd {:.0} us, vhost-user-blk {:.0} us each", took[0][4], took[1][4]);
    }
    let mut blackouts = [Vec::new(), Vec::new()];
    for _ in 0..12 {
        for (at, (_, from, to)) in machines.iter_mut().enumerate() {
            let report = go(&stage.fleet, *from, *to, Mode::Hybrid, budgets());
            blackouts[at].push((
                report.blackout_ms,
                report.blackout.pause_ms,
                report.blackout.run_ms,
            ));
            std::mem::swap(from, to);
        }
    }
    for ((kind, ..), mut times) in machines.iter().zip(blackouts) {
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        eprintln!(
            "{kind}: blackout {:.1} ms (pause, run: {:?}) median of 12",
            times[6].0, times[6]
        );
    }
}
