//! Blocks that arrive after the guest runs: which of them are wanted, who waited for them, and how
//! somebody beside the guest has them brought.

use super::Memory;
use silo_block::{
    block::{BlockIndex, BlockRange},
    device::Result,
};
use std::{
    collections::hash_map::Entry,
    io,
    sync::PoisonError,
    time::{Duration, Instant},
};

impl Memory {
    /// The parts of `range` that are still missing.
    pub(super) fn wanted(&self, range: BlockRange) -> Vec<BlockRange> {
        let holes = self.holes();
        let mut wanted = Vec::new();
        let mut at = range.start;
        while let Some(piece) = holes.missing.next_range(at, range.count) {
            if piece.start.0 >= range.end() {
                break;
            }
            let end = piece.end().min(range.end());
            wanted.push(BlockRange::new(piece.start.0, end - piece.start.0));
            at = BlockIndex(end);
        }
        wanted
    }

    /// Blocks are in place: nobody waits for them any more.
    pub(super) fn arrived(&self, range: BlockRange) -> u64 {
        let mut served = Vec::new();
        let before;
        let after;
        {
            let mut holes = self.holes();
            before = holes.missing.len();
            holes.missing.remove_range(range);
            holes.landing.remove_range(range);
            after = holes.missing.len();
            if !holes.waiting.is_empty() {
                for block in range.start.0..range.end() {
                    served.extend(holes.waiting.remove(&block));
                }
            }
        }
        self.shared.arrived.notify_all();
        for since in served {
            self.shared.served(since);
        }
        before - after
    }

    /// Has missing blocks brought here the way a fault does, and waits for them: for whoever reads
    /// the memory beside the guest.
    ///
    /// # Errors
    /// If they do not come in time, nobody serves them, or [`Memory::interrupt`] was called.
    pub fn bring(&self, range: BlockRange, within: Duration) -> Result<()> {
        let late = |left: u64, why: &str| {
            let at = format!("{} and {} more", range.start, left.saturating_sub(1));
            self.error("bring", at, io::Error::new(io::ErrorKind::TimedOut, why.to_owned()))
        };
        let began = Instant::now();
        let mut holes = self.holes();
        if !holes.missing.intersects(range) {
            return Ok(());
        }
        let Some(demand) = holes.demand.clone() else {
            return Err(late(holes.missing.count_in(range), "nobody serves the memory's faults"));
        };
        let interrupted = holes.interrupted;
        let missing: Vec<_> = holes.missing.ranges_in(range).collect();
        let mut asked: Vec<BlockRange> = Vec::new();
        for block in missing.into_iter().flat_map(|piece| piece.start.0..piece.end()) {
            let Entry::Vacant(place) = holes.waiting.entry(block) else { continue };
            place.insert(began);
            match asked.last_mut() {
                Some(run) if run.end() == block => run.count += 1,
                _ => asked.push(BlockRange::new(block, 1)),
            }
        }
        drop(holes);
        asked.into_iter().for_each(|run| demand(run));
        holes = self.holes();
        while holes.missing.intersects(range) {
            if holes.interrupted != interrupted {
                let at = range.start.to_string();
                let why = io::Error::new(io::ErrorKind::Interrupted, "the wait was called off");
                return Err(self.error("bring", at, why));
            }
            let left = within.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(late(holes.missing.count_in(range), "no answer in time"));
            }
            let waited = self.shared.arrived.wait_timeout(holes, left);
            holes = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}
