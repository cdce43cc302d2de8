//! The unsafe edge: guest memory is shared with another process that may change it at any time,
//! so it is only touched through copies, atomics and the kernel, never through references to plain
//! bytes. Nothing else in this module tree dereferences a guest address.

use nix::{
    cmsg_space,
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
};
use std::{
    fs::File,
    io::{self, IoSliceMut},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    ptr,
    sync::atomic::{AtomicU8, AtomicU16, AtomicU64},
};
use vm_memory::{FileOffset, MmapRegion};

/// Most parts of one vectored call (`UIO_MAXIOV`, linux/uio.h).
const MAX_PARTS: usize = 1024;

/// Bytes of guest memory, as mapped here. Whoever holds one also holds the mapping.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    ptr: *mut u8,
    len: usize,
}

const _: () = assert!(size_of::<Span>() == size_of::<libc::iovec>());
const _: () =
    assert!(std::mem::offset_of!(libc::iovec, iov_len) == std::mem::offset_of!(Span, len));

// SAFETY: a span is an address and a length; all accesses through it are copies and atomics.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    pub(super) fn len(self) -> usize {
        self.len
    }

    pub(super) fn address(self) -> usize {
        self.ptr as usize
    }

    /// The part from `start`, at most `len` bytes of it.
    pub(super) fn part(self, start: usize, len: usize) -> Self {
        let start = start.min(self.len);
        // SAFETY: `start` is within the span or one past its end, which is within one mapping.
        Self { ptr: unsafe { self.ptr.add(start) }, len: len.min(self.len - start) }
    }

    /// Copies its beginning out; gives how many bytes that were.
    pub(super) fn copy_to(self, buf: &mut [u8]) -> usize {
        let count = self.len.min(buf.len());
        // SAFETY: the source is mapped for `len` bytes, `buf` is ours, they cannot overlap. The
        // guest may write meanwhile: then we get a mix, which is checked like any other bytes.
        unsafe { ptr::copy_nonoverlapping(self.ptr.cast_const(), buf.as_mut_ptr(), count) };
        count
    }

    /// Copies into its beginning; gives how many bytes that were.
    pub(super) fn copy_from(self, buf: &[u8]) -> usize {
        let count = self.len.min(buf.len());
        // SAFETY: as `copy_to`, the other way round.
        unsafe { ptr::copy_nonoverlapping(buf.as_ptr(), self.ptr, count) };
        count
    }

    /// Copies from a device's memory into its beginning; gives how many bytes that were.
    pub(super) fn copy_from_device(self, place: &[AtomicU8]) -> usize {
        let count = self.len.min(place.len());
        // SAFETY: both are mapped for so long, atomic bytes may change under a reference, and a copy
        // of this kind may overlap.
        unsafe { ptr::copy(place.as_ptr().cast(), self.ptr, count) };
        count
    }

    /// Copies its beginning into a device's memory; gives how many bytes that were.
    pub(super) fn copy_to_device(self, place: &[AtomicU8]) -> usize {
        let count = self.len.min(place.len());
        // SAFETY: as `copy_from_device`; atomic bytes may be written through a shared reference.
        unsafe { ptr::copy(self.ptr.cast_const(), place.as_ptr().cast_mut().cast(), count) };
        count
    }

    /// 16 bytes at `at`, read once.
    pub(super) fn sixteen(self, at: usize) -> [u8; 16] {
        assert!(at + 16 <= self.len, "the caller checked the length");
        // SAFETY: within the span; an array of bytes has no alignment, and any bytes are one.
        // Volatile, so that what was checked is what is used.
        unsafe { self.ptr.add(at).cast::<[u8; 16]>().read_volatile() }
    }

    /// The 16 bits at `at`.
    pub(super) fn u16_at(&self, at: usize) -> &AtomicU16 {
        assert!(at + 2 <= self.len && (self.address() + at).is_multiple_of(2));
        // SAFETY: within the mapping, aligned, and only accessed by atomics here; the borrow keeps
        // the span alive, whose holder keeps the mapping.
        unsafe { AtomicU16::from_ptr(self.ptr.add(at).cast()) }
    }

    /// The 64 bits at `at`.
    pub(super) fn u64_at(&self, at: usize) -> &AtomicU64 {
        assert!(at + 8 <= self.len && (self.address() + at).is_multiple_of(8));
        // SAFETY: as `u16_at`.
        unsafe { AtomicU64::from_ptr(self.ptr.add(at).cast()) }
    }

    /// The byte at `at`.
    pub(super) fn u8_at(&self, at: usize) -> &AtomicU8 {
        assert!(at < self.len);
        // SAFETY: as `u16_at`; a byte is always aligned.
        unsafe { AtomicU8::from_ptr(self.ptr.add(at)) }
    }
}

/// A file mapped for reading and writing, shared with whoever else maps it.
#[derive(Debug)]
pub(super) struct Shared(MmapRegion<()>);

impl Shared {
    /// Maps `len` bytes of `file` from `offset`.
    ///
    /// # Errors
    /// If the file is shorter than that, the offset is no multiple of the page, or mmap fails.
    pub(super) fn map(file: File, offset: u64, len: u64) -> io::Result<Self> {
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        if len == 0 || file.metadata()?.len() < end {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{len} bytes from {offset} were to be mapped, the file is shorter"),
            ));
        }
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        MmapRegion::from_file(FileOffset::new(file, offset), len)
            .map(Self)
            .map_err(io::Error::other)
    }

    /// All of it.
    pub(super) fn span(&self) -> Span {
        Span { ptr: self.0.as_ptr(), len: self.0.size() }
    }
}

/// What a vectored read or write came to.
pub(super) enum Moved {
    /// That many bytes; 0 is the end of the file.
    Bytes(usize),
    /// It would have had to wait.
    WouldWait,
    /// The file system cannot say whether it would have to wait.
    CannotTell,
}

/// One `preadv2` into guest memory; with `nowait` from the page cache only.
pub(super) fn read_file(
    file: BorrowedFd<'_>,
    offset: u64,
    spans: &[Span],
    nowait: bool,
) -> io::Result<Moved> {
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let parts = spans.len().min(MAX_PARTS);
    loop {
        // SAFETY: spans have the layout of iovecs (asserted above) and point into mappings that the
        // caller holds; the kernel writes there as any other process that shares them would.
        let got = unsafe {
            libc::preadv2(
                file.as_raw_fd(),
                spans.as_ptr().cast(),
                parts as libc::c_int,
                offset,
                if nowait { libc::RWF_NOWAIT } else { 0 },
            )
        };
        if got >= 0 {
            return Ok(Moved::Bytes(got as usize));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN) => return Ok(Moved::WouldWait),
            Some(libc::EOPNOTSUPP) if nowait => return Ok(Moved::CannotTell),
            _ => return Err(error),
        }
    }
}

/// One `pwritev` from guest memory; how many bytes that were.
pub(super) fn write_file(file: BorrowedFd<'_>, offset: u64, spans: &[Span]) -> io::Result<usize> {
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let parts = spans.len().min(MAX_PARTS) as libc::c_int;
    loop {
        // SAFETY: as `read_file`; the kernel reads there.
        let put = unsafe { libc::pwritev(file.as_raw_fd(), spans.as_ptr().cast(), parts, offset) };
        if put >= 0 {
            return Ok(put as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// What stands next on a vhost-user socket, without taking it: the number of the request and a
/// descriptor that came with it. The protocol crate keeps the descriptor of the channel to the
/// front end to itself and has no message for a change of configuration; the peek gives us our own.
///
/// # Errors
/// If the socket fails.
pub(super) fn peek_request(socket: &UnixStream) -> io::Result<Option<(u32, Option<OwnedFd>)>> {
    let mut header = [0; 12];
    let mut descriptors = cmsg_space!([i32; 32]);
    let mut parts = [IoSliceMut::new(&mut header)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut descriptors),
        MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut first = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            for number in numbers {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
                let owned = unsafe { OwnedFd::from_raw_fd(number) };
                first.get_or_insert(owned);
            }
        }
    }
    if message.bytes < 12 {
        return Ok(None);
    }
    let request = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    Ok(Some((request, first)))
}

/// Has an object that works on a socket work on another from now on: `socket` is put in the place of its
/// descriptor. What the one before it still had to say is lost.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn replace(object: &impl AsRawFd, socket: &UnixStream) -> io::Result<()> {
    // SAFETY: the object owns that open descriptor, and has no state that belongs to the file behind it;
    // its number stays open throughout, so nobody can get it in between.
    let done = unsafe { libc::dup3(socket.as_raw_fd(), object.as_raw_fd(), libc::O_CLOEXEC) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A memfd with these bytes, for tests and fuzzing.
pub(super) fn scratch(bytes: &[u8]) -> io::Result<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let file = File::from(memfd_create("silo-scratch", MFdFlags::MFD_CLOEXEC)?);
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0)?;
    Ok(file)
}

/// The descriptor of an event, for as long as the event lives.
pub(super) fn borrow(event: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns an open descriptor, and the result's lifetime is that of its borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
