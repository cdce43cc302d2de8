//! The last version of blocks that was sent, so that only the difference is sent next time.
//!
//! Bounded by bytes. Only blocks that are sent again are kept (the first pass over a device would
//! push everything out and cost a copy of every byte). Shared by the senders of one device.

use silo_block::block::BlockIndex;
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

const SHARDS: usize = 16;

struct Slot {
    block: u64,
    round: u64,
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
        }
    }

    /// Bytes of content held now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let slots = |shard: &Mutex<Shard>| lock(shard).slots.len();
        self.shards.iter().map(|shard| slots(shard) * self.block).sum::<usize>() as u64
    }

    /// Copies the version of a whole block that was sent in round `acknowledged` or before, if the
    /// newest version sent is that old: the destination said that it has all of that round.
    pub fn find(&self, block: BlockIndex, acknowledged: u64, into: &mut [u8]) -> bool {
        let mut shard = self.shard(block);
        let Some(&at) = shard.index.get(&block.0) else { return false };
        let slot = &mut shard.slots[at];
        if slot.round > acknowledged || into.len() != slot.content.len() {
            return false;
        }
        slot.used = true;
        into.copy_from_slice(&slot.content);
        true
    }

    /// Notes what was sent of a block in `round`; a short last block is not kept.
    pub fn remember(&self, block: BlockIndex, round: u64, content: &[u8]) {
        if content.len() != self.block || self.slots_per_shard == 0 {
            return;
        }
        let mut shard = self.shard(block);
        let shard = &mut *shard;
        if let Some(&at) = shard.index.get(&block.0) {
            let slot = &mut shard.slots[at];
            slot.round = round;
            slot.content.copy_from_slice(content);
            return;
        }
        if shard.slots.len() < self.slots_per_shard {
            shard.index.insert(block.0, shard.slots.len());
            let content = content.into();
            shard.slots.push(Slot { block: block.0, round, used: false, content });
            return;
        }
        // Every slot is spared at most once a turn, so that this ends within two turns.
        while std::mem::take(&mut shard.slots[shard.hand].used) {
            shard.hand = (shard.hand + 1) % shard.slots.len();
        }
        let slot = &mut shard.slots[shard.hand];
        shard.index.remove(&slot.block);
        (slot.block, slot.round) = (block.0, round);
        slot.content.copy_from_slice(content);
        shard.index.insert(block.0, shard.hand);
        shard.hand = (shard.hand + 1) % shard.slots.len();
    }

    /// Forgets a block: what was sent did not arrive.
    pub fn forget(&self, block: BlockIndex) {
        let mut shard = self.shard(block);
        if let Some(&at) = shard.index.get(&block.0) {
            // Never acknowledged, so never found; its slot is reused in turn.
            shard.slots[at].round = u64::MAX;
        }
    }

    /// Forgets all.
    pub fn clear(&self) {
        for shard in &self.shards {
            *lock(shard) = Shard::default();
        }
    }

    fn shard(&self, block: BlockIndex) -> MutexGuard<'_, Shard> {
        // Neighbours lie in one shard, so that a run costs few locks' cache lines.
        lock(&self.shards[(block.0 / 64) as usize % SHARDS])
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
            versions.remember(BlockIndex(block), 1, &[block as u8; 512]);
            assert!(versions.bytes() <= 32 * 512);
            if block >= 5 {
                let _ = versions.find(BlockIndex(5), 1, &mut found);
            }
        }
        assert!(versions.find(BlockIndex(9_999), 1, &mut found));
        assert_eq!(found, [9_999u64 as u8; 512]);
    }

    #[test]
    fn a_version_that_was_not_acknowledged_is_not_a_base() {
        let versions = Versions::new(1 << 20, 512);
        let mut found = [0; 512];
        versions.remember(BlockIndex(1), 2, &[1; 512]);
        assert!(!versions.find(BlockIndex(1), 1, &mut found));
        assert!(versions.find(BlockIndex(1), 2, &mut found));
        versions.forget(BlockIndex(1));
        assert!(!versions.find(BlockIndex(1), 100, &mut found));
    }
}
