//! Crashes, lost objects, second writers.

use super::*;
use crate::{
    source::tests::{compare, exercise},
    store::{Environment, Limits, StoreUrl},
    tests::random::Random,
};
use std::fs;

fn objects(dir: &Path) -> Objects {
    let url: StoreUrl = format!("file://{}", dir.display()).parse().unwrap();
    Objects::open(&url, &Environment::default(), Limits::default()).unwrap()
}

fn files(dir: &Path, folder: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> =
        fs::read_dir(dir.join(folder)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn after_a_crash_the_device_is_as_of_its_last_flush_and_nothing_is_left_over() {
    let dir = tempfile::tempdir().unwrap();
    let device = ObjectDevice::create(objects(dir.path()), 100_000, 4096).unwrap();
    let (mut model, mut random) = (vec![0; 100_000], Random(1));
    exercise(&device, &mut model, &mut random, 30, "objects");
    device.flush().unwrap();
    let mut later = model.clone();
    exercise(&device, &mut later, &mut random, 30, "objects");
    drop(device);
    let device = ObjectDevice::open(objects(dir.path()), true).unwrap();
    compare(&device, &model, "as of the flush");
    let listed = device.index.iter().filter(|slot| slot.load(Ordering::Relaxed) != 0).count();
    assert_eq!(files(dir.path(), "blocks").len(), listed, "no leftovers");
    exercise(&device, &mut model, &mut random, 30, "objects");
    device.flush().unwrap();
    assert!(files(dir.path(), "manifest").len() <= 3);
    let reader = ObjectDevice::open(objects(dir.path()), false).unwrap();
    compare(&reader, &model, "read-only");
    let error = reader.write_at(0, &[1]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn a_lost_or_changed_object_is_an_error_that_names_it_and_never_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let device = ObjectDevice::create(objects(dir.path()), 10_000, 4096).unwrap();
    device.write_at(0, &[1; 10_000]).unwrap();
    device.flush().unwrap();
    let blocks = files(dir.path(), "blocks");
    fs::remove_file(&blocks[0]).unwrap();
    let mut bytes = fs::read(&blocks[1]).unwrap();
    bytes[100] ^= 1;
    fs::write(&blocks[1], bytes).unwrap();
    for (offset, name) in [(0, &blocks[0]), (4096, &blocks[1])] {
        let error = device.read_at(offset, &mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let name = name.file_name().unwrap().to_str().unwrap();
        assert!(error.to_string().contains(name), "{error}");
    }
    device.read_at(8192, &mut [0; 10]).unwrap();
}

#[test]
fn a_commit_whose_answer_was_lost_is_known_again_and_does_not_fence_its_own_writer() {
    let dir = tempfile::tempdir().unwrap();
    let device = ObjectDevice::create(objects(dir.path()), 10_000, 4096).unwrap();
    device.write_at(0, &[1; 4096]).unwrap();
    // What the store has once a create took effect that the writer gave up.
    let generations = vec![(0, device.index[0].load(Ordering::Relaxed))];
    let late = Manifest { geometry: device.geometry, generations };
    assert!(device.objects.create(&manifest_name(2), late.encode(&device.nonce)).unwrap());
    device.write_at(0, &[2; 8192]).unwrap();
    device.flush().unwrap();
    device.write_at(8192, &[3; 10]).unwrap();
    device.flush().unwrap();
    drop(device);
    let device = ObjectDevice::open(objects(dir.path()), true).unwrap();
    let mut all = vec![0; 10_000];
    device.read_at(0, &mut all).unwrap();
    assert_eq!((all[0], all[8191], all[8192], all[9000]), (2, 2, 3, 0));
    assert_eq!(files(dir.path(), "blocks").len(), 3, "no leftovers");
}

#[test]
fn a_manifest_with_a_number_that_no_device_reaches_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    drop(ObjectDevice::create(objects(dir.path()), 10_000, 4096).unwrap());
    let manifests = files(dir.path(), "manifest");
    let huge = dir.path().join("manifest/ffffffffffffffff");
    fs::copy(&manifests[0], huge).unwrap();
    let error = ObjectDevice::open(objects(dir.path()), true).unwrap_err();
    assert!(matches!(error, SourceError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("ffffffffffffffff"), "{error}");
}

#[test]
fn a_second_writer_fences_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let first = ObjectDevice::create(objects(dir.path()), 10_000, 4096).unwrap();
    first.write_at(0, &[1; 4096]).unwrap();
    first.flush().unwrap();
    let second = ObjectDevice::open(objects(dir.path()), true).unwrap();
    first.write_at(0, &[2; 4096]).unwrap();
    let error = first.flush().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected, "{error}");
    assert!(first.write_at(0, &[3]).is_err());
    second.write_at(4096, &[4; 4096]).unwrap();
    second.flush().unwrap();
    let mut all = vec![0; 10_000];
    second.read_at(0, &mut all).unwrap();
    assert_eq!((all[0], all[4096], all[9999]), (1, 4, 0));
    assert!(ObjectDevice::create(objects(dir.path()), 1, 512).is_err());
}
