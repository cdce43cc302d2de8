//! `/etc/drafter/machine.json`: what the init in the guest runs, and how.
//!
//! The package builder makes a [`MachineConfig`] from the manifest and writes [`MachineConfig::to_json`]
//! into the root file system at [`MACHINE_CONFIG_PATH`]; the init reads it with
//! [`MachineConfig::from_json`]. It belongs to the package: nothing in it depends on the host or
//! the instance. Those facts come on the kernel command line, see [`InstanceConfig`].
//!
//! What must hold: a file that an older package carries is read by a newer init (fields have
//! defaults, the major version stays), and a file that a newer builder wrote with another major
//! version is refused by name instead of being half understood.

mod instance;

pub use instance::{GATEWAY, GATEWAY_V6, InstanceConfig, InstanceError, MAX_HOST_NAME};

use std::{collections::BTreeMap, fmt, time::Duration};

/// Where the init looks for the file in the machine's root.
pub const MACHINE_CONFIG_PATH: &str = "/etc/drafter/machine.json";

/// Where the init binary lies in the machine's root; the initramfs executes it.
pub const GUEST_BINARY_PATH: &str = "/usr/lib/drafter/guest";

/// Where the initramfs keeps the kernel modules that it loads.
pub const MODULES_DIR: &str = "/modules";

/// File in [`MODULES_DIR`] that names the modules to load, one file name a line, in order. Blank
/// lines and lines that start with `#` are skipped.
pub const MODULES_ORDER: &str = "/modules/order";

/// The root device that the initramfs mounts: the machine's first disk.
pub const ROOT_DEVICE: &str = "/dev/vda";

/// The version this code writes, and the newest it understands fully.
pub const MACHINE_CONFIG_VERSION: ConfigVersion = ConfigVersion { major: 1, minor: 0 };

/// Longest list of arguments or variables that a config may hold.
const MAX_ITEMS: usize = 4096;

/// Version of the file, as in `"1.0"`. Another major number means that an older init would
/// misunderstand the file; a higher minor one only adds fields that it may ignore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigVersion {
    /// Incompatible changes.
    pub major: u32,
    /// Additions.
    pub minor: u32,
}

impl fmt::Display for ConfigVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl serde::Serialize for ConfigVersion {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for ConfigVersion {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = text
            .split_once('.')
            .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let (major, minor) = parsed.ok_or_else(|| {
            serde::de::Error::custom(format!(
                "version \"{text}\" is not of the form MAJOR.MINOR, as in \"{MACHINE_CONFIG_VERSION}\""
            ))
        })?;
        Ok(Self { major, minor })
    }
}

/// What runs in a machine. All durations are milliseconds in the file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MachineConfig {
    /// See [`ConfigVersion`].
    pub version: ConfigVersion,
    /// The entry point: program (looked up in `PATH` if it has no slash) and arguments. Empty: the
    /// machine runs nothing but the agent, and is used by `exec`.
    pub argv: Vec<String>,
    /// Environment of the entry point, hooks and probes. `PATH` and `HOME` have defaults
    /// ([`DEFAULT_PATH`], the user's home).
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where the entry point starts.
    #[serde(default = "root_dir")]
    pub working_dir: String,
    /// Who the entry point runs as: `name`, `name:group`, `uid` or `uid:gid`, looked up in the
    /// machine's own `/etc/passwd` and `/etc/group`. Empty: root.
    #[serde(default)]
    pub user: String,
    /// When the entry point starts again after it ended.
    #[serde(default)]
    pub restart: Restart,
    /// What the machine does when the entry point has ended and will not start again.
    #[serde(default)]
    pub at_end: AtEnd,
    /// How long the entry point has between SIGTERM and SIGKILL when the machine is shut down.
    #[serde(default = "stop_timeout", with = "millis", rename = "stop_timeout_ms")]
    pub stop_timeout: Duration,
    /// Commands around a move.
    #[serde(default)]
    pub hooks: Hooks,
    /// How to see from inside whether the machine does its work.
    #[serde(default)]
    pub probes: Probes,
}

/// `PATH` where the config has none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// When the entry point starts again.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Restart {
    /// After which ends.
    #[serde(default)]
    pub policy: RestartPolicy,
    /// Wait before the first restart; doubles with every further one.
    #[serde(default = "backoff_first", with = "millis", rename = "backoff_first_ms")]
    pub backoff_first: Duration,
    /// Longest wait.
    #[serde(default = "backoff_max", with = "millis", rename = "backoff_max_ms")]
    pub backoff_max: Duration,
    /// A run of at least this length makes the next wait the first one again.
    #[serde(default = "backoff_reset", with = "millis", rename = "backoff_reset_ms")]
    pub backoff_reset: Duration,
}

impl Default for Restart {
    fn default() -> Self {
        Self {
            policy: RestartPolicy::default(),
            backoff_first: backoff_first(),
            backoff_max: backoff_max(),
            backoff_reset: backoff_reset(),
        }
    }
}

/// After which ends the entry point starts again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// It runs once.
    Never,
    /// After a non-zero exit status or a signal.
    #[default]
    OnFailure,
    /// After every end.
    Always,
}

/// What follows the last end of the entry point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AtEnd {
    /// The machine powers off, as a container would end.
    #[default]
    PowerOff,
    /// The machine stays up; the agent answers.
    Stay,
}

/// Commands that the agent runs around a move, as the user of the entry point.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Hooks {
    /// Before the machine is paused. If it fails the move is called off and the machine runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before_suspend: Option<Hook>,
    /// After the machine runs again; clock and random numbers are right by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_resume: Option<Hook>,
    /// In a copy of a machine, before `after_resume`; the copy has its own names, addresses and random
    /// numbers by then, and nothing of it leaves its host before the hook has succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_fork: Option<Hook>,
}

/// A command with a limit.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Hook {
    /// Program and arguments; not empty.
    pub argv: Vec<String>,
    /// After this the command is killed and counts as failed.
    #[serde(default = "hook_timeout", with = "millis", rename = "timeout_ms")]
    pub timeout: Duration,
}

/// How to see from inside whether the machine does its work. They run when the host asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Probes {
    /// Is it alive? Without one: the entry point runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness: Option<Probe>,
    /// Does it serve? Without one: the entry point runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<Probe>,
}

/// One probe.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Probe {
    /// What is tried.
    #[serde(flatten)]
    pub check: Check,
    /// How often the host should ask.
    #[serde(default = "probe_interval", with = "millis", rename = "interval_ms")]
    pub interval: Duration,
    /// After this the try counts as failed.
    #[serde(default = "probe_timeout", with = "millis", rename = "timeout_ms")]
    pub timeout: Duration,
}

/// What a probe tries.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// A TCP connection to this port of the machine's loopback address is accepted.
    Tcp {
        /// The port, not 0.
        port: u16,
    },
    /// A command ends with status 0.
    Exec {
        /// Program and arguments; not empty.
        argv: Vec<String>,
    },
}

/// Why a machine config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or not of this shape.
    #[error("the machine config is not valid: {0}; build the package again")]
    Json(#[from] serde_json::Error),
    /// From another generation.
    #[error(
        "the machine config has version {found}, this init understands {}.x; rebuild the package \
         with the drafter that made the init, or take a newer init",
        MACHINE_CONFIG_VERSION.major
    )]
    Version {
        /// What the file says.
        found: ConfigVersion,
    },
    /// A field breaks a rule.
    #[error("the machine config's {field} {problem}")]
    Field {
        /// Which, as a path: `probes.readiness.tcp.port`.
        field: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}

impl MachineConfig {
    /// A config that runs `argv` as root with every default.
    #[must_use]
    pub fn new(argv: Vec<String>) -> Self {
        Self {
            version: MACHINE_CONFIG_VERSION,
            argv,
            env: BTreeMap::new(),
            working_dir: root_dir(),
            user: String::new(),
            restart: Restart::default(),
            at_end: AtEnd::default(),
            stop_timeout: stop_timeout(),
            hooks: Hooks::default(),
            probes: Probes::default(),
        }
    }

    /// Reads the file's content.
    ///
    /// # Errors
    /// When it is not JSON of this shape, has another major version, or breaks a rule of
    /// [`MachineConfig::check`].
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        // The version first, by itself: a later layout need not have today's fields.
        #[derive(serde::Deserialize)]
        struct Head {
            version: ConfigVersion,
        }
        let head: Head = serde_json::from_slice(bytes)?;
        if head.version.major != MACHINE_CONFIG_VERSION.major {
            return Err(ConfigError::Version { found: head.version });
        }
        let config: Self = serde_json::from_slice(bytes)?;
        config.check()?;
        Ok(config)
    }

    /// The file's content: checked, indented, with a final newline.
    ///
    /// # Errors
    /// As [`MachineConfig::check`].
    pub fn to_json(&self) -> Result<String, ConfigError> {
        self.check()?;
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// Names the first field that breaks a rule.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.argv.first().is_some_and(String::is_empty) {
            return Err(field("argv", "starts with an empty program name"));
        }
        check_strings("argv", &self.argv)?;
        if self.env.len() > MAX_ITEMS {
            return Err(field("env", format!("has more than {MAX_ITEMS} entries")));
        }
        for (name, value) in &self.env {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err(field(
                    "env",
                    format!(
                        "has {name:?}: names are not empty and hold no '=', and neither names \
                         nor values hold a NUL"
                    ),
                ));
            }
        }
        if !self.working_dir.starts_with('/') || self.working_dir.contains('\0') {
            let problem = format!("{:?} is not an absolute path", self.working_dir);
            return Err(field("working_dir", problem));
        }
        if self.user.contains(['\0', '\n']) {
            return Err(field("user", "holds a NUL or a newline"));
        }
        if self.restart.backoff_first.is_zero() {
            return Err(field(
                "restart.backoff_first_ms",
                "is 0: a crash would loop without pause",
            ));
        }
        if self.restart.backoff_max < self.restart.backoff_first {
            return Err(field("restart.backoff_max_ms", "is less than backoff_first_ms"));
        }
        check_hook("hooks.before_suspend", self.hooks.before_suspend.as_ref())?;
        check_hook("hooks.after_resume", self.hooks.after_resume.as_ref())?;
        check_hook("hooks.after_fork", self.hooks.after_fork.as_ref())?;
        check_probe("probes.liveness", self.probes.liveness.as_ref())?;
        check_probe("probes.readiness", self.probes.readiness.as_ref())
    }
}

fn field(field: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError::Field { field: field.into(), problem: problem.into() }
}

fn check_strings(name: &str, strings: &[String]) -> Result<(), ConfigError> {
    if strings.len() > MAX_ITEMS {
        return Err(field(name, format!("has more than {MAX_ITEMS} entries")));
    }
    if strings.iter().any(|text| text.contains('\0')) {
        return Err(field(name, "holds a NUL"));
    }
    Ok(())
}

fn check_command(name: &str, argv: &[String], timeout: Duration) -> Result<(), ConfigError> {
    if argv.first().is_none_or(String::is_empty) {
        return Err(field(format!("{name}.argv"), "names no program"));
    }
    check_strings(&format!("{name}.argv"), argv)?;
    check_timeout(name, timeout)
}

fn check_timeout(name: &str, timeout: Duration) -> Result<(), ConfigError> {
    if timeout.is_zero() {
        return Err(field(format!("{name}.timeout_ms"), "is 0: it could never succeed"));
    }
    Ok(())
}

fn check_hook(name: &str, hook: Option<&Hook>) -> Result<(), ConfigError> {
    hook.map_or(Ok(()), |hook| check_command(name, &hook.argv, hook.timeout))
}

fn check_probe(name: &str, probe: Option<&Probe>) -> Result<(), ConfigError> {
    let Some(probe) = probe else { return Ok(()) };
    if probe.interval.is_zero() {
        return Err(field(format!("{name}.interval_ms"), "is 0: it would run without pause"));
    }
    match &probe.check {
        Check::Tcp { port: 0 } => Err(field(format!("{name}.tcp.port"), "is 0")),
        Check::Tcp { .. } => check_timeout(name, probe.timeout),
        Check::Exec { argv } => check_command(&format!("{name}.exec"), argv, probe.timeout),
    }
}

fn root_dir() -> String {
    "/".to_owned()
}

const fn stop_timeout() -> Duration {
    Duration::from_secs(10)
}

const fn backoff_first() -> Duration {
    Duration::from_millis(500)
}

const fn backoff_max() -> Duration {
    Duration::from_secs(30)
}

const fn backoff_reset() -> Duration {
    Duration::from_secs(60)
}

const fn hook_timeout() -> Duration {
    Duration::from_secs(10)
}

const fn probe_interval() -> Duration {
    Duration::from_secs(1)
}

const fn probe_timeout() -> Duration {
    Duration::from_secs(1)
}

/// Durations as whole milliseconds.
pub(crate) mod millis {
    use std::time::Duration;

    pub(crate) fn serialize<S: serde::Serializer>(d: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    }

    pub(crate) fn deserialize<'de, D: serde::Deserializer<'de>>(
        d: D,
    ) -> Result<Duration, D::Error> {
        serde::Deserialize::deserialize(d).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests;
