//! A limit on bytes per second, shared by the data connections of a session. Pure but for
//! [`Throttle::wait`].

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How much may be sent at once after a pause: a tenth of a second's worth.
const BURST: f64 = 0.1;

struct State {
    /// Bytes per second; none for no limit.
    rate: Option<f64>,
    /// Bytes that may be sent now; below zero while a debt is paid, so that a run that is taken
    /// from the queue is sent at once, and one that waits can still be sent as a demand.
    credit: f64,
    at: Instant,
    stopped: bool,
}

/// See the module.
pub struct Throttle {
    state: Mutex<State>,
    changed: Condvar,
}

impl Throttle {
    /// At most `rate` bytes per second; no limit without.
    #[must_use]
    pub fn new(rate: Option<u64>) -> Self {
        let state = State { rate: None, credit: 0.0, at: Instant::now(), stopped: false };
        let throttle = Self { state: Mutex::new(state), changed: Condvar::new() };
        throttle.set_rate(rate);
        throttle
    }

    /// Changes the limit; whoever waits feels it at once.
    pub fn set_rate(&self, rate: Option<u64>) {
        let mut state = self.lock();
        state.rate = rate.map(|rate| rate.max(1) as f64);
        state.credit = 0.0;
        self.changed.notify_all();
    }

    /// The limit, bytes per second.
    #[must_use]
    pub fn rate(&self) -> Option<f64> {
        self.lock().rate
    }

    /// Nobody waits any more.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Waits until something may be sent: until what was sent before is paid for.
    pub fn wait(&self) {
        let mut state = self.lock();
        refill(&mut state, Instant::now());
        while let (Some(rate), false) = (state.rate, state.stopped) {
            if state.credit >= 0.0 {
                break;
            }
            let wait = Duration::from_secs_f64((-state.credit / rate).min(60.0));
            state =
                self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
            refill(&mut state, Instant::now());
        }
    }

    /// So many bytes are sent, and are to be paid for before the next are.
    pub fn charge(&self, bytes: u64) {
        let mut state = self.lock();
        if state.rate.is_some() {
            refill(&mut state, Instant::now());
            state.credit -= bytes as f64;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refill(state: &mut State, now: Instant) {
    let Some(rate) = state.rate else { return };
    let passed = now.saturating_duration_since(state.at).as_secs_f64();
    state.credit = (state.credit + passed * rate).min(rate * BURST);
    state.at = now;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_senders_together_keep_to_the_rate() {
        let throttle = Throttle::new(Some(10_000_000));
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        throttle.wait();
                        throttle.charge(100_000);
                    }
                });
            }
        });
        // 4 MB at 10 MB/s, less the burst.
        let took = begin.elapsed().as_secs_f64();
        assert!((0.28..2.0).contains(&took), "{took} s");
    }

    #[test]
    fn a_stopped_or_lifted_limit_lets_whoever_waits_go() {
        let throttle = Throttle::new(Some(1));
        let begin = Instant::now();
        std::thread::scope(|scope| {
            throttle.charge(1_000_000);
            scope.spawn(|| throttle.wait());
            throttle.stop();
        });
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}
