//! Counting requests: what a store bills for, and what the bars are about.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Requests made of a store, repeated ones included, and bytes that they carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Objects written.
    pub writes: u64,
    /// Objects created if absent.
    pub creates: u64,
    /// Reads of objects or ranges.
    pub reads: u64,
    /// Listings (a long one takes several pages and counts once).
    pub lists: u64,
    /// Deletions.
    pub deletes: u64,
    /// How many of all these repeated one that had failed.
    pub repeated: u64,
    /// Bytes written.
    pub uploaded: u64,
    /// Bytes read.
    pub downloaded: u64,
}

impl Requests {
    /// All requests together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.writes + self.creates + self.reads + self.lists + self.deletes
    }

    /// Those since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            writes: self.writes - earlier.writes,
            creates: self.creates - earlier.creates,
            reads: self.reads - earlier.reads,
            lists: self.lists - earlier.lists,
            deletes: self.deletes - earlier.deletes,
            repeated: self.repeated - earlier.repeated,
            uploaded: self.uploaded - earlier.uploaded,
            downloaded: self.downloaded - earlier.downloaded,
        }
    }
}

#[derive(Default)]
pub(super) struct Counters {
    writes: AtomicU64,
    creates: AtomicU64,
    reads: AtomicU64,
    lists: AtomicU64,
    deletes: AtomicU64,
    repeated: AtomicU64,
    uploaded: AtomicU64,
    downloaded: AtomicU64,
}

impl Counters {
    pub(super) fn count(&self, operation: &str, again: bool) {
        let counter = match operation {
            "write" => &self.writes,
            "create" => &self.creates,
            "list" => &self.lists,
            "delete" => &self.deletes,
            _ => &self.reads,
        };
        counter.fetch_add(1, Relaxed);
        self.repeated.fetch_add(u64::from(again), Relaxed);
    }

    pub(super) fn uploaded(&self, bytes: u64) {
        self.uploaded.fetch_add(bytes, Relaxed);
    }

    pub(super) fn downloaded(&self, bytes: u64) {
        self.downloaded.fetch_add(bytes, Relaxed);
    }

    pub(super) fn read(&self) -> Requests {
        Requests {
            writes: self.writes.load(Relaxed),
            creates: self.creates.load(Relaxed),
            reads: self.reads.load(Relaxed),
            lists: self.lists.load(Relaxed),
            deletes: self.deletes.load(Relaxed),
            repeated: self.repeated.load(Relaxed),
            uploaded: self.uploaded.load(Relaxed),
            downloaded: self.downloaded.load(Relaxed),
        }
    }
}
