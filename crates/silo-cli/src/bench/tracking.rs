//! Bars of what lies between a writer and a device: what counting writes in rounds costs, how fast
//! whole blocks are written into the write-back cache by round trip of the device behind, what
//! happens beyond its limit, and how much memory a device takes.
//!
//! Every row's bytes are read back from the device behind and compared.

use super::{Group, Setting};
use anyhow::{Context, ensure};
use bench::{Row, Samples, Target};
use silo::{
    expose::fuse::{FuseMount, FuseOptions},
    filter::{CacheOptions, Delayed, Delays, Tracked, WriteCache},
    io::BlockDevice,
    layer::{Stack, StackOptions},
    nbd::{Endpoint, NbdClient, NbdClientOptions, NbdOptions, NbdServer},
    source::MemoryDevice,
};
use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "tracking",
        about: "what exact rounds cost, for random writes of 4 KiB",
        bars: &["silo.tracking."],
        run: tracking,
    },
    Group {
        name: "write",
        about: "whole blocks into the write-back cache, by round trip of the device behind",
        bars: &["silo.write."],
        run: write,
    },
    Group {
        name: "footprint",
        about: "memory of a device's maps, epochs and cache",
        bars: &["silo.footprint."],
        run: footprint,
    },
];

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;
/// How long a server gets to stop.
const STOP: Duration = Duration::from_secs(20);

/// splitmix64: the same order of blocks in every run.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let mut content = Vec::with_capacity(bytes + 8);
    while content.len() < bytes {
        content.extend_from_slice(&next(&mut state).to_le_bytes());
    }
    content.truncate(bytes);
    content
}

fn median(values: impl IntoIterator<Item = f64>) -> anyhow::Result<f64> {
    Samples::new(values).and_then(|samples| samples.median()).context("nothing was measured")
}

fn memory(bytes: u64) -> anyhow::Result<Arc<MemoryDevice>> {
    Ok(Arc::new(MemoryDevice::new("silo bench", bytes)?))
}

// ---- tracking

/// Writes pages at random places; how many a second.
fn random_writes(device: &dyn BlockDevice, seed: u64, count: usize) -> anyhow::Result<f64> {
    let page = pattern(seed, PAGE);
    let pages = device.size() / PAGE as u64;
    let mut state = seed;
    let start = Instant::now();
    for _ in 0..count {
        device.write_at(next(&mut state) % pages * PAGE as u64, &page)?;
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

/// Whether the pages that a run wrote last are there.
fn check_writes(device: &dyn BlockDevice, seed: u64, count: usize) -> anyhow::Result<()> {
    let page = pattern(seed, PAGE);
    let pages = device.size() / PAGE as u64;
    let (mut state, mut found) = (seed, vec![0; PAGE]);
    for _ in 0..count.min(1000) {
        let at = next(&mut state) % pages * PAGE as u64;
        device.read_at(at, &mut found)?;
        ensure!(found == page, "the page at {at} is not what was written");
    }
    Ok(())
}

/// A run that is checked; operations a second.
fn checked_writes(device: &dyn BlockDevice, seed: u64, count: usize) -> anyhow::Result<f64> {
    let rate = random_writes(device, seed, count)?;
    check_writes(device, seed, count)?;
    Ok(rate)
}

/// Pairs of runs with and without tracking, in turns: medians of operations a second, and the
/// median of the pairs' extra time, as a share. Both are ways to the same device below: of two
/// devices, one may lie better in memory by more than tracking costs.
fn compare_tracking(
    plain: &dyn BlockDevice,
    tracked: &dyn BlockDevice,
    pairs: usize,
    count: usize,
) -> anyhow::Result<(f64, f64, f64)> {
    // Once to make pages present.
    random_writes(plain, 1, count)?;
    random_writes(tracked, 2, count)?;
    let (mut without, mut with, mut extra) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..pairs as u64 {
        // Each run writes something else, or one could pass for the other.
        let seed = 100 + 2 * pair;
        let (a, b) = if pair % 2 == 0 {
            let a = checked_writes(plain, seed, count)?;
            (a, checked_writes(tracked, seed + 1, count)?)
        } else {
            let b = checked_writes(tracked, seed, count)?;
            (checked_writes(plain, seed + 1, count)?, b)
        };
        without.push(a);
        with.push(b);
        extra.push(a / b - 1.0);
    }
    Ok((median(without)?, median(with)?, median(extra)?))
}

fn tracking(setting: &Setting) -> anyhow::Result<Vec<Row>> {
    const SIZE: u64 = 256 * MIB;
    let mut rows = Vec::new();
    let mut add = |bar: &str, (plain, tracked, extra): (f64, f64, f64), target: bool| {
        let target = target.then_some(Target::AtMost(3.0));
        rows.push(Row::judged(
            &format!("silo.tracking.{bar}"),
            extra * 100.0,
            "% more time",
            None,
            target,
        ));
        rows.push(Row::judged(
            &format!("silo.tracking.{bar}.rate"),
            tracked / 1000.0,
            "thousand/s",
            Some(plain / 1000.0),
            None,
        ));
    };
    let pairs = if setting.quick { 5 } else { 21 };

    // Served, as writers see it.
    let plain = memory(SIZE)?;
    let tracked = Arc::new(Tracked::new(plain.clone(), PAGE as u32)?);
    let sockets = [setting.scratch.join("plain.sock"), setting.scratch.join("tracked.sock")];
    let servers = [
        NbdServer::start(&sockets[0], plain, NbdOptions::default())?,
        NbdServer::start(&sockets[1], tracked.clone(), NbdOptions::default())?,
    ];
    let connect =
        |socket: &Path| NbdClient::connect(&Endpoint::unix(socket), NbdClientOptions::default());
    let (a, b) = (connect(&sockets[0])?, connect(&sockets[1])?);
    add("nbd.4k", compare_tracking(&a, &b, pairs, setting.times(20_000))?, true);
    drop((a, b));
    for server in servers {
        server.stop(STOP)?;
    }
    let round = tracked.rounds().advance(STOP)?;
    ensure!(tracked.rounds().clock() > round, "the round did not end");

    // In a stack of layers, called directly: what a program pays that has silo in itself. Nothing is
    // promised but for devices that are served.
    let options = StackOptions { bytes: SIZE, block: PAGE as u32 };
    let plain = Arc::new(Stack::create(&setting.scratch.join("stack"), None, options)?);
    let tracked = Tracked::new(plain.clone(), PAGE as u32)?;
    add("stack.4k", compare_tracking(&*plain, &tracked, pairs, setting.times(100_000))?, false);

    // Memory, called directly: a copy and nothing else, so all of the cost shows.
    let plain = memory(SIZE)?;
    let tracked = Tracked::new(plain.clone(), PAGE as u32)?;
    add("memory.4k", compare_tracking(&*plain, &tracked, pairs, setting.times(400_000))?, false);
    Ok(rows)
}

// ---- write

/// Writes `content` in requests of 1 MiB; GB/s until the last one was answered.
fn whole_blocks(
    content: &[u8],
    mut write: impl FnMut(u64, &[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let start = Instant::now();
    for (index, part) in content.chunks(MIB as usize).enumerate() {
        write(index as u64 * MIB, part)?;
    }
    Ok(content.len() as f64 / start.elapsed().as_secs_f64() / 1e9)
}

fn check_behind(behind: &MemoryDevice, content: &[u8]) -> anyhow::Result<()> {
    let mut found = vec![0; content.len()];
    behind.read_at(0, &mut found)?;
    ensure!(found == content, "the device behind does not hold what was written");
    Ok(())
}

/// A cache over memory that is so far away.
fn far_cache(
    bytes: u64,
    budget: u64,
    delays: Delays,
) -> anyhow::Result<(Arc<MemoryDevice>, Arc<WriteCache>)> {
    let behind = memory(bytes)?;
    let far = Arc::new(Delayed::new(behind.clone(), delays));
    Ok((behind, Arc::new(WriteCache::new(far, CacheOptions::with_budget(budget))?)))
}

#[derive(Clone, Copy)]
enum Door {
    Library,
    Nbd,
    File,
}

/// One run through a front end: GB/s.
fn through(
    door: Door,
    setting: &Setting,
    (behind, cache): &(Arc<MemoryDevice>, Arc<WriteCache>),
    content: &[u8],
) -> anyhow::Result<f64> {
    // So that what an earlier run wrote does not pass for what this one did; memory stays present.
    for at in (0..behind.size()).step_by(MIB as usize) {
        behind.write_at(at, &[0; PAGE])?;
    }
    let rate = match door {
        Door::Library => {
            let rate = whole_blocks(content, |at, part| Ok(cache.write_at(at, part)?))?;
            cache.flush()?;
            rate
        }
        Door::Nbd => {
            let socket = setting.scratch.join("write.sock");
            let server = NbdServer::start(&socket, cache.clone(), NbdOptions::default())?;
            let client = NbdClient::connect(&Endpoint::unix(&socket), NbdClientOptions::default())?;
            let rate = whole_blocks(content, |at, part| Ok(client.write_at(at, part)?))?;
            client.flush()?;
            drop(client);
            server.stop(STOP)?;
            rate
        }
        Door::File => {
            let place = setting.scratch.join("mount");
            fs::create_dir_all(&place)?;
            let mount = FuseMount::mount(&place, "disk", cache.clone(), &FuseOptions::default())?;
            let file = OpenOptions::new().read(true).write(true).open(mount.path())?;
            let rate = whole_blocks(content, |at, part| Ok(file.write_all_at(part, at)?))?;
            file.sync_all()?;
            drop(file);
            mount.stop(STOP)?;
            rate
        }
    };
    check_behind(behind, content)?;
    Ok(rate)
}

fn write(setting: &Setting) -> anyhow::Result<Vec<Row>> {
    let content = pattern(7, if setting.quick { 64 << 20 } else { 512 << 20 });
    let runs = if setting.quick { 3 } else { 5 };
    let mut rows = Vec::new();
    for (door, name) in [(Door::Library, "library"), (Door::Nbd, "nbd"), (Door::File, "file")] {
        for milliseconds in [0, 10, 40] {
            let rtt = Duration::from_millis(milliseconds);
            // Up to the limit: all of it fits.
            let bytes = content.len() as u64;
            let cache = far_cache(bytes, bytes + 64 * MIB, Delays::round_trip(rtt))?;
            // Once to make memory present.
            through(door, setting, &cache, &content)?;
            let rates = (0..runs).map(|_| through(door, setting, &cache, &content));
            let rate = median(rates.collect::<anyhow::Result<Vec<_>>>()?)?;
            rows.push(Row::judged(
                &format!("silo.write.{name}.{milliseconds}ms"),
                rate,
                "GB/s",
                None,
                Some(Target::AtLeast(1.0)),
            ));
        }
    }
    // Beyond the limit: as fast as the line takes it, and no write fails.
    let line = 500 << 20;
    let delays = Delays { bandwidth: line, ..Delays::round_trip(Duration::from_millis(10)) };
    let budget = content.len() as u64 / 8;
    let (behind, cache) = far_cache(content.len() as u64, budget, delays)?;
    let start = Instant::now();
    let mut most = 0;
    whole_blocks(&content, |at, part| {
        cache.write_at(at, part)?;
        most = most.max(cache.status().held);
        Ok(())
    })?;
    cache.flush()?;
    let rate = content.len() as f64 / start.elapsed().as_secs_f64() / 1e9;
    check_behind(&behind, &content)?;
    ensure!(cache.status().failures == 0, "writes to the device behind failed");
    rows.push(Row::judged(
        "silo.write.beyond.10ms",
        rate,
        "GB/s",
        Some(line as f64 / 1e9),
        Some(Target::RatioAtLeast(0.8)),
    ));
    rows.push(Row::judged(
        "silo.write.beyond.memory",
        most as f64 / MIB as f64,
        "MiB",
        Some(budget as f64 / MIB as f64),
        Some(Target::RatioAtMost(1.05)),
    ));
    Ok(rows)
}

// ---- footprint

/// Memory of this process that is its own, in bytes.
fn own_memory() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no RssAnon")?;
    Ok(kib.trim().parse::<u64>()? * 1024)
}

/// A tracked, cached stack of which every block's maps are in use, while the cache is as full as it
/// gets: memory beyond the cache's budget, as a share of the device.
fn footprint_of(setting: &Setting, bytes: u64, block: u32) -> anyhow::Result<f64> {
    const BUDGET: u64 = 64 * MIB;
    let before = own_memory()?;
    let dir = setting.scratch.join(format!("footprint {block}"));
    let stack = Arc::new(Stack::create(&dir, None, StackOptions { bytes, block })?);
    let tracked = Arc::new(Tracked::new(stack.clone(), block)?);
    // Zeros everywhere: each block has a state, an epoch and its bits.
    let mut at = 0;
    while at < bytes {
        let part = (bytes - at).min(1 << 30);
        tracked.zero(at, part, false)?;
        at += part;
    }
    // A second layer, as while a backup runs.
    drop(stack.push(STOP)?);
    tracked.flush()?;
    let maps = own_memory()?.saturating_sub(before);
    // And twice as much written at once as the cache may hold, over a line that is slow.
    let far = Delayed::new(tracked, Delays::round_trip(Duration::from_millis(20)));
    let cache = WriteCache::new(Arc::new(far), CacheOptions::with_budget(BUDGET))?;
    let data = pattern(5, MIB as usize);
    let (mut state, mut most) = (3, 0);
    for _ in 0..BUDGET / MIB * 2 {
        cache.write_at(next(&mut state) % (bytes / MIB) * MIB, &data)?;
        most = most.max(own_memory()?.saturating_sub(before));
    }
    cache.flush()?;
    let mut found = vec![0; MIB as usize];
    let mut state = 3;
    for _ in 0..10 {
        cache.read_at(next(&mut state) % (bytes / MIB) * MIB, &mut found)?;
        ensure!(found == data, "the device does not hold what was written");
    }
    let beyond = most.saturating_sub(BUDGET).max(maps);
    Ok(beyond as f64 / bytes as f64 * 100.0)
}

fn footprint(setting: &Setting) -> anyhow::Result<Vec<Row>> {
    let bytes = if setting.quick { 16 << 30 } else { 64 << 30 };
    let mut rows = Vec::new();
    for (block, name, limit) in [(64 << 10, "64k", 0.1), (4096, "4k", 0.4)] {
        rows.push(Row::judged(
            &format!("silo.footprint.{name}"),
            footprint_of(setting, bytes, block)?,
            "% of the device",
            None,
            Some(Target::AtMost(limit)),
        ));
    }
    Ok(rows)
}
