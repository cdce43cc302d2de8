//! Packets that are too large, and those in pieces: never cut on the way without being asked, and
//! the sender is told.

use crate::rig::{CLIENT, MACHINE, Options, PORT, Rig, eventually, heard};
use conduit_bpf::Event;
use nix::sys::socket::{setsockopt, sockopt};
use std::{
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    thread,
    time::Duration,
};

/// Asks that datagrams are never cut (IP_PMTUDISC_DO) or may be (IP_PMTUDISC_DONT).
fn discover(socket: &UdpSocket, value: i32) {
    // SAFETY: the kernel reads one int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0);
}

const MAY_BE_CUT: i32 = libc::IP_PMTUDISC_DONT;
const NEVER_CUT: i32 = libc::IP_PMTUDISC_DO;

/// Sends 1440 bytes until the kernel knows better; how many sends it took to learn.
fn learns(socket: &UdpSocket, to: (IpAddr, u16), size: usize) -> usize {
    discover(socket, NEVER_CUT);
    for n in 0..200 {
        match socket.send_to(&vec![7; size], to) {
            Ok(_) => thread::sleep(Duration::from_millis(5)),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{error}");
                return n;
            }
        }
    }
    panic!("nobody told the sender that {size} bytes are too many");
}

#[test]
fn a_client_learns_the_size_that_fits_and_larger_packets_are_not_cut() {
    let rig = Rig::with(&Options { guest_mtu: 1500, ..Options::default() });
    rig.place(0, 1);
    let ear = rig.listen(0);
    let socket = rig.client.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    // 1440 and 28 of headers do not fit into 1450.
    let sends = learns(&socket, (MACHINE.into(), PORT), 1440);
    assert!(sends >= 1, "the first one had to be tried");
    socket.send_to(&[7; 1422], (MACHINE, PORT)).unwrap();
    assert_eq!(heard(&ear).unwrap().0.len(), 1422, "exactly what fits arrives");
}

#[test]
fn a_machine_learns_the_size_that_fits() {
    let rig = Rig::with(&Options { guest_mtu: 1500, ..Options::default() });
    rig.place(0, 1);
    let ear = rig.client.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    ear.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let socket = rig.guests[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    learns(&socket, (CLIENT.into(), 53), 1440);
    assert!(rig.hosts[0].count(Event::TooLarge) >= 1);
    socket.send_to(&[7; 1422], (CLIENT, 53)).unwrap();
    assert_eq!(heard(&ear).unwrap().0.len(), 1422);
}

#[test]
fn packets_that_may_be_cut_arrive_whole_both_ways() {
    let rig = Rig::with(&Options { guest_mtu: 1500, ..Options::default() });
    rig.place(0, 1);
    let ear = rig.listen(0);
    let socket = rig.client.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    discover(&socket, MAY_BE_CUT);
    let heard_size = |ear: &UdpSocket| {
        let mut buffer = [0; 9000];
        ear.recv_from(&mut buffer).map(|(size, _)| size).ok()
    };
    for size in [1440, 1472, 4000, 8000] {
        socket.send_to(&vec![7; size], (MACHINE, PORT)).unwrap();
        assert_eq!(heard_size(&ear), Some(size), "to the machine");
    }
    let ear = rig.client.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    ear.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let socket = rig.guests[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    discover(&socket, MAY_BE_CUT);
    for size in [1440, 1472, 4000, 8000] {
        socket.send_to(&vec![7; size], (CLIENT, 53)).unwrap();
        assert_eq!(heard_size(&ear), Some(size), "from the machine");
    }
}

/// Moves bytes both ways over one connection; fails if it hangs.
fn bulk(rig: &Rig, size: usize) {
    let listener = rig.guests[0].run(|| TcpListener::bind("0.0.0.0:7").unwrap());
    let serving = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = vec![0; size];
        stream.read_exact(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    });
    let mut stream = rig
        .client
        .run(|| TcpStream::connect_timeout(&(MACHINE, 7).into(), Duration::from_secs(5)).unwrap());
    let limit = nix::sys::time::TimeVal::new(10, 0);
    setsockopt(&stream, sockopt::ReceiveTimeout, &limit).unwrap();
    setsockopt(&stream, sockopt::SendTimeout, &limit).unwrap();
    stream.write_all(&vec![7; size]).unwrap();
    let mut back = vec![0; size];
    stream.read_exact(&mut back).unwrap();
    serving.join().unwrap();
}

#[test]
fn a_stream_of_full_size_segments_passes_although_the_guest_knows_nothing_of_the_tunnel() {
    let rig = Rig::with(&Options { guest_mtu: 1500, ..Options::default() });
    rig.place(0, 1);
    bulk(&rig, 8 << 20);
}

#[test]
fn a_path_that_becomes_narrower_between_hosts_is_found_out() {
    let rig = Rig::new();
    rig.place(0, 1);
    bulk(&rig, 1 << 20);
    // The way between router and host a: the edge hears of it when a packet did not pass.
    rig.router.ip("link set to2 mtu 1400\n").unwrap();
    rig.hosts[0].space.ip("link set under0 mtu 1400\n").unwrap();
    let ear = rig.listen(0);
    let socket = rig.client.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let fit = |node: &crate::rig::Node, peer: &crate::rig::Node| {
        let before = node.tunnel.mtu;
        node.space.run(|| conduit::tunnel::fit(node.this, &[peer.this], before).unwrap())
    };
    eventually("both ends know", || {
        socket.send_to(&[7; 1360], (MACHINE, PORT)).ok();
        let (edge, host) = (fit(&rig.edge, &rig.hosts[0]), fit(&rig.hosts[0], &rig.edge));
        (edge, host) == (1350, 1350)
    });
    learns(&socket, (MACHINE.into(), PORT), 1340);
    socket.send_to(&[7; 1322], (MACHINE, PORT)).unwrap();
    eventually("what fits arrives", || heard(&ear).is_some_and(|(text, _)| text.len() == 1322));
    bulk(&rig, 1 << 20);
}
