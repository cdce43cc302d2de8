//! Hosts that announce their machines to the network around, in place of a tunnel from the edge: on a link
//! that clients share, and by routes that a routing daemon (BIRD) takes to a router.

use crate::rig::{LIMIT, Machine, Rig, net, tcp};
use conduit::{
    Announce, DataPath, MachineNet, NetworkId,
    lab::{
        Space,
        traffic::{Datagrams, Echoes, Received},
        wait_for,
    },
};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::{Child, Command, Stdio},
    time::Duration,
};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 5));
const V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 5));

fn space_on_the_bridge(rig: &Rig) -> Space {
    let space = Space::new().unwrap();
    space.sysctl("net/ipv6/conf/default/accept_dad", "0").unwrap();
    space.join("eth0", &rig.edge_space, "to-other").unwrap();
    rig.edge_space.ip("link set to-other master under0\n").unwrap();
    space
}

fn output(space: &Space, program: &str, args: &str) -> String {
    space.run(|| {
        let out = Command::new(program).args(args.split(' ')).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    })
}

fn mac(space: &Space) -> String {
    let text = output(space, "ip", "-oneline link show dev eth0");
    let mut words = text.split_whitespace().skip_while(|w| *w != "link/ether");
    words.nth(1).unwrap().to_owned()
}

/// Who answers for an address, as a client has learned it.
fn neighbour(client: &Space, address: IpAddr) -> String {
    output(client, "ip", &format!("neigh show {address}"))
}

/// How long a machine stands still.
const BLACKOUT: Duration = Duration::from_millis(100);

struct Flows {
    echoes: Vec<Echoes>,
    datagrams: Vec<Datagrams>,
    received: Vec<Received>,
}

impl Flows {
    fn start(client: &Space, machine: &Machine, addresses: &[IpAddr]) -> Self {
        let ports = || (0_u16..).zip(addresses.iter().copied());
        let received = ports().map(|(n, _)| Received::collect(machine.udp(9 + n))).collect();
        let echoes = ports().map(|(_, a)| client.run(|| Echoes::start((a, 7).into()))).collect();
        let datagrams =
            ports().map(|(n, a)| client.run(|| Datagrams::start((a, 9 + n).into()))).collect();
        let flows = Self { echoes, datagrams, received };
        flows.go_on();
        flows
    }

    fn go_on(&self) {
        for echoes in &self.echoes {
            echoes.wait(50);
        }
    }

    /// All echoes came back; says how many datagrams were lost.
    fn finish(self) -> u64 {
        for echoes in self.echoes {
            let seen = echoes.finish();
            assert_eq!(seen.sent, seen.answered, "{seen:?}");
            eprintln!("{} echoes, the longest silence was {:?}", seen.answered, seen.gap);
            assert!(seen.gap < 10 * BLACKOUT, "{seen:?}");
        }
        let ends = self.datagrams.into_iter().zip(&self.received);
        ends.map(|(datagrams, received)| {
            let (sent, lost) = datagrams.finish(received);
            eprintln!("{lost} of {sent} datagrams were lost");
            lost
        })
        .sum()
    }
}

#[test]
fn on_the_clients_link_a_machine_keeps_its_flows_through_moves_without_edge_and_tunnel() {
    let rig = Rig::announcing("link:eth0".parse().unwrap());
    let client = space_on_the_bridge(&rig);
    client.ip("address add 10.77.255.9/16 dev eth0\naddress add fd77::ff09/64 dev eth0\n").unwrap();
    for (at, host) in (2..).zip(&rig.hosts) {
        let own = format!(
            "address add 10.77.255.{at}/16 dev eth0\naddress add fd77::ff0{at}/64 dev eth0 nodad\n"
        );
        host.space.ip(&own).unwrap();
    }
    let mut machine = rig.boot(net("near", NetworkId::COMMON.0, 5), 0);
    machine.echo(7);
    let flows = Flows::start(&client, &machine, &[V4, V6]);
    let answered_by = |at: usize| {
        let mac = mac(&rig.hosts[at].space);
        [V4, V6].iter().all(|&a| neighbour(&client, a).contains(&mac))
    };
    assert!(answered_by(0), "{}", neighbour(&client, V4));
    for _ in 0..2 {
        rig.move_machine(&mut machine, BLACKOUT);
        assert!(wait_for(LIMIT, || answered_by(machine.at)), "{}", neighbour(&client, V4));
        flows.go_on();
    }
    rig.move_machine(&mut machine, BLACKOUT);
    flows.go_on();
    // The host that it has left may go.
    rig.hosts[0].space.ip("link set eth0 down\n").unwrap();
    flows.go_on();
    // One who has never spoken to it asks, and is answered by its host alone.
    let late = Space::new().unwrap();
    late.join("eth0", &rig.edge_space, "to-late").unwrap();
    rig.edge_space.ip("link set to-late master under0\n").unwrap();
    late.ip("address add 10.77.255.10/16 dev eth0\n").unwrap();
    let echoes = late.run(|| Echoes::start((V4, 7).into()));
    echoes.wait(10);
    assert!(echoes.finish().answered >= 10);
    assert!(neighbour(&late, V4).contains(&mac(&rig.hosts[1].space)));
    assert_eq!(flows.finish(), 0, "no datagram was lost");
    rig.hosts[0].space.ip("link set eth0 up\n").unwrap();
    let host = &rig.hosts[1];
    host.path.forget(&machine.net, machine.epoch).unwrap();
    let proxies = || output(&host.space, "ip", "neigh show proxy");
    assert!(wait_for(LIMIT, || proxies().is_empty()), "{}", proxies());
}

/// A routing daemon.
struct Bird(Child);

impl Bird {
    fn start(rig: &Rig, space: &Space, name: &str, config: &str) -> Self {
        let at = |end: &str| rig.folder.path().join(format!("{name}.{end}"));
        std::fs::write(at("conf"), config).unwrap();
        let child = space.run(|| {
            Command::new("bird")
                .args(["-f", "-c"])
                .arg(at("conf"))
                .arg("-s")
                .arg(at("ctl"))
                .arg("-P")
                .arg(at("pid"))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("bird is installed (scripts/setup.sh)")
        });
        Self(child)
    }
}

impl Drop for Bird {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn in_a_routed_fabric_a_routing_daemon_takes_the_routes_and_flows_keep_through_moves() {
    let rig = Rig::announcing(Announce::Routes);
    let router = space_on_the_bridge(&rig);
    let client = Space::new().unwrap();
    router.sysctl("net/ipv4/ip_forward", "1").unwrap();
    router.join("inner", &client, "eth0").unwrap();
    router.ip("address add 10.88.0.9/24 dev eth0\naddress add 10.99.0.1/24 dev inner\n").unwrap();
    client.ip("address add 10.99.0.2/24 dev eth0\nroute add default via 10.99.0.1\n").unwrap();
    let session = |neighbour: &str| {
        format!(
            "protocol bgp {{
                local as 64512; neighbor {neighbour} as 64512;
                connect retry time 1; connect delay time 1; error wait time 1, 2;
                ipv4 {{ import all; export where source = RTS_INHERIT; next hop self; }};
            }}\n"
        )
    };
    let mut birds = Vec::new();
    for (at, host) in (2..).zip(&rig.hosts) {
        host.space.ip("route add 10.99.0.0/24 via 10.88.0.9\n").unwrap();
        let config = format!(
            "router id 10.88.0.{at};
            protocol device {{ }}
            protocol kernel {{ kernel table 6472; learn; ipv4 {{ import all; export none; }}; }}\n{}",
            session("10.88.0.9")
        );
        birds.push(Bird::start(&rig, &host.space, &format!("bird{at}"), &config));
    }
    let config = format!(
        "router id 10.88.0.9;
        protocol device {{ }}
        protocol direct {{ ipv4; }}
        protocol kernel {{ ipv4 {{ import none; export where source = RTS_BGP; }}; }}\n{}{}",
        session("10.88.0.2"),
        session("10.88.0.3")
    );
    birds.push(Bird::start(&rig, &router, "router", &config));

    let v4_only = MachineNet { address_v6: None, ..net("far", NetworkId::COMMON.0, 5) };
    let mut machine = rig.boot(v4_only, 0);
    machine.echo(7);
    let leads_to = |at: usize| {
        let routes = output(&router, "ip", "route show 10.77.0.5");
        routes.contains(&format!("via 10.88.0.{}", at + 2))
    };
    let patience = 3 * LIMIT;
    assert!(wait_for(patience, || leads_to(0)), "{}", output(&router, "ip", "route"));
    let flows = Flows::start(&client, &machine, &[V4]);
    for _ in 0..2 {
        rig.move_machine(&mut machine, BLACKOUT);
        assert!(wait_for(patience, || leads_to(machine.at)), "{}", output(&router, "ip", "route"));
        flows.go_on();
    }
    // While no host announces it, the router has no way, and says so: TCP sends again.
    eprintln!("{} datagrams met a router without a route", flows.finish());
}

#[test]
fn what_the_edge_would_do_for_a_machine_is_refused_where_it_is_announced() {
    let rig = Rig::announcing(Announce::Routes);
    let path = &rig.hosts[0].path;
    let tenants = path.prepare(&net("tenants", 7, 5)).unwrap_err().to_string();
    assert!(tenants.contains("one network only"), "{tenants}");
    let common = net("mapped", NetworkId::COMMON.0, 5);
    let mapped = MachineNet { ports: vec![tcp(7000, 7)], ..common };
    let mapped = path.prepare(&mapped).unwrap_err().to_string();
    assert!(mapped.contains("clients reach the machine there"), "{mapped}");
}
