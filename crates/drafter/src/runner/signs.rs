//! What a stand-in has seen of a machine's owner, and what follows from it: how long it was silent, and how
//! much of its work is lost at most.
//!
//! ```text
//!   here    asked: not there ── answered: there        last sign seen ──── the next would have come
//!                │                                                              │
//!   owner        └ written ── age ──▶ pause of the generation ── lost ──▶ its end, at the latest
//! ```
//!
//! Times are of this host's clock, but for the age, which the generation tells. What must hold: the loss
//! that is told is never less than the true one, as long as the owner ended no later than the sign of life
//! after its last would have been written.

use super::api::TakenOver;
use crate::{
    checkpoint::description::{Description, LifeSign},
    lease::{Beat, BootTime, Drift, Record},
};
use std::{collections::VecDeque, time::Duration};

/// Signs of life that are remembered: those of the generations that may be restored.
const SIGNS: usize = 256;

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A sign of life of the machine's owner.
struct Sign {
    beat: Beat,
    /// When the question was asked that did not show it yet; of the first that was seen there is none.
    not_before: Option<BootTime>,
    /// When it was seen.
    seen: BootTime,
}

/// What was seen of the owner, for the reckoning.
#[derive(Default)]
pub(super) struct Signs {
    signs: VecDeque<Sign>,
    asked: Option<BootTime>,
    asking: Option<BootTime>,
}

impl Signs {
    pub(super) fn ask(&mut self, now: BootTime) {
        self.asked = self.asking.replace(now);
    }

    pub(super) fn saw(&mut self, beat: &Beat, now: BootTime) {
        let known = self
            .signs
            .back()
            .is_some_and(|last| last.beat.of == beat.of && last.beat.serial >= beat.serial);
        if known || beat.fenced_by.is_some() {
            return;
        }
        if self.signs.len() == SIGNS {
            self.signs.pop_front();
        }
        let not_before = self.asked.filter(|_| !self.signs.is_empty());
        self.signs.push_back(Sign { beat: beat.clone(), not_before, seen: now });
    }

    fn last_seen(&self) -> Option<BootTime> {
        self.signs.back().map(|sign| sign.seen)
    }

    /// The longest time by which the owner can have outlived an instant at which this was its newest
    /// sign: up to the sign after its last, which never came.
    fn lost_since(&self, then: &LifeSign, renewal: Duration) -> Option<Duration> {
        let last = self.signs.back()?;
        let is_it = |sign: &&Sign| {
            let of = &sign.beat.of;
            // A machine that has moved is kept alive under another name.
            then.of.as_ref().is_none_or(|name| *name == of.name.to_string())
                && of.incarnation == then.life
                && sign.beat.serial == then.serial
        };
        let sign = self.signs.iter().find(is_it)?;
        let age = Duration::from_micros(then.age_us);
        // Of what the owner measured so much is sure here.
        let age = age - age / 1_000_000 * (2 * Drift::default().ppm);
        let renewal = renewal.max(Duration::from_micros(then.every_us));
        Some((last.seen + renewal).since(sign.not_before? + age))
    }
}

/// When what was seen, by this host's clock.
#[derive(Default)]
pub(super) struct Waited {
    pub(super) from: String,
    pub(super) silent: Option<BootTime>,
    pub(super) taken: Option<BootTime>,
}

impl Waited {
    pub(super) fn report(
        &self,
        generation: u64,
        ran: BootTime,
        saved: &Description,
        signs: &Signs,
        renewal: Duration,
    ) -> TakenOver {
        let silent = self.silent.unwrap_or(ran);
        let taken = self.taken.unwrap_or(silent);
        let last = signs.last_seen().unwrap_or(silent);
        TakenOver {
            from: self.from.clone(),
            generation,
            detected_ms: ms(silent.since(last)),
            taken_ms: ms(taken.since(silent)),
            restored_ms: ms(ran.since(taken)),
            lost_ms: saved.beat.as_ref().and_then(|sign| signs.lost_since(sign, renewal)).map(ms),
            paused_at_ns: saved.paused_at_ns,
            ran_at_ns: ran.0.as_nanos() as u64,
        }
    }
}

pub(super) fn sentence(taken: &TakenOver, record: &Record) -> String {
    let lost = match taken.lost_ms {
        Some(lost) => format!("at most {:.1} s of its work is lost", lost / 1e3),
        None => "how much of its work is lost is not known".to_owned(),
    };
    format!(
        "host \"{}\" was silent for {:.1} s; generation {} runs here ({}), {:.2} s later; {lost}",
        taken.from,
        taken.detected_ms / 1e3,
        taken.generation,
        record.epoch,
        (taken.taken_ms + taken.restored_ms) / 1e3,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{BeatName, HostName, Nonce};

    fn at(ms: u64) -> BootTime {
        BootTime(Duration::from_millis(ms))
    }

    #[test]
    fn the_loss_counts_from_the_last_look_before_the_generations_sign_to_the_sign_that_never_came()
    {
        let term = Duration::from_secs(3);
        let renewal = Duration::from_millis(750);
        let first =
            Beat::begun(BeatName::of_host(HostName::new("a").unwrap()), Some(4), term, Nonce(1));
        let mut signs = Signs::default();
        let mut look = |asked, answered, beat: &Beat| {
            signs.ask(at(asked));
            signs.saw(beat, at(answered));
        };
        look(100, 110, &first);
        let second = first.renewed(term, Nonce(2));
        look(300, 310, &first);
        look(500, 510, &second);
        look(700, 710, &second);
        let third = second.renewed(term, Nonce(3));
        look(1300, 1310, &third);
        look(1500, 1510, &third.fenced(HostName::new("b").unwrap(), Nonce(4)));
        assert_eq!(signs.last_seen(), Some(at(1310)));
        let sign = |life, serial| LifeSign { life, serial, of: None, age_us: 0, every_us: 0 };
        // Of the second sign: written after the look of 300, which did not show it.
        let lost = signs.lost_since(&sign(5, 1), renewal);
        assert_eq!(lost, Some(Duration::from_millis(1310 + 750 - 300)));
        assert_eq!(signs.lost_since(&sign(5, 0), renewal), None, "it may be older than the watch");
        assert_eq!(signs.lost_since(&sign(5, 7), renewal), None, "a sign that was not seen");
        assert_eq!(signs.lost_since(&sign(4, 1), renewal), None, "of another life");
        // It had been there for 200 ms by the owner's clock, which may be fast; the owner is slower.
        let older = LifeSign { age_us: 200_000, every_us: 1_000_000, ..sign(5, 1) };
        let lost = signs.lost_since(&older, renewal).unwrap();
        assert_eq!(lost, Duration::from_micros(1_310_000 + 1_000_000 - 300_000 - 200_000 + 400));
        // After a move the same numbers are another's.
        let of = |name: &str| Some(name.to_owned());
        let named = |name| signs.lost_since(&LifeSign { of: of(name), ..sign(5, 1) }, renewal);
        assert!(named("a").is_some());
        assert_eq!(named("b"), None);
    }
}
