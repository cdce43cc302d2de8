//! In which order the blocks of a volume are first used.

use super::{Volume, here::Here, lock};
use silo_block::{
    block::{BlockRange, BlockSet},
    order::{FirstTouch, touch::Manifest},
};
use std::sync::Mutex;

/// Records first uses. After the first use of a block there is no lock on its way.
pub(super) struct Touch {
    seen: Here,
    order: Mutex<FirstTouch>,
}

impl Touch {
    fn new(blocks: u64) -> Self {
        let seen = Here::new(blocks, &BlockSet::full(blocks));
        Self { seen, order: Mutex::new(FirstTouch::new(blocks)) }
    }
}

impl Volume {
    /// From now on it is recorded which blocks are used first, and in which order.
    pub fn record_first_touch(&self) {
        self.touch.get_or_init(|| Touch::new(self.geometry.blocks()));
    }

    /// What was recorded so far, if anything is.
    #[must_use]
    pub fn first_touch(&self) -> Option<Manifest> {
        self.touch.get().map(|touch| lock(&touch.order).manifest())
    }

    /// Somebody uses these blocks.
    pub(super) fn touched(&self, range: BlockRange) {
        if let Some(touch) = self.touch.get()
            && !touch.seen.has(range)
        {
            lock(&touch.order).touched(range);
            touch.seen.insert(range);
        }
    }
}
