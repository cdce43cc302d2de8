//! `architect bench`: what a move costs, measured on machines that really move, next to QEMU's own
//! migration of the same guest over the same link in the same run.
//!
//! [`groups`] says what is measured and what is promised of it, [`ours`] and [`stock`] do the
//! moves, [`versus`] lets them take turns, [`journal`] keeps every single one in `moves.jsonl`. Rows go to `results.json` after each
//! group, so that a later group's failure costs nothing of the earlier ones. Bars that begin with
//! `silo.` are measured by `silo bench`, those with `conduit.` by `conduit bench`, into the same file
//! (except for those with real machines: [`follow`]).
//!
//! What must hold: a row is only written from moves that happened in this run; a move that fails
//! is a failed run, with the ends of the logs, never a sample less. What needs 200 moves (a 99th
//! percentile) is left out and named when there were fewer.

mod backups;
mod cell;
mod evacuate;
mod follow;
mod fork;
mod groups;
mod journal;
mod ours;
mod processor;
mod protect;
mod sleep;
mod stock;
mod store;
mod versus;

use anyhow::{Context, bail, ensure};
use bench::Results;
use drafter::package::{
    Cache,
    build::{self, BuildRequest, recipe::AddedFile, recipe::Recipe, recipe::Root},
};
use journal::Journal;
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

/// Arguments of `architect bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Measure only bars whose names begin with this, as in `move.` or `move.blackout.`
    #[arg(long, default_value = "")]
    only: String,
    /// Folder for results.json and moves.jsonl
    #[arg(long, default_value = "target/bench")]
    output: PathBuf,
    /// Names of network namespaces begin with this
    #[arg(long, default_value = "bench")]
    prefix: String,
    /// What guests run on, ours and QEMU's alike: tcg or kvm
    #[arg(long, default_value = "tcg", value_parser = ["tcg", "kvm"])]
    accelerator: String,
    /// A package with Redis and the oracle [default: made from the recipe]
    #[arg(long)]
    package: Option<PathBuf>,
    /// The recipe of the guest; the oracle is added
    #[arg(long, default_value = "packages/redis.json")]
    recipe: PathBuf,
    /// A tenth of the moves: to try it out. Results go to quick.json, because they mean little
    #[arg(long)]
    quick: bool,
}

/// Set when the user has had enough.
#[derive(Clone, Debug, Default)]
struct Abandon(Arc<AtomicBool>);

impl Abandon {
    /// Takes Ctrl-C and its like from here on: the move at hand ends, the rig is removed.
    fn on_signals() -> anyhow::Result<Abandon> {
        let abandon = Abandon::default();
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            // A second signal ends it at once.
            signal_hook::flag::register_conditional_shutdown(signal, 130, abandon.0.clone())?;
            signal_hook::flag::register(signal, abandon.0.clone())?;
        }
        Ok(abandon)
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.0.load(Ordering::Relaxed), "stopped by a signal");
        Ok(())
    }
}

/// What the groups share.
struct Setting {
    prefix: String,
    accelerator: String,
    package: PathBuf,
    journal: Journal,
    abandon: Abandon,
    quick: bool,
}

impl Setting {
    /// The rig of a cell; what its line reaches is said and written down.
    fn bed(&mut self, cell: cell::Cell) -> anyhow::Result<(ours::Bed, crate::rig::line::Line)> {
        let (bed, line) = ours::Bed::new(cell, &self.prefix, &self.package, &self.accelerator)?;
        println!("   the line between the hosts: {line}");
        self.journal.line(cell, &line);
        Ok((bed, line))
    }

    /// How many times to do what is to be done `count` times.
    fn times(&self, count: usize) -> usize {
        if self.quick { count.div_ceil(10) } else { count }
    }
}

/// Parts whose own command measures them: what their bars begin with, and the command.
const PARTS: [(&str, &str); 2] = [("silo.", "silo"), ("conduit.", "conduit")];

/// Runs the command. True if every promise was kept.
///
/// # Errors
/// When something could not be measured; what was measured before is kept.
pub fn run(args: &Args) -> anyhow::Result<bool> {
    let chosen: Vec<_> = groups::ALL.iter().filter(|group| group.concerns(&args.only)).collect();
    let parts: Vec<_> = PARTS
        .into_iter()
        .filter(|(bars, _)| args.only.starts_with(bars) || bars.starts_with(&args.only))
        // Of the network those with real machines are measured here.
        .filter(|_| !args.only.starts_with(follow::BARS))
        .collect();
    if chosen.is_empty() && parts.is_empty() {
        let own = groups::ALL.iter().flat_map(|group| group.bars).copied();
        let all: Vec<_> = own.chain(PARTS.map(|(bars, _)| bars)).collect();
        bail!("no bar begins with \"{}\"; there are {}…", args.only, all.join("…, "));
    }
    let abandon = Abandon::on_signals()?;
    let machines =
        if chosen.is_empty() { Ok(true) } else { measure_machines(args, chosen, &abandon) };
    let mut results = vec![machines];
    for (bars, command) in parts {
        abandon.check()?;
        results.push(measure_part(args, bars, command));
    }
    let (mut met, mut failures) = (true, Vec::new());
    for result in results {
        match result {
            Ok(kept) => met &= kept,
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(met)
}

/// Lets a part's own command measure its bars. True if every promise was kept.
fn measure_part(args: &Args, bars: &str, name: &str) -> anyhow::Result<bool> {
    let program = crate::programs::command(name).with_context(|| {
        format!("the {name} command is not where the build puts it; run `make build` first")
    })?;
    let only = if args.only.starts_with(bars) { args.only.as_str() } else { bars };
    let mut command = std::process::Command::new(&program);
    command.args(["bench", "--only", only, "--output"]).arg(&args.output);
    if args.quick {
        command.arg("--quick");
    }
    let status =
        command.status().with_context(|| format!("could not run {}", program.display()))?;
    match status.code() {
        Some(0) => Ok(true),
        // What it says when all was measured and a promise was not kept.
        Some(3) => Ok(false),
        _ => bail!("{name} bench: {status}; what went wrong stands above"),
    }
}

fn measure_machines(
    args: &Args,
    chosen: Vec<&groups::Group>,
    abandon: &Abandon,
) -> anyhow::Result<bool> {
    let mut setting = Setting {
        prefix: args.prefix.clone(),
        accelerator: args.accelerator.clone(),
        package: package(args)?,
        journal: Journal::open(&args.output)?,
        abandon: abandon.clone(),
        quick: args.quick,
    };
    let path = args.output.join(if args.quick { "quick.json" } else { "results.json" });
    let (start, mut failed, mut met) = (Instant::now(), Vec::new(), true);
    let mut bars = Vec::new();
    for group in chosen {
        let began = Instant::now();
        println!("== {}: {}", group.name, group.about);
        setting.journal.group(group.name);
        let rows = match (group.run)(&mut setting) {
            Ok(rows) => rows,
            Err(error) => {
                println!("   failed: {error:#}");
                failed.push(group.name);
                setting.abandon.check()?;
                continue;
            }
        };
        met &= Results::report(&path, rows, &args.only, &mut bars)?;
        println!("   {:.0} s", began.elapsed().as_secs_f64());
    }
    println!("{}: {:.0} s altogether", path.display(), start.elapsed().as_secs_f64());
    ensure!(failed.is_empty(), "could not be measured: {}", failed.join(", "));
    Results::retire(&path, &bars, |bar| {
        let parts = PARTS.iter().any(|(bars, _)| bar.starts_with(bars));
        bar.starts_with(&args.only) && (!parts || bar.starts_with(follow::BARS))
    })?;
    Ok(met)
}

/// The package to measure with: Redis and the oracle.
fn package(args: &Args) -> anyhow::Result<PathBuf> {
    if let Some(path) = &args.package {
        return Ok(path.clone());
    }
    let mut recipe = Recipe::read(&args.recipe)?;
    let oracle = crate::programs::oracle()
        .context("the oracle is not where the build puts it; run `make build` first")?;
    recipe.name = format!("{}-bench", recipe.name);
    if let Root::Debian { packages, .. } = &mut recipe.root {
        packages.push("dash".into()); // starts the spinner of the slow-down rows
    }
    recipe.files.push(AddedFile {
        from: oracle,
        to: "/usr/bin/oracle".into(),
        owner: "root".into(),
        mode: None,
    });
    let request = BuildRequest {
        recipe,
        guest_program: build::find_guest_program()?,
        cache: Cache::default_for_user(),
        output: None,
    };
    let built = build::build(&request, &mut |_| {})?;
    Ok(Path::to_path_buf(built.package.dir()))
}
