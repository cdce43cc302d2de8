//! A round on its way into the store: what was frozen is read, named, and stored where it is new.
//!
//! A generation is one round, or two: all that there is while somebody still writes, and then, when
//! nobody does, what was written meanwhile. Either way it is one commit.

use super::{LineWriter, State, Stored, upload::Upload};
use crate::{
    StoreError,
    capture::{DeviceInfo, Frozen},
    error::Result,
    format::runs::{Collector, Content, Run},
    keys::{BlockName, DataKey},
    root,
};
use silo_block::{
    block::{BlockRange, BlockSet, is_zero},
    geometry::Geometry,
};
use std::{sync::atomic::AtomicBool, time::Instant};

/// Bytes read from a device at a time: how long a writer may be held by the reading.
const READ: u64 = 128 << 10;

/// What a round became of each device.
type Changes = Vec<Vec<Run>>;

/// Gives the second round of a generation.
pub type Rest<'a> = &'a mut dyn FnMut() -> Result<Box<dyn Frozen>>;

impl LineWriter {
    /// Stores one frozen round as the next generation: all of it or, on an error, nothing. Does not
    /// release or put back the round. `everything` says that it lists all blocks; `stop` ends it.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] if another writer took the line, for good; else the round can be put
    /// back, and a later one tried.
    pub fn store(
        &mut self,
        infos: &[DeviceInfo],
        frozen: &dyn Frozen,
        everything: bool,
        label: &str,
        stop: &AtomicBool,
    ) -> Result<Stored> {
        self.store_rounds(infos, frozen, everything, None, label, stop)
    }

    /// The same, of a group that is written to while `first` is read: what was written since `first`
    /// began is what `rest` gives, which is called when all of `first` is stored. Blocks that `first`
    /// has and `rest` lists again may be anything in `first`.
    ///
    /// # Errors
    /// As [`LineWriter::store`], and those of `rest`.
    pub fn store_with_rest(
        &mut self,
        infos: &[DeviceInfo],
        first: &dyn Frozen,
        everything: bool,
        rest: Rest<'_>,
        label: &str,
        stop: &AtomicBool,
    ) -> Result<Stored> {
        self.store_rounds(infos, first, everything, Some(rest), label, stop)
    }

    fn store_rounds(
        &mut self,
        infos: &[DeviceInfo],
        frozen: &dyn Frozen,
        everything: bool,
        rest: Option<Rest<'_>>,
        label: &str,
        stop: &AtomicBool,
    ) -> Result<Stored> {
        self.asked = false;
        self.check_owner()?;
        let _span = tracing::info_span!("generation", line = %self.line).entered();
        let (start, before) = (Instant::now(), self.store.requests());
        if everything && !self.seeded {
            tracing::info_span!("seed").in_scope(|| self.seed())?;
        }
        if self.needs_everything() && !everything {
            let detail = "the round lists changes only, but content stored before is not sure";
            return Err(StoreError::Group {
                line: self.line.to_string(),
                detail: detail.to_owned(),
            });
        }
        self.fit(infos)?;
        let mut stored = Stored::default();
        let changes = tracing::info_span!("upload")
            .in_scope(|| self.upload(infos, frozen, everything, stop, &mut stored))?;
        let mut undo = vec![self.apply(&changes)];
        let was_incomplete = self.incomplete;
        self.incomplete &= !everything;
        let mut held = frozen.held();
        let committed = (|| {
            if let Some(rest) = rest {
                let rest = rest()?;
                let changes = tracing::info_span!("rest")
                    .in_scope(|| self.upload(infos, &*rest, false, stop, &mut stored))?;
                undo.push(self.apply(&changes));
                held = held.max(rest.held());
            }
            for held in &mut self.devices {
                held.root = held.tags.root(held.places.geometry());
            }
            tracing::info_span!("commit").in_scope(|| self.commit(label, stop, &mut stored))
        })();
        match committed {
            Ok(number) => (stored.number, stored.writer) = (number, self.nonce),
            Err(error) => {
                // The newest first: each says what was there before it.
                for changes in undo.iter().rev() {
                    self.apply(changes);
                }
                self.incomplete |= was_incomplete;
                return Err(error);
            }
        }
        stored.requests = self.store.requests().since(&before);
        stored.held = held;
        stored.took = start.elapsed();
        Ok(stored)
    }

    /// Notes where blocks are now; gives what undoes that.
    fn apply(&mut self, changes: &Changes) -> Changes {
        changes.iter().zip(&mut self.devices).map(|(runs, held)| held.places.apply(runs)).collect()
    }

    /// Reads all blocks of the round, and stores those whose content is new.
    fn upload(
        &mut self,
        infos: &[DeviceInfo],
        frozen: &dyn Frozen,
        everything: bool,
        stop: &AtomicBool,
        stored: &mut Stored,
    ) -> Result<Changes> {
        let Self { store, key, options, packs, names, limiter, began, devices, .. } = self;
        let mut upload =
            Upload::new(&store.remote, key, options.packs, packs, limiter, *began, stop);
        let mut changes = Vec::with_capacity(infos.len());
        let mut buf = Vec::new();
        let result = infos.iter().enumerate().try_for_each(|(device, info)| {
            let mut collector = Collector::default();
            let tags = &mut devices[device].tags;
            if everything {
                tags.begin();
            }
            let geometry = info.geometry;
            let shift = geometry.block().trailing_zeros() as u8;
            for range in early(frozen, device, geometry) {
                read(frozen, device, info, range, &mut buf)?;
                for block in buf.chunks(geometry.block() as usize) {
                    let Some(name) = name_of(key, block) else { continue };
                    // Equal ones are here once.
                    if names.get(&name).is_some_and(|(pack, _)| upload.is_new(pack)) {
                        continue;
                    }
                    stored.content += block.len() as u64;
                    let place = upload.push(shift, name, block)?;
                    names.insert(name, place.0, place.1);
                }
            }
            for part in parts(frozen, device, geometry) {
                stored.blocks += part.range().count;
                let range = match part {
                    Part::Zeros(range) => {
                        stored.zeros += range.count;
                        for number in range.start.0..range.end() {
                            tags.set(number, 0);
                            collector.push(number, Content::Zero);
                        }
                        continue;
                    }
                    Part::Read(range) => range,
                };
                read(frozen, device, info, range, &mut buf)?;
                for (at, block) in buf.chunks(geometry.block() as usize).enumerate() {
                    let number = range.start.0 + at as u64;
                    let Some(name) = name_of(key, block) else {
                        stored.zeros += 1;
                        tags.set(number, 0);
                        collector.push(number, Content::Zero);
                        continue;
                    };
                    tags.set(number, root::tag(&name));
                    let known = names.get(&name).filter(|(pack, _)| upload.usable(*pack));
                    let (pack, slot) = match known {
                        Some(place) => {
                            stored.known += 1;
                            place
                        }
                        None => {
                            stored.content += block.len() as u64;
                            let place = upload.push(shift, name, block)?;
                            names.insert(name, place.0, place.1);
                            place
                        }
                    };
                    collector.push(number, Content::At { pack, slot });
                }
            }
            if everything {
                tags.complete();
            }
            changes.push(collector.runs);
            Ok(())
        });
        let result = result.and_then(|()| upload.finish());
        stored.pack_bytes += upload.bytes;
        stored.packs += upload.count;
        // Packs of which the outcome is unknown hold nothing that may be referred to.
        let unknown = |pack: u32| packs[pack as usize].state != State::Stored;
        if result.is_err() {
            names.forget(unknown);
        }
        result.map(|()| changes)
    }
}

/// Neighbouring blocks of a round.
#[derive(Clone, Copy)]
enum Part {
    /// Zeros, as is known.
    Zeros(BlockRange),
    /// To be read, at once.
    Read(BlockRange),
}

impl Part {
    fn range(self) -> BlockRange {
        match self {
            Self::Zeros(range) | Self::Read(range) => range,
        }
    }
}

/// What a round has of a device, in the order of blocks.
fn parts(frozen: &dyn Frozen, device: usize, geometry: Geometry) -> Vec<Part> {
    let mut parts = Vec::new();
    let step = (READ / geometry.block()).max(1);
    let mut put = |range: BlockRange, zero: bool| match zero {
        true => parts.push(Part::Zeros(range)),
        false => parts.extend(range.chunks(step).map(Part::Read)),
    };
    let none = BlockSet::new(0);
    let zeros = frozen.zeros(device).unwrap_or(&none);
    for range in frozen.changed(device).ranges() {
        let mut at = range.start.0;
        for zero in zeros.ranges_in(range) {
            if at < zero.start.0 {
                put(BlockRange::new(at, zero.start.0 - at), false);
            }
            put(zero, true);
            at = zero.end();
        }
        if at < range.end() {
            put(BlockRange::new(at, range.end() - at), false);
        }
    }
    parts
}

/// What of a device is stored first.
fn early(frozen: &dyn Frozen, device: usize, geometry: Geometry) -> Vec<BlockRange> {
    let step = (READ / geometry.block()).max(1);
    frozen.early(device).iter().flat_map(|range| range.chunks(step)).collect()
}

/// Reads whole blocks; what a short last block lacks counts as zeros.
fn read(
    frozen: &dyn Frozen,
    device: usize,
    info: &DeviceInfo,
    range: BlockRange,
    buf: &mut Vec<u8>,
) -> Result<()> {
    let geometry = info.geometry;
    buf.clear();
    buf.resize((geometry.block() * range.count) as usize, 0);
    let length = geometry.bytes_of(range) as usize;
    frozen.read(device, range, &mut buf[..length]).map_err(|source| StoreError::Device {
        operation: "read the frozen content of",
        device: info.name.clone(),
        offset: geometry.offset(range.start),
        source,
    })
}

/// The name of a block's content; `None` for zeros.
fn name_of(key: &DataKey, block: &[u8]) -> Option<BlockName> {
    (!is_zero(block)).then(|| key.name(block))
}
