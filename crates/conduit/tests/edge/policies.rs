//! What the edge lets through: whole addresses, allow lists, limits, hairpin, echoes.

use crate::rig::{
    CLIENTS, CLIENTS_V6, LIMIT, PUBLIC, PUBLIC_V6, Rig, SILENCE, SPARE, heard, net, public,
    public_v6, translated, udp, udp_of,
};
use conduit::{
    MachineNet, Protocol,
    lab::Space,
    policy::{Allow, Limits, Policy, PublicPort},
    wire::{self, Answer, Ask},
};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::{
    io::BufReader,
    net::{IpAddr, UdpSocket},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

fn machine(policy: Policy) -> MachineNet {
    MachineNet { ports: vec![udp(7001, 9), udp(7002, 10)], policy, ..net("guarded", 7, 5) }
}

fn only(port: u16, from: &[&str]) -> Policy {
    let to = Some(PublicPort { protocol: Protocol::Udp, port });
    let from = from.iter().map(|text| text.parse().unwrap()).collect();
    Policy { allow: vec![Allow { to, from }], ..Policy::default() }
}

fn is_heard(client: &UdpSocket, inside: &UdpSocket, port: u16) -> bool {
    let to = if client.local_addr().unwrap().is_ipv4() { public(port) } else { public_v6(port) };
    client.send_to(b"x", to).unwrap();
    heard(inside, SILENCE).is_some()
}

#[test]
fn a_port_with_an_allow_list_is_open_to_those_only_and_others_are_counted() {
    let rig = Rig::new(&translated());
    let list = ["198.51.100.0/24", "198.51.100.2", "fd0a::/64"];
    let machine = rig.boot(machine(only(7001, &list)), 0);
    let inside = [machine.udp(9), machine.udp(10)];
    let v4 = [0, 1].map(|at| udp_of(&rig.clients[at], CLIENTS[at], 4000));
    let v6 = [0, 1].map(|at| udp_of(&rig.clients[at], CLIENTS_V6[at], 4000));
    for clients in [&v4, &v6] {
        assert!(is_heard(&clients[0], &inside[0], 7001), "allowed");
        assert!(!is_heard(&clients[1], &inside[0], 7001), "not allowed");
        assert!(is_heard(&clients[1], &inside[1], 7002), "a port that no rule speaks of");
    }
    assert_eq!(rig.count("nat_refused_source"), 2);
}

/// Tells a machine's agent of other settings, as a runner does that prepares anew.
fn tell(rig: &Rig, net: &MachineNet) {
    let mut stream = UnixStream::connect(rig.folder.path().join("a.sock")).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    wire::send(&mut stream, &Ask::Prepare { net: net.clone(), blackout_ms: None }).unwrap();
    let answer = wire::receive::<Answer>(&mut BufReader::new(stream)).unwrap();
    assert!(matches!(answer, Some(Answer::Tap(_))), "{answer:?}");
}

#[test]
fn a_changed_allow_list_holds_at_once_also_for_a_flow_under_way() {
    let rig = Rig::new(&translated());
    let machine_of = machine;
    let machine = rig.boot(machine_of(Policy::default()), 0);
    let inside = machine.udp(9);
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    assert!(is_heard(&client, &inside, 7001));
    tell(&rig, &machine_of(only(7001, &["192.0.2.0/24"])));
    rig.settle(&machine);
    assert!(!is_heard(&client, &inside, 7001), "its flow is cut");
    tell(&rig, &machine_of(Policy::default()));
    rig.settle(&machine);
    assert!(is_heard(&client, &inside, 7001));
}

#[test]
fn a_whole_address_leads_to_its_machine_and_the_machine_shows_it() {
    let rig = Rig::new(&translated());
    let policy = Policy { public: vec![SPARE.into()], ..Policy::default() };
    let mut machine = rig.boot(MachineNet { policy, ..net("whole", 7, 5) }, 0);
    // Another tenant's, with the same address, is not in its way.
    let twin = rig.boot(net("twin", 9, 5), 0);
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    let inside = machine.udp(1234);
    for _ in 0..2 {
        client.send_to(b"question", (SPARE, 1234)).unwrap();
        let (_, from) = heard(&inside, LIMIT).expect("any port leads there");
        assert_eq!(from, (CLIENTS[0], 4000).into());
        inside.send_to(b"answer", from).unwrap();
        assert_eq!(heard(&client, LIMIT), Some(("answer".into(), (SPARE, 1234).into())));
        rig.move_machine(&mut machine, Duration::from_millis(20));
    }
    machine.udp(2000).send_to(b"own", (CLIENTS[0], 4000)).unwrap();
    assert_eq!(heard(&client, LIMIT), Some(("own".into(), (SPARE, 2000).into())));
    twin.udp(2000).send_to(b"own", (CLIENTS[0], 4000)).unwrap();
    assert_eq!(heard(&client, LIMIT).map(|h| h.1.ip()), Some(PUBLIC.into()));
    // A machine reaches it too, as if from outside.
    let asking = twin.udp(3000);
    asking.send_to(b"question", (SPARE, 1234)).unwrap();
    let (_, from) = heard(&inside, LIMIT).expect("through the public address");
    inside.send_to(b"answer", from).unwrap();
    assert_eq!(heard(&asking, LIMIT), Some(("answer".into(), (SPARE, 1234).into())));
}

#[test]
fn what_is_beyond_a_machines_limits_is_dropped_and_counted() {
    let rig = Rig::new(&translated());
    let limits = Limits { bytes_in: Some(50_000), bytes_out: Some(50_000), flows_in: Some(10) };
    let machine = rig.boot(machine(Policy { limits, ..Policy::default() }), 0);
    let inside = machine.udp(9);
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    let arrived = |to: &UdpSocket| std::iter::from_fn(|| heard(to, SILENCE)).count() as f64;
    // One second's worth waits in the bucket, and it fills while it is emptied.
    let most = |start: Instant| (1.0 + start.elapsed().as_secs_f64()) * 50.0;
    let payload = [b'x'; 1000 - 28];
    let start = Instant::now();
    for _ in 0..400 {
        client.send_to(&payload, public(7001)).unwrap();
    }
    let (most_in, arrived_in) = (most(start), arrived(&inside));
    assert!((40.0..=most_in + 1.0).contains(&arrived_in), "{arrived_in} in of {most_in}");
    let dropped = rig.count("nat_over_rate");
    assert_eq!(dropped as f64, 400.0 - arrived_in);
    let start = Instant::now();
    for _ in 0..400 {
        inside.send_to(&payload, (CLIENTS[0], 4000)).unwrap();
    }
    let (most_out, arrived_out) = (most(start), arrived(&client));
    assert!((40.0..=most_out + 1.0).contains(&arrived_out), "{arrived_out} out of {most_out}");

    // What the machine has asked for counts like what comes by itself.
    let downloads = machine.udp(6000);
    downloads.send_to(b"give me", (CLIENTS[0], 4000)).unwrap();
    let (_, asked_by) = heard(&client, LIMIT).expect("it asks");
    let start = Instant::now();
    for _ in 0..400 {
        client.send_to(&payload, asked_by).unwrap();
    }
    let (most_back, arrived_back) = (most(start), arrived(&downloads));
    assert!((10.0..=most_back + 1.0).contains(&arrived_back), "{arrived_back} of {most_back}");

    let start = Instant::now();
    for port in 5000..5100 {
        udp_of(&rig.clients[0], CLIENTS[0], port).send_to(b"new", public(7001)).unwrap();
    }
    let most_flows = (1.0 + start.elapsed().as_secs_f64()) * 10.0;
    let flows = arrived(&inside);
    assert!((5.0..=most_flows + 1.0).contains(&flows), "{flows} flows of {most_flows}");
}

/// Whether an address answers an ICMP echo.
fn answers_echo(client: &Space, address: IpAddr) -> bool {
    let (family, protocol, request) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128),
    };
    client.sysctl("net/ipv4/ping_group_range", "0 0").unwrap();
    let socket = client.run(|| socket(family, SockType::Datagram, SockFlag::empty(), protocol));
    let socket = UdpSocket::from(socket.unwrap());
    // Type, code, checksum and identifier (the kernel's), sequence; and something to say.
    let packet = [request, 0, 0, 0, 0, 0, 0, 1, b'h', b'i'];
    socket.send_to(&packet, (address, 0)).unwrap();
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    let mut buffer = [0; 64];
    socket
        .recv_from(&mut buffer)
        .is_ok_and(|(size, from)| from.ip() == address && buffer[..size].ends_with(b"hi"))
}

#[test]
fn public_addresses_answer_echoes_from_clients_and_from_machines() {
    let rig = Rig::new(&translated());
    let policy = Policy { public: vec![SPARE.into()], ..Policy::default() };
    let machine = rig.boot(MachineNet { policy, ..net("whole", 7, 5) }, 0);
    for address in [PUBLIC.into(), PUBLIC_V6.into(), SPARE.into()] {
        assert!(answers_echo(&rig.clients[0], address), "{address}");
    }
    assert!(answers_echo(machine.guest.space(), PUBLIC.into()));
    assert!(answers_echo(machine.guest.space(), CLIENTS[0].into()), "and outwards");
    assert!(answers_echo(machine.guest.space(), CLIENTS_V6[0].into()));
}
