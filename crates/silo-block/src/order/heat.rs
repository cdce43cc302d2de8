//! How volatile the chunks of a device are: decaying counts of writes, and chunks kept in buckets
//! by them.
//!
//! A count that halves with every tick would have to be halved everywhere. Instead new writes count
//! double with every tick, and the logarithm of the sum is kept: all counts decay together, so
//! their order, and the bucket of a chunk, change only when that chunk is written. What has cooled
//! down for [`HORIZON`] ticks joins the static chunks by hanging its whole bucket onto theirs.

use crate::block::BlockRange;

/// Blocks in a chunk: the unit of volatility, and one word of a set.
pub(super) const CHUNK: u64 = 64;
/// Ticks after which a write no longer matters.
const HORIZON: i64 = 24;
/// One for static chunks, and a ring for the others.
const BUCKETS: usize = 64;
const RING: i64 = BUCKETS as i64 - 1;
/// A chunk's score is at most so much above the tick: keeps the ring from meeting its own tail.
const CEILING: f32 = 32.0;

/// How often the chunks of a device were written lately. Kept by whoever tracks a device, also
/// before a move begins.
#[derive(Clone, Debug)]
pub struct Heat {
    tick: i64,
    /// Per chunk the logarithm of its decaying count, relative to tick 0.
    scores: Vec<f32>,
}

impl Heat {
    /// A device of `blocks` blocks, nothing written.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self { tick: 0, scores: vec![f32::NEG_INFINITY; blocks.div_ceil(CHUNK) as usize] }
    }

    /// A half-life has passed: what was written before counts half. After 8 million ticks the
    /// resolution of the counts ends.
    pub fn tick(&mut self) {
        self.tick += 1;
    }

    /// Blocks were written.
    pub fn wrote(&mut self, range: BlockRange) {
        for chunk in chunks(range) {
            self.wrote_in(chunk, overlap(range, chunk));
        }
    }

    pub(super) fn wrote_in(&mut self, chunk: u64, blocks: u64) {
        let Some(score) = self.scores.get_mut(chunk as usize) else { return };
        let new = self.tick as f32 + (blocks.max(1) as f32).log2();
        let (high, low) = if *score > new { (*score, new) } else { (new, *score) };
        let sum = high + (low - high).exp2().ln_1p() * std::f32::consts::LOG2_E;
        *score = sum.min(self.tick as f32 + CEILING);
    }

    pub(super) fn chunks(&self) -> usize {
        self.scores.len()
    }

    pub(super) fn now(&self) -> i64 {
        self.tick
    }

    /// The bucket that a chunk belongs to now.
    pub(super) fn bucket(&self, chunk: u64) -> usize {
        let floor = self.scores[chunk as usize].floor();
        if floor < (self.tick - HORIZON) as f32 { 0 } else { ring(floor as i64) }
    }
}

/// The chunks that a range touches.
pub(super) fn chunks(range: BlockRange) -> impl Iterator<Item = u64> {
    let end = if range.count == 0 { 0 } else { range.end().div_ceil(CHUNK) };
    range.start.0 / CHUNK..end
}

/// How many blocks of a range are in a chunk.
pub(super) fn overlap(range: BlockRange, chunk: u64) -> u64 {
    range.end().min((chunk + 1) * CHUNK) - range.start.0.max(chunk * CHUNK)
}

fn ring(floor: i64) -> usize {
    1 + floor.rem_euclid(RING) as usize
}

const NONE: u32 = u32::MAX;

/// Chunks in buckets: doubly linked lists through two arrays, each with a head of its own behind
/// the chunks, so that a chunk leaves a list without knowing which one it is in.
pub(super) struct Buckets {
    next: Vec<u32>,
    prev: Vec<u32>,
    /// Lists that may have chunks in them.
    filled: u64,
    /// Up to which tick cooled buckets were joined to the static one.
    joined: i64,
    chunks: usize,
}

impl Buckets {
    pub(super) fn new(chunks: usize) -> Self {
        let mut links = vec![NONE; chunks];
        links.extend((chunks..chunks + BUCKETS).map(|head| head as u32));
        Self { prev: links.clone(), next: links, filled: 0, joined: 0, chunks }
    }

    pub(super) fn contains(&self, chunk: u64) -> bool {
        self.next[chunk as usize] != NONE
    }

    /// Adds a chunk at the end of its bucket; one that is in already stays where it is.
    pub(super) fn insert(&mut self, chunk: u64, heat: &Heat) {
        if self.contains(chunk) {
            return;
        }
        self.cool(heat);
        let bucket = heat.bucket(chunk);
        let head = (self.chunks + bucket) as u32;
        let last = self.prev[head as usize];
        self.link(last, chunk as u32);
        self.link(chunk as u32, head);
        self.filled |= 1 << bucket;
    }

    pub(super) fn remove(&mut self, chunk: u64) {
        let at = chunk as usize;
        if self.next[at] == NONE {
            return;
        }
        self.link(self.prev[at], self.next[at]);
        self.next[at] = NONE;
        self.prev[at] = NONE;
    }

    /// The coldest chunk; it stays in.
    pub(super) fn coldest(&mut self, heat: &Heat, steps: &mut u64) -> Option<u64> {
        self.cool(heat);
        while self.filled != 0 {
            *steps += 1;
            let bucket = self.lowest(heat);
            let first = self.next[self.chunks + bucket];
            if (first as usize) < self.chunks {
                return Some(u64::from(first));
            }
            self.filled &= !(1 << bucket);
        }
        None
    }

    /// The coldest list that may have chunks: static, then from the horizon up around the ring.
    fn lowest(&self, heat: &Heat) -> usize {
        if self.filled & 1 == 1 {
            return 0;
        }
        let from = u64::MAX << ring(heat.now() - HORIZON);
        let ahead = self.filled & from;
        (if ahead == 0 { self.filled } else { ahead }).trailing_zeros() as usize
    }

    /// Hangs the lists that have passed the horizon onto the static one. A constant amount of work
    /// for each tick, at most once around the ring.
    fn cool(&mut self, heat: &Heat) {
        let behind = (heat.now() - self.joined).min(RING);
        for age in (0..behind).rev() {
            let bucket = ring(heat.now() - age - HORIZON - 1);
            let (head, cold) = ((self.chunks + bucket) as u32, self.chunks as u32);
            let (first, last) = (self.next[head as usize], self.prev[head as usize]);
            if first != head {
                let end = self.prev[cold as usize];
                self.link(end, first);
                self.link(last, cold);
                self.link(head, head);
                self.filled |= 1;
            }
            self.filled &= !(1 << bucket);
        }
        self.joined = heat.now();
    }

    fn link(&mut self, left: u32, right: u32) {
        self.next[left as usize] = right;
        self.prev[right as usize] = left;
    }
}
