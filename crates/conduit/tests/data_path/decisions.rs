//! Where a frame goes, and which frames go nowhere.

use crate::rig::{
    CLIENT, CLIENT_V6, MACHINE, MACHINE_V6, Options, PORT, Rig, Underlay, eventually, heard, key,
    key_v6,
};
use conduit::{lab::Space, tunnel};
use conduit_bpf::{Changed, Entry, Error, Event, Key, Place};
use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

/// A stream both ways between client and machine, opened by either.
fn streams(rig: &Rig, guest: usize) {
    let echo = |listener: TcpListener| {
        thread::spawn(move || {
            let (mut stream, from) = listener.accept().unwrap();
            let mut buffer = vec![0; 200_000];
            stream.read_exact(&mut buffer).unwrap();
            stream.write_all(&buffer).unwrap();
            from.ip().to_canonical()
        })
    };
    let talk = |mut stream: TcpStream| {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let said: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        let mut writer = stream.try_clone().unwrap();
        let sent = said.clone();
        let writing = thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut answer = vec![0; said.len()];
        stream.read_exact(&mut answer).unwrap();
        writing.join().unwrap();
        assert!(answer == said);
    };
    let dial =
        |to: (IpAddr, u16)| TcpStream::connect_timeout(&to.into(), Duration::from_secs(5)).unwrap();
    for (machine, client) in
        [(IpAddr::from(MACHINE), IpAddr::from(CLIENT)), (MACHINE_V6.into(), CLIENT_V6.into())]
    {
        let served = echo(rig.guests[guest].run(|| TcpListener::bind("[::]:7").unwrap()));
        talk(rig.client.run(|| dial((machine, 7))));
        assert_eq!(served.join().unwrap(), client, "the machine sees the client's own address");
        let served = echo(rig.client.run(|| TcpListener::bind("[::]:8").unwrap()));
        talk(rig.guests[guest].run(|| dial((client, 8))));
        assert_eq!(served.join().unwrap(), machine);
    }
}

#[test]
fn streams_go_both_ways_in_both_families() {
    let rig = Rig::new();
    rig.place(0, 1);
    streams(&rig, 0);
    assert!(rig.hosts[0].count(Event::ToTap) > 0 && rig.hosts[0].count(Event::ToTunnel) > 0);
    assert_eq!(rig.hosts[1].count(Event::ToTap), 0);
}

#[test]
fn hosts_may_have_ipv6_addresses_among_themselves() {
    let rig = Rig::with(&Options { underlay: Underlay::V6, ..Options::default() });
    rig.place(0, 1);
    streams(&rig, 0);
}

#[test]
fn clsact_carries_the_same_where_tcx_is_missing() {
    let rig = Rig::with(&Options { attach: conduit_bpf::Attach::Clsact, ..Options::default() });
    rig.place(0, 1);
    streams(&rig, 0);
    let links = std::fs::read_dir(rig.hosts[0].plane().pins().join("links")).unwrap().count();
    assert_eq!(links, 0, "no tcx link was made");
}

#[test]
fn a_flip_leads_frames_to_the_other_host() {
    let rig = Rig::new();
    rig.place(0, 1);
    let (a, b) = (rig.listen(0), rig.listen(1));
    rig.say("one");
    assert_eq!(heard(&a).unwrap().0, "one");
    rig.place(1, 2);
    rig.say("two");
    assert_eq!(heard(&b).unwrap().0, "two");
    assert_eq!(rig.hosts[0].count(Event::ToTap), 1);
}

#[test]
fn a_host_sends_on_what_still_comes_for_a_machine_that_left() {
    let rig = Rig::new();
    rig.place(0, 1);
    let b = rig.listen(1);
    // The edge has not heard of it yet.
    let owner = rig.hosts[1].this;
    rig.hosts[1].set(key(), 0, Place::Local { tap: rig.taps[1], candidate: true }, owner);
    rig.hosts[0].set(key(), 2, Place::Remote { leaving: false }, owner);
    rig.say("over the old host");
    assert_eq!(heard(&b).unwrap().0, "over the old host");
    assert_eq!(rig.hosts[0].count(Event::Forwarded), 1);
}

#[test]
fn two_hosts_that_believe_each_other_to_have_it_send_nothing_in_circles() {
    let rig = Rig::new();
    rig.place(0, 1);
    let away = Place::Remote { leaving: false };
    rig.hosts[1].set(key(), 2, away, rig.hosts[0].this);
    rig.hosts[0].set(key(), 2, away, rig.hosts[1].this);
    rig.say("where to?");
    eventually("the frame ends", || rig.hosts[1].count(Event::Loop) == 1);
    assert_eq!(rig.hosts[0].count(Event::Forwarded), 1);
}

#[test]
fn an_epoch_only_grows_and_has_one_owner() {
    let rig = Rig::new();
    let (a, b) = (rig.hosts[0].this, rig.hosts[1].this);
    let away = Place::Remote { leaving: false };
    assert_eq!(rig.edge.try_set(key(), 5, away, a).unwrap(), Changed::Changed);
    assert_eq!(rig.edge.try_set(key(), 5, away, a).unwrap(), Changed::Same);
    let taken = rig.edge.try_set(key(), 5, away, b).unwrap_err();
    assert!(matches!(taken, Error::Taken { epoch: 5, owner, .. } if owner == a), "{taken}");
    assert_eq!(rig.edge.try_set(key(), 6, away, b).unwrap(), Changed::Changed);
    // A flip that was seen on the way and is sent again.
    let replayed = rig.edge.try_set(key(), 5, away, a).unwrap_err();
    assert!(
        matches!(replayed, Error::Stale { asked: 5, current: 6, .. }),
        "{replayed}: epoch 6 stands"
    );
    let entry = rig.edge.plane().entry(key()).unwrap().unwrap();
    assert_eq!((entry.epoch, entry.owner), (6, b));
    // Where nobody owns the epoch yet, anybody may take it.
    let candidate = Place::Local { tap: 9, candidate: true };
    rig.hosts[1].set(key(), 6, candidate, b);
    rig.hosts[1].set(key(), 6, away, a);
}

#[test]
fn of_many_writers_one_gets_an_epoch() {
    let rig = Rig::new();
    let (edge, away) = (&rig.edge, Place::Remote { leaving: false });
    for epoch in 1..=200 {
        let winners: Vec<Ipv4Addr> = thread::scope(|scope| {
            let tries: Vec<_> = (1..=4_u8)
                .map(|n| {
                    let owner = Ipv4Addr::new(10, 0, 0, n);
                    scope.spawn(move || {
                        edge.try_set(key(), epoch, away, owner.into()).is_ok().then_some(owner)
                    })
                })
                .collect();
            tries.into_iter().filter_map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(winners.len(), 1, "epoch {epoch}: {winners:?}");
        let entry = edge.plane().entry(key()).unwrap().unwrap();
        assert_eq!((entry.epoch, entry.owner), (epoch, IpAddr::from(winners[0])));
    }
}

#[test]
fn a_machine_speaks_with_its_own_addresses_only() {
    let rig = Rig::new();
    rig.place(0, 1);
    let ear = rig.client.run(|| UdpSocket::bind("[::]:53").unwrap());
    ear.set_read_timeout(Some(Duration::from_millis(1000))).unwrap();
    rig.guests[0]
        .ip("address add 10.77.0.99/32 dev eth0\naddress add fd77::99/128 dev eth0 nodad\n")
        .unwrap();
    let say = |from: &str, to: IpAddr| {
        rig.guests[0].run(|| {
            let socket = UdpSocket::bind((from.parse::<IpAddr>().unwrap(), 0)).unwrap();
            socket.send_to(from.as_bytes(), (to, 53)).unwrap();
        });
    };
    say("10.77.0.5", CLIENT.into());
    assert_eq!(heard(&ear).unwrap().0, "10.77.0.5");
    say("fd77::5", CLIENT_V6.into());
    assert_eq!(heard(&ear).unwrap().0, "fd77::5");
    let spoofed = || rig.hosts[0].count(Event::SpoofedSource);
    say("10.77.0.99", CLIENT.into());
    say("fd77::99", CLIENT_V6.into());
    eventually("both lies are counted", || spoofed() == 2);
    rig.guests[0].ip("link set eth0 address 02:00:00:00:00:66\n").unwrap();
    say("10.77.0.5", CLIENT.into());
    eventually("a false MAC is counted", || rig.hosts[0].count(Event::SpoofedMac) >= 1);
    assert!(heard(&ear).is_none(), "none of it got out");
}

#[test]
fn a_machine_tells_its_host_only_the_truth_of_itself() {
    let rig = Rig::new();
    rig.place(0, 1);
    // An ARP answer for somebody else's address.
    rig.guests[0].ip("address add 10.77.0.99/32 dev eth0\n").unwrap();
    rig.guests[0].sysctl("net/ipv4/conf/eth0/arp_notify", "1").unwrap();
    rig.guests[0].ip("link set eth0 down\nlink set eth0 up\n").unwrap();
    eventually("the lie is counted", || rig.hosts[0].count(Event::SpoofedSource) >= 1);
}

#[test]
fn a_candidate_hears_and_does_not_speak_and_one_that_leaves_speaks_to_the_end() {
    let rig = Rig::new();
    rig.place(0, 1);
    let ear = rig.client.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    ear.set_read_timeout(Some(Duration::from_millis(1000))).unwrap();
    let (b, owner) = (rig.listen(1), rig.hosts[1].this);
    let say = |guest: usize, text: &str| {
        rig.guests[guest].run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(text.as_bytes(), (CLIENT, 53)).unwrap();
        });
    };
    rig.hosts[1].set(key(), 0, Place::Local { tap: rig.taps[1], candidate: true }, owner);
    rig.hosts[0].set(key(), 2, Place::Remote { leaving: true }, owner);
    rig.say("for both");
    assert_eq!(heard(&b).unwrap().0, "for both");
    say(1, "too early");
    eventually("a candidate is silent", || rig.hosts[1].count(Event::NotOwner) == 1);
    say(0, "last words");
    assert_eq!(heard(&ear).unwrap().0, "last words");
    // It has paused: whatever still comes from there is not the machine's.
    rig.hosts[0].set(key(), 2, Place::Remote { leaving: false }, owner);
    say(0, "a ghost");
    eventually("the old host is silent", || rig.hosts[0].count(Event::NotOwner) == 1);
    assert!(heard(&ear).is_none());
}

#[test]
fn an_edge_believes_the_owner_and_the_announced_candidate_only() {
    let rig = Rig::new();
    rig.place(0, 5);
    let ear = rig.client.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    ear.set_read_timeout(Some(Duration::from_millis(1000))).unwrap();
    let say = |guest: usize, text: &str| {
        rig.guests[guest].run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(text.as_bytes(), (CLIENT, 53)).unwrap();
        });
    };
    let (a, b) = (rig.hosts[0].this, rig.hosts[1].this);
    let away = Place::Remote { leaving: false };
    let announce = |candidate: Option<IpAddr>| {
        let entry = Entry { epoch: 5, owner: a, candidate, place: away, mac: crate::rig::MAC };
        rig.edge.plane().change(key(), &entry).unwrap();
    };
    // Host b says that it has the machine; another one was announced.
    rig.hosts[1].set(key(), 6, rig.local(1), b);
    announce(Some(IpAddr::from([10, 88, 9, 9])));
    say(1, "usurper");
    eventually("it is refused", || rig.edge.count(Event::NotOwner) == 1);
    announce(Some(b));
    say(1, "successor");
    assert_eq!(heard(&ear).unwrap().0, "successor");
    // None was announced, because no edge ran that could hear it.
    announce(None);
    say(1, "heir");
    assert_eq!(heard(&ear).unwrap().0, "heir");
    assert_eq!(rig.edge.count(Event::Ahead), 2);
    // The edge has heard of the move; a late host a is not believed any more.
    rig.edge.set(key(), 6, away, b);
    say(0, "late");
    eventually("the late one is refused", || rig.edge.count(Event::NotOwner) == 2);
    // The owner, with an epoch that is over.
    rig.edge.set(key(), 7, away, b);
    say(1, "old epoch");
    eventually("the old epoch is refused", || rig.edge.count(Event::OldEpoch) == 1);
    assert!(heard(&ear).is_none());
}

#[test]
fn a_sender_that_is_far_behind_is_not_believed_by_a_host() {
    let rig = Rig::new();
    rig.place(0, 1);
    let a = rig.listen(0);
    // Failed moves raise the host's epoch while the edge hears nothing.
    let at = |lease: u64, flips: u64| lease << 16 | flips;
    rig.hosts[0].set(key(), at(7, 40), rig.local(0), rig.hosts[0].this);
    rig.say("a little behind");
    assert_eq!(heard(&a).unwrap().0, "a little behind");
    rig.hosts[0].set(key(), at(9, 0), rig.local(0), rig.hosts[0].this);
    rig.say("far behind");
    eventually("it is refused", || rig.hosts[0].count(Event::OldEpoch) == 1);
    // The wire has 16 bits: what lies on both sides of a round is compared right.
    rig.hosts[0].set(key(), at(1025, 0), rig.local(0), rig.hosts[0].this);
    rig.edge.set(key(), at(1023, 1), Place::Remote { leaving: false }, rig.hosts[0].this);
    rig.say("before the round");
    assert_eq!(heard(&a).unwrap().0, "before the round");
}

#[test]
fn the_first_flip_of_the_next_owner_is_newer_on_the_wire_too() {
    let rig = Rig::new();
    let (first, next) = (5 << 16 | 3, 6 << 16);
    rig.place(0, first);
    let ear = rig.client.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    ear.set_read_timeout(Some(Duration::from_millis(1000))).unwrap();
    let (b, owner) = (rig.listen(1), rig.hosts[1].this);
    // The edge has heard of nothing: in by way of the old host, out ahead of the claim.
    rig.hosts[0].set(key(), next, Place::Remote { leaving: false }, owner);
    rig.hosts[1].set(key(), next, rig.local(1), owner);
    rig.say("in");
    assert_eq!(heard(&b).unwrap().0, "in");
    rig.guests[1].run(|| {
        UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"out", (CLIENT, 53)).unwrap();
    });
    assert_eq!(heard(&ear).unwrap().0, "out");
    assert_eq!((rig.hosts[0].count(Event::Forwarded), rig.edge.count(Event::Ahead)), (1, 1));
}

/// A vxlan packet with a datagram for the machine in it, as somebody would forge it.
fn forged(net: u32, epoch: u16, forwarded: bool) -> Vec<u8> {
    let mut packet = vec![0x88, u8::from(forwarded) << 3];
    packet.extend(epoch.to_be_bytes());
    packet.extend((net << 8).to_be_bytes());
    packet.extend([0; 12]);
    packet.extend([8, 0]);
    let text = b"forged";
    let length = (20 + 8 + text.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(length.to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(CLIENT.octets());
    ip.extend(MACHINE.octets());
    let sum: u32 = ip.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(ip);
    packet.extend(1000_u16.to_be_bytes());
    packet.extend(PORT.to_be_bytes());
    packet.extend((8 + text.len() as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(text);
    packet
}

#[test]
fn a_forged_tunnel_packet_is_dropped_by_name() {
    let rig = Rig::new();
    rig.place(0, 1);
    let a = rig.listen(0);
    let target = (rig.hosts[0].this, tunnel::PORT);
    let send = |from: &Space, packet: Vec<u8>| {
        from.run(|| UdpSocket::bind("0.0.0.0:0").unwrap().send_to(&packet, target).unwrap());
    };
    let count = |event| rig.hosts[0].count(event);
    // The same packet from the edge is good: what follows is refused for what is named alone.
    send(&rig.edge.space, forged(tunnel::NETWORK, 1, false));
    assert_eq!(heard(&a).unwrap().0, "forged");
    // From an address that is no host's.
    send(&rig.router, forged(tunnel::NETWORK, 1, false));
    eventually("an unknown sender", || count(Event::UnknownPeer) == 1);
    // From a host that has nothing to say about this machine.
    send(&rig.hosts[1].space, forged(tunnel::NETWORK, 1, false));
    eventually("a host without the machine", || count(Event::NotOwner) == 1);
    // Another tenant's network.
    send(&rig.edge.space, forged(tunnel::NETWORK + 1, 1, false));
    eventually("another network", || count(Event::UnknownMachine) == 1);
    // An epoch that is long over.
    rig.place(0, 20 << 16);
    send(&rig.edge.space, forged(tunnel::NETWORK, 1, false));
    eventually("an old epoch", || count(Event::OldEpoch) == 1);
    // Neither this nor that.
    let mut odd = forged(tunnel::NETWORK, 20 * 64, false);
    odd[8 + 14] = 0x65;
    send(&rig.edge.space, odd);
    eventually("it is no IPv4", || count(Event::Malformed) == 1);
    assert!(heard(&a).is_none());
}

#[test]
fn tenants_with_the_same_addresses_do_not_meet() {
    let rig = Rig::new();
    rig.place(0, 1);
    let (a, b) = (rig.listen(0), rig.listen(1));
    // Host b has a machine of another tenant with the very same address.
    let other = Key { net: 77, address: MACHINE.into() };
    rig.hosts[1].set(other, 1, rig.local(1), rig.hosts[1].this);
    let send = |host: usize, net: u32| {
        let target = (rig.hosts[host].this, tunnel::PORT);
        let packet = forged(net, 1, false);
        rig.edge
            .space
            .run(|| UdpSocket::bind("0.0.0.0:0").unwrap().send_to(&packet, target).unwrap());
    };
    send(1, 77);
    assert_eq!(heard(&b).unwrap().0, "forged");
    send(1, tunnel::NETWORK);
    eventually("not this tenant's", || rig.hosts[1].count(Event::UnknownMachine) == 1);
    send(0, tunnel::NETWORK);
    assert_eq!(heard(&a).unwrap().0, "forged");
    assert!(heard(&b).is_none());
}

#[test]
fn a_machine_that_is_gone_and_one_that_never_was_are_told_apart() {
    let rig = Rig::new();
    rig.place(0, 1);
    for key in [key(), key_v6()] {
        rig.hosts[0].set(key, 1, Place::Drop, rig.hosts[0].this);
    }
    rig.say("too late");
    eventually("gone", || rig.hosts[0].count(Event::MachineGone) == 1);
    rig.hosts[0].plane().remove_entry(key()).unwrap();
    rig.say("later still");
    eventually("unknown", || rig.hosts[0].count(Event::UnknownMachine) == 1);
    rig.edge.plane().remove_entry(key()).unwrap();
    // What the kernel says of its own accord on the device counts too.
    let before = rig.edge.count(Event::UnknownMachine);
    rig.say("at the edge");
    eventually("unknown at the edge", || rig.edge.count(Event::UnknownMachine) > before);
    assert_eq!(rig.hosts[0].count(Event::UnknownMachine), 1);
}
