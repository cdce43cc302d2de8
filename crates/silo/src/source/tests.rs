//! What holds for every source: the same accesses give the same bytes as in a plain buffer, for
//! sizes and blocks that fit badly, and again after it was closed and opened.

use super::*;
use crate::{
    io::{Allocation, BlockDevice},
    tests::random::Random,
};
use std::{path::Path, sync::Arc};

/// Sizes from the check's list, for a block size.
fn sizes(block: u64) -> Vec<u64> {
    let mut sizes = vec![1, 511, 512, 4095, 4096, block - 1, block, block + 1, 2 * block + 78];
    sizes.retain(|size| *size > 0);
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// Makes a device of so many bytes in blocks of so many, or opens it again.
type Make<'a> = &'a dyn Fn(&Path, u64, u32) -> Arc<dyn BlockDevice>;

pub(crate) fn compare(device: &dyn BlockDevice, model: &[u8], context: &str) {
    assert_eq!(device.size(), model.len() as u64, "{context}");
    let mut all = vec![0xEE; model.len()];
    device.read_at(0, &mut all).unwrap();
    if let Some(at) = all.iter().zip(model).position(|(a, b)| a != b) {
        panic!("{context}: byte {at} of {} is {} and not {}", model.len(), all[at], model[at]);
    }
    let mut at = 0;
    for extent in device.extents(0, device.size()).unwrap() {
        assert!(extent.length > 0, "{context}");
        let end = at + extent.length as usize;
        if extent.allocation != Allocation::Data {
            assert!(crate::block::is_zero(&model[at..end]), "{context}: a hole with content");
        }
        at = end;
    }
    assert_eq!(at, model.len(), "{context}: extents cover the device");
}

/// Random accesses to a device and to a buffer.
pub(crate) fn exercise(
    device: &dyn BlockDevice,
    model: &mut [u8],
    random: &mut Random,
    steps: usize,
    context: &str,
) {
    let size = model.len() as u64;
    for step in 0..steps {
        let offset = random.below(size);
        let most = (size - offset).min(1 << random.below(18));
        let length = 1 + random.below(most);
        let range = offset as usize..(offset + length) as usize;
        match random.below(8) {
            0 => device.zero(offset, length, random.below(2) == 0).unwrap(),
            1 => {
                device.trim(offset, length).unwrap();
                // Old bytes or zeros, byte by byte.
                let mut now = vec![0; range.len()];
                device.read_at(offset, &mut now).unwrap();
                for (old, new) in model[range.clone()].iter().zip(&now) {
                    assert!(new == old || *new == 0, "{context}, step {step}: trim");
                }
                model[range].copy_from_slice(&now);
                continue;
            }
            2 => {
                let mut buf = vec![0xEE; range.len()];
                device.read_at(offset, &mut buf).unwrap();
                assert!(
                    buf == model[range],
                    "{context}, step {step}: read of {length} at {offset}"
                );
                continue;
            }
            _ => {
                let data = random.bytes(length as usize);
                device.write_at(offset, &data).unwrap();
                model[range].copy_from_slice(&data);
                continue;
            }
        }
        model[range].fill(0);
    }
    for (offset, length) in [(size, 1u64), (0, size + 1), (u64::MAX, 2)] {
        let mut buf = vec![0; length.min(size + 1) as usize];
        let error = device.read_at(offset, &mut buf).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{context}");
        let error = device.write_at(offset, &buf).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{context}");
        let error = device.trim(offset, length).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{context}");
    }
    device.read_at(size, &mut []).unwrap();
}

fn matrix(make: Make<'_>, blocks: &[u32], reopen: bool) {
    for block in blocks {
        for size in sizes(u64::from(*block)) {
            let dir = tempfile::tempdir().unwrap();
            let context = format!("{size} bytes in blocks of {block}");
            let mut random = Random(size ^ u64::from(*block));
            let mut model = vec![0; size as usize];
            let device = make(dir.path(), size, *block);
            compare(&*device, &model, &context);
            exercise(&*device, &mut model, &mut random, 40, &context);
            compare(&*device, &model, &context);
            if reopen {
                device.flush().unwrap();
                drop(device);
                let device = make(dir.path(), size, *block);
                compare(&*device, &model, &format!("{context}, opened again"));
                exercise(&*device, &mut model, &mut random, 10, &context);
                compare(&*device, &model, &context);
            }
        }
    }
}

const BLOCKS: [u32; 4] = [512, 4096, 64 << 10, 1 << 20];

#[test]
fn check_01_memory_of_any_size_holds_what_was_written() {
    let make = |_: &Path, size, _| -> Arc<dyn BlockDevice> {
        Arc::new(MemoryDevice::new("test", size).unwrap())
    };
    matrix(&make, &BLOCKS, false);
}

#[test]
fn check_01_a_file_of_any_size_holds_what_was_written() {
    let make = |dir: &Path, size, _| -> Arc<dyn BlockDevice> {
        let path = dir.join("disk");
        let device = match path.exists() {
            true => FileDevice::open(&path, FileMode::ReadWrite),
            false => FileDevice::create(&path, size),
        };
        Arc::new(device.unwrap())
    };
    matrix(&make, &BLOCKS, true);
}

#[test]
fn check_01_a_directory_of_shards_of_any_size_holds_what_was_written() {
    let make = |dir: &Path, size, block| -> Arc<dyn BlockDevice> {
        let path = dir.join("disk");
        let device = match path.exists() {
            true => DirectoryDevice::open(&path),
            false => DirectoryDevice::create(&path, size, block),
        };
        Arc::new(device.unwrap())
    };
    matrix(&make, &BLOCKS, true);
}

#[test]
fn check_01_a_sparse_file_of_any_size_holds_what_was_written() {
    let make = |dir: &Path, size, block| -> Arc<dyn BlockDevice> {
        let path = dir.join("disk");
        let device = match path.exists() {
            true => SparseDevice::open(&path),
            false => SparseDevice::create(&path, size, block),
        };
        Arc::new(device.unwrap())
    };
    matrix(&make, &BLOCKS, true);
}

#[test]
fn check_01_objects_of_any_size_hold_what_was_written() {
    use crate::store::{Environment, Limits, Objects, StoreUrl};
    let make = |dir: &Path, size, block| -> Arc<dyn BlockDevice> {
        let url: StoreUrl = format!("file://{}/store", dir.display()).parse().unwrap();
        let objects = || Objects::open(&url, &Environment::default(), Limits::default()).unwrap();
        let device = match dir.join("store/manifest").exists() {
            true => ObjectDevice::open(objects(), true),
            false => ObjectDevice::create(objects(), size, block),
        };
        Arc::new(device.unwrap())
    };
    // Each write of a block is a synced file: the smallest blocks would take minutes.
    matrix(&make, &[64 << 10, 1 << 20], true);
}
