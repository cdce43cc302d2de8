//! The gate that every write passes: it says under which clock a write happens, and lets whoever
//! ends a round wait for the writes of that round, without a lock on the way of writers.
//!
//! A writer counts itself in at the parity of the clock that it read, then reads the clock again:
//! unchanged means that whoever moves the clock from now on sees the count. Changed means that the
//! round may have been closed without it: it takes itself back and tries again. Both sides write
//! first and read second, so one of them sees the other (Dekker); this needs a total order over
//! the four accesses, which `SeqCst` gives.
//!
//! Counts lie in shards, one a thread as long as there are enough, so that writers do not pull at
//! one cache line. The clock itself is one word: a write that begins after another has ended can
//! never be in an earlier round, on whatever shard.
//!
//! The code is generic over the atomics, so that `loom` runs the same lines (`loom_tests`).

use std::sync::atomic::{AtomicU32, Ordering};

/// An atomic `u32`: the standard library's, or loom's in tests.
pub(super) trait Word: Send + Sync {
    fn new(value: u32) -> Self;
    fn load(&self, order: Ordering) -> u32;
    fn store(&self, value: u32, order: Ordering);
    fn fetch_add(&self, value: u32, order: Ordering) -> u32;
    fn fetch_sub(&self, value: u32, order: Ordering) -> u32;
    fn fetch_max(&self, value: u32, order: Ordering) -> u32;
    /// Puts `new` in place of `current`, if that is still there.
    fn replace(&self, current: u32, new: u32, order: Ordering);
    /// Orders what is before it against what is after it where `SeqCst` accesses do not: loom takes
    /// them for `AcqRel`, so there it is a `SeqCst` fence; else it is nothing.
    fn barrier();
}

impl Word for AtomicU32 {
    fn new(value: u32) -> Self {
        AtomicU32::new(value)
    }

    #[inline]
    fn load(&self, order: Ordering) -> u32 {
        self.load(order)
    }

    #[inline]
    fn store(&self, value: u32, order: Ordering) {
        self.store(value, order);
    }

    #[inline]
    fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
        self.fetch_add(value, order)
    }

    #[inline]
    fn fetch_sub(&self, value: u32, order: Ordering) -> u32 {
        self.fetch_sub(value, order)
    }

    #[inline]
    fn fetch_max(&self, value: u32, order: Ordering) -> u32 {
        self.fetch_max(value, order)
    }

    fn replace(&self, current: u32, new: u32, order: Ordering) {
        // Whoever was faster has made it newer.
        let _ = self.compare_exchange(current, new, order, Ordering::Relaxed);
    }

    #[inline]
    fn barrier() {}
}

/// Writers under way of one shard, by parity of the clock. On a cache line of its own (two, for
/// processors that fetch lines in pairs).
#[repr(align(128))]
struct Shard<W> {
    writers: [W; 2],
}

/// See the module.
pub(super) struct Gate<W> {
    clock: W,
    shards: Box<[Shard<W>]>,
}

impl<W: Word> Gate<W> {
    /// A gate whose clock stands at `clock`. `shards` is a power of two.
    pub(super) fn new(clock: u32, shards: usize) -> Self {
        debug_assert!(shards.is_power_of_two());
        let shard = |_| Shard { writers: [W::new(0), W::new(0)] };
        Self { clock: W::new(clock), shards: (0..shards).map(shard).collect() }
    }

    /// The round that is open.
    #[inline]
    pub(super) fn clock(&self) -> u32 {
        self.clock.load(Ordering::SeqCst)
    }

    /// Lets a writer in; gives the clock that it writes under and its place, for `leave`.
    #[inline]
    pub(super) fn enter(&self, thread: usize) -> (u32, usize) {
        let place = thread & (self.shards.len() - 1);
        loop {
            let clock = self.clock();
            self.count_in(clock, place);
            if self.clock() == clock {
                return (clock, place);
            }
            self.leave(clock, place);
        }
    }

    #[inline]
    pub(super) fn count_in(&self, clock: u32, place: usize) {
        self.shards[place].writers[(clock & 1) as usize].fetch_add(1, Ordering::SeqCst);
        W::barrier();
    }

    /// The writer is done: what it wrote is seen by whoever finds the round idle.
    #[inline]
    pub(super) fn leave(&self, clock: u32, place: usize) {
        self.shards[place].writers[(clock & 1) as usize].fetch_sub(1, Ordering::Release);
    }

    /// Opens round `clock`. One caller at a time, and only when the round before the open one is
    /// idle: it shares its counts with the new one.
    pub(super) fn open(&self, clock: u32) {
        self.clock.store(clock, Ordering::SeqCst);
        W::barrier();
    }

    /// How many writers are inside under `clock` or were on their way in. 0 once after
    /// `open(clock + 1)` means that all writes of that round are done and seen.
    pub(super) fn writers(&self, clock: u32) -> u32 {
        let parity = (clock & 1) as usize;
        self.shards.iter().map(|shard| shard.writers[parity].load(Ordering::SeqCst)).sum()
    }
}
