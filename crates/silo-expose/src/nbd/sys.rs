//! The system calls that no crate here offers: between a socket and a file, or memory that others
//! read and write too, without a copy on the way.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::atomic::AtomicU8,
};

/// Copies `data` to memory that others may read and write meanwhile; the shorter one decides how much.
pub(super) fn copy_in(place: &[AtomicU8], data: &[u8]) {
    let length = place.len().min(data.len());
    // SAFETY: both are at least so long; `data` is no atomic memory, so they do not overlap; atomic
    // bytes may be written through a shared reference.
    unsafe {
        std::ptr::copy_nonoverlapping(data.as_ptr(), place.as_ptr().cast_mut().cast(), length);
    }
}

/// Receives into memory that others may read and write meanwhile, what is there or comes first;
/// with `wait` false, only what is there (`WouldBlock` if nothing is).
pub(super) fn receive_into(
    socket: BorrowedFd<'_>,
    place: &[AtomicU8],
    wait: bool,
) -> io::Result<usize> {
    let (start, flags) =
        (place.as_ptr().cast_mut().cast(), if wait { 0 } else { libc::MSG_DONTWAIT });
    // SAFETY: the kernel writes at most so many bytes there, and atomic bytes may be written through
    // a shared reference.
    let count = unsafe { libc::recv(socket.as_raw_fd(), start, place.len(), flags) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Sends `head` and then memory that others may read and write meanwhile; how many bytes were sent.
pub(super) fn send_from(
    socket: BorrowedFd<'_>,
    head: &[u8],
    place: &[AtomicU8],
) -> io::Result<usize> {
    let part = |start: *const u8, length| libc::iovec {
        iov_base: start.cast_mut().cast(),
        iov_len: length,
    };
    let mut parts = [part(head.as_ptr(), head.len()), part(place.as_ptr().cast(), place.len())];
    // SAFETY: all zeros is a message without a name, control data or parts.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len();
    // SAFETY: the kernel reads what the two parts say, which outlive the call.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

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
        sync::atomic::Ordering,
    };

    #[test]
    fn memory_that_others_write_goes_in_and_out_of_a_socket() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let place: Vec<AtomicU8> = b"0123456789".iter().map(|byte| AtomicU8::new(*byte)).collect();
        assert_eq!(send_from(ours.as_fd(), b"ab", &place[4..]).unwrap(), 8);
        let mut found = [0; 8];
        theirs.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"ab456789");
        copy_in(&place[..3], b"xyzw");
        theirs.write_all(b"pq").unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        // Less than there is room for, and then the end of the stream.
        assert_eq!(receive_into(ours.as_fd(), &place[4..], false).unwrap(), 2);
        assert_eq!(receive_into(ours.as_fd(), &place[6..], true).unwrap(), 0);
        let content: Vec<u8> = place.iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        assert_eq!(content, b"xyz3pq6789");
    }

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
