//! What was read from a store and may be needed again: leaves of maps, indexes of packs, chunks.
//! Bounded by a budget in bytes; the least recently used goes first. Several threads that want the
//! same thing cause one request.

use crate::{
    error::{Result, StoreError},
    format::pack::Opened,
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// What is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// A leaf of a device.
    Leaf(usize, u64),
    /// The index of a pack.
    Index(u32),
    /// A chunk of a pack.
    Chunk(u32, u32),
}

#[derive(Clone)]
pub(super) enum Value {
    Leaf(Arc<[u64]>),
    Index(Arc<Opened>),
    Chunk(Arc<[u8]>),
}

impl Value {
    fn memory(&self) -> usize {
        64 + match self {
            Self::Leaf(words) => words.len() * 8,
            Self::Index(opened) => opened.index.memory(),
            Self::Chunk(bytes) => bytes.len(),
        }
    }
}

enum State {
    /// Somebody is getting it.
    Coming,
    Here {
        value: Value,
        used: u64,
    },
}

#[derive(Default)]
struct Inside {
    known: HashMap<Key, State>,
    /// By last use, oldest first.
    order: BTreeMap<u64, Key>,
    clock: u64,
    bytes: usize,
}

impl Inside {
    fn touch(&mut self, key: Key) -> Option<Value> {
        self.clock += 1;
        let clock = self.clock;
        let Some(State::Here { value, used }) = self.known.get_mut(&key) else { return None };
        self.order.remove(used);
        self.order.insert(clock, key);
        *used = clock;
        Some(value.clone())
    }

    fn insert(&mut self, key: Key, value: Value, budget: usize) {
        self.remove(key);
        self.bytes += value.memory();
        self.clock += 1;
        self.order.insert(self.clock, key);
        self.known.insert(key, State::Here { value, used: self.clock });
        while self.bytes > budget && self.order.len() > 1 {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            if let Some(State::Here { value, .. }) = self.known.remove(&oldest) {
                self.bytes -= value.memory();
            }
        }
    }

    fn remove(&mut self, key: Key) {
        if let Some(State::Here { value, used }) = self.known.remove(&key) {
            self.bytes -= value.memory();
            self.order.remove(&used);
        }
    }
}

pub(super) struct Cache {
    inside: Mutex<Inside>,
    arrived: Condvar,
    budget: usize,
    patience: Duration,
}

impl Cache {
    /// `patience`: how long to wait for what another thread is getting.
    pub(super) fn new(budget: usize, patience: Duration) -> Self {
        Self { inside: Mutex::default(), arrived: Condvar::new(), budget, patience }
    }

    /// What is here, without getting it.
    pub(super) fn peek(&self, key: Key) -> Option<Value> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner).touch(key)
    }

    /// Puts something in that was come by.
    pub(super) fn put(&self, key: Key, value: Value) {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        inside.insert(key, value, self.budget);
        self.arrived.notify_all();
    }

    /// Gives it, by `get` if it is not here and nobody is getting it.
    pub(super) fn get(&self, key: Key, get: impl FnOnce() -> Result<Value>) -> Result<Value> {
        let until = Instant::now() + self.patience;
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(value) = inside.touch(key) {
                return Ok(value);
            }
            if !inside.known.contains_key(&key) {
                break;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(StoreError::Timeout {
                    operation: "read",
                    object: format!("{key:?}"),
                    limit: self.patience,
                });
            }
            inside =
                self.arrived.wait_timeout(inside, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        inside.known.insert(key, State::Coming);
        drop(inside);
        let coming = Coming { cache: self, key };
        let value = get()?;
        self.put(key, value.clone());
        std::mem::forget(coming);
        Ok(value)
    }

    pub(super) fn memory(&self) -> usize {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner).bytes
    }
}

/// Takes the promise back if getting fails.
struct Coming<'a> {
    cache: &'a Cache,
    key: Key,
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        let mut inside = self.cache.inside.lock().unwrap_or_else(PoisonError::into_inner);
        inside.known.remove(&self.key);
        drop(inside);
        self.cache.arrived.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn chunk(byte: u8) -> Value {
        Value::Chunk(vec![byte; 1000].into())
    }

    #[test]
    fn the_budget_holds_and_what_was_used_last_stays() {
        let cache = Cache::new(10_700, Duration::from_secs(1));
        for i in 0..100 {
            cache.get(Key::Chunk(0, i), || Ok(chunk(i as u8))).unwrap();
            cache.get(Key::Chunk(0, 0), || panic!("it was used all the time")).unwrap();
            assert!(cache.memory() <= 10_700);
        }
        assert!(cache.peek(Key::Chunk(0, 99)).is_some());
        assert!(cache.peek(Key::Chunk(0, 50)).is_none());
    }

    #[test]
    fn many_threads_that_want_one_thing_get_it_once_and_a_failure_is_not_kept() {
        let cache = Cache::new(1 << 20, Duration::from_secs(10));
        let failed = cache.get(Key::Index(1), || Err(StoreError::Stopped));
        assert!(failed.is_err());
        let (gets, barrier) = (AtomicU32::new(0), std::sync::Barrier::new(8));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    barrier.wait();
                    cache
                        .get(Key::Index(1), || {
                            gets.fetch_add(1, Ordering::Relaxed);
                            Ok(chunk(1))
                        })
                        .unwrap();
                });
            }
        });
        assert_eq!(gets.load(Ordering::Relaxed), 1);
    }
}
