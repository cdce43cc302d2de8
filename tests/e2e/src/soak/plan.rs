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

/// Hosts of a soak.
pub const HOSTS: u8 = 3;

/// What a machine may be put through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nobody runs it elsewhere without being asked: its runners are killed and stopped, it is suspended,
    /// sleeps in a store, and goes back to generations there.
    Plain,
    /// The same, and it is copied, for which its disks are NBD.
    Forked,
    /// Protected with output commit: its hosts are lost, also those that it has just left.
    Protected,
    /// The same, and its runners are killed and stopped while it moves. In the clear, as the gates at a
    /// move's steps need it.
    ProtectedHarmed,
}

impl Kind {
    /// Whether it is protected.
    #[must_use]
    pub fn is_protected(self) -> bool {
        matches!(self, Self::Protected | Self::ProtectedHarmed)
    }
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
    /// It moves to another host, at most at so many bytes a second.
    Move(Mode, Option<u64>),
    /// It moves, and something happens at a step of that.
    Harmed(Mode, Step, Harm),
    /// It is suspended, and resumed on its host, or on another one.
    Suspend {
        /// On another one.
        elsewhere: bool,
    },
    /// It sleeps in a store and is woken, on its host or on another one.
    Sleep {
        /// On another one.
        elsewhere: bool,
    },
    /// It sleeps, and is woken as it was in an earlier generation: of those that there are, counted from
    /// the newest, this one modulo their number.
    GoBack(u64),
    /// It is copied; the copy is used and ended.
    Fork,
    /// Its host is lost: runner, monitor and guard are killed at once.
    LoseHost,
    /// It moves, and the host that it left is lost while half of its blocks are still there.
    LoseSource,
    /// Its host stands still until another has the machine, and comes back.
    FreezeHost,
}

/// What happens to all of them at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// The store of leases is away for so long.
    StoreAway(Duration),
    /// The line between two hosts is down for so long: that of the number, and the next.
    LineDown(u8, Duration),
    /// The network agent of a host dies (SIGKILL), and is started again after so long.
    AgentDies(u8, Duration),
    /// The edge dies, and is started again after so long.
    EdgeDies(Duration),
}

/// One deed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// The pause before it.
    pub pause: Duration,
    /// What is done.
    pub deed: Deed,
    /// Which other host is meant, if one is: so many on from the machine's own.
    pub way: u8,
}

/// The deeds of one machine. Without end.
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
        let generation = random.below(1000);
        match (self.kind, random.below(100)) {
            (Kind::Plain, 0..30)
            | (Kind::Forked, 0..25)
            | (Kind::Protected | Kind::ProtectedHarmed, 0..35) => Deed::Move(mode, pace),
            (Kind::Plain, 30..65) | (Kind::Forked, 25..45) | (Kind::ProtectedHarmed, 35..65) => {
                Deed::Harmed(mode, step, harm)
            }
            (Kind::Forked, 45..70) => Deed::Fork,
            (Kind::Plain, 65..75) | (Kind::Forked, 70..80) => Deed::Suspend { elsewhere },
            (Kind::Plain | Kind::Forked, 0..88) => Deed::Sleep { elsewhere },
            (Kind::Plain | Kind::Forked, _) => Deed::GoBack(generation),
            (Kind::Protected | Kind::ProtectedHarmed, 35..75) => Deed::LoseHost,
            (Kind::Protected | Kind::ProtectedHarmed, 75..85) => Deed::LoseSource,
            (Kind::Protected | Kind::ProtectedHarmed, _) => Deed::FreezeHost,
        }
    }
}

impl Iterator for Deeds {
    type Item = Next;

    fn next(&mut self) -> Option<Self::Item> {
        let pause = self.random.millis(0, 2000);
        let way = 1 + self.random.below(u64::from(HOSTS) - 1) as u8;
        Some(Next { pause, deed: self.deed(), way })
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
        let host = self.0.below(u64::from(HOSTS)) as u8;
        let weather = self.0.of(&[
            Weather::StoreAway(time),
            Weather::LineDown(host, time),
            Weather::AgentDies(host, time),
            Weather::EdgeDies(time),
        ]);
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
        let all = |kind| Deeds::new(1, 1, kind).take(3000).map(|next| next.deed);
        let kinds = [Kind::Plain, Kind::Forked, Kind::Protected, Kind::ProtectedHarmed];
        for kind in kinds {
            for step in STEPS {
                let harmed = |deed: Deed| matches!(deed, Deed::Harmed(_, at, _) if at == step);
                assert_eq!(all(kind).any(harmed), kind != Kind::Protected, "{kind:?}, {step:?}");
            }
            for mode in [Mode::PreCopy, Mode::PostCopy, Mode::Hybrid] {
                assert!(all(kind).any(|deed| deed == Deed::Move(mode, None)), "{kind:?}, {mode}");
            }
            for deed in [Deed::LoseHost, Deed::LoseSource, Deed::FreezeHost] {
                let may = kind.is_protected();
                assert_eq!(
                    all(kind).any(|other| other == deed),
                    may,
                    "else its writes would be lost"
                );
            }
            for deed in [Deed::Suspend { elsewhere: true }, Deed::Sleep { elsewhere: true }] {
                assert_eq!(all(kind).any(|other| other == deed), !kind.is_protected(), "{kind:?}");
            }
            let goes_back = |deed| matches!(deed, Deed::GoBack(_));
            assert_eq!(all(kind).any(goes_back), !kind.is_protected(), "{kind:?}");
            assert_eq!(all(kind).any(|deed| deed == Deed::Fork), kind == Kind::Forked, "{kind:?}");
        }
        let weather = |is: fn(&Weather) -> bool| Forecast::new(1).take(300).any(|(_, w)| is(&w));
        assert!(weather(|w| matches!(w, Weather::StoreAway(_))));
        for host in 0..HOSTS {
            let of = |w: &Weather| match w {
                Weather::LineDown(at, _) | Weather::AgentDies(at, _) => Some(*at),
                _ => None,
            };
            assert!(Forecast::new(1).take(300).any(|(_, w)| of(&w) == Some(host)));
        }
        assert!(weather(|w| matches!(w, Weather::LineDown(..))));
        assert!(weather(|w| matches!(w, Weather::AgentDies(..))));
        assert!(weather(|w| matches!(w, Weather::EdgeDies(_))));
    }
}
