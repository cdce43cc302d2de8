//! The queue of one device.

use super::{
    Class, Heat,
    heat::{Buckets, CHUNK, chunks, overlap},
};
use crate::block::{BlockIndex, BlockRange, BlockSet};
use std::{collections::VecDeque, fmt};

/// Blocks of one device that are to be sent (or fetched), and which of them is next.
pub struct Order {
    heat: Heat,
    demand: Line,
    prefetch: Line,
    dirty: Shelf,
    bulk: Shelf,
    steps: u64,
}

/// Blocks in the order in which they were asked for.
#[derive(Debug)]
struct Line {
    set: BlockSet,
    ranges: VecDeque<BlockRange>,
}

/// Blocks by volatility.
struct Shelf {
    set: BlockSet,
    buckets: Buckets,
}

impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Order")
            .field("demand", &self.demand)
            .field("prefetch", &self.prefetch)
            .field("dirty", &self.dirty.set)
            .field("bulk", &self.bulk.set)
            .finish_non_exhaustive()
    }
}

impl Order {
    /// An empty queue; `heat` is what is known of the device's volatility.
    #[must_use]
    pub fn new(blocks: u64, heat: Heat) -> Self {
        debug_assert_eq!(heat.chunks() as u64, blocks.div_ceil(CHUNK));
        let line = || Line { set: BlockSet::new(blocks), ranges: VecDeque::new() };
        let shelf = || Shelf { set: BlockSet::new(blocks), buckets: Buckets::new(heat.chunks()) };
        let (demand, prefetch, dirty, bulk) = (line(), line(), shelf(), shelf());
        Self { heat, demand, prefetch, dirty, bulk, steps: 0 }
    }

    /// How many blocks wait.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.demand.set.len() + self.prefetch.set.len() + self.dirty.set.len() + self.bulk.set.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many blocks of a class wait.
    #[must_use]
    pub fn len_of(&self, class: Class) -> u64 {
        self.set(class).len()
    }

    /// The most urgent class in which something waits.
    #[must_use]
    pub fn most_urgent(&self) -> Option<Class> {
        Class::ALL.into_iter().find(|class| !self.set(*class).is_empty())
    }

    /// The class in which a block waits.
    #[must_use]
    pub fn class_of(&self, block: BlockIndex) -> Option<Class> {
        Class::ALL.into_iter().find(|class| self.set(*class).contains(block))
    }

    fn set(&self, class: Class) -> &BlockSet {
        match class {
            Class::Demand => &self.demand.set,
            Class::Prefetch => &self.prefetch.set,
            Class::Dirty => &self.dirty.set,
            Class::Bulk => &self.bulk.set,
        }
    }

    /// Puts blocks in. Those that wait already keep their place, or move up if `class` is more
    /// urgent.
    pub fn insert(&mut self, class: Class, range: BlockRange) {
        match class {
            Class::Demand => {
                self.prefetch.set.remove_range(range);
                self.dirty.set.remove_range(range);
                self.bulk.set.remove_range(range);
                self.demand.add(range);
            }
            Class::Prefetch => {
                self.dirty.set.remove_range(range);
                self.bulk.set.remove_range(range);
                for free in outside(&self.demand.set, range) {
                    self.prefetch.add(free);
                }
            }
            Class::Dirty | Class::Bulk => self.shelve(class, range),
        }
    }

    fn shelve(&mut self, class: Class, range: BlockRange) {
        let (shelf, other) = match class {
            Class::Dirty => (&mut self.dirty, &mut self.bulk),
            _ => (&mut self.bulk, &mut self.dirty),
        };
        if class == Class::Dirty {
            other.set.remove_range(range);
        }
        let urgent = self.demand.set.intersects(range) || self.prefetch.set.intersects(range);
        if !urgent && (class == Class::Dirty || !other.set.intersects(range)) {
            shelf.add(range, &self.heat);
            return;
        }
        for part in outside(&self.demand.set, range) {
            for part in outside(&self.prefetch.set, part) {
                if class == Class::Dirty {
                    shelf.add(part, &self.heat);
                    continue;
                }
                for part in outside(&other.set, part) {
                    shelf.add(part, &self.heat);
                }
            }
        }
    }

    /// What waits of `range` in a less urgent class will probably be needed soon.
    pub fn promote(&mut self, range: BlockRange) {
        let waiting: Vec<BlockRange> =
            self.dirty.set.ranges_in(range).chain(self.bulk.set.ranges_in(range)).collect();
        waiting.into_iter().for_each(|part| self.insert(Class::Prefetch, part));
    }

    /// Takes blocks out, in whatever class they wait.
    pub fn remove(&mut self, range: BlockRange) {
        self.demand.set.remove_range(range);
        self.prefetch.set.remove_range(range);
        self.dirty.set.remove_range(range);
        self.bulk.set.remove_range(range);
    }

    /// Blocks were written: they are the more volatile.
    pub fn wrote(&mut self, range: BlockRange) {
        let end = self.heat.chunks();
        for chunk in chunks(range).take_while(|chunk| (*chunk as usize) < end) {
            self.heat.wrote_in(chunk, overlap(range, chunk));
            for shelf in [&mut self.dirty, &mut self.bulk] {
                if shelf.buckets.contains(chunk) {
                    shelf.buckets.remove(chunk);
                    shelf.buckets.insert(chunk, &self.heat);
                }
            }
        }
    }

    /// A half-life has passed.
    pub fn tick(&mut self) {
        self.heat.tick();
    }

    /// What is known of the device's volatility, for the next move.
    #[must_use]
    pub fn heat(&self) -> &Heat {
        &self.heat
    }

    /// Takes the next run out: at most `max` neighbouring blocks of one class.
    pub fn next(&mut self, max: u64) -> Option<(Class, BlockRange)> {
        debug_assert!(max > 0);
        if let Some(range) = self.demand.take(max, &mut self.steps) {
            return Some((Class::Demand, range));
        }
        if let Some(range) = self.prefetch.take(max, &mut self.steps) {
            return Some((Class::Prefetch, range));
        }
        if let Some(range) = self.dirty.take(max, &self.heat, &mut self.steps) {
            return Some((Class::Dirty, range));
        }
        self.bulk.take(max, &self.heat, &mut self.steps).map(|range| (Class::Bulk, range))
    }

    /// How many list entries and words [`Order::next`] has looked at so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }
}

impl Line {
    fn add(&mut self, range: BlockRange) {
        for free in outside(&self.set, range) {
            self.set.insert_range(free);
            self.ranges.push_back(free);
        }
    }

    fn take(&mut self, max: u64, steps: &mut u64) -> Option<BlockRange> {
        while let Some(range) = self.ranges.pop_front() {
            *steps += 1;
            // What was taken out meanwhile is no longer in the set.
            let Some(run) = self.set.ranges_in(range).next() else { continue };
            let run = BlockRange::new(run.start.0, run.count.min(max));
            self.set.remove_range(run);
            if run.end() < range.end() {
                self.ranges.push_front(BlockRange::new(run.end(), range.end() - run.end()));
            }
            return Some(run);
        }
        None
    }
}

impl Shelf {
    fn add(&mut self, range: BlockRange, heat: &Heat) {
        self.set.insert_range(range);
        for chunk in chunks(range).take_while(|chunk| (*chunk as usize) < heat.chunks()) {
            self.buckets.insert(chunk, heat);
        }
    }

    fn take(&mut self, max: u64, heat: &Heat, steps: &mut u64) -> Option<BlockRange> {
        while let Some(chunk) = self.buckets.coldest(heat, steps) {
            *steps += 1;
            let whole = BlockRange::new(chunk * CHUNK, CHUNK);
            let Some(run) = self.set.ranges_in(whole).next() else {
                // Its blocks were taken out one by one; paid for by what put it in.
                self.buckets.remove(chunk);
                continue;
            };
            let mut run = BlockRange::new(run.start.0, run.count.min(max));
            let bucket = heat.bucket(chunk);
            let mut at = chunk;
            while run.count < max && run.end() == (at + 1) * CHUNK {
                at += 1;
                if at as usize >= heat.chunks()
                    || !self.buckets.contains(at)
                    || heat.bucket(at) != bucket
                {
                    break;
                }
                *steps += 1;
                let whole = BlockRange::new(at * CHUNK, CHUNK);
                match self.set.ranges_in(whole).next() {
                    Some(more) if more.start.0 == run.end() => {
                        run.count = (run.count + more.count).min(max);
                    }
                    _ => break,
                }
            }
            self.set.remove_range(run);
            for chunk in chunks(run) {
                if !self.set.intersects(BlockRange::new(chunk * CHUNK, CHUNK)) {
                    self.buckets.remove(chunk);
                }
            }
            return Some(run);
        }
        None
    }
}

/// The parts of `range` that are not in `set`, cut at the end of the device.
fn outside(set: &BlockSet, range: BlockRange) -> Vec<BlockRange> {
    let end = range.end().min(set.device_blocks());
    let (mut at, mut parts) = (range.start.0, Vec::new());
    for taken in set.ranges_in(range) {
        if taken.start.0 > at {
            parts.push(BlockRange::new(at, taken.start.0 - at));
        }
        at = taken.end();
    }
    if at < end {
        parts.push(BlockRange::new(at, end - at));
    }
    parts
}
