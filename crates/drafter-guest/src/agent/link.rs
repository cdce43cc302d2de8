//! The writing end: whole lines, of the present conversation only.

use super::port::Port;
use crate::{log::say, protocol::GuestMessage};
use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// A host that takes nothing for this long counts as gone; it says hello when it is back.
const STALL_LIMIT: Duration = Duration::from_secs(10);

/// How often a writer that waits looks whether its conversation is over.
const TICK: Duration = Duration::from_millis(100);

/// The port, shared by all who write.
pub(crate) struct Link {
    pub(crate) port: Port,
    writing: Mutex<()>,
    /// Number of the present conversation; odd while there is one.
    present: AtomicU64,
}

impl Link {
    pub(crate) fn new(port: Port) -> Arc<Self> {
        Arc::new(Self { port, writing: Mutex::new(()), present: AtomicU64::new(0) })
    }

    /// Begins a conversation; the one before is over.
    pub(crate) fn begin(self: &Arc<Self>) -> Conversation {
        self.end();
        let number = self.present.fetch_add(1, Ordering::SeqCst) + 1;
        Conversation { link: Arc::clone(self), number }
    }

    /// Ends the present conversation, if there is one.
    pub(crate) fn end(&self) {
        let present = self.present.load(Ordering::SeqCst);
        self.end_if(present);
    }

    fn end_if(&self, number: u64) {
        if number % 2 == 1 {
            // Somebody else may have ended it meanwhile: then there is nothing to do.
            let _ = self.present.compare_exchange(
                number,
                number + 1,
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
        }
    }
}

/// One conversation with a host. Cheap to clone; outlives the conversation harmlessly.
#[derive(Clone)]
pub(crate) struct Conversation {
    link: Arc<Link>,
    number: u64,
}

impl Conversation {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn is_over(&self) -> bool {
        self.link.present.load(Ordering::SeqCst) != self.number
    }

    /// Sends a message; false if the conversation is over, or is by this failure.
    pub(crate) fn send(&self, message: &GuestMessage) -> bool {
        let mut line = match message.encode() {
            Ok(line) => line,
            Err(error) => {
                say!("an answer was not sent: {error}");
                return false;
            }
        };
        if matches!(message, GuestMessage::Hello { .. } | GuestMessage::Started {}) {
            // Ends whatever half line the conversation before has left behind.
            line.insert(0, b'\n');
        }
        // A writer never panics with the lock held; if one did, the port is still as it was.
        let writing = self.link.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = self.write(&line);
        drop(writing);
        match sent {
            Ok(()) => true,
            Err(error) => {
                if !self.is_over() {
                    say!("the host is gone: {error}");
                    self.link.end_if(self.number);
                }
                false
            }
        }
    }

    fn write(&self, line: &[u8]) -> io::Result<()> {
        let mut rest = line;
        let mut progress = Instant::now();
        while !rest.is_empty() {
            if self.is_over() {
                return Err(io::Error::other("the conversation is over"));
            }
            let ready = self.link.port.wait(true, TICK)?;
            if ready.hung_up {
                if self.link.port.hang_up_lasts(false)? {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                continue;
            }
            if let Some(written) = self.link.port.write(rest)?.filter(|written| *written > 0) {
                rest = &rest[written..];
                progress = Instant::now();
            } else if progress.elapsed() > STALL_LIMIT {
                return Err(io::ErrorKind::TimedOut.into());
            } else if ready.writable {
                // The port said yes and took nothing; do not spin on it.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }
}
