//! Content against a model, through deaths of the process and crashes of the host.

use super::*;
use proptest::prelude::*;
use std::os::unix::fs::FileExt;

const BLOCKS: u64 = 24;
const BASE_BYTES: usize = 14 * BLOCK_SIZE + 777;

#[derive(Clone, Debug)]
enum Op {
    Write {
        offset: u64,
        length: u64,
        seed: u64,
    },
    Trim {
        offset: u64,
        length: u64,
    },
    Zero {
        offset: u64,
        length: u64,
        allocate: bool,
    },
    Read {
        offset: u64,
        length: u64,
    },
    Flush,
    /// `kill -9`: files as they are, same boot.
    Kill,
    /// The host crashes: every block of the overlay is at some point since the last flush.
    Crash {
        choice: u64,
    },
    /// The host crashes inside a flush: content is durable, a prefix of the record is.
    CrashInFlush {
        part: u64,
    },
}

fn access() -> impl Strategy<Value = (u64, u64)> {
    let size = BLOCKS * BLOCK;
    // Half of the accesses are whole blocks.
    prop_oneof![
        (0..BLOCKS, 1u64..6)
            .prop_map(move |(start, count)| { (start * BLOCK, count.min(BLOCKS - start) * BLOCK) }),
        (0..size, 1u64..12_000).prop_map(move |(at, length)| (at, length.min(size - at))),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (access(), any::<u64>())
            .prop_map(|((offset, length), seed)| Op::Write { offset, length, seed }),
        2 => access().prop_map(|(offset, length)| Op::Trim { offset, length }),
        2 => (access(), any::<bool>())
            .prop_map(|((offset, length), allocate)| Op::Zero { offset, length, allocate }),
        2 => access().prop_map(|(offset, length)| Op::Read { offset, length }),
        3 => Just(Op::Flush),
        1 => Just(Op::Kill),
        1 => any::<u64>().prop_map(|choice| Op::Crash { choice }),
        1 => any::<u64>().prop_map(|part| Op::CrashInFlush { part }),
    ]
}

/// What the disk must hold, and what it may hold after a crash.
struct Model {
    now: Vec<u8>,
    /// Per block: its content at the last flush, and everything it held since.
    since_flush: Vec<Vec<Vec<u8>>>,
}

impl Model {
    fn new(now: Vec<u8>) -> Self {
        let mut model = Self { now, since_flush: Vec::new() };
        model.flushed();
        model
    }

    fn block(&self, index: u64) -> Vec<u8> {
        self.now[(index * BLOCK) as usize..((index + 1) * BLOCK) as usize].to_vec()
    }

    fn flushed(&mut self) {
        self.since_flush = (0..BLOCKS).map(|index| vec![self.block(index)]).collect();
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        self.now[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        for index in offset / BLOCK..(offset + data.len() as u64).div_ceil(BLOCK) {
            let block = self.block(index);
            self.since_flush[index as usize].push(block);
        }
    }

    /// After a crash: what is there must be allowed, and is the truth from now on.
    fn crashed(&mut self, found: Vec<u8>) -> Result<(), TestCaseError> {
        for index in 0..BLOCKS {
            let block = &found[(index * BLOCK) as usize..((index + 1) * BLOCK) as usize];
            let allowed = &self.since_flush[index as usize];
            prop_assert!(
                allowed.iter().any(|version| version == block),
                "block {index} holds none of {} allowed versions; starts with {:?}",
                allowed.len(),
                &block[..8]
            );
        }
        self.now = found;
        Ok(())
    }
}

/// Copies of the overlay's content, one per operation since the last flush.
struct History {
    copies: Vec<Vec<u8>>,
}

impl History {
    fn note(&mut self, rig: &Rig) {
        self.copies.push(fs::read(rig.overlay().join("data")).unwrap());
    }

    fn flushed(&mut self, rig: &Rig) {
        self.copies.clear();
        self.note(rig);
    }

    /// Puts every block back to one of its copies.
    fn scramble(&self, rig: &Rig, mut choice: u64) {
        let path = rig.overlay().join("data");
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        for index in 0..BLOCKS {
            choice = choice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            let copy = &self.copies[(choice >> 33) as usize % self.copies.len()];
            let range = (index * BLOCK) as usize..((index + 1) * BLOCK) as usize;
            file.write_all_at(&copy[range], index * BLOCK).unwrap();
        }
    }
}

fn run(ops: Vec<Op>) -> Result<(), TestCaseError> {
    let mut rig = Rig::new(BASE_BYTES);
    let (mut disk, content) = rig.create(BLOCKS);
    let mut model = Model::new(content);
    let mut history = History { copies: Vec::new() };
    history.note(&rig);
    for op in ops {
        match op {
            Op::Write { offset, length, seed } => {
                let data = pattern(seed, length as usize);
                disk.write_at(offset, &data).unwrap();
                model.put(offset, &data);
            }
            Op::Trim { offset, length } => {
                disk.trim(offset, length).unwrap();
                let start = offset.next_multiple_of(BLOCK);
                let end = (offset + length) / BLOCK * BLOCK;
                if start < end {
                    model.put(start, &vec![0; (end - start) as usize]);
                }
            }
            Op::Zero { offset, length, allocate } => {
                disk.zero(offset, length, allocate).unwrap();
                model.put(offset, &vec![0; length as usize]);
            }
            Op::Read { offset, length } => {
                let expected = &model.now[offset as usize..(offset + length) as usize];
                prop_assert!(read(&disk, offset, length as usize) == expected);
            }
            Op::Flush => {
                disk.flush().unwrap();
                model.flushed();
                history.flushed(&rig);
                continue;
            }
            Op::Kill => {
                drop(disk);
                disk = rig.open().unwrap();
                prop_assert!(content_of(&disk) == model.now, "after kill -9");
            }
            Op::Crash { choice } => {
                drop(disk);
                history.scramble(&rig, choice);
                rig.crash_host();
                disk = rig.open().unwrap();
                model.crashed(content_of(&disk))?;
                // What the crash left is the start of what the next one may leave.
                disk.sync().unwrap();
                model.flushed();
                history.flushed(&rig);
                continue;
            }
            Op::CrashInFlush { part } => {
                let path = rig.overlay().join("journal");
                let before = fs::read(&path).unwrap();
                disk.flush().unwrap();
                drop(disk);
                let after = fs::read(&path).unwrap();
                prop_assert!(after.starts_with(&before), "small journals are appended to");
                let torn = before.len() + (part % (after.len() - before.len() + 1) as u64) as usize;
                fs::write(&path, &after[..torn]).unwrap();
                rig.crash_host();
                disk = rig.open().unwrap();
                model.crashed(content_of(&disk))?;
                disk.sync().unwrap();
                model.flushed();
                history.flushed(&rig);
                continue;
            }
        }
        history.note(&rig);
    }
    prop_assert!(content_of(&disk) == model.now, "at the end");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn a_disk_holds_what_was_written_through_kills_and_what_was_flushed_through_crashes(
        ops in proptest::collection::vec(op(), 1..40),
    ) {
        run(ops)?;
    }
}

#[test]
fn a_journal_that_grew_is_written_anew_and_says_the_same() {
    let mut rig = Rig::new(BLOCK_SIZE);
    let blocks = 4096;
    let (disk, _) = rig.create(blocks);
    let journal = rig.overlay().join("journal");
    let mut longest = 0;
    // Every other block, so that runs do not merge; then back and forth between two states.
    for round in 0u64..9 {
        for index in (0..blocks).step_by(2) {
            if round % 2 == 0 {
                disk.write_at(index * BLOCK, &index.to_le_bytes()).unwrap();
            } else {
                disk.trim(index * BLOCK, BLOCK).unwrap();
            }
        }
        disk.flush().unwrap();
        longest = longest.max(fs::metadata(&journal).unwrap().len());
    }
    disk.flush().unwrap();
    let generation = super::super::inspect(&rig.overlay()).unwrap().journal_generation;
    assert!(generation > 1, "never rewritten");
    assert!(longest < 400 << 10, "{longest}");
    drop(disk);
    rig.crash_host();
    let disk = rig.open().unwrap();
    for index in (2..blocks).step_by(2) {
        assert_eq!(read(&disk, index * BLOCK, 8), index.to_le_bytes());
        assert_eq!(read(&disk, index * BLOCK + BLOCK, 8), [0; 8]);
    }
}

#[test]
fn what_a_killed_process_wrote_becomes_durable_with_the_next_flush() {
    let mut rig = Rig::new(4 * BLOCK_SIZE);
    let (disk, mut content) = rig.create(4);
    disk.write_at(BLOCK, b"written, never flushed").unwrap();
    content[BLOCK_SIZE..BLOCK_SIZE + 22].copy_from_slice(b"written, never flushed");
    drop(disk);
    let disk = rig.open().unwrap();
    disk.flush().unwrap();
    drop(disk);
    rig.crash_host();
    assert_eq!(content_of(&rig.open().unwrap()), content);
}

#[test]
fn a_folder_that_was_copied_is_a_disk_of_its_own() {
    let rig = Rig::new(4 * BLOCK_SIZE);
    let (disk, _) = rig.create(4);
    disk.write_at(0, b"original").unwrap();
    disk.sync().unwrap();
    let copy = rig.dir.path().join("copy");
    copy_disk(&rig.overlay(), &copy);
    let second = Disk::open(&copy, Some(&rig.base()), &rig.options()).unwrap();
    second.write_at(0, b"changed!").unwrap();
    assert_eq!(read(&disk, 0, 8), b"original");
    assert_eq!(read(&second, 0, 8), b"changed!");
}
