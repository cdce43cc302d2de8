//! Real guests with IPv6, and of two tenants that have the same addresses. The edge of every stage
//! believes leases only, so these moves prove that too.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::rig::{CLIENT_V6, PUBLIC_V6};
use conduit::lab::traffic::{Echoes, serve_echo};
use drafter::migrate::messages::Mode;
use e2e::{
    Stage,
    busy::sh,
    moves::{budgets, go, there_and_back},
};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

/// The guest's echo, from outside.
const PUBLIC: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(PUBLIC_V6), 7000);
const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_guests_ipv6_connections_inwards_and_outwards_keep_through_moves() {
    let Some(mut stage) = Stage::open() else { return };
    let mut spec = stage.spec("redis", 1);
    spec.address_v6 = "fd77::1".parse().ok();
    spec.ports.push((7000, 7000));
    let (a, b) = stage.pair(&spec);
    let client = stage.fleet.rig().client().clone();
    // Outwards: the guest's own connection, to an echo at the client.
    let to = SocketAddr::from((CLIENT_V6, 7008));
    let listener = client.run(|| TcpListener::bind(to)).unwrap().unwrap();
    serve_echo(listener);
    let guest = stage.fleet.runner(a);
    sh(guest, &format!("oracle outbound --background --to {to}"));
    // Inwards: a client of the guest's echo.
    sh(guest, "oracle echo --listen [::]:7000 </dev/null >/dev/null 2>&1 &");
    let reached = || client.run(|| TcpStream::connect_timeout(&PUBLIC, LIMIT)).unwrap().is_ok();
    e2e::eventually("the guest's echo answers over IPv6", LIMIT, reached);
    let echoes = client.run(|| Echoes::start(PUBLIC)).unwrap();
    echoes.wait(50);
    let (end, _) = there_and_back(&stage.fleet, (a, b), 4, Mode::Hybrid, budgets());
    echoes.wait(50);
    let seen = echoes.finish();
    assert_eq!(seen.sent, seen.answered, "{seen:?}");
    eprintln!("{} echoes over IPv6, longest silence {:?}", seen.answered, seen.gap);
    let out = sh(stage.fleet.runner(end), "oracle status --socket /run/oracle-outbound.sock");
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    let count = |name: &str| report[name].as_u64().unwrap();
    assert_eq!((count("resets"), count("wrong")), (0, 0), "{out}");
    assert!(count("echoed") > 10, "{out}");
}

/// Sends one command to a Redis and returns its answer.
fn redis(stage: &Stage, at: SocketAddr, command: &str) -> String {
    let client = stage.fleet.rig().client();
    let mut stream = client.run(|| TcpStream::connect_timeout(&at, LIMIT)).unwrap().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(format!("{command}\r\n").as_bytes()).unwrap();
    let mut answer = [0; 256];
    let size = stream.read(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..size]).into_owned()
}

#[test]
fn two_tenants_guests_have_the_same_address_on_the_same_hosts_and_move() {
    let Some(mut stage) = Stage::open() else { return };
    let mut pairs = Vec::new();
    for (name, network, number) in [("seven", 7, 1), ("nine", 9, 2)] {
        let mut spec = stage.spec(name, number);
        spec.address = Some([10, 77, 0, 1].into());
        spec.extra_boot = vec!["--network-id".into(), format!("{network}")];
        pairs.push(stage.pair(&spec));
    }
    let places = [Stage::public(1), Stage::public(2)];
    for (at, name) in places.iter().zip(["seven", "nine"]) {
        assert!(redis(&stage, *at, &format!("SET who {name}")).contains("OK"));
    }
    let keep = |stage: &Stage| {
        for (at, name) in places.iter().zip(["seven", "nine"]) {
            let answer = redis(stage, *at, "GET who");
            assert!(answer.contains(name), "{at} is {name}'s, and said {answer}");
        }
    };
    keep(&stage);
    for (from, to) in pairs {
        go(&stage.fleet, from, to, Mode::Hybrid, budgets());
        keep(&stage);
    }
}
