//! Terms step by step: what each of the three does, said exactly. That nobody runs twice is the
//! simulator's to show (`migrate::switchover::simulator`).

use super::*;
use crate::lease::{
    AttemptId, Beat, BeatName, BeatRef, BootTime, Epoch, FileStore, HostName, LeaseStore,
    MachineName, Nonce, Outcome, Record,
};
use HolderAction as Ha;
use HolderEvent as He;
use PulseAction as Pa;
use PulseEvent as Pe;
use TakerAction as Ta;
use TakerEvent as Te;
use std::time::Duration;

const T: u64 = 3000;

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn machine() -> MachineName {
    MachineName::new("redis").unwrap()
}

fn at(ms: u64) -> BootTime {
    BootTime(Duration::from_millis(ms))
}

fn life(name: &str, incarnation: u64) -> BeatRef {
    BeatRef { name: BeatName::of_host(host(name)), incarnation }
}

fn view(name: &str, incarnation: u64, until: u64) -> Option<View> {
    Some(View { of: life(name, incarnation), until: at(until) })
}

fn nonces(from: u128) -> Nonces {
    let mut next = from;
    Box::new(move || {
        next += 1;
        Nonce(next)
    })
}

/// Host a's machine, protected by the first life of host a.
fn record() -> Record {
    let first = Record::first(machine(), host("a"), AttemptId(1), Nonce(1));
    first.bound(Some(life("a", 1)))
}

fn beat(incarnation: u64, serial: u64) -> Beat {
    let (of, term) = (life("a", incarnation), Duration::from_millis(T));
    let nonce = Nonce(u128::from(1000 * incarnation + serial));
    Beat { of, serial, term, fenced_by: None, nonce }
}

fn pulse() -> (Pulse, Vec<Pa>) {
    let name = BeatName::of_host(host("a"));
    Pulse::start(at(0), PulseParts { name, times: Times::default(), nonces: nonces(100) })
}

fn holder(now: u64, view: Option<View>) -> (Holder, Vec<Ha>) {
    let times = Times::default();
    let parts = HolderParts {
        record: record(),
        here: host("a"),
        view,
        given_up: None,
        times,
        nonces: nonces(200),
    };
    Holder::new(at(now), parts)
}

fn taker() -> (Taker, Vec<Ta>) {
    let parts = TakerParts {
        machine: machine(),
        here: host("b"),
        attempt: AttemptId(7),
        times: Times::default(),
        nonces: nonces(300),
    };
    Taker::start(at(0), parts)
}

fn operation(call: &Call) -> OperationId {
    call.operation
}

fn pulse_call(actions: &[Pa]) -> Call {
    let call =
        actions.iter().find_map(|a| if let Pa::Store(c) = a { Some(c.clone()) } else { None });
    call.unwrap_or_else(|| panic!("nothing is asked: {actions:?}"))
}

fn holder_call(actions: &[Ha]) -> Call {
    let call =
        actions.iter().find_map(|a| if let Ha::Store(c) = a { Some(c.clone()) } else { None });
    call.unwrap_or_else(|| panic!("nothing is asked: {actions:?}"))
}

fn taker_call(actions: &[Ta]) -> Call {
    let call =
        actions.iter().find_map(|a| if let Ta::Store(c) = a { Some(c.clone()) } else { None });
    call.unwrap_or_else(|| panic!("nothing is asked: {actions:?}"))
}

fn deeds(actions: Vec<Ha>) -> Vec<Ha> {
    actions.into_iter().filter(|a| !matches!(a, Ha::Report(_))).collect()
}

/// Answers a taker's next questions from a store that holds these.
fn serve(taker: &mut Taker, now: u64, call: &Call, lease: &Record, beat: &Beat) -> Vec<Ta> {
    let answer = match &call.content {
        Content::ReadLease(_) => Answer::Lease(Some(lease.clone())),
        Content::ReadBeat(_) => Answer::Beat(Some(beat.clone())),
        other => panic!("asked {other:?}"),
    };
    let more = taker.on(at(now), Te::Answer { operation: call.operation, answer });
    let reads_on = |a: &Ta| matches!(a, Ta::Store(c) if matches!(c.content, Content::ReadBeat(_)));
    if !more.iter().any(reads_on) {
        return more;
    }
    let call = taker_call(&more);
    serve(taker, now, &call, lease, beat)
}

#[test]
fn a_pulse_counts_its_term_from_the_first_sending_of_the_write_that_won() {
    let (mut p, asked) = pulse();
    let read = pulse_call(&asked);
    assert_eq!(read.content, Content::ReadBeat(BeatName::of_host(host("a"))));
    let old = Some(beat(4, 17));
    let began =
        p.on(at(10), Pe::Answer { operation: operation(&read), answer: Answer::Beat(old.clone()) });
    let begin = pulse_call(&began);
    let Content::SetBeat { expected, new } = &begin.content else { panic!("{begin:?}") };
    assert_eq!((expected, &new.of, new.serial), (&old, &life("a", 5), 0));
    assert_eq!(p.view(), None);

    // The first answer is lost, the second try finds its own nonce much later.
    let lost = Answer::Unavailable("no route".into());
    p.on(at(500), Pe::Answer { operation: operation(&begin), answer: lost });
    assert_eq!(p.wake_at(), Some(at(520)));
    let again = pulse_call(&p.on(at(520), Pe::Tick));
    assert_eq!(again.content, begin.content);
    let found = Answer::Beat(Some(new.clone()));
    let alive = p.on(at(900), Pe::Answer { operation: operation(&again), answer: found });
    assert!(alive.contains(&Pa::Tell(view("a", 5, 10 + T))), "{alive:?}");
    assert_eq!(p.wake_at(), Some(at(1010)));
}

#[test]
fn a_fenced_pulse_says_that_its_life_is_over_before_it_begins_the_next() {
    let (mut p, asked) = pulse();
    let read = pulse_call(&asked);
    let began = p.on(at(0), Pe::Answer { operation: operation(&read), answer: Answer::Beat(None) });
    let begin = pulse_call(&began);
    p.on(at(5), Pe::Answer { operation: operation(&begin), answer: Answer::Won });
    let renew = pulse_call(&p.on(at(1000), Pe::Tick));
    let Content::SetBeat { expected: Some(seen), .. } = &renew.content else { panic!("{renew:?}") };
    let fenced = seen.fenced(host("b"), Nonce(9));
    let answer = Answer::Beat(Some(fenced.clone()));
    let over = p.on(at(9000), Pe::Answer { operation: operation(&renew), answer });
    let tell = over.iter().position(|a| *a == Pa::Tell(None)).unwrap();
    let store = over.iter().position(|a| matches!(a, Pa::Store(_))).unwrap();
    assert!(tell < store, "{over:?}");
    let next = pulse_call(&over);
    let Content::SetBeat { expected, new } = next.content else { panic!() };
    assert_eq!((expected, new.of), (Some(fenced), life("a", 2)));
    assert_eq!(p.view(), None);
}

#[test]
fn a_machine_stands_still_at_the_end_of_its_term_and_goes_on_when_the_same_life_is_renewed() {
    let (mut h, done) = holder(0, view("a", 1, T));
    assert_eq!(deeds(done), []);
    let end = at(T - 100);
    assert_eq!((h.freeze_at(), h.wake_at()), (Some(end), Some(end)));
    assert!(h.may_run(at(T - 101)) && !h.may_run(end));
    // Renewed: the end moves.
    assert_eq!(deeds(h.on(at(1000), He::View(view("a", 1, T + 1000)))), []);
    assert_eq!(h.freeze_at(), Some(at(T + 900)));
    assert_eq!(deeds(h.on(at(T + 900), He::Tick)), [Ha::Freeze]);
    assert_eq!((h.state(), h.freeze_at()), (HolderState::Frozen, None));
    // A renewal that ends too soon to be worth a thaw.
    assert_eq!(deeds(h.on(at(T + 1000), He::View(view("a", 1, T + 1250)))), []);
    assert_eq!(deeds(h.on(at(T + 1100), He::View(view("a", 1, 2 * T)))), [Ha::Thaw]);
}

#[test]
fn a_deadline_thread_that_was_faster_than_a_renewal_is_undone() {
    let (mut h, _) = holder(0, view("a", 1, T));
    h.on(at(T - 101), He::View(view("a", 1, 2 * T)));
    assert_eq!(deeds(h.on(at(T - 90), He::Frozen)), [Ha::Thaw]);
}

#[test]
fn in_a_new_life_a_machine_runs_only_after_its_lease_was_got_back() {
    let (mut h, _) = holder(0, view("a", 1, T));
    assert_eq!(deeds(h.on(at(T), He::View(None))), [Ha::Freeze]);
    let asked = h.on(at(T + 500), He::View(view("a", 2, 3 * T)));
    let call = holder_call(&asked);
    let Content::SetLease { expected, new } = &call.content else { panic!("{call:?}") };
    assert_eq!((expected, new.epoch, &new.beat), (&record(), Epoch(2), &Some(life("a", 2))));
    assert_eq!(h.state(), HolderState::Frozen);
    let won = He::Answer { operation: operation(&call), answer: Answer::Won };
    assert_eq!(deeds(h.on(at(T + 510), won)), [Ha::Held(new.clone()), Ha::Thaw]);

    let (mut h, _) = holder(0, view("a", 1, T));
    h.on(at(T), He::View(None));
    let call = holder_call(&h.on(at(T + 500), He::View(view("a", 2, 3 * T))));
    let taken = record().taken(host("b"), AttemptId(7), Nonce(8)).bound(Some(life("b", 1)));
    let lost = He::Answer { operation: operation(&call), answer: Answer::Lease(Some(taken)) };
    let (owner, epoch) = (host("b"), Epoch(2));
    assert_eq!(deeds(h.on(at(T + 510), lost)), [Ha::Discard { owner, epoch }]);
    assert_eq!(h.state(), HolderState::Gone);
}

#[test]
fn nothing_is_got_back_behind_the_back_of_a_move() {
    let (mut h, _) = holder(0, view("a", 1, T));
    h.on(at(10), He::Moving(true));
    let handing = record().handing(AttemptId(5), host("c"), Nonce(50));
    h.on(at(20), He::Holds(handing.clone()));
    assert_eq!(deeds(h.on(at(T), He::View(view("a", 2, 3 * T)))), [Ha::Freeze]);
    let call = holder_call(&h.on(at(T + 10), He::Moving(false)));
    let Content::SetLease { expected, .. } = call.content else { panic!() };
    assert_eq!(expected, handing);
}

#[test]
fn protection_counts_from_the_moment_it_is_asked_for() {
    let unbound = record().bound(None);
    let parts = HolderParts {
        record: unbound.clone(),
        here: host("a"),
        view: view("a", 1, T),
        given_up: None,
        times: Times::default(),
        nonces: nonces(200),
    };
    let (mut h, done) = Holder::new(at(0), parts);
    assert_eq!((deeds(done), h.freeze_at()), (vec![], None));
    let call = holder_call(&h.on(at(10), He::Protect(true)));
    let Content::SetLease { expected, new } = &call.content else { panic!("{call:?}") };
    assert_eq!((expected, new.epoch, &new.beat), (&unbound, Epoch(1), &Some(life("a", 1))));
    // No answer yet: a taker may see it already.
    assert_eq!(h.freeze_at(), Some(at(T - 100)));
    let won = He::Answer { operation: operation(&call), answer: Answer::Won };
    assert_eq!(deeds(h.on(at(20), won)), [Ha::Held(new.clone())]);
    // And ends only with the answer.
    let call = holder_call(&h.on(at(30), He::Protect(false)));
    assert_eq!(h.freeze_at(), Some(at(T - 100)));
    h.on(at(40), He::Answer { operation: operation(&call), answer: Answer::Won });
    assert_eq!(h.freeze_at(), None);

    // Without the rule the machine runs on although a taker may see the beat already.
    let parts = HolderParts {
        record: record().bound(None),
        here: host("a"),
        view: view("a", 1, T),
        given_up: None,
        times: Times { broken: Some(Rule::BoundFromSending), ..Times::default() },
        nonces: nonces(200),
    };
    let (mut h, _) = Holder::new(at(0), parts);
    holder_call(&h.on(at(10), He::Protect(true)));
    assert_eq!(deeds(h.on(at(2 * T), He::Tick)), []);
}

#[test]
fn a_machine_that_arrives_is_within_its_hosts_term_from_the_token_on() {
    let handed = record().handing(AttemptId(5), host("b"), Nonce(50));
    let parts = HolderParts {
        record: handed.clone(),
        here: host("b"),
        view: view("b", 3, T),
        given_up: None,
        times: Times::default(),
        nonces: nonces(200),
    };
    let (mut h, done) = Holder::arriving(at(0), parts, Some(life("b", 3)));
    assert_eq!((deeds(done), h.freeze_at()), (vec![], Some(at(T - 100))));
    // Its life was ended meanwhile: it waits for the lease before it can be got back.
    assert_eq!(deeds(h.on(at(50), He::View(view("b", 4, 2 * T)))), [Ha::Freeze]);
    let owned = handed.taken(host("b"), AttemptId(5), Nonce(51)).bound(Some(life("b", 3)));
    assert_eq!(deeds(h.on(at(60), He::Holds(owned.clone()))), []);
    let call = holder_call(&h.on(at(70), He::Moving(false)));
    let Content::SetLease { expected, new } = call.content else { panic!() };
    assert_eq!((expected, new.beat), (owned, Some(life("b", 4))));

    // Without the rule it runs on, until its lease is known to be won.
    let parts = HolderParts {
        record: handed.clone(),
        here: host("b"),
        view: view("b", 3, T),
        given_up: None,
        times: Times { broken: Some(Rule::TermFromTheToken), ..Times::default() },
        nonces: nonces(200),
    };
    let (mut h, _) = Holder::arriving(at(0), parts, Some(life("b", 3)));
    assert_eq!(deeds(h.on(at(2 * T), He::Tick)), []);
}

#[test]
fn a_taker_waits_fences_and_takes_under_its_own_life() {
    let (mut t, asked) = taker();
    let (lease, seen) = (record(), beat(1, 7));
    serve(&mut t, 5, &taker_call(&asked), &lease, &seen);
    assert_eq!((t.state(), t.wake_at()), (TakerState::Watching, Some(at(255))));
    // It has beaten: counted anew, and from the answer.
    let seen = beat(1, 8);
    let asked = t.on(at(255), Te::Tick);
    serve(&mut t, 260, &taker_call(&asked), &lease, &seen);
    let patience = Times::default().patience(Duration::from_millis(T));
    let over = at(260) + patience;
    let mut fencing = Vec::new();
    while fencing.is_empty() {
        let due = t.wake_at().unwrap();
        assert!(due <= over, "the end of the term is slept through");
        let call = taker_call(&t.on(due, Te::Tick));
        let now = u64::try_from(due.0.as_millis()).unwrap() + 1;
        fencing = serve(&mut t, now, &call, &lease, &seen);
        assert!(fencing.is_empty() || at(now) >= over, "{fencing:?} at {now}");
    }
    let fence = taker_call(&fencing);
    let Content::SetBeat { expected, new } = &fence.content else { panic!("{fence:?}") };
    assert_eq!((expected, &new.fenced_by), (&Some(seen), &Some(host("b"))));
    let asked = t.on(at(4000), Te::Answer { operation: operation(&fence), answer: Answer::Won });
    let orphaned = serve(&mut t, 4001, &taker_call(&asked), &lease, new);
    assert_eq!(orphaned, [Ta::Orphaned(lease.clone())]);
    assert_eq!(t.state(), TakerState::Ready);
    // Prepared, but a host that shows no sign of life itself may take nothing.
    assert_eq!(t.on(at(4100), Te::Prepared), []);
    assert_eq!(t.on(at(4100), Te::View(view("b", 2, 4200))), []);
    let call = taker_call(&t.on(at(4110), Te::View(view("b", 2, 9000))));
    let Content::SetLease { expected, new } = &call.content else { panic!("{call:?}") };
    assert_eq!((expected, &new.owner, new.epoch), (&lease, &host("b"), Epoch(2)));
    assert_eq!(new.beat, Some(life("b", 2)));
    let taken = t.on(at(4120), Te::Answer { operation: operation(&call), answer: Answer::Won });
    assert!(taken.contains(&Ta::Taken(new.clone())), "{taken:?}");
}

#[test]
fn a_machine_that_was_being_moved_is_taken_only_when_no_offer_can_hold() {
    let (mut t, asked) = taker();
    t.on(at(1), Te::Prepared);
    t.on(at(1), Te::View(view("b", 2, 60_000)));
    let lease = record().handing(AttemptId(5), host("c"), Nonce(50));
    let fenced = beat(1, 7).fenced(host("d"), Nonce(60));
    let told = serve(&mut t, 5, &taker_call(&asked), &lease, &fenced);
    // The lease is read once more after the end of its owner's life is known.
    let told = serve(&mut t, 6, &taker_call(&told), &lease, &fenced);
    assert_eq!(told, [Ta::Orphaned(lease.clone())]);
    let times = Times::default();
    assert_eq!(t.wake_at(), Some(at(5) + times.drift.outlast(times.longest_offer)));
    // The destination was faster: it is watched now.
    let call = taker_call(&t.on(at(2100), Te::Tick));
    let moved = lease.taken(host("c"), AttemptId(5), Nonce(51)).bound(Some(life("c", 1)));
    let answer = Answer::Lease(Some(moved));
    let next = t.on(at(2110), Te::Answer { operation: call.operation, answer });
    let name = BeatName::of_host(host("c"));
    assert_eq!(taker_call(&next).content, Content::ReadBeat(name));
    assert_eq!(t.state(), TakerState::Watching);
}

#[test]
fn the_next_life_of_an_owner_ends_the_one_before_only_when_its_term_is_over() {
    let (mut t, asked) = taker();
    t.on(at(1), Te::Prepared);
    t.on(at(1), Te::View(view("b", 2, 60_000)));
    let told = serve(&mut t, 5, &taker_call(&asked), &record(), &beat(2, 0));
    serve(&mut t, 6, &taker_call(&told), &record(), &beat(2, 0));
    assert_eq!(t.state(), TakerState::Clearing);
    let patience = Times::default().patience(Duration::from_millis(T));
    assert_eq!(t.wake_at(), Some(at(5) + patience));
}

#[test]
fn a_machine_without_a_term_is_never_taken() {
    for lease in [record().bound(None), record().taken(host("b"), AttemptId(2), Nonce(2))] {
        let (mut t, asked) = taker();
        let done = serve(&mut t, 5, &taker_call(&asked), &lease, &beat(1, 7));
        assert!(matches!(&done[..], [Ta::Done(_)]), "{done:?}");
        assert_eq!((t.state(), t.wake_at()), (TakerState::Done, None));
    }
}

#[test]
fn calls_say_to_a_real_store_what_they_mean() {
    let folder = tempfile::tempdir().unwrap();
    let store = FileStore::open(folder.path(), Duration::from_secs(5)).unwrap();
    let ask = |content| Call { operation: OperationId(1), content }.perform(&store);
    let (name, first) = (BeatName::of_host(host("a")), beat(1, 0));
    assert_eq!(ask(Content::ReadBeat(name.clone())), Answer::Beat(None));
    let set = Content::SetBeat { expected: None, new: first.clone() };
    assert_eq!(ask(set.clone()), Answer::Won);
    assert_eq!(ask(set), Answer::Beat(Some(first.clone())));
    assert_eq!(ask(Content::ReadBeat(name)), Answer::Beat(Some(first)));
    assert_eq!(ask(Content::ReadLease(machine())), Answer::Lease(None));
    assert_eq!(store.compare_and_set(&machine(), None, &record()).unwrap(), Outcome::Won);
    let new = record().rebound(None, Nonce(4));
    let set = Content::SetLease { expected: record(), new: new.clone() };
    assert_eq!(ask(set.clone()), Answer::Won);
    assert_eq!(ask(set), Answer::Lease(Some(new)));
}
