//! The one call without a safe wrapper.

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
