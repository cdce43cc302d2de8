//! The `drafter` command.

use clap::Parser;
use std::process::ExitCode;

/// Machines that move.
#[derive(Parser)]
#[command(version, about)]
enum Drafter {
    /// Make, look at, check and carry packages: what machines boot from.
    Package(drafter::cli::package::PackageArgs),
}

fn main() -> ExitCode {
    let result = match Drafter::parse() {
        Drafter::Package(args) => args.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("drafter: {error:#}");
            ExitCode::FAILURE
        }
    }
}
