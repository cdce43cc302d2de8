//! A layer between a disk's base and its overlay: what a machine had written when it was copied.
//!
//! Several disks have one layer, each by hard links of its own to the two files, so that it goes with
//! the last of them. Nobody writes to it. In the folder of a disk:
//!
//! | file | what |
//! |---|---|
//! | `below` | content, sparse, each block at its place |
//! | `below.json` | which blocks that is, and which are zero whatever the base says |
//!
//! Made by [`Layer`], read by the [`store`](super::store), which finds it when it opens the disk. What
//! must hold: a disk that is received has none, because "as in the base" means the base of the package
//! to whoever sends. So a [`reset`](crate::device::Device::reset) takes the layer away.

use super::DiskError;
use crate::{
    block::{BLOCK_SIZE, BlockRange, BlockSet, is_zero},
    files::read_cached,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

const CONTENT: &str = "below";
const MAP: &str = "below.json";
const VERSION: u32 = 1;
/// Blocks that are copied at once.
const PIECE: u64 = 256;

#[derive(Serialize, Deserialize)]
struct Map {
    version: u32,
    blocks: u64,
    /// [start, count] pairs.
    data: Vec<(u64, u64)>,
    zeros: Vec<(u64, u64)>,
}

fn pairs(set: &BlockSet) -> Vec<(u64, u64)> {
    set.ranges().map(|range| (range.start.0, range.count)).collect()
}

fn set(blocks: u64, pairs: &[(u64, u64)]) -> Option<BlockSet> {
    let mut set = BlockSet::new(blocks);
    for (start, count) in pairs {
        start.checked_add(*count).filter(|end| *end <= blocks)?;
        set.insert_range(BlockRange::new(*start, *count));
    }
    Some(set)
}

/// A layer that no disk has yet, in a folder of its own.
#[derive(Debug)]
pub struct Layer {
    content: PathBuf,
    map: PathBuf,
}

impl Layer {
    /// Writes a layer of those `blocks` into `folder`, which must be on the file system of the disks,
    /// under `name`. `read` gives their content.
    ///
    /// # Errors
    /// If there is one of that name, or reading or writing fails.
    pub fn write(
        folder: &Path,
        name: &str,
        blocks: &BlockSet,
        mut read: impl FnMut(BlockRange, &mut [u8]) -> io::Result<()>,
    ) -> Result<Self, DiskError> {
        let content = folder.join(format!("{name}.{CONTENT}"));
        let map = folder.join(format!("{name}.{MAP}"));
        let all = blocks.device_blocks();
        let (mut data, mut zeros) = (BlockSet::new(all), BlockSet::new(all));
        let mut write = || -> io::Result<()> {
            let file = File::create_new(&content)?;
            file.set_len(all * BLOCK_SIZE as u64)?;
            let mut buffer = vec![0; PIECE as usize * BLOCK_SIZE];
            for piece in blocks.ranges().flat_map(|range| range.chunks(PIECE)) {
                let buffer = &mut buffer[..piece.bytes() as usize];
                read(piece, buffer)?;
                for (at, block) in buffer.chunks(BLOCK_SIZE).enumerate() {
                    let number = piece.start.0 + at as u64;
                    let place = if is_zero(block) { &mut zeros } else { &mut data };
                    place.insert_range(BlockRange::new(number, 1));
                }
                for run in data.ranges_in(piece) {
                    let from = (run.start.offset() - piece.start.offset()) as usize;
                    let part = &buffer[from..from + run.bytes() as usize];
                    file.write_all_at(part, run.start.offset())?;
                }
            }
            file.sync_data()
        };
        write().map_err(DiskError::io("write", &content))?;
        let text = Map { version: VERSION, blocks: all, data: pairs(&data), zeros: pairs(&zeros) };
        let write_map = || -> io::Result<()> {
            let mut file = File::create_new(&map)?;
            io::Write::write_all(&mut file, &serde_json::to_vec(&text)?)?;
            file.sync_data()
        };
        write_map().map_err(DiskError::io("write", &map))?;
        Ok(Self { content, map })
    }

    /// A layer that another process has written.
    #[must_use]
    pub fn found(folder: &Path, name: &str) -> Self {
        Self {
            content: folder.join(format!("{name}.{CONTENT}")),
            map: folder.join(format!("{name}.{MAP}")),
        }
    }

    /// Puts it below the disk that will be created in `dir`.
    ///
    /// # Errors
    /// If there is a layer already, or the file system cannot link.
    pub fn put_below(&self, dir: &Path) -> Result<(), DiskError> {
        fs::create_dir_all(dir).map_err(DiskError::io("create", dir))?;
        // The map last: where it is, the content is.
        for (from, to) in [(&self.content, CONTENT), (&self.map, MAP)] {
            let to = dir.join(to);
            fs::hard_link(from, &to).map_err(DiskError::io("link", &to))?;
        }
        Ok(())
    }
}

/// The layer of an open disk.
pub(super) struct Below {
    dir: PathBuf,
    file: File,
    data: BlockSet,
    zeros: BlockSet,
    /// It is no longer the disk's.
    gone: AtomicBool,
    cache_reads: AtomicBool,
}

/// Where blocks of a disk are that are not in its overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Layer,
    Zero,
    Base,
}

impl Below {
    /// The layer of the disk in `dir`, if it has one.
    ///
    /// # Errors
    /// If it is damaged, or not for a disk of so many blocks.
    pub(super) fn open(dir: &Path, blocks: u64) -> Result<Option<Self>, DiskError> {
        let (path, content) = (dir.join(MAP), dir.join(CONTENT));
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(DiskError::io("read", &path)(error)),
        };
        let corrupt = |detail: String| DiskError::Corrupt { path: path.clone(), at: 0, detail };
        let map: Map = serde_json::from_slice(&text).map_err(|e| corrupt(e.to_string()))?;
        if map.version != VERSION {
            return Err(DiskError::Version { path, found: map.version, known: VERSION });
        }
        if map.blocks != blocks {
            return Err(corrupt(format!("it is of a disk of {} blocks", map.blocks)));
        }
        let outside = || corrupt("it lists blocks beyond the disk's end".to_owned());
        let data = set(blocks, &map.data).ok_or_else(outside)?;
        let zeros = set(blocks, &map.zeros).ok_or_else(outside)?;
        let file = File::open(&content).map_err(DiskError::io("open", &content))?;
        let length = file.metadata().map_err(DiskError::io("inspect", &content))?.len();
        if length != blocks * BLOCK_SIZE as u64 {
            let detail = "the layer does not have the size of the disk".to_owned();
            return Err(DiskError::Corrupt { path: content, at: length, detail });
        }
        let (gone, cache_reads) = (AtomicBool::new(false), AtomicBool::new(true));
        Ok(Some(Self { dir: dir.to_owned(), file, data, zeros, gone, cache_reads }))
    }

    pub(super) fn is_there(&self) -> bool {
        !self.gone.load(Ordering::Acquire)
    }

    /// The blocks that differ from the base.
    pub(super) fn blocks(&self) -> BlockSet {
        let mut set = self.data.clone();
        set.union_with(&self.zeros);
        set
    }

    /// Where `block` is, and the first block after it that is elsewhere, at most `end`.
    pub(super) fn run(&self, block: u64, end: u64) -> (Place, u64) {
        let place = |block| {
            let one = BlockRange::new(block, 1);
            if self.data.intersects(one) {
                Place::Layer
            } else if self.zeros.intersects(one) {
                Place::Zero
            } else {
                Place::Base
            }
        };
        let first = place(block);
        let mut stop = block + 1;
        while stop < end && place(stop) == first {
            stop += 1;
        }
        (first, stop)
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let path = self.dir.join(CONTENT);
        self.file.read_exact_at(buf, offset).map_err(DiskError::io("read", &path))
    }

    /// Reads what is in the page cache; false if it is not.
    pub(super) fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, DiskError> {
        if self.cache_reads.load(Ordering::Relaxed) {
            match read_cached(&self.file, offset, buf) {
                Ok(Some(count)) if count == buf.len() => return Ok(true),
                Ok(_) => return Ok(false),
                Err(_) => self.cache_reads.store(false, Ordering::Relaxed),
            }
        }
        self.read(offset, buf).map(|()| true)
    }

    /// Takes the layer away, durably: the disk is over its base alone.
    pub(super) fn remove(&self) -> Result<(), DiskError> {
        if !self.is_there() {
            return Ok(());
        }
        for name in [MAP, CONTENT] {
            let path = self.dir.join(name);
            fs::remove_file(&path).map_err(DiskError::io("remove", &path))?;
        }
        let synced = File::open(&self.dir).and_then(|dir| dir.sync_all());
        synced.map_err(DiskError::io("sync", &self.dir))?;
        self.gone.store(true, Ordering::Release);
        Ok(())
    }
}
