//! When flushes are answered, and what a freeze refuses.

use super::*;
use crate::disk::FlushPolicy;
use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

const SOON: Duration = Duration::from_millis(60);
const LATE: Duration = Duration::from_secs(20);

#[test]
fn a_normal_flush_waits_for_its_sync_and_an_early_one_for_the_runners_word() {
    let rig = Rig::new(4 * BLOCK_SIZE);
    let (disk, _) = rig.create(4);
    disk.write_at(0, b"x").unwrap();
    let disk = &disk;
    // A sync cannot go on while the journal is locked: that is our slow file system.
    let slow = disk.store.hold_journal();
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let answered = sender.clone();
        scope.spawn(move || answered.send(disk.flush()).unwrap());
        assert!(receiver.recv_timeout(SOON).is_err(), "normal policy");
        disk.answer_now();
        assert!(receiver.recv_timeout(SOON).is_err(), "the word counts in a switchover only");
        disk.set_flush_policy(FlushPolicy::Switchover);
        assert!(receiver.recv_timeout(SOON).is_err(), "without the word");
        disk.answer_now();
        receiver.recv_timeout(LATE).unwrap().unwrap();
        let later = Instant::now();
        disk.flush().unwrap();
        assert!(later.elapsed() < LATE, "later flushes are answered at once");

        let early = disk.wait_durable(Instant::now() + SOON);
        assert!(matches!(early, Err(DiskError::Timeout { .. })), "nothing is durable yet");
        scope.spawn(move || sender.send(disk.sync()).unwrap());
        assert!(receiver.recv_timeout(SOON).is_err(), "a sync is never early");
        drop(slow);
        receiver.recv_timeout(LATE).unwrap().unwrap();
        disk.wait_durable(Instant::now() + LATE).unwrap();
    });
    disk.set_flush_policy(FlushPolicy::Normal);
    disk.flush().unwrap();
    let mut rig = rig;
    let copy = rig.dir.path().join("copy");
    copy_disk(&rig.overlay(), &copy);
    rig.crash_host();
    let after = Disk::open(&copy, Some(&rig.base()), &rig.options()).unwrap();
    assert_eq!(read(&after, 0, 1), b"x");
}

#[test]
fn a_flush_that_takes_too_long_is_an_error() {
    let rig = Rig::new(4 * BLOCK_SIZE);
    let options = DiskOptions { flush_limit: SOON, ..rig.options() };
    let disk = Disk::create(&rig.overlay(), Some(&rig.base()), 0, &options).unwrap();
    disk.write_at(0, b"x").unwrap();
    let slow = disk.store.hold_journal();
    assert!(matches!(disk.flush(), Err(DiskError::Timeout { .. })));
    drop(slow);
    disk.wait_durable(Instant::now() + LATE).unwrap();
}

#[test]
fn a_frozen_disk_refuses_writes_after_a_restart_too_until_it_is_thawed() {
    let rig = Rig::new(4 * BLOCK_SIZE);
    let (disk, content) = rig.create(4);
    disk.freeze(LATE).unwrap();
    for disk in [disk, { drop_then_open(&rig) }] {
        assert!(disk.is_frozen());
        assert!(matches!(disk.write_at(0, b"x"), Err(DiskError::Frozen)));
        assert!(matches!(disk.trim(0, BLOCK), Err(DiskError::Frozen)));
        assert!(matches!(disk.zero(0, 1, false), Err(DiskError::Frozen)));
        disk.flush().unwrap();
        assert_eq!(content_of(&disk), content);
        disk.thaw().unwrap();
        disk.write_at(0, &content[..4]).unwrap();
        disk.freeze(LATE).unwrap();
    }
}

/// The same files in another folder, as if the first process had died.
fn drop_then_open(rig: &Rig) -> Disk {
    let copy = rig.dir.path().join("copy");
    copy_disk(&rig.overlay(), &copy);
    Disk::open(&copy, Some(&rig.base()), &rig.options()).unwrap()
}

#[test]
fn a_failed_sync_is_never_forgotten() {
    let rig = Rig::new(4 * BLOCK_SIZE);
    let (disk, _) = rig.create(4);
    disk.write_at(0, b"x").unwrap();
    disk.store.lose_sync("the device is gone");
    for _ in 0..2 {
        let error = disk.flush().unwrap_err();
        assert!(error.to_string().contains("the device is gone"), "{error}");
    }
}

#[test]
fn lack_of_room_is_told_as_that_by_every_flush_that_waited_for_the_sync() {
    let error = DiskError::Sync { cause: "no room".into(), kind: std::io::ErrorKind::StorageFull };
    assert!(error.is_full());
    assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::StorageFull);
}
