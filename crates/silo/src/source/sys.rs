//! The mapping of a memfd: the one unsafe part of [`MemoryDevice`](super::MemoryDevice).

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::{ffi::c_void, fs::File, io, num::NonZeroUsize, ptr::NonNull, sync::atomic::AtomicU8};

/// Size of a page of memory on x86-64 and in silo.
pub(super) const PAGE: usize = 4096;

/// A file's whole content, mapped shared, to be written by copying.
///
/// The only references into it are to atomic bytes. Two copies into the same bytes at once leave a mix of both,
/// as two writes to the same sector of a disk do; nothing in this process takes a decision on those
/// bytes while it copies.
pub(super) struct Mapping {
    start: NonNull<c_void>,
    length: usize,
}

// SAFETY: the mapping belongs to no thread; see the type about copies at the same time.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes, rounded up to pages. The file must be sealed against shrinking, so that
    /// no access can be past its end.
    pub(super) fn new(file: &File, length: NonZeroUsize) -> io::Result<Self> {
        let rounded = length.get().checked_next_multiple_of(PAGE).and_then(NonZeroUsize::new);
        let rounded = rounded.ok_or(io::ErrorKind::InvalidInput)?;
        let (protection, flags) =
            (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { mmap(None, rounded, protection, flags, file, 0) }?;
        Ok(Self { start, length: rounded.get() })
    }

    /// Makes the pages of `offset..offset + length` present and writable, all in one call and
    /// without the lock that `pwrite` takes on the whole file. Memory that is short is an error
    /// here, and a signal in [`Mapping::copy_in`].
    pub(super) fn populate(&self, offset: usize, length: usize) -> io::Result<()> {
        assert!(offset.checked_add(length).is_some_and(|end| end <= self.length));
        let first = offset / PAGE * PAGE;
        let length = (offset + length).next_multiple_of(PAGE) - first;
        // SAFETY: the range was just checked to lie in this mapping, whose length is whole pages;
        // populating changes no content.
        let result = unsafe {
            libc::madvise(self.start.as_ptr().byte_add(first), length, libc::MADV_POPULATE_WRITE)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// These bytes, for whoever copies to or from them himself.
    pub(super) fn bytes(&self, offset: usize, length: usize) -> &[AtomicU8] {
        assert!(offset.checked_add(length).is_some_and(|end| end <= self.length));
        // SAFETY: the range was just checked to lie in the mapping, which lives as long as self; an
        // atomic byte may be changed by anybody while there is a reference to it.
        unsafe {
            std::slice::from_raw_parts(self.start.as_ptr().cast::<AtomicU8>().add(offset), length)
        }
    }

    /// Copies `data` to `offset`.
    pub(super) fn copy_in(&self, offset: usize, data: &[u8]) {
        assert!(offset.checked_add(data.len()).is_some_and(|end| end <= self.length));
        // SAFETY: the target was just checked to lie in the mapping, which lives as long as self,
        // and references into it are to atomic bytes, so `data` cannot overlap it.
        unsafe {
            let to = self.start.as_ptr().cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len());
        }
    }

    /// Copies from `offset` to `buf`. A page that is not there is filled.
    pub(super) fn copy_out(&self, offset: usize, buf: &mut [u8]) {
        assert!(offset.checked_add(buf.len()).is_some_and(|end| end <= self.length));
        // SAFETY: the source was just checked to lie in the mapping, which lives as long as self,
        // and references into it are to atomic bytes, so `buf` cannot overlap it.
        unsafe {
            let from = self.start.as_ptr().cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len());
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; nobody has a pointer into it.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}
