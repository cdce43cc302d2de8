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
    session::messages::{BlockHash, DeviceIndex, MAX_RUN, Reason, ToSource},
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
    /// Nothing is fetched before: the store has just failed, and there is nobody else.
    pause: Duration,
}

/// How long a store is left alone that has failed when there is nobody else to ask.
const PAUSE: Duration = Duration::from_secs(1);

impl Fetching {
    pub(super) fn new(blocks: u64) -> Self {
        Self {
            blocks,
            promised: None,
            queue: None,
            under_way: BTreeMap::new(),
            pause: Duration::ZERO,
        }
    }

    /// Whether a store has all of these.
    pub(super) fn covers(&self, absent: &BlockSet) -> bool {
        self.promised.as_ref().is_some_and(|set| absent.ranges().all(|r| set.contains_range(r)))
    }

    /// Somebody waits for these: if they are promised, they are next.
    pub(super) fn urge(&mut self, class: Class, range: BlockRange) {
        let (Some(promised), Some(queue)) = (&self.promised, &mut self.queue) else { return };
        for part in promised.ranges_in(range) {
            // What is on its way already is only asked for again if it waits in the queue.
            if queue.class_of(part.start).is_some() {
                queue.insert(class, part);
            }
        }
    }

    /// What is still promised of these is fetched again.
    fn again(&mut self, range: BlockRange) {
        if let (Some(promised), Some(queue)) = (&self.promised, &mut self.queue) {
            promised.ranges_in(range).for_each(|part| queue.insert(Class::Bulk, part));
        }
    }

    /// These will probably be used soon.
    pub(super) fn expect(&mut self, range: BlockRange) {
        if let Some(queue) = &mut self.queue {
            queue.promote(range);
        }
    }

    fn promise(&mut self, block: BlockIndex) {
        let blocks = self.blocks;
        let set = self.promised.get_or_insert_with(|| BlockSet::new(blocks));
        let queue = self.queue.get_or_insert_with(|| Order::new(blocks, Heat::new(blocks)));
        if set.insert(block) {
            queue.insert(Class::Bulk, BlockRange::new(block.0, 1));
        }
    }

    /// These are not promised any more: they came, or changed. Gives the fetches that would bring
    /// nothing else.
    pub(super) fn useless(&mut self, range: BlockRange) -> Vec<u64> {
        let Some(promised) = &mut self.promised else { return Vec::new() };
        promised.remove_range(range);
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

    /// Until when nothing is fetched, if that is still to come and there is something to fetch.
    pub(super) fn paused(&self, now: Duration) -> Option<Duration> {
        let waits = self.queue.as_ref().is_some_and(|queue| !queue.is_empty());
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
            if now < incoming.fetching.pause {
                continue;
            }
            let Some(queue) = &mut incoming.fetching.queue else { continue };
            let Some(class) = queue.most_urgent() else { continue };
            let room = if class == Class::Demand { 2 * window } else { window };
            if used >= room {
                continue;
            }
            let block = incoming.replica.geometry().block();
            let Some((class, range)) = queue.next((MAX_RUN / block).max(1)) else { continue };
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
    pub(super) fn fetched(&mut self, now: Duration, ticket: u64, hashes: &[BlockHash], slot: u64) {
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
            let right = hashes.get(at).copied();
            if right.is_none() || right != self.hashes.get(device, block.start) {
                self.counters.store_wrong += 1;
                wrong.push(block);
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
        self.counters.store_failed += 1;
        self.ask_the_peer(now, device, range);
    }

    /// A store does not have what was promised.
    fn ask_the_peer(&mut self, now: Duration, device: DeviceIndex, range: BlockRange) {
        let gone = self.link.as_ref().is_none_or(|link| !link.ready);
        let incoming = &mut self.devices[device.0 as usize];
        if gone {
            // The source may have gone because of this promise: only the store can keep it.
            incoming.fetching.pause = now + PAUSE;
            incoming.fetching.again(range);
            return;
        }
        incoming.fetching.useless(range);
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
