//! The source's blocks: what is queued, what is on its way, what comes back.

use super::{Action, Config, Outgoing, Phase, Source, SourceDevice};
use crate::{
    block::{BlockIndex, BlockRange, BlockSet},
    order::{Class, Order},
    rounds::{Epoch, Holder},
    session::messages::{
        BlockHash, BlockHeader, DeviceIndex, Held, MAX_PROMISES, MAX_RANGES, MAX_RUN, ToDestination,
    },
};
use std::{collections::BTreeMap, time::Duration};

impl Outgoing {
    pub(super) fn new(device: SourceDevice) -> Self {
        let blocks = device.geometry.blocks();
        let set = || BlockSet::new(blocks);
        Self {
            name: device.name,
            base: device.base,
            geometry: device.geometry,
            rounds: device.rounds,
            history: device.history,
            holder: None,
            told: set(),
            last: device.last,
            lists: 0,
            first_done: false,
            label: Epoch::BASE,
            listed: None,
            order: Order::new(blocks, device.heat),
            flying: set(),
            in_flight: 0,
            demanded: 0,
            sent: BTreeMap::new(),
            after: set(),
            absent: device.absent,
            awaited: set(),
            promised: set(),
            hedged: blocks,
            expected: Vec::new(),
            early: Vec::new(),
        }
    }

    /// The newest round that is closed, or the last that the source makes.
    pub(super) fn closed(&self) -> Epoch {
        self.last.unwrap_or(Epoch(self.rounds.clock().0.saturating_sub(1)))
    }

    /// No list has been made for the destination on this link.
    pub(super) fn is_new(&self) -> bool {
        self.holder.is_some() && self.lists == 0
    }

    /// Bytes not confirmed.
    pub(super) fn remaining(&self) -> u64 {
        let blocks = self.holder.as_ref().map_or(0, |holder| holder.exceptions().len());
        blocks * self.geometry.block()
    }

    /// Longest run in one message, in blocks.
    fn max_run(&self) -> u64 {
        (MAX_RUN / self.geometry.block()).max(1)
    }

    /// A part of what is missing at the destination.
    pub(super) fn missing(&mut self, blocks: &[BlockRange]) {
        blocks.iter().for_each(|range| self.told.insert_range(*range));
    }

    /// The destination has said all that it has. What it misses is queued with the first list on
    /// this link, and sent as of that: content of now must not pass for content of an older round.
    pub(super) fn begin(&mut self, held: &Held) {
        self.missing(&held.missing);
        let missing = std::mem::replace(&mut self.told, BlockSet::new(self.geometry.blocks()));
        self.order.remove(BlockRange::new(0, self.geometry.blocks()));
        self.promised.intersect_with(&missing);
        self.holder = Some(Holder::new(held.clock, missing));
        self.label = held.clock;
        self.listed = None;
        self.lists = 0;
    }

    /// What was written up to `epoch` and has not been listed. It is not sent as of an older round
    /// any more: that would be in vain.
    pub(super) fn next_list(&mut self, epoch: Epoch) -> Option<BlockSet> {
        let list = self.holder.as_mut()?.begin_new(&self.rounds, epoch);
        for range in list.ranges() {
            self.order.remove(range);
            self.promised.remove_range(range);
            self.awaited.remove_range(range);
            self.after.remove_range(range);
            if self.first_done {
                self.order.wrote(range);
            }
        }
        self.lists += 1;
        Some(list)
    }

    /// As [`Outgoing::next_list`], for the token: nobody waits for a confirmation.
    pub(super) fn last_list(&mut self, epoch: Epoch) -> BlockSet {
        let pending = self.listed.take();
        let list = self.next_list(epoch).unwrap_or(BlockSet::new(self.geometry.blocks()));
        if let Some((_, pending)) = pending {
            self.queue(&pending, Class::Dirty);
        }
        self.label = epoch;
        self.queue_missing(Class::Dirty);
        list
    }

    /// Queues all that the destination lacks, if that was not done on this link.
    pub(super) fn queue_missing(&mut self, class: Class) {
        if self.lists > 1 {
            return;
        }
        let Some(holder) = &self.holder else { return };
        for range in holder.exceptions().ranges() {
            self.order.insert(class, range);
        }
        for range in self.promised.ranges() {
            self.order.remove(range);
        }
        // The first list on a link: most of what was recorded has not come yet.
        self.expected.iter().for_each(|range| self.order.promote(*range));
    }

    /// The next run of what a store has promised, to be sent all the same.
    fn next_promised(&mut self) -> Option<BlockRange> {
        if self.promised.is_empty() {
            return None;
        }
        let (blocks, step) = (self.geometry.blocks(), self.max_run());
        for _ in 0..=blocks.div_ceil(step) + 1 {
            if self.hedged == 0 {
                self.hedged = blocks;
            }
            let start = (self.hedged - 1) / step * step;
            let window = BlockRange::new(start, self.hedged - start);
            if let Some(range) = self.promised.ranges_in(window).last() {
                self.hedged = range.start.0;
                self.promised.remove_range(range);
                return Some(range);
            }
            self.hedged = start;
        }
        None
    }

    pub(super) fn queue(&mut self, list: &BlockSet, class: Class) {
        list.ranges().for_each(|range| self.order.insert(class, range));
    }

    /// The first part of a run that can be sent now; what cannot be is put where it waits.
    fn sendable(&mut self, class: Class, range: BlockRange) -> Ready {
        if !self.flying.intersects(range) && !self.absent.intersects(range) {
            return Ready::Send(range);
        }
        let first = BlockRange::new(range.start.0, 1);
        let part = |set: &BlockSet| set.ranges_in(range).next();
        let (ready, end) = if self.flying.intersects(first) {
            let run = part(&self.flying).unwrap_or(first);
            self.after.insert_range(run);
            (Ready::Nothing, run.end())
        } else if self.absent.intersects(first) {
            let run = part(&self.absent).unwrap_or(first);
            self.awaited.insert_range(run);
            (Ready::Pull(run), run.end())
        } else {
            let next = [part(&self.flying), part(&self.absent)].into_iter().flatten();
            let end = next.map(|run| run.start.0).min().unwrap_or(range.end());
            (Ready::Send(BlockRange::new(range.start.0, end - range.start.0)), end)
        };
        if end < range.end() {
            self.order.insert(class, BlockRange::new(end, range.end() - end));
        }
        ready
    }
}

/// What the devices of a group may have on their way together. Half of it is anybody's; the other
/// half is divided, and each device's part is kept free for it whatever the others do: one whose
/// blocks are not confirmed, because they cannot be stored there, never stops the others. So it is
/// with what may go beyond that because somebody waits for it.
struct Room {
    share: u64,
    /// Of what is anybody's, not in use.
    free: u64,
    /// The same for what is demanded: a part for each, and what is left of the whole.
    demand_share: u64,
    demand_free: u64,
}

impl Room {
    fn new(config: &Config, devices: &[Outgoing]) -> Self {
        let count = devices.len() as u64;
        // One alone has all of it.
        let part = |of: u64| if count > 1 { of / 2 / count } else { 0 };
        let (share, demand_share) = (part(config.window), part(config.demand_window));
        let beyond = |device: &Outgoing| device.in_flight.saturating_sub(share);
        let used = devices.iter().map(beyond).sum::<u64>() + share * count;
        let all = config.window + config.demand_window - demand_share * count;
        Self {
            share,
            free: config.window.saturating_sub(used),
            demand_share,
            demand_free: all.saturating_sub(used),
        }
    }

    /// Whether a device may send more of this class.
    fn has(&self, device: &Outgoing, class: Class) -> bool {
        let own = device.in_flight < self.share;
        match class {
            Class::Demand => own || self.demand_free > 0 || device.demanded < self.demand_share,
            _ => own || self.free > 0,
        }
    }
}

enum Ready {
    Send(BlockRange),
    Pull(BlockRange),
    Nothing,
}

impl Source {
    /// The next run to send, if the budget has room for its class.
    pub(super) fn next_blocks(&mut self) -> Option<Action> {
        if self.is_over() {
            return None;
        }
        let link = self.link.as_ref().filter(|link| link.ready)?.id;
        loop {
            let Some((at, _)) = self.choose()? else {
                if self.hedge() {
                    continue;
                }
                return None;
            };
            let count = self.devices.len() as u64;
            let device = &mut self.devices[at];
            let (left, block) =
                (device.order.len() * device.geometry.block(), device.geometry.block());
            // No run is longer than what a device may have on its way in any case.
            let most = self.config.window / count;
            let run = device.max_run().min((most / block).max(1));
            let (class, range) = device.order.next(run)?;
            match device.sendable(class, range) {
                Ready::Send(range) => {
                    device.flying.insert_range(range);
                    device.sent.insert(range.start.0, (range.count, device.label, class));
                    let bytes = range.count * block;
                    device.in_flight += bytes;
                    device.demanded += if class == Class::Demand { bytes } else { 0 };
                    self.fair.took(at, bytes, left);
                    self.counters.sent[class as usize] += range.count;
                    let (device, epoch) = (DeviceIndex(at as u16), device.label);
                    let header = BlockHeader { device, range, epoch, class };
                    return Some(Action::Blocks(link, header));
                }
                Ready::Pull(range) => {
                    return Some(Action::Pull(DeviceIndex(at as u16), range, class));
                }
                Ready::Nothing => {}
            }
        }
    }

    /// The device whose turn it is, among those that have room and of these with the most urgent
    /// class. `None` if the budget is used up, `Some(None)` if nothing is queued.
    #[expect(
        clippy::option_option,
        reason = "full and empty are different, and neither is an error"
    )]
    fn choose(&self) -> Option<Option<(usize, Class)>> {
        if self.devices.iter().all(|device| device.order.is_empty()) {
            return Some(None);
        }
        let room = Room::new(&self.config, &self.devices);
        let urgent =
            |device: &Outgoing| device.order.most_urgent().filter(|class| room.has(device, *class));
        let class = self.devices.iter().filter_map(urgent).min()?;
        let left = |device: &Outgoing| match urgent(device) {
            Some(most) if most == class => device.order.len() * device.geometry.block(),
            _ => 0,
        };
        self.fair.next(self.devices.iter().map(left)).map(|at| Some((at, class)))
    }

    /// Nothing else is left: what a store has promised goes too, a run at a time from the other
    /// end, so that a slow store delays nobody. True if there was something.
    fn hedge(&mut self) -> bool {
        let room = Room::new(&self.config, &self.devices);
        let mut some = false;
        for device in &mut self.devices {
            if room.has(device, Class::Bulk)
                && let Some(range) = device.next_promised()
            {
                device.order.insert(Class::Bulk, range);
                some = true;
            }
        }
        some
    }

    pub(super) fn receipt(
        &mut self,
        device: DeviceIndex,
        range: BlockRange,
        epoch: Epoch,
        retry: &[BlockRange],
    ) {
        let urgent = !self.owns();
        let Some(device) = self.devices.get_mut(device.0 as usize) else { return };
        if range.count == 0 || range.end() > device.geometry.blocks() {
            return;
        }
        // A confirmation that comes twice says nothing about what was sent since. One may be of a
        // part: where some blocks of a run were references, they have fates of their own.
        let run = device.sent.range(..=range.start.0).next_back();
        let Some((start, (count, as_of, class))) = run.map(|(start, run)| (*start, *run)) else {
            return;
        };
        let run = BlockRange::new(start, count);
        if as_of != epoch || range.end() > run.end() {
            return;
        }
        device.sent.remove(&start);
        if range.start > run.start {
            device.sent.insert(start, (range.start.0 - start, epoch, class));
        }
        if range.end() < run.end() {
            device.sent.insert(range.end(), (run.end() - range.end(), epoch, class));
        }
        device.flying.remove_range(range);
        let bytes = range.count * device.geometry.block();
        device.in_flight = device.in_flight.saturating_sub(bytes);
        if class == Class::Demand {
            device.demanded = device.demanded.saturating_sub(bytes);
        }
        self.pace.confirmed(bytes);
        let again = if urgent { Class::Demand } else { Class::Dirty };
        let held_back: Vec<BlockRange> = device.after.ranges_in(range).collect();
        device.after.remove_range(range);
        let Some(holder) = &mut device.holder else { return };
        let inside = |part: &&BlockRange| part.start >= range.start && part.end() <= range.end();
        let mut at = range.start.0;
        for part in retry.iter().filter(inside) {
            if part.start.0 > at {
                holder.settle(&device.rounds, BlockRange::new(at, part.start.0 - at), epoch);
            }
            at = at.max(part.end());
            self.counters.again += part.count;
            device.order.insert(again, *part);
        }
        if at < range.end() {
            holder.settle(&device.rounds, BlockRange::new(at, range.end() - at), epoch);
        }
        held_back.into_iter().for_each(|part| device.order.insert(again, part));
    }

    pub(super) fn needed(&mut self, device: DeviceIndex, range: BlockRange, class: Class) {
        let Some(device) = self.devices.get_mut(device.0 as usize) else { return };
        if range.end() > device.geometry.blocks() || range.count > device.max_run() {
            return;
        }
        // What is on its way comes; what is in a list that is not confirmed is queued when it is.
        let listed = device.listed.as_ref().map(|(_, list)| list);
        let mut wanted = Vec::new();
        for block in range.chunks(1) {
            let waits = listed.is_some_and(|list| list.intersects(block));
            if !waits && !device.flying.intersects(block) {
                match wanted.last_mut() {
                    Some(BlockRange { start, count }) if start.0 + *count == block.start.0 => {
                        *count += 1;
                    }
                    _ => wanted.push(block),
                }
            }
        }
        for part in wanted {
            device.promised.remove_range(part);
            device.order.insert(class, part);
            if let Some(holder) = &mut device.holder {
                holder.put_back(part);
            }
        }
    }

    pub(super) fn not_needed(&mut self, device: DeviceIndex, range: BlockRange, epoch: Epoch) {
        let Some(device) = self.devices.get_mut(device.0 as usize) else { return };
        if range.end() > device.geometry.blocks() {
            return;
        }
        let whole = !device.rounds.any_newer(range, epoch);
        let size = if whole { range.count.max(1) } else { 1 };
        let before = device.order.len() + device.promised.len();
        for part in range.chunks(size) {
            // A later list has it: the destination did not know that yet.
            if !whole && device.rounds.any_newer(part, epoch) {
                continue;
            }
            device.order.remove(part);
            device.promised.remove_range(part);
            device.awaited.remove_range(part);
            device.after.remove_range(part);
            if let Some(holder) = &mut device.holder {
                holder.settle(&device.rounds, part, epoch);
            }
        }
        self.counters.spared += before - device.order.len() - device.promised.len();
    }

    /// Blocks that this side was itself waiting for.
    pub(super) fn arrived(&mut self, device: DeviceIndex, range: BlockRange) {
        let class = if self.phase == Phase::Filling { Class::Bulk } else { Class::Demand };
        let Some(device) = self.devices.get_mut(device.0 as usize) else { return };
        device.absent.remove_range(range);
        let wanted: Vec<BlockRange> = device.awaited.ranges_in(range).collect();
        device.awaited.remove_range(range);
        wanted.into_iter().for_each(|part| device.order.insert(class, part));
    }

    /// A store has blocks. Passed on for those that have not been written since and that the
    /// destination misses; they are the last to go over the line.
    pub(super) fn promised(
        &mut self,
        now: Duration,
        index: DeviceIndex,
        epoch: Epoch,
        blocks: Vec<(BlockIndex, BlockHash)>,
    ) {
        if self.is_over() {
            return;
        }
        let Some(device) = self.devices.get_mut(index.0 as usize) else { return };
        if !device.first_done {
            device.early.push((epoch, blocks));
            return;
        }
        let Some(holder) = &device.holder else { return };
        let listed = device.listed.as_ref().map(|(_, list)| list);
        let wanted = |(block, _): &(BlockIndex, BlockHash)| {
            holder.exceptions().contains(*block)
                && device.rounds.epoch(*block) <= epoch
                && !device.flying.contains(*block)
                && listed.is_none_or(|list| !list.contains(*block))
        };
        let fit: Vec<(BlockIndex, BlockHash)> = blocks.into_iter().filter(wanted).collect();
        let label = device.label;
        for (block, _) in &fit {
            let one = BlockRange::new(block.0, 1);
            if device.order.class_of(*block).is_some_and(|class| class >= Class::Dirty) {
                device.order.remove(one);
                device.promised.insert(*block);
            }
        }
        for part in fit.chunks(MAX_PROMISES) {
            let blocks = part.to_vec();
            self.say_if_ready(now, ToDestination::Promise { device: index, epoch: label, blocks });
        }
    }

    pub(super) fn expected(&mut self, now: Duration, index: DeviceIndex, order: &[BlockRange]) {
        let Some(device) = self.devices.get_mut(index.0 as usize) else { return };
        let blocks = device.geometry.blocks();
        let fits = |range: &&BlockRange| range.count > 0 && range.end() <= blocks;
        device.expected = order.iter().filter(fits).copied().collect();
        device.expected.iter().for_each(|range| device.order.promote(*range));
        if self.link.as_ref().is_some_and(|link| link.ready) {
            self.tell_expected(now, index);
        }
    }

    /// Tells the destination what will be used first; again on every link.
    pub(super) fn tell_expected(&mut self, now: Duration, index: DeviceIndex) {
        let Some(device) = self.devices.get(index.0 as usize) else { return };
        for part in device.expected.clone().chunks(MAX_RANGES) {
            let order = part.to_vec();
            self.say(now, ToDestination::Expect { device: index, order });
        }
    }
}
