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
    sync::{Arc, Mutex, atomic::Ordering, mpsc},
    thread,
    time::Duration,
};

const PAGE: usize = BLOCK_SIZE;
const DISK: u64 = 4 << 20;

/// Brings a page by touching it where the monitor maps it: that faults, and the memory's own fault
/// thread asks the peer.
struct Touch {
    guest: Arc<Shared>,
    touched: Mutex<BlockSet>,
    written: Mutex<BlockSet>,
}

fn pages(range: GuestRange) -> std::ops::Range<u64> {
    range.offset / PAGE as u64..(range.offset + range.length).div_ceil(PAGE as u64)
}

impl GuestPages for Touch {
    fn make_present(&self, range: GuestRange) -> io::Result<()> {
        for page in pages(range) {
            // The load that faults.
            self.guest.span().u8_at(page as usize * PAGE).load(Ordering::SeqCst);
            self.touched.lock().unwrap().insert(BlockIndex(page));
        }
        Ok(())
    }

    fn wrote(&self, range: GuestRange) {
        for page in pages(range) {
            self.written.lock().unwrap().insert(BlockIndex(page));
        }
    }
}

struct Outcome {
    /// Reads that delivered something else, and writes that stored something else.
    mismatches: usize,
    demanded: u64,
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
    let blocks = bytes / PAGE as u64;
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
    let mut missing = BlockSet::new(blocks);
    missing.insert_range(BlockRange::new(0, blocks));
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
    let touch = Arc::new(Touch {
        guest: guest.clone(),
        touched: Mutex::new(BlockSet::new(blocks)),
        written: Mutex::new(BlockSet::new(blocks)),
    });
    let pages = with_pager.then(|| touch.clone() as Arc<dyn GuestPages>);
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
    let (mut changed, mut ours, mut theirs) = (BlockSet::new(blocks), [0; PAGE], [0; PAGE]);
    for page in 0..blocks {
        guest.span().part(page as usize * PAGE, PAGE).copy_to(&mut ours);
        image.read_exact_at(&mut theirs, page * PAGE as u64).unwrap();
        if ours != theirs {
            changed.insert(BlockIndex(page));
        }
    }
    let demanded = touch.touched.lock().unwrap().len();
    let written = touch.written.lock().unwrap().clone();
    memory.detach();
    Outcome { mismatches, demanded, written, changed }
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
