//! The times of terms, and the rules that tests break.

use crate::lease::Drift;
use std::time::Duration;

/// The times of a protected machine. All hosts must agree on the drift bound and on `longest_offer`;
/// the term travels in the beat.
#[derive(Clone, Debug)]
pub struct Times {
    /// T: how long a machine may run after the renewal that its owner began last. A host that is
    /// lost is taken over after about T and a poll.
    pub term: Duration,
    /// How often the beat is renewed: the store may be silent for `term` less this before a machine
    /// stands still.
    pub renew_every: Duration,
    /// How often a taker looks.
    pub poll: Duration,
    /// Longest time until a freeze has taken effect: it is ordered this long before the term ends.
    pub stop_margin: Duration,
    /// A frozen machine is thawed only if at least this is left of its term (beyond `stop_margin`).
    pub start_margin: Duration,
    /// The longest offer that any source takes up (`switchover::Terms::longest_offer`).
    pub longest_offer: Duration,
    /// ρ.
    pub drift: Drift,
    /// First pause before a store that did not answer is asked again; doubles up to 10 times this.
    pub store_retry: Duration,
    /// One rule that a test breaks.
    #[cfg(test)]
    pub(crate) broken: Option<Rule>,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            term: Duration::from_secs(3),
            renew_every: Duration::from_secs(1),
            poll: Duration::from_millis(250),
            stop_margin: Duration::from_millis(100),
            start_margin: Duration::from_millis(200),
            longest_offer: crate::migrate::switchover::Terms::default().longest_offer,
            drift: Drift::default(),
            store_retry: Duration::from_millis(20),
            #[cfg(test)]
            broken: None,
        }
    }
}

impl Times {
    /// For a term that is renewed this often.
    #[must_use]
    pub fn of(term: Duration, renewal: Duration) -> Self {
        Self {
            term,
            renew_every: renewal,
            poll: (renewal / 2).clamp(Duration::from_millis(20), Duration::from_millis(250)),
            stop_margin: (term / 20).clamp(Duration::from_millis(20), Duration::from_millis(100)),
            start_margin: (term / 10).clamp(Duration::from_millis(40), Duration::from_millis(200)),
            ..Self::default()
        }
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

    /// How long a beat must be seen unchanged before it may be fenced.
    #[must_use]
    pub fn patience(&self, term: Duration) -> Duration {
        if !self.keeps(Rule::WaitTermOut) {
            return term / 2;
        }
        if self.keeps(Rule::WaitCoversDrift) { self.drift.outlast(term) } else { term }
    }
}

/// The rules that keep a protected machine in one place, each of which the simulator must miss when
/// broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// A term counts from the moment at which the renewal was first sent, not from its answer.
    CountFromSending,
    /// The machine stands still when its term ends.
    FreezeAtTermEnd,
    /// A taker waits until it has seen the beat unchanged for a term …
    WaitTermOut,
    /// … stretched for the drift of both clocks …
    WaitCoversDrift,
    /// … from the answer that showed it, not from the question.
    SeenWhenAnswered,
    /// The beat is fenced before the lease is taken.
    FenceBeforeTake,
    /// A fenced life ends: it renews nothing any more.
    FenceEndsLife,
    /// In a new life a machine runs only after its lease was got back.
    ReclaimBeforeRun,
    /// … and is not got back behind the back of a move.
    NoReclaimWhileMoving,
    /// A lease that is being handed over is taken only when no offer can hold any more.
    WaitForOffers,
    /// A machine that arrives is bound to its destination's term from the token on. (The runner's, in
    /// the simulator.)
    TermFromTheToken,
    /// Protection counts from the moment at which it was asked for.
    BoundFromSending,
    /// A machine that nobody looks after is given up only when all that was said of its term is over.
    GiveUpAfterTerm,
    /// Whoever comes back after that gets its lease back before the machine runs.
    GivenUpIsGotBack,
}
