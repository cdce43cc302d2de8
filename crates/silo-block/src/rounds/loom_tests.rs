//! Every interleaving of writers with whoever closes rounds, by loom, over the lines that run in
//! production (only the atomics are loom's).

use super::{
    Core,
    gate::{Gate, Word},
};
use crate::block::{BlockIndex, BlockRange, BlockSet};
use loom::sync::{
    Arc,
    atomic::{AtomicU32, Ordering, fence},
};

impl Word for AtomicU32 {
    fn new(value: u32) -> Self {
        AtomicU32::new(value)
    }

    fn load(&self, order: Ordering) -> u32 {
        self.load(order)
    }

    fn store(&self, value: u32, order: Ordering) {
        self.store(value, order);
    }

    fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
        self.fetch_add(value, order)
    }

    fn fetch_sub(&self, value: u32, order: Ordering) -> u32 {
        self.fetch_sub(value, order)
    }

    fn fetch_max(&self, value: u32, order: Ordering) -> u32 {
        self.fetch_max(value, order)
    }

    fn replace(&self, current: u32, new: u32, order: Ordering) {
        // Whoever was faster has made it newer.
        let _ = self.compare_exchange(current, new, order, Ordering::Relaxed);
    }

    fn barrier() {
        fence(Ordering::SeqCst);
    }
}

/// Loom bounds how often a thread loses its turn for nothing, as its documentation advises: two or
/// three finds nearly all there is, and three takes ten times as long here.
fn explore(body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(body);
}

struct Device {
    core: Core<AtomicU32>,
    content: AtomicU32,
}

impl Device {
    fn new() -> Arc<Self> {
        Arc::new(Self { core: Core::new(1, 2), content: AtomicU32::new(0) })
    }

    /// Writes `value` into the one block; gives the round.
    fn write(&self, thread: usize, value: u32) -> u32 {
        let (epoch, place) = self.core.gate.enter(thread);
        self.core.stamp(BlockRange::new(0, 1), epoch);
        self.content.fetch_add(value, Ordering::Relaxed);
        self.core.gate.leave(epoch, place);
        epoch
    }

    fn close(&self) -> u32 {
        let open = self.core.gate.clock();
        self.core.gate.open(open + 1);
        while self.core.gate.writers(open) != 0 {
            loom::thread::yield_now();
        }
        open
    }

    fn dirty(&self, after: u32, upto: u32) -> bool {
        let mut set = BlockSet::new(1);
        self.core.between(after, upto, &mut set);
        set.contains(BlockIndex(0))
    }
}

#[test]
fn every_write_is_in_the_round_that_it_says_and_done_when_that_round_ends() {
    explore(|| {
        let device = Device::new();
        let writers: Vec<_> = [1u32, 16]
            .into_iter()
            .enumerate()
            .map(|(thread, value)| {
                let device = Arc::clone(&device);
                loom::thread::spawn(move || (value, device.write(thread, value)))
            })
            .collect();
        let first = device.close();
        let (listed, copy) = (device.dirty(0, first), device.content.load(Ordering::Relaxed));
        let newer = device.dirty(first, u32::MAX);
        let mut in_first = 0;
        let mut in_second = 0;
        for writer in writers {
            let (value, epoch) = writer.join().unwrap();
            *(if epoch <= first { &mut in_first } else { &mut in_second }) += value;
        }
        // All that is in the round was in the copy, whatever else had begun to be.
        for value in [1, 16] {
            assert!(in_first & value == 0 || copy & value != 0, "a write of the round is missing");
        }
        assert!(!listed || in_first != 0, "listed without a write in the round");
        assert!(in_first == 0 || listed || newer, "a write of the round is in no list");
        let second = device.close();
        assert_eq!(device.dirty(first, second), in_second != 0, "the second round is exact");
        assert_eq!(device.content.load(Ordering::Relaxed), 17);
    });
}

#[test]
fn a_write_after_another_is_never_in_an_earlier_round() {
    explore(|| {
        let device = Device::new();
        let closer = {
            let device = Arc::clone(&device);
            loom::thread::spawn(move || device.close())
        };
        let first = device.write(0, 1);
        let other = Arc::clone(&device);
        let second = loom::thread::spawn(move || other.write(1, 2)).join().unwrap();
        assert!(second >= first);
        closer.join().unwrap();
    });
}

/// The same gate without the second look at the clock. Loom must find the write that is lost, or
/// the tests above prove nothing.
#[test]
#[should_panic(expected = "a write of the round is missing")]
fn loom_finds_a_gate_that_does_not_look_twice() {
    explore(|| {
        let gate = Arc::new((Gate::<AtomicU32>::new(1, 1), AtomicU32::new(0)));
        let writer = {
            let gate = Arc::clone(&gate);
            loom::thread::spawn(move || {
                let clock = gate.0.clock();
                // What `enter` does, less the check.
                let place = gate.0.enter_unchecked(clock);
                gate.1.store(1, Ordering::Relaxed);
                gate.0.leave(clock, place);
                clock
            })
        };
        let open = gate.0.clock();
        gate.0.open(open + 1);
        while gate.0.writers(open) != 0 {
            loom::thread::yield_now();
        }
        let copy = gate.1.load(Ordering::Relaxed);
        let epoch = writer.join().unwrap();
        assert!(epoch > open || copy == 1, "a write of the round is missing");
    });
}

/// A device that is about to leave: writers are told to stop, then its last round ends, and its list is
/// all that anybody will ever hear of. `looks_first` is what `Rounds::write_if` does; the other order
/// stamps and then looks.
fn the_last_list_has_every_write(looks_first: bool) {
    explore(move || {
        let device = Device::new();
        let stopped = Arc::new(AtomicU32::new(0));
        let writer = {
            let (device, stopped) = (Arc::clone(&device), Arc::clone(&stopped));
            loom::thread::spawn(move || {
                let mut done = 0;
                for _ in 0..2 {
                    let (epoch, place) = device.core.gate.enter(0);
                    let stamp = || device.core.stamp(BlockRange::new(0, 1), epoch);
                    if !looks_first {
                        stamp();
                    }
                    // The volume's mode is read with SeqCst, which loom takes for less.
                    fence(Ordering::SeqCst);
                    if stopped.load(Ordering::SeqCst) == 0 {
                        if looks_first {
                            stamp();
                        }
                        device.content.fetch_add(1, Ordering::Relaxed);
                        done += 1;
                    }
                    device.core.gate.leave(epoch, place);
                }
                done
            })
        };
        stopped.store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let last = device.close();
        let copy = device.content.load(Ordering::Relaxed);
        let done = writer.join().unwrap();
        assert_eq!(copy, done, "a write after the last round");
        assert_eq!(device.dirty(0, last), done > 0, "the last list is not what was written");
    });
}

#[test]
fn a_writer_that_is_stopped_leaves_no_mark_and_the_last_list_is_exact() {
    the_last_list_has_every_write(true);
}

#[test]
#[should_panic(expected = "the last list is not what was written")]
fn loom_finds_the_write_that_a_mark_of_a_stopped_writer_hides() {
    the_last_list_has_every_write(false);
}

impl Gate<AtomicU32> {
    fn enter_unchecked(&self, clock: u32) -> usize {
        self.count_in(clock, 0);
        0
    }
}
