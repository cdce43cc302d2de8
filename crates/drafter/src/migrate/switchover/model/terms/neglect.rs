//! A runner that stands still while its host's sign of life goes on, as that of a host with other machines
//! does: the keeper tells it nothing more, its guard freezes the machine at the end of what it was told, and
//! the keeper gives it up then (`tenure::surrender`). It may go on at any time.

use super::world::{OWNER, Who, World, host, machine};
use crate::{
    lease::{BootTime, Epoch},
    tenure::{
        HolderEvent, Rule, Surrender, SurrenderAction, SurrenderEvent, SurrenderParts, Times, View,
    },
};
use std::sync::Arc;

/// What the owner's keeper knows of the machine's runner.
#[derive(Clone, Default)]
pub(super) struct Neglect {
    /// How often it may still begin to stand still.
    pub(super) hangs: u8,
    /// It takes nothing in.
    pub(super) hung: bool,
    /// It goes on, and has not heard from its keeper yet.
    pub(super) deaf: bool,
    /// The end of what it was told last.
    pub(super) told_until: BootTime,
    pub(super) surrender: Option<Arc<Surrender>>,
    /// What was given up, or may have been.
    pub(super) given: Option<Epoch>,
}

impl Neglect {
    /// Whether it is let in again.
    pub(super) fn may_go_on(&self) -> bool {
        let dropped = self.surrender.as_ref().is_none_or(|surrender| surrender.may_be_dropped());
        self.hung && dropped
    }

    /// Whether it is told what the pulse says; notes until when.
    pub(super) fn is_told(&mut self, view: Option<&View>) -> bool {
        let hears = !self.hung && !self.deaf;
        if hears && let Some(view) = view {
            self.told_until = self.told_until.max(view.until);
        }
        hears
    }
}

impl World {
    pub(super) fn may_hang(&self) -> bool {
        let Neglect { hangs, hung, deaf, .. } = self.neglect;
        let watched = self.holders[OWNER].is_some() && self.pulses[OWNER].is_some();
        hangs > 0 && !hung && !deaf && watched
    }

    /// Its guard must act, before anything else in that instant.
    pub(super) fn must_guard(&self) -> bool {
        let end = self.holders[OWNER].as_ref().and_then(|holder| holder.freeze_at());
        let over = end.is_some_and(|end| self.now[OWNER] >= end);
        self.neglect.hung && over && !self.copies[OWNER].term_frozen
    }

    pub(super) fn hangs(&mut self) {
        let parts = SurrenderParts {
            machine: machine(),
            here: host(OWNER),
            not_before: self.neglect.told_until,
            times: Times::clone(&self.times),
            nonces: self.nonces(),
        };
        self.neglect.hangs -= 1;
        self.neglect.hung = true;
        self.neglect.surrender = Some(Arc::new(Surrender::new(parts)));
        if self.times.broken == Some(Rule::GiveUpAfterTerm) {
            self.surrender_event(SurrenderEvent::Tick);
        }
    }

    pub(super) fn goes_on(&mut self) {
        let neglect = &mut self.neglect;
        (neglect.hung, neglect.deaf, neglect.surrender) = (false, true, None);
    }

    pub(super) fn welcomed(&mut self) {
        self.neglect.deaf = false;
        if let Some(given) = self.neglect.given {
            self.holder_event(OWNER, HolderEvent::GivenUp(given));
        }
        let view = self.view(OWNER);
        self.neglect.is_told(view.as_ref());
        self.holder_event(OWNER, HolderEvent::View(view));
    }

    pub(super) fn surrender_event(&mut self, event: SurrenderEvent) {
        let now = self.now[OWNER];
        let Some(surrender) = &mut self.neglect.surrender else { return };
        for action in Arc::make_mut(surrender).on(now, event) {
            match action {
                SurrenderAction::Store(call) => self.ask(Who::Surrender, call),
                SurrenderAction::GivingUp(epoch) => {
                    self.neglect.given = self.neglect.given.max(Some(epoch));
                }
                SurrenderAction::Done(_) | SurrenderAction::Report(_) => {}
            }
        }
    }
}
