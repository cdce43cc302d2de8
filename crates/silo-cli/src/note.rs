//! What is noted of devices that move: whether this host may use them, may receive them, or has to
//! go on with a move whose process has died.
//!
//! Callers: every command that opens devices. What must hold: devices that have left, or have not
//! come whole, are used by no command; what a note says of blocks is believed only where their bytes
//! have survived with it, and after a clean end only while nobody else has touched them.

mod rest;

use crate::config::{Config, DeviceConfig};
use anyhow::{Context, Result, bail, ensure};
use silo::{
    device::DeviceName,
    io::BlockDevice,
    moving::{
        Content, SessionId, Volume,
        ledger::{DeviceNote, FileLedger, Ledger, Note, Standing},
    },
};
use silo_block::geometry::Geometry;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// How a destination begins.
pub(crate) enum Start {
    /// With nothing.
    New,
    /// With what has come before; the devices are the source's.
    Filling(Arc<Note>),
    /// As the owner, by this session and attempt: what is missing is still at the source.
    Running(Arc<Note>, SessionId, u32),
}

fn load(path: &Path) -> Result<Option<Note>> {
    let read = || format!("the note {}", path.display());
    FileLedger::new(path.to_owned()).load().with_context(read)
}

/// Blocks that have not come.
fn missing(note: &Note) -> u64 {
    let absent = note.devices.iter().flat_map(|device| &device.record.absent);
    absent.map(|range| range.count).sum()
}

/// Refuses to use devices that are not this host's any more, not yet, or not whole.
///
/// # Errors
/// If the note says so, or cannot be read.
pub(crate) fn check_use(config: &Config) -> Result<()> {
    let note = config.migrate.iter().filter_map(|migrate| migrate.note.clone());
    // Whoever moved a device by flags has it noted beside the device.
    let own = config.device.values().filter_map(DeviceConfig::own_note);
    note.chain(own).try_for_each(|path| check_note(&path))
}

fn check_note(path: &Path) -> Result<()> {
    let Some(note) = load(path)? else { return Ok(()) };
    let why = match (&note.standing, missing(&note)) {
        (Standing::Here, _) | (Standing::Owner { .. }, 0) => return Ok(()),
        (Standing::Owner { .. }, blocks) => {
            format!("{blocks} blocks of them have not come; silo connect goes on with the move")
        }
        (Standing::Receiving { session }, _) => {
            format!("session {session}, by which they were coming, did not end; run silo connect")
        }
        (Standing::Leaving { session, .. }, _) => format!(
            "they were given away by session {session}, or are about to be; silo serve with the \
             same [migrate] goes on with the move"
        ),
        (Standing::Away { session }, _) => {
            format!("they were given away by session {session}; they run elsewhere")
        }
    };
    refuse(path, &why)
}

/// How a destination with this note begins.
///
/// # Errors
/// If the devices are this host's already, or what came of them is lost.
pub(crate) fn receiving(config: &Config, path: Option<&Path>) -> Result<Start> {
    let Some(path) = path else { return Ok(Start::New) };
    let Some(note) = load(path)? else { return Ok(Start::New) };
    Ok(match note.standing {
        Standing::Away { .. } if rest::holds(config, path) => Start::Filling(Arc::new(note)),
        Standing::Leaving { .. } | Standing::Away { .. } => Start::New,
        Standing::Receiving { .. } => Start::Filling(Arc::new(note)),
        Standing::Here => {
            refuse(path, "they are this host's already; run silo serve")?;
            Start::New
        }
        Standing::Owner { session, attempt } => {
            let kept = |device: &DeviceNote| {
                config.device.get(device.name.as_str()).is_none_or(DeviceConfig::is_kept)
            };
            if let Some(lost) = note.devices.iter().find(|device| !kept(device)) {
                let why =
                    format!("device \"{}\" was memory of a process that is no more", lost.name);
                refuse(path, &why)?;
            }
            Start::Running(Arc::new(note), session, attempt)
        }
    })
}

/// The session by which the devices are leaving, if a process died while that was undecided or the
/// destination still needed it.
///
/// # Errors
/// If the note cannot be read.
pub(crate) fn leaving(path: Option<&Path>) -> Result<Option<(Arc<Note>, SessionId, u32)>> {
    let Some(path) = path else { return Ok(None) };
    Ok(load(path)?.and_then(|note| match note.standing {
        Standing::Leaving { session, attempt } => Some((Arc::new(note), session, attempt)),
        _ => None,
    }))
}

/// The note of devices that are this host's and whole, if nobody has touched them since a process
/// ended in order that had them: then it is known who else has what of them.
///
/// # Errors
/// If the note cannot be read.
pub(crate) fn rested(config: &Config, path: Option<&Path>) -> Result<Option<Arc<Note>>> {
    let Some(path) = path else { return Ok(None) };
    let note = load(path)?.filter(|note| {
        let here = matches!(note.standing, Standing::Here | Standing::Owner { .. });
        here && missing(note) == 0 && rest::holds(config, path)
    });
    Ok(note.map(Arc::new))
}

/// The end of a process that had the devices: notes what they are now, if they are this host's, and
/// that nobody has touched them since.
///
/// # Errors
/// If that cannot be noted.
pub(crate) fn leave(config: &Config, path: Option<&Path>, volumes: Vec<Arc<Volume>>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    if volumes.iter().all(|volume| volume.is_owned() && volume.absent() == 0) {
        note_whole(Some(path), &volumes)?;
    }
    // What a device does when it is closed is done before it is looked at.
    drop(volumes);
    rest::keep(config, path)
}

/// A device as the note says. `content` is what the device would be without one.
///
/// # Errors
/// If it is another device, or its bytes have not survived.
pub(crate) fn volume(
    note: &Note,
    name: DeviceName,
    device: Arc<dyn BlockDevice>,
    block: u32,
    content: Content,
) -> Result<Volume> {
    let noted = note.devices.iter().find(|noted| noted.name == name);
    let noted = noted.context("the note does not have it; a group moves with the same devices")?;
    let geometry = Geometry::new(device.size(), block)?;
    ensure!(
        noted.geometry == geometry,
        "the note is of a device of {} bytes in blocks of {}; this has {} in blocks of {}",
        noted.geometry.bytes(),
        noted.geometry.block(),
        geometry.bytes(),
        geometry.block()
    );
    let fresh = content == Content::Zeros;
    match note.standing {
        // Memory of this process: what came before is gone with the other.
        Standing::Receiving { .. } if fresh => Ok(Volume::untouched(name, device, block, content)?),
        _ if fresh => bail!("it was memory of a process that is no more"),
        Standing::Leaving { .. } => {
            let replica = noted.replica()?;
            ensure!(
                replica.absent().is_empty(),
                "{} of its blocks had not come yet when it was given on",
                replica.absent().len()
            );
            Ok(Volume::leaving(name, device, content, replica))
        }
        _ => Ok(Volume::restored(name, device, content, noted.replica()?)),
    }
}

/// The volumes of a note, in its order: that of the group at the source.
///
/// # Errors
/// If one is not there.
pub(crate) fn in_order(note: &Note, volumes: &[Arc<Volume>]) -> Result<Vec<Arc<Volume>>> {
    ensure!(
        note.devices.len() == volumes.len(),
        "the note is of {} devices, the group has {}",
        note.devices.len(),
        volumes.len()
    );
    let find = |noted: &DeviceNote| {
        let found = volumes.iter().find(|volume| *volume.name() == noted.name).cloned();
        found.with_context(|| format!("there is no device \"{}\" in the group", noted.name))
    };
    note.devices.iter().map(find).collect()
}

/// Notes that the devices are this host's and whole. Their content is durable already.
///
/// # Errors
/// If the note cannot be made.
pub(crate) fn note_whole(path: Option<&Path>, volumes: &[Arc<Volume>]) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let devices = volumes
        .iter()
        .map(|volume| volume.with_replica(|replica| DeviceNote::of(volume.name().clone(), replica)))
        .collect();
    FileLedger::new(path.to_owned())
        .save(&Note { standing: Standing::Here, devices })
        .with_context(|| format!("could not note in {} that all is here", path.display()))
}

/// The ledger of a move.
pub(crate) fn ledger(path: Option<&PathBuf>) -> Option<Arc<dyn Ledger>> {
    path.map(|path| Arc::new(FileLedger::new(path.clone())) as Arc<dyn Ledger>)
}

fn refuse(path: &Path, why: &str) -> Result<()> {
    bail!(
        "the devices are not usable like that: {why} (if you know better, remove the note {})",
        path.display()
    )
}
