//! Real guests with IPv6, and of two tenants that have the same addresses. The edge of every stage
//! believes leases only, so these moves prove that too.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::rig::{CLIENT_V6, PUBLIC_V6, RigConfig};
use conduit::{
    AgentDataPath, NetworkId,
    lab::traffic::{Echoes, serve_echo},
};
use drafter::migrate::messages::Mode;
use e2e::{
    Stage,
    busy::sh,
    command::say,
    eventually,
    moves::{budgets, go, there_and_back},
};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

/// The guest's echo, from outside.
const PUBLIC: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(PUBLIC_V6), 7000);
const LIMIT: Duration = Duration::from_secs(60);

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
    eventually("the guest's echo answers over IPv6", LIMIT, reached);
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

#[test]
fn a_guest_is_given_an_address_and_a_name_keeps_both_on_its_way_and_gives_them_back() {
    // Two addresses, and what is returned rests for longer than this test.
    let edge_args = ["--pool", "10.77.9.4/30", "--quarantine", "1h"].map(Into::into).to_vec();
    let Some(mut stage) = Stage::with(RigConfig { edge_args, ..RigConfig::default() }) else {
        return;
    };
    let agents: Vec<_> =
        stage.fleet.rig().hosts().iter().map(|host| host.agent_socket.clone()).collect();
    let given = |host: usize, name: &str| {
        let agent = AgentDataPath::connect(&agents[host]).unwrap();
        agent.address(name, NetworkId::COMMON).map_err(|e| e.to_string())
    };
    let mut spec = stage.plain_spec("first");
    spec.on_agent = true;
    spec.ports = vec![(6379, 6379)];
    spec.extra_boot = vec!["--address".into(), "auto".into()];
    let (a, b) = stage.pair(&spec);
    let place = Stage::public(1);
    let (address, v6) = given(0, "first").unwrap();
    assert!(address.to_string().starts_with("10.77.9."), "{address}");
    let v6 = v6.expect("this edge leads IPv6");
    assert!(redis(&stage, place, "SET who first").contains("OK"));
    let keeps = |stage: &Stage, at, host: usize| {
        assert!(redis(stage, place, "GET who").contains("first"));
        assert_eq!(given(host, "first"), Ok((address, Some(v6))));
        let guest = stage.fleet.runner(at);
        let routes = sh(guest, "cat /proc/net/fib_trie");
        assert!(routes.contains(&address.to_string()), "{routes}");
        let digits = v6.octets().map(|byte| format!("{byte:02x}")).concat();
        let addresses = sh(guest, "cat /proc/net/if_inet6");
        assert!(addresses.contains(&digits), "{v6}: {addresses}");
        // By its name, which the edge answers, and not by a file in the guest.
        let name = "first.machine.internal";
        assert!(!sh(guest, "cat /etc/hosts").contains(name));
        eventually("the guest finds itself by its name", LIMIT, || {
            guest.exec(&["redis-cli", "-h", name, "get", "who"], LIMIT).unwrap().1.trim() == "first"
        });
    };
    keeps(&stage, a, 0);
    go(&stage.fleet, a, b, Mode::Hybrid, budgets());
    keeps(&stage, b, 1);

    // The pool's other address is one machine's, whoever asks; a third gets none.
    let other = given(1, "second").unwrap();
    assert_eq!(given(0, "second"), Ok(other));
    assert_ne!(other.0, address);
    let none = given(0, "third").unwrap_err();
    assert!(none.contains("all 2 addresses") && none.contains("0 of them"), "{none}");

    // What stops keeps its address; what is removed gives it back, and its port. It rests, for all but
    // the one who had it.
    let known = |stage: &Stage| {
        let edge = conduit::status(&stage.fleet.rig().edge_socket()).unwrap();
        edge.machines.iter().any(|m| m.net.machine == "first")
    };
    let on = |stage: &Stage, host, words: &[&str]| say(stage.drafter(host).args(words), LIMIT * 3);
    on(&stage, 1, &["stop", "first"]).succeeds();
    eventually("its runner has ended", LIMIT, || stage.fleet.runner(b).status().is_err());
    assert!(known(&stage));
    eventually("it is removed", LIMIT, || on(&stage, 1, &["remove", "first"]).code == Some(0));
    eventually("the edge has heard that it is gone", LIMIT, || !known(&stage));
    let none = given(0, "third").unwrap_err();
    assert!(none.contains("1 of them"), "{none}");
    assert_eq!(given(0, "first").unwrap().0, address);
}
