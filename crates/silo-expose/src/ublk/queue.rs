//! One queue of a device: takes requests, has them done, answers. It knows the driver only by the
//! two traits here, so that a driver made for tests can stand in its place.

use super::{
    abi::{Control, Descriptor, Info, Io},
    request::{By, perform},
    sys::Buffer,
};
use crate::pool::Pool;
use nix::sys::eventfd::{EfdFlags, EventFd};
use silo_block::io::BlockDevice;
use std::{
    io, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// What goes with a control command.
#[derive(Debug, Default)]
pub(super) struct Payload {
    /// What the driver reads, or writes over.
    pub(super) bytes: Vec<u8>,
    /// A number, where the command has one.
    pub(super) data: u64,
}

/// The driver. Errors have the errno that it answered with; `TimedOut`: no answer.
pub(super) trait Driver: Send + Sync + 'static {
    type Entries: Entries;

    /// Has a command done; gives the payload's bytes as the driver left them.
    fn control(
        &self,
        command: Control,
        device: u32,
        payload: Payload,
        limit: Duration,
    ) -> io::Result<Vec<u8>>;

    /// Opens the device's own file, which appears soon after the device was added.
    fn open(&self, id: u32, limit: Duration) -> io::Result<()>;

    /// The entries of a queue; `wake` ends a wait. Called by the queue's thread: the driver wants
    /// all commands of an entry from the same.
    fn entries(&self, info: &Info, queue: u16, wake: Arc<EventFd>) -> io::Result<Self::Entries>;

    /// Lets go of the device's file.
    fn close(&self);
}

/// The entries of one queue.
pub(super) trait Entries {
    /// The request that an entry has.
    fn descriptor(&self, tag: u16) -> Descriptor;

    /// Gives an entry, with its buffer, to the driver, at the latest with the next wait.
    fn submit(&mut self, io: Io, tag: u16, buffer: Buffer) -> io::Result<()>;

    /// Waits until something happens, and appends what did.
    fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()>;
}

/// An entry came back from the driver.
pub(super) struct Event {
    pub(super) tag: u16,
    /// 0: with a request. Else it brings none any more.
    pub(super) result: i32,
    pub(super) buffer: Buffer,
}

/// An answer that is to be given.
struct Answer {
    tag: u16,
    result: i32,
    buffer: Buffer,
}

/// Answers on their way from the workers to a queue's thread.
pub(super) struct Answers {
    list: Mutex<Vec<Answer>>,
    wake: Arc<EventFd>,
    quit: AtomicBool,
}

impl Answers {
    pub(super) fn new() -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { list: Mutex::default(), wake: Arc::new(wake), quit: AtomicBool::new(false) })
    }

    pub(super) fn wake(&self) -> Arc<EventFd> {
        self.wake.clone()
    }

    /// Has the queue's thread end, also if the driver still has entries.
    pub(super) fn quit(&self) {
        self.quit.store(true, Ordering::SeqCst);
        self.signal();
    }

    fn list(&self) -> MutexGuard<'_, Vec<Answer>> {
        // One push or one take at a time.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self) {
        // It fails only if it stands at its maximum, and then it wakes all the same.
        let _ = self.wake.write(1);
    }
}

/// A request at a worker. Whatever becomes of the worker, it is answered.
struct InHand {
    tag: u16,
    result: i32,
    buffer: Option<Buffer>,
    answers: Arc<Answers>,
}

impl InHand {
    /// Does it; the answer goes out when this is dropped.
    fn perform(mut self, device: &dyn BlockDevice, descriptor: &Descriptor) {
        if let Some(buffer) = &mut self.buffer {
            let done = perform(device, descriptor, buffer.as_mut(), By::Worker);
            self.result = done.unwrap_or(self.result);
        }
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.answers.list().push(Answer { tag: self.tag, result: self.result, buffer });
            self.answers.signal();
        }
    }
}

/// What a queue's thread works with.
pub(super) struct Work {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) pool: Arc<Pool>,
    pub(super) answers: Arc<Answers>,
}

impl Work {
    /// Gives the driver all entries of a queue.
    ///
    /// # Errors
    /// If there is no memory, or the driver cannot be spoken to.
    pub(super) fn fetch(&self, entries: &mut impl Entries, info: &Info) -> io::Result<()> {
        (0..info.depth).try_for_each(|tag| {
            entries.submit(Io::Fetch, tag, Buffer::new(info.max_request as usize)?)
        })
    }

    /// Serves a queue until the device stops.
    ///
    /// # Errors
    /// If the driver cannot be spoken to any more, or took an entry with an error.
    pub(super) fn serve(&self, entries: &mut impl Entries, info: &Info) -> io::Result<()> {
        // Entries that the driver may still give requests for, or waits for answers of.
        let mut left = info.depth;
        let mut events = Vec::new();
        while left > 0 && !self.answers.quit.load(Ordering::SeqCst) {
            entries.wait(&mut events)?;
            for Event { tag, result, buffer } in events.drain(..) {
                match result {
                    0 => self.take(entries, tag, buffer)?,
                    super::abi::ABORTED => left -= 1,
                    code => return Err(io::Error::from_raw_os_error(code.saturating_neg())),
                }
            }
            for Answer { tag, result, buffer } in mem::take(&mut *self.answers.list()) {
                entries.submit(Io::Commit(result), tag, buffer)?;
            }
        }
        Ok(())
    }

    fn take(&self, entries: &mut impl Entries, tag: u16, mut buffer: Buffer) -> io::Result<()> {
        let descriptor = entries.descriptor(tag);
        let done = perform(&*self.device, &descriptor, buffer.as_mut(), By::Queue);
        if let Some(result) = done {
            return entries.submit(Io::Commit(result), tag, buffer);
        }
        let (result, answers) = (-libc::EIO, self.answers.clone());
        let in_hand = InHand { tag, result, buffer: Some(buffer), answers };
        let device = self.device.clone();
        let submitted = self.pool.submit(Box::new(move |_| in_hand.perform(&*device, &descriptor)));
        if let Err(error) = submitted {
            // The job was dropped, which answers with an error.
            tracing::error!(%error, "no thread for a block request");
        }
        Ok(())
    }
}
