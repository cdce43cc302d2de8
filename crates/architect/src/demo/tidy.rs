//! The folder of a run: what is in it goes when the run ends.

use nix::fcntl::{Flock, FlockArg};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// What of the folder goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// All of it.
    Everything,
    /// `logs/` stays, for whoever wants to know why.
    AllButLogs,
}

/// Where a run keeps everything that it makes. Short, because sockets are in it.
pub(super) fn folder(prefix: &str) -> PathBuf {
    std::env::temp_dir().join(format!("architect-{prefix}"))
}

/// Removes it, unless another run has it by now. What cannot be removed is told, and is no
/// failure: the next run tries again.
pub(super) fn remove(folder: &Path, what: What) {
    if let Err(error) = try_remove(folder, what) {
        tracing::warn!(folder = %folder.display(), %error, "something of the run stays behind");
    }
}

fn try_remove(folder: &Path, what: What) -> io::Result<()> {
    let lock = folder.join("lock");
    let Ok(_held) = Flock::lock(File::open(&lock)?, FlockArg::LockExclusiveNonblock) else {
        return Ok(());
    };
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        if name == "lock" || (what == What::AllButLogs && name == "logs") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(path)?;
        } else {
            fs::remove_file(path)?;
        }
    }
    if what == What::Everything {
        fs::remove_file(&lock)?;
        fs::remove_dir(folder)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used_folder() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("run");
        fs::create_dir_all(folder.join("logs")).unwrap();
        fs::create_dir_all(folder.join("state-a/machines")).unwrap();
        fs::write(folder.join("lock"), "").unwrap();
        fs::write(folder.join("edge.sock"), "").unwrap();
        (parent, folder)
    }

    #[test]
    fn nothing_is_left_of_a_good_run_and_the_logs_of_a_bad_one() {
        let (_parent, folder) = used_folder();
        try_remove(&folder, What::AllButLogs).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["lock", "logs"]);
        try_remove(&folder, What::Everything).unwrap();
        assert!(!folder.exists());
    }

    #[test]
    fn the_folder_of_a_run_that_lives_is_left_alone() {
        let (_parent, folder) = used_folder();
        let lock = File::open(folder.join("lock")).unwrap();
        let _held = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
        try_remove(&folder, What::Everything).unwrap();
        assert!(folder.join("state-a").exists());
    }
}
