//! Devices, stores and rounds for the tests.

use object_store::memory::InMemory;
use silo_block::io::BlockDevice;
use silo_store::{
    Access, CopyGroup, Environment, Generation, KeyRing, Limits, LineName, LineWriter,
    RestoreOptions, ScratchOptions, Store, StoreError, StoreUrl, Stored, Which, WriterOptions,
    capture::{Capture, Want},
};
use silo_testing::S3Server;
use std::{
    io,
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

/// A disk in memory.
pub(crate) struct Disk(pub(crate) RwLock<Vec<u8>>);

impl Disk {
    pub(crate) fn new(content: Vec<u8>) -> Arc<Self> {
        Arc::new(Self(RwLock::new(content)))
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.0.read().unwrap().clone()
    }
}

impl BlockDevice for Disk {
    fn size(&self) -> u64 {
        self.0.read().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let content = self.0.read().unwrap();
        buf.copy_from_slice(&content[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write().unwrap()[offset as usize..offset as usize + data.len()]
            .copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.0.write().unwrap()[offset as usize..(offset + length) as usize].fill(0);
        Ok(())
    }
}

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Short waits: a test's store answers at once, or is meant not to.
pub(crate) fn limits() -> Limits {
    Limits {
        request: Duration::from_secs(5),
        slowest: 1 << 20,
        attempts: 3,
        pause: Duration::from_millis(5),
    }
}

pub(crate) fn ring() -> KeyRing {
    KeyRing::from_keys([("key-1", [1; 32])]).unwrap()
}

pub(crate) fn line(name: &str) -> LineName {
    LineName::new("acme", name).unwrap()
}

pub(crate) fn over(backend: Arc<dyn object_store::ObjectStore>) -> Arc<Store> {
    Store::with_backend(backend, "folder", "a store in memory", Access::Write, limits()).unwrap()
}

pub(crate) fn in_memory() -> (Arc<InMemory>, Arc<Store>) {
    let backend = Arc::new(InMemory::new());
    (backend.clone(), over(backend))
}

pub(crate) fn s3(server: &S3Server, limits: Limits) -> Arc<Store> {
    let url: StoreUrl = server.url("folder").parse().unwrap();
    Store::open(&url, Access::Write, &Environment::given(server.credentials()), limits).unwrap()
}

pub(crate) fn server() -> S3Server {
    S3Server::start(&std::env::temp_dir()).unwrap()
}

pub(crate) fn writer(store: &Arc<Store>, name: &str) -> LineWriter {
    LineWriter::open(store.clone(), &ring(), &line(name), WriterOptions::default()).unwrap()
}

pub(crate) fn group(disks: &[(&str, u32, &Arc<Disk>)]) -> Arc<CopyGroup> {
    let devices = disks
        .iter()
        .map(|(name, block, disk)| {
            ((*name).to_owned(), *block, Arc::<Disk>::clone(disk) as Arc<dyn BlockDevice>)
        })
        .collect();
    CopyGroup::new(devices, ScratchOptions::in_folder(&std::env::temp_dir())).unwrap()
}

/// One round, as the engine makes it.
pub(crate) fn round(
    writer: &mut LineWriter,
    group: &Arc<CopyGroup>,
    want: Want,
) -> Result<Stored, StoreError> {
    let want = if writer.needs_everything() { Want::Everything } else { want };
    let frozen = group.freeze(want)?;
    let everything = want == Want::Everything;
    let stop = AtomicBool::new(false);
    let result = writer.store(&group.devices(), frozen.as_ref(), everything, "test", &stop);
    match result {
        Ok(_) => frozen.release(),
        Err(_) => frozen.put_back(),
    }
    result
}

pub(crate) fn generation(
    store: &Arc<Store>,
    name: &str,
    which: Which,
) -> Result<Arc<Generation>, StoreError> {
    Generation::open(store, &ring(), &line(name), which, 8 << 20)
}

/// A device of a generation, restored as a whole over something else.
pub(crate) fn restored(generation: &Generation, device: &str) -> Result<Vec<u8>, StoreError> {
    let size = generation.devices()[generation.find(device)?].geometry.bytes();
    let target = Disk::new(vec![0xee; size as usize]);
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let restored =
        generation.restore(device, target.as_ref(), RestoreOptions::default(), &done, &stop)?;
    assert_eq!(restored.bytes, size);
    assert_eq!(done.into_inner(), size, "every byte is counted once");
    Ok(target.content())
}

/// The newest content of a line's device.
pub(crate) fn newest(store: &Arc<Store>, name: &str, device: &str) -> Result<Vec<u8>, StoreError> {
    restored(generation(store, name, Which::Newest)?.as_ref(), device)
}
