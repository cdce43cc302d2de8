//! Who may be at the other end, where they are, and which of several sessions with one of them is
//! used: a table in memory, without I/O.
//!
//! A peer has a *link* for each pair of one of our keys and one of its keys: one, and more only while
//! somebody changes keys. Each link is a [`Tunn`] of boringtun with sessions of its own, so packets
//! of the old keys are still understood while the new ones are already used.

use crate::{PublicKey, TunnelError, state::KnownPeer, state::PeerConfig};
use boringtun::noise::Tunn;
use ip_network_table::IpNetworkTable;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

/// A peer's place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerId(usize);

/// A link's place in the table, and the number by which its sessions are known on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkId(u16);

/// Bytes of frames that wait for a handshake with one peer.
const WAITING: usize = 1 << 20;
/// For how long they wait.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pauses between initiations, while an answer is missed; the last one again and again. The first
/// ones are shorter than what the protocol says (5 s), because machines' connections wait.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(5),
];

/// Where a link stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// No session, and none is sought.
    Down,
    /// Initiations are sent, the next one at `next`.
    Seeking {
        /// How many were sent.
        sent: usize,
        /// When to send again.
        next: Instant,
    },
    /// There is a session.
    Up,
}

pub(crate) struct Link {
    pub(crate) tunn: Tunn,
    pub(crate) peer: PeerId,
    pub(crate) own: PublicKey,
    pub(crate) theirs: PublicKey,
    pub(crate) stage: Stage,
    /// We have answered an initiation; the first packet of the new session confirms it.
    pub(crate) unconfirmed: bool,
    /// The source that was last found to be the peer's.
    pub(crate) source: Option<IpAddr>,
}

impl Link {
    /// Is it time for an initiation? Says so once for each.
    pub(crate) fn is_due(&mut self, now: Instant, wanted: bool) -> bool {
        let Stage::Seeking { sent, next } = self.stage else { return false };
        if next > now {
            return false;
        }
        // What nobody waits for is given up after some tries.
        if sent >= PAUSES.len() && !wanted {
            self.stage = Stage::Down;
            return false;
        }
        let pause = PAUSES[sent.min(PAUSES.len() - 1)];
        self.stage = Stage::Seeking { sent: sent + 1, next: now + pause };
        true
    }

    pub(crate) fn seek(&mut self, now: Instant) {
        if self.stage == Stage::Down {
            self.stage = Stage::Seeking { sent: 0, next: now };
        }
    }
}

pub(crate) struct Peer {
    pub(crate) config: PeerConfig,
    /// Where it was last heard from, else where it is said to be.
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) links: Vec<LinkId>,
    /// The link to send by.
    pub(crate) best: Option<LinkId>,
    /// What the path to it takes, if that is known.
    pub(crate) path: Option<u32>,
    waiting: VecDeque<Box<[u8]>>,
    waiting_bytes: usize,
    waiting_since: Option<Instant>,
}

impl Peer {
    /// Keeps a frame until there is a session; false if too much waits already.
    pub(crate) fn wait(&mut self, frame: &[u8], now: Instant) -> bool {
        if self.waiting_bytes + frame.len() > WAITING {
            return false;
        }
        self.waiting_bytes += frame.len();
        self.waiting_since.get_or_insert(now);
        self.waiting.push_back(frame.into());
        true
    }

    /// What waited, the oldest first.
    pub(crate) fn take_waiting(&mut self) -> VecDeque<Box<[u8]>> {
        self.waiting_bytes = 0;
        self.waiting_since = None;
        std::mem::take(&mut self.waiting)
    }

    /// Has what waits waited for too long?
    pub(crate) fn gave_up(&self, now: Instant) -> bool {
        self.waiting_since.is_some_and(|since| now.duration_since(since) > PATIENCE)
    }

    /// Does anybody miss a session with it?
    pub(crate) fn is_wanted(&self) -> bool {
        self.config.keepalive.is_some() || !self.waiting.is_empty()
    }
}

/// All peers.
pub(crate) struct Peers {
    peers: Vec<Option<Peer>>,
    links: Vec<Option<Link>>,
    by_address: IpNetworkTable<PeerId>,
    by_key: BTreeMap<PublicKey, PeerId>,
}

/// Says why a list of peers cannot be used.
pub(crate) fn check(peers: &[PeerConfig]) -> Result<(), TunnelError> {
    let fail = |peer: &PeerConfig, detail: String| {
        Err(TunnelError::invalid(format!("peer \"{}\"", peer.name), detail))
    };
    let (mut names, mut keys, mut networks) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
    for peer in peers {
        let printable = !peer.name.chars().any(char::is_control);
        if peer.name.is_empty() || peer.name.len() > 128 || !printable {
            return fail(peer, "a name has 1 to 128 printable characters".into());
        }
        if !names.insert(&peer.name) {
            return fail(peer, "the name is there twice".into());
        }
        if peer.keys.is_empty() || peer.keys.len() > 2 {
            return fail(peer, format!("it has {} keys, not one or two", peer.keys.len()));
        }
        for key in &peer.keys {
            if !keys.insert(key) {
                return fail(peer, format!("the key {key} is there twice"));
            }
        }
        for network in &peer.allowed {
            if let Some(other) = networks.insert(*network, &peer.name) {
                return fail(peer, format!("{network} belongs to peer \"{other}\" already"));
            }
        }
    }
    Ok(())
}

impl Default for Peers {
    fn default() -> Self {
        let (peers, links) = (Vec::new(), Vec::new());
        Self { peers, links, by_address: IpNetworkTable::new(), by_key: BTreeMap::new() }
    }
}

impl Peers {
    pub(crate) fn peer(&self, id: PeerId) -> Option<&Peer> {
        self.peers.get(id.0)?.as_ref()
    }

    pub(crate) fn peer_mut(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.peers.get_mut(id.0)?.as_mut()
    }

    pub(crate) fn link_mut(&mut self, id: LinkId) -> Option<&mut Link> {
        self.links.get_mut(usize::from(id.0))?.as_mut()
    }

    /// A link and its peer.
    pub(crate) fn both_mut(&mut self, id: LinkId) -> Option<(&mut Link, &mut Peer)> {
        let link = self.links.get_mut(usize::from(id.0))?.as_mut()?;
        let peer = self.peers.get_mut(link.peer.0)?.as_mut()?;
        Some((link, peer))
    }

    pub(crate) fn ids(&self) -> Vec<PeerId> {
        (0..self.peers.len()).filter(|n| self.peers[*n].is_some()).map(PeerId).collect()
    }

    pub(crate) fn link_ids(&self) -> Vec<LinkId> {
        let there = |n: &usize| self.links[*n].is_some();
        (0..self.links.len()).filter(there).map(|n| LinkId(n as u16)).collect()
    }

    /// Whose address this is.
    pub(crate) fn of_address(&self, address: IpAddr) -> Option<PeerId> {
        self.by_address.longest_match(address).map(|(_, id)| *id)
    }

    /// The link between two keys.
    pub(crate) fn of_keys(&self, own: PublicKey, theirs: PublicKey) -> Option<LinkId> {
        let peer = self.peer(*self.by_key.get(&theirs)?)?;
        let fits = |id: &&LinkId| {
            let link = self.links.get(usize::from(id.0)).and_then(Option::as_ref);
            link.is_some_and(|l| l.own == own && l.theirs == theirs)
        };
        peer.links.iter().find(fits).copied()
    }

    /// The link whose sessions have this index on the wire, in the process numbered `generation`.
    pub(crate) fn of_index(index: u32, generation: u8) -> Option<LinkId> {
        (index >> 24 == u32::from(generation)).then_some(LinkId((index >> 8) as u16))
    }

    /// What boringtun is to make a link's indices of.
    pub(crate) fn index(id: LinkId, generation: u8) -> u32 {
        u32::from(generation) << 16 | u32::from(id.0)
    }

    /// Makes the table what `configs` say, with `own` keys (the newest first). Peers and links that
    /// stay keep what they have. `make` makes a session layer for our key, its key, at that place.
    pub(crate) fn set(
        &mut self,
        configs: Vec<KnownPeer>,
        own: &[PublicKey],
        make: &mut dyn FnMut(PublicKey, PublicKey, LinkId, Option<u16>) -> Tunn,
    ) -> Result<(), TunnelError> {
        let gone: Vec<_> = self
            .ids()
            .into_iter()
            .filter(|id| {
                let name = self.peer(*id).map(|p| p.config.name.clone());
                !configs.iter().any(|c| Some(&c.config.name) == name.as_ref())
            })
            .collect();
        for id in gone {
            self.peers[id.0] = None;
        }
        for known in configs {
            let KnownPeer { config, heard_from } = known;
            let at = self
                .ids()
                .into_iter()
                .find(|id| self.peer(*id).is_some_and(|p| p.config.name == config.name));
            match at.and_then(|id| self.peer_mut(id)) {
                Some(peer) => {
                    // Said anew, it counts; else where it was heard from does.
                    if peer.config.endpoint != config.endpoint && config.endpoint.is_some() {
                        peer.endpoint = config.endpoint;
                    }
                    peer.config = config;
                }
                None => {
                    let endpoint = heard_from.or(config.endpoint);
                    let peer = Peer {
                        config,
                        endpoint,
                        links: Vec::new(),
                        best: None,
                        path: None,
                        waiting: VecDeque::new(),
                        waiting_bytes: 0,
                        waiting_since: None,
                    };
                    let free = self.peers.iter().position(Option::is_none);
                    match free {
                        Some(n) => self.peers[n] = Some(peer),
                        None => self.peers.push(Some(peer)),
                    }
                }
            }
        }
        self.link_all(own, make)
    }

    /// Makes the links that are missing, and removes those of keys that are gone.
    pub(crate) fn link_all(
        &mut self,
        own: &[PublicKey],
        make: &mut dyn FnMut(PublicKey, PublicKey, LinkId, Option<u16>) -> Tunn,
    ) -> Result<(), TunnelError> {
        for slot in &mut self.links {
            let stays = slot.as_ref().is_some_and(|link| {
                let peer = self.peers.get(link.peer.0).and_then(Option::as_ref);
                own.contains(&link.own)
                    && peer.is_some_and(|p| p.config.keys.contains(&link.theirs))
            });
            match slot {
                // Whose address is whose may have changed.
                Some(link) if stays => link.source = None,
                _ => *slot = None,
            }
        }
        self.by_address = IpNetworkTable::new();
        self.by_key.clear();
        for id in self.ids() {
            let Some(peer) = self.peers[id.0].as_ref() else { continue };
            let (keys, keepalive) = (peer.config.keys.clone(), peer.config.keepalive);
            for network in &peer.config.allowed {
                self.by_address.insert(network.0, id);
            }
            let mut links = Vec::new();
            for own in own {
                for theirs in &keys {
                    self.by_key.insert(*theirs, id);
                    let same = |l: &Link| l.peer == id && l.own == *own && l.theirs == *theirs;
                    let old = self.links.iter().position(|l| l.as_ref().is_some_and(same));
                    let at = match old {
                        Some(at) => LinkId(at as u16),
                        None => self.new_link(id, *own, *theirs, keepalive, make)?,
                    };
                    links.push(at);
                }
            }
            if let Some(peer) = self.peers[id.0].as_mut() {
                peer.links = links;
            }
            self.choose(id);
        }
        Ok(())
    }

    fn new_link(
        &mut self,
        peer: PeerId,
        own: PublicKey,
        theirs: PublicKey,
        keepalive: Option<u16>,
        make: &mut dyn FnMut(PublicKey, PublicKey, LinkId, Option<u16>) -> Tunn,
    ) -> Result<LinkId, TunnelError> {
        let free = self.links.iter().position(Option::is_none).unwrap_or(self.links.len());
        let at = u16::try_from(free).map(LinkId).map_err(|_| {
            TunnelError::invalid("the list of peers", "more than 65,536 pairs of keys")
        })?;
        if free == self.links.len() {
            self.links.push(None);
        }
        self.links[free] = Some(Link {
            tunn: make(own, theirs, at, keepalive),
            peer,
            own,
            theirs,
            stage: Stage::Down,
            unconfirmed: false,
            source: None,
        });
        Ok(at)
    }

    /// Chooses the link to send to a peer by: of those with a session, the one of the newest keys.
    pub(crate) fn choose(&mut self, id: PeerId) {
        let Some(peer) = self.peers.get(id.0).and_then(Option::as_ref) else { return };
        let up = |id: &&LinkId| {
            let link = self.links.get(usize::from(id.0)).and_then(Option::as_ref);
            link.is_some_and(|l| l.stage == Stage::Up)
        };
        let best = peer.links.iter().find(up).copied();
        if let Some(peer) = self.peers[id.0].as_mut() {
            peer.best = best;
        }
    }

    /// What is to be remembered.
    pub(crate) fn known(&self) -> Vec<KnownPeer> {
        let known = |p: &Peer| KnownPeer { config: p.config.clone(), heard_from: p.endpoint };
        self.peers.iter().flatten().map(known).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PrivateKey;

    fn key() -> PublicKey {
        PrivateKey::generate().unwrap().public()
    }

    fn config(name: &str, keys: &[PublicKey], allowed: &[&str]) -> PeerConfig {
        let allowed = allowed.iter().map(|n| n.parse().unwrap()).collect();
        PeerConfig {
            name: name.into(),
            keys: keys.to_vec(),
            allowed,
            endpoint: None,
            keepalive: None,
        }
    }

    fn known(configs: &[PeerConfig]) -> Vec<KnownPeer> {
        configs.iter().map(|c| KnownPeer { config: c.clone(), heard_from: None }).collect()
    }

    fn tunn(_: PublicKey, theirs: PublicKey, id: LinkId, keepalive: Option<u16>) -> Tunn {
        let own = PrivateKey::generate().unwrap();
        Tunn::new(own.x25519(), theirs.x25519(), None, keepalive, Peers::index(id, 1), None)
    }

    #[test]
    fn an_address_belongs_to_the_peer_with_the_longest_prefix() {
        let (a, b) = (
            config("a", &[key()], &["10.0.0.0/8"]),
            config("b", &[key()], &["10.1.0.0/16", "fd00::/64"]),
        );
        let mut peers = Peers::default();
        peers.set(known(&[a, b]), &[key()], &mut tunn).unwrap();
        let name = |address: &str| {
            let id = peers.of_address(address.parse().unwrap())?;
            peers.peer(id).map(|p| p.config.name.clone())
        };
        assert_eq!(name("10.2.0.1").as_deref(), Some("a"));
        assert_eq!(name("10.1.0.1").as_deref(), Some("b"));
        assert_eq!(name("fd00::7").as_deref(), Some("b"));
        assert_eq!(name("192.0.2.1"), None);
    }

    #[test]
    fn of_several_sessions_the_one_of_the_newest_keys_is_used() {
        let (old, new, theirs) = (key(), key(), key());
        let a = config("a", &[theirs], &["10.0.0.1"]);
        let mut peers = Peers::default();
        peers.set(known(&[a]), &[old], &mut tunn).unwrap();
        let id = peers.of_address("10.0.0.1".parse().unwrap()).unwrap();
        let first = peers.of_keys(old, theirs).unwrap();
        peers.link_mut(first).unwrap().stage = Stage::Up;
        peers.choose(id);
        assert_eq!(peers.peer(id).unwrap().best, Some(first));
        peers.link_all(&[new, old], &mut tunn).unwrap();
        assert_eq!(peers.peer(id).unwrap().best, Some(first), "the new one has no session yet");
        let second = peers.of_keys(new, theirs).unwrap();
        peers.link_mut(second).unwrap().stage = Stage::Up;
        peers.choose(id);
        assert_eq!(peers.peer(id).unwrap().best, Some(second));
        peers.link_all(&[new], &mut tunn).unwrap();
        assert_eq!(peers.of_keys(old, theirs), None);
        assert_eq!(peers.peer(id).unwrap().best, Some(second));
    }

    #[test]
    fn a_peer_that_stays_keeps_its_session_and_where_it_was_heard_from() {
        let (own, theirs) = (key(), key());
        let mut a = config("a", &[theirs], &["10.0.0.1"]);
        a.endpoint = Some("192.0.2.1:1".parse().unwrap());
        let mut peers = Peers::default();
        peers.set(known(&[a.clone()]), &[own], &mut tunn).unwrap();
        let id = peers.of_address("10.0.0.1".parse().unwrap()).unwrap();
        let heard = Some("192.0.2.2:2".parse().unwrap());
        peers.peer_mut(id).unwrap().endpoint = heard;
        let link = peers.of_keys(own, theirs).unwrap();
        peers.link_mut(link).unwrap().stage = Stage::Up;
        let b = config("b", &[key()], &["10.0.0.2"]);
        peers.set(known(&[b, a.clone()]), &[own], &mut tunn).unwrap();
        let id = peers.of_address("10.0.0.1".parse().unwrap()).unwrap();
        assert_eq!(peers.peer(id).unwrap().endpoint, heard);
        assert_eq!(peers.peer(id).unwrap().best, Some(link));
        a.endpoint = Some("192.0.2.3:3".parse().unwrap());
        peers.set(known(&[a.clone()]), &[own], &mut tunn).unwrap();
        let id = peers.of_address("10.0.0.1".parse().unwrap()).unwrap();
        assert_eq!(peers.peer(id).unwrap().endpoint, a.endpoint, "said anew, it counts");
        assert_eq!(peers.of_address("10.0.0.2".parse().unwrap()), None);
    }

    #[test]
    fn a_list_that_contradicts_itself_is_refused() {
        let one = key();
        let a = config("a", &[one], &["10.0.0.1"]);
        assert!(check(&[a.clone(), config("b", &[key()], &["10.0.0.2"])]).is_ok());
        for (bad, why) in [
            (config("a", &[key()], &[]), "name"),
            (config("b", &[one], &[]), "key"),
            (config("b", &[key()], &["10.0.0.1/32"]), "belongs to"),
            (config("b", &[], &[]), "0 keys"),
            (config("", &[key()], &[]), "name"),
        ] {
            let error = check(&[a.clone(), bad]).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn indices_of_another_process_are_nobodys() {
        let id = LinkId(0x1234);
        let index = Peers::index(id, 7) << 8 | 0x56;
        assert_eq!(Peers::of_index(index, 7), Some(id));
        assert_eq!(Peers::of_index(index, 8), None);
    }
}
