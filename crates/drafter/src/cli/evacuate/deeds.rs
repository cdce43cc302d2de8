//! What is done to one machine of this host: it moves, it is put to sleep in a store, it is woken at
//! another host.

use super::{
    super::{
        StateArgs,
        backup::{self, HistoryArgs},
        moves::HostAt,
    },
    ANSWER,
    destinations::{Destination, Place},
};
use crate::{
    migrate::{
        messages::{Mode, StoredAs},
        planner::Budgets,
        reception::{self, ASK_LIMIT, Ask},
        timings::MoveReport,
    },
    runner::{
        api::{BackupRequest, Client, ClientError, MigrateRequest, Request, SuspendReport},
        config::{NetworkConfig, RunnerConfig},
        state::MachineDir,
    },
};
use evacuation::{Load, Rate, Way};
use identity::HostName;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

/// What a generation is called that was made because its host was emptied.
const LABEL: &str = "evacuated";
/// How long a sleep may take beyond what the line needs for it: one that still fills is waited for.
const SLEEP: Duration = Duration::from_secs(150);
/// So much slower than the line may be.
const SLOWER: f64 = 4.0;
/// The longest sleep that is waited for.
const LONGEST_SLEEP: f64 = 86_400.0;

/// A machine that has left.
pub(super) struct Moved {
    pub(super) host: String,
    pub(super) blackout_ms: f64,
    pub(super) sent_bytes: u64,
    /// What its host had already.
    pub(super) known_bytes: u64,
}

/// A machine that sleeps in the store.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Asleep {
    /// The history.
    pub(super) line: String,
    /// The generation.
    pub(super) generation: u64,
    /// Bytes that it took in the store.
    pub(super) stored_bytes: u64,
    /// How long it stood still until it was durable, milliseconds.
    pub(super) paused_ms: f64,
    /// What wakes it, on a host of the same leases.
    pub(super) resume: String,
}

/// What can be done to a machine.
pub(super) trait Deeds: Sync {
    /// Moves it, to the end. `left`: until the host is gone.
    fn go(&self, load: &Load, to: &Destination, way: Way, left: Duration) -> Result<Moved, String>;
    /// Puts it to sleep, until that is durable.
    fn sleep(&self, load: &Load) -> Result<Asleep, String>;
    /// Has the first of these hosts wake it that does; which that is.
    fn wake(&self, machine: &str, hosts: &[HostAt]) -> Result<String, String>;
}

/// The store that machines are put to sleep in.
#[derive(Clone, Debug)]
pub(super) struct SleepsIn {
    pub(super) store: String,
    pub(super) keys: Option<PathBuf>,
}

impl SleepsIn {
    /// The history of a machine's sleeps, with this user's keys and credentials.
    pub(super) fn request(&self, machine: &str) -> anyhow::Result<BackupRequest> {
        self.history(machine, backup::sleeps_line(machine))
    }

    /// A history of a machine, with this user's keys and credentials.
    pub(super) fn history(&self, machine: &str, line: String) -> anyhow::Result<BackupRequest> {
        let history = HistoryArgs::at(&self.store, self.keys.as_deref(), line);
        let mut request = backup::request(&history, machine)?;
        LABEL.clone_into(&mut request.label);
        Ok(request)
    }

    /// The command that wakes a machine of which the runner was started so.
    fn resume(&self, machine: &str, config: Option<&RunnerConfig>) -> String {
        let mut words = vec!["drafter".to_owned(), "resume".into(), machine.into()];
        let mut add = |flag: &str, value: &Path| {
            words.extend([flag.to_owned(), quoted(&value.to_string_lossy())]);
        };
        add("--store", Path::new(&self.store));
        if let Some(keys) = &self.keys {
            add("--keys", keys);
        }
        match config {
            Some(config) => {
                config.packages.iter().for_each(|package| add("--package", package));
                add("--lease", &config.lease);
                match &config.network {
                    NetworkConfig::None => {}
                    NetworkConfig::Local => add("--network", Path::new("local")),
                    NetworkConfig::Agent(_) => add("--network", Path::new("agent")),
                }
            }
            None => add("--package", Path::new("PACKAGES")),
        }
        words.join(" ")
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The machines of this host, by their runners.
pub(super) struct ByRunners<'a> {
    pub(super) state: &'a StateArgs,
    pub(super) sleeps: Option<&'a SleepsIn>,
    /// The history of each machine that a destination can bring most of.
    pub(super) brings: &'a BTreeMap<String, String>,
    /// What one machine has of the line when as many as are planned are under way.
    pub(super) share: Rate,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl ByRunners<'_> {
    fn dir(&self, machine: &str) -> MachineDir {
        MachineDir::at(&self.state.state, machine)
    }

    /// A connection of which each answer may take so long: a runner that hangs keeps no other machine from
    /// leaving.
    fn client(&self, machine: &str, limit: Duration) -> Result<Client, ClientError> {
        let client = Client::connect(&self.dir(machine).socket())?;
        client.set_deadline(Some(limit))?;
        Ok(client)
    }

    /// What its runner was started with.
    fn config(&self, machine: &str) -> Option<RunnerConfig> {
        self.dir(machine).read_record().ok().flatten().and_then(|record| record.config)
    }
}

fn mode(way: Way) -> Mode {
    match way {
        Way::Hybrid | Way::HybridWithStore => Mode::Hybrid,
        // (Whoever sleeps does not move.)
        Way::PostCopy | Way::PostCopyWithStore | Way::Suspend => Mode::PostCopy,
    }
}

/// How long a machine waits for what its destination brings from the store: no longer than it takes to send
/// the same, as more than that saves nothing, and for no more than half of the time that is left, so that
/// what did not come can still be sent.
fn bring_limit(load: &Load, share: Rate, left: Duration) -> Duration {
    let seconds = load.brought.0 as f64 / share.0.max(1) as f64;
    (left / 2).min(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

/// How long a machine may take to sleep over so much of a line.
fn sleep_limit(load: &Load, share: Rate) -> Duration {
    let bytes = Way::Suspend.most(load).0 as f64;
    let seconds = (SLOWER * bytes / share.0.max(1) as f64).min(LONGEST_SLEEP);
    SLEEP + Duration::from_secs_f64(seconds)
}

impl Deeds for ByRunners<'_> {
    fn go(&self, load: &Load, to: &Destination, way: Way, left: Duration) -> Result<Moved, String> {
        let machine = &load.name;
        let HostAt { host, address } = match &to.place {
            Place::Runner(runner) => runner.clone(),
            Place::Hosts(hosts) => {
                let mut refused = Vec::new();
                // By a connection each: a late answer is never taken for another host's.
                let ask = |host: &HostAt| host.ask(&mut self.client(machine, ASK_LIMIT + ANSWER)?);
                let asked = hosts.iter().find_map(|host| match ask(host) {
                    Ok(address) => Some(HostAt { host: host.host.clone(), address }),
                    Err(why) => {
                        refused.push(why.to_string());
                        None
                    }
                });
                asked.ok_or_else(|| refused.join("; "))?
            }
        };
        let request =
            MigrateRequest {
                to: address,
                peer: host.clone(),
                mode: mode(way),
                budgets: Budgets::default(),
                dry_run: false,
                stored_as: self.brings.get(machine).filter(|_| way.brings()).map(|line| {
                    StoredAs::within(line.clone(), bring_limit(load, self.share, left))
                }),
            };
        // A job that is followed tells ten times a second how far it is.
        let mut client = self.client(machine, ANSWER).map_err(text)?;
        let job: u64 = client.get(&Request::Migrate(request)).map_err(text)?;
        let report: MoveReport = client.get(&Request::Follow { job }).map_err(text)?;
        Ok(Moved {
            host,
            blackout_ms: report.blackout_ms,
            sent_bytes: report.bytes_sent,
            known_bytes: report.known_bytes,
        })
    }

    fn sleep(&self, load: &Load) -> Result<Asleep, String> {
        let sleeps = self.sleeps.ok_or("there is no store")?;
        let request = sleeps.request(&load.name).map_err(|error| format!("{error:#}"))?;
        let config = self.config(&load.name);
        let limit = sleep_limit(load, self.share);
        let mut client = self.client(&load.name, limit).map_err(text)?;
        let said = client.get(&Request::SuspendToStore(request));
        let report: SuspendReport = said.map_err(|error| match error {
            ClientError::Broken(source) if source.kind() == ErrorKind::WouldBlock => format!(
                "it does not sleep within {} s, and goes on trying: `drafter status {}`",
                limit.as_secs(),
                load.name
            ),
            other => other.to_string(),
        })?;
        Ok(Asleep {
            line: report.line,
            generation: report.number,
            stored_bytes: report.stored_bytes,
            paused_ms: report.paused_ms,
            resume: sleeps.resume(&load.name, config.as_ref()),
        })
    }

    /// Its runner has ended, so that this proves itself with what that was started with.
    fn wake(&self, machine: &str, hosts: &[HostAt]) -> Result<String, String> {
        let config = self.config(machine).ok_or("what its runner was started with is not known")?;
        let here = HostName::new(&config.host).map_err(text)?;
        let security = config.security.load(&here).map_err(text)?;
        let mut refused = Vec::new();
        for HostAt { host, address } in hosts {
            let asked = HostName::new(host).map_err(text).and_then(|peer| {
                let ask = Ask { host: config.host.clone(), machine: machine.to_owned() };
                reception::wake(*address, &peer, &security, ask)
            });
            match asked {
                Ok(()) => return Ok(host.clone()),
                Err(why) => refused.push(why),
            }
        }
        Err(refused.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use evacuation::Bytes;

    #[test]
    fn a_word_is_written_as_a_shell_takes_it() {
        assert_eq!(quoted("file:///a/b-c_d.e"), "file:///a/b-c_d.e");
        assert_eq!(quoted("s3://b/f?region=x&y=z"), "'s3://b/f?region=x&y=z'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn the_command_that_wakes_a_machine_names_the_store_and_the_keys_and_what_is_not_known() {
        let sleeps = SleepsIn { store: "file:///s".into(), keys: Some("/k".into()) };
        assert_eq!(
            sleeps.resume("redis", None),
            "drafter resume redis --store file:///s --keys /k --package PACKAGES"
        );
    }

    fn load() -> Load {
        Load {
            name: "a".into(),
            weight: 1,
            bytes: Bytes(100),
            in_store: Bytes(40),
            brought: Bytes(0),
            dirties: Rate(0),
            hot: Bytes(15),
            destination: false,
            may_sleep: true,
            generation_age: None,
        }
    }

    #[test]
    fn a_store_is_waited_for_as_long_as_it_can_save_something_and_time_is_left_to_do_without() {
        let load = Load { brought: Bytes(40_000_000), ..load() };
        let (share, minute) = (Rate(10_000_000), Duration::from_secs(60));
        assert_eq!(bring_limit(&load, share, minute), Duration::from_secs(4));
        assert_eq!(bring_limit(&load, share, Duration::from_secs(6)), Duration::from_secs(3));
        assert_eq!(bring_limit(&load, Rate(0), minute), Duration::from_secs(30));
        assert_eq!(bring_limit(&load, share, Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn a_sleep_is_waited_for_as_long_as_a_slow_line_takes_and_never_for_ever() {
        let load = load();
        assert_eq!(sleep_limit(&load, Rate(10)), SLEEP + Duration::from_secs(30));
        let huge = Load { bytes: Bytes(u64::MAX), ..load };
        assert_eq!(sleep_limit(&huge, Rate(0)), SLEEP + Duration::from_secs(86_400));
    }
}
