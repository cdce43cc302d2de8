//! System calls that only the tests need: a tap, and the userfaultfd as the memory engine uses it.

use crate::driver::MemoryHandle;
use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, OwnedFd},
};

/// `_IOW('T', 202, int)` of linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// `_IOR(0xaa, 1, struct uffdio_range)` of linux/userfaultfd.h.
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;

/// A tap as drafter's machines get it, in the network namespace of this thread.
pub(super) fn tap(name: &str) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0u8; 40]; // struct ifreq
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    request[16..18].copy_from_slice(&flags.to_le_bytes());
    // SAFETY: the request is as long as the kernel's struct ifreq and outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) })?;
    Ok(file.into())
}

/// Makes every absent page of the memory wait for us.
pub(super) fn register_missing(memory: &MemoryHandle) -> io::Result<()> {
    let descriptor = memory.userfaultfd.as_raw_fd();
    let mut api = [0xAAu64, UFFD_FEATURE_MISSING_SHMEM, 0];
    // SAFETY: struct uffdio_api is three 64-bit words.
    check(unsafe { libc::ioctl(descriptor, UFFDIO_API, api.as_mut_ptr()) })?;
    let mut register = [memory.address, memory.length, 1, 0]; // mode: missing
    // SAFETY: struct uffdio_register is four 64-bit words.
    check(unsafe { libc::ioctl(descriptor, UFFDIO_REGISTER, register.as_mut_ptr()) })
}

/// Nobody waits for absent pages any more: they are zero, as ever.
pub(super) fn unregister(memory: &MemoryHandle) -> io::Result<()> {
    let mut range = [memory.address, memory.length];
    // SAFETY: struct uffdio_range is two 64-bit words.
    check(unsafe {
        libc::ioctl(memory.userfaultfd.as_raw_fd(), UFFDIO_UNREGISTER, range.as_mut_ptr())
    })
}

/// Fills absent pages.
pub(super) fn copy(memory: &MemoryHandle, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut copy = [memory.address + offset, data.as_ptr() as u64, data.len() as u64, 0, 0];
    let descriptor = memory.userfaultfd.as_raw_fd();
    // SAFETY: struct uffdio_copy is five 64-bit words; the source is valid for its length.
    check(unsafe { libc::ioctl(descriptor, UFFDIO_COPY, copy.as_mut_ptr()) })
}

/// Takes one pending fault: the offset in the memory that somebody waits for, if anybody does.
pub(super) fn pending_fault(memory: &MemoryHandle) -> Option<u64> {
    let mut message = [0; 32]; // struct uffd_msg
    let mut file = File::from(memory.userfaultfd.try_clone().ok()?);
    file.read_exact(&mut message).ok()?;
    let address = u64::from_le_bytes(message[16..24].try_into().ok()?);
    (message[0] == 0x12).then(|| address - memory.address)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
