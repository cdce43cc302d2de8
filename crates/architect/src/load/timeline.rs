//! When answers came, so that "what did the client notice" can be asked of any span of time.
//!
//! Every silence (time between two consecutive completed answers) of a millisecond or more is
//! kept exactly; of shorter ones only the longest in each 100 ms. That bounds memory by time
//! (at most 16 kB and 40 B a second), whatever the rate of operations.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

const KEPT_EXACTLY: Duration = Duration::from_millis(1);
const SLOT: Duration = Duration::from_millis(100);

/// A span in which no answer was completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// The answer before it.
    pub from: Instant,
    /// The answer after it, or the time of asking if none came yet.
    pub to: Instant,
}

impl Silence {
    /// How long it lasted.
    pub fn length(&self) -> Duration {
        self.to.saturating_duration_since(self.from)
    }

    fn overlaps(&self, from: Instant, to: Instant) -> bool {
        self.from <= to && self.to >= from
    }
}

/// The silences of one load, readable while it runs and after it ended. Cheap to clone; the clones
/// see the same record.
#[derive(Clone)]
pub struct Timeline(Arc<Mutex<Record>>);

struct Record {
    origin: Instant,
    last: Option<Instant>,
    ended: bool,
    long: Vec<Silence>,
    /// Longest short silence that ended in each slot since `origin`.
    short: Vec<Duration>,
}

impl Timeline {
    pub(super) fn new(origin: Instant) -> Self {
        Timeline(Arc::new(Mutex::new(Record {
            origin,
            last: None,
            ended: false,
            long: Vec::new(),
            short: Vec::new(),
        })))
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer was completed at `now`.
    pub(super) fn answered(&self, now: Instant) {
        let mut record = self.record();
        if let Some(last) = record.last {
            let silence = Silence { from: last, to: now };
            if silence.length() >= KEPT_EXACTLY {
                record.long.push(silence);
            } else {
                let slot = slot(record.origin, now);
                if record.short.len() <= slot {
                    record.short.resize(slot + 1, Duration::ZERO);
                }
                record.short[slot] = record.short[slot].max(silence.length());
            }
        }
        record.last = Some(now);
    }

    /// No answer is expected any more: time after the last one is not a silence.
    pub(super) fn end(&self) {
        self.record().ended = true;
    }

    /// The longest silence that overlaps the span from `from` to `to`, in its full length even
    /// where it reaches beyond the span. A silence that still lasts counts up to now. Zero if the
    /// span lies before the first answer or after the end.
    pub fn longest_between(&self, from: Instant, to: Instant) -> Duration {
        self.longest_at(from, to, Instant::now())
    }

    fn longest_at(&self, from: Instant, to: Instant, now: Instant) -> Duration {
        let record = self.record();
        let first = record.long.partition_point(|silence| silence.to < from);
        let long = record.long[first..]
            .iter()
            .take_while(|silence| silence.from <= to)
            .map(Silence::length)
            .max()
            .unwrap_or_default();
        let slots = slot(record.origin, from)..=slot(record.origin, to);
        let short = slots
            .take_while(|&slot| slot < record.short.len())
            .map(|slot| record.short[slot])
            .max()
            .unwrap_or_default();
        let lasting = record
            .last
            .filter(|_| !record.ended)
            .map(|last| Silence { from: last, to: now })
            .filter(|silence| silence.overlaps(from, to))
            .map(|silence| silence.length())
            .unwrap_or_default();
        long.max(short).max(lasting)
    }

    /// The longest silence so far.
    pub fn longest(&self) -> Duration {
        let now = Instant::now();
        let (origin, last) = {
            let record = self.record();
            (record.origin, record.last.unwrap_or(record.origin))
        };
        self.longest_at(origin, now.max(last), now)
    }
}

fn slot(origin: Instant, at: Instant) -> usize {
    let since = at.saturating_duration_since(origin).as_millis() / SLOT.as_millis();
    usize::try_from(since).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// Answers at 0, 2, 4 … 1000 ms, except none between 500 and 530.
    fn with_a_gap() -> (Instant, Timeline) {
        let origin = Instant::now();
        let timeline = Timeline::new(origin);
        for at in (0..=1000).step_by(2).filter(|at| !(501..530).contains(at)) {
            timeline.answered(origin + ms(at));
        }
        timeline.end();
        (origin, timeline)
    }

    #[test]
    fn a_silence_is_seen_by_each_span_it_overlaps_and_by_no_other() {
        let (origin, timeline) = with_a_gap();
        let longest = |from, to| timeline.longest_between(origin + ms(from), origin + ms(to));
        assert_eq!(longest(0, 1000), ms(30));
        assert_eq!(longest(510, 515), ms(30), "inside it");
        assert_eq!(longest(400, 501), ms(30), "its beginning");
        assert_eq!(longest(529, 900), ms(30), "its end");
        assert_eq!(longest(0, 499), ms(2));
        assert_eq!(longest(531, 1000), ms(2));
        assert_eq!(timeline.longest(), ms(30));
    }

    #[test]
    fn a_silence_that_still_lasts_counts_up_to_now() {
        let origin = Instant::now();
        let timeline = Timeline::new(origin);
        timeline.answered(origin);
        timeline.answered(origin + ms(1));
        assert_eq!(
            timeline.longest_at(origin + ms(50), origin + ms(60), origin + ms(301)),
            ms(300)
        );
        timeline.end();
        assert_eq!(
            timeline.longest_at(origin + ms(50), origin + ms(60), origin + ms(301)),
            Duration::ZERO,
            "after the end nothing is awaited"
        );
    }

    #[test]
    fn short_silences_cost_memory_by_time_and_not_by_number() {
        let origin = Instant::now();
        let timeline = Timeline::new(origin);
        for at in 0..100_000 {
            timeline.answered(origin + Duration::from_micros(at * 10));
        }
        let record = timeline.record();
        assert!(record.long.is_empty());
        assert_eq!(record.short.len(), 10);
        drop(record);
        assert_eq!(
            timeline.longest_at(origin, origin + ms(999), origin),
            Duration::from_micros(10)
        );
    }

    #[test]
    fn before_the_first_answer_nothing_is_a_silence() {
        let origin = Instant::now();
        let timeline = Timeline::new(origin);
        assert_eq!(timeline.longest_at(origin, origin + ms(10), origin + ms(20)), Duration::ZERO);
    }
}
