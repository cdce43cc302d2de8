//! The uploader is killed at every request, before it takes effect and after.

use crate::support::*;
use object_store::memory::InMemory;
use silo_block::io::BlockDevice;
use silo_store::{
    Access, Depth, LineWriter, Reading, Store, StoreError, Which, WriterOptions,
    capture::{Capture, Want},
};
use silo_testing::{Death, Dying};
use std::sync::{Arc, atomic::AtomicBool};

/// Opens the line and stores one generation, through a client that may die.
fn session(backend: &Arc<Dying>, disk: &Arc<Disk>) -> Result<(), StoreError> {
    let store = Store::with_backend(backend.clone(), "folder", "dying", Access::Write, limits())?;
    let mut writer =
        LineWriter::open(store.clone(), &ring(), &line("vm"), WriterOptions::default())?;
    round(&mut writer, &group(&[("disk", 4096, disk)]), Want::Everything).map(|_| ())
}

#[test]
fn whenever_the_uploader_is_killed_the_store_holds_the_old_generation_or_the_new_one() {
    let (old, new) = (noise(1, 300_000), {
        let mut new = noise(1, 300_000);
        new[50_000..150_000].copy_from_slice(&noise(2, 100_000));
        new
    });
    let (mut deaths, mut outcomes) = (0, [0, 0]);
    for death in [Death::Before, Death::After] {
        for at in 0.. {
            let content = Arc::new(InMemory::new());
            session(&Dying::new(content.clone(), None, death), &Disk::new(old.clone())).unwrap();
            let client = Dying::new(content.clone(), Some(at), death);
            let result = session(&client, &Disk::new(new.clone()));
            if !client.is_dead() {
                result.unwrap();
                break;
            }
            deaths += 1;
            // Somebody else comes, with the store as it was left.
            let store = over(content.clone());
            let found = newest(&store, "vm", "disk").unwrap();
            assert!(found == old || found == new, "killed {death:?} request {at}");
            outcomes[usize::from(found == new)] += 1;
            assert!(result.is_err() || found == new, "said to be stored: {death:?} request {at}");
            let (done, stop) = (Reading::default(), AtomicBool::new(false));
            let verified =
                store.verify(&ring(), &line("vm"), None, Depth::Full, &done, &stop).unwrap();
            assert!(verified.is_well(), "{death:?} request {at}: {verified:?}");
            let disk = Disk::new(new.clone());
            disk.write_at(1, b"and on").unwrap();
            let group = group(&[("disk", 4096, &disk)]);
            round(&mut writer(&store, "vm"), &group, Want::Everything).unwrap();
            assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
            assert_eq!(group.changes(0).blocks, 0);
        }
    }
    assert!(deaths > 20 && outcomes.iter().all(|count| *count > 0), "{deaths}, {outcomes:?}");
}

#[test]
fn a_collector_that_is_killed_at_any_request_can_be_run_again_and_nothing_is_lost() {
    use silo_store::{Retention, Swept};
    use std::time::{Duration, SystemTime};
    let disk = Disk::new(noise(1, 300_000));
    for death in [Death::Before, Death::After] {
        for at in 0.. {
            let content = Arc::new(InMemory::new());
            let store = over(content.clone());
            let group = group(&[("disk", 4096, &disk)]);
            let mut writer = writer(&store, "vm");
            round(&mut writer, &group, Want::Changed).unwrap();
            group.device(0).write_at(0, &noise(u64::from(at) + 7, 300_000)).unwrap();
            round(&mut writer, &group, Want::Changed).unwrap();
            store.prune(&line("vm"), &Retention::default(), SystemTime::now(), false).unwrap();
            let client = Dying::new(content.clone(), Some(at), death);
            let collect = |store: &Arc<Store>| -> Result<Swept, StoreError> {
                store.mark(Duration::ZERO, false)?;
                store.sweep(Duration::ZERO)
            };
            let open =
                Store::with_backend(client.clone(), "folder", "dying", Access::Write, limits());
            let result = open.and_then(|store| collect(&store));
            let is_last = !client.is_dead();
            assert!(is_last || result.is_err());
            assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content(), "{death:?} {at}");
            // The next one ends what the dead one began.
            while collect(&store).unwrap() != Swept::Nothing {}
            assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content(), "{death:?} {at}");
            let scrubbed = store.scrub(None, &Reading::default(), &AtomicBool::new(false)).unwrap();
            assert_eq!(scrubbed.packs, 1, "only what is referred to is left: {death:?} {at}");
            // The writer of before goes on, and does not refer to what is gone.
            group.device(0).write_at(0, &noise(1, 300_000)).unwrap();
            while let Err(error) = round(&mut writer, &group, Want::Changed) {
                assert!(matches!(error, StoreError::Busy(_)), "{error}");
            }
            let generation = generation(&store, "vm", Which::Newest).unwrap();
            assert_eq!(restored(&generation, "disk").unwrap(), disk.content());
            if is_last {
                break;
            }
        }
    }
}
