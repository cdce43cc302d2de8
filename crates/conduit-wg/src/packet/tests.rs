//! What the kernel gives, cut; what is cut, put together; and what is neither, left alone.

use super::*;
use proptest::prelude::*;

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const FIN: u8 = 0x01;
const CWR: u8 = 0x80;

/// As RFC 1071 says it, not as the code under test does it.
fn sum(mut sum: u32, bytes: &[u8]) -> u32 {
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum
}

/// Where the transport header is, and whether all checksums and lengths are right.
fn verify(packet: &[u8]) -> usize {
    let (start, protocol, addresses) = if packet[0] >> 4 == 4 {
        assert_eq!(usize::from(word(packet, 2)), packet.len(), "length of IPv4");
        assert_eq!(sum(0, &packet[..20]), 0xffff, "checksum of IPv4");
        (20, packet[9], 12..20)
    } else {
        assert_eq!(usize::from(word(packet, 4)) + 40, packet.len(), "length of IPv6");
        (40, packet[6], 8..40)
    };
    let length = packet.len() - start;
    let pseudo = sum(sum(0, &packet[addresses]), &[0, protocol, 0, 0]) + length as u32;
    assert_eq!(
        sum(sum(pseudo, &[]), &packet[start..]) % 0xffff,
        0,
        "checksum of protocol {protocol}"
    );
    if protocol == UDP {
        assert_eq!(usize::from(word(packet, start + 4)), length, "length of UDP");
    }
    start
}

#[derive(Clone, Debug)]
struct Shape {
    v4: bool,
    protocol: u8,
    stream: u8,
    id: u16,
    sequence: u32,
    flags: u8,
    options: bool,
    payload: Vec<u8>,
}

impl Shape {
    fn tcp(sequence: u32, payload: &[u8]) -> Self {
        let payload = payload.to_vec();
        let (v4, protocol, stream, id, flags, options) = (true, TCP, 1, 7, ACK, true);
        Self { v4, protocol, stream, id, sequence, flags, options, payload }
    }

    /// Headers with everything but checksums and lengths, and the payload.
    fn raw(&self) -> (Vec<u8>, usize) {
        let mut p = Vec::new();
        if self.v4 {
            p.extend([0x45, 0, 0, 0]);
            p.extend(self.id.to_be_bytes());
            p.extend([0x40, 0, 64, self.protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, self.stream]);
        } else {
            p.extend([0x60, 0, 0, 7, 0, 0, self.protocol, 64]);
            p.extend([0xfd; 16]);
            p.extend([self.stream; 16]);
        }
        let start = p.len();
        p.extend([0x13, 0x88, 0x20, 0]);
        if self.protocol == TCP {
            p.extend(self.sequence.to_be_bytes());
            p.extend([0, 0, 0, 9]);
            p.extend([if self.options { 0x80 } else { 0x50 }, self.flags, 1, 0, 0, 0, 0, 0]);
            if self.options {
                p.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
            }
        } else {
            p.extend([0, 0, 0, 0]);
        }
        p.extend(&self.payload);
        (p, start)
    }

    /// As it comes from the kernel for its reader to finish: `segment` bytes in each part.
    fn frame(&self, segment: u16) -> Vec<u8> {
        let (mut p, start) = self.raw();
        let length = p.len();
        if self.v4 {
            put(&mut p, 2, length as u16);
        } else {
            put(&mut p, 4, (length - 40) as u16);
        }
        let offset = if self.protocol == TCP { 16 } else { 6 };
        if self.protocol == UDP {
            put(&mut p, start + 4, (length - start) as u16);
        }
        let addresses = if self.v4 { 12..20 } else { 8..40 };
        let pseudo = sum(sum(0, &p[addresses]), &[0, self.protocol]) + (length - start) as u32;
        put(&mut p, start + offset, sum(pseudo, &[0, 0]) as u16);
        let kind = match (segment, self.protocol, self.v4) {
            (0, ..) => Kind::Single,
            (_, UDP, _) => Kind::Datagrams,
            (.., true) => Kind::Tcp4,
            (.., false) => Kind::Tcp6,
        };
        let (start, offset) = (start as u16, offset as u16);
        let header = VnetHeader { needs_checksum: true, kind, headers: 0, segment, start, offset };
        [&header.bytes()[..], &p].concat()
    }

    /// As it is on the wire.
    fn packet(&self) -> Vec<u8> {
        let (mut p, _) = self.raw();
        let length = p.len();
        if self.v4 {
            put(&mut p, 2, length as u16);
            let check = !(sum(0, &p[..20]) as u16);
            put(&mut p, 10, check);
            p = p.clone();
        }
        let mut frame = self.frame(0);
        if self.v4 {
            frame[VNET..VNET + 20].copy_from_slice(&p[..20]);
        }
        let mut packets = cut_all(&mut frame);
        assert_eq!(packets.len(), 1);
        let packet = packets.remove(0);
        verify(&packet);
        packet
    }
}

fn cut_all(frame: &mut [u8]) -> Vec<Vec<u8>> {
    let mut room: Box<[u8; LARGEST]> = vec![0; LARGEST].into_boxed_slice().try_into().unwrap();
    let mut packets = Vec::new();
    cut(frame, &mut room, |p| packets.push(p.to_vec())).unwrap();
    packets
}

/// Frames that a merger makes of packets.
fn merge_all(datagrams: bool, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let (mut merger, mut frames) = (Merger::new(datagrams), Vec::new());
    let mut write = |f: &[u8]| frames.push(f.to_vec());
    for packet in packets {
        let mut frame = [&[0xee; VNET], &packet[..]].concat();
        merger.push(&mut frame, &mut write);
    }
    merger.flush(&mut write);
    frames
}

fn headers_of(packet: &[u8]) -> usize {
    let start = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let protocol = if start == 20 { packet[9] } else { packet[6] };
    start + if protocol == TCP { usize::from(packet[start + 12] >> 4) * 4 } else { 8 }
}

fn shape() -> impl Strategy<Value = (Shape, u16)> {
    let payload = prop::collection::vec(any::<u8>(), 1..20_000);
    (any::<[bool; 3]>(), any::<u32>(), any::<u16>(), 0..4_u8, payload, 1..9000_u16).prop_map(
        |([v4, tcp, options], sequence, id, flags, payload, segment)| {
            let flags = [ACK, ACK | PSH, ACK | FIN, ACK | CWR][usize::from(flags)];
            let protocol = if tcp { TCP } else { UDP };
            // As many as the kernel puts into one.
            let segment = segment.max((payload.len() / 60) as u16 + 1);
            (Shape { v4, protocol, stream: 1, id, sequence, flags, options, payload }, segment)
        },
    )
}

proptest! {
    #[test]
    fn a_large_segment_becomes_whole_packets_and_these_a_large_segment(
        (shape, segment) in shape()
    ) {
        let packets = cut_all(&mut shape.frame(segment));
        prop_assert_eq!(packets.len(), shape.payload.len().div_ceil(segment.into()));
        let mut payload = Vec::new();
        for (n, packet) in packets.iter().enumerate() {
            let start = verify(packet);
            let part = &packet[headers_of(packet)..];
            let (first, last) = (n == 0, n + 1 == packets.len());
            prop_assert!(last || part.len() == usize::from(segment));
            if shape.v4 {
                prop_assert_eq!(word(packet, 4), shape.id.wrapping_add(n as u16));
            }
            if shape.protocol == TCP {
                let sequence = shape.sequence.wrapping_add(payload.len() as u32);
                prop_assert_eq!(long(packet, start + 4), sequence);
                let mut flags = shape.flags;
                if !last { flags &= !(PSH | FIN); }
                if !first { flags &= !CWR; }
                prop_assert_eq!(packet[start + 13], flags);
            }
            payload.extend_from_slice(part);
        }
        prop_assert_eq!(&payload, &shape.payload);
        // Together again, and cut again: bit by bit the same.
        let mut frames = merge_all(true, &packets);
        if shape.flags & !PSH == ACK {
            prop_assert_eq!(frames.len(), 1);
        }
        let again: Vec<_> = frames.iter_mut().flat_map(|f| cut_all(f)).collect();
        prop_assert_eq!(again, packets);
    }

    #[test]
    fn packets_of_many_streams_stay_what_they_are_and_each_streams_in_order(
        seed in prop::collection::vec((0..12_u8, 0..10_u8, any::<bool>(), 1..4_usize), 1..200)
    ) {
        let (mut next, mut ids) = ([1_u32; 12], [0_u16; 12]);
        let mut packets = Vec::new();
        for (stream, what, v4, size) in seed {
            let at = usize::from(stream);
            let mut shape = Shape::tcp(next[at], &vec![stream; size * 100]);
            shape.v4 = v4;
            (shape.stream, shape.id) = (stream, ids[at]);
            match what {
                0 => shape.flags |= PSH,
                1 => shape.flags |= FIN,
                2 => shape.sequence = shape.sequence.wrapping_sub(100),
                3 => shape.options = false,
                4 => shape.payload.clear(),
                5 => shape.protocol = UDP,
                _ => {}
            }
            let mut packet = shape.packet();
            if what == 6 {
                // Broken on the way: must stay so.
                *packet.last_mut().unwrap() ^= 1;
            }
            next[at] = shape.sequence.wrapping_add(shape.payload.len() as u32);
            ids[at] = shape.id.wrapping_add(1);
            packets.push(packet);
        }
        let mut frames = merge_all(true, &packets);
        let again: Vec<_> = frames.iter_mut().flat_map(|f| cut_all(f)).collect();
        let of = |all: &[Vec<u8>], stream: u8, v4: bool| -> Vec<Vec<u8>> {
            let (version, at) = if v4 { (4, 19) } else { (6, 39) };
            all.iter().filter(|p| p[0] >> 4 == version && p[at] == stream).cloned().collect()
        };
        prop_assert_eq!(again.len(), packets.len());
        for stream in 0..12 {
            // TCP and UDP of one stream number are two streams of the wire.
            for protocol in [TCP, UDP] {
                for v4 in [true, false] {
                    let place = if v4 { 9 } else { 6 };
                    let pick = |all: &[Vec<u8>]| -> Vec<Vec<u8>> {
                        of(all, stream, v4).into_iter().filter(|p| p[place] == protocol).collect()
                    };
                    prop_assert_eq!(pick(&again), pick(&packets));
                }
            }
        }
    }

    #[test]
    fn whatever_the_bytes_are_nothing_panics_and_nothing_is_lost(
        mut frame in prop::collection::vec(any::<u8>(), 0..300),
        version in 0..3_u8,
        kind in 0..7_u8,
    ) {
        if frame.len() > VNET {
            frame[0] &= 1;
            frame[1] = kind;
            frame[3] = 0;
            frame[5] = 0;
            frame[7] = 0;
            frame[9] = 0;
            frame[VNET] = [0x45, 0x60, frame[VNET]][usize::from(version)];
        }
        let mut room: Box<[u8; LARGEST]> = vec![0; LARGEST].into_boxed_slice().try_into().unwrap();
        let _ = cut(&mut frame.clone(), &mut room, |p| assert!(p.len() <= LARGEST));
        if frame.len() >= VNET {
            let packets = [frame[VNET..].to_vec()];
            let frames = merge_all(true, &packets);
            prop_assert_eq!(frames.len(), 1);
            prop_assert_eq!(&frames[0][VNET..], &packets[0][..]);
        }
    }
}

#[test]
fn a_push_ends_what_is_gathered_and_keeps_its_mark() {
    let packets: Vec<_> = (0..4_u16)
        .map(|n| {
            let mut shape = Shape::tcp(100 + u32::from(n) * 500, &[n as u8; 500]);
            shape.id = n;
            if n == 1 {
                shape.flags |= PSH;
            }
            shape.packet()
        })
        .collect();
    let mut frames = merge_all(false, &packets);
    assert_eq!(frames.len(), 2);
    assert_eq!(frames[0][VNET + 33], ACK | PSH);
    let again: Vec<_> = frames.iter_mut().flat_map(|f| cut_all(f)).collect();
    assert_eq!(again, packets);
}

#[test]
fn a_stream_of_64_kib_is_one_frame_and_the_next_byte_another() {
    let packets: Vec<_> = (0..50_u16)
        .map(|n| {
            let mut shape = Shape::tcp(u32::from(n) * 1388, &[n as u8; 1388]);
            shape.id = n;
            shape.packet()
        })
        .collect();
    let frames = merge_all(false, &packets);
    assert_eq!(frames.len(), 2);
    assert!(frames[0].len() > 60_000 && frames[0].len() <= VNET + LARGEST);
}

#[test]
fn datagrams_are_put_together_only_where_the_kernel_takes_them() {
    let datagram = |n: u16| {
        let mut shape = Shape::tcp(0, &[n as u8; 300]);
        (shape.protocol, shape.id) = (UDP, n);
        shape.packet()
    };
    let packets: Vec<_> = (0..100).map(datagram).collect();
    assert_eq!(merge_all(false, &packets), {
        let alone = |p: &Vec<u8>| [&[0; VNET], &p[..]].concat();
        packets.iter().map(alone).collect::<Vec<_>>()
    });
    let mut frames = merge_all(true, &packets);
    assert_eq!(frames.len(), 2, "at most 64 in one");
    let again: Vec<_> = frames.iter_mut().flat_map(|f| cut_all(f)).collect();
    assert_eq!(again, packets);
}

/// In one's complement zero is 0 and 0xffff; a cut writes one of them.
#[test]
fn a_checksum_of_zero_stays_as_it_was_written() {
    // What each holds besides is chosen so that a checksum comes out as zero.
    let with = |change: &dyn Fn(&mut Shape, u16), place: usize| {
        let of = |n: u16| {
            let mut shape = Shape::tcp(1, &[4; 300]);
            shape.options = false;
            change(&mut shape, n);
            (word(&shape.packet(), place), shape)
        };
        let (_, shape) =
            (0..=u16::MAX).map(of).find(|(check, _)| matches!(check, 0 | 0xffff)).unwrap();
        shape
    };
    let tcp = with(&|shape, n| shape.sequence = u32::from(n), 20 + 16);
    let ip = with(&|shape, n| shape.id = n, 10);
    for (shape, place) in [(tcp, 20 + 16), (ip, 10)] {
        let mut second = shape.clone();
        second.sequence += 300;
        second.id += 1;
        for written in [0, 0xffff] {
            let mut packets = [shape.packet(), second.packet()];
            put(&mut packets[0], place, written);
            let mut frames = merge_all(true, &packets);
            assert_eq!(frames.len(), if written == 0 { 1 } else { 2 }, "at {place}");
            let again: Vec<_> = frames.iter_mut().flat_map(|f| cut_all(f)).collect();
            assert_eq!(again, packets, "at {place}, written {written:#x}");
        }
    }
}

#[test]
fn what_contradicts_itself_is_refused_by_name() {
    let mut room: Box<[u8; LARGEST]> = vec![0; LARGEST].into_boxed_slice().try_into().unwrap();
    let frame = Shape::tcp(1, &[1; 3000]).frame(1000);
    let mut refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = frame.clone();
        change(&mut frame);
        cut(&mut frame, &mut room, |_| panic!("nothing of it may go out")).unwrap_err()
    };
    assert_eq!(refused(&|f| f.truncate(VNET + 30)), Malformed::Short);
    assert_eq!(refused(&|f| f.truncate(5)), Malformed::Short);
    assert_eq!(refused(&|f| f[1] = 3), Malformed::Kind);
    assert_eq!(refused(&|f| f[1] = 4), Malformed::Headers);
    assert_eq!(refused(&|f| f[4..6].fill(0)), Malformed::Short);
    assert_eq!(refused(&|f| f[VNET + 20 + 12] = 0x10), Malformed::Headers);
    assert_eq!(refused(&|f| f[VNET + 9] = 17), Malformed::Headers);
    assert_eq!(refused(&|f| f[0] = 0), Malformed::Short);
}

#[test]
fn addresses_are_found_or_there_are_none() {
    let v4 = Shape::tcp(1, &[]).packet();
    let (from, to) = addresses(&v4).unwrap();
    assert_eq!((from.to_string(), to.to_string()), ("10.0.0.1".into(), "10.0.0.1".into()));
    assert_eq!(addresses(&v4[..19]), None);
    assert_eq!(addresses(&[]), None);
    assert_eq!(addresses(&[0x50; 60]), None);
}
