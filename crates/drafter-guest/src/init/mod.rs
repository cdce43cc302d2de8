//! Process 1 of the guest.
//!
//! ```text
//!  kernel → /init in the initramfs (initramfs): modules, root device, switch root
//!         → /usr/lib/drafter/guest (this module): file systems, network
//!         → agent ─┐ both are children, started again when they end
//!         → entry ─┘ point, by the package's restart policy
//!         → power off: by SIGTERM from the agent, or when the entry point has ended for good;
//!           a machine that cannot start ends with a reset instead
//! ```
//!
//! What must hold: process 1 never panics and never ends (the kernel would stop with it), so it
//! has one thread, does nothing but start, reap and wait, and takes every failure as a line on the
//! console. All talk with the host is in the agent, another process.

pub mod initramfs;
mod mounts;
pub(crate) mod network;
mod power;
mod supervise;

use crate::{
    agent::ENTRY_FILE,
    config::{InstanceConfig, MACHINE_CONFIG_PATH, MachineConfig},
    log::say,
    process::{Launch, status_of},
    protocol::{Entry, EntryState},
    sys,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal, killpg},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::Pid,
};
use std::{
    collections::BTreeMap,
    os::{fd::AsFd, unix::process::ExitStatusExt},
    path::Path,
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};
use supervise::{Next, Supervisor};

/// Argument by which the binary becomes the agent.
pub const AGENT_ARGUMENT: &str = "agent";

/// Wait before the agent is started again.
const AGENT_BACKOFF: Duration = Duration::from_secs(2);

/// Process 1 of the machine's root. Returns only into a power-off, so never.
pub fn main() -> ! {
    let signals = block_signals();
    mounts::mount_all();
    let instance = instance();
    network::set_up(&instance);
    let config = read_config().unwrap_or_else(|error| {
        say!("{error}; the machine cannot start");
        power::fail()
    });
    Init::new(config, signals).run()
}

/// Signals for which the init waits; in every child they are free again.
fn block_signals() -> Option<SignalFd> {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR] {
        mask.add(signal);
    }
    let made = mask
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC));
    match made {
        Ok(signals) => Some(signals),
        Err(error) => {
            say!("no signals ({error}): the init looks every 100 ms, and cannot be told to stop");
            None
        }
    }
}

fn instance() -> InstanceConfig {
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_else(|error| {
        say!("/proc/cmdline: {error}; the machine has no name and no network");
        String::new()
    });
    let instance = InstanceConfig::parse(&line).unwrap_or_else(|error| {
        say!("{error}; the machine has no name and no network");
        InstanceConfig::default()
    });
    for name in &instance.unknown {
        say!("kernel command line: {name} is unknown to this init; ignored");
    }
    instance
}

fn read_config() -> Result<MachineConfig, String> {
    let bytes = std::fs::read(MACHINE_CONFIG_PATH)
        .map_err(|error| format!("{MACHINE_CONFIG_PATH}: {error}; build the package again"))?;
    MachineConfig::from_json(&bytes).map_err(|error| format!("{MACHINE_CONFIG_PATH}: {error}"))
}

/// A process that is kept running.
enum Kept {
    Running { pid: Pid, since: Instant },
    Due { at: Instant },
    Ended,
}

impl Kept {
    fn due_in(&self) -> Option<Duration> {
        match self {
            Self::Due { at } => Some(at.saturating_duration_since(Instant::now())),
            Self::Running { .. } | Self::Ended => None,
        }
    }

    fn is_due(&self) -> bool {
        self.due_in() == Some(Duration::ZERO)
    }

    fn pid(&self) -> Option<Pid> {
        match self {
            Self::Running { pid, .. } => Some(*pid),
            Self::Due { .. } | Self::Ended => None,
        }
    }
}

/// The state of process 1.
struct Init {
    config: MachineConfig,
    signals: Option<SignalFd>,
    supervisor: Supervisor,
    entry: Kept,
    agent: Kept,
}

impl Init {
    fn new(config: MachineConfig, signals: Option<SignalFd>) -> Self {
        let now = Instant::now();
        let entry = if config.argv.is_empty() { Kept::Ended } else { Kept::Due { at: now } };
        let supervisor = Supervisor::new(&config);
        Self { config, signals, supervisor, entry, agent: Kept::Due { at: now } }
    }

    fn run(&mut self) -> ! {
        self.publish();
        loop {
            if self.agent.is_due() {
                self.start_agent();
            }
            if self.entry.is_due() {
                self.start_entry();
            }
            let due = [self.agent.due_in(), self.entry.due_in()];
            let limit = due.into_iter().flatten().min().unwrap_or(Duration::from_secs(3600));
            if self.wait(limit) {
                power::off(self, "the machine was told to power off");
            }
            self.reap();
        }
    }

    /// Waits for a child's end or a signal; true if the machine shall power off.
    fn wait(&mut self, limit: Duration) -> bool {
        let Some(signals) = &self.signals else {
            std::thread::sleep(limit.min(Duration::from_millis(100)));
            return false;
        };
        // Rounded up, so that the last wait does not spin.
        let limit = limit + Duration::from_millis(1);
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                say!("the init cannot wait: {error}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        let mut stop = false;
        while let Ok(Some(signal)) = signals.read_signal() {
            stop |= signal.ssi_signo != Signal::SIGCHLD as u32;
        }
        stop
    }

    /// Collects every process that has ended: children, and orphans of all kinds.
    fn reap(&mut self) {
        while let Some((pid, status)) = sys::reap() {
            if self.agent.pid() == Some(pid) {
                say!("the agent {}; it starts again", status_of(status));
                self.agent = Kept::Due { at: Instant::now() + AGENT_BACKOFF };
            } else if let Kept::Running { pid: entry, since } = self.entry
                && entry == pid
            {
                self.entry_ended(status, since.elapsed());
            }
        }
    }

    fn start_agent(&mut self) {
        let mut command = Command::new("/proc/self/exe");
        command.arg(AGENT_ARGUMENT).stdin(Stdio::null());
        sys::prepare_child(&mut command, None);
        self.agent = match command.spawn() {
            Ok(child) => Kept::Running { pid: pid_of(child.id()), since: Instant::now() },
            Err(error) => {
                say!("cannot start the agent: {error}");
                Kept::Due { at: Instant::now() + AGENT_BACKOFF }
            }
        };
    }

    fn start_entry(&mut self) {
        let env: [&BTreeMap<String, String>; 1] = [&self.config.env];
        let launch = Launch::of_package(&self.config, &env, &self.config.argv);
        let started = launch
            .command()
            .and_then(|mut command| command.spawn().map_err(|error| launch.cannot_start(&error)));
        match started {
            Ok(child) => {
                self.entry = Kept::Running { pid: pid_of(child.id()), since: Instant::now() };
                self.publish();
            }
            Err(problem) => {
                say!("{problem}");
                // As a shell says that a program was not found or could not be executed.
                self.entry_ended(ExitStatus::from_raw(127 << 8), Duration::ZERO);
            }
        }
    }

    fn entry_ended(&mut self, status: ExitStatus, ran: Duration) {
        let status = status_of(status);
        match self.supervisor.ended(status, ran) {
            Next::StartIn(wait) => {
                say!("the entry point {status}; it starts again in {wait:?}");
                self.entry = Kept::Due { at: Instant::now() + wait };
                self.publish();
            }
            Next::Stay => {
                say!("the entry point {status}; the machine stays up");
                self.entry = Kept::Ended;
                self.publish();
            }
            Next::PowerOff => {
                self.entry = Kept::Ended;
                self.publish();
                power::off(self, &format!("the entry point {status}"))
            }
        }
    }

    /// Tells the agent what the entry point does; replaced as a whole, so that it never reads half.
    fn publish(&self) {
        let state = match (&self.entry, self.config.argv.is_empty()) {
            (_, true) => EntryState::None,
            (Kept::Running { pid, .. }, _) => EntryState::Running { pid: pid.as_raw() },
            (Kept::Due { .. }, _) => EntryState::Waiting,
            (Kept::Ended, _) => EntryState::Ended,
        };
        let entry = Entry {
            state,
            restarts: self.supervisor.restarts(),
            last_end: self.supervisor.last_end().map(|status| status.to_string()),
        };
        let temporary = format!("{ENTRY_FILE}.new");
        let written = serde_json::to_vec(&entry).map_err(std::io::Error::from).and_then(|text| {
            Path::new(ENTRY_FILE).parent().map_or(Ok(()), std::fs::create_dir_all)?;
            std::fs::write(&temporary, text)?;
            std::fs::rename(&temporary, ENTRY_FILE)
        });
        if let Err(error) = written {
            say!("{ENTRY_FILE}: {error}; the host sees an old state of the entry point");
        }
    }

    /// Asks the entry point to end and makes it; at most its stop timeout and a little more.
    fn stop_entry(&mut self) {
        let Some(pid) = self.entry.pid() else { return };
        let limits = [
            (Signal::SIGTERM, self.config.stop_timeout),
            (Signal::SIGKILL, Duration::from_secs(2)),
        ];
        for (signal, limit) in limits {
            // Its group may be gone while it is not, if it changed groups.
            if killpg(pid, signal).is_err() {
                let _ = nix::sys::signal::kill(pid, signal);
            }
            let deadline = Instant::now() + limit;
            loop {
                while let Some((ended, status)) = sys::reap() {
                    if ended == pid {
                        say!("the entry point {}", status_of(status));
                        self.entry = Kept::Ended;
                        return;
                    }
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                // A second request to stop changes nothing.
                self.wait(left);
            }
            say!("the entry point did not end within {limit:?} of {signal}");
        }
    }
}

fn pid_of(id: u32) -> Pid {
    Pid::from_raw(i32::try_from(id).unwrap_or(i32::MAX))
}
