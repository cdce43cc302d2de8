//! The `silo` command: disks that move, by hand. See `silo --help`.

mod cli;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli::log_to_stderr();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("silo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
