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

mod source;
#[cfg(test)]
mod tests;

pub(crate) use source::{disk_options, hash_of_file};

use crate::{
    config::{BackupConfig, BinlogConfig, Config, DeviceConfig, OnError, SourceConfig},
    metrics::{CacheFigures, DeviceFigures, FilterFigures, Metrics, MoveFigures, Tracking, names},
    note,
};
use anyhow::{Context, Result, bail, ensure};
use identity::{HostName, Identity};
use silo::{
    device::DeviceName,
    filter::{
        self, CacheOptions, Delayed, Delays, ErrorPolicy, Metered, Policied, ReadOnly, Recorder,
        RedundantWrites, WriteCache, binlog::RecordOptions,
    },
    io::BlockDevice,
    layer::{Stack, StackGroup},
    moving::{Content, Volume, ledger::Note, source::new_session},
    store::{CopyGroup, ScratchOptions, capture::Capture},
};
use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::{self, BufWriter},
    path::Path,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

/// Buffer of a binlog.
const BINLOG_BUFFER: usize = 1 << 20;
/// How long a flush may wait for room when nobody is served any more, and how often it is looked at.
pub(crate) const ROOM_LIMIT: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(100);
/// Longest time that writers are held for a backup before its round is given up.
const HELD_LIMIT: Duration = Duration::from_secs(5);

/// What all devices of a process share.
#[derive(Clone)]
pub(crate) struct Host {
    /// Where their figures go.
    pub(crate) metrics: Metrics,
    /// Figures of moves.
    pub(crate) moves: Arc<MoveFigures>,
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
        let (metrics, moves) = (Metrics::new(names::ALL), Arc::new(MoveFigures::default()));
        metrics.add(moves.clone());
        Ok(Self { metrics, moves, identity })
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// To be used; those of `[migrate]` may leave.
    Use,
    /// Those of `[migrate]` are to come from another host.
    Receive,
    /// Those of `[migrate]` are as this note says: a move goes on that a process began which is no
    /// more.
    GoOn(Arc<Note>),
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
    pub(crate) fn open(config: &Config, host: &Host, role: &Role) -> Result<Self> {
        check_kept(config, role)?;
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
                host.metrics.add(Tracking::new(volume.clone()));
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

/// What a note says of blocks is of bytes that are gone if what kept them is: it must not be made
/// anew, as a config may say, and taken for them.
fn check_kept(config: &Config, role: &Role) -> Result<()> {
    let (Role::GoOn(_), Some(migrate)) = (role, &config.migrate) else { return Ok(()) };
    let group = config.members(migrate.group.as_deref()).context("the group to move")?;
    for name in group.1 {
        let place = config.device.get(&name).and_then(DeviceConfig::place);
        if let Some(place) = place.filter(|place| !place.exists()) {
            bail!(
                "device \"{name}\": {} is gone, and the note of its move says what was in it; bring \
                 it back, or remove the note to begin anew",
                place.display()
            );
        }
    }
    Ok(())
}

/// A device that can move. What is not known to be zeros is sent and compared, never assumed.
fn volume(
    name: &str,
    config: &DeviceConfig,
    device: Arc<dyn BlockDevice>,
    role: &Role,
) -> Result<Arc<Volume>> {
    let name = DeviceName::new(name).context("a device that moves has another name")?;
    let block = u32::try_from(config.block_size.0)?;
    let fresh = matches!(config.source, SourceConfig::Memory) && config.overlays.is_empty();
    let content = if fresh { Content::Zeros } else { Content::Unknown };
    let volume = match role {
        Role::Use => Volume::owned(name, device, block, content, new_session()?)?,
        Role::Receive => Volume::untouched(name, device, block, content)?,
        Role::GoOn(noted) => note::volume(noted, name, device, block, content)?,
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
        let (mut device, mut layers) = source::layered(name, config, host)?;
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
