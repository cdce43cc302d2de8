//! Where blocks of a move may come from beside its source, as the config says: a store, other hosts,
//! files of this host.
//!
//! Callers: `silo serve` (the source, and whoever shares content) and `silo connect`. What must hold:
//! a store or a host that cannot be reached delays nobody and ends no move; what files were believed
//! to hold is checked by hash before it is used.

use crate::{
    backup::{Place, Target, key_ring},
    config::{AssistConfig, Config, MigrateConfig},
    moving::security,
    stack::Host,
};
use anyhow::{Context, Result};
use identity::HostName;
use silo::{
    assist::{InStore, Open, StorePlace},
    io::BlockDevice,
    moving::{
        Server, Volume,
        assist::{Fetch, HashIndex, Lookup, PeerFetch, Policy},
        codec::Naming,
        destination::{self, Accepted, Offer, Reception},
        peer::{Dial, Limits, Listener},
        source::{self, Advertised},
    },
    source::{FileDevice, FileMode},
    store::{Access, Generation, Limits as StoreLimits, LineName, Which},
};
use silo_block::{block::BlockIndex, geometry::Geometry, session::messages::BlockHash};
use std::{
    net::{TcpListener, TcpStream, ToSocketAddrs},
    path::Path,
    sync::Arc,
    time::Duration,
};

/// Memory for what was read of a generation, in bytes.
const CACHE: usize = 128 << 20;
/// A store beside a move is not waited for as a backup is: the source has the block too.
const STORE_LIMITS: StoreLimits = StoreLimits {
    request: Duration::from_secs(5),
    slowest: 256 << 10,
    attempts: 2,
    pause: Duration::from_millis(100),
};
/// The longest that another host may take for one block.
const PEER_LIMIT: Duration = Duration::from_secs(5);
/// What is read at once of a file whose blocks are named.
const PORTION: u64 = 1 << 20;

/// Opens the newest generation of the line beside a move.
fn newest(config: &Config, assist: &AssistConfig) -> Result<(String, Open)> {
    let backup = config.backup.as_ref();
    let target = match (backup, &assist.store, &assist.line, &assist.keys) {
        (_, Some(store), Some(line), Some(keys)) => Target {
            place: Place::by_config(store)?,
            line: LineName::parse(line)?,
            keys: key_ring(keys)?,
        },
        (Some(backup), store, line, keys) => {
            let (group, _) =
                config.members(backup.group.as_deref()).context("the group to back up")?;
            let mut target = Target::by_config(backup, &group)?;
            if let Some(store) = store {
                target.place = Place::by_config(store)?;
            }
            if let Some(line) = line {
                target.line = LineName::parse(line)?;
            }
            if let Some(keys) = keys {
                target.keys = key_ring(keys)?;
            }
            target
        }
        (None, ..) => anyhow::bail!("the store beside the move needs store, line and keys"),
    };
    let name = format!("store {}", target.place);
    let open = Box::new(move || {
        let store = target.place.open_within(Access::Read, STORE_LIMITS)?;
        Generation::open(&store, &target.keys, &target.line, Which::Newest, CACHE)
    });
    Ok((name, open))
}

/// Which file stands for which device, with the hashes of its blocks in their order.
struct Known(Vec<Vec<BlockHash>>);

impl Advertised for Known {
    fn hash(&self, device: usize, block: BlockIndex) -> Option<BlockHash> {
        self.0.get(device)?.get(usize::try_from(block.0).ok()?).copied()
    }
}

fn open_known(path: &Path, block: u32) -> Result<(Arc<FileDevice>, Geometry)> {
    let device = FileDevice::open(path, FileMode::ReadOnly)
        .with_context(|| format!("a file of content that others have: {}", path.display()))?;
    let geometry = Geometry::new(device.size(), block)?;
    Ok((Arc::new(device), geometry))
}

fn hashes(path: &Path, block: u32) -> Result<Vec<BlockHash>> {
    let (device, geometry) = open_known(path, block)?;
    let mut all = Vec::with_capacity(usize::try_from(geometry.blocks())?);
    let (mut at, mut buffer) = (0, Vec::new());
    while at < device.size() {
        buffer.resize(PORTION.min(device.size() - at) as usize, 0);
        device.read_at(at, &mut buffer)?;
        all.extend(buffer.chunks(block as usize).map(|content| Naming::Plain.name(content)));
        at += buffer.len() as u64;
    }
    Ok(all)
}

/// Tells a source what it need not send.
///
/// # Errors
/// If a file or a key is not there.
pub(crate) fn at_source(
    config: &Config,
    migrate: &MigrateConfig,
    volumes: &[Arc<Volume>],
    options: &mut source::Options,
) -> Result<()> {
    if let Some(assist) = &migrate.assist {
        options.stored = Some(Arc::new(InStore::new(newest(config, assist)?.1)));
    }
    if !migrate.known.is_empty() {
        let of = |volume: &Arc<Volume>| match migrate.known.get(volume.name().as_str()) {
            Some(path) => hashes(path, volume.geometry().block() as u32),
            None => Ok(Vec::new()),
        };
        options.advertised = Some(Arc::new(Known(volumes.iter().map(of).collect::<Result<_>>()?)));
    }
    Ok(())
}

/// Tells a destination where else it may look.
///
/// # Errors
/// If a file or a key is not there, or an address is none.
pub(crate) fn at_destination(
    config: &Config,
    migrate: &MigrateConfig,
    host: &Host,
    options: &mut destination::Options,
) -> Result<()> {
    if let Some(assist) = &migrate.assist {
        let (name, open) = newest(config, assist)?;
        // What is fetched may take hours, and be all that there is once the source has gone.
        let open: Open = Box::new(move || {
            let generation = open()?;
            generation.pin_if_possible()?;
            Ok(generation)
        });
        options.places.push(Arc::new(StorePlace::new(&name, Naming::Plain, open)));
        options.policy = Policy { hedge: assist.hedge.0, ..Policy::default() };
        options.session.early_release = assist.early_release;
    }
    let (security, _) = security(migrate, host)?;
    for peer in &migrate.peers {
        let name: HostName = peer.name.as_deref().unwrap_or("peer").parse()?;
        let address = peer.address.clone();
        let open = move |limit| {
            let none = || std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
            let address = address.to_socket_addrs()?.next().ok_or_else(none)?;
            TcpStream::connect_timeout(&address, limit)
        };
        let limits = Limits { connect: PEER_LIMIT, ..Limits::default() };
        let dial = Dial::by(open, name, security.clone(), limits);
        options.places.push(Arc::new(PeerFetch::new(dial, PEER_LIMIT)) as Arc<dyn Fetch>);
    }
    if !migrate.known.is_empty() {
        options.local = Some(index(config, migrate)? as Arc<dyn Lookup>);
    }
    Ok(())
}

/// The content of the files that a config knows, by hash.
fn index(config: &Config, migrate: &MigrateConfig) -> Result<Arc<HashIndex>> {
    let index = HashIndex::default();
    for (name, path) in &migrate.known {
        let device = config.device.get(name).context("a device that is not there")?;
        let (file, geometry) = open_known(path, u32::try_from(device.block_size.0)?)?;
        index.add(file, geometry)?;
    }
    Ok(Arc::new(index))
}

/// Takes no devices.
struct Closed;

impl Reception for Closed {
    fn receive(&self, _: &Offer<'_>) -> Result<Accepted, String> {
        Err("this host only answers by hash here; it takes no devices".to_owned())
    }
}

/// Answers other hosts by hash, if the config says so, until it is dropped.
///
/// # Errors
/// If a file is not there, or the address is taken.
pub(crate) fn share(
    config: &Config,
    migrate: &MigrateConfig,
    host: &Host,
) -> Result<Option<Server>> {
    let Some(share) = &migrate.share else { return Ok(None) };
    let index = index(config, migrate)?;
    let (security, limits) = security(migrate, host)?;
    let hosts =
        share.hosts.iter().map(|name| name.parse()).collect::<Result<Vec<HostName>, _>>()?;
    let allow = move |name: Option<&HostName>| {
        hosts.is_empty() || name.is_some_and(|name| hosts.contains(name))
    };
    let socket = TcpListener::bind(share.listen).with_context(|| {
        format!("could not listen on {} for hosts that ask by hash", share.listen)
    })?;
    let listener = Listener::new(socket, security, limits, allow)?;
    Ok(Some(Server::new(listener, Arc::new(Closed), Some(index))?))
}
