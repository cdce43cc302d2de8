//! When rounds end: how long the destination would wait for the last dirty set if it took over now,
//! and whether another round would make that shorter.
//!
//! Used by the [`Source`](super::Source). What must hold: whatever is written, and however fast, the
//! number of rounds is bounded, and so are time and bytes; a device that nobody writes to costs no
//! rounds.

use std::time::Duration;

/// How a move ends its rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The token goes with the last dirty lists, and their blocks after it: readers of those wait.
    Hybrid,
    /// Writers pause until everything is at the destination; the token goes then.
    Whole,
}

/// What happens when rounds no longer help, or a budget is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outpaced {
    /// The devices change hands then, with what is dirty.
    Switch,
    /// The move fails and the writers go on here.
    Fail,
}

/// Bounds of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Longest wait for the last dirty set that is aimed at.
    pub blackout: Duration,
    /// What changing hands takes apart from blocks.
    pub switch_cost: Duration,
    /// Most rounds.
    pub max_rounds: u32,
    /// Most bytes over the line before the token, as a multiple of the group's size in percent.
    pub max_percent: u64,
    /// Longest time before the token.
    pub max_time: Duration,
    /// Shortest time from one round to the next.
    pub pause: Duration,
    /// Rounds go on until [`super::source::Event::Switch`] comes: a standby copy.
    pub hold: bool,
    /// See there.
    pub finish: Finish,
    /// See there.
    pub outpaced: Outpaced,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            blackout: Duration::from_millis(100),
            switch_cost: Duration::from_millis(5),
            max_rounds: 30,
            max_percent: 300,
            max_time: Duration::from_secs(3600),
            pause: Duration::from_millis(20),
            hold: false,
            finish: Finish::Hybrid,
            outpaced: Outpaced::Switch,
        }
    }
}

/// What to do when everything listed so far has been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Close a round.
    Round,
    /// Nothing yet; ask again at this time.
    Later(Duration),
    /// Pause writers and hand over.
    Switch,
    /// Rounds do not help and handing over is not allowed.
    GiveUp,
}

/// Measures rounds. Times are since the start of the session, sizes in bytes.
#[derive(Clone, Debug)]
pub struct Pace {
    policy: Policy,
    began: Duration,
    size: u64,
    rounds: u32,
    sent: u64,
    /// When the last round was closed, and what had been sent then.
    closed: Duration,
    sent_then: u64,
    /// Bytes of the last list, and bytes a second that were dirtied before it.
    list: u64,
    rate: f64,
    bandwidth: f64,
    unhelpful: u32,
}

impl Pace {
    /// A move of `size` bytes that begins now.
    #[must_use]
    pub fn new(policy: Policy, size: u64, now: Duration) -> Self {
        Self {
            policy,
            began: now,
            size,
            rounds: 0,
            sent: 0,
            closed: now,
            sent_then: 0,
            list: 0,
            rate: 0.0,
            bandwidth: 0.0,
            unhelpful: 0,
        }
    }

    /// A round was closed; its lists have so many bytes.
    pub fn closed(&mut self, now: Duration, list: u64) {
        let time = now.saturating_sub(self.closed).as_secs_f64();
        if time > 0.0 && self.sent > self.sent_then {
            let measured = (self.sent - self.sent_then) as f64 / time;
            // The fastest of late rounds: a round with little to send says little about the line.
            self.bandwidth = measured.max(self.bandwidth * 0.8);
        }
        if self.rounds > 0 {
            self.rate = list as f64 / time.max(1e-6);
        }
        let helped = self.rounds < 2 || list < self.list / 5 * 4;
        self.unhelpful = if helped { 0 } else { self.unhelpful + 1 };
        (self.closed, self.sent_then, self.list) = (now, self.sent, list);
        self.rounds += 1;
    }

    /// The destination has confirmed so many bytes.
    pub fn confirmed(&mut self, bytes: u64) {
        self.sent = self.sent.saturating_add(bytes);
    }

    /// How many rounds were closed.
    #[must_use]
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// How long the destination would wait for what is dirty by now.
    #[must_use]
    pub fn predicted(&self, now: Duration) -> Duration {
        let time = now.saturating_sub(self.closed).as_secs_f64();
        let measured = (self.sent - self.sent_then) as f64 / time.max(1e-6);
        let dirty = self.rate * time;
        let bandwidth = self.bandwidth.max(measured).max(1.0);
        let wait = Duration::try_from_secs_f64(dirty / bandwidth).unwrap_or(Duration::MAX);
        self.policy.switch_cost.saturating_add(wait)
    }

    /// A budget that is used up, whatever is still queued.
    #[must_use]
    pub fn exhausted(&self, now: Duration) -> bool {
        let bytes = u128::from(self.size) * u128::from(self.policy.max_percent) / 100;
        now.saturating_sub(self.began) >= self.policy.max_time
            || u128::from(self.sent) > bytes + (1 << 20)
    }

    /// What to do now that everything listed so far has been sent, or a budget is used up.
    #[must_use]
    pub fn next(&self, now: Duration) -> Next {
        let again = self.closed + self.policy.pause;
        if self.policy.hold {
            return if now >= again { Next::Round } else { Next::Later(again) };
        }
        if self.rounds > 1 && self.predicted(now) <= self.policy.blackout {
            return Next::Switch;
        }
        if self.exhausted(now) || self.rounds >= self.policy.max_rounds || self.unhelpful >= 2 {
            return match self.policy.outpaced {
                Outpaced::Switch => Next::Switch,
                Outpaced::Fail => Next::GiveUp,
            };
        }
        if now >= again || self.rounds <= 1 { Next::Round } else { Next::Later(again) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: f64 = 1e8;

    /// Plays rounds of a writer with `rate` bytes a second over a working set of `set` bytes.
    fn play(policy: Policy, rate: f64, set: u64) -> (u32, Next, Duration, u64) {
        let size = 1u64 << 30;
        let (mut now, mut sent) = (0.0f64, 0u64);
        let mut pace = Pace::new(policy, size, Duration::ZERO);
        pace.closed(Duration::ZERO, size);
        let (mut list, mut last) = (size, 0.0);
        for _ in 0..10_000 {
            now += list as f64 / LINE;
            pace.confirmed(list);
            sent += list;
            let at = Duration::from_secs_f64(now);
            match pace.next(at) {
                Next::Round => {
                    list = set.min((rate * (now - last)) as u64);
                    last = now;
                    pace.closed(at, list);
                }
                Next::Later(then) => {
                    assert!(then > at, "no spinning");
                    (now, list) = (then.as_secs_f64() + 1e-6, 0);
                }
                end => return (pace.rounds(), end, at, sent),
            }
        }
        panic!("rounds without end");
    }

    #[test]
    fn check_37_rounds_converge_or_stop_whatever_is_written() {
        let policy = Policy::default();
        let (rounds, end, ..) = play(policy, 0.0, 0);
        assert_eq!((rounds, end), (2, Next::Switch), "an idle device takes one look");
        let (rounds, end, ..) = play(policy, 2e7, 1 << 30);
        assert_eq!(end, Next::Switch);
        assert!((3..10).contains(&rounds), "a fifth of the line converges: {rounds}");
        let (rounds, end, ..) = play(policy, 5e8, 1 << 30);
        assert_eq!(end, Next::Switch);
        assert!(rounds < 8, "five times the line is seen early: {rounds}");
        let strict = Policy { outpaced: Outpaced::Fail, ..policy };
        assert_eq!(play(strict, 5e8, 1 << 30).1, Next::GiveUp);
        let bounded = Policy { max_rounds: 4, blackout: Duration::ZERO, ..policy };
        assert_eq!(play(bounded, 1e7, 1 << 30).0, 4);
        let timed =
            Policy { max_time: Duration::from_secs(12), blackout: Duration::ZERO, ..policy };
        assert!(play(timed, 5e7, 1 << 30).2 < Duration::from_secs(25));
        let counted = Policy { max_percent: 120, blackout: Duration::ZERO, ..policy };
        assert!(play(counted, 9.5e7, 1 << 30).3 < (1 << 30) * 22 / 10);
    }

    #[test]
    fn check_37_a_standby_copy_of_an_idle_device_waits_between_rounds() {
        let pace = {
            let policy = Policy { hold: true, pause: Duration::from_secs(1), ..Policy::default() };
            let mut pace = Pace::new(policy, 1 << 20, Duration::ZERO);
            pace.closed(Duration::from_secs(5), 0);
            pace
        };
        assert_eq!(pace.next(Duration::from_secs(5)), Next::Later(Duration::from_secs(6)));
        assert_eq!(pace.next(Duration::from_secs(6)), Next::Round);
    }
}
