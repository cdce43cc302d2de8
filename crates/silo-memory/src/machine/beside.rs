//! Memory that somebody touches beside the guest, through a mapping of its own: the server of a
//! vhost-user disk, which reads requests from the guest's rings and moves data to and from its
//! pages.
//!
//! Two things go wrong for such a one without this. A load from a hole of the memfd makes a page of
//! zeros, and the guest never faults on it, whatever its content should have been. And a store does
//! not pass by the monitor's mapping, so the tracking does not see it. So:
//!
//! ```text
//!   make_present ──▶ load, store ──▶ note_written ──▶ tell the guest
//! ```
//!
//! What must hold:
//! - After [`Memory::make_present`] the range is in the file, with its content, for as long as the
//!   machine runs here: a missing block has been brought, a zero one has become a page, protected
//!   like every page that arrives. Before [`Device::arm`] nothing is promised: content may still be
//!   dropped, so there is nothing to be had.
//! - A store that was noted is in the next [`Device::take_dirty`] that begins after the note, and
//!   whoever reads the block because of that sees the store.
//!
//! [`Device::arm`]: silo_block::device::Device::arm
//! [`Device::take_dirty`]: silo_block::device::Device::take_dirty

use super::{BLOCK_SIZE, Memory};
use silo_block::{
    block::{BlockIndex, BlockRange, BlockSet},
    device::Result,
};
use std::{
    io,
    sync::atomic::{AtomicU8, AtomicU64, Ordering},
    time::Duration,
};

/// Blocks that are turned into pages by one call.
const CLUSTER: usize = 16;
static ZEROS: [u8; BLOCK_SIZE * CLUSTER] = [0; BLOCK_SIZE * CLUSTER];

/// What this host promises of the memory.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// No monitor maps it.
    Detached,
    /// The machine began here: every hole is zero, and whoever touches it may make the page.
    Here,
    /// It arrives: what is here may be dropped again.
    Receiving,
    /// It arrived, or still does while it runs: holes are missing or zero.
    Armed,
}

/// What is known for those beside the guest.
pub(super) struct Beside {
    stage: AtomicU8,
    /// Blocks that are pages: certainly in the file, and no longer missing. Only while armed.
    pages: Marks,
    /// Blocks that were written beside the guest.
    written: Marks,
}

impl Beside {
    pub(super) fn new(blocks: u64) -> Self {
        let stage = AtomicU8::new(Stage::Detached as u8);
        Self { stage, pages: Marks::new(blocks), written: Marks::new(blocks) }
    }

    /// Begins a stage, in which nothing is known of pages yet.
    pub(super) fn enter(&self, stage: Stage) {
        // Nobody learns of a page between the two.
        self.stage.store(Stage::Receiving as u8, Ordering::SeqCst);
        self.pages.clear();
        self.stage.store(stage as u8, Ordering::SeqCst);
    }

    pub(super) fn is(&self, stage: Stage) -> bool {
        self.stage.load(Ordering::SeqCst) == stage as u8
    }

    /// The content is dropped.
    pub(super) fn forget(&self) {
        self.pages.clear();
        self.written.clear();
    }

    pub(super) fn forget_written(&self) {
        self.written.clear();
    }

    /// Adds what was written since the last call.
    pub(super) fn take_written(&self, to: &mut BlockSet) {
        self.written.take(to);
    }
}

impl Memory {
    /// Whether these blocks are certainly pages with their content. Never waits.
    #[must_use]
    pub fn is_present(&self, range: BlockRange) -> bool {
        self.beside.is(Stage::Here) || (self.beside.is(Stage::Armed) && self.has_pages(range))
    }

    fn has_pages(&self, range: BlockRange) -> bool {
        range.end() <= self.blocks && self.beside.pages.has_all(range)
    }

    /// Makes these blocks pages with their content: has missing ones brought, as a fault would, and
    /// turns those that are zero into pages.
    ///
    /// # Errors
    /// If they do not come within the time, if [`Memory::interrupt`] is called meanwhile, if they
    /// are beyond the end, or if the machine is not here.
    pub fn make_present(&self, range: BlockRange, within: Duration) -> Result<()> {
        let failed = |kind, why: &str| {
            let source = io::Error::new(kind, why.to_owned());
            Err(self.error("make present", range.start.to_string(), source))
        };
        if range.end() > self.blocks {
            return failed(io::ErrorKind::InvalidInput, "the memory ends before that");
        }
        if self.beside.is(Stage::Here) || self.has_pages(range) {
            return Ok(());
        }
        if !self.beside.is(Stage::Armed) {
            return failed(io::ErrorKind::WouldBlock, "the machine has not arrived here");
        }
        self.bring(range, within)?;
        self.with_attached("make present", |attached| {
            for piece in range.chunks(CLUSTER as u64) {
                // A block that is there already stays as it is.
                Self::copy(attached, piece.start, &ZEROS[..piece.bytes() as usize])?;
            }
            // While it is attached: another stay of the machine begins with no marks.
            self.beside.pages.set(range);
            Ok(())
        })
    }

    /// Somebody beside the guest has written to these blocks, which were present. Called after the
    /// store, and before the guest is told of it. What is beyond the end is not looked at.
    pub fn note_written(&self, range: BlockRange) {
        let end = range.end().min(self.blocks);
        if let Some(count) = end.checked_sub(range.start.0) {
            self.beside.written.set(BlockRange::new(range.start.0, count));
        }
    }

    /// Ends every wait of [`Memory::bring`] and [`Memory::make_present`] with an error: the server
    /// of a disk, or the machine, ends.
    pub fn interrupt(&self) {
        self.holes().interrupted += 1;
        self.shared.arrived.notify_all();
    }
}

/// A bit for each block, set by many threads without a lock.
struct Marks(Box<[AtomicU64]>);

/// The words of a range, each with the bits of it that are meant.
fn words(range: BlockRange) -> impl Iterator<Item = (usize, u64)> {
    let (start, end) = (range.start.0, range.end());
    (start / 64..end.div_ceil(64)).map(move |word| {
        let from = start.saturating_sub(word * 64).min(63);
        let to = (end - word * 64).min(64);
        (word as usize, (u64::MAX << from) & (u64::MAX >> (64 - to)))
    })
}

impl Marks {
    fn new(blocks: u64) -> Self {
        Self((0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn set(&self, range: BlockRange) {
        for (word, bits) in words(range) {
            // Also where they are set: the store that they stand for must come before whoever takes
            // them reads the block, and a plain look could be done before that store is out.
            self.0[word].fetch_or(bits, Ordering::SeqCst);
        }
    }

    fn has_all(&self, range: BlockRange) -> bool {
        words(range).all(|(word, bits)| self.0[word].load(Ordering::Acquire) & bits == bits)
    }

    fn clear(&self) {
        for word in &self.0 {
            word.store(0, Ordering::SeqCst);
        }
    }

    /// Moves all marks into `to`.
    fn take(&self, to: &mut BlockSet) {
        for (index, word) in self.0.iter().enumerate() {
            // A mark that this look misses was set after the taking began.
            if word.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::SeqCst);
            while bits != 0 {
                to.insert(BlockIndex(index as u64 * 64 + u64::from(bits.trailing_zeros())));
                bits &= bits - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_set_found_and_taken_once_over_the_edges_of_words() {
        let marks = Marks::new(200);
        for (start, count) in [(0, 1), (63, 2), (127, 1), (128, 64), (199, 1)] {
            let range = BlockRange::new(start, count);
            assert!(!marks.has_all(range), "{range:?}");
            marks.set(range);
            assert!(marks.has_all(range), "{range:?}");
        }
        assert!(!marks.has_all(BlockRange::new(62, 2)) && !marks.has_all(BlockRange::new(63, 3)));
        assert!(marks.has_all(BlockRange::new(127, 65)));
        let (mut taken, mut again) = (BlockSet::new(200), BlockSet::new(200));
        marks.take(&mut taken);
        let ranges: Vec<_> = taken.ranges().map(|range| (range.start.0, range.count)).collect();
        assert_eq!(ranges, [(0, 1), (63, 2), (127, 65), (199, 1)]);
        marks.take(&mut again);
        assert!(again.is_empty());
    }
}
