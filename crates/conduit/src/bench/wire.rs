//! Throughput of one TCP stream and packets per second, on three ways that take turns.

use super::{
    Group,
    rig::{Rig, Way, received},
};
use crate::lab::Space;
use anyhow::{Context, ensure};
use bench::{Row, Target};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg};
use std::{
    io::{IoSlice, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "wire",
        about: "one TCP stream, packets of wire size on the underlay",
        bars: &["conduit.wire.tcp."],
        run: |quick| streams(quick, true),
    },
    Group {
        name: "gso",
        about: "one TCP stream, large segments kept whole from end to end",
        bars: &["conduit.gso.tcp."],
        run: |quick| streams(quick, false),
    },
    Group {
        name: "packets",
        about: "packets of 64 bytes a second, one sender",
        bars: &["conduit.wire.packets."],
        run: packets,
    },
    Group {
        name: "watch",
        about: "packets of 64 bytes a second while `conduit flows` looks on",
        bars: &["conduit.watch."],
        run: watched,
    },
];

#[derive(Clone, Copy, Debug)]
enum Direction {
    Ingress,
    Egress,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn streams(quick: bool, wire: bool) -> anyhow::Result<Vec<Row>> {
    let (runs, time) = if quick { (1, 300) } else { (7, 1000) };
    let time = Duration::from_millis(time);
    let rig = Rig::new()?;
    rig.set_wire(wire)?;
    let mut rows = Vec::new();
    for (direction, name) in [(Direction::Ingress, "ingress"), (Direction::Egress, "egress")] {
        for way in Way::ALL {
            // What is set up on the first packet is not what is measured.
            stream(&rig, way, direction, Duration::from_millis(100))?;
        }
        let mut rates = [const { Vec::new() }; 3];
        for run in 0..runs {
            // Every way is first, second and third in turn.
            for at in 0..3 {
                let at = (at + run) % 3;
                let way = Way::ALL[at];
                let before = rig.on_the_wire(way)?;
                rates[at].push(stream(&rig, way, direction, time)?);
                let after = rig.on_the_wire(way)?;
                let size = (after.0 - before.0) as f64 / (after.1 - before.1).max(1) as f64;
                ensure!(!wire || size < 1600.0, "packets of {size:.0} bytes are not of wire size");
            }
        }
        let [plain, vxlan, bpf] = rates.map(median);
        let rig_name = if wire { "wire" } else { "gso" };
        let (of_vxlan, of_plain) = if wire { (0.95, 0.85) } else { (0.85, 0.75) };
        for (other, rate, target) in [("vxlan", vxlan, of_vxlan), ("plain", plain, of_plain)] {
            rows.push(Row::judged(
                &format!("conduit.{rig_name}.tcp.{name} | next to {other}"),
                bpf,
                "Gb/s",
                Some(rate),
                Some(Target::RatioAtLeast(target)),
            ));
        }
    }
    Ok(rows)
}

/// What is sent, over and over; every received byte is compared with it.
fn pattern() -> Vec<u8> {
    (0..2 * CHUNK).map(|n| (n % CHUNK % 251) as u8).collect()
}
const CHUNK: usize = 256 << 10;

/// One stream on one of the rig's ways; Gb/s.
fn stream(rig: &Rig, way: Way, direction: Direction, time: Duration) -> anyhow::Result<f64> {
    let machine = rig.machine(way);
    let (from, to, address) = match direction {
        Direction::Ingress => (&rig.client, machine, way.machine()),
        Direction::Egress => (machine, &rig.client, way.client()),
    };
    transfer(from, to, address, time).with_context(|| format!("{way:?}, {direction:?}"))
}

/// Sends for `time`, waits until all of it arrived and was right, and returns Gb/s.
pub(super) fn transfer(
    from: &Space,
    to: &Space,
    address: Ipv4Addr,
    time: Duration,
) -> anyhow::Result<f64> {
    let listener = to.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 5001)))?;
    let port = listener.local_addr()?.port();
    let receiving = thread::spawn(move || -> anyhow::Result<u64> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let (pattern, mut buffer) = (pattern(), vec![0; CHUNK]);
        let mut total = 0_usize;
        loop {
            let size = stream.read(&mut buffer)?;
            if size == 0 {
                return Ok(total as u64);
            }
            let at = total % CHUNK;
            ensure!(buffer[..size] == pattern[at..at + size], "byte {total} or later is wrong");
            total += size;
        }
    });
    let limit = Duration::from_secs(5);
    let mut stream = from
        .run(|| TcpStream::connect_timeout(&SocketAddrV4::new(address, port).into(), limit))
        .context("connect")?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let chunk = &pattern()[..CHUNK];
    let (start, mut sent) = (Instant::now(), 0_u64);
    while start.elapsed() < time {
        stream.write_all(chunk)?;
        sent += CHUNK as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let arrived = receiving.join().map_err(|_| anyhow::anyhow!("the receiver failed"))??;
    let taken = start.elapsed().as_secs_f64();
    ensure!(arrived == sent, "{arrived} of {sent} bytes arrived");
    Ok(arrived as f64 * 8.0 / taken / 1e9)
}

/// What it costs to have frames counted by flow, which is off unless somebody looks on: packets of 64
/// bytes with it next to without, in turns.
fn watched(quick: bool) -> anyhow::Result<Vec<Row>> {
    let (runs, time) = if quick { (1, 300) } else { (7, 500) };
    let time = Duration::from_millis(time);
    let rig = Rig::new()?;
    rig.set_wire(true)?;
    flood(&rig, Way::Bpf, Duration::from_millis(50))?;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        without.push(flood(&rig, Way::Bpf, time)?);
        let flows = rig.count_flows()?;
        with.push(flood(&rig, Way::Bpf, time)?);
        for place in flows {
            let counted: u64 = place.read()?.iter().map(|flow| flow.packets).sum();
            ensure!(counted > 0, "nothing was counted");
        }
    }
    let bar = "conduit.watch.packets.64 | counted by flow, next to not";
    let (with, without) = (median(with) / 1e6, median(without) / 1e6);
    Ok(vec![Row::judged(bar, with, "M/s", Some(without), None)])
}

fn packets(quick: bool) -> anyhow::Result<Vec<Row>> {
    let (runs, time) = if quick { (1, 300) } else { (7, 500) };
    let time = Duration::from_millis(time);
    let rig = Rig::new()?;
    rig.set_wire(true)?;
    for way in Way::ALL {
        flood(&rig, way, Duration::from_millis(50))?;
    }
    let mut rates = [const { Vec::new() }; 3];
    for run in 0..runs {
        for at in 0..3 {
            let at = (at + run) % 3;
            rates[at].push(flood(&rig, Way::ALL[at], time)?);
        }
    }
    let [plain, vxlan, bpf] = rates.map(median);
    let row = |other: &str, rate, target| {
        let bar = format!("conduit.wire.packets.64 | next to {other}");
        Row::judged(&bar, bpf / 1e6, "M/s", Some(rate / 1e6), target)
    };
    Ok(vec![row("vxlan", vxlan, Some(Target::RatioAtLeast(0.9))), row("plain", plain, None)])
}

/// Datagrams of 18 bytes (64 on Ethernet) to the machine for `time`; how many reached its interface
/// a second.
fn flood(rig: &Rig, way: Way, time: Duration) -> anyhow::Result<f64> {
    const AT_ONCE: usize = 32;
    let machine = rig.machine(way);
    // Somebody listens, so that no answer "port unreachable" is sent; what it drops has arrived.
    let _ear = machine.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 5002)))?;
    let socket = rig.client.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    let to = SockaddrIn::from(SocketAddrV4::new(way.machine(), 5002));
    let payload = [[7_u8; 18]; AT_ONCE];
    let slices: Vec<[IoSlice<'_>; 1]> = payload.iter().map(|p| [IoSlice::new(p)]).collect();
    let addresses = [Some(to); AT_ONCE];
    let mut headers = MultiHeaders::preallocate(AT_ONCE, None);
    let before = received(machine, "eth0")?;
    let (start, mut sent) = (Instant::now(), 0_u64);
    while start.elapsed() < time {
        let done =
            sendmmsg(socket.as_raw_fd(), &mut headers, &slices, addresses, [], MsgFlags::empty())?;
        sent += done.count() as u64;
    }
    let taken = start.elapsed().as_secs_f64();
    let arrived = received(machine, "eth0")? - before;
    ensure!(arrived * 10 > sent, "{way:?}: {arrived} of {sent} packets arrived");
    Ok(arrived as f64 / taken)
}
