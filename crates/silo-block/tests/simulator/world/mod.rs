//! One world: time, hosts, links, faults, and the checks.
//!
//! Checked all the time: every read returns what the guest wrote last, or after a crash something
//! not older than the last flush ([`Reference`](crate::reference)); the guest never runs on two
//! hosts; nobody reads a block that is not there. Checked at the end, when faults have ceased: the
//! world comes to rest with one owner that has everything.

mod drive;
mod faults;
mod play;

use crate::{guest::Guest, host::Host, random::Random};
use silo_block::{
    block::{BlockIndex, BlockRange},
    rounds::Epoch,
    session::{
        LinkId,
        destination::{self, Destination},
        messages::{BlockHash, BlockHeader, DeviceIndex, SessionId, Term, ToDestination, ToSource},
        source::{self, Source},
    },
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

/// A rule that is broken on purpose, to see that this is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    Nothing,
    LateContentIsTaken,
    ListsAreForgotten,
    ContentBeforeItsList,
    WritesAreNotTracked,
    PauseDoesNotPause,
    HashesAreNotChecked,
    DurableIsNotDurable,
    FlushIsNotDurable,
    ListsAreNotNoted,
    HandOverIsNotNoted,
    RestartsAreNotTold,
    PartialWritesDoNotWait,
    WritesAreNotIntended,
    StoredCountsAsDurable,
}

impl Broken {
    pub(crate) const RULES: [Self; 14] = [
        Self::LateContentIsTaken,
        Self::ListsAreForgotten,
        Self::ContentBeforeItsList,
        Self::WritesAreNotTracked,
        Self::PauseDoesNotPause,
        Self::HashesAreNotChecked,
        Self::DurableIsNotDurable,
        Self::FlushIsNotDurable,
        Self::ListsAreNotNoted,
        Self::HandOverIsNotNoted,
        Self::RestartsAreNotTold,
        Self::PartialWritesDoNotWait,
        Self::WritesAreNotIntended,
        Self::StoredCountsAsDurable,
    ];
}

macro_rules! outcome {
    ($($field:ident: $what:literal,)*) => {
        /// What happened, over all worlds.
        #[derive(Clone, Debug, Default)]
        pub(crate) struct Outcome { $(pub(crate) $field: u64,)* }
        impl Outcome {
            pub(crate) fn add(&mut self, other: &Self) { $(self.$field += other.$field;)* }
            /// A simulator in which something never happens says nothing about it.
            pub(crate) fn check_that_everything_happened(&self, seeds: u64) {
                $(assert!(self.$field >= seeds / 500, "{} of {seeds} worlds: {}", self.$field, $what);)*
            }
        }
    };
}

outcome! {
    events: "events",
    reads: "reads that were checked",
    writes: "writes",
    flushes: "flushes",
    moves: "moves begun",
    tokens: "moves that changed hands",
    releases: "sources released",
    failures: "moves that failed",
    cuts: "cuts",
    crashes: "crashes",
    crashes_out: "crashes of a source with the token out",
    crashes_filling: "crashes of a destination that runs and fills",
    crashes_guest: "crashes of a guest",
    waits: "accesses that waited",
    early_writes: "whole blocks written before they came",
    late: "late or doubled content",
    early: "content before its list",
    from_store: "blocks from the store",
    store_wrong: "wrong answers of the store",
    store_late: "late answers of the store",
    reissued: "flushes done again at the destination",
    chained: "moves on from a destination that still filled",
    wiped: "sources wiped after their release",
    back: "moves back to a host that had an old copy",
    spared: "blocks that had come otherwise and were not sent",
}

#[derive(Clone, Debug)]
enum Ev {
    ToDestination(LinkId, ToDestination),
    ToSource(LinkId, ToSource),
    Data(LinkId, BlockHeader, Vec<[u64; 2]>),
    Poll(usize, u64),
    Stored(usize, u64, u64),
    Fetched(usize, u64, u64, DeviceIndex, BlockRange),
    Promised(usize, u64, DeviceIndex, Epoch, Vec<(BlockIndex, BlockHash)>),
    CloseRound(usize, u64),
    Pause(usize, u64, u32),
    Guest(u64),
    Finish(u64, u64),
    FlushDone(usize, u64, u64),
    Connect(usize),
    Cut(LinkId),
    CutSeen(LinkId, bool),
    Crash(usize),
    Restart(usize),
    Move,
    Backup,
    Persist,
    Disturb,
}

struct Move {
    session: SessionId,
    from: usize,
    to: usize,
    link: Option<LinkId>,
    over: bool,
}

struct Line {
    of: usize,
    up: bool,
    seen: [bool; 2],
    last: [u64; 2],
}

pub(crate) struct World {
    seed: u64,
    random: Random,
    broken: Broken,
    loud: bool,
    now: u64,
    serial: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Ev>,
    sizes: Vec<u64>,
    hosts: Vec<Host>,
    guest: Guest,
    moves: Vec<Move>,
    lines: BTreeMap<LinkId, Line>,
    store: BTreeMap<(u16, u64), Vec<[u64; 2]>>,
    promises: BTreeMap<(usize, u16, u64), BlockHash>,
    slots: u64,
    sessions: u64,
    troubled_until: u64,
    last_move: bool,
    with_store: bool,
    early_release: bool,
    whole: bool,
    window: u64,
    /// How often the guest flushes, in percent of a twentieth of what it does.
    flushes: u64,
    outcome: Outcome,
}

type Checked = Result<(), String>;

impl World {
    pub(crate) fn new(seed: u64, broken: Broken, loud: bool) -> Self {
        let mut random = Random::new(seed);
        let sizes: Vec<u64> = (0..1 + random.below(2)).map(|_| 2 + random.below(9)).collect();
        let hosts = (0..3).map(|_| Host::new(&sizes, random.chance(50))).collect();
        let halves = sizes.iter().sum::<u64>() as usize * 2;
        let with_store = random.chance(60);
        Self {
            seed,
            broken,
            loud,
            now: 0,
            serial: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            hosts,
            guest: Guest::new(halves),
            moves: Vec::new(),
            lines: BTreeMap::new(),
            store: BTreeMap::new(),
            promises: BTreeMap::new(),
            slots: 0,
            sessions: 0,
            troubled_until: 20_000 + random.below(40_000),
            last_move: false,
            with_store,
            early_release: with_store && random.chance(30),
            whole: random.chance(20),
            window: 512 << random.below(4),
            flushes: [3, 100][random.below(2) as usize],
            sizes,
            random,
            outcome: Outcome::default(),
        }
    }

    fn time(&self) -> Duration {
        Duration::from_micros(self.now)
    }

    fn at(&mut self, delay: u64, event: Ev) {
        self.serial += 1;
        self.queue.push(Reverse((self.now + delay, self.serial)));
        self.events.insert(self.serial, event);
    }

    fn soon(&mut self, most: u64, event: Ev) {
        let delay = 1 + self.random.below(most);
        self.at(delay, event);
    }

    fn session(&mut self) -> SessionId {
        self.sessions += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.sessions.to_le_bytes());
        SessionId(id)
    }

    pub(crate) fn run(mut self) -> Result<Outcome, String> {
        let term = Term { id: self.session(), first: Epoch(1) };
        let sizes = self.sizes.clone();
        let owned =
            |blocks: &u64| silo_block::model::Replica::owned(crate::host::geometry(*blocks), term);
        self.hosts[0].replicas = sizes.iter().map(owned).collect();
        self.hosts[0].disk.owner = true;
        self.hosts[0].persist();
        self.guest.host = Some(0);
        self.soon(50, Ev::Guest(0));
        self.soon(5_000, Ev::Move);
        self.soon(3_000, Ev::Backup);
        self.soon(3_000, Ev::Persist);
        self.soon(4_000, Ev::Disturb);
        while let Some(Reverse((at, serial))) = self.queue.pop() {
            self.now = at;
            let event = self.events.remove(&serial).expect("queued with an event");
            self.outcome.events += 1;
            if self.loud {
                println!("{at:>8} {event:?}");
            }
            self.step(event)?;
            if self.rests() {
                return self.finish();
            }
            if self.now > 120_000_000 || self.outcome.events > 400_000 {
                return Err(format!("does not come to rest: {}", self.describe()));
            }
        }
        Err("nothing left to do".into())
    }

    fn describe(&self) -> String {
        let host = |host: &Host| {
            let source = host.source.as_ref().map(Source::phase);
            let destination = host.destination.as_ref().map(Destination::phase);
            format!("[up {} source {source:?} destination {destination:?}]", host.up)
        };
        let hosts: Vec<String> = self.hosts.iter().map(host).collect();
        format!("guest on {:?}, {}", self.guest.host, hosts.join(" "))
    }

    fn rests(&self) -> bool {
        self.last_move
            && self.moves.iter().all(|a| a.over)
            && !self.guest.paused
            && self.guest.host.is_some_and(|host| self.hosts[host].all_here())
    }

    /// Everything is at the owner, and right.
    fn finish(mut self) -> Result<Outcome, String> {
        let host = self.guest.host.expect("rests with an owner");
        for device in self.hosts[host].devices() {
            let blocks = self.sizes[device.0 as usize];
            self.check(host, device, BlockRange::new(0, blocks))?;
        }
        Ok(self.outcome)
    }

    fn half(&self, device: DeviceIndex, block: u64) -> usize {
        let before: u64 = self.sizes[..device.0 as usize].iter().sum();
        (before + block) as usize * 2
    }

    fn check(&mut self, host: usize, device: DeviceIndex, range: BlockRange) -> Checked {
        for block in range.start.0..range.end() {
            let half = self.half(device, block);
            let content = self.hosts[host].content[device.0 as usize][block as usize];
            for (at, value) in content.into_iter().enumerate() {
                let read = self.guest.reference.read(half + at, value);
                read.map_err(|e| format!("host {host}, {device}, block {block}: {e}"))?;
            }
        }
        self.outcome.reads += 1;
        Ok(())
    }

    fn step(&mut self, event: Ev) -> Checked {
        let now = self.time();
        match event {
            Ev::ToDestination(link, message) => {
                let Some(host) = self.receiver(link, 0) else { return Ok(()) };
                let message = self.bend(host, message);
                if let Some(destination) = &mut self.hosts[host].destination {
                    destination.handle(now, destination::Event::Received(link, message));
                }
                self.pump(host)
            }
            Ev::ToSource(link, message) => {
                let Some(host) = self.receiver(link, 1) else { return Ok(()) };
                if let Some(source) = &mut self.hosts[host].source {
                    source.handle(now, source::Event::Received(link, message));
                }
                self.pump(host)
            }
            Ev::Data(link, header, content) => self.data(link, header, content),
            Ev::Poll(host, life) if self.hosts[host].life == life => {
                if self.hosts[host].wakes <= self.now {
                    self.hosts[host].wakes = u64::MAX;
                }
                self.pump(host)
            }
            Ev::Stored(host, life, slot) if self.hosts[host].life == life => {
                self.stored(host, slot)
            }
            Ev::Fetched(host, life, ticket, device, range) if self.hosts[host].life == life => {
                self.fetched(host, ticket, device, range)
            }
            Ev::Promised(host, life, device, epoch, blocks) if self.hosts[host].life == life => {
                if let Some(source) = &mut self.hosts[host].source {
                    source.handle(now, source::Event::Promised { device, epoch, blocks });
                }
                self.pump(host)
            }
            Ev::CloseRound(host, life) if self.hosts[host].life == life => self.close_round(host),
            Ev::Pause(host, life, ticket) if self.hosts[host].life == life => {
                self.pause(host, ticket)
            }
            Ev::Guest(life) if self.guest.life == life => self.guest_step(),
            Ev::Finish(op, life) if self.guest.life == life => self.finish_write(op),
            Ev::FlushDone(host, op, life) if self.guest.life == life => self.flush_done(host, op),
            Ev::Connect(of) => {
                self.connect(of);
                Ok(())
            }
            Ev::Cut(link) => {
                self.cut(link);
                Ok(())
            }
            Ev::CutSeen(link, at_source) => self.cut_seen(link, at_source),
            Ev::Crash(host) => {
                self.crash(host);
                Ok(())
            }
            Ev::Restart(host) => self.restart(host),
            Ev::Move => self.begin_move(),
            Ev::Backup => {
                self.backup();
                Ok(())
            }
            Ev::Persist => {
                self.soon(20_000, Ev::Persist);
                let host = self.random.below(3) as usize;
                if self.hosts[host].up {
                    self.hosts[host].persist();
                }
                Ok(())
            }
            Ev::Disturb => {
                self.disturb();
                Ok(())
            }
            // Of a host or a guest that has died since.
            _ => Ok(()),
        }
    }

    // ---- links

    /// Where a control message arrives, if it does. `side` 0 is the destination.
    fn receiver(&mut self, link: LinkId, side: usize) -> Option<usize> {
        let line = &self.lines[&link];
        // What is lost is the end of the stream; after the cut was seen, anything may still come.
        if !line.up && (!line.seen[side] || self.random.chance(70)) {
            return None;
        }
        let of = &self.moves[line.of];
        let host = if side == 0 { of.to } else { of.from };
        (self.hosts[host].up && !of.over).then_some(host)
    }

    fn send(&mut self, link: LinkId, side: usize, event: Ev) {
        let delay = 20 + self.random.below(1_500);
        let Some(line) = self.lines.get_mut(&link).filter(|line| line.up) else { return };
        line.last[side] = (self.now + delay).max(line.last[side] + 1);
        let delay = line.last[side] - self.now;
        if self.random.chance(4) {
            let more = self.random.below(3_000);
            self.at(delay + more, event.clone());
        }
        self.at(delay, event);
    }

    fn bend(&mut self, host: usize, message: ToDestination) -> ToDestination {
        match message {
            ToDestination::Round { device, epoch, last, .. }
                if self.broken == Broken::ListsAreForgotten =>
            {
                ToDestination::Round { device, epoch, blocks: Vec::new(), last }
            }
            ToDestination::Promise { device, epoch, blocks } => {
                for (block, hash) in &blocks {
                    self.promises.insert((host, device.0, block.0), *hash);
                }
                ToDestination::Promise { device, epoch, blocks }
            }
            other => other,
        }
    }

    fn data(&mut self, link: LinkId, header: BlockHeader, content: Vec<[u64; 2]>) -> Checked {
        let line = &self.lines[&link];
        let of = &self.moves[line.of];
        let (host, session) = (of.to, of.session);
        let lost = !line.up && self.random.chance(50);
        let ours = self.hosts[host].disk.received.is_some_and(|(known, _)| known == session);
        if lost || !self.hosts[host].up || !ours || self.hosts[host].destination.is_none() {
            return Ok(());
        }
        self.slots += 1;
        let (slot, now) = (self.slots, self.time());
        if self.broken == Broken::ContentBeforeItsList {
            let start = header.range.start.0 as usize;
            self.hosts[host].content[header.device.0 as usize][start..start + content.len()]
                .copy_from_slice(&content);
        }
        self.hosts[host].slots.insert(slot, (header.device, header.range, content));
        if let Some(destination) = &mut self.hosts[host].destination {
            destination.handle(now, destination::Event::Blocks(link, header, slot));
        }
        self.pump(host)
    }

    fn connect(&mut self, of: usize) {
        let now = self.time();
        let Move { session, from, to, link, over } = self.moves[of];
        if over || link.is_some() {
            return;
        }
        let ours = |known: Option<(SessionId, Option<u32>)>| {
            known.is_some_and(|(known, _)| known == session)
        };
        let ready = self.hosts[from].source.as_ref().is_some_and(|s| s.session() == session)
            && self.hosts[to].destination.is_some()
            && ours(self.hosts[to].disk.received);
        if !ready {
            self.soon(4_000, Ev::Connect(of));
            return;
        }
        self.serial += 1;
        let link = LinkId(self.serial);
        self.lines.insert(link, Line { of, up: true, seen: [false; 2], last: [0; 2] });
        self.moves[of].link = Some(link);
        let event = destination::Event::Connected(link);
        self.hosts[to].destination.iter_mut().for_each(|d| d.handle(now, event.clone()));
        let event = source::Event::Connected(link);
        self.hosts[from].source.iter_mut().for_each(|s| s.handle(now, event.clone()));
        for host in [from, to] {
            let life = self.hosts[host].life;
            self.at(0, Ev::Poll(host, life));
        }
        if self.now < self.troubled_until && self.random.chance(40) {
            self.soon(12_000, Ev::Cut(link));
        }
    }

    fn cut(&mut self, link: LinkId) {
        let Some(line) = self.lines.get_mut(&link).filter(|line| line.up) else { return };
        line.up = false;
        self.outcome.cuts += 1;
        let of = line.of;
        self.moves[of].link = None;
        for at_source in [false, true] {
            // Now and then nobody says that a link is dead.
            let silent = self.random.chance(10);
            self.soon(if silent { 100_000 } else { 2_000 }, Ev::CutSeen(link, at_source));
        }
        self.soon(6_000, Ev::Connect(of));
    }

    fn cut_seen(&mut self, link: LinkId, at_source: bool) -> Checked {
        let now = self.time();
        let line = self.lines.get_mut(&link).expect("a known link");
        line.seen[usize::from(at_source)] = true;
        let of = &self.moves[line.of];
        let host = if at_source { of.from } else { of.to };
        if of.over || !self.hosts[host].up {
            return Ok(());
        }
        match (&mut self.hosts[host], at_source) {
            (Host { source: Some(source), .. }, true) => {
                source.handle(now, source::Event::Cut(link));
            }
            (Host { destination: Some(destination), .. }, false) => {
                destination.handle(now, destination::Event::Cut(link));
            }
            _ => {}
        }
        self.pump(host)
    }
}
