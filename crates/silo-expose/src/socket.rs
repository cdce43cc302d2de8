//! The path of a unix socket before a server listens there. Both socket servers call it. What must
//! hold: only a socket that nobody serves is ever removed.

use std::{
    fs, io,
    os::unix::{fs::FileTypeExt, net::UnixStream},
    path::Path,
};

/// What is at a path.
pub(crate) enum Way {
    /// Nothing, or nothing any more.
    Free,
    /// A server that answers.
    Served,
}

/// Removes a socket that nobody serves any more. To connect to a file that is no socket is refused
/// just as with such a socket, so the type is looked at first.
///
/// # Errors
/// If something else is there, which is left as it is, or the path cannot be looked at.
pub(crate) fn make_way(path: &Path) -> io::Result<Way> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Way::Free),
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
        Ok(_) => Ok(Way::Served),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map(|()| Way::Free)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Way::Free),
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
    use std::fs;

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
}
