//! Where programs, maps and links stay when nobody runs: a folder of a BPF file system for each
//! network namespace.
//!
//! ```text
//!  /sys/fs/bpf/conduit/ns-<cookie>/   locked by the process that owns the data path
//!      v2/forward …                   the maps, by layout
//!      programs/cd_tap …              the programs that are attached now
//!      links/<ifindex>-cd_tap …       what keeps them attached (tcx; clsact keeps itself)
//! ```

use crate::{error::Error, sys};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Where pins go unless told otherwise.
pub const ROOT: &str = "/sys/fs/bpf/conduit";
const BPF_FS: &str = "/sys/fs/bpf";
/// A process that was killed holds its lock until it is gone.
const LOCK_LIMIT: Duration = Duration::from_secs(3);

/// The folder of pins of one network namespace, locked.
pub(crate) struct Pins {
    folder: PathBuf,
    _lock: Flock<File>,
}

/// The folder of the calling thread's network namespace.
pub fn folder(root: &Path) -> Result<PathBuf, Error> {
    let cookie =
        sys::namespace_cookie().map_err(|source| Error::Pins { path: root.into(), source })?;
    Ok(root.join(format!("ns-{cookie}")))
}

/// Removes the pins of the calling thread's network namespace, whoever made them: traffic of its
/// machines ends (of links that clsact keeps, when their interfaces go).
pub fn sweep(root: &Path) -> Result<(), Error> {
    let folder = folder(root)?;
    remove_tree(&folder).map_err(|source| Error::Pins { path: folder, source })
}

impl Pins {
    /// Opens the folder of this namespace, which is made if need be.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        let folder = folder(root)?;
        let fail = |source| Error::Pins { path: folder.clone(), source };
        ensure_bpf_fs(root).map_err(fail)?;
        for part in ["programs", "links"] {
            fs::create_dir_all(folder.join(part)).map_err(fail)?;
        }
        let deadline = Instant::now() + LOCK_LIMIT;
        let mut file = File::open(&folder).map_err(fail)?;
        let lock = loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break lock,
                Err((_, _)) if Instant::now() >= deadline => {
                    return Err(Error::Owned { path: folder });
                }
                Err((again, _)) => file = again,
            }
            thread::sleep(Duration::from_millis(5));
        };
        Ok(Self { folder, _lock: lock })
    }

    pub(crate) fn maps(&self, layout: u32) -> PathBuf {
        self.folder.join(format!("v{layout}"))
    }

    /// The layouts that have maps here.
    pub(crate) fn layouts(&self) -> Result<Vec<u32>, Error> {
        let fail = |source| Error::Pins { path: self.folder.clone(), source };
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            found.extend(name.to_str().and_then(|n| n.strip_prefix('v')?.parse::<u32>().ok()));
        }
        found.sort_unstable();
        Ok(found)
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.folder.join("programs").join(name)
    }

    pub(crate) fn link(&self, interface: u32, program: &str) -> PathBuf {
        self.folder.join("links").join(format!("{interface}-{program}"))
    }

    /// The links that are pinned: interface and program.
    pub(crate) fn links(&self) -> Result<Vec<(u32, String)>, Error> {
        let fail = |source| Error::Pins { path: self.folder.clone(), source };
        let mut found = Vec::new();
        for entry in fs::read_dir(self.folder.join("links")).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            let parts = name.to_str().and_then(|n| n.split_once('-'));
            if let Some((interface, program)) = parts
                && let Ok(interface) = interface.parse()
            {
                found.push((interface, program.to_owned()));
            }
        }
        Ok(found)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn make(&self, folder: &Path) -> Result<(), Error> {
        fs::create_dir_all(folder).map_err(|source| Error::Pins { path: folder.into(), source })
    }

    pub(crate) fn remove(&self, path: &Path) -> Result<(), Error> {
        remove_tree(path).map_err(|source| Error::Pins { path: path.into(), source })
    }
}

/// Removes a file or folder, if it is there.
fn remove_tree(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(facts) if facts.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Mounts the BPF file system where systemd would, if nobody has.
fn ensure_bpf_fs(root: &Path) -> io::Result<()> {
    let is_bpf = |path: &Path| statfs(path).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC);
    let existing = root.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    if is_bpf(existing) {
        return Ok(());
    }
    if !root.starts_with(BPF_FS) {
        return Err(io::Error::other("this is no BPF file system"));
    }
    // Two that start at once must not mount over each other.
    let lock =
        File::open("/sys/fs").map_err(|e| io::Error::new(e.kind(), format!("/sys/fs: {e}")))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| io::Error::from(e))?;
    if is_bpf(Path::new(BPF_FS)) {
        return Ok(());
    }
    mount(Some("bpf"), BPF_FS, Some("bpf"), MsFlags::empty(), Some("mode=0700"))?;
    tracing::info!(at = BPF_FS, "BPF file system mounted");
    Ok(())
}
