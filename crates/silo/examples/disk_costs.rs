//! What the calls cost that a switchover makes, on a disk of 4 GiB with scattered blocks:
//! `cargo run --release -p silo --example disk_costs -- FOLDER`.

use anyhow::{Context, Result};
use silo::{
    block::{BLOCK_SIZE, BlockIndex, BlockSet},
    device::{Device, DeviceName},
    disk::{Disk, DiskOptions, FlushPolicy},
};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

const BLOCKS: u64 = 1 << 20;
const SCATTERED: u64 = 10_000;

fn timed<T>(what: &str, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = call();
    println!("{what:<48} {:>10.3} ms", start.elapsed().as_secs_f64() * 1e3);
    result
}

fn main() -> Result<()> {
    let dir = std::env::args_os().nth(1).map(PathBuf::from).context("give an empty folder")?;
    let options = DiskOptions::new(DeviceName::new("root").context("a name")?);
    let bytes = BLOCKS * BLOCK_SIZE as u64;
    let source = timed("create", || Disk::create(&dir.join("source"), None, bytes, &options))?;
    let target = Disk::create(&dir.join("target"), None, bytes, &options)?;
    timed("reset (destination, before pre-copy)", || target.reset())?;

    let page = [7; BLOCK_SIZE];
    let spread = || (0..SCATTERED).map(|at| at * (BLOCKS / SCATTERED));
    timed("10,000 scattered first writes of 4 KiB", || {
        spread().try_for_each(|block| source.write_at(block * BLOCK_SIZE as u64, &page))
    })?;
    timed("flush of those", || source.flush())?;
    timed("flush with nothing to do", || source.flush())?;
    source.write_at(0, &page)?;
    timed("flush of one block rewritten", || source.flush())?;
    source.set_flush_policy(FlushPolicy::Switchover);
    source.answer_now();
    source.write_at(0, &page)?;
    timed("flush, answered early", || source.flush())?;
    timed("  until it was durable", || {
        source.wait_durable(Instant::now() + Duration::from_secs(60))
    })?;
    let dirty = timed("take_dirty, 10,000 ranges", || source.take_dirty())?;
    timed("take_dirty, empty", || source.take_dirty())?;
    timed("freeze", || source.freeze(Duration::from_secs(1)))?;

    let mut missing = BlockSet::new(BLOCKS);
    for range in dirty.ranges() {
        missing.insert_range(range);
    }
    timed("arm, 10,000 ranges missing", || target.arm(&missing, Box::new(|_| {})))?;
    timed("10,000 fills of 4 KiB", || {
        spread().try_for_each(|block| target.fill(BlockIndex(block), &page).map(|_| ()))
    })?;
    timed("missing()", || target.missing());
    timed("complete", || target.complete())?;
    drop(target);
    timed("open after the process died", || {
        Disk::open(&dir.join("target"), None, &options).map(drop)
    })?;
    Ok(())
}
