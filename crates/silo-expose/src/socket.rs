//! The path of a unix socket, before a server listens there and after. Both socket servers use it.
//! What must hold: only a socket that nobody serves, or that this server made, is ever removed.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

/// What came of listening at a path.
pub(crate) enum Opened {
    /// It listens, without blocking in `accept`.
    Listens(UnixListener, SocketFile),
    /// Another server answers there.
    Served,
}

/// The file of a socket that this process made.
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// Removes the file, unless another server has put its own in its place.
    pub(crate) fn remove(&self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (self.device, self.inode));
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "a socket's file was not removed");
        }
    }
}

/// Listens at `path`. A socket that nobody serves any more is replaced.
///
/// # Errors
/// If something that is no socket is there, which is left as it is, or the path cannot be used.
pub(crate) fn listen(path: &Path) -> io::Result<Opened> {
    if is_served(path)? {
        return Ok(Opened::Served);
    }
    let listener = UnixListener::bind(path)?;
    // A client that gives up between poll and accept must not block the thread that accepts.
    listener.set_nonblocking(true)?;
    let made = fs::symlink_metadata(path)?;
    let file = SocketFile { path: path.to_owned(), device: made.dev(), inode: made.ino() };
    Ok(Opened::Listens(listener, file))
}

/// Whether a server answers at a path; removes a socket that nobody serves. To connect to a file
/// that is no socket is refused just as with such a socket, so the type is looked at first.
fn is_served(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            let message = format!(
                "{} is there and is not a socket; it was left as it is: choose another path",
                path.display()
            );
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map(|()| false)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        nbd::{NbdError, NbdOptions, NbdServer},
        test_devices::Plain,
        vhost::{VhostError, VhostOptions, VhostServer},
    };
    use std::{fs, os::unix::net::UnixListener, time::Duration};

    #[test]
    fn a_file_at_the_path_of_an_nbd_server_is_named_and_keeps_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("letters.txt");
        fs::write(&path, "dear reader").unwrap();
        let error = NbdServer::start(&path, Plain::new(4096, true), NbdOptions::default());
        let error = error.err().expect("a file is in the way");
        assert!(matches!(error, NbdError::Listen { .. }), "{error}");
        assert!(error.to_string().contains("letters.txt is there and is not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "dear reader");
    }

    #[test]
    fn a_file_at_the_path_of_a_vhost_server_is_named_and_keeps_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("letters.txt");
        fs::write(&path, "dear reader").unwrap();
        let error = VhostServer::start(&path, Plain::new(4096, true), VhostOptions::default());
        let error = error.err().expect("a file is in the way");
        assert!(matches!(error, VhostError::Listen { .. }), "{error}");
        assert!(error.to_string().contains("letters.txt is there and is not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "dear reader");
    }

    #[test]
    fn a_server_that_stops_leaves_the_socket_of_the_one_that_took_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let limit = Duration::from_secs(10);
        let path = dir.path().join("nbd");
        let ours = NbdServer::start(&path, Plain::new(4096, true), NbdOptions::default()).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        ours.stop(limit).unwrap();
        assert!(path.exists(), "the other server's socket was removed");

        let path = dir.path().join("vhost");
        let ours =
            VhostServer::start(&path, Plain::new(4096, true), VhostOptions::default()).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        ours.stop(limit).unwrap();
        assert!(path.exists(), "the other server's socket was removed");
    }
}
