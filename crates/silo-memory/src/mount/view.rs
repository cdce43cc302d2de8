//! One mapping of a mount's memfd whose page faults come to us, in this process or in another.
//!
//! Pages get into the file in two ways: by `UFFDIO_COPY` through the first view (allocates, copies,
//! maps, protects and wakes in one call, and needs no zeroed page before it), or by a plain write to
//! the file. Pages that are in the file and not in the mapping fault too (minor faults), so a page
//! that somebody else's access created in the file is never taken for content.
//!
//! What must hold: nothing here decides whether content may be put in place; that is the table's.
//! Nothing is done to the addresses once the mapping is gone: the next mapping of this process gets
//! the same ones, and the kernel does not ask whose userfaultfd it is that copies to them.

use super::MountError;
use crate::sys::{self, CopyOutcome, Userfault, feature};
use nix::sys::eventfd::EventFd;
use silo_block::block::{BLOCK_SIZE, BlockIndex, BlockRange};
use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard},
};

const PAGE: u64 = BLOCK_SIZE as u64;

/// What a mount asks of the kernel; Linux 6.7 has it all.
const FEATURES: u64 = feature::MISSING_SHMEM
    | feature::MINOR_SHMEM
    | feature::WP_HUGETLBFS_SHMEM
    | feature::WP_UNPOPULATED
    | feature::POISON
    | feature::WP_ASYNC;

/// A registered mapping.
pub(super) struct View {
    userfault: Userfault,
    pagemap: Arc<File>,
    address: u64,
    writable: bool,
    /// Whether the mapping is there; held while something is done to its addresses.
    mapped: RwLock<bool>,
    /// Ends the fault thread.
    pub(super) stop: EventFd,
}

/// The page map of a process. This one's is opened once: that takes a third of the time in which a
/// mount opens, and it stays the same for the life of the process.
fn page_map(pid: u32) -> io::Result<Arc<File>> {
    static OWN: OnceLock<(u32, Arc<File>)> = OnceLock::new();
    if let Some((_, map)) = OWN.get().filter(|(whose, _)| *whose == pid) {
        return Ok(Arc::clone(map));
    }
    let map = Arc::new(File::open(format!("/proc/{pid}/pagemap"))?);
    if pid == std::process::id() {
        // A child that was forked keeps its parent's: it has another id, and opens its own.
        let _ = OWN.set((pid, Arc::clone(&map)));
    }
    Ok(map)
}

/// A mapping of a mount's file in another process, for [`Mount::attach`](super::Mount::attach).
#[derive(Debug)]
pub struct Foreign {
    /// Made inside that process, and not set up yet.
    pub userfaultfd: OwnedFd,
    /// The process.
    pub pid: u32,
    /// Where offset 0 of the file is mapped there, shared; all of it must be.
    pub address: u64,
}

impl View {
    /// Registers a mapping of `len` bytes. The whole mapping faults from now on.
    pub(super) fn new(
        userfaultfd: OwnedFd,
        pid: u32,
        address: u64,
        len: u64,
        writable: bool,
    ) -> Result<Self, MountError> {
        let system = |operation| move |source| MountError::System { operation, source };
        let userfault = Userfault::new(userfaultfd, FEATURES).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EINVAL) => MountError::Unsupported,
                _ => MountError::System { operation: "set up userfaultfd", source },
            }
        })?;
        let tracked = if writable { sys::REGISTER_WP } else { 0 };
        userfault
            .register(address, len, sys::REGISTER_MISSING | sys::REGISTER_MINOR | tracked)
            .map_err(system("register the mapping"))?;
        let pagemap = page_map(pid).map_err(system("open the page map"))?;
        let stop = EventFd::new().map_err(|error| system("make an eventfd")(error.into()))?;
        let mapped = RwLock::new(true);
        Ok(Self { userfault, pagemap, address, writable, mapped, stop })
    }

    /// The mapping is about to go: from now on its addresses are somebody else's.
    pub(super) fn retire(&self) {
        *self.mapped.write().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// Keeps the mapping where it is; none if it has gone.
    fn mapped(&self) -> Option<RwLockReadGuard<'_, bool>> {
        Some(self.mapped.read().unwrap_or_else(PoisonError::into_inner)).filter(|mapped| **mapped)
    }

    /// Whether the address space that this is a mapping of has ended, with what its page map knew.
    pub(super) fn is_over(&self) -> bool {
        let entry = self.address / PAGE * 8;
        // The page map of an address space that is no more reads as empty.
        matches!(self.pagemap.read_at(&mut [0; 8], entry), Ok(0))
    }

    pub(super) fn userfault(&self) -> &Userfault {
        &self.userfault
    }

    /// The block at an address of this mapping.
    pub(super) fn block_at(&self, address: u64) -> u64 {
        address.wrapping_sub(self.address) / PAGE
    }

    fn address_of(&self, block: u64) -> u64 {
        self.address + block * PAGE
    }

    /// Puts whole blocks into the file and into this mapping, over whatever the file has there,
    /// and wakes whoever waits for them here.
    pub(super) fn place(&self, file: &File, start: BlockIndex, data: &[u8]) -> io::Result<()> {
        let Some(_mapped) = self.mapped() else {
            return file.write_all_at(data, start.offset());
        };
        let mut at = 0;
        while at < data.len() {
            let address = self.address + start.offset() + at as u64;
            match self.userfault.copy(address, &data[at..]) {
                Ok(CopyOutcome::Done) => return Ok(()),
                Ok(CopyOutcome::Again(done)) => at += done as usize,
                Ok(CopyOutcome::Present(_)) => {
                    // Somebody's access made a page here that is not content: overwrite it.
                    let page = &data[at..at + BLOCK_SIZE];
                    file.write_all_at(page, start.offset() + at as u64)?;
                    self.map(BlockRange::new(start.0 + at as u64 / PAGE, 1))?;
                    at += BLOCK_SIZE;
                }
                // The mapping is gone (its process ended): the file still takes the content.
                Err(gone) if is_gone(&gone) => {
                    return file.write_all_at(&data[at..], start.offset() + at as u64);
                }
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }

    /// Maps blocks whose content the file has (or that are zero: holes of the file) and wakes
    /// whoever waits for them.
    pub(super) fn expose(&self, range: BlockRange) -> io::Result<()> {
        let Some(_mapped) = self.mapped() else { return Ok(()) };
        self.map(range)
    }

    fn map(&self, range: BlockRange) -> io::Result<()> {
        let mut block = range.start.0;
        while block < range.end() {
            let left = (range.end() - block) * PAGE;
            match self.userfault.map_present(self.address_of(block), left) {
                Ok(CopyOutcome::Done) => return Ok(()),
                Ok(CopyOutcome::Again(done)) => block += done / PAGE,
                Ok(CopyOutcome::Present(_)) => {
                    self.userfault.wake(self.address_of(block), PAGE)?;
                    block += 1;
                }
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    block += self.zero(block)?;
                }
                Err(gone) if is_gone(&gone) => return Ok(()),
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }

    /// A hole of the file gets a page of zeros. Returns 1 when that is done, 0 to look again.
    fn zero(&self, block: u64) -> io::Result<u64> {
        static ZERO: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
        match self.userfault.copy(self.address_of(block), &ZERO)? {
            CopyOutcome::Done => Ok(1),
            CopyOutcome::Again(_) | CopyOutcome::Present(_) => Ok(0),
        }
    }

    /// Blocks that are in the file and not mapped count as not written.
    pub(super) fn protect(&self, range: BlockRange) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        let Some(_mapped) = self.mapped() else { return Ok(()) };
        match self.userfault.write_protect(self.address_of(range.start.0), range.bytes()) {
            Err(gone) if is_gone(&gone) => Ok(()),
            other => other,
        }
    }

    /// Ends the wait of everybody who waits for these blocks here, with SIGBUS.
    pub(super) fn poison(&self, range: BlockRange) -> io::Result<()> {
        let Some(_mapped) = self.mapped() else { return Ok(()) };
        let (mut block, mut cleared) = (range.start.0, false);
        while block < range.end() {
            let (address, left) = (self.address_of(block), (range.end() - block) * PAGE);
            match self.userfault.poison(address, left) {
                Ok(CopyOutcome::Done) => return Ok(()),
                Ok(CopyOutcome::Again(done)) => block += done / PAGE,
                // A scan left a mark of protection where no page is: it would be poisoned never,
                // and its waiters would fault for ever.
                Ok(CopyOutcome::Present(_)) if !cleared && self.writable => {
                    self.userfault.unprotect(address, PAGE)?;
                    cleared = true;
                    continue;
                }
                Ok(CopyOutcome::Present(_)) => {
                    self.userfault.wake(address, PAGE)?;
                    block += 1;
                }
                Err(gone) if is_gone(&gone) => return Ok(()),
                Err(other) => return Err(other),
            }
            cleared = false;
        }
        Ok(())
    }

    /// Calls `found(blocks, mapped)` for every run of blocks that may have been written through this
    /// mapping since the last call, and tracks them anew. Blocks that are not mapped may be among
    /// them; with `tell` they are told apart.
    pub(super) fn scan(
        &self,
        blocks: u64,
        tell: bool,
        mut found: impl FnMut(BlockRange, bool),
    ) -> io::Result<()> {
        if !self.writable || blocks == 0 {
            return Ok(());
        }
        let Some(_mapped) = self.mapped() else { return Ok(()) };
        let (start, end) = (self.address, self.address_of(blocks));
        let range = |from, to| BlockRange::new((from - start) / PAGE, (to - from) / PAGE);
        let scanned = if tell {
            sys::scan_written_mapped(&self.pagemap, start, end, |from, to, mapped| {
                found(range(from, to), mapped);
            })
        } else {
            sys::scan_written(&self.pagemap, start, end, |from, to| found(range(from, to), true))
        };
        match scanned {
            Err(gone) if is_gone(&gone) => Ok(()),
            other => other,
        }
    }
}

/// Whether a call failed because the mapping or its process no longer exists.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}
