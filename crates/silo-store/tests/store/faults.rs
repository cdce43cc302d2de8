//! A store that is slow, fails, lies, or forgets its answers.

use crate::support::*;
use silo_block::io::BlockDevice;
use silo_store::{
    Backup, BackupOptions, Depth, GenerationDevice, Limits, Policy, Reading, StoreError, Which,
    capture::{Capture, Want},
};
use silo_testing::{Fault, Rule, S3Server};
use std::{
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

fn pack_keys(server: &S3Server) -> Vec<String> {
    let mut keys = Vec::new();
    let root = server.file("folder/packs");
    for folder in std::fs::read_dir(root).unwrap() {
        let folder = folder.unwrap();
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let names = (folder.file_name(), file.unwrap().file_name());
            keys.push(format!("folder/packs/{}/{}", names.0.display(), names.1.display()));
        }
    }
    keys
}

#[test]
fn check_15_a_corrupt_missing_truncated_or_stale_object_is_an_error_that_names_it_and_never_content()
 {
    let server = server();
    let store = s3(&server, limits());
    let disk = Disk::new(noise(1, 2 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    round(&mut writer, &group, Want::Changed).unwrap();
    let old = pack_keys(&server);
    group.device(0).write_at(0, &noise(2, 2 << 20)).unwrap();
    round(&mut writer, &group, Want::Changed).unwrap();
    let new: Vec<_> = pack_keys(&server).into_iter().filter(|key| !old.contains(key)).collect();
    let part = new[0].rsplit('/').next().unwrap().to_owned();
    let log = "lines/acme/vm/".to_owned();
    let entries: Vec<_> = std::fs::read_dir(server.file("folder/lines/acme/vm"))
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    let oldest_entry = format!("folder/lines/acme/vm/{}", entries.iter().max().unwrap());
    for (contains, fault) in [
        (&part, Fault::WrongBytes),
        (&part, Fault::Status(404)),
        (&part, Fault::Truncated),
        (&part, Fault::Stale(old[0].clone())),
        (&log, Fault::WrongBytes),
        (&log, Fault::Stale(oldest_entry)),
    ] {
        server.faults().add(Rule::all("GET", contains, fault.clone()));
        // The listing has "lines/…" as a query, not as a path; it stays as it is.
        let whole = newest(&store, "vm", "disk");
        let lazy = generation(&store, "vm", Which::Newest).and_then(|generation| {
            let device = GenerationDevice::new(&generation, "disk", 0)?;
            let mut block = vec![0; 4096];
            device
                .read_at(0, &mut block)
                .map_err(|error| *error.into_inner().unwrap().downcast::<StoreError>().unwrap())?;
            Ok(block)
        });
        for error in [whole.err().unwrap(), lazy.err().unwrap()] {
            let named = match &error {
                StoreError::Corrupt { object, .. }
                | StoreError::Sealed { object, .. }
                | StoreError::Missing { object }
                | StoreError::Request { object, .. } => object,
                other => panic!("{fault:?}: {other}"),
            };
            assert!(named.contains("packs/") || named.contains("lines/"), "{fault:?}: {error}");
        }
        server.faults().clear();
        assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content(), "after {fault:?}");
    }
}

#[test]
fn verify_names_what_is_wrong_and_which_generations_suffer() {
    let server = server();
    let store = s3(&server, limits());
    let disk = Disk::new(noise(1, 1 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    let first = round(&mut writer, &group, Want::Changed).unwrap().number;
    let old = pack_keys(&server);
    group.device(0).write_at(0, &noise(2, 1 << 20)).unwrap();
    let second = round(&mut writer, &group, Want::Changed).unwrap().number;
    let new: Vec<_> = pack_keys(&server).into_iter().filter(|key| !old.contains(key)).collect();
    let (done, stop) = (Reading::default(), AtomicBool::new(false));
    let verify = |depth| store.verify(&ring(), &line("vm"), None, depth, &done, &stop).unwrap();
    assert!(verify(Depth::Quick).is_well() && verify(Depth::Full).is_well());

    // A bit rots on the server's disk.
    let path = server.file(&old[0]);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[70_000] ^= 4;
    std::fs::write(&path, &bytes).unwrap();
    assert!(verify(Depth::Quick).is_well(), "sizes are right");
    let found = verify(Depth::Full);
    assert_eq!(found.problems.len(), 1);
    assert_eq!(found.problems[0].affects, [(line("vm"), first)]);
    assert!(old[0].ends_with(&found.problems[0].object), "{:?}", found.problems);
    assert_eq!(store.scrub(None, &done, &stop).unwrap().problems.len(), 1);

    std::fs::remove_file(server.file(&new[0])).unwrap();
    let found = verify(Depth::Quick);
    assert_eq!(found.problems[0].affects, [(line("vm"), second)]);
    assert!(matches!(found.problems[0].error, StoreError::Missing { .. }));
}

#[test]
fn errors_of_the_server_are_waited_out_and_a_lost_answer_of_a_create_is_recognised() {
    let server = server();
    let store = s3(&server, limits());
    let disk = Disk::new(noise(1, 1 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    server.faults().add(Rule::next("PUT", "packs/", Fault::Status(500)));
    server.faults().add(Rule::next("PUT", "packs/", Fault::LostAnswer(503)));
    // The create takes effect, the answer is lost, the repeated one says that there is one already.
    server.faults().add(Rule::next("PUT", "lines/", Fault::LostAnswer(500)));
    let stored = round(&mut writer, &group, Want::Changed).unwrap();
    assert_eq!(stored.requests.repeated, 3, "{stored:?}");
    server.faults().add(Rule::next("GET", "packs/", Fault::Status(503)));
    server.faults().add(Rule::next("GET", "packs/", Fault::Truncated));
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
    // And the writer goes on from the number that it has.
    group.device(0).write_at(0, b"more").unwrap();
    assert_eq!(round(&mut writer, &group, Want::Changed).unwrap().number, stored.number + 1);
}

#[test]
fn a_commit_whose_outcome_is_unknown_is_found_out_about_before_the_next() {
    let server = server();
    let quick = Limits { request: Duration::from_secs(2), attempts: 1, ..limits() };
    let store = s3(&server, quick);
    let disk = Disk::new(noise(1, 200_000));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    round(&mut writer, &group, Want::Changed).unwrap();
    group.device(0).write_at(0, &noise(2, 5000)).unwrap();
    let cut = disk.content();
    server.faults().add(Rule::next("PUT", "lines/", Fault::LostAnswer(500)));
    assert!(round(&mut writer, &group, Want::Changed).unwrap_err().is_transient());
    // It is there, complete, though the writer does not know it yet.
    assert_eq!(newest(&store, "vm", "disk").unwrap(), cut);
    group.device(0).write_at(100_000, &noise(3, 5000)).unwrap();
    let stored = round(&mut writer, &group, Want::Changed).unwrap();
    assert_eq!(stored.blocks, 2 + 2, "what may not have been stored is stored again");
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
    let infos = store.generations(&line("vm")).unwrap();
    assert_eq!(infos.len(), 3, "the one that was in doubt is a generation as well");
}

#[test]
fn check_33_a_put_that_was_given_up_is_unknown_and_nothing_refers_to_what_it_may_leave_behind() {
    let server = server();
    let quick = Limits { request: Duration::from_secs(1), attempts: 1, ..limits() };
    let store = s3(&server, Limits { slowest: 1 << 30, ..quick });
    let disk = Disk::new(noise(1, 1 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    // Takes effect long after the writer gave it up.
    server.faults().add(Rule::next("PUT", "packs/", Fault::Slow(Duration::from_secs(4))));
    let error = round(&mut writer, &group, Want::Changed).unwrap_err();
    assert!(matches!(error, StoreError::Timeout { .. }), "{error}");
    assert_eq!(group.changes(0).blocks, 256, "all is to be stored again");
    assert!(matches!(newest(&store, "vm", "disk"), Err(StoreError::NoGeneration { .. })));
    group.device(0).write_at(0, &noise(2, 100_000)).unwrap();
    let stored = round(&mut writer, &group, Want::Changed).unwrap();
    assert_eq!(stored.known, 0, "what may have arrived counts as not arrived");
    let (done, stop) = (Reading::default(), AtomicBool::new(false));
    let verified = store.verify(&ring(), &line("vm"), None, Depth::Full, &done, &stop).unwrap();
    assert!(verified.is_well(), "{verified:?}");
    assert_eq!(verified.blocks, 256);
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
}

#[test]
fn a_store_that_never_answers_costs_bounded_time() {
    let server = server();
    let quick = Limits { request: Duration::from_secs(1), attempts: 2, ..limits() };
    let store = s3(&server, Limits { slowest: 1 << 30, ..quick });
    let disk = Disk::new(noise(1, 100_000));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    server.faults().add(Rule::all("PUT", "packs/", Fault::Hangs));
    let begun = Instant::now();
    assert!(matches!(round(&mut writer, &group, Want::Changed), Err(StoreError::Timeout { .. })));
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    server.faults().clear();
    round(&mut writer, &group, Want::Changed).unwrap();
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
}

#[test]
fn a_running_backup_outlives_a_store_that_is_away_and_loses_no_change() {
    let server = server();
    let store = s3(&server, Limits { attempts: 1, ..limits() });
    let disk = Disk::new(noise(1, 500_000));
    let group = group(&[("disk", 4096, &disk)]);
    let policy = Policy {
        max_age: Duration::from_millis(100),
        min_interval: Duration::from_millis(20),
        period: Duration::from_millis(10),
        retry: Duration::from_millis(20),
        ..Policy::default()
    };
    let options = BackupOptions { policy, tracked_since: None };
    let backup = Backup::start(writer(&store, "vm"), Arc::new(group.clone()), options).unwrap();
    backup.now("", Duration::from_secs(20)).unwrap();
    server.faults().add(Rule::all("PUT", "", Fault::Status(503)));
    let device = group.device(0);
    let until = Instant::now() + Duration::from_secs(20);
    let mut i = 0;
    while backup.status().failures < 3 {
        assert!(Instant::now() < until, "{:?}", backup.status());
        device.write_at(i % 400_000, &noise(i, 3000)).unwrap();
        i += 7919;
        std::thread::yield_now();
    }
    assert!(backup.status().error.is_some());
    server.faults().clear();
    backup.now("", Duration::from_secs(20)).unwrap();
    assert!(backup.status().error.is_none());
    drop(backup);
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
}

#[test]
fn check_34_a_running_backup_keeps_age_interval_and_limit_with_a_hot_block() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(1, 1 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    let policy = Policy {
        max_age: Duration::from_millis(400),
        min_interval: Duration::from_millis(200),
        period: Duration::from_millis(20),
        min_changed: 1,
        group_shift: 4,
        ..Policy::default()
    };
    let options = BackupOptions { policy, tracked_since: None };
    let backup = Backup::start(writer(&store, "vm"), Arc::new(group.clone()), options).unwrap();
    backup.now("", Duration::from_secs(20)).unwrap();
    let before = backup.status().generations;
    let (begun, device) = (Instant::now(), group.device(0));
    let mut n = 0u64;
    let generations = || backup.status().generations - before;
    // For two seconds at least, and on until there is something to judge.
    while begun.elapsed() < Duration::from_secs(2) || n <= 10_000 || generations() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{n} writes, {:?}", backup.status());
        n += 1;
        device.write_at(8192, &n.to_le_bytes()).unwrap();
        if n.is_multiple_of(512) {
            std::thread::yield_now();
        }
    }
    let generations = generations();
    let elapsed = begun.elapsed().as_millis() as u64;
    assert!(generations <= elapsed / 200 + 1, "{generations} in {elapsed} ms");
}
