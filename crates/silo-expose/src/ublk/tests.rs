//! Requests on real devices, and the life of a server on the driver for tests.

use super::{
    abi::{Control, Descriptor, Params, State},
    fake::Fake,
    request::{By, FUA, NOUNMAP, perform},
    server::{Serving, UblkError, UblkOptions, UblkServer},
};
use crate::test_devices::{Gated, Plain};
use proptest::prelude::*;
use silo_block::io::BlockDevice;
use std::{
    io,
    path::Path,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

const LIMIT: Duration = Duration::from_secs(20);
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 2;
const DISCARD: u32 = 3;
const ZEROES: u32 = 5;

/// A device that tells what it was asked.
#[derive(Default)]
struct Told {
    calls: Mutex<Vec<String>>,
    read_only: bool,
    full: bool,
}

impl Told {
    fn tell(&self, call: String) -> io::Result<()> {
        self.calls.lock().unwrap().push(call);
        Ok(())
    }

    fn take(&self) -> String {
        self.calls.lock().unwrap().drain(..).collect::<Vec<_>>().join(", ")
    }
}

impl BlockDevice for Told {
    fn size(&self) -> u64 {
        // The last piece is no whole sector.
        (1 << 20) + 100
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(7);
        self.tell(format!("read {offset}+{}", buf.len()))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.tell(format!("write {offset}+{} of {}", data.len(), data[0]))
    }

    fn flush(&self) -> io::Result<()> {
        self.tell("flush".to_owned())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.tell(format!("trim {offset}+{length}"))
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.tell(format!("zero {offset}+{length}{}", if allocate { " and keep" } else { "" }))
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }
}

fn ask(device: &dyn BlockDevice, op_flags: u32, start: u64, sectors: u32) -> Option<i32> {
    let descriptor = Descriptor { op_flags, sectors, start };
    perform(device, &descriptor, &mut [3; 8192], By::Worker)
}

#[test]
fn each_operation_is_the_call_that_it_means() {
    let device = Told::default();
    let cases = [
        (READ, 8, 2, 1024, "read 4096+1024"),
        (WRITE, 8, 2, 1024, "write 4096+1024 of 3"),
        (WRITE | FUA, 8, 2, 1024, "write 4096+1024 of 3, flush"),
        (FLUSH, 0, 0, 0, "flush"),
        (DISCARD, 0, 2048, 0, "trim 0+1048576"),
        (ZEROES, 8, 8, 0, "zero 4096+4096"),
        (ZEROES | NOUNMAP, 8, 8, 0, "zero 4096+4096 and keep"),
        (ZEROES | FUA, 8, 8, 0, "zero 4096+4096, flush"),
        // A flag that says nothing about what is to be done (UBLK_IO_F_META).
        (READ | 1 << 11, 0, 1, 512, "read 0+512"),
    ];
    for (op_flags, start, sectors, bytes, calls) in cases {
        assert_eq!(ask(&device, op_flags, start, sectors), Some(bytes), "{calls}");
        assert_eq!(device.take(), calls);
    }
}

#[test]
fn what_cannot_be_is_an_errno_and_no_call() {
    let device = Told::default();
    let cases = [
        (READ, 2047, 2, libc::EINVAL),
        (READ, 2048, 1, libc::EINVAL),
        (READ, u64::MAX, 1, libc::EINVAL),
        (READ, 0, 0, libc::EINVAL),
        // Within the device, and longer than the buffer.
        (WRITE, 0, 17, libc::EINVAL),
        (DISCARD, 1, 2048, libc::EINVAL),
        (ZEROES, 1 << 60, u32::MAX, libc::EINVAL),
        (4, 0, 1, libc::EOPNOTSUPP),
        (255, 0, 1, libc::EOPNOTSUPP),
    ];
    for (op_flags, start, sectors, errno) in cases {
        assert_eq!(ask(&device, op_flags, start, sectors), Some(-errno), "{op_flags} at {start}");
        assert_eq!(device.take(), "");
    }
    let read_only = Told { read_only: true, ..Told::default() };
    for op in [WRITE, DISCARD, ZEROES] {
        assert_eq!(ask(&read_only, op, 0, 1), Some(-libc::EPERM));
    }
    assert_eq!(read_only.take(), "");
    assert_eq!(ask(&read_only, READ, 0, 1), Some(512));
    let full = Told { full: true, ..Told::default() };
    assert_eq!(ask(&full, WRITE, 0, 1), Some(-libc::ENOSPC));
}

#[test]
fn the_queues_thread_does_only_what_need_not_wait() {
    let gated = Gated::new(true);
    let ask = |op_flags, start| {
        let descriptor = Descriptor { op_flags, sectors: 8, start };
        perform(&*gated, &descriptor, &mut [3; 8192], By::Queue)
    };
    // Its second half is always here.
    assert_eq!((ask(READ, 0), ask(READ, 1024)), (None, Some(4096)));
    assert_eq!((ask(WRITE, 1024), ask(FLUSH, 0), ask(DISCARD, 0)), (None, None, None));
    let plain = Plain::new(1 << 20, false);
    let write = |op_flags| {
        let descriptor = Descriptor { op_flags, sectors: 8, start: 0 };
        perform(&*plain, &descriptor, &mut [3; 8192], By::Queue)
    };
    assert_eq!((write(WRITE), write(WRITE | FUA)), (Some(4096), None));
    assert_eq!(plain.flushes(), 0);
}

proptest! {
    #[test]
    fn no_descriptor_makes_it_panic_or_leave_its_buffer_or_device(
        op_flags in any::<u32>(),
        operation in 0..7u32,
        sectors in prop_oneof![any::<u32>(), 0..40u32],
        start in prop_oneof![any::<u64>(), 0..2100u64],
    ) {
        // A device that is exactly a megabyte panics if it is asked for more.
        let device = Gated::new(true);
        let descriptor = Descriptor { op_flags: op_flags & !0xff | operation, sectors, start };
        for by in [By::Queue, By::Worker] {
            let done = perform(&*device, &descriptor, &mut [0; 8192], by);
            prop_assert!(by == By::Queue || done.is_some());
        }
    }
}

fn options(id: Option<u32>, recover: bool) -> UblkOptions {
    UblkOptions {
        id,
        queues: 3,
        depth: 4,
        max_request: 64 << 10,
        recover,
        ..UblkOptions::default()
    }
}

#[test]
fn a_device_is_served_from_its_start_to_its_end() {
    let fake = Fake::default();
    let device = Plain::new((4 << 20) + 100, false);
    let mut serving = Serving::start(fake.handle(), device.clone(), &options(None, false)).unwrap();
    let id = serving.id();
    assert_eq!((fake.state(id), serving.is_live()), (State::Live, true));
    let expected =
        Params { read_only: false, sectors: 8192, max_sectors: 128, max_range_sectors: 1 << 21 };
    assert_eq!(fake.params(id), expected.encode());
    // More users than entries, each in its own place.
    thread::scope(|scope| {
        for user in 0..16u64 {
            let fake = &fake;
            scope.spawn(move || {
                for round in 0..8u8 {
                    let data = vec![user as u8 * 16 + round; 4096];
                    let sector = user * 512 + u64::from(round) * 8;
                    fake.request(id, WRITE, sector, data.clone()).unwrap();
                    assert_eq!(fake.request(id, READ, sector, vec![0; 4096]), Ok(data));
                }
            });
        }
    });
    let before = device.flushes();
    fake.request(id, FLUSH, 0, Vec::new()).unwrap();
    assert_eq!(device.flushes(), before + 1);
    let zeros = Descriptor { op_flags: ZEROES, sectors: 8, start: 0 };
    fake.request_sectors(id, zeros, Vec::new()).unwrap();
    assert_eq!(fake.request(id, READ, 0, vec![1; 4096]), Ok(vec![0; 4096]));
    assert_eq!(fake.request(id, READ, 8192, vec![0; 512]), Err(libc::EINVAL), "past the end");
    serving.shut(LIMIT).unwrap();
    assert!(fake.devices().is_empty(), "nothing is left in the kernel");
    let mut found = [0; 4096];
    device.read_at(512 * 512 + 7 * 4096, &mut found).unwrap();
    assert_eq!(found, [16 + 7; 4096]);
}

#[test]
fn a_request_that_waits_holds_up_none_of_the_others_and_ends_with_the_server() {
    let (fake, device) = (Fake::default(), Gated::new(false));
    let mut serving = Serving::start(fake.handle(), device.clone(), &options(None, false)).unwrap();
    let id = serving.id();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| fake.request(id, READ, 0, vec![0; 512]));
        device.await_waiting(1);
        for _ in 0..20 {
            fake.request(id, READ, 1024, vec![1; 4096]).unwrap();
        }
        // Its block never comes.
        serving.shut(Duration::from_millis(500)).unwrap();
        assert_eq!(waiting.join().unwrap(), Err(libc::EIO));
    });
    assert!(fake.devices().is_empty());
}

#[test]
fn a_flush_that_fails_is_seen_by_who_asked() {
    let (fake, device) = (Fake::default(), Gated::new(true));
    let serving = Serving::start(fake.handle(), device.clone(), &options(None, false)).unwrap();
    fake.request(serving.id(), WRITE | FUA, 8, vec![5; 512]).unwrap();
    assert_eq!(device.durable()[8 * 512], 5, "durable when it was answered");
    device.fail_flushes(true);
    assert_eq!(fake.request(serving.id(), FLUSH, 0, Vec::new()), Err(libc::EIO));
    assert_eq!(fake.request(serving.id(), WRITE | FUA, 8, vec![6; 512]), Err(libc::EIO));
    serving_ended(serving).unwrap();
}

/// A server on the fake has no `Drop`: it is ended by hand.
fn serving_ended<D: super::queue::Driver>(mut serving: Serving<D>) -> Result<(), UblkError> {
    serving.shut(LIMIT)
}

#[test]
fn after_a_kill_the_next_server_does_what_was_in_hand() {
    let (fake, device) = (Fake::default(), Gated::new(false));
    let first = Serving::start(fake.handle(), device.clone(), &options(Some(3), true)).unwrap();
    thread::scope(|scope| {
        let writes: Vec<_> = (0..6u8)
            .map(|at| {
                let fake = &fake;
                scope.spawn(move || fake.request(3, WRITE, u64::from(at) * 8, vec![at + 1; 4096]))
            })
            .collect();
        device.await_waiting(6);
        fake.kill(3);
        // As after kill -9: nothing of it runs on.
        std::mem::forget(first);
        assert_eq!(fake.state(3), State::Quiesced);
        // Users wait meanwhile.
        let late = scope.spawn(|| fake.request(3, READ, 1024, vec![1; 512]));
        let without = Serving::start(fake.handle(), device.clone(), &options(Some(3), false));
        let refused = without.err().unwrap().to_string();
        assert!(refused.contains("start with recovery"), "{refused}");
        let other = Plain::new(2 << 20, false);
        let refused = Serving::start(fake.handle(), other, &options(Some(3), true)).err().unwrap();
        assert!(matches!(refused, UblkError::Size { old, new, .. } if old < new), "{refused}");
        // The same content, in a device of the new process.
        let again = Gated::new(true);
        let next = Serving::start(fake.handle(), again.clone(), &options(Some(3), true)).unwrap();
        for write in writes {
            write.join().unwrap().unwrap();
        }
        assert_eq!(late.join().unwrap(), Ok(vec![0; 512]));
        for at in 0..6usize {
            assert_eq!(again.now()[at * 4096], at as u8 + 1);
        }
        device.set_open(true);
        serving_ended(next).unwrap();
    });
    assert!(fake.devices().is_empty());
}

#[test]
fn a_number_that_is_served_is_refused_and_what_a_dead_server_left_is_removed() {
    let (fake, device) = (Fake::default(), Plain::new(1 << 20, false));
    let first = Serving::start(fake.handle(), device.clone(), &options(Some(5), false)).unwrap();
    let refused = Serving::start(fake.handle(), device.clone(), &options(Some(5), false));
    assert!(matches!(refused.err(), Some(UblkError::Taken { id: 5, .. })));
    fake.kill(5);
    std::mem::forget(first);
    assert_eq!(fake.state(5), State::Dead);
    let next = Serving::start(fake.handle(), device, &options(Some(5), false)).unwrap();
    fake.request(5, READ, 0, vec![1; 512]).unwrap();
    serving_ended(next).unwrap();
}

#[test]
fn a_start_that_fails_at_any_step_leaves_nothing() {
    for (command, errno) in [
        (Control::Add, libc::EPERM),
        (Control::SetParams, libc::EINVAL),
        (Control::Start, libc::EINTR),
    ] {
        let (fake, device) = (Fake::default(), Plain::new(1 << 20, false));
        fake.refuse(command, errno);
        let refused = Serving::start(fake.handle(), device, &options(None, false)).err().unwrap();
        let text = refused.to_string();
        assert!(text.contains(command.name()), "{text}");
        assert!(errno != libc::EPERM || text.contains("needs root"), "{text}");
        assert!(fake.devices().is_empty(), "{text}");
    }
}

#[test]
fn options_that_cannot_be_are_refused_before_anything_is_made() {
    let fake = Fake::default();
    let start = |device: Arc<dyn BlockDevice>, change: &dyn Fn(&mut UblkOptions)| {
        let mut options = options(Some(1), false);
        change(&mut options);
        Serving::start(fake.handle(), device, &options).err().map(|error| error.to_string())
    };
    let device = Plain::new(1 << 20, false);
    type Case = (fn(&mut UblkOptions), &'static str);
    let cases: [Case; 4] = [
        (|o| o.depth = 4097, "4096 entries"),
        (|o| o.queues = 0, "at least 1 queue"),
        (|o| o.max_request = 100, "4 KiB"),
        (|o| (o.recover, o.id) = (true, None), "needs a number"),
    ];
    for (change, part) in cases {
        let refused = start(device.clone(), &change).unwrap();
        assert!(refused.contains(part), "{refused}");
    }
    let refused = start(Plain::new(100, false), &|_| ()).unwrap();
    assert!(refused.contains("smaller than a sector"), "{refused}");
    assert!(fake.devices().is_empty());
}

#[test]
fn a_kernel_without_the_driver_is_named() {
    if Path::new("/dev/ublk-control").exists() {
        return;
    }
    let device = Plain::new(1 << 20, false);
    let refused = UblkServer::start(device, &UblkOptions::default()).err().unwrap().to_string();
    assert!(refused.contains("this kernel has no ublk"), "{refused}");
    assert!(refused.contains("modprobe ublk_drv"), "{refused}");
}
