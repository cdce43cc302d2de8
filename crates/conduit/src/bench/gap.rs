//! What a client feels of a move: real agents and a real edge, a machine without a processor, TCP
//! and UDP through the public address, and a blackout of a stated length.

use super::{Group, program};
use crate::{
    PathChoice,
    lab::{
        fleet::{BULK, Fleet, TCP, UDP},
        traffic::{Datagrams, Echoes, Received, flood_at, retransmits, serve_echo, swallow},
    },
};
use anyhow::ensure;
use bench::{Row, Target};
use std::{
    net::{TcpListener, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "gap",
        about: "TCP and UDP of a client while a machine moves",
        bars: &["conduit.gap.100ms", "conduit.gap.300ms", "conduit.gap.1000ms", "conduit.gap.flip"],
        run: gaps,
    },
    Group {
        name: "announce",
        about: "the same where hosts announce the machine on the client's link, next to the overlay",
        bars: &["conduit.gap.announce"],
        run: announced,
    },
    Group {
        name: "bulk",
        about: "a client sends 500 Mb/s to a machine that moves",
        bars: &["conduit.gap.bulk"],
        run: bulk,
    },
    Group {
        name: "cut",
        about: "the old host is cut off after the flip",
        bars: &["conduit.gap.cut"],
        run: cuts,
    },
];

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A fleet whose machine answers echoes and counts datagrams, with the socket buffers that everybody
/// has.
fn fleet() -> anyhow::Result<(Fleet, Received)> {
    serving(Fleet::new(&program()?, PathChoice::Bpf)?)
}

fn serving(fleet: Fleet) -> anyhow::Result<(Fleet, Received)> {
    serve_echo(fleet.guest.run(|| TcpListener::bind("0.0.0.0:7"))?);
    let received = Received::collect_as_usual(fleet.guest.run(|| UdpSocket::bind("0.0.0.0:9"))?);
    Ok((fleet, received))
}

fn gaps(quick: bool) -> anyhow::Result<Vec<Row>> {
    let moves = if quick { 2 } else { 20 };
    let (mut fleet, received) = fleet()?;
    let (mut rows, mut diverts) = (Vec::new(), Vec::new());
    for blackout in [100, 300, 1000] {
        let (mut added, mut again, mut lost) = (Vec::new(), Vec::new(), 0);
        for _ in 0..moves {
            let moved = one_move(&mut fleet, &received, Duration::from_millis(blackout))?;
            added.push(moved.added * 1e3);
            again.push(moved.retransmits as f64);
            diverts.push(moved.divert * 1e6);
            lost += moved.lost;
        }
        let worst = added.iter().copied().fold(0.0, f64::max);
        let row = |what: &str, value, unit: &str, target| {
            Row::judged(&format!("conduit.gap.{blackout}ms | {what}"), value, unit, None, target)
        };
        rows.push(row(
            "TCP, beyond the blackout, median",
            median(&mut added),
            "ms",
            Some(Target::AtMost(10.0)),
        ));
        rows.push(row("TCP, beyond the blackout, worst", worst, "ms", None));
        rows.push(row(
            "TCP segments that the client sent again, median",
            median(&mut again),
            "segments",
            Some(Target::AtMost(5.0)),
        ));
        rows.push(row(
            "UDP at 1000 a second, lost",
            lost as f64,
            "datagrams",
            Some(Target::AtMost(0.0)),
        ));
    }
    rows.push(Row::judged(
        "conduit.gap.flip | at the agent over its socket, once in a while, amid a client's traffic",
        median(&mut diverts),
        "us",
        None,
        None,
    ));
    Ok(rows)
}

/// Both kinds of fleet in turn, so that what else this computer does meets both.
fn announced(quick: bool) -> anyhow::Result<Vec<Row>> {
    let moves = if quick { 2 } else { 20 };
    let mut fleets = [fleet()?, serving(Fleet::announced(&program()?)?)?];
    let mut rows = Vec::new();
    for blackout in [100, 300] {
        let (mut added, mut lost) = ([Vec::new(), Vec::new()], 0);
        for _ in 0..moves {
            for (at, (fleet, received)) in fleets.iter_mut().enumerate() {
                let moved = one_move(fleet, received, Duration::from_millis(blackout))?;
                added[at].push(moved.added * 1e3);
                lost += if at == 1 { moved.lost } else { 0 };
            }
        }
        let [overlay, announced] = added.each_mut().map(|values| median(values));
        let name = |what: &str| format!("conduit.gap.announce | {what}, {blackout} ms");
        let (target, none) = (Some(Target::AtMost(10.0)), Some(Target::AtMost(0.0)));
        let what = name("TCP, beyond the blackout, median; baseline: the overlay");
        rows.push(Row::judged(&what, announced, "ms", Some(overlay), target));
        let what = name("UDP at 1000 a second, lost");
        rows.push(Row::judged(&what, lost as f64, "datagrams", None, none));
    }
    Ok(rows)
}

struct Moved {
    /// Longest silence of the echo stream, less the blackout; seconds.
    added: f64,
    retransmits: u64,
    divert: f64,
    lost: u64,
}

fn one_move(fleet: &mut Fleet, received: &Received, blackout: Duration) -> anyhow::Result<Moved> {
    let (tcp, udp) = (fleet.public(TCP), fleet.public(UDP));
    // The client's only: a real machine's clock stands still with it, this one's does not.
    let before = fleet.client.run(retransmits);
    let echoes = fleet.client.run(|| Echoes::start(tcp));
    let datagrams = fleet.client.run(|| Datagrams::start(udp));
    echoes.wait(150);
    let moved = fleet.move_machine(blackout, Some(blackout))?;
    echoes.wait(150);
    let seen = echoes.finish();
    let (_, lost) = datagrams.finish(received);
    ensure!(seen.sent == seen.answered, "echoes were lost: {seen:?}");
    let after = fleet.client.run(retransmits);
    Ok(Moved {
        added: seen.gap.saturating_sub(moved.stood).as_secs_f64(),
        retransmits: after - before,
        divert: moved.divert.as_secs_f64(),
        lost,
    })
}

/// Bytes a second.
const BULK_RATE: u64 = 500_000_000 / 8;

fn bulk(quick: bool) -> anyhow::Result<Vec<Row>> {
    let moves = if quick { 2 } else { 20 };
    let mut fleet = Fleet::new(&program()?, PathChoice::Bpf)?;
    let listener = fleet.guest.run(|| TcpListener::bind("0.0.0.0:8"))?;
    let to = fleet.public(BULK);
    let (mut again, mut added) = (Vec::new(), Vec::new());
    for _ in 0..moves {
        let before = fleet.client.run(retransmits);
        let stop = Arc::new(AtomicBool::new(false));
        let (listener, stopping) = (listener.try_clone()?, stop.clone());
        let machine = fleet.guest.spawn(move || swallow(&listener));
        let client = fleet.client.run(|| flood_at(to, stopping, Some(BULK_RATE)));
        thread::sleep(Duration::from_millis(200));
        let moved = fleet.move_machine(Duration::from_millis(100), None)?;
        thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        let sent = client.join().map_err(|_| anyhow::anyhow!("the client failed"))?;
        let (came, gap) = machine.join().map_err(|_| anyhow::anyhow!("the machine failed"))?;
        ensure!(sent == came, "{came} bytes of {sent} arrived");
        ensure!(sent > BULK_RATE * 3 / 10, "only {sent} bytes were sent: not 500 Mb/s");
        again.push((fleet.client.run(retransmits) - before) as f64);
        added.push(gap.saturating_sub(moved.stood).as_secs_f64() * 1e3);
    }
    let worst = again.iter().copied().fold(0.0, f64::max);
    let row = |what: &str, value, unit: &str, target| {
        Row::judged(&format!("conduit.gap.bulk | {what}"), value, unit, None, target)
    };
    Ok(vec![
        row(
            "500 Mb/s into a 100 ms blackout, segments sent again, median",
            median(&mut again),
            "segments",
            Some(Target::AtMost(2.0)),
        ),
        row("500 Mb/s into a 100 ms blackout, segments sent again, worst", worst, "segments", None),
        row("500 Mb/s, beyond the blackout, median", median(&mut added), "ms", None),
    ])
}

fn cuts(quick: bool) -> anyhow::Result<Vec<Row>> {
    let moves = if quick { 1 } else { 10 };
    let (mut fleet, received) = fleet()?;
    let (tcp, udp) = (fleet.public(TCP), fleet.public(UDP));
    let blackout = Duration::from_millis(150);
    let mut rows = Vec::new();
    for after in [0, 10, 100] {
        let (mut added, mut beyond) = (Vec::new(), 0);
        for _ in 0..moves {
            let echoes = fleet.client.run(|| Echoes::start(tcp));
            let datagrams = fleet.client.run(|| Datagrams::start(udp));
            echoes.wait(150);
            let old = fleet.at();
            let moved = fleet.depart(None)?;
            fleet.left()?;
            thread::sleep(Duration::from_millis(after));
            fleet.cut(old, true)?;
            thread::sleep(blackout.saturating_sub(fleet.stands_for()));
            let stood = fleet.arrive()?;
            echoes.wait(150);
            let seen = echoes.finish();
            let (_, lost) = datagrams.finish(&received);
            ensure!(seen.sent == seen.answered, "echoes were lost: {seen:?}");
            fleet.cut(old, false)?;
            fleet.forget()?;
            added.push(seen.gap.saturating_sub(stood).as_secs_f64() * 1e3);
            beyond += lost.saturating_sub(moved.drained);
        }
        rows.push(Row::judged(
            &format!(
                "conduit.gap.cut | TCP, {after} ms after the flip, beyond the blackout, median"
            ),
            median(&mut added),
            "ms",
            None,
            Some(Target::AtMost(10.0)),
        ));
        rows.push(Row::judged(
            &format!(
                "conduit.gap.cut | UDP, {after} ms after the flip, lost beyond the old tap's queue"
            ),
            beyond as f64,
            "datagrams",
            None,
            Some(Target::AtMost(0.0)),
        ));
    }
    Ok(rows)
}
