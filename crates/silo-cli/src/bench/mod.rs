//! `silo bench`: what silo costs, next to something else that does the same work in the same run.
//!
//! One file for each part of the engine; each lists its [`Group`]s. A row's name begins with
//! `silo.`; `make bench ONLY=silo.` runs them all and writes the table of the README.
//!
//! What must hold: a row is only written from work that was done and checked in this run; where a
//! tool for the comparison is missing, the group fails and says which package has it.

mod backup;
mod mount;
mod moving;
mod serving;
mod tracking;
mod vhost;

use anyhow::{bail, ensure};
use bench::{Results, Row};
use std::{path::PathBuf, time::Instant};

/// Arguments of `silo bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Measure only bars whose names begin with this, as in `silo.mount.`
    #[arg(long, default_value = "silo.")]
    only: String,
    /// Folder for results.json and scratch files
    #[arg(long, default_value = "target/bench")]
    output: PathBuf,
    /// A tenth of the work: to try it out. Results go to quick.json, because they mean little
    #[arg(long)]
    quick: bool,
}

/// What the groups share.
pub(crate) struct Setting {
    /// A folder on a real file system for scratch files; emptied after each group.
    pub(crate) scratch: PathBuf,
    /// A tenth of the work is asked for.
    pub(crate) quick: bool,
}

impl Setting {
    /// How many times to do what is to be done `count` times.
    pub(crate) fn times(&self, count: usize) -> usize {
        if self.quick { count.div_ceil(10) } else { count }
    }
}

/// Bars that are measured together.
pub(crate) struct Group {
    /// Short name.
    pub(crate) name: &'static str,
    /// One line for people.
    pub(crate) about: &'static str,
    /// Beginnings of the names of its bars.
    pub(crate) bars: &'static [&'static str],
    /// Measures.
    pub(crate) run: fn(&Setting) -> anyhow::Result<Vec<Row>>,
}

impl Group {
    fn concerns(&self, only: &str) -> bool {
        self.bars.iter().any(|bar| bar.starts_with(only) || only.starts_with(bar))
    }
}

/// The groups of each part of the engine.
const ALL: &[&[Group]] = &[
    backup::GROUPS,
    mount::GROUPS,
    moving::GROUPS,
    vhost::GROUPS,
    serving::GROUPS,
    tracking::GROUPS,
];

/// Runs the command. True if every promise was kept.
pub(crate) fn run(args: &Args) -> anyhow::Result<bool> {
    let all = || ALL.iter().flat_map(|groups| groups.iter());
    let chosen: Vec<&Group> = all().filter(|group| group.concerns(&args.only)).collect();
    if chosen.is_empty() {
        let known: Vec<_> = all().flat_map(|group| group.bars).copied().collect();
        bail!("no bar begins with \"{}\"; there are {}…", args.only, known.join("…, "));
    }
    std::fs::create_dir_all(&args.output)?;
    let path = args.output.join(if args.quick { "quick.json" } else { "results.json" });
    let (start, mut failed, mut met) = (Instant::now(), Vec::new(), true);
    let mut bars = Vec::new();
    for group in chosen {
        let began = Instant::now();
        println!("== {}: {}", group.name, group.about);
        let scratch = tempfile::Builder::new().prefix("silo-").tempdir_in(&args.output)?;
        let setting = Setting { scratch: scratch.path().to_owned(), quick: args.quick };
        let rows = match (group.run)(&setting) {
            Ok(rows) => rows,
            Err(error) => {
                println!("   failed: {error:#}");
                failed.push(group.name);
                continue;
            }
        };
        met &= Results::report(&path, rows, &args.only, &mut bars)?;
        println!("   {:.0} s", began.elapsed().as_secs_f64());
    }
    println!("{}: {:.0} s altogether", path.display(), start.elapsed().as_secs_f64());
    ensure!(failed.is_empty(), "could not be measured: {}", failed.join(", "));
    Results::retire(&path, &bars, |bar| bar.starts_with(&args.only))?;
    Ok(met)
}
