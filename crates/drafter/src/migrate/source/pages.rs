//! The source after the token: paused, its content frozen, serving what is missing elsewhere.
//!
//! Two threads share the set of blocks that have not been sent: the fault thread answers demands
//! on the fault connection, with a few neighbours; the pusher sends the rest on the main
//! connection, going on behind the last fault, because what a guest touches next lies near.

use super::send::{SendError, send_run};
use crate::migrate::{
    link::{Incoming, Outgoing},
    protocol::{DeviceNumber, Frame, MAX_RUN, WireError},
};
use silo::{
    block::{BlockIndex, BlockRange, BlockSet},
    device::Device,
};
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Blocks that answer one demand at most: the one that somebody waits for and what follows it.
const CLUSTER: u64 = 8;

/// Shared by the two threads.
pub(super) struct PageServer {
    devices: Vec<Arc<dyn Device>>,
    remaining: Mutex<Vec<BlockSet>>,
    /// Of these, those that nobody else has.
    first: Mutex<Vec<BlockSet>>,
    /// What was pushed last was behind a fault.
    behind_fault: AtomicBool,
    /// Device number in the upper 8 bits, block after the last fault below; `u64::MAX` for none.
    last_fault: AtomicU64,
    fault_bytes: AtomicU64,
}

impl PageServer {
    /// Serves `remaining[i]` of `devices[i]`.
    pub(super) fn new(devices: Vec<Arc<dyn Device>>, remaining: Vec<BlockSet>) -> Self {
        debug_assert_eq!(devices.len(), remaining.len());
        Self {
            devices,
            remaining: Mutex::new(remaining),
            first: Mutex::default(),
            behind_fault: AtomicBool::new(false),
            last_fault: AtomicU64::new(u64::MAX),
            fault_bytes: AtomicU64::new(0),
        }
    }

    /// Bytes sent on the fault connection.
    pub(super) fn fault_bytes(&self) -> u64 {
        self.fault_bytes.load(Ordering::Relaxed)
    }

    /// Blocks not sent yet, over all devices.
    pub(super) fn remaining(&self) -> u64 {
        self.lock().iter().map(BlockSet::len).sum()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<BlockSet>> {
        self.remaining.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The destination has said what it lacks: that is to be sent, whatever was sent before.
    pub(super) fn reset(&self, remaining: Vec<BlockSet>) {
        *self.lock() = remaining;
    }

    /// What nobody has but this host is pushed before all else.
    pub(super) fn first(&self, sets: Vec<BlockSet>) {
        *self.first.lock().unwrap_or_else(PoisonError::into_inner) = sets;
    }

    /// The next of what goes first, of what is left.
    fn next_first(&self, remaining: &[BlockSet]) -> Option<(usize, BlockRange)> {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        for (device, set) in first.iter_mut().enumerate() {
            while let Some(range) = set.next_range(BlockIndex(0), MAX_RUN) {
                set.remove_range(range);
                // Faults have taken some of it.
                let mut parts = remaining[device].ranges_in(range);
                if let Some(part) = parts.next() {
                    parts.for_each(|rest| set.insert_range(rest));
                    return Some((device, part));
                }
            }
        }
        None
    }

    /// Answers demands until the connection ends. A demand for a block that was sent already is
    /// answered again: it may still be on its way behind bulk data. `heard` is called for each frame.
    pub(super) fn serve(
        &self,
        mut from: Incoming,
        to: &Mutex<Outgoing>,
        heard: impl Fn(),
    ) -> Result<(), SendError> {
        let mut buffer = Vec::new();
        loop {
            let frame = match from.read() {
                Ok(frame) => frame,
                Err(WireError::Io(error)) => return Err(error.into()),
                Err(other) => return Err(std::io::Error::other(other.to_string()).into()),
            };
            heard();
            match frame {
                Frame::Demand { device, range } => {
                    let Some(source) = self.devices.get(usize::from(device.0)) else { continue };
                    if range.end() > source.blocks() {
                        continue;
                    }
                    let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
                    let before = to.sent();
                    for piece in range.chunks(MAX_RUN) {
                        let answer = self.claim(device, piece);
                        send_run(&mut to, device, source.as_ref(), answer, &mut buffer)?;
                    }
                    to.flush()?;
                    self.fault_bytes.fetch_add(to.sent() - before, Ordering::Relaxed);
                }
                Frame::Ping(nonce) => {
                    let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
                    to.write(&Frame::Pong(nonce))?;
                    to.flush()?;
                }
                _ => {}
            }
        }
    }

    /// The demanded blocks and the unsent ones right behind them, now counted as sent.
    fn claim(&self, device: DeviceNumber, demanded: BlockRange) -> BlockRange {
        let mut sets = self.lock();
        let set = &mut sets[usize::from(device.0)];
        let mut end = demanded.end();
        while end - demanded.start.0 < CLUSTER && set.contains(BlockIndex(end)) {
            end += 1;
        }
        let range = BlockRange::new(demanded.start.0, end - demanded.start.0);
        set.remove_range(range);
        let mark = u64::from(device.0) << 56 | end & ((1 << 56) - 1);
        self.last_fault.store(mark, Ordering::Relaxed);
        range
    }

    /// The next run to push: behind the last fault if there was a new one (a guest that waits all the time
    /// has half of the runs), else of what goes first, else behind the last run, else from the start of the
    /// next device that has something left.
    pub(super) fn next(&self, cursor: &mut (usize, u64)) -> Option<(DeviceNumber, BlockRange)> {
        let mut sets = self.lock();
        let fault = self.last_fault.swap(u64::MAX, Ordering::Relaxed);
        let new = fault != u64::MAX;
        if new {
            *cursor = ((fault >> 56) as usize, fault & ((1 << 56) - 1));
        }
        let again = self.behind_fault.swap(new, Ordering::Relaxed);
        if (!new || again)
            && let Some((device, range)) = self.next_first(&sets)
        {
            self.behind_fault.store(false, Ordering::Relaxed);
            sets[device].remove_range(range);
            return Some((DeviceNumber(device as u8), range));
        }
        let count = sets.len();
        for step in 0..=count {
            let device = (cursor.0 + step) % count;
            let from = if step == 0 { cursor.1 } else { 0 };
            if let Some(range) = sets[device].next_range(BlockIndex(from), MAX_RUN) {
                sets[device].remove_range(range);
                *cursor = (device, range.end());
                return Some((DeviceNumber(device as u8), range));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use silo::{device::DeviceName, memory::Memory};

    const BLOCKS: u64 = 4096;

    fn set(ranges: &[(u64, u64)]) -> BlockSet {
        let mut set = BlockSet::new(BLOCKS);
        ranges.iter().for_each(|(start, count)| set.insert_range(BlockRange::new(*start, *count)));
        set
    }

    #[test]
    fn what_only_this_host_has_is_pushed_first_without_what_faults_have_taken_and_all_of_it_once() {
        let device = |name: &str| -> Arc<dyn Device> {
            let name = DeviceName::new(name).unwrap();
            Arc::new(Memory::new(name, BLOCKS * 4096).unwrap())
        };
        let all = set(&[(0, BLOCKS)]);
        let sets = vec![all.clone(), all.clone()];
        let pages = PageServer::new(vec![device("memory"), device("disk")], sets.clone());
        let mut cursor = (0, 0);
        let begun = pages.next(&mut cursor).unwrap();
        assert_eq!(begun, (DeviceNumber(0), BlockRange::new(0, MAX_RUN)));
        // A fault in the midst of what goes first, and what follows it.
        pages.first(vec![set(&[(3000, 20)]), set(&[(0, 1), (4000, MAX_RUN + 1)])]);
        let claimed = pages.claim(DeviceNumber(0), BlockRange::new(3004, 1));
        assert_eq!(claimed, BlockRange::new(3004, CLUSTER));
        let mut order = Vec::new();
        let mut faults = vec![3300, 3200];
        let (mut left, mut sent) = (sets, vec![begun, (DeviceNumber(0), claimed)]);
        while let Some(next) = pages.next(&mut cursor) {
            order.push(next);
            sent.push(next);
            // Two more faults, right behind one another.
            if let Some(at) = faults.pop() {
                let claimed = pages.claim(DeviceNumber(0), BlockRange::new(at, 1));
                sent.push((DeviceNumber(0), claimed));
            }
        }
        // Behind the fault, which is what the guest needs next; then what goes first.
        let behind = BlockRange::new(3004 + CLUSTER, MAX_RUN.min(BLOCKS - 3004 - CLUSTER));
        assert_eq!(order[0], (DeviceNumber(0), behind));
        let first = [(0, 3000, 4), (1, 0, 1), (1, 4000, MAX_RUN), (1, 4000 + MAX_RUN, 1)];
        let first = first
            .map(|(device, start, count)| (DeviceNumber(device), BlockRange::new(start, count)));
        // Who faults all the time has every second one.
        let between = (DeviceNumber(0), BlockRange::new(3300 + CLUSTER, MAX_RUN));
        assert_eq!((order[1], order[2]), (first[0], between), "{order:?}");
        assert_eq!(order[3..6], first[1..], "{order:?}");
        for (device, range) in sent {
            let left = &mut left[usize::from(device.0)];
            assert!(left.contains_range(range), "{range:?} was sent twice");
            left.remove_range(range);
        }
        assert!(left.iter().all(BlockSet::is_empty));
        assert_eq!(pages.remaining(), 0);
    }
}
