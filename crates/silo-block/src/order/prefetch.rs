//! What faults say about the blocks to come: runs upwards or downwards, strides, and else the
//! neighbourhood.

use crate::block::{BlockIndex, BlockRange};

/// How many sequences of faults are followed at once: programs read several files at a time.
const STREAMS: usize = 8;
/// Farthest two faults of one sequence may lie apart, in blocks.
const REACH: i64 = 512;

#[derive(Clone, Copy, Debug)]
struct Stream {
    last: u64,
    step: i64,
    /// How often the step has repeated.
    hits: u32,
    /// Up to where was asked for already.
    asked: u64,
    used: u64,
}

/// Follows the faults of one device and says what to ask for in advance. Constant memory and time.
#[derive(Clone, Debug)]
pub struct Prefetch {
    blocks: u64,
    window: u64,
    streams: Vec<Stream>,
    clock: u64,
}

impl Prefetch {
    /// For a device of `blocks` blocks; at most `window` blocks are asked for at a time.
    #[must_use]
    pub fn new(blocks: u64, window: u64) -> Self {
        Self { blocks, window, streams: Vec::new(), clock: 0 }
    }

    /// Somebody touched a block that was not here. Gives what will likely be touched next, most
    /// likely first; never the block itself, never past the device.
    pub fn fault(&mut self, block: BlockIndex) -> Vec<BlockRange> {
        self.clock += 1;
        let (clock, at) = (self.clock, block.0);
        let near = |stream: &Stream| (at as i64 - stream.last as i64).abs() <= REACH;
        let expected =
            |stream: &Stream| stream.hits > 0 && at as i64 == stream.last as i64 + stream.step;
        let index = self.streams.iter().position(expected);
        let Some(index) = index.or_else(|| self.streams.iter().position(near)) else {
            self.follow(Stream { last: at, step: 0, hits: 0, asked: at, used: clock });
            return self.around(at);
        };
        let stream = &mut self.streams[index];
        let step = at as i64 - stream.last as i64;
        if step == 0 {
            return Vec::new();
        }
        let again = step == stream.step;
        stream.hits = if again { stream.hits.saturating_add(1) } else { 0 };
        if !again {
            stream.asked = at;
        }
        (stream.last, stream.step, stream.used) = (at, step, clock);
        if stream.hits == 0 { Vec::new() } else { self.ahead(index) }
    }

    /// A first fault somewhere: the aligned neighbourhood, which is what a loader or a page of
    /// objects would touch.
    fn around(&self, at: u64) -> Vec<BlockRange> {
        let size = (self.window / 8).max(1);
        let (start, end) = (at / size * size, ((at / size + 1) * size).min(self.blocks));
        let after = BlockRange::new(at + 1, end.saturating_sub(at + 1));
        let before = BlockRange::new(start, at - start);
        [after, before].into_iter().filter(|range| range.count > 0).collect()
    }

    /// The next of a sequence: twice as far with every repetition, to the window.
    fn ahead(&mut self, index: usize) -> Vec<BlockRange> {
        let (window, blocks) = (self.window, self.blocks);
        let stream = &mut self.streams[index];
        let depth = (4u64 << stream.hits.min(16)).min(window);
        let target = (0..depth as i64).map(|turn| stream.last as i64 + (turn + 1) * stream.step);
        let up = stream.step > 0;
        let asked = stream.asked as i64;
        let fresh: Vec<i64> = target
            .filter(|at| (0..blocks as i64).contains(at))
            .filter(|at| if up { *at > asked } else { *at < asked })
            .collect();
        let Some(last) = fresh.last() else { return Vec::new() };
        stream.asked = *last as u64;
        match stream.step {
            1 => vec![BlockRange::new(fresh[0] as u64, fresh.len() as u64)],
            -1 => vec![BlockRange::new(*last as u64, fresh.len() as u64)],
            _ => fresh.into_iter().map(|at| BlockRange::new(at as u64, 1)).collect(),
        }
    }

    fn follow(&mut self, stream: Stream) {
        if self.streams.len() < STREAMS {
            self.streams.push(stream);
        } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = stream;
        }
    }
}
