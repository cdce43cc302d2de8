//! The driver's side of one queue: slots of data, rings, kicks and answers.

use super::{ANSWER, Ask, ClientOptions, GUEST_BASE, other};
use crate::vhost::sys::{self, Span};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    io,
    sync::atomic::{Ordering, fence},
    time::{Duration, Instant},
};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of a slot before its data: header, status, an indirect table of three descriptors.
const SLOT_HEAD: usize = 4096;
const STATUS: usize = 16;
const TABLE: usize = 32;
const PAGE: usize = 4096;

/// One queue, driven by one thread at a time.
pub struct ClientQueue {
    pub(super) index: usize,
    pub(super) options: ClientOptions,
    /// The queue's part of the memory, and its guest address.
    pub(super) span: Span,
    pub(super) guest: u64,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    pub(super) next_available: u16,
    pub(super) kicked: u16,
    pub(super) next_used: u16,
    pub(super) free: Vec<u16>,
}

impl ClientQueue {
    pub(in crate::vhost) fn available_at(&self) -> usize {
        16 * usize::from(self.options.entries)
    }

    pub(super) fn used_at(&self) -> usize {
        (self.available_at() + 6 + 2 * usize::from(self.options.entries)).next_multiple_of(8)
    }

    fn rings_bytes(entries: u16) -> usize {
        let entries = usize::from(entries);
        ((16 * entries + 6 + 2 * entries).next_multiple_of(8) + 6 + 8 * entries)
            .next_multiple_of(PAGE)
    }

    pub(super) fn slots(entries: u16) -> u16 {
        entries / 3
    }

    pub(super) fn bytes(options: &ClientOptions) -> usize {
        let slot = SLOT_HEAD + options.slot_bytes.next_multiple_of(PAGE);
        Self::rings_bytes(options.entries) + usize::from(Self::slots(options.entries)) * slot
    }

    fn slot_at(&self, slot: u16) -> usize {
        let bytes = SLOT_HEAD + self.options.slot_bytes.next_multiple_of(PAGE);
        Self::rings_bytes(self.options.entries) + usize::from(slot) * bytes
    }

    fn data(&self, slot: u16) -> Span {
        self.span.part(self.slot_at(slot) + SLOT_HEAD, self.options.slot_bytes)
    }

    /// The offset of a slot's data in the client's memory.
    #[must_use]
    pub fn data_offset(&self, slot: u16) -> u64 {
        self.guest - GUEST_BASE + (self.slot_at(slot) + SLOT_HEAD) as u64
    }

    /// Copies bytes into a slot's data.
    pub fn fill(&self, slot: u16, bytes: &[u8]) {
        self.data(slot).copy_from(bytes);
    }

    /// Copies a slot's data out.
    pub fn fetch(&self, slot: u16, bytes: &mut [u8]) {
        self.data(slot).copy_to(bytes);
    }

    /// Copies a part of a slot's data out, from `start`.
    pub fn fetch_part(&self, slot: u16, start: usize, bytes: &mut [u8]) {
        self.data(slot).part(start, bytes.len()).copy_to(bytes);
    }

    /// A slot for [`ClientQueue::submit`]; `None` if all are under way.
    pub fn take_slot(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// Gives a slot back that was not submitted.
    pub fn return_slot(&mut self, slot: u16) {
        self.free.push(slot);
    }

    fn descriptor(&self, at: usize, guest: u64, length: usize, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&guest.to_le_bytes());
        bytes[8..12].copy_from_slice(&(length as u32).to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.span.part(at, 16).copy_from(&bytes);
    }

    /// Puts a request in the available ring; the server is told by [`ClientQueue::kick`].
    pub fn submit(&mut self, slot: u16, ask: Ask, sector: u64, length: usize) {
        assert!(length <= self.options.slot_bytes, "the slot has no room for it");
        let at = self.slot_at(slot);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&ask.number().to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.span.part(at, 16).copy_from(&header);
        self.span.part(at + STATUS, 1).copy_from(&[0xff]);
        let writes = if matches!(ask, Ask::Read | Ask::Id) { 2 } else { 0 };
        let head = 3 * slot;
        let guest = self.guest + at as u64;
        let (table, first) =
            if self.options.indirect { (at + TABLE, 0) } else { (16 * usize::from(head), head) };
        let mut parts = vec![(guest, 16, 0)];
        if length > 0 {
            parts.push((guest + SLOT_HEAD as u64, length, writes));
        }
        parts.push((guest + STATUS as u64, 1, 2));
        for (index, &(address, length, flags)) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let next = if last { 0 } else { first + index as u16 + 1 };
            let flags = if last { flags } else { flags | 1 };
            self.descriptor(table + 16 * index, address, length, flags, next);
        }
        if self.options.indirect {
            let at = 16 * usize::from(head);
            self.descriptor(at, guest + TABLE as u64, 16 * parts.len(), 4, 0);
        }
        self.publish(head);
    }

    /// Makes the chain at `head` available.
    pub(in crate::vhost) fn publish(&mut self, head: u16) {
        let place = 4 + 2 * usize::from(self.next_available % self.options.entries);
        let available = self.available_at();
        self.span.u16_at(available + place).store(head.to_le(), Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        self.span.u16_at(available + 2).store(self.next_available.to_le(), Ordering::Release);
    }

    /// The queue's memory and the guest address of its beginning, for tests that misbehave.
    #[cfg(test)]
    pub(in crate::vhost) fn raw(&self) -> (Span, u64) {
        (self.span, self.guest)
    }

    /// Tells the server, if it wants to be told.
    ///
    /// # Errors
    /// If the event cannot be written.
    pub fn kick(&mut self) -> io::Result<()> {
        fence(Ordering::SeqCst);
        let since = self.next_available.wrapping_sub(self.kicked);
        let wanted = if self.options.event_idx {
            let at = self.used_at() + 4 + 8 * usize::from(self.options.entries);
            let event = u16::from_le(self.span.u16_at(at).load(Ordering::Acquire));
            self.next_available.wrapping_sub(event).wrapping_sub(1) < since
        } else {
            u16::from_le(self.span.u16_at(self.used_at()).load(Ordering::Acquire)) & 1 == 0
        };
        self.kicked = self.next_available;
        if wanted && since > 0 { self.kick_always() } else { Ok(()) }
    }

    /// Tells the server whether it wants to know or not.
    ///
    /// # Errors
    /// If the event cannot be written.
    pub fn kick_always(&self) -> io::Result<()> {
        match self.kick.write(1) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    /// How many requests the server ever handed back, modulo 2^16.
    pub(super) fn used_index(&self) -> u16 {
        u16::from_le(self.span.u16_at(self.used_at() + 2).load(Ordering::Acquire))
    }

    /// Requests submitted and not answered.
    #[must_use]
    pub fn under_way(&self) -> u16 {
        self.next_available.wrapping_sub(self.next_used)
    }

    /// A request that was answered: its slot, which is the caller's again, and the status byte.
    pub fn poll(&mut self) -> Option<(u16, u8)> {
        let used = self.used_at();
        let index = u16::from_le(self.span.u16_at(used + 2).load(Ordering::Acquire));
        if index == self.next_used {
            return None;
        }
        let at = used + 4 + 8 * usize::from(self.next_used % self.options.entries);
        let mut element = [0; 8];
        self.span.part(at, 8).copy_to(&mut element);
        self.next_used = self.next_used.wrapping_add(1);
        let slot = u16::from_le_bytes([element[0], element[1]]) / 3;
        let mut status = [0];
        self.span.part(self.slot_at(slot) + STATUS, 1).copy_to(&mut status);
        self.free.push(slot);
        Some((slot, status[0]))
    }

    /// Waits for an answer, as a guest does: sleeping until the server's event.
    ///
    /// # Errors
    /// `TimedOut` after `limit`.
    pub fn wait(&mut self, limit: Duration) -> io::Result<(u16, u8)> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(answer) = self.poll() {
                return Ok(answer);
            }
            // Tell me at the next one.
            if self.options.event_idx {
                let at = self.available_at() + 4 + 2 * usize::from(self.options.entries);
                self.span.u16_at(at).store(self.next_used.to_le(), Ordering::SeqCst);
                fence(Ordering::SeqCst);
            }
            if let Some(answer) = self.poll() {
                return Ok(answer);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = format!("queue {}: no answer within {limit:?}", self.index);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX).max(1);
            let call = sys::borrow(&self.call);
            let mut fds = [PollFd::new(call, PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(millis))?;
            // It fails when there was none.
            let _ = self.call.read();
        }
    }

    /// One request, alone: the data is the slot's; gives the status byte.
    ///
    /// # Errors
    /// `TimedOut` if there is no answer, or if all slots are under way.
    pub fn call(&mut self, ask: Ask, sector: u64, data: &mut [u8]) -> io::Result<u8> {
        let slot = self.take_slot().ok_or(io::ErrorKind::TimedOut)?;
        self.fill(slot, data);
        self.submit(slot, ask, sector, data.len());
        self.kick()?;
        let (answered, status) = self.wait(ANSWER)?;
        if answered != slot {
            return Err(other("another request was answered"));
        }
        self.fetch(slot, data);
        Ok(status)
    }
}
