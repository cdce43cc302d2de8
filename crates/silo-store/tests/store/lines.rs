//! Lines: fencing, forks, retention, names.

use crate::support::*;
use silo_block::io::BlockDevice;
use silo_store::{
    Backup, BackupOptions, Depth, Generation, KeyRing, LineName, LineWriter, Reading, Retention,
    StoreError, Which, WriterOptions, capture::Want,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::{Duration, SystemTime},
};

#[test]
fn of_two_writers_the_later_one_fences_the_earlier_for_good() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(1, 100_000));
    let group = group(&[("disk", 4096, &disk)]);
    let mut first = writer(&store, "vm");
    round(&mut first, &group, Want::Changed).unwrap();
    let mut second = writer(&store, "vm");
    for _ in 0..2 {
        let error = round(&mut first, &group, Want::Everything).unwrap_err();
        assert!(matches!(error, StoreError::Fenced { epoch: 2, .. }), "{error}");
    }
    round(&mut second, &group, Want::Everything).unwrap();
    let infos = store.generations(&line("vm")).unwrap();
    assert_eq!(infos.iter().map(|info| info.epoch).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn many_writers_that_race_for_a_line_leave_one_owner_and_no_damage() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(1, 200_000));
    let stored = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let group = group(&[("disk", 4096, &disk)]);
                for _ in 0..3 {
                    let mut writer = match LineWriter::open(
                        store.clone(),
                        &ring(),
                        &line("vm"),
                        WriterOptions::default(),
                    ) {
                        Ok(writer) => writer,
                        Err(StoreError::Busy(_)) => continue,
                        Err(error) => panic!("{error}"),
                    };
                    match round(&mut writer, &group, Want::Everything) {
                        Ok(_) => _ = stored.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
                        Err(StoreError::Fenced { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    let infos = store.generations(&line("vm")).unwrap();
    assert_eq!(infos.len() as u64, stored.into_inner(), "what was said to be stored is there");
    assert!(infos.windows(2).all(|pair| pair[0].epoch > pair[1].epoch));
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
}

#[test]
fn a_running_backup_that_is_fenced_ends_and_says_so() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(1, 50_000));
    let group = group(&[("disk", 4096, &disk)]);
    let backup =
        Backup::start(writer(&store, "vm"), Arc::new(group.clone()), BackupOptions::default())
            .unwrap();
    backup.now("first", Duration::from_secs(30)).unwrap();
    let _other = writer(&store, "vm");
    let error = backup.now("second", Duration::from_secs(30)).unwrap_err();
    assert!(matches!(*error, StoreError::Fenced { .. }), "{error}");
    let status = backup.stop();
    assert!(status.ended && status.error.unwrap().contains("taken over"));
}

#[test]
fn a_fork_copies_nothing_and_goes_its_own_way() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(1, 4 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    let mut trunk = writer(&store, "trunk");
    let number = round(&mut trunk, &group, Want::Changed).unwrap().number;
    let original = disk.content();
    let before = store.requests().uploaded;
    let fork = |name: &str| {
        let options = WriterOptions::default();
        LineWriter::fork(store.clone(), &ring(), (&line("trunk"), number), &line(name), options)
    };
    let mut branch = fork("branch").unwrap();
    assert!(store.requests().uploaded - before < 2000, "nothing was copied");
    assert!(matches!(fork("branch"), Err(StoreError::LineExists { .. })));

    // Both go on.
    group.device(0).write_at(0, &noise(2, 9000)).unwrap();
    round(&mut trunk, &group, Want::Changed).unwrap();
    let other = Disk::new(original.clone());
    other.write_at(1 << 20, &noise(3, 9000)).unwrap();
    let their_group = self::group(&[("disk", 4096, &other)]);
    let stored = round(&mut branch, &their_group, Want::Everything).unwrap();
    assert!(stored.content < 20_000, "the rest was known: {stored:?}");
    assert_eq!(newest(&store, "branch", "disk").unwrap(), other.content());
    assert_eq!(newest(&store, "trunk", "disk").unwrap(), disk.content());

    // The trunk may vanish; the branch stays.
    let keep_last = Retention { last: 1, ..Retention::default() };
    store.prune(&line("trunk"), &keep_last, SystemTime::now(), false).unwrap();
    store.mark(Duration::ZERO, false).unwrap();
    store.sweep(Duration::ZERO).unwrap();
    let first = store.generations(&line("branch")).unwrap().last().unwrap().number;
    let first = generation(&store, "branch", Which::Number(first)).unwrap();
    assert_eq!(restored(&first, "disk").unwrap(), original);
    assert_eq!(first.parent(), Some((&line("trunk"), number)));
}

#[test]
fn a_shared_base_is_forked_by_tenants_that_have_its_key() {
    let (_, store) = in_memory();
    let base_keys = KeyRing::from_keys([("base-key", [9; 32])]).unwrap();
    let base = LineName::new("bases", "debian").unwrap();
    let disk = Disk::new(noise(1, 1 << 20));
    let open = |keys: &KeyRing, line: &LineName| {
        LineWriter::open(store.clone(), keys, line, WriterOptions::default())
    };
    let group = group(&[("disk", 4096, &disk)]);
    let number =
        round(&mut open(&base_keys, &base).unwrap(), &group, Want::Changed).unwrap().number;
    let both = KeyRing::from_keys([("tenant-key", [3; 32]), ("base-key", [9; 32])]).unwrap();
    let mine = LineName::new("acme", "vm").unwrap();
    let fork = |keys: &KeyRing| {
        LineWriter::fork(store.clone(), keys, (&base, number), &mine, WriterOptions::default())
    };
    let stranger = KeyRing::from_keys([("tenant-key", [3; 32])]).unwrap();
    let error = fork(&stranger).err().expect("it lacks the base's key").to_string();
    assert!(error.contains("key \"base-key\" is lost") && error.contains("bases"), "{error}");
    let mine = LineName::new("acme", "vm-2").unwrap();
    let options = WriterOptions::default();
    let mut writer =
        LineWriter::fork(store.clone(), &both, (&base, number), &mine, options).unwrap();
    disk.write_at(4096, &noise(2, 4096)).unwrap();
    let group = self::group(&[("disk", 4096, &disk)]);
    round(&mut writer, &group, Want::Everything).unwrap();
    let generation = Generation::open(&store, &both, &mine, Which::Newest, 0).unwrap();
    assert_eq!(restored(&generation, "disk").unwrap(), disk.content());
}

#[test]
fn pruning_says_what_would_go_and_deletes_that_and_never_the_newest() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(1, 50_000));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    for i in 0..5u64 {
        group.device(0).write_at(0, &noise(i, 4096)).unwrap();
        round(&mut writer, &group, Want::Changed).unwrap();
    }
    let keep = Retention { last: 2, ..Retention::default() };
    let now = SystemTime::now();
    let would = store.prune(&line("vm"), &keep, now, true).unwrap();
    assert_eq!((would.deleted.len(), would.kept), (3, 2));
    assert_eq!(store.generations(&line("vm")).unwrap().len(), 5, "a dry run deletes nothing");
    assert_eq!(store.prune(&line("vm"), &keep, now, false).unwrap(), would);
    assert_eq!(store.generations(&line("vm")).unwrap().len(), 2);
    store.prune(&line("vm"), &Retention::default(), now, false).unwrap();
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
    let (done, stop) = (Reading::default(), AtomicBool::new(false));
    assert!(store.verify(&ring(), &line("vm"), None, Depth::Full, &done, &stop).unwrap().is_well());
}
