//! What a change of one machine's way costs, with one machine and with many.

use super::Group;
use crate::lab::Space;
use bench::{Row, Target};
use conduit_bpf::{Attach, DataPlane, Entry, Key, Place};
use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    time::Instant,
};

pub(super) const GROUPS: &[Group] = &[Group {
    name: "flip",
    about: "one change of one machine's way, and what many machines cost",
    bars: &["conduit.flip.map", "conduit.flip.memory"],
    run: flips,
}];

const MANY: u32 = 10_000;

fn key(machine: u32) -> Key {
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 77, 0, 0)) + machine);
    Key { net: crate::tunnel::NETWORK, address: address.into() }
}

fn entry(epoch: u64) -> Entry {
    let owner = IpAddr::from([10, 88, 0, (epoch % 200) as u8 + 1]);
    let place = Place::Remote { leaving: false };
    Entry { epoch, owner, candidate: None, place, mac: [2, 0, 0, 0, 0, 1] }
}

/// The median of `count` flips, in microseconds, over machines 0 to `machines`.
fn measure(plane: &DataPlane, machines: u32, count: u64, epoch: &mut u64) -> anyhow::Result<f64> {
    let mut times = Vec::with_capacity(count as usize);
    for n in 0..count {
        *epoch += 1;
        // A step that is prime to the count: no order that a cache likes.
        let (key, entry) = (key((n as u32).wrapping_mul(7919) % machines), entry(*epoch));
        let start = Instant::now();
        plane.change(key, &entry)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn flips(quick: bool) -> anyhow::Result<Vec<Row>> {
    let count = if quick { 2_000 } else { 100_000 };
    let space = Space::new()?;
    space.run(|| {
        let plane = DataPlane::open(Path::new(conduit_bpf::ROOT), Attach::Auto)?;
        let rows = flips_of(&plane, count);
        plane.remove()?;
        rows
    })
}

fn flips_of(plane: &DataPlane, count: u64) -> anyhow::Result<Vec<Row>> {
    let mut epoch = 1;
    plane.change(key(0), &entry(epoch))?;
    let one = measure(plane, 1, count, &mut epoch)?;
    let empty = plane.memory()?;
    for machine in 1..MANY / 10 {
        plane.change(key(machine), &entry(1))?;
    }
    let tenth = plane.memory()?;
    for machine in MANY / 10..MANY {
        plane.change(key(machine), &entry(1))?;
    }
    let all = plane.memory()?;
    let many = measure(plane, MANY, count, &mut epoch)?;
    // The entries are what was written, each of them.
    let entries = plane.entries()?;
    anyhow::ensure!(entries.len() == MANY as usize, "{} entries of {MANY}", entries.len());
    anyhow::ensure!(entries.iter().all(|(_, e)| e.owner == entry(e.epoch).owner), "a torn entry");
    let each = |from: u64, to: u64, machines: u32| (to - from) as f64 / f64::from(machines);
    let (few_bytes, many_bytes) =
        (each(empty, tenth, MANY / 10 - 1), each(tenth, all, MANY - MANY / 10));
    Ok(vec![
        Row::judged("conduit.flip.map | one machine", one, "us", None, Some(Target::AtMost(50.0))),
        Row::judged(
            "conduit.flip.map | 10,000 machines",
            many,
            "us",
            Some(one),
            Some(Target::RatioAtMost(1.5)),
        ),
        Row::judged(
            "conduit.flip.memory | a machine, of 10,000 next to 1,000",
            many_bytes,
            "bytes",
            Some(few_bytes),
            Some(Target::RatioAtMost(1.1)),
        ),
    ])
}
