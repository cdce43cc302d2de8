//! A disk that is filled from a generation in a folder.

use super::*;
use silo::{
    block::BlockIndex,
    device::DeviceName,
    disk::{Disk, DiskOptions},
    source::MemoryDevice,
    store::{
        Access, CopyGroup, Environment, KeyRing, Limits, LineName, LineWriter, ScratchOptions,
        Store, Which, WriterOptions,
        capture::{Capture, Want},
    },
};
use std::{fs, path::Path, thread, time::Instant};

const BLOCKS: u64 = 2000;
const LIMIT: Duration = Duration::from_secs(60);

/// Ends a filling, also when a check fails.
struct End<'a>(&'a StoreFill);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[track_caller]
fn wait_for_trouble(fill: &StoreFill) {
    let deadline = Instant::now() + LIMIT;
    while fill.trouble().is_none() {
        assert!(Instant::now() < deadline, "nobody said that the store is away");
        thread::yield_now();
    }
}

/// What block `at` holds; every seventh is zeros.
fn content(at: u64) -> [u8; BLOCK_SIZE] {
    let mut block = [0; BLOCK_SIZE];
    if !at.is_multiple_of(7) {
        for (place, byte) in block.iter_mut().enumerate() {
            *byte = (at as usize * 31 + place * place) as u8;
        }
        block[0] = at as u8 | 1;
    }
    block
}

/// A generation with one device "disk-root" in a store below `folder`.
fn generation(folder: &Path) -> Arc<Generation> {
    let device = Arc::new(MemoryDevice::new("root", BLOCKS * BLOCK_SIZE as u64).unwrap());
    for at in 0..BLOCKS {
        device.write_at(at * BLOCK_SIZE as u64, &content(at)).unwrap();
    }
    let parts = vec![("disk-root".to_owned(), 4096, device as Arc<dyn BlockDevice>)];
    let group = CopyGroup::new(parts, ScratchOptions::in_folder(folder)).unwrap();
    let url = format!("file://{}/store", folder.display()).parse().unwrap();
    let environment = Environment::of_process();
    let quick = Limits { attempts: 1, request: Duration::from_secs(2), ..Limits::default() };
    let open = |access| Store::open(&url, access, &environment, quick).unwrap();
    let keys = KeyRing::from_keys([("1", [7; 32])]).unwrap();
    let line = LineName::new("machines", "m").unwrap();
    let store = open(Access::Write);
    let mut writer = LineWriter::open(store, &keys, &line, WriterOptions::default()).unwrap();
    let frozen = group.freeze(Want::Everything).unwrap();
    let stop = AtomicBool::new(false);
    writer.store(&group.devices(), frozen.as_ref(), true, "", &stop).unwrap();
    frozen.release();
    Generation::open(&open(Access::Read), &keys, &line, Which::Newest, 1 << 20).unwrap()
}

/// A disk whose blocks are all in the store, and what brings them.
fn armed(folder: &Path, touches: &FirstTouches) -> (Arc<Disk>, Arc<StoreFill>) {
    let mut options = DiskOptions::new(DeviceName::new("root").unwrap());
    options.arrival_limit = LIMIT;
    let bytes = BLOCKS * BLOCK_SIZE as u64;
    let disk = Arc::new(Disk::create(&folder.join("disk"), None, bytes, &options).unwrap());
    let devices = vec![("disk-root".to_owned(), disk.clone() as Arc<dyn Device>)];
    let fill = StoreFill::new(generation(folder), devices, touches).unwrap();
    let missing = fill.missing(0).unwrap();
    assert_eq!(missing.len(), BLOCKS - BLOCKS.div_ceil(7));
    disk.begin().unwrap();
    disk.arm(&missing, fill.demand(0)).unwrap();
    fill.serve().unwrap();
    (disk, fill)
}

fn block(disk: &Disk, at: u64) -> [u8; BLOCK_SIZE] {
    let mut block = [0; BLOCK_SIZE];
    disk.read_at(at * BLOCK_SIZE as u64, &mut block).unwrap();
    block
}

#[test]
fn what_is_touched_comes_at_once_what_is_written_stays_and_all_else_follows() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, fill) = armed(folder.path(), &FirstTouches::new());
    for at in [1500, 3, 700, 1999] {
        assert!(block(&disk, at) == content(at), "block {at}");
    }
    assert!(disk.missing_blocks() > 1000, "only what is near was brought");
    disk.write_at(40 * BLOCK_SIZE as u64, &[9; BLOCK_SIZE]).unwrap();
    disk.write_at(50 * BLOCK_SIZE as u64 + 100, &[9; 8]).unwrap();
    assert!(fill.run(true));
    assert!(disk.is_complete());
    for at in 0..BLOCKS {
        let mut wanted = content(at);
        match at {
            40 => wanted = [9; BLOCK_SIZE],
            50 => wanted[100..108].fill(9),
            _ => {}
        }
        assert!(block(&disk, at) == wanted, "block {at}");
    }
    assert_eq!(fill.trouble(), None);
    fill.end();
}

fn order(ranges: &[(u64, u64)]) -> FirstTouches {
    let order = ranges.iter().map(|&(start, count)| BlockRange::new(start, count)).collect();
    BTreeMap::from([("disk-root".to_owned(), Manifest { blocks: BLOCKS, order })])
}

#[test]
fn what_an_earlier_start_touched_comes_before_the_rest_and_is_recorded_with_what_this_one_touches()
{
    let folder = tempfile::tempdir().unwrap();
    let touches = order(&[(1700, 90), (20, 1), (900, 3)]);
    let (disk, fill) = armed(folder.path(), &touches);
    assert!(fill.run_ahead());
    let missing = disk.missing();
    for range in &touches["disk-root"].order {
        assert!(!missing.intersects(*range), "{range:?} is not here");
    }
    let brought = BLOCKS - BLOCKS.div_ceil(7) - missing.len();
    assert!((70..=94 + CLUSTER).contains(&brought), "{brought} blocks were brought");
    assert!(block(&disk, 500) == content(500) && block(&disk, 20) == content(20));
    let recorded = fill.first_touches();
    // Block 499 lies in the chunk of block 500 and came with it; few do, so that more was brought.
    let expected = [(1700, 90), (20, 1), (900, 3), (500, 1), (499, 1), (501, CLUSTER - 1)];
    assert_eq!(recorded, order(&expected));
    // Whoever reads everything is no start.
    fill.stop_recording();
    assert!(block(&disk, 1200) == content(1200));
    assert_eq!(fill.first_touches(), recorded);
    assert!(fill.run(false));
    assert!((0..BLOCKS).all(|at| block(&disk, at) == content(at)));
    fill.end();
}

#[test]
fn of_an_order_that_is_nearly_everything_the_beginning_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let (_disk, fill) = armed(folder.path(), &order(&[(1700, 90), (20, 1), (0, BLOCKS)]));
    let ahead = |most| {
        let ranges = fill.expected(most).into_iter();
        ranges.map(|(_, range)| range).collect::<Vec<_>>()
    };
    let all: u64 = ahead(u64::MAX).iter().map(|range| range.count).sum();
    assert!(all >= BLOCKS - BLOCKS.div_ceil(7), "{all}");
    let first = ahead(90);
    let count: u64 = first.iter().map(|range| range.count).sum();
    // Every seventh block is zeros, which nobody has to bring.
    assert_eq!(count, 90 - 13 + 1 + 12, "{first:?}");
    assert!(first.starts_with(&ahead(70)) && first[0].start.0 >= 1700, "{first:?}");
    assert_eq!((expected_at_most(0), expected_at_most(1 << 24)), (8192, 1 << 21));
    fill.end();
}

#[test]
fn an_order_of_another_device_is_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let mut touches = order(&[(1, 5)]);
    touches.get_mut("disk-root").unwrap().blocks += 1;
    let (disk, fill) = armed(folder.path(), &touches);
    let before = disk.missing_blocks();
    assert!(fill.run_ahead() && disk.missing_blocks() == before);
    assert_eq!(fill.first_touches(), FirstTouches::new());
    fill.end();
}

#[test]
fn a_store_that_is_away_makes_a_reader_wait_says_so_and_is_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, fill) = armed(folder.path(), &FirstTouches::new());
    let (packs, aside) = (folder.path().join("store/packs"), folder.path().join("aside"));
    fs::rename(&packs, &aside).unwrap();
    thread::scope(|scope| {
        let _end = End(&fill);
        let reader = scope.spawn(|| block(&disk, 1000));
        let filler = scope.spawn(|| fill.run(false));
        wait_for_trouble(&fill);
        assert!(!reader.is_finished() && !filler.is_finished());
        fs::rename(&aside, &packs).unwrap();
        assert!(reader.join().unwrap() == content(1000));
        assert!(filler.join().unwrap());
    });
    let missing = BlockSet::new(BLOCKS);
    assert_eq!(disk.missing(), missing);
    let mut all = vec![0; BLOCK_SIZE * 8];
    disk.read(BlockIndex(1), &mut all).unwrap();
    assert!(all[..BLOCK_SIZE] == content(1));
}

#[test]
fn the_generation_is_pinned_while_it_is_brought_and_not_afterwards() {
    let folder = tempfile::tempdir().unwrap();
    let pins = || {
        let mut found = 0;
        let mut folders = vec![folder.path().join("store/pins")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.file_type().unwrap().is_dir() {
                    true => folders.push(entry.path()),
                    false => found += 1,
                }
            }
        }
        found
    };
    let (_disk, fill) = armed(folder.path(), &FirstTouches::new());
    let (packs, aside) = (folder.path().join("store/packs"), folder.path().join("aside"));
    fs::rename(&packs, &aside).unwrap();
    thread::scope(|scope| {
        let _end = End(&fill);
        let filler = scope.spawn(|| fill.run(false));
        wait_for_trouble(&fill);
        assert_eq!(pins(), 1);
        fs::rename(&aside, &packs).unwrap();
        assert!(filler.join().unwrap());
    });
    assert_eq!(pins(), 0);
}

#[test]
fn it_ends_when_it_is_told_to_although_the_store_is_away() {
    let folder = tempfile::tempdir().unwrap();
    let (_disk, fill) = armed(folder.path(), &FirstTouches::new());
    fs::remove_dir_all(folder.path().join("store/packs")).unwrap();
    thread::scope(|scope| {
        let _end = End(&fill);
        let filler = scope.spawn(|| fill.run(false));
        wait_for_trouble(&fill);
        fill.end();
        assert!(!filler.join().unwrap());
    });
}
