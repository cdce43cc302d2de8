//! The `silo` command: devices that are layered, served, backed up and moved. See `silo --help`.
//!
//! Exit codes: 0 done; 1 failed; 2 wrong flags or a wrong config; 3 done, and what was checked is
//! not as it should be; 130 ended by a second signal.

mod assist;
mod backup;
mod bench;
mod cli;
mod config;
mod first_touch;
mod metrics;
mod moving;
mod note;
mod service;
mod stack;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli::log_to_stderr();
    match cli.run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(3),
        Err(error) => {
            eprintln!("silo: {}", whole(&error));
            let wrong_config = error.downcast_ref::<config::ConfigError>().is_some();
            ExitCode::from(if wrong_config { 2 } else { 1 })
        }
    }
}

/// An error with its causes; one that a message repeats already is not said again.
fn whole(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |said, cause| match cause.to_string() {
        cause if said.is_empty() => cause,
        cause if said.contains(&cause) => said,
        cause => format!("{said}: {cause}"),
    })
}
