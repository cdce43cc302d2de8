//! Puts packets of one stream together into frames that the kernel takes as one: what GRO does in a
//! network card's driver, for packets that come out of a tunnel.
//!
//! What must hold: a cut of the frame ([`super::cut`], or the kernel's own) gives the packets again,
//! bit by bit; and packets of one stream keep their order. So only packets whose checksums are
//! right, and whose headers differ by what a cut makes again, are put together; whatever else
//! belongs to a stream pushes out what was gathered of it before it passes.

use super::{Kind, LARGEST, TCP, UDP, VNET, VnetHeader, checksum, finish_v4, long, put, word};

/// Streams that are gathered at the same time.
const STREAMS: usize = 8;
/// Most packets in one frame: what the kernel allows for datagrams (`UDP_MAX_SEGMENTS`).
const DATAGRAMS: usize = 64;
/// TCP flags of a packet with nothing special: ACK, and PSH, which ends a frame.
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
/// The second writing of zero in a checksum. It is right, and Linux writes it where it finishes a single
/// packet (`CSUM_MANGLED_0` in `skb_checksum_help`), but a cut writes the first one. (To UDP the first
/// says that there is none: there a cut writes this.)
const OTHER_ZERO: u16 = 0xffff;
/// "May not be cut", in the IPv4 header's second row.
const DONT_FRAGMENT: u16 = 0x4000;

/// Whose packets they are: protocol, addresses and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stream {
    protocol: u8,
    addresses: [u8; 32],
    ports: [u8; 4],
}

/// A packet that may be one of many.
#[derive(Clone, Copy, Debug)]
struct Piece {
    v4: bool,
    protocol: u8,
    /// The transport header.
    start: usize,
    /// All headers.
    headers: usize,
    payload: usize,
    sequence: u32,
    last: bool,
}

struct Gathered {
    stream: Stream,
    first: Piece,
    count: usize,
    next_sequence: u32,
    /// Header and packet.
    frame: Box<[u8]>,
    length: usize,
}

/// Gathers packets; see the module.
pub struct Merger {
    /// In use, the oldest first.
    gathered: Vec<Gathered>,
    spare: Vec<Box<[u8]>>,
    datagrams: bool,
}

impl Merger {
    /// Makes one. `datagrams`: UDP as well (the kernel takes it from Linux 6.2 on).
    #[must_use]
    pub fn new(datagrams: bool) -> Self {
        let spare = (0..STREAMS).map(|_| vec![0; VNET + LARGEST].into_boxed_slice()).collect();
        Self { gathered: Vec::with_capacity(STREAMS), spare, datagrams }
    }

    /// Takes a packet that stands behind [`VNET`] bytes of room in `frame`; gives what is complete
    /// to `write`, as frames for the tun device.
    pub fn push(&mut self, frame: &mut [u8], write: &mut impl FnMut(&[u8])) {
        let Some((room, packet)) = frame.split_first_chunk_mut::<VNET>() else { return };
        *room = [0; VNET];
        let Some(stream) = stream(packet) else {
            // It may be a piece of any stream (a fragment, say): none may fall behind it.
            self.flush(write);
            return write(frame);
        };
        let at = self.gathered.iter().position(|g| g.stream == stream);
        let allowed = stream.protocol == TCP || self.datagrams;
        let piece = if allowed { piece(packet) } else { None };
        if let (Some(at), Some(piece)) = (at, piece)
            && self.gathered[at].takes(packet, &piece)
        {
            let gathered = &mut self.gathered[at];
            gathered.append(packet, &piece);
            if gathered.is_full(&piece) {
                self.give(at, write);
            }
            return;
        }
        if let Some(at) = at {
            self.give(at, write);
        }
        match piece {
            Some(piece) if !piece.last => self.begin(stream, piece, packet, write),
            _ => write(frame),
        }
    }

    /// Gives everything that was gathered to `write`.
    pub fn flush(&mut self, write: &mut impl FnMut(&[u8])) {
        while !self.gathered.is_empty() {
            self.give(0, write);
        }
    }

    fn begin(
        &mut self,
        stream: Stream,
        piece: Piece,
        packet: &[u8],
        write: &mut impl FnMut(&[u8]),
    ) {
        if self.spare.is_empty() {
            self.give(0, write);
        }
        let new = || vec![0; VNET + LARGEST].into_boxed_slice();
        let mut frame = self.spare.pop().unwrap_or_else(new);
        frame[VNET..VNET + packet.len()].copy_from_slice(packet);
        self.gathered.push(Gathered {
            stream,
            first: piece,
            count: 1,
            next_sequence: piece.sequence.wrapping_add(piece.payload as u32),
            frame,
            length: packet.len(),
        });
    }

    fn give(&mut self, at: usize, write: &mut impl FnMut(&[u8])) {
        let mut gathered = self.gathered.remove(at);
        gathered.finish();
        write(&gathered.frame[..VNET + gathered.length]);
        self.spare.push(gathered.frame);
    }
}

impl Gathered {
    fn packet(&self) -> &[u8] {
        &self.frame[VNET..VNET + self.length]
    }

    /// Does a cut of all gathered so far and this give this again?
    fn takes(&self, packet: &[u8], piece: &Piece) -> bool {
        let (first, own) = (&self.first, self.packet());
        let same_shape = piece.v4 == first.v4 && piece.headers == first.headers;
        if !same_shape
            || piece.payload > first.payload
            || self.length + piece.payload > LARGEST
            || (piece.protocol == UDP && self.count >= DATAGRAMS)
        {
            return false;
        }
        let start = piece.start;
        let same = |range: std::ops::Range<usize>| own[range.clone()] == packet[range];
        let ip = if piece.v4 {
            let id = word(own, 4).wrapping_add(self.count as u16);
            same(0..2) && same(6..10) && word(packet, 4) == id
        } else {
            same(0..4) && same(6..8)
        };
        // The last packet may say PSH; which one said it is then kept.
        ip && (piece.protocol == UDP
            || (piece.sequence == self.next_sequence
                && same(start + 8..start + 13)
                && (own[start + 13] | PSH) == (packet[start + 13] | PSH)
                && same(start + 14..start + 16)
                && same(start + 18..piece.headers)))
    }

    fn append(&mut self, packet: &[u8], piece: &Piece) {
        let at = VNET + self.length;
        self.frame[at..at + piece.payload].copy_from_slice(&packet[piece.headers..]);
        self.length += piece.payload;
        self.count += 1;
        self.next_sequence = self.next_sequence.wrapping_add(piece.payload as u32);
        if piece.last {
            self.frame[VNET + self.first.start + 13] |= PSH;
        }
    }

    /// May nothing follow?
    fn is_full(&self, newest: &Piece) -> bool {
        newest.last || newest.payload < self.first.payload
    }

    fn finish(&mut self) {
        if self.count == 1 {
            self.frame[..VNET].fill(0);
            return;
        }
        let Piece { v4, protocol, start, headers, payload, .. } = self.first;
        let (header, packet) = self.frame.split_at_mut(VNET);
        let packet = &mut packet[..self.length];
        if v4 {
            put(packet, 2, self.length as u16);
            finish_v4(&mut packet[..start]);
        } else {
            put(packet, 4, (self.length - 40) as u16);
        }
        let (kind, offset) = match (protocol, v4) {
            (TCP, true) => (Kind::Tcp4, 16),
            (TCP, false) => (Kind::Tcp6, 16),
            _ => (Kind::Datagrams, 6),
        };
        if protocol == UDP {
            put(packet, start + 4, (self.length - start) as u16);
        }
        let addresses = if v4 { 12..20 } else { 8..40 };
        let sum = checksum::pseudo(&packet[addresses], protocol, self.length - start);
        packet[start + offset..start + offset + 2]
            .copy_from_slice(&checksum::fold(sum).to_ne_bytes());
        let vnet = VnetHeader {
            needs_checksum: true,
            kind,
            headers: headers as u16,
            segment: payload as u16,
            start: start as u16,
            offset: offset as u16,
        };
        header.copy_from_slice(&vnet.bytes());
    }
}

/// Where the transport header is, if the packet is a whole one of TCP or UDP without extras.
fn transport(packet: &[u8]) -> Option<(bool, u8, usize)> {
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            let start = usize::from(packet[0] & 15) * 4;
            let whole = word(packet, 6) & !DONT_FRAGMENT == 0;
            (start >= 20 && whole).then_some((true, packet[9], start))
        }
        6 if packet.len() >= 40 => Some((false, packet[6], 40)),
        _ => None,
    }
    .filter(|(_, protocol, start)| {
        let least = if *protocol == TCP { 20 } else { 8 };
        matches!(*protocol, TCP | UDP) && packet.len() >= start + least
    })
}

/// Whose packet this is; `None` if that cannot be told.
fn stream(packet: &[u8]) -> Option<Stream> {
    let (v4, protocol, start) = transport(packet)?;
    let mut addresses = [0; 32];
    if v4 {
        addresses[..8].copy_from_slice(&packet[12..20]);
    } else {
        addresses.copy_from_slice(&packet[8..40]);
    }
    let ports = *packet[start..].first_chunk()?;
    Some(Stream { protocol, addresses, ports })
}

/// What may be put together: whole, with data, nothing special said, and both checksums right, written
/// as a cut writes them.
fn piece(packet: &[u8]) -> Option<Piece> {
    let (v4, protocol, start) = transport(packet)?;
    let length_fits = if v4 {
        // Options would have to be looked into.
        start == 20
            && usize::from(word(packet, 2)) == packet.len()
            && word(packet, 10) != OTHER_ZERO
            && checksum::fold(checksum::add(0, &packet[..20])) == 0xffff
    } else {
        usize::from(word(packet, 4)) + 40 == packet.len()
    };
    if !length_fits {
        return None;
    }
    let (headers, last, sequence) = if protocol == TCP {
        let flags = packet[start + 13];
        // What RFC 3540 and later use the reserved bits for is not looked into either.
        if flags & !PSH != ACK || packet[start + 12] & 15 != 0 {
            return None;
        }
        if word(packet, start + 16) == OTHER_ZERO {
            return None;
        }
        let own = usize::from(packet[start + 12] >> 4) * 4;
        if own < 20 {
            return None;
        }
        (start + own, flags & PSH != 0, long(packet, start + 4))
    } else {
        let whole = usize::from(word(packet, start + 4)) + start == packet.len();
        if !whole || word(packet, start + 6) == 0 {
            return None;
        }
        (start + 8, false, 0)
    };
    let payload = packet.len().checked_sub(headers).filter(|p| *p > 0)?;
    let addresses = if v4 { 12..20 } else { 8..40 };
    let sum = checksum::pseudo(&packet[addresses], protocol, packet.len() - start);
    let right = checksum::fold(checksum::add(sum, &packet[start..])) == 0xffff;
    right.then_some(Piece { v4, protocol, start, headers, payload, sequence, last })
}
