//! A device as one file on a mount of its own, by FUSE: for loop devices, tools that want a path,
//! and programs that map it.
//!
//! Who calls it: `silo serve --fuse`, and whoever embeds the library.
//!
//! What holds:
//! - The mount has one file, named by the caller, of the device's size, which does not change:
//!   truncating, extending, creating, renaming and removing are refused.
//! - `fsync` and `fdatasync` are a flush of the device; `O_SYNC` and `O_DSYNC` writes are flushed
//!   before they are answered. Punching a hole makes zeros and frees room; `ZERO_RANGE` makes zeros
//!   and keeps room; `SEEK_DATA` and `SEEK_HOLE` tell what the device tells.
//! - A request that waits for a block that has not arrived holds up none of the others.
//! - Writes go through: the kernel keeps what was read in its cache, and hands each write over
//!   before it returns. So `kill -9` of the server loses nothing that was answered, and a dirty
//!   page never waits in the kernel for a server that is gone. With [`Caching::WriteBack`] the
//!   kernel collects writes until `fsync`: faster for small ones, and what was not synced is gone
//!   with the server. With [`Caching::None`] nothing is cached: for devices that others change too.
//! - Root mounts by itself; others need the program `fusermount3`. A mount whose server died is
//!   taken over; anything else that is mounted there is left alone.

mod files;
#[cfg(test)]
mod tests;

use crate::pool::Pool;
use files::{File, Gate};
use fuser::{Config, MountOption, Session, SessionACL};
use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};
use silo_block::io::BlockDevice;
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

const FUSE: &str = "/dev/fuse";

/// What the kernel keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Caching {
    /// What was read or written; writes are handed over at once.
    #[default]
    WriteThrough,
    /// Writes too, until `fsync` or some seconds have passed.
    WriteBack,
    /// Nothing.
    None,
}

/// How a mount behaves.
#[derive(Clone, Debug)]
pub struct FuseOptions {
    /// What the kernel keeps.
    pub caching: Caching,
    /// Refuse all writes, also to a device that takes them.
    pub read_only: bool,
    /// Other users may open it too, if the file's mode (0600) lets them: root, mostly.
    pub others: bool,
    /// Threads that take requests from the kernel.
    pub threads: usize,
    /// Most threads for requests that wait.
    pub workers: usize,
}

impl Default for FuseOptions {
    fn default() -> Self {
        Self {
            caching: Caching::default(),
            read_only: false,
            others: false,
            threads: 4,
            workers: 32,
        }
    }
}

/// What could not be done with a mount.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// The kernel has no FUSE, or this process may not use it.
    #[error(
        "could not open {FUSE}: {source}; load the module with \"modprobe fuse\", or in a container pass the device in"
    )]
    NoFuse {
        /// The cause.
        source: io::Error,
    },
    /// The file's name cannot be one.
    #[error("\"{name}\" cannot be the name of a file")]
    Name {
        /// What was asked for.
        name: String,
    },
    /// Mounting failed.
    #[error("could not mount on {}: {source}", at.display())]
    Mount {
        /// Where.
        at: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Somebody uses the mount: it was taken out of sight, and requests get errors from now on.
    #[error("{} is still in use after {limit:?} (an open file, a loop device, a shell in the folder); it was detached", at.display())]
    InUse {
        /// Where.
        at: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// Requests did not end in time.
    #[error("{threads} threads of the mount on {} were still at work after {limit:?}", at.display())]
    StillWorking {
        /// Where.
        at: PathBuf,
        /// How many.
        threads: usize,
        /// How long was waited.
        limit: Duration,
    },
}

/// Set once the session's threads have ended.
#[derive(Default)]
struct Ended {
    done: Mutex<bool>,
    changed: Condvar,
}

impl Ended {
    fn wait(&self, deadline: Instant) -> bool {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        while !*done {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(done, left);
            done = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// A mounted device. Dropping it unmounts.
pub struct FuseMount {
    at: PathBuf,
    file: PathBuf,
    device: Arc<dyn BlockDevice>,
    pool: Arc<Pool>,
    gate: Arc<Gate>,
    ended: Arc<Ended>,
    mounted: bool,
}

impl FuseMount {
    /// Mounts `device` on the folder `at`, as the file `name` in it.
    ///
    /// # Errors
    /// If there is no FUSE, the name is no file name, or mounting is refused.
    pub fn mount(
        at: &Path,
        name: &str,
        device: Arc<dyn BlockDevice>,
        options: &FuseOptions,
    ) -> Result<Self, FuseError> {
        let failed = |source| FuseError::Mount { at: at.to_owned(), source };
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
            return Err(FuseError::Name { name: name.to_owned() });
        }
        if name.len() > 255 {
            return Err(FuseError::Name { name: name.to_owned() });
        }
        fs::File::options()
            .read(true)
            .write(true)
            .open(FUSE)
            .map_err(|source| FuseError::NoFuse { source })?;
        if let Err(error) = fs::metadata(at)
            && error.raw_os_error() == Some(libc::ENOTCONN)
        {
            // The mount of a server that is gone: nobody else has it.
            tracing::warn!(at = %at.display(), "taking over the mount of a server that died");
            unmount(at, true).map_err(failed)?;
        }
        let read_only = options.read_only || device.is_read_only();
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("silo".to_owned()),
            MountOption::Subtype("silo".to_owned()),
            MountOption::DefaultPermissions,
            MountOption::NoDev,
            MountOption::NoSuid,
            MountOption::NoAtime,
            if read_only { MountOption::RO } else { MountOption::RW },
        ];
        config.acl = if options.others { SessionACL::All } else { SessionACL::Owner };
        config.n_threads = Some(options.threads.max(1));
        config.clone_fd = options.threads > 1;
        let pool = Arc::new(Pool::new(options.workers));
        let gate = Arc::new(Gate::default());
        let file =
            File::new(name, device.clone(), pool.clone(), gate.clone(), read_only, options.caching);
        let session = Session::new(file, at, &config).map_err(failed)?;
        let ended = Arc::new(Ended::default());
        let ending = ended.clone();
        // It unmounts by itself if there is no thread for it.
        thread::Builder::new()
            .name("silo-fuse".to_owned())
            .spawn(move || {
                if let Err(error) = session.run() {
                    tracing::warn!(%error, "a FUSE session ended");
                }
                *ending.done.lock().unwrap_or_else(PoisonError::into_inner) = true;
                ending.changed.notify_all();
            })
            .map_err(failed)?;
        let at = at.to_owned();
        Ok(Self { file: at.join(name), at, device, pool, gate, ended, mounted: true })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// Whether it is still mounted: somebody may have unmounted it by hand.
    #[must_use]
    pub fn is_mounted(&self) -> bool {
        !self.ended.wait(Instant::now())
    }

    /// Unmounts, which writes back what the kernel keeps, and waits for the requests in hand.
    /// Nothing touches the device once this has returned, unless with `StillWorking`.
    ///
    /// # Errors
    /// If the file is still in use, or requests are in hand, after `limit`.
    pub fn stop(mut self, limit: Duration) -> Result<(), FuseError> {
        self.shut(limit)
    }

    fn shut(&mut self, limit: Duration) -> Result<(), FuseError> {
        if !std::mem::take(&mut self.mounted) {
            return Ok(());
        }
        let deadline = Instant::now() + limit;
        let mut result = Ok(());
        while self.is_mounted() {
            match unmount(&self.at, false) {
                Ok(()) => break,
                // The kernel lets go of a file a moment after it was closed.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    if self.ended.wait((Instant::now() + Duration::from_millis(20)).min(deadline)) {
                        break;
                    }
                    if Instant::now() < deadline {
                        continue;
                    }
                    let at = self.at.clone();
                    result = Err(FuseError::InUse { at, limit });
                    if let Err(error) = unmount(&self.at, true) {
                        tracing::warn!(%error, at = %self.at.display(), "cannot detach a mount");
                    }
                    break;
                }
                Err(source) => {
                    result = Err(FuseError::Mount { at: self.at.clone(), source });
                    break;
                }
            }
        }
        // What still comes, from whoever has the file open, gets an error.
        self.gate.close();
        self.pool.stop();
        let patience = deadline.max(Instant::now() + Duration::from_secs(1));
        let threads = loop {
            self.device.interrupt();
            // Again after a moment: a worker may begin to wait just after the interrupt.
            let moment = (Instant::now() + Duration::from_millis(10)).min(patience);
            let threads = self.pool.wait(moment) + usize::from(!self.gate.wait(moment));
            if threads == 0 || Instant::now() >= patience {
                break threads;
            }
        };
        if threads > 0 {
            return Err(FuseError::StillWorking { at: self.at.clone(), threads, limit });
        }
        if result.is_ok() && !self.ended.wait(patience) {
            let at = self.at.clone();
            return Err(FuseError::StillWorking { at, threads: 1, limit });
        }
        result
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        if let Err(error) = self.shut(Duration::from_secs(5)) {
            tracing::warn!(%error, "a mount did not end");
        }
    }
}

/// Unmounts as root, else by the helper; `detach` takes it out of sight at once.
fn unmount(at: &Path, detach: bool) -> io::Result<()> {
    let flags = if detach { MntFlags::MNT_DETACH } else { MntFlags::UMOUNT_NOFOLLOW };
    match umount2(at, flags) {
        // EINVAL: it is no mount any more.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(Errno::EPERM) => {
            let mut helper = Command::new("fusermount3");
            helper.arg(if detach { "-uz" } else { "-u" }).arg("--").arg(at);
            let output = helper.output()?;
            if output.status.success() {
                return Ok(());
            }
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            if text.contains("busy") {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
            Err(io::Error::other(format!("fusermount3: {}", text.trim())))
        }
        Err(errno) => Err(errno.into()),
    }
}
