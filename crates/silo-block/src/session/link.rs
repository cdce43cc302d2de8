//! What both ends keep of a connection, and custom events that survive it.

use super::messages::Custom;
use std::{collections::VecDeque, time::Duration};

/// A set of connections that belong together, made by one handshake of the transport. Numbers are
/// chosen by the driver and never used twice in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// Times after which an end stops waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// A link over which nothing comes for so long is taken for cut. Both ends say something at
    /// least three times in it.
    pub silence: Duration,
    /// How long a cut may last, and how long an answer may take, before the session ends where it
    /// can end, or says that it is overdue where it cannot.
    pub answer: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { silence: Duration::from_secs(5), answer: Duration::from_secs(60) }
    }
}

/// The link that is used now.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) id: LinkId,
    /// Both sides have said what they have.
    pub(super) ready: bool,
    pub(super) heard: Duration,
    pub(super) said: Duration,
}

impl Link {
    pub(super) fn new(id: LinkId, now: Duration) -> Self {
        Self { id, ready: false, heard: now, said: now }
    }
}

/// Custom events: sent until the other side says that it has handled them, handled once, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Customs {
    sent: u32,
    outbox: VecDeque<Custom>,
    /// The newest that was handed up, and the newest that the layer above has handled.
    taken: u32,
    handled: u32,
}

/// Most custom events under way.
const OUTBOX: usize = 256;

impl Customs {
    /// A new one; `None` if too many are under way.
    pub(super) fn post(&mut self, kind: u32, payload: Vec<u8>) -> Option<Custom> {
        if self.outbox.len() == OUTBOX {
            return None;
        }
        self.sent += 1;
        let custom = Custom { serial: self.sent, kind, payload };
        self.outbox.push_back(custom.clone());
        Some(custom)
    }

    /// All that the other side has not handled yet, for a new link.
    pub(super) fn unanswered(&self) -> impl Iterator<Item = &Custom> {
        self.outbox.iter()
    }

    /// The other side has handled all up to `serial`.
    pub(super) fn done(&mut self, serial: u32) {
        while self.outbox.front().is_some_and(|custom| custom.serial <= serial) {
            self.outbox.pop_front();
        }
    }

    /// One came. True if it is to be handed up; false if it was before, is not its turn, or comes
    /// from a peer that does not wait for answers: what waits here is bounded.
    pub(super) fn take(&mut self, serial: u32) -> bool {
        let room = self.taken - self.handled < OUTBOX as u32;
        let turn = room && self.taken.checked_add(1) == Some(serial);
        self.taken += u32::from(turn);
        turn
    }

    /// The layer above has handled one.
    pub(super) fn handled(&mut self, serial: u32) {
        self.handled = self.handled.max(serial.min(self.taken));
    }

    /// Whether one that came was handled before, so that the answer got lost.
    pub(super) fn is_handled(&self, serial: u32) -> bool {
        serial <= self.handled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_does_not_wait_for_answers_has_no_more_handed_up_than_one_that_does() {
        let mut customs = Customs::default();
        let taken =
            |customs: &mut Customs| (1..5000).filter(|serial| customs.take(*serial)).count();
        assert_eq!(taken(&mut customs), OUTBOX);
        customs.handled(3);
        assert_eq!(taken(&mut customs), 3, "as many as were handled");
        assert!(customs.is_handled(3) && !customs.is_handled(4));
    }
}
