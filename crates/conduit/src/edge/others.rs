//! What this edge knows of the others: where they are, how they are reached by encrypted packets, and
//! which homes there are. Said by the others themselves ([`super::beside`]), and remembered.

use super::{Shared, fronts::Fronts};
use crate::{
    exec::KernelError,
    homes::{self, HomeWord},
    wire::{Peer, TunnelEnd},
};

impl Shared {
    /// Another edge speaks: where it is, and what it knows of homes. Its word on who serves a home is
    /// news only of homes that were not known: for the others the lease is read.
    pub(super) fn hear_edge(
        &self,
        name: &str,
        peer: Peer,
        (words, tunnel): (Vec<HomeWord>, Option<TunnelEnd>),
    ) -> Result<(), KernelError> {
        let Some(fronts) = &self.fronts else { return Ok(()) };
        let fail = |e| KernelError::new(format!("believe edge {name}"), e);
        self.check_encryption(peer).map_err(fail)?;
        // Its keys first: nothing is sent there before the tunnel knows it.
        let keys = match tunnel {
            Some(end) => self.join_edge_tunnel(peer.overlay, end).map_err(fail)?,
            None => false,
        };
        let moved = fronts.set_peer(name, peer);
        if moved || keys {
            fronts.remember(name, peer)?;
        }
        if moved && let Some(plane) = &self.plane {
            plane.let_edge_in(&peer)?;
        }
        if keys && let Some(tunnels) = self.news_of_tunnels() {
            tracing::info!(edge = name, "its keys are known");
            self.lines.tell_all(&tunnels);
        }
        for word in words {
            let known = fronts.word(word.home);
            let addresses = known.as_ref().map(HomeWord::publics);
            // An edge's own addresses are its own business, this one's are ours.
            let news = known.is_none() || word.name == name && addresses != Some(word.publics());
            if !news || word.home == self.this.overlay {
                continue;
            }
            let word = match known {
                Some(known) => HomeWord { by: known.by, epoch: known.epoch, ..word },
                None => word,
            };
            self.know_home(fronts, word)?;
        }
        Ok(())
    }

    /// A home, or its addresses, are new here.
    fn know_home(&self, fronts: &Fronts, word: HomeWord) -> Result<(), KernelError> {
        if fronts.words().len() >= homes::HOMES {
            return Err(KernelError::new("learn of a home", "there are too many"));
        }
        tracing::info!(home = word.name, public = %word.public, "a home is known");
        {
            let mut core = self.core();
            core.ledger.allow_spare(word.spare.iter().copied());
            if self.nat.know(word.home, word.publics()) {
                self.nat.start(core.ledger.machines())?;
            }
        }
        if let Some(plane) = &self.plane {
            plane.let_edge_in(&word.by)?;
            plane.set_front(word.home, &word.by, word.epoch)?;
        }
        fronts.note_word(word)?;
        self.tell_homes();
        Ok(())
    }

    /// Before anything is led: homes that were known are known again, and served if they were.
    pub(super) fn take_up_homes(&self) -> Result<(), KernelError> {
        let Some(fronts) = &self.fronts else { return Ok(()) };
        let serving = fronts.serving();
        let mut core = self.core();
        for word in fronts.words() {
            core.ledger.allow_spare(word.spare.iter().copied());
            self.nat.know(word.home, word.publics());
            if serving.contains(&word.home) {
                self.nat.note_served(word.home);
            }
            if let Some(plane) = &self.plane
                && word.by != self.this
            {
                plane.let_edge_in(&word.by)?;
                plane.set_front(word.home, &word.by, word.epoch)?;
            }
        }
        for edge in fronts.peers().iter().filter(|e| e.overlay != self.this.overlay) {
            if let Some(plane) = &self.plane {
                plane.let_edge_in(edge)?;
            }
        }
        Ok(())
    }
}
