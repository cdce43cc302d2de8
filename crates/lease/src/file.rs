//! Leases in a directory, for hosts that share a file system (and for a single host, and for tests).
//!
//! A cell is a folder, `MACHINE.lease`. In it one empty file, the *head*, says by its name what is in
//! force: `head.N.MARK` is version N of the cell, whose content is `N.MARK.json`; version 0 is the empty
//! cell and has no content. No mark is used twice.
//!
//! A swap writes the content of version N+1 under a mark of its own, syncs it, and renames the head to it:
//! `head.N.MARK` to `head.N+1.MARK'`. Of all who try that with one head exactly one finds it, since a rename
//! takes its source away, and since its name never comes back whoever slept over newer versions finds
//! nothing, however long it slept. So nobody holds anything that others wait for, wherever it is
//! stopped or dies. The cell itself is made once, by renaming a folder that has its first head: a rename
//! onto a folder that is not empty fails, and a cell always has its head.
//!
//! A read lists the folder, takes the newest head, and opens it: that one was in force when it was
//! opened. (A listing beside a rename may have both names, or none; then it is read again.) The folder is
//! synced before anything is answered, so that no crash takes back what was told.
//!
//! Content of versions up to the head's that is not the head's is nobody's: whoever wrote it can no longer
//! find the head that it expects. The next writer that wins removes it.
//!
//! On NFS the server must give renames one order (it does) and the clients must not answer look-ups from
//! memory (`lookupcache=none,noac`). A rename whose answer got lost is recognised by its mark.
//! A store of the form before this one is taken over, cell by cell (see [`old`]).

mod old;
#[cfg(test)]
mod tests;

use super::{Cells, Key, MAX_CELL, Nonce, StoreError, Swap};
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, openat, renameat},
    sys::stat::{Mode, mkdirat},
    unistd::{UnlinkatFlags, fsync, unlinkat},
};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How a folder is opened.
const FOLDER: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);
/// How a file is opened to read it.
const READ: OFlag = OFlag::O_RDONLY.union(OFlag::O_CLOEXEC);
/// How a file is made that nobody else makes.
const NEW: OFlag =
    OFlag::O_WRONLY.union(OFlag::O_CREAT).union(OFlag::O_EXCL).union(OFlag::O_CLOEXEC);
const OWN_FILE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// Leases in a directory.
#[derive(Clone, Debug)]
pub struct FileStore {
    dir: PathBuf,
    limit: Duration,
    #[cfg(test)]
    hook: tests::Hook,
}

/// What a call does next. Tests stop there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests look at it"))]
enum Step {
    /// Makes the cell that it found missing.
    Make,
    /// Renames the folder with the first head into place.
    Place,
    /// Reads the head that it has listed.
    Look,
    /// Reads the head's content.
    Read,
    /// Writes the content of the next version.
    Write,
    /// Renames the head.
    Rename,
    /// Syncs the folder with the renamed head.
    Sync,
    /// Removes content that is nobody's.
    Prune,
}

/// Which version is in force, and where its content is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Head {
    version: u64,
    mark: String,
}

impl Head {
    fn next(&self) -> io::Result<Self> {
        Ok(Self { version: self.version + 1, mark: mark()? })
    }

    fn name(&self) -> String {
        format!("head.{}.{}", self.version, self.mark)
    }

    fn content(&self) -> String {
        format!("{}.{}.json", self.version, self.mark)
    }

    fn parse(name: &str) -> Option<Self> {
        let (version, mark) = name.strip_prefix("head.")?.split_once('.')?;
        Some(Self { version: version.parse().ok()?, mark: mark.to_owned() })
    }
}

/// A cell as it was at one instant of the call.
struct Seen {
    folder: OwnedFd,
    head: Head,
    content: Option<Vec<u8>>,
    /// Files with content that were there a moment before.
    contents: Vec<String>,
}

impl FileStore {
    /// Uses `dir`, which is made (mode 0700) if it is not there; a call gives up after `limit` if
    /// others write to the same cell all the time, or hold the lock of a store of the form before this one.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(dir: &Path, limit: Duration) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            limit,
            #[cfg(test)]
            hook: tests::Hook::default(),
        })
    }

    fn cell(key: &Key) -> String {
        match key {
            Key::Lease(machine) => format!("{machine}.lease"),
            Key::Beat(name) => match name.machine() {
                None => format!("{}.beat", name.host()),
                Some(machine) => format!("{}~{machine}.beat", name.host()),
            },
        }
    }

    #[cfg_attr(not(test), allow(clippy::unused_self, reason = "tests stop here"))]
    fn step(&self, step: Step) {
        #[cfg(test)]
        self.hook.at(step);
        #[cfg(not(test))]
        let _ = step;
    }

    /// The store's directory. Held through a call, so that no cell is missing because the store is.
    fn store(&self, key: &Key) -> Result<OwnedFd, StoreError> {
        let opened = nix::fcntl::open(&self.dir, FOLDER, Mode::empty());
        opened.map_err(|e| unavailable(key, format!("open {}", self.dir.display()), &e))
    }

    /// The cell, `None` if there is none yet.
    fn seen(&self, key: &Key, store: &OwnedFd) -> Result<Option<Seen>, StoreError> {
        let failed = |e: Errno| unavailable(key, format!("read {}", self.place(key)), &e);
        let folder = match openat(store, Self::cell(key).as_str(), FOLDER, Mode::empty()) {
            Ok(folder) => folder,
            Err(Errno::ENOENT) => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let end = Instant::now() + self.limit;
        loop {
            let (head, contents) = list(&folder).map_err(failed)?;
            if let Some(head) = head
                && let Some(content) = self.content_of(key, &folder, &head)?
            {
                // What a crash could take back is not told.
                fsync(&folder).map_err(failed)?;
                return Ok(Some(Seen { folder, head, content, contents }));
            }
            // Others have written meanwhile.
            if Instant::now() > end {
                let detail = format!("no version stood still for {:?}", self.limit);
                return Err(unavailable(key, format!("read {}", self.place(key)), &detail));
            }
        }
    }

    /// The content of a head, `Some(None)` of an empty cell; `None`: it is in force no more.
    #[expect(clippy::option_option, reason = "an empty cell is content too")]
    fn content_of(
        &self,
        key: &Key,
        folder: &OwnedFd,
        head: &Head,
    ) -> Result<Option<Option<Vec<u8>>>, StoreError> {
        let failed = |e: &dyn std::fmt::Display| {
            unavailable(key, format!("read {} in {}", head.content(), self.place(key)), e)
        };
        let is_there = || match openat(folder, head.name().as_str(), READ, Mode::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(e) => Err(failed(&e)),
        };
        self.step(Step::Look);
        if !is_there()? {
            return Ok(None);
        }
        if head.version == 0 {
            return Ok(Some(None));
        }
        self.step(Step::Read);
        match openat(folder, head.content().as_str(), READ, Mode::empty()) {
            Ok(file) => {
                let mut bytes = Vec::new();
                // One byte more shows that it is too long.
                let read = File::from(file).take(MAX_CELL as u64 + 1).read_to_end(&mut bytes);
                read.map_err(|e| failed(&e))?;
                Ok(Some(Some(bytes)))
            }
            // Removed, because a newer one is in force.
            Err(Errno::ENOENT) if !is_there()? => Ok(None),
            Err(Errno::ENOENT) => Err(StoreError::Corrupt {
                of: key.clone(),
                place: self.place(key),
                detail: format!("{} is in force, and {} is not there", head.name(), head.content()),
            }),
            Err(e) => Err(failed(&e)),
        }
    }

    /// Makes a cell with this content, unless there is one by now.
    fn make(&self, store: &OwnedFd, cell: &str, content: Option<&[u8]>) -> io::Result<()> {
        self.step(Step::Make);
        let new = format!("{cell}.new.{}", mark()?);
        mkdirat(store, new.as_str(), Mode::S_IRWXU)?;
        let made = self.fill(store, cell, &new, content);
        if let Ok(folder) = openat(store, new.as_str(), FOLDER, Mode::empty()) {
            // It did not become the cell.
            let (head, contents) = list(&folder)?;
            let names = head.map(|head| head.name()).into_iter().chain(contents);
            names.for_each(|name| remove(&folder, &name));
            let _ = unlinkat(store, new.as_str(), UnlinkatFlags::RemoveDir);
        }
        made
    }

    fn fill(
        &self,
        store: &OwnedFd,
        cell: &str,
        new: &str,
        content: Option<&[u8]>,
    ) -> io::Result<()> {
        let folder = openat(store, new, FOLDER, Mode::empty())?;
        let head = Head { version: u64::from(content.is_some()), mark: mark()? };
        if let Some(content) = content {
            write(&folder, &head.content(), content)?;
        }
        write(&folder, &head.name(), b"")?;
        fsync(&folder)?;
        self.step(Step::Place);
        match renameat(store, new, store, cell) {
            Ok(()) => Ok(fsync(store)?),
            // Somebody else was first.
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// The cell; made, or taken over from the form before this one, if it is not there.
    fn seen_or_made(&self, key: &Key, store: &OwnedFd) -> Result<Seen, StoreError> {
        for _ in 0..3 {
            if let Some(seen) = self.seen(key, store)? {
                return Ok(seen);
            }
            let content = self.old(key, store)?;
            let failed = |e| unavailable(key, format!("make {}", self.place(key)), &e);
            self.make(store, &Self::cell(key), content.as_deref()).map_err(failed)?;
            if content.is_some() {
                Self::forget_old(key, store).map_err(failed)?;
            }
        }
        let detail = "it was made, and is gone again";
        Err(unavailable(key, format!("make {}", self.place(key)), &detail))
    }

    /// The cell, `None` if it has never been written to in any form.
    fn found(&self, key: &Key, store: &OwnedFd) -> Result<Option<Seen>, StoreError> {
        if let Some(seen) = self.seen(key, store)? {
            return Ok(Some(seen));
        }
        // The mark in the old place is made before the cell: without one there is none yet.
        if !self.old_is_there(key, store)? {
            return Ok(None);
        }
        self.seen_or_made(key, store).map(Some)
    }

    /// Makes `new` the content, if the head is still the one that was seen.
    fn replace(&self, seen: &Seen, new: &[u8]) -> io::Result<bool> {
        let (folder, next) = (&seen.folder, seen.head.next()?);
        self.step(Step::Write);
        let written = write(folder, &next.content(), new).and_then(|()| Ok(fsync(folder)?));
        if let Err(e) = written {
            remove(folder, &next.content());
            return Err(e);
        }
        self.step(Step::Rename);
        match renameat(folder, seen.head.name().as_str(), folder, next.name().as_str()) {
            Ok(()) => {}
            // Over NFS an answer may get lost, and the second try find no source.
            Err(Errno::ENOENT) if list(folder)?.0.as_ref() == Some(&next) => {}
            Err(Errno::ENOENT) => {
                remove(folder, &next.content());
                return Ok(false);
            }
            // It may have happened: the content stays.
            Err(e) => return Err(e.into()),
        }
        self.step(Step::Sync);
        fsync(folder)?;
        self.step(Step::Prune);
        // The head that was seen stayed until now, so nothing listed then is newer.
        seen.contents.iter().for_each(|name| remove(folder, name));
        Ok(true)
    }
}

impl Cells for FileStore {
    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        let store = self.store(key)?;
        Ok(self.found(key, &store)?.and_then(|seen| seen.content))
    }

    fn swap(&self, key: &Key, expected: Option<&[u8]>, new: &[u8]) -> Result<Swap, StoreError> {
        let store = self.store(key)?;
        let end = Instant::now() + self.limit;
        loop {
            let seen = match expected {
                None => Some(self.seen_or_made(key, &store)?),
                Some(_) => self.found(key, &store)?,
            };
            let current = seen.as_ref().and_then(|seen| seen.content.as_deref());
            let Some(seen) = seen.as_ref().filter(|_| current == expected) else {
                return Ok(Swap::Found(current.map(<[u8]>::to_vec)));
            };
            let replaced = self.replace(seen, new);
            if replaced.map_err(|e| unavailable(key, format!("write {}", self.place(key)), &e))? {
                return Ok(Swap::Done);
            }
            // Replaced by another; mostly by something else than what is expected.
            if Instant::now() > end {
                let detail = format!("others wrote all the time, for {:?}", self.limit);
                return Err(unavailable(key, format!("write {}", self.place(key)), &detail));
            }
        }
    }

    fn place(&self, key: &Key) -> String {
        self.dir.join(Self::cell(key)).display().to_string()
    }
}

fn mark() -> io::Result<String> {
    Ok(format!("{:032x}", Nonce::random()?.0))
}

/// The newest head in a cell, and the files with content.
fn list(folder: &OwnedFd) -> Result<(Option<Head>, Vec<String>), Errno> {
    // A descriptor of its own, so that the listing begins at the beginning.
    let mut dir = Dir::openat(folder, ".", FOLDER, Mode::empty())?;
    let (mut newest, mut contents) = (None, Vec::new());
    for entry in dir.iter() {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        if name.ends_with(".json") {
            contents.push(name.to_owned());
        } else {
            newest = newest.max(Head::parse(name));
        }
    }
    Ok((newest, contents))
}

/// Writes a file that is not there, and syncs it.
fn write(folder: &OwnedFd, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::from(openat(folder, name, NEW, OWN_FILE)?);
    file.write_all(bytes)?;
    file.sync_all()
}

/// Removes a file that nobody needs; the next writer does it again if this fails.
fn remove(folder: &OwnedFd, name: &str) {
    let _ = unlinkat(folder, name, UnlinkatFlags::NoRemoveDir);
}

fn unavailable(key: &Key, operation: String, cause: &dyn std::fmt::Display) -> StoreError {
    StoreError::Unavailable { of: key.clone(), operation, detail: cause.to_string() }
}
