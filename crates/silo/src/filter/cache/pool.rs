//! Buffers of whole regions that are used again: fresh memory costs a page fault for every 4 KiB.

use super::REGION;
use bytes::Bytes;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

/// Buffers that wait to be used. Those in use are counted by who uses them.
#[derive(Default)]
pub(super) struct Pool {
    free: Mutex<Vec<Vec<u8>>>,
    /// Bytes in `free`, to look at without the lock.
    waiting: AtomicU64,
}

/// A buffer in use; it goes back when the last reference to it does.
struct Lent {
    buffer: Vec<u8>,
    pool: Arc<Pool>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.pool.free().push(std::mem::take(&mut self.buffer));
        self.pool.waiting.fetch_add(REGION, Ordering::Relaxed);
    }
}

impl Pool {
    fn free(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        // A list of buffers is whole at every step.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of a whole region.
    pub(super) fn copy(self: &Arc<Self>, data: &[u8]) -> Bytes {
        debug_assert_eq!(data.len() as u64, REGION);
        let used = self.free().pop();
        if used.is_some() {
            self.waiting.fetch_sub(REGION, Ordering::Relaxed);
        }
        let mut buffer = used.unwrap_or_else(|| Vec::with_capacity(REGION as usize));
        buffer.clear();
        buffer.extend_from_slice(data);
        Bytes::from_owner(Lent { buffer, pool: self.clone() })
    }

    /// Gives memory back until at most so many bytes wait.
    pub(super) fn keep(&self, bytes: u64) {
        while self.waiting.load(Ordering::Relaxed) > bytes {
            if self.free().pop().is_none() {
                return;
            }
            self.waiting.fetch_sub(REGION, Ordering::Relaxed);
        }
    }

    /// Bytes that wait to be used again.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }
}
