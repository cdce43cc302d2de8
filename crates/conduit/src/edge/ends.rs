//! Who is reached how by encrypted packets: hosts and other edges say so themselves, each over its own
//! connection, and this edge tells its tunnel and every agent ([`crate::secure`]).

use super::{Core, Shared, fronts::Fronts};
use crate::{
    exec::KernelError,
    secure::{self, Ends, Note},
    wire::{EdgeSays, Peer, TunnelEnd},
};
use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, PoisonError},
};

/// Notes for other edges, until the next sign of life takes them along; by overlay address.
pub(super) type Notes = BTreeMap<Ipv4Addr, Vec<Note>>;

/// Notes that may wait for one edge; what comes after is lost, and said again.
const NOTES: usize = 16;

impl Fronts {
    fn put_note(&self, to: Ipv4Addr, note: Note) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = notes.entry(to).or_default();
        if waiting.len() < NOTES {
            waiting.push(note);
        }
    }

    pub(super) fn take_notes(&self, to: Ipv4Addr) -> Vec<Note> {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.remove(&to).unwrap_or_default()
    }
}

/// From now on, what this end of the tunnel tells others goes by their connections.
pub(super) fn pass_notes(shared: &Arc<Shared>) {
    let Some(secure) = &shared.secure else { return };
    let me = Arc::downgrade(shared);
    secure.set_post(move |to, note| {
        if let Some(shared) = me.upgrade() {
            shared.send_note(to, note);
        }
    });
}

impl Shared {
    /// Inside the tunnel, everybody has the address that goes with its overlay address.
    pub(super) fn check_encryption(&self, peer: Peer) -> Result<(), String> {
        let inside = peer.underlay == secure::address(peer.overlay);
        if inside == self.secure.is_some() {
            return Ok(());
        }
        let (its, ours) = if inside { ("", " not") } else { (" not", "") };
        Err(format!(
            "its packets are{its} encrypted, this edge's are{ours}; start all hosts and edges with the \
             same --encrypt"
        ))
    }

    /// A host says how it is reached by encrypted packets.
    pub(super) fn join_tunnel(&self, by: Ipv4Addr, tunnel: TunnelEnd) -> Result<(), String> {
        let mut core = self.core();
        self.check_end(&core, by, &tunnel)?;
        let host = core.hosts.get_mut(&by).ok_or("it has not said hello")?;
        host.tunnel = Some(tunnel);
        let saved = self.hosts.save(by, host);
        self.tell_tunnel_soon(&core);
        saved.map_err(|e| e.to_string())
    }

    /// Another edge says so. True if that is news.
    pub(super) fn join_edge_tunnel(&self, by: Ipv4Addr, tunnel: TunnelEnd) -> Result<bool, String> {
        let (Some(fronts), Some(_)) = (&self.fronts, &self.secure) else { return Ok(false) };
        let core = self.core();
        if fronts.tunnel(by).as_ref() == Some(&tunnel) {
            return Ok(false);
        }
        self.check_end(&core, by, &tunnel)?;
        fronts.set_tunnel(by, tunnel);
        self.tell_tunnel_soon(&core);
        Ok(true)
    }

    /// Whether nobody else is reached so, or by that address.
    fn check_end(&self, core: &Core, by: Ipv4Addr, tunnel: &TunnelEnd) -> Result<(), String> {
        secure::check_keys(tunnel)?;
        let shares = |end: &TunnelEnd| end.keys.iter().any(|key| tunnel.keys.contains(key));
        let same = |other: Ipv4Addr| secure::address(other) == secure::address(by);
        let hosts = core.hosts.values().map(|host| host.peer.overlay);
        let edges = self.fronts.iter().flat_map(Fronts::overlays);
        let mut others = hosts.chain(edges).chain([self.this.overlay]).filter(|other| *other != by);
        let another = others.find(|other| same(*other)).or_else(|| {
            let ends = self.tunnels(core);
            ends.into_iter()
                .find(|(other, end)| *other != by && shares(end))
                .map(|(other, _)| other)
        });
        another.map_or(Ok(()), |another| {
            Err(format!(
                "{another} has the same key, or the same low 17 bits of its overlay address, as {by}"
            ))
        })
    }

    /// Everybody's ends, this edge's included.
    fn tunnels(&self, core: &Core) -> Ends {
        let hosts = core.hosts.values().filter_map(|h| Some((h.peer.overlay, h.tunnel.clone()?)));
        let edges = self.fronts.iter().flat_map(Fronts::tunnels);
        let own = self.secure.iter().map(|secure| (self.this.overlay, secure.this()));
        hosts.chain(edges).chain(own).collect()
    }

    pub(super) fn tell_tunnel(&self, core: &Core) -> Result<(), KernelError> {
        let Some(secure) = &self.secure else { return Ok(()) };
        secure.set_peers(self.tunnels(core))
    }

    /// Likewise; a tunnel that cannot be told now is told as soon as it can be ([`crate::secure`]).
    fn tell_tunnel_soon(&self, core: &Core) {
        if let Err(error) = self.tell_tunnel(core) {
            tracing::warn!(%error, "it is told again");
        }
    }

    /// A note of one host to another end of the tunnel, which may be this edge. It is neither read nor kept
    /// here if it is for another one; if that one is not connected, it is lost, and said again.
    pub(super) fn pass_note(&self, from: Ipv4Addr, to: Ipv4Addr, note: Note) {
        if to != self.this.overlay {
            self.lines.tell_host(to, &EdgeSays::Note { from, note });
        } else if let Some(secure) = &self.secure {
            secure.hear(from, note);
        }
    }

    /// A note of this edge's own.
    fn send_note(&self, to: Ipv4Addr, note: Note) {
        match &self.fronts {
            Some(fronts) if fronts.overlays().contains(&to) => fronts.put_note(to, note),
            _ => drop(self.lines.tell_host(to, &EdgeSays::Note { from: self.this.overlay, note })),
        }
    }

    /// What agents are to be told; nothing where packets are not encrypted.
    pub(super) fn news_of_tunnels(&self) -> Option<EdgeSays> {
        self.secure.as_ref()?;
        let tunnels = self.tunnels(&self.core());
        Some(EdgeSays::Tunnels { tunnels })
    }
}
