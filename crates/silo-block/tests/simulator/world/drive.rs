//! The drivers of both ends: they do what the machines ask for.

use super::{Broken, Checked, Ev, World};
use crate::host::Storing;
use silo_block::{
    rounds::Epoch,
    session::{
        destination::{self, WaiterId},
        messages::{BlockHeader, SessionId, Term, ToDestination},
        source,
    },
};
use std::time::Duration;

impl World {
    pub(super) fn pump(&mut self, host: usize) -> Checked {
        for _ in 0..10_000 {
            let now = self.time();
            if !self.hosts[host].up {
                return Ok(());
            }
            if let Some(action) = self.hosts[host].source.as_mut().and_then(|s| s.poll(now)) {
                self.do_source(host, action)?;
                continue;
            }
            if let Some(action) = self.hosts[host].destination.as_mut().and_then(|d| d.poll(now)) {
                self.do_destination(host, action)?;
                continue;
            }
            let source = self.hosts[host].source.as_ref().and_then(|s| s.wake(now));
            let destination = self.hosts[host].destination.as_ref().and_then(|d| d.wake(now));
            if let Some(at) = source.into_iter().chain(destination).min() {
                let (at, life) =
                    ((at.as_micros() as u64).max(self.now + 50), self.hosts[host].life);
                if at < self.hosts[host].wakes {
                    self.hosts[host].wakes = at;
                    self.at(at - self.now, Ev::Poll(host, life));
                }
            }
            return Ok(());
        }
        Err(format!("host {host} never stops acting: {}", self.describe()))
    }

    fn do_source(&mut self, host: usize, action: source::Action) -> Checked {
        use source::{Action, Event};
        let (now, life) = (self.time(), self.hosts[host].life);
        if self.loud {
            println!("         source {host}: {action:?}");
        }
        match action {
            Action::Send(link, message) => {
                if matches!(message, ToDestination::Token { .. }) {
                    self.outcome.tokens += 1;
                }
                self.send(link, 0, Ev::ToDestination(link, message));
            }
            Action::Blocks(link, header) => {
                let BlockHeader { device, range, .. } = header;
                if !self.hosts[host].replica(device).is_here(range) {
                    return Err(format!("host {host} sends {range:?} of {device}: not here"));
                }
                let range = range.start.0 as usize..range.end() as usize;
                let content = self.hosts[host].content[device.0 as usize][range].to_vec();
                if self.lines.get(&link).is_some_and(|line| line.up) {
                    self.soon(3_000, Ev::Data(link, header, content));
                }
            }
            Action::CloseRound => {
                self.hosts[host].closing = true;
                self.soon(300, Ev::CloseRound(host, life));
            }
            Action::Quiesce(ticket) => {
                self.hosts[host].pausing = Some(ticket);
                self.guest.paused = true;
                self.soon(300, Ev::Pause(host, life, ticket));
            }
            Action::Resume => {
                self.hosts[host].pausing = None;
                self.hosts[host].disk.handed = None;
                self.hosts[host].disk.owner = true;
                if self.guest.host == Some(host) {
                    self.resume_guest(host)?;
                } else {
                    let term = Term { id: self.session(), first: Epoch::BASE };
                    for device in self.hosts[host].devices() {
                        let replica = self.hosts[host].replica_mut(device);
                        replica.reclaim(term, Duration::ZERO).map_err(|e| e.to_string())?;
                        self.hosts[host].note(device);
                    }
                    self.boot_guest(host)?;
                }
            }
            Action::Pull(device, range, class) => match &mut self.hosts[host].destination {
                Some(d) => d.handle(now, destination::Event::Want(device, range, class)),
                None => {
                    let arrived = Event::Arrived(device, range);
                    self.hosts[host].source.iter_mut().for_each(|s| s.handle(now, arrived.clone()));
                }
            },
            Action::HandedOver => {
                for device in self.hosts[host].devices() {
                    if let Some((_, epochs)) = &self.hosts[host].disk.handed {
                        let last = epochs[device.0 as usize];
                        self.hosts[host].replica_mut(device).give_away(last);
                    }
                }
            }
            Action::Released => {
                self.outcome.releases += 1;
                if self.now < self.troubled_until
                    && self.random.chance(30)
                    && let Some(owner) = self.guest.host
                {
                    // Now nobody else has what it says is durable.
                    self.soon(1_500, Ev::Crash(owner));
                }
                self.end_source(host);
                self.hosts[host].disk.handed = None;
                let free = self.hosts[host].destination.is_none();
                if free && self.random.chance(40) {
                    let sizes = self.sizes.clone();
                    self.hosts[host].wipe(&sizes);
                    self.outcome.wiped += 1;
                } else {
                    self.hosts[host].disk.owner = false;
                    self.hosts[host].devices().for_each(|device| self.hosts[host].note(device));
                }
            }
            Action::Failed(_) => {
                self.outcome.failures += 1;
                self.end_source(host);
            }
            Action::Hangup(link) => self.cut(link),
            Action::Custom(_) | Action::Overdue(_) | Action::Undecided => {}
        }
        Ok(())
    }

    /// The source is gone for good: whoever received from it and has no token stops.
    fn end_source(&mut self, host: usize) {
        let Some(source) = self.hosts[host].source.take() else { return };
        let released = *source.phase() == source::Phase::Released;
        self.outcome.spared += source.counters().spared;
        self.end_session(source.session(), released);
    }

    pub(super) fn end_session(&mut self, session: SessionId, released: bool) {
        let Some(of) = self.moves.iter().position(|of| of.session == session && !of.over) else {
            return;
        };
        let to = self.moves[of].to;
        if let Some(link) = self.moves[of].link {
            self.cut(link);
        }
        let ours = self.hosts[to].disk.received.is_some_and(|(known, _)| known == session);
        let now = self.time();
        if !released && ours {
            // What the control plane does when a move has failed.
            if let Some(destination) = &mut self.hosts[to].destination {
                destination.handle(now, destination::Event::Cancel("its source gave up".into()));
            } else if !self.hosts[to].up && self.hosts[to].disk.received == Some((session, None)) {
                self.hosts[to].disk.received = None;
            }
        }
        self.moves[of].over = !released || !ours || self.hosts[to].destination.is_none();
        let life = self.hosts[to].life;
        self.at(0, Ev::Poll(to, life));
    }

    fn do_destination(&mut self, host: usize, action: destination::Action) -> Checked {
        use destination::{Action, Event};
        let (now, life) = (self.time(), self.hosts[host].life);
        if self.loud {
            println!("         destination {host}: {action:?}");
        }
        match action {
            Action::Send(link, message) => self.send(link, 1, Ev::ToSource(link, message)),
            Action::Note(device) => {
                if self.broken != Broken::ListsAreNotNoted {
                    self.hosts[host].note(device);
                }
            }
            Action::Store { slot, device, parts } => {
                let (_, range, content) = self.hosts[host].slots.remove(&slot).expect("a slot");
                let storing = Storing { device, range, content, parts };
                // One half now, the other when it is said to be stored.
                storing.put(&mut self.hosts[host], 0);
                self.hosts[host].storing.insert(slot, storing);
                self.soon(400, Ev::Stored(host, life, slot));
            }
            Action::Discard(slot) => {
                let dropped = self.hosts[host].slots.remove(&slot);
                if let Some((device, range, content)) = dropped
                    && self.broken == Broken::LateContentIsTaken
                {
                    let storing = Storing { device, range, content, parts: vec![range] };
                    storing.put(&mut self.hosts[host], 0);
                    storing.put(&mut self.hosts[host], 1);
                }
            }
            Action::Here(device, ranges) => {
                for range in ranges {
                    let event = source::Event::Arrived(device, range);
                    self.hosts[host].source.iter_mut().for_each(|s| s.handle(now, event.clone()));
                }
            }
            Action::Wake(waiters) => {
                for WaiterId(op) in waiters {
                    if self.guest.host == Some(host) && !self.guest.paused {
                        self.attempt(op)?;
                    }
                }
            }
            Action::Fail(waiters, _) => {
                for WaiterId(op) in waiters {
                    self.guest.ops.remove(&op);
                }
            }
            Action::Run { attempt, flushes, .. } => {
                let busy = self.guest.host.is_some_and(|at| at == host || !self.guest.paused);
                if busy {
                    return Err(format!("two owners: {host} and {:?}", self.guest.host));
                }
                let (session, _) = self.hosts[host].disk.received.expect("it receives");
                for device in self.hosts[host].devices() {
                    if self.broken == Broken::StoredCountsAsDurable {
                        self.hosts[host].replica_mut(device).sync_begins();
                        self.hosts[host].replica_mut(device).sync_ends(true);
                    }
                    self.hosts[host].note(device);
                }
                let disk = &mut self.hosts[host].disk;
                (disk.owner, disk.received) = (true, Some((session, Some(attempt))));
                (disk.shared, disk.handed) = (None, None);
                let again: u64 = flushes.iter().map(|of| of.len() as u64).sum();
                self.outcome.reissued += again;
                self.guest.host = Some(host);
                self.hosts[host].destination.iter_mut().for_each(|d| d.handle(now, Event::Ran));
                self.resume_guest(host)?;
            }
            Action::Fetch { ticket, device, range, .. } => {
                self.soon(3_000, Ev::Fetched(host, life, ticket, device, range));
            }
            Action::MakeDurable => {
                if self.broken != Broken::DurableIsNotDurable {
                    self.hosts[host].persist();
                    self.hosts[host].note_promises();
                }
                let event = Event::MadeDurable;
                self.hosts[host].destination.iter_mut().for_each(|d| d.handle(now, event.clone()));
            }
            Action::Complete | Action::Failed(_) => {
                self.count(host);
                let (session, _) = self.hosts[host].disk.received.expect("it receives");
                let failed = matches!(action, Action::Failed(_));
                if failed {
                    self.hosts[host].disk.received = None;
                }
                self.hosts[host].dissolve();
                for of in self.moves.iter_mut().filter(|of| of.session == session) {
                    let source = &self.hosts[of.from].source;
                    of.over |= source.as_ref().is_none_or(|s| s.session() != session);
                }
                if !failed {
                    self.hosts[host].persist();
                }
            }
            Action::Hangup(link) => self.cut(link),
            Action::Custom(_)
            | Action::Overdue(_)
            | Action::Trouble(_)
            | Action::CancelFetch(_) => {}
        }
        Ok(())
    }

    pub(super) fn count(&mut self, host: usize) {
        if let Some(destination) = &self.hosts[host].destination {
            let counters = destination.counters();
            self.outcome.late += counters.late;
            self.outcome.early += counters.again;
            self.outcome.from_store += counters.from_store;
            self.outcome.store_wrong += counters.store_wrong;
            self.outcome.store_late += counters.store_late;
            self.outcome.early_writes += counters.written;
        }
    }
}
