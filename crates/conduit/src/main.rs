//! The `conduit` command.

use clap::Parser;
use std::{io::IsTerminal, process::ExitCode};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = conduit::cli::Cli::parse();
    // boringtun calls it an error when a peer does not answer. A benchmark flips thousands of times.
    let usual = match cli.command {
        conduit::cli::Command::Bench(_) => "warn,boringtun=off",
        _ => "info,boringtun=off",
    };
    let filter = EnvFilter::try_from_env("CONDUIT_LOG").unwrap_or_else(|_| EnvFilter::new(usual));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match conduit::cli::run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("conduit: {error:#}");
            ExitCode::FAILURE
        }
    }
}
