//! Doing something at a rate, by the monotonic clock.

use std::time::{Duration, Instant};

/// The most that is made up for at once: after a longer pause (the machine moved) the work goes on
/// at its rate and does not try to catch up.
const MOST: Duration = Duration::from_millis(50);

/// Says how much to do now.
pub(crate) struct Pacer {
    per_second: u64,
    last: Instant,
    /// Parts of one unit that are left over, in units of a nanosecond's share.
    rest: u128,
}

impl Pacer {
    pub(crate) fn new(per_second: u64, now: Instant) -> Self {
        Self { per_second, last: now, rest: 0 }
    }

    /// How many units are due at `now`. A clock that stands still or steps back gives none.
    pub(crate) fn due(&mut self, now: Instant) -> u64 {
        const SECOND: u128 = 1_000_000_000;
        let passed = now.saturating_duration_since(self.last).min(MOST);
        self.last = self.last.max(now);
        let shares = u128::from(self.per_second) * passed.as_nanos() + self.rest;
        self.rest = shares % SECOND;
        (shares / SECOND) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_small_steps_give_the_exact_rate() {
        let start = Instant::now();
        let mut pacer = Pacer::new(25_601, start);
        let done: u64 =
            (1..=3000).map(|step| pacer.due(start + Duration::from_micros(step * 1000))).sum();
        assert_eq!(done, 25_601 * 3);
    }

    #[test]
    fn a_long_pause_is_not_made_up_for() {
        let start = Instant::now();
        let mut pacer = Pacer::new(1000, start);
        assert_eq!(pacer.due(start + Duration::from_secs(3600)), 50);
        assert_eq!(pacer.due(start + Duration::from_secs(3600) + Duration::from_millis(10)), 10);
    }

    #[test]
    fn a_clock_that_steps_back_gives_nothing_and_costs_nothing() {
        let start = Instant::now() + Duration::from_secs(100);
        let mut pacer = Pacer::new(1000, start);
        assert_eq!(pacer.due(start - Duration::from_secs(50)), 0);
        assert_eq!(pacer.due(start + Duration::from_millis(7)), 7);
    }
}
