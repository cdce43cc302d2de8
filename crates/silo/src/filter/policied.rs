//! What happens when the device below fails, by policy: the error is passed on, the operation waits
//! until somebody has helped, or the device stops.
//!
//! Waiting is what a machine wants of a full disk: it sees a slow disk, not a broken one. Whoever
//! runs the device is told by a callback, makes room, and calls [`Policied::resume`].

use crate::io::BlockDevice;
use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// Pass it on: the client sees EIO or ENOSPC.
    #[default]
    Eio,
    /// Hold the operation and try it again when told.
    Pause,
    /// Refuse everything from then on, as if the device were unplugged.
    Stop,
}

/// What to do about which error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorPolicy {
    /// A read that failed.
    pub read: OnError,
    /// A write, trim or zero that failed for another reason than room.
    pub write: OnError,
    /// No room: the file system, or the quota.
    pub full: OnError,
    /// How long an operation waits under [`OnError::Pause`] before its error is passed on.
    pub patience: Duration,
}

impl Default for ErrorPolicy {
    /// Passes errors on, and waits a day for room.
    fn default() -> Self {
        Self {
            read: OnError::Eio,
            write: OnError::Eio,
            full: OnError::Pause,
            patience: Duration::from_secs(24 * 3600),
        }
    }
}

/// What the callback is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What is done about it.
    pub reaction: OnError,
    /// What was attempted: "read", "write", …
    pub operation: &'static str,
    /// Where, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
    /// Of what kind the error is.
    pub kind: io::ErrorKind,
    /// The error in words.
    pub error: String,
}

#[derive(Default)]
struct State {
    /// Grows when waiting operations shall try again.
    resumed: u64,
    /// Grows when waiting operations shall give up.
    interrupted: u64,
    waiting: usize,
    /// Of these, reads.
    reads: usize,
    stopped: Option<String>,
}

type Tell = Box<dyn Fn(&Trouble) + Send + Sync>;

/// See the comment of its module.
pub struct Policied {
    inner: Arc<dyn BlockDevice>,
    policy: ErrorPolicy,
    tell: Tell,
    state: Mutex<State>,
    changed: Condvar,
}

impl Policied {
    /// Over `inner`. `tell` is called on the thread of the operation that failed, each time a
    /// policy other than [`OnError::Eio`] takes hold; it must not wait.
    #[must_use]
    pub fn new(
        inner: Arc<dyn BlockDevice>,
        policy: ErrorPolicy,
        tell: impl Fn(&Trouble) + Send + Sync + 'static,
    ) -> Self {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Self { inner, policy, tell: Box::new(tell), state, changed }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Fields are set one by one and each is valid alone.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Operations that wait try again.
    pub fn resume(&self) {
        self.state().resumed += 1;
        self.changed.notify_all();
    }

    /// How many operations wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.state().waiting
    }

    /// How many of them are reads: what they ask for is on no other host, until it can be read here.
    #[must_use]
    pub fn waiting_reads(&self) -> usize {
        self.state().reads
    }

    /// Why the device stopped, if it did.
    #[must_use]
    pub fn stopped(&self) -> Option<String> {
        self.state().stopped.clone()
    }

    fn run(
        &self,
        operation: &'static str,
        (offset, length): (u64, u64),
        mut work: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut deadline = None;
        loop {
            let (resumed, interrupted) = {
                let state = self.state();
                if let Some(cause) = &state.stopped {
                    let text = format!("the device was stopped: {cause}");
                    return Err(io::Error::new(io::ErrorKind::NotConnected, text));
                }
                (state.resumed, state.interrupted)
            };
            let Err(error) = work() else { return Ok(()) };
            let reaction = self.reaction(operation, &error);
            if reaction == OnError::Eio {
                return Err(error);
            }
            let trouble = Trouble {
                reaction,
                operation,
                offset,
                length,
                kind: error.kind(),
                error: error.to_string(),
            };
            if reaction == OnError::Stop {
                self.state().stopped.get_or_insert_with(|| trouble.error.clone());
                self.changed.notify_all();
                (self.tell)(&trouble);
                return Err(error);
            }
            let until = *deadline.get_or_insert_with(|| Instant::now() + self.policy.patience);
            (self.tell)(&trouble);
            if !self.wait(operation, (resumed, interrupted), until) {
                return Err(error);
            }
        }
    }

    /// Which policy an error falls under. What the caller did wrong is the caller's.
    fn reaction(&self, operation: &'static str, error: &io::Error) -> OnError {
        match error.kind() {
            io::ErrorKind::InvalidInput
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::NotConnected
            | io::ErrorKind::Interrupted => OnError::Eio,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => self.policy.full,
            _ if operation == "read" => self.policy.read,
            // The kernel forgets what a flush could not write: one more would succeed without it.
            _ if operation == "flush" && self.policy.write == OnError::Pause => OnError::Eio,
            _ => self.policy.write,
        }
    }

    /// Waits for [`Policied::resume`] since `resumed`; false if it did not come or the wait was
    /// called off.
    fn wait(
        &self,
        operation: &'static str,
        (resumed, interrupted): (u64, u64),
        until: Instant,
    ) -> bool {
        let read = usize::from(operation == "read");
        let mut state = self.state();
        state.waiting += 1;
        state.reads += read;
        let again = loop {
            if state.interrupted != interrupted {
                break false;
            }
            if state.resumed != resumed || state.stopped.is_some() {
                break true;
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else { break false };
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.waiting -= 1;
        state.reads -= read;
        again
    }
}

impl BlockDevice for Policied {
    forward!(inner: size may_wait extents prefetch zeroes_fast is_read_only);

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let range = (offset, buf.len() as u64);
        self.run("read", range, || self.inner.read_at(offset, buf))
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if self.state().stopped.is_some() {
            return Ok(false);
        }
        // An error comes again, and is dealt with, when the read is done in full.
        Ok(self.inner.try_read_at(offset, buf).unwrap_or(false))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = (offset, data.len() as u64);
        self.run("write", range, || self.inner.write_at(offset, data))
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        if self.state().stopped.is_some() {
            return Ok(false);
        }
        // An error comes again, and is dealt with, when the write is done in full.
        Ok(self.inner.try_write_at(offset, data).unwrap_or(false))
    }

    /// An error of a flush is passed on unless there is no room: what it was for may be lost, and
    /// a second flush that succeeds would hide that.
    fn flush(&self) -> io::Result<()> {
        self.run("flush", (0, 0), || self.inner.flush())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.run("trim", (offset, length), || self.inner.trim(offset, length))
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        let range = (offset, length);
        self.run("zero", range, || self.inner.zero(offset, length, allocate))
    }

    fn interrupt(&self) {
        self.state().interrupted += 1;
        self.changed.notify_all();
        self.inner.interrupt();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        filter::{Fault, Faulty, Op},
        source::MemoryDevice,
    };
    use std::{sync::mpsc, thread};

    fn rig(policy: ErrorPolicy) -> (Arc<Faulty>, Arc<Policied>, mpsc::Receiver<Trouble>) {
        let faulty = Arc::new(Faulty::new(Arc::new(MemoryDevice::new("test", 1 << 20).unwrap())));
        let (sender, told) = mpsc::channel();
        let tell = move |trouble: &Trouble| sender.send(trouble.clone()).unwrap();
        (faulty.clone(), Arc::new(Policied::new(faulty, policy, tell)), told)
    }

    fn full(op: Op, _: u64, _: u64) -> Option<Fault> {
        (op == Op::Write).then_some(Fault::Error(io::ErrorKind::StorageFull))
    }

    #[test]
    fn a_write_to_a_full_disk_waits_until_there_is_room_and_is_not_lost() {
        let (faulty, device, told) = rig(ErrorPolicy::default());
        faulty.set(full);
        thread::scope(|scope| {
            let writer = scope.spawn(|| device.write_at(4096, &[7; 4096]));
            let trouble = told.recv_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!((trouble.operation, trouble.offset), ("write", 4096));
            // Resumed too early: it waits again.
            device.resume();
            told.recv_timeout(Duration::from_secs(10)).unwrap();
            faulty.heal();
            device.resume();
            writer.join().unwrap().unwrap();
        });
        let mut buf = [0; 4096];
        device.read_at(4096, &mut buf).unwrap();
        assert_eq!(buf, [7; 4096]);
        assert_eq!(device.waiting(), 0);
    }

    /// Writes at once if there is room, and does not look as if it would ever wait.
    struct Small {
        room: std::sync::atomic::AtomicBool,
    }

    impl BlockDevice for Small {
        fn size(&self) -> u64 {
            1 << 20
        }

        fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }

        fn may_wait(&self, _: u64, _: u64) -> bool {
            false
        }

        fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
            let room = self.room.load(std::sync::atomic::Ordering::SeqCst);
            if room { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }

        fn trim(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn whoever_must_not_wait_is_told_to_write_in_full_when_there_is_no_room() {
        let small = Arc::new(Small { room: true.into() });
        let told = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let tells = Arc::clone(&told);
        let device = Policied::new(small.clone(), ErrorPolicy::default(), move |_| {
            tells.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        assert!(device.try_write_at(4096, &[7; 4096]).unwrap());
        small.room.store(false, std::sync::atomic::Ordering::SeqCst);
        assert!(!device.try_write_at(4096, &[7; 4096]).unwrap());
        assert!(!told.load(std::sync::atomic::Ordering::SeqCst), "whoever writes in full tells");
        assert_eq!(device.waiting(), 0);
    }

    #[test]
    fn a_flush_that_failed_is_not_tried_again_until_it_succeeds_without_what_was_lost() {
        let policy = ErrorPolicy { write: OnError::Pause, ..ErrorPolicy::default() };
        let (faulty, device, told) = rig(policy);
        let first = std::sync::atomic::AtomicBool::new(true);
        faulty.set(move |op, _, _| {
            let fails = op == Op::Flush && first.swap(false, std::sync::atomic::Ordering::SeqCst);
            fails.then_some(Fault::Error(io::ErrorKind::Other))
        });
        thread::scope(|scope| {
            let flush = scope.spawn(|| device.flush());
            if told.recv_timeout(Duration::from_millis(200)).is_ok() {
                device.resume();
            }
            assert!(flush.join().unwrap().is_err(), "the caller has to hear of it");
        });
    }

    #[test]
    fn patience_ends_and_a_server_that_stops_calls_the_wait_off() {
        let patience = Duration::from_millis(20);
        let (faulty, device, _told) = rig(ErrorPolicy { patience, ..ErrorPolicy::default() });
        faulty.set(full);
        let error = device.write_at(0, &[1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);

        let (faulty, device, told) = rig(ErrorPolicy::default());
        faulty.set(full);
        thread::scope(|scope| {
            let writer = scope.spawn(|| device.write_at(0, &[1]));
            told.recv_timeout(Duration::from_secs(10)).unwrap();
            device.interrupt();
            assert!(writer.join().unwrap().is_err());
        });
    }

    #[test]
    fn read_errors_go_by_their_own_policy_and_a_stopped_device_says_why() {
        let broken =
            |op, _, _| (op == Op::Read).then_some(Fault::Error(io::ErrorKind::InvalidData));
        let (faulty, device, _told) = rig(ErrorPolicy::default());
        faulty.set(broken);
        assert_eq!(device.read_at(0, &mut [0]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        device.write_at(0, &[1]).unwrap();

        let stop = ErrorPolicy { read: OnError::Stop, ..ErrorPolicy::default() };
        let (faulty, device, told) = rig(stop);
        faulty.set(broken);
        assert!(device.read_at(0, &mut [0]).is_err());
        assert_eq!(told.try_recv().unwrap().reaction, OnError::Stop);
        faulty.heal();
        let error = device.write_at(0, &[1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotConnected);
        assert!(error.to_string().contains("a test asked for it"), "{error}");
        // What the caller did wrong stops nothing.
        let (_, device, _told) = rig(stop);
        assert!(device.read_at(1 << 20, &mut [0]).is_err());
        assert_eq!(device.stopped(), None);
    }
}
