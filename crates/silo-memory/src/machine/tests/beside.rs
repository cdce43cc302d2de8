//! Somebody beside the guest: a second mapping of the memfd in this process plays the server of a
//! disk.

use super::*;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

const SOON: Duration = Duration::from_secs(20);

/// The other mapping.
struct Server {
    map: sys::SharedMap,
    memory: Arc<Memory>,
}

impl Server {
    fn of(guest: &Guest) -> Self {
        let bytes = BLOCKS as usize * BLOCK_SIZE;
        let map = sys::SharedMap::new(guest.memory.file(), bytes, true).unwrap();
        Self { map, memory: Arc::clone(&guest.memory) }
    }

    /// One of the 1024 numbers of a block.
    fn number(&self, block: u64, number: usize) -> &AtomicU32 {
        assert!(block < BLOCKS && number < 1024);
        let at = block as usize * BLOCK_SIZE + 4 * number;
        // SAFETY: inside the mapping, aligned; those who change it meanwhile do so by atomics.
        unsafe { AtomicU32::from_ptr(self.map.base().as_ptr().add(at).cast()) }
    }

    fn load(&self, block: u64) -> u32 {
        self.number(block, 0).load(Ordering::SeqCst)
    }

    /// As a disk's server does it.
    fn add(&self, block: u64, number: usize) {
        let range = BlockRange::new(block, 1);
        if !self.memory.is_present(range) {
            self.memory.make_present(range, SOON).unwrap();
        }
        self.number(block, number).fetch_add(1, Ordering::SeqCst);
        self.memory.note_written(range);
    }
}

/// Blocks of a peer, each full of its own byte, and a thread that answers demands from there.
fn arm_with_peer(guest: &Guest, missing: &BlockSet) -> mpsc::Receiver<BlockRange> {
    let (ask, asked) = mpsc::channel::<BlockRange>();
    let (note, noted) = mpsc::channel();
    let demand = Box::new(move |range| {
        // It fails when the test is over.
        let _ = ask.send(range);
    });
    guest.memory.arm(missing, demand).unwrap();
    let memory = Arc::downgrade(&guest.memory);
    thread::spawn(move || {
        for range in asked {
            let _ = note.send(range);
            let bytes: Vec<u8> =
                (range.start.0..range.end()).flat_map(|block| [block as u8; BLOCK_SIZE]).collect();
            let Some(memory) = memory.upgrade() else { return };
            memory.fill(range.start, &bytes).unwrap();
        }
    });
    noted
}

#[test]
fn what_is_touched_beside_the_guest_is_brought_first_and_what_is_written_there_is_dirty() {
    let guest = Guest::start(true);
    let server = Server::of(&guest);
    let noted = arm_with_peer(&guest, &set(40..60));
    let range = BlockRange::new(38, 5);
    assert!(!guest.memory.is_present(range));
    guest.memory.make_present(range, SOON).unwrap();
    assert!(guest.memory.is_present(range));
    assert_eq!(noted.recv().unwrap(), BlockRange::new(40, 3), "asked for in one go");
    assert_eq!(server.load(41), 0x2929_2929);
    assert_eq!(server.load(39), 0, "what was zero is a page of zeros");
    assert_eq!(guest.memory.allocated().unwrap(), set(38..43));
    assert_eq!(guest.memory.take_dirty().unwrap(), set([]), "nobody has written yet");

    server.add(41, 0);
    server.add(39, 0);
    server.add(50, 0);
    assert_eq!(guest.memory.take_dirty().unwrap(), set([39, 41, 50]));
    assert_eq!(guest.memory.take_dirty().unwrap(), set([]));
    assert_eq!((guest.read(41), guest.read(39), guest.read(50)), (0x2a, 1, 51));
    // Pages made beside the guest are protected like all others.
    for block in [38, 39, 40, 42] {
        guest.write(block, 9);
    }
    assert_eq!(guest.memory.take_dirty().unwrap(), set([38, 39, 40, 42]));
    guest.memory.note_written(BlockRange::new(BLOCKS - 1, 5));
    assert_eq!(guest.memory.take_dirty().unwrap(), set([BLOCKS - 1]), "beyond the end is nothing");
}

#[test]
fn without_that_a_missing_block_is_zeros_for_ever_and_a_write_is_seen_by_nobody() {
    let guest = Guest::start(true);
    let server = Server::of(&guest);
    let noted = arm_with_peer(&guest, &set([7, 8]));
    assert_eq!(server.load(7), 0, "the load made a page");
    assert_eq!(guest.read(7), 0, "the guest does not fault, and reads what never was");
    assert!(noted.try_recv().is_err(), "nobody asked the peer");
    guest.memory.make_present(BlockRange::new(8, 1), SOON).unwrap();
    server.number(8, 0).store(1, Ordering::SeqCst);
    assert_eq!(guest.memory.take_dirty().unwrap(), set([]), "a store without a note is lost");
}

#[test]
fn at_a_machine_that_began_here_every_page_may_be_touched_and_writes_are_noted_too() {
    let guest = Guest::start(false);
    let server = Server::of(&guest);
    guest.write(3, 3);
    guest.memory.start_tracking().unwrap();
    assert!(guest.memory.is_present(BlockRange::new(0, BLOCKS)));
    server.add(3, 1);
    server.add(2000, 0);
    assert_eq!(guest.memory.take_dirty().unwrap(), set([3, 2000]));
    // A failed round gives back what was noted as well.
    server.add(5, 0);
    let taken = guest.memory.take_dirty().unwrap();
    guest.memory.put_back(&taken);
    assert_eq!(guest.memory.take_dirty().unwrap(), set([5]));
    server.add(6, 0);
    guest.memory.start_tracking().unwrap();
    assert_eq!(guest.memory.take_dirty().unwrap(), set([]), "tracking begins anew");
    assert!(guest.memory.make_present(BlockRange::new(BLOCKS - 1, 2), SOON).is_err());
}

#[test]
fn before_it_has_arrived_nothing_can_be_had_and_a_stay_forgets_what_it_knew_of_pages() {
    let guest = Guest::start(true);
    let early = guest.memory.make_present(BlockRange::new(1, 1), SOON).unwrap_err();
    assert!(early.to_string().contains("has not arrived"), "{early}");
    assert!(!guest.memory.is_present(BlockRange::new(1, 1)));
    guest.memory.arm(&set([]), no_demand()).unwrap();
    Server::of(&guest).add(1, 0);
    let memory = Arc::clone(&guest.memory);
    drop(guest);
    assert!(memory.make_present(BlockRange::new(1, 1), SOON).is_err(), "no monitor");
    let again = Guest::over(memory, true);
    let noted = arm_with_peer(&again, &set([1]));
    assert!(!again.memory.is_present(BlockRange::new(1, 1)), "that was the stay before");
    again.memory.make_present(BlockRange::new(1, 1), SOON).unwrap();
    assert_eq!(noted.recv().unwrap(), BlockRange::new(1, 1));
    assert_eq!(again.read(1), 1);
}

#[test]
fn a_wait_beside_the_guest_ends_at_its_deadline_and_when_it_is_called_off() {
    let guest = Guest::start(true);
    let (ask, asked) = mpsc::channel();
    guest.memory.arm(&set([4, 5]), Box::new(move |range| ask.send(range).unwrap())).unwrap();
    let late = guest.memory.make_present(BlockRange::new(4, 1), Duration::from_millis(30));
    assert!(late.unwrap_err().to_string().contains("no answer in time"));
    asked.recv_timeout(SOON).unwrap();
    let waiting = thread::spawn({
        let memory = Arc::clone(&guest.memory);
        move || memory.make_present(BlockRange::new(5, 1), SOON)
    });
    asked.recv_timeout(SOON).unwrap();
    guest.memory.interrupt();
    let error = waiting.join().unwrap().unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::Interrupted, "{error}");
}

/// Everything at once: blocks arrive in bulk, twice and on demand, some of them as zeros; the guest
/// and two servers count in numbers of their own of the same blocks; rounds of dirty blocks are
/// copied away meanwhile. Nothing may be lost, neither here nor in the copy.
#[test]
fn nothing_is_lost_between_arrivals_faults_writes_on_both_sides_and_rounds_of_tracking() {
    const STEPS: u64 = 30_000;
    let guest = Arc::new(Guest::start(true));
    // Of four blocks three are missing; of those one is zero at the peer.
    let missing = set((0..BLOCKS).filter(|block| block % 4 != 3));
    let content = |block: u64| match block % 4 {
        2 | 3 => 0,
        _ => block as u8,
    };
    let fill = move |memory: &Memory, range: BlockRange| {
        for block in range.start.0..range.end() {
            match content(block) {
                0 => memory.fill_zero(BlockRange::new(block, 1)).unwrap(),
                byte => memory.fill(BlockIndex(block), &[byte; BLOCK_SIZE]).unwrap(),
            };
        }
    };
    let (ask, asked) = mpsc::channel::<BlockRange>();
    let demand = Box::new(move |range| {
        // It fails when the test is over.
        let _ = ask.send(range);
    });
    guest.memory.arm(&missing, demand).unwrap();
    let answering = thread::spawn({
        let memory = Arc::downgrade(&guest.memory);
        move || {
            for range in asked {
                let Some(memory) = memory.upgrade() else { return };
                fill(&memory, range);
            }
        }
    });
    let over = AtomicBool::new(false);
    let take = |copy: &mut [u8]| {
        let mut dirty = guest.memory.take_dirty().unwrap();
        // One that is just landing can be written already, and is read in a later round.
        let mut landing = guest.memory.missing();
        landing.intersect_with(&dirty);
        guest.memory.put_back(&landing);
        dirty.subtract(&landing);
        for range in dirty.ranges() {
            let at = range.start.offset() as usize;
            let to = &mut copy[at..at + range.bytes() as usize];
            guest.memory.read(range.start, to).unwrap();
        }
    };
    let random = |state: &mut u64| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (*state >> 33) % BLOCKS
    };
    thread::scope(|scope| {
        let writers: Vec<_> = (1..=3usize)
            .map(|who| {
                let guest = &guest;
                scope.spawn(move || {
                    let (server, mut state) = (Server::of(guest), who as u64);
                    let mut counts = vec![0u32; BLOCKS as usize];
                    for _ in 0..STEPS {
                        let block = random(&mut state);
                        counts[block as usize] += 1;
                        if who < 3 {
                            server.add(block, who);
                            continue;
                        }
                        let at = block as usize * BLOCK_SIZE + 4 * who;
                        // SAFETY: inside the guest's mapping, aligned, and only atomics there.
                        let number =
                            unsafe { AtomicU32::from_ptr(guest.base.as_ptr().add(at).cast()) };
                        number.fetch_add(1, Ordering::SeqCst);
                    }
                    counts
                })
            })
            .collect();
        let bulk: Vec<_> = (0..2)
            .map(|_| {
                let guest = &guest;
                scope.spawn(move || {
                    for start in (0..BLOCKS).rev().step_by(8) {
                        fill(&guest.memory, BlockRange::new(start.saturating_sub(7), 8));
                        thread::yield_now();
                    }
                })
            })
            .collect();
        let tracking = scope.spawn(|| {
            let (mut copy, mut rounds) = (vec![0; BLOCKS as usize * BLOCK_SIZE], 0);
            while !over.load(Ordering::SeqCst) {
                take(&mut copy);
                rounds += 1;
            }
            (copy, rounds)
        });
        let counts: Vec<Vec<u32>> = writers.into_iter().map(|w| w.join().unwrap()).collect();
        bulk.into_iter().for_each(|thread| thread.join().unwrap());
        over.store(true, Ordering::SeqCst);
        let (mut copied, rounds) = tracking.join().unwrap();
        take(&mut copied); // the last round, after the last write
        guest.memory.complete().unwrap();
        assert!(rounds > 3, "{rounds} rounds");
        for block in 0..BLOCKS {
            let at = block as usize * BLOCK_SIZE;
            let mut here = vec![0; BLOCK_SIZE];
            guest.memory.read(BlockIndex(block), &mut here).unwrap();
            let mut expected = vec![content(block); BLOCK_SIZE];
            for (who, counts) in counts.iter().enumerate() {
                let number = &mut expected[4 * (who + 1)..4 * (who + 2)];
                let first = u32::from_ne_bytes(number.try_into().unwrap());
                let last = first.wrapping_add(counts[block as usize]);
                number.copy_from_slice(&last.to_ne_bytes());
            }
            assert!(here == expected, "block {block} is not what was written");
            if counts.iter().any(|counts| counts[block as usize] > 0) {
                assert!(copied[at..at + BLOCK_SIZE] == expected, "block {block} in the copy");
            }
        }
    });
    drop(guest);
    answering.join().unwrap();
}
