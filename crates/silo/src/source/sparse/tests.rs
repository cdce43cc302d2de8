//! Logs that are torn, damaged, written anew.

use super::{
    record::{RECORD, Record},
    *,
};
use crate::{
    files::sim::SimFolder,
    source::tests::{compare, exercise},
    tests::{model::Model, random::Random},
};
use std::time::{Duration, Instant};

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
    // How often a crash came in each part of writing the log anew.
    let mut cut = [0; 3];
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
            // Parts of a rewrite, with writes and flushes in between.
            let mut rewriting = None;
            for step in 0..40 {
                context = format!("seed {seed}, life {life}, step {step}");
                let offset = random.below(size);
                let length = 1 + random.below((size - offset).min(3000));
                let result = match random.below(14) {
                    0 => {
                        model.put(offset as usize, &vec![0; length as usize]);
                        device.zero(offset, length, random.below(3) == 0)
                    }
                    1 => device.flush().inspect(|()| model.flushed()),
                    2 if rewriting.is_none() => device.compact(),
                    2 | 10..=13 => match rewriting.take() {
                        None => device.inner.begin(1500).map(|rewrite| {
                            rewriting = Some((rewrite, true));
                        }),
                        Some((mut rewrite, true)) => device.inner.slice(&mut rewrite).map(|more| {
                            rewriting = Some((rewrite, more));
                        }),
                        Some((rewrite, false)) => device.inner.switch(&rewrite),
                    },
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
                    // Or a write had the last of it, and none was left for the new log.
                    let text = error.to_string();
                    let expected = ["no power", "could not be appended to it"];
                    assert!(expected.iter().any(|t| text.contains(t)), "{context}: {text}");
                    break;
                }
            }
            cut[match rewriting {
                None => 0,
                Some((_, true)) => 1,
                Some((_, false)) => 2,
            }] += 1;
            drop(device);
            folder = folder.crash(random);
            device = SparseDevice::open_in(folder.clone(), "disk", None)
                .unwrap_or_else(|error| panic!("{context}: {error}"));
            model.crashed(content_of(&device), &context);
        }
    }
    assert!(cut.iter().all(|count| *count > seeds / 4), "{cut:?}");
}

#[test]
fn nobody_waits_for_more_than_a_slice_while_a_log_is_written_anew() {
    let folder = SimFolder::new();
    let device = SparseDevice::create_in(folder.clone(), "disk", 256 << 10, 512, None).unwrap();
    let device = Arc::new(device);
    let mut model = vec![0; 256 << 10];
    let mut write = |device: &SparseDevice, at: usize, byte: u8| {
        model[at..at + 700].fill(byte);
        device.write_at(at as u64, &[byte; 700]).unwrap();
        compare(device, &model, "meanwhile");
    };
    for at in 0..360 {
        write(&device, at * 700, 1);
    }
    device.flush().unwrap();
    // Between any two slices others write and flush; a slice is short.
    let (slice, record) = (4096, 512 + RECORD as u64);
    let mut rewrite = device.inner.begin(slice).unwrap();
    let length = || device.inner.log().fresh.as_ref().unwrap().tail.end;
    let mut slices = 0;
    loop {
        let before = length();
        let more = device.inner.slice(&mut rewrite).unwrap();
        assert!(length() - before <= slice as u64 + record, "slice {slices}");
        if !more {
            break;
        }
        write(&device, slices * 1777 % 250_000, 2);
        device.flush().unwrap();
        slices += 1;
    }
    assert!(slices > 40, "{slices} slices");
    // During either sync of the new log too: what is flushed then is durable whichever of the two
    // a crash leaves.
    let (first, second, again) = (device.clone(), device.clone(), folder.clone());
    folder.at_next_sync(move || {
        first.write_at(0, &[3; 700]).unwrap();
        first.flush().unwrap();
        again.at_next_sync(move || {
            second.write_at(700, &[4; 700]).unwrap();
            second.flush().unwrap();
            second.write_at(1400, &[5; 700]).unwrap();
        });
    });
    device.inner.switch(&rewrite).unwrap();
    model[..700].fill(3);
    model[700..1400].fill(4);
    let flushed = model.clone();
    model[1400..2100].fill(5);
    compare(&*device, &model, "written anew");
    let (end, dead) = device.log_bytes();
    assert!(end - dead <= 512 * record + HEADER as u64, "{end} {dead}");
    for seed in 0..100 {
        let after = folder.crash(&mut Random(seed));
        let device = SparseDevice::open_in(after, "disk", None).unwrap();
        let found = content_of(&device);
        assert!(found[..1024] == flushed[..1024] && found[2560..] == flushed[2560..], "{seed}");
    }
}

#[test]
fn a_rewrite_that_finds_no_room_leaves_the_device_as_it_was() {
    let folder = SimFolder::new();
    let device = SparseDevice::create_in(folder.clone(), "disk", 64 << 10, 512, None).unwrap();
    let mut model = vec![7; 64 << 10];
    device.write_at(0, &model).unwrap();
    let mut rewrite = device.inner.begin(2048).unwrap();
    assert!(device.inner.slice(&mut rewrite).unwrap());
    // Enough for one of both logs: the write is in the one that is in use.
    folder.set_room(Some(folder.used() + 600));
    device.write_at(512, &[8; 512]).unwrap();
    model[512..1024].fill(8);
    assert!(device.inner.slice(&mut rewrite).is_err());
    assert_eq!(Folder::names(&*folder).unwrap(), ["disk"]);
    compare(&device, &model, "after a failed rewrite");
    folder.set_room(None);
    device.compact().unwrap();
    compare(&device, &model, "written anew");
    device.flush().unwrap();
    drop(device);
    let device = SparseDevice::open_in(folder, "disk", None).unwrap();
    compare(&device, &model, "opened again");
}

#[test]
fn a_flush_that_finds_much_dead_has_the_log_written_anew_and_does_not_wait_for_it() {
    const LIMIT: Duration = Duration::from_secs(120);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let size = 32 << 20;
    let device = SparseDevice::create(&path, size, 4096).unwrap();
    let mut model = vec![0; size as usize];
    for round in 1..=4u8 {
        model.fill(round);
        device.write_at(0, &model).unwrap();
    }
    let before = device.log_bytes();
    assert!(before.1 > MIN_DEAD);
    // The thread waits here, and the flush does not.
    let one = device.inner.rewriting.lock().unwrap();
    device.flush().unwrap();
    assert_eq!(device.log_bytes().0 - before.0, RECORD as u64, "only a mark was added");
    // Writers beside it, before it has begun and until it is done.
    let (begin, mut random, mut writes, mut longest) =
        (Instant::now(), Random(8), 0, Duration::ZERO);
    let mut one = Some(one);
    while one.is_some() || device.log_bytes().0 > before.0 / 2 {
        if writes > 10 {
            one = None;
        }
        assert!(begin.elapsed() < LIMIT, "{:?} after {before:?}", device.log_bytes());
        let (at, data) = (random.below(size / 4096) * 4096, random.bytes(4096));
        let started = Instant::now();
        device.write_at(at, &data).unwrap();
        longest = longest.max(started.elapsed());
        model[at as usize..][..4096].copy_from_slice(&data);
        writes += 1;
        thread::yield_now();
    }
    println!("{writes} writes in {:?}, the longest took {longest:?}", begin.elapsed());
    drop(one);
    compare(&device, &model, "written anew");
    drop(device);
    compare(&SparseDevice::open(&path).unwrap(), &model, "opened again");
}
