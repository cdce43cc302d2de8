//! Protected machines: every host keeps a sign of life, every copy is held to its host's term, and
//! hosts that have no part in a move wait for the machine of one that is silent. Hosts die with all
//! that they have and come back with nothing; hosts lose the store while the others reach it.

use super::{
    neglect::Neglect,
    world::{Copy, Event, MS, SECOND, World},
};
use crate::{
    lease::{AttemptId, Beat, BeatName, BeatRef, BootTime, Drift, Outcome, Record},
    migrate::switchover::{
        DestinationAuthority, DestinationState, SourceAuthority, SourceEvent, SourceState,
    },
    tenure::{
        Answer, Call, Content, Holder, HolderAction, HolderEvent, HolderParts, Pulse, PulseAction,
        PulseEvent, PulseParts, Surrender, SurrenderEvent, Taker, TakerAction, TakerEvent,
        TakerParts, Times, View,
    },
};

type Checked = Result<(), String>;

/// Whose state machine: of a host, of a copy, of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Pulse(usize),
    Holder(usize),
    Taker(usize),
    /// Of a host's keeper, for its machine.
    /// Which of its times.
    Surrender(usize, u64),
}

/// What happens to protected machines.
#[expect(clippy::large_enum_variant, reason = "a few thousand per world")]
#[derive(Clone, Debug)]
pub(super) enum TermEvent {
    Wake(Who, BootTime),
    Pulse(usize, PulseEvent),
    Holder(usize, HolderEvent),
    Taker(usize, TakerEvent),
    Applies(Who, u64, Call, Option<u64>),
    Freezes(usize),
    Starts(usize),
    Watch(usize),
    Dies(usize),
    Revives(usize),
    CutOff(usize, bool),
    /// See `neglect`.
    Hangs(usize),
    GoesOn(usize),
    Welcomed(usize),
    Surrender(usize, u64, SurrenderEvent),
    GuardFreezes(usize, u64),
    GuardEndsOffer(usize, u64),
    /// The last faults are over: what follows must come to rest.
    Calm,
}

/// What a host has for protected machines. A host that died has another `life`: what was under way
/// for the one before reaches nobody.
#[derive(Default)]
pub(super) struct Keeper {
    pub(super) pulse: Option<Pulse>,
    taker: Option<Taker>,
    life: u64,
    pub(super) cut_off: bool,
    pub(super) dead: bool,
    pulse_wake: Option<BootTime>,
    taker_wake: Option<BootTime>,
    pub(super) neglect: Neglect,
}

impl World {
    pub(super) fn times(&self) -> Times {
        Times {
            stop_margin: self.terms.stop_margin,
            longest_offer: self.terms.longest_offer,
            drift: Drift { ppm: self.terms.drift_ppm },
            broken: self.broken_term,
            ..Times::default()
        }
    }

    /// Begins a world whose machine is protected, or is to be.
    pub(super) fn protect(&mut self) {
        for host in 0..self.hosts.len() {
            self.revive(host);
            if host > 0 {
                self.after(SECOND / 2, Event::Term(TermEvent::Watch(host)));
            }
        }
        let record = self.store.record.clone();
        self.hold(0, record, None);
        let asked = self.random.between(MS, 3 * SECOND);
        self.after(asked, Event::Term(TermEvent::Holder(0, HolderEvent::Protect(true))));
        self.after(240 * SECOND, Event::Term(TermEvent::Calm));
        for round in 1..4 {
            // An owner that lost its machine and does not know it, when a move begins that may bring it.
            if self.random.chance(self.faults / 2) {
                let host = self.random.below(3) as usize;
                let from = round * 60 * SECOND - self.random.between(3 * SECOND, 7 * SECOND);
                let to = round * 60 * SECOND + self.random.between(SECOND, 5 * SECOND);
                self.after(from, Event::Term(TermEvent::CutOff(host, true)));
                self.after(to, Event::Term(TermEvent::CutOff(host, false)));
            }
        }
        for _ in 0..3 {
            if self.random.chance(self.faults / 2) {
                let (host, from) = (self.random.below(3) as usize, self.random.below(230 * SECOND));
                self.after(from, Event::Term(TermEvent::CutOff(host, true)));
                let length = self.random.between(SECOND / 2, 12 * SECOND);
                self.after(from + length, Event::Term(TermEvent::CutOff(host, false)));
            }
            if self.random.chance(self.faults / 2) {
                // Often in the middle of a move.
                let round = self.random.below(4) * 60 * SECOND;
                let when = round + self.random.between(SECOND, 8 * SECOND);
                let host = self.random.below(3) as usize;
                self.after(when, Event::Term(TermEvent::Dies(host)));
            }
        }
        self.neglect();
    }

    pub(super) fn life_of(&self, host: usize) -> Option<BeatRef> {
        self.view_of(host).map(|view| view.of)
    }

    pub(super) fn view_of(&self, host: usize) -> Option<View> {
        self.keepers[host].pulse.as_ref().and_then(Pulse::view).cloned()
    }

    fn revive(&mut self, host: usize) {
        let name = BeatName::of_host(self.hosts[host].name.clone());
        let parts = PulseParts { name, times: self.times(), nonces: self.nonces() };
        let (pulse, actions) = Pulse::start(self.local(host), parts);
        self.keepers[host].pulse = Some(pulse);
        self.keepers[host].dead = false;
        self.do_pulse(host, actions);
        self.term_alarm(Who::Pulse(host));
    }

    /// The copy is held to its host's term from now on; `arriving` under that life.
    pub(super) fn hold(&mut self, copy: usize, record: Record, arriving: Option<Option<BeatRef>>) {
        let host = self.copies[copy].host;
        let view = self.view_of(host);
        self.was_told(host, view.as_ref());
        let parts = HolderParts {
            record,
            here: self.hosts[host].name.clone(),
            view,
            given_up: None,
            times: self.times(),
            nonces: self.nonces(),
        };
        let now = self.local(host);
        let (holder, actions) = match arriving {
            Some(life) => Holder::arriving(now, parts, life),
            None => Holder::new(now, parts),
        };
        self.copies[copy].holder = Some(holder);
        self.do_holder(copy, actions);
        self.term_alarm(Who::Holder(copy));
    }

    pub(super) fn term_happens(&mut self, event: TermEvent) -> Checked {
        match event {
            TermEvent::Wake(who, at) => {
                if *self.wake_of(who) != Some(at) {
                    return Ok(());
                }
                *self.wake_of(who) = None;
                match who {
                    Who::Pulse(host) => self.pulse(host, PulseEvent::Tick),
                    Who::Holder(copy) => self.holder(copy, HolderEvent::Tick),
                    Who::Taker(host) => self.taker(host, TakerEvent::Tick),
                    Who::Surrender(host, times) => {
                        self.surrenders(host, times, SurrenderEvent::Tick);
                    }
                }
            }
            TermEvent::Pulse(host, event) => self.pulse(host, event),
            TermEvent::Holder(copy, event) => self.holder(copy, event),
            TermEvent::Taker(host, event) => self.taker(host, event),
            TermEvent::Applies(who, life, call, answered) => {
                return self.applies(who, life, &call, answered);
            }
            TermEvent::Freezes(copy) => {
                self.copies[copy].term_frozen = self.copies[copy].freeze_wanted;
            }
            TermEvent::Starts(copy) => {
                let copy = &mut self.copies[copy];
                (copy.running, copy.output) = (true, true);
            }
            TermEvent::Watch(host) => self.watch(host),
            TermEvent::Dies(host) => self.host_dies(host),
            TermEvent::Revives(host) => self.revive(host),
            TermEvent::Hangs(host) => self.hangs(host),
            TermEvent::GoesOn(host) => self.goes_on(host),
            TermEvent::Welcomed(host) => return self.welcomed(host),
            TermEvent::Surrender(host, times, event) => self.surrenders(host, times, event),
            TermEvent::GuardFreezes(copy, times) => self.guard_ends_term(copy, times),
            TermEvent::GuardEndsOffer(m, times) => self.guard_ends_offer(m, times),
            TermEvent::Calm => {
                self.store.is_sound();
                for keeper in &mut self.keepers {
                    keeper.cut_off = false;
                }
            }
            TermEvent::CutOff(host, off) => {
                self.tell(&format!("host {host} cut off from the store: {off}"));
                self.keepers[host].cut_off = off;
            }
        }
        Ok(())
    }

    fn pulse(&mut self, host: usize, event: PulseEvent) {
        let now = self.local(host);
        let Some(pulse) = &mut self.keepers[host].pulse else { return };
        let actions = pulse.on(now, event);
        self.do_pulse(host, actions);
        self.term_alarm(Who::Pulse(host));
    }

    fn do_pulse(&mut self, host: usize, actions: Vec<PulseAction>) {
        for action in actions {
            match action {
                PulseAction::Store(call) => self.ask(Who::Pulse(host), host, call),
                PulseAction::Tell(view) => {
                    if self.is_told(host, view.as_ref()) {
                        self.tell_view(host, &view);
                    }
                }
                PulseAction::Report(text) => self.tell(&format!("host {host}: {text}")),
            }
        }
    }

    /// Everything of a runner hears until when its host's life holds.
    pub(super) fn tell_view(&mut self, host: usize, view: &Option<View>) {
        self.was_told(host, view.as_ref());
        let ours = |copy: &usize| self.copies[*copy].host == host;
        for copy in (0..self.copies.len()).filter(ours).collect::<Vec<_>>() {
            self.holder(copy, HolderEvent::View(view.clone()));
        }
        for m in 0..self.moves.len() {
            let given_up =
                |copy: usize| self.copies[copy].holder.as_ref().is_some_and(Holder::is_given_up);
            let shown = view.clone().filter(|_| !given_up(self.moves[m].source_copy));
            if self.moves[m].from == host
                && let Some(source) = &mut self.moves[m].source
            {
                let now = self.hosts[host].local(self.now);
                // It only notes it.
                let none = source.on(now, SourceEvent::Term(shown));
                debug_assert!(none.is_empty());
            }
        }
        self.taker(host, TakerEvent::View(view.clone()));
    }

    pub(super) fn holder(&mut self, copy: usize, event: HolderEvent) {
        let now = self.local(self.copies[copy].host);
        let Some(holder) = &mut self.copies[copy].holder else { return };
        let actions = holder.on(now, event);
        self.do_holder(copy, actions);
        self.term_alarm(Who::Holder(copy));
    }

    fn do_holder(&mut self, copy: usize, actions: Vec<HolderAction>) {
        for action in actions {
            match action {
                HolderAction::Freeze => {
                    self.tally.terms_ended += 1;
                    self.copies[copy].freeze_wanted = true;
                    // One that has not been started is not.
                    self.copies[copy].term_frozen |= !self.copies[copy].running;
                    let late = self.random.below(self.half_margin());
                    self.after(late, Event::Term(TermEvent::Freezes(copy)));
                }
                HolderAction::Thaw => {
                    let copy = &mut self.copies[copy];
                    (copy.freeze_wanted, copy.term_frozen) = (false, false);
                }
                HolderAction::Held(record) => {
                    self.tally.got_back += u64::from(record.epoch > self.copies[copy].epoch);
                    self.copies[copy].epoch = record.epoch;
                }
                HolderAction::Store(call) => {
                    let host = self.copies[copy].host;
                    self.ask(Who::Holder(copy), host, call);
                }
                HolderAction::Discard { .. } => {
                    let copy = &mut self.copies[copy];
                    (copy.discarded, copy.holder) = (true, None);
                }
                HolderAction::Report(text) => self.tell(&format!("copy {copy}: {text}")),
            }
        }
    }

    fn taker(&mut self, host: usize, event: TakerEvent) {
        let now = self.local(host);
        let Some(taker) = &mut self.keepers[host].taker else { return };
        let actions = taker.on(now, event);
        self.do_taker(host, actions);
        self.term_alarm(Who::Taker(host));
    }

    fn do_taker(&mut self, host: usize, actions: Vec<TakerAction>) {
        for action in actions {
            match action {
                TakerAction::Store(call) => self.ask(Who::Taker(host), host, call),
                TakerAction::Orphaned(_) => {
                    let prepared = self.random.below(SECOND);
                    let event = TermEvent::Taker(host, TakerEvent::Prepared);
                    self.after(prepared, Event::Term(event));
                }
                TakerAction::Taken(record) => {
                    self.tally.taken_over += 1;
                    self.keepers[host].taker = None;
                    // What an earlier move left here makes room, and its runner does not come back.
                    for copy in self.copies.iter_mut().filter(|copy| copy.host == host) {
                        (copy.discarded, copy.holder) = (true, None);
                    }
                    let copy = self.copies.len();
                    self.copies.push(Copy::at(host, record.epoch));
                    self.hold(copy, record, None);
                    let loads = self.random.between(MS, SECOND);
                    self.after(loads, Event::Term(TermEvent::Starts(copy)));
                }
                TakerAction::Done(_) => {
                    self.keepers[host].taker = None;
                    self.after(SECOND, Event::Term(TermEvent::Watch(host)));
                }
                TakerAction::Report(text) => self.tell(&format!("host {host}: {text}")),
            }
        }
    }

    /// A host that has no part in a move waits for a machine that is not its own.
    fn watch(&mut self, host: usize) {
        let keeper = &self.keepers[host];
        if keeper.dead || keeper.taker.is_some() {
            return;
        }
        if self.takes_part(host) {
            return self.after(SECOND, Event::Term(TermEvent::Watch(host)));
        }
        let parts = TakerParts {
            machine: self.machine.clone(),
            here: self.hosts[host].name.clone(),
            attempt: AttemptId(self.random.next()),
            times: self.times(),
            nonces: self.nonces(),
        };
        let (taker, actions) = Taker::start(self.local(host), parts);
        self.keepers[host].taker = Some(taker);
        let view = self.view_of(host);
        self.do_taker(host, actions);
        self.taker(host, TakerEvent::View(view));
        self.term_alarm(Who::Taker(host));
    }

    pub(super) fn stands_in(&self, host: usize) -> bool {
        self.keepers[host].taker.is_some()
    }

    /// Its runner is busy with a move of this machine.
    fn takes_part(&self, host: usize) -> bool {
        use {DestinationState as D, SourceState as S};
        self.moves.iter().any(|mv| {
            let source = mv.source.as_ref().map(SourceAuthority::state);
            // One whose runner is dead has a monitor here, and a runner that comes back to it.
            let copy = &self.copies[mv.source_copy];
            let gone = copy.crashed || copy.discarded;
            let sends = mv.from == host
                && match source {
                    None => !gone,
                    Some(S::Aborted | S::Resumed(_) | S::Released | S::ServingPages(_)) => false,
                    Some(_) => true,
                };
            let destination = mv.destination.as_ref().map(DestinationAuthority::state);
            let takes = mv.to == host
                && !matches!(
                    destination,
                    None | Some(D::Refused | D::Discarded | D::Lost | D::Settled(_) | D::Owner(_))
                );
            sends || takes
        })
    }

    /// One move at a time: what has come to nothing is called off before the next begins.
    pub(super) fn end_earlier_moves(&mut self) -> Checked {
        for m in 0..self.moves.len() {
            if self.protected && !self.moves[m].source_over {
                self.source_event(m, SourceEvent::Cancel)?;
            }
        }
        Ok(())
    }

    /// Both ends lose the store while the machine pauses, for so long that the source's term ends.
    pub(super) fn lose_store_in_pause(&mut self, m: usize) -> u64 {
        for host in [self.moves[m].from, self.moves[m].to] {
            let lasts = self.random.between(4 * SECOND, 9 * SECOND);
            self.after(0, Event::Term(TermEvent::CutOff(host, true)));
            self.after(lasts, Event::Term(TermEvent::CutOff(host, false)));
        }
        self.random.between(1500 * MS, 4900 * MS)
    }

    /// A destination finds the store again just when it is given a machine.
    pub(super) fn find_store_again(&mut self, host: usize) {
        if self.keepers[host].cut_off && self.random.chance(50) {
            self.keepers[host].cut_off = false;
        }
    }

    /// A move begins: whoever takes part waits for nothing else.
    pub(super) fn stop_watching(&mut self, host: usize) {
        if self.keepers[host].taker.take().is_some() {
            self.after(SECOND, Event::Term(TermEvent::Watch(host)));
        }
    }

    fn host_dies(&mut self, host: usize) {
        if self.keepers[host].dead {
            return;
        }
        self.tell(&format!("host {host} dies with all that it has"));
        self.tally.crashed += 1;
        let life = self.keepers[host].life + 1;
        let cut_off = self.keepers[host].cut_off;
        self.keepers[host] = Keeper { life, cut_off, dead: true, ..Keeper::default() };
        for copy in self.copies.iter_mut().filter(|copy| copy.host == host) {
            (copy.crashed, copy.holder) = (true, None);
        }
        for m in 0..self.moves.len() {
            for end in 0..2 {
                let lives = if end == 0 {
                    self.moves[m].from == host && self.moves[m].source.is_some()
                } else {
                    self.moves[m].to == host && self.moves[m].destination.is_some()
                };
                if lives {
                    self.crash_host(m, end);
                }
            }
        }
        let back = self.random.between(SECOND / 2, 20 * SECOND);
        self.after(back, Event::Term(TermEvent::Revives(host)));
        self.after(back + SECOND, Event::Term(TermEvent::Watch(host)));
    }

    fn wake_of(&mut self, who: Who) -> &mut Option<BootTime> {
        match who {
            Who::Pulse(host) => &mut self.keepers[host].pulse_wake,
            Who::Holder(copy) => &mut self.copies[copy].holder_wake,
            Who::Taker(host) => &mut self.keepers[host].taker_wake,
            Who::Surrender(host, _) => &mut self.keepers[host].neglect.wake,
        }
    }

    pub(super) fn term_alarm(&mut self, who: Who) {
        let (host, wanted) = match who {
            Who::Pulse(h) => (h, self.keepers[h].pulse.as_ref().and_then(Pulse::wake_at)),
            Who::Taker(h) => (h, self.keepers[h].taker.as_ref().and_then(Taker::wake_at)),
            Who::Surrender(h, _) => {
                (h, self.keepers[h].neglect.surrender.as_ref().and_then(Surrender::wake_at))
            }
            Who::Holder(copy) => {
                let copy = &self.copies[copy];
                (copy.host, copy.holder.as_ref().and_then(Holder::wake_at))
            }
        };
        if *self.wake_of(who) == wanted {
            return;
        }
        *self.wake_of(who) = wanted;
        let Some(at) = wanted else { return };
        let due = self.hosts[host].true_time(at).max(self.now);
        // The deadline's thread may be late by half of what it has for a freeze.
        let late = if matches!(who, Who::Holder(_)) { self.half_margin() } else { 30 * MS };
        let late = self.random.below(late);
        self.at(due + late, Event::Term(TermEvent::Wake(who, at)));
    }

    pub(super) fn ask(&mut self, who: Who, host: usize, call: Call) {
        let off = self.keepers[host].cut_off;
        let life = self.keepers[host].life;
        let mut course = self.store.course_for(off, &mut self.random);
        let binds = matches!(
            &call.content,
            Content::SetLease { expected, new } if expected.beat.is_none() && new.beat.is_some()
        );
        if binds && course.applied.is_some() && self.random.chance(self.faults / 4) {
            // It is written, and its owner is cut off before it hears so.
            (course.applied, course.told) = (Some(5 * MS), false);
            let lasts = self.random.between(4 * SECOND, 9 * SECOND);
            self.after(10 * MS, Event::Term(TermEvent::CutOff(host, true)));
            self.after(lasts, Event::Term(TermEvent::CutOff(host, false)));
        }
        if !course.told {
            let answer = Answer::Unavailable("no answer".to_owned());
            self.after(course.answered, answered(who, &call, answer));
        }
        if let Some(applied) = course.applied {
            let delay = course.told.then(|| course.answered.saturating_sub(applied));
            self.after(applied, Event::Term(TermEvent::Applies(who, life, call, delay)));
        }
    }

    fn applies(&mut self, who: Who, life: u64, call: &Call, delay: Option<u64>) -> Checked {
        let answer = match &call.content {
            Content::ReadLease(_) => Answer::Lease(Some(self.store.record.clone())),
            Content::ReadBeat(name) => Answer::Beat(self.store.beats.get(name).cloned()),
            Content::SetLease { expected, new } => match self.store.replace(expected, new)? {
                Outcome::Won => {
                    self.tell(&format!("{who:?} wrote {} {:?}", new.owner, new.epoch));
                    Answer::Won
                }
                Outcome::Lost(found) => Answer::Lease(found),
            },
            Content::SetBeat { expected, new } => self.set_beat(expected.as_ref(), new),
        };
        let host = match who {
            Who::Pulse(host) | Who::Taker(host) | Who::Surrender(host, _) => host,
            Who::Holder(copy) => self.copies[copy].host,
        };
        if let Some(delay) = delay.filter(|_| self.keepers[host].life == life) {
            self.after(delay, answered(who, call, answer));
        }
        Ok(())
    }

    fn set_beat(&mut self, expected: Option<&Beat>, new: &Beat) -> Answer {
        let there = self.store.beats.get(&new.of.name);
        if there != expected {
            return Answer::Beat(there.cloned());
        }
        self.tally.fenced += u64::from(new.fenced_by.is_some());
        if new.fenced_by.is_some() {
            self.tell(&format!("{} is fenced", new.of));
        }
        self.store.beats.insert(new.of.name.clone(), new.clone());
        Answer::Won
    }
}

fn answered(who: Who, call: &Call, answer: Answer) -> Event {
    let operation = call.operation;
    Event::Term(match who {
        Who::Pulse(host) => TermEvent::Pulse(host, PulseEvent::Answer { operation, answer }),
        Who::Holder(copy) => TermEvent::Holder(copy, HolderEvent::Answer { operation, answer }),
        Who::Taker(host) => TermEvent::Taker(host, TakerEvent::Answer { operation, answer }),
        Who::Surrender(host, times) => {
            TermEvent::Surrender(host, times, SurrenderEvent::Answer { operation, answer })
        }
    })
}
