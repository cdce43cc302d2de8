//! A look at a disk's files without opening it: for people, and for a host that takes stock.

use super::{BlockState, BootId, DiskError, DiskStatus, Identity, identity};
use crate::{
    files::RealFolder,
    map::{Journal, Runtime},
};
use serde::Serialize;
use std::{fs, os::unix::fs::MetadataExt, path::Path};

/// What the files of a disk say.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Size of the disk.
    pub bytes: u64,
    /// Size of the base it was created over; 0 without one.
    pub base_bytes: u64,
    /// How far it is from being usable.
    pub status: DiskStatus,
    /// Whether the guest's writes are refused.
    pub frozen: bool,
    /// Whether this tells what was written last (the host has not crashed since), or what was
    /// flushed last.
    pub up_to_date: bool,
    /// Blocks in the overlay.
    pub data_blocks: u64,
    /// Blocks that were made zero.
    pub zero_blocks: u64,
    /// Blocks that have not arrived.
    pub missing_blocks: u64,
    /// Blocks whose state a crash of the host would take back to the last flush.
    pub unflushed_blocks: u64,
    /// Space that the overlay's content takes.
    pub allocated_bytes: u64,
    /// Length of the journal.
    pub journal_bytes: u64,
    /// How often the journal was written anew, from 1.
    pub journal_generation: u64,
    /// Records since.
    pub journal_records: u64,
    /// Bytes at its end that a crash tore.
    pub journal_torn_bytes: u64,
    /// Whose disk it is.
    pub identity: Option<Identity>,
}

/// Reads the files of the disk in `dir`. Changes nothing, and may be called while another process
/// has the disk open; then the numbers are those of a moment.
///
/// # Errors
/// If there is no disk, or a file is damaged.
pub fn inspect(dir: &Path) -> Result<Inspection, DiskError> {
    let folder = RealFolder::new(dir);
    let (replayed, journal_bytes) = Journal::inspect(&*folder, "journal")?;
    let header = replayed.header;
    let boot =
        BootId::current().map_err(DiskError::io("ask the kernel for", Path::new("its boot id")))?;
    let current =
        Runtime::adopt(&*folder, "runtime", header.geometry.blocks(), header.instance, &boot)?;
    let up_to_date = current.is_some();
    let (states, status, frozen) = match current {
        Some((_, now)) => (now.states, now.status, now.frozen),
        None => (replayed.states.clone(), replayed.status, false),
    };
    let count =
        |state: BlockState| states.iter().filter(|byte| **byte == state as u8).count() as u64;
    let unflushed = states.iter().zip(&replayed.states).filter(|(now, then)| now != then).count();
    let data = dir.join("data");
    let metadata = fs::metadata(&data).map_err(DiskError::io("inspect", &data))?;
    Ok(Inspection {
        bytes: header.geometry.bytes(),
        base_bytes: header.base_bytes,
        status,
        frozen,
        up_to_date,
        data_blocks: count(BlockState::Data),
        zero_blocks: count(BlockState::Zero),
        missing_blocks: count(BlockState::Missing),
        unflushed_blocks: unflushed as u64,
        allocated_bytes: metadata.blocks() * 512,
        journal_bytes,
        journal_generation: header.generation,
        journal_records: replayed.sequence,
        journal_torn_bytes: journal_bytes - replayed.good_bytes,
        identity: identity::read(dir)?,
    })
}
