//! A log of what happens to a device: recorded as it happens, played again later with the same
//! pauses or as fast as possible, or made from an image.
//!
//! Used to measure with real workloads, to reproduce a fault, and to fill a new device.
//!
//! # Layout (little endian), version 1
//!
//! Header, 32 bytes: `SILOBIN\0`, version (4), flags (4; bit 0: reads are in it), size of the device
//! in bytes (8), XXH3-64 of the 24 bytes before (8).
//!
//! Record, 40 bytes and its bytes:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 4 | `SBLR` |
//! | 4 | 1 | kind: 0 write, 1 read, 2 flush, 3 trim, 4 zeros, 5 zeros that hold room |
//! | 5 | 3 | zero |
//! | 8 | 8 | nanoseconds since the first operation |
//! | 16 | 8 | offset in bytes |
//! | 24 | 8 | length in bytes |
//! | 32 | 8 | XXH3-64 of the 32 bytes before and, for a write, of the bytes that follow |
//!
//! What holds: operations on the same bytes are in the order in which they took effect. A log that
//! ends inside a record was cut: the whole records before it are good, and [`BinlogError::Truncated`]
//! says so.

mod record;
mod recorder;
mod replay;
#[cfg(test)]
mod tests;

pub use record::{Entry, Kind, Reader};
pub use recorder::{RecordOptions, Recorder, create};
pub use replay::{Pace, ReplayReport, replay};

pub(crate) use record::fuzz_binlog;

use std::io;

/// A log that could not be read or played.
#[derive(Debug, thiserror::Error)]
pub enum BinlogError {
    /// Reading the log failed.
    #[error("could not read the log at byte {at}: {source}")]
    Read {
        /// Where.
        at: u64,
        /// The cause.
        source: io::Error,
    },
    /// Writing the log failed.
    #[error("could not write the log: {0}")]
    Write(#[source] io::Error),
    /// It is no log.
    #[error("this is not a log of a device: {0}")]
    NotALog(&'static str),
    /// Another version of silo wrote it.
    #[error("the log has format version {0}, this silo reads version 1")]
    Version(u32),
    /// It ends inside a record.
    #[error("the log was cut at byte {at}, inside a record; {records} whole records are before it")]
    Truncated {
        /// Where the record that was cut begins.
        at: u64,
        /// How many are whole.
        records: u64,
    },
    /// A record does not say what silo wrote.
    #[error("the log is damaged at byte {at}: {detail}; {records} good records are before it")]
    Damaged {
        /// Where the record begins.
        at: u64,
        /// What is wrong.
        detail: &'static str,
        /// How many are good.
        records: u64,
    },
    /// The device is smaller than the one that was recorded.
    #[error("the log is of a device of {recorded} bytes, this one has {given}")]
    TooSmall {
        /// Size in the log.
        recorded: u64,
        /// Size of the device.
        given: u64,
    },
    /// The device failed.
    #[error("record {record} ({kind:?} of {length} bytes at {offset}) failed: {source}")]
    Device {
        /// Which one, from 0.
        record: u64,
        /// What it is.
        kind: Kind,
        /// Where on the device.
        offset: u64,
        /// How long.
        length: u64,
        /// The cause.
        source: io::Error,
    },
}
