//! Several edges whose packets to each other and to hosts are encrypted (in user space). Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use conduit::lab::{
    edges::{Edges, Machine, client, public},
    sniff::SECRET,
    traffic::{Datagrams, Echoes, Received, serve_echo},
    wait_for,
};
use conduit_wg::{Ask, PublicKey};
use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

const WAIT: Duration = Duration::from_secs(30);
const EAST: usize = 0;
const WEST: usize = 1;
/// The tunnel's UDP port.
const TUNNEL: u16 = 7451;

fn rig() -> Edges {
    Edges::encrypted(Path::new(env!("CARGO_BIN_EXE_conduit"))).unwrap()
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
fn server(rig: &Edges) -> (SocketAddr, SocketAddr, Received) {
    let (listener, socket) = rig.clients[1].run(|| {
        (TcpListener::bind("0.0.0.0:443").unwrap(), UdpSocket::bind("0.0.0.0:53").unwrap())
    });
    serve_echo(listener);
    ((client(1), 443).into(), (client(1), 53).into(), Received::collect(socket))
}

/// Says the secret again and again through an echo, until it is told to stop: everything that crosses
/// the network of hosts and edges has it inside.
struct Whisper {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<u64>>,
}

impl Whisper {
    /// Connects in the calling thread's namespace.
    fn start(to: SocketAddr) -> Self {
        let mut stream = TcpStream::connect_timeout(&to, WAIT).unwrap();
        stream.set_read_timeout(Some(WAIT)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = thread::spawn(move || {
            let (mut said, mut back) = (0, [0; SECRET.len()]);
            while !stopping.load(Ordering::Relaxed) {
                stream.write_all(SECRET)?;
                stream.read_exact(&mut back)?;
                assert_eq!(&back, SECRET);
                said += 1;
            }
            Ok(said)
        });
        Self { stop, thread }
    }

    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap()
    }
}

/// Does what may be refused while a computer has too much to do, and is undone then: until it is done.
fn insist<T>(what: &str, mut done: impl FnMut() -> Result<T, String>) -> T {
    let (mut last, mut result) = (String::new(), None);
    wait_for(WAIT * 3, || {
        match done() {
            Ok(value) => result = Some(value),
            Err(error) => last = error,
        }
        result.is_some()
    });
    result.unwrap_or_else(|| panic!("{what}: {last}"))
}

fn rotate(rig: &Edges, name: &str) {
    let before = keys(rig, name);
    insist("change keys", || {
        // It may have been done, and the answer came too late.
        if keys(rig, name) != before {
            return Ok(());
        }
        conduit_wg::tell(&rig.tunnel_socket(name), &Ask::Rotate).map_err(|e| e.to_string())
    });
}

fn drain(rig: &Edges, from: usize, to: usize) {
    insist("drain", || rig.drain(from, &["--home", "east"]).map_err(|e| e.to_string()));
    assert!(wait_for(WAIT, || rig.served_by(EAST, to) == Some(to)), "it is not served there");
}

fn keys(rig: &Edges, name: &str) -> Vec<PublicKey> {
    conduit_wg::status(&rig.tunnel_socket(name)).map(|s| s.keys).unwrap_or_default()
}

/// Waits until every tunnel has sessions with all others, each by the newest keys of both.
fn until_all_speak(rig: &Edges) {
    let speaks = |name: &str| {
        let Ok(status) = conduit_wg::status(&rig.tunnel_socket(name)) else { return false };
        let own = status.keys.first().copied();
        status.peers.len() == 3 && status.peers.iter().all(|p| p.key.is_some() && p.own == own)
    };
    let all = || Edges::names().all(speaks);
    let told = || {
        let status = |name| conduit_wg::status(&rig.tunnel_socket(name)).map(|s| (s.keys, s.peers));
        Edges::names().map(|name| format!("{name}: {:?}", status(name))).collect::<Vec<_>>()
    };
    assert!(wait_for(WAIT, all), "{:#?}", told());
}

/// What tunnels and edges have counted: where frames went that did not arrive.
fn counted(rig: &Edges) -> String {
    let tunnels = Edges::names().map(|name| {
        let status = conduit_wg::status(&rig.tunnel_socket(name));
        format!("{name}: {:?}", status.map(|s| (s.counts, s.peers)))
    });
    let edges = [EAST, WEST].map(|edge| {
        let status = rig.status(edge);
        format!("edge {edge}: {:?}", status.map(|s| (s.counts, s.homes, s.machines)))
    });
    tunnels.chain(edges).collect::<Vec<_>>().join("\n")
}

/// Nothing of what machines said could be read between hosts and edges, and nothing but the tunnel's
/// packets went there by UDP; what clients see could be, so the ears were open.
fn nothing_was_readable(
    inside: conduit::lab::sniff::Sniffer,
    outside: conduit::lab::sniff::Sniffer,
) {
    let (inside, outside) = (inside.finish().unwrap(), outside.finish().unwrap());
    assert!(outside.readable > 100, "{outside:?}");
    assert_eq!(inside.readable, 0, "{inside:?}");
    assert!(inside.udp.get(&TUNNEL).is_some_and(|&n| n > 100), "{inside:?}");
    assert_eq!(inside.udp.keys().collect::<Vec<_>>(), [&TUNNEL], "{inside:?}");
}

#[test]
fn encrypted_edges_drain_and_machines_move_while_keys_and_processes_change() {
    let mut rig = rig();
    let (mut first, received) = machine(&mut rig, 0, EAST);
    let (second, _) = machine(&mut rig, 1, WEST);
    let (tcp, udp, heard) = server(&rig);
    until_all_speak(&rig);
    let ears = (rig.sniff(false).unwrap(), rig.sniff(true).unwrap());
    let machines = [&first, &second];
    let inside = machines.map(|m| rig.clients[0].run(|| Echoes::start(rig.public(m, 0))));
    let outside = machines.map(|m| m.guest.run(|| Echoes::start(tcp)));
    let whisper = first.guest.run(|| Whisper::start(tcp));
    let datagrams = rig.clients[0].run(|| Datagrams::start(rig.public(&first, 1)));
    let out = first.guest.run(|| Datagrams::start(udp));
    let goes_on = |rig: &Edges| {
        inside.iter().chain(&outside).for_each(|echoes| echoes.wait_or(50, || counted(rig)));
    };
    rig.move_machine(&mut first).unwrap();
    goes_on(&rig);

    // Everybody's keys, edges' included.
    let before: Vec<_> = Edges::names().map(|name| keys(&rig, name)).collect();
    Edges::names().for_each(|name| rotate(&rig, name));
    let changed = || {
        Edges::names().zip(&before).all(|(name, before)| {
            let now = keys(&rig, name);
            now.len() == 1 && now != *before
        })
    };
    assert!(wait_for(WAIT, changed), "an old key stays");
    until_all_speak(&rig);
    goes_on(&rig);

    // The processes of tunnels, by hand-over; the old one of each has ended when the new one serves.
    for name in Edges::names() {
        rig.upgrade_tunnel(name).unwrap();
        goes_on(&rig);
    }
    rig.move_machine(&mut first).unwrap();
    goes_on(&rig);

    // A host whose agent is away hears of no drain: what its machine says goes to the old edge, which
    // sends it on to the other one.
    rig.kill_agent(first.at);
    drain(&rig, EAST, WEST);
    goes_on(&rig);
    assert!(rig.count(EAST, "to_other_edge") > 0);
    rig.start_agent(first.at, 2).unwrap();
    rig.until_served(EAST, WEST).unwrap();
    goes_on(&rig);
    drain(&rig, WEST, EAST);
    rig.until_served(EAST, EAST).unwrap();
    goes_on(&rig);

    assert!(whisper.finish() > 100);
    for echoes in inside.into_iter().chain(outside) {
        let seen = echoes.finish();
        assert_eq!(seen.sent, seen.answered);
    }
    let ((sent, lost), (sent_out, lost_out)) = (datagrams.finish(&received), out.finish(&heard));
    eprintln!("{lost} of {sent} datagrams lost in, {lost_out} of {sent_out} out");
    assert_eq!(lost, 0);
    // On a computer with too much to do, a host may speak for a machine before an edge has heard that it
    // was prepared for it: that is not believed, and counted.
    let unheard = rig.count(EAST, "not_owner") + rig.count(WEST, "not_owner");
    assert!(lost_out <= unheard, "{lost_out} lost, {unheard} counted");
    for edge in [EAST, WEST] {
        assert_eq!(rig.count(edge, "nat_orphan_reset"), 0);
        let protection = rig.status(edge).unwrap().protection;
        assert!(protection.contains("user space"), "{protection}");
    }
    nothing_was_readable(ears.0, ears.1);
}

#[test]
fn after_an_encrypted_edge_has_died_another_serves_its_machines() {
    let mut rig = rig();
    let (machine, _) = machine(&mut rig, 0, EAST);
    let (tcp, _, _) = server(&rig);
    until_all_speak(&rig);
    let ears = (rig.sniff(false).unwrap(), rig.sniff(true).unwrap());
    let inside = rig.clients[0].run(|| Echoes::start(rig.public(&machine, 0)));
    let whisper = rig.clients[0].run(|| Whisper::start(rig.public(&machine, 0)));
    let mut outside = machine.guest.run(|| TcpStream::connect_timeout(&tcp, WAIT).unwrap());
    inside.wait(50);
    let outage = Instant::now();
    rig.cut_edge(EAST, true).unwrap();
    rig.until_served(EAST, WEST).unwrap();
    let outage = outage.elapsed();
    inside.wait_or(100, || format!("served again after {outage:?}\n{}", counted(&rig)));
    // Its translation went with the edge: it ends, and does not hang.
    outside.set_read_timeout(Some(WAIT)).unwrap();
    outside.write_all(SECRET).unwrap();
    let error = outside.read(&mut [0; 5]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    // An agent that begins now hears one edge alone, and knows the other's keys by it.
    rig.kill_agent(0);
    rig.start_agent(0, 1).unwrap();
    inside.wait_or(50, || counted(&rig));
    let ends = conduit_wg::status(&rig.tunnel_socket("a")).unwrap().peers;
    assert_eq!(ends.len(), 3, "{ends:?}");
    // The edge comes back, with other keys.
    let before = keys(&rig, "east");
    rotate(&rig, "east");
    rig.cut_edge(EAST, false).unwrap();
    assert!(wait_for(WAIT, || rig.served_by(EAST, EAST) == Some(WEST)), "it does not give up");
    rig.connected(0, 2).unwrap();
    let alone = || {
        let now = keys(&rig, "east");
        now.len() == 1 && now != before
    };
    assert!(wait_for(WAIT, alone), "{:?}", keys(&rig, "east"));
    until_all_speak(&rig);
    inside.wait_or(50, || counted(&rig));
    assert!(whisper.finish() > 100);
    let seen = inside.finish();
    eprintln!("served again after {outage:?}, gap {:?}", seen.gap);
    assert_eq!(seen.sent, seen.answered);
    assert_eq!(public(EAST), public(machine.home));
    nothing_was_readable(ears.0, ears.1);
}
