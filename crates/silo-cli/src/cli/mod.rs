//! The subcommands. Each prints a few lines for people, or one JSON object with `--json`.

mod assist;
mod binlog;
mod check;
mod config;
mod connect;
mod device;
mod expose;
pub(crate) mod give;
mod history;
mod keys;
mod mount;
pub(crate) mod progress;
mod restore;
mod serve;
pub(crate) mod stop;
mod store;
mod sync;
mod tls;
mod verify;

use crate::{
    config::ByteSize,
    stack::{disk_options, hash_of_file},
};
use anyhow::{Context, Result};
use clap::{Args, CommandFactory, Parser, Subcommand};
use serde::Serialize;
use silo::disk::{self, Disk, DiskStatus};
use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
};

/// Data that moves: disks over a read-only base, served over NBD, durable through crashes.
#[derive(Parser)]
#[command(name = "silo", version, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the BLAKE3 root hash of a device file
    Hash {
        /// The file
        file: PathBuf,
    },
    /// Create a disk over a base, or a blank one
    Create(CreateArgs),
    /// Serve devices to others until SIGTERM or SIGINT: by NBD, vhost-user-blk or FUSE
    Serve(Box<serve::ServeArgs>),
    /// Tell what the files of a disk say, without opening it
    Inspect {
        /// The disk's folder
        overlay: PathBuf,
    },
    /// Hash each block of an image, and tell in which blocks two images differ
    Check(check::CheckArgs),
    /// Take devices from a `silo serve` on another host, and serve them here
    Connect(Box<connect::ConnectArgs>),
    /// Serve one device in one way
    #[command(subcommand)]
    Expose(expose::ExposeCommand),
    /// Map a device that is elsewhere, and fetch it when it is touched or before
    Mount(Box<mount::MountArgs>),
    /// Back devices up to an object store, continuously or once, and serve them meanwhile
    Sync(Box<sync::SyncArgs>),
    /// Bring devices back from a generation: whole, or served at once and fetched when touched
    Restore(Box<restore::RestoreArgs>),
    /// List what is in a store
    Generations(history::GenerationsArgs),
    /// Begin a new line of generations from one of another; nothing is copied
    Fork(history::ForkArgs),
    /// Say which generations a rule keeps, and delete the others with --delete
    Prune(history::PruneArgs),
    /// Check that a store has what its generations need: all there, or every block read
    Verify(verify::VerifyArgs),
    /// Delete from a store what no generation needs any more, in two steps
    Collect(history::CollectArgs),
    /// Make, list and change the keys of backups
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Record what is written to a device, and play it again
    #[command(subcommand)]
    Binlog(binlog::BinlogCommand),
    /// Make certificates for hosts
    #[command(subcommand)]
    Tls(tls::TlsCommand),
    /// Check a config file, or print the schema of config files
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Measure silo next to other programs that do the same
    Bench(crate::bench::Args),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Args)]
struct CreateArgs {
    /// The read-only file below; without it the disk is all zeros
    #[arg(long)]
    base: Option<PathBuf>,
    /// The folder that becomes the disk
    #[arg(long)]
    overlay: PathBuf,
    /// Size, as in 512M or 10G; without it that of the base
    #[arg(long, default_value = "0")]
    size: ByteSize,
}

/// Logs go to stderr, by `RUST_LOG`, warnings by default.
pub(crate) fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        // How long each phase took, as it ends.
        .with_span_events(tracing_subscriber::fmt::format::FmtSpan::CLOSE)
        .init();
}

/// Bytes for people.
fn human(bytes: u64) -> ByteSize {
    ByteSize(bytes)
}

fn print(json: bool, value: &impl Serialize, text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = if json {
        serde_json::to_writer(&mut out, value)?;
        writeln!(out)
    } else {
        writeln!(out, "{text}")
    };
    written.and_then(|()| out.flush()).context("could not write to stdout")
}

impl Cli {
    /// Does what was asked. False if a promise was not kept, which was said already.
    pub(crate) fn run(self) -> Result<bool> {
        match &self.command {
            Command::Bench(args) => crate::bench::run(args),
            Command::Check(args) => check::run(args, self.json),
            Command::Verify(args) => verify::run(args, self.json),
            _ => self.act().map(|()| true),
        }
    }

    fn act(self) -> Result<()> {
        let json = self.json;
        match self.command {
            Command::Bench(_) | Command::Check(_) | Command::Verify(_) => {
                unreachable!("run has taken them")
            }
            Command::Connect(args) => connect::run(&args, json),
            Command::Expose(command) => expose::run(&command, json),
            Command::Mount(args) => mount::run(&args, json),
            Command::Sync(args) => sync::run(&args, json),
            Command::Restore(args) => restore::run(&args, json),
            Command::Generations(args) => history::generations(&args, json),
            Command::Fork(args) => history::fork(&args, json),
            Command::Prune(args) => history::prune(&args, json),
            Command::Collect(args) => history::collect(&args, json),
            Command::Keys(command) => keys::run(&command, json),
            Command::Binlog(command) => binlog::run(&command, json),
            Command::Tls(command) => tls::run(&command, json),
            Command::Hash { file } => {
                let hash = hash_of_file(&file)?;
                let bytes = std::fs::metadata(&file).map_or(0, |metadata| metadata.len());
                let value = serde_json::json!({ "file": file, "bytes": bytes, "blake3": hash });
                print(json, &value, &format!("{hash}  {}", file.display()))
            }
            Command::Create(args) => {
                let disk = Disk::create(
                    &args.overlay,
                    args.base.as_deref(),
                    args.size.0,
                    &disk_options("disk"),
                )?;
                let value = serde_json::json!({ "overlay": args.overlay, "bytes": disk.size() });
                let text = format!("created {} ({})", args.overlay.display(), human(disk.size()));
                print(json, &value, &text)
            }
            Command::Config(command) => config::run(&command, json),
            Command::Serve(args) => serve::run(&args, json),
            Command::Inspect { overlay } => {
                let seen = disk::inspect(&overlay)?;
                print(json, &seen, &describe(&seen))
            }
            Command::Completions { shell } => {
                // It panics where it cannot write: into memory it can.
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "silo", &mut script);
                io::stdout().lock().write_all(&script).context("could not write to stdout")
            }
        }
    }
}

fn describe(seen: &disk::Inspection) -> String {
    let status = match seen.status {
        DiskStatus::Whole => "whole".to_owned(),
        DiskStatus::Receiving => "incomplete: a transfer to this host did not end".to_owned(),
        DiskStatus::Armed => format!("incomplete: {} blocks never arrived", seen.missing_blocks),
    };
    let frozen = if seen.frozen { ", frozen (handed over)" } else { "" };
    let view = if seen.up_to_date {
        format!("as last written; {} changed blocks wait for a flush", seen.unflushed_blocks)
    } else {
        "as of the last flush (the host has restarted since)".to_owned()
    };
    let owner = seen.identity.as_ref().map_or_else(
        || "nobody's yet".to_owned(),
        |identity| {
            let base = identity.base.map_or_else(String::new, |hash| format!(", base {hash}"));
            format!("{} at epoch {}{base}", identity.machine, identity.epoch)
        },
    );
    let torn = match seen.journal_torn_bytes {
        0 => String::new(),
        bytes => format!(", {bytes} torn bytes at its end"),
    };
    format!(
        "size       {} over a base of {}\n\
         status     {status}{frozen}\n\
         machine    {owner}\n\
         blocks     {} in the overlay, {} zero, {} missing; {} on this host\n\
         shown      {view}\n\
         journal    {}, generation {}, {} records{torn}",
        human(seen.bytes),
        human(seen.base_bytes),
        seen.data_blocks,
        seen.zero_blocks,
        seen.missing_blocks,
        human(seen.allocated_bytes),
        human(seen.journal_bytes),
        seen.journal_generation,
        seen.journal_records,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
