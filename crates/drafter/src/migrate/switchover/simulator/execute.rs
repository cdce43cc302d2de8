//! What happens when something happens: events reach the state machines, and their actions are
//! done, as the runner would do them.

use super::world::{Event, MS, Message, SECOND, World};
use crate::{
    lease::Outcome,
    migrate::switchover::{
        DestinationAction, DestinationAuthority, DestinationEvent, DestinationState, LeaseAnswer,
        LeaseCall, SourceAction, SourceAuthority, SourceEvent, SourceState,
    },
    tenure::HolderEvent,
};

type Checked = Result<(), String>;

impl World {
    pub(super) fn happens(&mut self, event: Event) -> Checked {
        if let Some(host) = self.is_held(&event) {
            self.hold_back(host, event);
            return Ok(());
        }
        match event {
            Event::StartMove => return self.start_move(),
            Event::Source(m, event) => return self.source_event(m, event),
            Event::Destination(m, event) => return self.destination_event(m, event),
            Event::Arrives(m, message) => return self.arrives(m, message),
            Event::Wake(m, end, at) => {
                if !self.rings(m, end, at) {
                    return Ok(());
                }
                return if end == 0 {
                    self.source_event(m, SourceEvent::Tick)
                } else {
                    self.destination_event(m, DestinationEvent::Tick)
                };
            }
            Event::StoreApplies(m, end, call, answered) => {
                return self.store_applies(m, end, &call, answered);
            }
            Event::MachinePaused(m, fails) => return self.machine_paused(m, fails),
            Event::MachineLoaded(m, fails) => self.machine_loaded(m, fails),
            Event::MachineFrozen(m) if !self.moves[m].freezing => {}
            Event::MachineFrozen(m) => {
                let mv = &mut self.moves[m];
                mv.freezing = false;
                self.copies[mv.copy].frozen = true;
                return self.do_destination(m);
            }
            Event::Cut(m) => self.cut(m),
            Event::Joined(m) => return self.joined(m),
            // Of a protected machine the whole host dies: `TermEvent::Dies`.
            Event::CrashHost(m, end) if !self.protected => self.crash_host(m, end),
            Event::CrashHost(..) => {}
            Event::CrashRunner(m) => self.crash_runner(m),
            Event::RunnerBack(m) => return self.runner_back(m),
            Event::CrashReceiver(m) => self.crash_receiver(m),
            Event::ReceiverBack(m) => self.receiver_back(m),
            Event::ReceiverDecides(m, found) => return self.receiver_decides(m, found),
            Event::GuardFreezes(m) => self.guard_freezes(m),
            Event::Term(event) => return self.term_happens(event),
            Event::StoreGoes(up) => {
                self.tell(if up { "the store is up" } else { "the store is down" });
                self.store.up = up;
            }
        }
        Ok(())
    }

    fn arrives(&mut self, m: usize, message: Message) -> Checked {
        let link = &self.moves[m].link;
        if link.ordered && link.cut {
            return Ok(());
        }
        match message {
            Message::ToDestination(DestinationEvent::SourceDurable)
                if self.copies[self.moves[m].source_copy].crashed =>
            {
                Ok(())
            }
            Message::ToSource(_) if self.moves[m].source_deaf => Ok(()),
            Message::ToSource(event) => self.source_event(m, event),
            Message::ToDestination(event) => {
                if event == DestinationEvent::AllPresent {
                    self.moves[m].all_present = true;
                }
                self.destination_event(m, event)
            }
        }
    }

    pub(super) fn source_event(&mut self, m: usize, event: SourceEvent) -> Checked {
        let now = self.local(self.moves[m].from);
        let Some(source) = &mut self.moves[m].source else { return Ok(()) };
        let before = source.state();
        let text = format!("{m} source  {before:?} ← {event:?}");
        let actions = source.on(now, event);
        let after = source.state();
        if before != after || !actions.is_empty() {
            self.tell(&format!("{text} → {after:?}"));
        }
        if matches!(after, SourceState::ServingPages(_)) && before == SourceState::TakingBack {
            self.tally.served_after_expiry += 1;
        }
        self.do_source(m, actions)?;
        self.set_alarm(m, 0);
        self.tell_source_holder(m, after);
        Ok(())
    }

    /// The runner tells the holder what became of its lease.
    fn tell_source_holder(&mut self, m: usize, state: SourceState) {
        let mv = &self.moves[m];
        let copy = mv.source_copy;
        let Some(source) = mv.source.as_ref().filter(|_| self.protected) else { return };
        let record = source.holding().record;
        let known = self.copies[copy].holder.as_ref().map(|holder| holder.record().clone());
        let over =
            matches!(state, SourceState::Aborted | SourceState::Resumed(_) | SourceState::Stopped);
        match state {
            SourceState::ServingPages(_) | SourceState::Released => {
                self.copies[copy].holder = None;
            }
            // Said once: later the lease is the holder's again.
            _ if mv.source_over => {}
            _ => {
                let stays = state != SourceState::Stopped;
                if stays && known.is_some_and(|known| known != record) {
                    self.holder(copy, HolderEvent::Holds(record));
                }
                if over {
                    self.moves[m].source_over = true;
                    self.holder(copy, HolderEvent::Moving(false));
                }
            }
        }
    }

    fn do_source(&mut self, m: usize, actions: Vec<SourceAction>) -> Checked {
        for action in actions {
            let mv = &mut self.moves[m];
            match action {
                SourceAction::Lease(call) => self.ask_store(m, 0, call),
                SourceAction::PauseMachine { .. } => {
                    mv.pausing = true;
                    let slow = self.random.chance(5);
                    let mut time = self.random.between(MS, if slow { 7 * SECOND } else { 60 * MS });
                    if self.protected && self.random.chance(self.faults / 4) {
                        time = self.lose_store_in_pause(m);
                    }
                    let fails = self.random.chance(3);
                    self.after(time, Event::MachinePaused(m, fails));
                }
                SourceAction::SendToken(token) => {
                    self.check_token(m, &token)?;
                    let mv = &self.moves[m];
                    if mv.link.ordered && mv.link.cut {
                        if self.random.chance(50) {
                            self.after(0, Event::Source(m, SourceEvent::TokenNotSent));
                        }
                        continue;
                    }
                    let owed = token.flush_owed;
                    let event = DestinationEvent::Token(token);
                    self.send(m, &Message::ToDestination(event));
                    if owed {
                        // The disks of the source sync, and it says so.
                        let sync = self.random.between(MS, 3 * SECOND);
                        self.after(
                            sync,
                            Event::Arrives(
                                m,
                                Message::ToDestination(DestinationEvent::SourceDurable),
                            ),
                        );
                    }
                }
                SourceAction::ResumeHere { epoch, .. } => {
                    self.tell(&format!("{m} the machine runs at its source at {epoch}"));
                    let mv = &mut self.moves[m];
                    if mv.pausing {
                        mv.resume_when_paused = true;
                    }
                    let copy = &mut self.copies[mv.source_copy];
                    (copy.running, copy.epoch) = (true, epoch);
                    match mv.source.as_ref().map(SourceAuthority::state) {
                        Some(SourceState::Resumed(_)) => self.tally.taken_back += 1,
                        _ => self.tally.aborted += 1,
                    }
                }
                SourceAction::SendCancel { .. } => {
                    self.send(m, &Message::ToDestination(DestinationEvent::Cancel));
                }
                SourceAction::StayPaused { why } => {
                    let copy = mv.source_copy;
                    let holds = self.copies[copy].epoch;
                    let taken = self.store.record.epoch > holds
                        && self.store.record.owner != self.hosts[self.copies[copy].host].name;
                    // Of a protected machine somebody else may be the owner.
                    if !(self.protected && taken) {
                        return Err(format!(
                            "the source gave up although the store is sound: {why}"
                        ));
                    }
                    self.copies[copy].running = false;
                    self.tally.taken_from_source += 1;
                }
                SourceAction::Release => {
                    let copy = &mut self.copies[mv.source_copy];
                    copy.discarded = true;
                    self.tally.moved += 1;
                }
                SourceAction::ServePages | SourceAction::Report(_) => {}
            }
        }
        Ok(())
    }

    pub(super) fn destination_event(&mut self, m: usize, event: DestinationEvent) -> Checked {
        if event == DestinationEvent::SourceDurable {
            self.moves[m].flush_durable = true;
        }
        let now = self.local(self.moves[m].to);
        let Some(destination) = &mut self.moves[m].destination else { return Ok(()) };
        let before = destination.state();
        let text = format!("{m} destin. {before:?} ← {event:?}");
        let actions = destination.on(now, event);
        let after = destination.state();
        let offers_only = actions.iter().all(|a| matches!(a, DestinationAction::SendOffer(_)));
        if before != after || !offers_only {
            self.tell(&format!("{text} → {after:?}"));
        }
        self.tally.frozen +=
            u64::from(after == DestinationState::FrozenUnconfirmed && after != before);
        self.tally.lost_to_source += u64::from(after == DestinationState::Lost && after != before);
        if let DestinationAction::SendOffer(offer) =
            actions.first().unwrap_or(&DestinationAction::Discard)
        {
            self.moves[m].offers.insert(offer.serial, now + offer.good_for);
        }
        self.moves[m].to_do.extend(actions);
        self.do_destination(m)?;
        let refuses = (before, after) == (DestinationState::Loading, DestinationState::Refused);
        if refuses && !self.protected && self.random.chance(self.faults / 4) {
            // Before it has ended the copy that it refused.
            let soon = self.random.below(self.half_margin());
            self.after(soon, Event::CrashReceiver(m));
        }
        self.set_alarm(m, 1);
        Ok(())
    }

    fn do_destination(&mut self, m: usize) -> Checked {
        while !self.moves[m].freezing {
            let Some(action) = self.moves[m].to_do.pop_front() else { break };
            let copy = self.moves[m].copy;
            match action {
                DestinationAction::SendOffer(offer) => {
                    self.send(m, &Message::ToSource(SourceEvent::Offer(offer)));
                }
                DestinationAction::LoadAndRun => {
                    if self.protected {
                        self.find_store_again(self.moves[m].to);
                        let (to, life) = (self.moves[m].to, self.moves[m].life.clone());
                        let record = self.store.record.clone();
                        debug_assert_eq!(self.copies[copy].host, to);
                        self.hold(copy, record, Some(life));
                        let now = self.local(to);
                        let may = self.copies[copy].holder.as_ref().is_none_or(|h| h.may_run(now));
                        if !may {
                            // The source had better go on at once.
                            let why = "this host's term has ended".to_owned();
                            let event = DestinationEvent::LoadFailed(why);
                            self.after(0, Event::Destination(m, event));
                            continue;
                        }
                    }
                    self.copies[copy].unconfirmed_until = self.token_ends(m);
                    let slow = self.random.chance(8);
                    let time = self.random.between(MS, if slow { 4 * SECOND } else { 150 * MS });
                    let fails = self.random.chance(3);
                    self.after(time, Event::MachineLoaded(m, fails));
                }
                DestinationAction::SendRefused { attempt, why } => {
                    self.tally.refused += 1;
                    self.send(m, &Message::ToSource(SourceEvent::Refused { attempt, why }));
                }
                DestinationAction::Lease(call) => self.ask_store(m, 1, call),
                DestinationAction::Resume { epoch, .. } => {
                    let copy = &mut self.copies[copy];
                    copy.epoch = copy.epoch.max(epoch);
                    copy.unconfirmed_until = None;
                    if self.protected {
                        let owned = self.moves[m]
                            .destination
                            .as_ref()
                            .and_then(DestinationAuthority::holding);
                        let index = self.moves[m].copy;
                        if let Some(holding) = owned {
                            self.holder(index, HolderEvent::Holds(holding.record));
                            self.holder(index, HolderEvent::Moving(false));
                        }
                    }
                }
                DestinationAction::ReleaseOutput { epoch } => {
                    self.check_output(m)?;
                    let copy = &mut self.copies[copy];
                    // It may have been got back in a new life meanwhile.
                    (copy.output, copy.epoch) = (true, copy.epoch.max(epoch));
                }
                DestinationAction::FreezeNow => {
                    self.moves[m].freezing = true;
                    // Half of the time as late as it may be.
                    let most = self.half_margin();
                    let late = if self.random.chance(50) { most } else { self.random.below(most) };
                    self.after(late, Event::MachineFrozen(m));
                }
                DestinationAction::Thaw => {
                    self.tally.thawed += 1;
                    self.copies[copy].frozen = false;
                }
                DestinationAction::SendConfirmed { epoch } => {
                    self.send(m, &Message::ToSource(SourceEvent::Confirmed { epoch }));
                }
                DestinationAction::SendDurable { epoch } => {
                    self.send(m, &Message::ToSource(SourceEvent::Durable { epoch }));
                }
                DestinationAction::Discard => {
                    let copy = &mut self.copies[copy];
                    (copy.discarded, copy.holder) = (true, None);
                }
                DestinationAction::Report(_) => {}
            }
        }
        Ok(())
    }

    fn ask_store(&mut self, m: usize, end: usize, call: LeaseCall) {
        let host = if end == 0 { self.moves[m].from } else { self.moves[m].to };
        let cut_off = self.keepers[host].cut_off;
        let course = self.store.course_for(cut_off, &mut self.random);
        let operation = call.operation;
        if !course.told {
            let answer = LeaseAnswer::Unavailable("no answer".to_owned());
            self.answer_later(m, end, course.answered, operation, answer);
        }
        if let Some(applied) = course.applied {
            let answered = course.told.then(|| course.answered.saturating_sub(applied));
            self.after(applied, Event::StoreApplies(m, end, call, answered));
        }
    }

    fn store_applies(
        &mut self,
        m: usize,
        end: usize,
        call: &LeaseCall,
        answered: Option<u64>,
    ) -> Checked {
        let outcome = self.store.apply(call)?;
        self.tell(&format!("{m} the store: {:?} of end {end} {outcome:?}", call.purpose));
        if let Outcome::Lost(Some(found)) = &outcome {
            self.tally.settled_by_nonce += u64::from(found.is_same_write(&call.new));
        }
        if let Some(delay) = answered {
            let answer = LeaseAnswer::from(Ok(outcome));
            self.answer_later(m, end, delay, call.operation, answer);
        }
        Ok(())
    }

    fn answer_later(
        &mut self,
        m: usize,
        end: usize,
        delay: u64,
        operation: crate::migrate::switchover::OperationId,
        answer: LeaseAnswer,
    ) {
        let event = if end == 0 {
            Event::Source(m, SourceEvent::LeaseAnswer { operation, answer })
        } else {
            Event::Destination(m, DestinationEvent::LeaseAnswer { operation, answer })
        };
        self.after(delay, event);
    }

    fn machine_paused(&mut self, m: usize, fails: bool) -> Checked {
        let mv = &mut self.moves[m];
        mv.pausing = false;
        let resume = std::mem::take(&mut mv.resume_when_paused);
        self.copies[mv.source_copy].running = resume || (fails && self.random.chance(50));
        let flush_owed = self.moves[m].flush_owed;
        let event = if fails {
            SourceEvent::PauseFailed("it was said to fail".to_owned())
        } else {
            SourceEvent::Paused { flush_owed }
        };
        self.source_event(m, event)
    }

    fn machine_loaded(&mut self, m: usize, fails: bool) {
        let copy = &mut self.copies[self.moves[m].copy];
        if copy.discarded || copy.crashed {
            return;
        }
        copy.running = !fails;
        let event = if fails {
            DestinationEvent::LoadFailed("it was said to fail".to_owned())
        } else {
            DestinationEvent::Running
        };
        let noticed = self.random.below(5 * MS);
        self.after(noticed, Event::Destination(m, event));
        if !fails {
            // The last block, from the source or from elsewhere.
            let bulk = self.random.between(MS, 20 * SECOND);
            let message = Message::ToDestination(DestinationEvent::AllPresent);
            self.after(bulk, Event::Arrives(m, message));
        }
    }

    fn cut(&mut self, m: usize) {
        self.tell(&format!("{m} the connection is cut"));
        self.moves[m].link.cut = true;
        self.peer_lost(m, 0);
        self.peer_lost(m, 1);
        if self.random.chance(50) {
            // Later than both ends have noticed.
            let back = 10 * SECOND + self.random.below(5 * SECOND);
            self.after(back, Event::Joined(m));
        }
    }

    /// The ends have found each other again, and say again what may have been lost.
    pub(super) fn joined(&mut self, m: usize) -> Checked {
        let mv = &self.moves[m];
        let dead = |copy: usize| self.copies[copy].crashed || self.copies[copy].discarded;
        if mv.source.is_none() || mv.destination.is_none() || dead(mv.source_copy) {
            return Ok(());
        }
        self.tell(&format!("{m} the connection is back"));
        let mv = &mut self.moves[m];
        // What a source's next runner was deaf to comes by the new connection.
        (mv.link.cut, mv.source_deaf) = (false, false);
        if mv.named.is_some() {
            let late = [DestinationEvent::SourceDurable, DestinationEvent::AllPresent];
            for event in late {
                let sync = self.random.between(MS, 3 * SECOND);
                // All blocks come only to a copy that was made of the token.
                if event == DestinationEvent::SourceDurable
                    || self.copies[self.moves[m].copy].running
                {
                    self.after(sync, Event::Arrives(m, Message::ToDestination(event)));
                }
            }
        }
        self.destination_event(m, DestinationEvent::PeerBack)
    }

    /// One end notices, sooner or later.
    pub(super) fn peer_lost(&mut self, m: usize, end: usize) {
        let most = if self.random.chance(30) { 9 * SECOND } else { 300 * MS };
        let notice = self.random.below(most);
        let event = if end == 0 {
            Event::Source(m, SourceEvent::PeerLost)
        } else {
            Event::Destination(m, DestinationEvent::PeerLost)
        };
        self.after(notice, event);
    }

    pub(super) fn crash_host(&mut self, m: usize, end: usize) {
        self.tell(&format!("{m} the {} crashes", ["source", "destination"][end]));
        self.tally.crashed += 1;
        let mv = &mut self.moves[m];
        mv.link.cut = true;
        let copy = if end == 0 {
            mv.source = None;
            mv.source_copy
        } else {
            mv.destination = None;
            mv.to_do.clear();
            mv.copy
        };
        self.copies[copy].crashed = true;
        self.peer_lost(m, 1 - end);
    }

    /// The source's runner dies; the machine stays as it is, and what was sent stays sent.
    fn crash_runner(&mut self, m: usize) {
        // Where a stand-in waits there is no other runner of the machine.
        if self.stands_in(self.moves[m].from) || self.moves[m].source.take().is_none() {
            return;
        }
        self.tell(&format!("{m} the source's runner dies"));
        self.moves[m].source_deaf = true;
        self.peer_lost(m, 1);
        let back = self.random.between(10 * MS, 5 * SECOND);
        self.after(back, Event::RunnerBack(m));
    }

    fn runner_back(&mut self, m: usize) -> Checked {
        let mv = &self.moves[m];
        let copy = &self.copies[mv.source_copy];
        if copy.crashed || copy.discarded {
            return Ok(());
        }
        if mv.pausing || !self.store.up {
            self.after(100 * MS, Event::RunnerBack(m));
            return Ok(());
        }
        if copy.running {
            // Of a protected machine it keeps the lease from here on, and has no move.
            if self.protected && !mv.source_over {
                let copy = mv.source_copy;
                self.moves[m].source_over = true;
                self.holder(copy, HolderEvent::Moving(false));
            }
            return Ok(());
        }
        self.tally.recovered += 1;
        let from = mv.from;
        let (now, nonces) = (self.local(from), self.nonces());
        let (here, record) = (&self.hosts[from].name, self.store.record.clone());
        let (source, actions) =
            SourceAuthority::recover(now, here, record, self.terms.clone(), nonces);
        let text = format!("{m} the source's runner is back: {:?}", source.state());
        self.moves[m].source = Some(source);
        self.tell(&text);
        let state = self.moves[m].source.as_ref().map(SourceAuthority::state);
        self.do_source(m, actions)?;
        self.set_alarm(m, 0);
        if let Some(state) = state {
            self.tell_source_holder(m, state);
        }
        Ok(())
    }
}
