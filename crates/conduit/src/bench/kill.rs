//! What the death of a daemon costs: agents and edge are killed (SIGKILL) and started again under
//! traffic, a hundred times, half of them while frames are held; and so are the processes that hold them,
//! which lose what they had in memory, count it, and nothing else.

use super::{Group, program};
use crate::{
    PathChoice,
    lab::{
        fleet::{Fleet, TCP, UDP},
        traffic::{Datagrams, Echoes, Received, serve_echo},
        wait_for,
    },
};
use anyhow::ensure;
use bench::{Row, Target};
use std::{
    net::{TcpListener, UdpSocket},
    thread,
    time::Duration,
};

pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "kill",
        about: "agents and edge killed and started again under traffic, also while frames are held",
        bars: &["conduit.kill.daemons"],
        run: kills,
    },
    Group {
        name: "kill-holder",
        about: "the processes that hold frames killed under traffic, also with frames in memory",
        bars: &["conduit.kill.holder"],
        run: holders,
    },
];

const LIMIT: Duration = Duration::from_secs(5);
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

/// Loses what the two holders concerned have in memory, and gives back the rest.
fn holders(quick: bool) -> anyhow::Result<Vec<Row>> {
    let rounds = if quick { 2 } else { 25 };
    let mut fleet = Fleet::new(&program()?, PathChoice::Bpf)?;
    serve_echo(fleet.guest.run(|| TcpListener::bind("0.0.0.0:7"))?);
    let received = Received::collect(fleet.guest.run(|| UdpSocket::bind("0.0.0.0:9"))?);
    let (tcp, udp) = (fleet.public(TCP), fleet.public(UDP));
    let echoes = fleet.client.run(|| Echoes::start(tcp));
    echoes.wait(100);
    let (mut killed, mut beyond, mut lost, mut had) = (0, 0, 0, 0);
    for _ in 0..rounds {
        let datagrams = fleet.client.run(|| Datagrams::start(udp));
        let ends = [Some(1 - fleet.at()), None];
        // Under traffic, with nothing in memory.
        for end in ends {
            fleet.kill_holder(end)?;
        }
        fleet.depart(Some(EXPECTED))?;
        thread::sleep(EXPECTED / 3);
        for end in ends {
            had += fleet.holder_stats(end)?.frames;
            fleet.kill_holder(end)?;
        }
        thread::sleep(EXPECTED.saturating_sub(fleet.stands_for()));
        fleet.arrive()?;
        fleet.forget()?;
        let empty = |end| fleet.holder_stats(end).is_ok_and(|stats| stats.machines == 0);
        ensure!(wait_for(LIMIT, || ends.iter().all(|&end| empty(end))), "frames stay held");
        echoes.wait(50);
        let mut counted = 0;
        for end in ends {
            counted += fleet.holder_stats(end)?.lost;
        }
        let (_, missing) = datagrams.finish(&received);
        beyond += missing.saturating_sub(counted);
        lost += counted;
        killed += 4;
    }
    let seen = echoes.finish();
    ensure!(seen.sent == seen.answered, "echoes were lost: {seen:?}");
    ensure!(had > rounds * 50, "only {had} frames were held: this proves nothing");
    let row = |what: &str, value, baseline, target| {
        let bar = format!("conduit.kill.holder | {what}, killed {killed} times");
        Row::judged(&bar, value, "frames", baseline, target)
    };
    Ok(vec![
        row(
            "datagrams lost beyond what was counted",
            beyond as f64,
            None,
            Some(Target::AtMost(0.0)),
        ),
        row(
            "counted as lost, next to what was in memory a moment before",
            lost as f64,
            Some(had as f64),
            Some(Target::RatioAtMost(1.25)),
        ),
    ])
}
