//! Work on a disk that may never answer: it runs on a thread of its own, and whoever wants it done
//! waits no longer than a limit.
//!
//! Used by sessions for flushes of their devices and for their notes. What must hold: one piece of
//! work at a time, in the order in which it was begun; nothing new is begun while an old one hangs, so
//! a disk that hangs costs one thread; who asks while it hangs is told so at once.

use crate::{
    lane::lock,
    ledger::{Ledger, Note},
    volume::Volume,
};
use std::{
    io,
    sync::{Arc, Condvar, Mutex, PoisonError, mpsc},
    thread::Builder,
    time::{Duration, Instant},
};

/// How long a flush or a note may take before whoever waits for it is told that it hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

#[derive(Default)]
struct State {
    /// Since when work is under way.
    since: Mutex<Option<Instant>>,
    ended: Condvar,
}

/// One thing that can hang.
pub(crate) struct Bounded {
    /// What it is, for people: `device "disk"`.
    name: String,
    limit: Duration,
    state: Arc<State>,
}

/// Work under way.
pub(crate) struct Pending<T> {
    what: String,
    limit: Duration,
    deadline: Instant,
    result: mpsc::Receiver<io::Result<T>>,
}

fn hangs(what: &str, limit: Duration) -> io::Error {
    let text = format!("{what} has not ended within {limit:?}; its disk does not answer");
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// Ends the work for those who wait to begin, also after a panic.
struct Ending(Arc<State>);

impl Drop for Ending {
    fn drop(&mut self) {
        *lock(&self.0.since) = None;
        self.0.ended.notify_all();
    }
}

impl Bounded {
    pub(crate) fn new(name: String, limit: Duration) -> Self {
        Self { name, limit, state: Arc::default() }
    }

    /// Begins `work`, which is `doing` it ("a flush of"). Waits for earlier work to end.
    ///
    /// # Errors
    /// If that hangs, or there is no thread.
    pub(crate) fn begin<T: Send + 'static>(
        &self,
        doing: &str,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<Pending<T>> {
        let what = format!("{doing} {}", self.name);
        let mut since = lock(&self.state.since);
        while let Some(began) = *since {
            let left = self.limit.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(hangs(&what, self.limit));
            }
            let waited = self.state.ended.wait_timeout(since, left);
            since = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *since = Some(Instant::now());
        drop(since);
        let ending = Ending(self.state.clone());
        let (sender, result) = mpsc::channel();
        Builder::new().name("silo-bounded".to_owned()).spawn(move || {
            let result = work();
            drop(ending);
            // It fails when nobody waits any more.
            let _ = sender.send(result);
        })?;
        Ok(Pending { what, limit: self.limit, deadline: Instant::now() + self.limit, result })
    }

    /// [`Bounded::begin`], and waits for the end.
    ///
    /// # Errors
    /// Those of the work, and if it hangs.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        doing: &str,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.begin(doing, work)?.wait()
    }
}

impl<T> Pending<T> {
    /// # Errors
    /// Those of the work, and if it hangs.
    pub(crate) fn wait(self) -> io::Result<T> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.result.recv_timeout(left) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(hangs(&self.what, self.limit)),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Err(io::Error::other(format!("{} ended by a panic", self.what)))
            }
        }
    }
}

/// The disks of a session: those of its volumes, and that of its note.
pub(crate) struct Disks {
    volumes: Vec<Bounded>,
    note: Bounded,
    /// How long one of them may take.
    pub(crate) limit: Duration,
}

impl Disks {
    pub(crate) fn of(volumes: &[Arc<Volume>], limit: Duration) -> Self {
        let name = |volume: &Arc<Volume>| format!("device \"{}\"", volume.name());
        let bounded = |volume| Bounded::new(name(volume), limit);
        Self {
            volumes: volumes.iter().map(bounded).collect(),
            note: Bounded::new("the note of the move".to_owned(), limit),
            limit,
        }
    }

    /// Flushes all volumes at the same time, each by `flush`; how it went, in their order.
    pub(crate) fn flush(
        &self,
        volumes: &[Arc<Volume>],
        flush: impl Fn(&Volume) -> io::Result<()> + Copy + Send + 'static,
    ) -> Vec<io::Result<()>> {
        let begin = |(disk, volume): (&Bounded, &Arc<Volume>)| {
            let volume = volume.clone();
            disk.begin("a flush of", move || flush(&volume))
        };
        let begun: Vec<_> = self.volumes.iter().zip(volumes).map(begin).collect();
        begun.into_iter().map(|flush| flush.and_then(Pending::wait)).collect()
    }

    /// Saves a note.
    ///
    /// # Errors
    /// Those of the ledger, and if it hangs.
    pub(crate) fn save(&self, ledger: &Arc<dyn Ledger>, note: Note) -> io::Result<()> {
        let ledger = ledger.clone();
        self.note.run("a save of", move || ledger.save(&note))
    }
}

/// Whether an error says that something hangs, not that it failed.
pub(crate) fn is_late(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::TimedOut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_hangs_is_told_at_its_limit_then_at_once_and_what_follows_is_done_when_it_ends() {
        let bounded = Bounded::new("disk".to_owned(), LIMIT);
        assert_eq!(bounded.run("asking", || Ok(7)).unwrap(), 7);
        let (let_go, held) = mpsc::channel::<()>();
        let hung = bounded.run("a flush of", move || {
            let _ = held.recv();
            Ok(())
        });
        let error = hung.unwrap_err();
        assert!(is_late(&error) && error.to_string().contains("a flush of disk"), "{error}");
        let began = Instant::now();
        for _ in 0..50 {
            assert!(is_late(&bounded.run("a flush of", || Ok(())).unwrap_err()));
        }
        assert!(began.elapsed() < LIMIT * 25, "each of them waited");
        drop(let_go);
        let deadline = Instant::now() + Duration::from_secs(20);
        while bounded.run("a flush of", || Ok(())).is_err() {
            assert!(Instant::now() < deadline, "it never recovered");
        }
        let failed = bounded.run("a flush of", || Err::<(), _>(io::ErrorKind::StorageFull.into()));
        assert!(!is_late(&failed.unwrap_err()));
    }
}
