//! A device in memory: a memfd, sparse, which others may map too.
//!
//! Reads go through the descriptor unless the pages are known to be present, because reading a hole
//! through a mapping would fill it with a page. Writes go through a mapping, because `write` takes a
//! lock on the whole file: two writers of different pages never wait for each other. Nothing here
//! survives the process.

use super::sys::{Mapping, PAGE};
use crate::{
    files::extents_of,
    io::{Allocation, BlockDevice, Extent},
    range::check,
};
use nix::{
    fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use std::{
    fs::File,
    io,
    num::NonZeroUsize,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    sync::atomic::{AtomicU8, AtomicU64, Ordering},
};

/// See the comment of its module.
pub struct MemoryDevice {
    file: File,
    bytes: u64,
    /// None for an empty device.
    mapping: Option<Mapping>,
    /// Pages that are likely to be present: a write of those needs no system call. Only a hint; a
    /// page that is marked and is not there is filled by the write's own page fault.
    present: Box<[AtomicU64]>,
}

impl std::fmt::Debug for MemoryDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryDevice({} bytes)", self.bytes)
    }
}

impl MemoryDevice {
    /// A device of `bytes` zero bytes. `name` is what `/proc/<pid>/maps` shows.
    ///
    /// # Errors
    /// If the kernel has no room for the descriptor or the mapping.
    pub fn new(name: &str, bytes: u64) -> io::Result<Self> {
        let name = std::ffi::CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(name.as_c_str(), flags)?);
        file.set_len(bytes)?;
        // So that no access through a mapping can be past the end.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let length = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mapping = NonZeroUsize::new(length).map(|length| Mapping::new(&file, length));
        let words = bytes.div_ceil(PAGE as u64 * 64);
        Ok(Self {
            file,
            bytes,
            mapping: mapping.transpose()?,
            present: (0..words).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// The memfd, to map or to hand to another process. It cannot change its size.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Memory that the content takes, in bytes.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// The words of `present` that the pages from `first` to before `end` are in, with their bits.
    fn words(&self, first: u64, end: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let mut at = first;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let stop = (at / 64 * 64 + 64).min(end);
            let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            let word = &self.present[(at / 64) as usize];
            at = stop;
            Some((word, mask))
        })
    }

    /// Whether all pages of these bytes are likely to be present.
    fn is_present(&self, offset: u64, length: u64) -> bool {
        let page = PAGE as u64;
        self.words(offset / page, (offset + length).div_ceil(page))
            .all(|(word, mask)| word.load(Ordering::Relaxed) & mask == mask)
    }

    /// Sees to it that these bytes can be written through the mapping; false: this kernel, one before
    /// 5.14, cannot say whether there is room.
    fn make_present(&self, mapping: &Mapping, offset: u64, length: u64) -> io::Result<bool> {
        if self.is_present(offset, length) {
            return Ok(true);
        }
        match mapping.populate(offset as usize, length as usize) {
            Ok(()) => {
                let page = PAGE as u64;
                for (word, mask) in self.words(offset / page, (offset + length).div_ceil(page)) {
                    word.fetch_or(mask, Ordering::Relaxed);
                }
                Ok(true)
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) => {
                let text = format!("no memory for {length} bytes at {offset}: {error}");
                Err(io::Error::new(io::ErrorKind::StorageFull, text))
            }
        }
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let page = PAGE as u64;
        // Before the hole: a writer that sees the marks gone populates again.
        for (word, mask) in self.words(offset.div_ceil(page), (offset + length) / page) {
            word.fetch_and(!mask, Ordering::Relaxed);
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, flags, offset as i64, length as i64)?)
    }
}

impl BlockDevice for MemoryDevice {
    fn size(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check(self.bytes, offset, buf.len() as u64)?;
        // Where all of it is present (see the module) no system call is needed. A hole that was made
        // just now reads as zeros there too.
        if let (Some(mapping), false) = (&self.mapping, buf.is_empty())
            && self.is_present(offset, buf.len() as u64)
        {
            mapping.copy_out(offset as usize, buf);
            return Ok(());
        }
        self.file.read_exact_at(buf, offset)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buf).map(|()| true)
    }

    fn may_wait(&self, _offset: u64, _length: u64) -> bool {
        false
    }

    fn file_range(&self, offset: u64, length: u64, _write: bool) -> Option<(BorrowedFd<'_>, u64)> {
        check(self.bytes, offset, length).ok().map(|()| (self.file.as_fd(), offset))
    }

    fn mapped(&self, offset: u64, length: u64, write: bool) -> io::Result<Option<&[AtomicU8]>> {
        check(self.bytes, offset, length)?;
        let (Some(mapping), true) = (&self.mapping, length > 0) else { return Ok(None) };
        let there = if write {
            self.make_present(mapping, offset, length)?
        } else {
            self.is_present(offset, length)
        };
        Ok(there.then(|| mapping.bytes(offset as usize, length as usize)))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check(self.bytes, offset, data.len() as u64)?;
        let (Some(mapping), false) = (&self.mapping, data.is_empty()) else { return Ok(()) };
        if !self.make_present(mapping, offset, data.len() as u64)? {
            return self.file.write_all_at(data, offset);
        }
        mapping.copy_in(offset as usize, data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        check(self.bytes, offset, length)?;
        let page = PAGE as u64;
        let (start, mut end) = (offset.next_multiple_of(page), (offset + length) / page * page);
        if offset + length == self.bytes {
            end = self.bytes;
        }
        if start < end { self.punch(start, end - start) } else { Ok(()) }
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        check(self.bytes, offset, length)?;
        if length == 0 {
            return Ok(());
        }
        self.punch(offset, length)?;
        if allocate {
            fallocate(&self.file, FallocateFlags::empty(), offset as i64, length as i64)?;
        }
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        check(self.bytes, offset, length)?;
        // The kernel would look for a hole up to the end of the file, page by page.
        if length > 0 && self.is_present(offset, length) {
            return Ok(vec![Extent { length, allocation: Allocation::Data }]);
        }
        extents_of(&self.file, offset, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_written_takes_no_memory_even_when_it_is_read() {
        let device = MemoryDevice::new("test", 1 << 30).unwrap();
        let mut buf = vec![1; 4 << 20];
        device.read_at(8 << 20, &mut buf).unwrap();
        assert!(crate::block::is_zero(&buf));
        assert_eq!(device.allocated_bytes().unwrap(), 0);
        device.write_at(12345, &[7; 10_000]).unwrap();
        assert!(device.allocated_bytes().unwrap() <= 4 * 4096);
        device.trim(0, 1 << 20).unwrap();
        assert_eq!(device.allocated_bytes().unwrap(), 0);
    }

    #[test]
    fn holes_are_reported() {
        let device = MemoryDevice::new("test", (64 << 10) + 100).unwrap();
        device.write_at(8192, &[1; 4096]).unwrap();
        let found: Vec<_> = device
            .extents(0, device.size())
            .unwrap()
            .into_iter()
            .map(|extent| (extent.length, extent.allocation))
            .collect();
        let rest = (52 << 10) + 100;
        assert_eq!(
            found,
            [(8192, Allocation::Hole), (4096, Allocation::Data), (rest, Allocation::Hole)]
        );
    }

    #[test]
    fn writers_of_different_pages_at_once_lose_nothing_while_holes_are_punched() {
        let device = MemoryDevice::new("test", 8 << 20).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let device = &device;
                scope.spawn(move || {
                    for round in 1..=20u8 {
                        for page in (u64::from(thread)..1024).step_by(4) {
                            device.write_at(page * 4096, &[thread * 40 + round; 4096]).unwrap();
                        }
                    }
                });
            }
            let device = &device;
            scope.spawn(move || {
                for _ in 0..50 {
                    device.trim(4 << 20, 4 << 20).unwrap();
                }
            });
        });
        let mut page = [0; 4096];
        for index in 0..1024u64 {
            device.read_at(index * 4096, &mut page).unwrap();
            assert_eq!(page, [(index % 4) as u8 * 40 + 20; 4096], "page {index}");
        }
    }
}
