//! The times that both ends agree on, and the small values that outlive one attempt.

use crate::lease::{Drift, Epoch, Record};
use std::time::Duration;

/// The times of a switchover. Both ends must use the same drift bound; the rest may differ.
#[derive(Clone, Debug)]
pub struct Terms {
    /// G: how long an offer holds, on the destination's clock.
    pub good_for: Duration,
    /// ρ: how far a clock may run fast or slow, in parts per million.
    pub drift_ppm: u32,
    /// Destination: a freeze takes effect within this time, so it is ordered this long before the
    /// end of an offer.
    pub stop_margin: Duration,
    /// Destination: a token is refused if its offer has less than this left (beyond `stop_margin`),
    /// because the machine would be frozen before the store can answer.
    pub start_margin: Duration,
    /// Source: how old an offer may be when it is named.
    pub fresh_for: Duration,
    /// Source: offers that promise more than this are ignored, because the source would wait that
    /// long for a silent destination.
    pub longest_offer: Duration,
    /// Source: how long it waits for a fresh offer, the store or the pause before it gives up the
    /// attempt; the machine runs meanwhile, but for the pause.
    pub patience: Duration,
    /// First pause before a store that did not answer is asked again; doubles up to 10 times this.
    pub store_retry: Duration,
    /// One rule that a test breaks.
    #[cfg(test)]
    pub(super) broken: Option<Rule>,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            good_for: Duration::from_secs(2),
            drift_ppm: 1000,
            stop_margin: Duration::from_millis(100),
            start_margin: Duration::from_millis(200),
            fresh_for: Duration::from_secs(1),
            longest_offer: Duration::from_secs(2),
            patience: Duration::from_secs(5),
            store_retry: Duration::from_millis(20),
            #[cfg(test)]
            broken: None,
        }
    }
}

impl Terms {
    /// How long the source waits, from the receipt of an offer, until it is over on any clock that
    /// keeps the drift bound: G(1+ρ)/(1−ρ), rounded up.
    ///
    /// The destination's G lasts at most G/(1−ρ) of true time, from a moment before the receipt;
    /// the source's clock counts at most (1+ρ) of it.
    #[must_use]
    pub fn expiry(&self, good_for: Duration) -> Duration {
        if !self.keeps(Rule::ExpiryCoversDrift) {
            return good_for;
        }
        Drift { ppm: self.drift_ppm }.outlast(good_for)
    }

    /// How often the destination renews its offer.
    #[must_use]
    pub fn renewal(&self) -> Duration {
        self.good_for / 4
    }

    #[cfg(test)]
    pub(super) fn keeps(&self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "tests break rules, nobody else does")]
    pub(super) const fn keeps(&self, _: Rule) -> bool {
        true
    }
}

/// The rules that keep a machine in one place, each of which the simulator must miss when broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// (b) The hand-over is in the store before the machine pauses.
    HandOverBeforePause,
    /// (c) The destination runs only while the named offer holds on its own clock.
    RunOnlyInOffer,
    /// (c) No frame leaves before the lease is won.
    HoldOutput,
    /// (c) No frame leaves before the source's flushes are durable.
    HoldOutputForFlush,
    /// (c) At the end of an unconfirmed offer the destination is stopped.
    FreezeAtEnd,
    /// (c) A destination that has lost never runs on.
    DiscardWhenLost,
    /// (c) Whoever has begun to take the lease cannot refuse any more.
    NoRefusalAfterTake,
    /// (d) The source waits for the end of the offer that the token named.
    WaitForExpiry,
    /// (d) … of that offer, not of an earlier one.
    WaitForNamedOffer,
    /// (f) The source of a protected machine sends no token after its term.
    NoTokenAfterTerm,
    /// (d) … stretched for the drift of both clocks.
    ExpiryCoversDrift,
    /// (d) The source runs again only after its own compare-and-set won.
    ClaimBeforeResume,
    /// Every change of owner has an epoch of its own.
    NewEpoch,
    /// (d) … also if the destination refused, where an earlier life of the source's runner may have
    /// begun to take the machine back.
    SuccessorClaimsBack,
    /// A write whose answer got lost is recognised by its nonce.
    SettleByNonce,
    /// A write without an answer is tried again, and nothing concluded from the silence.
    SilenceIsNoVerdict,
    /// (c) At the end of an unconfirmed offer the destination is stopped, also if its runner is dead.
    #[cfg(test)]
    GuardOutlivesRunner,
    /// A runner that comes after one that died takes the lease only if that had begun to: else the
    /// attempt may have been refused.
    #[cfg(test)]
    SuccessorTakesWhatWasAsked,
    /// … and then does not drop the copy before its own write has lost: the dead runner's may come late.
    #[cfg(test)]
    SuccessorAsksOn,
}

/// What a host holds that may run a machine: kept by the runner from one attempt to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The lease as last known.
    pub record: Record,
    /// How often the network was flipped under this epoch.
    pub flips: u16,
}

impl Holding {
    /// A machine that starts here under `record`.
    #[must_use]
    pub const fn new(record: Record) -> Self {
        Self { record, flips: 0 }
    }

    /// There is one more for a pause and one for the abort after it (there is not after some 30
    /// thousand aborted moves).
    pub(super) const fn has_flips(&self) -> bool {
        self.flips <= u16::MAX - 2
    }

    /// The epoch for the network's next flip.
    pub(super) const fn next_flip(&mut self) -> FlipEpoch {
        self.flips = self.flips.saturating_add(1);
        self.flip()
    }

    pub(super) const fn flip(&self) -> FlipEpoch {
        FlipEpoch::of(self.record.epoch, self.flips)
    }
}

/// The epoch that the network is told: the lease's, followed by a counter that only the owner of
/// that epoch advances, so that a pause and the abort after it differ without a write to the store,
/// and the next owner beats both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlipEpoch(pub u64);

impl FlipEpoch {
    /// The `flips`th flip under `epoch`.
    #[must_use]
    pub const fn of(epoch: Epoch, flips: u16) -> Self {
        Self(epoch.0 << 16 | flips as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_waits_for_the_slowest_clock_by_the_fastest() {
        let terms = Terms::default();
        let two = Duration::from_secs(2);
        // 2 s × 1.001 / 0.999 = 2.004 004 004 004 … s
        assert_eq!(terms.expiry(two), Duration::from_nanos(2_004_004_005));
    }

    #[test]
    fn a_new_owner_beats_every_flip_of_the_old_one() {
        assert!(FlipEpoch::of(Epoch(8), 0) > FlipEpoch::of(Epoch(7), u16::MAX));
    }
}
