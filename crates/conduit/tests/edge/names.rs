//! Machines find each other by name, at their gateway, wherever they are.

use crate::rig::{LIMIT, Machine, Rig, SILENCE, net, translated};
use conduit::{edge::EdgeOptions, lab::wait_for, tap::GATEWAY};
use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::TXT},
};
use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const SERVER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(GATEWAY), 53);

fn question(name: &str, kind: RecordType, id: u16) -> Vec<u8> {
    let mut asked = Message::new(id, MessageType::Query, OpCode::Query);
    asked.metadata.recursion_desired = true;
    asked.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    asked.to_vec().unwrap()
}

/// Asks by UDP as resolvers do: again and again, until an answer to this question has come.
fn ask(socket: &UdpSocket, name: &str, kind: RecordType) -> Message {
    let (deadline, id) = (Instant::now() + LIMIT, name.len() as u16 * 7);
    let mut bytes = [0; 4096];
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    while Instant::now() < deadline {
        // There is no route for a moment perhaps.
        let _ = socket.send_to(&question(name, kind, id), SERVER);
        let Ok((size, from)) = socket.recv_from(&mut bytes) else { continue };
        assert_eq!(from, SERVER);
        let said = Message::from_vec(&bytes[..size]).unwrap();
        if said.metadata.id == id && said.metadata.response_code != ResponseCode::ServFail {
            return said;
        }
    }
    panic!("{name} {kind} is not answered");
}

fn ask_by_tcp(machine: &Machine, name: &str, kind: RecordType) -> Message {
    let deadline = Instant::now() + LIMIT;
    let connected = machine.guest.run(|| {
        loop {
            match TcpStream::connect_timeout(&SERVER, LIMIT) {
                Ok(stream) => return stream,
                // Its host listens a moment after it has come.
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    let (mut stream, asked) = (connected, question(name, kind, 5));
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let size = u16::try_from(asked.len()).unwrap().to_be_bytes();
    stream.write_all(&[size.as_slice(), &asked].concat()).unwrap();
    let mut size = [0; 2];
    stream.read_exact(&mut size).unwrap();
    let mut bytes = vec![0; usize::from(u16::from_be_bytes(size))];
    stream.read_exact(&mut bytes).unwrap();
    Message::from_vec(&bytes).unwrap()
}

fn data(said: &Message) -> Vec<String> {
    said.answers.iter().map(|r| r.data.to_string()).collect()
}

fn resolver(machine: &Machine) -> UdpSocket {
    machine.guest.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap()
}

#[test]
fn machines_find_those_of_their_own_network_by_name_on_each_host_and_during_a_move() {
    let rig = Rig::new(&translated());
    let mut web = rig.boot(net("web", 7, 5), 0);
    let _db = rig.boot(net("db", 7, 6), 1);
    // Another tenant's machines: the same address on the same host, and the same name.
    let twin = rig.boot(net("twin", 9, 5), 0);
    let _other_db = rig.boot(net("db", 9, 7), 0);
    let (socket, other) = (resolver(&web), resolver(&twin));
    let one = |text: &str| vec![text.to_owned()];
    let check = |web: &Machine| {
        use RecordType as R;
        assert_eq!(data(&ask(&socket, "db.machine.internal.", R::A)), one("10.77.0.6"));
        assert_eq!(data(&ask(&socket, "db.machine.internal.", R::AAAA)), one("fd77::6"));
        let reverse = "6.0.77.10.in-addr.arpa.";
        assert_eq!(data(&ask(&socket, reverse, R::PTR)), one("db.machine.internal."));
        assert_eq!(data(&ask(&other, "db.machine.internal.", R::A)), one("10.77.0.7"));
        let foreign = ask(&other, "web.machine.internal.", R::A);
        assert_eq!(foreign.metadata.response_code, ResponseCode::NXDomain);
        let outside = ask(&socket, "example.org.", R::A);
        assert_eq!(outside.metadata.response_code, ResponseCode::Refused);
        assert_eq!(data(&ask_by_tcp(web, "db.machine.internal.", R::A)), one("10.77.0.6"));
    };
    check(&web);
    assert_eq!(data(&ask_by_tcp(&twin, "db.machine.internal.", RecordType::A)), one("10.77.0.7"));
    let ended = Arc::new(AtomicBool::new(false));
    let asked = Arc::new(AtomicU64::new(0));
    let asking = {
        let (ended, asked, socket) = (ended.clone(), asked.clone(), resolver(&web));
        thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let said = ask(&socket, "db.machine.internal.", RecordType::A);
                assert_eq!(data(&said), ["10.77.0.6"]);
                asked.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(10));
            }
        })
    };
    for _ in 0..2 {
        rig.move_machine(&mut web, Duration::from_millis(100));
        check(&web);
    }
    assert!(wait_for(LIMIT, || asked.load(Ordering::Relaxed) > 10), "nobody is answered");
    ended.store(true, Ordering::Relaxed);
    asking.join().unwrap();
}

/// A name server for everything: one short text by UDP, and a long one that has to be asked for by TCP.
fn serve_texts(rig: &Rig, at: SocketAddr) {
    let answer = |bytes: &[u8], stream: bool| {
        let asked = Message::from_vec(bytes).unwrap();
        let mut said = Message::response(asked.metadata.id, OpCode::Query);
        let name = asked.queries[0].name.clone();
        said.add_query(asked.queries[0].clone());
        let long = name.to_ascii().starts_with("long.");
        for _ in 0..if long && stream { 40 } else { 1 } {
            let text = TXT::new(vec!["a".repeat(if long { 200 } else { 20 })]);
            said.add_answer(Record::from_rdata(name.clone(), 60, RData::TXT(text)));
        }
        said.metadata.recursion_available = true;
        said.metadata.truncation = long && !stream;
        said.to_vec().unwrap()
    };
    let udp = rig.router.run(|| UdpSocket::bind(at)).unwrap();
    let tcp = rig.router.run(|| TcpListener::bind(at)).unwrap();
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok((size, from)) = udp.recv_from(&mut bytes) {
            udp.send_to(&answer(&bytes[..size], false), from).unwrap();
        }
    });
    thread::spawn(move || {
        for stream in tcp.incoming() {
            let (mut stream, mut size) = (stream.unwrap(), [0; 2]);
            stream.read_exact(&mut size).unwrap();
            let mut bytes = vec![0; usize::from(u16::from_be_bytes(size))];
            stream.read_exact(&mut bytes).unwrap();
            let said = answer(&bytes, true);
            let size = u16::try_from(said.len()).unwrap().to_be_bytes();
            stream.write_all(&[size.as_slice(), &said].concat()).unwrap();
        }
    });
}

#[test]
fn other_names_are_asked_of_the_edges_name_servers_and_long_answers_come_by_tcp() {
    let server: SocketAddr = "203.0.113.254:53".parse().unwrap();
    // The first one is silent.
    let silent = "203.0.113.253:53".parse().unwrap();
    let rig = Rig::new(&EdgeOptions { name_servers: vec![silent, server], ..translated() });
    serve_texts(&rig, server);
    let machine = rig.boot(net("asks", 7, 5), 0);
    let socket = resolver(&machine);
    let short = ask(&socket, "short.example.org.", RecordType::TXT);
    assert_eq!(data(&short), ["a".repeat(20)]);
    assert!(short.metadata.recursion_available && !short.metadata.truncation);
    let long = ask(&socket, "long.example.org.", RecordType::TXT);
    assert!(long.metadata.truncation);
    let long = ask_by_tcp(&machine, "long.example.org.", RecordType::TXT);
    assert_eq!(long.answers.len(), 40);
}
