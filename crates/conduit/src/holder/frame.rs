//! What the holder must know of a frame: whose it is, and how it may be given back. The program that
//! put it into the hold tap wrote its network into the source address.

use super::early::Sender;
use conduit_bpf::Key;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The first bytes of a held frame's source address; three bytes of network follow (`CD_TAG_HELD`).
const MARK: [u8; 3] = [0x02, 0x63, 0x64];
/// Likewise of a frame that came too early (`CD_TAG_EARLY`).
const EARLY: [u8; 3] = [0x02, 0x63, 0x65];
const ETHERNET: usize = 14;
const TCP: u8 = 6;

/// How frames may be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Its sender waits for answers before it sends much more: a burst harms nobody.
    Stream,
    /// Nobody slows its sender down: a burst overruns the receiver's socket, so it is paced.
    Datagram,
}

/// Why a frame waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nobody has the machine that it is for.
    Held(Class),
    /// It is not known yet that its sender has the machine that it is from.
    Early(Sender),
}

/// Whose frame this is, after `header` bytes of `virtio_net_hdr`, and why it is here; `None` if it is no held
/// frame.
pub(super) fn read(frame: &[u8], header: usize) -> Option<(Key, Kind)> {
    let ethernet = frame.get(header..)?;
    let (head, packet) = ethernet.split_at_checked(ETHERNET)?;
    let early = head[6..9] == EARLY;
    if head[6..9] != MARK && !early {
        return None;
    }
    let net = u32::from_be_bytes([0, head[9], head[10], head[11]]);
    // Source and destination, and the protocol.
    let (addresses, protocol): ([IpAddr; 2], u8) = match [head[12], head[13]] {
        [0x08, 0x00] => {
            let at = |at: usize| -> Option<IpAddr> {
                let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
                Some(Ipv4Addr::from(bytes).into())
            };
            ([at(12)?, at(16)?], packet[9])
        }
        [0x86, 0xdd] => {
            let at = |at: usize| -> Option<IpAddr> {
                let bytes: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
                Some(Ipv6Addr::from(bytes).into())
            };
            ([at(8)?, at(24)?], packet[6])
        }
        _ => return None,
    };
    let [from, to] = addresses.map(|address| address.to_canonical());
    if early {
        let outer = Ipv4Addr::new(head[0], head[1], head[2], head[3]);
        let sender = Sender { outer, wire: u16::from_be_bytes([head[4], head[5]]) };
        return Some((Key { net, address: from }, Kind::Early(sender)));
    }
    let class = if protocol == TCP { Class::Stream } else { Class::Datagram };
    Some((Key { net, address: to }, Kind::Held(class)))
}

/// A held frame as the kernel would give it, for tests: to 10.77.0.`to` in `net`.
#[cfg(test)]
pub(super) fn sample(net: u32, to: u8, protocol: u8, payload: &[u8]) -> Box<[u8]> {
    let mut frame = vec![0; 10];
    frame.extend([0x02; 6]);
    frame.extend(MARK);
    frame.extend(&net.to_be_bytes()[1..]);
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend([0; 7]);
    frame.extend([protocol, 0, 0, 203, 0, 113, 2, 10, 77, 0, to]);
    frame.extend(payload);
    frame.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_says_whose_it_is() {
        let key = Key { net: 0x12_3456, address: [10, 77, 0, 5].into() };
        assert_eq!(
            read(&sample(0x12_3456, 5, 6, b"x"), 10),
            Some((key, Kind::Held(Class::Stream)))
        );
        assert_eq!(
            read(&sample(0x12_3456, 5, 17, b"x"), 10),
            Some((key, Kind::Held(Class::Datagram)))
        );
        let mut six = vec![0; 10];
        six.extend([0x02; 6]);
        six.extend([0x02, 0x63, 0x64, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 6, 64]);
        six.extend([0xfd; 16]);
        six.extend([0xfe; 16]);
        let key = Key { net: 1, address: IpAddr::from([0xfe_u8; 16]) };
        let mut early = sample(7, 5, 17, b"x").into_vec();
        early[10..19].copy_from_slice(&[10, 88, 0, 3, 1, 2, 0x02, 0x63, 0x65]);
        let sender = Sender { outer: Ipv4Addr::new(10, 88, 0, 3), wire: 0x102 };
        let of = Key { net: 7, address: [203, 0, 113, 2].into() };
        assert_eq!(read(&early, 10), Some((of, Kind::Early(sender))));
        assert_eq!(read(&six, 10), Some((key, Kind::Held(Class::Stream))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..120),
            header in 0_usize..64) {
            let _ = read(&bytes, header);
            let mut frame = sample(7, 1, 17, &bytes).into_vec();
            frame.truncate(header + 20);
            let _ = read(&frame, 10);
        }
    }
}
