//! Keys: lost, wrong, changed.

use crate::support::*;
use silo_block::io::BlockDevice;
use silo_store::{
    Access, Generation, KeyError, KeyRing, LineWriter, Store, StoreError, Which, WriterOptions,
    capture::Want,
};

#[test]
fn a_lost_key_is_named_and_nothing_is_touched() {
    let (backend, store) = in_memory();
    let disk = Disk::new(noise(1, 50_000));
    let group = group(&[("disk", 4096, &disk)]);
    round(&mut writer(&store, "vm"), &group, Want::Changed).unwrap();
    // A new process, without the key.
    let store = over(backend);
    let before = store.requests();
    for (keys, lost) in [
        (KeyRing::from_keys([("key-2", [1; 32])]).unwrap(), true),
        (KeyRing::from_keys([("key-1", [2; 32])]).unwrap(), false),
    ] {
        let open = Generation::open(&store, &keys, &line("vm"), Which::Newest, 0).err().unwrap();
        let take = LineWriter::open(store.clone(), &keys, &line("vm"), WriterOptions::default());
        for error in [open, take.err().unwrap()] {
            assert!(error.to_string().contains("key-1"), "{error}");
            match error {
                StoreError::Key(KeyError::Lost { .. }) => assert!(lost),
                StoreError::Key(KeyError::Wrong { .. }) => assert!(!lost),
                other => panic!("{other}"),
            }
        }
    }
    let since = store.requests().since(&before);
    assert_eq!((since.writes, since.creates, since.deletes), (0, 0, 0));
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
}

#[test]
fn a_tenant_key_is_changed_without_rewriting_packs_and_the_old_one_can_be_thrown_away() {
    let (backend, store) = in_memory();
    let disk = Disk::new(noise(1, 200_000));
    let group = group(&[("disk", 4096, &disk)]);
    let old = round(&mut writer(&store, "vm"), &group, Want::Changed).unwrap().number;
    let first = disk.content();
    let both = KeyRing::from_keys([("key-2", [2; 32]), ("key-1", [1; 32])]).unwrap();
    let before = store.requests();
    let rotation = store.rotate("acme", &both, true).unwrap();
    assert_eq!((rotation.keys, rotation.wrapped), (1, 1));
    assert!(store.requests().since(&before).uploaded < 2000);

    let new = KeyRing::from_keys([("key-2", [2; 32])]).unwrap();
    let store = over(backend.clone());
    let mut writer =
        LineWriter::open(store.clone(), &new, &line("vm"), WriterOptions::default()).unwrap();
    group.device(0).write_at(7, b"after the change").unwrap();
    let stored = round(&mut writer, &group, Want::Everything).unwrap();
    assert_eq!(stored.known, stored.blocks - 1, "block names outlive the data key: {stored:?}");
    for (which, content) in [(Which::Number(old), first), (Which::Newest, disk.content())] {
        let reader = over(backend.clone());
        let generation = Generation::open(&reader, &new, &line("vm"), which, 0).unwrap();
        assert_eq!(restored(&generation, "disk").unwrap(), content);
    }
    // The old key alone opens nothing that is new.
    let reader = over(backend);
    let error = Generation::open(&reader, &ring(), &line("vm"), Which::Newest, 0).err().unwrap();
    assert!(matches!(error, StoreError::Key(KeyError::Lost { .. })), "{error}");
}

#[test]
fn hostile_names_and_foreign_stores_are_refused_before_anything_is_written() {
    let (backend, store) = in_memory();
    for name in ["../x/y", "a/../b", "a/", "/a", "a/b/c", ".a/b"] {
        assert!(silo_store::LineName::parse(name).is_err(), "{name}");
    }
    drop(store);
    let other = object_store::memory::InMemory::new();
    let path = object_store::path::Path::from("folder/silo-store");
    let put = object_store::ObjectStoreExt::put(&other, &path, "silo-store 7".into());
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(put).unwrap();
    let opened =
        Store::with_backend(std::sync::Arc::new(other), "folder", "x", Access::Write, limits());
    let error = opened.err().unwrap().to_string();
    assert!(error.contains("silo-store 7"), "{error}");
    drop(backend);
}
