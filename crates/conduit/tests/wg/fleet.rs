//! Agents and an edge whose packets to each other are encrypted.

use super::program;
use conduit::{
    PathChoice,
    lab::{
        fleet::{Fleet, TCP, UDP},
        traffic::{Datagrams, Echoes, Received, serve_echo},
        wait_for,
    },
};
use conduit_wg::Ask;
use std::{
    net::{TcpListener, UdpSocket},
    time::Duration,
};

const WAIT: Duration = Duration::from_secs(20);

fn fleet(path: PathChoice) -> (Fleet, Received) {
    let fleet = Fleet::encrypted(program(), path).unwrap();
    serve_echo(fleet.guest.run(|| TcpListener::bind("0.0.0.0:7").unwrap()));
    let socket = fleet.guest.run(|| UdpSocket::bind("0.0.0.0:9").unwrap());
    (fleet, Received::collect(socket))
}

fn keys(fleet: &Fleet, end: Option<usize>) -> Vec<conduit_wg::PublicKey> {
    conduit_wg::status(&fleet.tunnel_socket(end)).map(|s| s.keys).unwrap_or_default()
}

#[test]
fn a_machine_moves_and_hosts_change_their_keys_without_a_frame_lost() {
    move_and_change_keys(PathChoice::Bpf);
}

#[test]
fn streams_survive_both_where_frames_are_led_by_routes() {
    move_and_change_keys(PathChoice::Routes);
}

fn move_and_change_keys(path: PathChoice) {
    let (mut fleet, received) = fleet(path);
    // Whatever comes from a host by UDP and is not the tunnel's is dropped and counted.
    let rule = "add table inet clear; \
                add chain inet clear in { type filter hook input priority -300; }; \
                add rule inet clear in iifname under0 udp dport != 7451 counter drop";
    fleet.edge_space().run(|| conduit::exec::run("nft", &[rule], "")).unwrap();
    let (tcp, udp) = (fleet.public(TCP), fleet.public(UDP));
    let echoes = fleet.client.run(|| Echoes::start(tcp));
    let datagrams = fleet.client.run(|| Datagrams::start(udp));
    echoes.wait(50);
    fleet.move_machine(Duration::from_millis(50), None).unwrap();
    echoes.wait(50);
    let ends = [None, Some(0), Some(1)];
    let before = ends.map(|end| keys(&fleet, end));
    for end in ends {
        conduit_wg::tell(&fleet.tunnel_socket(end), &Ask::Rotate).unwrap();
    }
    let changed = || {
        ends.iter().zip(&before).all(|(end, before)| {
            let now = keys(&fleet, *end);
            now.len() == 1 && now != *before
        })
    };
    assert!(wait_for(WAIT, changed), "everybody has a new key alone");
    echoes.wait(50);
    fleet.move_machine(Duration::from_millis(50), None).unwrap();
    echoes.wait(50);
    let seen = echoes.finish();
    let (sent, lost) = datagrams.finish(&received);
    assert_eq!(seen.sent, seen.answered);
    // A move by routes is two changes, between which a datagram may find none.
    let bound = if path == PathChoice::Bpf { 0 } else { 10 };
    assert!(lost <= bound, "{lost} of {sent} datagrams are lost");
    let counted = fleet
        .edge_space()
        .run(|| conduit::exec::run("nft", &["list table inet clear"], ""))
        .unwrap();
    assert!(counted.contains("counter packets 0"), "{counted}");
    let status = conduit::status(&fleet.edge_socket()).unwrap();
    assert!(status.protection.contains("user space"), "{}", status.protection);
}

#[test]
fn a_tunnel_that_is_killed_is_started_again_by_its_agent_and_streams_go_on() {
    let (fleet, _) = fleet(PathChoice::Bpf);
    let tcp = fleet.public(TCP);
    let echoes = fleet.client.run(|| Echoes::start(tcp));
    echoes.wait(50);
    for end in [Some(0), None] {
        let socket = fleet.tunnel_socket(end);
        let process = conduit_wg::status(&socket).unwrap().process;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(process.cast_signed()),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
        let anew = || conduit_wg::status(&socket).is_ok_and(|s| s.process != process);
        assert!(wait_for(WAIT, anew), "there is another one");
        echoes.wait(50);
    }
    let seen = echoes.finish();
    assert_eq!(seen.sent, seen.answered);
}
