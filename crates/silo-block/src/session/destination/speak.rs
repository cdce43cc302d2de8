//! The destination's side of the conversation: links, lists, content, the token.

use super::{Action, Destination, From, Phase, Slot};
use crate::{
    block::{BlockRange, BlockSet},
    device::DeviceName,
    geometry::Geometry,
    model::{History, Owner},
    rounds::Epoch,
    session::{
        link::{Link, LinkId},
        messages::{
            BlockHeader, DeviceIndex, DeviceInfo, Held, LastRound, MAX_RANGES, Reason, SessionId,
            Term, ToDestination, ToSource, Token, VERSION,
        },
    },
};
use std::time::Duration;

impl Destination {
    pub(super) fn connected(&mut self, now: Duration, id: LinkId) {
        if let Some(old) = self.link.take() {
            self.forget_link(now);
            self.actions.push_back(Action::Hangup(old.id));
        }
        self.link = Some(Link::new(id, now));
    }

    pub(super) fn cut(&mut self, now: Duration, id: LinkId) {
        if self.link.as_ref().is_some_and(|link| link.id == id) {
            self.link = None;
            self.forget_link(now);
        }
    }

    /// What was asked for on this link will not be answered.
    fn forget_link(&mut self, now: Duration) {
        self.alone = now;
        self.held.clear();
        for device in &mut self.devices {
            let blocks = device.replica.geometry().blocks();
            device.demanded = BlockSet::new(blocks);
            device.expected = BlockSet::new(blocks);
        }
    }

    pub(super) fn say(&mut self, now: Duration, message: ToSource) {
        if let Some(link) = &mut self.link {
            link.said = now;
            self.actions.push_back(Action::Send(link.id, message));
        }
    }

    pub(super) fn say_if_ready(&mut self, now: Duration, message: ToSource) {
        if self.link.as_ref().is_some_and(|link| link.ready) {
            self.say(now, message);
        }
    }

    fn hang_up(&mut self, now: Duration, reason: Reason) {
        self.say(now, ToSource::Abort(reason.clone()));
        if let Some(link) = self.link.take() {
            self.forget_link(now);
            self.actions.push_back(Action::Hangup(link.id));
        }
        self.fail(now, reason);
    }

    pub(super) fn received(&mut self, now: Duration, id: LinkId, message: ToDestination) {
        let Some(link) = self.link.as_mut().filter(|link| link.id == id) else { return };
        link.heard = now;
        let ready = link.ready;
        match message {
            ToDestination::Alive => {}
            ToDestination::Hello { version, session } => self.hello(now, version, session),
            ToDestination::Group(devices) if !ready => self.group(now, &devices),
            ToDestination::Abort(reason) => self.aborted(reason),
            _ if !ready => {}
            ToDestination::Round { device, epoch, blocks, last } => {
                self.round(now, device, epoch, &blocks, last);
            }
            ToDestination::Promise { device, epoch, blocks } => {
                self.promise(device, epoch, &blocks);
            }
            ToDestination::Expect { device, order } => {
                if let Some(incoming) = self.devices.get_mut(device.0 as usize) {
                    order.iter().for_each(|range| incoming.fetching.expect(*range));
                }
            }
            ToDestination::Kept { device, epoch, blocks } => self.kept(device, epoch, blocks),
            ToDestination::Token { attempt, devices, state } => {
                self.token(now, attempt, devices, state);
            }
            ToDestination::Custom(custom) => {
                if self.customs.take(custom.serial) {
                    self.actions.push_back(Action::Custom(custom));
                } else if self.customs.is_handled(custom.serial) {
                    self.say(now, ToSource::CustomDone { serial: custom.serial });
                }
            }
            ToDestination::CustomDone { serial } => self.customs.done(serial),
            ToDestination::Released => self.released = true,
            ToDestination::Group(_) => {}
        }
    }

    fn hello(&mut self, now: Duration, version: u16, session: SessionId) {
        if version != VERSION {
            self.hang_up(now, Reason::Version { ours: VERSION, theirs: version });
        } else if session != self.session {
            let reason = Reason::UnknownSession(session);
            self.say(now, ToSource::Abort(reason));
        } else {
            self.say(now, ToSource::Hello { version: VERSION, session });
        }
    }

    /// The source has said what it gives away: checks that, and answers with what is here.
    fn group(&mut self, now: Duration, devices: &[DeviceInfo]) {
        if let Err(reason) = self.sort(devices) {
            self.hang_up(now, reason);
            return;
        }
        if self.phase == Phase::Receiving {
            for (incoming, info) in self.devices.iter_mut().zip(devices) {
                let Some(history) = History::new(info.history.clone()) else {
                    self.hang_up(now, Reason::Protocol("its history makes no sense".into()));
                    return;
                };
                incoming.replica.follow(&history, info.clock, incoming.base == info.base);
                // Blocks at the base's epoch will be what the source's are.
                incoming.base = info.base;
            }
            let devices = (0..self.devices.len()).map(|at| DeviceIndex(at as u16));
            self.actions.extend(devices.map(Action::Note));
        }
        if let Phase::Failed(reason) = self.phase.clone() {
            self.say(now, ToSource::Abort(reason));
        }
        let mut held = Vec::with_capacity(self.devices.len());
        let token = self.token_state();
        for (at, info) in devices.iter().enumerate() {
            let (incoming, device) = (&self.devices[at], DeviceIndex(at as u16));
            let clock = match token {
                Token::Awaited => incoming.replica.clock(),
                Token::Taken(_) | Token::Runs(_) => incoming.moved(self.session),
            };
            let clock = clock.min(info.clock);
            let ranges: Vec<BlockRange> = incoming.replica.absent().ranges().collect();
            let mut parts = ranges.chunks(MAX_RANGES).map(<[BlockRange]>::to_vec);
            let missing = parts.next().unwrap_or_default();
            for blocks in parts {
                self.say(now, ToSource::Missing { device, blocks });
            }
            held.push(Held { clock, missing });
        }
        self.say(now, ToSource::Have { devices: held, token });
        if let Some(link) = &mut self.link {
            link.ready = true;
        }
        self.lost = false;
        self.told = now;
        self.catch_up(now);
    }

    /// What the last link may not have brought over.
    fn catch_up(&mut self, now: Duration) {
        let waiting: Vec<_> = self.customs.unanswered().cloned().collect();
        for custom in waiting {
            self.say(now, ToSource::Custom(custom));
        }
        if matches!(self.phase, Phase::Durable | Phase::Complete) {
            self.say_durable(now);
        }
        for at in 0..self.devices.len() {
            let awaited = self.devices[at].awaited();
            self.demand(now, DeviceIndex(at as u16), &awaited);
        }
    }

    /// Puts the devices into the order of the group, the first time; checks them every time.
    fn sort(&mut self, group: &[DeviceInfo]) -> Result<(), Reason> {
        let misfit =
            |device: &DeviceName, what: String| Reason::Group { device: device.to_string(), what };
        for (at, info) in group.iter().enumerate() {
            let from = if self.sorted { at } else { 0 };
            let found = self.devices.iter().skip(from).position(|device| device.name == info.name);
            let Some(found) = found.map(|found| found + from) else {
                return Err(misfit(&info.name, "there is none of this name here".into()));
            };
            let replica = &self.devices[found].replica;
            if self.phase == Phase::Receiving && replica.owner() == Owner::Here {
                return Err(misfit(&info.name, "it is owned and used here".into()));
            }
            let geometry: Geometry = replica.geometry();
            if geometry != info.geometry {
                let what = format!("{:?} there, {geometry:?} here", info.geometry);
                return Err(misfit(&info.name, what));
            }
            if found != at {
                if self.sorted || found < at {
                    return Err(misfit(
                        &info.name,
                        "it is named twice, or in another place".into(),
                    ));
                }
                self.devices.swap(at, found);
            }
        }
        if let Some(rest) = self.devices.get(group.len()) {
            return Err(misfit(&rest.name.clone(), "the source does not have it".into()));
        }
        self.sorted = true;
        Ok(())
    }

    fn aborted(&mut self, reason: Reason) {
        match self.phase {
            Phase::Receiving => self.end(reason),
            Phase::Running => {
                // It runs here, and the source says that it cannot give what is missing.
                self.fail_waiters(super::Waiter::needs_the_peer, &reason);
                self.actions.push_back(Action::Trouble(reason));
            }
            Phase::Starting | Phase::Durable | Phase::Complete | Phase::Failed(_) => {}
        }
    }

    /// The source says what has not changed since an earlier term.
    fn kept(&mut self, device: DeviceIndex, epoch: Epoch, blocks: Vec<BlockRange>) {
        if !self.runs() || !self.fits(device, &blocks) {
            return;
        }
        let incoming = &mut self.devices[device.0 as usize];
        let known = incoming.kept.iter().map(|(_, ranges)| ranges.len()).sum::<usize>();
        // Whoever says more than there can be is not believed.
        if known as u64 <= 2 * incoming.replica.geometry().blocks() {
            incoming.kept.push((epoch, blocks));
        }
        if self.making_durable {
            self.apply_kept();
        }
    }

    /// Content is certain where it is: it gets the epoch since which it has not changed.
    pub(super) fn apply_kept(&mut self) {
        for incoming in &mut self.devices {
            let last = incoming.moved(self.session);
            for (epoch, blocks) in &incoming.kept {
                blocks.iter().for_each(|range| incoming.replica.kept(*range, last, *epoch));
            }
        }
    }

    fn fits(&self, device: DeviceIndex, blocks: &[BlockRange]) -> bool {
        let Some(incoming) = self.devices.get(device.0 as usize) else { return false };
        let size = incoming.replica.geometry().blocks();
        let inside = |r: &BlockRange| {
            r.count > 0 && r.start.0.checked_add(r.count).is_some_and(|end| end <= size)
        };
        blocks.iter().all(inside)
    }

    fn round(
        &mut self,
        now: Duration,
        device: DeviceIndex,
        epoch: Epoch,
        blocks: &[BlockRange],
        last: bool,
    ) {
        if self.phase != Phase::Receiving {
            return;
        }
        if !self.fits(device, blocks) {
            self.hang_up(now, Reason::Protocol(format!("{device}: a list past its end")));
            return;
        }
        if self.devices[device.0 as usize].replica.apply(epoch, blocks, last) {
            self.unpromise(device, blocks);
            self.counters.lists += u64::from(last);
        }
        if last {
            self.actions.push_back(Action::Note(device));
            self.say(now, ToSource::Applied { device, epoch });
        }
    }

    /// Content came over the line.
    pub(super) fn blocks(&mut self, now: Duration, link: LinkId, header: BlockHeader, slot: u64) {
        let BlockHeader { device, range, epoch, .. } = header;
        if let Some(current) = self.link.as_mut().filter(|current| current.id == link) {
            current.heard = now;
        }
        let failed = matches!(self.phase, Phase::Failed(_));
        if failed || !self.sorted || !self.fits(device, &[range]) {
            self.actions.push_back(Action::Discard(slot));
            if !failed && self.sorted {
                self.hang_up(now, Reason::Protocol(format!("{device}: blocks past its end")));
            }
            return;
        }
        let incoming = &mut self.devices[device.0 as usize];
        let verdict = incoming.replica.offer(range, epoch);
        self.counters.late += verdict.late;
        self.counters.again += verdict.again.iter().map(|part| part.count).sum::<u64>();
        if verdict.store.is_empty() {
            self.actions.push_back(Action::Discard(slot));
            let replica = &self.devices[device.0 as usize].replica;
            if verdict.again.iter().any(|part| replica.is_arriving(*part)) {
                self.held.push(super::Held { link, header, retry: verdict.again });
                return;
            }
            self.receipt(now, link, device, range, epoch, verdict.again);
            return;
        }
        let parts = verdict.store;
        let from = From::Peer { link, range, retry: verdict.again };
        self.slots.insert(slot, Slot { device, parts: parts.clone(), epoch, from });
        self.actions.push_back(Action::Store { slot, device, parts });
    }

    pub(super) fn receipt(
        &mut self,
        now: Duration,
        link: LinkId,
        device: DeviceIndex,
        range: BlockRange,
        epoch: Epoch,
        retry: Vec<BlockRange>,
    ) {
        if self.link.as_ref().is_some_and(|current| current.id == link && current.ready) {
            self.say(now, ToSource::Receipt { device, range, epoch, retry });
        }
    }

    /// Something was stored: confirmations that waited for that go out.
    pub(super) fn release_held(&mut self, now: Duration) {
        let devices = &self.devices;
        let free = |held: &mut super::Held| {
            let replica = &devices[held.header.device.0 as usize].replica;
            !held.retry.iter().any(|part| replica.is_arriving(*part))
        };
        let free: Vec<super::Held> = self.held.extract_if(.., free).collect();
        for super::Held { link, header, retry } in free {
            let BlockHeader { device, range, epoch, .. } = header;
            let replica = &self.devices[device.0 as usize].replica;
            // What has come by now need not come again.
            let absent = |part: &BlockRange| !replica.is_here(*part);
            let retry = retry.into_iter().filter(absent).collect();
            self.receipt(now, link, device, range, epoch, retry);
        }
    }

    /// Content could not be stored: before the token the move fails and the source goes on.
    pub(super) fn not_stored(
        &mut self,
        now: Duration,
        device: DeviceIndex,
        parts: &[BlockRange],
        reason: Reason,
    ) {
        if self.phase == Phase::Receiving {
            self.fail(now, reason);
            return;
        }
        let incoming = &mut self.devices[device.0 as usize];
        // Not asked for again by itself: whoever wants it next does, and may have better luck.
        parts.iter().for_each(|part| incoming.demanded.remove_range(*part));
        let failed = incoming.fail_in(parts);
        if !failed.is_empty() {
            self.actions.push_back(Action::Fail(failed, reason.clone()));
        }
        self.actions.push_back(Action::Trouble(reason));
    }

    fn token(&mut self, now: Duration, attempt: u32, last: Vec<LastRound>, state: Vec<u8>) {
        match self.phase.clone() {
            Phase::Receiving => {}
            Phase::Failed(reason) => {
                self.say(now, ToSource::Refused { attempt, reason });
                return;
            }
            Phase::Starting => return,
            Phase::Running | Phase::Durable | Phase::Complete => {
                if let Some(attempt) = self.attempt {
                    self.say(now, ToSource::Running { attempt });
                }
                return;
            }
        }
        if let Err(reason) = self.check(&last) {
            self.refuse(now, attempt, reason);
            return;
        }
        for (at, round) in last.iter().enumerate() {
            self.devices[at].replica.apply(round.epoch, &round.blocks, true);
            self.unpromise(DeviceIndex(at as u16), &round.blocks);
        }
        let term = Term { id: self.session, first: Epoch::BASE };
        for at in 0..self.devices.len() {
            if let Err(error) = self.devices[at].replica.take_over(term, Duration::ZERO) {
                self.refuse(now, attempt, Reason::Cancelled(error.to_string()));
                return;
            }
        }
        self.attempt = Some(attempt);
        self.phase = Phase::Starting;
        self.told = now;
        let flushes = last.into_iter().map(|round| round.flushes).collect();
        self.actions.push_back(Action::Run { attempt, state, flushes });
    }

    fn check(&self, last: &[LastRound]) -> Result<(), Reason> {
        if last.len() != self.devices.len() {
            return Err(Reason::Protocol("a token for another group".into()));
        }
        for (at, round) in last.iter().enumerate() {
            let device = DeviceIndex(at as u16);
            let clock = self.devices[at].replica.clock();
            let rises = round.epoch > clock || (round.epoch == clock && round.blocks.is_empty());
            if !rises || !self.fits(device, &round.blocks) {
                return Err(Reason::Protocol(format!("{device}: a token with a wrong list")));
            }
        }
        Ok(())
    }

    fn refuse(&mut self, now: Duration, attempt: u32, reason: Reason) {
        for incoming in &mut self.devices {
            let clock = incoming.replica.clock();
            incoming.replica.give_away(clock);
        }
        self.phase = Phase::Receiving;
        self.end(reason.clone());
        self.say(now, ToSource::Refused { attempt, reason });
    }

    pub(super) fn ran(&mut self, now: Duration) {
        if self.phase != Phase::Starting {
            return;
        }
        self.phase = Phase::Running;
        self.told = now;
        if let Some(attempt) = self.attempt {
            self.say(now, ToSource::Running { attempt });
        }
    }

    pub(super) fn cannot_run(&mut self, now: Duration, reason: Reason) {
        if self.phase == Phase::Starting
            && let Some(attempt) = self.attempt
        {
            self.refuse(now, attempt, reason);
        }
    }
}
