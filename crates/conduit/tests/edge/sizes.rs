//! ICMP errors about translated flows, in a tenant's network with a twin of the same address.

use crate::rig::{
    CLIENTS, CLIENTS_V6, LIMIT, Machine, Rig, address, net, public, public_v6, tcp, translated,
    udp, udp_of,
};
use conduit::{MachineNet, exec, lab::wait_for};
use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
};

const BYTES: usize = 2_000_000;

fn boot(rig: &Rig) -> [Machine; 2] {
    let ports = vec![tcp(7000, 7), udp(7001, 9)];
    let seven = rig.boot(MachineNet { ports, ..net("seven", 7, 5) }, 0);
    [seven, rig.boot(net("twin", 9, 5), 0)]
}

fn send_all(mut stream: TcpStream) {
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream.write_all(&vec![7; BYTES]).unwrap();
}

fn take_all(mut stream: TcpStream) -> usize {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all.len()
}

#[test]
fn a_narrow_path_outside_is_told_to_the_machine_through_the_translation() {
    let rig = Rig::new(&translated());
    // Narrower than the machine's 1400, on both sides of the link; only the router can say so.
    for (space, interface) in [(&rig.router, "c0"), (&rig.clients[0], "eth0")] {
        space.ip(&format!("link set {interface} mtu 1300\n")).unwrap();
    }
    let [machine, _twin] = boot(&rig);
    let listener = machine.guest.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 7))).unwrap();
    for (client, to) in
        [(IpAddr::from(CLIENTS[0]), public(7000)), (IpAddr::from(CLIENTS_V6[0]), public_v6(7000))]
    {
        // The machine connects, and sends.
        let outside = rig.clients[0].run(|| TcpListener::bind((client, 5000))).unwrap();
        let address = SocketAddr::from((client, 5000));
        let stream = machine.guest.run(|| TcpStream::connect_timeout(&address, LIMIT)).unwrap();
        let sender = thread::spawn(move || send_all(stream));
        assert_eq!(take_all(outside.accept().unwrap().0), BYTES, "out to {client}");
        sender.join().unwrap();
        // A client connects, and the machine sends. What it has learned meanwhile is forgotten.
        machine.guest.space().ip("route flush cache\n-6 route flush cache\n").ok();
        let stream = rig.clients[0].run(|| TcpStream::connect_timeout(&to, LIMIT)).unwrap();
        let (inside, _) = listener.accept().unwrap();
        let sender = thread::spawn(move || send_all(inside));
        assert_eq!(take_all(stream), BYTES, "in from {client}");
        sender.join().unwrap();
    }
}

/// Whether a connected socket is told that nobody listens where it sends to.
fn is_refused(socket: &UdpSocket) -> bool {
    wait_for(LIMIT, || {
        let said = socket.send(b"x").err();
        socket.set_nonblocking(true).unwrap();
        let heard = socket.recv(&mut [0; 10]).err();
        [said, heard].into_iter().flatten().any(|e| e.kind() == ErrorKind::ConnectionRefused)
    })
}

#[test]
fn a_closed_port_is_told_through_the_translation_both_ways() {
    let rig = Rig::new(&translated());
    let [machine, _twin] = boot(&rig);
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    client.connect(public(7001)).unwrap();
    assert!(is_refused(&client), "the machine's answer to a client");
    let client = udp_of(&rig.clients[0], CLIENTS_V6[0], 4000);
    client.connect(public_v6(7001)).unwrap();
    assert!(is_refused(&client), "the same over IPv6");
    for to in [IpAddr::from(CLIENTS[0]), IpAddr::from(CLIENTS_V6[0])] {
        let socket = machine.udp(0);
        let to = match to {
            IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
            v6 => v6,
        };
        socket.connect((to, 4444)).unwrap();
        assert!(is_refused(&socket), "the client's answer to the machine, {to}");
    }
}

#[test]
fn a_client_is_told_the_size_that_fits_the_tunnel_to_a_tenants_machine() {
    let rig = Rig::new(&translated());
    let [_machine, _twin] = boot(&rig);
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    let told = || {
        client.send_to(&[0; 1472], public(7001)).unwrap();
        let route = exec_in(&rig, &["route", "get", "203.0.113.1"]);
        route.contains("mtu 1450")
    };
    assert!(wait_for(LIMIT, told), "{}", exec_in(&rig, &["route", "get", "203.0.113.1"]));
    assert_ne!(address(5), CLIENTS[0]);
}

fn exec_in(rig: &Rig, args: &[&str]) -> String {
    rig.clients[0].run(|| exec::run("ip", args, "")).unwrap()
}
