//! The durable map: which block is where, as of the last flush.
//!
//! An append-only file. A flush first makes the overlay's content durable, then appends one record
//! with the states that changed, then makes that durable: so a record never promises content that
//! a crash can take away. The file starts with a snapshot and is written anew when it has grown
//! ([`Journal::rewrite`]: a new file, synced, renamed over the old one).
//!
//! A record that a crash tore is the last one, and what follows it is not a record: it is dropped,
//! because its flush never returned. A bad record with a good one behind it is damage, and an
//! error. (Damage of the very last record cannot be told from a torn one.)
//!
//! Layout (little endian), version 1. File header, 64 bytes:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `SILOJNL\0` |
//! | 8 | 4 | version |
//! | 12 | 4 | block size |
//! | 16 | 8 | blocks |
//! | 24 | 8 | bytes of the base, 0 without one |
//! | 32 | 8 | instance: random, the same for the disk's life |
//! | 40 | 8 | generation: 1, and one more for every rewrite |
//! | 48 | 8 | bytes that the last block lacks |
//! | 56 | 8 | XXH3-64 of bytes 0 to 56 |
//!
//! Record: 32 bytes and its payload. `SJRC`, payload length (4), sequence number (8, from 1), kind
//! (1), status (1), six zeros, XXH3-64 (8) over the 24 bytes before it and the payload, seeded with
//! instance XOR generation. Kind 1: runs of 16 bytes {start 8, count 4, state 1, three zeros}.
//! Kind 2: two bits per block, lowest first, for all blocks. Record 1 applies to a disk of which
//! every block is in the base.

use super::{
    MAX_BLOCKS,
    error::MapError,
    state::{BlockState, DiskStatus},
};
use crate::{
    block::BlockRange,
    files::{Folder, Stored, read_whole},
    geometry::Geometry,
};
use std::{
    hash::Hasher,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};
use twox_hash::XxHash3_64;

const MAGIC: &[u8; 8] = b"SILOJNL\0";
const VERSION: u32 = 1;
const HEADER: usize = 64;
const RECORD_MAGIC: &[u8; 4] = b"SJRC";
const RECORD: usize = 32;
const RUN: usize = 16;
const KIND_RUNS: u8 = 1;
const KIND_MAP: u8 = 2;
/// Longest journal that is read: the records since a snapshot of the largest map.
const MAX_BYTES: u64 = 4 << 30;

/// A journal is written anew when it is longer than this and than four of its snapshots.
const REWRITE_BYTES: u64 = 256 << 10;

/// What the file header says about the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct JournalHeader {
    pub(crate) geometry: Geometry,
    pub(crate) base_bytes: u64,
    pub(crate) instance: u64,
    pub(crate) generation: u64,
}

/// What a journal says in the end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Replay {
    pub(crate) header: JournalHeader,
    pub(crate) states: Vec<u8>,
    pub(crate) status: DiskStatus,
    /// Sequence number of the last good record.
    pub(crate) sequence: u64,
    /// Length up to the end of the last good record; the rest was torn.
    pub(crate) good_bytes: u64,
    /// Length of the first record, the snapshot.
    pub(crate) snapshot_bytes: u64,
}

/// Why a journal cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Version(u32),
    Damage { at: u64, detail: &'static str },
}

impl Fault {
    fn named(self, path: &Path) -> MapError {
        let path = path.to_owned();
        match self {
            Self::Version(found) => MapError::Version { path, found, known: VERSION },
            Self::Damage { at, detail } => MapError::Corrupt {
                path,
                at,
                detail: format!("{detail}; restore the disk from its source or a backup"),
            },
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes were sliced"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes were sliced"))
}

impl JournalHeader {
    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.geometry.block() as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.geometry.blocks().to_le_bytes());
        bytes[24..32].copy_from_slice(&self.base_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.instance.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.generation.to_le_bytes());
        let lacks = self.geometry.blocks() * self.geometry.block() - self.geometry.bytes();
        bytes[48..56].copy_from_slice(&lacks.to_le_bytes());
        let sum = XxHash3_64::oneshot(&bytes[..56]);
        bytes[56..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, Fault> {
        let damage = |detail| Fault::Damage { at: 0, detail };
        if bytes.len() < HEADER {
            return Err(damage("the file is shorter than its header"));
        }
        if bytes[..8] != *MAGIC {
            return Err(damage("this is not a journal of a silo disk"));
        }
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(Fault::Version(version));
        }
        if XxHash3_64::oneshot(&bytes[..56]) != u64_at(bytes, 56) {
            return Err(damage("the header's checksum does not match"));
        }
        let (block, blocks, lacks) = (u32_at(bytes, 12), u64_at(bytes, 16), u64_at(bytes, 48));
        if blocks == 0 || blocks > MAX_BLOCKS {
            return Err(damage("the number of blocks is out of bounds"));
        }
        if lacks >= u64::from(block) {
            return Err(damage("the last block lacks more than it has"));
        }
        let geometry = Geometry::new(blocks * u64::from(block) - lacks, block)
            .map_err(|_| damage("the block size is not possible"))?;
        Ok(Self {
            geometry,
            base_bytes: u64_at(bytes, 24),
            instance: u64_at(bytes, 32),
            generation: u64_at(bytes, 40),
        })
    }

    fn checksum(&self, head: &[u8], payload: &[u8]) -> u64 {
        let mut sum = XxHash3_64::with_seed(self.instance ^ self.generation);
        sum.write(head);
        sum.write(payload);
        sum.finish()
    }
}

/// A record as it lies in the file.
struct Record<'a> {
    sequence: u64,
    kind: u8,
    status: DiskStatus,
    payload: &'a [u8],
}

impl<'a> Record<'a> {
    /// The record at the start of `bytes`, if there is a whole and good one.
    fn decode(header: &JournalHeader, bytes: &'a [u8]) -> Option<Self> {
        if bytes.len() < RECORD || bytes[..4] != *RECORD_MAGIC {
            return None;
        }
        let payload = bytes[RECORD..].get(..u32_at(bytes, 4) as usize)?;
        if header.checksum(&bytes[..24], payload) != u64_at(bytes, 24) {
            return None;
        }
        let status = DiskStatus::from_byte(bytes[17])?;
        Some(Self { sequence: u64_at(bytes, 8), kind: bytes[16], status, payload })
    }

    fn apply(&self, states: &mut [u8]) -> Result<(), &'static str> {
        match self.kind {
            KIND_RUNS => apply_runs(self.payload, states),
            KIND_MAP => apply_map(self.payload, states),
            _ => Err("a record of an unknown kind"),
        }
    }

    const fn bytes(&self) -> usize {
        RECORD + self.payload.len()
    }
}

fn apply_runs(payload: &[u8], states: &mut [u8]) -> Result<(), &'static str> {
    if !payload.len().is_multiple_of(RUN) {
        return Err("a record whose length is not that of whole runs");
    }
    for run in payload.chunks_exact(RUN) {
        let start = u64_at(run, 0);
        let end = start.checked_add(u64::from(u32_at(run, 8)));
        if BlockState::from_byte(run[12]).is_none() {
            return Err("a run with an unknown state");
        }
        let Some(end) = end.filter(|end| *end <= states.len() as u64) else {
            return Err("a run that reaches past the end of the disk");
        };
        states[start as usize..end as usize].fill(run[12]);
    }
    Ok(())
}

fn apply_map(payload: &[u8], states: &mut [u8]) -> Result<(), &'static str> {
    if payload.len() != states.len().div_ceil(4) {
        return Err("a map of another size");
    }
    for (index, state) in states.iter_mut().enumerate() {
        *state = payload[index / 4] >> (index % 4 * 2) & 3;
    }
    Ok(())
}

/// Reads a journal's bytes.
pub(crate) fn replay(bytes: &[u8]) -> Result<Replay, Fault> {
    let header = JournalHeader::decode(bytes)?;
    let mut states = vec![0; header.geometry.blocks() as usize];
    let Some(first) = Record::decode(&header, &bytes[HEADER..]) else {
        return Err(Fault::Damage { at: HEADER as u64, detail: "the snapshot is damaged" });
    };
    let snapshot_bytes = first.bytes() as u64;
    let mut at = HEADER;
    let mut sequence = 0;
    let mut status = first.status;
    while let Some(record) = Record::decode(&header, &bytes[at..]) {
        let damage = |detail| Fault::Damage { at: at as u64, detail };
        if record.sequence != sequence + 1 {
            return Err(damage("a record is out of sequence"));
        }
        record.apply(&mut states).map_err(damage)?;
        sequence = record.sequence;
        status = record.status;
        at += record.bytes();
    }
    let behind = (at + 1..bytes.len())
        .filter(|from| bytes[*from..].starts_with(RECORD_MAGIC))
        .any(|from| Record::decode(&header, &bytes[from..]).is_some());
    if behind {
        let detail = "a damaged record with good ones behind it";
        return Err(Fault::Damage { at: at as u64, detail });
    }
    Ok(Replay { header, states, status, sequence, good_bytes: at as u64, snapshot_bytes })
}

/// A run of blocks in one state, as a record holds it.
pub(crate) type Run = (BlockRange, BlockState);

fn encode_record(
    header: &JournalHeader,
    sequence: u64,
    kind: u8,
    status: DiskStatus,
    fill: impl FnOnce(&mut Vec<u8>),
) -> Vec<u8> {
    let mut bytes = vec![0; RECORD];
    fill(&mut bytes);
    let payload = (bytes.len() - RECORD) as u32;
    bytes[..4].copy_from_slice(RECORD_MAGIC);
    bytes[4..8].copy_from_slice(&payload.to_le_bytes());
    bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
    bytes[16] = kind;
    bytes[17] = status as u8;
    let sum = header.checksum(&bytes[..24], &bytes[RECORD..]);
    bytes[24..32].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn encode_runs(
    header: &JournalHeader,
    sequence: u64,
    status: DiskStatus,
    runs: impl IntoIterator<Item = Run>,
) -> Vec<u8> {
    encode_record(header, sequence, KIND_RUNS, status, |bytes| {
        for (range, state) in runs {
            bytes.extend_from_slice(&range.start.0.to_le_bytes());
            bytes.extend_from_slice(&(range.count as u32).to_le_bytes());
            bytes.extend_from_slice(&[state as u8, 0, 0, 0]);
        }
    })
}

/// The shorter of the two ways to write all states.
fn encode_snapshot(header: &JournalHeader, status: DiskStatus, states: &[u8]) -> Vec<u8> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, byte) in states.iter().enumerate() {
        let state = BlockState::from_byte(*byte).expect("states in memory were checked");
        match runs.last_mut() {
            Some((range, last)) if *last == state && range.end() == index as u64 => {
                range.count += 1;
            }
            _ if state == BlockState::Base => {}
            _ => runs.push((BlockRange::new(index as u64, 1), state)),
        }
    }
    if runs.len() * RUN <= states.len().div_ceil(4) {
        return encode_runs(header, 1, status, runs);
    }
    encode_record(header, 1, KIND_MAP, status, |bytes| {
        let packed = states.chunks(4).map(|four| {
            four.iter().enumerate().fold(0, |byte, (index, state)| byte | state << (index * 2))
        });
        bytes.extend(packed);
    })
}

/// An open journal, positioned behind its last good record.
pub(crate) struct Journal {
    folder: Arc<dyn Folder>,
    name: String,
    file: Arc<dyn Stored>,
    header: JournalHeader,
    end: u64,
    sequence: u64,
    snapshot_bytes: u64,
    status: DiskStatus,
    /// Set when nobody can know any more what is durable; see [`MapError::SyncLost`].
    lost: Option<String>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Journal({}, {} records)", self.path().display(), self.sequence)
    }
}

impl Journal {
    /// Writes a new journal in `folder`, durable when this returns.
    pub(crate) fn create(
        folder: &Arc<dyn Folder>,
        name: &str,
        header: JournalHeader,
        status: DiskStatus,
        states: &[u8],
    ) -> Result<Self, MapError> {
        let journal = Self::prepare(folder, name, header, status, states)?;
        journal.publish()?;
        Ok(journal)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    /// Writes a new journal beside the one in use.
    fn prepare(
        folder: &Arc<dyn Folder>,
        name: &str,
        header: JournalHeader,
        status: DiskStatus,
        states: &[u8],
    ) -> Result<Self, MapError> {
        let fresh = format!("{name}.new");
        let snapshot = encode_snapshot(&header, status, states);
        let write = || -> io::Result<Arc<dyn Stored>> {
            let file = folder.create(&fresh)?;
            file.write_at(&header.encode(), 0)?;
            file.write_at(&snapshot, HEADER as u64)?;
            file.sync()?;
            Ok(file)
        };
        let file = write().map_err(MapError::io("write", &folder.path().join(&fresh)))?;
        Ok(Self {
            folder: folder.clone(),
            name: name.to_owned(),
            file,
            header,
            end: (HEADER + snapshot.len()) as u64,
            sequence: 1,
            snapshot_bytes: snapshot.len() as u64,
            status,
            lost: None,
        })
    }

    /// Makes a prepared journal the one in use.
    fn publish(&self) -> Result<(), MapError> {
        self.folder
            .rename(&format!("{}.new", self.name), &self.name)
            .and_then(|()| self.folder.sync())
            .map_err(MapError::io("replace", &self.path()))
    }

    /// Reads a journal without changing anything.
    pub(crate) fn inspect(folder: &dyn Folder, name: &str) -> Result<(Replay, u64), MapError> {
        let path = folder.path().join(name);
        let bytes = read_whole(folder, name, MAX_BYTES).map_err(MapError::io("read", &path))?;
        let Some(bytes) = bytes else { return Err(MapError::NotThere { path }) };
        let replayed = replay(&bytes).map_err(|fault| fault.named(&path))?;
        Ok((replayed, bytes.len() as u64))
    }

    /// Opens a journal and cuts a torn tail off.
    pub(crate) fn open(folder: &Arc<dyn Folder>, name: &str) -> Result<(Self, Replay), MapError> {
        let (replayed, length) = Self::inspect(&**folder, name)?;
        let path = folder.path().join(name);
        let file = folder.open(name).map_err(MapError::io("open", &path))?;
        if length > replayed.good_bytes {
            tracing::info!(
                journal = %path.display(),
                bytes = length - replayed.good_bytes,
                "dropped the torn tail of a journal"
            );
            file.set_len(replayed.good_bytes)
                .and_then(|()| file.sync())
                .map_err(MapError::io("cut the torn tail of", &path))?;
        }
        let journal = Self {
            folder: folder.clone(),
            name: name.to_owned(),
            file,
            header: replayed.header,
            end: replayed.good_bytes,
            sequence: replayed.sequence,
            snapshot_bytes: replayed.snapshot_bytes,
            status: replayed.status,
            lost: None,
        };
        Ok((journal, replayed))
    }

    /// The status that a crash of the host would leave.
    pub(crate) const fn status(&self) -> DiskStatus {
        self.status
    }

    pub(crate) const fn header(&self) -> &JournalHeader {
        &self.header
    }

    /// Whether the file has grown enough to be written anew.
    pub(crate) const fn is_long(&self) -> bool {
        self.end > REWRITE_BYTES && self.end > 4 * self.snapshot_bytes
    }

    /// Fails if an earlier sync did.
    pub(crate) fn check(&self) -> Result<(), MapError> {
        match &self.lost {
            Some(cause) => Err(MapError::SyncLost { cause: cause.clone() }),
            None => Ok(()),
        }
    }

    /// Remembers that a sync failed: the kernel has dropped what it could not write and the next
    /// sync would succeed without it.
    pub(crate) fn lose(&mut self, error: &MapError) {
        self.lost.get_or_insert_with(|| error.to_string());
    }

    /// Appends what changed; durable when this returns.
    pub(crate) fn append(
        &mut self,
        status: DiskStatus,
        runs: impl IntoIterator<Item = Run>,
    ) -> Result<(), MapError> {
        self.check()?;
        let bytes = encode_runs(&self.header, self.sequence + 1, status, runs);
        if let Err(error) = self.file.write_at(&bytes, self.end) {
            let error = MapError::io("append to", &self.path())(error);
            if self.file.set_len(self.end).is_err() {
                self.lose(&error);
            }
            return Err(error);
        }
        if let Err(error) = self.file.sync() {
            let error = MapError::io("sync", &self.path())(error);
            self.lose(&error);
            return Err(error);
        }
        self.end += bytes.len() as u64;
        self.sequence += 1;
        self.status = status;
        Ok(())
    }

    /// Writes the journal anew with `states` as its snapshot; durable when this returns. If there
    /// is no room for a new one, the old one stays in use.
    pub(crate) fn rewrite(&mut self, status: DiskStatus, states: &[u8]) -> Result<(), MapError> {
        self.check()?;
        let header = JournalHeader { generation: self.header.generation + 1, ..self.header };
        let fresh = Self::prepare(&self.folder, &self.name, header, status, states)?;
        if let Err(error) = fresh.publish() {
            // Nobody knows which of the two a crash would leave.
            self.lose(&error);
            return Err(error);
        }
        *self = fresh;
        Ok(())
    }
}

/// Reads any bytes as a journal; for a fuzzer. Only the first 1 MiB of blocks are believed, so that
/// no time goes into maps that are large and say nothing.
pub(crate) fn fuzz_journal(bytes: &[u8]) {
    if bytes.get(16..24).is_some_and(|blocks| u64_at(blocks, 0) <= 1 << 20) {
        let _ = replay(bytes);
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
