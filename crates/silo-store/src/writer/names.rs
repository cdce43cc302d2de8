//! Which content is stored already, and where: what makes equal blocks cost once.
//!
//! Bounded: when the younger half is full, the older half is forgotten. Forgetting costs space in
//! the store and nothing else.

use crate::keys::BlockName;
use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

/// Names are uniform already: eight of their bytes are the hash.
#[derive(Default)]
pub(crate) struct First8(u64);

impl Hasher for First8 {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks_exact(8) {
            self.0 ^= u64::from_le_bytes(chunk.try_into().unwrap_or_default());
        }
    }

    // The array's length, which is always the same.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

type Map = HashMap<BlockName, (u32, u32), BuildHasherDefault<First8>>;

/// Bytes of memory that an entry takes at the most, with the room that a hash table keeps free.
const ENTRY: usize = 64;

pub(crate) struct Names {
    young: Map,
    old: Map,
    half: usize,
}

impl Names {
    /// Takes at most `budget` bytes of memory.
    pub(crate) fn new(budget: usize) -> Self {
        Self { young: Map::default(), old: Map::default(), half: (budget / ENTRY / 2).max(1) }
    }

    pub(crate) fn get(&self, name: &BlockName) -> Option<(u32, u32)> {
        self.young.get(name).or_else(|| self.old.get(name)).copied()
    }

    pub(crate) fn insert(&mut self, name: BlockName, pack: u32, slot: u32) {
        if self.young.len() >= self.half {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(name, (pack, slot));
    }

    /// Forgets what is in packs for which `lost` is true.
    pub(crate) fn forget(&mut self, lost: impl Fn(u32) -> bool) {
        self.young.retain(|_, (pack, _)| !lost(*pack));
        self.old.retain(|_, (pack, _)| !lost(*pack));
    }

    pub(crate) fn room(&self) -> usize {
        (2 * self.half).saturating_sub(self.young.len() + self.old.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_and_what_is_new_is_known() {
        let mut names = Names::new(64 * 1000);
        let name =
            |i: u32| BlockName(*blake3::hash(&i.to_le_bytes()).as_bytes().first_chunk().unwrap());
        for i in 0..10_000 {
            names.insert(name(i), i, 0);
            assert_eq!(names.get(&name(i)), Some((i, 0)));
            assert_eq!(names.get(&name(i.saturating_sub(400))), Some((i.saturating_sub(400), 0)));
        }
        assert!(names.young.len() + names.old.len() <= 1000);
        names.forget(|pack| pack == 9_999);
        assert_eq!(names.get(&name(9_999)), None);
    }
}
