//! Forwards only the bytes that differ from what the device has: for writers that write the same
//! again, over devices where a write costs more than a read (a layer, a log, a store).

use crate::{
    block::BlockRange,
    io::BlockDevice,
    locks::{RangeLocks, Who},
    range::check,
};
use std::{
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// The most unchanged bytes between two changes that are written with them.
pub const MAX_ALLOWANCE: usize = 4096;
/// Bytes that are compared at once.
const STEP: usize = 1 << 20;
/// Unit of the lock that keeps two writers apart.
const UNIT: u64 = 512;

/// See the comment of its module.
pub struct RedundantWrites {
    inner: Arc<dyn BlockDevice>,
    allowance: usize,
    /// Comparing and writing are one step for whoever writes the same place.
    locks: RangeLocks,
    dropped: AtomicU64,
    forwarded: AtomicU64,
}

impl RedundantWrites {
    /// Over `inner`. Changes with at most `allowance` unchanged bytes between them are written
    /// together; it is cut at [`MAX_ALLOWANCE`].
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>, allowance: usize) -> Self {
        Self {
            inner,
            allowance: allowance.min(MAX_ALLOWANCE),
            locks: RangeLocks::new(false),
            dropped: AtomicU64::new(0),
            forwarded: AtomicU64::new(0),
        }
    }

    /// Bytes that were not forwarded, and bytes that were.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.dropped.load(Ordering::Relaxed), self.forwarded.load(Ordering::Relaxed))
    }
}

/// The runs of bytes in which `new` differs from `old`, which is as long. Runs with at most
/// `allowance` equal bytes between them are joined.
fn changed_runs(old: &[u8], new: &[u8], allowance: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    while let Some(start) = next_difference(old, new, at) {
        let mut end = start + 1;
        while end < new.len() && old[end] != new[end] {
            end += 1;
        }
        match runs.last_mut() {
            Some(last) if start - last.end <= allowance => last.end = end,
            _ => runs.push(start..end),
        }
        at = end;
    }
    runs
}

/// The first byte at or after `from` that differs.
fn next_difference(old: &[u8], new: &[u8], from: usize) -> Option<usize> {
    // Whole pieces are compared as memory, then the byte is looked for.
    let mut at = from;
    while at < new.len() {
        let end = (at + 256).min(new.len());
        if old[at..end] != new[at..end] {
            return (at..end).find(|index| old[*index] != new[*index]);
        }
        at = end;
    }
    None
}

impl BlockDevice for RedundantWrites {
    forward!(inner: size read_at try_read_at may_wait flush interrupt extents prefetch zeroes_fast is_read_only);

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check(self.inner.size(), offset, data.len() as u64)?;
        let mut old = vec![0; data.len().min(STEP)];
        let mut at = offset;
        for part in data.chunks(STEP) {
            let first = at / UNIT;
            let end = (at + part.len() as u64).div_ceil(UNIT);
            let _guard = self.locks.lock(BlockRange::new(first, end - first), Who::Guest)?;
            let old = &mut old[..part.len()];
            self.inner.read_at(at, old)?;
            let mut forwarded = 0;
            for run in changed_runs(old, part, self.allowance) {
                self.inner.write_at(at + run.start as u64, &part[run.clone()])?;
                forwarded += run.len() as u64;
            }
            self.forwarded.fetch_add(forwarded, Ordering::Relaxed);
            self.dropped.fetch_add(part.len() as u64 - forwarded, Ordering::Relaxed);
            at += part.len() as u64;
        }
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.inner.size(), offset, length)?;
        let end = (offset + length).div_ceil(UNIT);
        let range = BlockRange::new(offset / UNIT, end - offset / UNIT);
        let _guard = self.locks.lock(range, Who::Guest)?;
        self.inner.trim(offset, length)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        check(self.inner.size(), offset, length)?;
        let end = (offset + length).div_ceil(UNIT);
        let range = BlockRange::new(offset / UNIT, end - offset / UNIT);
        let _guard = self.locks.lock(range, Who::Guest)?;
        self.inner.zero(offset, length, allocate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        filter::{Faulty, Op},
        source::MemoryDevice,
        tests::random::Random,
    };
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn check_28_random_edits_come_out_right_for_every_allowance(
            length in 1usize..3000,
            edits in proptest::collection::vec((0usize..3000, 1usize..40, any::<u8>()), 0..30),
            allowance in 0usize..=16,
        ) {
            let old = Random(length as u64).bytes(length);
            let mut new = old.clone();
            for (at, count, byte) in edits {
                for slot in new.iter_mut().skip(at).take(count) {
                    *slot = byte;
                }
            }
            let runs = changed_runs(&old, &new, allowance);
            let mut result = old.clone();
            for run in &runs {
                result[run.clone()].copy_from_slice(&new[run.clone()]);
                prop_assert!(old[run.start] != new[run.start] && old[run.end - 1] != new[run.end - 1]);
                let mut equal = 0;
                for index in run.clone() {
                    equal = if old[index] == new[index] { equal + 1 } else { 0 };
                    prop_assert!(equal <= allowance, "bridged too much");
                }
            }
            prop_assert_eq!(result, new);
            for pair in runs.windows(2) {
                prop_assert!(pair[1].start - pair[0].end > allowance, "not joined");
            }
        }
    }

    #[test]
    fn check_28_a_device_behind_the_filter_equals_one_without_for_allowances_0_to_16() {
        for allowance in 0..=16 {
            let memory = Arc::new(MemoryDevice::new("test", 300_000).unwrap());
            let filter = RedundantWrites::new(memory.clone(), allowance);
            let (mut model, mut random) = (vec![0; 300_000], Random(allowance as u64));
            for _ in 0..60 {
                let at = random.below(250_000) as usize;
                let count = 1 + random.below(40_000) as usize;
                // Most of it is what is there already.
                let mut data = model[at..at + count].to_vec();
                for _ in 0..random.below(30) {
                    let place = random.below(count as u64) as usize;
                    data[place] = random.next() as u8;
                }
                filter.write_at(at as u64, &data).unwrap();
                model[at..at + count].copy_from_slice(&data);
            }
            crate::source::tests::compare(&*memory, &model, &format!("allowance {allowance}"));
            let (dropped, forwarded) = filter.counts();
            assert!(dropped > 10 * forwarded, "{dropped} {forwarded}");
        }
    }

    #[test]
    fn a_write_of_the_same_bytes_writes_nothing() {
        let faulty = Arc::new(Faulty::new(Arc::new(MemoryDevice::new("test", 8192).unwrap())));
        let filter = RedundantWrites::new(faulty.clone(), 0);
        filter.write_at(100, &[3; 5000]).unwrap();
        faulty.set(|op, _, _| {
            assert_ne!(op, Op::Write);
            None
        });
        filter.write_at(100, &[3; 5000]).unwrap();
    }
}
