//! Stores of the form before: one JSON file per cell (`MACHINE.lease.json`, `HOST.beat.json`), written under
//! a lock (`flock` on `MACHINE.lock`, `HOST.beat.lock`).
//!
//! Each cell is taken over when it is first needed. What was in the file is put into a *mark* that takes the
//! file's place, under the old lock, before the cell is made of it: a program of that form refuses the
//! mark by its version, and so never writes there again, and whoever comes between mark and cell makes the
//! same cell. New cells have a mark as well, so that no older program makes one of its own beside it; made
//! without the lock, because nobody may wait for one who stands still. (So an older program that makes the
//! same cell for the first time, in the very milliseconds in which this one does, is not noticed.)

use super::{FileStore, OWN_FILE, READ, mark, remove, unavailable, write};
use crate::{Key, MAX_CELL, StoreError};
use nix::{
    errno::Errno,
    fcntl::{AtFlags, Flock, FlockArg, OFlag, openat, renameat},
    sys::stat::Mode,
    unistd::{fsync, linkat},
};
use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

/// Above all that programs of that form know (2).
const VERSION: u32 = 1000;

/// What stands in the place of the old file.
#[derive(serde::Serialize, serde::Deserialize)]
struct Mark {
    version: u32,
    /// The folder in which the record is now.
    moved_to: String,
    /// What the file held then.
    before: Option<String>,
}

/// What is in the old place.
enum Found {
    Nothing,
    /// A mark, and what was there before.
    Mark(Option<Vec<u8>>),
    /// A record of the form before.
    Record(Vec<u8>),
}

impl FileStore {
    fn old_name(key: &Key) -> String {
        format!("{}.json", Self::cell(key))
    }

    fn old_lock(key: &Key) -> String {
        match key {
            Key::Lease(machine) => format!("{machine}.lock"),
            Key::Beat(_) => format!("{}.lock", Self::cell(key)),
        }
    }

    fn old_place(&self, key: &Key) -> String {
        self.dir.join(Self::old_name(key)).display().to_string()
    }

    fn look_at_old(&self, key: &Key, store: &OwnedFd) -> Result<Found, StoreError> {
        let failed = |e: &dyn std::fmt::Display| {
            unavailable(key, format!("read {}", self.old_place(key)), e)
        };
        let mut bytes = Vec::new();
        match openat(store, Self::old_name(key).as_str(), READ, Mode::empty()) {
            Ok(file) => {
                // A mark is longer than what it tells of.
                let longest = 8 * MAX_CELL as u64;
                File::from(file).take(longest).read_to_end(&mut bytes).map_err(|e| failed(&e))?;
            }
            Err(Errno::ENOENT) => return Ok(Found::Nothing),
            Err(e) => return Err(failed(&e)),
        }
        match serde_json::from_slice::<Mark>(&bytes) {
            Ok(mark) if mark.version == VERSION && mark.moved_to == Self::cell(key) => {
                Ok(Found::Mark(mark.before.map(String::into_bytes)))
            }
            _ => Ok(Found::Record(bytes)),
        }
    }

    /// Whether the cell has been there in any form.
    pub(super) fn old_is_there(&self, key: &Key, store: &OwnedFd) -> Result<bool, StoreError> {
        Ok(!matches!(self.look_at_old(key, store)?, Found::Nothing))
    }

    /// With what the cell begins. A mark is in the old place then.
    pub(super) fn old(&self, key: &Key, store: &OwnedFd) -> Result<Option<Vec<u8>>, StoreError> {
        let failed = |e: io::Error| unavailable(key, format!("write {}", self.old_place(key)), &e);
        loop {
            match self.look_at_old(key, store)? {
                Found::Mark(before) => return Ok(before),
                Found::Nothing => Self::put_mark(key, store, None, false).map_err(failed)?,
                Found::Record(_) => {
                    let _lock = self.lock_old(key, store)?;
                    // It may have been written to until now.
                    let Found::Record(bytes) = self.look_at_old(key, store)? else { continue };
                    let before =
                        String::from_utf8(bytes).ok().filter(|text| text.len() <= MAX_CELL);
                    let before = before.ok_or_else(|| StoreError::Corrupt {
                        of: key.clone(),
                        place: self.old_place(key),
                        detail: "it is no record that could be taken over: no text, or too long"
                            .to_owned(),
                    })?;
                    Self::put_mark(key, store, Some(before), true).map_err(failed)?;
                }
            }
        }
    }

    /// The cell is there: whoever removes it later is not to find what the file held long ago.
    pub(super) fn forget_old(key: &Key, store: &OwnedFd) -> io::Result<()> {
        Self::put_mark(key, store, None, true)
    }

    /// Puts a mark in the old place: over what is there, or where nothing is (then somebody else may be
    /// first).
    fn put_mark(key: &Key, store: &OwnedFd, before: Option<String>, over: bool) -> io::Result<()> {
        let (old, new) = (Self::old_name(key), format!("{}.part.{}", Self::cell(key), mark()?));
        let content = Mark { version: VERSION, moved_to: Self::cell(key), before };
        let mut bytes = serde_json::to_vec_pretty(&content)?;
        bytes.push(b'\n');
        write(store, &new, &bytes)?;
        let put = if over {
            renameat(store, new.as_str(), store, old.as_str())
        } else {
            let linked = linkat(store, new.as_str(), store, old.as_str(), AtFlags::empty());
            remove(store, &new);
            if linked == Err(Errno::EEXIST) { Ok(()) } else { linked }
        };
        put?;
        Ok(fsync(store)?)
    }

    fn lock_old(&self, key: &Key, store: &OwnedFd) -> Result<Flock<File>, StoreError> {
        let path = self.dir.join(Self::old_lock(key));
        let failed = |e: Errno| unavailable(key, format!("lock {}", path.display()), &e);
        let how = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_CLOEXEC;
        let file = openat(store, Self::old_lock(key).as_str(), how, OWN_FILE).map_err(failed)?;
        let (mut file, end) = (File::from(file), Instant::now() + self.limit);
        let mut pause = Duration::from_micros(100);
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => return Ok(locked),
                Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => file,
                Err((_, e)) => return Err(failed(e)),
            };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(StoreError::Locked { of: key.clone(), path, limit: self.limit });
            }
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }
}
