//! Servers that die, stand still, go away, lose answers or take their time, while eight threads work.

use crate::{LIMIT, api_server::Fault, key, rig::Rig, threads};
use lease::{LeaseStore, MachineName, StoreError};
use silo_testing::{Fault as S3Fault, Rule};
use std::time::{Duration, Instant};

/// Shorter than any outage here.
const SHORT: Duration = Duration::from_millis(200);

/// What a call may take beyond its limit on a busy computer.
const PATIENCE: Duration = Duration::from_secs(60);

fn times_out(rig: &Rig) {
    let store = rig.open(SHORT);
    let begun = Instant::now();
    let e = store.get(&key()).unwrap_err();
    assert!(matches!(e, StoreError::Unavailable { .. }), "{e}");
    assert!(begun.elapsed() < SHORT + PATIENCE, "{e}");
}

/// Killed twice, then stopped for longer than a call may take.
fn a_process_with_troubles(kind: &str) {
    let Some(mut rig) = Rig::start(kind) else { return };
    threads(kind, &mut rig, |rig, more| {
        for _ in 0..2 {
            more();
            rig.server().kill();
            times_out(rig);
            rig.server().start_again();
            assert!(rig.open(LIMIT).get(&key()).unwrap().is_some());
        }
        more();
        rig.server().stand_still(true);
        times_out(rig);
        rig.server().stand_still(false);
        assert!(rig.open(LIMIT).get(&key()).unwrap().is_some());
        more();
    });
}

#[test]
fn postgres_killed_and_stopped_in_the_middle_keeps_every_history_linearizable() {
    a_process_with_troubles("postgres");
}

#[test]
fn etcd_killed_and_stopped_in_the_middle_keeps_every_history_linearizable() {
    a_process_with_troubles("etcd");
}

#[test]
fn s3_that_loses_answers_and_goes_away_keeps_every_history_linearizable() {
    let mut rig = Rig::start("s3").unwrap();
    threads("s3", &mut rig, |rig, more| {
        let server = rig.s3();
        for fault in [
            S3Fault::LostAnswer(500),
            S3Fault::Status(503),
            S3Fault::NoAnswer,
            S3Fault::Hangs,
            S3Fault::Slow(2 * SHORT),
        ] {
            more();
            for skip in 0..3 {
                server.faults().add(Rule { skip, ..Rule::next("PUT", "lease/", fault.clone()) });
            }
            server.faults().add(Rule::next("GET", "lease/", S3Fault::Status(500)));
        }
        more();
        server.go_away();
        times_out(rig);
        rig.s3().come_back().unwrap();
        more();
    });
}

#[test]
fn an_api_server_with_conflicts_cuts_and_slow_answers_keeps_every_history_linearizable() {
    let mut rig = Rig::start("kubernetes").unwrap();
    rig.kubernetes().script(&[
        Fault::Fine,
        Fault::Relabelled,
        Fault::CutAfter,
        Fault::Fine,
        Fault::TooMany,
        Fault::Fine,
        Fault::Fine,
        Fault::CutBefore,
        Fault::Fine,
        Fault::Status(500),
        Fault::Relabelled,
        Fault::Slow(2 * SHORT),
        Fault::Status(409),
    ]);
    threads("kubernetes", &mut rig, |_, more| (0..4).for_each(|_| more()));
    assert!(rig.kubernetes().requests() > 100);
    // People see who has what.
    rig.kubernetes().script(&[Fault::Fine]);
    let store = rig.open(LIMIT);
    let name = MachineName::new("redis-9").unwrap();
    let owner = lease::HostName::new("a").unwrap();
    let record = lease::Record::first(name.clone(), owner, lease::AttemptId(1), lease::Nonce(1));
    store.compare_and_set(&name, None, &record).unwrap();
    let holders: Vec<_> = rig.kubernetes().leases();
    assert!(holders.iter().any(|object| object["spec"]["holderIdentity"] == "a"), "{holders:?}");
    // An outage ends at the limit.
    rig.kubernetes().script(&[Fault::Status(503)]);
    times_out(&rig);
    rig.kubernetes().script(&[Fault::Slow(SHORT * 20)]);
    times_out(&rig);
}
