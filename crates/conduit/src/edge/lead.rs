//! Where the edge leads machines' frames: to the host that has one, into its hold, or nowhere.
//!
//! Called by what hosts say ([`super::words`]), by the watch over their signs of life, and at the start.

use super::{
    Core, Expected, Shared,
    health::{Signs, Treatment},
    ledger::Entry,
};
use crate::{
    datapath::MachineNet,
    exec::KernelError,
    host::MACHINES,
    netlink::{NextHop, Route},
    overlay,
    wire::Peer,
};
use conduit_bpf::Role;
use std::{collections::BTreeMap, net::Ipv4Addr, time::Instant};

impl Shared {
    /// Makes a host reachable.
    pub(super) fn reach(&self, core: &mut Core, peer: &Peer) -> Result<(), KernelError> {
        match &self.plane {
            Some(plane) => plane.set_peer(peer, Role::Host),
            None => overlay::set_peer(&mut core.netlink, self.index, peer),
        }
    }

    /// Leads a machine's frames to the host that has it.
    pub(super) fn lead(&self, core: &mut Core, entry: &Entry) -> Result<(), KernelError> {
        let Entry { net, owner, epoch, home, .. } = entry;
        if let (Some(plane), Some(home)) = (&self.plane, home) {
            plane.set_home(net, home.edge)?;
        }
        // Where one is announced, no other's newer epoch is believed.
        let only_owner = (!self.authority.believes_strangers()).then_some(*owner);
        let candidate = core.believed.get(&net.key()).copied().or(only_owner);
        let awaited = core.awaited.contains_key(&net.key()).then_some(Treatment::Hold);
        match &self.plane {
            Some(plane) => match core.health.treatment(*owner).or(awaited) {
                Some(Treatment::Hold) if plane.holds() => {
                    plane.hold(net, *owner, *epoch, candidate)
                }
                Some(Treatment::Drop) if plane.holds() => plane.drop_frames(net, *owner, *epoch),
                _ => plane.remote(net, *owner, *epoch, false, candidate),
            },
            None => {
                let next = NextHop::Gateway(entry.owner.into(), self.index);
                core.netlink.replace_route(&Route::host(MACHINES, entry.net.address, next))
            }
        }
    }

    /// Judges hosts by their signs of life; what changes for their machines is made so.
    pub(super) fn judge_hosts(&self, signs: &BTreeMap<Ipv4Addr, Vec<Signs>>, now: Instant) {
        let mut core = self.core();
        let bound = core.health.bound();
        let late = |e: &Expected| now.saturating_duration_since(e.since) > bound;
        let late: Vec<_> =
            core.expected.iter().filter(|(_, e)| late(e)).map(|(&address, _)| address).collect();
        for address in late {
            tracing::warn!(%address, "nobody has come to have it: its frames are not held any more");
            if let Err(error) = self.expect_no_more(&mut core, address) {
                tracing::warn!(%address, %error, "they are held all the same");
            }
        }
        if now.saturating_duration_since(core.started) > bound
            && let Some(plane) = &self.plane
        {
            let left_over = std::mem::take(&mut core.left_over);
            let expected = core.expected.values().map(|e| &e.net);
            if let Err(error) = plane.expect_only(&left_over, expected) {
                tracing::warn!(%error, "frames are held for nobody");
            }
        }
        let Core { awaited, ledger, .. } = &mut *core;
        let late: Vec<Entry> = awaited
            .extract_if(.., |_, since| now.saturating_duration_since(*since) > bound)
            .filter_map(|(address, _)| ledger.get(address).filter(|e| !e.released).cloned())
            .collect();
        self.lead_each(&mut core, &late);
        for host in core.health.judge(signs, now) {
            let name = core.hosts.get(&host).map_or("", |h| &h.name).to_owned();
            match core.health.treatment(host) {
                Some(Treatment::Hold) => {
                    tracing::warn!(host = name, "silent: frames for its machines are held");
                }
                Some(Treatment::Drop) => {
                    tracing::warn!(
                        host = name,
                        "still silent: frames for its machines are dropped"
                    );
                }
                None => tracing::info!(host = name, "speaks again"),
            }
            self.lead_all(&mut core, host);
        }
    }

    /// A host has said something.
    pub(super) fn heard(&self, host: Ipv4Addr) {
        let mut core = self.core();
        if core.health.heard(host) {
            let name = core.hosts.get(&host).map_or("", |h| &h.name);
            tracing::info!(host = name, "speaks again: what was held goes there");
            self.lead_all(&mut core, host);
        }
    }

    /// Leads all machines of a host (again).
    pub(super) fn lead_all(&self, core: &mut Core, host: Ipv4Addr) {
        let entries: Vec<Entry> =
            core.ledger.machines().filter(|e| e.owner == host).cloned().collect();
        self.lead_each(core, &entries);
    }

    pub(super) fn lead_each(&self, core: &mut Core, entries: &[Entry]) {
        for entry in entries {
            if let Err(error) = self.lead(core, entry) {
                tracing::warn!(machine = entry.net.machine, %error, "its way stays as it was");
            }
        }
    }

    /// Leads a machine's frames nowhere.
    pub(super) fn mislead(&self, core: &mut Core, net: &MachineNet) -> Result<(), KernelError> {
        core.candidates.remove(&net.key());
        core.believed.remove(&net.key());
        core.awaited.remove(&net.key());
        match &self.plane {
            Some(plane) => plane.forget(net),
            None => core.netlink.delete_route(MACHINES, net.address, 32).map(drop),
        }
    }
}
