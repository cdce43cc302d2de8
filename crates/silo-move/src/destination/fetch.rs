//! Blocks that come from stores and other peers: what the machine wants fetched because a store
//! promised it, and blocks that came as a hash only.

use super::Shared;
use crate::{
    assist::{Answer, Assist, Key, Wanted},
    lane::lock,
};
use silo_block::{
    block::{BlockIndex, BlockRange},
    order::Class,
    session::{
        LinkId,
        destination::{Action, Event, Hashes, MemoryHashes},
        messages::{BlockHash, BlockHeader, DeviceIndex},
    },
};
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, atomic::Ordering},
};

/// Promised hashes, which the machine keeps and the fetchers ask by.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedHashes(Arc<Mutex<MemoryHashes>>);

impl Hashes for SharedHashes {
    fn put(&mut self, device: DeviceIndex, block: BlockIndex, hash: BlockHash) {
        lock(&self.0).put(device, block, hash);
    }

    fn get(&self, device: DeviceIndex, block: BlockIndex) -> Option<BlockHash> {
        lock(&self.0).get(device, block)
    }
}

/// One request of the machine.
struct Ticket {
    device: DeviceIndex,
    range: BlockRange,
    content: Vec<u8>,
    /// What came of each block; none for one that no place had.
    hashes: Vec<Option<BlockHash>>,
    left: u64,
}

/// Why a block is being fetched.
enum Purpose {
    Ticket(u64),
    /// It came as a hash over this link.
    Held(LinkId, BlockHeader),
}

#[derive(Default)]
struct Open {
    tickets: HashMap<u64, Ticket>,
    purposes: HashMap<Key, Vec<Purpose>>,
}

/// What is being fetched.
#[derive(Default)]
pub(super) struct Fetches {
    hashes: SharedHashes,
    open: Mutex<Open>,
}

impl Fetches {
    pub(super) fn hashes(&self) -> SharedHashes {
        self.hashes.clone()
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.open).purposes.is_empty()
    }
}

impl Shared {
    pub(super) fn start_assist(self: &Arc<Self>) -> io::Result<()> {
        if self.options.places.is_empty() {
            return Ok(());
        }
        let weak = Arc::downgrade(self);
        let options = &self.options;
        let done = move |key: Key, wanted: &Wanted, answer: Answer<'_>| {
            if let Some(shared) = weak.upgrade() {
                shared.fetched(key, wanted, answer);
            }
        };
        let places = options.places.clone();
        let assist = Assist::new(places, options.policy, options.naming, done)?;
        *lock(&self.assist) = Some(assist);
        Ok(())
    }

    /// The machine wants blocks from a store.
    pub(super) fn fetch(&self, ticket: u64, device: DeviceIndex, range: BlockRange, class: Class) {
        let Some(volume) = self.device_of(device) else { return };
        let geometry = volume.geometry();
        let hashes: Option<Vec<BlockHash>> =
            range.chunks(1).map(|block| self.fetches.hashes.get(device, block.start)).collect();
        let assist = lock(&self.assist);
        let (Some(assist), Some(hashes)) = (&*assist, hashes) else {
            drop(assist);
            self.tell(Event::FetchFailed(ticket));
            return;
        };
        let entry = Ticket {
            device,
            range,
            content: vec![0; geometry.bytes_of(range) as usize],
            hashes: vec![None; hashes.len()],
            left: range.count,
        };
        {
            let mut open = lock(&self.fetches.open);
            open.tickets.insert(ticket, entry);
            for block in range.chunks(1) {
                let purposes = open.purposes.entry((device.0, block.start)).or_default();
                purposes.push(Purpose::Ticket(ticket));
            }
        }
        for (block, hash) in range.chunks(1).zip(hashes) {
            let length = geometry.length(block.start) as usize;
            let (name, block) = (volume.name().clone(), block.start);
            let offset = geometry.offset(block);
            let wanted = Wanted { device: name, block, offset, hash, length };
            assist.want((device.0, block), wanted, class == Class::Demand);
        }
    }

    /// A block came as a hash over a link.
    pub(super) fn fetch_held(&self, id: LinkId, header: BlockHeader, hash: BlockHash) {
        let Some(volume) = self.device_of(header.device) else { return };
        for range in header.range.chunks(1) {
            let key = (header.device.0, range.start);
            let one = BlockHeader { range, ..header };
            let purpose = Purpose::Held(id, one);
            lock(&self.fetches.open).purposes.entry(key).or_default().push(purpose);
            let length = volume.geometry().length(range.start) as usize;
            let (device, block) = (volume.name().clone(), range.start);
            let offset = volume.geometry().offset(block);
            let wanted = Wanted { device, block, offset, hash, length };
            match &*lock(&self.assist) {
                Some(assist) => assist.want(key, wanted, header.class == Class::Demand),
                None => self.ask_again(id, one),
            }
        }
    }

    /// A place answered, or none has the block.
    fn fetched(&self, key: Key, wanted: &Wanted, answer: Answer<'_>) {
        let purposes = lock(&self.fetches.open).purposes.remove(&key).unwrap_or_default();
        for purpose in purposes {
            match (purpose, answer) {
                (Purpose::Held(id, header), Answer::Content(content)) => {
                    self.offer_content(id, header, content);
                }
                (Purpose::Held(id, header), Answer::Nowhere) => self.ask_again(id, header),
                (Purpose::Ticket(number), answer) => self.fill_ticket(number, wanted, answer),
            }
        }
    }

    /// The other blocks of a request do not suffer from one that is nowhere.
    fn fill_ticket(&self, number: u64, wanted: &Wanted, answer: Answer<'_>) {
        let mut open = lock(&self.fetches.open);
        let Some(ticket) = open.tickets.get_mut(&number) else { return };
        let Some(volume) = self.device_of(ticket.device) else { return };
        if let Answer::Content(content) = answer {
            let at = (wanted.block.0 - ticket.range.start.0) as usize;
            let from = at * volume.geometry().block() as usize;
            ticket.content[from..from + content.len()].copy_from_slice(content);
            // The place's answer was hashed, and had this hash, or it would not be here.
            ticket.hashes[at] = Some(wanted.hash);
        }
        ticket.left -= 1;
        if ticket.left > 0 {
            return;
        }
        let Some(ticket) = open.tickets.remove(&number) else { return };
        drop(open);
        if ticket.hashes.iter().all(Option::is_none) {
            self.tell(Event::FetchFailed(number));
            return;
        }
        let slot = self.slots.fetch_add(1, Ordering::Relaxed);
        let event = Event::Fetched { ticket: number, hashes: ticket.hashes, slot };
        let Some(Action::Store { parts, device, .. }) = self.feed(event, Some(slot)) else {
            return;
        };
        let Some(volume) = self.device_of(device) else { return };
        let base = volume.geometry().offset(ticket.range.start);
        let noted = self.wait_for_notes().map_err(io::Error::other);
        let stored = noted.and_then(|()| {
            parts.iter().try_for_each(|part| {
                let from = volume.geometry().offset(part.start);
                let length = volume.geometry().bytes_of(*part);
                let at = (from - base) as usize;
                volume.store(from, &ticket.content[at..at + length as usize])
            })
        });
        let bytes: u64 = parts.iter().map(|part| self.bytes_of(device, *part)).sum();
        self.stored.fetch_add(bytes, Ordering::Relaxed);
        self.tell(Event::Stored { slot, result: stored.map_err(|error| error.to_string()) });
    }

    /// The machine does not need a fetch any more.
    pub(super) fn cancel_fetch(&self, number: u64) {
        let mut open = lock(&self.fetches.open);
        let Some(ticket) = open.tickets.remove(&number) else { return };
        let mut gone = Vec::new();
        for block in ticket.range.chunks(1) {
            let key = (ticket.device.0, block.start);
            let Some(purposes) = open.purposes.get_mut(&key) else { continue };
            purposes.retain(|purpose| !matches!(purpose, Purpose::Ticket(of) if *of == number));
            if purposes.is_empty() {
                open.purposes.remove(&key);
                gone.push(key);
            }
        }
        drop(open);
        self.call_off(&gone);
    }

    /// Blocks have come: nobody needs to go on looking for them.
    pub(super) fn fetches_arrived(&self, device: u16, range: BlockRange) {
        let (mut gone, mut held) = (Vec::new(), Vec::new());
        {
            let mut open = lock(&self.fetches.open);
            for block in range.chunks(1) {
                let key = (device, block.start);
                let Some(purposes) = open.purposes.get_mut(&key) else { continue };
                // Tickets are the machine's to cancel.
                let sent = purposes.extract_if(.., |of| matches!(of, Purpose::Held(..)));
                held.extend(sent.filter_map(|purpose| match purpose {
                    Purpose::Held(id, header) => Some((id, header)),
                    Purpose::Ticket(_) => None,
                }));
                if purposes.is_empty() {
                    open.purposes.remove(&key);
                    gone.push(key);
                }
            }
        }
        self.call_off(&gone);
        // The source waits for a word about what it has sent.
        held.into_iter().for_each(|(id, header)| self.confirm(id, header, Vec::new()));
    }

    fn call_off(&self, keys: &[Key]) {
        if let Some(assist) = &*lock(&self.assist) {
            keys.iter().for_each(|key| {
                assist.arrived(*key);
            });
        }
    }

    /// Somebody waits for blocks: those that are being fetched go first.
    pub(super) fn urge_fetches(&self, device: u16, range: BlockRange) {
        if self.fetches.is_empty() {
            return;
        }
        let mut keys: Vec<Key> = range.chunks(1).map(|block| (device, block.start)).collect();
        {
            // A block is stored with all of its request: so that goes first as a whole.
            let open = lock(&self.fetches.open);
            let purposes: Vec<&Purpose> =
                keys.iter().filter_map(|key| open.purposes.get(key)).flatten().collect();
            let tickets = purposes.into_iter().filter_map(|purpose| match purpose {
                Purpose::Ticket(number) => open.tickets.get(number),
                Purpose::Held(..) => None,
            });
            let more: Vec<Key> = tickets
                .flat_map(|ticket| ticket.range.chunks(1).map(|block| (device, block.start)))
                .collect();
            keys.extend(more);
        }
        keys.sort_unstable();
        keys.dedup();
        if let Some(assist) = &*lock(&self.assist) {
            keys.into_iter().for_each(|key| {
                assist.urge(key);
            });
        }
    }
}
