//! Read-ahead: finds walkers among the faults and says what they will touch next.
//!
//! A walker goes forward over neighbouring blocks, or jumps by the same distance each time, in
//! either direction. What is fetched ahead is doubled each time it was right, up to a limit that the
//! caller takes from the line. The first block of each piece fetched ahead is put where touching it
//! faults once more (without waiting), so that a walker who never waits is still seen.
//!
//! No I/O and no clock.

use silo_block::block::BlockRange;

/// Walkers that are told apart.
const WALKERS: usize = 16;
/// First piece fetched ahead, in blocks (128 KiB).
const FIRST: u64 = 32;
/// Smallest piece of a long walk, in blocks (1 MiB).
const PIECE: u64 = 256;
/// A walker may skip this many blocks and still count as walking.
const GAP: u64 = 8;
/// Farthest jump that is taken for a stride, in blocks (256 MiB).
const FARTHEST: i64 = 1 << 16;
/// Jumps fetched ahead at most.
const JUMPS: u64 = 64;

#[derive(Clone, Copy)]
struct Walker {
    last: u64,
    /// Forward walk: where what was fetched ahead ends.
    end: u64,
    /// Blocks to fetch ahead, or jumps.
    window: u64,
    stride: i64,
    /// Jumps fetched ahead of `last`.
    jumps: u64,
    used: u64,
}

pub(super) struct Ahead {
    walkers: Vec<Walker>,
    clock: u64,
    blocks: u64,
}

impl Ahead {
    pub(super) fn new(blocks: u64) -> Self {
        Self { walkers: Vec::with_capacity(WALKERS), clock: 0, blocks }
    }

    /// Somebody touched blocks in a way that was seen. Returns what to fetch, nearest first, at most
    /// `limit` blocks ahead.
    pub(super) fn touched(&mut self, range: BlockRange, limit: u64) -> Vec<BlockRange> {
        let at = range.start.0;
        if limit == 0 || at >= self.blocks || range.count == 0 {
            return Vec::new();
        }
        self.clock += 1;
        let clock = self.clock;
        let blocks = self.blocks;
        // A forward walker whose fetched part this is in or just behind.
        if let Some(walker) =
            self.walkers.iter_mut().find(|w| at > w.last && at <= w.end.max(w.last + 1) + GAP)
        {
            walker.used = clock;
            return walker.walk(range, limit, blocks);
        }
        // Or a walker that jumps: the nearest, if it is the second jump of that length.
        let near = self
            .walkers
            .iter_mut()
            .filter(|w| w.last != at && (at as i64 - w.last as i64).abs() <= FARTHEST)
            .min_by_key(|w| {
                let delta = at as i64 - w.last as i64;
                let expected = w.stride != 0 && delta % w.stride == 0 && delta / w.stride > 0;
                (!expected, delta.abs())
            });
        if let Some(walker) = near {
            walker.used = clock;
            return walker.jump(range, limit, blocks);
        }
        let (last, end) = (range.end() - 1, range.end());
        let fresh = Walker { last, end, window: 0, stride: 0, jumps: 0, used: clock };
        if self.walkers.len() < WALKERS {
            self.walkers.push(fresh);
        } else if let Some(oldest) = self.walkers.iter_mut().min_by_key(|w| w.used) {
            *oldest = fresh;
        }
        Vec::new()
    }
}

impl Walker {
    fn walk(&mut self, range: BlockRange, limit: u64, blocks: u64) -> Vec<BlockRange> {
        let at = range.end() - 1;
        self.stride = 0;
        self.last = at;
        self.end = self.end.max(at + 1);
        // What was fetched ahead is all still ahead.
        if self.end - at > self.window + 1 {
            return Vec::new();
        }
        self.window = (self.window * 2).max(FIRST).max(range.count).min(limit);
        let end = (at + 1 + self.window).min(blocks);
        // Not in crumbs, but for the last: each piece is a mark, and a request at least.
        let least = if end == blocks { 1 } else { (self.window / 4).clamp(1, PIECE) };
        if end < self.end + least {
            return Vec::new();
        }
        let piece = BlockRange::new(self.end, end - self.end);
        self.end = end;
        vec![piece]
    }

    fn jump(&mut self, range: BlockRange, limit: u64, blocks: u64) -> Vec<BlockRange> {
        let at = range.start.0;
        let delta = at as i64 - self.last as i64;
        let steps = if self.stride == 0 { 0 } else { delta / self.stride };
        let again = self.stride != 0 && delta % self.stride == 0 && steps > 0;
        self.last = at;
        self.end = range.end();
        if !again || steps as u64 > self.jumps + 1 {
            *self = Self { stride: delta, jumps: 0, window: 0, ..*self };
            return Vec::new();
        }
        self.jumps = self.jumps.saturating_sub(steps as u64);
        if self.jumps > self.window / 2 {
            return Vec::new();
        }
        self.window = (self.window * 2).clamp(4, JUMPS).min(limit);
        let ahead = self.jumps + 1..=self.window;
        let targets = ahead.map_while(|n| {
            let target = at as i64 + self.stride * n as i64;
            (target >= 0 && (target as u64) < blocks).then(|| BlockRange::new(target as u64, 1))
        });
        let targets: Vec<_> = targets.collect();
        self.jumps += targets.len() as u64;
        targets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Touches as a mount would see them: blocks that are not here, and the first block of each
    /// piece fetched ahead. Returns how many touches had to wait.
    fn waits(touches: impl IntoIterator<Item = u64>, limit: u64) -> (u64, u64) {
        let mut ahead = Ahead::new(1 << 20);
        let (mut here, mut marks) =
            (std::collections::HashSet::new(), std::collections::HashSet::new());
        let mut waited = 0;
        for block in touches {
            let missing = here.insert(block);
            waited += u64::from(missing);
            if missing || marks.remove(&block) {
                for piece in ahead.touched(BlockRange::new(block, 1), limit) {
                    for (number, block) in (piece.start.0..piece.end()).enumerate() {
                        if here.insert(block) && number == 0 {
                            marks.insert(block);
                        }
                    }
                }
            }
        }
        (waited, here.len() as u64)
    }

    #[test]
    fn a_forward_walk_waits_twice_and_then_never() {
        assert_eq!(waits(0..20_000, 4096).0, 2);
        let end = (1 << 20) - 20_000..1 << 20;
        assert_eq!(waits(end, 4096).0, 2, "also at the end of the device");
        let gaps = waits((0..20_000).map(|n| n * 2), 4096).0;
        assert!(gaps < 20, "every other block is a walk, too: waited {gaps} times");
    }

    #[test]
    fn reads_of_many_blocks_are_walks_too() {
        let mut ahead = Ahead::new(1 << 20);
        assert_eq!(ahead.touched(BlockRange::new(0, 256), 4096), []);
        let next = ahead.touched(BlockRange::new(256, 256), 4096);
        assert_eq!(next, [BlockRange::new(512, 256)]);
    }

    #[test]
    fn jumps_of_one_length_are_fetched_ahead_in_both_directions() {
        for stride in [100i64, -100, -1, 1000] {
            let touches = (0..400).map(|n| (600_000 + stride * n) as u64);
            let (waited, fetched) = waits(touches, 4096);
            assert!(waited <= 3, "stride {stride} waited {waited} times");
            assert!(fetched < 500, "and only what is walked on is fetched: {fetched}");
        }
    }

    #[test]
    fn random_touches_fetch_almost_nothing() {
        let mut random = 12345u64;
        let touches: Vec<u64> = std::iter::repeat_with(|| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % (1 << 20)
        })
        .take(5000)
        .collect();
        let (_, fetched) = waits(touches, 4096);
        assert!(fetched < 6000, "{fetched} blocks for 5000 touches");
    }

    #[test]
    fn two_walkers_do_not_disturb_each_other() {
        let both = (0..5000).flat_map(|n| [n, 500_000 + n]);
        assert!(waits(both, 1024).0 <= 4);
    }
}
