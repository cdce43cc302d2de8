//! Who owns the devices, and what becomes of them when an end fails.

use super::*;

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
fn devices_that_do_not_fit_are_refused_by_name() {
    let geometry = |blocks: u64| Geometry::new(blocks * BLOCK, BLOCK as u32).unwrap();
    let owner = Replica::owned(geometry(4), Term { id: SessionId([1; 16]), first: Epoch(1) });
    let there = Replica::untouched(geometry(5));
    let pair = between(owner, vec![0; 4], there, vec![0; 5], 2);
    let refused = matches!(pair.source.phase(), source::Phase::Failed(Reason::Group { device, .. })
        if device == "disk");
    assert!(refused, "{:?}", pair.source.phase());
}
