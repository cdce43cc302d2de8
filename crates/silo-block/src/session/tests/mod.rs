//! Both ends of a move, wired to each other in memory; each test lets one thing happen late.

mod authority;
mod blocks;
mod group;

use super::{
    destination::{self, Access, Destination, DestinationDevice, MemoryHashes, WaiterId},
    messages::*,
    source::{self, Source, SourceDevice},
    *,
};
use crate::{
    block::{BlockIndex, BlockRange},
    device::DeviceName,
    geometry::Geometry,
    model::Replica,
    order::Class,
    rounds::Epoch,
};
use proptest::prelude::*;
use std::{collections::BTreeMap, time::Duration};

const DEVICE: DeviceIndex = DeviceIndex(0);
const BLOCK: u64 = 4096;
const SECOND: Duration = Duration::from_secs(1);

fn one(block: u64) -> BlockRange {
    BlockRange::new(block, 1)
}

fn hash_of(value: u64) -> BlockHash {
    BlockHash([value as u8; 32])
}

struct Pair {
    now: Duration,
    link: u64,
    source: Source,
    destination: Destination,
    /// The giving side's device.
    replica: Replica,
    here: Vec<u64>,
    there: Vec<u64>,
    /// Content on its way, delivered when the test says so.
    data: Vec<(LinkId, BlockHeader, Vec<u64>)>,
    slots: BTreeMap<u64, (BlockRange, Vec<u64>)>,
    slot: u64,
    paused: bool,
    runs_there: bool,
    /// The destination's host does not answer when it is to run.
    starts_slowly: bool,
    sent: Vec<BlockHeader>,
    needs: Vec<(BlockRange, Class)>,
    /// Control messages to the destination are kept instead of delivered.
    held: Option<Vec<(LinkId, ToDestination)>>,
    given: Vec<source::Action>,
    taken: Vec<destination::Action>,
}

/// A device of `blocks` blocks, all written once, and a policy that switches only when told.
fn pair(blocks: u64) -> Pair {
    let geometry = Geometry::new(blocks * BLOCK, BLOCK as u32).unwrap();
    let replica = Replica::owned(geometry, Term { id: SessionId([1; 16]), first: Epoch(1) });
    drop(replica.rounds().write(BlockRange::new(0, blocks)));
    let content = (0..blocks).map(|block| 100 + block).collect();
    between(replica, content, Replica::untouched(geometry), vec![0; blocks as usize], 2)
}

fn between(here: Replica, content: Vec<u64>, there: Replica, other: Vec<u64>, id: u8) -> Pair {
    let policy = Policy { hold: true, pause: SECOND, ..Policy::default() };
    let config = source::Config { policy, ..source::Config::default() };
    let name = DeviceName::new("disk").unwrap();
    let session = SessionId([id; 16]);
    let devices = vec![SourceDevice::new(name.clone(), None, &here)];
    let source = Source::new(config, session, 1, devices, Duration::ZERO);
    let device = DestinationDevice { name, base: None, replica: there };
    let config = destination::Config { prefetch: 0, ..destination::Config::default() };
    let hashes = Box::new(MemoryHashes::default());
    let destination = Destination::new(config, session, vec![device], hashes, Duration::ZERO);
    let mut pair = Pair {
        now: Duration::ZERO,
        link: 0,
        source,
        destination,
        replica: here,
        here: content,
        there: other,
        data: Vec::new(),
        slots: BTreeMap::new(),
        slot: 0,
        paused: false,
        runs_there: false,
        starts_slowly: false,
        sent: Vec::new(),
        needs: Vec::new(),
        held: None,
        given: Vec::new(),
        taken: Vec::new(),
    };
    pair.connect();
    pair
}

impl Pair {
    fn connect(&mut self) {
        self.link += 1;
        let link = LinkId(self.link);
        self.destination.handle(self.now, destination::Event::Connected(link));
        self.source.handle(self.now, source::Event::Connected(link));
        self.settle();
    }

    fn cut(&mut self) {
        let link = LinkId(self.link);
        self.destination.handle(self.now, destination::Event::Cut(link));
        self.source.handle(self.now, source::Event::Cut(link));
        self.data.clear();
        self.settle();
    }

    /// Everything that needs no content to arrive.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if let Some(action) = self.source.poll(self.now) {
                self.source_does(action);
            } else if let Some(action) = self.destination.poll(self.now) {
                self.destination_does(action);
            } else {
                return;
            }
        }
        panic!("they never come to rest");
    }

    fn deliver(&mut self, at: usize) {
        let (link, header, content) = self.data.remove(at);
        self.slot += 1;
        self.slots.insert(self.slot, (header.range, content));
        let event = destination::Event::Blocks(link, header, self.slot);
        self.destination.handle(self.now, event);
        self.settle();
    }

    fn deliver_all(&mut self) {
        while !self.data.is_empty() {
            self.deliver(0);
        }
    }

    fn write_here(&mut self, block: u64, value: u64) {
        let guard = self.replica.rounds().write(one(block));
        self.here[block as usize] = value;
        drop(guard);
    }

    /// The next round.
    fn round(&mut self) {
        self.now += SECOND;
        self.settle();
    }

    fn switch(&mut self) {
        self.source.handle(self.now, source::Event::Switch);
        self.round();
    }

    fn read(&mut self, block: u64, waiter: u64) -> bool {
        let access = self.destination.read(self.now, DEVICE, one(block), WaiterId(waiter));
        self.settle();
        matches!(access, Access::Go(_))
    }

    fn woken(&mut self) -> Vec<u64> {
        let wakes = self.taken.iter().filter_map(|action| match action {
            destination::Action::Wake(ids) => Some(ids.iter().map(|id| id.0)),
            _ => None,
        });
        let woken = wakes.flatten().collect();
        self.taken.clear();
        woken
    }

    fn send(&mut self, link: LinkId, message: ToDestination) {
        match &mut self.held {
            Some(held) => held.push((link, message)),
            None => {
                self.destination.handle(self.now, destination::Event::Received(link, message));
            }
        }
    }

    fn source_does(&mut self, action: source::Action) {
        use source::{Action, Event};
        match action.clone() {
            Action::Send(link, message) => self.send(link, message),
            Action::Blocks(link, header) => {
                let range = header.range.start.0 as usize..header.range.end() as usize;
                self.data.push((link, header, self.here[range].to_vec()));
                self.sent.push(header);
            }
            Action::CloseRound => {
                let epoch = self.replica.rounds().advance(SECOND).unwrap();
                self.source.handle(self.now, Event::RoundClosed(vec![epoch]));
            }
            Action::Quiesce(ticket) => {
                self.paused = true;
                let epochs = vec![self.replica.rounds().advance(SECOND).unwrap()];
                let (flushes, state) = (vec![vec![77]], vec![1, 2, 3]);
                let event = Event::Quiesced { ticket, epochs, flushes, state };
                self.source.handle(self.now, event);
            }
            Action::Resume => self.paused = false,
            _ => {}
        }
        self.given.push(action);
    }

    fn destination_does(&mut self, action: destination::Action) {
        use destination::{Action, Event};
        match action.clone() {
            Action::Send(link, message) => {
                if let ToSource::Need { range, class, .. } = &message {
                    self.needs.push((*range, *class));
                }
                self.source.handle(self.now, source::Event::Received(link, message));
            }
            Action::Store { slot, parts, .. } => {
                let (range, content) = self.slots.remove(&slot).unwrap();
                for block in parts.iter().flat_map(|part| part.start.0..part.end()) {
                    self.there[block as usize] = content[(block - range.start.0) as usize];
                }
                self.destination.handle(self.now, Event::Stored { slot, result: Ok(()) });
            }
            Action::Run { .. } if self.starts_slowly => {}
            Action::Run { .. } => {
                assert!(self.paused && !self.runs_there, "two sides run");
                self.runs_there = true;
                self.destination.handle(self.now, Event::Ran);
            }
            Action::MakeDurable => self.destination.handle(self.now, Event::MadeDurable),
            _ => {}
        }
        self.taken.push(action);
    }

    fn failed(&self) -> bool {
        matches!(self.destination.phase(), destination::Phase::Failed(_))
    }
}
