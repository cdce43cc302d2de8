//! Several edges, as processes: homes that stay, an edge that dies, a drain. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use conduit::{
    conntrack::{self, Flow, FlowTuple},
    lab::{
        edges::{Edges, Machine, client, public},
        traffic::{Datagrams, Echoes, Received, serve_echo},
        wait_for,
    },
};
use nix::sys::signal::Signal;
use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    thread,
    time::{Duration, Instant},
};

const WAIT: Duration = Duration::from_secs(30);
const EAST: usize = 0;
const WEST: usize = 1;

fn rig() -> Edges {
    Edges::new(Path::new(env!("CARGO_BIN_EXE_conduit"))).unwrap()
}

/// A machine that belongs to an edge, with an echo and what it hears of datagrams.
fn machine(rig: &mut Edges, at: usize, home: usize) -> (Machine, Received) {
    let net = rig.machine_of(home);
    let machine = rig.boot(net, at, home).unwrap();
    serve_echo(machine.guest.run(|| TcpListener::bind("0.0.0.0:7").unwrap()));
    let socket = machine.guest.run(|| UdpSocket::bind("0.0.0.0:9").unwrap());
    (machine, Received::collect(socket))
}

/// An echo and a collector of datagrams outside.
fn server(rig: &Edges, number: usize) -> (SocketAddr, SocketAddr, Received) {
    let (listener, socket) = rig.clients[number].run(|| {
        (TcpListener::bind("0.0.0.0:443").unwrap(), UdpSocket::bind("0.0.0.0:53").unwrap())
    });
    serve_echo(listener);
    let address = client(number);
    ((address, 443).into(), (address, 53).into(), Received::collect(socket))
}

/// Connects, and says hello through an echo.
fn hello(to: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, WAIT)?;
    stream.set_read_timeout(Some(WAIT))?;
    stream.write_all(b"hello")?;
    let mut back = [0; 5];
    stream.read_exact(&mut back)?;
    assert_eq!(&back, b"hello");
    Ok(stream)
}

/// How an edge is, as another one has it.
fn health(rig: &Edges, says: usize, name: &str) -> String {
    let homes = rig.status(says).unwrap().homes;
    homes.into_iter().find(|h| h.word.name == name).unwrap().health
}

/// Who connects, as a server outside sees him.
fn seen_from(rig: &Edges, machine: &Machine) -> SocketAddr {
    let listener = rig.clients[1].run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    let to = SocketAddr::from((client(1), 80));
    let _stream = machine.guest.run(|| TcpStream::connect_timeout(&to, WAIT).unwrap());
    listener.accept().unwrap().1
}

#[test]
fn each_machine_belongs_to_an_edge_and_is_reached_and_seen_by_its_address() {
    let mut rig = rig();
    let (east, _) = machine(&mut rig, 0, EAST);
    let (west, _) = machine(&mut rig, 0, WEST);
    for machine in [&east, &west] {
        assert_eq!(rig.home_of(machine), Some(machine.home));
        let to = rig.public(machine, 0);
        rig.clients[0].run(|| hello(to)).unwrap();
        assert_eq!(seen_from(&rig, machine).ip(), public(machine.home));
        // The other edge's address has no such port.
        let other = SocketAddr::new(public(1 - machine.home).into(), to.port());
        let refused = rig.clients[0].run(|| hello(other)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{refused}");
    }
    // Machines of different edges, by private and by public addresses.
    let (private, mapped) = (SocketAddr::from((west.net.address, 7)), rig.public(&west, 0));
    for to in [private, mapped] {
        east.guest.run(|| hello(to)).unwrap();
    }
    assert_eq!(rig.count(EAST, "nat_orphan_reset") + rig.count(WEST, "nat_orphan_reset"), 0);
}

#[test]
fn a_home_stays_over_moves_and_restarts_of_everybody() {
    let mut rig = rig();
    let mut machines = vec![machine(&mut rig, 0, EAST).0, machine(&mut rig, 1, WEST).0];
    let (tcp, _, _) = server(&rig, 1);
    let inside: Vec<_> =
        machines.iter().map(|m| rig.clients[0].run(|| Echoes::start(rig.public(m, 0)))).collect();
    let outside: Vec<_> = machines.iter().map(|m| m.guest.run(|| Echoes::start(tcp))).collect();
    for machine in &mut machines {
        rig.move_machine(machine).unwrap();
        assert_eq!(rig.home_of(machine), Some(machine.home));
    }
    for edge in [EAST, WEST] {
        rig.kill_edge(edge);
        rig.start_edge(edge).unwrap();
    }
    for host in [0, 1] {
        rig.kill_agent(host);
        rig.start_agent(host, 2).unwrap();
    }
    for machine in &mut machines {
        assert_eq!(rig.home_of(machine), Some(machine.home));
        rig.move_machine(machine).unwrap();
    }
    for echoes in inside.into_iter().chain(outside) {
        echoes.wait(20);
        let seen = echoes.finish();
        assert_eq!(seen.sent, seen.answered);
    }
    for edge in [EAST, WEST] {
        assert_eq!(rig.served_by(edge, edge), Some(edge));
        assert_eq!(rig.count(edge, "homes_taken_over"), 0);
    }
}

#[test]
fn an_edge_that_is_added_moves_no_machine_and_takes_new_ones() {
    let mut rig = Edges::with(Path::new(env!("CARGO_BIN_EXE_conduit")), 1).unwrap();
    // Of the two edges, this one would be the second's.
    let net = rig.machine_of(WEST);
    let old = rig.boot(net, 0, EAST).unwrap();
    serve_echo(old.guest.run(|| TcpListener::bind("0.0.0.0:7").unwrap()));
    let (tcp, _, _) = server(&rig, 1);
    let inside = rig.clients[0].run(|| Echoes::start(rig.public(&old, 0)));
    let outside = old.guest.run(|| Echoes::start(tcp));
    rig.start_edge(WEST).unwrap();
    for host in [0, 1] {
        rig.connected(host, 2).unwrap();
    }
    let (new, _) = machine(&mut rig, 0, WEST);
    assert_eq!(rig.home_of(&new), Some(WEST));
    rig.clients[0].run(|| hello(rig.public(&new, 0))).unwrap();
    assert_eq!(rig.home_of(&old), Some(EAST));
    for echoes in [inside, outside] {
        echoes.wait(50);
        let seen = echoes.finish();
        assert_eq!(seen.sent, seen.answered);
    }
}

#[test]
fn an_edge_whose_process_is_dead_goes_on_and_is_not_taken_over() {
    let mut rig = rig();
    let (machine, _) = machine(&mut rig, 0, EAST);
    let (tcp, _, _) = server(&rig, 1);
    let inside = rig.clients[0].run(|| Echoes::start(rig.public(&machine, 0)));
    let outside = machine.guest.run(|| Echoes::start(tcp));
    rig.kill_edge(EAST);
    assert!(wait_for(WAIT, || health(&rig, WEST, "east") == "hung"));
    // Longer than it takes to take over.
    inside.wait(2000);
    outside.wait(20);
    assert_eq!(rig.served_by(EAST, WEST), Some(EAST));
    rig.clients[0].run(|| hello(rig.public(&machine, 0))).unwrap();
    rig.start_edge(EAST).unwrap();
    assert!(wait_for(WAIT, || health(&rig, WEST, "east") == "alive"));
    for echoes in [inside, outside] {
        let seen = echoes.finish();
        assert_eq!(seen.sent, seen.answered);
    }
}

#[test]
fn after_an_edge_has_died_mapped_flows_go_on_and_masqueraded_ones_are_reset() {
    let mut rig = rig();
    let (machine, received) = machine(&mut rig, 0, EAST);
    let (tcp, _, _) = server(&rig, 1);
    let inside = rig.clients[0].run(|| Echoes::start(rig.public(&machine, 0)));
    let datagrams = rig.clients[0].run(|| Datagrams::start(rig.public(&machine, 1)));
    let mut outside = machine.guest.run(|| hello(tcp)).unwrap();
    inside.wait(50);
    // Nobody hears it any more, though it runs and reads leases.
    let outage = Instant::now();
    rig.cut_edge(EAST, true).unwrap();
    rig.until_served(EAST, WEST).unwrap();
    let outage = outage.elapsed();
    inside.wait(100);
    // Its translation went with the edge: it ends, and does not hang.
    outside.set_read_timeout(Some(WAIT)).unwrap();
    outside.write_all(b"hello").unwrap();
    let error = outside.read(&mut [0; 5]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    assert!(rig.count(WEST, "nat_orphan_reset") >= 1);
    assert_eq!(rig.count(WEST, "homes_taken_over"), 1);
    // New ones, both ways, by the same address.
    rig.clients[1].run(|| hello(rig.public(&machine, 0))).unwrap();
    assert_eq!(seen_from(&rig, &machine).ip(), public(EAST));
    let seen = inside.finish();
    let (sent, lost) = datagrams.finish(&received);
    // How long is the benchmark's business; a segment that was lost last is sent again when as much time
    // has passed again.
    eprintln!("served after {outage:?}, gap {:?}, {lost} of {sent} datagrams lost", seen.gap);
    assert_eq!(seen.sent, seen.answered);
    // It comes back: its home stays where it is, and it serves nothing.
    rig.cut_edge(EAST, false).unwrap();
    assert!(wait_for(WAIT, || rig.served_by(EAST, EAST) == Some(WEST)), "it does not give up");
    assert!(wait_for(WAIT, || rig.count(EAST, "homes_given_up") == 1));
    rig.clients[0].run(|| hello(rig.public(&machine, 0))).unwrap();
}

/// Idle connections, still usable.
struct Idle(Vec<TcpStream>);

impl Idle {
    fn open(count: usize, to: SocketAddr) -> Self {
        Self((0..count).map(|_| hello(to).unwrap()).collect())
    }

    /// Each of them answers still.
    fn check(&mut self) {
        for stream in &mut self.0 {
            stream.write_all(b"again").unwrap();
            let mut back = [0; 5];
            stream.read_exact(&mut back).unwrap();
            assert_eq!(&back, b"again");
        }
    }
}

#[test]
fn a_drain_hands_every_connection_over_there_and_back() {
    let mut rig = rig();
    let (first, received) = machine(&mut rig, 0, EAST);
    let (second, _) = machine(&mut rig, 1, EAST);
    let (third, _) = machine(&mut rig, 0, WEST);
    let (tcp, udp, heard) = server(&rig, 1);
    let machines = [&first, &second, &third];
    let inside = machines.map(|m| rig.clients[0].run(|| Echoes::start(rig.public(m, 0))));
    let outside = machines.map(|m| m.guest.run(|| Echoes::start(tcp)));
    let datagrams = rig.clients[0].run(|| Datagrams::start(rig.public(&first, 1)));
    let out = second.guest.run(|| Datagrams::start(udp));
    let mut idle = [
        rig.clients[0].run(|| Idle::open(50, rig.public(&second, 0))),
        first.guest.run(|| Idle::open(50, tcp)),
        // Of the same edge, by the public address.
        first.guest.run(|| Idle::open(10, rig.public(&second, 0))),
    ];
    rig.until_drainable(EAST).unwrap();
    let dry = rig.drain(EAST, &["--dry-run"]).unwrap();
    assert_eq!((dry.len(), dry[0].machines, dry[0].changed), (1, 2, false));
    assert!(dry[0].flows >= 114, "{dry:?}");
    assert_eq!(rig.served_by(EAST, EAST), Some(EAST));
    for (from, to) in [(EAST, WEST), (WEST, EAST)] {
        rig.until_drainable(from).unwrap();
        let drained = rig.drain(from, &["--home", "east"]).unwrap();
        eprintln!("{drained:?}");
        assert_eq!((drained.len(), drained[0].changed, drained[0].failed), (1, true, 0));
        assert!(drained[0].flows >= 114, "{drained:?}");
        rig.until_served(EAST, to).unwrap();
        for idle in &mut idle {
            idle.check();
        }
        // New ones, both ways, by the same address.
        rig.clients[1].run(|| hello(rig.public(&second, 0))).unwrap();
        assert_eq!(seen_from(&rig, &first).ip(), public(EAST));
        // Again: it is there already.
        let again = rig.drain(from, &["--home", "east"]).unwrap();
        assert_eq!((again.len(), again[0].changed), (1, false));
        inside.iter().chain(&outside).for_each(|echoes| echoes.wait(50));
    }
    let mut largest = Duration::ZERO;
    for echoes in inside.into_iter().chain(outside) {
        let seen = echoes.finish();
        assert_eq!(seen.sent, seen.answered);
        largest = largest.max(seen.gap);
    }
    let (sent, lost) = datagrams.finish(&received);
    let (sent_out, lost_out) = out.finish(&heard);
    eprintln!("gap {largest:?}; {lost} of {sent} datagrams lost in, {lost_out} of {sent_out} out");
    assert_eq!((lost, lost_out), (0, 0));
    for edge in [EAST, WEST] {
        assert_eq!(rig.count(edge, "nat_orphan_reset"), 0);
        assert_eq!(rig.count(edge, "homes_drained"), 1);
    }
}

/// Connections of a home that exist at its edge only, and do nothing.
fn invent(rig: &Edges, count: u32) {
    let flow = |n: u32| {
        let (client, port) = (IpAddr::from([198, 18, (n >> 8) as u8, n as u8]), 1024);
        let (seen, machine) = (public(EAST).into(), IpAddr::from([10, 77, 200, 1]));
        let end = |from, to, sport, dport| FlowTuple { from, to, sport, dport, zone: 0 };
        Flow {
            protocol: 17,
            original: end(client, seen, port, 9999),
            reply: end(machine, client, 9999, port),
            zone: 0,
            status: 6,
            timeout: 600,
            mark: 0,
            tcp: None,
        }
    };
    let flows: Vec<Flow> = (0..count).map(flow).collect();
    let done = rig.edge_space(EAST).run(|| conntrack::made(&flows)).unwrap();
    assert_eq!(done.failed, 0);
}

fn flows_at(rig: &Edges, edge: usize) -> usize {
    rig.edge_space(edge).run(|| conntrack::taken(&[public(EAST).into()])).unwrap().len()
}

/// Connections of any kind that an edge's kernel has: quickly said.
fn tracked_at(rig: &Edges, edge: usize) -> usize {
    let count = || std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
    rig.edge_space(edge).run(count).unwrap().trim().parse().unwrap()
}

#[test]
fn a_drain_that_fails_or_takes_too_long_is_undone_and_traffic_goes_on() {
    let mut rig = rig();
    let (machine, _) = machine(&mut rig, 0, EAST);
    let (tcp, _, _) = server(&rig, 1);
    let inside = rig.clients[0].run(|| Echoes::start(rig.public(&machine, 0)));
    let outside = machine.guest.run(|| Echoes::start(tcp));
    invent(&rig, 30_000);
    // It takes longer than it may.
    rig.until_drainable(EAST).unwrap();
    let error = rig.drain(EAST, &["--limit", "50ms"]).unwrap_err().to_string();
    assert!(error.contains("time given is over"), "{error}");
    assert!(wait_for(WAIT, || flows_at(&rig, WEST) == 0), "{} stay", flows_at(&rig, WEST));
    // The other edge dies in the middle: it takes no more as soon as it has taken some.
    rig.until_drainable(EAST).unwrap();
    let before = tracked_at(&rig, WEST);
    let error = thread::scope(|scope| {
        let draining = scope.spawn(|| rig.drain(EAST, &[]));
        assert!(wait_for(WAIT, || tracked_at(&rig, WEST) > before + 500), "nothing comes");
        rig.signal_edge(WEST, Signal::SIGSTOP).unwrap();
        let came = flows_at(&rig, WEST);
        assert!((1..30_000).contains(&came), "{came} are not some");
        rig.signal_edge(WEST, Signal::SIGKILL).unwrap();
        draining.join().unwrap().unwrap_err().to_string()
    });
    eprintln!("{error}");
    assert_eq!(rig.served_by(EAST, EAST), Some(EAST));
    for echoes in [&inside, &outside] {
        echoes.wait(100);
    }
    rig.kill_edge(WEST);
    rig.start_edge(WEST).unwrap();
    // What was left there is cleared away, and another try succeeds.
    assert!(wait_for(WAIT, || flows_at(&rig, WEST) == 0), "{} stay", flows_at(&rig, WEST));
    for host in [0, 1] {
        rig.connected(host, 2).unwrap();
    }
    rig.until_drainable(EAST).unwrap();
    let drained = rig.drain(EAST, &[]).unwrap();
    eprintln!("{drained:?}");
    assert!(drained[0].flows >= 30_002 && drained[0].failed == 0, "{drained:?}");
    for echoes in [inside, outside] {
        echoes.wait(100);
        let seen = echoes.finish();
        assert_eq!(seen.sent, seen.answered);
    }
}
