//! Blocks from a store, beside those from the peer: whichever comes first and is right is taken.
//!
//! What must hold: an answer counts only if its block is absent, the epoch that it was fetched for
//! is still the block's, and its hash is the one that the owner promised for that. A block that was
//! not promised is not fetched.

use super::{Action, Destination, From, Incoming, Slot};
use crate::{
    block::{BlockIndex, BlockRange, BlockSet},
    model::Replica,
    order::{Class, Heat, Order},
    rounds::Epoch,
    session::messages::{BlockHash, DeviceIndex, Reason, ToSource},
};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    time::Duration,
};

/// Where promised hashes are kept: 32 bytes a promised block, so that large devices keep them in a
/// mapped file.
pub trait Hashes: Send + fmt::Debug {
    /// Keeps the hash of a block in place of any other.
    fn put(&mut self, device: DeviceIndex, block: BlockIndex, hash: BlockHash);
    /// The hash that was kept last; anything for a block that has none.
    fn get(&self, device: DeviceIndex, block: BlockIndex) -> Option<BlockHash>;
}

/// Hashes in memory, in pages of 64 blocks.
#[derive(Debug, Default)]
pub struct MemoryHashes(HashMap<(DeviceIndex, u64), Box<[BlockHash; 64]>>);

impl Hashes for MemoryHashes {
    fn put(&mut self, device: DeviceIndex, block: BlockIndex, hash: BlockHash) {
        let page = self.0.entry((device, block.0 / 64));
        page.or_insert_with(|| Box::new([BlockHash([0; 32]); 64]))[(block.0 % 64) as usize] = hash;
    }

    fn get(&self, device: DeviceIndex, block: BlockIndex) -> Option<BlockHash> {
        self.0.get(&(device, block.0 / 64)).map(|page| page[(block.0 % 64) as usize])
    }
}

/// The fetches of one device.
#[derive(Debug)]
pub(super) struct Fetching {
    blocks: u64,
    /// Absent, and a store has the content of their epoch. `None` before the first promise.
    promised: Option<BlockSet>,
    queue: Option<Order>,
    under_way: BTreeMap<u64, (BlockRange, Epoch)>,
    /// Promised, but the store has failed to give them. The peer is asked, and the store again: it
    /// may be the only one that is left.
    doubted: Option<BlockSet>,
    /// Those of them that are not asked for again before [`Fetching::pause`] has passed.
    aside: Option<BlockSet>,
    pause: Duration,
    /// Will probably be used soon.
    expected: Option<BlockSet>,
}

/// Longest run in one request: who waits for a block of it waits for no more than this.
const MAX_FETCH: u64 = 64 << 10;
/// How long a store is not asked for a block that it has failed to give.
const PAUSE: Duration = Duration::from_secs(1);

impl Fetching {
    pub(super) fn new(blocks: u64) -> Self {
        Self {
            blocks,
            promised: None,
            queue: None,
            under_way: BTreeMap::new(),
            doubted: None,
            aside: None,
            pause: Duration::ZERO,
            expected: None,
        }
    }

    /// Whether a store has all of these, and has never failed to give one.
    pub(super) fn covers(&self, absent: &BlockSet) -> bool {
        let doubted = |range| self.doubted.as_ref().is_some_and(|set| set.intersects(range));
        absent.ranges().all(|range| self.may_bring(range) && !doubted(range))
    }

    /// Whether a store has said that it has all of these.
    pub(super) fn may_bring(&self, range: BlockRange) -> bool {
        self.promised.as_ref().is_some_and(|set| set.contains_range(range))
    }

    /// The parts of a range that no store has.
    pub(super) fn unpromised(&self, range: BlockRange) -> Vec<BlockRange> {
        let (mut at, mut rest) = (range.start.0, Vec::new());
        let promised = self.promised.iter().flat_map(|set| set.ranges_in(range));
        for part in promised.chain([BlockRange::new(range.end(), 0)]) {
            if part.start.0 > at {
                rest.push(BlockRange::new(at, part.start.0 - at));
            }
            at = part.end();
        }
        rest
    }

    /// Somebody waits for these: if they are promised, they are next.
    pub(super) fn urge(&mut self, class: Class, range: BlockRange) {
        let (Some(promised), Some(queue)) = (&self.promised, &mut self.queue) else { return };
        for part in promised.ranges_in(range) {
            for block in part.chunks(1) {
                // What is on its way already comes by itself.
                let aside = self.aside.as_mut().is_some_and(|aside| aside.remove(block.start));
                if aside || queue.class_of(block.start).is_some() {
                    queue.insert(class, block);
                }
            }
        }
    }

    /// The store has failed to give these: what is still promised is asked for again, later.
    fn doubt(&mut self, now: Duration, range: BlockRange) {
        let Some(promised) = &self.promised else { return };
        let blocks = self.blocks;
        let doubted = self.doubted.get_or_insert_with(|| BlockSet::new(blocks));
        let aside = self.aside.get_or_insert_with(|| BlockSet::new(blocks));
        if aside.is_empty() {
            self.pause = now + PAUSE;
        }
        for part in promised.ranges_in(range) {
            doubted.insert_range(part);
            aside.insert_range(part);
        }
    }

    /// What was put aside is asked for again, if it is time; first what somebody waits for.
    fn come_back(&mut self, now: Duration, awaited: impl FnOnce() -> Vec<BlockRange>) {
        if now < self.pause || self.aside.as_ref().is_none_or(BlockSet::is_empty) {
            return;
        }
        let Some(aside) = self.aside.take() else { return };
        let (Some(promised), Some(queue)) = (&self.promised, &mut self.queue) else { return };
        let still: Vec<BlockRange> = aside
            .ranges()
            .flat_map(|range| promised.ranges_in(range).collect::<Vec<_>>())
            .collect();
        still.into_iter().for_each(|part| queue.insert(Class::Bulk, part));
        awaited().into_iter().for_each(|part| self.urge(Class::Demand, part));
    }

    /// These will probably be used soon.
    pub(super) fn expect(&mut self, range: BlockRange) {
        let blocks = self.blocks;
        if range.end() <= blocks {
            self.expected.get_or_insert_with(|| BlockSet::new(blocks)).insert_range(range);
        }
        if let Some(queue) = &mut self.queue {
            queue.promote(range);
        }
    }

    fn promise(&mut self, block: BlockIndex) {
        let blocks = self.blocks;
        let set = self.promised.get_or_insert_with(|| BlockSet::new(blocks));
        let queue = self.queue.get_or_insert_with(|| Order::new(blocks, Heat::new(blocks)));
        if set.insert(block) {
            let soon = self.expected.as_ref().is_some_and(|set| set.contains(block));
            let class = if soon { Class::Prefetch } else { Class::Bulk };
            queue.insert(class, BlockRange::new(block.0, 1));
        }
    }

    /// These are not promised any more: they came, or changed. Gives the fetches that would bring
    /// nothing else.
    pub(super) fn useless(&mut self, range: BlockRange) -> Vec<u64> {
        let Some(promised) = &mut self.promised else { return Vec::new() };
        promised.remove_range(range);
        for set in [&mut self.doubted, &mut self.aside].into_iter().flatten() {
            set.remove_range(range);
        }
        if let Some(queue) = &mut self.queue {
            queue.remove(range);
        }
        let promised = &*promised;
        let ends = |(_, (fetch, _)): &(&u64, &(BlockRange, Epoch))| !promised.intersects(*fetch);
        let useless: Vec<u64> = self.under_way.iter().filter(ends).map(|(t, _)| *t).collect();
        for ticket in &useless {
            self.under_way.remove(ticket);
        }
        useless
    }

    /// When something is asked for again.
    pub(super) fn paused(&self, now: Duration) -> Option<Duration> {
        let waits = self.aside.as_ref().is_some_and(|aside| !aside.is_empty());
        (waits && now < self.pause).then_some(self.pause)
    }

    fn bytes_under_way(&self, block: u64) -> u64 {
        self.under_way.values().map(|(range, _)| range.count * block).sum()
    }
}

impl Destination {
    /// The owner says that a store has blocks.
    pub(super) fn promise(
        &mut self,
        device: DeviceIndex,
        epoch: Epoch,
        blocks: &[(BlockIndex, BlockHash)],
    ) {
        let Some(incoming) = self.devices.get_mut(device.0 as usize) else { return };
        let mut waited = Vec::new();
        for (block, hash) in blocks {
            let replica = &incoming.replica;
            let fits = epoch <= replica.clock() && replica.epoch(*block) <= epoch;
            if fits && replica.absent().contains(*block) {
                self.hashes.put(device, *block, *hash);
                incoming.fetching.promise(*block);
                if incoming.demanded.contains(*block) {
                    waited.push(BlockRange::new(block.0, 1));
                }
            }
        }
        for range in waited {
            incoming.fetching.urge(Class::Demand, range);
        }
    }

    /// What a store has of the blocks that are not here: to be noted durably with
    /// [`Action::MakeDurable`], because the source may go on the strength of it.
    #[must_use]
    pub fn promised(&self, device: DeviceIndex) -> Vec<(BlockIndex, BlockHash)> {
        let Some(incoming) = self.devices.get(device.0 as usize) else { return Vec::new() };
        let Some(promised) = &incoming.fetching.promised else { return Vec::new() };
        let blocks = promised.ranges().flat_map(|range| range.start.0..range.end());
        let blocks = blocks.map(BlockIndex);
        blocks.filter_map(|block| Some((block, self.hashes.get(device, block)?))).collect()
    }

    /// After a restart: what [`Destination::promised`] said when it was noted. Blocks that have
    /// come since are left out.
    pub fn remember(&mut self, device: DeviceIndex, blocks: &[(BlockIndex, BlockHash)]) {
        let clock = self.replica(device).map(Replica::clock);
        self.relies |= !blocks.is_empty();
        self.promise(device, clock.unwrap_or(Epoch::BASE), blocks);
    }

    /// Blocks have a newer list: what a store has of them is old.
    pub(super) fn unpromise(&mut self, device: DeviceIndex, blocks: &[BlockRange]) {
        let Some(incoming) = self.devices.get_mut(device.0 as usize) else { return };
        for range in blocks {
            for ticket in incoming.fetching.useless(*range) {
                self.counters.cancelled += 1;
                self.actions.push_back(Action::CancelFetch(ticket));
            }
        }
    }

    /// The next fetch, if there is room for it; demands have a window of their own.
    pub(super) fn next_fetch(&mut self, now: Duration) -> Option<Action> {
        let window = self.config.fetch_window;
        let used: u64 = self.devices.iter().map(Incoming::fetched_bytes).sum();
        for (at, incoming) in self.devices.iter_mut().enumerate() {
            let Incoming { fetching, waiters, replica, .. } = incoming;
            fetching.come_back(now, || super::access::awaited(waiters, replica));
            let Some(queue) = &mut incoming.fetching.queue else { continue };
            let Some(class) = queue.most_urgent() else { continue };
            let room = if class == Class::Demand { 2 * window } else { window };
            if used >= room {
                continue;
            }
            let block = incoming.replica.geometry().block();
            let Some((class, range)) = queue.next((MAX_FETCH / block).max(1)) else { continue };
            self.tickets += 1;
            let (ticket, device) = (self.tickets, DeviceIndex(at as u16));
            let epoch = incoming.replica.clock();
            incoming.fetching.under_way.insert(ticket, (range, epoch));
            return Some(Action::Fetch { ticket, device, range, epoch, class });
        }
        None
    }

    fn take_ticket(&mut self, ticket: u64) -> Option<(DeviceIndex, BlockRange, Epoch)> {
        self.devices.iter_mut().enumerate().find_map(|(at, incoming)| {
            let (range, epoch) = incoming.fetching.under_way.remove(&ticket)?;
            Some((DeviceIndex(at as u16), range, epoch))
        })
    }

    /// Content came from a store.
    pub(super) fn fetched(
        &mut self,
        now: Duration,
        ticket: u64,
        hashes: &[Option<BlockHash>],
        slot: u64,
    ) {
        let Some((device, range, epoch)) = self.take_ticket(ticket) else {
            self.counters.store_late += hashes.len() as u64;
            self.actions.push_back(Action::Discard(slot));
            return;
        };
        let incoming = &mut self.devices[device.0 as usize];
        let (mut parts, mut wrong) = (Vec::new(), Vec::new());
        for (at, block) in range.chunks(1).enumerate() {
            let promised = incoming.fetching.promised.as_ref();
            if !promised.is_some_and(|set| set.contains(block.start)) {
                self.counters.store_late += 1;
                continue;
            }
            let Some(hash) = hashes.get(at).copied().flatten() else {
                self.counters.store_failed += 1;
                push(&mut wrong, block);
                continue;
            };
            if Some(hash) != self.hashes.get(device, block.start) {
                self.counters.store_wrong += 1;
                push(&mut wrong, block);
                continue;
            }
            let verdict = incoming.replica.offer(block, epoch);
            if verdict.store.is_empty() {
                self.counters.store_late += 1;
            } else {
                push(&mut parts, block);
            }
        }
        for block in wrong {
            self.ask_the_peer(now, device, block);
        }
        if parts.is_empty() {
            self.actions.push_back(Action::Discard(slot));
            return;
        }
        let entry = Slot { device, parts: parts.clone(), epoch, from: From::Store };
        self.slots.insert(slot, entry);
        self.actions.push_back(Action::Store { slot, device, parts });
    }

    pub(super) fn fetch_failed(&mut self, now: Duration, ticket: u64) {
        let Some((device, range, _)) = self.take_ticket(ticket) else { return };
        self.counters.store_failed += range.count;
        self.ask_the_peer(now, device, range);
    }

    /// A store does not give what was promised. The peer does, if it is there; it may have gone
    /// because of this promise, or be about to die, so the store is asked again too.
    fn ask_the_peer(&mut self, now: Duration, device: DeviceIndex, range: BlockRange) {
        let incoming = &mut self.devices[device.0 as usize];
        incoming.fetching.doubt(now, range);
        let awaited = incoming.awaited().iter().any(|part| overlaps(*part, range));
        let class = if awaited { Class::Demand } else { Class::Dirty };
        let absent: Vec<BlockRange> = incoming.replica.absent().ranges_in(range).collect();
        for range in absent {
            self.say_if_ready(now, ToSource::Need { device, range, class });
        }
    }

    /// Content that is being stored has landed, or could not be stored.
    pub(super) fn stored(&mut self, now: Duration, slot: u64, result: Result<(), String>) {
        let Some(entry) = self.slots.remove(&slot) else { return };
        let device = entry.device;
        let (session, runs) = (self.session, self.runs());
        let incoming = &mut self.devices[device.0 as usize];
        let mut here = Vec::new();
        for part in &entry.parts {
            here.extend(incoming.replica.stored(*part, entry.epoch, result.is_ok()));
        }
        let epoch = if runs { incoming.moved(session) } else { incoming.replica.clock() };
        let blocks: u64 = here.iter().map(|part| part.count).sum();
        match entry.from {
            From::Peer { link, range, retry } => {
                self.counters.from_peer += blocks;
                self.receipt(now, link, device, range, entry.epoch, retry);
            }
            From::Store => {
                self.counters.from_store += blocks;
                for range in here.clone() {
                    self.say_if_ready(now, ToSource::DontNeed { device, range, epoch });
                }
            }
        }
        if let Err(what) = result {
            let range = entry.parts[0];
            self.not_stored(now, device, &entry.parts, Reason::Store { device, range, what });
        }
        self.arrived(device, here);
        self.release_held(now);
    }
}

impl Incoming {
    fn fetched_bytes(&self) -> u64 {
        self.fetching.bytes_under_way(self.replica.geometry().block())
    }
}

fn overlaps(a: BlockRange, b: BlockRange) -> bool {
    a.start.0 < b.end() && b.start.0 < a.end()
}

fn push(runs: &mut Vec<BlockRange>, block: BlockRange) {
    match runs.last_mut() {
        Some(last) if last.end() == block.start.0 => last.count += block.count,
        _ => runs.push(block),
    }
}
