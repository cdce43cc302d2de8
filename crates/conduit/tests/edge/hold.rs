//! What an edge holds for a machine that no host has.

use crate::rig::{
    LIMIT, Machine, Rig, SILENCE, address, address_v6, epoch, heard, net, translated,
};
use conduit::{
    DataPath,
    holder::{HoldSettings, Limits},
    lab::{
        machine::{Guest, Vmm},
        wait_for,
    },
};
use std::{
    net::{IpAddr, UdpSocket},
    path::Path,
    time::Duration,
};

fn holding(limits: Limits) -> Rig {
    let hold = HoldSettings::of(Path::new(env!("CARGO_BIN_EXE_conduit")), limits);
    Rig::with_hold(&translated(), Some(hold))
}

/// Numbered datagrams from one machine to the address of another.
fn talk(from: &Machine, to: IpAddr) -> UdpSocket {
    let socket = from.udp(0);
    let to = match to {
        IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
        IpAddr::V6(_) => to,
    };
    for n in 0..20 {
        socket.send_to(n.to_string().as_bytes(), (to, 9)).unwrap();
    }
    socket
}

fn comes_to(rig: &Rig, name: &str, count: u64) -> bool {
    wait_for(LIMIT, || rig.count(name) == count)
}

#[test]
fn frames_of_a_machine_that_a_host_was_prepared_for_are_held_until_it_runs() {
    let rig = holding(Limits::default());
    let first = rig.boot(net("first", 7, 5), 0);
    let (second, host) = (net("second", 7, 6), &rig.hosts[1]);
    let guest = Guest::new(&second).unwrap();
    let listening = guest.run(|| UdpSocket::bind("[::]:9")).unwrap();
    let tap = host.space.run(|| host.path.prepare(&second)).unwrap();
    let known = || conduit::status(&rig.folder.path().join("b.sock")).is_ok();
    assert!(wait_for(LIMIT, known));
    // Its announcement is on the way to the edge; what comes before is for nobody.
    let socket = first.udp(0);
    let probe = || {
        let _ = socket.send_to(b"anybody?", (address(6).to_ipv6_mapped(), 10));
        rig.count("hold_frames") > 0
    };
    assert!(wait_for(LIMIT, probe), "the edge holds nothing");
    let probes = rig.count("hold_frames");
    talk(&first, address(6).into());
    talk(&first, address_v6(6).into());
    assert!(comes_to(&rig, "hold_frames", probes + 40));
    host.path.resume(&second, epoch(1)).unwrap();
    host.path.settled(&second, epoch(1), LIMIT).unwrap();
    let _vmm = Vmm::run(&guest, &tap);
    let mut numbers = [Vec::new(), Vec::new()];
    while let Some((text, from)) = heard(&listening, SILENCE) {
        numbers[usize::from(from.is_ipv6())].push(text.parse::<u32>().unwrap());
    }
    assert_eq!(numbers, [(0..20).collect::<Vec<_>>(), (0..20).collect()]);
    assert!(comes_to(&rig, "hold_machines", 0));
    assert_eq!(rig.count("hold_lost"), 0);
}

#[test]
fn what_was_held_for_a_machine_that_does_not_come_is_thrown_away_by_name() {
    let rig = holding(Limits { age: Duration::from_secs(2), ..Limits::default() });
    let first = rig.boot(net("first", 7, 5), 0);
    let host = &rig.hosts[1];
    // One that is called off, and one of which nothing is heard again.
    for (number, called_off) in [(6, true), (8, false)] {
        let next = net("next", 7, number);
        let tap = host.space.run(|| host.path.prepare(&next)).unwrap();
        let before = rig.count("hold_gone") + rig.count("hold_expired");
        let socket = first.udp(0);
        let probe = || {
            let _ = socket.send_to(b"anybody?", (address(number).to_ipv6_mapped(), 10));
            rig.count("hold_frames") > 0
        };
        assert!(wait_for(LIMIT, probe), "the edge holds nothing");
        let held = rig.count("hold_frames");
        drop(tap);
        if called_off {
            host.path.forget(&next, epoch(1)).unwrap();
        }
        let thrown = || rig.count("hold_gone") + rig.count("hold_expired") - before;
        assert!(wait_for(LIMIT, || thrown() >= held), "{} of {held}", thrown());
        assert!(comes_to(&rig, "hold_machines", 0));
    }
}
