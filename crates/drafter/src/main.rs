//! The `drafter` command.

use clap::{CommandFactory, Parser};
use drafter::cli::{self, StateArgs};
use std::process::ExitCode;

/// Machines that move: run, migrate, suspend and inspect them
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Drafter {
    #[command(flatten)]
    state: StateArgs,
    #[command(subcommand)]
    command: Top,
}

#[derive(clap::Subcommand)]
enum Top {
    #[command(flatten)]
    Drafter(Box<cli::Command>),
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    cli::log_to_stderr();
    let args = Drafter::parse();
    let result = match args.command {
        Top::Drafter(command) => cli::execute(*command, &args.state),
        Top::Completions { shell } => {
            let mut command = Drafter::command();
            clap_complete::generate(shell, &mut command, "drafter", &mut std::io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::fail(&error),
    }
}
