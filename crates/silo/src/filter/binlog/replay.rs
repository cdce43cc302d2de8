//! Playing a log on a device.

use super::{BinlogError, Kind, Reader};
use crate::io::BlockDevice;
use std::{
    io::Read,
    time::{Duration, Instant},
};

/// How fast a log is played.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// Without pauses.
    AsFastAsPossible,
    /// With the pauses that were recorded, divided by this (1: as it was).
    Times(f64),
}

/// What a replay did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplayReport {
    /// Operations that were played.
    pub operations: u64,
    /// Bytes that were written.
    pub written: u64,
    /// Bytes that were read.
    pub read: u64,
    /// Time between the first and the last operation in the log.
    pub recorded: Duration,
    /// How far behind its time an operation was at most.
    pub late: Duration,
}

/// Plays a log. `sleep` waits, and `now` tells the time: a test passes its own.
///
/// # Errors
/// If the log is cut or damaged (everything before that was played), the device is smaller than the
/// one that was recorded, or fails.
pub fn replay<R: Read>(
    mut log: Reader<R>,
    device: &dyn BlockDevice,
    pace: Pace,
    now: &mut dyn FnMut() -> Instant,
    sleep: &mut dyn FnMut(Duration),
) -> Result<ReplayReport, BinlogError> {
    let (recorded, given) = (log.device_bytes(), device.size());
    if recorded > given {
        return Err(BinlogError::TooSmall { recorded, given });
    }
    let (start, mut report, mut buf) = (now(), ReplayReport::default(), Vec::new());
    while let Some(entry) = log.read()? {
        if let Pace::Times(factor) = pace
            && factor > 0.0
        {
            let due = start
                + Duration::try_from_secs_f64(entry.at.as_secs_f64() / factor)
                    .unwrap_or(Duration::ZERO);
            let current = now();
            match due.checked_duration_since(current) {
                Some(left) => sleep(left),
                None => report.late = report.late.max(current - due),
            }
        }
        let (offset, length) = (entry.offset, entry.length);
        let result = match entry.kind {
            Kind::Write => device.write_at(offset, &entry.data),
            Kind::Read => read(device, offset, length, &mut buf),
            Kind::Flush => device.flush(),
            Kind::Trim => device.trim(offset, length),
            Kind::Zero => device.zero(offset, length, false),
            Kind::ZeroAllocate => device.zero(offset, length, true),
        };
        result.map_err(|source| BinlogError::Device {
            record: report.operations,
            kind: entry.kind,
            offset,
            length,
            source,
        })?;
        report.operations += 1;
        report.recorded = entry.at;
        match entry.kind {
            Kind::Write => report.written += length,
            Kind::Read => report.read += length,
            _ => {}
        }
    }
    Ok(report)
}

/// Reads and forgets, in pieces: the length comes from the log.
fn read(
    device: &dyn BlockDevice,
    offset: u64,
    length: u64,
    buf: &mut Vec<u8>,
) -> std::io::Result<()> {
    const STEP: u64 = 1 << 20;
    buf.resize(length.min(STEP) as usize, 0);
    let mut at = 0;
    while at < length {
        let part = (length - at).min(STEP);
        device.read_at(offset + at, &mut buf[..part as usize])?;
        at += part;
    }
    Ok(())
}
