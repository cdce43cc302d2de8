//! Processes that end, are killed, hand over, and change their keys, under traffic.

use super::{Traffic, pair, transfer};
use conduit::{
    exec,
    lab::{
        traffic::{flood, swallow},
        tunnel::{Pair, inner},
        wait_for,
    },
};
use conduit_wg::Ask;
use std::{
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

#[test]
fn an_upgrade_loses_no_datagram_and_no_echo() {
    let mut pair = pair();
    let traffic = Traffic::start(&pair);
    for _ in 0..3 {
        pair.a.upgrade().unwrap();
        pair.b.upgrade().unwrap();
    }
    let (there, back, gap) = traffic.finish();
    assert_eq!((there, back), (0, 0), "none lost");
    assert!(gap < Duration::from_secs(1), "a silence of {gap:?}");
}

#[test]
fn an_upgrade_under_a_full_stream_breaks_nothing() {
    let mut pair = pair();
    let Pair { a, b, .. } = &mut pair;
    let flooding = Arc::new(AtomicBool::new(false));
    let served = b.space.run(|| TcpListener::bind((inner(2).0, 7)).unwrap());
    let swallowing = thread::spawn(move || swallow(&served));
    let sent = a.space.run(|| flood((inner(2).0, 7).into(), flooding.clone()));
    a.upgrade().unwrap();
    b.upgrade().unwrap();
    flooding.store(true, Ordering::Relaxed);
    let (sent, (got, gap)) = (sent.join().unwrap(), swallowing.join().unwrap());
    assert_eq!(sent, got);
    assert!(gap < Duration::from_secs(2), "a silence of {gap:?}");
    let passed = pair.a.count("passed_back").unwrap() + pair.b.count("passed_back").unwrap();
    assert!(passed > 0, "the processes before were given what was theirs");
}

#[test]
fn an_upgrade_that_fails_leaves_the_tunnel_as_it_was() {
    let mut pair = pair();
    let before = pair.a.process();
    let traffic = Traffic::start(&pair);
    // No handshake succeeds (148 bytes and UDP's 8), so no process takes the tunnel soon.
    let deaf = "add table inet deaf; add chain inet deaf in { type filter hook input priority 0; }; \
                add rule inet deaf in udp length 156 drop";
    pair.b.space.run(|| exec::run("nft", &[deaf], "")).unwrap();
    for time in [0, 20, 100, 300] {
        pair.a.fail_to_upgrade(Duration::from_millis(time)).unwrap();
    }
    pair.b.space.run(|| exec::run("nft", &["delete table inet deaf"], "")).unwrap();
    let answers = || pair.a.status().is_ok_and(|s| Some(s.process) == before);
    assert!(wait_for(Duration::from_secs(30), answers), "the old process answers again");
    let (there, _, gap) = traffic.finish();
    assert_eq!(there, 0, "what is sent from there is not touched");
    assert!(gap < Duration::from_secs(5), "a silence of {gap:?}");
}

#[test]
fn after_kill_9_streams_go_on_with_the_next_process() {
    let mut pair = pair();
    let traffic = Traffic::start(&pair);
    for _ in 0..3 {
        pair.a.kill().unwrap();
        pair.a.start(&[]).unwrap();
        traffic.echoes.wait(50);
        pair.b.kill().unwrap();
        pair.b.start(&[]).unwrap();
        traffic.echoes.wait(50);
    }
    let (_, _, gap) = traffic.finish();
    assert!(gap < Duration::from_secs(10), "a silence of {gap:?}");
}

#[test]
fn a_change_of_keys_loses_no_packet_and_ends_with_the_new_key_alone() {
    let pair = pair();
    let old = pair.keys_in_use().unwrap();
    let traffic = Traffic::start(&pair);
    // Both at once, which is the hardest: each learns of the other's new key as it comes.
    pair.a.tell(&Ask::Rotate).unwrap();
    pair.b.tell(&Ask::Rotate).unwrap();
    assert!(pair.a.tell(&Ask::Rotate).is_err(), "one at a time");
    let here = |n| Some(conduit::lab::tunnel::Outer::V4.of(n));
    pair.introduce(here(1), here(2)).unwrap();
    let alone = || {
        let keys = |end: &conduit::lab::tunnel::TunnelEnd| end.status().map(|s| s.keys.len());
        keys(&pair.a).is_ok_and(|n| n == 1) && keys(&pair.b).is_ok_and(|n| n == 1)
    };
    assert!(wait_for(Duration::from_secs(20), alone), "the old keys go");
    pair.introduce(here(1), here(2)).unwrap();
    let (there, back, gap) = traffic.finish();
    assert_eq!((there, back), (0, 0), "none lost");
    assert!(gap < Duration::from_secs(1), "a silence of {gap:?}");
    let new = pair.keys_in_use().unwrap();
    assert!(new.0.is_some() && new.1.is_some());
    assert!(new.0 != old.0 && new.1 != old.1, "{old:?} became {new:?}");
    transfer(&pair.a.space, &pair.b.space, inner(2).0.into(), 1_000_000);
}

#[test]
fn keys_stay_as_they_are_for_a_peer_that_does_not_know_the_new_one() {
    let pair = pair();
    let traffic = Traffic::start(&pair);
    pair.a.tell(&Ask::Rotate).unwrap();
    let refused = || pair.b.count("dropped_unknown_key").is_ok_and(|n| n > 0);
    assert!(wait_for(Duration::from_secs(10), refused), "b does not know it");
    let (there, back, _) = traffic.finish();
    assert_eq!((there, back), (0, 0), "none lost");
    assert_eq!(pair.a.status().unwrap().keys.len(), 2);
}

#[test]
fn an_interface_outlives_its_process_unless_it_is_removed() {
    let mut pair = pair();
    let there = |pair: &Pair| {
        pair.a.space.run(|| {
            std::path::Path::new("/proc/thread-self/net/dev").exists()
                && std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains("cd-wg")
        })
    };
    pair.a.tell(&Ask::Stop { remove: false }).unwrap();
    assert!(pair.a.wait().unwrap().success());
    assert!(there(&pair));
    pair.a.start(&[]).unwrap();
    transfer(&pair.a.space, &pair.b.space, inner(2).0.into(), 100_000);
    pair.a.tell(&Ask::Stop { remove: true }).unwrap();
    assert!(pair.a.wait().unwrap().success());
    assert!(!there(&pair));
}

#[test]
fn two_tunnels_do_not_share_a_control_socket() {
    let pair = pair();
    assert!(!pair.a.second().unwrap().success(), "a second one is refused");
    assert!(pair.a.status().is_ok_and(|s| Some(s.process) == pair.a.process()));
    transfer(&pair.a.space, &pair.b.space, inner(2).0.into(), 100_000);
}
