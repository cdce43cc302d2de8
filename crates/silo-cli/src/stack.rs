//! Builds a device from its config: the one place where sources, layers and filters are put
//! together.
//!
//! ```text
//!  front ends, moves, backups
//!      │
//!  Metered           counts and times what clients do
//!  ReadOnly          if so configured
//!  Recorder          writes a binlog
//!  Policied          what happens when something below fails
//!  RedundantWrites   drops what is there already
//!  WriteCache        answers before the rest has it; a flush waits for the rest
//!  Stack …           copy-on-write layers, the last one takes the writes
//!      │
//!  source            memory, file, disk, folder …
//! ```
//!
//! Callers: [`service`](crate::service) and the commands that open a device for a moment. What must
//! hold: a source with a configured hash is checked before a byte of it is served; an error names
//! the device; closing makes durable what was written, and tells if that failed.

use crate::{
    config::{BinlogConfig, DeviceConfig, OnError, SourceConfig},
    metrics::{CacheFigures, DeviceFigures, FilterFigures, Metrics},
};
use anyhow::{Context, Result, bail, ensure};
use silo::{
    device::DeviceName,
    disk::{Disk, DiskError, DiskOptions},
    filter::{
        self, CacheOptions, ErrorPolicy, Metered, Policied, ReadOnly, Recorder, RedundantWrites,
        WriteCache, binlog::RecordOptions,
    },
    hash::{self, RootHash},
    io::BlockDevice,
    layer::{Base, LayerError, Stack, StackOptions},
    source::{DirectoryDevice, FileDevice, FileMode, MemoryDevice},
};
use std::{
    fs::OpenOptions,
    io::BufWriter,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

/// How much is read at once where a whole device is read.
const PORTION: usize = 4 << 20;
/// Buffer of a binlog.
const BINLOG_BUFFER: usize = 1 << 20;

/// An open device with everything over it.
pub(crate) struct DeviceStack {
    name: String,
    /// What clients see.
    device: Arc<dyn BlockDevice>,
    policied: Arc<Policied>,
    recorder: Option<Arc<Recorder>>,
}

impl DeviceStack {
    /// Opens, checks and puts together. Its figures are among `metrics` from then on.
    ///
    /// # Errors
    /// If a part cannot be opened, or the content is not what the config says.
    pub(crate) fn open(name: &str, config: &DeviceConfig, metrics: &Metrics) -> Result<Self> {
        Self::build(name, config, metrics).with_context(|| format!("device \"{name}\""))
    }

    #[tracing::instrument(name = "open", skip_all, fields(device = name), err(level = "debug"))]
    fn build(name: &str, config: &DeviceConfig, metrics: &Metrics) -> Result<Self> {
        let mut device = layered(name, config)?;
        if let Some(size) = config.size {
            let have = device.size();
            ensure!(
                have == size.0,
                "it has {have} bytes, the config says {}; correct `size` or leave it out",
                size.0
            );
        }
        if let Some(wanted) = &config.write_cache {
            let options = CacheOptions {
                age: wanted.max_age.0.max(Duration::from_millis(1)),
                ..CacheOptions::with_budget(wanted.limit.0)
            };
            let cache = Arc::new(WriteCache::new(device, options)?);
            metrics.add(CacheFigures::new(name, cache.clone()));
            device = cache;
        }
        if let Some(wanted) = &config.filter {
            let filter = Arc::new(RedundantWrites::new(device, wanted.allowance));
            metrics.add(FilterFigures::new(name, filter.clone()));
            device = filter;
        }
        let policied = Arc::new(policied(name, config, device));
        let mut device: Arc<dyn BlockDevice> = policied.clone();
        let mut recorder = None;
        if let Some(wanted) = &config.binlog {
            let recording = Arc::new(record(device, wanted)?);
            recorder = Some(recording.clone());
            device = recording;
        }
        if config.read_only {
            device = Arc::new(ReadOnly::new(device));
        }
        let metered = Arc::new(Metered::new(device));
        metrics.add(DeviceFigures::new(name, metered.clone()));
        Ok(Self { name: name.to_owned(), device: metered, policied, recorder })
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
    /// If that failed, or the binlog is not complete.
    pub(crate) fn close(self) -> Result<()> {
        let device = || format!("device \"{}\"", self.name);
        if !self.device.is_read_only() {
            self.device.flush().with_context(|| format!("{}: the last flush", device()))?;
        }
        if let Some(recorder) = &self.recorder {
            let records = recorder.finish().with_context(device)?;
            tracing::info!(device = self.name, records, "the binlog is complete");
        }
        Ok(())
    }
}

/// The source, with its layers over it.
fn layered(name: &str, config: &DeviceConfig) -> Result<Arc<dyn BlockDevice>> {
    let expected = config.hash.as_deref().map(str::parse::<RootHash>).transpose()?;
    if config.overlays.is_empty() {
        return source(name, config, expected);
    }
    let block = u32::try_from(config.block_size.0)?;
    let mut base = base(name, config, expected)?;
    for (at, dir) in config.overlays.iter().enumerate() {
        let last = at + 1 == config.overlays.len();
        let bytes = if last { config.size.map_or(0, |size| size.0) } else { 0 };
        let stack = match Stack::open(dir, Some(&base)) {
            Err(LayerError::NotAStack { .. }) if config.create_overlays => {
                Stack::create(dir, Some(&base), StackOptions { bytes, block })?
            }
            opened => opened?,
        };
        let stack: Arc<dyn BlockDevice> = Arc::new(stack);
        base = Base::trusted(stack, &dir.display().to_string(), None);
    }
    Ok(base.device().clone())
}

/// What the lowest layer lies over. A file is known by its hash: the one that the config says, or
/// the one that the layer was made over.
fn base(name: &str, config: &DeviceConfig, expected: Option<RootHash>) -> Result<Base> {
    let SourceConfig::File { path, create: false } = &config.source else {
        let source = source(name, config, expected)?;
        return Ok(Base::trusted(source, name, expected));
    };
    let recorded = Stack::inspect(&config.overlays[0]).ok().and_then(|stack| stack.base_root);
    let now = SystemTime::now();
    Ok(match expected.or(recorded) {
        Some(wanted) => Base::verified(path, wanted, now)?,
        None => Base::identified(path, now)?,
    })
}

/// The innermost device.
fn source(
    name: &str,
    config: &DeviceConfig,
    expected: Option<RootHash>,
) -> Result<Arc<dyn BlockDevice>> {
    let size = config.size.map_or(0, |size| size.0);
    let device: Arc<dyn BlockDevice> = match &config.source {
        SourceConfig::Memory => Arc::new(MemoryDevice::new(name, size)?),
        SourceConfig::Disk { dir, base, create } => {
            if let (Some(expected), Some(base)) = (expected, base) {
                Base::verified(base, expected, SystemTime::now())?;
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
        SourceConfig::Directory { path, piece } => {
            let piece = u32::try_from(piece.0)?;
            Arc::new(match path.exists() {
                true => DirectoryDevice::open(path)?,
                false => DirectoryDevice::create(path, size, piece)?,
            })
        }
        SourceConfig::Sparse { .. }
        | SourceConfig::Object { .. }
        | SourceConfig::Silo { .. }
        | SourceConfig::Process { .. } => bail!("not built yet"),
    };
    if let Some(expected) = expected {
        let found = hash_of(&*device)?;
        ensure!(
            found == expected,
            "the content has hash {found}, the config says {expected}: it is another image, or \
             was changed; nothing was served"
        );
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

/// The BLAKE3 root of a device's content.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn hash_of(device: &dyn BlockDevice) -> Result<RootHash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PORTION];
    let mut at = 0;
    while at < device.size() {
        let length = (device.size() - at).min(PORTION as u64) as usize;
        device
            .read_at(at, &mut buffer[..length])
            .with_context(|| format!("could not read at {at} for the hash"))?;
        hasher.update_rayon(&buffer[..length]);
        at += length as u64;
    }
    Ok(RootHash::from(*hasher.finalize().as_bytes()))
}

/// The hash of a file, as [`hash_of`].
pub(crate) fn hash_of_file(path: &Path) -> Result<RootHash> {
    hash::hash_file(path).with_context(|| format!("could not hash {}", path.display()))
}

fn record(device: Arc<dyn BlockDevice>, wanted: &BinlogConfig) -> Result<Recorder> {
    // Never over an older one: it may be the only record of something.
    let file =
        OpenOptions::new().write(true).create_new(true).open(&wanted.path).with_context(|| {
            format!("could not make the binlog {}; it must not exist yet", wanted.path.display())
        })?;
    let sink = Box::new(BufWriter::with_capacity(BINLOG_BUFFER, file));
    Ok(Recorder::new(device, sink, RecordOptions { reads: wanted.reads })?)
}

fn policied(name: &str, config: &DeviceConfig, device: Arc<dyn BlockDevice>) -> Policied {
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
    Policied::new(device, policy, move |trouble| {
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
