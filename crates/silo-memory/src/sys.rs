//! The kernel interfaces that memory moves by: userfaultfd, PAGEMAP_SCAN, memfd, mappings.
//!
//! Numbers and layouts are those of `include/uapi/linux/userfaultfd.h` and `include/uapi/linux/fs.h`
//! (Linux 6.7). Every function here is checked against the running kernel by the tests of
//! [`machine`](crate::machine) and [`mount`](crate::mount).

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFDIO_CONTINUE: libc::c_ulong = 0xc020_aa07;
const UFFDIO_POISON: libc::c_ulong = 0xc020_aa08;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

const UFFD_API: u64 = 0xaa;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;

/// Kernel features of userfaultfd that memory can use.
pub mod feature {
    /// Missing faults on shared memory (Linux 4.11).
    pub const MISSING_SHMEM: u64 = 1 << 5;
    /// Faults on pages that are in the file and not in the mapping (5.14).
    pub const MINOR_SHMEM: u64 = 1 << 10;
    /// Write protection on shared memory (5.19).
    pub const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    /// Write protection of pages that are not there yet (6.4).
    pub const WP_UNPOPULATED: u64 = 1 << 13;
    /// Pages whose access fails with SIGBUS (6.6).
    pub const POISON: u64 = 1 << 14;
    /// Write protection that the kernel lifts by itself: tracking without events (6.7).
    pub const WP_ASYNC: u64 = 1 << 15;
}

/// `UFFDIO_REGISTER_MODE_MISSING`.
pub const REGISTER_MISSING: u64 = 1;
/// `UFFDIO_REGISTER_MODE_WP`.
pub const REGISTER_WP: u64 = 2;
/// `UFFDIO_REGISTER_MODE_MINOR`.
pub const REGISTER_MINOR: u64 = 4;

const COPY_MODE_WP: u64 = 2;
const CONTINUE_MODE_WP: u64 = 2;
const WRITEPROTECT_MODE_WP: u64 = 1;
const WRITEPROTECT_MODE_DONTWAKE: u64 = 2;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 2;
const PAGE_IS_WRITTEN: u64 = 2;
const PAGE_IS_PRESENT: u64 = 8;

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RegisterArg {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
}

#[repr(C)]
struct CopyArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// The argument of `UFFDIO_CONTINUE` and `UFFDIO_POISON`, which differ in the name of a field.
#[repr(C)]
struct PagesArg {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct WriteProtectArg {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct uffd_msg` for page faults.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    rest: u64,
}

const _: () = assert!(size_of::<ApiArg>() == 0x18);
const _: () = assert!(size_of::<RegisterArg>() == 0x20);
const _: () = assert!(size_of::<CopyArg>() == 0x28);
const _: () = assert!(size_of::<PagesArg>() == 0x20);
const _: () = assert!(size_of::<WriteProtectArg>() == 0x18);
const _: () = assert!(size_of::<ScanArg>() == 0x60);
const _: () = assert!(size_of::<Message>() == 32);

fn ioctl<T>(fd: RawFd, request: libc::c_ulong, arg: &mut T) -> io::Result<i32> {
    // SAFETY: every request in this module takes a pointer to the struct it is called with, whose
    // size the request number itself encodes (asserted above).
    let result = unsafe { libc::ioctl(fd, request as _, ptr::from_mut(arg)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes a userfaultfd for the calling process from an open `/dev/userfaultfd`.
pub fn new_userfaultfd(device: &File) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value and returns a new descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether a failed copy may be tried again.
#[derive(Debug)]
pub enum CopyOutcome {
    /// All bytes are in place.
    Done,
    /// This many bytes are in place; the page after them was there already.
    Present(u64),
    /// This many bytes are in place; the mapping changed meanwhile, try the rest again.
    Again(u64),
}

/// A userfaultfd over (part of) another process' address space.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    /// Whether the range is registered for write protection: only then can a copy be protected.
    protects: AtomicBool,
}

impl Userfault {
    /// Negotiates the features; fails with `EINVAL` where the kernel lacks one.
    pub fn new(fd: OwnedFd, features: u64) -> io::Result<Self> {
        let mut arg = ApiArg { api: UFFD_API, features, ioctls: 0 };
        ioctl(fd.as_raw_fd(), UFFDIO_API, &mut arg)?;
        Ok(Self { fd, protects: AtomicBool::new(false) })
    }

    /// One whose features another process has negotiated. `protects`: its range is registered for
    /// write protection.
    pub fn adopt(fd: OwnedFd, protects: bool) -> Self {
        Self { fd, protects: AtomicBool::new(protects) }
    }

    /// The descriptor, for poll.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }

    /// Registers `[start, start + len)` for the modes.
    pub fn register(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        let mut arg = RegisterArg { start, len, mode, ioctls: 0 };
        ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &mut arg)?;
        self.protects.store(mode & REGISTER_WP != 0, Ordering::Relaxed);
        Ok(())
    }

    /// Protects `[start, start + len)`: the next write to each page is seen by [`scan_written`].
    pub fn write_protect(&self, start: u64, len: u64) -> io::Result<()> {
        self.protection(start, len, WRITEPROTECT_MODE_WP)
    }

    /// Lifts the protection, also where it stands for pages that are not there. Wakes nobody.
    pub fn unprotect(&self, start: u64, len: u64) -> io::Result<()> {
        self.protection(start, len, WRITEPROTECT_MODE_DONTWAKE)
    }

    fn protection(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        // In pieces, so that the mapping's lock is free now and then.
        const PIECE: u64 = 64 << 20;
        let mut at = 0;
        while at < len {
            let piece = PIECE.min(len - at);
            let mut arg = WriteProtectArg { start: start + at, len: piece, mode };
            match ioctl(self.fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &mut arg) {
                Ok(_) => at += piece,
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Puts `data` at `address` as protected pages and wakes whoever waits for them.
    pub fn copy(&self, address: u64, data: &[u8]) -> io::Result<CopyOutcome> {
        let mut arg = CopyArg {
            dst: address,
            src: data.as_ptr() as u64,
            len: data.len() as u64,
            mode: if self.protects.load(Ordering::Relaxed) { COPY_MODE_WP } else { 0 },
            copy: 0,
        };
        let Err(error) = ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &mut arg) else {
            return Ok(CopyOutcome::Done);
        };
        let done = u64::try_from(arg.copy).unwrap_or(0);
        match error.raw_os_error() {
            Some(libc::EEXIST) => Ok(CopyOutcome::Present(0)),
            // A short copy is reported as EAGAIN with the count; what stopped it shows next time.
            Some(libc::EAGAIN) => Ok(CopyOutcome::Again(done)),
            _ => Err(error),
        }
    }

    /// Maps pages that are in the file into `[start, start + len)`, protected as by
    /// [`Userfault::copy`], and wakes whoever waits for them. `EFAULT`: a page is not in the file.
    pub fn map_present(&self, start: u64, len: u64) -> io::Result<CopyOutcome> {
        let mode = if self.protects.load(Ordering::Relaxed) { CONTINUE_MODE_WP } else { 0 };
        self.pages(UFFDIO_CONTINUE, PagesArg { start, len, mode, done: 0 })
    }

    /// Makes every access to pages that are not mapped fail with SIGBUS, and wakes whoever waits.
    /// A later [`Userfault::copy`] heals them.
    pub fn poison(&self, start: u64, len: u64) -> io::Result<CopyOutcome> {
        self.pages(UFFDIO_POISON, PagesArg { start, len, mode: 0, done: 0 })
    }

    fn pages(&self, request: libc::c_ulong, mut arg: PagesArg) -> io::Result<CopyOutcome> {
        let Err(error) = ioctl(self.fd.as_raw_fd(), request, &mut arg) else {
            return Ok(CopyOutcome::Done);
        };
        let done = u64::try_from(arg.done).unwrap_or(0);
        match error.raw_os_error() {
            Some(libc::EEXIST) => Ok(CopyOutcome::Present(0)),
            Some(libc::EAGAIN) => Ok(CopyOutcome::Again(done)),
            _ => Err(error),
        }
    }

    /// Wakes every thread that waits in the range.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut arg = RangeArg { start, len };
        ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, &mut arg).map(drop)
    }

    /// Addresses that threads wait for, as many as fit; empty if none is pending.
    ///
    /// Blocks if the descriptor does; ours do not.
    pub fn faults(&self, addresses: &mut Vec<u64>) -> io::Result<()> {
        let mut messages = [Message::default(); 64];
        // SAFETY: the buffer is valid for its whole size, and any bytes make valid messages.
        let read = unsafe {
            libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages))
        };
        if read < 0 {
            let error = io::Error::last_os_error();
            let none = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR));
            return if none { Ok(()) } else { Err(error) };
        }
        let count = read as usize / size_of::<Message>();
        let faults = messages[..count].iter().filter(|m| m.event == UFFD_EVENT_PAGEFAULT);
        addresses.extend(faults.map(|m| m.address));
        Ok(())
    }
}

/// Calls `found(start, end)` for every run of pages written since they were last protected, and
/// protects them again, atomically per page. `pagemap` is `/proc/PID/pagemap`.
pub fn scan_written(
    pagemap: &File,
    start: u64,
    end: u64,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    scan(pagemap, start, end, PAGE_IS_WRITTEN, |region| found(region.start, region.end))
}

/// As [`scan_written`], somewhat slower: `found(start, end, mapped)` also tells pages that are not
/// mapped, which may or may not have been written while they were, from those that are.
pub fn scan_written_mapped(
    pagemap: &File,
    start: u64,
    end: u64,
    mut found: impl FnMut(u64, u64, bool),
) -> io::Result<()> {
    scan(pagemap, start, end, PAGE_IS_WRITTEN | PAGE_IS_PRESENT, |region| {
        found(region.start, region.end, region.categories & PAGE_IS_PRESENT != 0);
    })
}

fn scan(
    pagemap: &File,
    start: u64,
    end: u64,
    return_mask: u64,
    mut found: impl FnMut(&PageRegion),
) -> io::Result<()> {
    let mut regions = vec![PageRegion::default(); 4096];
    let mut at = start;
    while at < end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            start: at,
            end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: PAGE_IS_WRITTEN,
            category_anyof_mask: 0,
            return_mask,
        };
        let count = ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut arg)? as usize;
        for region in &regions[..count.min(regions.len())] {
            found(region);
        }
        if arg.walk_end <= at {
            return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
        }
        at = arg.walk_end;
    }
    Ok(())
}

/// Whether this kernel has the features, by trying.
///
/// # Errors
/// If `/dev/userfaultfd` cannot be opened, or the kernel fails otherwise.
pub fn probe(features: u64) -> io::Result<bool> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    match Userfault::new(new_userfaultfd(&device)?, features) {
        Ok(_) => Ok(true),
        Err(refused) if refused.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(other) => Err(other),
    }
}

/// A shared mapping of a whole file in this process; unmapped when dropped.
#[derive(Debug)]
pub struct SharedMap {
    base: ptr::NonNull<u8>,
    len: usize,
}

// SAFETY: the struct owns the mapping and hands out only its address; what is done with that is up
// to unsafe code elsewhere.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps `len` bytes of `file`, which must be that long.
    pub fn new(file: &File, len: usize, writable: bool) -> io::Result<Self> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        let size = std::num::NonZeroUsize::new(len)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let protection = if writable {
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
        } else {
            ProtFlags::PROT_READ
        };
        // SAFETY: a fresh mapping at a place that the kernel chooses touches nothing that exists.
        let base = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { base: base.cast(), len })
    }

    /// Leaves the mapping out of child processes, which would not fault on it, and out of core
    /// dumps, which would fetch all of it.
    pub fn keep_to_ourselves(&self) -> io::Result<()> {
        use nix::sys::mman::{MmapAdvise, madvise};
        for advice in [MmapAdvise::MADV_DONTFORK, MmapAdvise::MADV_DONTDUMP] {
            // SAFETY: neither advice changes what this process sees at these addresses.
            unsafe { madvise(self.base.cast(), self.len, advice) }?;
        }
        Ok(())
    }

    /// Where it begins.
    pub fn base(&self) -> ptr::NonNull<u8> {
        self.base
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nobody may use the address any more.
        let _ = unsafe { nix::sys::mman::munmap(self.base.cast(), self.len) };
    }
}

/// A memfd of `len` bytes, sealed against change of size.
pub fn memfd(name: &str, len: u64) -> io::Result<OwnedFd> {
    use nix::{
        fcntl::{FcntlArg, SealFlag, fcntl},
        sys::memfd::{MFdFlags, memfd_create},
        unistd::ftruncate,
    };
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let len = i64::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    ftruncate(&fd, len)?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
    Ok(fd)
}
