//! The end that a user or a service manager asks for: SIGINT, SIGTERM, orderly and once.

use anyhow::{Context, Result};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};
use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

#[derive(Default)]
struct Shared {
    asked: AtomicBool,
    lock: Mutex<()>,
    changed: Condvar,
}

/// Whether the end was asked for. Cheap to clone; taken before anything is started, so that a
/// signal that comes early is not lost.
#[derive(Clone, Default)]
pub(crate) struct Stop(Arc<Shared>);

impl Stop {
    /// Takes SIGINT and SIGTERM from here on. A second one ends the process at once, with 130.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn on_signals() -> Result<Self> {
        let stop = Self::default();
        let mut signals = Signals::new([SIGTERM, SIGINT]).context("could not watch for signals")?;
        let told = stop.clone();
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in signals.forever() {
                if told.is_asked() {
                    tracing::warn!(signal, "a second signal: ending at once");
                    std::process::exit(130);
                }
                tracing::info!(signal, "stopping");
                told.ask();
            }
        })?;
        Ok(stop)
    }

    /// Asks for the end.
    pub(crate) fn ask(&self) {
        let _lock = self.0.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.asked.store(true, Ordering::Release);
        self.0.changed.notify_all();
    }

    /// Whether the end was asked for.
    pub(crate) fn is_asked(&self) -> bool {
        self.0.asked.load(Ordering::Acquire)
    }

    /// Waits until the end is asked for, at most so long; whether it was.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut lock = self.0.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_asked() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            lock = self
                .0
                .changed
                .wait_timeout(lock, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(lock, _)| lock);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_is_woken_and_whoever_comes_later_does_not_wait() {
        let stop = Stop::default();
        assert!(!stop.wait(Duration::from_millis(1)));
        let asker = stop.clone();
        let thread = thread::spawn(move || asker.ask());
        assert!(stop.wait(Duration::from_secs(20)));
        thread.join().unwrap();
        assert!(stop.wait(Duration::ZERO));
    }
}
