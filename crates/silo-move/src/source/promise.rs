//! Tells the destination which of the blocks that it lacks a store has, so that it fetches them
//! there while this side sends the others.
//!
//! A thread of its own reads what is missing at the destination, from the end of each device
//! downwards (blocks are sent upwards), and asks [`Stored`] for each block by its content. What must
//! hold: a block is promised only with the hash of bytes that were read here after the round that
//! the promise names was closed, and that nobody has written since; a store that cannot be asked
//! delays nobody.

use super::Shared;
use crate::lane::lock;
use silo_block::{
    block::{self, BlockIndex, BlockRange},
    device::DeviceName,
    rounds::Epoch,
    session::{
        LinkId,
        messages::{BlockHash, DeviceIndex},
        source::Event,
    },
};
use std::{
    io,
    sync::{Arc, PoisonError},
    time::Duration,
};

/// Bytes that are read at once.
const WINDOW: u64 = 1 << 20;
/// Blocks that are promised at once.
const BATCH: usize = 1024;
/// How often it is looked whether there is something to do, when nobody says so.
const LOOK: Duration = Duration::from_millis(500);

/// What a store that the destination can read has of the devices that move. Called from one thread.
pub trait Stored: Send + Sync {
    /// A new look begins, on a new link: what was known of the store may be old.
    ///
    /// # Errors
    /// If the store cannot be asked; nothing is promised on this link.
    fn look(&self) -> io::Result<()> {
        Ok(())
    }

    /// Whether the store has this content of this block, durably. `content` is one block.
    ///
    /// # Errors
    /// If the store cannot be asked; nothing more is promised on this link.
    fn has(&self, device: &DeviceName, block: BlockIndex, content: &[u8]) -> io::Result<bool>;
}

impl Shared {
    /// Until the session is over.
    pub(super) fn promise(self: &Arc<Self>, stored: &dyn Stored) {
        let mut last = None;
        while let Some(link) = self.new_link(last) {
            last = Some(link);
            match stored.look().and_then(|()| self.promise_on(link, stored)) {
                Ok(count) => {
                    tracing::info!(session = %self.session, count, "blocks that a store has");
                }
                Err(error) => {
                    tracing::warn!(
                        session = %self.session, %error,
                        "the store cannot be asked; what it has is sent"
                    );
                }
            }
        }
    }

    /// Waits for a link on which the lists are confirmed; none when the session is over.
    fn new_link(&self, last: Option<LinkId>) -> Option<LinkId> {
        let mut machine = lock(&self.machine);
        while !self.lanes.is_over() {
            match machine.listed_on() {
                Some(link) if Some(link) != last => return Some(link),
                _ => {}
            }
            let waited = self.changed.wait_timeout(machine, LOOK);
            machine = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }

    /// Gives how many blocks were promised.
    fn promise_on(&self, link: LinkId, stored: &dyn Stored) -> io::Result<u64> {
        let (mut count, mut buffer) = (0, Vec::new());
        for (at, volume) in self.volumes.iter().enumerate() {
            let geometry = volume.geometry();
            let (step, mut end) = ((WINDOW / geometry.block()).max(1), geometry.blocks());
            let mut batch =
                Batch { device: DeviceIndex(at as u16), epoch: Epoch::BASE, blocks: Vec::new() };
            while end > 0 {
                let start = (end - 1) / step * step;
                let window = BlockRange::new(start, end - start);
                end = start;
                let (lacking, epoch) = {
                    let machine = lock(&self.machine);
                    if machine.listed_on() != Some(link) {
                        return Ok(count);
                    }
                    machine.lacking(batch.device, window)
                };
                if epoch != batch.epoch {
                    count += self.send_batch(&mut batch);
                    batch.epoch = epoch;
                }
                for range in lacking {
                    buffer.resize(geometry.bytes_of(range) as usize, 0);
                    volume.read_raw(geometry.offset(range.start), &mut buffer)?;
                    let rounds = volume.rounds();
                    let contents = buffer.chunks(geometry.block() as usize);
                    for (one, content) in range.chunks(1).zip(contents) {
                        // A write leaves its mark before it leaves its bytes.
                        if !rounds.any_newer(one, epoch)
                            && !block::is_zero(content)
                            && stored.has(volume.name(), one.start, content)?
                        {
                            let hash = self.options.naming.name(content);
                            batch.blocks.push((one.start, hash));
                        }
                    }
                }
                if batch.blocks.len() >= BATCH {
                    count += self.send_batch(&mut batch);
                }
            }
            count += self.send_batch(&mut batch);
        }
        Ok(count)
    }

    fn send_batch(&self, batch: &mut Batch) -> u64 {
        let blocks = std::mem::take(&mut batch.blocks);
        let count = blocks.len() as u64;
        if count > 0 {
            self.tell(Event::Promised { device: batch.device, epoch: batch.epoch, blocks });
        }
        count
    }
}

struct Batch {
    device: DeviceIndex,
    epoch: Epoch,
    blocks: Vec<(BlockIndex, BlockHash)>,
}
