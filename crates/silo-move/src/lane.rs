//! The connections of one link while they are in use, and the runs of blocks that wait for them.
//! The same on both ends.

use crate::peer::{Hangup, Outgoing};
use silo_block::{
    block::BlockRange,
    order::Class,
    session::messages::{BlockHeader, DeviceIndex},
};
use std::{
    collections::VecDeque,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Locks; whatever a panic left behind a lock of this crate is whole (counters, queues, machines
/// that are moved from state to state by one call).
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs that wait for a connection.
#[derive(Default)]
struct Queues {
    demand: VecDeque<BlockHeader>,
    bulk: VecDeque<BlockHeader>,
    closed: bool,
}

/// Which connection takes a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Track {
    /// Somebody waits for it.
    Demand,
    /// All others.
    Bulk,
}

/// The runs to be sent over one link. Bounded by the window of the session.
#[derive(Default)]
pub(crate) struct Work {
    queues: Mutex<Queues>,
    demand: Condvar,
    bulk: Condvar,
}

impl Work {
    pub(crate) fn push(&self, track: Track, header: BlockHeader) {
        let mut queues = lock(&self.queues);
        match track {
            Track::Demand => {
                queues.demand.push_back(header);
                self.demand.notify_one();
            }
            Track::Bulk => {
                queues.bulk.push_back(header);
                self.bulk.notify_one();
            }
        }
    }

    /// Somebody waits for blocks: those that have not been sent leave the line of the others.
    pub(crate) fn urge(&self, device: DeviceIndex, range: BlockRange) {
        let mut queues = lock(&self.queues);
        let meets = |header: &BlockHeader| {
            header.device == device
                && header.range.start.0 < range.end()
                && range.start.0 < header.range.end()
        };
        let Some(at) = queues.bulk.iter().position(meets) else { return };
        let mut rest = Vec::new();
        for header in queues.bulk.split_off(at) {
            if !meets(&header) {
                rest.push(header);
                continue;
            }
            let (start, end) = (header.range.start.0, header.range.end());
            let (from, to) = (start.max(range.start.0), end.min(range.end()));
            let part = |from, to| BlockHeader { range: BlockRange::new(from, to - from), ..header };
            queues.demand.push_back(BlockHeader { class: Class::Demand, ..part(from, to) });
            rest.extend((start < from).then(|| part(start, from)));
            rest.extend((to < end).then(|| part(to, end)));
        }
        queues.bulk.extend(rest);
        self.demand.notify_all();
    }

    /// The next run; `idle` is called before waiting for one. None when the link is closed.
    pub(crate) fn pop(&self, track: Track, mut idle: impl FnMut()) -> Option<BlockHeader> {
        let mut queues = lock(&self.queues);
        let mut told = false;
        loop {
            if queues.closed {
                return None;
            }
            let (queue, condition) = match track {
                Track::Demand => (&mut queues.demand, &self.demand),
                Track::Bulk => (&mut queues.bulk, &self.bulk),
            };
            if let Some(header) = queue.pop_front() {
                return Some(header);
            }
            if !told {
                drop(queues);
                idle();
                told = true;
                queues = lock(&self.queues);
                continue;
            }
            queues = condition.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Nothing more is sent.
    pub(crate) fn close(&self) {
        let mut queues = lock(&self.queues);
        queues.closed = true;
        queues.demand.clear();
        queues.bulk.clear();
        self.demand.notify_all();
        self.bulk.notify_all();
    }
}

/// The link in use, as the driver's thread has it.
pub(crate) struct Lane {
    pub(crate) id: silo_block::session::LinkId,
    pub(crate) control: Outgoing,
    pub(crate) hangup: Hangup,
    pub(crate) work: std::sync::Arc<Work>,
    /// Of `control.sent()`, what was counted already.
    pub(crate) counted: u64,
}

impl Lane {
    /// Ends it, now.
    pub(crate) fn close(&self) {
        self.hangup.hang_up();
        self.work.close();
    }
}

/// Bytes of frames, counted by all threads of an end.
#[derive(Default)]
pub(crate) struct WireCount {
    pub(crate) control_sent: AtomicU64,
    pub(crate) control_received: AtomicU64,
    pub(crate) data: AtomicU64,
    pub(crate) demand: AtomicU64,
}

impl WireCount {
    pub(crate) fn read(&self) -> crate::report::WireBytes {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        crate::report::WireBytes {
            control_sent: load(&self.control_sent),
            control_received: load(&self.control_received),
            data: load(&self.data),
            demand: load(&self.demand),
        }
    }

    pub(crate) fn blocks(&self, track: Track) -> &AtomicU64 {
        match track {
            Track::Demand => &self.demand,
            Track::Bulk => &self.data,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use silo_block::rounds::Epoch;

    fn header(start: u64, count: u64, class: Class) -> BlockHeader {
        let range = BlockRange::new(start, count);
        BlockHeader { device: DeviceIndex(0), range, epoch: Epoch(1), class }
    }

    #[test]
    fn blocks_that_somebody_waits_for_leave_the_line_and_nothing_is_lost_or_doubled() {
        let work = Work::default();
        (0..4).for_each(|n| work.push(Track::Bulk, header(n * 10, 10, Class::Bulk)));
        work.urge(DeviceIndex(1), BlockRange::new(0, 40));
        work.urge(DeviceIndex(0), BlockRange::new(18, 4));
        let drain = |track| {
            let mut all = Vec::new();
            let closes = std::cell::Cell::new(false);
            while let Some(header) = work.pop(track, || closes.set(true)) {
                all.push((header.range.start.0, header.range.count));
                let queues = lock(&work.queues);
                let left =
                    if track == Track::Bulk { queues.bulk.len() } else { queues.demand.len() };
                if left == 0 {
                    break;
                }
            }
            all
        };
        assert_eq!(drain(Track::Demand), [(18, 2), (20, 2)]);
        assert_eq!(drain(Track::Bulk), [(0, 10), (10, 8), (22, 8), (30, 10)]);
    }
}
