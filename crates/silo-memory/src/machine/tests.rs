//! Against the running kernel: this process plays the monitor and the guest.

mod beside;
mod copy;
mod watch;

use super::*;
use std::{num::NonZeroUsize, ptr::NonNull, sync::mpsc, thread, time::Duration};

const BLOCKS: u64 = 4096;

/// A mapping of the memory in this process, written and read like a guest would.
struct Guest {
    base: NonNull<u8>,
    memory: Arc<Memory>,
}

// SAFETY: the mapping lives as long as the struct, and the tests touch disjoint blocks or expect
// the races that they make.
unsafe impl Send for Guest {}
// SAFETY: as above.
unsafe impl Sync for Guest {}

impl Guest {
    fn start(incoming: bool) -> Self {
        let memory = Memory::new(DeviceName::new("memory").unwrap(), BLOCKS * 4096).unwrap();
        Self::over(Arc::new(memory), incoming)
    }

    fn over(memory: Arc<Memory>, incoming: bool) -> Self {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        let sharing = if memory.is_copy() { MapFlags::MAP_PRIVATE } else { MapFlags::MAP_SHARED };
        // SAFETY: a fresh mapping of a file that outlives it.
        let base = unsafe {
            mmap(
                None,
                NonZeroUsize::new(BLOCKS as usize * BLOCK_SIZE).unwrap(),
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                sharing,
                memory.file(),
                0,
            )
        }
        .unwrap()
        .cast::<u8>();
        let device = File::options().read(true).write(true).open("/dev/userfaultfd").unwrap();
        let tracking = memory
            .attach(Mapping {
                userfaultfd: sys::new_userfaultfd(&device).unwrap(),
                pid: std::process::id(),
                address: base.as_ptr() as u64,
                incoming,
                adopted: false,
                track: true,
            })
            .unwrap();
        assert_eq!(tracking, Tracking::WriteProtect, "these tests need Linux 6.7 or newer");
        Self { base, memory }
    }

    fn write(&self, block: u64, value: u8) {
        assert!(block < BLOCKS);
        // SAFETY: inside the mapping.
        unsafe { self.base.as_ptr().add(block as usize * BLOCK_SIZE).write_volatile(value) };
    }

    fn read(&self, block: u64) -> u8 {
        assert!(block < BLOCKS);
        // SAFETY: inside the mapping.
        unsafe { self.base.as_ptr().add(block as usize * BLOCK_SIZE).read_volatile() }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.memory.detach();
        // SAFETY: mapped by `over`; no reference into it is left.
        let _ = unsafe { nix::sys::mman::munmap(self.base.cast(), BLOCKS as usize * BLOCK_SIZE) };
    }
}

fn set(blocks: impl IntoIterator<Item = u64>) -> BlockSet {
    let mut set = BlockSet::new(BLOCKS);
    for block in blocks {
        set.insert(BlockIndex(block));
    }
    set
}

fn no_demand() -> Demand {
    Box::new(|range| panic!("unexpected demand for {range:?}"))
}

#[test]
fn tracking_reports_exactly_the_blocks_written_since_the_last_look() {
    let guest = Guest::start(false);
    for block in 0..100 {
        guest.write(block, 1);
    }
    guest.memory.start_tracking().unwrap();
    assert_eq!(guest.memory.take_dirty().unwrap(), set([]));
    let mut random = 12345u64;
    for _ in 0..20 {
        let mut expected = BlockSet::new(BLOCKS);
        for _ in 0..500 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let block = (random >> 33) % BLOCKS;
            guest.write(block, 2);
            expected.insert(BlockIndex(block));
        }
        for block in 0..64 {
            guest.read(block * 61 % BLOCKS);
        }
        assert_eq!(guest.memory.take_dirty().unwrap(), expected);
    }
    guest.memory.put_back(&set([7, 9]));
    guest.write(9, 3);
    guest.write(10, 3);
    assert_eq!(guest.memory.take_dirty().unwrap(), set([7, 9, 10]));
    assert_eq!(guest.memory.take_dirty().unwrap(), set([]));
}

#[test]
fn a_missing_block_stops_its_reader_until_it_is_filled_and_others_go_on() {
    let guest = Arc::new(Guest::start(true));
    let (asked, asks) = mpsc::channel();
    guest.memory.store(BlockIndex(1), &[5; BLOCK_SIZE]).unwrap();
    guest.memory.store(BlockIndex(2), &[6; BLOCK_SIZE]).unwrap();
    guest.memory.arm(&set([2, 3]), Box::new(move |range| asked.send(range).unwrap())).unwrap();
    let reader = thread::spawn({
        let guest = Arc::clone(&guest);
        move || guest.read(2)
    });
    assert_eq!(asks.recv_timeout(Duration::from_secs(60)).unwrap(), BlockRange::new(2, 1));
    assert_eq!(guest.read(1), 5, "what arrived before is there");
    assert_eq!(guest.read(100), 0, "a hole that is not missing is zero");
    assert!(guest.memory.read(BlockIndex(2), &mut [0; BLOCK_SIZE]).is_err());
    assert!(!reader.is_finished());
    assert_eq!(guest.memory.fill(BlockIndex(2), &[7; BLOCK_SIZE]).unwrap(), 1);
    assert_eq!(reader.join().unwrap(), 7, "the stale content of before is gone");
    assert_eq!(guest.memory.fill(BlockIndex(2), &[8; BLOCK_SIZE]).unwrap(), 0, "a late answer");
    assert_eq!(guest.read(2), 7);
    assert!(guest.memory.complete().is_err());
    assert_eq!(guest.memory.fill_zero(BlockRange::new(3, 1)).unwrap(), 1);
    guest.memory.complete().unwrap();
    assert_eq!(guest.read(3), 0);
    let summary = guest.memory.fault_summary();
    assert_eq!(summary.demanded, 1);
    assert!(summary.zero >= 1);
}

#[test]
fn what_is_discarded_early_is_missing_all_the_same_and_so_is_what_was_stored_again_after_it() {
    let guest = Arc::new(Guest::start(true));
    let (asked, asks) = mpsc::channel();
    for block in [4, 5, 6] {
        guest.memory.store(BlockIndex(block), &[1; BLOCK_SIZE]).unwrap();
    }
    guest.memory.discard(BlockRange::new(4, 2)).unwrap();
    assert_eq!(guest.memory.allocated().unwrap(), set([6]), "dropped at once");
    // A source that goes back on its word: the block is stale again.
    guest.memory.store(BlockIndex(5), &[2; BLOCK_SIZE]).unwrap();
    guest.memory.arm(&set([4, 5]), Box::new(move |range| asked.send(range).unwrap())).unwrap();
    for block in [4, 5] {
        let reader = thread::spawn({
            let guest = Arc::clone(&guest);
            move || guest.read(block)
        });
        assert_eq!(asks.recv_timeout(Duration::from_secs(60)).unwrap().start, BlockIndex(block));
        guest.memory.fill(BlockIndex(block), &[9; BLOCK_SIZE]).unwrap();
        assert_eq!(reader.join().unwrap(), 9);
    }
    assert_eq!(guest.read(6), 1);
}

#[test]
fn zero_content_for_a_block_that_somebody_waits_for_arrives() {
    let guest = Arc::new(Guest::start(true));
    let (asked, asks) = mpsc::channel();
    guest.memory.arm(&set([9]), Box::new(move |range| asked.send(range).unwrap())).unwrap();
    let reader = thread::spawn({
        let guest = Arc::clone(&guest);
        move || guest.read(9)
    });
    asks.recv_timeout(Duration::from_secs(60)).unwrap();
    guest.memory.fill_zero(BlockRange::new(0, 64)).unwrap();
    assert_eq!(reader.join().unwrap(), 0);
}

#[test]
fn what_arrives_is_not_dirty_and_what_the_guest_writes_is() {
    let guest = Guest::start(true);
    for block in 0..64 {
        guest.memory.store(BlockIndex(block), &[1; BLOCK_SIZE]).unwrap();
    }
    guest.memory.arm(&set(32..48), no_demand()).unwrap();
    guest.memory.fill(BlockIndex(32), &vec![2; BLOCK_SIZE * 16]).unwrap();
    for block in 0..64 {
        guest.read(block);
    }
    guest.read(200);
    let dirty = guest.memory.take_dirty().unwrap();
    assert_eq!(dirty, set([]), "only reads so far");
    for block in [0, 31, 32, 40, 300] {
        guest.write(block, 9);
    }
    assert_eq!(guest.memory.take_dirty().unwrap(), set([0, 31, 32, 40, 300]));
}

#[test]
fn a_block_written_on_arrival_is_dirty_once_it_has_arrived() {
    let guest = Arc::new(Guest::start(true));
    let (asked, asks) = mpsc::channel();
    guest.memory.arm(&set([4, 5]), Box::new(move |range| asked.send(range).unwrap())).unwrap();
    let writer = thread::spawn({
        let guest = Arc::clone(&guest);
        move || guest.write(4, 9)
    });
    asks.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(guest.memory.take_dirty().unwrap(), set([]), "nothing has been written yet");
    guest.memory.fill(BlockIndex(4), &[1; BLOCK_SIZE * 2]).unwrap();
    writer.join().unwrap();
    assert_eq!(guest.read(4), 9);
    assert_eq!(guest.memory.take_dirty().unwrap(), set([4]));
}

#[test]
fn only_what_holds_content_is_allocated_and_reading_allocates_nothing() {
    let guest = Guest::start(false);
    for block in [0, 1, 2, 1000, BLOCKS - 1] {
        guest.write(block, 1);
    }
    let expected = set([0, 1, 2, 1000, BLOCKS - 1]);
    assert_eq!(guest.memory.allocated().unwrap(), expected);
    let mut buffer = vec![9; BLOCK_SIZE * 64];
    guest.memory.read(BlockIndex(512), &mut buffer).unwrap();
    assert!(silo_block::block::is_zero(&buffer));
    assert_eq!(guest.memory.allocated().unwrap(), expected);
    guest.memory.store_zero(BlockRange::new(0, 2)).unwrap();
    assert_eq!(guest.memory.allocated().unwrap(), set([2, 1000, BLOCKS - 1]));
}

#[test]
fn fills_of_the_same_blocks_from_two_sides_count_once_and_never_overwrite_the_guest() {
    let guest = Arc::new(Guest::start(true));
    guest.memory.arm(&BlockSet::full(BLOCKS), Box::new(|_| {})).unwrap();
    let fill = |value: u8| {
        let guest = Arc::clone(&guest);
        move || {
            (0..BLOCKS / 16)
                .map(|piece| {
                    let data = vec![value; BLOCK_SIZE * 16];
                    guest.memory.fill(BlockIndex(piece * 16), &data).unwrap()
                })
                .sum::<u64>()
        }
    };
    let writer = thread::spawn({
        let guest = Arc::clone(&guest);
        move || {
            for block in 0..BLOCKS {
                guest.write(block, 3);
            }
        }
    });
    let (one, two) = (thread::spawn(fill(1)), thread::spawn(fill(2)));
    let taken = one.join().unwrap() + two.join().unwrap();
    writer.join().unwrap();
    assert_eq!(taken, BLOCKS);
    for block in 0..BLOCKS {
        assert_eq!(guest.read(block), 3, "block {block}");
    }
}

#[test]
fn a_filled_memory_can_be_a_source_and_a_detached_one_a_destination_again() {
    let guest = Guest::start(true);
    guest.memory.store(BlockIndex(1), &[1; BLOCK_SIZE]).unwrap();
    guest.memory.arm(&set([]), no_demand()).unwrap();
    guest.write(5, 5);
    assert_eq!(guest.memory.take_dirty().unwrap(), set([5]));
    let memory = Arc::clone(&guest.memory);
    drop(guest);
    assert!(memory.take_dirty().is_err(), "no monitor");
    let again = Guest::over(memory, true);
    again.memory.store(BlockIndex(6), &[6; BLOCK_SIZE]).unwrap();
    again.memory.arm(&set([]), no_demand()).unwrap();
    assert_eq!((again.read(1), again.read(5), again.read(6)), (1, 5, 6));
    assert_eq!(again.memory.take_dirty().unwrap(), set([]));
}

#[test]
fn a_memory_whose_owner_is_gone_is_adopted_with_its_waiting_guest() {
    let guest = Arc::new(Guest::start(true));
    let (asked, asks) = mpsc::channel();
    guest.memory.store(BlockIndex(1), &[1; BLOCK_SIZE]).unwrap();
    guest.memory.arm(&set([2]), Box::new(move |range| asked.send(range).unwrap())).unwrap();
    let reader = thread::spawn({
        let guest = Arc::clone(&guest);
        move || guest.read(2)
    });
    asks.recv_timeout(Duration::from_secs(60)).unwrap();
    let userfaultfd = {
        let attached = guest.memory.attached.read().unwrap();
        attached.as_ref().unwrap().userfault.as_fd().try_clone_to_owned().unwrap()
    };
    // The owner is gone: its fault thread with it, having taken the fault.
    guest.memory.detach();
    let file = guest.memory.file().try_clone().unwrap();
    let second = Memory::adopt(DeviceName::new("memory").unwrap(), file).unwrap();
    let base = guest.base.as_ptr() as u64;
    second
        .attach(Mapping {
            userfaultfd,
            pid: std::process::id(),
            address: base,
            incoming: true,
            adopted: true,
            track: true,
        })
        .unwrap();
    // The new owner knows of nothing missing, so what is not there is zero.
    assert_eq!(reader.join().unwrap(), 0);
    assert_eq!((guest.read(1), guest.read(900)), (1, 0));
    guest.write(7, 7);
    let dirty = second.take_dirty().unwrap();
    assert!(dirty.contains(BlockIndex(7)) && !dirty.contains(BlockIndex(900)));
    second.detach();
}
