//! Sending blocks: reads runs from a device, tells zero from data, paces.

use crate::migrate::{
    link::Outgoing,
    protocol::{DeviceNumber, Frame, MAX_RUN},
};
use silo::{
    block::{BLOCK_SIZE, BlockRange, is_zero},
    device::{Device, DeviceError},
};
use std::{
    io,
    time::{Duration, Instant},
};

/// Why sending stopped.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// A device could not be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The connection failed.
    #[error("the connection to the destination failed: {0}")]
    Link(#[from] io::Error),
    /// The user said so.
    #[error("cancelled")]
    Cancelled,
}

/// Holds a bandwidth limit over a whole move: how far ahead of the allowed bytes we are.
pub(super) struct Pacer {
    limit: Option<u64>,
    since: Instant,
    bytes: u64,
}

impl Pacer {
    /// `limit` in bytes per second.
    pub(super) fn new(limit: Option<u64>) -> Self {
        Self { limit, since: Instant::now(), bytes: 0 }
    }

    /// Counts `bytes` as sent and waits until the limit allows more.
    pub(super) fn sent(&mut self, bytes: u64) {
        let Some(limit) = self.limit else { return };
        self.bytes += bytes;
        let due = Duration::from_secs_f64(self.bytes as f64 / limit as f64);
        let elapsed = self.since.elapsed();
        if let Some(ahead) = due.checked_sub(elapsed) {
            std::thread::sleep(ahead);
        } else if elapsed > due + Duration::from_millis(200) {
            // Unused allowance does not add up to a burst.
            self.since = Instant::now();
            self.bytes = 0;
        }
    }
}

/// Sends one run of at most [`MAX_RUN`] blocks: data as data, zeros as a note.
pub(super) fn send_run(
    to: &mut Outgoing,
    number: DeviceNumber,
    device: &dyn Device,
    range: BlockRange,
    buffer: &mut Vec<u8>,
) -> Result<(), SendError> {
    debug_assert!(range.count <= MAX_RUN);
    buffer.resize(range.bytes() as usize, 0);
    device.read(range.start, buffer)?;
    let mut at = 0;
    while at < range.count {
        let zero = is_zero(block(buffer, at));
        let mut end = at + 1;
        while end < range.count && is_zero(block(buffer, end)) == zero {
            end += 1;
        }
        let piece = BlockRange::new(range.start.0 + at, end - at);
        if zero {
            to.write(&Frame::Zero { device: number, range: piece })?;
        } else {
            let bytes = &buffer[at as usize * BLOCK_SIZE..end as usize * BLOCK_SIZE];
            to.blocks(number, piece.start, bytes)?;
        }
        at = end;
    }
    Ok(())
}

fn block(buffer: &[u8], at: u64) -> &[u8] {
    &buffer[at as usize * BLOCK_SIZE..][..BLOCK_SIZE]
}
