//! Flags that name a device, in place of a config file, and the flags of front ends.

use crate::config::{
    AttachConfig, ByteSize, Config, DeviceConfig, ExposeConfig, FuseConfig, IdentityConfig,
    MetricsConfig, NbdConfig, SourceConfig, UblkConfig, VhostConfig,
};
use anyhow::{Result, bail};
use clap::Args;
use std::{net::SocketAddr, path::PathBuf};

/// The name of a device that is described by flags.
pub(super) const NAME: &str = "disk";

/// One device, described by flags.
#[derive(Args)]
#[command(next_help_heading = "The device: one of")]
#[command(group = clap::ArgGroup::new("device").required(true).args([
    "config", "overlay", "file", "memory", "sparse", "directory", "nbd",
]))]
pub(super) struct DeviceArgs {
    /// What this file describes; see docs/silo-config.md
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// A disk's folder, as `silo create` makes it
    #[arg(long, value_name = "DIR")]
    overlay: Option<PathBuf>,
    /// A file or block device
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Memory of this process, of so many bytes
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// A log file that holds only what was written; --size says how big the device is
    #[arg(long, value_name = "FILE", requires = "size")]
    sparse: Option<PathBuf>,
    /// A folder with a file for each piece; --size says how big the device is
    #[arg(long, value_name = "DIR", requires = "size")]
    directory: Option<PathBuf>,
    /// Another silo or NBD server: nbd://host/export or nbd+unix:///export?socket=PATH
    #[arg(long, value_name = "URL")]
    nbd: Option<String>,

    /// The name in the certificate of --nbd; the host in the address if not given
    #[arg(long, value_name = "NAME", requires = "nbd", help_heading = "How it is opened")]
    peer_name: Option<String>,
    /// The read-only file below --overlay, the one it was created over
    #[arg(long, value_name = "FILE", requires = "overlay", help_heading = "How it is opened")]
    base: Option<PathBuf>,
    /// Make the disk (--overlay), the file (--file) and the layers if there are none
    #[arg(long, conflicts_with = "config", help_heading = "How it is opened")]
    create: bool,
    /// Size of what is made; of a disk without it that of its base
    #[arg(long, value_name = "SIZE", conflicts_with = "config", help_heading = "How it is opened")]
    size: Option<ByteSize>,
    /// A copy-on-write layer over it, in this folder; may be given several times, the lowest first
    #[arg(long, value_name = "DIR", conflicts_with = "config", help_heading = "How it is opened")]
    layer: Vec<PathBuf>,
    /// The BLAKE3 root that it must have (`silo hash`)
    #[arg(long, value_name = "HASH", conflicts_with = "config", help_heading = "How it is opened")]
    hash: Option<String>,
    /// Refuse writes
    #[arg(long, conflicts_with = "config", help_heading = "How it is opened")]
    read_only: bool,
}

impl DeviceArgs {
    /// The config file, or what the flags say in its place.
    ///
    /// # Errors
    /// If the file, or the device that the flags describe, cannot be.
    pub(super) fn config(&self) -> Result<Config> {
        match &self.config {
            Some(path) => Ok(Config::load(path)?),
            None => {
                let device = self.device()?;
                Ok(Config { device: [(NAME.to_owned(), device)].into(), ..Config::default() })
            }
        }
    }

    /// The device that the flags describe.
    fn device(&self) -> Result<DeviceConfig> {
        let create = self.create;
        let (source, size) = if let Some(dir) = self.overlay.clone() {
            (SourceConfig::Disk { dir, base: self.base.clone(), create }, self.size)
        } else if let Some(path) = self.file.clone() {
            (SourceConfig::File { path, create: create && self.layer.is_empty() }, self.size)
        } else if let Some(size) = self.memory {
            (SourceConfig::Memory, Some(size))
        } else if let Some(path) = self.sparse.clone() {
            (SourceConfig::Sparse { path }, self.size)
        } else if let Some(path) = self.directory.clone() {
            (SourceConfig::directory(path), self.size)
        } else if let Some(url) = self.nbd.clone() {
            (SourceConfig::silo(url, self.peer_name.clone()), self.size)
        } else {
            bail!("no device is named")
        };
        Ok(DeviceConfig {
            overlays: self.layer.clone(),
            create_overlays: create,
            hash: self.hash.clone(),
            read_only: self.read_only,
            ..DeviceConfig::of(source, size)
        })
    }
}

/// How a device that is described by flags is reached.
#[derive(Args, Default)]
#[command(next_help_heading = "How it is reached")]
pub(super) struct FrontArgs {
    /// Serve NBD on this unix socket
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    pub(super) socket: Option<PathBuf>,
    /// Serve NBD on this address, as in 127.0.0.1:10809; with TLS unless --plaintext
    #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
    pub(super) tcp: Option<SocketAddr>,
    /// The name of the NBD export; clients that ask for "" get it too
    #[arg(long, value_name = "NAME", default_value = "", conflicts_with = "config")]
    pub(super) export: String,
    /// Serve a virtual machine on this vhost-user-blk socket
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    pub(super) vhost_user_blk: Option<PathBuf>,
    /// Show it as a file in this empty folder
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    pub(super) fuse: Option<PathBuf>,
    /// Attach it as this block device, as in /dev/nbd0, by nbd-client
    #[arg(long, value_name = "DEVICE", conflicts_with = "config", requires = "socket")]
    pub(super) attach: Option<PathBuf>,
    /// Make it a block device of this kernel, /dev/ublkbN, by its ublk driver
    #[arg(long, conflicts_with = "config")]
    pub(super) ublk: bool,
    /// The N of --ublk; the first free one if not given
    #[arg(long, value_name = "N", requires = "ublk")]
    pub(super) ublk_id: Option<u32>,
    /// Keep --ublk when this process dies: users wait, and the same command goes on
    #[arg(long, requires = "ublk_id")]
    pub(super) ublk_recover: bool,
}

impl FrontArgs {
    /// One NBD export.
    pub(super) fn nbd(socket: Option<PathBuf>, tcp: Option<SocketAddr>, export: &str) -> Self {
        Self { socket, tcp, export: export.to_owned(), ..Self::default() }
    }

    /// What was asked for.
    pub(super) fn expose(&self, plaintext: bool) -> ExposeConfig {
        let nbd = (self.socket.is_some() || self.tcp.is_some()).then(|| NbdConfig {
            unix: self.socket.clone(),
            tcp: self.tcp,
            plaintext,
            export: Some(self.export.clone()),
            ..NbdConfig::default()
        });
        ExposeConfig {
            nbd,
            vhost_user_blk: self.vhost_user_blk.clone().map(VhostConfig::at),
            fuse: self.fuse.clone().map(|mount| FuseConfig { mount, write_back: false }),
            attach: self.attach.clone().map(|device| AttachConfig { device }),
            ublk: self.ublk.then(|| UblkConfig::numbered(self.ublk_id, self.ublk_recover)),
        }
    }

    /// Whether anything was asked for.
    pub(super) fn is_empty(&self) -> bool {
        self.socket.is_none()
            && self.tcp.is_none()
            && self.vhost_user_blk.is_none()
            && self.fuse.is_none()
            && !self.ublk
    }
}

/// Who this host is, and whether that is to be proved.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Connections to other hosts")]
pub(super) struct TlsArgs {
    /// The folder with ca.crt, NAME.crt and NAME.key, as `silo tls` makes them
    #[arg(long, value_name = "DIR", env = "SILO_TLS", requires = "host")]
    tls: Option<PathBuf>,
    /// This host's name in its certificate
    #[arg(long, value_name = "NAME", env = "SILO_HOST")]
    host: Option<String>,
    /// Prove nothing and hide nothing: only on a network that is trusted as a whole
    #[arg(long, conflicts_with_all = ["tls", "config"])]
    pub(super) plaintext: bool,
}

impl TlsArgs {
    /// The identity, if one was given.
    pub(super) fn identity(&self) -> Option<IdentityConfig> {
        let (dir, name) = (self.tls.clone()?, self.host.clone()?);
        Some(IdentityConfig { dir, name })
    }
}

/// Where figures are served.
#[derive(Args)]
pub(super) struct MetricsArgs {
    /// Answer Prometheus on this address, as in 127.0.0.1:9618
    #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
    metrics: Option<SocketAddr>,
}

impl MetricsArgs {
    /// The endpoint, if one was asked for.
    pub(super) fn config(&self) -> Option<MetricsConfig> {
        self.metrics.map(|listen| MetricsConfig { listen })
    }
}
