//! A monitor's process, known by pid and start time: a pid alone comes to mean another process.

use super::sys;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
};
use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// How a process ended, as far as can be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Code(i32),
    Signal(i32),
    /// It was not our child, so that its status went to somebody else.
    Unknown,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(name) => write!(f, "killed by {name}"),
                Err(_) => write!(f, "killed by signal {signal}"),
            },
            Self::Unknown => f.write_str("exit status unknown"),
        }
    }
}

/// Pid and start time: together they name one process until the host reboots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Identity {
    pub(super) pid: u32,
    /// Clock ticks after boot, from /proc/PID/stat.
    pub(super) start_time: u64,
}

impl Identity {
    /// This process.
    pub(super) fn own() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// Whoever has this pid now.
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_time = start_time(&stat).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat: no start time"))
        })?;
        Ok(Self { pid, start_time })
    }

    /// Whether that process is still there, be it as a zombie.
    pub(super) fn exists(self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == self)
    }

    /// Whether that process still runs: one that was killed may stay a zombie for as long as its
    /// parent, or whoever inherited it, does not ask for its end.
    pub(super) fn runs(self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let state = stat.rsplit_once(')').map_or("", |(_, after_name)| after_name.trim_start());
        start_time(&stat) == Some(self.start_time) && !state.starts_with(['Z', 'X'])
    }
}

/// Field 22 of /proc/PID/stat. The name in field 2 may hold anything, also parentheses.
fn start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// A process that we can wait for and signal, ours or taken over.
pub(super) struct Process {
    identity: Identity,
    descriptor: Arc<OwnedFd>,
    ended: Option<Ended>,
}

impl Process {
    /// The process of that identity; `None` if it is gone.
    pub(super) fn open(identity: Identity) -> io::Result<Option<Self>> {
        let descriptor = match sys::pidfd_open(identity.pid) {
            Ok(descriptor) => descriptor,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Checked after opening: from here on the descriptor means this process or none.
        if !identity.exists() {
            return Ok(None);
        }
        let mut process = Self { identity, descriptor: Arc::new(descriptor), ended: None };
        Ok(process.ended().is_none().then_some(process))
    }

    /// A child that was just started.
    pub(super) fn of_child(pid: u32) -> io::Result<Self> {
        Ok(Self {
            identity: Identity::of(pid)?,
            descriptor: Arc::new(sys::pidfd_open(pid)?),
            ended: None,
        })
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    pub(super) fn pid(&self) -> u32 {
        self.identity.pid
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// The descriptor for whoever outlives this value.
    pub(super) fn shared_descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.descriptor)
    }

    /// Its threads: id and name.
    pub(super) fn threads(&self) -> Vec<(u32, String)> {
        let folder = format!("/proc/{}/task", self.pid());
        let ids = fs::read_dir(&folder).into_iter().flatten().flatten();
        let ids = ids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        ids.filter_map(|id| {
            let name = fs::read_to_string(format!("{folder}/{id}/comm")).ok()?;
            Some((id, name.trim_end().to_owned()))
        })
        .collect()
    }

    /// How it ended, if it did. Does not wait.
    pub(super) fn ended(&mut self) -> Option<Ended> {
        self.wait(Duration::ZERO)
    }

    /// Waits until it ended.
    pub(super) fn wait(&mut self, limit: Duration) -> Option<Ended> {
        let until = Instant::now() + limit;
        while self.ended.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut wanted = [PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN)];
            match nix::poll::poll(&mut wanted, timeout) {
                Ok(1..) => self.ended = Some(self.status()),
                Err(nix::errno::Errno::EINTR) => {}
                _ if left.is_zero() => break,
                _ => {}
            }
        }
        self.ended
    }

    /// Takes the status of a process that has ended.
    fn status(&self) -> Ended {
        match waitid(
            Id::PIDFd(self.descriptor.as_fd()),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
        ) {
            Ok(WaitStatus::Exited(_, code)) => Ended::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => Ended::Signal(signal as i32),
            _ => Ended::Unknown,
        }
    }

    pub(super) fn signal(&self, signal: nix::sys::signal::Signal) -> io::Result<()> {
        signal_by(self.descriptor(), signal)
    }
}

/// Sends a signal; to a process that is gone it is no error.
pub(super) fn signal_by(
    process: BorrowedFd<'_>,
    signal: nix::sys::signal::Signal,
) -> io::Result<()> {
    match sys::pidfd_signal(process, signal as i32) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result,
    }
}

/// The last lines of a log, at most `bytes` of them, as one line; what cannot be read is "".
pub(super) fn tail(path: &Path, bytes: usize) -> String {
    let Ok(content) = fs::read(path) else { return String::new() };
    let start = content.len().saturating_sub(bytes);
    let text = String::from_utf8_lossy(&content[start..]);
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_start_time_is_found_behind_any_process_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 9 9";
        assert_eq!(start_time(stat), Some(4711));
        assert_eq!(start_time("7 (x"), None);
    }

    #[test]
    fn a_process_with_another_start_time_is_not_the_one_we_look_for() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let mut identity = Identity::of(child.id()).unwrap();
        assert!(Process::open(identity).unwrap().is_some());
        identity.start_time += 1;
        assert!(Process::open(identity).unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_killed_child_ends_by_that_signal_and_a_stranger_for_reasons_unknown() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let mut process = Process::of_child(child.id()).unwrap();
        let mut again = Process::open(process.identity()).unwrap().unwrap();
        assert_eq!(process.wait(Duration::from_millis(20)), None);
        process.signal(nix::sys::signal::SIGKILL).unwrap();
        assert_eq!(process.wait(Duration::from_secs(10)), Some(Ended::Signal(libc::SIGKILL)));
        assert_eq!(again.wait(Duration::from_secs(10)), Some(Ended::Unknown));
        process.signal(nix::sys::signal::SIGKILL).unwrap();
        child.wait().unwrap_err(); // its status was taken above
    }
}
