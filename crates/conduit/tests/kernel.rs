//! Against the kernel, each test in a nameless network namespace of its own. Needs root.

use conduit::{
    DataPath, LocalDataPath, MachineNet, PathChoice,
    agent::{Agent, AgentConfig},
    edge::{Edge, EdgeConfig, EdgeOptions},
    exec,
    holder::{HoldSettings, Limits},
    netlink::{Netlink, NextHop, Route, Rule, interface_index},
    secure::SecureConfig,
    tap,
    wire::Peer,
};
use identity::{HostName, Security};
use nix::sched::{CloneFlags, unshare};
use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Runs a test on a thread in a network namespace that nobody else has.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let run = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests make namespaces: run them as root");
        ip("link set dev lo up\n");
        test();
    });
    if let Err(panic) = run.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(script: &str) {
    exec::run("ip", &["-batch", "-"], script).expect("the kernel takes what the test sets up");
}

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);

fn net() -> MachineNet {
    MachineNet::new("m", ADDRESS, [2, 0, 0, 0, 0, 5], 1400)
}

fn hold() -> HoldSettings {
    HoldSettings::of(Path::new(env!("CARGO_BIN_EXE_conduit")), Limits::default())
}

fn edge_config(folder: &Path, path: PathChoice, pins: &Path) -> EdgeConfig {
    let underlay = Ipv4Addr::new(10, 88, 0, 1);
    EdgeConfig {
        public: underlay,
        this: Peer { overlay: Ipv4Addr::new(100, 64, 0, 1), underlay },
        listen: SocketAddr::from((underlay, 0)),
        machines: (Ipv4Addr::new(10, 77, 0, 0), 16),
        options: EdgeOptions::default(),
        security: Security::Plaintext,
        socket: folder.join("edge.sock"),
        state: folder.join("edge"),
        path,
        pins: pins.to_owned(),
        hold: Some(hold()),
        secure: SecureConfig::off(),
    }
}

#[test]
fn a_route_is_set_replaced_listed_and_removed_and_others_are_left_alone() {
    in_namespace(|| {
        ip("link add d0 type veth peer name d1\nlink set d0 up\nlink set d1 up\n\
            route add 10.77.0.9 dev d0 table 6472\n");
        let (d0, d1) = (interface_index("d0").unwrap(), interface_index("d1").unwrap());
        let mut netlink = Netlink::open().unwrap();
        let here = Route::host(6472, ADDRESS, NextHop::Device(d0));
        let away =
            Route::host(6472, ADDRESS, NextHop::Gateway(Ipv4Addr::new(100, 64, 0, 3).into(), d1));
        netlink.replace_route(&here).unwrap();
        assert_eq!(netlink.routes(6472).unwrap(), [here]);
        for _ in 0..2 {
            netlink.replace_route(&away).unwrap();
            assert_eq!(netlink.routes(6472).unwrap(), [away], "onlink, without a route to it");
        }
        assert!(netlink.delete_route(6472, ADDRESS, 32).unwrap());
        assert!(!netlink.delete_route(6472, ADDRESS, 32).unwrap());
        let left = exec::run("ip", &["route", "show", "table", "6472"], "").unwrap();
        assert!(left.contains("10.77.0.9"), "{left}");
    });
}

#[test]
fn setting_a_route_takes_microseconds() {
    in_namespace(|| {
        ip("link add d0 type veth peer name p0\nlink set d0 up\nlink set p0 up\n");
        let next = NextHop::Device(interface_index("d0").unwrap());
        let mut netlink = Netlink::open().unwrap();
        // The best of some rounds: a busy computer is slow in the others.
        let rounds = (0..20).map(|_| {
            let start = Instant::now();
            for n in 0..50_u32 {
                let to = Ipv4Addr::from(u32::from(ADDRESS) + n % 16);
                netlink.replace_route(&Route::host(6472, to, next)).unwrap();
            }
            start.elapsed() / 50
        });
        let each = rounds.min().unwrap();
        eprintln!("one route: {each:?}");
        assert!(each < Duration::from_millis(1), "{each:?}");
    });
}

#[test]
fn a_refusal_by_the_kernel_says_what_was_attempted() {
    in_namespace(|| {
        let route = Route::host(6472, ADDRESS, NextHop::Device(4711));
        let error = Netlink::open().unwrap().replace_route(&route).unwrap_err().to_string();
        assert!(error.contains("10.77.0.5/32 dev #4711 table 6472"), "{error}");
    });
}

#[test]
fn a_rule_is_added_once() {
    in_namespace(|| {
        let from_interface = Some("dr-0a4d0005".into());
        let rule = Rule { priority: 6402, from_interface, table: 6473, ..Rule::default() };
        let mut netlink = Netlink::open().unwrap();
        netlink.ensure_rule(&rule).unwrap();
        netlink.ensure_rule(&rule).unwrap();
        let rules = exec::run("ip", &["rule"], "").unwrap();
        assert_eq!(
            rules.matches("from all iif dr-0a4d0005 [detached] lookup 6473").count(),
            1,
            "{rules}"
        );
        assert!(netlink.delete_rule(&rule).unwrap());
        assert!(!netlink.delete_rule(&rule).unwrap());
    });
}

#[test]
fn a_tap_holds_what_comes_before_anybody_reads() {
    in_namespace(|| {
        let path = LocalDataPath::open().unwrap();
        let tap = path.prepare(&net()).unwrap();
        path.resume(&net(), 1).unwrap();
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for n in 0..10_000_u32 {
            socket.send_to(&n.to_be_bytes(), (ADDRESS, 9)).unwrap();
        }
        // Nobody has read; the route leads elsewhere now, where nothing is.
        ip(
            "link add d0 type veth peer name p0\nlink set d0 up\nlink set p0 up\nroute replace 10.77.0.5 dev d0 table 6472\n\
            neighbour replace 10.77.0.5 lladdr 02:00:00:00:00:05 dev d0\n",
        );
        let start = Instant::now();
        let drained = tap::drain(&tap).unwrap();
        eprintln!("{drained:?} in {:?}", start.elapsed());
        assert_eq!((drained.forwarded, drained.dropped), (10_000, 0));
        let start = Instant::now();
        assert_eq!(tap::drain(&tap).unwrap().forwarded, 0);
        eprintln!("an empty queue in {:?}", start.elapsed());
        let link = exec::run("ip", &["-s", "-json", "link", "show", "dev", "d0"], "").unwrap();
        let link: serde_json::Value = serde_json::from_str(&link).unwrap();
        let sent = link[0]["stats64"]["tx"]["packets"].as_u64().unwrap();
        assert!(sent >= 10_000, "routed on: {sent}");
    });
}

#[test]
fn a_drain_whose_route_was_not_changed_ends_and_says_so() {
    in_namespace(|| {
        let path = LocalDataPath::open().unwrap();
        let tap = path.prepare(&net()).unwrap();
        path.resume(&net(), 1).unwrap();
        UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"x", (ADDRESS, 9)).unwrap();
        let start = Instant::now();
        match tap::drain(&tap) {
            // Each turn costs the packet a hop, so it ends by itself after 64.
            Ok(drained) => assert!(drained.forwarded <= 64, "{drained:?}"),
            Err(error) => assert!(error.to_string().contains("route"), "{error}"),
        }
        assert!(start.elapsed() < Duration::from_secs(20));
    });
}

#[test]
fn a_tap_in_use_is_refused_by_name_and_a_closed_one_is_opened_again() {
    in_namespace(|| {
        let path = LocalDataPath::open().unwrap();
        let tap = path.prepare(&net()).unwrap();
        let error = path.prepare(&net()).unwrap_err().to_string();
        assert!(error.contains("dr-0a4d0005") && error.contains("another process"), "{error}");
        drop(tap);
        let mut again = std::fs::File::from(path.prepare(&net()).unwrap().fd);
        assert!(again.write(&[0; 10]).is_err(), "a header without a frame is refused, not taken");
    });
}

#[test]
fn hop_check_25_an_agent_and_an_edge_leave_nothing_behind_when_asked_to() {
    in_namespace(|| {
        let listing = || {
            let nft = exec::run("nft", &["list", "tables"], "").unwrap();
            let rules = exec::run("ip", &["rule"], "").unwrap();
            let links = exec::run("ip", &["-brief", "link"], "").unwrap();
            (nft, rules, links.lines().count())
        };
        let folder = tempfile::tempdir().unwrap();
        let before = listing();
        ip("address add 10.88.0.2/32 dev lo\naddress add 10.88.0.1/32 dev lo\n");
        let agent = Agent::start(AgentConfig {
            announce: None,
            host: HostName::new("a").unwrap(),
            this: Peer {
                overlay: Ipv4Addr::new(100, 64, 0, 2),
                underlay: Ipv4Addr::new(10, 88, 0, 2),
            },
            edge: "10.88.0.1:7450".parse().unwrap(),
            edge_name: HostName::new("edge").unwrap(),
            more_edges: Vec::new(),
            security: Security::Plaintext,
            socket: folder.path().join("agent.sock"),
            state: folder.path().join("agent"),
            path: PathChoice::Auto,
            pins: conduit_bpf::ROOT.into(),
            hold: Some(hold()),
            secure: SecureConfig::off(),
        })
        .unwrap();
        assert_ne!(listing(), before);
        assert_eq!(agent.status().machines.len(), 0);
        agent.remove_everything().unwrap();
        assert_eq!(listing(), before);

        let pins = Path::new(conduit_bpf::ROOT);
        let edge = Edge::start(edge_config(folder.path(), PathChoice::Auto, pins)).unwrap();
        assert_ne!(listing(), before);
        edge.remove_everything().unwrap();
        assert_eq!(listing(), before);
    });
}

#[test]
fn an_address_that_is_not_this_hosts_is_refused_at_start() {
    in_namespace(|| {
        let folder = tempfile::tempdir().unwrap();
        let error = Edge::start(EdgeConfig {
            public: Ipv4Addr::new(203, 0, 113, 1),
            this: Peer {
                overlay: Ipv4Addr::new(100, 64, 0, 1),
                underlay: Ipv4Addr::new(10, 88, 0, 1),
            },
            listen: "127.0.0.1:0".parse().unwrap(),
            machines: (Ipv4Addr::new(10, 77, 0, 0), 16),
            options: EdgeOptions::default(),
            security: Security::Plaintext,
            socket: folder.path().join("edge.sock"),
            state: folder.path().join("edge"),
            path: PathChoice::Auto,
            pins: conduit_bpf::ROOT.into(),
            hold: None,
            secure: SecureConfig::off(),
        })
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
        assert!(error.contains("203.0.113.1") && error.contains("no such address"), "{error}");
    });
}

#[test]
fn a_check_finds_what_this_kernel_has_and_leaves_nothing_behind() {
    in_namespace(|| {
        let pins = Path::new(conduit::PINS);
        let found = conduit::check::check(pins).unwrap();
        let works = |word: &str| found.iter().any(|f| f.works && f.what.contains(word));
        assert!(works("tunnel") && works("clsact") && works("a tap"), "{found:?}");
        assert!(conduit::check::can_bpf(&found));
        // It worked in a namespace of its own.
        assert!(!conduit_bpf::folder(pins).unwrap().exists());
        assert!(interface_index("cd-tunnel").is_err());
    });
}

#[test]
fn a_folder_that_is_no_bpf_file_system_is_refused_and_auto_goes_on_with_routes() {
    in_namespace(|| {
        let folder = tempfile::tempdir().unwrap();
        ip("address add 10.88.0.1/32 dev lo\n");
        let pins = folder.path().join("pins");
        let config = |path| edge_config(folder.path(), path, &pins);
        let error = Edge::start(config(PathChoice::Bpf)).err().unwrap().to_string();
        assert!(error.contains("BPF file system") && error.contains("mount -t bpf"), "{error}");
        let edge = Edge::start(config(PathChoice::Auto)).unwrap();
        assert_eq!(edge.status().path, conduit::PathKind::Routes);
        edge.remove_everything().unwrap();
    });
}

#[test]
fn a_tracked_connection_is_listed_with_both_of_its_directions() {
    in_namespace(|| {
        let rules = "add table ip t; add chain ip t c { type filter hook output priority 0; }; \
            add rule ip t c ct state new accept";
        exec::run("nft", &[rules], "").unwrap();
        let ear = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mouth = UdpSocket::bind("127.0.0.1:0").unwrap();
        mouth.send_to(b"x", ear.local_addr().unwrap()).unwrap();
        ear.recv(&mut [0; 4]).unwrap();
        let (from, to) = (mouth.local_addr().unwrap(), ear.local_addr().unwrap());
        let found = conduit::conntrack::list().unwrap();
        let ours = found.iter().find(|c| c.original.from == from).unwrap();
        assert_eq!((ours.protocol, ours.original.to), (17, to));
        assert_eq!((ours.reply.from, ours.reply.to), (to, from));
        assert!(ours.timeout.is_some_and(|t| t > 0), "{ours:?}");
    });
}

#[test]
fn an_edge_answers_prometheus_with_every_name_and_what_its_programs_counted() {
    in_namespace(|| {
        let folder = tempfile::tempdir().unwrap();
        ip("address add 10.88.0.1/32 dev lo\n");
        let pins = Path::new(conduit_bpf::ROOT);
        let edge = Edge::start(edge_config(folder.path(), PathChoice::Bpf, pins)).unwrap();
        let endpoint = edge.serve_metrics("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut stream = TcpStream::connect(endpoint.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        for line in [
            "conduit_machines{place=\"known\"} 0.0",
            "conduit_frames_total{event=\"spoofed_mac\",end=\"dropped\"} 0",
            "conduit_changes_total{operation=\"claim\",result=\"done\"} 0",
            "conduit_state_files_behind 0.0",
            "conduit_rule_drops_total{rule=\"not_mapped\"} 0",
            "conduit_held{what=\"frames\"} 0.0",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is missing in\n{text}");
        }
        assert!(text.contains("role=\"edge\",path=\"bpf\"") && text.contains("# EOF"), "{text}");
        drop(endpoint);
        edge.remove_everything().unwrap();
    });
}
