//! The last version of blocks that was sent, so that only the difference is sent next time.
//!
//! Bounded by bytes. Only blocks that are sent again are kept (the first pass over a device would
//! push everything out and cost a copy of every byte). Shared by the senders of one device.

use silo_block::{
    block::{BlockIndex, BlockRange},
    rounds::Epoch,
};
use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

const SHARDS: usize = 16;
/// Neighbours that lie in one shard.
const NEIGHBOURS: u64 = 64;

struct Slot {
    block: u64,
    epoch: Epoch,
    /// The destination has said that it dealt with this version.
    acknowledged: bool,
    /// Found since the hand passed last: spared once.
    used: bool,
    content: Box<[u8]>,
}

#[derive(Default)]
struct Shard {
    index: HashMap<u64, usize>,
    slots: Vec<Slot>,
    hand: usize,
}

/// Versions of the blocks of one device.
pub struct Versions {
    shards: Vec<Mutex<Shard>>,
    block: usize,
    slots_per_shard: usize,
    used: AtomicBool,
}

impl Versions {
    /// Keeps at most `budget` bytes of blocks of `block` bytes; fewer than a block for each of a
    /// few parts means none.
    #[must_use]
    pub fn new(budget: u64, block: usize) -> Self {
        let slots = budget as usize / block / SHARDS;
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            block,
            slots_per_shard: slots,
            used: AtomicBool::new(false),
        }
    }

    /// Bytes of content held now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let slots = |shard: &Mutex<Shard>| lock(shard).slots.len();
        self.shards.iter().map(|shard| slots(shard) * self.block).sum::<usize>() as u64
    }

    /// Copies the last version that was sent of a whole block, if the destination is known to have
    /// it.
    pub fn find(&self, block: BlockIndex, into: &mut [u8]) -> bool {
        let mut shard = self.shard(block);
        let Some(&at) = shard.index.get(&block.0) else { return false };
        let slot = &mut shard.slots[at];
        if !slot.acknowledged || into.len() != slot.content.len() {
            return false;
        }
        slot.used = true;
        into.copy_from_slice(&slot.content);
        true
    }

    /// The destination has dealt with what was sent of these blocks as of `epoch`.
    pub fn acknowledge(&self, range: BlockRange, epoch: Epoch) {
        self.mark(range, |slot| slot.acknowledged |= slot.epoch == epoch);
    }

    /// What was sent of these blocks is not at the destination.
    pub fn forget(&self, range: BlockRange) {
        self.mark(range, |slot| slot.acknowledged = false);
    }

    fn mark(&self, range: BlockRange, set: impl Fn(&mut Slot)) {
        if self.is_unused() {
            return;
        }
        if range.count > (self.slots_per_shard * SHARDS) as u64 {
            // The peer names the range: work is bounded by what is kept here.
            for shard in &self.shards {
                let mut shard = lock(shard);
                let inside = |slot: &&mut Slot| (range.start.0..range.end()).contains(&slot.block);
                shard.slots.iter_mut().filter(inside).for_each(&set);
            }
            return;
        }
        let mut at = range.start.0;
        while at < range.end() {
            let stop = (at / NEIGHBOURS * NEIGHBOURS + NEIGHBOURS).min(range.end());
            let mut shard = self.shard(BlockIndex(at));
            let shard = &mut *shard;
            for block in at..stop {
                if let Some(&slot) = shard.index.get(&block) {
                    set(&mut shard.slots[slot]);
                }
            }
            at = stop;
        }
    }

    /// Whether nothing was ever remembered.
    fn is_unused(&self) -> bool {
        !self.used.load(Ordering::Relaxed)
    }

    /// Notes what is being sent of a block as of `epoch`; a short last block is not kept.
    pub fn remember(&self, block: BlockIndex, epoch: Epoch, content: &[u8]) {
        if content.len() != self.block || self.slots_per_shard == 0 {
            return;
        }
        self.used.store(true, Ordering::Relaxed);
        let mut shard = self.shard(block);
        let shard = &mut *shard;
        if let Some(&at) = shard.index.get(&block.0) {
            let slot = &mut shard.slots[at];
            (slot.epoch, slot.acknowledged) = (epoch, false);
            slot.content.copy_from_slice(content);
            return;
        }
        if shard.slots.len() < self.slots_per_shard {
            shard.index.insert(block.0, shard.slots.len());
            let content = content.into();
            shard.slots.push(Slot {
                block: block.0,
                epoch,
                acknowledged: false,
                used: false,
                content,
            });
            return;
        }
        // Every slot is spared at most once a turn, so that this ends within two turns.
        while std::mem::take(&mut shard.slots[shard.hand].used) {
            shard.hand = (shard.hand + 1) % shard.slots.len();
        }
        let slot = &mut shard.slots[shard.hand];
        shard.index.remove(&slot.block);
        (slot.block, slot.epoch, slot.acknowledged) = (block.0, epoch, false);
        slot.content.copy_from_slice(content);
        shard.index.insert(block.0, shard.hand);
        shard.hand = (shard.hand + 1) % shard.slots.len();
    }

    /// Forgets all.
    pub fn clear(&self) {
        for shard in &self.shards {
            *lock(shard) = Shard::default();
        }
    }

    fn shard(&self, block: BlockIndex) -> MutexGuard<'_, Shard> {
        // Neighbours lie in one shard, so that a run costs few locks' cache lines.
        lock(&self.shards[(block.0 / NEIGHBOURS) as usize % SHARDS])
    }
}

/// A holder of the lock copies bytes only: what a panic leaves behind is whole.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_stays_within_the_budget_and_what_is_used_stays_longer() {
        let versions = Versions::new(32 * 512, 512);
        let mut found = [0; 512];
        for block in 0..10_000u64 {
            versions.remember(BlockIndex(block), Epoch(1), &[block as u8; 512]);
            versions.acknowledge(BlockRange::new(block, 1), Epoch(1));
            assert!(versions.bytes() <= 32 * 512);
            if block >= 5 {
                let _ = versions.find(BlockIndex(5), &mut found);
            }
        }
        assert!(versions.find(BlockIndex(9_999), &mut found));
        assert_eq!(found, [9_999u64 as u8; 512]);
    }

    #[test]
    fn a_confirmation_of_more_blocks_than_any_device_has_is_no_work() {
        let versions = Versions::new(1 << 20, 512);
        versions.remember(BlockIndex(70), Epoch(2), &[1; 512]);
        let begin = std::time::Instant::now();
        let all = BlockRange::new(1, u64::from(u32::MAX));
        (0..1000).for_each(|_| versions.acknowledge(all, Epoch(2)));
        assert!(begin.elapsed().as_secs() < 10, "{:?}", begin.elapsed());
        assert!(versions.find(BlockIndex(70), &mut [0; 512]));
    }

    #[test]
    fn a_version_that_was_not_acknowledged_is_not_a_base() {
        let versions = Versions::new(1 << 20, 512);
        let mut found = [0; 512];
        versions.remember(BlockIndex(63), Epoch(2), &[1; 512]);
        versions.remember(BlockIndex(64), Epoch(3), &[1; 512]);
        assert!(!versions.find(BlockIndex(63), &mut found));
        versions.acknowledge(BlockRange::new(0, 200), Epoch(2));
        assert!(versions.find(BlockIndex(63), &mut found));
        assert!(!versions.find(BlockIndex(64), &mut found), "a later version is on its way");
        versions.forget(BlockRange::new(60, 10));
        assert!(!versions.find(BlockIndex(63), &mut found));
    }
}
