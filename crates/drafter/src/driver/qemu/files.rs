//! Passing files to a QEMU that may open nothing: by descriptor, named `/proc/self/fd/N`. Such a
//! name needs no right on any folder, but the file's own mode still counts.

use crate::driver::DriverError;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::{
    fs::File,
    io::{self, Seek},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt, chown},
    },
    path::Path,
};

/// How QEMU names a descriptor that it inherits.
pub(super) fn path_of(descriptor: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd())
}

/// Opens a file so that any user can read it again by [`path_of`]: as it is if its mode allows,
/// else as a copy in memory.
pub(super) fn readable_by_all(path: &Path) -> Result<OwnedFd, DriverError> {
    let host = |source| DriverError::Host {
        operation: format!("opening {} for QEMU", path.display()),
        source,
    };
    let mut file = File::open(path).map_err(host)?;
    if file.metadata().map_err(host)?.mode() & 0o004 != 0 {
        return Ok(file.into());
    }
    let mut in_memory = || -> io::Result<OwnedFd> {
        let mut copy = File::from(memfd_create(c"drafter-file", MFdFlags::MFD_CLOEXEC)?);
        io::copy(&mut file, &mut copy)?;
        copy.set_permissions(std::fs::Permissions::from_mode(0o444))?;
        copy.rewind()?;
        Ok(copy.into())
    };
    in_memory().map_err(host)
}

/// Lets any user that inherits the memory's descriptor map it by [`path_of`]. Nobody else can name
/// it: a memfd has no path.
pub(super) fn mappable_by_all(memory: &OwnedFd) -> Result<(), DriverError> {
    let host = |source| DriverError::Host {
        operation: "opening the machine's memory for QEMU".into(),
        source,
    };
    let file = File::from(memory.try_clone().map_err(host)?);
    let mode = file.metadata().map_err(host)?.mode() & 0o7777;
    if mode & 0o006 != 0o006 {
        let wider = std::fs::Permissions::from_mode(mode | 0o006);
        file.set_permissions(wider).map_err(host)?;
    }
    Ok(())
}

/// Lets a machine's user connect to a unix socket at `path`: search its folder (by the user's
/// group) and write to the socket (as its owner).
pub(super) fn admit(path: &Path, user: u32) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        let metadata = folder.metadata()?;
        let mode = metadata.mode() & 0o7777;
        if mode & 0o001 == 0 && !(metadata.gid() == user && mode & 0o010 != 0) {
            chown(folder, None, Some(user))?;
            let wider = std::fs::Permissions::from_mode((mode & !0o070) | 0o010);
            std::fs::set_permissions(folder, wider)?;
        }
    }
    if path.metadata()?.mode() & 0o002 == 0 {
        chown(path, Some(user), None)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::net::UnixListener};

    #[test]
    fn a_private_file_is_passed_as_a_readable_copy_and_a_public_one_as_itself() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        fs::write(&path, b"content").unwrap();
        for (mode, is_copy) in [(0o600, true), (0o644, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let passed = readable_by_all(&path).unwrap();
            assert_eq!(fs::read(path_of(&passed)).unwrap(), b"content");
            let metadata = File::from(passed).metadata().unwrap();
            assert_eq!(metadata.ino() != path.metadata().unwrap().ino(), is_copy);
            assert_eq!(metadata.mode() & 0o004, 0o004);
        }
        let error = readable_by_all(&directory.path().join("none")).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
    }

    #[test]
    fn a_private_socket_is_opened_to_its_machines_user_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        for private in [directory.path(), &path] {
            fs::set_permissions(private, fs::Permissions::from_mode(0o700)).unwrap();
        }
        for _ in 0..2 {
            admit(&path, 64_444).unwrap();
            assert_eq!(path.metadata().unwrap().uid(), 64_444);
            let folder = directory.path().metadata().unwrap();
            assert_eq!((folder.gid(), folder.mode() & 0o777), (64_444, 0o710));
        }
    }
}
