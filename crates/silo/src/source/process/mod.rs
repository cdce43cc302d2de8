//! The memory of another process that runs: one of its mappings, chosen by file, by address, or
//! both.
//!
//! Reads and writes go through `/proc/<pid>/mem`. They are copies of a memory that somebody else
//! changes: a copy is torn unless the process is stopped ([`ProcessDevice::stop`]), and which pages
//! changed can only be found by looking at all of them ([`ProcessScan`]): a process that does not
//! cooperate cannot be tracked from outside on kernels without soft-dirty bits. For a machine's
//! memory use [`silo_memory`], which is told.
//!
//! A read makes the kernel fill holes of the mapping with pages, and waits where the process has a
//! fault handler of its own. The descriptor stays bound to the process that it was opened for: when
//! that ends, reads fail, and never see another process with the same number.

mod maps;
mod scan;
mod stop;
#[cfg(test)]
mod tests;

pub use maps::{MapChoice, Mapping};
pub use scan::ProcessScan;
pub use stop::Stopped;

pub(crate) use maps::fuzz_maps;

use super::SourceError;
use crate::{
    io::{Allocation, BlockDevice, Extent},
    range::{ZEROS, add_extent, check, refuse_write},
};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::PathBuf,
};

/// Whether a process's memory may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessMode {
    /// Only read.
    ReadOnly,
    /// Written where the process itself may write.
    ReadWrite,
}

/// A part of the device, and where it is in the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    length: u64,
    address: u64,
    writable: bool,
}

/// See the comment of its module.
pub struct ProcessDevice {
    pid: i32,
    handle: OwnedFd,
    memory: File,
    mode: ProcessMode,
    /// In order, not overlapping; between them there is nothing, which reads as zeros.
    segments: Vec<Segment>,
    bytes: u64,
}

impl std::fmt::Debug for ProcessDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ProcessDevice({}, {} bytes)", self.pid, self.bytes)
    }
}

impl ProcessDevice {
    /// Opens the mapping that `choice` says. The device is as long as the part of the file that is
    /// mapped, from its lowest mapped byte; what lies between mappings is zeros.
    ///
    /// # Errors
    /// If there is no such process or mapping, or it may not be read.
    pub fn open(pid: i32, choice: &MapChoice, mode: ProcessMode) -> Result<Self, SourceError> {
        let error = |detail: String| SourceError::Process { pid, detail };
        // First: from here on the number cannot come to mean another process without notice.
        let handle = stop::open_handle(pid)
            .map_err(|source| error(format!("cannot be opened: {source}")))?;
        let path = PathBuf::from(format!("/proc/{pid}/mem"));
        let memory = OpenOptions::new()
            .read(true)
            .write(mode == ProcessMode::ReadWrite)
            .open(&path)
            .map_err(SourceError::io("open", &path))?;
        let path = PathBuf::from(format!("/proc/{pid}/maps"));
        let text = fs::read(&path).map_err(SourceError::io("read", &path))?;
        let all = maps::parse(&text);
        let chosen = maps::choose(&all, choice);
        let Some(base) = chosen.iter().map(|map| map.offset).min() else {
            return Err(error(format!("has no mapping of {choice}; /proc/{pid}/maps lists them")));
        };
        let mut segments: Vec<Segment> = Vec::new();
        for map in chosen {
            let (mut offset, end) = (map.offset - base, map.offset - base + map.length());
            // A part that is mapped twice is the same memory.
            let taken = segments.last().map_or(0, |last| last.offset + last.length);
            let skip = taken.saturating_sub(offset);
            offset += skip;
            if offset < end {
                segments.push(Segment {
                    offset,
                    length: end - offset,
                    address: map.start + skip,
                    writable: map.writable,
                });
            }
        }
        let bytes = segments.last().map_or(0, |last| last.offset + last.length);
        Ok(Self { pid, handle, memory, mode, segments, bytes })
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The parts of an access: where it is in the process (none for a gap), and the length.
    fn parts(&self, offset: u64, length: u64) -> Vec<(Option<Segment>, u64)> {
        let (mut at, end, mut parts) = (offset, offset + length, Vec::new());
        let first = self.segments.partition_point(|s| s.offset + s.length <= offset);
        for segment in &self.segments[first..] {
            if at >= end || segment.offset >= end {
                break;
            }
            if segment.offset > at {
                parts.push((None, segment.offset - at));
                at = segment.offset;
            }
            let stop = (segment.offset + segment.length).min(end);
            let inside = Segment {
                offset: at,
                length: stop - at,
                address: segment.address + (at - segment.offset),
                writable: segment.writable,
            };
            parts.push((Some(inside), stop - at));
            at = stop;
        }
        if at < end {
            parts.push((None, end - at));
        }
        parts
    }

    fn failed(&self, operation: &str, at: u64) -> impl FnOnce(io::Error) -> io::Error {
        let pid = self.pid;
        let text = format!("could not {operation} at {at}: it ended or unmapped that");
        move |error| {
            let detail = format!("{text} ({error})");
            io::Error::new(error.kind(), SourceError::Process { pid, detail })
        }
    }
}

impl BlockDevice for ProcessDevice {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check(self.bytes, offset, buf.len() as u64)?;
        for (segment, length) in self.parts(offset, buf.len() as u64) {
            let (part, rest) = buf.split_at_mut(length as usize);
            match segment {
                None => part.fill(0),
                Some(segment) => self
                    .memory
                    .read_exact_at(part, segment.address)
                    .map_err(self.failed("be read", segment.offset))?,
            }
            buf = rest;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, mut data: &[u8]) -> io::Result<()> {
        check(self.bytes, offset, data.len() as u64)?;
        let parts = self.parts(offset, data.len() as u64);
        // All or nothing as far as it can be known before: a gap has no place to write to.
        let takes = |(segment, _): &(Option<Segment>, u64)| segment.is_some_and(|s| s.writable);
        if self.mode == ProcessMode::ReadOnly || !parts.iter().all(takes) {
            return refuse_write(&format!("this part of process {}'s memory", self.pid));
        }
        for (segment, length) in parts {
            let (part, rest) = data.split_at(length as usize);
            if let Some(segment) = segment {
                self.memory
                    .write_all_at(part, segment.address)
                    .map_err(self.failed("be written", segment.offset))?;
            }
            data = rest;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// The old bytes stay.
    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.bytes, offset, length)?;
        match self.mode {
            ProcessMode::ReadWrite => Ok(()),
            ProcessMode::ReadOnly => refuse_write(&format!("process {}'s memory", self.pid)),
        }
    }

    fn zero(&self, offset: u64, length: u64, _allocate: bool) -> io::Result<()> {
        check(self.bytes, offset, length)?;
        let mut at = offset;
        while at < offset + length {
            let part = (offset + length - at).min(ZEROS.len() as u64);
            self.write_at(at, &ZEROS[..part as usize])?;
            at += part;
        }
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        check(self.bytes, offset, length)?;
        let mut found = Vec::new();
        for (segment, length) in self.parts(offset, length) {
            let kind = segment.map_or(Allocation::Hole, |_| Allocation::Data);
            if !add_extent(&mut found, length, kind) {
                break;
            }
        }
        Ok(found)
    }

    fn is_read_only(&self) -> bool {
        self.mode == ProcessMode::ReadOnly
    }
}
