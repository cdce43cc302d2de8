//! Logs that are torn, damaged, written anew.

use super::*;
use crate::{
    files::sim::SimFolder,
    source::tests::{compare, exercise},
    tests::{model::Model, random::Random},
};

fn content_of(device: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0xEE; device.size() as usize];
    device.read_at(0, &mut all).unwrap();
    all
}

#[test]
fn check_27_a_torn_end_is_dropped_wherever_it_is_torn_and_never_read_as_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let device = SparseDevice::create(&path, 5000, 512).unwrap();
    let mut ends = vec![(device.log_bytes().0, vec![0; 5000])];
    for index in 0..4u8 {
        device.write_at(u64::from(index) * 600, &[index + 1; 700]).unwrap();
        ends.push((device.log_bytes().0, content_of(&device)));
    }
    drop(device);
    let whole = fs::read(&path).unwrap();
    for length in (HEADER..whole.len()).step_by(61) {
        for garbage in [&b""[..], &[0; 60], &whole[HEADER..HEADER + 30]] {
            fs::write(&path, [&whole[..length], garbage].concat()).unwrap();
            let device = SparseDevice::open(&path).unwrap();
            let content = content_of(&device);
            // Blocks are whole: each is that of the last whole write of it, or of the one before,
            // where a write of two blocks was torn between them.
            let last = ends.iter().rposition(|(end, _)| *end <= length as u64).unwrap();
            let next = (last + 1).min(ends.len() - 1);
            for (index, block) in content.chunks(512).enumerate() {
                let of = |(_, content): &(u64, Vec<u8>)| {
                    content.chunks(512).nth(index).unwrap().to_vec()
                };
                assert!(
                    block == of(&ends[last]) || block == of(&ends[next]),
                    "length {length}, block {index}"
                );
            }
            device.write_at(0, &[9; 10]).unwrap();
        }
    }
}

#[test]
fn check_27_damage_before_what_was_flushed_is_an_error_that_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let device = SparseDevice::create(&path, 8192, 512).unwrap();
    device.write_at(0, &[1; 2048]).unwrap();
    device.flush().unwrap();
    device.write_at(512, &[2; 512]).unwrap();
    device.flush().unwrap();
    drop(device);
    let good = fs::read(&path).unwrap();
    // In a head: the chain breaks. In the bytes: found when the block is read.
    for at in [HEADER + 3, HEADER + 20, HEADER + 560 + 44] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, &bad).unwrap();
        let error = SparseDevice::open(&path).unwrap_err();
        assert!(matches!(error, SourceError::Corrupt { .. }), "{at}: {error}");
    }
    let mut bad = good.clone();
    bad[HEADER + RECORD + 100] ^= 1;
    fs::write(&path, &bad).unwrap();
    let device = SparseDevice::open(&path).unwrap();
    let error = device.read_at(0, &mut [0; 512]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    assert!(device.compact().is_err(), "and is not copied on as if it were good");
    drop(device);
    let mut newer = good;
    newer[8] = 2;
    fs::write(&path, &newer).unwrap();
    assert!(matches!(SparseDevice::open(&path), Err(SourceError::Version { found: 2, .. })));
}

#[test]
fn a_log_that_is_written_anew_during_a_flush_gets_no_mark_of_the_old_one() {
    let folder = SimFolder::new();
    let device =
        Arc::new(SparseDevice::create_in(folder.clone(), "disk", 8192, 512, None).unwrap());
    for round in 0..40 {
        device.write_at(0, &[round; 1024]).unwrap();
    }
    let other = device.clone();
    folder.at_next_sync(move || {
        other.compact().unwrap();
        other.write_at(2048, &[7; 2048]).unwrap();
    });
    device.flush().unwrap();
    for seed in 0..200 {
        let after = folder.crash(&mut Random(seed));
        let device = SparseDevice::open_in(after, "disk", None)
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let content = content_of(&device);
        assert!(content[..1024].iter().all(|byte| *byte == 39), "seed {seed}: what was flushed");
        for block in content[2048..4096].chunks(512) {
            assert!(block.iter().all(|byte| *byte == block[0]), "seed {seed}: a torn block");
        }
    }
}

#[test]
fn a_log_whose_new_name_may_be_lost_is_flushed_no_more() {
    let folder = SimFolder::new();
    let device = SparseDevice::create_in(folder.clone(), "disk", 8192, 512, None).unwrap();
    device.write_at(0, &[1; 512]).unwrap();
    device.flush().unwrap();
    folder.lose_names();
    assert!(device.compact().is_err());
    device.write_at(0, &[2; 512]).unwrap();
    let error = device.flush().unwrap_err();
    assert!(error.to_string().contains("lost names"), "{error}");
}

#[test]
fn a_header_that_asks_for_an_index_of_gigabytes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let geometry = Geometry::new((MAX_BLOCKS + 1) * 512, 512).unwrap();
    fs::write(&path, Header { geometry, instance: 1, generation: 1 }.encode()).unwrap();
    let wrong = |result: Result<SparseDevice, SourceError>| {
        let error = result.unwrap_err();
        assert!(matches!(error, SourceError::NotA { .. }), "{error}");
    };
    wrong(SparseDevice::open(&path));
    wrong(SparseDevice::create(&dir.path().join("new"), geometry.bytes(), 512));
}

#[test]
fn a_log_has_these_bytes() {
    let geometry = Geometry::new(0x1234, 512).unwrap();
    let header = Header { geometry, instance: 0x11, generation: 2 };
    let bytes = header.encode();
    assert_eq!(
        bytes[..56],
        *b"SILOSPR\0\x01\0\0\0\0\x02\0\0\x34\x12\0\0\0\0\0\0\x11\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\
           \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    let head = Record { kind: Kind::Data, block: 3, count: 1 }.encode(&header, 5, b"abc");
    assert_eq!(
        head[..32],
        *b"SPRR\x01\0\0\0\x05\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"
    );
    assert_eq!(head[32..40], twox_hash::XxHash3_64::oneshot(b"abc").to_le_bytes());
    let sum = twox_hash::XxHash3_64::oneshot_with_seed(0x13, &head[..40]);
    assert_eq!(head[40..], sum.to_le_bytes());
}

#[test]
fn a_log_that_is_written_anew_holds_the_same_and_is_short() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let size = 700_000;
    let device = SparseDevice::create(&path, size, 4096).unwrap();
    let (mut model, mut random) = (vec![0; size as usize], Random(5));
    exercise(&device, &mut model, &mut random, 300, "sparse");
    let before = device.log_bytes();
    device.compact().unwrap();
    let after = device.log_bytes();
    assert!(after.0 < before.0 && after.1 < 100, "{before:?} {after:?}");
    assert_eq!(after.0 - after.1, before.0 - before.1, "what is alive was counted right");
    compare(&device, &model, "written anew");
    exercise(&device, &mut model, &mut random, 100, "sparse");
    drop(device);
    let device = SparseDevice::open(&path).unwrap();
    compare(&device, &model, "opened again");
}

#[test]
fn check_27_what_was_flushed_survives_power_cuts_at_any_change_of_the_log() {
    let seeds = std::env::var("SILO_SEEDS").map_or(300, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        let random = &mut Random(seed);
        let size = 8_000 + random.below(8_000);
        let mut folder = SimFolder::new();
        let device = SparseDevice::create_in(folder.clone(), "disk", size, 512, None);
        let mut device = device.unwrap();
        let mut model = Model::new(vec![0; size as usize]);
        for life in 0..5 {
            folder.power_for(random.below(60));
            let mut context = String::new();
            for step in 0..40 {
                context = format!("seed {seed}, life {life}, step {step}");
                let offset = random.below(size);
                let length = 1 + random.below((size - offset).min(3000));
                let result = match random.below(10) {
                    0 => {
                        model.put(offset as usize, &vec![0; length as usize]);
                        device.zero(offset, length, random.below(3) == 0)
                    }
                    1 => device.flush().inspect(|()| model.flushed()),
                    2 => device.compact(),
                    3 => {
                        assert!(content_of(&device) == model.now, "{context}");
                        Ok(())
                    }
                    _ => {
                        let data = random.bytes(length as usize);
                        model.put(offset as usize, &data);
                        device.write_at(offset, &data)
                    }
                };
                if let Err(error) = result {
                    assert!(error.to_string().contains("no power"), "{context}: {error}");
                    break;
                }
            }
            drop(device);
            folder = folder.crash(random);
            device = SparseDevice::open_in(folder.clone(), "disk", None)
                .unwrap_or_else(|error| panic!("{context}: {error}"));
            model.crashed(content_of(&device), &context);
        }
    }
}
