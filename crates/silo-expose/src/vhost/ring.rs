//! A split virtqueue (virtio 1.2, 2.7) in guest memory: the available side, which the queue's
//! thread reads, and the used side, which whoever completes a request writes under a lock.
//!
//! Why not the `virtio-queue` crate: a successor has to walk chains by their head, without the
//! available ring; tables of descriptors have to be made present before they are read; and the
//! record of requests in hand is written between two steps of the used ring.

use super::{inflight::InflightQueue, memory::GuestMemory, sys::Span};
use std::{
    io,
    sync::atomic::{Ordering, fence},
};

/// Most descriptors of one request; QEMU's limit too (`VIRTQUEUE_MAX_SIZE`).
pub(super) const MAX_CHAIN: usize = 1024;
const DESCRIPTOR: u64 = 16;
/// Flags of a descriptor (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Flags of the rings (2.7.6, 2.7.8).
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// What a guest did against the rules. The queue stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingError {
    #[error("{0} requests were made available at once in a queue of {1}")]
    TooMany(u16, u16),
    #[error("descriptor {0} is beyond the end of its table of {1}")]
    Index(u16, u32),
    #[error("a chain of descriptors has a loop, or more than {MAX_CHAIN}")]
    Loop,
    #[error("a descriptor points to {1} bytes at {0:#x}, which is no memory")]
    Address(u64, u64),
    #[error("a table of descriptors lies within another, or has a length of {0}")]
    Indirect(u32),
    #[error("a part that is read follows one that is written")]
    Order,
    #[error("a request without header or without status")]
    Short,
    #[error("a part of a ring does not lie in memory where it should")]
    Place,
    #[error("a page of guest memory could not be had")]
    Page,
}

/// Where a ring lies.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) size: u16,
    descriptors: Span,
    available: Span,
    used: Span,
    event_idx: bool,
}

impl Place {
    /// # Errors
    /// If a part of it is no memory, not aligned, or its pages cannot be had.
    pub(super) fn new(
        memory: &GuestMemory,
        size: u16,
        [descriptors, available, used]: [u64; 3],
        event_idx: bool,
    ) -> Result<Self, RingError> {
        // 2.7: what each part takes; both rings with the field that event_idx adds.
        let lengths =
            [DESCRIPTOR * u64::from(size), 6 + 2 * u64::from(size), 6 + 8 * u64::from(size)];
        let find = |guest, length, align: usize| {
            let span = memory.one(guest, length)?;
            span.address().is_multiple_of(align).then_some(span)
        };
        let (Some(descriptors), Some(available), Some(used)) = (
            find(descriptors, lengths[0], 16),
            find(available, lengths[1], 2),
            find(used, lengths[2], 4),
        ) else {
            return Err(RingError::Place);
        };
        memory.make_present(&[descriptors, available, used]).map_err(|error| {
            tracing::warn!(%error, "the pages of a ring cannot be had");
            RingError::Page
        })?;
        Ok(Self { size, descriptors, available, used, event_idx })
    }

    /// The driver's index: how many requests it ever made available, modulo 2^16.
    pub(super) fn available_index(&self) -> u16 {
        u16::from_le(self.available.u16_at(2).load(Ordering::Acquire))
    }

    /// The device's index.
    pub(super) fn used_index(&self) -> u16 {
        u16::from_le(self.used.u16_at(2).load(Ordering::Acquire))
    }

    /// The head that stands at `index` of the available ring.
    pub(super) fn head(&self, index: u16) -> Result<u16, RingError> {
        let slot = 4 + 2 * usize::from(index % self.size);
        let head = u16::from_le(self.available.u16_at(slot).load(Ordering::Relaxed));
        if head < self.size { Ok(head) } else { Err(RingError::Index(head, self.size.into())) }
    }

    /// Puts `head` at `index` of the available ring, where a head stood that was taken: the driver
    /// does not read there, and writes there only once what is in hand was handed back.
    pub(super) fn put_head(&self, memory: &GuestMemory, index: u16, head: u16) {
        let slot = 4 + 2 * usize::from(index % self.size);
        self.available.u16_at(slot).store(head.to_le(), Ordering::SeqCst);
        memory.wrote(self.available.part(slot, 2));
    }

    /// Asks the driver for a kick when something is available beyond `next`, or for none.
    pub(super) fn want_kicks(&self, memory: &GuestMemory, next: Option<u16>) {
        let size = usize::from(self.size);
        match (self.event_idx, next) {
            (true, Some(next)) => {
                let at = 4 + 8 * size;
                self.used.u16_at(at).store(next.to_le(), Ordering::SeqCst);
                memory.wrote(self.used.part(at, 2));
            }
            // It asks once, and not again until we move on.
            (true, None) => {}
            (false, next) => {
                let flags = if next.is_some() { 0 } else { NO_NOTIFY };
                self.used.u16_at(0).store(flags.to_le(), Ordering::SeqCst);
                memory.wrote(self.used.part(0, 2));
            }
        }
        fence(Ordering::SeqCst);
    }
}

/// The used side.
pub(super) struct Used {
    index: u16,
    /// The index when the driver was last told, or need not be.
    told: u16,
}

impl Used {
    pub(super) fn new(index: u16) -> Self {
        Self { index, told: index }
    }

    /// Hands a request back.
    pub(super) fn push(
        &mut self,
        place: &Place,
        memory: &GuestMemory,
        inflight: Option<&InflightQueue>,
        head: u16,
        written: u32,
    ) {
        let at = 4 + 8 * usize::from(self.index % place.size);
        let element = u64::from(head) | u64::from(written) << 32;
        // Elements lie at 4 modulo 8: two halves.
        place.used.part(at, 8).copy_from(&element.to_le_bytes());
        memory.wrote(place.used.part(at, 8));
        if let Some(inflight) = inflight {
            inflight.completing(head);
        }
        self.index = self.index.wrapping_add(1);
        place.used.u16_at(2).store(self.index.to_le(), Ordering::Release);
        memory.wrote(place.used.part(2, 2));
        if let Some(inflight) = inflight {
            inflight.completed(head, self.index);
        }
    }

    /// Whether the driver wants to be told of what was pushed since it was asked last.
    pub(super) fn must_tell(&mut self, place: &Place) -> bool {
        let since = self.index.wrapping_sub(self.told);
        if since == 0 {
            return false;
        }
        self.told = self.index;
        // The index must be out before the driver's wish is read (2.7.7.1).
        fence(Ordering::SeqCst);
        if place.event_idx {
            let at = 4 + 2 * usize::from(place.size);
            let event = u16::from_le(place.available.u16_at(at).load(Ordering::Acquire));
            return self.index.wrapping_sub(event).wrapping_sub(1) < since;
        }
        u16::from_le(place.available.u16_at(0).load(Ordering::Acquire)) & NO_INTERRUPT == 0
    }
}

/// The parts of a request, in order: what the device reads, then what it writes.
#[derive(Default)]
pub(super) struct Chain {
    pub(super) readable: Vec<Span>,
    pub(super) writable: Vec<Span>,
}

/// How to deal with pages that may not be present.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Absent {
    /// Wait for them.
    Wait,
    /// Say so.
    Tell,
}

/// Follows the chain of `head`. `Ok(false)`: a table's page is absent, and `absent` is `Tell`.
pub(super) fn walk(
    place: &Place,
    memory: &GuestMemory,
    head: u16,
    absent: Absent,
    chain: &mut Chain,
) -> Result<bool, RingError> {
    chain.readable.clear();
    chain.writable.clear();
    let (mut table, mut entries, mut indirect) = (place.descriptors, u32::from(place.size), false);
    let (mut index, mut seen) = (head, 0);
    loop {
        seen += 1;
        if seen > MAX_CHAIN {
            return Err(RingError::Loop);
        }
        if u32::from(index) >= entries {
            return Err(RingError::Index(index, entries));
        }
        let bytes = table.sixteen(usize::from(index) * DESCRIPTOR as usize);
        let address = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        let length = u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes"));
        let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
        let next = u16::from_le_bytes([bytes[14], bytes[15]]);
        if flags & INDIRECT != 0 {
            // 2.7.5.3.1: not within another, not continued, a whole number of descriptors.
            if indirect || flags & NEXT != 0 || length == 0 || !length.is_multiple_of(16) {
                return Err(RingError::Indirect(length));
            }
            entries = length / DESCRIPTOR as u32;
            // Of a longer table, no more than a chain can use has to be memory.
            let used = u64::from(entries.min(u32::from(u16::MAX) + 1)) * DESCRIPTOR;
            table = memory.one(address, used).ok_or(RingError::Address(address, used))?;
            if memory.is_paged() && !memory.is_present(&[table]) {
                if absent == Absent::Tell {
                    return Ok(false);
                }
                memory.make_present(&[table]).map_err(|_| RingError::Page)?;
            }
            (index, indirect) = (0, true);
            entries = (used / DESCRIPTOR) as u32;
            continue;
        }
        let parts = if flags & WRITE != 0 {
            &mut chain.writable
        } else if chain.writable.is_empty() {
            &mut chain.readable
        } else {
            return Err(RingError::Order);
        };
        if !memory.translate(address, length.into(), parts) {
            return Err(RingError::Address(address, length.into()));
        }
        if flags & NEXT == 0 {
            return Ok(true);
        }
        index = next;
    }
}

/// Waits for the pages of both lists, or tells whether they are there.
pub(super) fn present(memory: &GuestMemory, chain: &Chain, absent: Absent) -> io::Result<bool> {
    if !memory.is_paged() {
        return Ok(true);
    }
    if absent == Absent::Tell {
        return Ok(memory.is_present(&chain.readable) && memory.is_present(&chain.writable));
    }
    memory.make_present(&chain.readable)?;
    memory.make_present(&chain.writable)?;
    Ok(true)
}
