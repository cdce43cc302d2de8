//! Both ends of a move, wired to each other in memory; each test lets one thing happen late.

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

#[test]
fn check_06_a_dirty_list_applies_before_any_of_its_content() {
    let mut pair = pair(8);
    pair.deliver_all();
    assert!(pair.read(3, 1), "all is there");
    pair.write_here(3, 555);
    pair.round();
    assert!(!pair.read(3, 2), "a read between list and content waits");
    pair.deliver_all();
    assert_eq!(pair.woken(), [2]);
    assert_eq!(pair.there[3], 555);
    // Content that comes before its list is sent again, not taken.
    pair.write_here(4, 666);
    let early =
        BlockHeader { device: DEVICE, range: one(4), epoch: Epoch(99), class: Class::Dirty };
    pair.data.push((LinkId(1), early, vec![666]));
    pair.deliver_all();
    assert_eq!(pair.there[4], 104);
    assert_eq!(pair.destination.counters().again, 1);
}

#[test]
fn check_07_a_late_answer_of_a_store_does_not_satisfy_a_newer_list() {
    let mut pair = pair(4000);
    pair.source.handle(
        pair.now,
        source::Event::Promised {
            device: DEVICE,
            epoch: Epoch(1),
            blocks: vec![(BlockIndex(3999), hash_of(4099))],
        },
    );
    pair.settle();
    let fetch = pair.taken.iter().find_map(|action| match action {
        destination::Action::Fetch { ticket, range, .. } => Some((*ticket, *range)),
        _ => None,
    });
    let (ticket, range) = fetch.expect("promised, so fetched");
    assert_eq!(range, one(3999));
    pair.data.clear();
    pair.write_here(3999, 777);
    pair.cut();
    pair.connect();
    // The new link's first list has block 5; now the store answers for what it was.
    pair.slots.insert(900, (one(3999), vec![4099]));
    let hashes = vec![hash_of(4099)];
    let event = destination::Event::Fetched { ticket, hashes, slot: 900 };
    pair.destination.handle(pair.now, event);
    pair.settle();
    assert_ne!(pair.there[3999], 4099, "old content");
    assert!(!pair.read(3999, 1));
    pair.deliver_all();
    assert_eq!(pair.there[3999], 777);
    assert_eq!(pair.destination.counters().from_store, 0);
}

#[test]
fn check_08_content_that_comes_later_never_goes_over_a_block_written_here() {
    let mut pair = pair(600);
    pair.data.clear();
    pair.switch();
    assert!(pair.runs_there);
    let claim = pair.destination.write(pair.now, DEVICE, 590 * BLOCK, 2 * BLOCK, WaiterId(1));
    let Access::Go(claim) = claim else { panic!("{claim:?}") };
    assert_eq!(claim, BlockRange::new(590, 2));
    let rounds = std::sync::Arc::clone(pair.destination.replica(DEVICE).unwrap().rounds());
    let guard = rounds.write(claim);
    pair.there[590..592].fill(9);
    pair.destination.wrote(pair.now, DEVICE, claim, true);
    drop(guard);
    pair.settle();
    let late = BlockHeader {
        device: DEVICE,
        range: BlockRange::new(589, 4),
        epoch: pair.destination.replica(DEVICE).unwrap().clock(),
        class: Class::Bulk,
    };
    pair.data.insert(0, (LinkId(1), late, vec![1, 2, 3, 4]));
    pair.deliver(0);
    assert_eq!(pair.there[589..593], [1, 9, 9, 4]);
    assert_eq!(pair.destination.counters().late, 2);
}

#[test]
fn check_08_a_block_written_there_leaves_the_queue_of_the_source() {
    let mut pair = pair(4000);
    pair.switch();
    // The window is full of the first blocks; the last ones are still queued.
    let last = BlockRange::new(3998, 2);
    assert!(pair.data.iter().all(|(_, header, _)| header.range.end() < last.start.0));
    let access = pair.destination.write(pair.now, DEVICE, 3998 * BLOCK, 2 * BLOCK, WaiterId(1));
    assert_eq!(access, Access::Go(last));
    pair.destination.wrote(pair.now, DEVICE, last, true);
    pair.settle();
    assert_eq!(pair.source.counters().spared, 2);
    pair.deliver_all();
    assert!(pair.sent.iter().all(|header| header.range.end() <= last.start.0));
    assert_eq!(pair.destination.missing(), 0);
}

#[test]
fn check_09_a_partial_write_waits_for_its_block_asks_for_it_and_merges() {
    let mut pair = pair(8);
    pair.deliver_all();
    pair.write_here(2, 222);
    pair.switch();
    let write = |pair: &mut Pair, waiter| {
        let access =
            pair.destination.write(pair.now, DEVICE, 2 * BLOCK + 512, 512, WaiterId(waiter));
        pair.settle();
        access
    };
    assert_eq!(write(&mut pair, 1), Access::Wait);
    assert_eq!(pair.needs, [(one(2), Class::Demand)], "it asks for the block itself");
    let copy = pair.data[0].clone();
    pair.deliver_all();
    assert_eq!(pair.woken(), [1]);
    assert!(matches!(write(&mut pair, 1), Access::Go(claim) if claim.count == 0));
    pair.there[2] += 1_000_000;
    // The same content once more does not undo it.
    pair.data.push(copy);
    pair.deliver_all();
    assert_eq!(pair.there[2], 1_000_222);
}

#[test]
fn check_10_readers_of_one_block_ask_once_and_all_go_on() {
    let mut pair = pair(8);
    pair.deliver_all();
    pair.write_here(6, 600);
    pair.switch();
    for waiter in 1..=3 {
        assert!(!pair.read(6, waiter));
    }
    assert_eq!(pair.needs, [(one(6), Class::Demand)]);
    pair.deliver_all();
    assert_eq!(pair.woken(), [1, 2, 3]);
}

#[test]
fn check_11_a_demand_goes_out_at_once_however_much_is_on_its_way() {
    let mut pair = pair(8000);
    pair.switch();
    assert!(pair.source.in_flight() >= 8 << 20, "the window is full");
    let before = pair.sent.len();
    assert!(!pair.read(7999, 1));
    assert_eq!(pair.sent.len(), before + 1);
    let demanded = pair.sent.last().unwrap();
    assert_eq!((demanded.range, demanded.class), (one(7999), Class::Demand));
}

#[test]
fn check_17_when_the_source_dies_readers_get_an_error_in_time_and_do_not_hang() {
    let mut pair = pair(8);
    pair.deliver_all();
    pair.write_here(1, 111);
    pair.switch();
    assert!(!pair.read(1, 5));
    pair.cut();
    pair.now += Patience::default().answer;
    pair.settle();
    let failed = |action: &destination::Action| {
        matches!(action, destination::Action::Fail(ids, Reason::Deadline { .. })
            if ids.contains(&WaiterId(5)))
    };
    assert!(pair.taken.iter().any(failed));
    let again = pair.destination.read(pair.now, DEVICE, one(1), WaiterId(6));
    assert!(matches!(again, Access::Refused(Reason::Deadline { .. })));
    // It is not given up: when the source is back, the block comes.
    pair.connect();
    pair.deliver_all();
    assert!(pair.read(1, 7));
}

#[test]
fn check_17_a_destination_that_never_got_the_token_fails_in_time() {
    let mut pair = pair(8);
    pair.cut();
    pair.now += Patience::default().answer;
    pair.settle();
    assert!(pair.failed());
    assert!(!pair.paused, "writers at the source were never stopped");
}

#[test]
fn check_19_after_a_cut_only_missing_and_dirty_blocks_are_sent() {
    let mut pair = pair(3000);
    pair.deliver(0);
    pair.deliver(0);
    pair.cut();
    let have = 3000 - pair.destination.missing() / BLOCK;
    assert!(have >= 512);
    pair.write_here(0, 5);
    pair.now += Duration::from_secs(10);
    pair.settle();
    pair.sent.clear();
    pair.connect();
    pair.deliver_all();
    let sent: u64 = pair.sent.iter().map(|header| header.range.count).sum();
    assert_eq!(sent, 3000 - have + 1);
    assert_eq!(pair.there, pair.here);
}

#[test]
fn check_21_a_token_that_comes_twice_or_late_runs_once() {
    let mut pair = pair(8);
    pair.deliver_all();
    pair.held = Some(Vec::new());
    pair.switch();
    let held = pair.held.take().unwrap();
    for (link, message) in held.iter().chain(&held) {
        pair.destination.handle(pair.now, destination::Event::Received(*link, message.clone()));
        pair.settle();
    }
    assert!(pair.runs_there);
    let runs = |action: &&destination::Action| matches!(action, destination::Action::Run { .. });
    let all: Vec<_> = pair.taken.iter().filter(runs).cloned().collect();
    let [destination::Action::Run { attempt: 1, state, flushes }] = &all[..] else {
        panic!("{all:?}")
    };
    assert_eq!((&state[..], &flushes[..]), (&[1, 2, 3][..], &[vec![77]][..]));
    // From here on the source does not run by itself, whatever it is told.
    pair.source.handle(pair.now, source::Event::Cancel("too late".into()));
    pair.cut();
    pair.now += Duration::from_secs(3600);
    pair.settle();
    assert!(pair.paused);
}

#[test]
fn check_21_a_refused_token_gives_the_source_its_authority_back() {
    let mut pair = pair(8);
    pair.deliver_all();
    pair.held = Some(Vec::new());
    pair.switch();
    assert_eq!(*pair.source.phase(), source::Phase::Switched);
    pair.destination.handle(pair.now, destination::Event::Cancel("no room".into()));
    let held = pair.held.take().unwrap();
    for (link, message) in held {
        pair.destination.handle(pair.now, destination::Event::Received(link, message));
    }
    pair.settle();
    assert!(!pair.runs_there && !pair.paused);
    assert!(matches!(pair.source.phase(), source::Phase::Failed(Reason::Cancelled(_))));
}

#[test]
fn check_21_a_cut_while_the_destination_starts_gives_nothing_up_before_it_runs() {
    for refuses in [true, false] {
        let mut pair = pair(8);
        pair.data.clear();
        pair.starts_slowly = true;
        pair.switch();
        assert_eq!(*pair.destination.phase(), destination::Phase::Starting);
        pair.cut();
        pair.connect();
        assert_eq!(*pair.source.phase(), source::Phase::Switched, "it may still refuse");
        assert!(!pair.given.contains(&source::Action::HandedOver));
        // What it needs in order to run comes all the same.
        assert!(!pair.read(5, 1));
        pair.deliver_all();
        assert!(pair.read(5, 2));
        let answer = if refuses {
            destination::Event::CannotRun(Reason::Cancelled("no room".into()))
        } else {
            destination::Event::Ran
        };
        pair.destination.handle(pair.now, answer);
        pair.settle();
        assert_eq!(pair.paused, !refuses);
        assert_eq!(pair.given.contains(&source::Action::HandedOver), !refuses);
        assert_eq!(matches!(pair.source.phase(), source::Phase::Failed(_)), refuses);
        // Whoever has run cannot refuse any more, whatever he says.
        let refused =
            ToSource::Refused { attempt: 1, reason: Reason::Cancelled("after all".into()) };
        let event = source::Event::Received(LinkId(pair.link), refused);
        pair.source.handle(pair.now, event);
        pair.settle();
        assert_eq!(pair.paused, !refuses);
    }
}

#[test]
fn check_18_a_destination_that_dies_before_the_token_leaves_the_source_running() {
    let mut pair = pair(8);
    pair.cut();
    pair.now += Patience::default().answer;
    pair.settle();
    let failed = |action: &source::Action| {
        matches!(action, source::Action::Failed(Reason::Deadline { what: Wait::Connection, .. }))
    };
    assert!(pair.given.iter().any(failed));
    assert!(!pair.paused);
}

#[test]
fn check_20_content_that_cannot_be_stored_ends_the_move_and_authority_stays() {
    let mut pair = pair(8);
    pair.slot += 1;
    let (link, header, _) = pair.data.remove(0);
    pair.destination.handle(pair.now, destination::Event::Blocks(link, header, pair.slot));
    let stored = destination::Event::Stored { slot: pair.slot, result: Err("disk full".into()) };
    pair.destination.handle(pair.now, stored);
    pair.slots.insert(pair.slot, (header.range, vec![0; 8]));
    while let Some(action) = pair.destination.poll(pair.now) {
        if let destination::Action::Send(link, message) = action {
            pair.source.handle(pair.now, source::Event::Received(link, message));
        }
    }
    pair.settle();
    assert!(pair.failed());
    assert!(matches!(pair.source.phase(), source::Phase::Failed(Reason::Store { .. })));
    assert!(!pair.paused);
}

#[test]
fn check_38_moving_back_sends_the_difference_only() {
    let mut pair = pair(500);
    pair.deliver_all();
    pair.switch();
    pair.deliver_all();
    assert_eq!(*pair.source.phase(), source::Phase::Released);
    let Pair { mut replica, here, mut there, destination, .. } = pair;
    replica.give_away(Epoch(replica.rounds().clock().0 - 1));
    let owner = destination.into_devices().remove(0).replica;
    drop(owner.rounds().write(BlockRange::new(40, 2)));
    (there[40], there[41]) = (1, 2);
    let mut back = between(owner, there, replica, here, 3);
    back.deliver_all();
    back.switch();
    back.deliver_all();
    let sent: u64 = back.sent.iter().map(|header| header.range.count).sum();
    assert_eq!(sent, 2);
    assert_eq!(back.there, back.here);
    assert_eq!(*back.source.phase(), source::Phase::Released);
}

#[test]
fn check_38_a_destination_that_still_fills_passes_on_what_comes() {
    let mut first = pair(600);
    first.data.clear();
    first.cut();
    first.switch();
    first.connect();
    first.switch();
    assert!(first.runs_there && first.destination.missing() > 0);
    // The second move begins from what is there; the rest is pulled.
    let name = DeviceName::new("disk").unwrap();
    let replica = first.destination.replica(DEVICE).unwrap();
    let config = source::Config::default();
    let devices = vec![SourceDevice::new(name, None, replica)];
    let mut onward = Source::new(config, SessionId([4; 16]), 1, devices, first.now);
    let link = LinkId(50);
    let held = |clock| Held { clock, missing: Vec::new() };
    let have = ToSource::Have { devices: vec![held(Epoch::BASE)], token: Token::Awaited };
    onward.handle(first.now, source::Event::Connected(link));
    onward.handle(first.now, source::Event::Received(link, have));
    let (mut sent, mut pulled) = (0, 0);
    for _ in 0..2000 {
        let Some(action) = onward.poll(first.now) else {
            if first.data.is_empty() {
                break;
            }
            first.taken.clear();
            first.deliver(0);
            for action in std::mem::take(&mut first.taken) {
                if let destination::Action::Here(device, ranges) = action {
                    for range in ranges {
                        onward.handle(first.now, source::Event::Arrived(device, range));
                    }
                }
            }
            continue;
        };
        match action {
            source::Action::CloseRound => {
                let rounds = first.destination.replica(DEVICE).unwrap().rounds();
                let closed = source::Event::RoundClosed(vec![rounds.advance(SECOND).unwrap()]);
                onward.handle(first.now, closed);
            }
            source::Action::Send(_, ToDestination::Round { device, epoch, last: true, .. }) => {
                let applied = ToSource::Applied { device, epoch };
                onward.handle(first.now, source::Event::Received(link, applied));
            }
            source::Action::Blocks(_, BlockHeader { device, range, epoch, .. }) => {
                let replica = first.destination.replica(DEVICE).unwrap();
                assert!(replica.is_here(range), "sends what it does not have");
                sent += range.count;
                let receipt = ToSource::Receipt { device, range, epoch, retry: Vec::new() };
                onward.handle(first.now, source::Event::Received(link, receipt));
            }
            source::Action::Pull(device, range, class) => {
                pulled += range.count;
                first.destination.handle(first.now, destination::Event::Want(device, range, class));
                first.settle();
            }
            _ => {}
        }
    }
    assert!(pulled > 0);
    assert_eq!(sent, 600, "each block once");
}

#[test]
fn custom_events_arrive_once_and_in_order_across_a_cut() {
    let mut pair = pair(4);
    for kind in 0..3 {
        let payload = vec![kind as u8; 4];
        pair.source.handle(pair.now, source::Event::Custom { kind, payload });
    }
    pair.settle();
    pair.cut();
    pair.destination.handle(pair.now, destination::Event::CustomHandled(1));
    pair.connect();
    let kinds: Vec<u32> = pair
        .taken
        .iter()
        .filter_map(|action| match action {
            destination::Action::Custom(custom) => Some(custom.kind),
            _ => None,
        })
        .collect();
    assert_eq!(kinds, [0, 1, 2]);
}

#[test]
fn devices_that_do_not_fit_are_refused_by_name() {
    let geometry = |blocks: u64| Geometry::new(blocks * BLOCK, BLOCK as u32).unwrap();
    let owner = Replica::owned(geometry(4), Term { id: SessionId([1; 16]), first: Epoch(1) });
    let there = Replica::untouched(geometry(5));
    let pair = between(owner, vec![0; 4], there, vec![0; 5], 2);
    let refused = matches!(pair.source.phase(), source::Phase::Failed(Reason::Group { device, .. })
        if device == "disk");
    assert!(refused, "{:?}", pair.source.phase());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Content overtakes, comes twice, comes after the link is gone; writes go on meanwhile.
    #[test]
    fn check_32_content_may_come_in_any_order_and_twice(
        steps in proptest::collection::vec((0u8..10, any::<u16>()), 1..150),
    ) {
        let mut pair = pair(40);
        let mut value = 1000;
        for (what, number) in steps {
            let at = number as usize % pair.data.len().max(1);
            match what {
                0..=3 if !pair.data.is_empty() => pair.deliver(at),
                4 if !pair.data.is_empty() => { let copy = pair.data[at].clone(); pair.data.push(copy); }
                5..=7 => { value += 1; pair.write_here(u64::from(number) % 40, value); }
                8 => pair.round(),
                9 if number % 5 == 0 => {
                    let old = pair.data.clone();
                    pair.cut();
                    pair.connect();
                    pair.data.extend(old);
                }
                _ => {}
            }
        }
        pair.deliver_all();
        pair.switch();
        pair.deliver_all();
        prop_assert!(pair.runs_there);
        prop_assert_eq!(&pair.there, &pair.here);
        prop_assert_eq!(pair.source.phase(), &source::Phase::Released);
    }
}
