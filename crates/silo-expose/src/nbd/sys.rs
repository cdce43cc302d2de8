//! The one system call that no crate here offers: from a file to a socket without a copy.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Sends up to `length` bytes of `file` at `offset` to `socket`; how many were sent. 0: the file
/// ends there.
pub(super) fn send_file(
    socket: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    offset: u64,
    length: usize,
) -> io::Result<usize> {
    let mut at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: both descriptors are open while borrowed; `at` outlives the call, which writes only
    // to it.
    let sent =
        unsafe { libc::sendfile64(socket.as_raw_fd(), file.as_raw_fd(), &raw mut at, length) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Whether these bytes can be read now: the first and the last of them are in the page cache.
/// False too where the file system cannot tell (tmpfs: its single pages are copied faster).
pub(super) fn is_cached(file: BorrowedFd<'_>, offset: u64, length: u64) -> bool {
    [offset, offset + length.saturating_sub(1)].into_iter().all(|at| {
        let mut byte = 0u8;
        let part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let Ok(at) = i64::try_from(at) else { return false };
        // SAFETY: one part of one byte, which outlives the call.
        let read =
            unsafe { libc::preadv2(file.as_raw_fd(), &raw const part, 1, at, libc::RWF_NOWAIT) };
        read == 1
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        os::{fd::AsFd, unix::net::UnixStream},
    };

    #[test]
    fn a_part_of_a_file_goes_into_a_socket() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(send_file(ours.as_fd(), file.as_fd(), 3, 4).unwrap(), 4);
        assert_eq!(send_file(ours.as_fd(), file.as_fd(), 20, 4).unwrap(), 0);
        let mut found = [0; 4];
        theirs.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"3456");
        assert!(!is_cached(file.as_fd(), u64::MAX, 1));
    }
}
