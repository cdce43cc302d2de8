//! The runtime map: the state of every block right now, in a file that is never synced.
//!
//! The page cache outlives a process, not a host. So after `kill -9` this file says exactly which
//! blocks were in the overlay, acknowledged and unflushed ones too, and QEMU, which lives on and
//! connects again, finds every write that it was told of. After a host crash the boot id differs
//! and the [`journal`](super::journal) speaks instead.
//!
//! The order that makes it true, for every change of state: content into the overlay, then the
//! byte here, then the state in memory, then the answer to the guest.
//!
//! Layout (little endian), version 1: a header page, then one byte per block.
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `SILOMAP\0` |
//! | 8 | 4 | version |
//! | 12 | 4 | zero |
//! | 16 | 8 | blocks |
//! | 24 | 8 | instance: the disk that this map belongs to |
//! | 32 | 40 | boot id of the host, padded with zeros |
//! | 72 | 8 | XXH3-64 of bytes 0 to 72 |
//! | 128 | 1 | status (Whole, Receiving, Armed); changes in place |
//! | 129 | 1 | 1 when frozen; changes in place |
//! | 4096 | blocks | states |

use super::{
    error::MapError,
    state::{BlockState, DiskStatus, StateMap},
};
use crate::{
    block::BlockRange,
    files::{Folder, Stored},
};
use std::{fs, io, path::Path, sync::Arc};
use twox_hash::XxHash3_64;

const MAGIC: &[u8; 8] = b"SILOMAP\0";
const VERSION: u32 = 1;
const STATUS_AT: u64 = 128;
const FROZEN_AT: u64 = 129;
const BODY_AT: u64 = 4096;

/// Which boot of which host this is: what the page cache's content is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootId(String);

impl BootId {
    /// Any text of at most 40 bytes; tests use it to play a crash of the host.
    #[must_use]
    pub fn new(id: &str) -> Self {
        let mut end = id.len().min(40);
        while !id.is_char_boundary(end) {
            end -= 1;
        }
        Self(id[..end].to_owned())
    }

    /// That of the running kernel.
    ///
    /// # Errors
    /// If /proc is not mounted.
    pub fn current() -> io::Result<Self> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let text = fs::read_to_string(path).map_err(MapError::io("read", path))?;
        Ok(Self::new(text.trim()))
    }

    fn padded(&self) -> [u8; 40] {
        let mut bytes = [0; 40];
        bytes[..self.0.len()].copy_from_slice(self.0.as_bytes());
        bytes
    }
}

/// An open runtime map.
pub(crate) struct Runtime {
    file: Arc<dyn Stored>,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Runtime")
    }
}

/// What a runtime map that is still good says.
#[derive(Debug)]
pub(crate) struct RuntimeContent {
    pub(crate) states: Vec<u8>,
    pub(crate) status: DiskStatus,
    pub(crate) frozen: bool,
}

fn header(blocks: u64, instance: u64, boot: &BootId) -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&blocks.to_le_bytes());
    bytes[24..32].copy_from_slice(&instance.to_le_bytes());
    bytes[32..72].copy_from_slice(&boot.padded());
    let sum = XxHash3_64::oneshot(&bytes[..72]);
    bytes[72..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

impl Runtime {
    /// Makes the map anew, as a whole or not at all.
    pub(crate) fn create(
        folder: &dyn Folder,
        name: &str,
        instance: u64,
        boot: &BootId,
        content: &RuntimeContent,
    ) -> Result<Self, MapError> {
        let path = folder.path().join(name);
        let fresh = format!("{name}.new");
        let write = || -> io::Result<Arc<dyn Stored>> {
            let file = folder.create(&fresh)?;
            let length = BODY_AT + content.states.len() as u64;
            file.set_len(length)?;
            // Reserved now, so that a full file system cannot refuse a change of state later.
            file.allocate_zeros(0, length)?;
            file.write_at(&header(content.states.len() as u64, instance, boot), 0)?;
            file.write_at(&[content.status as u8, u8::from(content.frozen)], STATUS_AT)?;
            // Zeros are there already: an empty map costs nothing to write.
            for (index, part) in content.states.chunks(64 << 10).enumerate() {
                if !crate::block::is_zero(part) {
                    file.write_at(part, BODY_AT + (index as u64) * (64 << 10))?;
                }
            }
            folder.rename(&fresh, name)?;
            Ok(file)
        };
        Ok(Self { file: write().map_err(MapError::io("write", &path))? })
    }

    /// Opens the map and reads it, if it is of this boot and of this disk; `None` if not.
    ///
    /// # Errors
    /// If the map claims to be of this boot and of this disk, but is damaged: then writes that the
    /// guest was told of would be lost silently by going back to the journal.
    pub(crate) fn adopt(
        folder: &dyn Folder,
        name: &str,
        blocks: u64,
        instance: u64,
        boot: &BootId,
    ) -> Result<Option<(Self, RuntimeContent)>, MapError> {
        let path = folder.path().join(name);
        let file = match folder.open(name) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(MapError::io("open", &path)(error)),
        };
        let mut found = [0; 80];
        match file.read_at(&mut found, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(MapError::io("read", &path)(error)),
        }
        let ours = header(blocks, instance, boot);
        let version = u32::from_le_bytes([found[8], found[9], found[10], found[11]]);
        if found[..8] == *MAGIC && found[16..72] == ours[16..72] && version != VERSION {
            return Err(MapError::Version { path, found: version, known: VERSION });
        }
        if found != ours {
            return Ok(None);
        }
        let corrupt = |at, detail: &str| MapError::Corrupt {
            path: path.clone(),
            at,
            detail: format!(
                "{detail}; stop the machine and remove this file to go back to the last flush"
            ),
        };
        let mut flags = [0; 2];
        let mut states = vec![0; blocks as usize];
        file.read_at(&mut flags, STATUS_AT)
            .and_then(|()| file.read_at(&mut states, BODY_AT))
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => corrupt(BODY_AT, "the file is too short"),
                _ => MapError::io("read", &path)(error),
            })?;
        let Some(status) = DiskStatus::from_byte(flags[0]) else {
            return Err(corrupt(STATUS_AT, "unknown status"));
        };
        if let Some(bad) = states.iter().position(|b| BlockState::from_byte(*b).is_none()) {
            return Err(corrupt(BODY_AT + bad as u64, "unknown block state"));
        }
        Ok(Some((Self { file }, RuntimeContent { states, status, frozen: flags[1] != 0 })))
    }

    /// Notes that all blocks of `range` have `state`.
    pub(crate) fn set(&self, range: BlockRange, state: BlockState) -> io::Result<()> {
        const CHUNK: u64 = 4096;
        const BYTES: [[u8; CHUNK as usize]; 4] =
            [[0; CHUNK as usize], [1; CHUNK as usize], [2; CHUNK as usize], [3; CHUNK as usize]];
        static ROWS: [[u8; CHUNK as usize]; 4] = BYTES;
        for chunk in range.chunks(CHUNK) {
            let bytes = &ROWS[state as usize][..chunk.count as usize];
            self.file.write_at(bytes, BODY_AT + chunk.start.0)?;
        }
        Ok(())
    }

    /// Notes all states of `range` with one write.
    pub(crate) fn copy(&self, range: BlockRange, states: &StateMap) -> io::Result<()> {
        self.file.write_at(&states.to_bytes(range), BODY_AT + range.start.0)
    }

    pub(crate) fn set_status(&self, status: DiskStatus) -> io::Result<()> {
        self.file.write_at(&[status as u8], STATUS_AT)
    }

    pub(crate) fn set_frozen(&self, frozen: bool) -> io::Result<()> {
        self.file.write_at(&[u8::from(frozen)], FROZEN_AT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::files::RealFolder;

    fn content() -> RuntimeContent {
        RuntimeContent { states: vec![0, 1, 2, 3, 1], status: DiskStatus::Armed, frozen: true }
    }

    #[test]
    fn the_header_has_these_bytes() {
        let bytes = header(5, 0x0102_0304_0506_0708, &BootId::new("boot-1"));
        let mut expected = Vec::new();
        expected.extend_from_slice(b"SILOMAP\0\x01\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0");
        expected.extend_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
        expected.extend_from_slice(b"boot-1");
        expected.resize(72, 0);
        assert_eq!(&bytes[..72], &expected[..]);
        assert_eq!(bytes[72..], XxHash3_64::oneshot(&expected).to_le_bytes());
    }

    #[test]
    fn a_map_is_adopted_in_its_own_boot_by_its_own_disk_and_by_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RealFolder::new(dir.path());
        let boot = BootId::new("this boot");
        let map = Runtime::create(&*folder, "runtime", 7, &boot, &content()).unwrap();
        map.set(BlockRange::new(3, 2), BlockState::Zero).unwrap();
        map.set_status(DiskStatus::Receiving).unwrap();
        map.set_frozen(false).unwrap();
        let (_, read) = Runtime::adopt(&*folder, "runtime", 5, 7, &boot).unwrap().unwrap();
        assert_eq!(read.states, [0, 1, 2, 2, 2]);
        assert_eq!((read.status, read.frozen), (DiskStatus::Receiving, false));
        assert!(
            Runtime::adopt(&*folder, "runtime", 5, 8, &boot).unwrap().is_none(),
            "another disk"
        );
        assert!(
            Runtime::adopt(&*folder, "runtime", 6, 7, &boot).unwrap().is_none(),
            "another size"
        );
        let other = BootId::new("another boot");
        assert!(Runtime::adopt(&*folder, "runtime", 5, 7, &other).unwrap().is_none());
    }

    #[test]
    fn a_damaged_map_of_this_boot_is_an_error_and_not_a_silent_step_back() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RealFolder::new(dir.path());
        let boot = BootId::new("b");
        let map = Runtime::create(&*folder, "runtime", 7, &boot, &content()).unwrap();
        map.file.write_at(&[9], BODY_AT + 2).unwrap();
        let error = Runtime::adopt(&*folder, "runtime", 5, 7, &boot).unwrap_err();
        assert!(matches!(error, MapError::Corrupt { at, .. } if at == BODY_AT + 2), "{error}");
        map.file.set_len(BODY_AT + 1).unwrap();
        assert!(Runtime::adopt(&*folder, "runtime", 5, 7, &boot).is_err());
        map.file.write_at(&[2], 8).unwrap();
        let error = Runtime::adopt(&*folder, "runtime", 5, 7, &boot).unwrap_err();
        assert!(matches!(error, MapError::Version { found: 2, .. }), "{error}");
    }
}
