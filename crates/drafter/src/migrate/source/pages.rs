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
    atomic::{AtomicU64, Ordering},
};

/// Blocks that answer one demand at most: the one that somebody waits for and what follows it.
const CLUSTER: u64 = 8;

/// Shared by the two threads.
pub(super) struct PageServer {
    devices: Vec<Arc<dyn Device>>,
    remaining: Mutex<Vec<BlockSet>>,
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

    /// The next run to push: behind the last fault if there was a new one, else behind the last
    /// run, else from the start of the next device that has something left.
    pub(super) fn next(&self, cursor: &mut (usize, u64)) -> Option<(DeviceNumber, BlockRange)> {
        let mut sets = self.lock();
        let fault = self.last_fault.swap(u64::MAX, Ordering::Relaxed);
        if fault != u64::MAX {
            *cursor = ((fault >> 56) as usize, fault & ((1 << 56) - 1));
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
