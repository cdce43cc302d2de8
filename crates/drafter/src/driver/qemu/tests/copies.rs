//! A machine's saved state with vhost-user-blk disks goes on with NBD disks, as a copy's does.

use super::rig::*;
use crate::driver::{DiskKind, Driver, MachineShape, Start, Vm};
use silo::{
    expose::{
        nbd::{NbdOptions, NbdServer},
        vhost::{VhostOptions, VhostServer},
    },
    io::BlockDevice,
    source::MemoryDevice,
};
use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

/// A disk in memory. While it is shut a flush waits, and fails when waits are ended.
struct Disk {
    inner: MemoryDevice,
    state: Mutex<Shut>,
    changed: Condvar,
}

#[derive(Default)]
struct Shut {
    shut: bool,
    waiting: u32,
    interrupts: u64,
}

impl Disk {
    fn new(bytes: u64) -> Arc<Self> {
        let inner = MemoryDevice::new("disk", bytes).unwrap();
        Arc::new(Self { inner, state: Mutex::default(), changed: Condvar::new() })
    }

    fn shut(&self, shut: bool) {
        self.state.lock().unwrap().shut = shut;
        self.changed.notify_all();
    }

    fn waiting(&self) -> u32 {
        self.state.lock().unwrap().waiting
    }
}

impl BlockDevice for Disk {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write_at(offset, data)
    }

    fn flush(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let before = state.interrupts;
        state.waiting += 1;
        let limit = Duration::from_secs(60);
        let waits = |state: &mut Shut| state.shut && state.interrupts == before;
        let (mut state, _) = self.changed.wait_timeout_while(state, limit, waits).unwrap();
        state.waiting -= 1;
        if state.shut { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.trim(offset, length)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.inner.zero(offset, length, allocate)
    }

    fn interrupt(&self) {
        self.state.lock().unwrap().interrupts += 1;
        self.changed.notify_all();
    }
}

#[test]
fn a_machine_with_a_vhost_user_disk_goes_on_with_an_nbd_disk_and_does_what_waited_in_its_ring() {
    let rig = Rig::new();
    for vcpus in [1, 2] {
        let disks = vec!["root".into()];
        let shape = MachineShape { disks, disk_kind: DiskKind::VhostUserBlk, vcpus, ..rig.shape() };
        let copied = MachineShape { disk_kind: DiskKind::Nbd, ..shape.clone() };
        let disk = Disk::new(1 << 20);
        disk.write_at(512 << 10, &[0x5a; 4096]).unwrap();
        let [vhost, nbd] = ["vhost", "nbd"].map(|name| rig.state.path().join(name));
        let put_back_after = Some(Duration::from_millis(2));
        let options = VhostOptions { put_back_after, ..VhostOptions::default() };
        let server = VhostServer::start(&vhost, disk.clone(), options).unwrap();
        let other = NbdServer::start(&nbd, disk.clone(), NbdOptions::default()).unwrap();

        let mut machine = rig.boot(&shape, Given { tap: None, disk: Some(&vhost) });
        // More requests than the ring has places.
        for _ in 0..200 {
            assert_eq!(ask(&machine.vm, "sync"), "sync ok");
        }
        let read = ask(&machine.vm, "disk");
        disk.shut(true);
        let asked = say(&machine.vm, "sync");
        until(Duration::from_secs(60), "a flush is in hand", || disk.waiting() > 0);
        machine.vm.pause(&mut || ()).unwrap();
        assert!(server.is_at_rest(), "it was put back");
        let state = machine.vm.save().unwrap();
        let state = rig.driver.with_nbd_disks(&shape, &state).unwrap();

        let memory = machine.memory.try_clone().unwrap();
        let given = Given { tap: None, disk: Some(&nbd) };
        let mut copy = rig.start(&copied, memory, Start::Incoming, given);
        copy.vm.prepare_load().unwrap();
        copy.vm.load(&state).unwrap();
        drop(asked);
        let answer = UnixStream::connect(copy.vm.guest_socket()).unwrap();
        answer.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        copy.vm.run().unwrap();
        until(Duration::from_secs(60), "the copy asks for it again", || disk.waiting() > 0);
        disk.shut(false);
        let mut line = String::new();
        BufReader::new(&answer).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "sync ok", "{vcpus} processors");
        // And goes on from there, once round its rings and more.
        for _ in 0..200 {
            let mut line = String::new();
            (&answer).write_all(b"sync\n").unwrap();
            BufReader::new(&answer).read_line(&mut line).unwrap();
            assert_eq!(line.trim(), "sync ok");
        }
        drop(answer);
        assert_eq!(ask(&copy.vm, "disk"), read);
        assert_eq!(ask(&copy.vm, "check"), "check ok");

        // A copy is an ordinary machine with NBD disks from then on.
        let mut place = rig.place_for(&copy, &copied, given);
        copy.vm.pause(&mut || ()).unwrap();
        place.vm.load(&copy.vm.save().unwrap()).unwrap();
        place.vm.run().unwrap();
        assert_eq!(ask(&place.vm, "sync"), "sync ok");
        assert_eq!(ask(&place.vm, "check"), "check ok");
        for mut ended in [machine, copy, place] {
            ended.vm.kill().unwrap();
        }
        server.stop(Duration::from_secs(5)).unwrap();
        other.stop(Duration::from_secs(5)).unwrap();
    }
}
