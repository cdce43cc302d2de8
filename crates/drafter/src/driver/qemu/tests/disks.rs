//! A vhost-user disk whose server goes away, and comes back, while the machine stands still or runs.

use super::rig::*;
use crate::driver::{DiskKind, MachineShape, Vm};
use silo::{
    expose::vhost::{VhostOptions, VhostServer},
    io::BlockDevice,
    source::MemoryDevice,
};
use std::{io::BufRead, path::Path, sync::Arc, time::Duration};

const SOON: Duration = Duration::from_secs(60);

/// As a runner's.
fn serve(path: &Path, disk: &Arc<MemoryDevice>) -> VhostServer {
    let options = VhostOptions { memory_slots: false, ..VhostOptions::default() };
    let disk: Arc<dyn BlockDevice> = disk.clone();
    VhostServer::start(path, disk, options).unwrap()
}

/// Waits until QEMU has found a server, which says whether it is taken for the one before.
fn await_found(vm: &mut dyn Vm, server: &VhostServer) -> bool {
    until(SOON, "QEMU is let in and finds the server", || {
        vm.finds_disks().unwrap() && server.is_answering() && vm.finds_disks().unwrap()
    });
    server.is_mistaken()
}

fn descriptors(vm: &dyn Vm) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().count()
}

#[test]
fn a_paused_machine_goes_on_with_the_next_server_of_its_disk_and_with_those_after_it_too() {
    let rig = Rig::new();
    let shape = MachineShape {
        vcpus: 2,
        disks: vec!["root".into()],
        disk_kind: DiskKind::VhostUserBlk,
        ..rig.shape()
    };
    let path = rig.state.path().join("disk.sock");
    let disk = Arc::new(MemoryDevice::new("disk", 1 << 20).unwrap());
    let mut server = serve(&path, &disk);
    let mut machine = rig.boot(&shape, Given { disk: Some(&path), tap: None });
    let vm = &mut machine.vm;
    assert_eq!(ask(vm, "sync"), "sync ok");
    assert!(vm.finds_disks().unwrap() && !server.is_mistaken());
    let before = descriptors(vm);

    for saved in [false, true, false] {
        // Paused, and perhaps saved, as by a move that fails.
        vm.pause(&mut || ()).unwrap();
        assert!(server.comes_to_rest(SOON));
        if saved {
            assert!(!vm.save().unwrap().is_empty());
        }
        server.stop(SOON).unwrap();
        until(SOON, "QEMU notices", || !vm.finds_disks().unwrap());
        server = serve(&path, &disk);
        let mistaken = await_found(vm, &server);
        println!("paused: taken for the server before: {mistaken}");
        vm.run().unwrap();
        assert_eq!(ask(vm, "sync"), "sync ok", "its disk works");
        assert!(!server.is_mistaken() && !server.is_at_rest());

        // And while it runs: what the guest asks meanwhile is done.
        server.stop(SOON).unwrap();
        let mut answer = say(vm, "sync");
        server = serve(&path, &disk);
        if await_found(vm, &server) {
            println!("running: taken for the server before");
            vm.pause(&mut || ()).unwrap();
            await_found(vm, &server);
            vm.run().unwrap();
        }
        let mut line = String::new();
        answer.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "sync ok", "what it asked is done");
        // The guest has one who asks at a time.
        drop(answer);
        assert_eq!(ask(vm, "check"), "check ok");
    }
    vm.pause(&mut || ()).unwrap();
    assert!(server.comes_to_rest(SOON), "it pauses as before");
    vm.run().unwrap();
    assert_eq!(ask(vm, "sync"), "sync ok");
    assert!(descriptors(vm) <= before, "QEMU keeps nothing of the servers that are gone");
}
