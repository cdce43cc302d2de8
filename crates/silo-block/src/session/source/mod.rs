//! The end of a move that gives devices away.
//!
//! ```text
//!  FILLING ── CloseRound ⇄ RoundClosed, lists, blocks ──┐
//!     │ Pace says: switch                                │ cut: stays, and goes on by Have
//!     ▼                                                  │
//!  QUIESCING ── Quiesce → Quiesced ──────────────────────┤
//!     │ hybrid                  │ whole                  │
//!     │                         ▼                        │
//!     │                      DRAINING (all blocks first) │ any failure up to here: Resume, FAILED
//!     ▼                         │
//!  SWITCHED (token out) ◄───────┘     the source never runs again by itself from here on
//!     │ Running            │ Refused, or Reclaimed by proof of the lease: Resume, FAILED
//!     ▼
//!  SERVING (frozen content) ── Durable ──► RELEASED
//! ```
//!
//! The driver feeds events and the time, does what [`Source::poll`] says, and asks again after
//! every event and at [`Source::wake`]. What must hold:
//! - Before a source is made, the driver notes the open rounds of its devices durably: after a
//!   restart that was not clean it calls `Replica::restarted` with them.
//! - The token leaves only after `Quiesced`, by which the driver says: writers are paused, their
//!   writes have ended, flushes too or are named for re-issue, what was written is durable here,
//!   and so is the note (lease or file) that authority leaves: not even a restart runs here again.
//! - Lists travel before the content of their epoch. Content is sent "as of" the newest round whose
//!   list the destination has confirmed; after the token, as of the last one.
//! - A block is on its way at most once; what is not confirmed is sent again after a cut.

mod face;
mod flow;
mod speak;

pub use face::{Action, Config, Counters, Event, Phase, SourceDevice};

use super::{
    link::{Customs, Link, LinkId},
    messages::{
        BlockHash, DeviceIndex, DeviceInfo, MAX_CUSTOM, MAX_STATE, Reason, SessionId,
        ToDestination, Wait,
    },
    pace::{Finish, Next, Pace},
};
use crate::{
    block::{BlockIndex, BlockRange, BlockSet},
    device::DeviceName,
    geometry::Geometry,
    hash::RootHash,
    model::History,
    order::{Class, Fair, Order},
    rounds::{Epoch, Holder, Rounds},
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

/// The state towards one device of the destination.
#[derive(Debug)]
struct Outgoing {
    name: DeviceName,
    base: Option<RootHash>,
    geometry: Geometry,
    rounds: Arc<Rounds>,
    history: History,
    /// What the destination has; `None` before it has said so on this link.
    holder: Option<Holder>,
    /// What it has said so far that it misses.
    told: BlockSet,
    /// The last round, once authority is about to leave; others may go on closing rounds.
    last: Option<Epoch>,
    /// How many lists were made on this link.
    lists: u32,
    /// The first list of the session is confirmed: what comes later was written meanwhile.
    first_done: bool,
    /// The newest round whose list is confirmed: what content is sent as.
    label: Epoch,
    /// A list that is not confirmed yet.
    listed: Option<(Epoch, BlockSet)>,
    order: Order,
    flying: BlockSet,
    /// The same in bytes, and those of them that somebody waits for.
    in_flight: u64,
    demanded: u64,
    /// The same as it was sent: count of blocks, epoch and class, by first block.
    sent: BTreeMap<u64, (u64, Epoch, Class)>,
    /// Were to be sent while they were on their way.
    after: BlockSet,
    absent: BlockSet,
    /// Wanted, but absent here.
    awaited: BlockSet,
    /// A store has them: the last to be sent.
    promised: BlockSet,
    /// Where those are looked for next, from the end of the device downwards: the destination
    /// fetches upwards, so they meet.
    hedged: u64,
    /// The recorded order of first use.
    expected: Vec<BlockRange>,
    /// Promises that came before the list that they belong to was confirmed.
    early: Vec<(Epoch, Vec<(BlockIndex, BlockHash)>)>,
}

#[derive(Debug)]
struct HandOver {
    epochs: Vec<Epoch>,
    flushes: Vec<Vec<u64>>,
    state: Vec<u8>,
}

/// A source; see the module.
#[derive(Debug)]
pub struct Source {
    config: Config,
    session: SessionId,
    attempt: u32,
    devices: Vec<Outgoing>,
    phase: Phase,
    hand_over: Option<HandOver>,
    link: Option<Link>,
    customs: Customs,
    fair: Fair,
    pace: Pace,
    /// What the driver was asked for, and since when.
    asked: Option<(Wait, Duration)>,
    /// Since when there is no (ready) link.
    alone: Duration,
    /// The last time somebody was told that something is overdue.
    told: Duration,
    ticked: Duration,
    switch: bool,
    ticket: u32,
    actions: VecDeque<Action>,
    counters: Counters,
}

impl Source {
    /// A move that begins at `now`. `attempt` is the number of the try, as the lease has it.
    #[must_use]
    pub fn new(
        config: Config,
        session: SessionId,
        attempt: u32,
        devices: Vec<SourceDevice>,
        now: Duration,
    ) -> Self {
        let size = devices.iter().map(|device| device.geometry.bytes()).sum();
        let devices: Vec<Outgoing> = devices.into_iter().map(Outgoing::new).collect();
        Self {
            config,
            session,
            attempt,
            fair: Fair::new(devices.len()),
            pace: Pace::new(config.policy, size, now),
            devices,
            phase: Phase::Filling,
            hand_over: None,
            link: None,
            customs: Customs::default(),
            asked: None,
            alone: now,
            told: now,
            ticked: now,
            switch: false,
            ticket: 0,
            actions: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// A source after a restart that finds the note that authority left by this session: it serves
    /// what it has, if the destination runs. If that has not got the token, it never will: the
    /// layer above's state died with the process, and this side is told to [`Action::Resume`].
    #[must_use]
    pub fn restored(
        config: Config,
        session: SessionId,
        attempt: u32,
        devices: Vec<SourceDevice>,
        now: Duration,
    ) -> Self {
        let mut source = Self::new(config, session, attempt, devices, now);
        source.phase = Phase::Switched;
        source
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Which move this is.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// What was counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Rounds closed so far, and how long the destination would wait if it took over now.
    #[must_use]
    pub fn forecast(&self, now: Duration) -> (u32, Duration) {
        (self.pace.rounds(), self.pace.predicted(now))
    }

    /// Bytes that the destination has not confirmed, of those that were listed.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.devices.iter().map(Outgoing::remaining).sum()
    }

    /// The link that is in use, once the first lists of the session are confirmed.
    #[must_use]
    pub fn listed_on(&self) -> Option<LinkId> {
        let listed = self.devices.iter().all(|device| device.first_done);
        self.link
            .as_ref()
            .filter(|link| link.ready && listed && !self.is_over())
            .map(|link| link.id)
    }

    /// What a store could spare of `range`: blocks that the destination lacks, that are here and not
    /// on their way, with the round as of which their contents count.
    #[must_use]
    pub fn lacking(&self, device: DeviceIndex, range: BlockRange) -> (Vec<BlockRange>, Epoch) {
        let Some(device) = self.devices.get(device.0 as usize) else { return Default::default() };
        let Some(holder) = &device.holder else { return Default::default() };
        let out = [&device.flying, &device.absent, &device.promised];
        let mut lacking: Vec<BlockRange> = Vec::new();
        for block in holder.exceptions().ranges_in(range).flat_map(|part| part.chunks(1)) {
            if out.iter().any(|set| set.contains(block.start)) {
                continue;
            }
            match lacking.last_mut() {
                Some(last) if last.end() == block.start.0 => last.count += 1,
                _ => lacking.push(block),
            }
        }
        (lacking, device.label)
    }

    /// Bytes on their way.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.devices.iter().map(|device| device.in_flight).sum()
    }

    /// Takes an event.
    pub fn handle(&mut self, now: Duration, event: Event) {
        match event {
            Event::Connected(link) => self.connected(now, link),
            Event::Cut(link) => self.cut(now, link),
            Event::Received(link, message) => self.received(now, link, message),
            Event::RoundClosed(epochs) => self.round_closed(now, &epochs),
            Event::Quiesced { ticket, epochs, flushes, state } => {
                // An answer to a request that was taken back says nothing about now.
                if ticket == self.ticket {
                    self.quiesced(now, HandOver { epochs, flushes, state });
                }
            }
            Event::Unable(reason) => self.fail(reason),
            Event::Arrived(device, range) => self.arrived(device, range),
            Event::Promised { device, epoch, blocks } => self.promised(now, device, epoch, blocks),
            Event::Expected(device, order) => self.expected(now, device, &order),
            Event::Custom { kind, payload } => self.custom(now, kind, payload),
            Event::CustomHandled(serial) => {
                self.customs.handled(serial);
                self.say(now, ToDestination::CustomDone { serial });
            }
            Event::Switch => self.switch = true,
            Event::Cancel(why) => match self.phase {
                Phase::Filling | Phase::Quiescing | Phase::Draining => {
                    self.fail(Reason::Cancelled(why));
                }
                Phase::Switched => self.actions.push_back(Action::Undecided),
                Phase::Serving | Phase::Released | Phase::Failed(_) => {}
            },
            Event::Reclaimed => {
                if self.phase == Phase::Switched {
                    self.take_back(Reason::Cancelled("taken back by the lease".into()));
                }
            }
        }
    }

    /// The next thing to do; `None` until the next event or [`Source::wake`].
    pub fn poll(&mut self, now: Duration) -> Option<Action> {
        if let Some(action) = self.actions.pop_front() {
            return Some(action);
        }
        self.look_at_the_clock(now);
        self.decide(now);
        self.actions.pop_front().or_else(|| self.next_blocks())
    }

    /// When to call [`Source::poll`] again if nothing happens before.
    #[must_use]
    pub fn wake(&self, now: Duration) -> Option<Duration> {
        if matches!(self.phase, Phase::Released | Phase::Failed(_)) {
            return None;
        }
        let patience = self.config.patience;
        let mut at = self.told.max(self.alone) + patience.answer;
        if let Some((_, since)) = self.asked {
            at = at.min(since + patience.answer);
        }
        if let Some(link) = &self.link {
            at = at.min(link.said + patience.silence / 3).min(link.heard + patience.silence);
        }
        if let Next::Later(then) = self.pace.next(now)
            && self.is_idle()
            && self.phase == Phase::Filling
        {
            at = at.min(then);
        }
        Some(at.max(now + Duration::from_micros(1)))
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Released | Phase::Failed(_))
    }

    /// Whether the devices are still this side's.
    fn owns(&self) -> bool {
        matches!(self.phase, Phase::Filling | Phase::Quiescing | Phase::Draining)
    }

    /// Ends the move if that is still possible: nothing is lost and writers go on here.
    fn fail(&mut self, reason: Reason) {
        match self.phase {
            Phase::Filling => {}
            Phase::Quiescing | Phase::Draining => self.actions.push_back(Action::Resume),
            Phase::Serving => {
                // Too late to take anything back: the destination must know what it will not get.
                self.tell_abort(&reason);
                self.end(reason);
                return;
            }
            Phase::Switched => {
                self.actions.push_back(Action::Undecided);
                return;
            }
            Phase::Released | Phase::Failed(_) => return,
        }
        self.tell_abort(&reason);
        self.end(reason);
    }

    fn take_back(&mut self, reason: Reason) {
        self.actions.push_back(Action::Resume);
        self.end(reason);
    }

    fn end(&mut self, reason: Reason) {
        self.actions.push_back(Action::Failed(reason.clone()));
        self.phase = Phase::Failed(reason);
        self.hand_over = None;
        self.devices.iter_mut().for_each(|device| (device.in_flight, device.demanded) = (0, 0));
    }

    fn look_at_the_clock(&mut self, now: Duration) {
        if self.is_over() {
            return;
        }
        let patience = self.config.patience;
        while now >= self.ticked + self.config.half_life {
            self.ticked += self.config.half_life;
            if now > self.ticked + self.config.half_life * 64 {
                self.ticked = now;
            }
            self.devices.iter_mut().for_each(|device| device.order.tick());
        }
        if let Some(link) = self.link.clone() {
            if now >= link.heard + patience.silence {
                self.actions.push_back(Action::Hangup(link.id));
                self.cut(now, link.id);
            } else if now >= link.said + patience.silence / 3 {
                self.say(now, ToDestination::Alive);
            }
        }
        if let Some((what, since)) = self.asked
            && now >= since + patience.answer
        {
            self.asked = None;
            self.fail(Reason::Deadline { what, after: patience.answer });
            return;
        }
        let alone = self.link.as_ref().is_none_or(|link| !link.ready);
        if now < self.told.max(self.alone) + patience.answer {
            return;
        }
        self.told = now;
        match self.phase {
            Phase::Filling | Phase::Quiescing | Phase::Draining if alone => {
                let what = if self.link.is_none() { Wait::Connection } else { Wait::Handshake };
                self.fail(Reason::Deadline { what, after: patience.answer });
            }
            Phase::Switched => self.actions.push_back(Action::Undecided),
            Phase::Serving => self.actions.push_back(Action::Overdue(Wait::Durable)),
            _ => {}
        }
    }

    /// Whether everything listed so far has been sent and confirmed.
    fn is_idle(&self) -> bool {
        self.in_flight() == 0
            && self.devices.iter().all(|device| {
                device.listed.is_none() && device.order.is_empty() && device.awaited.is_empty()
            })
    }

    /// What comes after what is done: another round, the pause, the token.
    fn decide(&mut self, now: Duration) {
        if self.asked.is_some() || self.link.as_ref().is_none_or(|link| !link.ready) {
            return;
        }
        match self.phase {
            Phase::Filling => {}
            Phase::Draining => {
                let all = self.devices.iter().all(|device| device.promised.is_empty());
                if all && self.is_idle() {
                    self.hand_over(now);
                }
                return;
            }
            _ => return,
        }
        let first = self.pace.rounds() == 0 || self.devices.iter().any(Outgoing::is_new);
        let listing = self.devices.iter().any(|device| device.listed.is_some());
        if first {
            self.ask(now, Wait::Round, Action::CloseRound);
            return;
        }
        let idle = self.is_idle();
        if listing || !(idle || self.switch || self.pace.exhausted(now)) {
            return;
        }
        if self.switch {
            self.quiesce(now);
            return;
        }
        match self.pace.next(now) {
            Next::Round if idle => self.ask(now, Wait::Round, Action::CloseRound),
            Next::Round | Next::Later(_) => {}
            Next::Switch => self.quiesce(now),
            Next::GiveUp => {
                let (round, left) = (self.pace.rounds(), self.remaining());
                self.fail(Reason::Outpaced { round, left });
            }
        }
    }

    fn quiesce(&mut self, now: Duration) {
        self.phase = Phase::Quiescing;
        self.ticket += 1;
        self.ask(now, Wait::Quiesce, Action::Quiesce(self.ticket));
    }

    fn ask(&mut self, now: Duration, what: Wait, action: Action) {
        self.asked = Some((what, now));
        self.actions.push_back(action);
    }

    fn quiesced(&mut self, now: Duration, end: HandOver) {
        if self.phase != Phase::Quiescing {
            return;
        }
        self.asked = None;
        let fits = end.epochs.len() == self.devices.len() && end.flushes.len() == end.epochs.len();
        if !fits || end.state.len() > MAX_STATE {
            self.fail(Reason::Protocol("the driver's answer does not fit the group".into()));
            return;
        }
        let epochs = end.epochs.clone();
        for (device, epoch) in self.devices.iter_mut().zip(&epochs) {
            device.last = Some(*epoch);
        }
        self.hand_over = Some(end);
        match self.config.policy.finish {
            Finish::Hybrid => self.hand_over(now),
            Finish::Whole => {
                self.phase = Phase::Draining;
                self.list(now, &epochs);
            }
        }
    }

    /// A link that is cut while writers are paused: they go on, and rounds begin anew on the next.
    fn unpause(&mut self) {
        if matches!(self.phase, Phase::Quiescing | Phase::Draining) {
            self.actions.push_back(Action::Resume);
            self.phase = Phase::Filling;
            (self.asked, self.hand_over) = (None, None);
            self.devices.iter_mut().for_each(|device| device.last = None);
            self.ticket += 1;
        }
    }

    /// The token goes out; from here on only the destination or the lease can say who runs.
    fn hand_over(&mut self, now: Duration) {
        (self.told, self.phase) = (now, Phase::Switched);
        self.send_token(now);
    }

    fn custom(&mut self, now: Duration, kind: u32, payload: Vec<u8>) {
        if payload.len() > MAX_CUSTOM || self.is_over() {
            return;
        }
        match self.customs.post(kind, payload) {
            Some(custom) => self.say_if_ready(now, ToDestination::Custom(custom)),
            None => self.fail(Reason::Protocol("too many events wait for an answer".into())),
        }
    }

    fn info(&self) -> Vec<DeviceInfo> {
        let info = |device: &Outgoing| DeviceInfo {
            name: device.name.clone(),
            geometry: device.geometry,
            base: device.base,
            history: device.history.terms().to_vec(),
            clock: device.closed(),
        };
        self.devices.iter().map(info).collect()
    }
}
