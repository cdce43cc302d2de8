//! IPv6 of machines: inbound, outbound, by translation and as they are, over moves.

use crate::rig::{
    CLIENTS_V6, LIMIT, Rig, SILENCE, address_v6, heard, net, public_v6, routed, tcp, translated,
    udp, udp_of,
};
use conduit::{
    MachineNet,
    lab::traffic::{Datagrams, Echoes, Received, serve_echo},
};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

fn mapped() -> MachineNet {
    MachineNet { ports: vec![tcp(7000, 7), udp(7001, 9)], ..net("v6", 6472, 5) }
}

#[test]
fn tcp_and_udp_over_ipv6_keep_through_moves_to_and_fro() {
    let rig = Rig::new(&translated());
    let mut machine = rig.boot(mapped(), 0);
    machine.echo(7);
    let received = Received::collect(machine.udp(9));
    let echoes = rig.clients[0].run(|| Echoes::start(public_v6(7000)));
    let datagrams = rig.clients[0].run(|| Datagrams::start(public_v6(7001)));
    echoes.wait(50);
    for _ in 0..2 {
        rig.move_machine(&mut machine, Duration::from_millis(100));
        echoes.wait(50);
    }
    // The host that it went to and left again may go.
    rig.hosts[1].space.ip("link set eth0 down\n").unwrap();
    echoes.wait(50);
    let seen = echoes.finish();
    assert_eq!(seen.sent, seen.answered, "{seen:?}");
    let (sent, lost) = datagrams.finish(&received);
    assert_eq!(lost, 0, "of {sent}");
    rig.hosts[1].space.ip("link set eth0 up\n").unwrap();
}

#[test]
fn a_machines_own_connection_over_ipv6_keeps_and_shows_the_public_address() {
    let rig = Rig::new(&translated());
    let mut machine = rig.boot(mapped(), 0);
    let to = SocketAddr::from((CLIENTS_V6[0], 7));
    let listener = rig.clients[0].run(|| TcpListener::bind(to)).unwrap();
    let mut stream = machine.guest.run(|| TcpStream::connect_timeout(&to, LIMIT)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let (mut server, from) = listener.accept().unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(from.ip(), public_v6(0).ip());
    rig.move_machine(&mut machine, Duration::from_millis(20));
    let mut buffer = [0; 5];
    stream.write_all(b"there").unwrap();
    server.read_exact(&mut buffer).unwrap();
    server.write_all(b"back!").unwrap();
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"back!");
}

#[test]
fn the_machine_sees_the_clients_own_ipv6_address() {
    let rig = Rig::new(&translated());
    let machine = rig.boot(mapped(), 0);
    let inside = machine.udp(9);
    let client = udp_of(&rig.clients[1], CLIENTS_V6[1], 4000);
    client.send_to(b"hello", public_v6(7001)).unwrap();
    let (text, from) = heard(&inside, LIMIT).expect("it arrives");
    assert_eq!((text.as_str(), from), ("hello", (CLIENTS_V6[1], 4000).into()));
    inside.send_to(b"hi", from).unwrap();
    assert_eq!(heard(&client, LIMIT), Some(("hi".into(), public_v6(7001))));
}

#[test]
fn a_routed_machine_is_seen_as_it_is_with_its_mapped_ports_open_and_no_others() {
    let rig = Rig::new(&routed());
    let mut machine = rig.boot(mapped(), 0);
    machine.echo(7);
    let (open, closed) = (machine.udp(9), machine.udp(10));
    let client = udp_of(&rig.clients[0], CLIENTS_V6[0], 4000);
    let own = address_v6(5);
    client.send_to(b"closed", (own, 10)).unwrap();
    client.send_to(b"open", (own, 9)).unwrap();
    let (text, from) = heard(&open, LIMIT).expect("a mapped port is open");
    assert_eq!((text.as_str(), from), ("open", (CLIENTS_V6[0], 4000).into()));
    assert_eq!(heard(&closed, SILENCE), None, "a port that is not mapped");
    assert!(rig.count("nat_not_mapped") >= 1);
    // What it says by itself comes from its own address, and is answered.
    closed.send_to(b"own", (CLIENTS_V6[0], 4000)).unwrap();
    let (_, from) = heard(&client, LIMIT).expect("it may speak first");
    assert_eq!(from, (own, 10).into());
    client.send_to(b"answer", from).unwrap();
    assert!(heard(&closed, LIMIT).is_some());
    let echoes = rig.clients[0].run(|| Echoes::start((own, 7).into()));
    echoes.wait(20);
    rig.move_machine(&mut machine, Duration::from_millis(50));
    echoes.wait(20);
    let seen = echoes.finish();
    assert_eq!(seen.sent, seen.answered, "{seen:?}");
}

#[test]
fn machines_reach_each_other_over_ipv6_through_the_edge() {
    let rig = Rig::new(&translated());
    let (one, two) = (rig.boot(mapped(), 0), rig.boot(net("other", 6472, 6), 1));
    serve_echo(two.guest.run(|| TcpListener::bind("[::]:7")).unwrap());
    let to = SocketAddr::from((address_v6(6), 7));
    let stream = one.guest.run(|| TcpStream::connect_timeout(&to, LIMIT)).unwrap();
    assert_eq!(stream.peer_addr().unwrap(), to);
}
