//! What the agent does to its machine. A trait, so that tests never set a host's clock.

use super::identity::{self, IDENTITY_FILE};
use crate::{
    config::InstanceConfig,
    protocol::{Entry, EntryState, NewIdentity},
    sys,
};
use nix::{
    sys::{
        signal::{Signal, kill},
        time::TimeSpec,
    },
    time::{ClockId, clock_gettime, clock_settime},
    unistd::Pid,
};
use std::{
    fs::File,
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// A clock that is off by less than this is left alone: the message's own way took time too.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(10);

/// Where the init tells what the entry point does; see [`Entry`].
pub(crate) const ENTRY_FILE: &str = "/run/drafter/entry.json";

/// The machine as the agent sees it.
pub trait Platform: Send + Sync {
    /// Sets the wall clock to `unix` (time since 1970) if it is off by more than a tolerance.
    /// Returns the step in nanoseconds.
    ///
    /// # Errors
    /// What the system says.
    fn set_clock(&self, unix: Duration) -> io::Result<i64>;

    /// Mixes fresh random bytes into the kernel's generator.
    ///
    /// # Errors
    /// What the system says.
    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()>;

    /// Sets the host name.
    ///
    /// # Errors
    /// What the system says.
    fn set_host_name(&self, name: &str) -> io::Result<()>;

    /// Takes a copy's names and addresses and raises its generation. Each is tried; returns what did
    /// not work.
    fn become_another(&self, identity: &NewIdentity) -> Vec<String>;

    /// Writes all dirty data to the disks.
    fn sync(&self);

    /// Begins an orderly power-off and returns.
    ///
    /// # Errors
    /// When it could not begin.
    fn shut_down(&self) -> io::Result<()>;

    /// What the entry point does.
    fn entry(&self) -> Entry;

    /// How long the kernel has run.
    fn uptime(&self) -> Duration;

    /// Where a TCP probe tries, in order.
    fn probe_addresses(&self) -> Vec<Ipv4Addr>;
}

/// The machine that this process runs in, with drafter's init as process 1.
pub struct Machine {
    entry_file: PathBuf,
    /// What it booted with, but for what it became since.
    instance: Mutex<InstanceConfig>,
    /// Open from the beginning: to find it by its name is as much code as what is done with it, and a
    /// machine that wakes under a translator has none translated.
    random: Option<File>,
}

fn open_random() -> io::Result<File> {
    File::options().write(true).open("/dev/urandom")
}

impl Machine {
    /// `booted` is what the machine booted with; what it became since is found.
    #[must_use]
    pub fn new(mut booted: InstanceConfig) -> Self {
        identity::found(Path::new(IDENTITY_FILE), &mut booted);
        let random = open_random().ok();
        Self { entry_file: ENTRY_FILE.into(), instance: Mutex::new(booted), random }
    }

    fn instance(&self) -> MutexGuard<'_, InstanceConfig> {
        self.instance.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Platform for Machine {
    fn set_clock(&self, unix: Duration) -> io::Result<i64> {
        let clock = ClockId::CLOCK_REALTIME;
        let now = Duration::from(clock_gettime(clock)?);
        if unix.abs_diff(now) <= CLOCK_TOLERANCE {
            return Ok(0);
        }
        clock_settime(clock, TimeSpec::from(unix))?;
        let step = i64::try_from(unix.abs_diff(now).as_nanos()).unwrap_or(i64::MAX);
        Ok(if unix >= now { step } else { -step })
    }

    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()> {
        if let Some(random) = &self.random {
            return sys::add_entropy(random, bytes);
        }
        sys::add_entropy(&open_random()?, bytes)
    }

    fn set_host_name(&self, name: &str) -> io::Result<()> {
        nix::unistd::sethostname(name)?;
        Ok(())
    }

    fn become_another(&self, identity: &NewIdentity) -> Vec<String> {
        identity::take(&mut self.instance(), identity)
    }

    fn sync(&self) {
        nix::unistd::sync();
    }

    fn shut_down(&self) -> io::Result<()> {
        kill(Pid::from_raw(1), Signal::SIGTERM)?;
        Ok(())
    }

    fn entry(&self) -> Entry {
        let read = std::fs::read(&self.entry_file).ok();
        read.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or(Entry {
            state: EntryState::None,
            restarts: 0,
            last_end: None,
        })
    }

    fn uptime(&self) -> Duration {
        clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
    }

    fn probe_addresses(&self) -> Vec<Ipv4Addr> {
        [Some(Ipv4Addr::LOCALHOST), self.instance().address].into_iter().flatten().collect()
    }
}
