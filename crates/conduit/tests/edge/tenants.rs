//! Machines of different tenants: the same addresses, and nothing of each other.

use crate::rig::{
    CLIENTS, LIMIT, PUBLIC, Rig, SILENCE, address, address_v6, heard, net, public, tcp, translated,
    udp, udp_of,
};
use conduit::{
    MachineNet,
    edge::EdgeOptions,
    lab::traffic::{Datagrams, Echoes, Received},
};
use std::{net::UdpSocket, time::Duration};

/// The same machine in two networks, each with ports of its own.
fn twins() -> [MachineNet; 2] {
    [
        MachineNet { ports: vec![tcp(7000, 7), udp(7001, 9)], ..net("seven", 7, 5) },
        MachineNet { ports: vec![tcp(8000, 7), udp(8001, 9)], ..net("nine", 9, 5) },
    ]
}

fn answers(client: &UdpSocket, inside: &UdpSocket, port: u16) {
    client.send_to(b"question", public(port)).unwrap();
    let (_, from) = heard(inside, LIMIT).expect("the machine is reached");
    assert_eq!(from, client.local_addr().unwrap(), "it sees the client's own address");
    inside.send_to(b"answer", from).unwrap();
    assert_eq!(heard(client, LIMIT), Some(("answer".into(), public(port))));
}

#[test]
fn two_tenants_have_the_same_addresses_on_one_host_and_each_is_reached_by_its_own_ports() {
    let rig = Rig::new(&translated());
    let machines = twins().map(|net| rig.boot(net, 0));
    let inside = [0, 1].map(|at| machines[at].udp(9));
    // The very same client and port, to both.
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    for _ in 0..2 {
        answers(&client, &inside[0], 7001);
        answers(&client, &inside[1], 8001);
    }
    // Both speak first, from the same port to the same place.
    let own = [0, 1].map(|at| machines[at].udp(5000));
    let mut seen = Vec::new();
    for (at, socket) in own.iter().enumerate() {
        socket.send_to(format!("{at}").as_bytes(), (CLIENTS[0], 4000)).unwrap();
        let (text, from) = heard(&client, LIMIT).expect("it gets out");
        assert_eq!((text, from.ip()), (format!("{at}"), PUBLIC.into()));
        seen.push(from);
    }
    assert_ne!(seen[0], seen[1]);
    for (at, from) in seen.iter().enumerate() {
        client.send_to(format!("back {at}").as_bytes(), from).unwrap();
        assert_eq!(heard(&own[at], LIMIT).map(|h| h.0), Some(format!("back {at}")));
    }
}

#[test]
fn a_machine_that_speaks_first_from_a_mapped_port_shows_the_public_one_and_is_answered() {
    let rig = Rig::new(&translated());
    let machines = twins().map(|net| rig.boot(net, 0));
    let client = udp_of(&rig.clients[1], CLIENTS[1], 4000);
    for (machine, port) in machines.iter().zip([7001, 8001]) {
        let socket = machine.udp(9);
        socket.send_to(b"first", (CLIENTS[1], 4000)).unwrap();
        assert_eq!(heard(&client, LIMIT), Some(("first".into(), public(port))));
        client.send_to(b"answer", public(port)).unwrap();
        assert_eq!(heard(&socket, LIMIT).map(|h| h.0), Some("answer".into()));
    }
}

#[test]
fn flows_of_two_tenants_with_the_same_addresses_keep_through_their_moves() {
    let rig = Rig::new(&translated());
    let mut machines = twins().map(|net| rig.boot(net, 0));
    let flows: Vec<_> = machines
        .iter()
        .zip([7000, 8000])
        .map(|(machine, port)| {
            machine.echo(7);
            let received = Received::collect(machine.udp(9));
            let echoes = rig.clients[0].run(|| Echoes::start(public(port)));
            (echoes, rig.clients[0].run(|| Datagrams::start(public(port + 1))), received)
        })
        .collect();
    for machine in &mut machines {
        rig.move_machine(machine, Duration::from_millis(50));
    }
    rig.move_machine(&mut machines[0], Duration::from_millis(50));
    for (echoes, datagrams, received) in flows {
        echoes.wait(50);
        let seen = echoes.finish();
        assert_eq!(seen.sent, seen.answered, "{seen:?}");
        let (sent, lost) = datagrams.finish(&received);
        assert_eq!(lost, 0, "of {sent}");
    }
}

#[test]
fn tenants_do_not_reach_each_other_by_their_addresses() {
    let rig = Rig::new(&translated());
    let [seven, _] = twins();
    let (one, other) = (rig.boot(seven, 0), rig.boot(net("other", 9, 6), 0));
    let (socket, listener) = (one.udp(0), other.udp(9));
    socket.send_to(b"hello", (address(6), 9)).unwrap();
    socket.send_to(b"hello", (address_v6(6), 9)).unwrap();
    assert_eq!(heard(&listener, SILENCE), None);
    // Of the same tenant, it does.
    let same = rig.boot(net("same", 7, 6), 1);
    let listener = same.udp(9);
    socket.send_to(b"hello", (address(6), 9)).unwrap();
    assert_eq!(heard(&listener, LIMIT).map(|h| h.1.ip()), Some(address(5).into()));
}

#[test]
fn public_ports_are_reached_from_machines_of_the_same_tenant_and_of_another() {
    let rig = Rig::new(&translated());
    let [seven, nine] = twins();
    let (one, two) = (rig.boot(seven, 0), rig.boot(nine, 1));
    let same = rig.boot(net("same", 7, 6), 0);
    // One whose address no machine of the other tenant has.
    let stranger = rig.boot(net("stranger", 9, 7), 1);
    let inside = one.udp(9);
    for machine in [&two, &same, &stranger, &one] {
        let socket = machine.udp(6000);
        socket.send_to(b"question", public(7001)).unwrap();
        let (_, from) = heard(&inside, LIMIT).expect("the machine is reached");
        assert_eq!(from.ip(), PUBLIC, "as if from outside");
        inside.send_to(b"answer", from).unwrap();
        assert_eq!(heard(&socket, LIMIT), Some(("answer".into(), public(7001))));
    }
}

#[test]
fn a_tenant_cannot_speak_in_the_flows_of_another_that_has_the_same_address() {
    let rig = Rig::new(&translated());
    let [seven, nine] = twins();
    let (one, two) = (rig.boot(seven, 0), rig.boot(nine, 1));
    let intruder = rig.boot(net("intruder", 11, 5), 0);
    let (inside, forger) = (one.udp(9), intruder.udp(9));
    // A client's flow: what the intruder says comes from elsewhere.
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    answers(&client, &inside, 7001);
    forger.send_to(b"forged", (CLIENTS[0], 4000)).unwrap();
    let (_, from) = heard(&client, LIMIT).expect("its own flow is its right");
    assert_ne!(from, public(7001));
    // A machine's flow through the public address.
    let asking = two.udp(6000);
    asking.send_to(b"question", public(7001)).unwrap();
    let (_, from) = heard(&inside, LIMIT).expect("the machine is reached");
    forger.send_to(b"forged", from).unwrap();
    assert_eq!(heard(&asking, SILENCE), None);
    assert!(rig.count("nat_foreign_connection") >= 1);
    inside.send_to(b"answer", from).unwrap();
    assert_eq!(heard(&asking, LIMIT), Some(("answer".into(), public(7001))));
}

#[test]
fn a_tenants_connections_are_bounded_and_anothers_are_not_touched() {
    let rig = Rig::new(&EdgeOptions { flows_per_network: 40, ..translated() });
    let machines = twins().map(|net| rig.boot(net, 0));
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    for port in 20_000..20_100 {
        machines[0].udp(port).send_to(b"x", (CLIENTS[0], 4000)).unwrap();
    }
    let arrived = std::iter::from_fn(|| heard(&client, SILENCE)).count();
    assert_eq!(arrived, 40);
    assert_eq!(rig.count("nat_over_connections"), 60);
    machines[1].udp(20_000).send_to(b"x", (CLIENTS[0], 4000)).unwrap();
    assert!(heard(&client, LIMIT).is_some());
}
