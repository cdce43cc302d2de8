//! Machines whose memory is not all there.

use super::{nbd::Disk, rig::*, sys};
use crate::driver::{DiskKind, MachineShape, MemoryHandle, Start, Vm};
use silo::block::BlockRange;
use std::{
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

/// A QEMU with memory of its own in which nothing but `present` is there.
fn place_with(
    rig: &Rig,
    shape: &MachineShape,
    given: Given<'_>,
    source: &OwnedFd,
    present: &[BlockRange],
) -> (Machine, MemoryHandle) {
    let place = rig.start(shape, memory(shape.memory_bytes), Start::Incoming, given);
    let handle = place.vm.memory().unwrap();
    sys::register_missing(&handle).unwrap();
    for range in present {
        let data = read_memory(source, range.start.offset(), range.bytes());
        sys::copy(&handle, range.start.offset(), &data).unwrap();
    }
    (place, handle)
}

#[test]
fn loading_needs_the_state_blocks_and_no_other_and_freezing_works_while_a_page_is_missing() {
    let rig = Rig::new();
    let path = rig.state.path().join("disk.sock");
    let _disk = Disk::serve(&path, 1 << 20);
    state_blocks_are_enough(&rig, DiskKind::Nbd, &path);
}

#[test]
fn of_a_vhost_user_disk_too_loading_needs_the_state_blocks_and_no_other() {
    let rig = Rig::new();
    let path = rig.state.path().join("disk.sock");
    let _disk = vhost_disk(&path, 1 << 20);
    state_blocks_are_enough(&rig, DiskKind::VhostUserBlk, &path);
}

fn state_blocks_are_enough(rig: &Rig, disk_kind: DiskKind, path: &Path) {
    let shape = MachineShape { disks: vec!["root".into()], disk_kind, ..rig.shape() };
    let given = Given { disk: Some(path), tap: None };
    let mut machine = rig.boot(&shape, given);
    assert_eq!(ask(&machine.vm, "sync"), "sync ok");
    let blocks = machine.vm.state_blocks().unwrap();
    let count: u64 = blocks.iter().map(|range| range.count).sum();
    println!("{count} blocks are read by loading: {blocks:?}");
    assert_eq!(ask(&machine.vm, "sync"), "sync ok", "the question stops no ring");
    assert!((1..64).contains(&count));
    machine.vm.pause(&mut || ()).unwrap();
    let state = machine.vm.save().unwrap();

    let (mut place, handle) = place_with(rig, &shape, given, &machine.memory, &blocks);
    assert!(place.vm.state_blocks().unwrap().is_empty(), "no driver has set up a queue yet");
    place.vm.load(&state).unwrap();
    assert_eq!(sys::pending_fault(&handle), None, "loading touched a block that is not listed");

    // Running needs pages that never come: the processor waits, and QEMU would not stop.
    place.vm.run().unwrap();
    until(Duration::from_secs(10), "the guest waits for a page", || {
        sys::pending_fault(&handle).is_some()
    });
    let begin = Instant::now();
    place.vm.freeze().unwrap();
    println!("frozen in {:?}", begin.elapsed());
    place.vm.kill().unwrap();

    // And without the listed blocks loading waits: they are not too many.
    let (mut place, handle) = place_with(rig, &shape, given, &machine.memory, &blocks[1..]);
    let fence = place.vm.fence();
    std::thread::scope(|scope| {
        let vm = &mut place.vm;
        let loading = scope.spawn(move || vm.load(&state));
        let mut missing = None;
        until(Duration::from_secs(10), "loading waits for a block", || {
            missing = sys::pending_fault(&handle);
            missing.is_some()
        });
        let block = silo::block::BlockIndex::containing(missing.unwrap());
        assert!(block.0 >= blocks[0].start.0 && block.0 < blocks[0].end(), "{block}");
        fence.kill().unwrap();
        loading.join().unwrap().unwrap_err();
    });
}
