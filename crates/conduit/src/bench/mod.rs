//! `conduit bench`: what the BPF data path costs, next to kernel vxlan and plain routing in the
//! same rig and the same run.
//!
//! One file for each subject; each lists its [`Group`]s. A row's name begins with `conduit.`;
//! `make bench ONLY=conduit.` runs them all and writes the table of the README. Everything happens
//! in network namespaces that go with this process.

mod asked;
mod edges;
mod flip;
mod gap;
mod kill;
mod rig;
mod wg;
mod wire;

use anyhow::{Context, bail, ensure};
use bench::{Results, Row};
use std::{path::PathBuf, time::Instant};

/// Arguments of `conduit bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Measure only bars whose names begin with this, as in `conduit.wire.`
    #[arg(long, default_value = "conduit.")]
    only: String,
    /// Folder for results.json
    #[arg(long, default_value = "target/bench")]
    output: PathBuf,
    /// A tenth of the work: to try it out. Results go to quick.json, because they mean little
    #[arg(long)]
    quick: bool,
}

/// Bars that are measured together.
struct Group {
    /// Short name.
    name: &'static str,
    /// One line for people.
    about: &'static str,
    /// Beginnings of the names of its bars.
    bars: &'static [&'static str],
    /// Measures; true if a tenth of the work is asked for.
    run: fn(bool) -> anyhow::Result<Vec<Row>>,
}

const ALL: &[&[Group]] = &[
    wire::GROUPS,
    flip::GROUPS,
    asked::GROUPS,
    gap::GROUPS,
    kill::GROUPS,
    edges::GROUPS,
    wg::GROUPS,
];

/// The `conduit` whose daemons are measured: this one.
fn program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("find this program")
}

/// Runs the command. True if every promise was kept.
pub fn run(args: &Args) -> anyhow::Result<bool> {
    let all = || ALL.iter().flat_map(|groups| groups.iter());
    let concerns = |group: &&Group| {
        group.bars.iter().any(|bar| bar.starts_with(&args.only) || args.only.starts_with(bar))
    };
    let chosen: Vec<&Group> = all().filter(concerns).collect();
    if chosen.is_empty() {
        let known: Vec<_> = all().flat_map(|group| group.bars).copied().collect();
        bail!("no bar begins with \"{}\"; there are {}…", args.only, known.join("…, "));
    }
    std::fs::create_dir_all(&args.output)?;
    let path = args.output.join(if args.quick { "quick.json" } else { "results.json" });
    let (start, mut failed, mut met) = (Instant::now(), Vec::new(), true);
    let mut bars = Vec::new();
    for group in chosen {
        println!("== {}: {}", group.name, group.about);
        let began = Instant::now();
        match (group.run)(args.quick) {
            Ok(rows) => met &= Results::report(&path, rows, &args.only, &mut bars)?,
            Err(error) => {
                println!("   failed: {error:#}");
                failed.push(group.name);
            }
        }
        println!("   {:.0} s", began.elapsed().as_secs_f64());
    }
    println!("{}: {:.0} s altogether", path.display(), start.elapsed().as_secs_f64());
    ensure!(failed.is_empty(), "could not be measured: {}", failed.join(", "));
    // Those with real machines are measured by `architect bench`.
    let ours = |bar: &str| bar.starts_with(&args.only) && !bar.starts_with("conduit.gap.machine.");
    Results::retire(&path, &bars, ours)?;
    Ok(met)
}
