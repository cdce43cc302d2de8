//! Edge and agents as processes, killed and cut off under traffic. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use conduit::{
    PathChoice,
    lab::{
        fleet::{Fleet, TCP, UDP},
        traffic::{Datagrams, Echoes, Received, serve_echo},
        wait_for,
    },
};
use nix::sys::signal::Signal;
use std::{
    fs,
    net::{TcpListener, UdpSocket},
    path::Path,
    thread,
    time::Duration,
};

const WAIT: Duration = Duration::from_secs(10);

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
        let there = conduit::status(&fleet.agent_socket(to)).unwrap().counts["hold_frames"];
        let held = there + edge_counted(&fleet, "hold_frames");
        assert!(held > 200, "{held} frames are held");
        fleet.arrive().unwrap();
        fleet.forget().unwrap();
        echoes.wait(50);
    }
    let seen = echoes.finish();
    let (sent, lost) = datagrams.finish(&received);
    assert_eq!((seen.sent, lost), (seen.answered, 0), "of {sent} datagrams");
}

#[test]
fn frames_for_a_silent_host_are_held_and_go_there_when_it_speaks_again() {
    let (fleet, received) = fleet();
    let (echoes, datagrams) = traffic(&fleet);
    fleet.cut(0, true).unwrap();
    assert!(wait_for(WAIT, || edge_counted(&fleet, "hold_frames") > 500), "nothing is held");
    fleet.cut(0, false).unwrap();
    assert!(wait_for(WAIT, || edge_counted(&fleet, "hold_frames") == 0), "it stays held");
    let held = edge_counted(&fleet, "hold_given");
    echoes.wait(50);
    let seen = echoes.finish();
    let (sent, lost) = datagrams.finish(&received);
    assert_eq!(seen.sent, seen.answered);
    // What is lost was sent to it before its silence was noticed.
    assert!(held > 500 && lost < 1000, "{held} held and {lost} lost of {sent}");
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
    assert!(seen.gap < Duration::from_millis(500), "{seen:?}");
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
