//! Runners that stand still or are gone for a while, on hosts whose sign of life goes on without them: its
//! keeper tells them nothing more, the guard freezes their machine at the end of what they were told, and the
//! keeper gives the machine up then (`tenure::surrender`).

use super::{
    terms::{TermEvent, Who},
    world::{Event, MS, Message, SECOND, World},
};
use crate::{
    lease::{BootTime, Epoch},
    migrate::switchover::{DestinationAuthority, SourceEvent},
    tenure::{HolderEvent, Surrender, SurrenderAction, SurrenderEvent, SurrenderParts, View},
};

/// What a keeper knows of the runner of its host.
#[derive(Default)]
pub(super) struct Neglect {
    /// It takes nothing in.
    hung: bool,
    /// How often it has hung: what was meant for one time means nothing the next.
    times: u64,
    /// It is told what the pulse says.
    deaf: bool,
    /// What happens to it meanwhile waits.
    held: Vec<Event>,
    /// The end of what it was told last.
    told_until: BootTime,
    pub(super) surrender: Option<Surrender>,
    pub(super) wake: Option<BootTime>,
    /// What was given up, or may have been.
    given: Option<Epoch>,
}

impl World {
    pub(super) fn neglect(&mut self) {
        for _ in 0..3 {
            if self.random.chance(self.faults / 2) {
                // Often in the middle of a move.
                let round = self.random.below(4) * 60 * SECOND;
                let when = round + self.random.between(SECOND, 6 * SECOND);
                let host = self.random.below(3) as usize;
                self.after(when, Event::Term(TermEvent::Hangs(host)));
            }
        }
    }

    /// The host whose hanging runner keeps this from happening.
    pub(super) fn is_held(&mut self, event: &Event) -> Option<usize> {
        let host = match event {
            Event::Source(m, _)
            | Event::MachinePaused(m, _)
            | Event::CrashRunner(m)
            | Event::RunnerBack(m)
            | Event::Arrives(m, Message::ToSource(_))
            | Event::Wake(m, 0, _) => self.moves[*m].from,
            Event::Arrives(m, _)
            | Event::Wake(m, ..)
            | Event::Destination(m, _)
            | Event::MachineLoaded(m, _) => self.moves[*m].to,
            Event::MachineFrozen(m) => {
                let mv = &self.moves[*m];
                if self.keepers[mv.to].neglect.hung && mv.freezing {
                    // The kernel does it all the same.
                    self.copies[mv.copy].frozen = true;
                }
                mv.to
            }
            Event::Joined(m) => {
                let mv = &self.moves[*m];
                let to = self.keepers[mv.to].neglect.hung;
                if to { mv.to } else { mv.from }
            }
            Event::Term(
                TermEvent::Wake(Who::Taker(host), _)
                | TermEvent::Taker(host, _)
                | TermEvent::Watch(host),
            ) => *host,
            Event::Term(
                TermEvent::Wake(Who::Holder(copy), _)
                | TermEvent::Holder(copy, _)
                | TermEvent::Starts(copy),
            ) => self.copies[*copy].host,
            _ => return None,
        };
        self.keepers[host].neglect.hung.then_some(host)
    }

    pub(super) fn hold_back(&mut self, host: usize, event: Event) {
        self.keepers[host].neglect.held.push(event);
    }

    pub(super) fn anyone_hangs(&self) -> bool {
        self.keepers.iter().any(|keeper| keeper.neglect.hung || keeper.neglect.deaf)
    }

    /// Whether the runner is told; notes until when.
    pub(super) fn is_told(&mut self, host: usize, view: Option<&View>) -> bool {
        let neglect = &mut self.keepers[host].neglect;
        if neglect.hung || neglect.deaf {
            return false;
        }
        self.was_told(host, view);
        true
    }

    pub(super) fn was_told(&mut self, host: usize, view: Option<&View>) {
        let told = &mut self.keepers[host].neglect.told_until;
        *told = (*told).max(view.map_or(BootTime::default(), |view| view.until));
    }

    pub(super) fn hangs(&mut self, host: usize) {
        let keeper = &mut self.keepers[host];
        if keeper.dead || keeper.neglect.hung || keeper.neglect.deaf {
            return;
        }
        keeper.neglect.hung = true;
        keeper.neglect.times += 1;
        let times = keeper.neglect.times;
        self.tally.hung += 1;
        self.tell(&format!("host {host}: its runner stands still"));
        // The guards are there, and know what they were told.
        for copy in 0..self.copies.len() {
            let theirs = self.copies[copy].host == host;
            let end = self.copies[copy].holder.as_ref().and_then(crate::tenure::Holder::freeze_at);
            if let Some(end) = end.filter(|_| theirs) {
                self.guarded_until(host, end, TermEvent::GuardFreezes(copy, times));
            }
        }
        for m in 0..self.moves.len() {
            let end = self.moves[m].destination.as_ref().and_then(DestinationAuthority::freeze_at);
            if let Some(end) = end.filter(|_| self.moves[m].to == host) {
                self.guarded_until(host, end, TermEvent::GuardEndsOffer(m, times));
            }
        }
        let parts = SurrenderParts {
            machine: self.machine.clone(),
            here: self.hosts[host].name.clone(),
            not_before: self.keepers[host].neglect.told_until,
            times: self.times(),
            nonces: self.nonces(),
        };
        self.keepers[host].neglect.surrender = Some(Surrender::new(parts));
        if self.broken_term == Some(crate::tenure::Rule::GiveUpAfterTerm) {
            self.surrenders(host, times, SurrenderEvent::Tick);
        }
        self.term_alarm(Who::Surrender(host, times));
        let lasts = if self.random.chance(50) { 3 * SECOND } else { 14 * SECOND };
        let lasts = self.random.between(10 * MS, lasts);
        self.after(lasts, Event::Term(TermEvent::GoesOn(host)));
    }

    fn guarded_until(&mut self, host: usize, end: BootTime, event: TermEvent) {
        let due = self.hosts[host].true_time(end);
        let late = self.random.below(2 * self.half_margin());
        self.at((due + late).max(self.now), Event::Term(event));
    }

    pub(super) fn guard_ends_term(&mut self, copy: usize, times: u64) {
        let neglect = &self.keepers[self.copies[copy].host].neglect;
        // It does so whatever its runner does meanwhile, unless that has told it of a later end.
        if (neglect.hung && neglect.times == times) || self.copies[copy].freeze_wanted {
            self.copies[copy].term_frozen = true;
        }
    }

    pub(super) fn guard_ends_offer(&mut self, m: usize, times: u64) {
        let neglect = &self.keepers[self.moves[m].to].neglect;
        if (neglect.hung && neglect.times == times) || self.moves[m].freezing {
            let copy = self.moves[m].copy;
            self.copies[copy].frozen = true;
        }
    }

    /// The runner goes on: what has waited happens to it, and it hears of its keeper, in either order.
    pub(super) fn goes_on(&mut self, host: usize) {
        let neglect = &mut self.keepers[host].neglect;
        if !neglect.hung {
            return;
        }
        if neglect.surrender.as_ref().is_some_and(|it| !it.may_be_dropped()) {
            // It is not let in while its lease is being written.
            return self.after(50 * MS, Event::Term(TermEvent::GoesOn(host)));
        }
        neglect.surrender = None;
        (neglect.hung, neglect.deaf) = (false, true);
        let held = std::mem::take(&mut neglect.held);
        self.tell(&format!("host {host}: its runner goes on"));
        let first = self.random.chance(50);
        if first {
            self.at(self.now, Event::Term(TermEvent::Welcomed(host)));
        }
        for event in held {
            self.at(self.now, event);
        }
        if !first {
            self.at(self.now, Event::Term(TermEvent::Welcomed(host)));
        }
    }

    pub(super) fn welcomed(&mut self, host: usize) -> Result<(), String> {
        let neglect = &mut self.keepers[host].neglect;
        neglect.deaf = false;
        if let Some(given) = neglect.given {
            // A move whose machine stands still before its token is given up (`migrate::source`).
            for m in 0..self.moves.len() {
                if self.moves[m].from == host && !self.moves[m].source_over {
                    self.source_event(m, SourceEvent::Cancel)?;
                }
            }
            for copy in 0..self.copies.len() {
                if self.copies[copy].host == host {
                    self.holder(copy, HolderEvent::GivenUp(given));
                }
            }
        }
        let view = self.view_of(host);
        self.tell_view(host, &view);
        Ok(())
    }

    pub(super) fn surrenders(&mut self, host: usize, times: u64, event: SurrenderEvent) {
        if self.keepers[host].neglect.times != times {
            // An answer to the question of an earlier one.
            return;
        }
        let now = self.local(host);
        let Some(surrender) = &mut self.keepers[host].neglect.surrender else { return };
        for action in surrender.on(now, event) {
            match action {
                SurrenderAction::Store(call) => self.ask(Who::Surrender(host, times), host, call),
                SurrenderAction::GivingUp(epoch) => {
                    let given = &mut self.keepers[host].neglect.given;
                    *given = (*given).max(Some(epoch));
                }
                SurrenderAction::Done(what) => {
                    self.tally.given_up += u64::from(what.starts_with("given up"));
                    self.tell(&format!("host {host}: {what}"));
                }
                SurrenderAction::Report(text) => self.tell(&format!("host {host}: {text}")),
            }
        }
        self.term_alarm(Who::Surrender(host, times));
    }
}
