//! The files of one overlay, and the order in which they are written. See [`map`](super).

use super::{
    AtomicBits, BlockState, BootId, DiskStatus, Journal, JournalHeader, MAX_BLOCKS, MapError,
    Runtime, StateMap, journal::Run, runtime::RuntimeContent,
};
use crate::{
    block::{BlockIndex, BlockRange, BlockSet},
    files::{Folder, Stored},
    geometry::Geometry,
};
use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

/// What the files are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileNames {
    pub(crate) data: String,
    pub(crate) journal: String,
    pub(crate) runtime: String,
}

impl FileNames {
    /// All three, after a prefix: `7.` gives `7.data`, `7.journal`, `7.runtime`.
    pub(crate) fn prefixed(prefix: &str) -> Self {
        let named = |name: &str| format!("{prefix}{name}");
        Self { data: named("data"), journal: named("journal"), runtime: named("runtime") }
    }
}

/// What an overlay is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) geometry: Geometry,
    /// Bytes of what lies below; the overlay only keeps it.
    pub(crate) base_bytes: u64,
    /// Random, the same for the overlay's life.
    pub(crate) instance: u64,
}

/// What a sync may do besides making things durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tidy {
    /// Write the journal anew when it is long.
    Yes,
    /// Nothing that takes longer than it must.
    No,
}

/// An open overlay.
pub(crate) struct Overlay {
    folder: Arc<dyn Folder>,
    names: FileNames,
    data: Arc<dyn Stored>,
    shape: Shape,
    states: StateMap,
    runtime: Runtime,
    /// Blocks whose state is not (yet) what the journal says.
    unjournaled: AtomicBits,
    /// The data was written since the last sync.
    touched: AtomicBool,
    status: AtomicU8,
    journal: Mutex<Journal>,
}

impl Overlay {
    /// Makes the files; everything is below. The journal comes last: where it is, all is.
    pub(crate) fn create(
        folder: &Arc<dyn Folder>,
        names: FileNames,
        shape: Shape,
        boot: &BootId,
    ) -> Result<Self, MapError> {
        let Shape { geometry, base_bytes, instance } = shape;
        let path = folder.path().join(&names.data);
        if geometry.blocks() == 0 || geometry.blocks() > MAX_BLOCKS {
            let text = format!("{geometry:?}: an overlay has 1 to {MAX_BLOCKS} blocks");
            return Err(MapError::io("create", &path)(io::Error::other(text)));
        }
        let make = || -> io::Result<Arc<dyn Stored>> {
            let data = folder.create(&names.data)?;
            data.set_len(geometry.bytes())?;
            data.sync()?;
            Ok(data)
        };
        let data = make().map_err(MapError::io("create", &path))?;
        let states = vec![BlockState::Base as u8; geometry.blocks() as usize];
        let content = RuntimeContent { states, status: DiskStatus::Whole, frozen: false };
        let runtime = Runtime::create(&**folder, &names.runtime, instance, boot, &content)?;
        let header = JournalHeader { geometry, base_bytes, instance, generation: 1 };
        let journal =
            Journal::create(folder, &names.journal, header, DiskStatus::Whole, &content.states)?;
        Ok(Self::assemble(folder, names, data, shape, runtime, content, journal))
    }

    /// Opens what [`Overlay::create`] made. The second value: whether it was frozen.
    pub(crate) fn open(
        folder: &Arc<dyn Folder>,
        names: FileNames,
        boot: &BootId,
    ) -> Result<(Self, bool), MapError> {
        let (journal, replayed) = Journal::open(folder, &names.journal)?;
        let JournalHeader { geometry, base_bytes, instance, .. } = *journal.header();
        let shape = Shape { geometry, base_bytes, instance };
        let path = folder.path().join(&names.data);
        let data = folder.open(&names.data).map_err(MapError::io("open", &path))?;
        let length = data.len().map_err(MapError::io("inspect", &path))?;
        if length != geometry.bytes() {
            return Err(MapError::Corrupt {
                path,
                at: length,
                detail: "the file does not have the size of the device; it was cut or replaced"
                    .to_owned(),
            });
        }
        let blocks = geometry.blocks();
        let adopted = Runtime::adopt(&**folder, &names.runtime, blocks, instance, boot)?;
        let (runtime, content) = match adopted {
            Some((runtime, content)) => (runtime, content),
            None => {
                let content = RuntimeContent {
                    states: replayed.states.clone(),
                    status: replayed.status,
                    frozen: false,
                };
                let name = &names.runtime;
                (Runtime::create(&**folder, name, instance, boot, &content)?, content)
            }
        };
        let mut differs = BlockSet::new(blocks);
        for (index, (now, then)) in content.states.iter().zip(&replayed.states).enumerate() {
            if now != then {
                differs.insert(BlockIndex(index as u64));
            }
        }
        let frozen = content.frozen;
        let overlay = Self::assemble(folder, names, data, shape, runtime, content, journal);
        overlay.unjournaled.insert_set(&differs);
        // What the process before this one wrote may not be durable yet.
        overlay.touched.store(true, Ordering::Release);
        Ok((overlay, frozen))
    }

    fn assemble(
        folder: &Arc<dyn Folder>,
        names: FileNames,
        data: Arc<dyn Stored>,
        shape: Shape,
        runtime: Runtime,
        content: RuntimeContent,
        journal: Journal,
    ) -> Self {
        Self {
            folder: folder.clone(),
            names,
            data,
            shape,
            states: StateMap::new(content.states),
            runtime,
            unjournaled: AtomicBits::new(shape.geometry.blocks()),
            touched: AtomicBool::new(false),
            status: AtomicU8::new(content.status as u8),
            journal: Mutex::new(journal),
        }
    }

    /// Removes the files, the journal first: what is left after a crash is no overlay.
    pub(crate) fn remove(folder: &dyn Folder, names: &FileNames) -> io::Result<()> {
        for name in [&names.journal, &names.runtime, &names.data] {
            match folder.remove(name) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        folder.sync()
    }

    pub(crate) const fn geometry(&self) -> Geometry {
        self.shape.geometry
    }

    pub(crate) const fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(crate) const fn names(&self) -> &FileNames {
        &self.names
    }

    /// The state of every block.
    pub(crate) const fn states(&self) -> &StateMap {
        &self.states
    }

    fn data_path(&self) -> PathBuf {
        self.folder.path().join(&self.names.data)
    }

    fn runtime_path(&self) -> PathBuf {
        self.folder.path().join(&self.names.runtime)
    }

    pub(crate) fn status(&self) -> DiskStatus {
        DiskStatus::from_byte(self.status.load(Ordering::Acquire))
            .expect("only statuses are stored")
    }

    /// Changes the status for as long as this host stays up; a sync makes it durable.
    pub(crate) fn set_status(&self, status: DiskStatus) -> Result<(), MapError> {
        self.runtime
            .set_status(status)
            .map_err(MapError::io("note the status in", &self.runtime_path()))?;
        self.status.store(status as u8, Ordering::Release);
        Ok(())
    }

    pub(crate) fn set_frozen(&self, frozen: bool) -> Result<(), MapError> {
        self.runtime
            .set_frozen(frozen)
            .map_err(MapError::io("note a freeze in", &self.runtime_path()))
    }

    pub(crate) fn allocated_bytes(&self) -> Result<u64, MapError> {
        self.data.allocated().map_err(MapError::io("inspect", &self.data_path()))
    }

    // ---- content

    /// Reads bytes of blocks that are all in the data file.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), MapError> {
        self.data.read_at(buf, offset).map_err(MapError::io("read", &self.data_path()))
    }

    /// As [`Overlay::read`], but only what is in the page cache; false if it is not.
    pub(crate) fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, MapError> {
        self.data.try_read_at(buf, offset).map_err(MapError::io("read", &self.data_path()))
    }

    /// Writes bytes into the data file; no state changes.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<(), MapError> {
        let result = self.data.write_at(data, offset);
        // After the content and before any state that promises it, and also after an error: some
        // of the bytes may have been written.
        self.touched.store(true, Ordering::Release);
        result.map_err(MapError::io("write", &self.data_path()))
    }

    /// Zeros that hold their room in the data file; no state changes.
    pub(crate) fn allocate_zeros(&self, offset: u64, length: u64) -> Result<(), MapError> {
        let result = self.data.allocate_zeros(offset, length);
        self.touched.store(true, Ordering::Release);
        result.map_err(MapError::io("make zeros in", &self.data_path()))
    }

    /// Changes the state of blocks whose content is where the new state says. The caller holds the
    /// blocks' range lock.
    pub(crate) fn set_state(&self, range: BlockRange, state: BlockState) -> Result<(), MapError> {
        for (run, old) in self.states.runs(range) {
            if old == state {
                continue;
            }
            self.runtime
                .set(run, state)
                .map_err(MapError::io("note blocks in", &self.runtime_path()))?;
            self.states.set(run, state);
            self.unjournaled.insert(run);
        }
        Ok(())
    }

    /// As [`Overlay::set_state`] for many blocks at once, quick: one write of the whole span.
    pub(crate) fn set_states(&self, set: &BlockSet, state: BlockState) -> Result<(), MapError> {
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
            .map_err(MapError::io("note blocks in", &self.runtime_path()))
    }

    /// Gives the data file's room back; whoever reads these blocks must see zeros or nothing.
    pub(crate) fn punch(&self, range: BlockRange) {
        let (start, length) =
            (self.shape.geometry.offset(range.start), self.shape.geometry.bytes_of(range));
        if let Err(error) = self.data.punch(start, length) {
            // The state already says that the blocks are zero: only space is lost.
            tracing::debug!(%error, file = %self.data_path().display(), "cannot punch holes");
        }
    }

    // ---- durability

    fn journal(&self) -> MutexGuard<'_, Journal> {
        // The journal's own fields change only after its file did: a panic leaves it usable.
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps every sync from going on while the guard lives.
    #[cfg(test)]
    pub(crate) fn hold_journal(&self) -> impl Drop + '_ {
        self.journal()
    }

    /// As if a sync had failed.
    #[cfg(test)]
    pub(crate) fn lose_sync(&self, cause: &str) {
        let error = MapError::io("sync", &self.data_path())(io::Error::other(cause.to_owned()));
        self.journal().lose(&error);
    }

    /// Makes everything durable that was written before the call.
    pub(crate) fn sync(&self, tidy: Tidy) -> Result<(), MapError> {
        let mut journal = self.journal();
        self.sync_as(&mut journal, self.status(), tidy)
    }

    /// Makes everything durable, and with it that the disk is in `status`.
    pub(crate) fn sync_status(&self, status: DiskStatus) -> Result<(), MapError> {
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
    ) -> Result<(), MapError> {
        journal.check()?;
        if tidy == Tidy::Yes && journal.is_long() {
            // Marks first, states second, data last: what is marked in between is journaled next
            // time too, and a state that is read here has its content in the file already.
            let marked = self.unjournaled.take();
            let states = self.states.to_bytes(BlockRange::new(0, self.shape.geometry.blocks()));
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

    fn sync_data(&self, journal: &mut Journal) -> Result<(), MapError> {
        // After the marks were taken: a writer touches before it marks.
        if !self.touched.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.data.sync().map_err(|source| {
            let error = MapError::io("sync", &self.data_path())(source);
            journal.lose(&error);
            error
        })
    }

    /// Back to an overlay of which every block is below, and that is being received.
    pub(crate) fn reset(&self) -> Result<(), MapError> {
        let blocks = self.shape.geometry.blocks();
        let mut journal = self.journal();
        // First of all, so that no crash in between leaves a disk that looks whole.
        journal.append(DiskStatus::Receiving, [])?;
        self.set_status(DiskStatus::Receiving)?;
        self.set_states(&BlockSet::full(blocks), BlockState::Base)?;
        self.data
            .set_len(0)
            .and_then(|()| self.data.set_len(self.shape.geometry.bytes()))
            .map_err(MapError::io("empty", &self.data_path()))?;
        self.unjournaled.take();
        let states = vec![BlockState::Base as u8; blocks as usize];
        journal.rewrite(DiskStatus::Receiving, &states).inspect_err(|_| {
            self.unjournaled.insert(BlockRange::new(0, blocks));
        })
    }
}
