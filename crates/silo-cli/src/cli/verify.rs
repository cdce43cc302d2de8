//! `silo verify`: is everything in the store that generations need, and is it what was stored?

use super::{human, print, progress::Progress, stop::Stop, store::StoreArgs};
use crate::config::ByteSize;
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use silo::store::{Access, Depth, LineName, Reading, StoreError, Verified, Which};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

/// How thoroughly to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum How {
    /// Everything is there and has its size
    Quick,
    /// Everything is read, decrypts, and is what its name says
    Full,
    /// Each object of the whole store has the bytes that its name says; needs no keys
    Scrub,
}

#[derive(Args)]
pub(super) struct VerifyArgs {
    /// `tenant/line`; without it all lines of the store
    line: Option<String>,
    /// Only this generation
    #[arg(long, value_name = "NUMBER", requires = "line")]
    generation: Option<u64>,
    /// How thoroughly
    #[arg(long, value_enum, default_value = "quick")]
    depth: How,
    /// Most bytes a second to read, with --depth scrub
    #[arg(long, value_name = "SIZE")]
    bandwidth: Option<ByteSize>,
    #[command(flatten)]
    store: StoreArgs,
}

/// Runs the command; false if something is wrong.
pub(super) fn run(args: &VerifyArgs, json: bool) -> Result<bool> {
    let stop = Stop::on_signals()?;
    let store = args.store.place()?.open(Access::Read)?;
    let (reading, halt) = (Reading::default(), AtomicBool::new(false));
    let progress = Progress::bytes("reading", 0, json);
    let verified = thread::scope(|scope| {
        let work = scope.spawn(|| -> Result<Verified> {
            if args.depth == How::Scrub {
                let rate = args.bandwidth.map(|rate| rate.0);
                return Ok(store.scrub(rate, &reading, &halt)?);
            }
            let depth = if args.depth == How::Full { Depth::Full } else { Depth::Quick };
            let keys = args.store.keys()?;
            let lines = match &args.line {
                Some(line) => vec![LineName::parse(line)?],
                None => store.lines(None)?,
            };
            let which = args.generation.map(Which::Number);
            let mut all = Verified::default();
            for line in &lines {
                match store.verify(&keys, line, which, depth, &reading, &halt) {
                    Ok(one) => add(&mut all, one),
                    // A line that was begun and has nothing yet.
                    Err(StoreError::NoGeneration { .. }) if args.line.is_none() => {}
                    Err(error) => return Err(error).with_context(|| format!("line {line}")),
                }
            }
            Ok(all)
        });
        while !work.is_finished() {
            if stop.wait(Duration::from_millis(20)) {
                halt.store(true, Ordering::Relaxed);
                break;
            }
            let of = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
            progress.set(of(&reading.done), of(&reading.total));
        }
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    progress.end();
    report(&verified, json)?;
    Ok(verified.is_well())
}

fn add(all: &mut Verified, one: Verified) {
    all.generations += one.generations;
    all.packs += one.packs;
    all.maps += one.maps;
    all.blocks += one.blocks;
    all.roots += one.roots;
    all.bytes += one.bytes;
    all.problems.extend(one.problems);
}

fn report(verified: &Verified, json: bool) -> Result<()> {
    let problems: Vec<_> = verified
        .problems
        .iter()
        .map(|problem| {
            let affects: Vec<String> =
                problem.affects.iter().map(|(line, number)| format!("{line} {number}")).collect();
            serde_json::json!({
                "object": problem.object, "error": problem.error.to_string(), "affects": affects,
            })
        })
        .collect();
    let value = serde_json::json!({
        "generations": verified.generations, "packs": verified.packs, "maps": verified.maps,
        "blocks": verified.blocks, "roots": verified.roots, "bytes": verified.bytes,
        "problems": problems,
    });
    let mut lines = vec![format!(
        "{} generations, {} packs, {} maps; {} read, {} blocks and {} roots checked",
        verified.generations,
        verified.packs,
        verified.maps,
        human(verified.bytes),
        verified.blocks,
        verified.roots
    )];
    for problem in &verified.problems {
        lines.push(format!("WRONG {}: {}", problem.object, problem.error));
        for (line, number) in &problem.affects {
            lines.push(format!("      generation {number} of {line} cannot be restored whole"));
        }
    }
    if verified.is_well() {
        lines.push("all is well".to_owned());
    }
    print(json, &value, &lines.join("\n"))
}
