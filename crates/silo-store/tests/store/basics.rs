//! What is stored comes back, at what cost.

use crate::support::*;
use silo_block::{
    block::BlockIndex,
    io::{Allocation, BlockDevice},
};
use silo_store::{
    Access, Depth, Environment, GenerationDevice, Reading, Store, StoreUrl, Which,
    capture::{Capture, Want},
};
use std::sync::atomic::AtomicBool;

#[test]
fn a_device_of_any_size_in_blocks_of_any_size_comes_back_whole_and_in_pieces() {
    let (_, store) = in_memory();
    for block in [512u32, 4096, 65536, 1 << 20] {
        let b = block as usize;
        let mut disks = Vec::new();
        for size in [1, 511, 512, 4095, 4096, b - 1, b, b + 1, 3 * b + 78] {
            let mut content = noise(size as u64, size);
            // A hole in the middle, and something that compresses at the end.
            content[size / 3..size / 2].fill(0);
            content[size * 9 / 10..].fill(7);
            disks.push((format!("disk-{size}"), Disk::new(content)));
        }
        disks.dedup_by(|a, b| a.0 == b.0);
        disks.sort_by(|a, b| a.0.cmp(&b.0));
        disks.dedup_by(|a, b| a.0 == b.0);
        let parts: Vec<_> = disks.iter().map(|(name, disk)| (name.as_str(), block, disk)).collect();
        let group = group(&parts);
        let name = format!("line-{block}");
        round(&mut writer(&store, &name), &group, Want::Changed).unwrap();
        let generation = generation(&store, &name, Which::Newest).unwrap();
        for (name, disk) in &disks {
            let content = disk.content();
            assert_eq!(restored(&generation, name).unwrap(), content, "{name}, block {block}");
            let device = GenerationDevice::new(&generation, name, 0).unwrap();
            let mut piece = vec![1; content.len().div_ceil(3)];
            for (at, expected) in content.chunks(piece.len()).enumerate() {
                let out = &mut piece[..expected.len()];
                device.read_at((at * content.len().div_ceil(3)) as u64, out).unwrap();
                assert_eq!(out, expected, "{name}, block {block}");
            }
        }
    }
}

#[test]
fn generations_keep_their_content_while_the_device_goes_on() {
    let server = server();
    let store = s3(&server, limits());
    let disk = Disk::new(noise(1, 3 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    let device = group.device(0);
    let mut writer = writer(&store, "vm");
    let mut contents = Vec::new();
    for i in 0..6u64 {
        device.write_at(i * 300_000, &noise(100 + i, 70_000)).unwrap();
        device.zero(i * 200_000, 9000, false).unwrap();
        let stored = round(&mut writer, &group, Want::Changed).unwrap();
        contents.push((stored.number, disk.content()));
        assert!(i == 0 || stored.blocks < 30, "only changes: {stored:?}");
    }
    for (number, content) in &contents {
        let generation = generation(&store, "vm", Which::Number(*number)).unwrap();
        assert_eq!(&restored(&generation, "disk").unwrap(), content);
    }
    let infos = store.generations(&line("vm")).unwrap();
    let numbers: Vec<_> = contents.iter().rev().map(|(number, _)| *number).collect();
    assert_eq!(infos.iter().map(|info| info.number).collect::<Vec<_>>(), numbers);
    let (done, stop) = (Reading::default(), AtomicBool::new(false));
    let verified = store.verify(&ring(), &line("vm"), None, Depth::Full, &done, &stop).unwrap();
    assert!(verified.is_well() && verified.generations == 6, "{verified:?}");
    let bytes = |of: &std::sync::atomic::AtomicU64| of.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(bytes(&done.done), bytes(&done.total));
    assert!(bytes(&done.total) > 1 << 16, "{done:?}");
    assert!(store.scrub(None, &done, &stop).unwrap().is_well());
    assert_eq!(bytes(&done.done), bytes(&done.total));
}

#[test]
fn a_local_folder_is_a_store() {
    let folder = tempfile::tempdir().unwrap();
    let url: StoreUrl = format!("file://{}/deep/store", folder.path().display()).parse().unwrap();
    let open = |access| Store::open(&url, access, &Environment::default(), limits()).unwrap();
    let disk = Disk::new(noise(1, 200_000));
    let group = group(&[("disk", 4096, &disk)]);
    let store = open(Access::Write);
    let mut writer = writer(&store, "vm");
    round(&mut writer, &group, Want::Changed).unwrap();
    group.device(0).write_at(5, b"changed").unwrap();
    round(&mut writer, &group, Want::Changed).unwrap();
    assert_eq!(newest(&open(Access::Read), "vm", "disk").unwrap(), disk.content());
}

#[test]
fn zeros_cost_nothing_and_equal_blocks_cost_once() {
    let (_, store) = in_memory();
    let block = noise(5, 4096);
    let mut content = vec![0; 64 << 20];
    content[..4096 * 1000].copy_from_slice(&block.repeat(1000));
    let disk = Disk::new(content);
    let group = group(&[("disk", 4096, &disk)]);
    let stored = round(&mut writer(&store, "vm"), &group, Want::Changed).unwrap();
    assert_eq!((stored.blocks, stored.zeros, stored.known), (16384, 15384, 999));
    assert!(stored.bytes() < 4096 + 2000, "{stored:?}");
    assert!(stored.requests.total() <= 4, "{stored:?}");
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
}

#[test]
fn a_writer_that_knows_nothing_compares_and_sends_only_what_is_new() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(1, 4 << 20));
    round(&mut writer(&store, "vm"), &group(&[("disk", 4096, &disk)]), Want::Changed).unwrap();
    disk.write_at(123_456, &noise(2, 5000)).unwrap();
    // Another process: neither the writer nor the tracker of the first is there.
    let group = group(&[("disk", 4096, &disk)]);
    let stored = round(&mut writer(&store, "vm"), &group, Want::Everything).unwrap();
    assert_eq!((stored.blocks, stored.known), (1024, 1022), "{stored:?}");
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
}

#[test]
fn one_percent_rewritten_at_random_places_costs_little_more_than_one_percent() {
    let (_, store) = in_memory();
    let size = 128 << 20;
    let disk = Disk::new(noise(1, size));
    let group = group(&[("disk", 4096, &disk)]);
    let device = group.device(0);
    let mut writer = writer(&store, "vm");
    round(&mut writer, &group, Want::Changed).unwrap();
    let (blocks, mut at, mut total) = (size as u64 / 4096, 7u64, 0);
    for generation in 0..20u64 {
        let mut rewritten = 0;
        let mut seen = std::collections::BTreeSet::new();
        while rewritten < blocks / 100 {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let block = (at >> 33) % blocks;
            if seen.insert(block) {
                device.write_at(block * 4096, &noise(generation << 32 | rewritten, 4096)).unwrap();
                rewritten += 1;
            }
        }
        let stored = round(&mut writer, &group, Want::Changed).unwrap();
        total += stored.bytes();
        assert!(stored.bytes() * 1000 <= size as u64 * 11, "generation {generation}: {stored:?}");
    }
    assert!(total > 20 * blocks / 100 * 4096);
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
}

#[test]
fn the_first_block_takes_at_most_five_requests_however_many_generations_there_are() {
    let server = server();
    let writing = s3(&server, limits());
    let disk = Disk::new(noise(1, 48 << 20));
    let group = group(&[("disk", 512, &disk)]);
    let device = group.device(0);
    let mut writer = writer(&writing, "vm");
    let mut maps = 0;
    for generation in 0..30u64 {
        // Blocks in the reverse order and far apart: nothing for runs to gain.
        for i in 0..3000 {
            let block = (98_000 - i * 31 - generation % 7) % 98_304;
            device.write_at(block * 512, &noise(generation * 10_000 + i, 512)).unwrap();
        }
        maps += u64::from(round(&mut writer, &group, Want::Changed).unwrap().map_bytes > 0);
    }
    assert!(maps > 0, "the map was written apart at least once");
    let url: StoreUrl = server.url("folder").parse().unwrap();
    let environment = Environment::given(server.credentials());
    for last in [false, true] {
        if last {
            // An entry that is no generation comes on top.
            drop(self::writer(&writing, "vm"));
        }
        let reading = Store::open(&url, Access::Read, &environment, limits()).unwrap();
        let generation = generation(&reading, "vm", Which::Newest).unwrap();
        let device = GenerationDevice::new(&generation, "disk", 0).unwrap();
        let mut block = [0; 512];
        device.read_at(40 << 20, &mut block).unwrap();
        assert_eq!(block, disk.content()[40 << 20..(40 << 20) + 512]);
        let requests = reading.requests();
        assert!(requests.total() <= 5, "{requests:?}");
    }
}

#[test]
fn a_lazy_device_says_what_it_knows_of_holes_and_refuses_writes() {
    let (_, store) = in_memory();
    let mut content = vec![0; 1 << 20];
    content[8192..16384].fill(3);
    let group = group(&[("disk", 4096, &Disk::new(content))]);
    round(&mut writer(&store, "vm"), &group, Want::Changed).unwrap();
    let generation = generation(&store, "vm", Which::Newest).unwrap();
    let device = GenerationDevice::new(&generation, "disk", 1).unwrap();
    assert_eq!(device.extents(0, 1 << 20).unwrap()[0].allocation, Allocation::Data);
    device.read_at(0, &mut [0; 10]).unwrap();
    let extents = device.extents(0, 1 << 20).unwrap();
    let kinds: Vec<_> = extents.iter().map(|e| (e.length, e.allocation)).collect();
    let hole = Allocation::Hole;
    assert_eq!(kinds, [(8192, hole), (8192, Allocation::Data), ((1 << 20) - 16384, hole)]);
    assert!(device.is_read_only());
    let refused = device.write_at(0, b"x").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
    let beyond = device.read_at(1 << 20, &mut [0]).unwrap_err();
    assert_eq!(beyond.kind(), std::io::ErrorKind::InvalidInput);
}

#[test]
fn a_sequential_reader_of_a_lazy_device_is_fetched_ahead_of_and_memory_is_bounded() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(3, 32 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    round(&mut writer(&store, "vm"), &group, Want::Changed).unwrap();
    let generation = generation(&store, "vm", Which::Newest).unwrap();
    let device = GenerationDevice::new(&generation, "disk", 2).unwrap();
    let content = disk.content();
    let mut buf = vec![0; 256 << 10];
    for (at, expected) in content.chunks(buf.len()).enumerate() {
        device.read_at((at * (256 << 10)) as u64, &mut buf).unwrap();
        assert_eq!(buf, expected);
        assert!(generation.memory() <= (8 << 20) + (1 << 20), "{}", generation.memory());
    }
    // One request for each chunk of 64 KiB would be 512.
    let reads = store.requests().reads;
    assert!(reads < 300, "{reads} requests");
}

#[test]
fn a_device_may_grow_and_shrink_and_a_group_may_not_change() {
    let (_, store) = in_memory();
    let mut writer = writer(&store, "vm");
    for size in [1 << 20, 3 << 20, 500_000] {
        let disk = Disk::new(noise(size as u64, size));
        let group = group(&[("disk", 4096, &disk)]);
        round(&mut writer, &group, Want::Everything).unwrap();
        assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content(), "{size} bytes");
    }
    let other = group(&[("other", 4096, &Disk::new(vec![1; 4096]))]);
    let error = round(&mut writer, &other, Want::Everything).unwrap_err().to_string();
    assert!(error.contains("holds devices disk, not other"), "{error}");
}

#[test]
fn check_07_an_answer_for_an_older_generation_does_not_pass_for_the_newer_block() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(1, 64 << 10));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    let old = round(&mut writer, &group, Want::Changed).unwrap().number;
    group.device(0).write_at(4096, &noise(2, 4096)).unwrap();
    round(&mut writer, &group, Want::Changed).unwrap();
    let (old, new) = (
        generation(&store, "vm", Which::Number(old)).unwrap(),
        generation(&store, "vm", Which::Newest).unwrap(),
    );
    // Whoever fetches block 1 for the newer state checks what comes by the newer state's name.
    let (key, name) = new.block_name(0, BlockIndex(1)).unwrap().unwrap();
    let mut late = vec![0; 4096];
    GenerationDevice::new(&old, "disk", 0).unwrap().read_at(4096, &mut late).unwrap();
    assert_ne!(new.name(key, &late), Some(name));
    assert_eq!(new.name(key, &disk.content()[4096..8192]), Some(name));
    assert_eq!(
        old.block_name(0, BlockIndex(0)).unwrap(),
        new.block_name(0, BlockIndex(0)).unwrap()
    );
}

#[test]
fn check_35_content_from_before_the_backup_began_is_stored_without_being_rewritten() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(1, 1 << 20));
    let group = group(&[("disk", 65536, &disk)]);
    assert_eq!(group.changes(0).blocks, 16, "all of it is to be stored");
    round(&mut writer(&store, "vm"), &group, Want::Changed).unwrap();
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
    assert_eq!(group.changes(0).blocks, 0);
}
