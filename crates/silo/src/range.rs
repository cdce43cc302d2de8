//! Checks and constants that every device needs: an access past the end is refused with one
//! sentence, and zeros are written from one place.

use crate::io::{Allocation, Extent};
use std::io;

/// Zeros to write from.
pub(crate) static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// An access that reaches past the end.
#[derive(Debug, thiserror::Error)]
#[error("{length} bytes at {offset} reach past the end of a device of {size} bytes")]
struct OutOfRange {
    offset: u64,
    length: u64,
    size: u64,
}

/// Refuses an access that reaches past the end.
///
/// # Errors
/// `InvalidInput`, which clients see as EINVAL.
pub(crate) fn check(size: u64, offset: u64, length: u64) -> io::Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, OutOfRange { offset, length, size })),
    }
}

/// The parts of an access, cut at multiples of `unit`: number of the unit, first byte within it,
/// length. The access lies in the device.
pub(crate) fn parts(unit: u64, offset: u64, length: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let stop = (at / unit * unit + unit).min(end);
            let part = (at / unit, at % unit, stop - at);
            at = stop;
            part
        })
    })
}

/// Refuses a write to a device that takes none.
///
/// # Errors
/// Always `PermissionDenied`, which clients see as EPERM.
pub(crate) fn refuse_write<T>(device: &str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{device} is read-only")))
}

/// The same error again, for another caller that waited for the same work.
pub(crate) fn same_error(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

/// The most runs that are told at once.
pub(crate) const MOST_EXTENTS: usize = 4096;

/// Adds a run, joined to the last one if that is alike; false if there are too many.
pub(crate) fn add_extent(found: &mut Vec<Extent>, length: u64, allocation: Allocation) -> bool {
    let full = found.len() >= MOST_EXTENTS;
    match found.last_mut() {
        _ if length == 0 => {}
        Some(last) if last.allocation == allocation => last.length += length,
        _ if full => return false,
        _ => found.push(Extent { length, allocation }),
    }
    true
}
