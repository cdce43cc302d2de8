//! The real pager of a machine that arrives: its memory is a hole in a memfd behind a userfaultfd,
//! and the disk's requests lie in it. This process plays the monitor, the guest and the peer.
//!
//! A source client leaves requests in its rings; the memory "moves" with every page missing; the
//! server at the destination has to bring each page that it touches, or it reads zeros.

use super::{
    GuestPages, GuestRange, VhostOptions, VhostServer,
    client::{Ask, ClientOptions, VhostClient},
    sys::{self, Shared},
};
use crate::test_devices::{LIMIT, Plain};
use silo_block::{
    block::{BLOCK_SIZE, BlockIndex, BlockRange, BlockSet},
    device::{Device, DeviceName},
};
use silo_memory::machine::{Mapping, Memory, sys as kernel};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

const PAGE: usize = BLOCK_SIZE;
const DISK: u64 = 4 << 20;

/// The machine's memory as the server sees it; notes what was asked of it.
struct Machine {
    memory: Arc<Memory>,
    touched: Mutex<BlockSet>,
    written: Mutex<BlockSet>,
}

fn blocks(range: GuestRange) -> BlockRange {
    let start = range.offset / PAGE as u64;
    BlockRange::new(start, (range.offset + range.length).div_ceil(PAGE as u64) - start)
}

impl GuestPages for Machine {
    fn is_present(&self, range: GuestRange) -> bool {
        self.memory.is_present(blocks(range))
    }

    fn make_present(&self, range: GuestRange) -> io::Result<()> {
        self.touched.lock().unwrap().insert_range(blocks(range));
        self.memory.make_present(blocks(range), LIMIT).map_err(io::Error::other)
    }

    fn wrote(&self, range: GuestRange) {
        self.written.lock().unwrap().insert_range(blocks(range));
        self.memory.note_written(blocks(range));
    }

    fn interrupt(&self) {
        self.memory.interrupt();
    }
}

struct Outcome {
    /// Reads that delivered something else, and writes that stored something else.
    mismatches: usize,
    demanded: u64,
    /// What the tracking reports.
    written: BlockSet,
    changed: BlockSet,
}

fn content(seed: u64, at: usize) -> u8 {
    (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (at % 7 * 8)) as u8 | 1
}

/// Requests of 1.5 pages each: half reads, half writes, left in the rings of a machine that moves.
fn moved_with_requests_in_its_rings(with_pager: bool) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("source"), dir.path().join("destination"));
    let disk = Plain::new(DISK, false);
    for sector in 0..DISK / 512 {
        let bytes: Vec<u8> = (0..512).map(|at| content(sector, at)).collect();
        disk.file().write_all_at(&bytes, sector * 512).unwrap();
    }
    let options = ClientOptions { indirect: true, slot_bytes: 8192, ..ClientOptions::default() };
    let bytes = VhostClient::bytes(&options);
    let file = sys::scratch(&[]).unwrap();
    file.set_len(bytes).unwrap();

    // The source: some work, then requests that nobody takes because the rings are stopped.
    let server = VhostServer::start(&old, disk.clone(), VhostOptions::default()).unwrap();
    let mut source = VhostClient::connect_with(&old, options, file.try_clone().unwrap()).unwrap();
    for sector in 0..100 {
        assert_eq!(source.queues[0].call(Ask::Read, sector, &mut [0; 512]).unwrap(), 0);
    }
    source.stop_queue(0).unwrap();
    let mut asked = Vec::new();
    while let Some(slot) = source.queues[0].take_slot() {
        let sector = 1000 + 100 * u64::from(slot);
        let ask = if slot % 2 == 0 { Ask::Read } else { Ask::Write };
        let data: Vec<u8> = (0..6144)
            .map(|at| if ask == Ask::Write { content(sector ^ 0xabcd, at) } else { 0xee })
            .collect();
        source.queues[0].fill(slot, &data);
        source.queues[0].submit(slot, ask, sector, data.len());
        asked.push((slot, ask, sector));
    }
    server.stop(LIMIT).unwrap();
    let image = file;

    // The destination: the monitor's mapping, with every page missing.
    let count = bytes / PAGE as u64;
    let (memory, guest) = arriving(bytes);
    let mut missing = BlockSet::new(count);
    missing.insert_range(BlockRange::new(0, count));
    let (demand, demands) = mpsc::channel::<BlockRange>();
    memory
        .arm(
            &missing,
            Box::new(move |range| {
                // It fails when the test is over.
                let _ = demand.send(range);
            }),
        )
        .unwrap();
    // It ends when the memory, and with it the sender of demands, is gone.
    thread::spawn({
        let (memory, image) = (Arc::downgrade(&memory), image.try_clone().unwrap());
        move || {
            for range in demands {
                let mut bytes = vec![0; range.bytes() as usize];
                image.read_exact_at(&mut bytes, range.start.0 * PAGE as u64).unwrap();
                let Some(memory) = memory.upgrade() else { return };
                memory.fill(range.start, &bytes).unwrap();
            }
        }
    });
    let machine = Arc::new(Machine {
        memory: memory.clone(),
        touched: Mutex::new(BlockSet::new(count)),
        written: Mutex::new(BlockSet::new(count)),
    });
    let pages = with_pager.then(|| machine.clone() as Arc<dyn GuestPages>);
    let options = VhostOptions { pages, ..VhostOptions::default() };
    let server = VhostServer::start(&new, disk.clone(), options).unwrap();
    let Ok(mut client) = source.moved_to(&new, memory.file().try_clone().unwrap(), &guest) else {
        panic!("the destination's server refuses the rings");
    };
    let mut mismatches = 0;
    for _ in 0..asked.len() {
        let queue = &mut client.queues[0];
        let Ok((slot, status)) = queue.wait(Duration::from_secs(if with_pager { 20 } else { 1 }))
        else {
            mismatches += usize::from(asked.len() as u16);
            break;
        };
        let Some(&(_, ask, sector)) = asked.iter().find(|asked| asked.0 == slot) else {
            mismatches += 1;
            continue;
        };
        let mut got = vec![0; 6144];
        let expected: Vec<u8> = if ask == Ask::Read {
            queue.fetch(slot, &mut got);
            (0..6144).map(|at| content(sector + at as u64 / 512, at % 512)).collect()
        } else {
            disk.file().read_exact_at(&mut got, sector * 512).unwrap();
            (0..6144).map(|at| content(sector ^ 0xabcd, at)).collect()
        };
        mismatches += usize::from(status != 0 || got != expected);
    }
    server.stop(LIMIT).unwrap();
    // Everything else in the guest's memory is as it was at the source.
    let (mut changed, mut ours, mut theirs) = (BlockSet::new(count), [0; PAGE], [0; PAGE]);
    for page in 0..count {
        guest.span().part(page as usize * PAGE, PAGE).copy_to(&mut ours);
        image.read_exact_at(&mut theirs, page * PAGE as u64).unwrap();
        if ours != theirs {
            changed.insert(BlockIndex(page));
        }
    }
    let demanded = machine.touched.lock().unwrap().len();
    // The tracking tells the server's writes from the stores of this process, which plays the
    // guest through the tracked mapping: only what the server says can be compared with it.
    let mut written = memory.take_dirty().unwrap();
    written.intersect_with(&machine.written.lock().unwrap());
    memory.detach();
    Outcome { mismatches, demanded, written, changed }
}

/// A machine's memory that is to arrive, and the monitor's mapping of it.
fn arriving(bytes: u64) -> (Arc<Memory>, Arc<Shared>) {
    let memory = Arc::new(Memory::new(DeviceName::new("memory").unwrap(), bytes).unwrap());
    let guest = Arc::new(Shared::map(memory.file().try_clone().unwrap(), 0, bytes).unwrap());
    let userfaultfd = File::options().read(true).write(true).open("/dev/userfaultfd").unwrap();
    memory
        .attach(Mapping {
            userfaultfd: kernel::new_userfaultfd(&userfaultfd).unwrap(),
            pid: std::process::id(),
            address: guest.span().address() as u64,
            incoming: true,
            adopted: false,
            track: true,
        })
        .unwrap();
    (memory, guest)
}

#[test]
fn requests_in_absent_pages_demand_them_and_nothing_is_ever_read_as_zeros() {
    let outcome = moved_with_requests_in_its_rings(true);
    assert_eq!(outcome.mismatches, 0);
    assert!(outcome.demanded > 100, "{} pages were brought", outcome.demanded);
    let mut unreported = outcome.changed.clone();
    unreported.subtract(&outcome.written);
    assert_eq!(unreported.ranges().collect::<Vec<_>>(), [], "changed pages that were not reported");
}

#[test]
fn without_the_pager_the_same_requests_go_wrong() {
    assert!(moved_with_requests_in_its_rings(false).mismatches > 0, "or the test proves nothing");
}

#[test]
fn a_server_that_stops_ends_the_wait_for_a_page_that_never_comes() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("source"), dir.path().join("destination"));
    let disk = Plain::new(DISK, false);
    let options = ClientOptions { slot_bytes: 4096, ..ClientOptions::default() };
    let bytes = VhostClient::bytes(&options);
    let file = sys::scratch(&[]).unwrap();
    file.set_len(bytes).unwrap();
    let server = VhostServer::start(&old, disk.clone(), VhostOptions::default()).unwrap();
    assert!(!server.is_at_rest(), "nobody is connected");
    let mut source = VhostClient::connect_with(&old, options, file.try_clone().unwrap()).unwrap();
    assert_eq!(source.queues[0].call(Ask::Read, 0, &mut [0; 512]).unwrap(), 0);
    assert!(!server.is_at_rest(), "its ring runs");
    source.stop_queue(0).unwrap();
    assert!(server.comes_to_rest(LIMIT));
    let slot = source.queues[0].take_slot().unwrap();
    source.queues[0].fill(slot, &[0xee; 4096]);
    source.queues[0].submit(slot, Ask::Read, 0, 512);
    server.stop(LIMIT).unwrap();

    let (memory, guest) = arriving(bytes);
    // The peer has everything but the pages that the request's data lie in.
    let count = bytes / PAGE as u64;
    let mut image = vec![0; bytes as usize];
    file.read_exact_at(&mut image, 0).unwrap();
    let (demand, demands) = mpsc::channel::<BlockRange>();
    let demand = Box::new(move |range| {
        // It fails when the test is over.
        let _ = demand.send(range);
    });
    memory.arm(&BlockSet::full(count), demand).unwrap();
    let (ask, asked) = mpsc::channel();
    thread::spawn({
        let memory = Arc::downgrade(&memory);
        move || {
            for block in demands.iter().flat_map(|range| range.chunks(1)) {
                let page = &image[block.start.0 as usize * PAGE..][..PAGE];
                if page.windows(64).any(|bytes| bytes == [0xee; 64]) {
                    ask.send(()).unwrap();
                    continue;
                }
                let Some(memory) = memory.upgrade() else { return };
                memory.fill(block.start, page).unwrap();
            }
        }
    });
    let machine = Arc::new(Machine {
        memory: memory.clone(),
        touched: Mutex::new(BlockSet::new(count)),
        written: Mutex::new(BlockSet::new(count)),
    });
    let pages = Some(machine as Arc<dyn GuestPages>);
    let server =
        VhostServer::start(&new, disk, VhostOptions { pages, ..VhostOptions::default() }).unwrap();
    let Ok(mut client) = source.moved_to(&new, memory.file().try_clone().unwrap(), &guest) else {
        panic!("the destination's server refuses the rings");
    };
    asked.recv_timeout(LIMIT).unwrap();
    assert!(!server.is_at_rest(), "a request is in hand");
    server.stop(LIMIT).unwrap();
    assert!(client.queues[0].poll().is_none(), "the request is left to the next daemon");
    memory.detach();
}
