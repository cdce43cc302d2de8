//! The two machines, their hosts and the lines between them, and what each step does to them.

use super::{BLOCKS, DEVICE, NOW, SESSION, Seen, Small, Step};
use silo_block::{
    block::{BlockIndex, BlockRange},
    device::DeviceName,
    geometry::Geometry,
    model::{Record, Replica},
    rounds::Epoch,
    session::{
        LinkId, Policy,
        destination::{
            self, Access, Destination, DestinationDevice, MemoryHashes, Phase as Receiving,
            WaiterId,
        },
        messages::{BlockHash, BlockHeader, SessionId, Term, ToDestination, ToSource},
        source::{self, Phase as Giving, Source, SourceDevice},
    },
};
use std::{
    collections::{BTreeMap, VecDeque, hash_map::DefaultHasher},
    fmt::Write as _,
    hash::{Hash, Hasher},
    time::Duration,
};

#[derive(Clone, Debug)]
struct Disk {
    content: Vec<u32>,
    record: Record,
    handed: Option<Epoch>,
    running: bool,
}

#[derive(Debug)]
pub(super) struct World {
    source: Option<Source>,
    replica: Replica,
    destination: Option<Destination>,
    content: [Vec<u32>; 2],
    disk: [Disk; 2],
    down: VecDeque<(LinkId, ToDestination)>,
    up: VecDeque<(LinkId, ToSource)>,
    data: Vec<(LinkId, BlockHeader, Vec<u32>)>,
    slots: BTreeMap<u64, (BlockRange, Vec<u32>, Vec<BlockRange>)>,
    fetches: VecDeque<(u64, BlockRange)>,
    promise: Option<u32>,
    link: u64,
    /// Which side runs the guest, and whether it is paused.
    runs: Option<usize>,
    paused: bool,
    /// Per block: what the last flush covers, and all since.
    values: Vec<Vec<u32>>,
    known: bool,
    writes: usize,
    flushes: usize,
    faults: usize,
    fault_seen: bool,
    pub(super) seen: Seen,
    pub(super) wrong: Option<String>,
}

fn hash_of(value: u32) -> BlockHash {
    BlockHash([value as u8; 32])
}

impl World {
    pub(super) fn new() -> Self {
        let geometry = Geometry::new(BLOCKS * 4096, 4096).unwrap();
        let term = Term { id: SessionId([1; 16]), first: Epoch(1) };
        let replica = Replica::owned(geometry, term);
        // Both blocks were written before the move.
        drop(replica.rounds().write(BlockRange::new(0, BLOCKS)));
        replica.rounds().advance(NOW).unwrap();
        let there = Replica::untouched(geometry);
        let disk = |replica: &Replica, value: u32| Disk {
            content: vec![value; BLOCKS as usize],
            record: replica.record(),
            handed: None,
            running: false,
        };
        let mut world = Self {
            disk: [disk(&replica, 1), disk(&there, 0)],
            content: [vec![1; BLOCKS as usize], vec![0; BLOCKS as usize]],
            source: None,
            destination: Some(receive(there)),
            replica,
            down: VecDeque::new(),
            up: VecDeque::new(),
            data: Vec::new(),
            slots: BTreeMap::new(),
            fetches: VecDeque::new(),
            promise: None,
            link: 0,
            runs: Some(0),
            paused: false,
            values: vec![vec![1]; BLOCKS as usize],
            known: true,
            writes: 0,
            flushes: 0,
            faults: 0,
            fault_seen: false,
            seen: Seen::default(),
            wrong: None,
        };
        world.source = Some(Source::new(config(), SESSION, 1, world.devices(), NOW));
        world.connect();
        world.pump();
        world
    }

    fn free_slot(&self) -> u64 {
        (0..).find(|slot| !self.slots.contains_key(slot)).unwrap()
    }

    fn devices(&self) -> Vec<SourceDevice> {
        vec![SourceDevice::new(name(), None, &self.replica)]
    }

    pub(super) fn phases(&self) -> String {
        let source = self.source.as_ref().map(Source::phase);
        format!("{source:?} {:?}", self.destination.as_ref().map(Destination::phase))
    }

    pub(super) fn digest(&self) -> u128 {
        let mut text = format!("{self:?}");
        // What only counts how often something happened makes a new state of every turn of a loop.
        // Nothing here depends on it, as long as no budget is used up.
        for part in ["counters: Counters {", "pace: Pace {", "fair: Fair {"] {
            cut_out(&mut text, part);
        }
        write!(text, "{:?}", self.source.as_ref().map(|source| source.forecast(NOW).0)).unwrap();
        let mut halves = [0u64; 2];
        for (at, half) in halves.iter_mut().enumerate() {
            let mut hasher = DefaultHasher::new();
            (at, &text).hash(&mut hasher);
            *half = hasher.finish();
        }
        u128::from(halves[0]) << 64 | u128::from(halves[1])
    }

    /// Everything is where it belongs, and nobody waits for anybody.
    pub(super) fn finished(&self) -> bool {
        let full = self.destination.as_ref().is_none_or(|d| d.missing() == 0);
        match self.runs {
            Some(0) => matches!(self.source.as_ref().map(Source::phase), Some(Giving::Failed(_))),
            Some(_) => full && self.source.as_ref().is_none_or(|s| *s.phase() == Giving::Released),
            None => false,
        }
    }

    pub(super) fn steps(&self, small: &Small) -> Vec<Step> {
        let mut steps = Vec::new();
        let guest = self.runs.filter(|_| !self.paused);
        if guest.is_some() && self.writes < small.writes {
            steps.extend((0..BLOCKS).map(Step::Write));
        }
        if guest.is_some() && small.crashes && self.flushes == 0 && self.writes > 0 {
            steps.push(Step::Flush);
        }
        steps.extend((!self.down.is_empty()).then_some(Step::ToDestination));
        steps.extend((!self.up.is_empty()).then_some(Step::ToSource));
        steps.extend((0..self.data.len()).map(Step::Data));
        steps.extend(self.slots.keys().map(|slot| Step::Stored(*slot)));
        let giving = self.source.as_ref().map(Source::phase);
        if small.store && self.promise.is_none() && giving == Some(&Giving::Filling) {
            steps.push(Step::Promise);
        }
        if !self.fetches.is_empty() {
            steps.extend([true, false].map(|right| Step::Fetched { right }));
        }
        if self.faults == 0 && !self.finished() {
            let over = matches!(giving, Some(Giving::Failed(_) | Giving::Released));
            if small.cut && !over {
                steps.push(Step::Cut);
            }
            if small.crashes && !over {
                steps.extend(self.disk[0].handed.map(|_| Step::CrashSource));
                steps.push(Step::CrashDestination);
            }
        }
        steps
    }

    pub(super) fn step(&mut self, step: Step) {
        match step {
            Step::Write(block) => self.write(block),
            Step::Flush => {
                self.flushes += 1;
                self.persist(self.runs.unwrap());
                // After a crash it is not known which of the values the flush covers.
                if self.known {
                    self.values
                        .iter_mut()
                        .for_each(|values| drop(values.drain(..values.len() - 1)));
                }
            }
            Step::ToDestination => {
                let (link, message) = self.down.pop_front().unwrap();
                self.tell_destination(destination::Event::Received(link, message));
            }
            Step::ToSource => {
                let (link, message) = self.up.pop_front().unwrap();
                self.tell_source(source::Event::Received(link, message));
            }
            Step::Data(at) => {
                let (link, header, content) = self.data.remove(at);
                let slot = self.free_slot();
                self.slots.insert(slot, (header.range, content, Vec::new()));
                self.tell_destination(destination::Event::Blocks(link, header, slot));
            }
            Step::Stored(slot) => {
                let (range, content, parts) = self.slots.remove(&slot).unwrap();
                for block in parts.iter().flat_map(|part| part.start.0..part.end()) {
                    self.content[1][block as usize] = content[(block - range.start.0) as usize];
                }
                self.tell_destination(destination::Event::Stored { slot, result: Ok(()) });
            }
            Step::Promise => {
                let epoch = self.replica.rounds().advance(NOW).unwrap();
                let value = self.content[0][0];
                self.promise = Some(value);
                let blocks = vec![(BlockIndex(0), hash_of(value))];
                self.tell_source(source::Event::Promised { device: DEVICE, epoch, blocks });
            }
            Step::Fetched { right } => {
                let (ticket, range) = self.fetches.pop_front().unwrap();
                let value = self.promise.unwrap() + if right { 0 } else { 100 };
                self.seen.wrong_answer |= !right;
                let slot = self.free_slot();
                self.slots.insert(slot, (range, vec![value; range.count as usize], Vec::new()));
                let hashes = vec![Some(hash_of(value)); range.count as usize];
                self.tell_destination(destination::Event::Fetched { ticket, hashes, slot });
            }
            Step::Cut => {
                self.fault();
                let link = LinkId(self.link);
                self.tell_source(source::Event::Cut(link));
                self.tell_destination(destination::Event::Cut(link));
                self.connect();
            }
            Step::CrashSource => self.crash_source(),
            Step::CrashDestination => self.crash_destination(),
        }
        self.pump();
        self.check();
    }

    /// What was said on the line is lost; content may still come, as late as it likes.
    fn fault(&mut self) {
        self.faults += 1;
        self.fault_seen = true;
        self.down.clear();
        self.up.clear();
    }

    fn connect(&mut self) {
        self.link += 1;
        let link = LinkId(self.link);
        self.tell_destination(destination::Event::Connected(link));
        self.tell_source(source::Event::Connected(link));
    }

    fn tell_source(&mut self, event: source::Event) {
        if let Some(source) = &mut self.source {
            source.handle(NOW, event);
        }
    }

    fn tell_destination(&mut self, event: destination::Event) {
        if let Some(destination) = &mut self.destination {
            destination.handle(NOW, event);
        }
    }

    fn crash_source(&mut self) {
        self.fault();
        self.data.clear();
        if self.runs == Some(0) {
            (self.runs, self.paused, self.known) = (None, false, false);
        }
        let disk = self.disk[0].clone();
        self.content[0].clone_from(&disk.content);
        self.replica = Replica::restored(self.replica.geometry(), &disk.record).unwrap();
        self.replica.give_away(disk.handed.unwrap());
        self.source = Some(Source::restored(config(), SESSION, 1, self.devices(), NOW));
        self.tell_destination(destination::Event::Cut(LinkId(self.link)));
        self.connect();
    }

    fn crash_destination(&mut self) {
        self.fault();
        self.slots.clear();
        self.fetches.clear();
        let link = LinkId(self.link);
        self.tell_source(source::Event::Cut(link));
        let disk = self.disk[1].clone();
        self.content[1].clone_from(&disk.content);
        let replica = Replica::restored(self.replica.geometry(), &disk.record).unwrap();
        if self.runs == Some(1) {
            self.known = false;
        }
        self.destination = Some(if disk.running {
            let device = DestinationDevice { name: name(), base: None, replica };
            let hashes = Box::new(MemoryHashes::default());
            Destination::restored(there(), SESSION, vec![device], hashes, 1, NOW)
        } else {
            receive(replica)
        });
        self.connect();
    }

    fn persist(&mut self, side: usize) {
        self.disk[side].content.clone_from(&self.content[side]);
        if side == 0 {
            self.disk[0].record = self.replica.record();
        } else if let Some(replica) = self.destination.as_mut().and_then(|d| d.replica_mut(DEVICE))
        {
            replica.sync_begins();
            replica.sync_ends(true);
            self.disk[1].record = replica.record();
        }
    }

    fn note(&mut self) {
        let replica = self.destination.as_ref().unwrap().replica(DEVICE).unwrap();
        self.disk[1].record = replica.record();
    }

    fn write(&mut self, block: u64) {
        let side = self.runs.unwrap();
        let range = BlockRange::new(block, 1);
        self.writes += 1;
        let value = 10 + self.writes as u32;
        let destination = self.destination.as_mut().filter(|_| side == 1);
        let claim = match destination {
            None => BlockRange::new(0, 0),
            Some(d) => match d.write(NOW, DEVICE, block * 4096, 4096, WaiterId(self.writes as u64))
            {
                Access::Go(claim) => claim,
                // Its older content is being stored just now; the write is not done.
                Access::Wait => return,
                Access::Refused(reason) => {
                    self.wrong = Some(format!("a write is refused: {reason}"));
                    return;
                }
            },
        };
        self.seen.early_write |= claim.count > 0;
        let rounds = match side {
            0 => self.replica.rounds(),
            _ => self.destination.as_ref().unwrap().replica(DEVICE).unwrap().rounds(),
        };
        let guard = rounds.write_owned(range);
        self.content[side][block as usize] = value;
        self.values[block as usize].push(value);
        if let Some(destination) = self.destination.as_mut().filter(|_| side == 1) {
            destination.wrote(NOW, DEVICE, claim, true);
        }
        drop(guard);
    }

    fn pump(&mut self) {
        for _ in 0..1000 {
            if let Some(action) = self.source.as_mut().and_then(|source| source.poll(NOW)) {
                self.do_source(action);
            } else if let Some(action) = self.destination.as_mut().and_then(|d| d.poll(NOW)) {
                self.do_destination(action);
            } else {
                return;
            }
        }
        self.wrong = Some("never stops acting".into());
    }

    fn do_source(&mut self, action: source::Action) {
        use source::{Action, Event};
        match action {
            Action::Send(link, message) if link.0 == self.link => {
                self.down.push_back((link, message));
            }
            Action::Blocks(link, header) => {
                let range = header.range.start.0 as usize..header.range.end() as usize;
                let content = self.content[0][range].to_vec();
                self.data.push((link, header, content));
            }
            Action::CloseRound => {
                let epoch = self.replica.rounds().advance(NOW).unwrap();
                self.tell_source(Event::RoundClosed(vec![epoch]));
            }
            Action::Quiesce(ticket) => {
                self.paused = true;
                let epoch = self.replica.rounds().advance(NOW).unwrap();
                self.persist(0);
                self.disk[0].handed = Some(epoch);
                let (epochs, flushes) = (vec![epoch], vec![Vec::new()]);
                self.tell_source(Event::Quiesced { ticket, epochs, flushes, state: Vec::new() });
            }
            Action::Resume => {
                if self.runs.is_some_and(|side| side != 0) {
                    self.wrong = Some("the source runs while the destination does".into());
                }
                self.seen.taken_back |= self.runs.is_none();
                (self.runs, self.paused, self.disk[0].handed) = (Some(0), false, None);
            }
            Action::Released => self.seen.released = true,
            _ => {}
        }
    }

    fn do_destination(&mut self, action: destination::Action) {
        use destination::{Action, Event};
        match action {
            Action::Send(link, message) if link.0 == self.link => {
                self.up.push_back((link, message));
            }
            Action::Note(_) => self.note(),
            Action::Store { slot, parts, .. } => self.slots.get_mut(&slot).unwrap().2 = parts,
            Action::Discard(slot) => drop(self.slots.remove(&slot)),
            Action::Run { .. } => {
                if self.runs == Some(1) || (self.runs == Some(0) && !self.paused) {
                    self.wrong = Some("two sides run".into());
                }
                self.note();
                self.disk[1].running = true;
                (self.runs, self.paused) = (Some(1), false);
                self.seen.handed_over = true;
                self.tell_destination(Event::Ran);
            }
            Action::Fetch { ticket, range, .. } => self.fetches.push_back((ticket, range)),
            Action::CancelFetch(ticket) => self.fetches.retain(|(known, _)| *known != ticket),
            Action::MakeDurable => {
                self.persist(1);
                self.tell_destination(Event::MadeDurable);
            }
            _ => {}
        }
    }

    /// What whoever runs would read.
    fn check(&mut self) {
        if let Some(destination) = &self.destination {
            let counters = destination.counters();
            self.seen.late |= counters.late > 0;
            self.seen.from_store |= counters.from_store > 0;
            let runs = matches!(destination.phase(), Receiving::Running | Receiving::Durable);
            self.seen.resumed_after_fault |= self.fault_seen && runs && destination.missing() == 0;
        }
        let Some(side) = self.runs else { return };
        for block in 0..BLOCKS {
            let there = self.destination.as_ref().and_then(|d| d.replica(DEVICE));
            let here = side == 0 || there.is_some_and(|r| r.is_here(BlockRange::new(block, 1)));
            let (value, values) =
                (self.content[side][block as usize], &self.values[block as usize]);
            let right =
                if self.known { values.last() == Some(&value) } else { values.contains(&value) };
            if here && !right {
                let text = format!("side {side} reads block {block} as {value} of {values:?}");
                self.wrong = Some(text);
            }
        }
    }
}

/// Removes a part of a text up to the brace that closes it, wherever it is.
fn cut_out(text: &mut String, part: &str) {
    while let Some(start) = text.find(part) {
        let mut depth = 0;
        let length = text[start..].find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == '}' && depth == 0
        });
        text.replace_range(start..=start + length.unwrap(), "");
    }
}

fn name() -> DeviceName {
    DeviceName::new("disk").unwrap()
}

fn receive(replica: Replica) -> Destination {
    let device = DestinationDevice { name: name(), base: None, replica };
    Destination::new(there(), SESSION, vec![device], Box::new(MemoryHashes::default()), NOW)
}

fn config() -> source::Config {
    let policy = Policy { blackout: Duration::from_secs(1), pause: NOW, ..Policy::default() };
    source::Config { policy, window: 8192, demand_window: 4096, ..source::Config::default() }
}

fn there() -> destination::Config {
    destination::Config { prefetch: 0, ..destination::Config::default() }
}
