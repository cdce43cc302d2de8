//! The calls without a safe wrapper.

use crate::page::Page;
use nix::sys::mman::mlock;
use std::{io, ptr::NonNull};

/// Pins the pages in memory, which also makes all of them present.
pub(crate) fn lock(pages: &[Page]) -> io::Result<()> {
    let start = NonNull::from(pages).cast();
    // SAFETY: the range is exactly that of a live slice; mlock changes no content.
    unsafe { mlock(start, size_of_val(pages)) }?;
    Ok(())
}

/// Makes the calling thread the last to be scheduled (nice 19, which is per thread on Linux): what
/// it does waits while something else wants the processor.
pub(crate) fn yield_to_others() -> io::Result<()> {
    // SAFETY: changes a property of the calling thread and touches no memory.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
