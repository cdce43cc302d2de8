//! Ends what a fleet left when it was killed (SIGKILL, power, a panic in a panic): runners, their
//! monitors with control groups and user ids, and the state of machines.
//!
//! Called with the rig's lock held, so no fleet of this folder lives. A process is only ever ended
//! if it is the very one that was recorded: number, start time and boot.

use super::FleetError;
use drafter::{
    driver::qemu,
    runner::state::{self, MachineDir, RunnerRecord},
};
use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{getsockopt, sockopt::PeerCredentials},
    },
    unistd::Pid,
};
use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How folders of hosts begin, in the rig's folder.
pub(super) const STATE: &str = "state-";
/// The folder of leases, there.
pub(crate) const LEASES: &str = "leases";

/// Clears the rig's folder of an earlier fleet.
pub(super) fn sweep(folder: &Path) -> Result<(), FleetError> {
    for host in hosts(folder).map_err(failed(folder))? {
        for machine in state::machines(&host).map_err(failed(&host))? {
            let dir = MachineDir::at(&host, &machine);
            end_runner(&dir)?;
            qemu::stop_without_runner(&dir.run())
                .map_err(|error| FleetError::Leftover(error.to_string()))?;
        }
        end_keeper(&host)?;
        fs::remove_dir_all(&host).map_err(failed(&host))?;
    }
    let leases = folder.join(LEASES);
    match fs::remove_dir_all(&leases) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(&leases)(error)),
        _ => Ok(()),
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> FleetError {
    move |error| FleetError::Leftover(format!("{}: {error}", path.display()))
}

fn hosts(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut hosts = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(STATE) && entry.file_type()?.is_dir() {
            hosts.push(entry.path());
        }
    }
    Ok(hosts)
}

/// What keeps the host's sign of life stays for a while when nobody needs it any more, and writes to the
/// leases until then.
fn end_keeper(host: &Path) -> Result<(), FleetError> {
    let path = host.join("keeper.sock");
    let Ok(mut line) = UnixStream::connect(&path) else { return Ok(()) };
    let ended = getsockopt(&line, PeerCredentials)
        .and_then(|peer| kill(Pid::from_raw(peer.pid()), Signal::SIGKILL))
        .map_err(io::Error::from)
        .and_then(|()| line.set_read_timeout(Some(KILL_LIMIT)))
        // Its end closes the line.
        .and_then(|()| io::copy(&mut line, &mut io::sink()));
    match ended {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => Err(failed(&path)(error)),
        _ => Ok(()),
    }
}

/// Before the monitor: a runner that lives would look after it.
fn end_runner(dir: &MachineDir) -> Result<(), FleetError> {
    // A record that cannot be read names nobody; the monitor has a record of its own.
    let Some(record) = dir.read_record().ok().flatten().filter(RunnerRecord::alive) else {
        return Ok(());
    };
    let _ = kill(Pid::from_raw(record.pid.cast_signed()), Signal::SIGKILL);
    if crate::rig::wait_for(KILL_LIMIT, || !record.alive()) {
        return Ok(());
    }
    Err(FleetError::Leftover(format!(
        "runner {} of machine \"{}\" does not end",
        record.pid, record.machine
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A fleet's folder in which `runner` is recorded, as started `earlier` ticks before it was.
    fn folder_with(runner: &Child, earlier: u64) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let dir = MachineDir::create(&folder.path().join("state-a"), "redis").unwrap();
        let record = RunnerRecord {
            machine: "redis".into(),
            host: "a".into(),
            pid: runner.id(),
            started: state::process_start(runner.id()).unwrap() - earlier,
            boot_id: state::boot_id(),
            state: "running".into(),
            detail: String::new(),
            left_as: None,
            launch: serde_json::Value::Null,
            config: None,
            network: None,
        };
        dir.write_record(&record).unwrap();
        fs::create_dir(folder.path().join(LEASES)).unwrap();
        fs::create_dir(folder.path().join("statement")).unwrap();
        folder
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_runner_that_was_left_is_ended_and_its_state_removed_and_nothing_else() {
        let mut runner = Command::new("sleep").arg("100").spawn().unwrap();
        let folder = folder_with(&runner, 0);
        sweep(folder.path()).unwrap();
        assert!(!runner.wait().unwrap().success());
        assert_eq!(names(folder.path()), ["statement"]);
    }

    #[test]
    fn a_stranger_with_a_runners_number_is_left_alone() {
        let mut stranger = Command::new("sleep").arg("100").spawn().unwrap();
        let folder = folder_with(&stranger, 1);
        sweep(folder.path()).unwrap();
        assert!(stranger.try_wait().unwrap().is_none());
        assert_eq!(names(folder.path()), ["statement"]);
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    #[test]
    fn a_folder_without_an_earlier_fleet_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        sweep(folder.path()).unwrap();
    }
}
