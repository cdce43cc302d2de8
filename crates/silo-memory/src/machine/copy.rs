//! The memory of a copy of a running machine: a private mapping of a file that all copies have, and
//! that nobody writes any more.
//!
//! What the guest only reads is one page for all copies; what it writes becomes a page of its monitor
//! alone, and is not in the file. So content is in two places, and which is known by the tracking: it
//! runs from before the guest's first instruction to the end, and every look adds what was written to
//! the blocks of the monitor's own.
//!
//! What must hold: the file is sealed against writing; a block that a look has told of is read from
//! the monitor ever after. One that was written after the last look may still be read from the file:
//! the next look tells of it, which is what whoever reads beside a running guest counts on anyway.
//!
//! Such memory can leave (it is read like any other) and cannot arrive: a move makes it ordinary
//! memory at the destination. Its content goes with its monitor.

use super::{Memory, Tracking};
use silo_block::{
    block::{BlockRange, BlockSet},
    device::{Device, DeviceName, Result},
};
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Mutex, PoisonError},
};

impl Memory {
    /// The memory of a copy, over `file`, which must be sealed against writing.
    ///
    /// # Errors
    /// If it is not.
    pub fn copy_of(name: DeviceName, file: File) -> Result<Self> {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
        let sealed = seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_WRITE));
        let mut memory = Self::adopt(name, file)?;
        if !sealed {
            let source = io::Error::other("its file could still be written");
            return Err(memory.error("share", "file".into(), source));
        }
        memory.own = Some(Mutex::new(BlockSet::new(memory.blocks)));
        Ok(memory)
    }

    /// Whether its file is shared with other machines.
    #[must_use]
    pub fn is_copy(&self) -> bool {
        self.own.is_some()
    }

    /// The blocks that are not in the file, as far as has been looked.
    pub(super) fn own_blocks(&self) -> Option<BlockSet> {
        let own = self.own.as_ref()?;
        Some(own.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// These were written.
    pub(super) fn note_own(&self, written: &BlockSet) {
        if let Some(own) = &self.own {
            own.lock().unwrap_or_else(PoisonError::into_inner).union_with(written);
        }
    }

    /// Before the mapping of a copy is taken: whether that is possible, and the monitor's memory.
    pub(super) fn begin_copy(
        &self,
        pid: u32,
        incoming: bool,
        adopted: bool,
        tracking: Tracking,
    ) -> Result<Option<File>> {
        if self.own.is_none() {
            return Ok(None);
        }
        let refused = |why: &str| {
            let source = io::Error::new(io::ErrorKind::Unsupported, why.to_owned());
            Err(self.error("share", "attach".into(), source))
        };
        if tracking == Tracking::None {
            return refused(
                "a copy needs its writes tracked (Linux 6.7 or newer, and tracking not switched off)",
            );
        }
        if incoming {
            return refused("a copy has all of its memory");
        }
        if adopted {
            // What was written before this process knew of it is not known.
            self.note_own(&BlockSet::full(self.blocks));
        }
        let path = format!("/proc/{pid}/mem");
        let pages = File::open(&path).map_err(|source| self.error("open", path, source))?;
        Ok(Some(pages))
    }

    /// As [`Memory::own_blocks`], as of now. Whoever watches or moves is told what was found.
    pub(super) fn look_for_own(&self) -> Result<Option<BlockSet>> {
        if self.own.is_none() {
            return Ok(None);
        }
        let written = self.look(&mut self.watchers())?;
        self.put_back(&written);
        Ok(self.own_blocks())
    }

    /// Puts the monitor's own blocks in place of the file's.
    pub(super) fn read_own(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        let Some(own) = &self.own else { return Ok(()) };
        let pieces: Vec<BlockRange> =
            own.lock().unwrap_or_else(PoisonError::into_inner).ranges_in(range).collect();
        if pieces.is_empty() {
            return Ok(());
        }
        let attached = self.attached.read().unwrap_or_else(PoisonError::into_inner);
        let place = attached
            .as_ref()
            .and_then(|attached| attached.pages.as_ref().map(|pages| (attached.address, pages)));
        let Some((address, pages)) = place else {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "its monitor is gone"));
        };
        for piece in pieces {
            let from = (piece.start.offset() - range.start.offset()) as usize;
            let part = &mut buf[from..from + piece.bytes() as usize];
            pages.read_exact_at(part, address + piece.start.offset())?;
        }
        Ok(())
    }
}

/// Ends every way to write to a memory file for good. It must not be mapped to be written by sharing
/// it; private mappings may go on.
///
/// # Errors
/// If somebody can still write to it.
pub fn seal_content(file: &File) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).map(drop).map_err(io::Error::from)
}
