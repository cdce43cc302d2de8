//! System calls on files that need more than the standard library has: what is in the page cache,
//! where the holes are.

use crate::{
    io::{Allocation, Extent},
    range::MOST_EXTENTS,
};
use nix::unistd::{Whence, lseek};
use std::{fs::File, io, os::fd::AsRawFd};

/// Whether the file system does not know this kind of request.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

/// Data and holes of a file, as `SEEK_DATA` and `SEEK_HOLE` tell them; a file system that cannot
/// tell has data everywhere. The range lies in the file.
///
/// # Errors
/// Those of `lseek`.
pub(crate) fn extents_of(file: &File, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
    let end = offset + length;
    let (mut at, mut found) = (offset, Vec::new());
    // The position that this moves is used by nobody: all access is by offset.
    let seek = |from: u64, whence| match lseek(file, from as i64, whence) {
        Ok(position) => Ok(position as u64),
        Err(nix::errno::Errno::ENXIO) => Ok(end),
        Err(error) => Err(io::Error::from(error)),
    };
    while at < end && found.len() < MOST_EXTENTS {
        let data = match seek(at, Whence::SeekData) {
            Ok(data) => data.clamp(at, end),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => at,
            Err(error) => return Err(error),
        };
        if data > at {
            found.push(Extent { length: data - at, allocation: Allocation::Hole });
        }
        at = data;
        if at < end {
            let hole = match seek(at, Whence::SeekHole) {
                Ok(hole) => hole.clamp(at, end),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => end,
                Err(error) => return Err(error),
            };
            // A hole made in between: look again, from a byte further on.
            let stop = hole.max(at + 1);
            found.push(Extent { length: stop - at, allocation: Allocation::Data });
            at = stop;
        }
    }
    Ok(found)
}

/// Reads at `offset` only what the page cache holds. `Ok(None)`: it would have to wait for the
/// device. The count may be short, as with any read; 0 is the end of the file.
///
/// # Errors
/// Those of `preadv2`; `EOPNOTSUPP` where the file system cannot tell.
pub(crate) fn read_cached(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<Option<usize>> {
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
