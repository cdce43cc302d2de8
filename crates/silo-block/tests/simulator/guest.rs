//! The guest: one program that runs on one host at a time, and knows what it wrote.

use crate::reference::{Covered, Reference};
use silo_block::{block::BlockRange, rounds::OwnedWriteGuard, session::messages::DeviceIndex};
use std::collections::BTreeMap;

/// Something that the guest does.
pub(crate) struct Op {
    pub(crate) device: DeviceIndex,
    pub(crate) kind: Kind,
}

pub(crate) enum Kind {
    Read(BlockRange),
    /// Halves, as a run.
    Write {
        first: u64,
        count: u64,
        state: Writing,
    },
    Flush(Covered),
}

pub(crate) enum Writing {
    /// Not begun, or waiting for blocks.
    Waits,
    /// Half of it is done.
    Half { guard: OwnedWriteGuard, claim: BlockRange, values: Vec<u64> },
}

pub(crate) struct Guest {
    pub(crate) host: Option<usize>,
    pub(crate) paused: bool,
    /// Counts deaths: what was begun before is void.
    pub(crate) life: u64,
    pub(crate) ops: BTreeMap<u64, Op>,
    pub(crate) next: u64,
    pub(crate) reference: Reference,
}

impl Guest {
    pub(crate) fn new(halves: usize) -> Self {
        let (ops, reference) = (BTreeMap::new(), Reference::new(halves));
        Self { host: None, paused: false, life: 0, ops, next: 0, reference }
    }

    pub(crate) fn die(&mut self) {
        self.host = None;
        self.life += 1;
        self.ops.clear();
        self.reference.crashed();
    }

    pub(crate) fn begin(&mut self, device: DeviceIndex, kind: Kind) -> u64 {
        self.next += 1;
        self.ops.insert(self.next, Op { device, kind });
        self.next
    }

    /// Writes that have begun to change bytes.
    pub(crate) fn half_done(&self) -> usize {
        let half = |op: &&Op| matches!(op.kind, Kind::Write { state: Writing::Half { .. }, .. });
        self.ops.values().filter(half).count()
    }

    pub(crate) fn flushes(&self) -> Vec<u64> {
        let flush = |(_, op): &(&u64, &Op)| matches!(op.kind, Kind::Flush(_));
        self.ops.iter().filter(flush).map(|(id, _)| *id).collect()
    }
}
