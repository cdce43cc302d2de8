//! What comes of a decision: when each machine begins, is handed over, and is safe.
//!
//! The line is a fluid that those who send share equally. A machine under way takes its fixed cost
//! first, then sends its first copy; one that is copied while it runs here then sends what it wrote
//! meanwhile, at most what it writes over and over. The next one begins when one is safe.

use crate::{Load, Terms, Way};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Times of one machine, from now. A machine that is never safe has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// Its move begins.
    pub begin: Duration,
    /// It runs elsewhere (one that is put to sleep: it stands still).
    pub handed_over: Duration,
    /// Nothing of it is needed here any more.
    pub safe: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    /// Until this time.
    Setup(f64),
    /// So many bytes of the first copy, which began then.
    First(f64, f64),
    /// So many bytes of what it wrote meanwhile.
    Tail(f64),
}

struct UnderWay {
    /// Which step.
    step: usize,
    begin: f64,
    handed_over: f64,
    stage: Stage,
}

/// The most seconds that are told: a line that carries nothing takes for ever.
const FOR_EVER: f64 = 1e9;

fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value.clamp(0.0, FOR_EVER))
}

/// The times of `steps` (a load's place, and its way), in their order. None: it is never safe, because
/// the line carries nothing.
///
/// # Panics
/// If a step names a load that is not there.
#[must_use]
pub fn foresee(loads: &[Load], steps: &[(usize, Way)], terms: &Terms) -> Vec<Option<Times>> {
    let mut times = vec![None; steps.len()];
    let (line, setup) = (terms.line.0 as f64, terms.setup.as_secs_f64());
    let parallel = usize::from(terms.parallel.max(1));
    let mut waiting = 0..steps.len();
    let mut active: Vec<UnderWay> = Vec::with_capacity(parallel);
    let mut now = 0.0;
    loop {
        while active.len() < parallel
            && let Some(step) = waiting.next()
        {
            let stage = Stage::Setup(now + setup);
            active.push(UnderWay { step, begin: now, handed_over: now, stage });
        }
        if active.is_empty() {
            return times;
        }
        let senders = active.iter().filter(|one| !matches!(one.stage, Stage::Setup(_))).count();
        let share = line / senders.max(1) as f64;
        // Until the first of them comes to the end of its stage.
        let left = |one: &UnderWay| match one.stage {
            Stage::Setup(end) => end - now,
            Stage::First(left, _) | Stage::Tail(left) if left <= 0.0 => 0.0,
            Stage::First(left, _) | Stage::Tail(left) => left / share,
        };
        let step = active.iter().map(left).fold(f64::INFINITY, f64::min).max(0.0);
        if !step.is_finite() || now + step > FOR_EVER {
            return times;
        }
        // Whoever is as good as there, is there: a remainder of rounding would take steps of nothing.
        let ends = active.iter().map(|one| left(one) <= step + 1e-9).collect::<Vec<_>>();
        now += step;
        for (one, ends) in active.iter_mut().zip(&ends) {
            match &mut one.stage {
                Stage::Setup(_) => {}
                Stage::First(left, _) | Stage::Tail(left) => *left -= share * step,
            }
            if *ends {
                let (at, way) = steps[one.step];
                one.advance(&loads[at], way, now);
            }
        }
        active.retain(|one| {
            let over = matches!(one.stage, Stage::Tail(left) if left <= 0.0);
            if over {
                times[one.step] = Some(Times {
                    begin: seconds(one.begin),
                    handed_over: seconds(one.handed_over),
                    safe: seconds(now),
                });
            }
            !over
        });
    }
}

impl UnderWay {
    /// Its stage is at its end.
    fn advance(&mut self, load: &Load, way: Way, now: f64) {
        self.stage = match self.stage {
            Stage::Setup(_) => {
                // One that is copied while it runs here is handed over, or stands still, later.
                self.handed_over = now;
                Stage::First(way.first_copy(load).0 as f64, now)
            }
            Stage::First(_, began) if way.copies_while_it_runs_here() => {
                self.handed_over = now;
                let written = (now - began) * load.dirties.0 as f64;
                Stage::Tail(written.min(load.hot.0 as f64))
            }
            Stage::First(..) | Stage::Tail(_) => Stage::Tail(0.0),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Bytes, Rate,
        samples::{MIB, load, terms},
    };
    use proptest::prelude::*;

    fn alone(load: Load, way: Way) -> Times {
        let mut terms = terms(60);
        terms.line = Rate(100 * MIB);
        foresee(&[load], &[(0, way)], &terms)[0].unwrap()
    }

    #[track_caller]
    fn near(time: Duration, expected: f64) {
        assert!((time.as_secs_f64() - expected).abs() < 1e-6, "{time:?}, not {expected} s");
    }

    #[test]
    fn a_machine_alone_takes_what_arithmetic_says() {
        // 500 MiB at 100 MiB/s, 1 MiB/s written: 4 MiB at most come again.
        let times = alone(load("a", 500), Way::Hybrid);
        near(times.handed_over, 5.2);
        near(times.safe, 5.24);
        let times = alone(load("a", 200), Way::Hybrid);
        near(times.safe, 0.2 + 2.0 + 0.02);
        let times = alone(load("a", 500), Way::PostCopy);
        near(times.handed_over, 0.2);
        near(times.safe, 5.2);
        let there = Bytes(400 * MIB);
        let stored = Load { in_store: there, brought: there, ..load("a", 500) };
        // The names of 500 MiB are 3.9 MiB.
        near(alone(stored.clone(), Way::PostCopyWithStore).safe, 1.239_062_5);
        near(alone(stored.clone(), Way::HybridWithStore).safe, 1.249_453_125);
        // It stands still when what the store lacked is stored, and is safe when the rest is.
        let times = alone(stored, Way::Suspend);
        near(times.handed_over, 1.2);
        near(times.safe, 1.21);
    }

    #[test]
    fn machines_under_way_share_the_line_and_the_next_begins_when_one_is_safe() {
        let loads = [load("a", 100), load("b", 300), load("c", 100)];
        let mut terms = terms(60);
        terms.line = Rate(100 * MIB);
        let steps = [0, 1, 2].map(|at| (at, Way::PostCopy));
        let times: Vec<Times> = foresee(&loads, &steps, &terms).into_iter().flatten().collect();
        // a and b share until a is there; b is alone while c sets up; then b and c share.
        near(times[0].safe, 2.2);
        near(times[2].begin, 2.2);
        near(times[2].safe, 4.4);
        near(times[1].safe, 5.2 - 0.0);
        assert_eq!(times[1].begin, Duration::ZERO);
    }

    #[test]
    fn over_a_line_that_carries_nothing_only_those_leave_that_send_nothing() {
        let all_stored = Load { in_store: Bytes(9 * MIB), ..load("stored", 9) };
        let loads = [load("stuck", 1), all_stored];
        let mut terms = terms(60);
        terms.line = Rate(0);
        let steps = [(0, Way::PostCopy), (1, Way::Suspend)];
        let times = foresee(&loads, &steps, &terms);
        assert!(times[0].is_none());
        near(times[1].unwrap().safe, 0.2);
    }

    proptest! {
        #[test]
        fn the_line_never_carries_more_than_it_can_and_every_machine_is_told(
            mib in prop::collection::vec((0u64..2000, 0u64..400, 0u64..300), 1..12),
            parallel in 0u16..5,
            megabits in 1u64..10_000,
        ) {
            let loads: Vec<Load> = mib
                .iter()
                .map(|(size, dirties, hot)| Load {
                    dirties: Rate(dirties * MIB),
                    hot: Bytes(hot * MIB),
                    ..load("m", *size)
                })
                .collect();
            let terms =
                Terms { parallel, line: Rate::from_megabits(megabits), ..terms(60) };
            let steps: Vec<_> = (0..loads.len()).map(|at| (at, Way::Hybrid)).collect();
            let times = foresee(&loads, &steps, &terms);
            let end = times.iter().map(|times| times.unwrap().safe).max().unwrap();
            let bytes: u64 = loads.iter().map(|load| load.bytes.0).sum();
            let least = bytes as f64 / terms.line.0 as f64;
            prop_assert!(end.as_secs_f64() + 1e-6 >= least);
            for times in times.into_iter().flatten() {
                prop_assert!(times.begin <= times.handed_over && times.handed_over <= times.safe);
            }
        }
    }
}
