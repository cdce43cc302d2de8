//! Builds a device from its config: the one place where sources, layers and filters are put
//! together.
//!
//! ```text
//!  front ends, moves, backups
//!      │
//!  Metered       counts and times what clients do
//!  ReadOnly      if so configured
//!  Policied      what happens when something below fails
//!      │
//!  source        memory, file, disk …
//! ```
//!
//! Callers: [`service`](crate::service) and the commands that open a device for a moment. What must
//! hold: a source with a configured hash is checked before a byte of it is served; an error names
//! the device.

use crate::{
    config::{DeviceConfig, OnError, SourceConfig},
    metrics::{DeviceFigures, Metrics},
};
use anyhow::{Context, Result, bail, ensure};
use silo::{
    device::DeviceName,
    disk::{Disk, DiskError, DiskOptions},
    filter::{self, ErrorPolicy, Metered, Policied, ReadOnly},
    hash::{self, RootHash},
    io::BlockDevice,
    source::{FileDevice, FileMode, MemoryDevice},
};
use std::{path::Path, sync::Arc};

/// How much is read at once where a whole device is read.
const PORTION: usize = 4 << 20;

/// An open device with everything over it.
pub(crate) struct Stack {
    name: String,
    /// What clients see.
    device: Arc<dyn BlockDevice>,
    policied: Arc<Policied>,
}

impl Stack {
    /// Opens, checks and puts together. Its figures are among `metrics` from then on.
    ///
    /// # Errors
    /// If a part cannot be opened, or the content is not what the config says.
    pub(crate) fn open(name: &str, config: &DeviceConfig, metrics: &Metrics) -> Result<Self> {
        Self::build(name, config, metrics).with_context(|| format!("device \"{name}\""))
    }

    fn build(name: &str, config: &DeviceConfig, metrics: &Metrics) -> Result<Self> {
        let source = source(name, config)?;
        if let Some(size) = config.size {
            let have = source.size();
            ensure!(
                have == size.0,
                "it has {have} bytes, the config says {}; correct `size` or leave it out",
                size.0
            );
        }
        let policied = Arc::new(policied(name, config, source));
        let mut device: Arc<dyn BlockDevice> = policied.clone();
        if config.read_only {
            device = Arc::new(ReadOnly::new(device));
        }
        let metered = Arc::new(Metered::new(device));
        metrics.add(DeviceFigures::new(name, metered.clone()));
        Ok(Self { name: name.to_owned(), device: metered, policied })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What clients are to see.
    pub(crate) fn device(&self) -> Arc<dyn BlockDevice> {
        self.device.clone()
    }

    /// Lets operations try again that wait because something failed.
    pub(crate) fn retry(&self) {
        if self.policied.waiting() > 0 {
            self.policied.resume();
        }
    }

    /// Makes everything durable; after the last client has gone.
    ///
    /// # Errors
    /// If that failed.
    pub(crate) fn close(self) -> Result<()> {
        if self.device.is_read_only() {
            return Ok(());
        }
        self.device.flush().with_context(|| format!("device \"{}\": the last flush", self.name))
    }
}

/// The innermost device.
fn source(name: &str, config: &DeviceConfig) -> Result<Arc<dyn BlockDevice>> {
    let expected = config.hash.as_deref().map(str::parse::<RootHash>).transpose()?;
    let size = config.size.map_or(0, |size| size.0);
    let device: Arc<dyn BlockDevice> = match &config.source {
        SourceConfig::Memory => Arc::new(MemoryDevice::new(name, size)?),
        SourceConfig::Disk { dir, base, create } => {
            if let (Some(expected), Some(base)) = (expected, base) {
                check_file(base, expected)?;
            }
            return Ok(Arc::new(disk(name, dir, base.as_deref(), create.then_some(size))?));
        }
        SourceConfig::File { path, create } => {
            let mode = if config.read_only || !config.overlays.is_empty() {
                FileMode::ReadOnly
            } else {
                FileMode::ReadWrite
            };
            if *create && !path.exists() {
                Arc::new(FileDevice::create(path, size)?)
            } else {
                Arc::new(FileDevice::open(path, mode)?)
            }
        }
        SourceConfig::Sparse { .. }
        | SourceConfig::Directory { .. }
        | SourceConfig::Object { .. }
        | SourceConfig::Silo { .. }
        | SourceConfig::Process { .. } => bail!("not built yet"),
    };
    if let Some(expected) = expected {
        check_device(&*device, expected)?;
    }
    Ok(device)
}

/// A disk folder; with `create` one of so many bytes is made if there is none (0: of the base).
fn disk(name: &str, dir: &Path, base: Option<&Path>, create: Option<u64>) -> Result<Disk> {
    let options = disk_options(name);
    match (Disk::open(dir, base, &options), create) {
        (Err(DiskError::NotADisk { .. }), Some(bytes)) => {
            Ok(Disk::create(dir, base, bytes, &options)?)
        }
        (opened, _) => Ok(opened?),
    }
}

/// How a disk of this name is opened.
pub(crate) fn disk_options(name: &str) -> DiskOptions {
    // Names were checked with the config; those of commands are letters.
    DiskOptions::new(DeviceName::new(name).expect("names of devices were checked"))
}

fn check_file(path: &Path, expected: RootHash) -> Result<()> {
    let found =
        hash::hash_file(path).with_context(|| format!("could not hash {}", path.display()))?;
    same(found, expected).with_context(|| format!("{}", path.display()))
}

fn check_device(device: &dyn BlockDevice, expected: RootHash) -> Result<()> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PORTION];
    let mut at = 0;
    while at < device.size() {
        let length = (device.size() - at).min(PORTION as u64) as usize;
        device
            .read_at(at, &mut buffer[..length])
            .with_context(|| format!("could not read at {at} to check the hash"))?;
        hasher.update_rayon(&buffer[..length]);
        at += length as u64;
    }
    same(RootHash::from(*hasher.finalize().as_bytes()), expected)
}

fn same(found: RootHash, expected: RootHash) -> Result<()> {
    ensure!(
        found == expected,
        "the content has hash {found}, the config says {expected}: it is another image, or was \
         changed; nothing was served"
    );
    Ok(())
}

fn policied(name: &str, config: &DeviceConfig, source: Arc<dyn BlockDevice>) -> Policied {
    let reaction = |on: OnError| match on {
        OnError::Eio => filter::OnError::Eio,
        OnError::Pause => filter::OnError::Pause,
        OnError::Stop => filter::OnError::Stop,
    };
    let policy = ErrorPolicy {
        read: reaction(config.on_error.read),
        write: reaction(config.on_error.write),
        full: reaction(config.on_error.full),
        ..ErrorPolicy::default()
    };
    let name = name.to_owned();
    Policied::new(source, policy, move |trouble| {
        tracing::error!(
            device = name,
            operation = trouble.operation,
            offset = trouble.offset,
            length = trouble.length,
            reaction = ?trouble.reaction,
            error = trouble.error,
            "an operation failed"
        );
    })
}
