//! What a host keeps on disk about its machines:
//!
//! ```text
//! STATE/machines/NAME/runner.json   who runs here (below), rewritten at each change of state
//!                     api.sock      the runner's API
//!                     disks/        overlays
//!                     run/          the monitor's sockets, logs and facts
//!                     console.log
//! STATE/forks/ID/                   an image of a machine, while it is forked
//! STATE/packages/                   packages unpacked or linked here, found by identity
//! ```

use conduit::{AgentDataPath, DataPath, MachineNet};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How often it is looked whether a runner has ended.
const LOOK: Duration = Duration::from_millis(5);

/// The default root of a host's state.
pub const DEFAULT_STATE: &str = "/var/lib/drafter";

/// Where images of machines are while they are forked, below a host's state.
pub(super) const FORKS: &str = "forks";

/// Folders of one machine on one host.
#[derive(Clone, Debug)]
pub struct MachineDir {
    root: PathBuf,
}

/// The record in `runner.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunnerRecord {
    /// The machine.
    pub machine: String,
    /// The host's name.
    pub host: String,
    /// The runner's process.
    pub pid: u32,
    /// Its start time in clock ticks since boot (field 22 of /proc/PID/stat): tells a reused pid.
    pub started: u64,
    /// The boot in which it started.
    pub boot_id: String,
    /// As in `Status`.
    pub state: String,
    /// For people.
    pub detail: String,
    /// While a runner that comes after another finds out what there is to do: the state in which that left
    /// the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_as: Option<String>,
    /// What is needed to start the machine again from its disks.
    pub launch: serde_json::Value,
    /// What the runner was started with, for one that comes after it.
    #[serde(default)]
    pub config: Option<super::config::RunnerConfig>,
    /// Where it is known on the network, if it ran here and nobody else has its address now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<OnNetwork>,
}

/// A machine that a network agent knows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OnNetwork {
    /// The agent's socket.
    pub agent: PathBuf,
    /// The machine.
    pub net: MachineNet,
}

impl OnNetwork {
    /// The machine is gone for good: its tap goes, and its address and ports are free for others.
    ///
    /// # Errors
    /// The agent does not answer, or refuses.
    pub fn forget(&self) -> io::Result<()> {
        let Self { agent, net } = self;
        let same = |other: &MachineNet| other.key() == net.key() && other.machine == net.machine;
        let known = conduit::status(agent)?.machines.into_iter().find(|m| same(&m.net));
        let Some(known) = known else { return Ok(()) };
        let path = AgentDataPath::connect(agent)?;
        path.forget(&known.net, known.epoch).map_err(io::Error::other)
    }
}

impl MachineDir {
    /// The folders of `machine` under a host's state; makes them.
    pub fn create(state: &Path, machine: &str) -> io::Result<Self> {
        let dir = Self::at(state, machine);
        fs::create_dir_all(dir.disks())?;
        fs::create_dir_all(dir.run())?;
        Ok(dir)
    }

    /// The folders of `machine`, which may not exist.
    #[must_use]
    pub fn at(state: &Path, machine: &str) -> Self {
        Self { root: state.join("machines").join(machine) }
    }

    /// Everything of the machine here.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The API socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.root.join("api.sock")
    }

    /// Disk overlays.
    #[must_use]
    pub fn disks(&self) -> PathBuf {
        self.root.join("disks")
    }

    /// The monitor's files.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    fn record_path(&self) -> PathBuf {
        self.root.join("runner.json")
    }

    /// Replaces the record, atomically.
    pub fn write_record(&self, record: &RunnerRecord) -> io::Result<()> {
        let temporary = self.root.join("runner.json.new");
        fs::write(&temporary, serde_json::to_vec_pretty(record)?)?;
        fs::rename(temporary, self.record_path())
    }

    /// Reads the record, if there is one.
    pub fn read_record(&self) -> io::Result<Option<RunnerRecord>> {
        match fs::read(self.record_path()) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The names of all machines that have a folder here, sorted.
pub fn machines(state: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(state.join("machines")) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// This boot of this host.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

/// When a process started (clock ticks since boot), or `None` if there is none.
#[must_use]
pub fn process_start(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in parentheses may hold spaces; field 3 follows the last one.
    let rest = &stat[stat.rfind(')')? + 2..];
    let mut fields = rest.split(' ');
    if fields.next() == Some("Z") && !has_threads(pid) {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// A process that is being killed is a zombie when its first thread has ended; the others may still have its
/// files open, and what is locked by them.
fn has_threads(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|tasks| tasks.count() > 1)
}

impl RunnerRecord {
    /// Whether that very process still lives.
    #[must_use]
    pub fn alive(&self) -> bool {
        self.boot_id == boot_id() && process_start(self.pid) == Some(self.started)
    }

    /// Waits until it has ended, and with that has let go of its port and its files; whether it has.
    #[must_use]
    pub fn ends_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.alive() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    /// Whether it has been killed, and has not let go of its files yet.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        self.alive() && stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z"))
    }
}

/// A machine's name: what is safe as a file, host name and certificate name.
pub fn check_name(name: &str) -> Result<(), String> {
    let fits = (1..=40).contains(&name.len());
    let clean = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if fits && clean && !name.starts_with('-') {
        Ok(())
    } else {
        Err(format!(
            "\"{name}\" cannot name a machine: use 1 to 40 of a-z, 0-9 and -, not starting with -"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_and_a_gone_one_is_not_alive() {
        let me = std::process::id();
        let started = process_start(me).unwrap();
        let mut record = RunnerRecord {
            machine: "m".into(),
            host: "h".into(),
            pid: me,
            started,
            boot_id: boot_id(),
            state: "running".into(),
            detail: String::new(),
            left_as: None,
            launch: serde_json::Value::Null,
            config: None,
            network: None,
        };
        assert!(record.alive());
        record.started += 1;
        assert!(!record.alive());
        record.started = started;
        record.boot_id = "another".into();
        assert!(!record.alive());
    }

    #[test]
    fn names_that_are_no_file_names_are_refused() {
        for bad in ["", "../x", "a/b", "A", "-a", "a b", &"x".repeat(41)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name("redis-1").is_ok());
    }
}
