//! A machine whose source is lost while blocks are missing gets them from its last generation, but for those
//! that only the source had.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::load::{Load, LoadConfig};
use drafter::migrate::messages::Mode;
use e2e::{
    BOOT, Stage,
    busy::{Work, start_oracle, verify_oracle},
    eventually,
    moves::slow,
    place::Place,
    protected::{LIMIT, is_protected, signal},
    reception::on,
};
use nix::{sys::signal::Signal, unistd::Pid};
use silo_testing::S3Server;
use std::time::Instant;

/// Of what the guest holds, the most is written once.
const WORK: Work = Work { memory_mib: 64, hot_mib: 1, rate_mb_s: 1, file_mib: 4 };

/// What has the machine's content beside the source.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kept {
    /// A continuous backup in a folder.
    Backup,
    /// Protection, in a folder.
    Folder,
    /// Protection, in an S3 server that both hosts reach.
    S3,
}

#[test]
fn a_machine_whose_source_is_lost_gets_the_rest_from_its_backup() {
    loses_its_source(Kept::Backup);
}

#[test]
fn a_protected_machine_whose_source_is_lost_gets_the_rest_from_its_generation() {
    loses_its_source(Kept::Folder);
}

#[test]
fn so_does_one_whose_generations_are_in_s3() {
    loses_its_source(Kept::S3);
}

fn loses_its_source(kept: Kept) {
    let Some(mut stage) = Stage::open() else { return };
    let place = Place::new();
    let protected = kept != Kept::Backup;
    let bucket = (kept == Kept::S3).then(|| {
        let host = &stage.fleet.rig().hosts()[0];
        let start = || S3Server::start_at(&place.folder(), host.underlay.into()).unwrap();
        host.namespace.run(start).unwrap()
    });
    let url = bucket.as_ref().map_or_else(|| place.url(), |bucket| bucket.url("machines"));
    let keys = place.keys().display().to_string();
    let mut spec = stage.spec("redis", 1);
    if let Some(bucket) = &bucket {
        spec.environment =
            bucket.credentials().map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    }
    let package = spec.package.display().to_string();
    let mut receive = ["receive", "redis", "--package", &package].map(String::from).to_vec();
    if protected {
        let how = ["--protect", &url, "--protect-keys", &keys, "--every", "300ms", "--term", "2s"];
        spec.extra = how.map(String::from).into();
    } else {
        receive.extend(place.words());
    }
    let a = stage.fleet.run(0, &spec).unwrap();
    stage.fleet.runner(a).wait_ready(BOOT).unwrap();
    start_oracle(stage.fleet.runner(a), WORK);
    if protected {
        is_protected(&stage, a);
    } else {
        let backup = ["backup", "redis", "--every", "500ms"].map(String::from);
        on(&stage, 0, &[&backup[..], &place.words()].concat()).succeeds();
    }
    let b = stage.fleet.start(1, &spec, receive).unwrap();
    let config = LoadConfig { answer_within: LIMIT, verify_within: LIMIT, ..LoadConfig::default() };
    let client = stage.fleet.rig().client();
    let load = client.run(|| Load::start(Stage::public(1), config)).unwrap().unwrap();
    assert!(load.wait_for(100, LIMIT), "no answers");

    // What only the source has goes first; then it is lost, with half of the rest.
    let job = stage.fleet.start_move(a, b, Mode::PostCopy, slow(20_000_000), false).unwrap();
    let missing = || -> u64 {
        let status = stage.fleet.runner(b).status().unwrap();
        let owns = status.lease_owner.as_deref() == Some("b");
        if owns { status.missing.values().sum() } else { 0 }
    };
    let mut most = 0;
    eventually("half of it is there", LIMIT, || {
        let now = missing();
        most = most.max(now);
        now > 0 && now < most / 2
    });
    let status = stage.fleet.runner(a).status().unwrap();
    let pids = [status.runner_pid, status.monitor_pid.unwrap()];
    signal(&pids.map(|pid| Pid::from_raw(pid.cast_signed())), Signal::SIGKILL);
    let lost = Instant::now();
    stage.fleet.runner_mut(a).kill();
    let runner = stage.fleet.runner(b);
    let missing = || -> u64 {
        let status = runner.status();
        let late = lost.elapsed() > LIMIT;
        let Some(status) = status.as_ref().ok().filter(|_| !late) else {
            panic!("it is not here: {status:?}\n{}", runner.log_tail());
        };
        status.missing.values().sum()
    };
    let left = missing();
    assert!(left > 2000, "job {job} was nearly done: {left} of {most} blocks were missing");
    eventually("all of it is here", LIMIT * 2, || missing() == 0);
    eprintln!("{left} of {most} blocks from the store; whole {:?} after the loss", lost.elapsed());

    // Nothing was lost, and it is a machine like any other.
    assert!(load.wait_for(100, LIMIT), "no answers");
    verify_oracle(runner);
    eventually("it is b's, for good", LIMIT, || {
        let status = runner.status().unwrap();
        let settled = status.state == "running" && status.detail.is_empty();
        settled && status.lease_owner.as_deref() == Some("b")
    });
    if protected {
        is_protected(&stage, b);
        assert!(stage.fleet.runner(b).status().unwrap().protection.unwrap().taken_over.is_none());
    }
    let report = load.finish().unwrap();
    assert!(report.is_clean(), "{report:?}");
}
