//! The one flight of a switchover: everything the destination needs to run, sent between the
//! pause and the token without waiting for an answer.

use super::{MachineError, SendError, Session, Stop, is_tracked, send::send_run, take_if_tracked};
use crate::driver::Urgent;
use crate::migrate::{
    link::Outgoing,
    protocol::{DeviceNumber, MAX_RUN},
    timings::BlackoutParts,
};
use silo::{
    block::{BLOCK_SIZE, BlockIndex, BlockRange, BlockSet, is_zero},
    device::Device,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// zstd's level for the device state: the fastest.
const STATE_LEVEL: i32 = 1;

/// The pause and what followed, up to the token.
pub(super) struct Flight {
    /// When the pause began.
    pub paused_at: Instant,
    /// Blocks that follow after the token.
    pub missing: Vec<BlockSet>,
    /// The driver's state, compressed.
    pub state: Vec<u8>,
    /// Its size before, bytes.
    pub state_bytes: u64,
    /// All that was dirty at the pause, bytes.
    pub dirty_bytes: u64,
    /// Of these, sent in the flight.
    pub flight_bytes: u64,
    /// Times so far.
    pub parts: BlackoutParts,
}

pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Session<'_> {
    /// Pauses the machine and sends all but the token. `left` is what the rounds left over, `told`
    /// what of it the destination knows to be stale; `state_blocks` are those that loading the
    /// state reads.
    pub(super) fn fly(
        &mut self,
        left: Vec<BlockSet>,
        told: &[BlockSet],
        state_blocks: &[(DeviceNumber, BlockRange)],
        epoch: u64,
        all: bool,
    ) -> Result<Flight, MachineError> {
        let mut parts = BlackoutParts::default();
        let _urgent = Urgent::this_thread();
        let paused_at = Instant::now();
        let endpoint = self.verdict.endpoint;
        self.around.machine.pause(endpoint.as_ref(), epoch)?;
        parts.pause_ms = ms(paused_at.elapsed());

        // The state is saved while the last dirty blocks are collected and the hot ones leave: each
        // takes milliseconds. Saving writes nothing to the guest's memory, and if it did, a write
        // before the scan would be in it and one after it would be counted (`late_writes`).
        let save = Instant::now();
        let budget = if all { u64::MAX } else { self.planner.flight_bytes() };
        let Self { plan, around, devices, taken, main, .. } = self;
        let machine = &mut *around.machine;
        let mut dirty = left;
        let (state, sent) = std::thread::scope(|scope| {
            let saving =
                std::thread::Builder::new().name("save".into()).spawn_scoped(scope, move || {
                    let _urgent = Urgent::this_thread();
                    let state = machine.save()?;
                    // Mostly zeros: 175 KB become 15 KB in well under a millisecond.
                    let small = zstd::bulk::compress(&state, STATE_LEVEL)?;
                    Ok::<_, MachineError>((small, state.len() as u64))
                });
            let sent = (|| {
                let scan = Instant::now();
                for (at, set) in dirty.iter_mut().enumerate() {
                    set.union_with(&take_if_tracked(plan, devices, taken, at)?);
                    if !is_tracked(plan, &devices[at]) {
                        // Pages that came to be since the move began.
                        set.union_with(&devices[at].allocated()?);
                    }
                }
                parts.scan_ms = ms(scan.elapsed());
                let dirty_bytes = dirty.iter().map(BlockSet::bytes).sum();
                // What was written last is what will be touched first.
                let mut fresh = dirty.clone();
                fresh.iter_mut().zip(told).for_each(|(set, told)| set.subtract(told));
                let hot = hot_sets(&dirty, &fresh, state_blocks, budget);
                // The lists first: the destination drops what is stale while the state is saved.
                for (at, set) in dirty.iter_mut().enumerate() {
                    set.subtract(&hot[at]);
                    fresh[at].subtract(&hot[at]);
                    main.missing(DeviceNumber(at as u8), &fresh[at])?;
                }
                main.flush()?;
                send_hot(main, devices, &hot)?;
                Ok::<(u64, u64), Stop>((dirty_bytes, hot.iter().map(BlockSet::bytes).sum()))
            })();
            let state = match saving {
                Ok(thread) => {
                    thread.join().unwrap_or_else(|_| Err("saving the state failed".into()))
                }
                Err(error) => Err(error.into()),
            };
            (state, sent)
        });
        let (dirty_bytes, mut flight_bytes) = sent?;
        let (state, state_bytes) = state?;
        parts.save_ms = ms(save.elapsed());

        let send = Instant::now();
        flight_bytes += send_zeros_as_data(&mut self.main, &self.devices, state_blocks)?;
        parts.send_ms = ms(send.elapsed());
        Ok(Flight {
            paused_at,
            missing: dirty,
            state,
            state_bytes,
            dirty_bytes,
            flight_bytes,
            parts,
        })
    }
}

fn send_hot(
    to: &mut Outgoing,
    devices: &[Arc<dyn Device>],
    sets: &[BlockSet],
) -> Result<(), SendError> {
    let mut buffer = Vec::new();
    for (at, set) in sets.iter().enumerate() {
        for range in set.ranges() {
            for piece in range.chunks(MAX_RUN) {
                let number = DeviceNumber(at as u8);
                send_run(to, number, devices[at].as_ref(), piece, &mut buffer)?;
            }
        }
    }
    Ok(())
}

/// Sends those state blocks that are zero (rings that were never used) as data. A note would leave
/// a hole at the destination, and loading the state would fault on it.
fn send_zeros_as_data(
    to: &mut Outgoing,
    devices: &[Arc<dyn Device>],
    state_blocks: &[(DeviceNumber, BlockRange)],
) -> Result<u64, SendError> {
    let mut bytes = 0;
    let mut block = [0; BLOCK_SIZE];
    for (number, range) in state_blocks {
        let Some(device) = devices.get(usize::from(number.0)) else { continue };
        for at in range.start.0..range.end() {
            device.read(BlockIndex(at), &mut block)?;
            if is_zero(&block) {
                to.blocks(*number, BlockIndex(at), &block)?;
                bytes += BLOCK_SIZE as u64;
            }
        }
    }
    Ok(bytes)
}

/// Which dirty blocks travel in the flight: those that loading reads, whatever the budget, then of
/// the `fresh` ones disks (their metadata is small and touched at once), then memory in ascending
/// order.
fn hot_sets(
    dirty: &[BlockSet],
    fresh: &[BlockSet],
    state_blocks: &[(DeviceNumber, BlockRange)],
    budget: u64,
) -> Vec<BlockSet> {
    let mut hot: Vec<BlockSet> =
        dirty.iter().map(|set| BlockSet::new(set.device_blocks())).collect();
    for (number, range) in state_blocks {
        if let Some(set) = hot.get_mut(usize::from(number.0)) {
            set.insert_range(*range);
        }
    }
    let mut used = 0;
    for (set, dirty) in hot.iter_mut().zip(dirty) {
        set.intersect_with(dirty);
        used += set.bytes();
    }
    for (set, fresh) in hot.iter_mut().zip(fresh).rev() {
        if used + fresh.bytes() <= budget {
            used += fresh.bytes();
            set.union_with(fresh);
            continue;
        }
        for range in fresh.ranges() {
            for piece in range.chunks(MAX_RUN) {
                if used + piece.bytes() > budget {
                    return hot;
                }
                used += piece.bytes();
                set.insert_range(piece);
            }
        }
    }
    hot
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_loading_reads_flies_even_without_budget_but_only_if_it_is_due() {
        let mut memory = BlockSet::new(1000);
        memory.insert_range(BlockRange::new(0, 500));
        let dirty = vec![memory, BlockSet::full(10)];
        let rings =
            [(DeviceNumber(0), BlockRange::new(7, 2)), (DeviceNumber(0), BlockRange::new(900, 1))];
        let hot = hot_sets(&dirty, &dirty, &rings, 0);
        assert_eq!(hot[0].ranges().collect::<Vec<_>>(), [BlockRange::new(7, 2)]);
        assert!(hot[1].is_empty());
        let hot = hot_sets(&dirty, &dirty, &rings, 20 * 4096);
        assert_eq!(hot[1].len(), 10, "the disk first");
        assert!(hot[0].len() + hot[1].len() <= 20);
        let hot = hot_sets(&dirty, &dirty, &rings, u64::MAX);
        assert_eq!(hot, dirty);
    }
}
