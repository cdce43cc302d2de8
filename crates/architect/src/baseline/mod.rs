//! QEMU's own live migration, as the thing to be measured against: the same guest, link and
//! workload, moved by stock QEMU from one namespace to another. Used by the benchmarks only.
//!
//! A [`Machine`] runs in a network namespace under a stock QEMU that owns its memory.
//! [`Machine::migrate`] starts a second QEMU elsewhere, migrates over TCP in one of QEMU's
//! [`Mode`]s, and gives back an [`Outcome`] and the machine where it runs now. QMP is spoken
//! through the [`Monitor`] trait, so that there is one client for it, the driver's.
//!
//! What must hold: every step has a deadline; a migration that does not converge is cancelled and
//! reported as such, with the machine still running at its source; whether the guest survived is
//! judged by the caller's own question to it, never by QEMU's word, because QEMU 7.2's pre-copy
//! under its translator reports success for guests that are dead.

mod process;

use process::Process;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    ffi::OsString,
    io,
    net::SocketAddrV4,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

/// A QEMU's control connection.
pub trait Monitor: Send {
    /// Executes one command; the error is a sentence.
    fn call(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value, String>;
}

/// Connects to the control socket at a path, and negotiates.
pub type Connect<'a> = &'a dyn Fn(&Path, Duration) -> Result<Box<dyn Monitor>, String>;

/// The guest: the same at source and destination.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Kernel, an ELF file.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initramfs: PathBuf,
    /// Kernel command line, whole.
    pub command_line: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// `tcg` or `kvm`.
    pub accelerator: String,
}

/// One host's side of it.
#[derive(Clone, Debug)]
pub struct Side {
    /// Name, for messages and file names.
    pub name: String,
    /// Network namespace (as in `/run/netns/a`) that QEMU runs in; `None` for the present one.
    pub namespace: Option<PathBuf>,
    /// A folder for sockets and logs. Its path is short: a socket's has at most 107 bytes.
    pub folder: PathBuf,
    /// This host's network, disks and the like (`-netdev …`). A disk that both sides have open
    /// needs `file.locking=off` or a server.
    pub arguments: Vec<OsString>,
}

/// Certificates for QEMU's own TLS: a folder as `-object tls-creds-x509` wants it (`ca-cert.pem`,
/// `server-cert.pem`, `server-key.pem`, `client-cert.pem`, `client-key.pem`).
#[derive(Clone, Debug)]
pub struct Tls {
    /// The folder.
    pub folder: PathBuf,
    /// The name in the destination's certificate.
    pub destination: String,
}

/// How QEMU migrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// QEMU as it comes: 128 MiB/s and a downtime limit of 300 ms.
    PreCopyDefault,
    /// Pre-copy with these limits.
    PreCopyTuned {
        /// Longest downtime that QEMU aims for.
        downtime_limit_ms: u64,
        /// Bandwidth in MiB/s.
        bandwidth_mib: u64,
    },
    /// Pre-copy over several connections, otherwise as tuned.
    Multifd {
        /// Number of connections.
        channels: u32,
        /// Longest downtime that QEMU aims for.
        downtime_limit_ms: u64,
        /// Bandwidth in MiB/s.
        bandwidth_mib: u64,
    },
    /// Pre-copy for this long, then post-copy.
    PostCopy {
        /// How long.
        pre_copy_ms: u64,
        /// Bandwidth in MiB/s.
        bandwidth_mib: u64,
    },
}

impl Mode {
    /// The settings to measure against: a downtime limit of 50 ms because lower ones kill guests,
    /// and a bandwidth that leaves the limit to the link.
    pub const PRE_COPY_TUNED: Mode =
        Mode::PreCopyTuned { downtime_limit_ms: 50, bandwidth_mib: 4000 };

    /// The capability that the mode is made of.
    fn capability(self) -> Option<&'static str> {
        match self {
            Mode::PreCopyDefault | Mode::PreCopyTuned { .. } => None,
            Mode::Multifd { .. } => Some("multifd"),
            Mode::PostCopy { .. } => Some("postcopy-ram"),
        }
    }

    /// Every capability that any mode uses, on or off: a machine that came by one mode may leave
    /// by another.
    fn capabilities(self) -> Value {
        let switch = |name| json!({"capability": name, "state": self.capability() == Some(name)});
        let all = ["multifd", "postcopy-ram"].map(switch);
        json!({ "capabilities": all })
    }

    /// Every parameter that any mode sets, with QEMU 7.2's own value where this mode sets none.
    fn parameters(self) -> Value {
        let (downtime_limit_ms, bandwidth_mib, channels) = match self {
            Mode::PreCopyDefault => (DOWNTIME_LIMIT_MS, BANDWIDTH_MIB, CHANNELS),
            Mode::PreCopyTuned { downtime_limit_ms, bandwidth_mib } => {
                (downtime_limit_ms, bandwidth_mib, CHANNELS)
            }
            Mode::Multifd { channels, downtime_limit_ms, bandwidth_mib } => {
                (downtime_limit_ms, bandwidth_mib, channels)
            }
            Mode::PostCopy { bandwidth_mib, .. } => (DOWNTIME_LIMIT_MS, bandwidth_mib, CHANNELS),
        };
        json!({
            "downtime-limit": downtime_limit_ms,
            "max-bandwidth": bandwidth_mib << 20,
            "multifd-channels": channels,
            "tls-creds": "",
            "tls-hostname": ""
        })
    }
}

/// QEMU 7.2's defaults.
const DOWNTIME_LIMIT_MS: u64 = 300;
const BANDWIDTH_MIB: u64 = 128;
const CHANNELS: u32 = 2;

/// What one migration is asked to do.
pub struct Migration<'a> {
    /// The destination.
    pub to: &'a Side,
    /// Where the destination listens, in its namespace, reachable from the source's.
    pub listen: SocketAddrV4,
    /// How.
    pub mode: Mode,
    /// Encryption by QEMU.
    pub tls: Option<&'a Tls>,
    /// After this it counts as not converging and is cancelled.
    pub deadline: Duration,
    /// Asks the guest, at its destination, whether it is well; with a deadline of its own.
    pub alive: &'a mut dyn FnMut() -> bool,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// How it was migrated.
    pub mode: Mode,
    /// QEMU's own count of the whole; `None` if it did not converge, or if QEMU says zero.
    pub total_ms: Option<f64>,
    /// QEMU's own count of the time between pause and run; `None` for post-copy, where QEMU 7.2
    /// reports a figure that means something else. Compare client gaps there.
    pub downtime_ms: Option<f64>,
    /// From the command to the guest running at the destination with nothing left to send, by our
    /// own clock.
    pub wall_ms: f64,
    /// Bytes that QEMU sent for memory.
    pub bytes: u64,
    /// Whether it came to an end within the deadline.
    pub converged: bool,
    /// What the guest itself says, where it runs now.
    pub guest_alive: bool,
    /// Why it did not converge.
    pub note: Option<String>,
    /// From the command to the end, for the client's gap; not kept in files.
    #[serde(skip)]
    pub window: Option<(Instant, Instant)>,
}

/// Why there is nothing to measure.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// QEMU could not be started.
    #[error("baseline: starting QEMU on {side}: {source}")]
    Start {
        /// Where.
        side: String,
        /// The cause.
        source: io::Error,
    },
    /// QEMU did not do as told.
    #[error("baseline: {command} on {side}: {detail}; QEMU's last words: {words}")]
    Refused {
        /// Where.
        side: String,
        /// Which command.
        command: String,
        /// The monitor's answer.
        detail: String,
        /// End of QEMU's error output.
        words: String,
    },
}

const CONNECT_LIMIT: Duration = Duration::from_secs(15);
const CALL_LIMIT: Duration = Duration::from_secs(10);
const FIGURES_LIMIT: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(2);

/// A guest under a stock QEMU. Killed when dropped.
pub struct Machine {
    guest: Guest,
    process: Process,
    monitor: Box<dyn Monitor>,
    generation: u32,
}

impl Machine {
    /// Starts the guest. Returns when QEMU answers, which is before the guest is up.
    pub fn boot(
        guest: &Guest,
        side: &Side,
        connect: Connect<'_>,
    ) -> Result<Machine, BaselineError> {
        Machine::start(guest, side, 0, &[], connect)
    }

    fn start(
        guest: &Guest,
        side: &Side,
        generation: u32,
        more: &[OsString],
        connect: Connect<'_>,
    ) -> Result<Machine, BaselineError> {
        let mut process = Process::start(guest, side, generation, more)?;
        let deadline = Instant::now() + CONNECT_LIMIT;
        // The socket is there a moment after the process.
        let monitor = loop {
            match connect(process.socket(), CONNECT_LIMIT) {
                Ok(monitor) => break monitor,
                Err(detail) if Instant::now() >= deadline || process.has_ended() => {
                    return Err(process.refused("connecting to its monitor", detail));
                }
                Err(_) => sleep(POLL),
            }
        };
        Ok(Machine { guest: guest.clone(), process, monitor, generation })
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Where the guest's serial console is written.
    pub fn console_log(&self) -> &Path {
        self.process.console_log()
    }

    /// Whether QEMU has ended (the guest shut down or crashed, or QEMU did).
    pub fn has_ended(&mut self) -> bool {
        self.process.has_ended()
    }

    /// QEMU's own word for the machine's state, as in `running`.
    pub fn status(&mut self) -> Result<String, BaselineError> {
        let status = self.call("query-status", Value::Null)?;
        Ok(status.get("status").and_then(Value::as_str).unwrap_or("unknown").to_owned())
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<Value, BaselineError> {
        self.monitor
            .call(command, arguments, CALL_LIMIT)
            .map_err(|detail| self.process.refused(command, detail))
    }

    fn configure(&mut self, mode: Mode, parameters: Value) -> Result<(), BaselineError> {
        self.call("migrate-set-capabilities", mode.capabilities())?;
        self.call("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// Migrates to another side. The machine that is returned runs where the guest is now: at the
    /// destination, or still at the source if it did not converge.
    pub fn migrate(
        mut self,
        migration: Migration<'_>,
        connect: Connect<'_>,
    ) -> Result<(Outcome, Machine), BaselineError> {
        let Migration { to, listen, mode, tls, deadline, alive } = migration;
        let mut more: Vec<OsString> = vec!["-incoming".into(), "defer".into()];
        let mut parameters = mode.parameters();
        // Also counts attempts, so that what a failed one left behind is in nobody's way.
        self.generation += 1;
        let generation = self.generation;
        if let Some(tls) = tls {
            more.extend(tls_object(tls, "server", generation));
            self.call("object-add", tls_properties(tls, "client", generation))?;
        }
        let mut destination = Machine::start(&self.guest, to, generation, &more, connect)?;
        if tls.is_some() {
            parameters["tls-creds"] = json!(tls_name(generation));
        }
        destination.configure(mode, parameters.clone())?;
        if let Some(tls) = tls {
            parameters["tls-hostname"] = json!(tls.destination);
        }
        self.configure(mode, parameters)?;
        let uri = format!("tcp:{listen}");
        destination.call("migrate-incoming", json!({ "uri": uri }))?;

        let started = Instant::now();
        self.call("migrate", json!({ "uri": uri }))?;
        let end = self.follow(mode, started + deadline)?;
        let mut note = end.note;
        let converged = note.is_none();
        if converged && let Err(error) = destination.wait_running(Instant::now() + CALL_LIMIT) {
            note = Some(error.to_string());
        }
        let ended = Instant::now();
        // The other QEMU ends here, so that whoever answers later is the machine's only copy.
        let (status, now) = match converged {
            true => {
                let status = self.figures(end.status)?;
                drop(self);
                (status, destination)
            }
            false => {
                drop(destination);
                (end.status, self)
            }
        };
        let figure = |name| status.get(name).and_then(Value::as_f64).filter(|_| converged);
        let post_copy = matches!(mode, Mode::PostCopy { .. });
        let mut outcome = Outcome {
            mode,
            total_ms: figure("total-time").filter(|&total| total > 0.0),
            downtime_ms: figure("downtime").filter(|_| !post_copy),
            wall_ms: (ended - started).as_secs_f64() * 1e3,
            bytes: status.pointer("/ram/transferred").and_then(Value::as_u64).unwrap_or(0),
            converged,
            guest_alive: false,
            note,
            window: Some((started, ended)),
        };
        outcome.guest_alive = alive();
        Ok((outcome, now))
    }

    /// Follows a migration to its end, which is by success, by failure, or by being cancelled.
    fn follow(&mut self, mode: Mode, deadline: Instant) -> Result<End, BaselineError> {
        let mut post_copy_at = match mode {
            Mode::PostCopy { pre_copy_ms, .. } => {
                Some(Instant::now() + Duration::from_millis(pre_copy_ms))
            }
            _ => None,
        };
        loop {
            let status = self.call("query-migrate", Value::Null)?;
            let word = status.get("status").and_then(Value::as_str).unwrap_or("none");
            match word {
                "completed" => return Ok(End { status, note: None }),
                "failed" | "cancelled" => {
                    let why = status.get("error-desc").and_then(Value::as_str).unwrap_or(word);
                    let note = Some(format!("QEMU: {why}"));
                    return Ok(End { status, note });
                }
                "active" if post_copy_at.is_some_and(|at| Instant::now() >= at) => {
                    post_copy_at = None;
                    self.call("migrate-start-postcopy", Value::Null)?;
                }
                _ => {}
            }
            if Instant::now() >= deadline {
                return self.cancel(status);
            }
            sleep(POLL);
        }
    }

    /// QEMU says `completed` a moment before it has added up its figures.
    fn figures(&mut self, mut status: Value) -> Result<Value, BaselineError> {
        let limit = Instant::now() + FIGURES_LIMIT;
        while status.get("total-time").and_then(Value::as_u64).unwrap_or(0) == 0
            && Instant::now() < limit
        {
            sleep(POLL);
            status = self.call("query-migrate", Value::Null)?;
        }
        Ok(status)
    }

    fn cancel(&mut self, last: Value) -> Result<End, BaselineError> {
        self.call("migrate_cancel", Value::Null)?;
        let limit = Instant::now() + CALL_LIMIT;
        loop {
            let status = self.call("query-migrate", Value::Null)?;
            match status.get("status").and_then(Value::as_str) {
                // It got there after all, between two looks.
                Some("completed") => return Ok(End { status, note: None }),
                Some("cancelled" | "failed") => break,
                _ if Instant::now() >= limit => {
                    let detail = format!("it is still {status} after {CALL_LIMIT:?}");
                    return Err(self.process.refused("migrate_cancel", detail));
                }
                _ => sleep(POLL),
            }
        }
        Ok(End { status: last, note: Some("did not converge before its deadline".into()) })
    }

    fn wait_running(&mut self, deadline: Instant) -> Result<(), BaselineError> {
        loop {
            let status = self.status()?;
            if status == "running" {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let detail = format!("it is {status} after the migration");
                return Err(self.process.refused("query-status", detail));
            }
            sleep(POLL);
        }
    }
}

struct End {
    status: Value,
    note: Option<String>,
}

fn tls_name(generation: u32) -> String {
    format!("tls{generation}")
}

fn tls_properties(tls: &Tls, endpoint: &str, generation: u32) -> Value {
    json!({
        "qom-type": "tls-creds-x509",
        "id": tls_name(generation),
        "dir": tls.folder.to_string_lossy(),
        "endpoint": endpoint,
        "verify-peer": true
    })
}

fn tls_object(tls: &Tls, endpoint: &str, generation: u32) -> [OsString; 2] {
    ["-object".into(), tls_properties(tls, endpoint, generation).to_string().into()]
}

#[cfg(test)]
mod tests;
