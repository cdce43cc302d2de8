//! What an edge's going costs: planned, with every connection handed over, and by death.

use super::{Group, program};
use crate::{
    conntrack::{self, Flow, FlowTuple},
    lab::{
        edges::{Edges, Machine, client, public},
        traffic::{Datagrams, Echoes, Received, serve_echo},
    },
};
use anyhow::{Context, ensure};
use bench::{Row, Target};
use std::{
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    time::Duration,
};

pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "drain",
        about: "an edge's connections are handed over to another one, and back",
        bars: &["conduit.edges.drain"],
        run: drains,
    },
    Group {
        name: "dead",
        about: "an edge dies with its computer; another one serves its machines",
        bars: &["conduit.edges.dead"],
        run: deaths,
    },
];

const EAST: usize = 0;
const WEST: usize = 1;

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A machine of the first edge, and what it hears of datagrams.
fn machine(rig: &mut Edges) -> anyhow::Result<(Machine, Received)> {
    let net = rig.machine_of(EAST);
    let machine = rig.boot(net, 0, EAST)?;
    serve_echo(machine.guest.run(|| TcpListener::bind("0.0.0.0:7"))?);
    let received = Received::collect(machine.guest.run(|| UdpSocket::bind("0.0.0.0:9"))?);
    Ok((machine, received))
}

/// Connections of the first edge that are tracked and say nothing.
fn idle(count: u32) -> Vec<Flow> {
    let flow = |n: u32| {
        let (client, seen) =
            (IpAddr::from([198, 18, (n >> 8) as u8, n as u8]), public(EAST).into());
        let machine = IpAddr::from([10, 77, 200, 1]);
        let end = |from, to, sport, dport| FlowTuple { from, to, sport, dport, zone: 0 };
        Flow {
            protocol: 17,
            original: end(client, seen, 1024, 9999),
            reply: end(machine, client, 9999, 1024),
            zone: 0,
            // Seen in both directions, and so assured.
            status: 6,
            timeout: 600,
            mark: 0,
            tcp: None,
        }
    };
    (0..count).map(flow).collect()
}

fn drains(quick: bool) -> anyhow::Result<Vec<Row>> {
    let (turns, count) = if quick { (1, 2_000) } else { (5, 20_000) };
    let mut rig = Edges::new(&program()?)?;
    let (machine, received) = machine(&mut rig)?;
    let listener = rig.clients[1].run(|| TcpListener::bind("0.0.0.0:443"))?;
    serve_echo(listener);
    let made = rig.edge_space(EAST).run(|| conntrack::made(&idle(count)))?;
    ensure!(made.failed == 0, "{made:?}");
    let (tcp, udp) = (rig.public(&machine, 0), rig.public(&machine, 1));
    let outside = SocketAddr::from((client(1), 443));
    let (mut rates, mut gaps, mut broken, mut lost) = (Vec::new(), Vec::new(), 0, 0);
    let mut home = EAST;
    for _ in 0..turns * 2 {
        let streams = [
            rig.clients[0].run(|| Echoes::start(tcp)),
            machine.guest.run(|| Echoes::start(outside)),
        ];
        let datagrams = rig.clients[0].run(|| Datagrams::start(udp));
        streams.iter().for_each(|echoes| echoes.wait(100));
        let drained = rig.drain(home, &["--home", "east"])?;
        let drained = drained.first().context("nothing was drained")?;
        ensure!(drained.failed == 0 && drained.flows >= count as usize, "{drained:?}");
        home = 1 - home;
        rig.until_served(EAST, home)?;
        rates.push(drained.flows as f64 / drained.seconds);
        streams.iter().for_each(|echoes| echoes.wait(100));
        for echoes in streams {
            let seen = echoes.finish();
            broken += u32::from(seen.sent != seen.answered);
            gaps.push(seen.gap.as_secs_f64() * 1e3);
        }
        lost += datagrams.finish(&received).1;
    }
    let resets = rig.count(EAST, "nat_orphan_reset") + rig.count(WEST, "nat_orphan_reset");
    let worst = gaps.iter().copied().fold(0.0, f64::max);
    let name = |what: &str| format!("conduit.edges.drain | {what}");
    let none = Some(Target::AtMost(0.0));
    Ok(vec![
        Row::judged(&name("connections handed over"), median(&mut rates), "flows/s", None, None),
        Row::judged(
            &name("streams broken, and resets"),
            f64::from(broken) + resets as f64,
            "resets",
            None,
            none,
        ),
        Row::judged(&name("UDP at 1000 a second, lost"), lost as f64, "datagrams", None, none),
        Row::judged(&name("largest gap of a TCP stream"), worst, "ms", None, None),
    ])
}

fn deaths(quick: bool) -> anyhow::Result<Vec<Row>> {
    let turns = if quick { 1 } else { 5 };
    let mut rig = Edges::new(&program()?)?;
    let (machine, _) = machine(&mut rig)?;
    let tcp = rig.public(&machine, 0);
    let mut gaps = Vec::new();
    for turn in 0..turns {
        let echoes = rig.clients[0].run(|| Echoes::start(tcp));
        echoes.wait(100);
        rig.cut_edge(EAST, true)?;
        rig.kill_edge(EAST);
        rig.until_served(EAST, WEST)?;
        echoes.wait(100);
        let seen = echoes.finish();
        ensure!(seen.sent == seen.answered, "turn {turn}: {seen:?}");
        gaps.push(seen.gap.as_secs_f64() * 1e3);
        // Repaired, and as before.
        rig.start_edge(EAST)?;
        rig.cut_edge(EAST, false)?;
        for host in [0, 1] {
            rig.connected(host, 2)?;
        }
        rig.until_drainable(WEST)?;
        rig.drain(WEST, &["--home", "east"])?;
        rig.until_served(EAST, EAST)?;
    }
    let worst = gaps.iter().copied().fold(0.0, f64::max);
    let most = Some(Target::AtMost(Duration::from_secs(3).as_secs_f64() * 1e3));
    Ok(vec![
        Row::judged(
            "conduit.edges.dead | gap of a mapped TCP stream, median",
            median(&mut gaps),
            "ms",
            None,
            most,
        ),
        Row::judged("conduit.edges.dead | the same, worst", worst, "ms", None, None),
    ])
}
