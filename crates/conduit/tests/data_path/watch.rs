//! Looking on: flows and traces, and that they end.

use crate::rig::{CLIENT, MACHINE, PORT, Rig, eventually, heard, key};
use conduit::tunnel::NETWORK;
use conduit_bpf::{At, Error, Event, Filter, Flow, Seen, View};
use std::{
    io::{BufRead, BufReader},
    net::{IpAddr, SocketAddr, UdpSocket},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

const SOON: Duration = Duration::from_secs(20);

fn view(rig: &Rig, node: usize) -> View {
    rig.nodes()[node].plane().view().unwrap()
}

/// A datagram each way between client and machine.
fn exchange(rig: &Rig, ear: &UdpSocket, text: &str) -> SocketAddr {
    let socket = rig.client.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket.send_to(text.as_bytes(), (MACHINE, PORT)).unwrap();
    let (_, from) = heard(ear).unwrap();
    ear.send_to(b"answer", from).unwrap();
    socket.recv(&mut [0; 16]).unwrap();
    let port = socket.local_addr().unwrap().port();
    SocketAddr::from((CLIENT, port))
}

fn of(flows: &[Flow], from: SocketAddr, to: SocketAddr) -> Option<&Flow> {
    flows.iter().find(|f| f.from == from && f.to == to)
}

#[test]
fn flows_are_counted_in_both_directions_while_somebody_looks_on_and_only_then() {
    let rig = Rig::new();
    rig.place(0, 1);
    let ear = rig.listen(0);
    exchange(&rig, &ear, "nobody looks");
    let machine = SocketAddr::from((MACHINE, PORT));
    for (node, out, back) in [(0, At::Tunnel, At::Stack), (1, At::Tap, At::Tunnel)] {
        let flows = view(&rig, node).flows().unwrap();
        assert!(flows.read().unwrap().is_empty(), "what came before is not counted");
        let client = exchange(&rig, &ear, "sixteen letters.");
        let found = flows.read().unwrap();
        let to = of(&found, client, machine).unwrap();
        // Ethernet, IPv4, UDP and the letters.
        assert_eq!((to.packets, to.bytes, to.at, to.net), (1, 14 + 20 + 8 + 16, back, NETWORK));
        let from = of(&found, machine, client).unwrap();
        assert_eq!((from.packets, from.protocol, from.at), (1, 17, out));
        // A second one sees the same; the last one who leaves empties the map.
        let second = view(&rig, node).flows().unwrap();
        drop(flows);
        assert!(of(&second.read().unwrap(), client, machine).is_some());
        drop(second);
        exchange(&rig, &ear, "nobody looks");
        let again = view(&rig, node).flows().unwrap();
        assert!(again.read().unwrap().is_empty(), "nothing was counted while nobody looked on");
    }
}

#[test]
fn frames_that_end_are_counted_apart() {
    let rig = Rig::new();
    rig.place(0, 1);
    // The guest knows its gateway: a question for it in another's name would end here too.
    exchange(&rig, &rig.listen(0), "x");
    let flows = view(&rig, 1).flows().unwrap();
    let liar = rig.guests[0].run(|| {
        conduit::exec::run("ip", &["address", "add", "10.77.0.66/32", "dev", "eth0"], "").unwrap();
        UdpSocket::bind("10.77.0.66:5").unwrap()
    });
    liar.send_to(b"I am another", (CLIENT, PORT)).unwrap();
    let dropped = |flows: &[Flow]| flows.iter().find(|f| f.from.port() == 5).map(|f| f.dropped);
    eventually("it is counted", || dropped(&flows.read().unwrap()) == Some(1));
    let found = flows.read().unwrap();
    let flow = found.iter().find(|f| f.from.port() == 5).unwrap();
    assert_eq!((flow.packets, flow.bytes), (0, 0), "it moved nothing");
}

/// Everything that a trace tells until it is silent for a moment.
fn told(trace: &mut conduit_bpf::Trace) -> Vec<Seen> {
    let mut all = Vec::new();
    while let Some(seen) = trace.next(Duration::from_millis(300)).unwrap() {
        all.push(seen);
    }
    all
}

#[test]
fn a_frame_has_the_same_hash_at_edge_and_host_and_each_program_says_what_it_decided() {
    let rig = Rig::new();
    rig.place(0, 7);
    let ear = rig.listen(0);
    let port = Some(PORT);
    let filter = Filter { address: Some(MACHINE.into()), port, ..Filter::default() };
    let mut at_edge = view(&rig, 0).trace(filter).unwrap();
    let mut at_host = view(&rig, 1).trace(filter).unwrap();
    let client = exchange(&rig, &ear, "followed");
    let machine = SocketAddr::from((MACHINE, PORT));
    let (edge, host) = (told(&mut at_edge), told(&mut at_host));
    let way = |all: &[Seen], from| -> Seen {
        let mut of_it = all.iter().filter(|s| s.from == from);
        let first = *of_it.next().unwrap();
        assert!(of_it.next().is_none(), "told once: {all:?}");
        first
    };
    let (there, arrived) = (way(&edge, client), way(&host, client));
    assert_eq!((there.place, there.event), (At::Stack, Some(Event::ToTunnel)));
    assert_eq!((arrived.place, arrived.event), (At::Tunnel, Some(Event::ToTap)));
    assert_eq!(there.hash, arrived.hash, "it is the same frame");
    assert_eq!((arrived.to, arrived.protocol, arrived.net), (machine, 17, NETWORK));
    let owner = rig.hosts[0].this;
    assert_eq!(there.entry, Some(("remote", 7, owner)));
    assert_eq!(arrived.entry, Some(("local", 7, owner)));
    let (left, passed) = (way(&host, machine), way(&edge, machine));
    assert_eq!((left.place, left.event), (At::Tap, Some(Event::ToTunnel)));
    assert_eq!((passed.place, passed.event), (At::Tunnel, Some(Event::ToStack)));
    assert_eq!(left.hash, passed.hash);
    assert_ne!(left.hash, there.hash, "the answer is another frame");
}

#[test]
fn a_filter_leaves_out_what_it_was_not_asked_for() {
    let rig = Rig::new();
    rig.place(0, 1);
    let ear = rig.listen(0);
    let ask = |filter: Filter| {
        let mut trace = view(&rig, 1).trace(filter).unwrap();
        exchange(&rig, &ear, "x");
        told(&mut trace).iter().filter(|s| s.from.port() == PORT || s.to.port() == PORT).count()
    };
    let any = Filter::default();
    assert_eq!(ask(any), 2);
    assert_eq!(ask(Filter { port: Some(PORT), ..any }), 2);
    assert_eq!(ask(Filter { port: Some(PORT + 1), ..any }), 0);
    assert_eq!(ask(Filter { address: Some(CLIENT.into()), ..any }), 2);
    assert_eq!(ask(Filter { address: Some(IpAddr::from([10, 77, 0, 6])), ..any }), 0);
    assert_eq!(ask(Filter { protocol: Some(6), ..any }), 0);
    assert_eq!(ask(Filter { protocol: Some(17), net: Some(NETWORK), ..any }), 2);
    assert_eq!(ask(Filter { net: Some(NETWORK + 1), ..any }), 0);
    assert_eq!(ask(Filter { drops: true, ..any }), 0);
}

#[test]
fn a_trace_of_drops_names_the_reason() {
    let rig = Rig::new();
    rig.place(0, 1);
    let mut trace = view(&rig, 1).trace(Filter { drops: true, ..Filter::default() }).unwrap();
    let socket = rig.client.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    // The edge leads there what the host does not have any more.
    rig.hosts[0].plane().remove_entry(key()).unwrap();
    socket.send_to(b"to nobody", (MACHINE, PORT)).unwrap();
    let seen = trace.next(SOON).unwrap().unwrap();
    assert_eq!(seen.event, Some(Event::UnknownMachine));
    assert_eq!((seen.to, seen.entry), (SocketAddr::from((MACHINE, PORT)), None));
}

#[test]
fn there_is_one_trace_at_a_time_and_the_next_does_not_see_what_was_left() {
    let rig = Rig::new();
    rig.place(0, 1);
    let ear = rig.listen(0);
    let filter = Filter { port: Some(PORT), ..Filter::default() };
    let first = view(&rig, 1).trace(filter).unwrap();
    let second = view(&rig, 1).trace(filter).err().unwrap();
    assert!(matches!(second, Error::Traced { .. }), "{second}");
    exchange(&rig, &ear, "told to nobody");
    drop(first);
    let mut next = view(&rig, 1).trace(filter).unwrap();
    assert_eq!(next.next(Duration::from_millis(200)).unwrap(), None);
}

/// A command of conduit's at host a, and the lines that it prints.
fn command(rig: &Rig, args: &[&str]) -> (Child, mpsc::Receiver<String>) {
    let mut child = rig.hosts[0].space.run(|| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_conduit"));
        command.args(args).stdout(Stdio::piped()).spawn().unwrap()
    });
    let out = BufReader::new(child.stdout.take().unwrap());
    let (send, lines) = mpsc::channel();
    thread::spawn(move || out.lines().map_while(Result::ok).all(|line| send.send(line).is_ok()));
    (child, lines)
}

#[test]
fn one_who_was_killed_looks_on_no_longer_after_a_moment() {
    let rig = Rig::new();
    rig.place(0, 1);
    let ear = rig.listen(0);
    let view = view(&rig, 1);
    let (mut child, lines) = command(&rig, &["flows", "--watch", "--json"]);
    let mut line = String::new();
    eventually("it shows the flow", || {
        exchange(&rig, &ear, "x");
        line = lines.try_recv().unwrap_or_default();
        line.contains(&format!("\"address\":\"{MACHINE}:{PORT}\""))
    });
    let shown: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(shown["protocol"], "udp");
    assert!(shown["to_machine"]["bits"].as_f64().unwrap() > 0.0, "{line}");
    child.kill().unwrap();
    child.wait().unwrap();
    let start = Instant::now();
    eventually("its time is over", || {
        view.expire().unwrap();
        start.elapsed() > Duration::from_millis(3500)
    });
    exchange(&rig, &ear, "not counted");
    let again = view.flows().unwrap();
    assert!(again.read().unwrap().is_empty(), "what it had counted is gone, and no more came");
}

#[test]
fn the_command_tells_the_frames_of_one_port_and_ends_after_as_many_as_were_asked_for() {
    let rig = Rig::new();
    rig.place(0, 3);
    let ear = rig.listen(0);
    let port = PORT.to_string();
    let args = ["trace", "--port", &port, "--protocol", "udp", "--count", "2", "--seconds", "20"];
    let (mut child, lines) = command(&rig, &args);
    let mut told = Vec::new();
    eventually("two frames are told", || {
        exchange(&rig, &ear, "x");
        told.extend(lines.try_recv());
        told.len() == 2
    });
    assert!(child.wait().unwrap().success());
    let there = told.iter().find(|l| l.contains("cd_decap")).unwrap();
    let way = format!("→ {MACHINE}:{PORT} 43 bytes, cd_decap at cd-tunnel: to_tap");
    assert!(there.contains(&way) && there.contains("local at epoch 3"), "{there}");
    let back = told.iter().find(|l| l.contains("cd_tap")).unwrap();
    assert!(back.contains("cd_tap at tap0: to_tunnel"), "{back}");
}
