//! The unsafe edge: io_uring, the descriptors that the driver writes, and the buffers that it
//! copies data to and from.
//!
//! What makes it sound: a [`Buffer`] is moved into [`Ring::submit`] and comes back with the event
//! of its entry, so nothing here touches it while the driver may. Buffers that a ring still has
//! when it ends, because something failed, are never given back to the allocator.

use super::{
    abi::{self, CONTROL, Control, DESCRIPTOR_BYTES, Descriptor, Info, Io},
    queue::{Driver, Entries, Event, Payload},
};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::sys::{
    eventfd::EventFd,
    mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap},
};
use std::{
    ffi::c_void,
    fs::{File, OpenOptions},
    io, mem,
    num::NonZero,
    os::fd::AsRawFd,
    path::Path,
    ptr::NonNull,
    slice,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// How often it is looked whether the file of a new device is there: udev makes it.
const LOOK: Duration = Duration::from_millis(10);
/// Marks the event that something else is to be looked at.
const WOKEN: u64 = u64::MAX;

/// Memory for the data of one entry; whole pages, which cost nothing until they are used.
#[derive(Debug)]
pub(super) struct Buffer {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: it is plain memory with one owner.
unsafe impl Send for Buffer {}

impl Buffer {
    /// # Errors
    /// If there is no memory, or `len` is 0.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        let bytes = NonZero::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe { mmap_anonymous(None, bytes, protection, flags) }?;
        Ok(Self { start, len })
    }

    fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped for `len` bytes, zero or written since, as long as `self` lives, and
        // nobody else has it: the driver gets a buffer only with its ownership.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: our mapping, which nothing refers to once its owner is gone.
        if let Err(error) = unsafe { munmap(self.start, self.len) } {
            tracing::error!(%error, "a buffer cannot be unmapped");
        }
    }
}

/// The descriptors of a queue, written by the driver.
struct Descriptors {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: it is only read, by the queue's thread that has it.
unsafe impl Send for Descriptors {}

impl Descriptors {
    fn map(file: &File, queue: u16, depth: u16) -> io::Result<Self> {
        // SAFETY: it reads no memory of ours.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) });
        let page = page.map_err(|_| io::Error::last_os_error())?;
        let (offset, len) = abi::descriptors_at(queue, depth, page);
        let bytes = NonZero::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe { mmap(None, bytes, ProtFlags::PROT_READ, flags, file, offset) }?;
        Ok(Self { start, len })
    }

    fn read(&self, tag: u16) -> Descriptor {
        let at = usize::from(tag) * DESCRIPTOR_BYTES;
        assert!(at + DESCRIPTOR_BYTES <= self.len, "a tag is below the depth");
        // SAFETY: within the mapping; an array of bytes has no alignment and any bytes are one.
        // Read once, so that what is checked is what is used.
        let bytes = unsafe {
            self.start
                .as_ptr()
                .cast::<u8>()
                .add(at)
                .cast::<[u8; DESCRIPTOR_BYTES]>()
                .read_volatile()
        };
        Descriptor::decode(&bytes)
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: our mapping; no reference into it is ever given away.
        if let Err(error) = unsafe { munmap(self.start, self.len) } {
            tracing::error!(%error, "the descriptors of a queue cannot be unmapped");
        }
    }
}

/// One queue of a device of the kernel's driver.
pub(super) struct Ring {
    ring: IoUring,
    queue: u16,
    descriptors: Descriptors,
    /// By tag: what the driver has.
    given: Vec<Option<Buffer>>,
    wake: Arc<EventFd>,
    /// The wake-up is waited for.
    armed: bool,
    /// Last, so that it is open as long as the ring.
    file: Arc<File>,
}

impl Ring {
    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the file is open as long as the ring. The memory that a command names is a
        // buffer in `given`, which stays there until its event, or for ever; a poll names none.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }
}

impl Entries for Ring {
    fn descriptor(&self, tag: u16) -> Descriptor {
        self.descriptors.read(tag)
    }

    fn submit(&mut self, io: Io, tag: u16, buffer: Buffer) -> io::Result<()> {
        let command = io.encode(self.queue, tag, buffer.address());
        let entry = opcode::UringCmd16::new(types::Fd(self.file.as_raw_fd()), io.opcode())
            .cmd(command)
            .build()
            .user_data(tag.into());
        // First, so that it stays whatever becomes of the submission.
        let place = self.given.get_mut(usize::from(tag)).ok_or(io::ErrorKind::InvalidInput)?;
        *place = Some(buffer);
        self.push(&entry)
    }

    fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        if !self.armed {
            let flags = libc::POLLIN as u32;
            let poll = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), flags).build();
            self.push(&poll.user_data(WOKEN))?;
            self.armed = true;
        }
        // No deadline: a request, a wake-up or the end of the device ends it.
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        for done in self.ring.completion() {
            if done.user_data() == WOKEN {
                self.armed = false;
                // It is empty if another thread's wake-up was read with this one.
                let _ = self.wake.read();
                continue;
            }
            let Ok(tag) = u16::try_from(done.user_data()) else { continue };
            let buffer = self.given.get_mut(usize::from(tag)).and_then(Option::take);
            let Some(buffer) = buffer else { continue };
            events.push(Event { tag, result: done.result(), buffer });
        }
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let left = self.given.drain(..).flatten();
        let count = left.map(mem::forget).count();
        if count > 0 {
            tracing::warn!(count, "buffers that the driver may still use are kept for good");
        }
    }
}

/// The driver of this kernel.
pub(super) struct Kernel {
    control: File,
    /// The device's own file, while there is one.
    file: Mutex<Option<Arc<File>>>,
}

impl Kernel {
    /// # Errors
    /// If the kernel has no such driver, or this user may not use it.
    pub(super) fn open() -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        Ok(Self { control, file: Mutex::default() })
    }

    fn file(&self) -> std::sync::MutexGuard<'_, Option<Arc<File>>> {
        // It is set and taken in one step.
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for Kernel {
    type Entries = Ring;

    fn control(
        &self,
        command: Control,
        device: u32,
        payload: Payload,
        limit: Duration,
    ) -> io::Result<Vec<u8>> {
        command_on(&self.control, command, device, payload, limit)
    }

    fn open(&self, id: u32, limit: Duration) -> io::Result<()> {
        let path = format!("/dev/ublkc{id}");
        let deadline = Instant::now() + limit;
        loop {
            match OpenOptions::new().read(true).write(true).open(Path::new(&path)) {
                Ok(file) => {
                    *self.file() = Some(Arc::new(file));
                    return Ok(());
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
                    ) && Instant::now() < deadline =>
                {
                    thread::sleep(LOOK);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn entries(&self, info: &Info, queue: u16, wake: Arc<EventFd>) -> io::Result<Ring> {
        let file = self.file().clone().ok_or(io::ErrorKind::NotFound)?;
        let descriptors = Descriptors::map(&file, queue, info.depth)?;
        let ring = IoUring::new(u32::from(info.depth) + 1)?;
        let given = (0..info.depth).map(|_| None).collect();
        Ok(Ring { ring, queue, descriptors, given, wake, armed: false, file })
    }

    fn close(&self) {
        self.file().take();
    }
}

/// Has one control command done; gives back what it reads or has written.
fn command_on(
    file: &File,
    command: Control,
    device: u32,
    payload: Payload,
    limit: Duration,
) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + limit;
    let mut bytes = payload.bytes;
    let len = u16::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let address = if bytes.is_empty() { 0 } else { bytes.as_mut_ptr() as u64 };
    let mut whole = [0; 80];
    let header = command.encode(device, (address, len), payload.data);
    whole[..header.len()].copy_from_slice(&header);
    // A ring for each: there are few commands, and one that does not end holds up no other.
    let mut ring: IoUring<squeue::Entry128, cqueue::Entry> = IoUring::builder().build(2)?;
    let entry =
        opcode::UringCmd80::new(types::Fd(file.as_raw_fd()), command.opcode()).cmd(whole).build();
    // SAFETY: the driver reads and writes `len` bytes at `address`, which is a vector that is not
    // touched before the command has ended, and is never freed if that is not known.
    unsafe { ring.submission().push(&entry) }.map_err(|_| io::ErrorKind::QuotaExceeded)?;
    let outcome = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = types::Timespec::from(left);
        let arguments = types::SubmitArgs::new().timespec(&timeout);
        let waited = ring.submitter().submit_with_args(1, &arguments);
        if let Some(done) = ring.completion().next() {
            break Ok(done.result());
        }
        match waited.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::EINTR | libc::ETIME), _)) if !left.is_zero() => {}
            Ok(_) | Err((Some(libc::EINTR | libc::ETIME), _)) => {
                break Err(io::ErrorKind::TimedOut.into());
            }
            Err((_, error)) => break Err(error),
        }
    };
    match outcome {
        Ok(code) if code < 0 => Err(io::Error::from_raw_os_error(-code)),
        Ok(_) => Ok(bytes),
        Err(error) => {
            mem::forget(bytes);
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::EfdFlags;

    /// A ring over a file that knows no commands: what a kernel without the driver can show.
    fn ring(depth: u16) -> Ring {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ring {
            ring: IoUring::new(u32::from(depth) + 1).unwrap(),
            queue: 0,
            descriptors: Descriptors::map(&file, 0, depth).unwrap(),
            given: (0..depth).map(|_| None).collect(),
            wake: Arc::new(EventFd::from_flags(flags).unwrap()),
            armed: false,
            file: Arc::new(file),
        }
    }

    #[test]
    fn a_command_that_the_kernel_refuses_gives_its_buffer_back() {
        let mut ring = ring(4);
        for tag in 0..4 {
            let mut buffer = Buffer::new(8192).unwrap();
            buffer.as_mut().fill(tag as u8 + 1);
            ring.submit(Io::Fetch, tag, buffer).unwrap();
        }
        let mut events = Vec::new();
        while events.len() < 4 {
            ring.wait(&mut events).unwrap();
        }
        for event in &mut events {
            assert_eq!(event.result, -libc::EOPNOTSUPP);
            let expected = event.tag as u8 + 1;
            assert!(event.buffer.as_mut().iter().all(|&byte| byte == expected));
        }
        assert!(ring.given.iter().all(Option::is_none));
    }

    #[test]
    fn a_wake_up_ends_a_wait_each_time() {
        let mut ring = ring(1);
        for _ in 0..3 {
            let wake = ring.wake.clone();
            let waker = thread::spawn(move || wake.write(1).map(drop));
            let mut events = Vec::new();
            ring.wait(&mut events).unwrap();
            assert!(events.is_empty());
            waker.join().unwrap().unwrap();
            // What is left over of it would end the next wait too early.
            assert!(ring.wake.read().is_err(), "the wake-up was taken");
        }
    }

    #[test]
    fn a_control_command_ends_with_the_kernels_refusal() {
        let file = tempfile::tempfile().unwrap();
        let payload = Payload { bytes: vec![0; 64], data: 0 };
        let refused = command_on(&file, Control::Add, 0, payload, Duration::from_secs(10));
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
    }

    #[test]
    fn descriptors_are_read_as_they_stand_in_the_file() {
        use std::os::unix::fs::FileExt;
        let ring = ring(8);
        let descriptor = Descriptor { op_flags: 0x2001, sectors: 8, start: 77 };
        let at = 5 * DESCRIPTOR_BYTES as u64;
        ring.file.write_all_at(&descriptor.encode(), at).unwrap();
        assert_eq!(ring.descriptor(5), descriptor);
    }
}
