//! The `architect` command.

use architect::{bench, doctor, measure};
use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};

/// Virtual machines that move between hosts while they run.
#[derive(Parser)]
#[command(name = "architect", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Try what this host can do; succeeds if the demonstration can run here.
    Doctor(doctor::Args),
    /// Measure moves next to QEMU's own; fails if a promise was not kept.
    Bench(measure::Args),
    /// Write the benchmark results into the table of a README.
    BenchTable {
        /// The results.
        #[arg(long, default_value = "target/bench/results.json")]
        results: PathBuf,
        /// The file with the markers.
        #[arg(long, default_value = "README.md")]
        readme: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("architect: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<bool> {
    match cli.command {
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => measure::run(&args),
        Command::BenchTable { results, readme } => {
            let results = bench::Results::read(&results)?;
            let changed = bench::update_readme(&readme, &results)?;
            let state = if changed { "updated" } else { "up to date" };
            println!("{}: {state}, {} rows", readme.display(), results.0.len());
            Ok(true)
        }
    }
}
