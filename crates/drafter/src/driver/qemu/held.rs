//! What a QEMU got from its first runner, fetched from it by descriptor: for a runner that comes
//! after. Nothing here talks to QEMU, which may be waiting for a page that only we can bring.

use super::{
    memory_map::{self, FileId},
    process::Process,
    record::Record,
    sys,
};
use crate::driver::{DriverError, Held, MemoryHandle};
use std::{fs, io, os::fd::OwnedFd};

/// The userfaultfd of a QEMU whose runner is gone: the copy that the preload hook keeps open.
pub(super) fn userfaultfd(process: &Process) -> io::Result<OwnedFd> {
    descriptor(process, |target| target == "anon_inode:[userfaultfd]", |_| true)?
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it has no userfaultfd"))
}

/// A copy of the first descriptor of the QEMU whose link in /proc/PID/fd is wanted, and which is
/// what was looked for.
fn descriptor(
    process: &Process,
    wanted: impl Fn(&str) -> bool,
    is: impl Fn(&OwnedFd) -> bool,
) -> io::Result<Option<OwnedFd>> {
    for entry in fs::read_dir(format!("/proc/{}/fd", process.pid()))? {
        let path = entry?.path();
        // A descriptor that was closed meanwhile is not the one.
        let Ok(target) = fs::read_link(&path) else { continue };
        if target.to_str().is_some_and(&wanted) {
            let number = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse().ok());
            let number = number.ok_or(io::ErrorKind::InvalidData)?;
            let found = sys::pidfd_getfd(process.descriptor(), number)?;
            if is(&found) {
                return Ok(Some(found));
            }
        }
    }
    Ok(None)
}

/// The guest's memory in a QEMU.
pub(super) fn memory(
    record: &Record,
    process: &Process,
    userfaultfd: Option<&OwnedFd>,
) -> Result<MemoryHandle, DriverError> {
    let host = |operation: &str, source| DriverError::Host {
        operation: format!("{operation} of machine \"{}\"", record.shape.name),
        source,
    };
    let userfaultfd = match userfaultfd {
        Some(userfaultfd) => userfaultfd.try_clone(),
        None => self::userfaultfd(process),
    };
    let userfaultfd =
        userfaultfd.map_err(|error| host("getting the userfaultfd from the QEMU", error))?;
    let (pid, length) = (process.pid(), record.shape.memory_bytes);
    let address = fs::read_to_string(format!("/proc/{pid}/maps"))
        .and_then(|maps| memory_map::find_mapping(&maps, record.memory, length))
        .map_err(|error| host("finding the memory in the QEMU", error))?;
    Ok(MemoryHandle { userfaultfd, pid, address, length })
}

/// All of it.
pub(super) fn everything(record: &Record, process: &Process) -> Result<Held, DriverError> {
    let failed = |source| DriverError::Host {
        operation: format!(
            "taking over the descriptors of the QEMU of machine \"{}\"",
            record.shape.name
        ),
        source,
    };
    // A vhost-user disk's record of requests in hand is a memfd too.
    let is_memory = |found: &OwnedFd| {
        nix::sys::stat::fstat(found).is_ok_and(|facts| {
            FileId { device: facts.st_dev, inode: facts.st_ino } == record.memory
        })
    };
    let memory = descriptor(process, |target| target.starts_with("/memfd:"), is_memory)
        .and_then(|found| {
            found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it has no memfd"))
        })
        .map_err(failed)?;
    let tap = descriptor(process, |target| target == "/dev/net/tun", |_| true).map_err(failed)?;
    let mapping = self::memory(record, process, None)?;
    Ok(Held { mapping, memory, memory_is_shared: record.memory_is_shared, tap })
}
