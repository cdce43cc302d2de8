//! Ctrl-C and SIGTERM: a flag that the story looks at between its steps and in every wait, so that
//! it ends by dropping what it made, in order.

use nix::sys::signal::Signal;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

/// How often a wait looks at the flag.
const TICK: Duration = Duration::from_millis(50);

/// Somebody asked for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped by {}", .0.as_str())]
pub struct Stopped(Signal);

impl Stopped {
    /// What a shell expects of a program that a signal ended.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        128 + self.0 as u8
    }
}

/// Whether somebody asked for the end. Clones see the same flag.
#[derive(Clone, Default)]
pub(super) struct Stop(Arc<AtomicUsize>);

impl Stop {
    /// From now on the first signal sets the flag and a second one ends this process at once; then
    /// the next run clears up.
    pub(super) fn on_signals() -> io::Result<Self> {
        let stop = Self::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // The order matters: the first signal passes the first of these before it arms it.
            let armed = Arc::new(AtomicBool::new(false));
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&armed))?;
            flag::register(signal, armed)?;
            flag::register_usize(signal, Arc::clone(&stop.0), signal.cast_unsigned() as usize)?;
        }
        Ok(stop)
    }

    /// Fails if somebody asked.
    pub(super) fn check(&self) -> Result<(), Stopped> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            number => {
                let signal = i32::try_from(number).ok().and_then(|n| Signal::try_from(n).ok());
                Err(Stopped(signal.unwrap_or(Signal::SIGTERM)))
            }
        }
    }

    /// Waits until `done`; false at the limit.
    pub(super) fn wait(
        &self,
        limit: Duration,
        mut done: impl FnMut() -> bool,
    ) -> Result<bool, Stopped> {
        let deadline = Instant::now() + limit;
        loop {
            self.check()?;
            if done() {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            sleep(TICK);
        }
    }

    /// Waits for the end that somebody asks for.
    pub(super) fn wait_for_signal(&self) -> Stopped {
        loop {
            if let Err(stopped) = self.check() {
                return stopped;
            }
            sleep(TICK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_done_at_its_limit_or_by_a_signal() {
        let stop = Stop::default();
        assert_eq!(stop.wait(Duration::from_secs(60), || true), Ok(true));
        assert_eq!(stop.wait(Duration::from_millis(1), || false), Ok(false));
        stop.0.store(SIGTERM.cast_unsigned() as usize, Ordering::Relaxed);
        let stopped = stop.wait(Duration::from_secs(60), || true).unwrap_err();
        assert_eq!(stopped.to_string(), "stopped by SIGTERM");
        assert_eq!(stopped.exit_code(), 143);
        assert_eq!(stop.wait_for_signal(), stopped);
    }
}
