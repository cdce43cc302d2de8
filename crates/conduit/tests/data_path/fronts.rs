//! Several edges: which of them a machine's frames go to. Host b is the second edge here.

use crate::rig::{CLIENT, Node, Rig, eventually, heard, key};
use conduit::tunnel::NETWORK;
use conduit_bpf::{Config, Event, Front, Place, Role};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Duration;

const HOME: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 9);

/// The machine is on host a, and host b is an edge that knows so.
fn rig() -> Rig {
    let rig = Rig::new();
    rig.place(0, 1);
    let second = &rig.hosts[1];
    let (this, tunnel) = (second.this, second.tunnel.index);
    let (edge, hold, role, gateway) = (None, None, Role::Edge, conduit::tap::GATEWAY_MAC);
    let by_stack = false;
    let config = Config { this, edge, tunnel, hold, net: NETWORK, role, by_stack, gateway };
    second.plane().configure(&config).unwrap();
    second.set(key(), 1, Place::Remote { leaving: false }, rig.hosts[0].this);
    for node in [&rig.edge, &rig.hosts[0]] {
        node.plane().set_peer(this, Role::Edge).unwrap();
    }
    rig
}

/// Who hears what leaves by the first edge, and by the second: the client, and that edge as if it were.
fn ears(rig: &Rig) -> [UdpSocket; 2] {
    let second = &rig.hosts[1].space;
    second.ip(&format!("address add {CLIENT}/32 dev lo\n")).unwrap();
    [&rig.client, second].map(|space| {
        let socket = space.run(|| UdpSocket::bind("0.0.0.0:99").unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    })
}

/// The machine says something to the outside.
fn say(rig: &Rig) {
    let socket = rig.guests[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.send_to(b"out", (CLIENT, 99)).unwrap();
}

fn hears(ear: &UdpSocket) {
    assert_eq!(heard(ear).unwrap().0, "out");
}

fn at_home(node: &Node, edge: IpAddr) {
    node.plane().set_home(key(), HOME).unwrap();
    node.plane().set_front(HOME, &Front { edge, epoch: 1 }).unwrap();
}

#[test]
fn a_machine_speaks_by_the_edge_that_serves_its_home_and_without_one_by_the_only_edge() {
    let rig = rig();
    let [first, second] = ears(&rig);
    say(&rig);
    hears(&first);
    at_home(&rig.hosts[0], rig.hosts[1].this);
    say(&rig);
    hears(&second);
    // A change for all machines of the home.
    let front = Front { edge: rig.edge.this, epoch: 2 };
    rig.hosts[0].plane().set_front(HOME, &front).unwrap();
    say(&rig);
    hears(&first);
    assert_eq!(rig.hosts[0].plane().fronts().unwrap(), [(HOME, front)]);
    rig.hosts[0].plane().set_front(HOME, &Front { edge: rig.hosts[1].this, epoch: 3 }).unwrap();
    rig.hosts[0].plane().remove_home(key()).unwrap();
    say(&rig);
    hears(&first);
}

#[test]
fn an_edge_sends_on_what_another_serves_once_and_believes_it_from_edges_only() {
    let rig = rig();
    let [first, second] = ears(&rig);
    at_home(&rig.edge, rig.hosts[1].this);
    // The second believes that the first serves it: no circle.
    at_home(&rig.hosts[1], rig.edge.this);
    say(&rig);
    hears(&second);
    assert_eq!(rig.edge.count(Event::ToOtherEdge), 1);
    assert_eq!(rig.hosts[1].count(Event::ToOtherEdge), 0);
    // The same from one that is a host.
    rig.hosts[1].plane().set_peer(rig.edge.this, Role::Host).unwrap();
    say(&rig);
    eventually("it ends", || rig.hosts[1].count(Event::Loop) == 1);
    for ear in [first, second] {
        ear.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(heard(&ear).is_none());
    }
}
