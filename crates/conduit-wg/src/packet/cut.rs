//! Cuts a frame that the kernel left unfinished into packets with whole headers and checksums, as
//! a network card would (`linux/virtio_net.h`).

use super::{Kind, LARGEST, TCP, UDP, VNET, VnetHeader, checksum, finish_v4, long, put, word};

/// A frame that is not what its header says. From a kernel it does not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Too short for its headers.
    #[error("the frame ends within its headers")]
    Short,
    /// A kind of frame that was not asked for.
    #[error("the frame is of a kind that was not asked for")]
    Kind,
    /// The headers contradict each other.
    #[error("the frame's headers contradict each other")]
    Headers,
}

/// TCP flags that only the last segment keeps: FIN and PSH.
const LAST_ONLY: u8 = 0x01 | 0x08;
/// The flag that only the first segment keeps: CWR.
const FIRST_ONLY: u8 = 0x80;

/// Where things are in a frame of segments.
struct Plan {
    v4: bool,
    /// The transport header.
    start: usize,
    /// All headers.
    headers: usize,
    protocol: u8,
    segment: usize,
}

/// Gives each packet in `frame` (with its `virtio_net_hdr`) to `each`, in order, at most `LARGEST`
/// bytes; `room` is scratch space of that size.
pub fn cut(
    frame: &mut [u8],
    room: &mut [u8; LARGEST],
    mut each: impl FnMut(&[u8]),
) -> Result<(), Malformed> {
    let (header, packet) = frame.split_first_chunk_mut::<VNET>().ok_or(Malformed::Short)?;
    let header = VnetHeader::read(*header).ok_or(Malformed::Kind)?;
    if packet.is_empty() || packet.len() > LARGEST {
        return Err(Malformed::Short);
    }
    if header.kind == Kind::Single {
        if header.needs_checksum {
            finish(packet, header.start.into(), header.offset.into())?;
        }
        each(packet);
        return Ok(());
    }
    let plan = plan(packet, &header)?;
    let payload = &packet[plan.headers..];
    let count = payload.len().div_ceil(plan.segment).max(1);
    let (first_id, first_sequence) = match (plan.v4, plan.protocol) {
        (true, TCP) => (word(packet, 4), long(packet, plan.start + 4)),
        (true, _) => (word(packet, 4), 0),
        (false, TCP) => (0, long(packet, plan.start + 4)),
        (false, _) => (0, 0),
    };
    room[..plan.headers].copy_from_slice(&packet[..plan.headers]);
    for n in 0..count {
        let from = n * plan.segment;
        let part = &payload[from..payload.len().min(from + plan.segment)];
        let length = plan.headers + part.len();
        let out = &mut room[..length];
        out[plan.headers..].copy_from_slice(part);
        if plan.v4 {
            put(out, 2, length as u16);
            put(out, 4, first_id.wrapping_add(n as u16));
            finish_v4(&mut out[..plan.start]);
        } else {
            put(out, 4, (length - 40) as u16);
        }
        let check = if plan.protocol == TCP {
            let sequence = first_sequence.wrapping_add(from as u32);
            out[plan.start + 4..plan.start + 8].copy_from_slice(&sequence.to_be_bytes());
            let mut flags = packet[plan.start + 13];
            if n + 1 < count {
                flags &= !LAST_ONLY;
            }
            if n > 0 {
                flags &= !FIRST_ONLY;
            }
            out[plan.start + 13] = flags;
            plan.start + 16
        } else {
            put(out, plan.start + 4, (length - plan.start) as u16);
            plan.start + 6
        };
        out[check..check + 2].fill(0);
        let addresses = if plan.v4 { 12..20 } else { 8..40 };
        let sum = checksum::pseudo(&out[addresses], plan.protocol, length - plan.start);
        let sum = !checksum::fold(checksum::add(sum, &out[plan.start..]));
        // To UDP, zero says that there is no checksum.
        let sum = if sum == 0 && plan.protocol == UDP { 0xffff } else { sum };
        out[check..check + 2].copy_from_slice(&sum.to_ne_bytes());
        each(out);
    }
    Ok(())
}

fn plan(packet: &[u8], header: &VnetHeader) -> Result<Plan, Malformed> {
    let v4 = match (packet[0] >> 4, header.kind) {
        (4, Kind::Tcp4 | Kind::Datagrams) => true,
        (6, Kind::Tcp6 | Kind::Datagrams) => false,
        _ => return Err(Malformed::Headers),
    };
    let start = usize::from(header.start);
    let (protocol, least) = if header.kind == Kind::Datagrams { (UDP, 8) } else { (TCP, 20) };
    let offset = if protocol == TCP { 16 } else { 6 };
    if packet.len() < start + least || !header.needs_checksum || header.segment == 0 {
        return Err(Malformed::Short);
    }
    let ip_fits = if v4 {
        start >= 20 && start == usize::from(packet[0] & 15) * 4 && packet[9] == protocol
    } else {
        // Extension headers may stand between.
        start >= 40
    };
    if !ip_fits || usize::from(header.offset) != offset {
        return Err(Malformed::Headers);
    }
    let own = if protocol == TCP { usize::from(packet[start + 12] >> 4) * 4 } else { 8 };
    if own < least || packet.len() < start + own {
        return Err(Malformed::Headers);
    }
    Ok(Plan { v4, start, headers: start + own, protocol, segment: header.segment.into() })
}

/// Fills in a checksum whose place holds the sum of the pseudo header.
fn finish(packet: &mut [u8], start: usize, offset: usize) -> Result<(), Malformed> {
    let check = start + offset;
    if check + 2 > packet.len() {
        return Err(Malformed::Short);
    }
    let sum = !checksum::fold(checksum::add(0, &packet[start..]));
    let sum = if sum == 0 { 0xffff } else { sum };
    packet[check..check + 2].copy_from_slice(&sum.to_ne_bytes());
    Ok(())
}
