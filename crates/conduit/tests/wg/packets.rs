//! What passes, in which size, and what does not.

use super::{pair, program, transfer};
use conduit::lab::{
    traffic::{never_cut, retransmits},
    tunnel::{Outer, Pair, inner, outer},
    wait_for,
};
use conduit_wg::{Ask, PrivateKey};
use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

#[test]
fn tcp_passes_both_ways_over_both_families_in_both_families() {
    for over in [Outer::V4, Outer::V6] {
        let pair = Pair::new(program(), over).unwrap();
        // The first handshake may come before the other end knows whose it is.
        let before = [&pair.a, &pair.b].map(|end| end.status().unwrap().counts);
        for address in [IpAddr::from(inner(2).0), inner(2).1.into()] {
            transfer(&pair.a.space, &pair.b.space, address, 20_000_000);
        }
        for address in [IpAddr::from(inner(1).0), inner(1).1.into()] {
            transfer(&pair.b.space, &pair.a.space, address, 20_000_000);
        }
        let packets = pair.a.count("packets_sent").unwrap();
        assert!(packets > 25_000, "{packets} packets carried 40 MB");
        // Large segments on both sides of the tunnel, many packets in a call between.
        let (read, calls) =
            (pair.a.count("tun_read").unwrap(), pair.a.count("send_calls").unwrap());
        assert!(read * 4 < packets, "{read} frames became {packets} packets");
        assert!(calls * 4 < packets, "{packets} packets in {calls} calls");
        let (received, written) =
            (pair.b.count("packets_received").unwrap(), pair.b.count("tun_written").unwrap());
        assert!(written * 2 < received, "{received} packets became {written} frames");
        for (end, before) in [&pair.a, &pair.b].into_iter().zip(before) {
            for (name, count) in end.status().unwrap().counts {
                // The kernel's own multicasts have nobody to go to.
                let meant = !name.starts_with("dropped") || name == "dropped_no_peer";
                assert!(meant || count == before[&name], "{count} {name}");
            }
        }
    }
}

#[test]
fn datagrams_of_every_size_arrive_as_they_are() {
    let pair = pair();
    let v4 = (IpAddr::from(inner(1).0), IpAddr::from(inner(2).0));
    let v6 = (inner(1).1.into(), inner(2).1.into());
    for (from, to) in [v4, v6] {
        let receiver = pair.b.space.run(|| UdpSocket::bind((to, 0)).unwrap());
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let sender = pair.a.space.run(|| UdpSocket::bind((from, 0)).unwrap());
        // Beyond the MTU, the kernel cuts them before the tunnel and joins them behind it.
        for size in [0, 1, 20, 500, 1371, 1372, 1373, 1392, 1393, 5000, 60_000] {
            let data: Vec<u8> = (0..size).map(|n| (n % 253) as u8).collect();
            sender.send_to(&data, receiver.local_addr().unwrap()).unwrap();
            let mut buffer = vec![0; 65_536];
            let (got, who) = receiver.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..got], who.ip()), (&data[..], from), "{size} bytes");
        }
    }
}

#[test]
fn icmp_comes_back() {
    let pair = pair();
    let socket = pair.a.space.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.connect((inner(2).0, 4999)).unwrap();
    socket.send(b"anybody?").unwrap();
    let error = socket.recv(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "port unreachable, by ICMP");
}

#[test]
fn what_is_too_large_and_may_not_be_cut_is_refused_where_it_is_sent() {
    let pair = pair();
    let socket = pair.a.space.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    never_cut(&socket);
    let to = SocketAddr::from((inner(2).0, 4998));
    socket.send_to(&[0; 1392], to).unwrap();
    let error = socket.send_to(&[0; 1393], to).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
}

#[test]
fn the_tunnel_becomes_as_narrow_as_the_path_and_streams_go_on() {
    let pair = pair();
    transfer(&pair.a.space, &pair.b.space, inner(2).0.into(), 1_000_000);
    for end in [&pair.a, &pair.b] {
        end.space.ip("link set under0 mtu 1400\n").unwrap();
    }
    let narrow = || pair.a.status().is_ok_and(|s| s.mtu == 1400 - 60);
    assert!(wait_for(Duration::from_secs(30), narrow), "{:?}", pair.a.status().map(|s| s.mtu));
    transfer(&pair.a.space, &pair.b.space, inner(2).0.into(), 5_000_000);
    for end in [&pair.a, &pair.b] {
        end.space.ip("link set under0 mtu 1500\n").unwrap();
    }
    let wide = || pair.a.status().is_ok_and(|s| s.mtu == 1420);
    assert!(wait_for(Duration::from_secs(30), wide), "wide again");
}

#[test]
fn who_has_another_key_gets_nowhere() {
    let mut pair = Pair::apart(program()).unwrap();
    pair.a.start(&[]).unwrap();
    pair.b.start(&[]).unwrap();
    // b expects somebody else at a's addresses.
    let mut wrong = pair.a.as_peer(Some(Outer::V4.of(1))).unwrap();
    wrong.keys = vec![PrivateKey::generate().unwrap().public()];
    pair.b.tell(&Ask::Peers { peers: vec![wrong] }).unwrap();
    let right = pair.b.as_peer(Some(Outer::V4.of(2))).unwrap();
    pair.a.tell(&Ask::Peers { peers: vec![right.clone()] }).unwrap();
    let refused = || pair.b.count("dropped_unknown_key").is_ok_and(|n| n > 0);
    assert!(wait_for(Duration::from_secs(30), refused), "a's handshake is counted");
    // And a looks for somebody with a key that b does not have.
    let mut wrong = right;
    wrong.keys = vec![PrivateKey::generate().unwrap().public()];
    pair.a.tell(&Ask::Peers { peers: vec![wrong] }).unwrap();
    let refused = || pair.b.count("dropped_wrong_mac").is_ok_and(|n| n > 0);
    assert!(wait_for(Duration::from_secs(30), refused), "a handshake for another key is counted");
    for end in [&pair.a, &pair.b] {
        assert!(end.status().unwrap().peers.iter().all(|p| p.handshake.is_none()));
        assert_eq!(end.count("packets_received").unwrap(), 0);
    }
}

#[test]
fn a_peer_sends_from_its_own_addresses_only() {
    let pair = pair();
    let thief = IpAddr::from([10, 99, 0, 77]);
    pair.a.space.ip(&format!("address add {thief}/32 dev cd-wg\n")).unwrap();
    let ear = pair.b.space.run(|| UdpSocket::bind("0.0.0.0:4997").unwrap());
    ear.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let to = SocketAddr::from((inner(2).0, 4997));
    let send = |from: IpAddr, what: &[u8]| {
        pair.a.space.run(|| UdpSocket::bind((from, 0)).unwrap().send_to(what, to).unwrap())
    };
    send(thief, b"stolen");
    send(inner(1).0.into(), b"own");
    let mut buffer = [0; 10];
    let (size, _) = ear.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..size], b"own");
    assert_eq!(pair.b.count("dropped_foreign_source").unwrap(), 1);
}

#[test]
fn a_destination_that_nobody_has_is_counted() {
    let pair = pair();
    let to = SocketAddr::from(([10, 99, 0, 200], 9));
    let before = pair.a.count("dropped_no_peer").unwrap();
    let socket = pair.a.space.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    for _ in 0..50 {
        socket.send_to(b"x", to).unwrap();
    }
    let counted = || pair.a.count("dropped_no_peer").is_ok_and(|n| n >= before + 50);
    assert!(wait_for(Duration::from_secs(30), counted));
}

#[test]
fn what_is_sent_before_there_is_a_session_arrives_after_the_handshake() {
    let mut pair = Pair::apart(program()).unwrap();
    pair.a.start(&[]).unwrap();
    pair.b.start(&[]).unwrap();
    // Only a knows where to go, and a session is made by the first packet.
    pair.a.space.ip("link set under0 down\n").unwrap();
    pair.introduce(None, Some(Outer::V4.of(2))).unwrap();
    let ear = pair.b.space.run(|| UdpSocket::bind((inner(2).0, 4996)).unwrap());
    ear.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let sender = pair.a.space.run(|| UdpSocket::bind((inner(1).0, 0)).unwrap());
    for n in 0..100_u8 {
        sender.send_to(&[n], (inner(2).0, 4996)).unwrap();
    }
    pair.a.space.ip("link set under0 up\n").unwrap();
    for n in 0..100_u8 {
        let mut buffer = [0; 10];
        let (size, _) = ear.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..size], [n], "in order, none lost");
    }
}

#[test]
fn a_stream_loses_nothing_within_the_tunnel() {
    let pair = pair();
    let before = pair.a.space.run(retransmits);
    transfer(&pair.a.space, &pair.b.space, inner(2).0.into(), 100_000_000);
    let again = pair.a.space.run(retransmits) - before;
    assert!(again < 50, "{again} segments of 70,000 were sent again");
    assert_ne!(outer(1), outer(2));
}
