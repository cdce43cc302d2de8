//! System calls of the doctor: small trials against the running kernel. Numbers come from
//! include/uapi/linux/{userfaultfd,fs,if_tun,kvm}.h.

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::memfd::{MFdFlags, memfd_create},
};
use std::{
    ffi::c_void,
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    ptr::{self, NonNull},
    time::{Duration, Instant},
};

const PAGE: usize = 4096;

const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;

const UFFD_API: u64 = 0xaa;
const REGISTER_MISSING: u64 = 1;
const REGISTER_WP: u64 = 2;
const PAGE_IS_WRITTEN: u64 = 2;
const SCAN_WP_MATCHING: u64 = 1;
const SCAN_CHECK_WPASYNC: u64 = 2;
const EVENT_PAGEFAULT: u8 = 0x12;

/// Features of userfaultfd by bit and name, those that moves use.
pub(super) const FEATURES: [(u64, &str); 4] = [
    (1 << 5, "MISSING_SHMEM"),
    (1 << 12, "WP_SHMEM"),
    (1 << 13, "WP_UNPOPULATED"),
    (1 << 15, "WP_ASYNC"),
];
const TRACKING: u64 = 1 << 12 | 1 << 13 | 1 << 15;

/// A shared mapping of a memfd, unmapped when dropped.
struct Region {
    address: NonNull<c_void>,
    bytes: usize,
    _memory: OwnedFd,
}

// SAFETY: the region is memory of this process, reached through volatile accesses only.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn new(pages: usize) -> io::Result<Region> {
        let memory = memfd_create(c"architect-doctor", MFdFlags::MFD_CLOEXEC)?;
        let bytes = pages * PAGE;
        nix::unistd::ftruncate(&memory, bytes as i64)?;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Region { address, bytes, _memory: memory })
    }

    fn start(&self) -> u64 {
        self.address.as_ptr() as u64
    }

    fn page(&self, page: usize) -> *mut u8 {
        assert!((page + 1) * PAGE <= self.bytes, "inside the region");
        // SAFETY: inside the mapping, checked above.
        unsafe { self.address.as_ptr().cast::<u8>().add(page * PAGE) }
    }

    fn write(&self, page: usize, value: u8) {
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { ptr::write_volatile(self.page(page), value) }
    }

    fn read(&self, page: usize) -> u8 {
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { ptr::read_volatile(self.page(page)) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: made by `new`, unmapped once.
        unsafe { libc::munmap(self.address.as_ptr(), self.bytes) };
    }
}

/// An ioctl whose argument is a struct of 64-bit words.
fn words<const N: usize>(
    fd: &impl AsRawFd,
    request: libc::c_ulong,
    argument: &mut [u64; N],
) -> io::Result<i32> {
    let encoded = (request >> 16 & 0x3fff) as usize;
    assert_eq!(encoded, size_of_val(argument), "the request names the size of its argument");
    // SAFETY: the request encodes its argument's size, which is that of the array (checked above).
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A userfaultfd that is not set up yet.
fn new_userfaultfd() -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: this request takes flags by value and returns a descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Every feature that the kernel's userfaultfd offers, by bit.
pub(super) fn userfaultfd_features() -> io::Result<u64> {
    let mut api = [UFFD_API, 0, 0];
    words(&new_userfaultfd()?, UFFDIO_API, &mut api)?;
    Ok(api[1])
}

fn userfaultfd(features: u64, region: &Region, mode: u64) -> io::Result<OwnedFd> {
    let fd = new_userfaultfd()?;
    words(&fd, UFFDIO_API, &mut [UFFD_API, features, 0])?;
    words(&fd, UFFDIO_REGISTER, &mut [region.start(), region.bytes as u64, mode, 0])?;
    Ok(fd)
}

/// Which pages were written since the last call, by `PAGEMAP_SCAN`, protecting them again.
fn scan(pagemap: &File, region: &Region) -> io::Result<Vec<usize>> {
    let mut found = [[0u64; 3]; 16];
    let start = region.start();
    let mut argument = [
        96,
        SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
        start,
        start + region.bytes as u64,
        0,
        found.as_mut_ptr() as u64,
        found.len() as u64,
        0,
        0,
        PAGE_IS_WRITTEN,
        0,
        PAGE_IS_WRITTEN,
    ];
    // The kernel fills `found`, whose address and length the argument holds.
    let count = words(pagemap, PAGEMAP_SCAN, &mut argument)?;
    let mut pages = Vec::new();
    for [from, to, _] in found.iter().take(count as usize) {
        pages.extend((*from..*to).step_by(PAGE).map(|at| ((at - start) / PAGE as u64) as usize));
    }
    Ok(pages)
}

/// Tracks writes to a small shared mapping as moves do: true if exactly the written pages are
/// reported, and none twice.
pub(super) fn tracks_exactly() -> io::Result<bool> {
    let region = Region::new(16)?;
    let fd = userfaultfd(TRACKING, &region, REGISTER_WP)?;
    region.write(3, 1);
    words(&fd, UFFDIO_WRITEPROTECT, &mut [region.start(), region.bytes as u64, 1])?;
    let pagemap = File::open("/proc/self/pagemap")?;
    scan(&pagemap, &region)?;
    region.write(3, 2);
    region.write(4, 2);
    region.write(11, 2);
    let first = scan(&pagemap, &region)?;
    let second = scan(&pagemap, &region)?;
    Ok(first == [3, 4, 11] && second.is_empty())
}

/// Serves one fault on an absent page and returns how long the reader waited. Closing the
/// userfaultfd on every way out wakes a reader that was not served.
pub(super) fn serves_a_fault(limit: Duration) -> io::Result<Duration> {
    let region = Region::new(1)?;
    let fd = userfaultfd(1 << 5, &region, REGISTER_MISSING)?;
    let content = [0x5au8; PAGE];
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let started = Instant::now();
            (region.read(0), started.elapsed())
        });
        let served = serve(&fd, &region, &content, limit);
        drop(fd);
        let (value, waited) =
            reader.join().map_err(|_| io::Error::other("the reading thread panicked"))?;
        served?;
        if value != 0x5a {
            return Err(io::Error::other("the page held something else than what was put there"));
        }
        Ok(waited)
    })
}

fn serve(fd: &OwnedFd, region: &Region, content: &[u8; PAGE], limit: Duration) -> io::Result<()> {
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    if poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "no fault was reported"));
    }
    let mut message = [0u8; 32];
    if nix::unistd::read(fd, &mut message)? != 32 || message[0] != EVENT_PAGEFAULT {
        return Err(io::Error::other("an event that is not a fault"));
    }
    let length = PAGE as u64;
    words(fd, UFFDIO_COPY, &mut [region.start(), content.as_ptr() as u64, length, 0, 0])?;
    Ok(())
}

/// Whether the kernel's soft-dirty bits tell a written page from others.
pub(super) fn soft_dirty_works() -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let region = Region::new(2)?;
    region.write(0, 1);
    region.write(1, 1);
    std::fs::write("/proc/self/clear_refs", "4")?;
    region.write(0, 2);
    let pagemap = File::open("/proc/self/pagemap")?;
    let dirty = |page: u64| -> io::Result<bool> {
        let mut entry = [0u8; 8];
        pagemap.read_exact_at(&mut entry, (region.start() / PAGE as u64 + page) * 8)?;
        Ok(u64::from_ne_bytes(entry) >> 55 & 1 == 1)
    };
    Ok(dirty(0)? && !dirty(1)?)
}

/// Opens a tap in the calling thread's network namespace; it goes when the file is closed.
pub(super) fn tap(name: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0u8; 40];
    let name = name.as_bytes();
    assert!(name.len() < libc::IFNAMSIZ, "a name of ours");
    request[..name.len()].copy_from_slice(name);
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: `request` is a whole `struct ifreq` (40 bytes on 64-bit Linux) and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

/// KVM's API version; 12 everywhere since 2007.
pub(super) fn kvm_api() -> io::Result<i32> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: this request takes no argument.
    let version = unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION, 0) };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

/// The time stamp counter.
#[cfg(target_arch = "x86_64")]
pub(super) fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has it, and Linux lets programs read it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::missing;

    #[test]
    fn this_kernel_tracks_exactly_or_says_why_not() {
        match tracks_exactly() {
            Ok(exactly) => assert!(exactly),
            Err(error) => missing::note("exact dirty tracking", &error.to_string()),
        }
    }

    #[test]
    fn this_kernel_serves_a_fault_or_says_why_not() {
        match serves_a_fault(Duration::from_secs(5)) {
            Ok(waited) => assert!(waited < Duration::from_secs(5)),
            Err(error) => missing::note("faults by userfaultfd", &error.to_string()),
        }
    }

    #[test]
    fn an_unserved_reader_is_let_go_when_the_limit_has_passed() {
        if new_userfaultfd().is_ok() {
            let region = Region::new(1).unwrap();
            let fd = userfaultfd(1 << 5, &region, REGISTER_MISSING).unwrap();
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| region.read(0));
                std::thread::sleep(Duration::from_millis(20));
                drop(fd);
                assert_eq!(reader.join().unwrap(), 0);
            });
        } else {
            missing::note("userfaultfd", "/dev/userfaultfd cannot be used");
        }
    }
}
