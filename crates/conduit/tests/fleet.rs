//! Edge and agents as processes, killed and cut off under traffic. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use conduit::{
    AgentDataPath, NetworkId, PathChoice,
    lab::{
        fleet::{Fleet, TCP, UDP},
        traffic::{Datagrams, Echoes, Received, serve_echo},
        wait_for,
    },
};
use nix::sys::signal::Signal;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{Ipv4Addr, TcpListener, UdpSocket},
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

const WAIT: Duration = Duration::from_secs(30);

fn fleet() -> (Fleet, Received) {
    let fleet = Fleet::new(Path::new(env!("CARGO_BIN_EXE_conduit")), PathChoice::Bpf).unwrap();
    serve_echo(fleet.guest.run(|| TcpListener::bind("0.0.0.0:7").unwrap()));
    let socket = fleet.guest.run(|| UdpSocket::bind("0.0.0.0:9").unwrap());
    (fleet, Received::collect(socket))
}

fn traffic(fleet: &Fleet) -> (Echoes, Datagrams) {
    let (tcp, udp) = (fleet.public(TCP), fleet.public(UDP));
    let echoes = fleet.client.run(|| Echoes::start(tcp));
    let datagrams = fleet.client.run(|| Datagrams::start(udp));
    echoes.wait(50);
    (echoes, datagrams)
}

fn edge_counted(fleet: &Fleet, name: &str) -> u64 {
    let status = conduit::status(&fleet.edge_socket()).unwrap();
    status.counts.get(name).copied().unwrap_or(0)
}

#[test]
fn daemons_are_killed_and_started_again_without_a_frame_lost() {
    let (mut fleet, received) = fleet();
    let (echoes, datagrams) = traffic(&fleet);
    for _ in 0..3 {
        let at = fleet.at();
        fleet.kill_edge();
        fleet.start_edge().unwrap();
        fleet.kill_agent(at);
        fleet.start_agent(at).unwrap();
        echoes.wait(50);
    }
    let seen = echoes.finish();
    let (sent, lost) = datagrams.finish(&received);
    assert_eq!((seen.sent, lost), (seen.answered, 0), "of {sent} datagrams");
}

#[test]
fn daemons_are_killed_while_frames_are_held_without_a_frame_lost() {
    let (mut fleet, received) = fleet();
    let (echoes, datagrams) = traffic(&fleet);
    for _ in 0..2 {
        let to = 1 - fleet.at();
        let expected = Duration::from_millis(500);
        fleet.depart(Some(expected)).unwrap();
        fleet.kill_agent(to);
        fleet.kill_edge();
        thread::sleep(Duration::from_millis(100));
        fleet.start_edge().unwrap();
        fleet.start_agent(to).unwrap();
        thread::sleep(expected.saturating_sub(fleet.stands_for()));
        // At the new host what comes by the old one, until the edge knows that it is to hold.
        let there = || conduit::status(&fleet.agent_socket(to)).unwrap().counts["hold_frames"];
        let held = || there() + edge_counted(&fleet, "hold_frames") > 200;
        assert!(wait_for(WAIT, held), "hardly any frames are held");
        fleet.arrive().unwrap();
        fleet.forget().unwrap();
        echoes.wait(50);
    }
    let seen = echoes.finish();
    let (sent, lost) = datagrams.finish(&received);
    assert_eq!((seen.sent, lost), (seen.answered, 0), "of {sent} datagrams");
}

#[test]
fn holders_are_killed_while_they_hold_and_lose_no_more_than_they_count() {
    let (mut fleet, received) = fleet();
    let (echoes, datagrams) = traffic(&fleet);
    let (mut counted, mut had) = (0, 0);
    for _ in 0..2 {
        let ends = [Some(1 - fleet.at()), None];
        fleet.depart(Some(Duration::from_millis(400))).unwrap();
        let frames = |fleet: &Fleet| ends.map(|end| fleet.holder_stats(end).unwrap().frames);
        let enough = || frames(&fleet).iter().sum::<u64>() > 100;
        assert!(wait_for(WAIT, enough), "hardly any frames are held");
        for end in ends {
            let sent = datagrams.sent();
            had += fleet.holder_stats(end).unwrap().frames;
            fleet.kill_holder(end).unwrap();
            // What came between the look and the end, and TCP's as many again.
            had += 2 * (datagrams.sent() - sent);
        }
        thread::sleep(Duration::from_millis(400).saturating_sub(fleet.stands_for()));
        fleet.arrive().unwrap();
        fleet.forget().unwrap();
        let empty = |end| fleet.holder_stats(end).unwrap().machines == 0;
        assert!(wait_for(WAIT, || ends.iter().all(|&end| empty(end))), "frames stay held");
        counted += ends.map(|end| fleet.holder_stats(end).unwrap().lost).iter().sum::<u64>();
        echoes.wait(50);
    }
    let seen = echoes.finish();
    let (sent, lost) = datagrams.finish(&received);
    assert_eq!(seen.sent, seen.answered, "no connection broke");
    // Lost is what was in memory at that moment, TCP's segments among it.
    assert!(lost <= counted, "{lost} of {sent} lost, {counted} counted, {had} held");
    assert!(counted <= had + 100, "{counted} counted of {had}: a holder loses what it had");
}

#[test]
fn frames_for_a_silent_host_are_held_and_go_there_when_it_speaks_again() {
    let (fleet, received) = fleet();
    let (echoes, datagrams) = traffic(&fleet);
    let before = datagrams.sent();
    fleet.cut(0, true).unwrap();
    assert!(wait_for(WAIT, || edge_counted(&fleet, "hold_frames") > 0), "nothing is held");
    let noticed = datagrams.sent() - before;
    assert!(wait_for(WAIT, || edge_counted(&fleet, "hold_frames") > 500), "nothing is held");
    fleet.cut(0, false).unwrap();
    assert!(wait_for(WAIT, || edge_counted(&fleet, "hold_frames") == 0), "it stays held");
    let held = edge_counted(&fleet, "hold_given");
    echoes.wait(50);
    let seen = echoes.finish();
    let (sent, lost) = datagrams.finish(&received);
    assert_eq!(seen.sent, seen.answered);
    // What is lost was sent to it before its silence was noticed.
    assert!(held > 500 && lost <= noticed, "{held} held and {lost} of {noticed} lost of {sent}");
    assert_eq!(edge_counted(&fleet, "hold_lost"), 0);
}

#[test]
fn an_agent_that_hangs_is_not_taken_for_a_silent_host() {
    let (fleet, received) = fleet();
    let (echoes, datagrams) = traffic(&fleet);
    fleet.signal_agent(0, Signal::SIGSTOP).unwrap();
    // Three times as long as a host may be silent.
    thread::sleep(Duration::from_secs(2));
    echoes.wait(50);
    fleet.signal_agent(0, Signal::SIGCONT).unwrap();
    let seen = echoes.finish();
    let (_, lost) = datagrams.finish(&received);
    assert_eq!((seen.sent, lost, edge_counted(&fleet, "held")), (seen.answered, 0, 0));
    assert!(seen.gap < Duration::from_secs(1), "{seen:?}");
}

/// Processes whose command line has this in it.
fn processes(of: &str) -> usize {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|p| fs::read(p.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).contains(of))
        .count()
}

#[test]
fn a_fleet_that_is_asked_to_end_leaves_no_process() {
    let (fleet, _received) = fleet();
    let folder = fleet.folder().display().to_string();
    assert_eq!(processes(&folder), 6, "an edge, two agents, and a holder for each");
    drop(fleet);
    assert_eq!(processes(&folder), 0);
}

#[test]
fn the_old_host_is_cut_off_after_the_flip_and_has_the_machine_again() {
    let (mut fleet, received) = fleet();
    for _ in 0..3 {
        let (echoes, datagrams) = traffic(&fleet);
        let old = fleet.at();
        let moved = fleet.depart(None).unwrap();
        fleet.left().unwrap();
        fleet.cut(old, true).unwrap();
        thread::sleep(Duration::from_millis(150).saturating_sub(fleet.stands_for()));
        fleet.arrive().unwrap();
        echoes.wait(50);
        let seen = echoes.finish();
        let (sent, lost) = datagrams.finish(&received);
        assert_eq!(seen.sent, seen.answered);
        assert!(lost <= moved.drained, "{lost} of {sent} lost");
        fleet.cut(old, false).unwrap();
        fleet.forget().unwrap();
    }
}

#[test]
fn an_edge_that_is_killed_while_it_gives_addresses_gives_none_twice() {
    const TENANT: NetworkId = NetworkId(7);
    let (mut fleet, _) = fleet();
    let given = Mutex::new(BTreeMap::<String, Ipv4Addr>::new());
    let (ended, sockets) = (AtomicBool::new(false), [0, 1].map(|host| fleet.agent_socket(host)));
    thread::scope(|scope| {
        for (host, socket) in sockets.iter().enumerate() {
            let (given, ended) = (&given, &ended);
            scope.spawn(move || {
                let path = AgentDataPath::connect(socket).unwrap();
                let mut number = 0;
                while !ended.load(Ordering::Relaxed) {
                    let name = format!("m{host}-{number}");
                    // Without an answer it is asked for again, as a runner that starts again does.
                    let Ok((address, _)) = path.address(&name, TENANT) else { continue };
                    given.lock().unwrap().insert(name, address);
                    number += 1;
                }
            });
        }
        for _ in 0..5 {
            let before = given.lock().unwrap().len();
            assert!(wait_for(WAIT, || given.lock().unwrap().len() > before + 20));
            fleet.kill_edge();
            fleet.start_edge().unwrap();
        }
        ended.store(true, Ordering::Relaxed);
    });
    let given = given.into_inner().unwrap();
    let different: BTreeSet<_> = given.values().collect();
    assert_eq!(different.len(), given.len());
    let path = AgentDataPath::connect(&sockets[0]).unwrap();
    for (name, address) in &given {
        assert_eq!(path.address(name, TENANT).unwrap().0, *address, "{name}");
    }
}
