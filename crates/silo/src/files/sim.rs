//! Files that are only in memory, and a host that crashes: what was not synced is lost, kept, torn
//! by sectors or kept out of order, by a seed. Names are lost or kept in order, as a file system
//! with a journal of its metadata does it.

use super::{Folder, Stored};
use crate::tests::random::Random;
use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

const SECTOR: usize = 512;

/// A change that is in the cache and not on the disk.
#[derive(Clone)]
enum Pending {
    Write(u64, Vec<u8>),
    Length(u64),
}

fn apply(content: &mut Vec<u8>, change: &Pending) {
    match change {
        Pending::Write(offset, data) => {
            let end = *offset as usize + data.len();
            if content.len() < end {
                content.resize(end, 0);
            }
            content[*offset as usize..end].copy_from_slice(data);
        }
        Pending::Length(length) => content.resize(*length as usize, 0),
    }
}

#[derive(Default)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Pending>,
}

/// One file; it lives on while it is open, whatever becomes of its name.
pub(crate) struct SimFile {
    content: Mutex<Content>,
    folder: Weak<SimFolder>,
}

#[derive(Clone)]
enum NameChange {
    Set(String, Arc<SimFile>),
    Remove(String),
}

fn rename(names: &mut BTreeMap<String, Arc<SimFile>>, change: &NameChange) {
    match change {
        NameChange::Set(name, file) => {
            // A rename gives one file one name.
            names.retain(|_, other| !Arc::ptr_eq(other, file));
            names.insert(name.clone(), file.clone());
        }
        NameChange::Remove(name) => {
            names.remove(name);
        }
    }
}

#[derive(Default)]
struct Names {
    now: BTreeMap<String, Arc<SimFile>>,
    durable: BTreeMap<String, Arc<SimFile>>,
    pending: Vec<NameChange>,
    /// Writes and syncs until everything fails as if the power were gone.
    left: Option<u64>,
    /// Bytes that fit; writes that would need more fail.
    room: Option<u64>,
    /// Runs at the beginning of the next sync of a file.
    at_sync: Option<Box<dyn FnOnce() + Send>>,
    /// The next sync of names fails, and the one after it does not.
    lose_names: bool,
}

/// See the [module](self).
pub(crate) struct SimFolder {
    names: Mutex<Names>,
    me: Weak<SimFolder>,
}

fn gone() -> io::Error {
    io::Error::other("the simulated host has no power")
}

impl SimFolder {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new_cyclic(|me| Self { names: Mutex::default(), me: me.clone() })
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After so many more changes and syncs, none does anything any more.
    pub(crate) fn power_for(&self, changes: u64) {
        self.names().left = Some(changes);
    }

    /// From now on at most so many bytes fit into all files together.
    pub(crate) fn set_room(&self, bytes: Option<u64>) {
        self.names().room = bytes;
    }

    /// What another thread does while a file is being synced.
    pub(crate) fn at_next_sync(&self, work: impl FnOnce() + Send + 'static) {
        self.names().at_sync = Some(Box::new(work));
    }

    /// The next sync of names fails; later ones say that all is well.
    pub(crate) fn lose_names(&self) {
        self.names().lose_names = true;
    }

    fn spend(&self) -> io::Result<()> {
        match &mut self.names().left {
            None => Ok(()),
            Some(0) => Err(gone()),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    /// Sectors with content, as bytes.
    pub(crate) fn used(&self) -> u64 {
        let names = self.names();
        names.now.values().map(|file| file.used()).sum()
    }

    /// The host crashes and comes back: a new folder with what is left.
    pub(crate) fn crash(&self, random: &mut Random) -> Arc<Self> {
        let names = self.names();
        let mut kept = names.durable.clone();
        let count = random.below(names.pending.len() as u64 + 1);
        for change in &names.pending[..count as usize] {
            rename(&mut kept, change);
        }
        let after = Self::new();
        {
            let mut fresh = after.names();
            for (name, file) in kept {
                let content = file.crash(random);
                let content = Content { now: content.clone(), durable: content, pending: vec![] };
                let folder = after.me.clone();
                let file = Arc::new(SimFile { content: Mutex::new(content), folder });
                fresh.now.insert(name, file);
            }
            fresh.durable = fresh.now.clone();
        }
        after
    }
}

impl SimFile {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn used(&self) -> u64 {
        let content = self.content();
        let full = content.now.chunks(SECTOR).filter(|sector| !crate::block::is_zero(sector));
        full.count() as u64 * SECTOR as u64
    }

    /// Some of what was not synced arrived: any sectors of any writes, in any order.
    fn crash(&self, random: &mut Random) -> Vec<u8> {
        let content = self.content();
        let mut pieces = content.pending.clone();
        // All, none, or any of them; in order, or in any order.
        let (mode, shuffle) = (random.below(4), random.below(2) == 0);
        pieces.retain(|_| match mode {
            0 => true,
            1 => false,
            _ => random.below(2) == 0,
        });
        if shuffle {
            for index in (1..pieces.len()).rev() {
                pieces.swap(index, random.below(index as u64 + 1) as usize);
            }
        }
        let mut left = content.durable.clone();
        for piece in &pieces {
            apply(&mut left, piece);
        }
        left
    }

    fn change(&self, change: Pending) -> io::Result<()> {
        if let Some(folder) = self.folder.upgrade() {
            folder.spend()?;
            let room = folder.names().room;
            if let (Some(room), Pending::Write(_, data)) = (room, &change)
                && folder.used() + data.len() as u64 > room
            {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "no room (simulated)"));
            }
        }
        let mut content = self.content();
        apply(&mut content.now, &change);
        let Pending::Write(offset, data) = change else {
            content.pending.push(change);
            return Ok(());
        };
        // A disk takes whole sectors, as they are in the cache.
        let (first, end) =
            (offset as usize / SECTOR, (offset as usize + data.len()).div_ceil(SECTOR));
        for sector in first..end {
            let stop = (sector * SECTOR + SECTOR).min(content.now.len());
            let bytes = content.now[sector * SECTOR..stop].to_vec();
            content.pending.push(Pending::Write((sector * SECTOR) as u64, bytes));
        }
        Ok(())
    }
}

impl Stored for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let content = self.content();
        let range = offset as usize..offset as usize + buf.len();
        let found = content.now.get(range).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(found);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.change(Pending::Write(offset, data.to_vec()))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.content().now.len() as u64)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.change(Pending::Length(bytes))
    }

    fn sync(&self) -> io::Result<()> {
        if let Some(folder) = self.folder.upgrade() {
            let work = folder.names().at_sync.take();
            if let Some(work) = work {
                work();
            }
            folder.spend()?;
        }
        let mut content = self.content();
        content.durable = content.now.clone();
        content.pending.clear();
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = (offset + length).min(self.len()?);
        self.change(Pending::Write(offset, vec![0; end.saturating_sub(offset) as usize]))
    }

    fn allocate_zeros(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(Pending::Write(offset, vec![0; length as usize]))
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.used())
    }
}

impl Folder for SimFolder {
    fn path(&self) -> &Path {
        Path::new("/simulated")
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Stored>> {
        self.spend()?;
        let file = Arc::new(SimFile { content: Mutex::default(), folder: self.me.clone() });
        let mut names = self.names();
        let change = NameChange::Set(name.to_owned(), file.clone());
        rename(&mut names.now, &change);
        names.pending.push(change);
        Ok(file)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn Stored>> {
        let file = self.names().now.get(name).cloned();
        Ok(file.ok_or(io::ErrorKind::NotFound)?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.spend()?;
        let mut names = self.names();
        let file = names.now.get(from).cloned().ok_or(io::ErrorKind::NotFound)?;
        let change = NameChange::Set(to.to_owned(), file);
        rename(&mut names.now, &change);
        names.pending.push(change);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.spend()?;
        let mut names = self.names();
        if !names.now.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let change = NameChange::Remove(name.to_owned());
        rename(&mut names.now, &change);
        names.pending.push(change);
        Ok(())
    }

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(SimFolder::names(self).now.keys().cloned().collect())
    }

    fn sync(&self) -> io::Result<()> {
        self.spend()?;
        let mut names = SimFolder::names(self);
        if std::mem::take(&mut names.lose_names) {
            return Err(io::Error::other("the simulated disk lost names"));
        }
        names.durable = names.now.clone();
        names.pending.clear();
        Ok(())
    }
}
