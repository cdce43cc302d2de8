//! Leases in a directory: one JSON file per machine, for hosts that share a file system (and for a
//! single host, and for tests).
//!
//! Every call holds the machine's lock file (flock), waiting for it at most [`FileStore`]'s limit.
//! A write goes to a new file, is synced, renamed over the old one, and the directory synced, so
//! that a crash leaves the old record or the new one. Reads take the lock too: an unlocked read
//! could see a rename that a crash then undoes.

use super::{Cells, Key, MAX_CELL, StoreError, Swap};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Leases in a directory.
#[derive(Clone, Debug)]
pub struct FileStore {
    dir: PathBuf,
    lock_limit: Duration,
}

impl FileStore {
    /// Uses `dir`, which is made (mode 0700) if it is not there; a call waits at most `lock_limit`
    /// for another process.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(dir: &Path, lock_limit: Duration) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        Ok(Self { dir: dir.to_owned(), lock_limit })
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(match key {
            Key::Lease(machine) => format!("{machine}.lease.json"),
            Key::Beat(name) => match name.machine() {
                None => format!("{}.beat.json", name.host()),
                Some(machine) => format!("{}~{machine}.beat.json", name.host()),
            },
        })
    }

    fn lock_path(&self, key: &Key) -> PathBuf {
        match key {
            Key::Lease(machine) => self.dir.join(format!("{machine}.lock")),
            Key::Beat(_) => self.path(key).with_extension("lock"),
        }
    }

    fn lock(&self, key: &Key) -> Result<Flock<File>, StoreError> {
        let path = self.lock_path(key);
        let unavailable =
            |e: &dyn std::fmt::Display| unavailable(key, format!("lock {}", path.display()), e);
        // Never removed: whoever unlinks a lock file lets two processes lock two files.
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| unavailable(&e))?;
        let end = Instant::now() + self.lock_limit;
        let mut pause = Duration::from_micros(100);
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => return Ok(locked),
                Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => file,
                Err((_, e)) => return Err(unavailable(&e)),
            };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(StoreError::Locked { of: key.clone(), path, limit: self.lock_limit });
            }
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }

    fn read_locked(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.path(key);
        let read = || -> io::Result<Option<Vec<u8>>> {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(e) => return Err(e),
            };
            let mut bytes = Vec::new();
            // One byte more shows that it is too long.
            file.take(MAX_CELL as u64 + 1).read_to_end(&mut bytes)?;
            Ok(Some(bytes))
        };
        read().map_err(|e| unavailable(key, format!("read {}", path.display()), &e))
    }

    fn write_locked(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let part = path.with_extension("part");
        let mut file =
            OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)?;
        File::open(&self.dir)?.sync_all()
    }
}

impl Cells for FileStore {
    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        let _lock = self.lock(key)?;
        self.read_locked(key)
    }

    fn swap(&self, key: &Key, expected: Option<&[u8]>, new: &[u8]) -> Result<Swap, StoreError> {
        let _lock = self.lock(key)?;
        let current = self.read_locked(key)?;
        if current.as_deref() != expected {
            return Ok(Swap::Found(current));
        }
        let path = self.path(key);
        self.write_locked(&path, new)
            .map_err(|e| unavailable(key, format!("write {}", path.display()), &e))?;
        Ok(Swap::Done)
    }

    fn place(&self, key: &Key) -> String {
        self.path(key).display().to_string()
    }
}

fn unavailable(key: &Key, operation: String, cause: &dyn std::fmt::Display) -> StoreError {
    StoreError::Unavailable { of: key.clone(), operation, detail: cause.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttemptId, Epoch, HostName, LeaseStore, MachineName, Nonce, Outcome, Record};

    fn machine() -> MachineName {
        MachineName::new("redis-1").unwrap()
    }

    fn key() -> Key {
        Key::Lease(machine())
    }

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    fn store(dir: &Path) -> FileStore {
        FileStore::open(dir, Duration::from_secs(5)).unwrap()
    }

    fn first() -> Record {
        Record::first(machine(), host("a"), AttemptId(7), Nonce(0xabc))
    }

    #[test]
    fn only_the_expected_record_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        assert_eq!(store.read(&machine()).unwrap(), None);
        let one = first();
        let two = one.taken(host("b"), AttemptId(8), Nonce(2));
        let set = |expected, new| store.compare_and_set(&machine(), expected, new).unwrap();
        assert_eq!(set(Some(&one), &two), Outcome::Lost(None));
        assert_eq!(set(None, &one), Outcome::Won);
        assert_eq!(set(None, &one), Outcome::Lost(Some(one.clone())));
        assert_eq!(set(Some(&one), &two), Outcome::Won);
        assert_eq!(set(Some(&one), &two), Outcome::Lost(Some(two.clone())));
        assert_eq!(store.read(&machine()).unwrap(), Some(two));
    }

    #[test]
    fn of_many_writers_at_once_exactly_one_wins_each_epoch() {
        let dir = tempfile::tempdir().unwrap();
        let wins = std::sync::Mutex::new(Vec::new());
        store(dir.path()).compare_and_set(&machine(), None, &first()).unwrap();
        thread::scope(|scope| {
            for writer in 0..4_u64 {
                let (store, wins) = (store(dir.path()), &wins);
                scope.spawn(move || {
                    for round in 0..25 {
                        let seen = store.read(&machine()).unwrap().unwrap();
                        let nonce = Nonce(u128::from(writer * 1000 + round));
                        let new = seen.taken(host(&format!("w{writer}")), AttemptId(writer), nonce);
                        let outcome = store.compare_and_set(&machine(), Some(&seen), &new).unwrap();
                        if outcome == Outcome::Won {
                            wins.lock().unwrap().push(new.epoch);
                        }
                    }
                });
            }
        });
        let mut wins = wins.into_inner().unwrap();
        wins.sort_unstable();
        let expected: Vec<_> = (2..2 + wins.len() as u64).map(Epoch).collect();
        assert_eq!(wins, expected);
        assert_eq!(
            store(dir.path()).read(&machine()).unwrap().unwrap().epoch,
            wins[wins.len() - 1]
        );
    }

    #[test]
    fn a_damaged_file_is_an_error_that_names_it_and_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let path = store.path(&key());
        let whole = first().encode();
        let mut other_machine = first();
        other_machine.machine = MachineName::new("other").unwrap();
        let newer = String::from_utf8(whole.clone()).unwrap().replace(": 1,", ": 2,");
        let damaged: [&[u8]; 5] =
            [b"", &whole[..40], b"\xff\xfe", newer.as_bytes(), &other_machine.encode()];
        for bytes in damaged {
            fs::write(&path, bytes).unwrap();
            let e = store.read(&machine()).unwrap_err();
            assert!(matches!(e, StoreError::Corrupt { .. }), "{e}");
            assert!(e.to_string().contains("redis-1.lease.json"), "{e}");
            assert!(store.compare_and_set(&machine(), None, &first()).is_err());
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
    }

    #[test]
    fn a_lock_that_is_never_released_ends_the_wait_at_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let _held = store(dir.path()).lock(&key()).unwrap();
        let limit = Duration::from_millis(50);
        let impatient = FileStore::open(dir.path(), limit).unwrap();
        let started = Instant::now();
        let e = impatient.read(&machine()).unwrap_err();
        assert!(matches!(e, StoreError::Locked { .. }), "{e}");
        assert!(started.elapsed() >= limit && started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_part_file_left_by_a_crash_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        store.compare_and_set(&machine(), None, &first()).unwrap();
        let part = store.path(&key()).with_extension("part");
        fs::write(&part, b"half a rec").unwrap();
        assert_eq!(store.read(&machine()).unwrap(), Some(first()));
        let next = first().taken(host("b"), AttemptId(9), Nonce(9));
        let outcome = store.compare_and_set(&machine(), Some(&first()), &next).unwrap();
        assert_eq!(outcome, Outcome::Won);
    }
}
