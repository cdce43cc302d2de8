//! Mapped memories and the disks beside them as one device group that is backed up: one barrier, at
//! which the writer is paused, the last written pages are copied, and the disks freeze.
//!
//! Called by the backup engine of [`store`](crate::store). What must hold: all devices of a round are
//! of one instant, and the writer is paused for no more than the last set of pages (at most 8 MiB
//! unless the options say otherwise) and the freeze of the disks, which takes constant time.

use crate::{
    block::{BlockRange, BlockSet},
    geometry::Geometry,
    layer::fullest,
    mapped::staging::{self, Pauser, Staged, Staging, StagingError},
    store::capture::{Capture, CaptureError, Changes, DeviceInfo, Frozen, Want},
    times::{Histogram, Times},
};
use std::{io, sync::Arc, time::Duration};

/// Memories of one writer, and the disks that it writes to.
pub struct MappedGroup {
    memories: Vec<(DeviceInfo, Arc<Staging>)>,
    disks: Box<dyn Capture>,
    pauser: Box<dyn Pauser + Send + Sync>,
    holds: Times,
}

impl MappedGroup {
    /// `memories` with their names; `disks` freeze in their own way, in constant time; `pauser` stops
    /// whoever writes to all of them.
    #[must_use]
    pub fn new(
        memories: Vec<(String, Staging)>,
        disks: Box<dyn Capture>,
        pauser: Box<dyn Pauser + Send + Sync>,
    ) -> Self {
        let info = |(name, staging): (String, Staging)| {
            let bytes = staging.blocks() * crate::block::BLOCK_SIZE as u64;
            let geometry = Geometry::new(bytes, crate::block::BLOCK_SIZE as u32)
                .expect("a memory that can be mapped has fewer than 2^32 pages");
            (DeviceInfo { name, geometry }, Arc::new(staging))
        };
        let memories = memories.into_iter().map(info).collect();
        Self { memories, disks, pauser, holds: Times::default() }
    }

    fn error(&self, error: StagingError) -> CaptureError {
        match error {
            StagingError::Frozen => CaptureError::Frozen,
            other => {
                let names: Vec<_> =
                    self.memories.iter().map(|(info, _)| info.name.as_str()).collect();
                CaptureError::Device {
                    device: names.join(", "),
                    operation: "stage memory",
                    source: io::Error::other(other),
                }
            }
        }
    }
}

impl Capture for MappedGroup {
    fn devices(&self) -> Vec<DeviceInfo> {
        let memories = self.memories.iter().map(|(info, _)| info.clone());
        memories.chain(self.disks.devices()).collect()
    }

    fn changes(&self, group_shift: u32) -> Changes {
        let mut changes = self.disks.changes(group_shift);
        for (info, staging) in &self.memories {
            // If the kernel cannot tell, a round is due: it says what is wrong.
            let all = || BlockSet::full(info.geometry.blocks());
            let set = staging.changed().unwrap_or_else(|_| all());
            changes.blocks += set.len();
            changes.fullest = changes.fullest.max(fullest(&set, group_shift.min(63)));
        }
        changes
    }

    fn freeze(&self, want: Want) -> Result<Box<dyn Frozen>, CaptureError> {
        let memories: Vec<&Staging> = self.memories.iter().map(|(_, one)| &**one).collect();
        if want == Want::Everything {
            memories.iter().for_each(|memory| memory.forget());
        }
        let (mut disks, mut refused) = (None, None);
        let frozen = staging::freeze_with(&memories, &*self.pauser, &mut || {
            match self.disks.freeze(want) {
                Ok(frozen) => disks = Some(frozen),
                Err(error) => {
                    let text = error.to_string();
                    refused = Some(error);
                    return Err(io::Error::other(text));
                }
            }
            Ok(())
        });
        let (staged, held) = match (frozen, refused) {
            (Ok(frozen), _) => frozen,
            (Err(_), Some(refused)) => return Err(refused),
            (Err(error), None) => return Err(self.error(error)),
        };
        let memories = staged.into_iter().map(|staged| (staged.changed(), staged)).collect();
        let disks = disks.expect("a freeze that worked has frozen the disks");
        self.holds.add(held);
        Ok(Box::new(FrozenGroup { memories, disks, held }))
    }

    /// Pauses of the writer: the disks freeze within.
    fn holds(&self) -> Histogram {
        self.holds.read()
    }
}

struct FrozenGroup {
    memories: Vec<(BlockSet, Staged)>,
    disks: Box<dyn Frozen>,
    held: Duration,
}

impl Frozen for FrozenGroup {
    fn changed(&self, device: usize) -> &BlockSet {
        match self.memories.get(device) {
            Some((changed, _)) => changed,
            None => self.disks.changed(device - self.memories.len()),
        }
    }

    fn read(&self, device: usize, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        match self.memories.get(device) {
            Some((_, staged)) => staged.read(range, buf),
            None => self.disks.read(device - self.memories.len(), range, buf),
        }
    }

    fn held(&self) -> Duration {
        self.held.max(self.disks.held())
    }

    fn release(self: Box<Self>) {
        self.memories.into_iter().for_each(|(_, staged)| staged.release());
        self.disks.release();
    }

    fn put_back(self: Box<Self>) {
        // Memories put themselves back when they are dropped.
        self.disks.put_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        io::BlockDevice,
        mapped::{
            mount::{Mount, Options},
            staging::StagingOptions,
        },
        source::MemoryDevice,
        store::{CopyGroup, ScratchOptions},
    };
    use std::sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    };

    /// Whether the writer is paused; it holds the lock while it writes one number to both devices.
    #[derive(Clone, Default)]
    struct Gate(Arc<Mutex<bool>>);

    impl Pauser for Gate {
        fn pause(&self) -> io::Result<()> {
            *self.0.lock().unwrap() = true;
            Ok(())
        }

        fn resume(&self) -> io::Result<()> {
            *self.0.lock().unwrap() = false;
            Ok(())
        }
    }

    fn word(frozen: &dyn Frozen, device: usize, before: u64) -> u64 {
        let mut block = vec![0; 4096];
        let first = BlockRange::new(0, 1);
        if !frozen.changed(device).contains(first.start) {
            return before;
        }
        frozen.read(device, first, &mut block).unwrap();
        u64::from_le_bytes(block[..8].try_into().unwrap())
    }

    #[test]
    fn memory_and_disk_of_a_round_are_of_one_instant_and_a_failed_round_is_listed_again() {
        const BYTES: u64 = 1 << 20;
        let backend = Arc::new(MemoryDevice::new("test", BYTES).unwrap());
        let name = crate::device::DeviceName::new("memory").unwrap();
        let mount = Arc::new(Mount::managed(backend, Options::new(name)).unwrap());
        assert!(mount.wait_complete(Duration::from_secs(20)));
        let staging = Staging::new(mount.clone(), StagingOptions::default()).unwrap();

        let disk: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new("test", BYTES).unwrap());
        let devices = vec![("disk".to_owned(), 4096, disk)];
        let scratch = tempfile::tempdir().unwrap();
        let group = CopyGroup::new(devices, ScratchOptions::in_folder(scratch.path())).unwrap();
        let served = group.device(0);

        let gate = Gate::default();
        let memories = vec![("memory".to_owned(), staging)];
        let mapped = MappedGroup::new(memories, Box::new(group.clone()), Box::new(gate.clone()));
        assert_eq!(mapped.devices().len(), 2);

        let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut number = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let paused = gate.0.lock().unwrap();
                    if *paused {
                        drop(paused);
                        std::thread::yield_now();
                        continue;
                    }
                    number += 1;
                    mount.write_at(0, &number.to_le_bytes()).unwrap();
                    served.write_at(0, &number.to_le_bytes()).unwrap();
                    written.store(number, Ordering::Release);
                }
            });
            let (mut memory, mut on_disk, mut last) = (0, 0, 0);
            for round in 0..20 {
                while written.load(Ordering::Acquire) <= last {
                    std::thread::yield_now();
                }
                let frozen = mapped.freeze(Want::Changed).unwrap();
                assert!(matches!(mapped.freeze(Want::Changed), Err(CaptureError::Frozen)));
                let now = (word(&*frozen, 0, memory), word(&*frozen, 1, on_disk));
                assert_eq!(now.0, now.1, "round {round}");
                assert!(now.0 > last, "round {round} has what was written before it");
                last = now.0;
                if round % 3 == 1 {
                    frozen.put_back();
                } else {
                    (memory, on_disk) = now;
                    frozen.release();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        mount.close().unwrap();
    }
}
