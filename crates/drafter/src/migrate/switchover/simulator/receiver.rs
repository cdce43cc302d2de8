//! A destination whose runner dies while its monitor lives: what the guard does then, and the runner that
//! comes after it (`runner::guard`, `runner::take_over`).

use super::world::{Event, MS, SECOND, World};
use crate::{
    lease::{BootTime, Nonce, Outcome, Record},
    migrate::switchover::{
        DestinationAuthority, DestinationEvent, DestinationParts, DestinationState, terms::Rule,
    },
};

type Checked = Result<(), String>;

/// What outlives a destination's runner: the guard with its page.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Left {
    /// Until when the machine may run, by its host's clock.
    until: Option<BootTime>,
    /// The lease was asked for.
    asked: bool,
}

impl World {
    /// The destination's runner dies; the machine stays as it is, and what was sent stays sent.
    pub(super) fn crash_receiver(&mut self, m: usize) {
        let mv = &mut self.moves[m];
        let Some(destination) = mv.destination.take() else { return };
        let state = destination.state();
        mv.to_do.clear();
        // What it had begun takes effect.
        self.copies[mv.copy].frozen |= std::mem::take(&mut mv.freezing);
        mv.link.cut = true;
        mv.left = Left {
            until: destination.freeze_at(),
            asked: matches!(
                state,
                DestinationState::Unconfirmed | DestinationState::FrozenUnconfirmed
            ),
        };
        let (until, host) = (mv.left.until, mv.to);
        self.tell(&format!("{m} the destination's runner dies, {state:?}"));
        self.tally.receivers_died += 1;
        self.peer_lost(m, 0);
        if let Some(until) = until.filter(|_| self.terms.keeps(Rule::GuardOutlivesRunner)) {
            let due = self.hosts[host].true_time(until);
            // As late as a freeze may be, and as late as the guard may wake: from the end of the offer, also
            // where the runner died after it. The guard was there all the time.
            let late = self.random.below(2 * self.half_margin());
            self.at((due + late).max(self.now), Event::GuardFreezes(m));
        }
        let back = self.random.between(10 * MS, 5 * SECOND);
        self.after(back, Event::ReceiverBack(m));
    }

    pub(super) fn guard_freezes(&mut self, m: usize) {
        let mv = &self.moves[m];
        let copy = mv.copy;
        if mv.left.until.is_some() {
            self.tell(&format!("{m} the guard freezes it"));
            self.tally.guarded += u64::from(self.copies[copy].executes());
            self.copies[copy].frozen = true;
        }
    }

    /// The next runner is there, and asks the store until it answers.
    pub(super) fn receiver_back(&mut self, m: usize) {
        let mv = &self.moves[m];
        let copy = &self.copies[mv.copy];
        if copy.crashed || copy.discarded {
            return;
        }
        if !self.store.up {
            return self.after(100 * MS, Event::ReceiverBack(m));
        }
        let read = self.random.between(MS, 50 * MS);
        let found = self.store.record.clone();
        self.after(read, Event::ReceiverDecides(m, found));
    }

    /// By the lease as it was a moment ago.
    pub(super) fn receiver_decides(&mut self, m: usize, found: Record) -> Checked {
        let mv = &self.moves[m];
        let (to, attempt, left) = (mv.to, mv.attempt, mv.left);
        let here = self.hosts[to].name.clone();
        if self.copies[mv.copy].crashed {
            return Ok(());
        }
        let owned = |record: &Record| {
            record.owner == here && record.handing_to.is_none() && record.attempt == attempt
        };
        let handed = found
            .handing_to
            .as_ref()
            .is_some_and(|handing| handing.to == here && handing.attempt == attempt);
        let asked = left.asked || !self.terms.keeps(Rule::SuccessorTakesWhatWasAsked);
        if owned(&found) {
            return self.receiver_owns(m, found);
        }
        if handed && asked && self.terms.keeps(Rule::SuccessorAsksOn) {
            let nonce = Nonce(u128::from(self.random.next()));
            let new = found.taken(here.clone(), attempt, nonce);
            match self.store.replace(&found, &new)? {
                Outcome::Won => return self.receiver_owns(m, new),
                Outcome::Lost(Some(now)) if owned(&now) => return self.receiver_owns(m, now),
                Outcome::Lost(_) => {}
            }
        }
        self.tell(&format!("{m} the destination's next runner ends the copy"));
        let copy = self.moves[m].copy;
        self.copies[copy].discarded = true;
        Ok(())
    }

    fn receiver_owns(&mut self, m: usize, record: Record) -> Checked {
        self.tell(&format!("{m} the destination's next runner goes on at {}", record.epoch));
        self.tally.receivers_back += 1;
        let nonces = self.nonces();
        let mv = &mut self.moves[m];
        mv.left = Left::default();
        // It does not know what the source owes, nor what it has said of it, and waits for it.
        (mv.flush_owed, mv.flush_durable) = (true, false);
        let parts = DestinationParts {
            machine: self.machine.clone(),
            here: self.hosts[mv.to].name.clone(),
            from: self.hosts[mv.from].name.clone(),
            attempt: mv.attempt,
            beat: None,
            terms: self.terms.clone(),
            nonces,
        };
        let copy = &mut self.copies[mv.copy];
        copy.epoch = record.epoch;
        (copy.frozen, copy.running, copy.unconfirmed_until) = (false, true, None);
        mv.destination = Some(DestinationAuthority::owner(parts, record));
        self.set_alarm(m, 1);
        if self.moves[m].all_present {
            return self.destination_event(m, DestinationEvent::AllPresent);
        }
        self.joined(m)
    }
}
