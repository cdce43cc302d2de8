//! `backup` and `generations`: machines in object stores. (`restore` becomes a runner: see `run`.)
//!
//! Stores, keys and their variables are silo's: what `silo generations`, `verify`, `prune` and
//! `restore` do with any other history they do with a machine's.

use super::{Format, StateArgs, output::bytes};
use crate::runner::{
    api::{BackupReport, BackupRequest, BackupState, Client, Request, Secret, SuspendReport},
    state::{MachineDir, check_name},
};
use anyhow::Context;
use clap::Args;
use silo::store::{Access, Environment, KeyRing, Limits, LineName, Store, StoreUrl};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The environment variable with the keys themselves.
const KEYS: &str = "SILO_KEYS";
/// Beginnings of the variables that stores take credentials and settings from.
const CREDENTIALS: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];

/// A history of a machine in a store, and the keys to it.
#[derive(Args, Clone, Debug)]
pub(super) struct HistoryArgs {
    /// s3://bucket/folder?endpoint=…&region=…, gs://…, az://… or file:///folder; credentials come
    /// from the provider's usual variables, as AWS_ACCESS_KEY_ID
    #[arg(long, value_name = "URL", env = "SILO_STORE")]
    store: Option<String>,
    /// The file with the tenant's keys (`silo keys create`); without it the variable SILO_KEYS holds
    /// them
    #[arg(long, value_name = "FILE", env = "SILO_KEY_FILE")]
    pub(super) keys: Option<PathBuf>,
    /// The history, TENANT/LINE [default: machines/NAME]
    #[arg(long, value_name = "TENANT/LINE")]
    line: Option<String>,
}

impl HistoryArgs {
    /// The store's address.
    pub(super) fn store(&self) -> anyhow::Result<String> {
        let store = self.store.clone().context("no store is named; add --store URL")?;
        store.parse::<StoreUrl>()?;
        Ok(store)
    }

    /// The history of a machine.
    pub(super) fn line(&self, machine: &str) -> String {
        self.line.clone().unwrap_or_else(|| format!("machines/{machine}"))
    }

    /// A history in `store`, with the keys of a file or of their variable.
    pub(super) fn at(store: &str, keys: Option<&Path>, line: String) -> Self {
        let keys = keys.map(Path::to_owned);
        Self { store: Some(store.to_owned()), keys, line: Some(line) }
    }

    /// The keys as text, and where they were read.
    fn key_text(&self) -> anyhow::Result<(String, String)> {
        let Some(path) = &self.keys else {
            let text = std::env::var(KEYS).with_context(|| {
                format!("no keys: give --keys FILE, or put them into the variable {KEYS}")
            })?;
            return Ok((text.replace(';', "\n"), format!("environment variable {KEYS}")));
        };
        // Refuses a file that others can read.
        KeyRing::from_file(path)?;
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("could not read {}", path.display()))?;
        Ok((text, format!("key file {}", path.display())))
    }
}

/// Where a machine sleeps.
#[derive(Args, Clone, Debug)]
pub(super) struct SuspendHistory {
    /// s3://bucket/folder?endpoint=…&region=…, gs://…, az://… or file:///folder; credentials come
    /// from the provider's usual variables, as AWS_ACCESS_KEY_ID
    #[arg(long, value_name = "URL", env = "SILO_STORE")]
    store: Option<String>,
    /// The file with the tenant's keys (`silo keys create`); without it the variable SILO_KEYS holds
    /// them
    #[arg(long, value_name = "FILE", env = "SILO_KEY_FILE")]
    keys: Option<PathBuf>,
    /// The history, TENANT/LINE [default: machines/NAME.suspended]
    #[arg(long, value_name = "TENANT/LINE")]
    line: Option<String>,
}

impl SuspendHistory {
    /// The history of a machine's sleeps.
    pub(super) fn of(&self, machine: &str) -> HistoryArgs {
        let line = self.line.clone().unwrap_or_else(|| sleeps_line(machine));
        HistoryArgs { store: self.store.clone(), keys: self.keys.clone(), line: Some(line) }
    }
}

/// Where a machine's sleeps are, unless somebody says otherwise.
pub(super) fn sleeps_line(machine: &str) -> String {
    format!("machines/{machine}.suspended")
}

/// Whether a store's address and its keys, in a file or in their variable, can be read.
pub(super) fn check_store(store: &str, keys: Option<&Path>) -> anyhow::Result<()> {
    store.parse::<StoreUrl>()?;
    match keys {
        Some(path) => KeyRing::from_file(path)?,
        None => KeyRing::from_env(KEYS)?,
    };
    Ok(())
}

/// `drafter backup`.
#[derive(Args, Debug)]
pub struct BackupArgs {
    /// The machine's name
    name: String,
    #[command(flatten)]
    history: HistoryArgs,
    /// Store a generation this often from now on, as 60s or 5m; the command returns after the first
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    every: Option<Duration>,
    /// What to call the generation
    #[arg(long, default_value = "")]
    label: String,
    /// End a continuous backup; what was stored stays
    #[arg(long, conflicts_with_all = ["every", "label"])]
    end: bool,
}

/// `drafter generations`.
#[derive(Args, Debug)]
pub struct GenerationsArgs {
    /// The machine's name; without it (and without --line) the histories in the store are listed
    name: Option<String>,
    /// s3://bucket/folder?endpoint=…&region=…, gs://…, az://… or file:///folder
    #[arg(long, value_name = "URL", env = "SILO_STORE")]
    store: String,
    /// The history, TENANT/LINE [default: machines/NAME]
    #[arg(long, value_name = "TENANT/LINE")]
    line: Option<String>,
}

pub(super) fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("\"{text}\" is no time: write 500ms, 60s, 5m or 1h");
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    let ms = number.checked_mul(unit_ms).filter(|ms| (1..=30 * 86_400_000).contains(ms));
    ms.map(Duration::from_millis)
        .ok_or_else(|| format!("\"{text}\" is not between 1ms and 30 days"))
}

pub(super) fn backup(args: &BackupArgs, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    check_name(&args.name).map_err(anyhow::Error::msg)?;
    let mut client = Client::connect(&MachineDir::at(&state.state, &args.name).socket())?;
    if args.end {
        let value = client.call(&Request::EndBackup, |_| {})?;
        return format.print(&value, || value.as_str().unwrap_or("ended").to_owned());
    }
    // Before the machine is bothered.
    let mut request = request(&args.history, &args.name)?;
    request.every_ms = args.every.map(|every| every.as_millis() as u64);
    request.label.clone_from(&args.label);
    let report: BackupReport = client.get(&Request::Backup(request))?;
    format.print(&report, || sentence(&report))
}

/// One generation into a history, with this user's keys and credentials.
pub(super) fn request(history: &HistoryArgs, machine: &str) -> anyhow::Result<BackupRequest> {
    let (store, line) = (history.store()?, history.line(machine));
    LineName::parse(&line)?;
    let (keys, keys_from) = history.key_text()?;
    let ours = |name: &String| CREDENTIALS.iter().any(|begin| name.starts_with(begin));
    let variables = std::env::vars_os().filter_map(|(name, value)| {
        Some((name.into_string().ok().filter(ours)?, Secret(value.into_string().ok()?)))
    });
    Ok(BackupRequest {
        store,
        line,
        keys: Secret(keys),
        keys_from,
        environment: variables.collect(),
        every_ms: None,
        label: String::new(),
        keep: None,
    })
}

/// `drafter suspend --store`.
pub(super) fn suspend(
    history: &SuspendHistory,
    client: &mut Client,
    machine: &str,
) -> anyhow::Result<SuspendReport> {
    let request = request(&history.of(machine), machine)?;
    Ok(client.get(&Request::SuspendToStore(request))?)
}

/// What a suspend says to people.
pub(super) fn suspended(report: &SuspendReport) -> String {
    let machine = &report.machine;
    format!(
        "\"{machine}\" is suspended as generation {} of {} in {}: {} stored for {} of new content, \
         durable after {:.0} ms, {:.0} of them while it stood still\n\
         `drafter resume {machine} --store … --package …` runs it on any host with its package",
        report.number,
        report.line,
        report.store,
        bytes(report.stored_bytes),
        bytes(report.new_bytes),
        report.total_ms,
        report.paused_ms,
    )
}

pub(super) fn sentence(report: &BackupReport) -> String {
    let looked = if report.changes_only {
        "only what was written since the last was read"
    } else {
        "everything was compared"
    };
    let mut text = format!(
        "generation {} of {} in {}: {} stored for {} of new content ({looked}), {} requests, {:.1} s\n\
         \"{}\" stood still for {:.1} ms, after {} of memory had been copied in {} rounds",
        report.number,
        report.line,
        report.store,
        bytes(report.stored_bytes),
        bytes(report.new_bytes),
        report.requests,
        report.total_ms / 1e3,
        report.machine,
        report.pause_ms,
        bytes(report.copied_bytes),
        report.rounds,
    );
    if let Some(every) = report.every_ms {
        text += &format!(
            "\nanother follows every {:?}; `drafter status {}` tells how it goes",
            Duration::from_millis(every),
            report.machine
        );
    }
    text
}

/// A line of `drafter status`.
pub(super) fn state_line(backup: &BackupState) -> String {
    let every = Duration::from_millis(backup.every_ms);
    let mut text = format!("\nbackup: every {every:?} to {} in {}", backup.line, backup.store);
    if let (Some(number), Some(age)) = (backup.newest, backup.age_s) {
        text += &format!(", generation {number} is {age:.0} s old");
    }
    if let Some(pause) = backup.pause_ms {
        text += &format!(" (paused {pause:.1} ms)");
    }
    if let Some(error) = &backup.error {
        text += &format!("\nthe last one failed: {error}");
    }
    if backup.ended {
        text += "\nthe backup has ended";
    }
    text
}

/// How long ago something was made, for people.
fn ago(made: SystemTime) -> String {
    let seconds = SystemTime::now().duration_since(made).unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

pub(super) fn generations(args: &GenerationsArgs, format: Format) -> anyhow::Result<()> {
    let url: StoreUrl = args.store.parse()?;
    let environment = Environment::of_process();
    let store: Arc<Store> = Store::open(&url, Access::Read, &environment, Limits::default())?;
    let line = match (&args.line, &args.name) {
        (Some(line), _) => LineName::parse(line)?,
        (None, Some(name)) => LineName::new("machines", name)?,
        (None, None) => {
            let lines: Vec<String> = store.lines(None)?.iter().map(ToString::to_string).collect();
            return format.print(&serde_json::json!({ "lines": lines }), || lines.join("\n"));
        }
    };
    let all = store.generations(&line)?;
    let seconds = |made: SystemTime| made.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let list: Vec<_> = all
        .iter()
        .map(|one| serde_json::json!({ "number": one.number, "made": seconds(one.made) }))
        .collect();
    let value = serde_json::json!({ "line": line.to_string(), "generations": list });
    format.print(&value, || {
        if all.is_empty() {
            return format!("{line} has no generation in {}", args.store);
        }
        let lines: Vec<String> =
            all.iter().map(|one| format!("{:>8}  {}", one.number, ago(one.made))).collect();
        lines.join("\n")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_their_unit_and_nothing_else_is() {
        assert_eq!(parse_time("60s").unwrap(), Duration::from_secs(60));
        assert_eq!(parse_time("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(parse_time("2h").unwrap(), Duration::from_secs(7200));
        for bad in ["", "60", "s", "0s", "1d", "-1s", "1.5s", "99999999999999999999s", "9999h"] {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
    }
}
