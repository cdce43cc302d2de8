//! The parts that lie on the file system, and the order in which they are written: base, overlay
//! data, runtime map, journal. See the module documentation of [`disk`](super) for the layout.

use super::{
    BootId, DiskOptions, MAX_BLOCKS,
    error::DiskError,
    journal::{self, Journal, JournalHeader, Run},
    runtime::{Runtime, RuntimeContent},
    state::{AtomicBits, BlockState, DiskStatus, StateMap},
};
use crate::block::{BLOCK_SIZE, BlockRange, BlockSet};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

/// The read-only file below the overlay.
struct Base {
    file: File,
    path: PathBuf,
    bytes: u64,
}

/// What a sync may do besides making things durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tidy {
    /// Write the journal anew when it is long.
    Yes,
    /// Nothing that takes longer than it must.
    No,
}

/// An open disk's files and maps.
pub(super) struct Store {
    dir: PathBuf,
    base: Option<Base>,
    data: File,
    data_path: PathBuf,
    blocks: u64,
    pub(super) states: StateMap,
    runtime: Runtime,
    /// Blocks whose state is not (yet) what the journal says.
    unjournaled: AtomicBits,
    /// The overlay's data was written since the last sync.
    touched: AtomicBool,
    status: AtomicU8,
    cache_reads: AtomicBool,
    journal: Mutex<Journal>,
    /// Held for as long as the disk is open; the kernel lets go of it when the process ends.
    _lock: File,
}

fn lock(dir: &Path) -> Result<File, DiskError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(DiskError::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(DiskError::InUse { path: dir.to_owned() }),
        Err(fs::TryLockError::Error(error)) => Err(DiskError::io("lock", &path)(error)),
    }
}

fn open_base(path: Option<&Path>) -> Result<Option<Base>, DiskError> {
    let Some(path) = path else { return Ok(None) };
    let open = || -> io::Result<Base> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("a base must be a regular file"));
        }
        Ok(Base { file, path: path.to_owned(), bytes: metadata.len() })
    };
    open().map(Some).map_err(DiskError::io("open base", path))
}

fn size_in_blocks(base_bytes: u64, bytes: u64) -> Result<u64, DiskError> {
    let blocks = base_bytes.max(bytes).div_ceil(BLOCK_SIZE as u64);
    if bytes != 0 && bytes < base_bytes {
        return Err(DiskError::Size { bytes, detail: "it would be smaller than its base" });
    }
    match blocks {
        0 => Err(DiskError::Size { bytes, detail: "it needs a base or a size" }),
        1..=MAX_BLOCKS => Ok(blocks),
        _ => Err(DiskError::Size { bytes, detail: "1 TiB is the most that is supported" }),
    }
}

impl Store {
    pub(super) fn create(
        dir: &Path,
        base: Option<&Path>,
        bytes: u64,
        options: &DiskOptions,
    ) -> Result<Self, DiskError> {
        let base = open_base(base)?;
        let base_bytes = base.as_ref().map_or(0, |base| base.bytes);
        let blocks = size_in_blocks(base_bytes, bytes)?;
        fs::create_dir_all(dir).map_err(DiskError::io("create", dir))?;
        let held = lock(dir)?;
        if dir.join(journal::FILE_NAME).exists() {
            return Err(DiskError::Exists { path: dir.to_owned() });
        }
        let data_path = dir.join("data");
        let make = || -> io::Result<File> {
            let mut options = OpenOptions::new();
            let data =
                options.read(true).write(true).create(true).truncate(true).open(&data_path)?;
            data.set_len(blocks * BLOCK_SIZE as u64)?;
            data.sync_all()?;
            Ok(data)
        };
        let data = make().map_err(DiskError::io("create", &data_path))?;
        let instance = getrandom::u64().map_err(|error| {
            DiskError::io("draw random bytes for", dir)(io::Error::other(error.to_string()))
        })?;
        let states = vec![BlockState::Base as u8; blocks as usize];
        let content = RuntimeContent { states, status: DiskStatus::Whole, frozen: false };
        let boot = options.boot()?;
        let runtime = Runtime::create(dir, instance, &boot, &content)?;
        // Last, because a folder with a journal is a disk.
        let header = JournalHeader { blocks, base_bytes, instance, generation: 1 };
        let journal = Journal::create(dir, header, DiskStatus::Whole, &content.states)?;
        Ok(Self::assemble(dir, base, data, data_path, runtime, content, journal, held))
    }

    /// Opens what [`Store::create`] made. The second value: whether the disk was frozen.
    pub(super) fn open(
        dir: &Path,
        base: Option<&Path>,
        options: &DiskOptions,
    ) -> Result<(Self, bool), DiskError> {
        if !dir.join(journal::FILE_NAME).exists() {
            return Err(DiskError::NotADisk { path: dir.to_owned() });
        }
        let held = lock(dir)?;
        let (journal, replayed) = Journal::open(dir)?;
        let header = *journal.header();
        let base = open_base(base)?;
        let base_bytes = base.as_ref().map_or(0, |base| base.bytes);
        if base_bytes != header.base_bytes {
            return Err(DiskError::WrongBase {
                path: dir.to_owned(),
                base: base.map_or_else(|| PathBuf::from("no base"), |base| base.path),
                created: format!("one of {} bytes", header.base_bytes),
                given: format!("{base_bytes} bytes"),
            });
        }
        let data_path = dir.join("data");
        let data = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&data_path)
            .map_err(DiskError::io("open", &data_path))?;
        let length = data.metadata().map_err(DiskError::io("inspect", &data_path))?.len();
        if length != header.blocks * BLOCK_SIZE as u64 {
            return Err(DiskError::Corrupt {
                path: data_path,
                at: length,
                detail: "the file does not have the size of the disk; it was cut or replaced"
                    .to_owned(),
            });
        }
        let boot = options.boot()?;
        let adopted = Runtime::adopt(dir, header.blocks, header.instance, &boot)?;
        let (runtime, content) = match adopted {
            Some((runtime, content)) => (runtime, content),
            None => {
                let content = RuntimeContent {
                    states: replayed.states.clone(),
                    status: replayed.status,
                    frozen: false,
                };
                (Runtime::create(dir, header.instance, &boot, &content)?, content)
            }
        };
        let mut differs = BlockSet::new(header.blocks);
        for (index, (now, then)) in content.states.iter().zip(&replayed.states).enumerate() {
            if now != then {
                differs.insert(crate::block::BlockIndex(index as u64));
            }
        }
        let frozen = content.frozen;
        let store = Self::assemble(dir, base, data, data_path, runtime, content, journal, held);
        store.unjournaled.insert_set(&differs);
        // What the process before this one wrote may not be durable yet.
        store.touched.store(true, Ordering::Release);
        Ok((store, frozen))
    }

    #[expect(clippy::too_many_arguments, reason = "the one place where the parts come together")]
    fn assemble(
        dir: &Path,
        base: Option<Base>,
        data: File,
        data_path: PathBuf,
        runtime: Runtime,
        content: RuntimeContent,
        journal: Journal,
        held: File,
    ) -> Self {
        let blocks = content.states.len() as u64;
        Self {
            dir: dir.to_owned(),
            base,
            data,
            data_path,
            blocks,
            states: StateMap::new(content.states),
            runtime,
            unjournaled: AtomicBits::new(blocks),
            touched: AtomicBool::new(false),
            status: AtomicU8::new(content.status as u8),
            cache_reads: AtomicBool::new(true),
            journal: Mutex::new(journal),
            _lock: held,
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) const fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.blocks * BLOCK_SIZE as u64
    }

    /// Blocks that the base reaches into.
    pub(super) fn base_blocks(&self) -> u64 {
        self.base.as_ref().map_or(0, |base| base.bytes.div_ceil(BLOCK_SIZE as u64))
    }

    pub(super) fn status(&self) -> DiskStatus {
        DiskStatus::from_byte(self.status.load(Ordering::Acquire))
            .expect("only statuses are stored")
    }

    /// Changes the status for as long as this host stays up; a sync makes it durable.
    pub(super) fn set_status(&self, status: DiskStatus) -> Result<(), DiskError> {
        self.runtime
            .set_status(status)
            .map_err(DiskError::io("note the status in", &self.dir.join("runtime")))?;
        self.status.store(status as u8, Ordering::Release);
        Ok(())
    }

    pub(super) fn set_frozen(&self, frozen: bool) -> Result<(), DiskError> {
        self.runtime
            .set_frozen(frozen)
            .map_err(DiskError::io("note a freeze in", &self.dir.join("runtime")))
    }

    pub(super) fn allocated_bytes(&self) -> Result<u64, DiskError> {
        let metadata = self.data.metadata().map_err(DiskError::io("inspect", &self.data_path))?;
        Ok(metadata.blocks() * 512)
    }

    // ---- content

    /// Reads bytes of blocks that are all in `state`, which is not `Missing`.
    pub(super) fn read(
        &self,
        state: BlockState,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), DiskError> {
        match (state, &self.base) {
            (BlockState::Data, _) => {
                self.data.read_exact_at(buf, offset).map_err(DiskError::io("read", &self.data_path))
            }
            (BlockState::Base, Some(base)) => {
                let inside = base.bytes.saturating_sub(offset).min(buf.len() as u64) as usize;
                let (content, beyond) = buf.split_at_mut(inside);
                beyond.fill(0);
                base.file
                    .read_exact_at(content, offset)
                    .map_err(DiskError::io("read base", &base.path))
            }
            _ => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    /// As [`Store::read`], but only what is in the page cache; false if it is not.
    pub(super) fn read_cached(
        &self,
        state: BlockState,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<bool, DiskError> {
        let (file, length) = match (state, &self.base) {
            (BlockState::Data, _) => (&self.data, buf.len()),
            (BlockState::Base, Some(base)) => {
                (&base.file, base.bytes.saturating_sub(offset).min(buf.len() as u64) as usize)
            }
            _ => (&self.data, 0),
        };
        if length > 0 && self.cache_reads.load(Ordering::Relaxed) {
            match crate::files::read_cached(file, offset, &mut buf[..length]) {
                Ok(Some(count)) if count == length => {
                    buf[length..].fill(0);
                    return Ok(true);
                }
                Ok(_) => return Ok(false),
                // The file system cannot tell, so it is one in memory or a rare one: just read.
                Err(_) => self.cache_reads.store(false, Ordering::Relaxed),
            }
        }
        self.read(state, offset, buf).map(|()| true)
    }

    /// Writes bytes into the overlay; no state changes.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let result = self.data.write_all_at(data, offset);
        // After the content and before any state that promises it, and also after an error: some
        // of the bytes may have been written.
        self.touched.store(true, Ordering::Release);
        result.map_err(DiskError::io("write", &self.data_path))
    }

    /// Changes the state of blocks whose content is where the new state says. The caller holds the
    /// blocks' range lock.
    pub(super) fn set_state(&self, range: BlockRange, state: BlockState) -> Result<(), DiskError> {
        for (run, old) in self.states.runs(range) {
            if old == state {
                continue;
            }
            self.runtime
                .set(run, state)
                .map_err(DiskError::io("note blocks in", &self.dir.join("runtime")))?;
            self.states.set(run, state);
            self.unjournaled.insert(run);
        }
        Ok(())
    }

    /// As [`Store::set_state`] for many blocks at once, quick: one write of the whole span.
    pub(super) fn set_states(&self, set: &BlockSet, state: BlockState) -> Result<(), DiskError> {
        let mut span: Option<BlockRange> = None;
        for range in set.ranges() {
            self.states.set(range, state);
            self.unjournaled.insert(range);
            let start = span.map_or(range.start.0, |span| span.start.0);
            span = Some(BlockRange::new(start, range.end() - start));
        }
        let Some(span) = span else { return Ok(()) };
        self.runtime
            .copy(span, &self.states)
            .map_err(DiskError::io("note blocks in", &self.dir.join("runtime")))
    }

    /// Gives the overlay's space back; whoever reads these blocks must see zeros or nothing.
    pub(super) fn punch(&self, range: BlockRange) {
        let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
            | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (start, length) = (range.start.offset() as i64, range.bytes() as i64);
        if let Err(error) = nix::fcntl::fallocate(&self.data, flags, start, length) {
            // The state already says that the blocks are zero: only space is lost.
            tracing::debug!(%error, file = %self.data_path.display(), "cannot punch holes");
        }
    }

    // ---- durability

    fn journal(&self) -> MutexGuard<'_, Journal> {
        // The journal's own fields change only after its file did: a panic leaves it usable.
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps every sync from going on while the guard lives.
    #[cfg(test)]
    pub(super) fn hold_journal(&self) -> impl Drop + '_ {
        self.journal()
    }

    /// As if a sync had failed.
    #[cfg(test)]
    pub(super) fn lose_sync(&self, cause: &str) {
        let error = DiskError::io("sync", &self.data_path)(io::Error::other(cause.to_owned()));
        self.journal().lose(&error);
    }

    /// Makes everything durable that was written before the call.
    pub(super) fn sync(&self, tidy: Tidy) -> Result<(), DiskError> {
        let mut journal = self.journal();
        self.sync_as(&mut journal, self.status(), tidy)
    }

    /// Makes everything durable, and with it that the disk is in `status`.
    pub(super) fn sync_status(&self, status: DiskStatus) -> Result<(), DiskError> {
        let mut journal = self.journal();
        self.sync_as(&mut journal, status, Tidy::No)?;
        // With the journal still locked: a flush in between would write the old status again.
        self.set_status(status)
    }

    fn sync_as(
        &self,
        journal: &mut Journal,
        status: DiskStatus,
        tidy: Tidy,
    ) -> Result<(), DiskError> {
        journal.check()?;
        if tidy == Tidy::Yes && journal.is_long() {
            // Marks first, states second, data last: what is marked in between is journaled next
            // time too, and a state that is read here has its content in the file already.
            let marked = self.unjournaled.take();
            let states = self.states.to_bytes(BlockRange::new(0, self.blocks));
            let result = self.sync_data(journal).and_then(|()| journal.rewrite(status, &states));
            if result.is_err() {
                self.unjournaled.insert_set(&marked);
            }
            return result;
        }
        let marked = self.unjournaled.take();
        let runs: Vec<Run> = marked.ranges().flat_map(|range| self.states.runs(range)).collect();
        let mut result = self.sync_data(journal);
        if result.is_ok() && (!runs.is_empty() || status != journal.status()) {
            result = journal.append(status, runs);
        }
        if result.is_err() {
            self.unjournaled.insert_set(&marked);
        }
        result
    }

    fn sync_data(&self, journal: &mut Journal) -> Result<(), DiskError> {
        // After the marks were taken: a writer touches before it marks.
        if !self.touched.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.data.sync_data().map_err(|source| {
            let error = DiskError::io("sync", &self.data_path)(source);
            journal.lose(&error);
            error
        })
    }

    /// Back to a disk of which every block is in the base, and that is being received.
    pub(super) fn reset(&self) -> Result<(), DiskError> {
        let mut journal = self.journal();
        // First of all, so that no crash in between leaves a disk that looks whole.
        journal.append(DiskStatus::Receiving, [])?;
        self.set_status(DiskStatus::Receiving)?;
        self.set_states(&BlockSet::full(self.blocks), BlockState::Base)?;
        self.data
            .set_len(0)
            .and_then(|()| self.data.set_len(self.bytes()))
            .map_err(DiskError::io("empty", &self.data_path))?;
        self.unjournaled.take();
        let states = vec![BlockState::Base as u8; self.blocks as usize];
        journal.rewrite(DiskStatus::Receiving, &states).inspect_err(|_| {
            self.unjournaled.insert(BlockRange::new(0, self.blocks));
        })
    }
}

impl DiskOptions {
    fn boot(&self) -> Result<BootId, DiskError> {
        self.boot.clone().map_or_else(BootId::current, Ok)
    }
}
