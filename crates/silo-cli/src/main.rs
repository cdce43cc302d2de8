//! The `silo` command: disks that move, by hand. See `silo --help`.

mod bench;
mod cli;
mod config;
mod metrics;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli::log_to_stderr();
    match cli.run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("silo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
