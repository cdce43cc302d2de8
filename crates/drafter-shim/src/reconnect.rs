//! How soon QEMU tries again to reach a disk's server that is gone.
//!
//! A runner that died is back within a fraction of a second, and its guest waits for its disks. QEMU tries a
//! vhost-user socket once a second at most (`reconnect=1` is the least that it takes before version 9.2), and
//! an NBD socket after 1, 2, 4 … 16 s (`connect_thread_func` of `nbd/client-connection.c`). Both waits are
//! asked of other libraries, by functions that this one stands in for: a timer of GLib, which QEMU makes by
//! `g_timeout_source_new` for its character devices alone, and `sleep`, which nothing else of a running
//! machine's monitor calls. An attempt at a socket that nobody listens on takes microseconds.

use std::{
    ffi::{CStr, c_char, c_int, c_long, c_uint, c_void},
    ptr,
};

/// What QEMU asks for between two attempts at a vhost-user socket, ms.
const ASKED_MS: c_uint = 1000;
/// What it gets, ms.
const AGAIN_MS: c_uint = 50;

/// `struct timespec`.
#[repr(C)]
struct Timespec {
    seconds: c_long,
    nanoseconds: c_long,
}

unsafe extern "C" {
    fn nanosleep(time: *const Timespec, left: *mut Timespec) -> c_int;
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// `RTLD_NEXT` of dlfcn.h: the libraries that come after this one.
const NEXT: *mut c_void = ptr::without_provenance_mut(usize::MAX);
const SOURCE_NEW: &CStr = c"g_timeout_source_new";

const fn instead_of(interval_ms: c_uint) -> c_uint {
    if interval_ms == ASKED_MS { AGAIN_MS } else { interval_ms }
}

/// GLib's, but for the interval.
///
/// # Safety
/// As GLib's: callable from any thread, with any interval.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn g_timeout_source_new(interval: c_uint) -> *mut c_void {
    // SAFETY: the name ends with a zero byte; the handle is one of the constants that dlsym takes.
    let found = unsafe { dlsym(NEXT, SOURCE_NEW.as_ptr()) };
    if found.is_null() {
        // Whoever calls it has GLib; without it there is nothing that could be returned.
        std::process::abort();
    }
    // SAFETY: GLib's function of that name takes an unsigned int and returns a pointer, in every version.
    let original = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_uint) -> *mut c_void>(found)
    };
    // SAFETY: as the caller's.
    unsafe { original(instead_of(interval)) }
}

/// The C library's, but for the time.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn sleep(_seconds: c_uint) -> c_uint {
    let time = Timespec { seconds: 0, nanoseconds: c_long::from(AGAIN_MS) * 1_000_000 };
    // SAFETY: reads one timespec; a null pointer for what is left is allowed.
    unsafe { nanosleep(&raw const time, ptr::null_mut()) };
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_second_between_two_attempts_is_shorter() {
        assert_eq!([0, 999, 1000, 1001].map(instead_of), [0, 999, 50, 1001]);
    }

    #[test]
    fn a_thread_that_sleeps_for_seconds_is_back_at_once() {
        let began = std::time::Instant::now();
        assert_eq!(sleep(3600), 0);
        assert!(began.elapsed() >= std::time::Duration::from_millis(50));
    }
}
