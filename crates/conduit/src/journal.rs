//! State files that follow what they describe: a change is taken down in memory at once and written
//! by a thread of its own, a moment later, the newest state of each machine only.
//!
//! For what the kernel remembers meanwhile (`docs/conduit.md`, Deaths): a flip's record is the entry
//! in the pinned map, which outlives this process, and [`crate::recall`] makes the state of it if the
//! file was not written any more. What the kernel does not know (a new machine, its ports, that it is
//! gone) is written with [`Journal::save`] and [`Journal::remove`], before anybody is answered.
//!
//! What must hold: for one machine, files are written in the order of the calls; a state that could
//! not be written is tried again until it could or a newer one took its place; memory is bounded by
//! the number of machines. Called by [`crate::agent`] and [`crate::edge`].

use crate::{agent::spawn, datapath::MachineKey, exec::KernelError, store::Store};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// From the first change to its file. The steps of a move (divert, drained, confirmed) become one
/// write, which does not compete with them for the processor.
const BATCH: Duration = Duration::from_millis(20);
/// Between attempts while the folder cannot be written.
const RETRY: Duration = Duration::from_secs(1);
/// How long [`Journal::flush`] waits for the disk.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// A folder of state files that follow.
pub(crate) struct Journal<T>(Arc<Shared<T>>);

struct Shared<T> {
    store: Store,
    waiting: Mutex<Waiting<T>>,
    changed: Condvar,
    /// Held while a file is written, and taken before `waiting`.
    writing: Mutex<()>,
}

struct Waiting<T> {
    states: BTreeMap<MachineKey, T>,
    /// Somebody waits for the files: no batches.
    hurry: bool,
    ended: bool,
}

impl<T: Serialize + DeserializeOwned + Send + 'static> Journal<T> {
    /// Opens a folder, which is made if need be, and starts its thread.
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        let waiting = Waiting { states: BTreeMap::new(), hurry: false, ended: false };
        let shared = Arc::new(Shared {
            store: Store::open(folder)?,
            waiting: Mutex::new(waiting),
            changed: Condvar::new(),
            writing: Mutex::new(()),
        });
        let writer = shared.clone();
        spawn("state-writer", move || writer.follow());
        Ok(Self(shared))
    }

    /// Everything in the folder.
    pub(crate) fn load(&self) -> Result<Vec<T>, KernelError> {
        self.0.store.load()
    }

    /// Takes a state down; [`Journal::wake`] has it written. Costs no system call.
    pub(crate) fn note(&self, key: MachineKey, state: T) {
        self.0.waiting().states.insert(key, state);
    }

    /// What was noted is written soon.
    pub(crate) fn wake(&self) {
        self.0.changed.notify_all();
    }

    /// Writes a state before it returns, in place of what was noted for this address.
    pub(crate) fn save(&self, key: MachineKey, state: &T) -> Result<(), KernelError> {
        let _writing = self.0.writing();
        self.0.waiting().states.remove(&key);
        self.0.store.save(key, state)
    }

    /// Removes an address before it returns, and what was noted for it.
    pub(crate) fn remove(&self, key: MachineKey) -> Result<(), KernelError> {
        let _writing = self.0.writing();
        self.0.waiting().states.remove(&key);
        self.0.store.remove(key)
    }

    /// How many states are newer than their files.
    pub(crate) fn behind(&self) -> usize {
        self.0.waiting().states.len()
    }

    /// Waits until everything noted is written; false if the disk did not take it in time.
    pub(crate) fn flush(&self) -> bool {
        let deadline = Instant::now() + FLUSH_LIMIT;
        let mut waiting = self.0.waiting();
        waiting.hurry = true;
        self.0.changed.notify_all();
        while !waiting.states.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.0.changed.wait_timeout(waiting, left);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        waiting.hurry = false;
        drop(waiting);
        // The last one may still be under way: its state was taken out, and comes back if it fails.
        let _writing = self.0.writing();
        self.0.waiting().states.is_empty()
    }
}

impl<T> Drop for Journal<T> {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting();
        waiting.ended = true;
        drop(waiting);
        self.0.changed.notify_all();
    }
}

impl<T> Shared<T> {
    fn waiting(&self) -> MutexGuard<'_, Waiting<T>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for at most `limit`, or until there is something of interest.
    fn wait(&self, limit: Duration, until: impl Fn(&Waiting<T>) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut waiting = self.waiting();
        while !until(&waiting) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(waiting, left);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl<T: Serialize> Shared<T> {
    /// The writer's life: ends with its journal, after everything that was noted.
    fn follow(&self) {
        let mut failing = false;
        loop {
            // Looked at without a word too: whoever noted something may have been killed before it
            // said so.
            while !self.wait(RETRY, |w| w.ended || !w.states.is_empty()) {}
            if failing {
                self.wait(RETRY, |w| w.ended);
            } else {
                self.wait(BATCH, |w| w.ended || w.hurry);
            }
            let end = self.waiting().ended;
            let written = self.write_all();
            match &written {
                Err(error) if !failing => {
                    tracing::warn!(%error, "a state file cannot be written; the kernel's maps remember \
                        it until a reboot, and it is tried again every second");
                }
                Ok(()) if failing => tracing::info!("state files are written again"),
                _ => {}
            }
            failing = written.is_err();
            self.changed.notify_all();
            if end {
                return;
            }
        }
    }

    fn write_all(&self) -> Result<(), KernelError> {
        loop {
            // For each file anew: who saves one at once waits for no batch.
            let _writing = self.writing();
            let Some((key, state)) = self.waiting().states.pop_first() else { return Ok(()) };
            if let Err(error) = self.store.save(key, &state) {
                self.waiting().states.entry(key).or_insert(state);
                return Err(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::NetworkId;

    const fn key(last: u8) -> MachineKey {
        let address = std::net::Ipv4Addr::new(10, 0, 0, last);
        MachineKey { network: NetworkId::COMMON, address }
    }
    const A: MachineKey = key(1);
    const B: MachineKey = key(2);

    fn files(folder: &Path) -> Vec<u32> {
        let mut found: Vec<u32> = Store::open(folder).unwrap().load().unwrap();
        found.sort_unstable();
        found
    }

    #[test]
    fn what_was_noted_is_in_the_files_after_a_flush_the_newest_of_each_address() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::<u32>::open(folder.path()).unwrap();
        for n in 0..100 {
            journal.note(A, n);
            journal.note(B, 1000 + n);
        }
        journal.wake();
        assert!(journal.flush());
        assert_eq!(files(folder.path()), [99, 1099]);
        assert_eq!(journal.behind(), 0);
    }

    #[test]
    fn what_is_saved_or_removed_at_once_is_not_undone_by_what_was_noted_before() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::<u32>::open(folder.path()).unwrap();
        for _ in 0..50 {
            journal.note(A, 1);
            journal.note(B, 1);
            journal.wake();
            journal.save(A, &2).unwrap();
            journal.remove(B).unwrap();
            assert!(journal.flush());
            assert_eq!(files(folder.path()), [2]);
        }
    }

    #[test]
    fn a_state_that_cannot_be_written_is_kept_and_written_when_it_can_be() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("state");
        let journal = Journal::<u32>::open(&inside).unwrap();
        // A folder that is a file takes no files, not even root's.
        std::fs::remove_dir(&inside).unwrap();
        std::fs::write(&inside, b"").unwrap();
        journal.note(A, 7);
        journal.wake();
        assert!(journal.save(B, &1).is_err());
        assert!(crate::lab::wait_for(Duration::from_secs(30), || journal.behind() == 1));
        std::fs::remove_file(&inside).unwrap();
        std::fs::create_dir(&inside).unwrap();
        assert!(journal.flush());
        assert_eq!(files(&inside), [7]);
    }

    #[test]
    fn a_journal_that_goes_writes_what_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::<u32>::open(folder.path()).unwrap();
        journal.note(A, 7);
        drop(journal);
        let written = || folder.path().join("10.0.0.1.json").exists();
        assert!(crate::lab::wait_for(Duration::from_secs(30), written));
        assert_eq!(files(folder.path()), [7]);
    }
}
