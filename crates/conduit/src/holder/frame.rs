//! What the holder must know of a frame: whose it is, and how it may be given back. The program that
//! put it into the hold tap wrote its network into the source address.

use conduit_bpf::Key;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The first bytes of a held frame's source address; three bytes of network follow.
const MARK: [u8; 3] = [0x02, 0x63, 0x64];
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

/// Whose frame this is, after `header` bytes of `virtio_net_hdr`; `None` if it is no held frame.
pub(super) fn read(frame: &[u8], header: usize) -> Option<(Key, Class)> {
    let ethernet = frame.get(header..)?;
    let (head, packet) = ethernet.split_at_checked(ETHERNET)?;
    if head[6..9] != MARK {
        return None;
    }
    let net = u32::from_be_bytes([0, head[9], head[10], head[11]]);
    let (address, protocol) = match [head[12], head[13]] {
        [0x08, 0x00] => {
            let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            (IpAddr::from(Ipv4Addr::from(to)), packet[9])
        }
        [0x86, 0xdd] => {
            let to: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            (IpAddr::from(Ipv6Addr::from(to)), packet[6])
        }
        _ => return None,
    };
    let class = if protocol == TCP { Class::Stream } else { Class::Datagram };
    Some((Key { net, address: address.to_canonical() }, class))
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
        assert_eq!(read(&sample(0x12_3456, 5, 6, b"x"), 10), Some((key, Class::Stream)));
        assert_eq!(read(&sample(0x12_3456, 5, 17, b"x"), 10), Some((key, Class::Datagram)));
        let mut six = vec![0; 10];
        six.extend([0x02; 6]);
        six.extend([0x02, 0x63, 0x64, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 6, 64]);
        six.extend([0xfd; 16]);
        six.extend([0xfe; 16]);
        let key = Key { net: 1, address: IpAddr::from([0xfe_u8; 16]) };
        assert_eq!(read(&six, 10), Some((key, Class::Stream)));
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
