//! The `architect` command: its own subcommands, and those of `drafter` about machines.

use architect::{demo, doctor, measure};
use clap::{Args as _, CommandFactory, FromArgMatches, Parser, Subcommand};
use drafter::cli::{self, StateArgs};
use std::{path::PathBuf, process::ExitCode};

/// Virtual machines that move between hosts while they run.
#[derive(Parser)]
#[command(name = "architect", version)]
struct Cli {
    #[command(subcommand)]
    command: Own,
}

#[derive(Subcommand)]
enum Own {
    /// Move a busy Redis machine between two hosts on this computer, and show what was noticed
    Demo(demo::Args),
    /// Try what this host can do; succeeds if the demonstration can run here
    Doctor(doctor::Args),
    /// Measure moves next to QEMU's own; fails if a promise was not kept
    Bench(measure::Args),
    /// Write the benchmark results into the table of a README
    BenchTable {
        /// The results
        #[arg(long, default_value = "target/bench/results.json")]
        results: PathBuf,
        /// The file with the markers
        #[arg(long, default_value = "README.md")]
        readme: PathBuf,
    },
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Where the subcommands about machines come in the help: after ours.
const MACHINES: usize = 100;

/// All subcommands. Those about machines take drafter's `--state` and `--json`, ours do not: the
/// demonstration's `--json` names a file.
fn command() -> clap::Command {
    let machines = cli::Command::augment_subcommands(clap::Command::new("machines"));
    machines.get_subcommands().fold(Cli::command(), |command, machine| {
        let about = machine.get_about().cloned().unwrap_or_default();
        // Adding arguments takes over their struct's description.
        let machine = StateArgs::augment_args(machine.clone()).about(about);
        command.subcommand(machine.display_order(MACHINES))
    })
}

fn main() -> ExitCode {
    cli::log_to_stderr();
    let matches = command().get_matches();
    let own = Cli::command();
    let name = matches.subcommand_name().unwrap_or_default();
    let result = if own.find_subcommand(name).is_some() {
        match Own::from_arg_matches(&matches) {
            Ok(own) => run(own),
            Err(error) => error.exit(),
        }
    } else {
        let (_, arguments) = matches.subcommand().expect("clap demands a subcommand");
        match (cli::Command::from_arg_matches(&matches), StateArgs::from_arg_matches(arguments)) {
            (Ok(machine), Ok(state)) => cli::execute(machine, &state).map(|()| true),
            (Err(error), _) | (_, Err(error)) => error.exit(),
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => match error.downcast_ref::<demo::Stopped>() {
            Some(stopped) => {
                eprintln!("{stopped}; everything was removed");
                ExitCode::from(stopped.exit_code())
            }
            None => {
                let _ = cli::fail(&error);
                ExitCode::from(2)
            }
        },
    }
}

fn run(command: Own) -> anyhow::Result<bool> {
    match command {
        Own::Demo(args) => demo::run(&args),
        Own::Doctor(args) => doctor::run(&args),
        Own::Bench(args) => measure::run(&args),
        Own::BenchTable { results, readme } => {
            let results = bench::Results::read(&results)?;
            let changed = bench::update_readme(&readme, &results)?;
            let state = if changed { "updated" } else { "up to date" };
            println!("{}: {state}, {} rows", readme.display(), results.0.len());
            Ok(true)
        }
        Own::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut crate::command(),
                "architect",
                &mut std::io::stdout(),
            );
            Ok(true)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_of_both_parts_fit_together() {
        command().debug_assert();
    }

    #[test]
    fn the_demonstrations_json_is_a_file_and_that_of_list_a_switch() {
        let matches = command()
            .try_get_matches_from(["architect", "demo", "--json", "out.json", "--mode", "mixed"])
            .unwrap();
        let Ok(Own::Demo(args)) = Own::from_arg_matches(&matches) else { panic!("not the demo") };
        assert_eq!(args.json, Some("out.json".into()));
        assert_eq!(args.mode, Some(demo::HowToMove::Mixed));

        let matches = command()
            .try_get_matches_from(["architect", "list", "--json", "--state", "/x"])
            .unwrap();
        let (_, arguments) = matches.subcommand().unwrap();
        let state = StateArgs::from_arg_matches(arguments).unwrap();
        assert!(state.json && state.state.as_os_str() == "/x");
        cli::Command::from_arg_matches(&matches).unwrap();
    }

    #[test]
    fn nested_commands_about_machines_take_the_state_too() {
        let matches = command()
            .try_get_matches_from(["architect", "job", "follow", "redis", "3", "--state", "/x"])
            .unwrap();
        let (_, arguments) = matches.subcommand().unwrap();
        assert_eq!(StateArgs::from_arg_matches(arguments).unwrap().state, PathBuf::from("/x"));
    }
}
