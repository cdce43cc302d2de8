//! Who owned a device when. Epoch numbers mean the same on two sides as far as their histories
//! agree; where they part (an owner was lost and another went on from an earlier state), equal
//! numbers stand for different content.

use crate::{
    rounds::Epoch,
    session::messages::{MAX_TERMS, SessionId, Term},
};

/// The terms of a device, oldest first; `first` rises.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History(Vec<Term>);

impl History {
    /// From terms as a peer or a file tells them; `None` if there are too many, or their epochs do
    /// not rise.
    #[must_use]
    pub fn new(terms: Vec<Term>) -> Option<Self> {
        let rising = terms.windows(2).all(|pair| pair[0].first < pair[1].first);
        (rising && terms.len() <= MAX_TERMS).then_some(Self(terms))
    }

    /// The terms.
    #[must_use]
    pub fn terms(&self) -> &[Term] {
        &self.0
    }

    /// A new term. A term that made no epoch is replaced; of many, the oldest is forgotten.
    pub fn push(&mut self, term: Term) {
        while self.0.last().is_some_and(|last| last.first >= term.first) {
            self.0.pop();
        }
        if self.0.len() == MAX_TERMS {
            self.0.remove(0);
        }
        self.0.push(term);
    }

    /// The owner was set back to its durable state by a crash. What it gave to others since it
    /// opened round `shared` may hold writes that are lost: nobody's knowledge from then on counts.
    /// Whoever starts to share (a move, a backup) notes the open round durably before.
    pub fn restart(&mut self, id: SessionId, shared: Epoch) {
        self.push(Term { id, first: shared });
    }

    /// The newest epoch up to which this history, at `clock`, and another, at `theirs`, are the
    /// same; [`Epoch::BASE`] if they share no term.
    #[must_use]
    pub fn common(&self, clock: Epoch, other: &Self, theirs: Epoch) -> Epoch {
        let end = |history: &Self, at: usize, clock: Epoch| {
            history.0.get(at + 1).map_or(clock, |next| Epoch(next.first.0 - 1).min(clock))
        };
        for (at, term) in self.0.iter().enumerate().rev() {
            if let Some(there) = other.0.iter().position(|known| known == term) {
                return end(self, at, clock).min(end(other, there, theirs));
            }
        }
        Epoch::BASE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(terms: &[(u8, u32)]) -> History {
        let term =
            |(id, first): &(u8, u32)| Term { id: SessionId([*id; 16]), first: Epoch(*first) };
        History::new(terms.iter().map(term).collect()).unwrap()
    }

    #[test]
    fn histories_agree_up_to_where_they_part() {
        let common = |a: &[(u8, u32)], ca: u32, b: &[(u8, u32)], cb: u32| {
            let forward = history(a).common(Epoch(ca), &history(b), Epoch(cb));
            let backward = history(b).common(Epoch(cb), &history(a), Epoch(ca));
            assert_eq!(forward, backward);
            forward.0
        };
        assert_eq!(common(&[(1, 1)], 5, &[(1, 1)], 9), 5, "the same owner, later");
        assert_eq!(common(&[(1, 1)], 5, &[(1, 1), (2, 6)], 9), 5, "given away, and on");
        assert_eq!(common(&[(1, 1), (2, 6)], 9, &[(1, 1), (3, 6)], 7), 5, "two went on");
        assert_eq!(common(&[(1, 1)], 8, &[(1, 1), (3, 6)], 7), 5, "one was set back");
        assert_eq!(common(&[(1, 1)], 8, &[(2, 1)], 7), 0, "strangers");
        assert_eq!(common(&[], 0, &[(2, 1)], 7), 0, "untouched");
    }

    #[test]
    fn a_term_without_epochs_leaves_no_trace_and_the_length_is_bounded() {
        let mut terms = history(&[(1, 1), (2, 6)]);
        terms.push(Term { id: SessionId([3; 16]), first: Epoch(6) });
        assert_eq!(terms, history(&[(1, 1), (3, 6)]));
        for first in 7..200 {
            terms.push(Term { id: SessionId([4; 16]), first: Epoch(first) });
        }
        assert_eq!(terms.terms().len(), MAX_TERMS);
        let wrong = vec![Term { id: SessionId([1; 16]), first: Epoch(2) }; 2];
        assert!(History::new(wrong).is_none());
    }
}
