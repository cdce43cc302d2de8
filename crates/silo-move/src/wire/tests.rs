use super::*;
use crate::codec::{Encoder, NothingKnown};
use proptest::prelude::*;
use silo_block::{
    block::BlockRange,
    device::DeviceName,
    geometry::Geometry,
    hash::RootHash,
    order::Class,
    rounds::Epoch,
    session::messages::{
        BlockHeader, Custom, DeviceIndex, DeviceInfo, Held, LastRound, Reason, SessionId, Term,
        ToDestination, ToSource, Token, Wait,
    },
};
use std::{io::Read, time::Duration};

const SESSION: SessionId = SessionId(*b"0123456789abcdef");

fn sent(message: &ToDestination, checked: bool) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new(), checked);
    write_to_destination(&mut writer, message).unwrap();
    writer.flush().unwrap();
    std::mem::take(writer.inner())
}

fn all_to_destination() -> Vec<ToDestination> {
    let ranges = vec![BlockRange::new(0, 1), BlockRange::new(70_000, 12)];
    vec![
        ToDestination::Hello { version: 1, session: SESSION },
        ToDestination::Group(vec![DeviceInfo {
            name: DeviceName::new("root").unwrap(),
            geometry: Geometry::new(1_000_001, 4096).unwrap(),
            base: Some(RootHash::from([7; 32])),
            history: vec![Term { id: SESSION, first: Epoch(1) }],
            clock: Epoch(9),
        }]),
        ToDestination::Round {
            device: DeviceIndex(3),
            epoch: Epoch(4),
            blocks: ranges.clone(),
            last: true,
        },
        ToDestination::Promise {
            device: DeviceIndex(0),
            epoch: Epoch(2),
            blocks: vec![(
                silo_block::block::BlockIndex(5),
                silo_block::session::messages::BlockHash([1; 32]),
            )],
        },
        ToDestination::Expect { device: DeviceIndex(1), order: ranges.clone() },
        ToDestination::Kept { device: DeviceIndex(1), epoch: Epoch(3), blocks: ranges.clone() },
        ToDestination::Token {
            attempt: 2,
            devices: vec![LastRound { epoch: Epoch(5), blocks: ranges, flushes: vec![8, 9] }],
            state: b"state".to_vec(),
        },
        ToDestination::Custom(Custom { serial: 1, kind: 2, payload: vec![3] }),
        ToDestination::CustomDone { serial: 4 },
        ToDestination::Released,
        ToDestination::Abort(Reason::Outpaced { round: 3, left: 1 << 40 }),
        ToDestination::Alive,
    ]
}

fn all_to_source() -> Vec<ToSource> {
    let range = BlockRange::new(9, 2);
    let device = DeviceIndex(1);
    let reasons = [
        Reason::Version { ours: 1, theirs: 2 },
        Reason::UnknownSession(SESSION),
        Reason::Group { device: "root".into(), what: "too small".into() },
        Reason::Read { device, range, what: "EIO".into() },
        Reason::Store { device, range, what: "full".into() },
        Reason::Deadline { what: Wait::Durable, after: Duration::from_secs(3) },
        Reason::Cancelled("ü".into()),
        Reason::Lost { device, kept: Epoch(3) },
        Reason::Protocol("x".into()),
    ];
    let mut all = vec![
        ToSource::Hello { version: 1, session: SESSION },
        ToSource::Missing { device, blocks: vec![range] },
        ToSource::Have {
            devices: vec![Held { clock: Epoch(3), missing: vec![range, range] }],
            token: Token::Runs(7),
        },
        ToSource::Applied { device, epoch: Epoch(1) },
        ToSource::Receipt { device, range, epoch: Epoch(1), retry: vec![range] },
        ToSource::Need { device, range, class: Class::Demand },
        ToSource::DontNeed { device, range, epoch: Epoch(3) },
        ToSource::Running { attempt: 1 },
        ToSource::Durable { epochs: vec![Epoch(1), Epoch(2)] },
        ToSource::Custom(Custom { serial: 1, kind: 2, payload: vec![3] }),
        ToSource::CustomDone { serial: 4 },
        ToSource::Alive,
    ];
    all.extend(reasons.iter().cloned().map(ToSource::Abort));
    all.extend(reasons.into_iter().map(|reason| ToSource::Refused { attempt: 1, reason }));
    all
}

#[test]
fn every_message_survives_the_wire_with_and_without_checksums() {
    for checked in [false, true] {
        let mut writer = FrameWriter::new(Vec::new(), checked);
        for message in all_to_destination() {
            write_to_destination(&mut writer, &message).unwrap();
        }
        for message in all_to_source() {
            write_to_source(&mut writer, &message).unwrap();
        }
        writer.flush().unwrap();
        let sent = writer.sent();
        let bytes = std::mem::take(writer.inner());
        assert_eq!(bytes.len() as u64, sent);
        let mut reader = FrameReader::new(&bytes[..], checked);
        for message in all_to_destination() {
            assert_eq!(read_to_destination(&reader.read().unwrap()).unwrap(), Some(message));
        }
        for message in all_to_source() {
            assert_eq!(read_to_source(&reader.read().unwrap()).unwrap(), Some(message));
        }
        assert_eq!(reader.received(), sent);
    }
}

#[test]
fn messages_have_these_bytes() {
    let round = ToDestination::Round {
        device: DeviceIndex(0x0203),
        epoch: Epoch(0x0405_0607),
        blocks: vec![BlockRange::new(0x1112_1314, 0x21)],
        last: true,
    };
    let expected = [
        34, 0, 0, 0, 19, 0, 0, 0, // kind, length
        0, 0, 0, 0, 0, 0, 0, 0, //
        0, 0, 0, 0, 0, 0, 0, 0, //
        0, 0, 0, 0, 0, 0, 0, 0, // no check
        3, 2, 7, 6, 5, 4, 1, // device, epoch, last
        1, 0, 0, 0, 0x14, 0x13, 0x12, 0x11, 0x21, 0, 0, 0, // one range
    ];
    assert_eq!(sent(&round, false), expected);
    let checked = sent(&ToDestination::Alive, true);
    assert_eq!(checked[24..], 0x7cdb_3979_733a_f037u64.to_le_bytes(), "{:02x?}", &checked[24..]);
}

#[test]
fn a_preamble_has_these_bytes_and_others_are_refused_by_name() {
    let preamble = Preamble { role: Role::Data(3), data: 4, session: SESSION, attempt: 0x0102 };
    let bytes = preamble.encode();
    let mut expected = *b"SILO\x01\0\x01\x03\x04\0\0\0\0\0\0\x000123456789abcdef\0\0\0\0\0\0\0\0";
    (expected[32], expected[33]) = (2, 1);
    assert_eq!(bytes, expected);
    assert_eq!(Preamble::read(&mut &bytes[..]).unwrap(), preamble);

    let with = |at: usize, value: u8| {
        let mut bytes = bytes;
        bytes[at] = value;
        Preamble::read(&mut &bytes[..]).unwrap_err()
    };
    assert!(matches!(with(0, b'X'), WireError::Foreign(_)));
    assert!(matches!(with(4, 9), WireError::Version { theirs: 9 }));
    assert!(with(4, 9).to_string().contains("update the older side"));
    for (at, value) in [(6, 9), (7, 4), (8, 0), (8, 200)] {
        assert!(matches!(with(at, value), WireError::Invalid(_)), "byte {at}");
    }
}

#[test]
fn a_run_of_blocks_survives_the_wire_and_one_changed_bit_does_not() {
    let content: Vec<u8> = (0..100_000u32).map(|at| (at.wrapping_mul(at) % 253) as u8).collect();
    let mut encoder = Encoder::new(Some(crate::codec::Method::Plain));
    let header = BlockHeader {
        device: DeviceIndex(2),
        range: BlockRange::new(77, 25),
        epoch: Epoch(6),
        class: Class::Dirty,
    };
    let parcel = encoder.encode(2, header.range.start, 4096, &content, &NothingKnown);
    let mut writer = FrameWriter::new(Vec::new(), true);
    Blocks::write(&mut writer, &header, &parcel).unwrap();
    let bytes = std::mem::take(writer.inner());
    let mut reader = FrameReader::new(&bytes[..], true);
    let frame = reader.read().unwrap();
    let blocks = Blocks::read(&frame).unwrap().unwrap();
    assert_eq!((blocks.header, blocks.parcel), (header, &parcel.to_vec()[..]));
    for at in [0, 1, 9, 17, 30, 50_000, bytes.len() - 1] {
        let mut bytes = bytes.clone();
        bytes[at] ^= 4;
        assert!(matches!(FrameReader::new(&bytes[..], true).read(), Err(WireError::Damaged)));
    }
}

/// Gives what it has in pieces of odd sizes.
struct Drip<'a>(&'a [u8], usize);

impl Read for Drip<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.1 = self.1 * 7 % 1013 + 1;
        let n = self.0.len().min(buf.len()).min(self.1);
        buf[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        Ok(n)
    }
}

#[test]
fn frames_of_all_sizes_come_through_a_stream_that_drips() {
    let mut writer = FrameWriter::new(Vec::new(), true);
    let payload = |n: usize| vec![n as u8; n * 37 % 60_000];
    for n in 0..200 {
        let header = Header { kind: 200, class: 1, device: n as u16, a: n as u64, b: 3 };
        writer.write(header, &[&payload(n)[..], b"end"]).unwrap();
    }
    writer.flush().unwrap();
    let bytes = std::mem::take(writer.inner());
    let mut reader = FrameReader::new(Drip(&bytes, 5), true);
    for n in 0..200 {
        let frame = reader.read().unwrap();
        assert_eq!(frame.header.a, n as u64);
        assert_eq!(frame.payload[..frame.payload.len() - 3], payload(n));
    }
    assert!(
        matches!(reader.read(), Err(WireError::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof)
    );
}

#[test]
fn check_30_a_length_that_lies_costs_no_memory_and_one_out_of_range_is_refused() {
    let mut bytes = vec![0; 32];
    bytes[4..8].copy_from_slice(&MAX_PAYLOAD.to_le_bytes());
    fuzz_frames(&bytes);
    bytes[4..8].copy_from_slice(&(MAX_PAYLOAD + 1).to_le_bytes());
    let error = FrameReader::new(&bytes[..], false).read().unwrap_err();
    assert!(matches!(error, WireError::Invalid(_)), "{error}");
    // A list that says it is longer than its message.
    let mut round = sent(&all_to_destination()[2], false);
    round[39..43].copy_from_slice(&4000u32.to_le_bytes());
    let mut reader = FrameReader::new(&round[..], false);
    assert!(read_to_destination(&reader.read().unwrap()).is_err());
}

#[test]
fn a_kind_of_a_later_version_is_skipped() {
    let header = Header { kind: 250, class: 0, device: 0, a: 1, b: 2 };
    let frame = Frame { header, payload: b"whatever" };
    assert_eq!(read_to_destination(&frame).unwrap(), None);
    assert_eq!(read_to_source(&frame).unwrap(), None);
    assert_eq!(Blocks::read(&frame).unwrap(), None);
}

proptest! {
    #[test]
    fn check_30_no_bytes_make_a_decoder_of_the_wire_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        kind in prop_oneof![32u8..43, 64u8..78],
    ) {
        fuzz_preamble(&bytes);
        fuzz_frames(&bytes);
        fuzz_messages(&bytes);
        let mut message = bytes;
        message.insert(0, kind);
        fuzz_to_destination(&message);
        fuzz_to_source(&message);
    }

    #[test]
    fn check_30_a_damaged_message_is_refused_or_means_something(
        which in 0usize..11, at in 0usize..500, value in any::<u8>(),
    ) {
        let bytes = sent(&all_to_destination()[which], false);
        let mut message = vec![bytes[0]];
        message.extend_from_slice(&bytes[32..]);
        let at = at % message.len();
        message[at] = value;
        fuzz_to_destination(&message);
    }
}
