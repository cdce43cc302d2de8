//! What a soak does, from its seed alone: the same seed gives the same deeds in the same order, whatever
//! becomes of them.

use crate::gate::{STEPS, Step};
use drafter::migrate::messages::Mode;
use std::time::Duration;

/// Numbers from a seed (SplitMix64: Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

/// What a machine may be put through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nobody runs it elsewhere without being asked: its runners are killed and stopped, and it is
    /// suspended.
    Plain,
    /// Protected with output commit: its hosts are lost.
    Protected,
}

/// What happens to whom at a step of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// The source's runner dies (SIGKILL) and is started again.
    KillSource,
    /// The destination's.
    KillDestination,
    /// The source's runner stands still for so long.
    StopSource(Duration),
    /// The destination's.
    StopDestination(Duration),
    /// Their line is cut for so long.
    Cut(Duration),
}

/// What is done to one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// It moves to the other host, at most at so many bytes a second.
    Move(Mode, Option<u64>),
    /// It moves, and something happens at a step of that.
    Harmed(Mode, Step, Harm),
    /// It is suspended, and resumed on its host, or on the other one.
    Suspend {
        /// On the other one.
        elsewhere: bool,
    },
    /// Its host is lost: runner, monitor and guard are killed at once.
    LoseHost,
    /// Its host stands still until another has the machine, and comes back.
    FreezeHost,
}

/// What happens to all of them at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// The store of leases is away for so long.
    StoreAway(Duration),
    /// The line between the hosts is down for so long.
    LineDown(Duration),
}

/// The deeds of one machine, each with the pause before it. Without end.
pub struct Deeds {
    kind: Kind,
    random: Random,
}

impl Deeds {
    /// Of machine `number`.
    #[must_use]
    pub fn new(seed: u64, number: u8, kind: Kind) -> Self {
        // Far from each other, whatever the seed.
        let mut random = Random::new(seed);
        let mine = (0..=number).map(|_| random.next()).last();
        Self { kind, random: Random::new(mine.unwrap_or(seed)) }
    }

    fn deed(&mut self) -> Deed {
        let random = &mut self.random;
        let mode = random.of(&[Mode::Hybrid, Mode::Hybrid, Mode::PostCopy, Mode::PreCopy]);
        let pace = random.of(&[None, None, Some(60_000_000), Some(20_000_000)]);
        let step = random.of(&STEPS);
        let time = random.millis(50, 3000);
        let harm = random.of(&[
            Harm::KillSource,
            Harm::KillDestination,
            Harm::StopSource(time),
            Harm::StopDestination(time),
            Harm::Cut(time),
        ]);
        let elsewhere = random.below(2) == 0;
        match (self.kind, random.below(100)) {
            (Kind::Plain, 0..35) | (Kind::Protected, 0..40) => Deed::Move(mode, pace),
            (Kind::Plain, 35..85) => Deed::Harmed(mode, step, harm),
            (Kind::Plain, _) => Deed::Suspend { elsewhere },
            (Kind::Protected, 40..80) => Deed::LoseHost,
            (Kind::Protected, _) => Deed::FreezeHost,
        }
    }
}

impl Iterator for Deeds {
    type Item = (Duration, Deed);

    fn next(&mut self) -> Option<Self::Item> {
        let pause = self.random.millis(0, 2000);
        Some((pause, self.deed()))
    }
}

/// What happens to all, each with the pause before it. Without end.
pub struct Forecast(Random);

impl Forecast {
    /// From the soak's seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Random::new(!seed))
    }
}

impl Iterator for Forecast {
    type Item = (Duration, Weather);

    fn next(&mut self) -> Option<Self::Item> {
        let pause = self.0.millis(5000, 25_000);
        let time = self.0.millis(200, 4000);
        let weather = self.0.of(&[Weather::StoreAway(time), Weather::LineDown(time)]);
        Some((pause, weather))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_plan_again_and_another_seed_another_one() {
        let deeds =
            |seed, number| -> Vec<_> { Deeds::new(seed, number, Kind::Plain).take(50).collect() };
        assert_eq!(deeds(7, 1), deeds(7, 1));
        assert_ne!(deeds(7, 1), deeds(7, 2));
        assert_ne!(deeds(7, 1), deeds(8, 1));
        let weather = |seed| -> Vec<_> { Forecast::new(seed).take(20).collect() };
        assert_eq!(weather(7), weather(7));
        assert_ne!(weather(7), weather(8));
    }

    #[test]
    fn in_the_end_everything_happens_to_a_machine_that_may() {
        let all = |kind| Deeds::new(1, 1, kind).take(3000).map(|(_, deed)| deed);
        for step in STEPS {
            let harmed = |deed: &Deed| matches!(deed, Deed::Harmed(_, at, _) if *at == step);
            assert!(all(Kind::Plain).any(|deed| harmed(&deed)), "{step:?}");
        }
        for mode in [Mode::PreCopy, Mode::PostCopy, Mode::Hybrid] {
            for kind in [Kind::Plain, Kind::Protected] {
                assert!(all(kind).any(|deed| deed == Deed::Move(mode, None)), "{mode}");
            }
        }
        assert!(all(Kind::Plain).any(|deed| deed == Deed::Suspend { elsewhere: true }));
        assert!(all(Kind::Protected).any(|deed| deed == Deed::LoseHost));
        assert!(all(Kind::Protected).any(|deed| deed == Deed::FreezeHost));
        let of_one_kind = |deed: &Deed| matches!(deed, Deed::LoseHost | Deed::FreezeHost);
        assert!(!all(Kind::Plain).any(|deed| of_one_kind(&deed)), "its writes would be lost");
    }
}
