//! Lists, content and those who wait for it: whatever comes late, twice or not at all.

use super::*;

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
    let hashes = vec![Some(hash_of(4099))];
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

/// A pair whose destination runs and has nothing but promises: of two blocks that are far
/// behind in the queue.
fn promised() -> Pair {
    let mut pair = pair(4000);
    let epoch = Epoch(pair.replica.rounds().clock().0 - 1);
    let hash = |block: u64| (BlockIndex(block), hash_of(100 + block));
    let blocks = vec![hash(3000), hash(3001)];
    pair.source.handle(pair.now, source::Event::Promised { device: DEVICE, epoch, blocks });
    pair.settle();
    pair.switch();
    assert!(pair.runs_there);
    pair
}

fn fetches(pair: &mut Pair) -> Vec<(u64, BlockRange)> {
    let fetch = |action: &destination::Action| match action {
        destination::Action::Fetch { ticket, range, .. } => Some((*ticket, *range)),
        _ => None,
    };
    let fetches = pair.taken.iter().filter_map(fetch).collect();
    pair.taken.clear();
    fetches
}

#[test]
fn without_the_source_a_reader_waits_for_what_a_store_has_and_only_the_rest_fails() {
    let mut pair = promised();
    assert_eq!(fetches(&mut pair).len(), 1);
    pair.cut();
    pair.now += SECOND * 60;
    pair.settle();
    let rest = vec![BlockRange::new(0, 3000), BlockRange::new(3002, 998)];
    let lacking = pair.destination.lacking(DEVICE);
    assert_eq!(lacking, (vec![BlockRange::new(3000, 2)], rest));
    let read = |pair: &mut Pair, block: u64| {
        pair.destination.read(pair.now, DEVICE, one(block), WaiterId(block))
    };
    assert!(matches!(read(&mut pair, 0), Access::Refused(_)));
    assert_eq!(read(&mut pair, 3000), Access::Wait);
    assert!(matches!(
        pair.destination.write(pair.now, DEVICE, 4, 4, WaiterId(9)),
        Access::Refused(_)
    ));
}

#[test]
fn a_store_that_fails_is_asked_again_later_block_by_block_and_the_peer_at_once() {
    let mut pair = promised();
    let (ticket, range) = fetches(&mut pair)[0];
    assert_eq!(range, BlockRange::new(3000, 2));
    // One block of the two cannot be had.
    pair.needs.clear();
    pair.slots.insert(900, (range, pair.here[3000..3002].to_vec()));
    let hashes = vec![None, Some(hash_of(pair.here[3001]))];
    let event = destination::Event::Fetched { ticket, hashes, slot: 900 };
    pair.destination.handle(pair.now, event);
    pair.settle();
    assert_eq!(pair.there[3001], pair.here[3001]);
    assert_eq!(pair.needs, [(one(3000), Class::Dirty)]);
    let counters = pair.destination.counters();
    assert_eq!((counters.from_store, counters.store_failed), (1, 1), "{counters:?}");
    // The source dies before it has sent it; the store comes back.
    pair.cut();
    assert!(fetches(&mut pair).is_empty(), "not at once");
    let wake = pair.destination.wake(pair.now).unwrap();
    assert!(wake <= pair.now + SECOND);
    pair.now += SECOND;
    pair.settle();
    let (ticket, range) = fetches(&mut pair)[0];
    assert_eq!(range, one(3000));
    pair.slots.insert(901, (range, vec![pair.here[3000]]));
    let hashes = vec![Some(hash_of(pair.here[3000]))];
    let event = destination::Event::Fetched { ticket, hashes, slot: 901 };
    pair.destination.handle(pair.now, event);
    pair.settle();
    assert_eq!(pair.there[3000], pair.here[3000]);
}

#[test]
fn the_recorded_order_of_first_use_is_told_on_every_link_and_goes_ahead_of_the_rest() {
    let mut pair = pair(4000);
    let order = vec![BlockRange::new(3000, 3), BlockRange::new(10, 1)];
    pair.source.handle(pair.now, source::Event::Expected(DEVICE, order.clone()));
    for _ in 0..2 {
        pair.cut();
        pair.given.clear();
        pair.connect();
        let told = pair.given.iter().any(|action| {
            matches!(action, source::Action::Send(_, ToDestination::Expect { order: told, .. })
                if *told == order)
        });
        assert!(told);
        let ranges: Vec<BlockRange> =
            pair.data.iter().take(2).map(|(_, header, _)| header.range).collect();
        assert_eq!(ranges, order);
    }
}

#[test]
fn a_run_may_be_confirmed_in_parts_in_any_order_and_each_counts_once() {
    let mut pair = pair(8);
    let (link, header, _) = pair.data.remove(0);
    assert_eq!((header.range, pair.data.len()), (BlockRange::new(0, 8), 0));
    let confirm = |pair: &mut Pair, range: BlockRange, retry: Vec<BlockRange>| {
        let (device, epoch) = (DEVICE, header.epoch);
        let message = ToSource::Receipt { device, range, epoch, retry };
        pair.source.handle(pair.now, source::Event::Received(link, message));
        pair.source.in_flight() / BLOCK
    };
    assert_eq!(confirm(&mut pair, BlockRange::new(3, 2), vec![]), 6);
    assert_eq!(confirm(&mut pair, BlockRange::new(3, 2), vec![]), 6, "twice");
    assert_eq!(confirm(&mut pair, BlockRange::new(2, 2), vec![]), 6, "over its end");
    assert_eq!(confirm(&mut pair, BlockRange::new(5, 3), vec![one(6)]), 3);
    assert_eq!(confirm(&mut pair, BlockRange::new(0, 3), vec![]), 0);
    pair.settle();
    assert_eq!(pair.source.remaining(), BLOCK);
    assert_eq!(pair.data.remove(0).1.range, one(6));
}

#[test]
fn check_38_over_a_third_host_the_way_back_sends_what_was_written_since() {
    let mut forth = pair(64);
    forth.deliver_all();
    forth.switch();
    forth.deliver_all();
    let Pair { replica: a, destination, here: at_a, there: mut at_b, .. } = forth;
    let mut a = a;
    let last = Epoch(a.rounds().clock().0 - 1);
    a.give_away(last);
    let b = destination.into_devices().pop().unwrap().replica;
    drop(b.rounds().write(one(5)));
    at_b[5] = 1005;
    let geometry = b.geometry();
    let mut on = between(b, at_b, Replica::untouched(geometry), vec![0; 64], 3);
    on.deliver_all();
    on.switch();
    on.deliver_all();
    let Pair { destination, there: mut at_c, .. } = on;
    let c = destination.into_devices().pop().unwrap().replica;
    drop(c.rounds().write(one(9)));
    at_c[9] = 1009;
    let mut back = between(c, at_c.clone(), a, at_a, 4);
    back.deliver_all();
    back.switch();
    back.deliver_all();
    assert!(back.runs_there);
    let sent: Vec<BlockRange> = back.sent.iter().map(|header| header.range).collect();
    assert_eq!(sent, [one(5), one(9)]);
    assert_eq!(back.there, at_c);
}
