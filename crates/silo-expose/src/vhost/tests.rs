//! The server against our own client, in one process.

use super::{
    GuestPages, GuestRange, VhostError, VhostOptions, VhostServer,
    client::{Ask, ClientOptions, ClientQueue, VhostClient},
    config, sys,
};
use crate::test_devices::{Gated, LIMIT, Plain};
use silo_block::io::BlockDevice;
use std::{
    io,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;

struct Rig {
    _dir: TempDir,
    path: PathBuf,
    server: VhostServer,
}

fn serve(device: Arc<dyn BlockDevice>, options: VhostOptions) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let server = VhostServer::start(&path, device, options).unwrap();
    Rig { _dir: dir, path, server }
}

/// Waits for an event, whatever its descriptor was made by the server.
fn await_event(event: &vmm_sys_util::eventfd::EventFd) -> u64 {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(sys::borrow(event), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(20_000u16)).unwrap(), 1, "no event came");
    event.read().unwrap()
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn ranges(list: &[(u64, u32, u32)]) -> Vec<u8> {
    list.iter()
        .flat_map(|&(sector, sectors, flags)| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        })
        .collect()
}

/// Random requests of a queue over sectors of its own, many under way, compared with a model.
fn exercise(queue: &mut ClientQueue, first: u64, sectors: u64, steps: usize, seed: u64) {
    let mut state = seed | 1;
    let mut model = vec![0u8; (sectors * 512) as usize];
    let mut busy = vec![false; sectors as usize];
    let mut under_way: Vec<Option<(Ask, u64, u64)>> = vec![None; 64];
    let mut step = 0;
    while step < steps || queue.under_way() > 0 {
        while step < steps {
            let Some(slot) = queue.take_slot() else { break };
            let length = random(&mut state) % 64 + 1;
            let start = random(&mut state) % (sectors - length);
            let range = start as usize..(start + length) as usize;
            if busy[range.clone()].iter().any(|&busy| busy) {
                queue.return_slot(slot);
                break;
            }
            busy[range.clone()].fill(true);
            let bytes = range.start * 512..range.end * 512;
            let ask = match random(&mut state) % 12 {
                0..5 => Ask::Read,
                5..10 => Ask::Write,
                10 => Ask::WriteZeroes,
                _ => Ask::Flush,
            };
            let data = match ask {
                Ask::Write => {
                    let seed = random(&mut state);
                    let data: Vec<u8> = (0..bytes.len())
                        .map(|at| (seed >> (at % 8 * 8)) as u8 ^ at as u8)
                        .collect();
                    model[bytes.clone()].copy_from_slice(&data);
                    data
                }
                Ask::WriteZeroes => {
                    model[bytes.clone()].fill(0);
                    ranges(&[(first + start, length as u32, (start % 2) as u32)])
                }
                Ask::Read => vec![0xee; bytes.len()],
                _ => Vec::new(),
            };
            queue.fill(slot, &data);
            queue.submit(slot, ask, first + start, data.len());
            under_way[usize::from(slot)] = Some((ask, start, length));
            step += 1;
        }
        queue.kick().unwrap();
        let (slot, status) = queue.wait(LIMIT).unwrap();
        let (ask, start, length) = under_way[usize::from(slot)].take().unwrap();
        assert_eq!(status, 0, "{ask:?} of {length} sectors at {start}");
        let bytes = (start * 512) as usize..((start + length) * 512) as usize;
        busy[start as usize..(start + length) as usize].fill(false);
        if ask == Ask::Read {
            let mut got = vec![0; bytes.len()];
            queue.fetch(slot, &mut got);
            assert!(got == model[bytes], "{length} sectors at {start} differ");
        }
    }
    // All of it at the end.
    for start in (0..sectors).step_by(128) {
        let count = (sectors - start).min(128);
        let mut got = vec![0; (count * 512) as usize];
        assert_eq!(queue.call(Ask::Read, first + start, &mut got).unwrap(), 0);
        assert!(got == model[(start * 512) as usize..][..got.len()]);
    }
}

#[test]
fn random_requests_leave_what_a_model_says_over_all_kinds_of_rings_and_devices() {
    for (direct, event_idx, indirect, poll) in [
        (true, true, true, 32),
        (true, false, false, 0),
        (false, true, false, 0),
        (false, false, true, 32),
    ] {
        let device = Plain::new(SIZE, direct);
        let options = VhostOptions { poll: Duration::from_micros(poll), ..VhostOptions::default() };
        let rig = serve(device, options);
        let options =
            ClientOptions { event_idx, indirect, slot_bytes: 64 << 10, ..ClientOptions::default() };
        let mut client = VhostClient::connect(&rig.path, options).unwrap();
        assert_eq!(client.capacity().unwrap(), SIZE);
        exercise(&mut client.queues[0], 7, 2000, 1500, 11);
        rig.server.stop(LIMIT).unwrap();
    }
}

#[test]
fn several_queues_work_at_the_same_time() {
    let rig = serve(Plain::new(SIZE, false), VhostOptions::default());
    let options =
        ClientOptions { queues: 4, slot_bytes: 64 << 10, entries: 64, ..ClientOptions::default() };
    let mut client = VhostClient::connect(&rig.path, options).unwrap();
    thread::scope(|scope| {
        for (index, queue) in client.queues.iter_mut().enumerate() {
            scope.spawn(move || exercise(queue, index as u64 * 3000, 2000, 500, index as u64 + 5));
        }
    });
}

#[test]
fn requests_that_make_no_sense_get_an_error_and_the_next_one_is_served() {
    let rig = serve(
        Plain::new(SIZE, true),
        VhostOptions { serial: "serial-of-20-bytes-and-more".into(), ..VhostOptions::default() },
    );
    let mut client = VhostClient::connect(&rig.path, ClientOptions::default()).unwrap();
    let queue = &mut client.queues[0];
    let end = SIZE / 512;
    for (ask, sector, length, status) in [
        (Ask::Read, end, 512, 1),
        (Ask::Read, end - 1, 1024, 1),
        (Ask::Read, u64::MAX, 512, 1),
        (Ask::Read, u64::MAX / 512, 512, 1),
        (Ask::Read, 0, 511, 1),
        (Ask::Read, 0, 0, 1),
        (Ask::Write, end, 512, 1),
        (Ask::Write, 0, 0, 1),
        (Ask::Discard, 0, 0, 1),
        (Ask::Discard, 0, 15, 1),
        (Ask::Discard, 0, 16 * 33, 1),
        (Ask::Raw(99), 0, 512, 2),
        (Ask::Read, 0, 512, 0),
        (Ask::Read, end - 1, 512, 0),
        (Ask::Flush, 0, 0, 0),
    ] {
        let mut data = vec![0; length];
        assert_eq!(
            queue.call(ask, sector, &mut data).unwrap(),
            status,
            "{ask:?} {sector} {length}"
        );
    }
    for (ask, range, status) in [
        (Ask::Discard, (end, 8, 0), 1),
        (Ask::Discard, (u64::MAX, 8, 0), 1),
        (Ask::Discard, (0, 8, 1), 2),
        (Ask::WriteZeroes, (0, 8, 2), 2),
        (Ask::WriteZeroes, (0, u32::MAX, 0), 1),
        (Ask::Discard, (8, 0, 0), 0),
        (Ask::Discard, (8, 8, 0), 0),
        (Ask::WriteZeroes, (8, 8, 1), 0),
    ] {
        assert_eq!(queue.call(ask, 0, &mut ranges(&[range])).unwrap(), status, "{ask:?} {range:?}");
    }
    let mut id = [0; 20];
    assert_eq!(queue.call(Ask::Id, 0, &mut id).unwrap(), 0);
    assert_eq!(&id, b"serial-of-20-bytes-a");
}

#[test]
fn a_read_only_disk_is_read_and_never_written() {
    let device = Plain::new(SIZE, true);
    device.file().write_all_at(b"as it was", 512).unwrap();
    let rig = serve(device.clone(), VhostOptions { read_only: true, ..VhostOptions::default() });
    let mut client = VhostClient::connect(&rig.path, ClientOptions::default()).unwrap();
    assert!(config::has(client.features(), virtio_bindings::virtio_blk::VIRTIO_BLK_F_RO));
    let queue = &mut client.queues[0];
    let mut data = vec![7; 512];
    assert_eq!(queue.call(Ask::Write, 1, &mut data).unwrap(), 1);
    assert_eq!(queue.call(Ask::Discard, 0, &mut ranges(&[(0, 8, 0)])).unwrap(), 1);
    assert_eq!(queue.call(Ask::WriteZeroes, 0, &mut ranges(&[(0, 8, 0)])).unwrap(), 1);
    assert_eq!(queue.call(Ask::Read, 1, &mut data).unwrap(), 0);
    assert_eq!(&data[..9], b"as it was");
}

#[test]
fn check_25_a_flush_through_vhost_makes_what_was_answered_durable_and_its_failure_is_seen() {
    let device = Gated::new(true);
    let rig = serve(device.clone(), VhostOptions::default());
    let mut client = VhostClient::connect(&rig.path, ClientOptions::default()).unwrap();
    let queue = &mut client.queues[0];
    assert_eq!(queue.call(Ask::Write, 3, &mut [0x11; 512]).unwrap(), 0);
    assert_eq!(device.durable()[3 * 512], 0, "not asked for yet");
    assert_eq!(queue.call(Ask::Flush, 0, &mut []).unwrap(), 0);
    assert_eq!(device.durable()[3 * 512..][..512], [0x11; 512]);
    device.fail_flushes(true);
    assert_eq!(queue.call(Ask::Flush, 0, &mut []).unwrap(), 1);
    device.fail_flushes(false);
    assert_eq!(queue.call(Ask::WriteZeroes, 0, &mut ranges(&[(0, 8, 0)])).unwrap(), 1);

    // A driver that knows no FLUSH relies on each write.
    let options = ClientOptions { flush: false, ..ClientOptions::default() };
    let mut client = VhostClient::connect(&rig.path, options).unwrap();
    assert_eq!(client.queues[0].call(Ask::Write, 4, &mut [0x22; 512]).unwrap(), 0);
    assert_eq!(device.durable()[4 * 512..][..512], [0x22; 512]);
}

#[test]
fn a_request_that_waits_for_a_block_holds_up_none_of_the_others() {
    let device = Gated::new(false);
    let rig = serve(device.clone(), VhostOptions { workers: 8, ..VhostOptions::default() });
    let mut client = VhostClient::connect(&rig.path, ClientOptions::default()).unwrap();
    let queue = &mut client.queues[0];
    let mut waiting = Vec::new();
    for sector in 0..20 {
        let slot = queue.take_slot().unwrap();
        queue.submit(slot, Ask::Read, sector, 512);
        waiting.push(slot);
    }
    queue.kick().unwrap();
    device.await_waiting(8);
    // All workers wait, and more requests than there are workers.
    for sector in 1024..1124 {
        let slot = queue.take_slot().unwrap();
        queue.submit(slot, Ask::Read, sector, 512);
        queue.kick().unwrap();
        assert_eq!(queue.wait(LIMIT).unwrap(), (slot, 0));
    }
    device.set_open(true);
    let mut answered: Vec<_> = (0..20).map(|_| queue.wait(LIMIT).unwrap()).collect();
    answered.sort_unstable();
    waiting.sort_unstable();
    assert_eq!(answered, waiting.into_iter().map(|slot| (slot, 0)).collect::<Vec<_>>());
}

#[test]
fn check_39_stopping_ends_requests_that_wait_and_leaves_them_to_the_next_daemon() {
    let device = Gated::new(false);
    let Rig { _dir, path, server } = serve(device.clone(), VhostOptions::default());
    let mut client = VhostClient::connect(&path, ClientOptions::default()).unwrap();
    let queue = &mut client.queues[0];
    let mut slots = Vec::new();
    for sector in 0..10 {
        let slot = queue.take_slot().unwrap();
        queue.fill(slot, &[sector as u8 + 1; 512]);
        queue.submit(slot, if sector % 2 == 0 { Ask::Write } else { Ask::Read }, sector, 512);
        slots.push(slot);
    }
    queue.kick().unwrap();
    device.await_waiting(10);
    let began = Instant::now();
    server.stop(LIMIT).unwrap();
    assert!(began.elapsed() < LIMIT / 2, "it took {:?}", began.elapsed());
    assert!(queue.poll().is_none(), "no request was answered with an error");
    assert!(!path.exists());

    let next = Gated::new(true);
    let server = VhostServer::start(&path, next.clone(), VhostOptions::default()).unwrap();
    client.reconnect(&path).unwrap();
    let queue = &mut client.queues[0];
    let mut answered: Vec<_> = (0..10).map(|_| queue.wait(LIMIT).unwrap()).collect();
    answered.sort_unstable();
    slots.sort_unstable();
    assert_eq!(answered, slots.into_iter().map(|slot| (slot, 0)).collect::<Vec<_>>());
    assert_eq!(next.now()[4 * 512], 5, "the writes were run");
    // And everything goes on, in rings that went round.
    for round in 0..300u64 {
        let mut data = [round as u8; 512];
        assert_eq!(queue.call(Ask::Write, 1024 + round % 7, &mut data).unwrap(), 0);
    }
    drop(server);
}

#[test]
fn without_a_record_a_request_that_is_cut_short_gets_an_error() {
    let device = Gated::new(false);
    let rig = serve(device.clone(), VhostOptions::default());
    let options = ClientOptions { inflight: false, ..ClientOptions::default() };
    let mut client = VhostClient::connect(&rig.path, options).unwrap();
    let queue = &mut client.queues[0];
    let slot = queue.take_slot().unwrap();
    queue.submit(slot, Ask::Read, 0, 512);
    queue.kick().unwrap();
    device.await_waiting(1);
    rig.server.stop(LIMIT).unwrap();
    assert_eq!(queue.wait(LIMIT).unwrap(), (slot, 1));
}

#[test]
fn a_larger_device_is_announced_and_served_while_requests_run() {
    let device = Plain::new(1 << 20, true);
    let rig = serve(device.clone(), VhostOptions::default());
    let mut client = VhostClient::connect(&rig.path, ClientOptions::default()).unwrap();
    assert_eq!(client.queues[0].call(Ask::Write, 2047, &mut [5; 512]).unwrap(), 0);
    assert_eq!(client.queues[0].call(Ask::Write, 2048, &mut [6; 512]).unwrap(), 1);
    device.file().set_len(2 << 20).unwrap();
    rig.server.resize(device.clone());
    client.await_config_change(LIMIT).unwrap();
    assert_eq!(client.capacity().unwrap(), 2 << 20);
    assert_eq!(client.queues[0].call(Ask::Write, 2048, &mut [6; 512]).unwrap(), 0);
    let mut data = [0; 512];
    assert_eq!(client.queues[0].call(Ask::Read, 2047, &mut data).unwrap(), 0);
    assert_eq!(data, [5; 512]);
}

#[test]
fn stopping_a_ring_waits_for_its_requests_and_memory_may_change_under_running_ones() {
    let device = Gated::new(false);
    let rig = serve(device.clone(), VhostOptions::default());
    let mut client = VhostClient::connect(&rig.path, ClientOptions::default()).unwrap();
    let queue = &mut client.queues[0];
    let slot = queue.take_slot().unwrap();
    queue.submit(slot, Ask::Read, 0, 512);
    queue.kick().unwrap();
    device.await_waiting(1);
    thread::scope(|scope| {
        let opener = scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            device.set_open(true);
        });
        assert_eq!(client.stop_queue(0).unwrap(), 1, "one request was taken");
        opener.join().unwrap();
    });
    assert_eq!(client.queues[0].poll(), Some((slot, 0)), "answered before the ring was stopped");
    client.restart_queue(0).unwrap();
    for round in 0..50 {
        assert_eq!(client.queues[0].call(Ask::Write, 1500 + round, &mut [9; 512]).unwrap(), 0);
        client.share_memory_again().unwrap();
    }
}

#[test]
fn rings_against_the_rules_stop_alone_and_the_server_goes_on() {
    let rig =
        serve(Plain::new(SIZE, true), VhostOptions { max_connections: 40, ..Default::default() });
    let descriptor = |address: u64, length: u32, flags: u16, next: u16| {
        [
            &address.to_le_bytes()[..],
            &length.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ]
        .concat()
    };
    let good = 1u64 << 32 | 0x3000;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("a loop", descriptor(good, 16, 1, 0)),
        ("an index beyond the table", descriptor(good, 16, 1, 500)),
        ("no memory", descriptor(0x1000, 16, 0, 0)),
        ("an address that wraps", descriptor(u64::MAX - 3, 16, 0, 0)),
        ("a length beyond memory", descriptor(good, u32::MAX, 0, 0)),
        ("no status", descriptor(good, 16, 0, 0)),
        ("no header", descriptor(good, 16, 2, 0)),
        ("an empty table", descriptor(good, 0, 4, 0)),
        ("a table of half a descriptor", descriptor(good, 8, 4, 0)),
        ("a table that goes on", descriptor(good, 16, 5, 1)),
        ("a table in no memory", descriptor(0x10, 160, 4, 0)),
        ("a table in itself", descriptor(1u64 << 32, 16, 4, 0)),
    ];
    for (what, bytes) in cases {
        let options = ClientOptions { slot_bytes: 4096, ..ClientOptions::default() };
        let mut client = VhostClient::connect(&rig.path, options).unwrap();
        let err = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        vhost::VhostBackend::set_vring_err(client.frontend(), 0, &err).unwrap();
        let queue = &mut client.queues[0];
        queue.raw().0.part(0, 16).copy_from(&bytes);
        queue.publish(0);
        queue.kick_always().unwrap();
        assert_eq!(await_event(&err), 1, "{what}: the front end is told");
        assert_eq!(queue.poll(), None, "{what}");
    }
    // An index that runs away.
    let mut client = VhostClient::connect(&rig.path, ClientOptions::default()).unwrap();
    let err = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    vhost::VhostBackend::set_vring_err(client.frontend(), 0, &err).unwrap();
    for _ in 0..200 {
        client.queues[0].publish(0);
    }
    client.queues[0].kick_always().unwrap();
    assert_eq!(await_event(&err), 1);
    let mut client = VhostClient::connect(&rig.path, ClientOptions::default()).unwrap();
    assert_eq!(client.queues[0].call(Ask::Flush, 0, &mut []).unwrap(), 0);
}

#[test]
fn front_ends_that_talk_nonsense_are_cut_off_and_others_are_served() {
    use std::io::{Read, Write};
    let rig = serve(Plain::new(SIZE, true), VhostOptions::default());
    let mut state = 3u64;
    for round in 0..60u32 {
        let mut stream = std::os::unix::net::UnixStream::connect(&rig.path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // A right header for every request there is, with the wrong body; then noise.
        let mut message = Vec::new();
        message.extend((round % 45).to_le_bytes());
        message.extend(1u32.to_le_bytes());
        message.extend((round * 7 % 300).to_le_bytes());
        message.extend((0..round * 7 % 300).map(|_| random(&mut state) as u8));
        message.extend(random(&mut state).to_le_bytes());
        let _ = stream.write_all(&message);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    let mut client = VhostClient::connect(&rig.path, ClientOptions::default()).unwrap();
    assert_eq!(client.queues[0].call(Ask::Flush, 0, &mut []).unwrap(), 0);
}

#[test]
fn a_path_in_use_is_refused_and_a_stale_one_is_taken_over() {
    let rig = serve(Plain::new(SIZE, true), VhostOptions::default());
    let again = VhostServer::start(&rig.path, Plain::new(SIZE, true), VhostOptions::default());
    assert!(matches!(again, Err(VhostError::Taken { .. })));
    let stale = rig.path.with_extension("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let server =
        VhostServer::start(&stale, Plain::new(SIZE, true), VhostOptions::default()).unwrap();
    VhostClient::connect(&stale, ClientOptions::default()).unwrap();
    server.stop(LIMIT).unwrap();
}

#[test]
fn what_the_server_writes_is_in_the_dirty_log_of_a_migrating_monitor() {
    use std::os::fd::AsRawFd;
    use vhost::{VhostBackend, VhostUserDirtyLogRegion};
    let rig = serve(Plain::new(SIZE, true), VhostOptions::default());
    let mut client = VhostClient::connect(&rig.path, ClientOptions::default()).unwrap();
    let first_page = (1u64 << 32) / 4096;
    let bytes = first_page / 8 + (8 << 10);
    let log = sys::scratch(&[]).unwrap();
    log.set_len(bytes).unwrap();
    // The client agrees on LOG_SHMFD only here; the message itself is what matters.
    let region =
        VhostUserDirtyLogRegion { mmap_size: bytes, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    let features = client.features();
    client.enable_log().unwrap();
    client.frontend().set_log_base(0, Some(region)).unwrap();
    client.frontend().set_features(features | config::LOG_ALL).unwrap();
    let queue = &mut client.queues[0];
    let slot = queue.take_slot().unwrap();
    let page = first_page + queue.data_offset(slot) / 4096;
    queue.submit(slot, Ask::Read, 8, 8192);
    queue.kick().unwrap();
    assert_eq!(queue.wait(LIMIT).unwrap(), (slot, 0));
    let dirty = |page: u64| {
        let mut byte = [0];
        log.read_exact_at(&mut byte, page / 8).unwrap();
        byte[0] & 1 << (page % 8) != 0
    };
    assert!(dirty(page) && dirty(page + 1), "the data");
    assert!(dirty(page - 1), "the status");
    assert!(!dirty(page + 2), "nothing beyond");
    assert!(dirty(first_page), "the used ring");
}

/// A pager that counts, and fails for some pages.
#[derive(Default)]
struct Pager {
    demanded: Mutex<Vec<GuestRange>>,
    written: Mutex<Vec<GuestRange>>,
    fails: AtomicBool,
}

impl GuestPages for Pager {
    fn make_present(&self, range: GuestRange) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) && range.length == 4096 {
            return Err(io::Error::other("the peer is gone"));
        }
        self.demanded.lock().unwrap().push(range);
        Ok(())
    }

    fn wrote(&self, range: GuestRange) {
        self.written.lock().unwrap().push(range);
    }
}

#[test]
fn every_page_is_demanded_before_it_is_touched_and_every_write_is_reported() {
    let pager = Arc::new(Pager::default());
    let options = VhostOptions { pages: Some(pager.clone()), ..VhostOptions::default() };
    let rig = serve(Plain::new(SIZE, true), options);
    let options = ClientOptions { indirect: true, slot_bytes: 4096, ..ClientOptions::default() };
    let mut client = VhostClient::connect(&rig.path, options).unwrap();
    let queue = &mut client.queues[0];
    pager.demanded.lock().unwrap().clear();
    let slot = queue.take_slot().unwrap();
    let data = queue.data_offset(slot);
    queue.submit(slot, Ask::Read, 0, 4096);
    queue.kick().unwrap();
    assert_eq!(queue.wait(LIMIT).unwrap(), (slot, 0));
    let covers = |list: &Mutex<Vec<GuestRange>>, offset: u64, length: u64| {
        list.lock()
            .unwrap()
            .iter()
            .any(|range| range.offset <= offset && offset + length <= range.offset + range.length)
    };
    let head = data - 4096;
    assert!(covers(&pager.demanded, head + 32, 48), "the table of descriptors");
    assert!(covers(&pager.demanded, head, 16), "the header");
    assert!(covers(&pager.demanded, data, 4096), "the data");
    assert!(covers(&pager.demanded, head + 16, 1), "the status");
    assert!(covers(&pager.written, data, 4096) && covers(&pager.written, head + 16, 1));
    assert!(!covers(&pager.written, head, 1), "the header is the guest's");
    // A page that cannot be had: an error for the request, and the ring goes on.
    pager.fails.store(true, Ordering::SeqCst);
    assert_eq!(queue.call(Ask::Write, 0, &mut [1; 4096]).unwrap(), 1);
    pager.fails.store(false, Ordering::SeqCst);
    assert_eq!(queue.call(Ask::Write, 0, &mut [1; 4096]).unwrap(), 0);
}
