//! The lower end of a device: its source, checked if the config says what it must be, and the
//! copy-on-write layers over it.

use super::Host;
use crate::{
    backup::{Place, key_ring},
    config::{DeviceConfig, SourceConfig},
};
use anyhow::{Context, Result, bail, ensure};
use identity::{HostName, TlsClient};
use silo::{
    device::DeviceName,
    disk::{Disk, DiskError, DiskOptions},
    hash::{self, RootHash},
    io::BlockDevice,
    layer::{Base, LayerError, Stack, StackOptions},
    nbd::{NbdClient, NbdClientOptions, NbdUri, Transport},
    source::{
        DirectoryDevice, FileDevice, FileMode, MapChoice, MemoryDevice, ObjectDevice,
        ProcessDevice, ProcessMode, SourceError, SparseDevice,
    },
    store::{Access, Generation, GenerationDevice, LineName, Which},
};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

/// How much is read at once where a whole device is read.
const PORTION: usize = 4 << 20;
/// Memory for what was read of a generation, in bytes.
const GENERATION_CACHE: usize = 256 << 20;
/// Threads that fetch ahead of a reader of a generation.
const FETCHERS: usize = 4;

/// A source with its layers over it, and the uppermost of these.
pub(super) type Layered = (Arc<dyn BlockDevice>, Option<Arc<Stack>>);

/// The source, with its layers over it.
pub(super) fn layered(name: &str, config: &DeviceConfig, host: &Host) -> Result<Layered> {
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
            generation.pin_if_possible()?;
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
fn remote(
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
fn hash_of(device: &dyn BlockDevice) -> Result<RootHash> {
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
