use super::*;
use crate::files::RealFolder;
use std::sync::LazyLock;

static HEADER_FOR_TESTS: LazyLock<JournalHeader> = LazyLock::new(|| JournalHeader {
    geometry: Geometry::new(40_960, 4096).unwrap(),
    base_bytes: 40_000,
    instance: 0x1122,
    generation: 1,
});

fn folder(dir: &tempfile::TempDir) -> Arc<dyn Folder> {
    RealFolder::new(dir.path())
}

fn run(start: u64, count: u64, state: BlockState) -> Run {
    (BlockRange::new(start, count), state)
}

fn sample() -> (Vec<u8>, Vec<usize>) {
    let mut bytes = HEADER_FOR_TESTS.encode().to_vec();
    bytes.extend(encode_snapshot(&HEADER_FOR_TESTS, DiskStatus::Whole, &[0; 10]));
    let mut ends = vec![bytes.len()];
    let steps = [
        (DiskStatus::Whole, vec![run(0, 3, BlockState::Data)]),
        (DiskStatus::Whole, vec![run(1, 1, BlockState::Zero), run(9, 1, BlockState::Data)]),
        (DiskStatus::Receiving, vec![]),
        (DiskStatus::Armed, vec![run(4, 5, BlockState::Missing)]),
    ];
    for (sequence, (status, runs)) in (2..).zip(steps) {
        bytes.extend(encode_runs(&HEADER_FOR_TESTS, sequence, status, runs));
        ends.push(bytes.len());
    }
    (bytes, ends)
}

#[test]
fn the_journal_has_these_bytes() {
    let header = HEADER_FOR_TESTS.encode();
    assert_eq!(
        header[..56],
        *b"SILOJNL\0\x01\0\0\0\0\x10\0\0\x0a\0\0\0\0\0\0\0\x40\x9c\0\0\0\0\0\0\
           \x22\x11\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    assert_eq!(header[56..], XxHash3_64::oneshot(&header[..56]).to_le_bytes());

    let runs = [run(0x0203, 4, BlockState::Zero)];
    let record = encode_runs(&HEADER_FOR_TESTS, 2, DiskStatus::Armed, runs);
    assert_eq!(record[..24], *b"SJRC\x10\0\0\0\x02\0\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0");
    assert_eq!(record[32..], *b"\x03\x02\0\0\0\0\0\0\x04\0\0\0\x02\0\0\0");
    let mut sum = XxHash3_64::with_seed(0x1122 ^ 1);
    sum.write(&record[..24]);
    sum.write(&record[32..]);
    assert_eq!(record[24..32], sum.finish().to_le_bytes());

    let states = [0, 1, 2, 3, 0, 1, 2, 3, 1, 2];
    let map = encode_snapshot(&HEADER_FOR_TESTS, DiskStatus::Whole, &states);
    assert_eq!(map[..24], *b"SJRC\x03\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
    assert_eq!(map[32..], [0b1110_0100, 0b1110_0100, 0b0000_1001]);
    let record = Record::decode(&HEADER_FOR_TESTS, &map).unwrap();
    let mut back = [0; 10];
    record.apply(&mut back).unwrap();
    assert_eq!(back, states);
}

#[test]
fn a_journal_torn_at_any_byte_tells_the_state_of_the_last_whole_record() {
    let (bytes, ends) = sample();
    let expected = [
        (DiskStatus::Whole, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (DiskStatus::Whole, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
        (DiskStatus::Whole, [1, 2, 1, 0, 0, 0, 0, 0, 0, 1]),
        (DiskStatus::Receiving, [1, 2, 1, 0, 0, 0, 0, 0, 0, 1]),
        (DiskStatus::Armed, [1, 2, 1, 0, 3, 3, 3, 3, 3, 1]),
    ];
    for length in 0..=bytes.len() {
        for garbage in [&b""[..], &[0; 100], b"SJRC\x10\0\0\0garbage that is no record"] {
            let torn = [&bytes[..length], garbage].concat();
            // Zeros may happen to be what was torn off.
            let whole = ends.iter().filter(|end| torn.starts_with(&bytes[..**end])).count();
            let result = replay(&torn);
            if whole == 0 {
                assert!(result.is_err(), "length {length}");
                continue;
            }
            let read = result.unwrap();
            assert_eq!(read.good_bytes, ends[whole - 1] as u64);
            assert_eq!((read.status, &read.states[..]), {
                let (status, states) = &expected[whole - 1];
                (*status, &states[..])
            });
            assert_eq!(read.sequence, whole as u64);
        }
    }
}

#[test]
fn a_flipped_bit_before_the_last_record_is_an_error() {
    let (bytes, ends) = sample();
    let last = ends[ends.len() - 2];
    for at in 0..last {
        for bit in [0, 5] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            assert!(replay(&damaged).is_err(), "byte {at}, bit {bit}");
        }
    }
}

#[test]
fn a_journal_of_another_version_is_refused_by_name() {
    let (mut bytes, _) = sample();
    bytes[8] = 9;
    assert_eq!(replay(&bytes), Err(Fault::Version(9)));
}

#[test]
fn records_with_good_checksums_and_impossible_content_are_refused() {
    let (bytes, _) = sample();
    let with = |kind, fill: &[u8]| {
        let fill = |bytes: &mut Vec<u8>| bytes.extend_from_slice(fill);
        let record = encode_record(&HEADER_FOR_TESTS, 6, kind, DiskStatus::Whole, fill);
        replay(&[&bytes[..], &record].concat())
    };
    let past_the_end = [8, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0];
    let overflow = [[0xff; 8], [0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]].concat();
    let unknown_state = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0];
    for (kind, payload) in [
        (KIND_RUNS, &past_the_end[..]),
        (KIND_RUNS, &overflow),
        (KIND_RUNS, &unknown_state),
        (KIND_RUNS, &[0; 15]),
        (KIND_MAP, &[0; 2]),
        (7, &[]),
    ] {
        assert!(with(kind, payload).is_err(), "kind {kind} {payload:?}");
    }
    assert!(with(KIND_RUNS, &[]).is_ok());
}

#[test]
fn a_rewritten_journal_says_the_same_and_starts_a_generation() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal =
        Journal::create(&folder(&dir), "journal", *HEADER_FOR_TESTS, DiskStatus::Whole, &[0; 10])
            .unwrap();
    journal.append(DiskStatus::Whole, [run(2, 5, BlockState::Data)]).unwrap();
    let (before, _) = Journal::inspect(&*folder(&dir), "journal").unwrap();
    journal.rewrite(DiskStatus::Whole, &before.states).unwrap();
    journal.append(DiskStatus::Armed, [run(3, 1, BlockState::Zero)]).unwrap();
    drop(journal);
    let (journal, after) = Journal::open(&folder(&dir), "journal").unwrap();
    assert_eq!(after.states, [0, 0, 1, 2, 1, 1, 1, 0, 0, 0]);
    assert_eq!((after.header.generation, after.sequence), (2, 2));
    assert_eq!(journal.status(), DiskStatus::Armed);
}
