//! A fleet whose lines between hosts and edge are slow and do not keep the order. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use conduit::lab::{
    fleet::{Fleet, TCP, UDP},
    line::Shape,
    traffic::{Datagrams, Echoes, Received, serve_echo},
    wait_for,
};
use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    time::Duration,
};

const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// Where the client hears what the machine says of itself.
const HEARS: u16 = 9009;
const BLACKOUT: Duration = Duration::from_millis(50);
const WAIT: Duration = Duration::from_secs(30);

/// A machine with an echo, that hears datagrams and says some to the client, all the time.
struct Busy {
    fleet: Fleet,
    echoes: Echoes,
    inwards: Datagrams,
    heard_inside: Received,
    outwards: Datagrams,
    heard_outside: Received,
}

impl Busy {
    fn new() -> Self {
        let fleet = Fleet::on_lines(Path::new(env!("CARGO_BIN_EXE_conduit"))).unwrap();
        serve_echo(fleet.guest.run(|| TcpListener::bind("0.0.0.0:7").unwrap()));
        let inside = fleet.guest.run(|| UdpSocket::bind("0.0.0.0:9").unwrap());
        let outside = fleet.client.run(|| UdpSocket::bind((CLIENT, HEARS)).unwrap());
        let (tcp, udp) = (fleet.public(TCP), fleet.public(UDP));
        let echoes = fleet.client.run(|| Echoes::start(tcp));
        let inwards = fleet.client.run(|| Datagrams::start(udp));
        let to: SocketAddr = (CLIENT, HEARS).into();
        let outwards = fleet.guest.run(|| Datagrams::start(to));
        let (heard_inside, heard_outside) = (Received::collect(inside), Received::collect(outside));
        Self { fleet, echoes, inwards, heard_inside, outwards, heard_outside }
    }

    fn count(&self, name: &str) -> u64 {
        let status = conduit::status(&self.fleet.edge_socket()).unwrap();
        status.counts.get(name).copied().unwrap_or(0)
    }

    /// Nothing was lost in either direction, but `overtaken` of what the machine said at most; returns the
    /// longest time without an echo.
    fn finish(self, overtaken: u64) -> Duration {
        let seen = self.echoes.finish();
        assert_eq!(seen.sent, seen.answered, "of TCP");
        let (sent, lost) = self.inwards.finish(&self.heard_inside);
        assert_eq!(lost, 0, "of {sent} datagrams to the machine");
        let (sent, lost) = self.outwards.finish(&self.heard_outside);
        assert!(
            lost <= overtaken,
            "{lost} of {sent} datagrams of the machine, {overtaken} counted"
        );
        seen.gap
    }
}

#[test]
fn a_machine_moves_over_lines_of_20_ms_that_do_not_keep_the_order_and_what_is_lost_is_counted() {
    let mut busy = Busy::new();
    let way = Duration::from_millis(20);
    let late = Some((7, Duration::from_millis(5)));
    for host in 0..2 {
        busy.fleet.shape(host, Shape { words: way, frames: way, late });
    }
    busy.echoes.wait(20);
    for _ in 0..4 {
        busy.fleet.move_machine(BLACKOUT, None).unwrap();
        busy.echoes.wait(20);
    }
    assert!((0..2).all(|host| busy.fleet.overtaken(host) > 0), "nothing was out of order");
    // Last words that come after the word of the departure, which went by another connection: dropped and counted.
    let last_words = busy.count("not_owner");
    assert!(last_words < 4 * 20, "{last_words} in four moves");
    let longest = busy.finish(last_words);
    // What TCP sends again comes after 200 ms at least: an echo that was lost would take longer than that.
    eprintln!(
        "longest time without an echo: {longest:?}, a round trip is 40 ms, a blackout {BLACKOUT:?}"
    );
}

#[test]
fn what_a_machine_says_before_its_edge_has_heard_of_the_move_waits_there() {
    let mut busy = Busy::new();
    busy.echoes.wait(20);
    // Whoever leaves, and whoever comes, is heard a tenth of a second after the machine itself.
    for host in 0..2 {
        let words = Duration::from_millis(100);
        busy.fleet.shape(host, Shape { words, ..Shape::default() });
    }
    let before = busy.count("early");
    for _ in 0..4 {
        busy.fleet.move_machine(Duration::ZERO, None).unwrap();
        busy.echoes.wait(20);
    }
    assert!(busy.count("early") > before, "every move was heard of in time");
    assert_eq!((busy.count("not_owner"), busy.count("hold_early_lost")), (0, 0));
    let nothing_waits = wait_for(WAIT, || busy.count("hold_frames") == 0);
    assert!(nothing_waits, "frames wait");
    busy.finish(0);
}
