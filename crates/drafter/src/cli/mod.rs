//! The subcommands about machines. `drafter` and `architect` both mount [`Command`].
//!
//! A command talks to a runner over its API socket and owns nothing: ending it harms no machine.

mod backup;
mod evacuate;
mod fork;
mod list;
mod machine;
mod moves;
mod output;
pub mod package;
mod protect;
mod reception;
mod recover;
mod run;
mod spawned;

pub use output::{Format, fail, log_to_stderr};

use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Where a host keeps its machines.
#[derive(Args, Clone, Debug)]
pub struct StateArgs {
    /// The host's state directory
    #[arg(long, env = "DRAFTER_STATE", default_value = crate::runner::state::DEFAULT_STATE, global = true)]
    pub state: PathBuf,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// Machines, packages, certificates.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a package as a machine on this host
    Run(run::RunArgs),
    /// Wait here for a machine that moves to this host, or for any number of them
    Receive(reception::ReceiveArgs),
    /// Go on where a runner of this host died, from its state directory alone
    Recover(recover::RecoverArgs),
    /// Keep a machine's runner alive: as `recover`, again and again, until the machine has ended or left
    Supervise(recover::RecoverArgs),
    /// Run a suspended machine again, on this or any other host
    Resume(run::ResumeArgs),
    /// List the machines of this host
    List,
    /// Where a machine is, who may run it, what is missing
    Status(machine::NameArgs),
    /// Everything that is known about a machine
    Inspect(machine::NameArgs),
    /// Print the machine's console
    Console(machine::ConsoleArgs),
    /// Run a command inside a machine
    Exec(machine::ExecArgs),
    /// Move a machine to another host
    Migrate(moves::MigrateArgs),
    /// Move all machines of this host to others before a deadline, or put them to sleep in a store
    Evacuate(evacuate::EvacuateArgs),
    /// Follow or cancel a move
    #[command(subcommand)]
    Job(moves::JobCommand),
    /// Begin copies of a running machine on this host, each a machine of its own
    Fork(fork::ForkArgs),
    /// A runner with settings from a file: `fork` and `receive --any` start this
    #[command(hide = true)]
    Spawned(spawned::SpawnedArgs),
    /// Save a machine to a store or a directory, and end it here
    Suspend(machine::SuspendArgs),
    /// Store a generation of a running machine in an object store, once or every so often
    Backup(backup::BackupArgs),
    /// Let a running machine survive the loss of its host
    Protect(protect::ProtectArgs),
    /// Wait here for a protected machine's host to fall silent, and run it then
    StandIn(run::StandInArgs),
    /// Freeze a machine when its lease ends: a runner starts this
    #[command(hide = true)]
    Guard(protect::GuardArgs),
    /// Keep one sign of life for all protected machines of this host (--host-beat). Runners start one by
    /// themselves; as a service of its own it stays
    Keeper(protect::KeeperArgs),
    /// What a store has of machines
    Generations(backup::GenerationsArgs),
    /// Run a machine from a generation in a store, on this host
    Restore(run::RestoreArgs),
    /// End a machine
    Stop(machine::StopArgs),
    /// Remove what this host keeps of a machine that does not run here
    Remove(machine::RemoveArgs),
    /// What this host keeps of machines that moved away
    #[command(subcommand)]
    Stay(machine::StayCommand),
    /// Build and check packages
    #[command(subcommand)]
    Package(package::PackageCommand),
    /// Make the certificates that hosts prove themselves with
    #[command(subcommand)]
    Cert(machine::CertCommand),
}

/// Runs a command.
pub fn execute(command: Command, state: &StateArgs) -> anyhow::Result<()> {
    let format = if state.json { Format::Json } else { Format::Human };
    match command {
        Command::Run(args) => run::run(args, state),
        Command::Receive(args) => reception::receive(&args, state),
        Command::Recover(args) => recover::recover(&args, state),
        Command::Supervise(args) => recover::supervise(&args, state),
        Command::Resume(args) => run::resume(args, state),
        Command::List => list::list(state, format),
        Command::Status(args) => machine::status(&args, state, format),
        Command::Inspect(args) => machine::inspect(&args, state),
        Command::Console(args) => machine::console(&args, state),
        Command::Exec(args) => machine::exec(args, state, format),
        Command::Migrate(args) => moves::migrate(args, state, format),
        Command::Evacuate(args) => evacuate::evacuate(&args, state, format),
        Command::Job(command) => moves::job(command, state, format),
        Command::Fork(args) => fork::fork(&args, state, format),
        Command::Spawned(args) => spawned::serve(&args),
        Command::Suspend(args) => machine::suspend(&args, state, format),
        Command::Backup(args) => backup::backup(&args, state, format),
        Command::Protect(args) => protect::protect(&args, state, format),
        Command::StandIn(args) => run::stand_in(args, state),
        Command::Keeper(args) => protect::keep(&args, state),
        Command::Guard(args) => crate::runner::guard::serve(&args.run_dir),
        Command::Generations(args) => backup::generations(&args, format),
        Command::Restore(args) => run::restore(args, state),
        Command::Stop(args) => machine::stop(&args, state, format),
        Command::Remove(args) => machine::remove(&args, state, format),
        Command::Stay(command) => machine::stay(&command, state, format),
        Command::Package(command) => package::execute(command, state.json),
        Command::Cert(command) => machine::cert(command, format),
    }
}
