//! System calls of the shim, its constructor, and the `mmap` that QEMU calls. Layouts and numbers are
//! those of x86-64 Linux.

use std::{
    ffi::{c_int, c_long, c_ulong, c_void},
    io, mem,
    os::fd::RawFd,
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};

/// `_IO(0xAA, 0x00)` of linux/userfaultfd.h; since Linux 6.1.
const USERFAULTFD_IOC_NEW: c_ulong = 0xAA00;
const O_NONBLOCK: c_long = 0o4000;
const O_CLOEXEC: c_long = 0o2_000_000;
const SOL_SOCKET: c_int = 1;
const SCM_RIGHTS: c_int = 1;
const MSG_NOSIGNAL: c_int = 0x4000;
const SYS_MMAP: c_long = 9;
const SYS_FSTAT: c_long = 5;
const MAP_SHARED: c_int = 1;
const MAP_PRIVATE: c_int = 2;
/// Bits of the flags that say how a mapping is shared (`MAP_TYPE`).
const MAP_TYPE: c_int = 0xf;
/// No promise that all of it can become pages of this process: hardly any of it will.
const MAP_NORESERVE: c_int = 0x4000;

/// `struct iovec`.
#[repr(C)]
struct Iovec {
    base: *const c_void,
    len: usize,
}

/// `struct msghdr`.
#[repr(C)]
struct Message {
    name: *const c_void,
    name_len: u32,
    iov: *const Iovec,
    iov_len: usize,
    control: *const c_void,
    control_len: usize,
    flags: c_int,
}

/// `struct cmsghdr` with room for one descriptor, padded to its alignment.
#[repr(C)]
struct OneDescriptor {
    len: usize,
    level: c_int,
    kind: c_int,
    descriptor: c_int,
    padding: c_int,
}

/// `struct stat`: device and inode, and the rest.
#[repr(C)]
struct Facts {
    device: u64,
    inode: u64,
    rest: [u64; 16],
}

const _: () = assert!(size_of::<Facts>() == 144);
const _: () = assert!(size_of::<Message>() == 56 && size_of::<OneDescriptor>() == 24);

unsafe extern "C" {
    fn ioctl(fd: c_int, request: c_ulong, argument: c_long) -> c_int;
    fn sendmsg(fd: c_int, message: *const Message, flags: c_int) -> isize;
    #[link_name = "close"]
    fn libc_close(fd: c_int) -> c_int;
    fn read(fd: c_int, buffer: *mut c_void, size: usize) -> isize;
    fn syscall(number: c_long, ...) -> c_long;
    fn _exit(status: c_int) -> !;
}

/// Device and inode of the file that is mapped privately; inode 0 (no file has it) if there is none.
static PRIVATE: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

fn facts(descriptor: RawFd) -> Option<Facts> {
    let mut facts = Facts { device: 0, inode: 0, rest: [0; 16] };
    // SAFETY: the kernel writes at most a `struct stat`, which `Facts` is as large as.
    let done = unsafe { syscall(SYS_FSTAT, descriptor, &raw mut facts) };
    (done == 0).then_some(facts)
}

/// From now on this file is mapped privately, whatever is asked for. False if it is none.
pub(crate) fn map_privately(descriptor: RawFd) -> bool {
    let Some(facts) = facts(descriptor) else { return false };
    let [device, inode] = &PRIVATE;
    device.store(facts.device, Ordering::Relaxed);
    inode.store(facts.inode, Ordering::Release);
    true
}

/// The flags that a mapping gets in place of those that were asked for.
fn flags_for(flags: c_int, descriptor: c_int) -> c_int {
    let [device, inode] = &PRIVATE;
    let wanted = inode.load(Ordering::Acquire);
    // 1 is MAP_SHARED, 3 the same with flags checked; both set the lowest bit.
    if wanted == 0 || flags & MAP_SHARED == 0 || descriptor < 0 {
        return flags;
    }
    match facts(descriptor) {
        Some(facts) if (facts.device, facts.inode) == (device.load(Ordering::Relaxed), wanted) => {
            (flags & !MAP_TYPE) | MAP_PRIVATE | MAP_NORESERVE
        }
        _ => flags,
    }
}

/// What programs in this process call in place of the C library's.
///
/// # Safety
/// As mmap(2).
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    offset: i64,
) -> *mut c_void {
    let flags = flags_for(flags, descriptor);
    // SAFETY: the caller's arguments, but for how the file is shared; the C library's function is
    // this call too, and like this one leaves the error in errno. -1 is MAP_FAILED.
    unsafe {
        syscall(SYS_MMAP, address, length, protection, flags, descriptor, offset) as *mut c_void
    }
}

/// The same under its other name: offsets have 64 bits in both.
///
/// # Safety
/// As mmap(2).
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: as above.
    unsafe { mmap64(address, length, protection, flags, descriptor, offset) }
}

// A plain `extern "C"` function pointer in `.init_array` is what the dynamic loader calls.
#[used]
// SAFETY: the loader calls every pointer in `.init_array` once, with the C calling convention;
// `constructor` has it, and ignores the arguments.
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

extern "C" fn constructor() {
    super::start();
}

/// A new userfaultfd of this process, or the errno.
pub(crate) fn new_userfaultfd(device: RawFd) -> Result<RawFd, i32> {
    // SAFETY: this request takes its argument by value and touches no memory of ours; a number
    // that is no open descriptor gives EBADF.
    let made = unsafe { ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK) };
    if made >= 0 { Ok(made) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(-1)) }
}

/// Sends `data` and, with it, a descriptor. Nobody is left to hear of an error: the runner sees
/// the end of the stream.
pub(crate) fn send(socket: RawFd, data: &[u8], descriptor: Option<RawFd>) {
    let iov = Iovec { base: data.as_ptr().cast(), len: data.len() };
    let control = OneDescriptor {
        len: mem::offset_of!(OneDescriptor, padding),
        level: SOL_SOCKET,
        kind: SCM_RIGHTS,
        descriptor: descriptor.unwrap_or(-1),
        padding: 0,
    };
    let with = descriptor.is_some();
    let message = Message {
        name: ptr::null(),
        name_len: 0,
        iov: &raw const iov,
        iov_len: 1,
        control: if with { (&raw const control).cast() } else { ptr::null() },
        control_len: if with { size_of::<OneDescriptor>() } else { 0 },
        flags: 0,
    };
    // SAFETY: every pointer in `message` points to a value on this frame that outlives the call,
    // with the lengths given beside it.
    let _ = unsafe { sendmsg(socket, &raw const message, MSG_NOSIGNAL) };
}

/// Whether a byte comes before the stream ends and before the socket's own time limit.
pub(crate) fn receives_a_byte(socket: RawFd) -> bool {
    let mut byte = 0u8;
    loop {
        // SAFETY: the buffer is one byte on this frame, and one byte is asked for.
        let count = unsafe { read(socket, (&raw mut byte).cast(), 1) };
        let interrupted = || io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
        if count >= 0 || !interrupted() {
            return count == 1;
        }
    }
}

/// Ends the process, which has done nothing yet.
pub(crate) fn end() -> ! {
    // SAFETY: takes a number and does not return; nothing of QEMU has run that wants to clean up.
    unsafe { _exit(1) }
}

/// Closes a descriptor that was passed for the shim alone.
pub(crate) fn close(descriptor: RawFd) {
    // SAFETY: drafter passed this descriptor for the shim; nothing else in the process knows it.
    let _ = unsafe { libc_close(descriptor) };
}

/// Takes variables out of the environment.
pub(crate) fn remove_variables(names: [&str; 4]) {
    for name in names {
        // SAFETY: constructors run before `main`, when the process has one thread.
        unsafe { std::env::remove_var(name) };
    }
}
