//! What a history in a store has of this machine as it is now, for whoever decides whether the machine
//! moves or sleeps.
//!
//! Each block is compared, by its name, with the block at the same place in the newest generation: of the
//! store come that generation's map and the lists of names of its packs, never content, and nothing is
//! written. The machine notices nothing but the processor's time.
//!
//! What is told is a lower bound of what a destination can bring from there, or of what a sleep in that
//! history finds stored, so that the cost of either is told high:
//! - what was not reached within the limit does not count, nor what has not arrived here yet;
//! - it is of now, and the guest writes on: whoever plans reckons with what it writes;
//! - content that the generation has at another place does not count, although a sleep finds it;
//! - of a sleep, nor does what is more than a writer keeps the names of, or what it stores a second time,
//!   because it will be touched first and is to lie together.
//!
//! (A change of the tenant's data key in between makes a sleep store everything anew; that is not seen.)

use super::{api::BackupRequest, backup::Target};
use crate::checkpoint::{MEMORY, disk_device, overlay_device};
use serde::{Deserialize, Serialize};
use silo::{
    block::{BLOCK_SIZE, BlockIndex, is_zero},
    device::Device,
    store::{Generation, Limits, WriterOptions},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Memory for the lists of names.
const CACHE: usize = 64 << 20;
/// Blocks read at a time.
const LOOK: u64 = 256;
/// The least that a request to the store may take.
const LEAST_REQUEST: Duration = Duration::from_secs(1);
/// How often a request to the store is tried.
const ATTEMPTS: u32 = 2;
/// Bytes of a writer's memory for each name that it is sure not to forget while it stores.
const NAME: usize = 128;

/// A history to compare a machine with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CompareRequest {
    /// Which. [`BackupRequest::every_ms`], [`BackupRequest::keep`] and [`BackupRequest::label`] say
    /// nothing.
    pub history: BackupRequest,
    /// How long the comparison may take, milliseconds; what was not reached then counts as new.
    pub limit_ms: u64,
    /// The machine may sleep in it: what a sleep stores a second time does not count.
    pub sleeps: bool,
}

/// What a history has of a machine as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldReport {
    /// The history, `tenant/line`.
    pub line: String,
    /// The generation that the machine was compared with, if there is one.
    pub generation: Option<u64>,
    /// Blocks with the content that they have there, bytes, without zeros: at least so much need not be
    /// stored again.
    pub known_bytes: u64,
    /// Blocks of zeros that were found among those that the machine has, bytes.
    pub zero_bytes: u64,
    /// All of it was compared that could be there.
    pub whole: bool,
    /// Why the store could not be asked, or not to the end.
    pub error: Option<String>,
}

impl HeldReport {
    /// Of a comparison whose thread ended.
    pub(super) fn panicked() -> Self {
        Self { error: Some("the comparison panicked".into()), ..Self::default() }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Compares the devices of a machine with what a history has; a sleep stores `twice` blocks again although
/// they are there.
pub(super) fn held(
    request: &CompareRequest,
    devices: &[Arc<dyn Device>],
    twice: u64,
) -> HeldReport {
    let limit = Duration::from_millis(request.limit_ms);
    let deadline = Instant::now() + limit;
    let line = request.history.line.clone();
    let mut report = HeldReport { line, whole: true, ..HeldReport::default() };
    let limits = Limits {
        request: Limits::default().request.min(limit.max(LEAST_REQUEST)),
        attempts: ATTEMPTS,
        ..Limits::default()
    };
    let compared = Target::of(&request.history)
        .and_then(|target| target.newest(&request.history, limits, CACHE))
        .and_then(|generation| match generation {
            Some(generation) => compare(&generation, devices, deadline, &mut report),
            None => Ok(()),
        });
    report.error = compared.err();
    report.whole &= report.error.is_none();
    if request.sleeps {
        let names = (WriterOptions::default().names / NAME) as u64;
        report.known_bytes = report
            .known_bytes
            .min(names.saturating_mul(BLOCK_SIZE as u64))
            .saturating_sub(twice.saturating_mul(BLOCK_SIZE as u64));
    }
    report
}

/// The place of a device in a generation, if it is there in blocks like ours.
fn place(generation: &Generation, device: &dyn Device) -> Option<(usize, u64)> {
    let name = device.name().as_str();
    let names = match name {
        MEMORY => vec![MEMORY.to_owned()],
        disk => vec![overlay_device(disk), disk_device(disk)],
    };
    let at = names.iter().find_map(|name| generation.find(name).ok())?;
    let geometry = generation.devices().get(at)?.geometry;
    (geometry.block() as usize == BLOCK_SIZE).then_some((at, geometry.blocks()))
}

/// Adds what is found to `report`, also of a comparison that fails on the way.
fn compare(
    generation: &Generation,
    devices: &[Arc<dyn Device>],
    deadline: Instant,
    report: &mut HeldReport,
) -> Result<(), String> {
    report.generation = Some(generation.number());
    let mut content = Vec::new();
    for device in devices {
        let Some((at, blocks)) =
            place(generation, &**device).filter(|_| device.missing_blocks() == 0)
        else {
            report.whole = false;
            continue;
        };
        for range in device.allocated().map_err(text)?.ranges() {
            for piece in range.chunks(LOOK) {
                if Instant::now() >= deadline {
                    report.whole = false;
                    return Ok(());
                }
                content.resize(piece.bytes() as usize, 0);
                device.read(piece.start, &mut content).map_err(text)?;
                for (block, number) in content.chunks(BLOCK_SIZE).zip(piece.start.0..) {
                    if is_zero(block) {
                        report.zero_bytes += BLOCK_SIZE as u64;
                        continue;
                    }
                    if number >= blocks {
                        continue;
                    }
                    let named = generation.block_name(at, BlockIndex(number)).map_err(text)?;
                    if named.is_some_and(|(key, name)| generation.name(key, block) == Some(name)) {
                        report.known_bytes += BLOCK_SIZE as u64;
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::api::Secret;
    use silo::{
        block::{BlockRange, BlockSet},
        device::DeviceName,
        geometry::Geometry,
        memory::Memory,
        store::{
            KeyRing,
            capture::{DeviceInfo, Frozen},
        },
    };
    use std::{io, path::Path, sync::atomic::AtomicBool};

    const BLOCKS: u64 = 64;
    const BLOCK: u64 = BLOCK_SIZE as u64;

    /// All of a memory, as it is.
    struct All(Arc<Memory>, BlockSet);

    impl Frozen for All {
        fn changed(&self, _: usize) -> &BlockSet {
            &self.1
        }

        fn read(&self, _: usize, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
            self.0.read(range.start, buf).map_err(io::Error::other)
        }

        fn held(&self) -> Duration {
            Duration::ZERO
        }

        fn release(self: Box<Self>) {}

        fn put_back(self: Box<Self>) {}
    }

    fn request(folder: &Path, keys: &str, limit_ms: u64) -> CompareRequest {
        let history = BackupRequest {
            store: format!("file://{}", folder.join("store").display()),
            line: "machines/redis.suspended".into(),
            keys: Secret(keys.into()),
            keys_from: "a test".into(),
            environment: Vec::new(),
            every_ms: None,
            label: String::new(),
            keep: None,
        };
        CompareRequest { history, limit_ms, sleeps: true }
    }

    fn put(memory: &Memory, block: u64, content: u8) {
        memory.store(BlockIndex(block), &[content; BLOCK_SIZE]).unwrap();
    }

    #[test]
    fn what_the_newest_generation_has_at_the_same_place_is_known_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let keys = KeyRing::generate_line("test").unwrap();
        let memory =
            Arc::new(Memory::new(DeviceName::new(MEMORY).unwrap(), BLOCKS * BLOCK).unwrap());
        (0..32).for_each(|block| put(&memory, block, block as u8 + 1));
        let devices: Vec<Arc<dyn Device>> = vec![memory.clone()];
        let look_at = |keys: &str, limit_ms, twice| {
            held(&request(folder.path(), keys, limit_ms), &devices, twice)
        };
        let look = |keys: &str, limit_ms| look_at(keys, limit_ms, 0);

        // A history that there is not yet has nothing, which is no error.
        let line = "machines/redis.suspended".to_owned();
        let none = HeldReport { line, whole: true, ..HeldReport::default() };
        assert_eq!(look(&keys, 10_000), none);

        let request = request(folder.path(), &keys, 10_000);
        let target = Target::of(&request.history).unwrap();
        let mut writer = target.open(&request.history, WriterOptions::default()).unwrap();
        let geometry = Geometry::new(BLOCKS * BLOCK, BLOCK_SIZE as u32).unwrap();
        let infos = [DeviceInfo { name: MEMORY.into(), geometry }];
        let frozen = All(memory.clone(), BlockSet::full(BLOCKS));
        let stored = writer.store(&infos, &frozen, true, "", &AtomicBool::new(false)).unwrap();
        let all = look(&keys, 10_000);
        assert_eq!((all.known_bytes, all.whole, &all.error), (32 * BLOCK, true, &None));
        assert_eq!(all.generation, Some(stored.number));

        // What is stored a second time is taken off, and never more than there is.
        assert_eq!(look_at(&keys, 10_000, 5).known_bytes, 27 * BLOCK);
        assert_eq!(look_at(&keys, 10_000, u64::MAX).known_bytes, 0);
        // (Whoever brings it has all of it.)
        let brings =
            CompareRequest { sleeps: false, ..self::request(folder.path(), &keys, 10_000) };
        assert_eq!(held(&brings, &devices, u64::MAX).known_bytes, 32 * BLOCK);

        // Four are written, one of them to what another is there; two are new, one of them zeros.
        (0..3).for_each(|block| put(&memory, block, 200));
        put(&memory, 3, 32);
        put(&memory, 50, 201);
        put(&memory, 51, 0);
        let after = look(&keys, 10_000);
        assert_eq!((after.known_bytes, after.zero_bytes), (28 * BLOCK, BLOCK), "{after:?}");

        // No time: nothing is known, and that is said.
        let hasty = look(&keys, 0);
        assert_eq!((hasty.known_bytes, hasty.whole), (0, false), "{hasty:?}");
        let other = KeyRing::generate_line("other").unwrap();
        let locked = look(&other, 10_000);
        assert_eq!(locked.known_bytes, 0);
        assert!(locked.error.is_some(), "{locked:?}");
    }
}
