//! A daemon of a rig: started with a log and a pid file, killed when dropped, and found again by
//! its pid file when its rig was killed.

use super::{RigError, io_failed, wait_for};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

const KILL_LIMIT: Duration = Duration::from_secs(5);
const TAIL_LINES: usize = 12;

/// What identifies a process for good: its number may be given out again, with another start.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PidFile {
    pid: i32,
    /// Field 22 of /proc/PID/stat: ticks since the computer started.
    started: u64,
    program: PathBuf,
}

impl PidFile {
    fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name (field 2) is in parentheses and may hold anything; fields go on after the last.
        let started = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        Some(Self { pid, started, program })
    }
}

/// A running daemon. Dropping it kills it (SIGKILL) and waits for its end.
pub(super) struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
    pid_file: PathBuf,
}

impl Daemon {
    pub(super) fn start(folder: &Path, name: &str, mut command: Command) -> Result<Self, RigError> {
        for part in ["logs", "pids"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(io_failed(format!("make {}", path.display())))?;
        }
        let log = folder.join("logs").join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(io_failed(format!("make {}", log.display())))?;
        let copy = file.try_clone().map_err(io_failed("duplicate a log"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(copy)
            // Ctrl-C at the terminal is for the rig's owner, who ends its daemons in order.
            .process_group(0)
            .spawn()
            .map_err(io_failed(format!("start {}", command.get_program().display())))?;
        let pid_file = folder.join("pids").join(format!("{name}.json"));
        let daemon = Self { name: name.to_owned(), child, log, pid_file };
        // spawn returns after exec, so the program in /proc is the daemon's own.
        let facts = PidFile::of(daemon.child.id().cast_signed());
        let text = serde_json::to_vec(&facts).expect("plain data");
        fs::write(&daemon.pid_file, text)
            .map_err(io_failed(format!("write {}", daemon.pid_file.display())))?;
        Ok(daemon)
    }

    /// Waits until `ready`; fails as soon as the daemon has ended.
    pub(super) fn wait_until(
        &mut self,
        what: &str,
        limit: Duration,
        ready: impl Fn() -> bool,
    ) -> Result<(), RigError> {
        let mut ended = None;
        let done = wait_for(limit, || {
            ended = self.child.try_wait().ok().flatten();
            ended.is_some() || ready()
        });
        let problem = match (ended, done) {
            (Some(status), _) => format!("ended with {status}"),
            (None, false) => format!("did not {what} within {limit:?}"),
            (None, true) => return Ok(()),
        };
        Err(RigError::Daemon {
            daemon: self.name.clone(),
            problem,
            log: self.log.display().to_string(),
            tail: tail(&self.log),
        })
    }
}

#[cfg(test)]
impl Daemon {
    /// Whether it has ended by now, or does so soon.
    pub(super) fn ended(&mut self) -> bool {
        wait_for(KILL_LIMIT, || self.child.try_wait().is_ok_and(|status| status.is_some()))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.pid_file);
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

/// Kills the daemons that a killed rig has left in `folder`.
pub(super) fn sweep(folder: &Path) -> Result<(), RigError> {
    let Ok(entries) = fs::read_dir(folder.join("pids")) else { return Ok(()) };
    for entry in entries.flatten() {
        let Ok(text) = fs::read(entry.path()) else { continue };
        let Ok(Some(file)) = serde_json::from_slice::<Option<PidFile>>(&text) else { continue };
        let same = || PidFile::of(file.pid).as_ref() == Some(&file);
        if same() {
            let _ = kill(Pid::from_raw(file.pid), Signal::SIGKILL);
            if !wait_for(KILL_LIMIT, || !same()) {
                return Err(RigError::Settings {
                    prefix: folder.display().to_string(),
                    detail: format!("process {} of an earlier rig does not end", file.pid),
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_left_behind_is_killed_and_a_stranger_with_its_number_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("100");
        let mut daemon = Daemon::start(folder.path(), "left", command).unwrap();
        let pid = daemon.child.id().cast_signed();
        let mut facts = PidFile::of(pid).unwrap();

        facts.started += 1;
        fs::write(&daemon.pid_file, serde_json::to_vec(&Some(&facts)).unwrap()).unwrap();
        sweep(folder.path()).unwrap();
        assert!(daemon.child.try_wait().unwrap().is_none(), "another start: another process");

        facts.started -= 1;
        fs::write(&daemon.pid_file, serde_json::to_vec(&Some(&facts)).unwrap()).unwrap();
        // The child is ours, so it stays a zombie until waited for; its program is gone from
        // /proc then, which is what the sweep looks at.
        sweep(folder.path()).unwrap();
        assert!(wait_for(KILL_LIMIT, || daemon.child.try_wait().unwrap().is_some()));
    }

    #[test]
    fn a_daemon_that_ends_is_reported_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo the port is taken; exit 3"]);
        let mut daemon = Daemon::start(folder.path(), "edge", command).unwrap();
        let error = daemon.wait_until("answer", Duration::from_secs(5), || false).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("edge ended") && text.contains("the port is taken"), "{text}");
    }
}
