//! Tests of the disk as a whole.

mod below;
mod crash;
mod flush;
mod moving;
mod waiting;

use super::{BootId, Disk, DiskError, DiskOptions};
use crate::{block::BLOCK_SIZE, device::DeviceName};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const BLOCK: u64 = BLOCK_SIZE as u64;

/// A folder with a base and a disk over it, and a host that can be made to crash.
struct Rig {
    dir: tempfile::TempDir,
    boots: u32,
    base: Vec<u8>,
}

/// Bytes that tell where they are from and are never zero.
fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % 255) as u8 + 1
        })
        .collect()
}

impl Rig {
    /// A base of `bytes` bytes.
    fn new(bytes: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = pattern(77, bytes);
        fs::write(dir.path().join("base"), &base).unwrap();
        Self { dir, boots: 0, base }
    }

    fn base(&self) -> PathBuf {
        self.dir.path().join("base")
    }

    fn overlay(&self) -> PathBuf {
        self.dir.path().join("overlay")
    }

    fn options(&self) -> DiskOptions {
        let mut options = DiskOptions::new(DeviceName::new("root").unwrap());
        options.boot = Some(BootId::new(&format!("boot {}", self.boots)));
        // A test that is wrong ends.
        options.arrival_limit = Duration::from_secs(30);
        options
    }

    /// A disk of `blocks` blocks, and its content.
    fn create(&self, blocks: u64) -> (Disk, Vec<u8>) {
        let bytes = blocks * BLOCK;
        let disk =
            Disk::create(&self.overlay(), Some(&self.base()), bytes, &self.options()).unwrap();
        let mut content = self.base.clone();
        content.resize(bytes as usize, 0);
        (disk, content)
    }

    fn open(&self) -> Result<Disk, DiskError> {
        Disk::open(&self.overlay(), Some(&self.base()), &self.options())
    }

    fn open_incomplete(&self) -> Disk {
        let options = DiskOptions { accept_incomplete: true, ..self.options() };
        Disk::open(&self.overlay(), Some(&self.base()), &options).unwrap()
    }

    /// The next open finds a host that has booted since.
    fn crash_host(&mut self) {
        self.boots += 1;
    }
}

fn content_of(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

fn read(disk: &Disk, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; length];
    disk.read_at(offset, &mut bytes).unwrap();
    bytes
}

/// Waits until `done`, but not for ever.
fn until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn copy_disk(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_new_disk_reads_as_its_base_and_zeros_behind_it() {
    let rig = Rig::new(2 * BLOCK_SIZE + 100);
    let (disk, content) = rig.create(5);
    assert_eq!(content_of(&disk), content);
    assert_eq!(disk.allocated_bytes().unwrap(), 0);
    drop(disk);
    let blank = rig.dir.path().join("blank");
    let disk = Disk::create(&blank, None, 5000, &rig.options()).unwrap();
    assert_eq!(content_of(&disk), vec![0; 8192]);
}

#[test]
fn a_disk_that_cannot_be_opened_or_made_says_why() {
    let rig = Rig::new(3 * BLOCK_SIZE);
    assert!(matches!(rig.open(), Err(DiskError::NotADisk { .. })));
    let create = |bytes| Disk::create(&rig.overlay(), Some(&rig.base()), bytes, &rig.options());
    assert!(matches!(create(100), Err(DiskError::Size { .. })));
    assert!(matches!(create(u64::MAX), Err(DiskError::Size { .. })));
    let none = Disk::create(&rig.overlay(), None, 0, &rig.options());
    assert!(matches!(none, Err(DiskError::Size { .. })));

    let (disk, _) = rig.create(3);
    assert!(matches!(rig.open(), Err(DiskError::InUse { .. })));
    drop(disk);
    assert!(matches!(create(0), Err(DiskError::Exists { .. })));

    fs::write(rig.base(), b"another base").unwrap();
    let error = rig.open().unwrap_err();
    assert!(matches!(error, DiskError::WrongBase { .. }), "{error}");
    fs::write(rig.base(), &rig.base).unwrap();
    let disk = rig.open().unwrap();
    let hash = |text: &[u8]| Some(crate::hash::hash_reader(text).unwrap());
    let identity = super::Identity { machine: "m".to_owned(), epoch: 1, base: hash(b"one") };
    disk.set_identity(&identity).unwrap();
    drop(disk);
    for (base_hash, fits) in [(hash(b"one"), true), (hash(b"two"), false), (None, true)] {
        let options = DiskOptions { base_hash, ..rig.options() };
        let opened = Disk::open(&rig.overlay(), Some(&rig.base()), &options);
        assert_eq!(opened.is_ok(), fits);
    }

    let data = fs::OpenOptions::new().write(true).open(rig.overlay().join("data")).unwrap();
    data.set_len(BLOCK).unwrap();
    assert!(matches!(rig.open(), Err(DiskError::Corrupt { .. })));
}

#[test]
fn accesses_past_the_end_are_refused_and_change_nothing() {
    let rig = Rig::new(2 * BLOCK_SIZE);
    let (disk, content) = rig.create(2);
    let size = disk.size();
    for (offset, length) in [(size, 1), (size - 1, 2), (u64::MAX, 2), (u64::MAX - 1, 1)] {
        let mut buf = vec![0; length as usize];
        assert!(matches!(disk.read_at(offset, &mut buf), Err(DiskError::OutOfRange { .. })));
        assert!(matches!(disk.write_at(offset, &buf), Err(DiskError::OutOfRange { .. })));
        assert!(matches!(disk.trim(offset, length), Err(DiskError::OutOfRange { .. })));
        assert!(matches!(disk.zero(offset, length, true), Err(DiskError::OutOfRange { .. })));
    }
    disk.write_at(size, &[]).unwrap();
    assert_eq!(content_of(&disk), content);
}

#[test]
fn trimmed_blocks_give_their_space_back() {
    let rig = Rig::new(64 * BLOCK_SIZE);
    let (disk, _) = rig.create(64);
    disk.write_at(0, &pattern(1, 64 * BLOCK_SIZE)).unwrap();
    disk.sync().unwrap();
    let full = disk.allocated_bytes().unwrap();
    disk.trim(0, 60 * BLOCK).unwrap();
    disk.sync().unwrap();
    let left = disk.allocated_bytes().unwrap();
    assert!(full >= 64 * BLOCK && left <= 8 * BLOCK, "{full} {left}");
    assert_eq!(read(&disk, 0, 60 * BLOCK_SIZE), vec![0; 60 * BLOCK_SIZE]);
}
