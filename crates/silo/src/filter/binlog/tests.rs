//! Logs: recorded, played, cut, damaged.

use super::*;
use crate::{
    io::BlockDevice,
    source::{
        MemoryDevice,
        tests::{compare, exercise},
    },
    tests::random::Random,
};
use std::{
    cell::Cell,
    io::Write,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// A sink that can be read while it is written.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

fn memory(bytes: u64) -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new("test", bytes).unwrap())
}

fn fast(log: &[u8], device: &dyn BlockDevice) -> Result<ReplayReport, BinlogError> {
    let log = Reader::new(log)?;
    replay(log, device, Pace::AsFastAsPossible, &mut Instant::now, &mut |_| unreachable!())
}

#[test]
fn check_40_a_log_that_is_played_gives_the_identical_image() {
    for (seed, size) in [(1, 512u64), (2, 70_001), (3, 20 << 20)] {
        let (device, sink) = (memory(size), Sink::default());
        let options = RecordOptions { reads: true };
        let recorder = Recorder::new(device, Box::new(sink.clone()), options).unwrap();
        let mut model = vec![0; size as usize];
        exercise(&recorder, &mut model, &mut Random(seed), 200, "recorded");
        recorder.write_at(0, &Random(seed).bytes(size.min(18 << 20) as usize)).unwrap();
        recorder.flush().unwrap();
        recorder.read_at(0, &mut model).unwrap();
        let records = recorder.finish().unwrap();
        let other = memory(size + 100);
        let report = fast(&sink.bytes(), &*other).unwrap();
        assert_eq!(report.operations, records);
        model.resize(size as usize + 100, 0);
        compare(&*other, &model, "played");
    }
}

#[test]
fn check_40_writers_at_once_are_written_down_in_the_order_of_their_effect() {
    let (device, sink) = (memory(64 << 10), Sink::default());
    let recorder = Recorder::new(device, Box::new(sink.clone()), RecordOptions::default()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let recorder = &recorder;
            scope.spawn(move || {
                let mut random = Random(u64::from(thread));
                for round in 0..200u8 {
                    let offset = random.below(60 << 10);
                    let length = 1 + random.below(4096) as usize;
                    let byte = round.wrapping_mul(4).wrapping_add(thread);
                    recorder.write_at(offset, &vec![byte; length]).unwrap();
                }
            });
        }
    });
    recorder.finish().unwrap();
    let mut model = vec![0; 64 << 10];
    recorder.read_at(0, &mut model).unwrap();
    let other = memory(64 << 10);
    fast(&sink.bytes(), &*other).unwrap();
    compare(&*other, &model, "played");
}

#[test]
fn check_40_the_pauses_are_kept_and_scaled() {
    let mut log = record::Header { bytes: 4096, reads: false }.encode().to_vec();
    let times = [0u64, 30, 100, 1000];
    for at in times {
        let at = Duration::from_millis(at);
        log.extend(record::encode(Kind::Write, at, 0, 1, b"x"));
        log.push(b'x');
    }
    for factor in [1.0, 4.0] {
        // A clock that only moves when somebody sleeps, and by 3 ms for each operation.
        let start = Instant::now();
        let time = Cell::new(Duration::ZERO);
        let mut slept = Vec::new();
        let report = replay(
            Reader::new(&log[..]).unwrap(),
            &*memory(4096),
            Pace::Times(factor),
            &mut || {
                let now = start + time.get();
                time.set(time.get() + Duration::from_millis(3));
                now
            },
            &mut |pause| {
                slept.push(pause);
                time.set(time.get() + pause);
            },
        )
        .unwrap();
        assert_eq!(report.operations, 4);
        let end = time.get();
        let want = Duration::from_millis(1000).div_f64(factor);
        assert!(end >= want && end < want + Duration::from_millis(10), "{factor}: {end:?}");
        assert!(report.late <= Duration::from_millis(6), "{:?}", report.late);
    }
    // And on a real clock, roughly.
    let start = Instant::now();
    let report = replay(
        Reader::new(&log[..]).unwrap(),
        &*memory(4096),
        Pace::Times(5.0),
        &mut Instant::now,
        &mut std::thread::sleep,
    )
    .unwrap();
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert_eq!(report.recorded, Duration::from_secs(1));
}

#[test]
fn check_40_a_log_that_was_cut_or_damaged_says_where_and_what_came_before_is_played() {
    let (device, sink) = (memory(10_000), Sink::default());
    let recorder = Recorder::new(device, Box::new(sink.clone()), RecordOptions::default()).unwrap();
    let mut ends = vec![sink.bytes().len()];
    for index in 0..5u8 {
        recorder.write_at(u64::from(index) * 2000, &[index + 1; 1500]).unwrap();
        ends.push(sink.bytes().len());
    }
    let log = sink.bytes();
    for length in 0..log.len() {
        let device = memory(10_000);
        let result = fast(&log[..length], &*device);
        let whole = ends.iter().filter(|end| **end <= length).count();
        match result {
            Ok(report) => {
                assert_eq!(ends[whole - 1], length);
                assert_eq!(report.operations, whole as u64 - 1);
            }
            Err(BinlogError::NotALog(_)) => assert_eq!(whole, 0, "length {length}"),
            Err(BinlogError::Truncated { at, records }) => {
                assert_eq!((at, records), (ends[whole - 1] as u64, whole as u64 - 1));
                let mut byte = [0];
                for index in 0..5u64 {
                    device.read_at(index * 2000, &mut byte).unwrap();
                    assert_eq!(byte[0] != 0, index < records);
                }
            }
            Err(other) => panic!("length {length}: {other}"),
        }
    }
    for at in (0..log.len()).step_by(7) {
        let mut damaged = log.clone();
        damaged[at] ^= 4;
        assert!(fast(&damaged, &*memory(10_000)).is_err(), "byte {at}");
    }
    assert!(matches!(fast(&log, &*memory(9_999)), Err(BinlogError::TooSmall { .. })));
}

#[test]
fn a_log_has_these_bytes_and_another_version_is_refused_by_name() {
    let mut log = record::Header { bytes: 0x0102, reads: true }.encode().to_vec();
    assert_eq!(log[..24], *b"SILOBIN\0\x01\0\0\0\x01\0\0\0\x02\x01\0\0\0\0\0\0");
    assert_eq!(log[24..], twox_hash::XxHash3_64::oneshot(&log[..24]).to_le_bytes());
    let head = record::encode(Kind::Write, Duration::from_nanos(0x0506), 7, 2, b"ab");
    assert_eq!(
        head[..32],
        *b"SBLR\0\0\0\0\x06\x05\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"
    );
    let sum = twox_hash::XxHash3_64::oneshot(&[&head[..32], b"ab"].concat());
    assert_eq!(head[32..], sum.to_le_bytes());
    log[8] = 2;
    assert!(matches!(Reader::new(&log[..]), Err(BinlogError::Version(2))));
}

#[test]
fn a_log_made_from_an_image_holds_its_blocks_that_are_not_zero() {
    let image = memory(100_000);
    image.write_at(5000, &[1; 10]).unwrap();
    image.write_at(99_999, &[2]).unwrap();
    let mut log = Vec::new();
    assert_eq!(create(&*image, 4096, &mut log).unwrap(), 2);
    assert!(log.len() < 10_000);
    let other = memory(100_000);
    fast(&log, &*other).unwrap();
    let mut want = vec![0; 100_000];
    image.read_at(0, &mut want).unwrap();
    compare(&*other, &want, "made");
}
