//! Guest memory that is not all there yet, and guest memory whose changes somebody counts.
//!
//! Called by the server around every access to guest memory, if the machine's owner gave it a
//! [`GuestPages`]. Why it must be: a read of a hole of a memfd through another mapping creates a
//! page of zeros, and the guest then never faults on it; a write through another mapping does not
//! show in the tracking of the machine's own.

use std::{fmt, io};

/// Which memory: the file that the front end shares, by device and inode as `fstat` gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemoryId {
    /// `st_dev`
    pub device: u64,
    /// `st_ino`
    pub inode: u64,
}

/// Bytes of guest memory by their place in the file that holds it, which is their place in the
/// memory device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// Which file.
    pub memory: MemoryId,
    /// In bytes, from the start of the file.
    pub offset: u64,
    /// In bytes.
    pub length: u64,
}

impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of guest memory from {:#x}", self.length, self.offset)
    }
}

/// The pager and the tracker of a machine's memory, as the server sees them. Called from many
/// threads at once.
pub trait GuestPages: Send + Sync {
    /// Whether these bytes are certainly there; never waits.
    fn is_present(&self, range: GuestRange) -> bool {
        let _ = range;
        false
    }

    /// Makes the pages of these bytes present, and waits until they are. Must end, with an error
    /// if a page cannot be had: then the request fails with an I/O error and touches nothing.
    ///
    /// # Errors
    /// If a page cannot be had.
    fn make_present(&self, range: GuestRange) -> io::Result<()>;

    /// The server has written these bytes. Called after the write and before the guest is told.
    fn wrote(&self, range: GuestRange) {
        let _ = range;
    }

    /// Makes calls that wait return an error soon: the server stops.
    fn interrupt(&self) {}
}
