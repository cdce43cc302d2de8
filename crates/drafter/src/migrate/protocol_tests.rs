//! The wire format: what is sent comes back, what is damaged is refused, and bytes stay what they are.

use super::*;
use proptest::prelude::*;

fn bytes_of(frame: &Frame, checked: bool) -> Vec<u8> {
    let mut out = Vec::new();
    FrameWriter::new(&mut out, checked).write(frame).unwrap();
    out
}

fn arbitrary_frame() -> impl Strategy<Value = Frame> {
    let device = any::<u8>().prop_map(DeviceNumber);
    let range = (0u64..1 << 40, 1u64..1 << 20).prop_map(|(s, c)| BlockRange::new(s, c));
    let bytes = proptest::collection::vec(any::<u8>(), 0..64);
    prop_oneof![
        bytes.clone().prop_map(Frame::Prepare),
        bytes.clone().prop_map(Frame::Confirmed),
        bytes.clone().prop_map(Frame::Resume),
        bytes.clone().prop_map(Frame::Resumed),
        (device.clone(), 0u64..1 << 40, 1usize..3).prop_map(|(device, start, n)| {
            Frame::Blocks { device, start: BlockIndex(start), data: vec![7; n * BLOCK_SIZE] }
        }),
        (device.clone(), 0u64..1 << 40, 1usize..3, any::<u8>()).prop_map(
            |(device, start, n, byte)| {
                let names = vec![byte; n * NAME_BYTES];
                Frame::Names { device, start: BlockIndex(start), names }
            }
        ),
        (device.clone(), range.clone()).prop_map(|(device, range)| Frame::Zero { device, range }),
        (device.clone(), range.clone()).prop_map(|(device, range)| Frame::Demand { device, range }),
        (device.clone(), proptest::collection::vec(range.clone(), 0..9))
            .prop_map(|(device, ranges)| Frame::Missing { device, ranges }),
        (device, proptest::collection::vec(range, 0..9))
            .prop_map(|(device, ranges)| Frame::Changed { device, ranges }),
        bytes.clone().prop_map(Frame::History),
        (bytes.clone(), bytes).prop_map(|(meta, state)| Frame::Token { meta, state }),
        (any::<u64>(), any::<u64>(), any::<u32>()).prop_map(|(attempt, serial, good_for_ms)| {
            Frame::Offer { attempt, serial, good_for_ms }
        }),
        (any::<u64>(), ".{0,40}").prop_map(|(attempt, reason)| Frame::Refused { attempt, reason }),
        any::<u64>().prop_map(Frame::RoundEnd),
        any::<u64>().prop_map(Frame::Expect),
        proptest::collection::vec(any::<u8>(), 0..9).prop_map(Frame::Durable),
        Just(Frame::BulkEnd),
    ]
}

proptest! {
    #[test]
    fn every_frame_comes_back_as_it_was_sent(frame in arbitrary_frame(), checked: bool) {
        let bytes = bytes_of(&frame, checked);
        prop_assert_eq!(FrameReader::new(&bytes[..], checked).read().unwrap(), frame);
    }

    #[test]
    fn hop_check_11_a_damaged_or_cut_frame_is_refused(frame in arbitrary_frame(), at: usize, bit in 0u8..8) {
        let mut bytes = bytes_of(&frame, true);
        let cut = at % bytes.len();
        prop_assert!(FrameReader::new(&bytes[..cut], true).read().is_err());
        bytes[cut] ^= 1 << bit;
        prop_assert!(FrameReader::new(&bytes[..], true).read().is_err());
    }

    #[test]
    fn hop_check_11_no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = FrameReader::new(&bytes[..], false).read();
        let _ = Preamble::read(&mut &bytes[..]);
    }
}

#[test]
fn golden_bytes_of_version_3() {
    let preamble = Preamble { role: Role::Fault, session: SessionId([0xab; 16]) };
    let mut expected = b"DRFT\x03\x00\x01\x00".to_vec();
    expected.extend([0xab; 16]);
    assert_eq!(preamble.encode().to_vec(), expected);

    let demand = Frame::Demand { device: DeviceNumber(2), range: BlockRange::new(0x1234, 3) };
    let mut expected = vec![16, 2, 0, 0, 0, 0, 0, 0, 0x34, 0x12, 0, 0, 0, 0, 0, 0];
    expected.extend([3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes_of(&demand, false), expected);

    let token = Frame::Token { meta: b"{}".to_vec(), state: vec![9, 8, 7] };
    let mut expected = vec![8, 0, 0, 0, 5, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
    expected.extend([0; 16]);
    expected.extend(b"{}\x09\x08\x07");
    assert_eq!(bytes_of(&token, false), expected);

    let expect = bytes_of(&Frame::Expect(0x123), false);
    let mut expected = vec![19, 0, 0, 0, 0, 0, 0, 0, 0x23, 1];
    expected.resize(32, 0);
    assert_eq!(expect, expected, "an older peer of this version skips it");

    let names = vec![7; NAME_BYTES];
    let names = Frame::Names { device: DeviceNumber(1), start: BlockIndex(0x45), names };
    let bytes = bytes_of(&names, false);
    assert_eq!((&bytes[..5], &bytes[8..10]), (&[24, 1, 0, 0, 32][..], &[0x45, 0][..]));
    assert_eq!(&bytes[32..], [7; NAME_BYTES]);
    let mut half = bytes.clone();
    half[4] = 31;
    assert!(FrameReader::new(&half[..63], false).read().is_err(), "half a name");

    let missing = Frame::Missing { device: DeviceNumber(1), ranges: vec![BlockRange::new(5, 2)] };
    let bytes = bytes_of(&missing, true);
    assert_eq!(&bytes[..8], [7, 1, 0, 0, 12, 0, 0, 0]);
    assert_eq!(&bytes[32..], [5, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
}

#[test]
fn a_foreign_or_newer_peer_is_named() {
    let http = b"GET / HTTP/1.1\r\nHost: example\r\n\r\n";
    assert!(matches!(Preamble::read(&mut &http[..]), Err(WireError::Foreign(_))));
    let mut newer = Preamble { role: Role::Main, session: SessionId([0; 16]) }.encode();
    newer[4] = 9;
    let error = Preamble::read(&mut &newer[..]).unwrap_err();
    assert!(matches!(error, WireError::Version { theirs: 9 }), "{error}");
}

#[test]
fn hop_check_11_a_huge_length_allocates_nothing() {
    let mut header = [0u8; 32];
    header[0] = 3;
    header[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(FrameReader::new(&header[..], false).read(), Err(WireError::Invalid(_))));
}
