//! The disk as a device that moves: see [`Device`] for what each call promises.

use super::{Disk, DiskError};
use crate::{
    block::{BLOCK_SIZE, BlockIndex, BlockRange, BlockSet},
    device::{Demand, Device, DeviceError, DeviceName, Result},
    locks::Who,
    map::{BlockState, DiskStatus},
};

impl Disk {
    fn named<T>(
        &self,
        operation: &'static str,
        at: BlockIndex,
        result: std::result::Result<T, DiskError>,
    ) -> Result<T> {
        result.map_err(|error| DeviceError {
            device: self.name.clone(),
            operation,
            at: at.to_string(),
            source: error.into(),
        })
    }

    fn inside(
        &self,
        start: BlockIndex,
        bytes: usize,
    ) -> std::result::Result<BlockRange, DiskError> {
        let (length, size) = (bytes as u64, self.size());
        let range = BlockRange { start, count: length / BLOCK_SIZE as u64 };
        let fits = start.0.checked_add(range.count).is_some_and(|end| end <= self.blocks());
        if !bytes.is_multiple_of(BLOCK_SIZE) || !fits {
            let offset = start.0.saturating_mul(BLOCK_SIZE as u64);
            return Err(DiskError::OutOfRange { offset, length, size });
        }
        Ok(range)
    }

    fn inside_range(&self, range: BlockRange) -> std::result::Result<BlockRange, DiskError> {
        let bytes = range.count.checked_mul(BLOCK_SIZE as u64);
        self.inside(range.start, bytes.map_or(usize::MAX, |bytes| bytes as usize))
    }

    fn whole(&self) -> BlockRange {
        BlockRange::new(0, self.blocks())
    }

    /// The status in which blocks may be stored; durable, if it was not that already.
    fn receive(&self, operation: &'static str) -> std::result::Result<(), DiskError> {
        match self.status() {
            DiskStatus::Receiving => Ok(()),
            DiskStatus::Whole => self.store.sync_status(DiskStatus::Receiving),
            DiskStatus::Armed => Err(DiskError::State {
                operation,
                detail: "the machine runs here already; blocks are filled, not stored".to_owned(),
            }),
        }
    }

    fn store_blocks(&self, start: BlockIndex, data: &[u8]) -> std::result::Result<(), DiskError> {
        let range = self.inside(start, data.len())?;
        if range.count == 0 {
            return Ok(());
        }
        self.receive("storing blocks")?;
        let _guard = self.locks.lock(range, Who::Mover)?;
        self.store.write(start.offset(), data)?;
        self.store.set_state(range, BlockState::Data)
    }

    fn store_zeros(&self, range: BlockRange) -> std::result::Result<(), DiskError> {
        let range = self.inside_range(range)?;
        self.receive("storing blocks")?;
        let _guard = self.locks.lock(range, Who::Mover)?;
        let had_data = self.store.states().any(range, BlockState::Data);
        self.store.set_state(range, BlockState::Zero)?;
        if had_data {
            self.store.punch(range);
        }
        Ok(())
    }

    fn arm_missing(
        &self,
        missing: &BlockSet,
        demand: Demand,
    ) -> std::result::Result<(), DiskError> {
        if missing.device_blocks() != self.blocks() {
            return Err(DiskError::State {
                operation: "arming",
                detail: format!(
                    "the set is of a device of {} blocks, the disk has {}",
                    missing.device_blocks(),
                    self.blocks()
                ),
            });
        }
        match self.status() {
            // Correct, but with syncs; see the module's documentation.
            DiskStatus::Whole => self.store.sync_status(DiskStatus::Receiving)?,
            DiskStatus::Receiving => {}
            // Again, after a restart or with another source: what the guest wrote stays.
            DiskStatus::Armed => {
                let mut lost = missing.clone();
                lost.subtract(&self.missing());
                if !lost.is_empty() {
                    return Err(DiskError::State {
                        operation: "arming again",
                        detail: format!("{} of the blocks are here already", lost.len()),
                    });
                }
            }
        }
        let _guard = self.locks.lock(self.whole(), Who::Mover)?;
        self.store.set_states(missing, BlockState::Missing)?;
        self.dirty.clear();
        self.arrivals.connect(demand);
        self.thaw()?;
        self.store.set_status(DiskStatus::Armed)
    }

    /// Takes `put` for those blocks of `range` that are still missing.
    fn fill_with(
        &self,
        range: BlockRange,
        state: BlockState,
        put: impl Fn(BlockRange) -> std::result::Result<(), DiskError>,
    ) -> std::result::Result<u64, DiskError> {
        let _guard = self.locks.lock(range, Who::Mover)?;
        let mut taken = 0;
        for (run, old) in self.store.states().runs(range) {
            if old != BlockState::Missing {
                continue;
            }
            put(run)?;
            self.store.set_state(run, state)?;
            taken += run.count;
        }
        if taken > 0 {
            self.arrivals.wake();
        }
        Ok(taken)
    }

    fn finish(&self) -> std::result::Result<(), DiskError> {
        match self.status() {
            DiskStatus::Whole => return Ok(()),
            DiskStatus::Armed if self.missing_blocks() == 0 => {}
            DiskStatus::Armed => {
                return Err(DiskError::State {
                    operation: "completing",
                    detail: format!("{} blocks are missing", self.missing_blocks()),
                });
            }
            DiskStatus::Receiving => {
                return Err(DiskError::State {
                    operation: "completing",
                    detail: "it was never armed, so nobody knows which blocks are stale".to_owned(),
                });
            }
        }
        // The long sync lets the guest's flushes share it; what remains for the next is little.
        self.flusher.sync()?;
        self.store.sync_status(DiskStatus::Whole)?;
        self.arrivals.disconnect();
        Ok(())
    }

    fn forget(&self) -> std::result::Result<(), DiskError> {
        self.arrivals.disconnect();
        self.arrivals.interrupt();
        let _guard = self.locks.lock(self.whole(), Who::Mover)?;
        self.store.reset()?;
        self.dirty.clear();
        self.thaw()
    }
}

impl Device for Disk {
    fn name(&self) -> &DeviceName {
        &self.name
    }

    fn blocks(&self) -> u64 {
        self.store.blocks()
    }

    fn start_tracking(&self) -> Result<()> {
        // Writes are always marked. One whose mark is lost here put its content in place before.
        self.dirty.clear();
        Ok(())
    }

    fn take_dirty(&self) -> Result<BlockSet> {
        Ok(self.dirty.take())
    }

    fn put_back(&self, blocks: &BlockSet) {
        self.dirty.insert_set(blocks);
    }

    fn allocated(&self) -> Result<BlockSet> {
        let mut set = self.store.states().select(&[BlockState::Zero]);
        // Behind the base an untouched disk is zero too.
        let base = self.store.base_blocks().min(self.blocks());
        set.remove_range(BlockRange::new(base, self.blocks() - base));
        set.union_with(&self.store.states().select(&[BlockState::Data, BlockState::Missing]));
        if let Some(below) = self.store.below_blocks() {
            set.union_with(&below);
        }
        Ok(set)
    }

    fn read(&self, start: BlockIndex, buf: &mut [u8]) -> Result<()> {
        let read = || {
            let range = self.inside(start, buf.len())?;
            let mut rest = buf;
            for (run, state) in self.store.states().runs(range) {
                if state == BlockState::Missing {
                    return Err(DiskError::NotArrived { range: run });
                }
                let (part, after) = rest.split_at_mut(run.bytes() as usize);
                self.store.read(state, run.start.offset(), part)?;
                rest = after;
            }
            Ok(())
        };
        self.named("read", start, read())
    }

    fn begin(&self) -> Result<()> {
        self.named("begin an arrival", BlockIndex(0), self.receive("beginning an arrival"))
    }

    fn reset(&self) -> Result<()> {
        self.named("reset", BlockIndex(0), self.forget())
    }

    fn store(&self, start: BlockIndex, data: &[u8]) -> Result<()> {
        self.named("store", start, self.store_blocks(start, data))
    }

    fn store_zero(&self, range: BlockRange) -> Result<()> {
        self.named("store zeros", range.start, self.store_zeros(range))
    }

    fn arm(&self, missing: &BlockSet, demand: Demand) -> Result<()> {
        self.named("arm", BlockIndex(0), self.arm_missing(missing, demand))
    }

    fn fill(&self, start: BlockIndex, data: &[u8]) -> Result<u64> {
        let fill = || {
            let range = self.inside(start, data.len())?;
            self.fill_with(range, BlockState::Data, |run| {
                let from = (run.start.offset() - start.offset()) as usize;
                self.store.write(run.start.offset(), &data[from..from + run.bytes() as usize])
            })
        };
        self.named("fill", start, fill())
    }

    fn fill_zero(&self, range: BlockRange) -> Result<u64> {
        let fill = || self.fill_with(self.inside_range(range)?, BlockState::Zero, |_| Ok(()));
        self.named("fill zeros", range.start, fill())
    }

    fn missing_blocks(&self) -> u64 {
        self.store.states().count(BlockState::Missing)
    }

    fn missing(&self) -> BlockSet {
        self.store.states().select(&[BlockState::Missing])
    }

    fn complete(&self) -> Result<()> {
        self.named("complete", BlockIndex(0), self.finish())
    }
}
