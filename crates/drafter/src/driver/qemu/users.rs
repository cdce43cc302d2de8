//! A user of its own for each machine's monitor, so that one guest that breaks out of its monitor
//! reaches neither the runner's files nor another machine.
//!
//! A number is taken by a file `DIRECTORY/UID` that names the process which uses it (first the
//! runner, then the monitor); when that process is gone the number is free again, so a crash loses
//! none. Numbers under which any process of this computer runs are left alone: several hosts with
//! a directory each may share one kernel.

use super::process::Identity;
use crate::driver::DriverError;
use nix::fcntl::{Flock, FlockArg};
use std::{
    collections::HashSet,
    fs::{self, File},
    hash::{BuildHasher, Hasher},
    io,
    ops::RangeInclusive,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// A number that is ours until [`UserLease::release`], or until its holder is gone.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct UserLease {
    pub(super) uid: u32,
    entry: PathBuf,
}

impl UserLease {
    /// Takes a free number of `range`.
    pub(super) fn take(directory: &Path, range: &RangeInclusive<u32>) -> Result<Self, DriverError> {
        let host = |source| DriverError::Host {
            operation: format!(
                "taking a user id for a machine, recorded in {}",
                directory.display()
            ),
            source,
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(host)?;
        let _lock = lock(&directory.join("lock")).map_err(host)?;
        let busy = users_with_processes().map_err(host)?;
        let me = Identity::own().map_err(host)?;

        // Starting anywhere makes a clash of two hosts that look at the same moment unlikely.
        let size = range.end().saturating_sub(*range.start()).saturating_add(1).max(1);
        let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
        let offset = (random % u64::from(size)) as u32;
        for step in 0..size {
            let uid = range.start() + (offset + step) % size;
            let lease = Self { uid, entry: directory.join(uid.to_string()) };
            if uid != 0 && !busy.contains(&uid) && !lease.holder().is_some_and(Identity::exists) {
                lease.hand_to(me).map_err(host)?;
                return Ok(lease);
            }
        }
        Err(DriverError::Unusable {
            what: format!(
                "no user id from {} to {} is free for a machine",
                range.start(),
                range.end()
            ),
            hint: "end machines, or give the driver a wider range".into(),
        })
    }

    fn holder(&self) -> Option<Identity> {
        serde_json::from_slice(&fs::read(&self.entry).ok()?).ok()
    }

    /// From now on the number is taken as long as `process` lives.
    pub(super) fn hand_to(&self, process: Identity) -> io::Result<()> {
        fs::write(&self.entry, serde_json::to_vec(&process)?)
    }

    /// Gives the number back; its last process must have ended.
    pub(super) fn release(&self) {
        if let Err(error) = fs::remove_file(&self.entry)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(entry = %self.entry.display(), %error, "user id stays taken");
        }
    }
}

/// Waits for the lock with a deadline, which a plain flock has not.
fn lock(path: &Path) -> io::Result<Flock<File>> {
    let until = Instant::now() + LOCK_LIMIT;
    let mut file = File::options().create(true).truncate(false).write(true).open(path)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < until => file = back,
            Err((_, errno)) => return Err(errno.into()),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn users_with_processes() -> io::Result<HashSet<u32>> {
    let mut users = HashSet::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let is_process = entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
        // One that ended since is no user of anything.
        if is_process && let Ok(metadata) = entry.metadata() {
            users.insert(metadata.uid());
        }
    }
    Ok(users)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_given_once_and_again_when_its_holder_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let range = 64_300..=64_301;
        let a = UserLease::take(directory.path(), &range).unwrap();
        let b = UserLease::take(directory.path(), &range).unwrap();
        assert_ne!(a.uid, b.uid);
        let error = UserLease::take(directory.path(), &range).unwrap_err();
        assert!(error.to_string().contains("64300 to 64301"), "{error}");

        let mut gone = Identity::own().unwrap();
        gone.start_time += 1;
        a.hand_to(gone).unwrap();
        assert_eq!(UserLease::take(directory.path(), &range).unwrap().uid, a.uid);
        b.release();
        assert_eq!(UserLease::take(directory.path(), &range).unwrap().uid, b.uid);
    }

    #[test]
    fn a_number_under_which_a_process_runs_is_not_given() {
        let own = nix::unistd::getuid().as_raw();
        assert!(users_with_processes().unwrap().contains(&own));
        let directory = tempfile::tempdir().unwrap();
        UserLease::take(directory.path(), &(own..=own)).unwrap_err();
    }
}
