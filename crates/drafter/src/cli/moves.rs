//! `migrate` and `job`: a move is a job of the runner; these commands start, follow and cancel it.

use super::{Format, StateArgs, output::bytes};
use crate::{
    migrate::{messages::Mode, planner::Budgets, timings::MoveReport},
    runner::{
        api::{Client, MigrateRequest, Phase, Progress, Reply, Request},
        state::MachineDir,
    },
};
use anyhow::Context;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use std::{io::IsTerminal, net::SocketAddr, time::Duration};

/// `drafter migrate`.
#[derive(Args, Debug)]
pub struct MigrateArgs {
    /// The machine's name
    name: String,
    /// Where the destination's runner listens
    #[arg(long)]
    to: SocketAddr,
    /// The destination's name, as in its certificate
    #[arg(long)]
    peer: String,
    /// How to move
    #[arg(long, value_enum, default_value = "hybrid")]
    mode: Mode,
    /// Longest blackout to aim for, milliseconds
    #[arg(long, default_value_t = 10)]
    blackout_ms: u64,
    /// Longest pre-copy phase, seconds
    #[arg(long, default_value_t = 120)]
    time_s: u64,
    /// Bytes per second at most, in MB/s [default: no limit]
    #[arg(long)]
    bandwidth_mb_s: Option<u64>,
    /// Only ask the destination, and say what would happen
    #[arg(long)]
    dry_run: bool,
    /// Return when the job has started
    #[arg(long)]
    detach: bool,
}

/// `drafter job`.
#[derive(Subcommand, Debug)]
pub enum JobCommand {
    /// Follow a move until it ends
    Follow {
        /// The machine's name
        name: String,
        /// The job's number
        job: u64,
    },
    /// Cancel a move; it goes on if the machine has been handed over already
    Cancel {
        /// The machine's name
        name: String,
        /// The job's number
        job: u64,
    },
}

pub(super) fn migrate(args: MigrateArgs, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    let mut client = Client::connect(&MachineDir::at(&state.state, &args.name).socket())?;
    let request = MigrateRequest {
        to: args.to,
        peer: args.peer,
        mode: args.mode,
        budgets: Budgets {
            blackout: Duration::from_millis(args.blackout_ms),
            time: Duration::from_secs(args.time_s),
            bandwidth: args.bandwidth_mb_s.map(|mb| mb * 1_000_000),
            ..Budgets::default()
        },
        dry_run: args.dry_run,
    };
    let job: u64 = client.get(&Request::Migrate(request))?;
    if args.detach {
        return format.print(&serde_json::json!({ "job": job }), || {
            format!("job {job}: `drafter job follow {} {job}`", args.name)
        });
    }
    follow(&mut client, job, format)
}

pub(super) fn job(command: JobCommand, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    match command {
        JobCommand::Follow { name, job } => {
            let mut client = Client::connect(&MachineDir::at(&state.state, &name).socket())?;
            follow(&mut client, job, format)
        }
        JobCommand::Cancel { name, job } => {
            let mut client = Client::connect(&MachineDir::at(&state.state, &name).socket())?;
            let value = client.call(&Request::Cancel { job }, |_| {})?;
            format.print(&value, || value.as_str().unwrap_or("cancelled").to_owned())
        }
    }
}

fn follow(client: &mut Client, job: u64, format: Format) -> anyhow::Result<()> {
    let bar = if format == Format::Human && std::io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("{spinner} {msg}").context("progress style")?;
        ProgressBar::new_spinner().with_style(style)
    } else {
        ProgressBar::hidden()
    };
    let result = client.call(&Request::Follow { job }, |reply| {
        if let Reply::Progress(progress) = reply {
            bar.set_message(line(progress));
            bar.tick();
        }
    });
    bar.finish_and_clear();
    let value = result?;
    format.print(&value, || match serde_json::from_value::<MoveReport>(value.clone()) {
        Ok(report) => report.to_string(),
        Err(_) => value.as_str().map_or_else(|| value.to_string(), str::to_owned),
    })
}

fn line(progress: &Progress) -> String {
    let phase = match progress.phase {
        Phase::Prepare => "preparing the destination".to_owned(),
        Phase::PreCopy => format!("pre-copy, round {}", progress.round + 1),
        Phase::Switchover => "switching over".to_owned(),
        Phase::PostCopy => "running at the destination, filling".to_owned(),
        Phase::Ended => "done".to_owned(),
    };
    format!("{phase}: {} sent, {} left", bytes(progress.sent_bytes), bytes(progress.left_bytes))
}
