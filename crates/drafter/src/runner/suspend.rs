//! Suspend to a directory, and resume from it on any host that can take the machine:
//!
//! ```text
//! DIR/suspended.json   what it is, its lease, BLAKE3 of every file here
//!     state            the driver's device state
//!     memory           sparse
//!     disk-NAME        sparse; only blocks that differ from the package's base are data…
//!     disk-NAME.map    …and this lists them
//! ```

use super::{
    Runner, State,
    disks::unless_full,
    hosted::{self, Content, Hosted},
    saved::{As, Claim},
};
use crate::{
    checkpoint::description::Description,
    migrate::{protocol::MAX_RUN, source::SourceMachine, switchover::FlipEpoch},
};
use serde::{Deserialize, Serialize};
use silo::{
    block::{BLOCK_SIZE, BlockRange, BlockSet, is_zero},
    device::Device,
    hash::hash_file,
};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

const FORMAT: &str = "drafter-suspended";
const VERSION: u32 = 2;
/// Version 1 knew machines with NBD disks only, and did not say so.
const OLDEST: u32 = 1;
const INDEX: &str = "suspended.json";
/// How long the disks may take to make durable what was answered at the pause.
const FLUSH_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Serialize, Deserialize)]
struct Suspended {
    format: String,
    version: u32,
    #[serde(flatten)]
    machine: Description,
    /// Blocks that a disk's file holds, as [start, count] pairs.
    disks: BTreeMap<String, Vec<(u64, u64)>>,
    blake3: BTreeMap<String, String>,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Writes the listed blocks of a device into a sparse file.
fn save_device(device: &dyn Device, blocks: &BlockSet, path: &Path) -> Result<(), String> {
    let what = |e: std::io::Error| format!("writing {}: {e}", path.display());
    let file = File::create_new(path).map_err(what)?;
    file.set_len(device.blocks() * BLOCK_SIZE as u64).map_err(what)?;
    let mut buffer = Vec::new();
    for range in blocks.ranges() {
        for piece in range.chunks(MAX_RUN) {
            buffer.resize(piece.bytes() as usize, 0);
            device.read(piece.start, &mut buffer).map_err(text)?;
            if !is_zero(&buffer) {
                file.write_all_at(&buffer, piece.start.offset()).map_err(what)?;
            }
        }
    }
    file.sync_all().map_err(what)
}

/// Puts the listed blocks of a file into a device that does not run yet.
fn load_device(device: &dyn Device, blocks: &[(u64, u64)], path: &Path) -> Result<(), String> {
    let what = |e: std::io::Error| format!("reading {}: {e}", path.display());
    let file = File::open(path).map_err(what)?;
    if file.metadata().map_err(what)?.len() != device.blocks() * BLOCK_SIZE as u64 {
        return Err(format!("{} has not the size of device \"{}\"", path.display(), device.name()));
    }
    let mut buffer = Vec::new();
    for (start, count) in blocks {
        let end = start.checked_add(*count).filter(|end| *end <= device.blocks());
        if end.is_none() {
            return Err(format!("{INDEX} lists blocks outside device \"{}\"", device.name()));
        }
        for piece in BlockRange::new(*start, *count).chunks(MAX_RUN) {
            buffer.resize(piece.bytes() as usize, 0);
            file.read_exact_at(&mut buffer, piece.start.offset()).map_err(what)?;
            if is_zero(&buffer) {
                device.store_zero(piece).map_err(text)?;
            } else {
                device.store(piece.start, &buffer).map_err(text)?;
            }
        }
    }
    Ok(())
}

fn pairs(set: &BlockSet) -> Vec<(u64, u64)> {
    set.ranges().map(|r| (r.start.0, r.count)).collect()
}

impl Runner {
    /// Saves the machine and ends it here.
    pub(super) fn suspend(self: &Arc<Self>, directory: &Path) -> Result<serde_json::Value, String> {
        fs::create_dir_all(directory).map_err(|e| format!("{}: {e}", directory.display()))?;
        let empty = fs::read_dir(directory).map_err(text)?.next().is_none();
        if !empty {
            return Err(format!("{} is not empty", directory.display()));
        }
        if self.protection().is_some() {
            return Err(
                "the machine is protected; end that first (`drafter protect NAME --end`)".into()
            );
        }
        let mut body = self.borrow(State::Running, State::Paused)?;
        let missing: u64 = body.content.devices().iter().map(|d| d.missing_blocks()).sum();
        if missing > 0 {
            self.give_back(body, State::Running, "");
            return Err(format!("{missing} blocks have not arrived here yet; try again later"));
        }
        let saved = self.save_to(&mut body, directory);
        match saved {
            Ok(()) => {
                body.tear_down();
                drop(body);
                // Whoever resumes it has its address.
                self.lock().net = None;
                self.set_state(State::Stopped, format!("suspended in {}", directory.display()));
                Ok(serde_json::json!({ "directory": directory }))
            }
            Err(why) => {
                let (epoch, flip) = {
                    let inner = self.lock();
                    let epoch = inner.holding.as_ref().map_or(0, |h| h.record.epoch.0);
                    (epoch, FlipEpoch::of(lease::Epoch(epoch), u16::MAX).0)
                };
                // The directory is useless without its index, which is written last.
                let _ = fs::remove_dir_all(directory);
                match body.go_on(epoch, flip) {
                    Ok(()) => {
                        self.give_back(body, State::Running, "");
                        Err(format!("{why}; the machine runs on"))
                    }
                    Err(cause) => {
                        let detail = format!("{why}; it could not go on: {cause}");
                        self.give_back(body, State::Paused, detail.clone());
                        Err(detail)
                    }
                }
            }
        }
    }

    fn save_to(&self, body: &mut Hosted, directory: &Path) -> Result<(), String> {
        let machine = self.describe(body)?;
        body.before_pause().map_err(text)?;
        body.pause(None, 0).map_err(text)?;
        let state = body.save().map_err(text)?;
        let deadline = Instant::now() + FLUSH_LIMIT;
        for disk in &body.content.disks {
            unless_full(disk, disk.wait_durable(deadline)).map_err(text)?;
        }
        fs::write(directory.join("state"), &state).map_err(text)?;
        let memory = &body.content.memory;
        save_device(&**memory, &memory.allocated().map_err(text)?, &directory.join("memory"))?;
        let mut disks = BTreeMap::new();
        let mut files = vec!["state".to_owned(), "memory".to_owned()];
        for disk in &body.content.disks {
            let file = format!("disk-{}", disk.name());
            let blocks = disk.allocated().map_err(text)?;
            save_device(&**disk, &blocks, &directory.join(&file))?;
            disks.insert(disk.name().as_str().to_owned(), pairs(&blocks));
            files.push(file);
        }
        let mut blake3 = BTreeMap::new();
        for file in files {
            let hash = hash_file(&directory.join(&file)).map_err(text)?;
            blake3.insert(file, hash.to_string());
        }
        let index = Suspended { format: FORMAT.into(), version: VERSION, machine, disks, blake3 };
        let json = serde_json::to_vec_pretty(&index).map_err(text)?;
        let part = directory.join("suspended.json.new");
        fs::write(&part, json).map_err(text)?;
        File::open(&part).and_then(|f| f.sync_all()).map_err(text)?;
        fs::rename(&part, directory.join(INDEX)).map_err(text)?;
        File::open(directory).and_then(|d| d.sync_all()).map_err(text)
    }

    /// Continues a machine that was suspended to `directory`.
    pub(super) fn resume_from(self: &Arc<Self>, directory: &Path) -> Result<(), String> {
        let path = directory.join(INDEX);
        let bytes = fs::read(&path).map_err(|e| {
            format!("{} is no suspended machine: {}: {e}", directory.display(), path.display())
        })?;
        let index: Suspended = serde_json::from_slice(&bytes)
            .map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
        if index.format != FORMAT || !(OLDEST..=VERSION).contains(&index.version) {
            return Err(format!(
                "{} is {} version {}; this version reads {FORMAT} versions {OLDEST} to {VERSION}",
                path.display(),
                index.format,
                index.version
            ));
        }
        for (file, expected) in &index.blake3 {
            if file.contains('/') {
                return Err(format!("{} names a file \"{file}\" outside", path.display()));
            }
            let found = hash_file(&directory.join(file)).map_err(text)?.to_string();
            if found != *expected {
                return Err(format!(
                    "{file} in {} has been changed or damaged",
                    directory.display()
                ));
            }
        }
        let (package, lease) = self.check_saved(&index.machine, &self.config.machine)?;
        let paths = self.site();
        let content: Content =
            hosted::new_content(&index.machine.shape, &package, &paths.disks, false)
                .map_err(text)?;
        for disk in &content.disks {
            let blocks = index.disks.get(disk.name().as_str()).map_or(&[][..], Vec::as_slice);
            load_device(&**disk, blocks, &directory.join(format!("disk-{}", disk.name())))?;
        }
        let memory = &content.memory;
        let whole = data_ranges(&directory.join("memory"), memory.blocks())?;
        load_device(&**memory, &whole, &directory.join("memory"))?;
        let state = fs::read(directory.join("state")).map_err(text)?;

        // From the claim on no other host resumes the same directory.
        let itself = As::Itself(Claim::Suspended(&lease));
        self.start_saved(index.machine, package, content, &state, itself, None)
    }
}

/// The ranges of a sparse file that hold data.
fn data_ranges(path: &Path, blocks: u64) -> Result<Vec<(u64, u64)>, String> {
    use nix::unistd::{Whence, lseek64};
    let what = |e: &dyn std::fmt::Display| format!("reading {}: {e}", path.display());
    let file = File::open(path).map_err(|e| what(&e))?;
    let end = (blocks * BLOCK_SIZE as u64) as i64;
    let mut set = BlockSet::new(blocks);
    let mut at = 0;
    while at < end {
        let data = match lseek64(&file, at, Whence::SeekData) {
            Ok(data) => data,
            Err(nix::errno::Errno::ENXIO) => break,
            Err(error) => return Err(what(&error)),
        };
        let hole = lseek64(&file, data, Whence::SeekHole).map_err(|e| what(&e))?;
        let first = data as u64 / BLOCK_SIZE as u64;
        set.insert_range(BlockRange::new(first, (hole as u64).div_ceil(BLOCK_SIZE as u64) - first));
        at = hole;
    }
    Ok(pairs(&set))
}
