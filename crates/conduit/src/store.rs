//! Small state files, one per address or machine: written beside and renamed over, so that a reader (the
//! next start after a kill) finds the old or the new content and never a part.
//!
//! Not synced to the disk: they must outlive this process, not the host. A host that reboots has
//! no routes to remember, and the edge hears everything again from the agents.

use crate::exec::KernelError;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fmt::Display,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

/// A folder of state files.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    folder: PathBuf,
}

impl Store {
    /// Opens a folder, which is made if need be, for this user alone.
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        let fail = |e| KernelError::new(format!("make the state folder {}", folder.display()), e);
        fs::create_dir_all(folder).map_err(fail)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(folder, mode).map_err(fail)?;
        Ok(Self { folder: folder.to_owned() })
    }

    fn path(&self, key: impl Display) -> PathBuf {
        self.folder.join(format!("{key}.json"))
    }

    pub(crate) fn save(
        &self,
        key: impl Display,
        state: &impl Serialize,
    ) -> Result<(), KernelError> {
        self.write(key, state, false)
    }

    /// Likewise, and it is on the disk when this returns: for what must outlive the host.
    pub(crate) fn save_for_good(
        &self,
        key: impl Display,
        state: &impl Serialize,
    ) -> Result<(), KernelError> {
        self.write(key, state, true)
    }

    fn write(
        &self,
        key: impl Display,
        state: &impl Serialize,
        for_good: bool,
    ) -> Result<(), KernelError> {
        let path = self.path(&key);
        let partial = self.folder.join(format!("{key}.partial"));
        // The last step for good may fail when the new file is in place already.
        let unchanged = if for_good { "" } else { "nothing was changed, " };
        let write = || -> io::Result<()> {
            let mut file = fs::File::create(&partial)?;
            file.write_all(&serde_json::to_vec(state)?)?;
            if for_good {
                file.sync_all()?;
            }
            fs::rename(&partial, &path)?;
            if for_good { fs::File::open(&self.folder)?.sync_all() } else { Ok(()) }
        };
        write().map_err(|e| {
            KernelError::new(
                format!("write {}", path.display()),
                format!("{e}; {unchanged}free space or fix the folder and try again"),
            )
        })
    }

    pub(crate) fn remove(&self, key: impl Display) -> Result<(), KernelError> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(KernelError::new(format!("remove {}", path.display()), e))
            }
            _ => Ok(()),
        }
    }

    /// Everything in the folder. A file that cannot be read stops the start: going on without it
    /// would forget an epoch.
    pub(crate) fn load<T: DeserializeOwned>(&self) -> Result<Vec<T>, KernelError> {
        let list = |e| KernelError::new(format!("list {}", self.folder.display()), e);
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(list)? {
            let path = entry.map_err(list)?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let read = |e: String| {
                KernelError::new(
                    format!("read the state file {}", path.display()),
                    format!("{e}; move it away to start without it"),
                )
            };
            let bytes = fs::read(&path).map_err(|e| read(e.to_string()))?;
            found.push(serde_json::from_slice(&bytes).map_err(|e| read(e.to_string()))?);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn what_was_saved_is_found_again_and_a_partial_write_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.save(Ipv4Addr::new(10, 0, 0, 1), &1_u32).unwrap();
        store.save(Ipv4Addr::new(10, 0, 0, 1), &2_u32).unwrap();
        fs::write(folder.path().join("10.0.0.2.partial"), b"3").unwrap();
        assert_eq!(store.load::<u32>().unwrap(), [2]);
        store.remove(Ipv4Addr::new(10, 0, 0, 1)).unwrap();
        store.remove(Ipv4Addr::new(10, 0, 0, 1)).unwrap();
        assert!(store.load::<u32>().unwrap().is_empty());
    }

    #[test]
    fn a_broken_state_file_stops_the_start_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        fs::write(folder.path().join("10.0.0.2.json"), b"{").unwrap();
        let error = store.load::<u32>().unwrap_err().to_string();
        assert!(error.contains("10.0.0.2.json"), "{error}");
    }
}
