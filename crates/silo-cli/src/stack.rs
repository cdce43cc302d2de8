//! Builds a device from its config: the one place where sources, layers and filters are put
//! together.
//!
//! ```text
//!  front ends, moves, backups
//!      │
//!  Metered           counts and times what clients do
//!  Delayed           answers later, to try how far away is too far
//!  ReadOnly          if so configured
//!  Recorder          writes a binlog
//!  Volume            can move to another host, or comes from one
//!  CopyBeforeWrite   keeps what is overwritten while it is backed up
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

#[cfg(test)]
mod tests;

use crate::{
    backup::{Place, key_ring},
    config::{BackupConfig, BinlogConfig, Config, DeviceConfig, OnError, SourceConfig},
    metrics::{CacheFigures, DeviceFigures, FilterFigures, Metrics},
};
use anyhow::{Context, Result, bail, ensure};
use identity::{HostName, Identity, TlsClient};
use silo::{
    device::DeviceName,
    disk::{Disk, DiskError, DiskOptions},
    filter::{
        self, CacheOptions, Delayed, Delays, ErrorPolicy, Metered, Policied, ReadOnly, Recorder,
        RedundantWrites, WriteCache, binlog::RecordOptions,
    },
    hash::{self, RootHash},
    io::BlockDevice,
    layer::{Base, LayerError, Stack, StackGroup, StackOptions},
    moving::{Content, Volume, source::new_session},
    nbd::{NbdClient, NbdClientOptions, NbdUri, Transport},
    source::{
        DirectoryDevice, FileDevice, FileMode, MapChoice, MemoryDevice, ObjectDevice,
        ProcessDevice, ProcessMode, SourceError, SparseDevice,
    },
    store::{
        Access, CopyGroup, Generation, GenerationDevice, LineName, ScratchOptions, Which,
        capture::Capture,
    },
};
use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::{self, BufWriter},
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

/// How much is read at once where a whole device is read.
const PORTION: usize = 4 << 20;
/// Buffer of a binlog.
const BINLOG_BUFFER: usize = 1 << 20;
/// Memory for what was read of a generation, in bytes.
const GENERATION_CACHE: usize = 256 << 20;
/// Threads that fetch ahead of a reader of a generation.
const FETCHERS: usize = 4;
/// How long a flush may wait for room when nobody is served any more, and how often it is looked at.
pub(crate) const ROOM_LIMIT: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(100);
/// Longest time that writers are held for a backup before its round is given up.
const HELD_LIMIT: Duration = Duration::from_secs(5);

/// What all devices of a process share.
#[derive(Clone, Default)]
pub(crate) struct Host {
    /// Where their figures go.
    pub(crate) metrics: Metrics,
    /// Who this host is to other silos.
    pub(crate) identity: Option<Identity>,
}

impl Host {
    /// Reads the certificates that the config names.
    ///
    /// # Errors
    /// If one is missing, damaged or expired.
    pub(crate) fn new(config: &Config) -> Result<Self> {
        let identity = match &config.identity {
            None => None,
            Some(wanted) => Some(Identity::load(&wanted.dir, &wanted.name.parse::<HostName>()?)?),
        };
        Ok(Self { metrics: Metrics::default(), identity })
    }
}

/// The lower part of a device: what groups are made of.
struct Lower {
    device: Arc<dyn BlockDevice>,
    policied: Arc<Policied>,
    /// The layer that takes the writes, where nothing over it holds any back.
    layers: Option<Arc<Stack>>,
    /// If it may move.
    volume: Option<Arc<Volume>>,
}

/// An open device with everything over it.
pub(crate) struct DeviceStack {
    name: String,
    /// What clients see.
    device: Arc<dyn BlockDevice>,
    policied: Arc<Policied>,
    recorder: Option<Arc<Recorder>>,
    volume: Option<Arc<Volume>>,
}

/// What the devices of a config are opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// To be used; those of `[migrate]` may leave.
    Use,
    /// Those of `[migrate]` are to come from another host.
    Receive,
}

/// All devices of a config, and what is done with groups of them.
pub(crate) struct Devices {
    /// The devices.
    pub(crate) stacks: Vec<DeviceStack>,
    /// The group that is backed up.
    pub(crate) capture: Option<Arc<dyn Capture>>,
    /// The group that moves, in the order of the config.
    pub(crate) volumes: Vec<Arc<Volume>>,
}

impl Devices {
    /// Opens, checks and puts together. Figures are told from then on.
    ///
    /// # Errors
    /// If a part of a device cannot be opened, or its content is not what the config says.
    pub(crate) fn open(config: &Config, host: &Host, role: Role) -> Result<Self> {
        let mut lowers = BTreeMap::new();
        for (name, device) in &config.device {
            let lower = Lower::open(name, device, host);
            lowers.insert(name, lower.with_context(|| format!("device \"{name}\""))?);
        }
        let capture = match &config.backup {
            None => None,
            Some(backup) => {
                let (_, members) =
                    config.members(backup.group.as_deref()).context("the group to back up")?;
                Some(captured(config, backup, &members, &mut lowers)?)
            }
        };
        let mut volumes = Vec::new();
        if let Some(migrate) = &config.migrate {
            let group = config.members(migrate.group.as_deref()).context("the group to move")?;
            for name in &group.1 {
                let lower = lowers.get_mut(name);
                let lower = lower.with_context(|| format!("there is no device \"{name}\""))?;
                let volume = volume(name, &config.device[name], lower.device.clone(), role)
                    .with_context(|| format!("device \"{name}\""))?;
                lower.device = volume.clone();
                lower.volume = Some(volume.clone());
                volumes.push(volume);
            }
        }
        let stacks = lowers
            .into_iter()
            .map(|(name, lower)| {
                DeviceStack::over(name, &config.device[name], lower, host)
                    .with_context(|| format!("device \"{name}\""))
            })
            .collect::<Result<_>>()?;
        Ok(Self { stacks, capture, volumes })
    }
}

/// A device that can move. What is not known to be zeros is sent and compared, never assumed.
fn volume(
    name: &str,
    config: &DeviceConfig,
    device: Arc<dyn BlockDevice>,
    role: Role,
) -> Result<Arc<Volume>> {
    let name = DeviceName::new(name).context("a device that moves has another name")?;
    let block = u32::try_from(config.block_size.0)?;
    let fresh = matches!(config.source, SourceConfig::Memory) && config.overlays.is_empty();
    let content = if fresh { Content::Zeros } else { Content::Unknown };
    let volume = match role {
        Role::Use => Volume::owned(name, device, block, content, new_session()?)?,
        Role::Receive => Volume::untouched(name, device, block, content)?,
    };
    Ok(Arc::new(volume))
}

/// Makes a group of the devices that are backed up. Where all of them are layers, a round pushes a
/// new one; else what is written during a round is copied first.
fn captured(
    config: &Config,
    backup: &BackupConfig,
    members: &[String],
    lowers: &mut BTreeMap<&String, Lower>,
) -> Result<Arc<dyn Capture>> {
    let layers: Option<Vec<_>> = members
        .iter()
        .map(|name| Some((name.clone(), lowers.get(name)?.layers.clone()?)))
        .collect();
    if let Some(layers) = layers {
        return Ok(Arc::new(StackGroup::new(layers, HELD_LIMIT)));
    }
    let mut parts = Vec::new();
    for name in members {
        let lower = lowers.get(name).with_context(|| format!("there is no device \"{name}\""))?;
        let block = u32::try_from(config.device[name].block_size.0)?;
        parts.push((name.clone(), block, lower.device.clone()));
    }
    let scratch = backup.scratch.as_deref().unwrap_or(Path::new("/var/tmp"));
    let group = CopyGroup::new(parts, ScratchOptions::in_folder(scratch))?;
    for (at, name) in members.iter().enumerate() {
        if let Some(lower) = lowers.get_mut(name) {
            lower.device = Arc::new(group.device(at));
        }
    }
    Ok(Arc::new(group))
}

impl Lower {
    #[tracing::instrument(name = "open", skip_all, fields(device = name), err(level = "debug"))]
    fn open(name: &str, config: &DeviceConfig, host: &Host) -> Result<Self> {
        let metrics = &host.metrics;
        let (mut device, mut layers) = layered(name, config, host)?;
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
            (device, layers) = (cache, None);
        }
        if let Some(wanted) = &config.filter {
            let filter = Arc::new(RedundantWrites::new(device, wanted.allowance));
            metrics.add(FilterFigures::new(name, filter.clone()));
            device = filter;
        }
        let policied = Arc::new(policied(name, config, device));
        Ok(Self { device: policied.clone(), policied, layers, volume: None })
    }
}

impl DeviceStack {
    /// One device that belongs to no group.
    ///
    /// # Errors
    /// If a part cannot be opened, or the content is not what the config says.
    pub(crate) fn open(name: &str, config: &DeviceConfig, host: &Host) -> Result<Self> {
        Lower::open(name, config, host)
            .and_then(|lower| Self::over(name, config, lower, host))
            .with_context(|| format!("device \"{name}\""))
    }

    /// What is between clients and the lower part.
    fn over(name: &str, config: &DeviceConfig, lower: Lower, host: &Host) -> Result<Self> {
        let mut device = lower.device;
        let mut recorder = None;
        if let Some(wanted) = &config.binlog {
            let recording = Arc::new(record(device, wanted)?);
            recorder = Some(recording.clone());
            device = recording;
        }
        if config.read_only {
            device = Arc::new(ReadOnly::new(device));
        }
        if let Some(delay) = config.delay {
            device = Arc::new(Delayed::new(device, Delays::round_trip(delay.0)));
        }
        let metered = Arc::new(Metered::new(device));
        host.metrics.add(DeviceFigures::new(name, metered.clone()));
        let (policied, volume) = (lower.policied, lower.volume);
        Ok(Self { name: name.to_owned(), device: metered, policied, recorder, volume })
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

    /// Makes everything durable. Where there is no room it is tried again, but for no longer than
    /// `limit`: who ends a command does not wait for a day.
    ///
    /// # Errors
    /// If that failed.
    pub(crate) fn flush(&self, limit: Duration) -> io::Result<()> {
        let (done, ended) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                let deadline = Instant::now() + limit;
                while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                    if Instant::now() < deadline {
                        self.retry();
                    } else if self.policied.waiting() > 0 {
                        self.policied.interrupt();
                    }
                }
            });
            let flushed = self.device.flush();
            drop(done);
            flushed
        })
    }

    /// Makes everything durable; after the last client has gone.
    ///
    /// # Errors
    /// If that failed, or the binlog is not complete.
    pub(crate) fn close(self) -> Result<()> {
        let device = || format!("device \"{}\"", self.name);
        let away = self.volume.as_ref().is_some_and(|volume| !volume.is_owned());
        if !self.device.is_read_only() && !away {
            self.flush(ROOM_LIMIT).with_context(|| format!("{}: the last flush", device()))?;
        }
        if let Some(recorder) = &self.recorder {
            let records = recorder.finish().with_context(device)?;
            tracing::info!(device = self.name, records, "the binlog is complete");
        }
        Ok(())
    }
}

/// A source with its layers over it, and the uppermost of these.
type Layered = (Arc<dyn BlockDevice>, Option<Arc<Stack>>);

/// The source, with its layers over it.
fn layered(name: &str, config: &DeviceConfig, host: &Host) -> Result<Layered> {
    let expected = config.hash.as_deref().map(str::parse::<RootHash>).transpose()?;
    let Some((top, lower)) = config.overlays.split_last() else {
        return Ok((source(name, config, host, expected)?, None));
    };
    let block = u32::try_from(config.block_size.0)?;
    let open = |dir: &PathBuf, base: &Base, bytes| match Stack::open(dir, Some(base)) {
        Err(LayerError::NotAStack { .. }) if config.create_overlays => {
            Stack::create(dir, Some(base), StackOptions { bytes, block })
        }
        opened => opened,
    };
    let mut base = base(name, config, host, expected)?;
    for dir in lower {
        let stack: Arc<dyn BlockDevice> = Arc::new(open(dir, &base, 0)?);
        base = Base::trusted(stack, &dir.display().to_string(), None);
    }
    let top = Arc::new(open(top, &base, config.size.map_or(0, |size| size.0))?);
    Ok((top.clone(), Some(top)))
}

/// What the lowest layer lies over. A file is known by its hash: the one that the config says, or
/// the one that the layer was made over.
fn base(
    name: &str,
    config: &DeviceConfig,
    host: &Host,
    expected: Option<RootHash>,
) -> Result<Base> {
    let SourceConfig::File { path, create: false } = &config.source else {
        let source = source(name, config, host, expected)?;
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
    host: &Host,
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
        SourceConfig::Sparse { path } => {
            let block = u32::try_from(config.block_size.0)?;
            made_if_absent(SparseDevice::open(path), || SparseDevice::create(path, size, block))?
        }
        SourceConfig::Directory { path, piece } => {
            let piece = u32::try_from(piece.0)?;
            let make = || DirectoryDevice::create(path, size, piece);
            made_if_absent(DirectoryDevice::open(path), make)?
        }
        SourceConfig::Object { store, piece } => {
            let (place, piece) = (Place::by_config(store)?, u32::try_from(piece.0)?);
            let writable = !config.read_only && config.overlays.is_empty();
            let opened = ObjectDevice::open(place.objects()?, writable);
            made_if_absent(opened, || {
                let objects = place.objects().map_err(|error| SourceError::NotA {
                    path: place.to_string().into(),
                    wanted: "a store",
                    detail: error.to_string(),
                })?;
                ObjectDevice::create(objects, size, piece)
            })?
        }
        SourceConfig::Process { pid, mapping } => {
            let choice = MapChoice::File(mapping.clone());
            let mode = if config.read_only || !config.overlays.is_empty() {
                ProcessMode::ReadOnly
            } else {
                ProcessMode::ReadWrite
            };
            Arc::new(ProcessDevice::open(i32::try_from(*pid)?, &choice, mode)?)
        }
        SourceConfig::Silo { url, connections, peer_name } => {
            return Ok(Arc::new(remote(url, *connections, peer_name.as_deref(), host)?));
        }
        SourceConfig::Generation { store, line, keys, number, device } => {
            let store = Place::by_config(store)?.open(Access::Read)?;
            let which = number.map_or(Which::Newest, Which::Number);
            let (line, keys) = (LineName::parse(line)?, key_ring(keys)?);
            let generation = Generation::open(&store, &keys, &line, which, GENERATION_CACHE)?;
            let wanted = device.as_deref().unwrap_or(name);
            return Ok(Arc::new(GenerationDevice::new(&generation, wanted, FETCHERS)?));
        }
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

/// A source that is made when there is none.
fn made_if_absent<D: BlockDevice + 'static>(
    opened: Result<D, SourceError>,
    make: impl FnOnce() -> Result<D, SourceError>,
) -> Result<Arc<dyn BlockDevice>> {
    Ok(Arc::new(match opened {
        Err(SourceError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => make()?,
        Err(SourceError::NotA { wanted: "a device of objects", .. }) => make()?,
        other => other?,
    }))
}

/// A device of another silo, or of any NBD server.
pub(crate) fn remote(
    url: &str,
    connections: usize,
    peer_name: Option<&str>,
    host: &Host,
) -> Result<NbdClient> {
    let uri: NbdUri = url.parse()?;
    let tls = match (uri.transport, &host.identity) {
        (Transport::Plain, _) => None,
        (Transport::Tls, None) => {
            bail!("{url} needs TLS, and this host has no certificate; add [identity], or --tls")
        }
        (Transport::Tls, Some(identity)) => {
            let name = peer_name.or_else(|| uri.host()).with_context(|| {
                format!("{url} names no host; say which name its certificate has (peer-name)")
            })?;
            let name: HostName = name.parse().with_context(|| {
                format!("\"{name}\" is not a name in a certificate; give the host's (peer-name)")
            })?;
            Some(TlsClient::new(identity, &name))
        }
    };
    let options =
        NbdClientOptions { export: uri.export.clone(), connections, tls, ..Default::default() };
    Ok(NbdClient::connect(&uri.resolve()?, options)?)
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
