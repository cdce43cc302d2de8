//! Which requests are in hand, in memory that outlives this process: the front end keeps it, and
//! gives it to the next daemon, which runs again what its predecessor left.
//!
//! Layout and order of steps: QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking", split
//! virtqueues, version 1. A queue's region:
//!
//! ```text
//! 0  features u64 │ 8 version u16 │ 10 desc_num u16 │ 12 last_batch_head u16 │ 14 used_idx u16
//! 16 desc_num × { inflight u8, padding [u8; 5], next u16, counter u64 }
//! ```
//!
//! What must hold: nothing in the region is believed; it is shared with a process that may be
//! hostile, so indices are checked, lists are bounded by the size of the queue.

use super::sys::{Shared, Span};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

const HEADER: usize = 16;
const ENTRY: usize = 16;
/// Regions of queues begin at multiples of this, as in QEMU's libvhost-user.
const ALIGN: usize = 64;
const VERSION: u16 = 1;

/// Bytes of the region of one queue of `size` entries.
pub(super) fn queue_bytes(size: u16) -> usize {
    (HEADER + ENTRY * usize::from(size)).next_multiple_of(ALIGN)
}

/// The region of all queues.
#[derive(Clone)]
pub(super) struct Inflight {
    map: Arc<Shared>,
    queues: u16,
    size: u16,
}

impl Inflight {
    /// # Errors
    /// If the map is too short for so many queues of that size.
    pub(super) fn new(map: Shared, queues: u16, size: u16) -> io::Result<Self> {
        let needed = queue_bytes(size) * usize::from(queues);
        if map.span().len() < needed {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} bytes for requests in hand; {needed} are needed", map.span().len()),
            ));
        }
        Ok(Self { map: Arc::new(map), queues, size })
    }

    /// The part of queue `index`, if its size fits what was agreed.
    pub(super) fn queue(&self, index: usize, size: u16) -> Option<InflightQueue> {
        if index >= usize::from(self.queues) || size > self.size {
            return None;
        }
        let bytes = queue_bytes(self.size);
        Some(InflightQueue {
            span: self.map.span().part(index * bytes, bytes),
            size,
            counter: AtomicU64::new(0),
            _map: self.map.clone(),
        })
    }
}

/// The region of one queue. Marking is the queue thread's, completing happens under the lock of
/// the used ring.
pub(super) struct InflightQueue {
    span: Span,
    size: u16,
    counter: AtomicU64,
    _map: Arc<Shared>,
}

/// What a predecessor left.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Left {
    /// Heads to run again, oldest first.
    pub(super) heads: Vec<u16>,
}

impl InflightQueue {
    fn entry(&self, head: u16) -> usize {
        HEADER + ENTRY * usize::from(head)
    }

    /// Takes over: settles the last batch of a predecessor, and lists what it had in hand.
    /// `used` is the index in the used ring.
    pub(super) fn recover(&self, used: u16) -> Left {
        let version = self.span.u16_at(8);
        if version.load(Ordering::Acquire) != VERSION {
            // Fresh: all zeros, as it was made.
            self.span.u16_at(10).store(self.size, Ordering::Relaxed);
            self.span.u16_at(14).store(used, Ordering::Relaxed);
            version.store(VERSION, Ordering::Release);
        }
        let settled = self.span.u16_at(14).load(Ordering::Acquire);
        // Entries of the last batch were in the used ring already when the predecessor ended.
        let batch = used.wrapping_sub(settled).min(self.size);
        let mut head = self.span.u16_at(12).load(Ordering::Acquire);
        for _ in 0..batch {
            if head >= self.size {
                break;
            }
            self.span.u8_at(self.entry(head)).store(0, Ordering::Release);
            head = self.span.u16_at(self.entry(head) + 6).load(Ordering::Acquire);
        }
        self.span.u16_at(14).store(used, Ordering::Release);
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.span.u8_at(self.entry(head)).load(Ordering::Acquire) == 1)
            .map(|head| (self.span.u64_at(self.entry(head) + 8).load(Ordering::Acquire), head))
            .collect();
        left.sort_unstable();
        let next = left.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        self.counter.store(next, Ordering::Relaxed);
        Left { heads: left.into_iter().map(|(_, head)| head).collect() }
    }

    /// A request was taken from the available ring.
    pub(super) fn taken(&self, head: u16) {
        let counter = self.counter.fetch_add(1, Ordering::Relaxed);
        self.span.u64_at(self.entry(head) + 8).store(counter, Ordering::Release);
        self.span.u8_at(self.entry(head)).store(1, Ordering::Release);
    }

    /// A request stands in the available ring again, behind those that are still marked.
    pub(super) fn put_back(&self, head: u16) {
        self.span.u8_at(self.entry(head)).store(0, Ordering::Release);
    }

    /// Before the index of the used ring includes the request.
    pub(super) fn completing(&self, head: u16) {
        let last = self.span.u16_at(12);
        self.span
            .u16_at(self.entry(head) + 6)
            .store(last.load(Ordering::Relaxed), Ordering::Release);
        last.store(head, Ordering::Release);
    }

    /// After the index of the used ring, now `used`, includes it.
    pub(super) fn completed(&self, head: u16, used: u16) {
        self.span.u8_at(self.entry(head)).store(0, Ordering::Release);
        self.span.u16_at(14).store(used, Ordering::Release);
    }
}

/// For fuzzing: a region of any bytes is taken over without a panic, and lists each head once.
pub(super) fn fuzz(bytes: &[u8]) {
    let size = 16;
    let Ok(file) = super::sys::scratch(&[bytes, &[0; 1024]].concat()) else { return };
    let map = Shared::map(file, 0, queue_bytes(size) as u64).expect("the file is long enough");
    let region = Inflight::new(map, 1, size).expect("the map is long enough");
    let queue = region.queue(0, size).expect("the size was agreed");
    let used = bytes.first().map_or(0, |&byte| u16::from(byte));
    let left = queue.recover(used);
    let mut heads = left.heads.clone();
    heads.sort_unstable();
    heads.dedup();
    assert!(heads.len() == left.heads.len() && heads.iter().all(|&head| head < size));
    for &head in &left.heads {
        queue.completing(head);
        queue.completed(head, used.wrapping_add(1));
    }
    assert_eq!(queue.recover(used.wrapping_add(1)), Left::default());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn region(file: &File) -> InflightQueue {
        let map = Shared::map(file.try_clone().unwrap(), 0, queue_bytes(8) as u64).unwrap();
        Inflight::new(map, 1, 8).unwrap().queue(0, 8).unwrap()
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(queue_bytes(8) as u64).unwrap();
        file
    }

    /// One complete request, stopped after `steps` of its three steps.
    fn complete(queue: &InflightQueue, used: &mut u16, head: u16, steps: usize) {
        if steps > 0 {
            queue.completing(head);
        }
        if steps > 1 {
            *used = used.wrapping_add(1);
        }
        if steps > 2 {
            queue.completed(head, *used);
        }
    }

    #[test]
    fn the_layout_is_that_of_the_specification() {
        use std::os::unix::fs::FileExt;
        let file = file();
        let queue = region(&file);
        assert_eq!(queue_bytes(8), 192);
        queue.recover(0xfffe);
        queue.taken(3);
        queue.taken(5);
        queue.completing(5);
        queue.completed(5, 0xffff);
        let mut bytes = [0; 144];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let mut expected = [0; 144];
        // version 1, desc_num 8, last_batch_head 5, used_idx 0xffff
        expected[8..16].copy_from_slice(&[1, 0, 8, 0, 5, 0, 0xff, 0xff]);
        expected[16 + 3 * 16] = 1; // inflight, counter 0
        expected[16 + 5 * 16 + 8] = 1; // counter 1, next 0
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_successor_runs_exactly_what_was_not_in_the_used_ring_wherever_the_daemon_died() {
        for start in [0, u16::MAX - 1] {
            for steps in 0..=3 {
                let file = file();
                let mut used = start;
                let queue = region(&file);
                assert_eq!(queue.recover(used), Left::default());
                for head in [4, 1, 6, 2] {
                    queue.taken(head);
                }
                complete(&queue, &mut used, 1, 3);
                complete(&queue, &mut used, 6, steps);
                let expected = if steps >= 2 { vec![4, 2] } else { vec![4, 6, 2] };
                let next = region(&file);
                assert_eq!(next.recover(used).heads, expected, "{steps} steps from {start}");
                // And the successor's own order goes on from there.
                next.taken(0);
                assert_eq!(region(&file).recover(used).heads, [expected, vec![0]].concat());
            }
        }
    }

    #[test]
    fn a_daemon_that_dies_while_it_puts_requests_back_leaves_what_its_successor_takes_in_order() {
        for start in [0u16, u16::MAX - 2] {
            for cleared in 0..=3usize {
                let file = file();
                let queue = region(&file);
                let mut used = start;
                queue.recover(used);
                for head in [4, 1, 6, 2, 3] {
                    queue.taken(head);
                }
                complete(&queue, &mut used, 1, 3);
                complete(&queue, &mut used, 2, 3);
                // The ring's last three places hold 4, 6, 3 by now.
                let next = start.wrapping_add(5);
                for &head in [3, 6, 4].iter().take(cleared) {
                    queue.put_back(head);
                }
                let left = region(&file).recover(used).heads;
                assert_eq!(left, [4, 6, 3][..3 - cleared]);
                // Where a successor goes on is before the first that is not marked any more.
                let goes_on = used.wrapping_add(left.len() as u16);
                assert_eq!(goes_on, next.wrapping_sub(cleared as u16));
            }
        }
    }

    #[test]
    fn a_region_that_is_too_short_or_for_smaller_queues_is_refused() {
        let file = file();
        let map = || Shared::map(file.try_clone().unwrap(), 0, queue_bytes(8) as u64).unwrap();
        assert!(Inflight::new(map(), 2, 8).is_err());
        let region = Inflight::new(map(), 1, 8).unwrap();
        assert!(region.queue(1, 8).is_none() && region.queue(0, 16).is_none());
    }

    #[test]
    fn check_30_a_region_of_any_bytes_is_taken_over_without_panic_or_endless_list() {
        let mut state = 1u64;
        for round in 0..500 {
            let bytes: Vec<u8> = (0..round)
                .map(|_| {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    (state >> 33) as u8 & if round % 2 == 0 { 0xff } else { 1 }
                })
                .collect();
            fuzz(&bytes);
        }
    }
}
