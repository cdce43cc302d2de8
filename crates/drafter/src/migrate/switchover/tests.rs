//! The protocol step by step: what each end does, said exactly.

use super::*;
use crate::lease::{BootTime, Epoch, HostName, MachineName, Outcome};
use DestinationAction as Da;
use DestinationEvent as De;
use SourceAction as Sa;
use SourceEvent as Se;

const N: AttemptId = AttemptId(0xbeef);

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn at(ms: u64) -> BootTime {
    BootTime(Duration::from_millis(ms))
}

fn record() -> Record {
    Record::first(MachineName::new("redis").unwrap(), host("a"), AttemptId(1), Nonce(1))
}

fn nonces(from: u128) -> Nonces {
    let mut next = from;
    Box::new(move || {
        next += 1;
        Nonce(next)
    })
}

fn source() -> SourceAuthority {
    SourceAuthority::new(SourceParts {
        holding: Holding::new(record()),
        to: host("b"),
        attempt: N,
        view: None,
        terms: Terms::default(),
        nonces: nonces(100),
    })
}

fn destination() -> DestinationAuthority {
    DestinationAuthority::new(DestinationParts {
        machine: MachineName::new("redis").unwrap(),
        here: host("b"),
        from: host("a"),
        attempt: N,
        beat: None,
        terms: Terms::default(),
        nonces: nonces(200),
    })
}

fn offer(serial: u64) -> Offer {
    Offer { attempt: N, serial: OfferSerial(serial), good_for: Duration::from_secs(2) }
}

fn won(operation: u64) -> Se {
    Se::LeaseAnswer { operation: OperationId(operation), answer: LeaseAnswer::Won }
}

/// Without what is only for people.
fn deeds(actions: Vec<Sa>) -> Vec<Sa> {
    actions.into_iter().filter(|a| !matches!(a, Sa::Report(_))).collect()
}

fn acts(actions: Vec<Da>) -> Vec<Da> {
    actions.into_iter().filter(|a| !matches!(a, Da::Report(_))).collect()
}

fn handed() -> Record {
    record().handing(N, host("b"), Nonce(101))
}

fn token(serial: u64) -> Token {
    Token { attempt: N, serial: OfferSerial(serial), handed: handed(), flush_owed: false }
}

fn flip(epoch: u64, flips: u16) -> FlipEpoch {
    FlipEpoch::of(Epoch(epoch), flips)
}

/// A source whose token is out at 1030 ms, naming an offer received at 1000 ms.
fn source_with_token_out() -> SourceAuthority {
    let mut s = source();
    s.on(at(1000), Se::Offer(offer(3)));
    let asked = s.on(at(1010), Se::WantSwitchover);
    let call = LeaseCall {
        operation: OperationId(1),
        purpose: LeasePurpose::HandOver,
        expected: record(),
        new: handed(),
    };
    assert_eq!(asked, [Sa::Lease(call)]);
    assert_eq!(s.on(at(1020), won(1)), [Sa::PauseMachine { flip: flip(1, 1) }]);
    let sent = s.on(at(1030), Se::Paused { flush_owed: false });
    assert_eq!(sent, [Sa::SendToken(token(3)), Sa::ServePages]);
    s
}

/// A destination that runs unconfirmed since 120 ms under the offer of 0 ms.
fn destination_unconfirmed() -> DestinationAuthority {
    let mut d = destination();
    assert_eq!(d.on(at(0), De::Prepared), [Da::SendOffer(offer(1))]);
    assert_eq!(d.on(at(100), De::Token(token(1))), [Da::LoadAndRun]);
    let call = LeaseCall {
        operation: OperationId(1),
        purpose: LeasePurpose::Take,
        expected: handed(),
        new: handed().taken(host("b"), N, Nonce(201)),
    };
    assert_eq!(d.on(at(120), De::Running), [Da::Lease(call)]);
    d
}

fn answer(operation: u64, answer: LeaseAnswer) -> De {
    De::LeaseAnswer { operation: OperationId(operation), answer }
}

#[test]
fn a_move_that_goes_well_needs_one_message_each_way() {
    let mut s = source_with_token_out();
    let mut d = destination_unconfirmed();
    let epoch = Epoch(2);
    let owner = d.on(at(130), answer(1, LeaseAnswer::Won));
    let resume = Da::Resume { epoch, flip: flip(2, 0) };
    assert_eq!(owner, [resume, Da::SendConfirmed { epoch }, Da::ReleaseOutput { epoch }]);
    assert_eq!(deeds(s.on(at(1090), Se::Confirmed { epoch })), []);
    assert_eq!(s.state(), SourceState::ServingPages(epoch));
    assert_eq!(d.on(at(900), De::AllPresent), [Da::SendDurable { epoch }]);
    assert_eq!(s.on(at(1900), Se::Durable { epoch }), [Sa::Release]);
    assert_eq!(s.wake_at(), None);
    let next = d.holding().unwrap();
    assert_eq!((next.record.owner, next.record.epoch), (host("b"), epoch));
}

#[test]
fn without_a_store_there_is_no_switchover_and_the_machine_keeps_running() {
    let mut s = source();
    s.on(at(0), Se::Offer(offer(1)));
    s.on(at(1), Se::WantSwitchover);
    let silent = LeaseAnswer::Unavailable("no route".into());
    let deed = s.on(at(2), Se::LeaseAnswer { operation: OperationId(1), answer: silent });
    assert_eq!(deeds(deed), []);
    // Asked again with the same record, so that a late success is recognised.
    assert_eq!(s.wake_at(), Some(at(22)));
    let again = s.on(at(22), Se::Tick);
    assert!(matches!(&again[..], [Sa::Lease(call)] if call.new == handed()), "{again:?}");
    assert_eq!(deeds(s.on(at(5001), Se::Tick)), []);
    assert_eq!(s.state(), SourceState::Copying);
    // The late answer pauses nothing.
    assert_eq!(s.on(at(5002), won(2)), []);
}

#[test]
fn without_a_fresh_offer_the_source_waits_and_then_gives_up() {
    let mut s = source();
    s.on(at(0), Se::Offer(offer(1)));
    assert_eq!(s.on(at(1001), Se::WantSwitchover), []);
    assert_eq!(s.state(), SourceState::AwaitingOffer);
    // A doubled old offer is not fresh.
    assert_eq!(s.on(at(1100), Se::Offer(offer(1))), []);
    let go = s.on(at(1200), Se::Offer(offer(2)));
    assert!(matches!(&go[..], [Sa::Lease(_)]), "{go:?}");

    let mut s = source();
    s.on(at(0), Se::WantSwitchover);
    s.on(at(5000), Se::Tick);
    assert_eq!(s.state(), SourceState::Copying);
}

#[test]
fn an_offer_that_ends_during_the_pause_resumes_the_machine_at_once() {
    let mut s = source();
    s.on(at(0), Se::Offer(offer(1)));
    s.on(at(1), Se::WantSwitchover);
    s.on(at(2), won(1));
    let back = deeds(s.on(at(1001), Se::Paused { flush_owed: false }));
    let resume = Sa::ResumeHere { epoch: Epoch(1), flip: flip(1, 2) };
    assert_eq!(back, [resume, Sa::SendCancel { attempt: N }]);
    assert_eq!(s.state(), SourceState::Aborted);
    // The next attempt goes on counting flips under the same epoch.
    assert_eq!(s.holding(), Holding { record: handed(), flips: 2 });
}

#[test]
fn hop_check_08_every_failure_before_the_token_leaves_the_machine_running_here() {
    let failures = [
        Se::PeerLost,
        Se::Cancel,
        Se::PauseFailed("no".into()),
        Se::Refused { attempt: N, why: "no".into() },
    ];
    for failure in failures {
        for steps in 0..3 {
            let mut s = source();
            s.on(at(0), Se::Offer(offer(1)));
            if steps > 0 {
                s.on(at(1), Se::WantSwitchover);
            }
            if steps > 1 {
                s.on(at(2), won(1));
            }
            let deed = deeds(s.on(at(3), failure.clone()));
            let resumed = deed.iter().any(|a| matches!(a, Sa::ResumeHere { .. }));
            assert_eq!(resumed, steps > 1, "{failure:?} after {steps} steps: {deed:?}");
            let ignored = steps < 2 && matches!(failure, Se::PauseFailed(_));
            assert_eq!(s.state() == SourceState::Aborted, !ignored, "{failure:?} after {steps}");
        }
    }
}

#[test]
fn hop_check_09_a_refusal_resumes_at_once_and_one_of_another_attempt_does_not() {
    let mut s = source_with_token_out();
    let other = Se::Refused { attempt: AttemptId(7), why: "old".into() };
    assert_eq!(s.on(at(1050), other), []);
    let back = deeds(s.on(at(1060), Se::Refused { attempt: N, why: "no memory".into() }));
    assert_eq!(back[0], Sa::ResumeHere { epoch: Epoch(1), flip: flip(1, 2) });
}

#[test]
fn after_the_token_silence_is_waited_out_and_then_the_store_decides() {
    let expiry = at(1000) + Duration::from_nanos(2_004_004_005);
    let mut s = source_with_token_out();
    assert_eq!(deeds(s.on(at(1100), Se::PeerLost)), []);
    assert_eq!(deeds(s.on(at(1200), Se::Cancel)), []);
    assert_eq!(s.wake_at(), Some(expiry));
    assert_eq!(s.on(expiry - Duration::from_nanos(1), Se::Tick), []);
    let claim = s.on(expiry, Se::Tick);
    let [Sa::Lease(call)] = &claim[..] else { panic!("{claim:?}") };
    assert_eq!((call.purpose, &call.expected), (LeasePurpose::TakeBack, &handed()));
    assert_eq!((call.new.epoch, &call.new.owner), (Epoch(2), &host("a")));
    let back = deeds(s.on(at(3100), won(2)));
    assert_eq!(back[0], Sa::ResumeHere { epoch: Epoch(2), flip: flip(2, 0) });
    assert_eq!(s.state(), SourceState::Resumed(Epoch(2)));

    // The acknowledgement was lost: the store knows.
    let mut s = source_with_token_out();
    s.on(expiry, Se::Tick);
    let taken = handed().taken(host("b"), N, Nonce(201));
    let lost = LeaseAnswer::Lost(Some(taken));
    let deed = s.on(at(3100), Se::LeaseAnswer { operation: OperationId(2), answer: lost });
    assert_eq!(deeds(deed), []);
    assert_eq!(s.state(), SourceState::ServingPages(Epoch(2)));
}

#[test]
fn a_source_whose_store_is_silent_stays_paused_and_asks_on() {
    let mut s = source_with_token_out();
    s.on(at(4000), Se::Tick);
    let mut now = at(4000);
    for operation in 2..200 {
        let answer = LeaseAnswer::Unavailable("down".into());
        let event = Se::LeaseAnswer { operation: OperationId(operation), answer };
        assert_eq!(deeds(s.on(now, event)), []);
        let next = s.wake_at().unwrap();
        assert!(next.since(now) <= Duration::from_secs(1));
        now = next;
        assert!(matches!(&s.on(now, Se::Tick)[..], [Sa::Lease(_)]));
    }
    assert_eq!(s.state(), SourceState::TakingBack);
}

#[test]
fn a_lease_that_names_somebody_else_stops_the_source() {
    let mut s = source();
    s.on(at(0), Se::Offer(offer(1)));
    s.on(at(1), Se::WantSwitchover);
    let stranger = record().taken(host("c"), AttemptId(5), Nonce(5));
    let answer = LeaseAnswer::from(Ok(Outcome::Lost(Some(stranger))));
    let deed = deeds(s.on(at(2), Se::LeaseAnswer { operation: OperationId(1), answer }));
    assert!(matches!(&deed[..], [Sa::StayPaused { .. }]), "{deed:?}");
}

#[test]
fn a_hand_over_of_an_earlier_attempt_is_built_upon() {
    let mut s = source();
    s.on(at(0), Se::Offer(offer(1)));
    s.on(at(1), Se::WantSwitchover);
    let older = record().handing(AttemptId(5), host("c"), Nonce(5));
    let answer = LeaseAnswer::Lost(Some(older.clone()));
    let deed = s.on(at(2), Se::LeaseAnswer { operation: OperationId(1), answer });
    assert!(matches!(&deed[..], [Sa::Lease(call)] if call.expected == older), "{deed:?}");
}

#[test]
fn an_offer_that_would_keep_the_source_waiting_for_long_is_ignored() {
    let mut s = source();
    let long = Offer { good_for: Duration::from_secs(3600), ..offer(1) };
    assert!(matches!(&s.on(at(0), Se::Offer(long))[..], [Sa::Report(_)]));
    s.on(at(1), Se::WantSwitchover);
    assert_eq!(s.state(), SourceState::AwaitingOffer);
}

#[test]
fn a_confirmation_at_another_epoch_is_no_confirmation() {
    let mut s = source_with_token_out();
    s.on(at(1100), Se::Confirmed { epoch: Epoch(9) });
    assert_eq!(s.state(), SourceState::AwaitingVerdict);
}

#[test]
fn a_runner_that_comes_back_waits_for_the_longest_offer_before_it_asks() {
    let here = host("a");
    let recover =
        |record| SourceAuthority::recover(at(500), &here, record, Terms::default(), nonces(300));
    let (s, deed) = recover(handed());
    assert_eq!(deed, [Sa::ServePages]);
    assert_eq!(
        s.wake_at(),
        Some(at(500) + Terms::default().expiry(Terms::default().longest_offer))
    );

    let (s, deed) = recover(handed().taken(host("b"), N, Nonce(9)));
    assert_eq!((s.state(), deed), (SourceState::ServingPages(Epoch(2)), vec![Sa::ServePages]));

    let (mut s, deed) = recover(record());
    assert!(matches!(&deed[..], [Sa::Lease(_)]), "{deed:?}");
    // Its earlier life had asked already, and won.
    let earlier = record().taken(host("a"), AttemptId(1), Nonce(77));
    let answer = LeaseAnswer::Lost(Some(earlier));
    let deed = s.on(at(600), Se::LeaseAnswer { operation: OperationId(1), answer });
    assert!(matches!(&deeds(deed)[..], [Sa::ResumeHere { epoch: Epoch(2), .. }, _]));
}

#[test]
fn a_runner_that_comes_back_goes_on_after_a_refusal_only_with_the_store() {
    let here = host("a");
    let (mut s, _) =
        SourceAuthority::recover(at(500), &here, handed(), Terms::default(), nonces(300));
    let refused = Se::Refused { attempt: N, why: "it was given up".to_owned() };
    let deed = deeds(s.on(at(600), refused));
    assert!(matches!(&deed[..], [Sa::Lease(_)]), "{deed:?}");
    assert_eq!(s.state(), SourceState::TakingBack);
    // Its earlier life had begun to take it back, and the store did so only now.
    let earlier = handed().taken(here, N, Nonce(77));
    let answer = LeaseAnswer::Lost(Some(earlier));
    let deed = s.on(at(700), Se::LeaseAnswer { operation: OperationId(1), answer });
    assert!(matches!(&deeds(deed)[..], [Sa::ResumeHere { epoch: Epoch(2), .. }, _]));
}

#[test]
fn a_destination_renews_its_offer_every_quarter_of_its_life() {
    let mut d = destination();
    d.on(at(0), De::Prepared);
    for serial in 2..20 {
        let due = d.wake_at().unwrap();
        assert_eq!(due, at((serial - 1) * 500));
        assert_eq!(d.on(due, De::Tick), [Da::SendOffer(offer(serial))]);
    }
}

#[test]
fn a_token_that_is_late_or_wrong_is_refused_and_nothing_runs() {
    let other_attempt = Token { attempt: AttemptId(7), ..token(1) };
    let not_to_us = record().handing(N, host("c"), Nonce(3));
    let not_handed = record();
    let mut of_another = handed();
    of_another.machine = MachineName::new("other").unwrap();
    let mut from_another = handed();
    from_another.owner = host("c");
    let with = |handed| Token { handed, ..token(1) };
    let cases = [
        (100, other_attempt),
        (100, with(not_to_us)),
        (100, with(not_handed)),
        (100, with(of_another)),
        (100, with(from_another)),
        (100, token(2)),
        // 2000 − 100 (to freeze) − 200 (to start)
        (1701, token(1)),
    ];
    for (ms, token) in cases {
        let mut d = destination();
        d.on(at(0), De::Prepared);
        let text = format!("{token:?}");
        let deed = acts(d.on(at(ms), De::Token(token)));
        let deed: Vec<_> = deed.into_iter().filter(|a| !matches!(a, Da::SendOffer(_))).collect();
        assert!(matches!(&deed[..], [Da::SendRefused { .. }, Da::Discard]), "{text}: {deed:?}");
        // For ever.
        let again = acts(d.on(at(ms + 1), De::Token(self::token(1))));
        assert!(matches!(&again[..], [Da::SendRefused { .. }]), "{again:?}");
    }
    let mut d = destination();
    d.on(at(0), De::Prepared);
    let deed = d.on(at(1700), De::Token(token(1)));
    assert!(deed.contains(&Da::LoadAndRun), "{deed:?}");
}

#[test]
fn an_unconfirmed_destination_is_frozen_at_the_end_of_its_offer_and_goes_on_if_it_won() {
    let mut d = destination_unconfirmed();
    assert_eq!(d.freeze_at(), Some(at(1900)));
    let silent = || LeaseAnswer::Unavailable("down".into());
    assert_eq!(acts(d.on(at(200), answer(1, silent()))), []);
    assert!(matches!(&d.on(at(220), De::Tick)[..], [Da::Lease(_)]));
    assert_eq!(acts(d.on(at(1900), De::Tick)), [Da::FreezeNow]);
    assert_eq!(d.state(), DestinationState::FrozenUnconfirmed);
    assert_eq!(acts(d.on(at(2500), answer(2, silent()))), []);
    assert!(matches!(&d.on(at(2540), De::Tick)[..], [Da::Lease(_)]));
    // The first write had happened; only its answer was lost.
    let ours = handed().taken(host("b"), N, Nonce(201));
    let epoch = Epoch(2);
    let deed = acts(d.on(at(2600), answer(3, LeaseAnswer::Lost(Some(ours)))));
    let resume = Da::Resume { epoch, flip: flip(2, 0) };
    assert_eq!(deed, [resume, Da::Thaw, Da::SendConfirmed { epoch }, Da::ReleaseOutput { epoch }]);
}

#[test]
fn an_event_after_the_end_of_the_offer_finds_the_machine_frozen_even_if_the_timer_was_late() {
    let mut d = destination();
    d.on(at(0), De::Prepared);
    d.on(at(100), De::Token(token(1)));
    let deed = acts(d.on(at(1950), De::Running));
    assert!(matches!(&deed[..], [Da::FreezeNow, Da::SendRefused { .. }, Da::Discard]), "{deed:?}");
}

#[test]
fn a_destination_that_lost_drops_its_copy() {
    let mut d = destination_unconfirmed();
    let back = handed().taken(host("a"), N, Nonce(102));
    let deed = acts(d.on(at(2000), answer(1, LeaseAnswer::Lost(Some(back)))));
    assert_eq!(deed, [Da::FreezeNow, Da::FreezeNow, Da::Discard]);
    assert_eq!(d.state(), DestinationState::Lost);
}

#[test]
fn whoever_has_begun_to_take_the_lease_cannot_refuse() {
    for event in [De::Cancel, De::PeerLost, De::LoadFailed("late".into()), De::Token(token(1))] {
        let mut d = destination_unconfirmed();
        assert_eq!(acts(d.on(at(200), event)), []);
        assert_eq!(d.state(), DestinationState::Unconfirmed);
    }
}

#[test]
fn a_lost_source_before_the_lease_is_asked_for_means_refusal_only_while_blocks_are_missing() {
    for all_present in [false, true] {
        let mut d = destination();
        d.on(at(0), De::Prepared);
        if all_present {
            d.on(at(50), De::AllPresent);
        }
        d.on(at(100), De::Token(token(1)));
        d.on(at(110), De::PeerLost);
        let goes_on = d.state() == DestinationState::Loading;
        assert_eq!(goes_on, all_present);
    }
}

#[test]
fn frames_wait_for_the_sources_flushes_or_for_all_blocks() {
    let epoch = Epoch(2);
    let release = Da::ReleaseOutput { epoch };
    for event in [De::SourceDurable, De::AllPresent] {
        let mut d = destination();
        d.on(at(0), De::Prepared);
        d.on(at(100), De::Token(Token { flush_owed: true, ..token(1) }));
        d.on(at(120), De::Running);
        let owner = d.on(at(130), answer(1, LeaseAnswer::Won));
        assert!(!owner.contains(&release), "{owner:?}");
        assert!(d.on(at(140), event).contains(&release));
        assert!(!d.on(at(150), De::SourceDurable).contains(&release), "released once");
    }
    // The news may be there before the store's answer.
    let mut d = destination();
    d.on(at(0), De::Prepared);
    d.on(at(100), De::Token(Token { flush_owed: true, ..token(1) }));
    d.on(at(110), De::SourceDurable);
    d.on(at(120), De::Running);
    assert!(d.on(at(130), answer(1, LeaseAnswer::Won)).contains(&release));
}

#[test]
fn what_got_lost_is_said_again_on_a_new_connection() {
    let mut d = destination_unconfirmed();
    let epoch = Epoch(2);
    d.on(at(130), answer(1, LeaseAnswer::Won));
    assert_eq!(d.on(at(200), De::PeerBack), [Da::SendConfirmed { epoch }]);
    d.on(at(300), De::AllPresent);
    let both = [Da::SendConfirmed { epoch }, Da::SendDurable { epoch }];
    assert_eq!(d.on(at(400), De::PeerBack), both, "the confirmation may be lost, too");
}
