//! A generation that gives another content than was backed up: each of its blocks is whole, opens and
//! has its name, and lies where it does not belong.

use super::*;
use crate::{
    Access, CopyGroup, Depth, KeyRing, Limits, LineWriter, RestoreOptions, ScratchOptions,
    WriterOptions,
    capture::{Capture, Want},
    format::runs::Run,
    log::encode_commit,
};
use object_store::memory::InMemory;
use silo_block::io::BlockDevice;
use std::{
    io,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64},
    },
};

const BLOCK: usize = 4096;
const BLOCKS: usize = 64;

struct Disk(Mutex<Vec<u8>>);

impl BlockDevice for Disk {
    fn size(&self) -> u64 {
        (BLOCKS * BLOCK) as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; length as usize])
    }
}

struct Rig {
    store: Arc<Store>,
    ring: KeyRing,
    line: LineName,
    disk: Arc<Disk>,
    group: Arc<CopyGroup>,
    writer: LineWriter,
}

impl Rig {
    fn new() -> Self {
        let backend = Arc::new(InMemory::new());
        let limits = Limits::default();
        let store = Store::with_backend(backend, "folder", "a store", Access::Write, limits);
        let (store, ring) = (store.unwrap(), KeyRing::from_keys([("one", [1; 32])]).unwrap());
        let line = LineName::new("acme", "vm").unwrap();
        let content = (0..BLOCKS * BLOCK).map(|at| (at / BLOCK + at % 251) as u8).collect();
        let disk = Arc::new(Disk(Mutex::new(content)));
        let devices = vec![("disk".to_owned(), BLOCK as u32, disk.clone() as Arc<dyn BlockDevice>)];
        let group = CopyGroup::new(devices, ScratchOptions::in_folder(&std::env::temp_dir()));
        let writer = LineWriter::open(store.clone(), &ring, &line, WriterOptions::default());
        Self { store, ring, line, disk, group: group.unwrap(), writer: writer.unwrap() }
    }

    /// One generation; its number.
    fn back_up(&mut self) -> u64 {
        let everything = self.writer.needs_everything();
        let want = if everything { Want::Everything } else { Want::Changed };
        let frozen = self.group.freeze(want).unwrap();
        let (infos, stop) = (self.group.devices(), AtomicBool::new(false));
        let stored = self.writer.store(&infos, frozen.as_ref(), everything, "", &stop).unwrap();
        frozen.release();
        stored.number
    }

    fn open(&self, number: u64) -> Arc<Generation> {
        Generation::open(&self.store, &self.ring, &self.line, Which::Number(number), 1 << 20)
            .unwrap()
    }

    fn restored(&self, number: u64) -> Result<Vec<u8>> {
        self.restored_as(number, RestoreOptions::default())
    }

    fn restored_as(&self, number: u64, options: RestoreOptions) -> Result<Vec<u8>> {
        let target = Disk(Mutex::new(vec![0xee; BLOCKS * BLOCK]));
        let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let generation = self.open(number);
        generation.restore("disk", &target, options, &done, &stop)?;
        Ok(target.0.into_inner().unwrap())
    }

    fn verified(&self, depth: Depth) -> crate::Verified {
        let (reading, stop) = (crate::Reading::default(), AtomicBool::new(false));
        self.store.verify(&self.ring, &self.line, None, depth, &reading, &stop).unwrap()
    }
}

#[test]
fn every_generation_has_the_root_of_its_content_and_equal_content_the_same() {
    let mut rig = Rig::new();
    let first = rig.back_up();
    let content = rig.disk.0.lock().unwrap().clone();
    rig.group.device(0).write_at(5 * BLOCK as u64, &[9; BLOCK]).unwrap();
    rig.group.device(0).zero(7 * BLOCK as u64, BLOCK as u64, false).unwrap();
    let second = rig.back_up();
    assert!(rig.restored(second).unwrap() == *rig.disk.0.lock().unwrap());
    rig.group.device(0).write_at(0, &content).unwrap();
    let third = rig.back_up();
    let root = |number| rig.open(number).devices()[0].root;
    assert!(root(first).is_some() && root(first) == root(third) && root(first) != root(second));
    let verified = rig.verified(Depth::Full);
    assert!(verified.is_well() && verified.roots == 3, "{verified:?}");
}

#[test]
fn however_many_packs_are_under_way_everything_comes() {
    let mut rig = Rig::new();
    rig.back_up();
    let mut last = 0;
    for block in 0..12u64 {
        rig.group.device(0).write_at(5 * block * BLOCK as u64, &[block as u8; BLOCK]).unwrap();
        last = rig.back_up();
    }
    for (threads, in_flight, in_flight_bytes) in
        [(1, 1, u64::MAX), (1, 8, 0), (1, 8, 3 * BLOCK as u64), (2, 8, u64::MAX), (0, 0, 0)]
    {
        let options =
            RestoreOptions { threads, in_flight, in_flight_bytes, ..RestoreOptions::default() };
        let restored = rig.restored_as(last, options).unwrap();
        assert!(restored == *rig.disk.0.lock().unwrap(), "{options:?}");
    }
}

#[test]
fn two_blocks_that_changed_places_are_found_by_a_restore_and_by_a_full_verification() {
    let mut rig = Rig::new();
    let number = rig.back_up();
    let object = rig.line.entry(number);
    let entry = rig.store.read_entry(&rig.line, number).unwrap();
    let refers = entry.commit().unwrap().clone();
    let key = rig.store.data_key(&refers.keys[0], &rig.ring).unwrap();
    let mut body = entry.open(&rig.line, &key).unwrap();
    let runs = &mut body.devices[0].runs;
    let whole = runs.pop().unwrap();
    assert!(runs.is_empty() && whole.count == BLOCKS as u64, "{whole:?}");
    let at = |start, count, slot| Run { start, count, content: Content::At { pack: 0, slot } };
    runs.extend([at(0, 1, 1), at(1, 1, 0), at(2, BLOCKS as u64 - 2, 2)]);
    let (head, keys) = (&entry.head, &refers.keys);
    let bytes = encode_commit(&rig.line, head, keys, refers.map, &body, &key).unwrap();
    rig.store.remote.start_put(&object, bytes.into()).wait().unwrap();

    let error = rig.restored(number).unwrap_err();
    assert!(matches!(&error, StoreError::Corrupt { object: o, .. } if *o == object), "{error}");
    assert!(error.to_string().contains("the root is another one"), "{error}");
    assert!(rig.verified(Depth::Quick).is_well());
    let found = rig.verified(Depth::Full);
    assert_eq!(found.problems.len(), 1, "{found:?}");
    assert_eq!(found.problems[0].affects, [(rig.line.clone(), number)]);
    assert_eq!(found.problems[0].object, object);
}
