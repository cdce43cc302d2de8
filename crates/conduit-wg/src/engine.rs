//! What happens to a frame from the tun device and to a datagram from the socket, and what is due by
//! the clock. It decides and encrypts; devices are read by [`crate::device`].
//!
//! What must hold: nothing that comes from outside panics or allocates; whatever is dropped is
//! counted by the reason; what a peer sent is believed only after boringtun has authenticated it,
//! and only from the peer's own addresses.

use crate::{
    PublicKey, TunnelError,
    packet::{self, LARGEST, Merger, VNET},
    peers::{Link, LinkId, Peer, PeerId, Peers, Stage},
    state::{Keys, KnownPeer},
    udp::{Wire, plain},
};
use boringtun::noise::{
    Packet, Tunn, TunnResult, errors::WireGuardError, handshake::parse_handshake_anon,
    rate_limiter::RateLimiter,
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

/// What WireGuard adds to a packet.
pub(crate) const OVERHEAD: usize = 32;
/// Sizes of messages, by the protocol.
const INITIATION: usize = 148;
const RESPONSE: usize = 92;
const COOKIE: usize = 64;
/// Counters from here on are not used with one key (`REJECT_AFTER_MESSAGES`).
const LAST_COUNTER: u64 = u64::MAX - (1 << 13);
/// Handshake messages a second that are answered without a cookie. boringtun counts each twice,
/// because it is looked at before the link is known, and by the link.
const HANDSHAKES: u64 = 400;

/// One of our keys.
struct Own {
    public: PublicKey,
    secret: boringtun::x25519::StaticSecret,
    limiter: Arc<RateLimiter>,
}

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It was for this process, whatever became of it.
    Taken,
    /// It belongs to a session of another process.
    Foreign,
}

/// The tunnel without its devices.
pub(crate) struct Engine {
    pub(crate) wire: Wire,
    pub(crate) peers: Peers,
    keys: Vec<Own>,
    generation: u8,
    merger: Merger,
    /// A packet with room for its header.
    plain: Box<[u8]>,
    /// Packets are cut here.
    room: Box<[u8; LARGEST]>,
    /// A peer was heard from somewhere else.
    pub(crate) moved: bool,
}

impl Engine {
    pub(crate) fn new(wire: Wire, generation: u8, datagrams: bool) -> Self {
        let room = vec![0; LARGEST].into_boxed_slice();
        Self {
            wire,
            peers: Peers::default(),
            keys: Vec::new(),
            generation,
            merger: Merger::new(datagrams),
            plain: vec![0; VNET + LARGEST + 1].into_boxed_slice(),
            room: room.try_into().expect("it was made of that length"),
            moved: false,
        }
    }

    /// Takes our keys, the newest first. Sessions of keys that are gone end.
    pub(crate) fn set_keys(&mut self, keys: &Keys) -> Result<(), TunnelError> {
        self.keys = keys
            .all()
            .map(|key| {
                let (public, secret) = (key.public(), key.x25519());
                let old = self.keys.iter().find(|k| k.public == public);
                let limiter = old.map_or_else(
                    || Arc::new(RateLimiter::new(&public.x25519(), HANDSHAKES)),
                    |k| k.limiter.clone(),
                );
                Own { public, secret, limiter }
            })
            .collect();
        self.with_maker(Peers::link_all)
    }

    /// Takes the list of peers.
    pub(crate) fn set_peers(&mut self, known: Vec<KnownPeer>) -> Result<(), TunnelError> {
        self.with_maker(|peers, own, make| peers.set(known, own, make))
    }

    fn with_maker(
        &mut self,
        change: impl FnOnce(
            &mut Peers,
            &[PublicKey],
            &mut dyn FnMut(PublicKey, PublicKey, LinkId, Option<u16>) -> Tunn,
        ) -> Result<(), TunnelError>,
    ) -> Result<(), TunnelError> {
        let own: Vec<_> = self.keys.iter().map(|k| k.public).collect();
        let (keys, generation) = (&self.keys, self.generation);
        let mut make = |own: PublicKey, theirs: PublicKey, id, keepalive| {
            let key = keys.iter().find(|k| k.public == own).expect("links are made of these keys");
            let index = Peers::index(id, generation);
            let limiter = Some(key.limiter.clone());
            Tunn::new(key.secret.clone(), theirs.x25519(), None, keepalive, index, limiter)
        };
        change(&mut self.peers, &own, &mut make)
    }

    /// Seeks sessions with all peers whose whereabouts are known, by all links that have none.
    pub(crate) fn seek_all(&mut self, now: Instant) {
        for id in self.peers.link_ids() {
            if let Some((link, peer)) = self.peers.both_mut(id)
                && peer.endpoint.is_some()
            {
                link.seek(now);
            }
        }
        self.initiate(now);
    }

    /// A frame from the tun device, with its header. What is to be sent waits in the wire's box.
    pub(crate) fn outgoing(&mut self, frame: &mut [u8], now: Instant) {
        let addresses = frame.get(VNET..).and_then(packet::addresses);
        let Some((_, to)) = addresses else {
            self.wire.counters.dropped_malformed_frame += 1;
            return;
        };
        let found = self.peers.of_address(to);
        let Some((id, peer)) = found.and_then(|id| Some((id, self.peers.peer_mut(id)?))) else {
            self.wire.counters.dropped_no_peer += 1;
            return;
        };
        let (best, endpoint) = (peer.best, peer.endpoint);
        match (best, endpoint) {
            (Some(link), Some(endpoint)) => self.encrypt(link, endpoint, frame),
            (_, None) => self.wire.counters.dropped_no_endpoint += 1,
            (None, Some(_)) => {
                if !peer.wait(frame, now) {
                    self.wire.counters.dropped_queue_full += 1;
                }
                self.seek(id, now);
            }
        }
    }

    /// Seeks a session with one peer, by all its links.
    fn seek(&mut self, id: PeerId, now: Instant) {
        let links = self.peers.peer(id).map(|p| p.links.clone()).unwrap_or_default();
        for id in links {
            if let Some(link) = self.peers.link_mut(id) {
                link.seek(now);
            }
            self.initiate_one(id, now);
        }
    }

    fn encrypt(&mut self, link: LinkId, endpoint: SocketAddr, frame: &mut [u8]) {
        let Self { wire, peers, room, .. } = self;
        let Some(link) = peers.link_mut(link) else { return };
        let (mut packets, mut bytes) = (0, 0);
        let done = packet::cut(frame, room, |packet| {
            let size = packet.len() + OVERHEAD;
            let mut initiation = None;
            wire.put(endpoint, size, |room| match link.tunn.encapsulate(packet, room) {
                TunnResult::WriteToNetwork(datagram) if datagram.len() == size => Some(size),
                // Its session has just ended: the packet waits within boringtun.
                TunnResult::WriteToNetwork(datagram) => {
                    initiation = datagram.first_chunk::<INITIATION>().copied();
                    None
                }
                _ => None,
            });
            if let Some(initiation) = initiation {
                wire.put_copy(endpoint, &initiation);
            }
            packets += 1;
            bytes += packet.len() as u64;
        });
        wire.counters.packets_sent += packets;
        wire.counters.bytes_sent += bytes;
        if done.is_err() {
            wire.counters.dropped_malformed_frame += 1;
        }
    }

    /// A datagram from the socket. Frames for the tun device go to `write`, now or with
    /// [`Engine::flush`]; what is to be sent waits in the wire's box.
    pub(crate) fn incoming(
        &mut self,
        from: SocketAddr,
        datagram: &[u8],
        now: Instant,
        write: &mut impl FnMut(&[u8]),
    ) -> Fate {
        let from = plain(from);
        let index_at =
            |at: usize| datagram.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b));
        let (kind, index) = match (datagram.first_chunk::<4>(), datagram.len()) {
            (Some([4, 0, 0, 0]), OVERHEAD..=LARGEST) => (4, index_at(4)),
            (Some([1, 0, 0, 0]), INITIATION) => {
                self.answer(from, datagram);
                return Fate::Taken;
            }
            (Some([2, 0, 0, 0]), RESPONSE) => (2, index_at(8)),
            (Some([3, 0, 0, 0]), COOKIE) => (3, index_at(4)),
            _ => {
                self.wire.counters.dropped_malformed += 1;
                return Fate::Taken;
            }
        };
        let Some(link) = Peers::of_index(index.unwrap_or(0), self.generation) else {
            return Fate::Foreign;
        };
        if kind == 4 {
            self.decrypt(from, link, datagram, now, write);
        } else {
            self.conclude(from, link, datagram, now);
        }
        Fate::Taken
    }

    /// Writes what was gathered.
    pub(crate) fn flush(&mut self, write: &mut impl FnMut(&[u8])) {
        self.merger.flush(write);
    }

    /// Somebody begins a handshake.
    fn answer(&mut self, from: SocketAddr, datagram: &[u8]) {
        let Self { wire, peers, keys, room, .. } = self;
        let mut problem = WireGuardError::InvalidMac;
        for key in keys.iter() {
            let packet = match key.limiter.verify_packet(Some(from.ip()), datagram, &mut room[..]) {
                Ok(Packet::HandshakeInit(packet)) => packet,
                Err(TunnResult::WriteToNetwork(cookie)) => {
                    wire.counters.dropped_under_load += 1;
                    return wire.put_copy(from, cookie);
                }
                Err(TunnResult::Err(e)) => {
                    problem = e;
                    continue;
                }
                _ => continue,
            };
            let Ok(half) = parse_handshake_anon(&key.secret, &key.public.x25519(), &packet) else {
                problem = WireGuardError::InvalidAeadTag;
                continue;
            };
            let theirs = PublicKey::from_bytes(half.peer_static_public);
            let Some(id) = peers.of_keys(key.public, theirs) else {
                wire.counters.dropped_unknown_key += 1;
                return;
            };
            let Some((link, peer)) = peers.both_mut(id) else { return };
            match link.tunn.decapsulate(Some(from.ip()), datagram, &mut room[..]) {
                TunnResult::WriteToNetwork(answer) => {
                    if answer.len() == RESPONSE {
                        link.unconfirmed = true;
                        // An initiation can be replayed to a process that has forgotten the last
                        // one: it does not move a peer that is known to be somewhere.
                        peer.endpoint.get_or_insert(from);
                    }
                    wire.put_copy(from, answer);
                }
                TunnResult::Err(e) => count(wire, &e),
                _ => {}
            }
            return;
        }
        count(wire, &problem);
    }

    /// The answer to our handshake, or a cookie.
    fn conclude(&mut self, from: SocketAddr, id: LinkId, datagram: &[u8], now: Instant) {
        let Self { wire, peers, room, .. } = self;
        let Some((link, peer)) = peers.both_mut(id) else {
            wire.counters.dropped_unknown_session += 1;
            return;
        };
        match link.tunn.decapsulate(Some(from.ip()), datagram, &mut room[..]) {
            // Our first packet, which lets the peer use the session.
            TunnResult::WriteToNetwork(packet) if packet.len() == OVERHEAD => {
                wire.put_copy(from, packet);
                peer.endpoint = Some(from);
                self.up(id, now);
            }
            // A cookie for somebody who answers too often.
            TunnResult::WriteToNetwork(packet) => wire.put_copy(from, packet),
            TunnResult::Err(e) => count(wire, &e),
            _ => {}
        }
    }

    /// A link has a session that the peer has, too.
    fn up(&mut self, id: LinkId, now: Instant) {
        self.wire.counters.handshakes += 1;
        let Some((link, peer)) = self.peers.both_mut(id) else { return };
        link.stage = Stage::Up;
        link.unconfirmed = false;
        let (peer_id, endpoint) = (link.peer, peer.endpoint);
        self.moved = true;
        self.peers.choose(peer_id);
        // What boringtun kept when a session ended.
        let Self { wire, peers, room, .. } = self;
        if let (Some(link), Some(endpoint)) = (peers.link_mut(id), endpoint) {
            while let TunnResult::WriteToNetwork(packet) =
                link.tunn.decapsulate(None, &[], &mut room[..])
            {
                wire.put_copy(endpoint, packet);
            }
        }
        let waiting = self.peers.peer_mut(peer_id).map(Peer::take_waiting).unwrap_or_default();
        for mut frame in waiting {
            self.outgoing(&mut frame, now);
        }
    }

    fn decrypt(
        &mut self,
        from: SocketAddr,
        id: LinkId,
        datagram: &[u8],
        now: Instant,
        write: &mut impl FnMut(&[u8]),
    ) {
        let Self { wire, peers, plain, merger, .. } = self;
        let counters = &mut wire.counters;
        let Some(link) = peers.link_mut(id) else {
            counters.dropped_unknown_session += 1;
            return;
        };
        let counter = datagram.get(8..16).and_then(<[u8]>::first_chunk).copied();
        if counter.is_none_or(|c| u64::from_le_bytes(c) >= LAST_COUNTER) {
            counters.dropped_malformed += 1;
            return;
        }
        let (size, source) = match link.tunn.decapsulate(None, datagram, &mut plain[VNET..]) {
            TunnResult::WriteToTunnelV4(packet, source) => (packet.len(), Some(source.into())),
            TunnResult::WriteToTunnelV6(packet, source) => (packet.len(), Some(source.into())),
            // A sign of life.
            TunnResult::Done => (0, None),
            TunnResult::WriteToNetwork(_) => return,
            TunnResult::Err(e) => return count(wire, &e),
        };
        let (unconfirmed, owner) = (link.unconfirmed, link.peer);
        let own_source = source.is_none() || source == link.source;
        if !own_source {
            let found: Option<IpAddr> = source;
            if found.and_then(|a| peers.of_address(a)) != Some(owner) {
                counters.dropped_foreign_source += 1;
                return;
            }
            if let Some(link) = peers.link_mut(id) {
                link.source = source;
            }
        }
        if let Some(peer) = peers.peer_mut(owner)
            && peer.endpoint != Some(from)
        {
            tracing::info!(peer = peer.config.name, %from, "peer heard from elsewhere");
            peer.endpoint = Some(from);
            self.moved = true;
        }
        if source.is_some() {
            counters.packets_received += 1;
            counters.bytes_received += size as u64;
            merger.push(&mut plain[..VNET + size], write);
        }
        if unconfirmed {
            self.up(id, now);
        }
    }

    /// What is due: to be called every tenth of a second.
    pub(crate) fn tick(&mut self, now: Instant) {
        for key in &self.keys {
            key.limiter.reset_count();
        }
        for id in self.peers.link_ids() {
            self.tick_link(id, now);
        }
        for id in self.peers.ids() {
            let Some(peer) = self.peers.peer_mut(id) else { continue };
            if peer.best.is_none() && peer.gave_up(now) {
                self.wire.counters.dropped_no_answer += peer.take_waiting().len() as u64;
            }
        }
        self.initiate(now);
    }

    fn tick_link(&mut self, id: LinkId, now: Instant) {
        let Self { wire, peers, room, .. } = self;
        let Some((link, peer)) = peers.both_mut(id) else { return };
        match (link.tunn.update_timers(&mut room[..]), peer.endpoint) {
            (TunnResult::WriteToNetwork(packet), Some(to)) => wire.put_copy(to, packet),
            (TunnResult::Err(WireGuardError::ConnectionExpired), _) => {}
            (TunnResult::Err(e), _) => count(wire, &e),
            _ => {}
        }
        let alive = link.tunn.time_since_last_handshake().is_some();
        let (wanted, owner) = (peer.config.keepalive.is_some(), link.peer);
        let wanted = (peer.best.is_none() && wanted) || is_awaited(&self.keys, link);
        if link.stage == Stage::Up && !alive {
            link.stage = Stage::Down;
            self.peers.choose(owner);
        } else if link.stage == Stage::Down && wanted && peer.endpoint.is_some() {
            link.seek(now);
        }
    }

    /// Sends the initiations that are due.
    fn initiate(&mut self, now: Instant) {
        for id in self.peers.link_ids() {
            self.initiate_one(id, now);
        }
    }

    fn initiate_one(&mut self, id: LinkId, now: Instant) {
        let Self { wire, peers, room, .. } = self;
        let Some((link, peer)) = peers.both_mut(id) else { return };
        let Some(endpoint) = peer.endpoint.filter(|to| wire.outer.can_reach(*to)) else { return };
        let wanted = (peer.best.is_none() && peer.is_wanted()) || is_awaited(&self.keys, link);
        if !link.is_due(now, wanted) {
            return;
        }
        if let TunnResult::WriteToNetwork(packet) =
            link.tunn.format_handshake_initiation(&mut room[..], true)
        {
            wire.put_copy(endpoint, packet);
        }
    }

    /// New sessions with every peer that there is one with: another process may have made newer ones
    /// than ours, which peers prefer.
    pub(crate) fn renew_all(&mut self) {
        for id in self.peers.link_ids() {
            let Self { wire, peers, room, .. } = self;
            let Some((link, peer)) = peers.both_mut(id) else { continue };
            if link.stage == Stage::Up
                && let Some(endpoint) = peer.endpoint
                && let TunnResult::WriteToNetwork(packet) =
                    link.tunn.format_handshake_initiation(&mut room[..], true)
            {
                wire.put_copy(endpoint, packet);
            }
        }
    }

    /// A sign of life to every peer with a session.
    pub(crate) fn greet_all(&mut self) {
        for id in self.peers.ids() {
            let Self { wire, peers, room, .. } = self;
            let Some(peer) = peers.peer(id) else { continue };
            let (Some(best), Some(endpoint)) = (peer.best, peer.endpoint) else { continue };
            if let Some(link) = peers.link_mut(best)
                && let TunnResult::WriteToNetwork(packet) =
                    link.tunn.encapsulate(&[], &mut room[..])
            {
                wire.put_copy(endpoint, packet);
            }
        }
    }
}

/// While keys are changed, a session of the new one is sought until it is there.
fn is_awaited(keys: &[Own], link: &Link) -> bool {
    keys.len() > 1 && keys.first().is_some_and(|newest| newest.public == link.own)
}

/// Counts what boringtun did not take, by its reason.
fn count(wire: &mut Wire, error: &WireGuardError) {
    let counters = &mut wire.counters;
    let place = match error {
        WireGuardError::InvalidAeadTag => &mut counters.dropped_not_authentic,
        WireGuardError::DuplicateCounter | WireGuardError::InvalidCounter => {
            &mut counters.dropped_replayed
        }
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex => {
            &mut counters.dropped_unknown_session
        }
        WireGuardError::InvalidMac => &mut counters.dropped_wrong_mac,
        WireGuardError::WrongKey => &mut counters.dropped_unknown_key,
        WireGuardError::UnderLoad => &mut counters.dropped_under_load,
        WireGuardError::InvalidPacket
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::WrongPacketType => &mut counters.dropped_malformed,
        _ => &mut counters.dropped_handshake,
    };
    *place += 1;
}
