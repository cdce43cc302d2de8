//! Reads and writes on the side that receives, while blocks are still missing.

use super::{Action, Destination, Incoming, Phase};
use crate::{
    block::{BlockIndex, BlockRange, BlockSet},
    model::{Owner, Replica},
    order::{Class, Prefetch},
    rounds::Epoch,
    session::{
        destination::{Config, DestinationDevice, fetch::Fetching},
        messages::{DeviceIndex, MAX_RUN, Reason, SessionId, ToSource, Wait},
    },
};
use std::time::Duration;

/// A number of the driver for an access that may have to wait; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaiterId(pub u64);

/// What an access is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Go on now. A write also has to say [`Destination::wrote`] with this range when it is over:
    /// whole blocks that had not come.
    Go(BlockRange),
    /// Wait for [`Action::Wake`] and ask again, or for [`Action::Fail`].
    Wait,
    /// Fail.
    Refused(Reason),
}

#[derive(Debug)]
pub(super) struct Waiter {
    id: WaiterId,
    pub(super) since: Duration,
    until: Until,
    ranges: Vec<BlockRange>,
}

/// What has to be before an access can be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// The blocks are here.
    Here,
    /// Nothing is being stored to them.
    Landed,
}

impl Incoming {
    pub(super) fn new(mut device: DestinationDevice, config: &Config) -> Self {
        device.replica.abandon();
        let blocks = device.replica.geometry().blocks();
        Self {
            name: device.name,
            base: device.base,
            replica: device.replica,
            waiters: Vec::new(),
            demanded: BlockSet::new(blocks),
            expected: BlockSet::new(blocks),
            prefetch: Prefetch::new(blocks, config.prefetch),
            fetching: Fetching::new(blocks),
            kept: Vec::new(),
        }
    }

    /// The last epoch of the side that gave it to us by this session.
    pub(super) fn moved(&self, session: SessionId) -> Epoch {
        let term = self.replica.history().terms().iter().find(|term| term.id == session);
        term.map_or(self.replica.clock(), |term| Epoch(term.first.0.saturating_sub(1)))
    }
}

impl Destination {
    /// The last epoch that the source made, of each device, once the token was taken.
    #[must_use]
    pub fn last_epochs(&self) -> Vec<Epoch> {
        self.devices.iter().map(|device| device.moved(self.session)).collect()
    }

    /// Somebody here wants to read blocks.
    pub fn read(
        &mut self,
        now: Duration,
        device: DeviceIndex,
        range: BlockRange,
        waiter: WaiterId,
    ) -> Access {
        if let Some(reason) = self.refusal() {
            return Access::Refused(reason);
        }
        let Some(incoming) = self.devices.get_mut(device.0 as usize) else {
            return Access::Refused(Reason::Protocol(format!("there is no {device}")));
        };
        if incoming.replica.is_here(range) {
            return Access::Go(BlockRange::new(range.start.0, 0));
        }
        let absent: Vec<BlockRange> = incoming.replica.absent().ranges_in(range).collect();
        if self.lost && !incoming.store_has(&absent) {
            return Access::Refused(self.lost_reason());
        }
        incoming.wait(now, waiter, Until::Here, absent.clone());
        self.demand(now, device, &absent);
        Access::Wait
    }

    /// Somebody here wants to write `length` bytes at `offset`. Whole blocks need not have come: no
    /// content that comes later goes over them. Of blocks that are written in part the rest is
    /// needed first.
    pub fn write(
        &mut self,
        now: Duration,
        device: DeviceIndex,
        offset: u64,
        length: u64,
        waiter: WaiterId,
    ) -> Access {
        if let Some(reason) = self.refusal() {
            return Access::Refused(reason);
        }
        let Some(incoming) = self.devices.get_mut(device.0 as usize) else {
            return Access::Refused(Reason::Protocol(format!("there is no {device}")));
        };
        if incoming.replica.owner() != Owner::Here || !self.phase.may_write() {
            let why = format!("{device} is not owned here: it cannot be written");
            return Access::Refused(Reason::Cancelled(why));
        }
        let geometry = incoming.replica.geometry();
        let (touched, whole) = (geometry.touched(offset, length), geometry.covered(offset, length));
        if incoming.replica.is_here(touched) {
            return Access::Go(BlockRange::new(touched.start.0, 0));
        }
        let edges: Vec<BlockRange> = if whole.count == 0 {
            vec![touched]
        } else {
            let before = BlockRange::new(touched.start.0, whole.start.0 - touched.start.0);
            vec![before, BlockRange::new(whole.end(), touched.end() - whole.end())]
        };
        let absent: Vec<BlockRange> =
            edges.iter().flat_map(|edge| incoming.replica.absent().ranges_in(*edge)).collect();
        if self.lost && !incoming.store_has(&absent) {
            return Access::Refused(self.lost_reason());
        }
        if !absent.is_empty() {
            incoming.wait(now, waiter, Until::Here, absent.clone());
            self.demand(now, device, &absent);
            return Access::Wait;
        }
        if incoming.replica.is_arriving(whole) {
            // Its older content is being stored right now; a write beside that could be lost.
            incoming.wait(now, waiter, Until::Landed, vec![whole]);
            return Access::Wait;
        }
        incoming.replica.claim(whole);
        Access::Go(whole)
    }

    /// A write is over for which [`Destination::write`] gave this range. Its epochs were given by
    /// the guard of the device's [`Rounds`](crate::rounds::Rounds), which is still held.
    pub fn wrote(&mut self, now: Duration, device: DeviceIndex, range: BlockRange, well: bool) {
        if range.count == 0 {
            return;
        }
        let session = self.session;
        let Some(incoming) = self.devices.get_mut(device.0 as usize) else { return };
        let here = incoming.replica.written(range, well);
        let epoch = incoming.moved(session);
        self.counters.written += here.iter().map(|part| part.count).sum::<u64>();
        for part in &here {
            self.say_if_ready(now, ToSource::DontNeed { device, range: *part, epoch });
        }
        self.arrived(device, here);
    }

    /// Blocks are here: wakes whoever waits, and ends fetches that have become useless.
    pub(super) fn arrived(&mut self, device: DeviceIndex, here: Vec<BlockRange>) {
        let Some(incoming) = self.devices.get_mut(device.0 as usize) else { return };
        for range in &here {
            incoming.demanded.remove_range(*range);
            incoming.expected.remove_range(*range);
            for ticket in incoming.fetching.useless(*range) {
                self.counters.cancelled += 1;
                self.actions.push_back(Action::CancelFetch(ticket));
            }
        }
        self.wake_waiters(device);
        if !here.is_empty() {
            self.actions.push_back(Action::Here(device, here));
        }
    }

    pub(super) fn wake_waiters(&mut self, device: DeviceIndex) {
        let Some(incoming) = self.devices.get_mut(device.0 as usize) else { return };
        let replica = &incoming.replica;
        let mut woken = Vec::new();
        incoming.waiters.retain(|waiter| {
            let ready = waiter.ranges.iter().all(|range| match waiter.until {
                Until::Here => replica.is_here(*range),
                Until::Landed => !replica.is_arriving(*range),
            });
            if ready {
                woken.push(waiter.id);
            }
            !ready
        });
        if !woken.is_empty() {
            self.actions.push_back(Action::Wake(woken));
        }
    }

    pub(super) fn fail_waiters(
        &mut self,
        which: impl Fn(&Waiter, &Fetching) -> bool,
        reason: &Reason,
    ) {
        let mut failed = Vec::new();
        for device in &mut self.devices {
            let Incoming { waiters, fetching, .. } = device;
            failed.extend(waiters.extract_if(.., |w| which(w, fetching)).map(|waiter| waiter.id));
        }
        if !failed.is_empty() {
            self.actions.push_back(Action::Fail(failed, reason.clone()));
        }
    }

    fn refusal(&self) -> Option<Reason> {
        match &self.phase {
            Phase::Failed(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    fn lost_reason(&self) -> Reason {
        Reason::Deadline { what: Wait::Blocks, after: self.config.patience.answer }
    }

    /// Asks the peer, and the store, for blocks that somebody waits for; each block once a link.
    pub(super) fn demand(&mut self, now: Duration, device: DeviceIndex, absent: &[BlockRange]) {
        let ready = self.link.as_ref().is_some_and(|link| link.ready);
        let Some(incoming) = self.devices.get_mut(device.0 as usize) else { return };
        let max = (MAX_RUN / incoming.replica.geometry().block()).max(1);
        let (mut asks, mut faults) = (Vec::new(), Vec::new());
        for range in absent {
            incoming.fetching.urge(Class::Demand, *range);
            let mut at = range.start.0;
            let asked: Vec<BlockRange> = incoming.demanded.ranges_in(*range).collect();
            for known in asked.into_iter().chain([BlockRange::new(range.end(), 0)]) {
                if known.start.0 > at {
                    let new = BlockRange::new(at, known.start.0 - at);
                    faults.push(new.start);
                    asks.extend(new.chunks(max));
                }
                at = known.end();
            }
            if ready {
                incoming.demanded.insert_range(*range);
            }
        }
        if !ready {
            return;
        }
        for range in asks {
            self.counters.demands += 1;
            self.say(now, ToSource::Need { device, range, class: Class::Demand });
        }
        for fault in faults {
            self.prefetch(now, device, fault);
        }
    }

    /// A fault says something about what comes next.
    fn prefetch(&mut self, now: Duration, device: DeviceIndex, fault: BlockIndex) {
        if self.config.prefetch == 0 || !self.runs() {
            return;
        }
        let Some(incoming) = self.devices.get_mut(device.0 as usize) else { return };
        let mut asks = Vec::new();
        for range in incoming.prefetch.fault(fault) {
            let absent: Vec<BlockRange> = incoming.replica.absent().ranges_in(range).collect();
            for part in absent {
                let known =
                    incoming.expected.intersects(part) || incoming.demanded.intersects(part);
                if !known {
                    incoming.expected.insert_range(part);
                    incoming.fetching.urge(Class::Prefetch, part);
                    asks.push(part);
                }
            }
        }
        for range in asks {
            self.counters.prefetches += 1;
            self.say(now, ToSource::Need { device, range, class: Class::Prefetch });
        }
    }

    /// A source on this host needs blocks to pass on.
    pub(super) fn want(
        &mut self,
        now: Duration,
        device: DeviceIndex,
        range: BlockRange,
        class: Class,
    ) {
        let Some(incoming) = self.devices.get_mut(device.0 as usize) else { return };
        let absent: Vec<BlockRange> = incoming.replica.absent().ranges_in(range).collect();
        let here: Vec<BlockRange> = {
            let mut rest = BlockSet::new(incoming.replica.geometry().blocks());
            rest.insert_range(range);
            absent.iter().for_each(|part| rest.remove_range(*part));
            rest.ranges().collect()
        };
        if !here.is_empty() {
            self.actions.push_back(Action::Here(device, here));
        }
        if class == Class::Demand && !absent.is_empty() {
            self.demand(now, device, &absent);
        }
    }
}

impl Incoming {
    fn wait(&mut self, now: Duration, id: WaiterId, until: Until, ranges: Vec<BlockRange>) {
        self.waiters.push(Waiter { id, since: now, until, ranges });
    }

    /// Takes out the waiters that need something of these.
    pub(super) fn fail_in(&mut self, parts: &[BlockRange]) -> Vec<WaiterId> {
        let meets = |a: &BlockRange, b: &BlockRange| a.start.0 < b.end() && b.start.0 < a.end();
        let concerned = |w: &mut Waiter| {
            w.until == Until::Here && w.ranges.iter().any(|r| parts.iter().any(|p| meets(r, p)))
        };
        self.waiters.extract_if(.., concerned).map(|waiter| waiter.id).collect()
    }

    /// What somebody waits for.
    pub(super) fn awaited(&self) -> Vec<BlockRange> {
        awaited(&self.waiters, &self.replica)
    }

    /// Whether a store has said that it has all of these.
    fn store_has(&self, ranges: &[BlockRange]) -> bool {
        ranges.iter().all(|range| self.fetching.may_bring(*range))
    }
}

/// What those who wait still lack.
pub(super) fn awaited(waiters: &[Waiter], replica: &Replica) -> Vec<BlockRange> {
    let waiting = waiters.iter().filter(|waiter| waiter.until == Until::Here);
    let ranges = waiting.flat_map(|waiter| &waiter.ranges);
    ranges.flat_map(|range| replica.absent().ranges_in(*range)).collect()
}

impl Waiter {
    /// Whether nobody but the peer can bring what it waits for.
    pub(super) fn needs_the_peer(&self, fetching: &Fetching) -> bool {
        self.ranges.iter().any(|range| !fetching.may_bring(*range))
    }
}

impl Phase {
    fn may_write(&self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Durable | Self::Complete)
    }
}
