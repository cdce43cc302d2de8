//! How long a server looks for the next request before it sleeps.
//!
//! Waking a thread on another processor takes longer than most requests do (on a virtual processor
//! that sleeps, tens of µs). Who looked as long as the last sleep took would have seen the request
//! at once; who looks in vain takes time from others. So the span doubles after a sleep that
//! looking would have bridged, and halves after one that it would not.

use std::time::Duration;

/// The shortest time that is worth looking again and again.
const LEAST: Duration = Duration::from_micros(4);

/// What was learned so far.
#[derive(Debug)]
pub(crate) struct Polling {
    most: Duration,
    span: Duration,
}

impl Polling {
    /// Never looks longer than `most`; if that is zero, never.
    pub(crate) const fn new(most: Duration) -> Self {
        Self { most, span: Duration::ZERO }
    }

    /// How long to look now; `None`: sleep at once.
    pub(crate) fn span(&self) -> Option<Duration> {
        (self.span >= LEAST).then_some(self.span)
    }

    /// Nothing came while it looked, and then it slept so long.
    pub(crate) fn slept(&mut self, slept: Duration) {
        self.span = if self.most.is_zero() {
            Duration::ZERO
        } else if slept <= self.most {
            (self.span * 2).clamp(LEAST, self.most.max(LEAST))
        } else {
            self.span / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_are_bridged_and_long_ones_are_not_waited_for() {
        let (short, long) = (Duration::from_micros(20), Duration::from_millis(1));
        let mut polling = Polling::new(Duration::from_micros(32));
        assert_eq!(polling.span(), None, "nothing is known at first");
        for _ in 0..5 {
            polling.slept(short);
        }
        assert_eq!(polling.span(), Some(Duration::from_micros(32)));
        for _ in 0..4 {
            polling.slept(long);
        }
        assert_eq!(polling.span(), None);
        let mut never = Polling::new(Duration::ZERO);
        never.slept(short);
        assert_eq!(never.span(), None);
    }
}
