//! The config file: devices, what they are made of, and what happens to them.
//!
//! `silo serve --config FILE` and its like read it; [`stack`](crate::stack) builds devices from it.
//! `docs/silo-config.md` shows every key; the schema beside it is made from these types.
//!
//! What must hold: a key that is not known is an error that says where it stands and which key was
//! perhaps meant; nothing is opened, made or connected to before the whole file has been checked;
//! no secret can be written into it.

mod beyond;
mod check;
mod problem;
mod values;

#[cfg(test)]
mod tests;

pub(crate) use beyond::{
    AssistConfig, BackupConfig, IdentityConfig, MetricsConfig, MigrateConfig, PeerConfig,
    RetentionConfig, ShareConfig, StoreConfig,
};
pub(crate) use problem::ConfigError;
pub(crate) use values::{ByteSize, Secret, Span};

use schemars::JsonSchema;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// A file of devices that silo serves, backs up and moves.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[schemars(title = "silo config")]
pub(crate) struct Config {
    /// Devices by name: lower-case letters, digits and dashes
    #[serde(default)]
    pub(crate) device: BTreeMap<String, DeviceConfig>,
    /// Devices that move and are backed up together, at one moment; all in one group if there is none
    #[serde(default)]
    pub(crate) group: BTreeMap<String, GroupConfig>,
    /// Who this host is to others: certificates for mutual TLS
    pub(crate) identity: Option<IdentityConfig>,
    /// Continuous backup to an object store
    pub(crate) backup: Option<BackupConfig>,
    /// Moving devices to and from other hosts
    pub(crate) migrate: Option<MigrateConfig>,
    /// Prometheus endpoint
    pub(crate) metrics: Option<MetricsConfig>,
}

/// One device.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct DeviceConfig {
    /// Size in bytes; needed where the source does not say (memory, new files)
    pub(crate) size: Option<ByteSize>,
    /// Granularity of tracking, moving and backup: a power of two from 512 to 1M
    #[serde(default = "DeviceConfig::default_block_size")]
    pub(crate) block_size: ByteSize,
    /// Where its bytes are
    pub(crate) source: SourceConfig,
    /// BLAKE3 root that the source must have (`silo hash`); checked before anything is served
    pub(crate) hash: Option<String>,
    /// Folders of copy-on-write layers over the source, the lowest first; the last takes the writes
    #[serde(default)]
    pub(crate) overlays: Vec<PathBuf>,
    /// Make overlays that do not exist
    #[serde(default)]
    pub(crate) create_overlays: bool,
    /// Refuse writes
    #[serde(default)]
    pub(crate) read_only: bool,
    /// Keep written blocks in memory and write them back later (a flush writes them all)
    pub(crate) write_cache: Option<WriteCacheConfig>,
    /// Drop bytes of writes that the device has already
    pub(crate) filter: Option<FilterConfig>,
    /// Record what is written, to replay it elsewhere
    pub(crate) binlog: Option<BinlogConfig>,
    /// Answer each request so much later: to try how something behaves with a device far away
    pub(crate) delay: Option<Span>,
    /// What happens when the source fails
    #[serde(default)]
    pub(crate) on_error: ErrorPolicyConfig,
    /// How others reach it
    #[serde(default)]
    pub(crate) expose: ExposeConfig,
}

impl DeviceConfig {
    /// A device over `source` and nothing else.
    pub(crate) fn of(source: SourceConfig, size: Option<ByteSize>) -> Self {
        Self {
            size,
            block_size: Self::default_block_size(),
            source,
            hash: None,
            overlays: Vec::new(),
            create_overlays: false,
            read_only: false,
            write_cache: None,
            filter: None,
            binlog: None,
            delay: None,
            on_error: ErrorPolicyConfig::default(),
            expose: ExposeConfig::default(),
        }
    }

    /// What takes its writes: a file or a folder. None if nothing on this host keeps them.
    pub(crate) fn place(&self) -> Option<&Path> {
        let place = match (self.overlays.last(), &self.source) {
            (Some(dir), _) | (None, SourceConfig::Disk { dir, .. }) => dir,
            (
                None,
                SourceConfig::File { path, .. }
                | SourceConfig::Sparse { path }
                | SourceConfig::Directory { path, .. },
            ) => path,
            (
                None,
                SourceConfig::Memory
                | SourceConfig::Object { .. }
                | SourceConfig::Silo { .. }
                | SourceConfig::Generation { .. }
                | SourceConfig::Process { .. },
            ) => return None,
        };
        Some(place)
    }

    /// Where is noted that it moves, if nobody says where: beside what takes its writes. None if
    /// nothing on this host keeps it.
    pub(crate) fn own_note(&self) -> Option<PathBuf> {
        let place = self.place()?;
        // Nothing beside a device node survives a restart of the host.
        if place.starts_with("/dev") {
            return None;
        }
        // Without a slash at its end: beside a folder, not in it.
        let mut note = place.components().collect::<PathBuf>().into_os_string();
        note.push(".silo-note");
        Some(note.into())
    }

    /// Whether what is written to it is there after a restart.
    pub(crate) fn is_kept(&self) -> bool {
        !self.overlays.is_empty() || !matches!(self.source, SourceConfig::Memory)
    }

    /// 4 KiB: what memory and file systems work in.
    fn default_block_size() -> ByteSize {
        ByteSize(4096)
    }
}

/// Where the bytes of a device are: one of these.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum SourceConfig {
    /// Memory of this process, zeros at first; `size` says how much
    Memory,
    /// A disk folder made by `silo create`, over a read-only base or none; survives crashes
    #[serde(rename_all = "kebab-case")]
    Disk {
        /// The folder
        dir: PathBuf,
        /// The read-only file below it
        base: Option<PathBuf>,
        /// Make it if there is none; `size` says how big, else the base does
        #[serde(default)]
        create: bool,
    },
    /// A plain file or block device
    #[serde(rename_all = "kebab-case")]
    File {
        /// The file
        path: PathBuf,
        /// Make it, of `size` bytes, if there is none
        #[serde(default)]
        create: bool,
    },
    /// A log file that holds only blocks that were written
    #[serde(rename_all = "kebab-case")]
    Sparse {
        /// The file
        path: PathBuf,
    },
    /// A folder with one file for each piece
    #[serde(rename_all = "kebab-case")]
    Directory {
        /// The folder
        path: PathBuf,
        /// Bytes of a piece, a multiple of the block size
        #[serde(default = "SourceConfig::default_piece")]
        piece: ByteSize,
    },
    /// An object store, one object for each piece
    #[serde(rename_all = "kebab-case")]
    Object {
        /// The store
        store: StoreConfig,
        /// Bytes of an object, a multiple of the block size
        #[serde(default = "SourceConfig::default_piece")]
        piece: ByteSize,
    },
    /// Another silo, or any NBD server
    #[serde(rename_all = "kebab-case")]
    Silo {
        /// `nbd://host:port/export`, `nbds://…` for TLS, or `nbd+unix:///export?socket=PATH`
        url: String,
        /// Connections to it
        #[serde(default = "SourceConfig::default_connections")]
        connections: usize,
        /// The name in its certificate; the host in the address if not given
        peer_name: Option<String>,
    },
    /// A device of a generation in a store, read when it is asked for; never written
    #[serde(rename_all = "kebab-case")]
    Generation {
        /// The store
        store: StoreConfig,
        /// `tenant/line`
        line: String,
        /// Where the tenant's keys are
        keys: Secret,
        /// Number of the generation; the newest if not given
        number: Option<u64>,
        /// The device's name in the generation; the same as here if not given
        device: Option<String>,
    },
    /// A file that a running process has mapped, read out of its memory
    #[serde(rename_all = "kebab-case")]
    Process {
        /// Process id
        pid: u32,
        /// The path of the mapped file, as in /proc/PID/maps
        mapping: String,
    },
}

impl SourceConfig {
    /// A folder of pieces of the usual size.
    pub(crate) fn directory(path: PathBuf) -> Self {
        Self::Directory { path, piece: Self::default_piece() }
    }

    /// Another silo, with the usual number of connections.
    pub(crate) fn silo(url: String, peer_name: Option<String>) -> Self {
        Self::Silo { url, connections: Self::default_connections(), peer_name }
    }

    fn default_piece() -> ByteSize {
        ByteSize(1 << 20)
    }

    fn default_connections() -> usize {
        4
    }
}

/// Devices that belong together.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct GroupConfig {
    /// Names of devices
    pub(crate) devices: Vec<String>,
}

/// A write-back cache.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct WriteCacheConfig {
    /// Most bytes not yet written back; then writers are slowed
    #[serde(default = "WriteCacheConfig::default_limit")]
    pub(crate) limit: ByteSize,
    /// Longest time that a write stays in the cache only
    #[serde(default = "WriteCacheConfig::default_max_age")]
    pub(crate) max_age: Span,
}

impl WriteCacheConfig {
    fn default_limit() -> ByteSize {
        ByteSize(64 << 20)
    }

    fn default_max_age() -> Span {
        Span(std::time::Duration::from_secs(1))
    }
}

/// A filter of writes that change nothing.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct FilterConfig {
    /// Up to this many unchanged bytes between two changed ones are written all the same
    #[serde(default)]
    pub(crate) allowance: usize,
}

/// A record of what is written.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct BinlogConfig {
    /// The file; it must not exist
    pub(crate) path: PathBuf,
    /// Record reads too
    #[serde(default)]
    pub(crate) reads: bool,
}

/// What a device does when its source fails.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct ErrorPolicyConfig {
    /// A read fails
    pub(crate) read: OnError,
    /// A write or a flush fails
    pub(crate) write: OnError,
    /// There is no room
    pub(crate) full: OnError,
}

impl Default for ErrorPolicyConfig {
    /// A machine sees a slow disk rather than a broken one when room runs out.
    fn default() -> Self {
        Self { read: OnError::Eio, write: OnError::Eio, full: OnError::Pause }
    }
}

/// One answer to an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum OnError {
    /// The client gets the error
    #[default]
    Eio,
    /// The request waits and is tried again until it succeeds
    Pause,
    /// The device takes nothing any more
    Stop,
}

/// How a device is reached; several at once are possible.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct ExposeConfig {
    /// Network block device
    pub(crate) nbd: Option<NbdConfig>,
    /// For virtual machines: a vhost-user-blk socket
    pub(crate) vhost_user_blk: Option<VhostConfig>,
    /// A file in a folder, by FUSE
    pub(crate) fuse: Option<FuseConfig>,
    /// A block device of this kernel, by nbd-client
    pub(crate) attach: Option<AttachConfig>,
    /// A block device of this kernel, by its ublk driver
    pub(crate) ublk: Option<UblkConfig>,
}

/// An NBD export.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct NbdConfig {
    /// A unix socket to listen on
    pub(crate) unix: Option<PathBuf>,
    /// An address to listen on, as in 127.0.0.1:10809
    pub(crate) tcp: Option<SocketAddr>,
    /// Allow TCP clients without TLS; only for a network that is trusted as a whole
    #[serde(default)]
    pub(crate) plaintext: bool,
    /// The export's name; the device's name if not given
    pub(crate) export: Option<String>,
    /// Refuse writes of these clients
    #[serde(default)]
    pub(crate) read_only: bool,
    /// Names in certificates that may connect by TCP; all of the same authority if not given
    #[serde(default)]
    pub(crate) clients: Vec<String>,
    /// Most clients at a time
    #[serde(default = "NbdConfig::default_connections")]
    pub(crate) max_connections: usize,
}

impl Default for NbdConfig {
    fn default() -> Self {
        Self {
            unix: None,
            tcp: None,
            plaintext: false,
            export: None,
            read_only: false,
            clients: Vec::new(),
            max_connections: Self::default_connections(),
        }
    }
}

impl NbdConfig {
    fn default_connections() -> usize {
        16
    }
}

/// A vhost-user-blk socket.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct VhostConfig {
    /// The unix socket to listen on
    pub(crate) socket: PathBuf,
    /// Number of queues
    #[serde(default = "VhostConfig::default_queues")]
    pub(crate) queues: usize,
}

impl VhostConfig {
    /// On this socket, with the usual number of queues.
    pub(crate) fn at(socket: PathBuf) -> Self {
        Self { socket, queues: Self::default_queues() }
    }

    fn default_queues() -> usize {
        1
    }
}

/// A FUSE mount with one file in it, named as the device.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct FuseConfig {
    /// The folder
    pub(crate) mount: PathBuf,
    /// Let the kernel collect writes until fsync: faster, and lost with this process
    #[serde(default)]
    pub(crate) write_back: bool,
}

/// A kernel block device.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct AttachConfig {
    /// The device to attach to, as in /dev/nbd0
    pub(crate) device: PathBuf,
}

/// A block device of this kernel, without a socket in between.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[cfg_attr(not(feature = "ublk"), allow(dead_code, reason = "such a silo only refuses it"))]
pub(crate) struct UblkConfig {
    /// Its number, as 3 in /dev/ublkb3; the first free one if not given
    pub(crate) id: Option<u32>,
    /// Number of queues
    #[serde(default = "VhostConfig::default_queues")]
    pub(crate) queues: usize,
    /// The device stays when this process dies, its users wait, and the next start goes on; needs
    /// an id
    #[serde(default)]
    pub(crate) recover: bool,
}

impl UblkConfig {
    /// With the usual number of queues.
    pub(crate) fn numbered(id: Option<u32>, recover: bool) -> Self {
        Self { id, queues: VhostConfig::default_queues(), recover }
    }
}

impl Config {
    /// Reads and checks a file. Relative paths in it count from its folder.
    ///
    /// # Errors
    /// All problems that were found, each with its place.
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        let mut config = Self::parse(&text, path)?;
        if let Some(folder) = path.parent() {
            config.resolve(folder);
        }
        Ok(config)
    }

    /// Reads and checks a text; `path` is only for messages.
    ///
    /// # Errors
    /// All problems that were found, each with its place.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self =
            toml::from_str(text).map_err(|error| problem::of_parser(path, text, &error))?;
        let problems = check::all(&config);
        if problems.is_empty() { Ok(config) } else { Err(problem::of_checks(path, text, problems)) }
    }

    /// Checks a config that was put together from flags.
    ///
    /// # Errors
    /// All problems that were found.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        match check::all(self) {
            problems if problems.is_empty() => Ok(()),
            problems => Err(problem::of_flags(problems)),
        }
    }

    /// The JSON schema of a config file.
    pub(crate) fn schema() -> schemars::Schema {
        schemars::schema_for!(Self)
    }

    /// The devices of a group; of all devices without groups.
    pub(crate) fn members(&self, group: Option<&str>) -> Option<(String, Vec<String>)> {
        match group {
            Some(name) => {
                self.group.get(name).map(|group| (name.to_owned(), group.devices.clone()))
            }
            None if self.group.is_empty() => {
                Some(("all".to_owned(), self.device.keys().cloned().collect()))
            }
            None if self.group.len() == 1 => {
                self.group.iter().next().map(|(name, group)| (name.clone(), group.devices.clone()))
            }
            None => None,
        }
    }

    /// Makes relative paths relative to `folder`.
    fn resolve(&mut self, folder: &Path) {
        let at = |path: &mut PathBuf| *path = folder.join(&*path);
        let secret = |secret: &mut Secret| {
            if let Secret::File(path) = secret {
                *path = folder.join(&*path);
            }
        };
        let store = |store: &mut StoreConfig| {
            store.access_key.iter_mut().chain(&mut store.secret_key).for_each(secret);
        };
        for device in self.device.values_mut() {
            match &mut device.source {
                SourceConfig::Disk { dir, base, .. } => {
                    at(dir);
                    base.iter_mut().for_each(at);
                }
                SourceConfig::File { path, .. }
                | SourceConfig::Sparse { path }
                | SourceConfig::Directory { path, .. } => at(path),
                SourceConfig::Object { store: of, .. } => store(of),
                SourceConfig::Generation { store: of, keys, .. } => {
                    store(of);
                    secret(keys);
                }
                SourceConfig::Memory | SourceConfig::Silo { .. } | SourceConfig::Process { .. } => {
                }
            }
            device.overlays.iter_mut().for_each(at);
            device.binlog.iter_mut().for_each(|binlog| at(&mut binlog.path));
            let expose = &mut device.expose;
            expose.nbd.iter_mut().filter_map(|nbd| nbd.unix.as_mut()).for_each(at);
            expose.vhost_user_blk.iter_mut().for_each(|vhost| at(&mut vhost.socket));
            expose.fuse.iter_mut().for_each(|fuse| at(&mut fuse.mount));
        }
        self.identity.iter_mut().for_each(|identity| at(&mut identity.dir));
        if let Some(migrate) = &mut self.migrate {
            migrate.note.iter_mut().chain(&mut migrate.first_touch).for_each(at);
            migrate.known.values_mut().for_each(at);
            if let Some(assist) = &mut migrate.assist {
                assist.store.iter_mut().for_each(store);
                assist.keys.iter_mut().for_each(secret);
            }
        }
        if let Some(backup) = &mut self.backup {
            store(&mut backup.store);
            secret(&mut backup.keys);
            backup.scratch.iter_mut().for_each(at);
        }
    }
}
