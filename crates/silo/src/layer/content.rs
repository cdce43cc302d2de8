//! Reading through layers, and writing to the top one.

use super::stack::Layer;
use crate::{
    block::BlockRange,
    geometry::Geometry,
    io::{Allocation, BlockDevice, Extent},
    map::{BlockState, MapError},
    range::{ZEROS, add_extent},
};
use std::{io, sync::Arc};

/// Layers, lowest first, over a base that may be shorter than they are.
#[derive(Clone)]
pub(super) struct Content {
    pub(super) geometry: Geometry,
    pub(super) base: Option<Arc<dyn BlockDevice>>,
    pub(super) layers: Arc<[Arc<Layer>]>,
}

/// The part of an access that lies in a run of blocks: offset and length in bytes.
fn cut(geometry: Geometry, run: BlockRange, offset: u64, end: u64) -> (u64, u64) {
    let start = geometry.offset(run.start).max(offset);
    (start, (geometry.offset(run.start) + geometry.bytes_of(run)).min(end) - start)
}

impl Content {
    pub(super) fn top(&self) -> &Arc<Layer> {
        self.layers.last().expect("a stack has a layer")
    }

    /// Reads bytes inside the device.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_below(self.layers.len(), offset, buf)
    }

    /// Reads what the lowest `depth` layers and the base hold.
    fn read_below(&self, depth: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let Some(index) = depth.checked_sub(1) else { return self.read_base(offset, buf) };
        let overlay = &self.layers[index].overlay;
        let end = offset + buf.len() as u64;
        for (run, state) in overlay.states().runs(self.geometry.touched(offset, end - offset)) {
            let (start, length) = cut(self.geometry, run, offset, end);
            let part = &mut buf[(start - offset) as usize..][..length as usize];
            match state {
                BlockState::Data => overlay.read(start, part)?,
                BlockState::Base => self.read_below(index, start, part)?,
                BlockState::Zero | BlockState::Missing => part.fill(0),
            }
        }
        Ok(())
    }

    /// How much of an access the base has, and the base.
    fn in_base(&self, offset: u64, length: u64) -> Option<(&dyn BlockDevice, u64)> {
        let base = self.base.as_deref()?;
        let inside = base.size().saturating_sub(offset).min(length);
        (inside > 0).then_some((base, inside))
    }

    fn read_base(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let Some((base, inside)) = self.in_base(offset, buf.len() as u64) else {
            buf.fill(0);
            return Ok(());
        };
        let (content, beyond) = buf.split_at_mut(inside as usize);
        beyond.fill(0);
        base.read_at(offset, content)
    }

    /// As [`Content::read`], if nothing has to be waited for.
    pub(super) fn try_read(&self, depth: usize, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let Some(index) = depth.checked_sub(1) else {
            let Some((base, inside)) = self.in_base(offset, buf.len() as u64) else {
                buf.fill(0);
                return Ok(true);
            };
            let (content, beyond) = buf.split_at_mut(inside as usize);
            beyond.fill(0);
            return base.try_read_at(offset, content);
        };
        let overlay = &self.layers[index].overlay;
        let end = offset + buf.len() as u64;
        for (run, state) in overlay.states().runs(self.geometry.touched(offset, end - offset)) {
            let (start, length) = cut(self.geometry, run, offset, end);
            let part = &mut buf[(start - offset) as usize..][..length as usize];
            let done = match state {
                BlockState::Data => overlay.try_read(start, part)?,
                BlockState::Base => self.try_read(index, start, part)?,
                BlockState::Zero | BlockState::Missing => {
                    part.fill(0);
                    true
                }
            };
            if !done {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether reading bytes may have to wait for the base.
    pub(super) fn may_wait(&self, depth: usize, offset: u64, length: u64) -> bool {
        let Some(index) = depth.checked_sub(1) else {
            let base = self.in_base(offset, length);
            return base.is_some_and(|(base, inside)| base.may_wait(offset, inside));
        };
        let range = self.geometry.touched(offset, length);
        self.layers[index].overlay.states().runs(range).any(|(run, state)| {
            let (start, length) = cut(self.geometry, run, offset, offset + length);
            state == BlockState::Base && self.may_wait(index, start, length)
        })
    }

    /// What bytes are made of, or the first few thousand runs of it.
    pub(super) fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        let mut found = Vec::new();
        self.extents_below(self.layers.len(), offset, length, &mut found)?;
        Ok(found)
    }

    /// False if there are too many.
    fn extents_below(
        &self,
        depth: usize,
        offset: u64,
        length: u64,
        found: &mut Vec<Extent>,
    ) -> io::Result<bool> {
        let Some(index) = depth.checked_sub(1) else {
            let Some((base, inside)) = self.in_base(offset, length) else {
                return Ok(add_extent(found, length, Allocation::Hole));
            };
            let mut told = 0;
            for extent in base.extents(offset, inside)? {
                let part = extent.length.min(inside - told);
                if !add_extent(found, part, extent.allocation) {
                    return Ok(false);
                }
                told += part;
            }
            return Ok(told == inside && add_extent(found, length - inside, Allocation::Hole));
        };
        let end = offset + length;
        let states = self.layers[index].overlay.states();
        for (run, state) in states.runs(self.geometry.touched(offset, length)) {
            let (start, length) = cut(self.geometry, run, offset, end);
            let goes_on = match state {
                BlockState::Data => add_extent(found, length, Allocation::Data),
                BlockState::Base => self.extents_below(index, start, length, found)?,
                BlockState::Zero | BlockState::Missing => {
                    add_extent(found, length, Allocation::Hole)
                }
            };
            if !goes_on {
                return Ok(false);
            }
        }
        Ok(true)
    }

    // ---- writes: the caller holds the top's range lock over the blocks that are touched

    /// Writes bytes inside the device to the top layer.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (geometry, states) = (self.geometry, self.top().overlay.states());
        let range = geometry.touched(offset, data.len() as u64);
        let covered = geometry.covered(offset, data.len() as u64);
        let (mut at, mut rest) = (offset, data);
        // A block that is not in the layer goes there as a whole: at most the first and the last.
        let partial = |block: u64| block < covered.start.0 || block >= covered.end();
        if partial(range.start.0) && states.get(range.start.0) != BlockState::Data {
            let end = geometry.offset(range.start) + geometry.length(range.start);
            let (head, tail) = rest.split_at(rest.len().min((end - at) as usize));
            self.write_merged(range.start.0, at, head)?;
            (at, rest) = (at + head.len() as u64, tail);
        }
        let last = range.end() - 1;
        if !rest.is_empty() && partial(last) && states.get(last) != BlockState::Data {
            let start = last * geometry.block();
            let (head, tail) = rest.split_at((start - at) as usize);
            self.write_merged(last, start, tail)?;
            rest = head;
        }
        if !rest.is_empty() {
            self.top().overlay.write(at, rest)?;
        }
        Ok(self.top().overlay.set_state(range, BlockState::Data)?)
    }

    /// Writes a block that is not in the top layer, with `part` put into it at byte `offset`.
    fn write_merged(&self, block: u64, offset: u64, part: &[u8]) -> io::Result<()> {
        let block = crate::block::BlockIndex(block);
        let start = self.geometry.offset(block);
        let mut whole = vec![0; self.geometry.length(block) as usize];
        self.read(start, &mut whole)?;
        whole[(offset - start) as usize..][..part.len()].copy_from_slice(part);
        Ok(self.top().overlay.write(start, &whole)?)
    }

    /// Makes bytes zero.
    pub(super) fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        let end = offset + length;
        let covered = self.geometry.covered(offset, length);
        if covered.count == 0 {
            return self.write_zeros(offset, end);
        }
        let start = self.geometry.offset(covered.start);
        let stop = start + self.geometry.bytes_of(covered);
        self.write_zeros(offset, start)?;
        self.write_zeros(stop, end)?;
        if allocate {
            self.top().overlay.allocate_zeros(start, stop - start)?;
            return Ok(self.top().overlay.set_state(covered, BlockState::Data)?);
        }
        Ok(self.drop_blocks(covered)?)
    }

    fn write_zeros(&self, mut at: u64, end: u64) -> io::Result<()> {
        while at < end {
            let length = (end - at).min(ZEROS.len() as u64);
            self.write(at, &ZEROS[..length as usize])?;
            at += length;
        }
        Ok(())
    }

    /// Makes whole blocks zero and gives their room back.
    pub(super) fn drop_blocks(&self, range: BlockRange) -> Result<(), MapError> {
        let overlay = &self.top().overlay;
        let had_data = overlay.states().any(range, BlockState::Data);
        overlay.set_state(range, BlockState::Zero)?;
        if had_data {
            // After the state: whoever sees the hole sees zeros either way.
            overlay.punch(range);
        }
        Ok(())
    }
}
