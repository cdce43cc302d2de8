//! What the death of a daemon costs: agents and edge are killed (SIGKILL) and started again under
//! traffic, a hundred times, half of them while frames are held.

use super::{Group, program};
use crate::{
    PathChoice,
    lab::{
        fleet::{Fleet, TCP, UDP},
        traffic::{Datagrams, Echoes, Received, serve_echo},
    },
};
use anyhow::ensure;
use bench::{Row, Target};
use std::{
    net::{TcpListener, UdpSocket},
    thread,
    time::Duration,
};

pub(super) const GROUPS: &[Group] = &[Group {
    name: "kill",
    about: "agents and edge killed and started again under traffic, also while frames are held",
    bars: &["conduit.kill."],
    run: kills,
}];

/// Longer than two restarts take.
const EXPECTED: Duration = Duration::from_millis(600);

fn kills(quick: bool) -> anyhow::Result<Vec<Row>> {
    let rounds = if quick { 2 } else { 25 };
    let mut fleet = Fleet::new(&program()?, PathChoice::Bpf)?;
    serve_echo(fleet.guest.run(|| TcpListener::bind("0.0.0.0:7"))?);
    let received = Received::collect(fleet.guest.run(|| UdpSocket::bind("0.0.0.0:9"))?);
    let (tcp, udp) = (fleet.public(TCP), fleet.public(UDP));
    let echoes = fleet.client.run(|| Echoes::start(tcp));
    let datagrams = fleet.client.run(|| Datagrams::start(udp));
    echoes.wait(100);
    let mut killed = 0;
    for _ in 0..rounds {
        // Under traffic: the edge, and the agent of the host that has the machine.
        fleet.kill_edge();
        fleet.start_edge()?;
        let at = fleet.at();
        fleet.kill_agent(at);
        fleet.start_agent(at)?;
        // While the destination holds frames: its agent, and the edge.
        fleet.depart(Some(EXPECTED))?;
        fleet.kill_agent(1 - at);
        fleet.kill_edge();
        thread::sleep(Duration::from_millis(100));
        fleet.start_edge()?;
        fleet.start_agent(1 - at)?;
        thread::sleep(EXPECTED.saturating_sub(fleet.stands_for()));
        fleet.arrive()?;
        fleet.forget()?;
        echoes.wait(50);
        killed += 4;
    }
    let seen = echoes.finish();
    let (sent, lost) = datagrams.finish(&received);
    ensure!(seen.sent == seen.answered, "echoes were lost: {seen:?}");
    ensure!(sent > killed * 50, "only {sent} datagrams were sent");
    Ok(vec![Row::judged(
        &format!("conduit.kill.daemons | datagrams lost, agents and edge killed {killed} times"),
        lost as f64,
        "datagrams",
        None,
        Some(Target::AtMost(0.0)),
    )])
}
