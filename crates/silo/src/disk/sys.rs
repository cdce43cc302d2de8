//! The one system call that no crate wraps safely.

use std::{fs::File, io, os::fd::AsRawFd};

/// Reads at `offset` only what the page cache holds. `Ok(None)`: it would have to wait for the
/// device. The count may be short, as with any read; 0 is the end of the file.
///
/// # Errors
/// Those of `preadv2`; `EOPNOTSUPP` where the file system cannot tell.
pub(super) fn read_cached(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<Option<usize>> {
    let vector = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: one iovec that covers exactly the exclusive borrow `buf`, alive over the call; the
    // descriptor is open as long as `file` is borrowed.
    let got = unsafe {
        libc::preadv2(file.as_raw_fd(), &raw const vector, 1, offset as i64, libc::RWF_NOWAIT)
    };
    if got >= 0 {
        return Ok(Some(got as usize));
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_was_just_written_is_read_from_the_cache_or_the_kernel_says_that_it_cannot_tell() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello world").unwrap();
        let mut buf = [0; 5];
        match read_cached(&file, 6, &mut buf) {
            Ok(Some(count)) => assert_eq!((count, &buf), (5, b"world")),
            Ok(None) => panic!("freshly written bytes are in the cache"),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP)),
        }
    }
}
