//! The file systems that a Linux userland expects.

use crate::log::say;
use nix::mount::{MsFlags, mount};
use std::{
    io,
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
};

/// One file system: type, where, flags, options.
struct Mount {
    kind: &'static str,
    at: &'static str,
    flags: MsFlags,
    options: Option<&'static str>,
}

const QUIET: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const DATA: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// What both stages need; in this order.
const BASIC: &[Mount] = &[
    Mount { kind: "devtmpfs", at: "/dev", flags: MsFlags::MS_NOSUID, options: None },
    Mount { kind: "proc", at: "/proc", flags: QUIET, options: None },
    Mount { kind: "sysfs", at: "/sys", flags: QUIET, options: None },
];

/// What the machine's own root needs besides.
const REST: &[Mount] = &[
    Mount {
        kind: "devpts",
        at: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: Some("mode=620,ptmxmode=666,gid=5"),
    },
    Mount { kind: "tmpfs", at: "/dev/shm", flags: DATA, options: Some("mode=1777") },
    Mount { kind: "tmpfs", at: "/run", flags: DATA, options: Some("mode=755") },
    Mount { kind: "tmpfs", at: "/tmp", flags: DATA, options: Some("mode=1777") },
    Mount { kind: "cgroup2", at: "/sys/fs/cgroup", flags: QUIET, options: None },
];

/// Links that programs expect in `/dev`.
const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

impl Mount {
    fn mount(&self) -> io::Result<()> {
        // An initramfs or a thin root may lack the directory.
        if let Err(error) = std::fs::create_dir_all(self.at)
            && !Path::new(self.at).is_dir()
        {
            return Err(error);
        }
        if is_mount_point(Path::new(self.at)) {
            // It came along from the initramfs.
            return Ok(());
        }
        mount(Some(self.kind), self.at, Some(self.kind), self.flags, self.options)?;
        Ok(())
    }
}

/// Whether a file system of its own lies at `path`.
fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev()).ok();
    path.parent().is_some_and(|parent| device(path) != device(parent))
}

fn mount_list(list: &[Mount]) {
    for mount in list {
        if let Err(error) = mount.mount() {
            say!("cannot mount {} at {}: {error}", mount.kind, mount.at);
        }
    }
}

/// Mounts what both stages need. What fails is told on the console and left out.
pub(super) fn mount_basic() {
    mount_list(BASIC);
}

/// Mounts everything for the machine's root.
pub(super) fn mount_all() {
    mount_basic();
    mount_list(REST);
    for (target, link) in LINKS {
        match symlink(target, link) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => say!("cannot link {link}: {error}"),
        }
    }
}

/// Where the file systems of [`mount_basic`] are, to move them to the new root.
pub(super) fn basic_points() -> impl Iterator<Item = &'static str> {
    BASIC.iter().map(|mount| mount.at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_told_from_a_folder() {
        assert!(is_mount_point(Path::new("/proc")));
        assert!(!is_mount_point(Path::new("/proc/sys/kernel")));
        assert!(!is_mount_point(Path::new("/")), "it has no parent to differ from");
    }
}
