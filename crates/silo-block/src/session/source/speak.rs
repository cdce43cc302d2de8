//! The source's side of the conversation: links, lists, the token, what the destination says.

use super::{Action, Outgoing, Phase, Source};
use crate::{
    block::{BlockRange, BlockSet},
    order::Class,
    rounds::Epoch,
    session::{
        link::{Link, LinkId},
        messages::{
            DeviceIndex, Held, LastRound, MAX_RANGES, MAX_TOKEN_RANGES, Reason, ToDestination,
            ToSource, Token, VERSION,
        },
    },
};
use std::time::Duration;

/// Terms whose unchanged blocks are told apart.
const KEPT_TERMS: usize = 8;

impl Source {
    pub(super) fn connected(&mut self, now: Duration, id: LinkId) {
        if self.is_over() {
            self.actions.push_back(Action::Hangup(id));
            return;
        }
        if let Some(old) = self.link.take() {
            self.forget_link(now);
            self.actions.push_back(Action::Hangup(old.id));
        }
        self.link = Some(Link::new(id, now));
        self.counters.links += 1;
        self.say(now, ToDestination::Hello { version: VERSION, session: self.session });
        self.say(now, ToDestination::Group(self.info()));
    }

    pub(super) fn cut(&mut self, now: Duration, id: LinkId) {
        if self.link.as_ref().is_some_and(|link| link.id == id) {
            self.link = None;
            self.forget_link(now);
        }
    }

    /// Nothing is on its way any more; what the destination has it will say on the next link.
    fn forget_link(&mut self, now: Duration) {
        self.unpause();
        self.alone = now;
        for device in &mut self.devices {
            (device.in_flight, device.demanded) = (0, 0);
            device.flying = BlockSet::new(device.geometry.blocks());
            device.sent.clear();
            device.after = BlockSet::new(device.geometry.blocks());
            device.told = BlockSet::new(device.geometry.blocks());
            device.listed = None;
            device.holder = None;
        }
    }

    /// Says something if there is a link; else the next handshake makes up for it.
    pub(super) fn say(&mut self, now: Duration, message: ToDestination) {
        if let Some(link) = &mut self.link {
            link.said = now;
            self.actions.push_back(Action::Send(link.id, message));
        }
    }

    pub(super) fn say_if_ready(&mut self, now: Duration, message: ToDestination) {
        if self.link.as_ref().is_some_and(|link| link.ready) {
            self.say(now, message);
        }
    }

    pub(super) fn tell_abort(&mut self, reason: &Reason) {
        if let Some(link) = &self.link {
            self.actions.push_back(Action::Send(link.id, ToDestination::Abort(reason.clone())));
        }
    }

    pub(super) fn received(&mut self, now: Duration, id: LinkId, message: ToSource) {
        let Some(link) = self.link.as_mut().filter(|link| link.id == id) else { return };
        link.heard = now;
        let ready = link.ready;
        if self.is_over() {
            return;
        }
        match message {
            ToSource::Alive => {}
            ToSource::Hello { version, session } => {
                if version != VERSION {
                    self.fail(Reason::Version { ours: VERSION, theirs: version });
                } else if session != self.session {
                    self.fail(Reason::UnknownSession(session));
                }
            }
            ToSource::Missing { device, blocks } => {
                if let Some(device) = self.devices.get_mut(device.0 as usize).filter(|_| !ready) {
                    device.missing(&blocks);
                }
            }
            ToSource::Have { devices, token } if !ready => self.have(now, &devices, token),
            ToSource::Abort(reason) => self.aborted(reason),
            ToSource::Refused { attempt, reason } if attempt == self.attempt => {
                // Whoever has run may have answered its clients: it cannot refuse any more.
                if self.phase == Phase::Switched {
                    self.take_back(reason);
                }
            }
            _ if !ready => {}
            ToSource::Applied { device, epoch } => self.applied(now, device, epoch),
            ToSource::Receipt { device, range, epoch, retry } => {
                self.receipt(device, range, epoch, &retry);
            }
            ToSource::Need { device, range, class } => self.needed(device, range, class),
            ToSource::DontNeed { device, range, epoch } => self.not_needed(device, range, epoch),
            ToSource::Running { attempt } if attempt == self.attempt => self.running(now),
            ToSource::Durable { epochs } => self.durable(now, &epochs),
            ToSource::Custom(custom) => {
                if self.customs.take(custom.serial) {
                    self.actions.push_back(Action::Custom(custom));
                } else if self.customs.is_handled(custom.serial) {
                    self.say(now, ToDestination::CustomDone { serial: custom.serial });
                }
            }
            ToSource::CustomDone { serial } => self.customs.done(serial),
            // Of another try, or said twice.
            ToSource::Running { .. } | ToSource::Refused { .. } | ToSource::Have { .. } => {}
        }
    }

    /// The destination cannot go on.
    fn aborted(&mut self, reason: Reason) {
        match self.phase {
            Phase::Quiescing | Phase::Draining => self.take_back(reason),
            // Whether it took the token it will say when asked again, or the lease does.
            Phase::Switched => self.actions.push_back(Action::Undecided),
            Phase::Filling | Phase::Serving => self.end(reason),
            Phase::Released | Phase::Failed(_) => {}
        }
    }

    /// The destination has said what it has: the link can be used.
    fn have(&mut self, now: Duration, held: &[Held], token: Token) {
        let known = |device: &Outgoing, held: &Held| held.clock <= device.closed();
        let fits = held.len() == self.devices.len()
            && self.devices.iter().zip(held).all(|(device, held)| known(device, held));
        if !fits {
            self.fail(Reason::Protocol("it has what this side never sent".into()));
            return;
        }
        if let Some(link) = &mut self.link {
            link.ready = true;
        }
        for (device, held) in self.devices.iter_mut().zip(held) {
            device.begin(held);
        }
        let waiting: Vec<_> = self.customs.unanswered().cloned().collect();
        for custom in waiting {
            self.say(now, ToDestination::Custom(custom));
        }
        for at in 0..self.devices.len() {
            self.tell_expected(now, DeviceIndex(at as u16));
        }
        let current = self.devices.iter().all(|device| device.label == device.closed());
        let ours =
            current && matches!(token, Token::Taken(by) | Token::Runs(by) if by == self.attempt);
        match (&self.phase, token) {
            (Phase::Switched | Phase::Serving, Token::Taken(_) | Token::Runs(_)) if ours => {
                // One that has not begun to run may refuse: until then nothing is given up here.
                if matches!(token, Token::Runs(_)) {
                    self.running(now);
                }
                self.devices.iter_mut().for_each(|device| device.queue_missing(Class::Bulk));
            }
            (Phase::Switched, Token::Taken(_) | Token::Runs(_)) => {
                self.fail(Reason::Protocol("it runs by another token, or other lists".into()));
            }
            (Phase::Switched, Token::Awaited) if self.hand_over.is_some() => self.send_token(now),
            (Phase::Switched, Token::Awaited) => {
                // On this link no token was sent, and those of older links are not heard any more.
                let reason = Reason::Cancelled("the source was restarted".into());
                self.tell_abort(&reason);
                self.take_back(reason);
            }
            (Phase::Serving, _) => {
                self.fail(Reason::Protocol("it has forgotten that it runs, or with what".into()));
            }
            (Phase::Filling, Token::Taken(_) | Token::Runs(_)) => {
                self.fail(Reason::Protocol("it runs without a token".into()));
            }
            _ => {}
        }
    }

    /// A round is closed: its list goes out, and its blocks follow when the list is confirmed.
    pub(super) fn round_closed(&mut self, now: Duration, epochs: &[Epoch]) {
        if self.phase != Phase::Filling {
            return;
        }
        self.asked = None;
        if epochs.len() != self.devices.len() {
            self.fail(Reason::Protocol("the driver closed rounds of other devices".into()));
            return;
        }
        let bytes = self.list(now, epochs);
        self.pace.closed(now, bytes);
    }

    /// Sends the lists of what was written up to `epochs`; gives their size in bytes.
    pub(super) fn list(&mut self, now: Duration, epochs: &[Epoch]) -> u64 {
        let mut bytes = 0;
        for (at, epoch) in epochs.iter().enumerate() {
            let device = &mut self.devices[at];
            let Some(list) = device.next_list(*epoch) else { continue };
            bytes += list.len() * device.geometry.block();
            device.listed = Some((*epoch, list.clone()));
            let index = DeviceIndex(at as u16);
            let mut ranges = list.ranges().peekable();
            loop {
                let blocks: Vec<BlockRange> = ranges.by_ref().take(MAX_RANGES).collect();
                let last = ranges.peek().is_none();
                self.say(now, ToDestination::Round { device: index, epoch: *epoch, blocks, last });
                if last {
                    break;
                }
            }
        }
        bytes
    }

    fn applied(&mut self, now: Duration, index: DeviceIndex, epoch: Epoch) {
        let Some(device) = self.devices.get_mut(index.0 as usize) else { return };
        let Some((_, list)) = device.listed.take_if(|(listed, _)| *listed == epoch) else { return };
        device.label = epoch;
        let class = if device.first_done { Class::Dirty } else { Class::Bulk };
        device.queue(&list, class);
        device.queue_missing(class);
        device.first_done = true;
        for (epoch, blocks) in std::mem::take(&mut device.early) {
            self.promised(now, index, epoch, blocks);
        }
    }

    /// Sends what makes the destination the owner. Also after a cut, when it has not got it.
    pub(super) fn send_token(&mut self, now: Duration) {
        if self.link.as_ref().is_none_or(|link| !link.ready) {
            return;
        }
        let Some(end) = self.hand_over.take() else { return };
        let (mut room, mut devices) = (MAX_TOKEN_RANGES, Vec::with_capacity(end.epochs.len()));
        for (at, (epoch, flushes)) in end.epochs.iter().zip(&end.flushes).enumerate() {
            let device = &mut self.devices[at];
            let list = device.last_list(*epoch);
            let mut ranges: Vec<BlockRange> = list.ranges().collect();
            let in_token = ranges.len().min(room);
            room -= in_token;
            let last = ranges.split_off(ranges.len() - in_token);
            for part in ranges.chunks(MAX_RANGES) {
                let (device, epoch, blocks) = (DeviceIndex(at as u16), *epoch, part.to_vec());
                self.say(now, ToDestination::Round { device, epoch, blocks, last: false });
            }
            self.devices[at].queue(&list, Class::Dirty);
            let flushes = flushes.clone();
            devices.push(LastRound { epoch: *epoch, blocks: last, flushes });
        }
        let (attempt, state) = (self.attempt, end.state.clone());
        self.say(now, ToDestination::Token { attempt, devices, state });
        self.hand_over = Some(end);
    }

    fn running(&mut self, now: Duration) {
        if self.phase == Phase::Switched {
            self.phase = Phase::Serving;
            self.told = now;
            self.hand_over = None;
            self.actions.push_back(Action::HandedOver);
        }
        if self.phase == Phase::Serving {
            self.tell_kept(now);
        }
    }

    /// Tells what has not changed since earlier terms: lists do not, they say "now".
    fn tell_kept(&mut self, now: Duration) {
        for at in 0..self.devices.len() {
            let device = &self.devices[at];
            let terms = device.history.terms();
            let ends = terms.windows(2).map(|pair| Epoch(pair[1].first.0.saturating_sub(1)));
            let ends: Vec<Epoch> = ends.collect();
            let mut after = Epoch::BASE;
            let mut all = Vec::new();
            for (number, end) in ends.iter().enumerate() {
                // Of a long history the older terms are told as one.
                if number + KEPT_TERMS < ends.len() {
                    continue;
                }
                all.push((*end, device.rounds.between(after, *end)));
                after = *end;
            }
            for (epoch, kept) in all {
                let mut ranges = kept.ranges().peekable();
                while ranges.peek().is_some() {
                    let blocks = ranges.by_ref().take(MAX_RANGES).collect();
                    let device = DeviceIndex(at as u16);
                    self.say_if_ready(now, ToDestination::Kept { device, epoch, blocks });
                }
            }
        }
    }

    fn durable(&mut self, now: Duration, epochs: &[Epoch]) {
        let all = epochs.len() == self.devices.len()
            && self.devices.iter().zip(epochs).all(|(device, epoch)| *epoch >= device.closed());
        if all && matches!(self.phase, Phase::Switched | Phase::Serving) {
            self.running(now);
            self.say(now, ToDestination::Released);
            self.phase = Phase::Released;
            self.actions.push_back(Action::Released);
        }
    }
}
