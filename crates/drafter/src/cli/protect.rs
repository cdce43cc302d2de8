//! `protect`, and what protection is told by the commands that start a runner; `guard`, which no person
//! calls.

use super::{
    Format, StateArgs,
    backup::{self, HistoryArgs, parse_time},
};
use crate::keeper::{self, Settings};
use crate::runner::{
    api::{BackupReport, Client, KeepPolicy, ProtectRequest, ProtectionState, Request},
    state::{MachineDir, check_name},
};
use clap::Args;
use std::{path::PathBuf, time::Duration};

/// A generation this often, if nothing else is said.
const EVERY: Duration = Duration::from_secs(1);
/// T, if nothing else is said: availability after a loss is this and about a second.
const TERM: Duration = Duration::from_secs(3);
/// A keeper renews the host's sign of life this often, if nothing else is said and the term is not shorter.
const RENEWAL: Duration = Duration::from_millis(250);

/// How a machine is protected.
#[derive(Args, Clone, Debug)]
pub(super) struct How {
    /// Of a protected machine: a generation this often [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    every: Option<Duration>,
    /// How long its lease holds if this host does not renew it; then it stands still here, and a stand-in
    /// may run it [default: 3s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    term: Option<Duration>,
    /// Let nothing that it sends leave before the generation that it is of is durable: clients never see
    /// time go back, and wait for each answer
    #[arg(long)]
    pub(super) output_commit: bool,
    /// Its lease refers to one sign of life of this host, which all machines with this share: the lease
    /// store sees one write a renewal, not one for each machine. All of them have the same --term
    /// [default: true where leases are in an object store, which bills requests]
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
        default_missing_value = "true"
    )]
    pub(super) host_beat: Option<bool>,
    /// Keep the newest so many generations
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    keep_last: usize,
    /// Keep all generations that are younger than this
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "1m")]
    keep_within: Duration,
    /// Keep one generation of each of the last so many hours
    #[arg(long, value_name = "COUNT", default_value_t = 24)]
    keep_hourly: usize,
    /// Keep one generation of each of the last so many days
    #[arg(long, value_name = "COUNT", default_value_t = 7)]
    keep_daily: usize,
    /// Delete content that no generation needs any more when it is this old
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "5m")]
    collect_after: Duration,
    /// Delete none: somebody runs `silo collect` on the store
    #[arg(long, conflicts_with = "collect_after")]
    no_collect: bool,
}

impl How {
    pub(super) fn every(&self) -> Duration {
        self.every.unwrap_or(EVERY)
    }

    pub(super) fn term(&self) -> Duration {
        self.term.unwrap_or(TERM)
    }

    pub(super) fn keep(&self) -> KeepPolicy {
        KeepPolicy {
            last: self.keep_last,
            within_s: self.keep_within.as_secs(),
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            collect_after_s: (!self.no_collect).then_some(self.collect_after.as_secs()),
        }
    }
}

/// `drafter protect`.
#[derive(Args, Debug)]
pub struct ProtectArgs {
    /// The machine's name
    name: String,
    #[command(flatten)]
    history: HistoryArgs,
    #[command(flatten)]
    how: How,
    /// End protection: the lease has no end any more, and nothing is stored
    #[arg(long)]
    end: bool,
}

/// `drafter guard`.
#[derive(Args, Debug)]
pub struct GuardArgs {
    /// The folder of the monitor
    #[arg(long)]
    pub(super) run_dir: PathBuf,
}

/// `drafter keeper`.
#[derive(Args, Debug)]
pub struct KeeperArgs {
    /// This host's name, as in leases
    #[arg(long, required_unless_present = "settings")]
    host: Option<String>,
    /// Where leases are kept, as for `run` [default: STATE/leases]
    #[arg(long, value_name = "STORE")]
    lease: Option<PathBuf>,
    /// How long leases hold that are not renewed; that of all machines that use it
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "3s")]
    term: Duration,
    /// How often the sign of life is renewed [default: a quarter of the term, at most 250ms]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    renewal: Option<Duration>,
    /// Settings as JSON, from standard input: a runner that needs a keeper starts one so
    #[arg(long, value_name = "-", hide = true, conflicts_with_all = ["host", "lease", "renewal"])]
    settings: Option<String>,
}

/// Keeps the sign of life of this host.
pub(super) fn keep(args: &KeeperArgs, state: &StateArgs) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let Some(host) = &args.host else {
        let given = std::io::read_to_string(std::io::stdin())?;
        let settings = serde_json::from_str(&given).context("reading the settings of a keeper")?;
        return keeper::serve(&settings, false);
    };
    let renewal = args.renewal.unwrap_or_else(|| (args.term / 4).min(RENEWAL));
    let lease = args.lease.clone().unwrap_or_else(|| state.state.join("leases"));
    let settings = Settings {
        state: state.state.clone(),
        host: host.clone(),
        leases: lease.to_str().context("the lease store's address is no text")?.to_owned(),
        term_ms: args.term.as_millis() as u64,
        renewal_ms: renewal.as_millis() as u64,
        linger_ms: None,
    };
    keeper::serve(&settings, true)
}

pub(super) fn protect(args: &ProtectArgs, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    check_name(&args.name).map_err(anyhow::Error::msg)?;
    let mut client = Client::connect(&MachineDir::at(&state.state, &args.name).socket())?;
    if args.end {
        let value = client.call(&Request::EndProtect, |_| {})?;
        return format.print(&value, || value.as_str().unwrap_or("ended").to_owned());
    }
    let mut request = backup::request(&args.history, &args.name)?;
    request.every_ms = Some(args.how.every().as_millis() as u64);
    request.keep = Some(args.how.keep());
    let request = ProtectRequest {
        backup: request,
        term_ms: args.how.term().as_millis() as u64,
        output_commit: args.how.output_commit,
        host_beat: args.how.host_beat,
    };
    let report: BackupReport = client.get(&Request::Protect(request))?;
    format.print(&report, || {
        format!(
            "{}\n\"{}\" is protected: a stand-in may run it {:?} after this host has fallen silent",
            backup::sentence(&report),
            report.machine,
            args.how.term(),
        )
    })
}

/// A line of `drafter status`.
pub(super) fn state_line(protection: &ProtectionState) -> String {
    let mut text = match protection.word.as_str() {
        "unprotected" => "\nnot protected yet".to_owned(),
        word => format!(
            "\nprotection: {word}, its lease holds for {:.1} of {:.1} s",
            protection.left_ms as f64 / 1e3,
            protection.term_ms as f64 / 1e3
        ),
    };
    if let Some(beat) = protection.beat.as_ref().filter(|beat| !beat.contains('/')) {
        text += &format!(", kept by the sign of life of host \"{beat}\"");
    }
    if protection.output_commit {
        text += ", what it sends waits for its generation";
    }
    if protection.freezes > 0 {
        text += &format!(", it stood still {} times for want of a lease", protection.freezes);
    }
    if !protection.detail.is_empty() {
        text += &format!(" ({})", protection.detail);
    }
    text
}
