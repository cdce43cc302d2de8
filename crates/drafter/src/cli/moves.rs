//! `migrate` and `job`: a move is a job of the runner; these commands start, follow and cancel it.

use super::{Format, StateArgs, backup, output::bytes};
use crate::{
    migrate::{
        messages::{Mode, StoredAs},
        planner::Budgets,
        timings::MoveReport,
    },
    runner::{
        api::{Client, ClientError, MigrateRequest, Phase, Progress, Reply, Request, Status},
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
    #[arg(long, requires = "peer", required_unless_present = "to_host")]
    to: Option<SocketAddr>,
    /// The destination's name, as in its certificate
    #[arg(long, requires = "to")]
    peer: Option<String>,
    /// A host that takes every machine (`receive --any`): its name, and where it listens
    #[arg(long, value_name = "HOST=ADDRESS:PORT", conflicts_with = "to")]
    to_host: Option<HostAt>,
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
    /// Have the destination bring what its store (`receive --store`) has of the machine: of its backup or
    /// protection that is on, or else of its last sleep. Blocks that are still the same are not sent
    #[arg(long)]
    from_store: bool,
    /// Only ask the destination, and say what would happen
    #[arg(long)]
    dry_run: bool,
    /// Return when the job has started
    #[arg(long)]
    detach: bool,
}

/// A host that takes every machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostAt {
    /// Its name, as in its certificate.
    pub(super) host: String,
    /// Where it listens.
    pub(super) address: SocketAddr,
}

impl std::str::FromStr for HostAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, address) =
            text.split_once('=').ok_or("write HOST=ADDRESS:PORT, as in host-b=10.0.0.2:7500")?;
        identity::HostName::new(host).map_err(|error| error.to_string())?;
        let address = address.parse().map_err(|_| format!("\"{address}\" is no ADDRESS:PORT"))?;
        Ok(Self { host: host.to_owned(), address })
    }
}

impl HostAt {
    /// Has a machine's runner ask there for one that takes the machine; where that listens.
    pub(super) fn ask(&self, client: &mut Client) -> Result<SocketAddr, ClientError> {
        client.get(&Request::AskHost { to: self.address, peer: self.host.clone() })
    }
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
    let (to, peer) = match (args.to_host, args.to.zip(args.peer)) {
        (Some(host), _) => (host.ask(&mut client)?, host.host),
        (None, Some(runner)) => runner,
        (None, None) => anyhow::bail!("say where it goes: --to and --peer, or --to-host"),
    };
    let stored_as = match args.from_store {
        true => Some(history_of(&mut client, &args.name)?),
        false => None,
    };
    let time = Duration::from_secs(args.time_s);
    let request = MigrateRequest {
        to,
        peer,
        mode: args.mode,
        budgets: Budgets {
            blackout: Duration::from_millis(args.blackout_ms),
            time,
            bandwidth: args.bandwidth_mb_s.map(|mb| mb * 1_000_000),
            ..Budgets::default()
        },
        dry_run: args.dry_run,
        stored_as: stored_as.map(|line| StoredAs::within(line, time)),
    };
    let job: u64 = client.get(&Request::Migrate(request))?;
    if args.detach {
        return format.print(&serde_json::json!({ "job": job }), || {
            format!("job {job}: `drafter job follow {} {job}`", args.name)
        });
    }
    follow(&mut client, job, format)
}

/// The history that a store has of a machine.
fn history_of(client: &mut Client, machine: &str) -> Result<String, ClientError> {
    let status: Status = client.get(&Request::Status)?;
    Ok(status.backup.map_or_else(|| backup::sleeps_line(machine), |backup| backup.line))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_read_with_its_name_and_what_is_wrong_is_named() {
        let at: HostAt = "host-b=[::1]:7500".parse().unwrap();
        assert_eq!((at.host.as_str(), at.address), ("host-b", "[::1]:7500".parse().unwrap()));
        for (bad, what) in [
            ("10.0.0.2:7500", "write HOST=ADDRESS:PORT"),
            ("B=10.0.0.2:7500", "cannot name a host"),
            ("b=10.0.0.2", "\"10.0.0.2\" is no ADDRESS:PORT"),
        ] {
            let why = bad.parse::<HostAt>().unwrap_err();
            assert!(why.contains(what), "{bad}: {why}");
        }
    }
}
