//! `conduit check`: what this kernel can do for the data path, each tried for real in a network
//! namespace that is gone afterwards.

use crate::{
    exec::{self, KernelError},
    lab::Space,
    tunnel,
};
use conduit_bpf::{Attach, DataPlane, Entry, Key, Place, Program};
use serde::Serialize;
use std::{net::IpAddr, path::Path};

/// One thing that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What.
    pub what: &'static str,
    /// Whether the kernel can.
    pub works: bool,
    /// Whether frames can be led by BPF without it.
    pub needed: bool,
    /// The kernel's words, where it cannot.
    pub detail: String,
    /// What is done instead, where it cannot.
    pub instead: &'static str,
}

/// Tries everything. Needs root.
pub fn check(pins: &Path) -> Result<Vec<Finding>, KernelError> {
    let space = Space::new()?;
    space.ip("address add 10.0.0.1/32 dev lo\n")?;
    let found = space.run(|| {
        let mut found = Vec::new();
        let device = tunnel::ensure(IpAddr::from([10, 0, 0, 1]));
        let routes = "frames are led by routes, all hosts and edges of the fleet (--path routes)";
        note(&mut found, "a tunnel device that is told per packet where to", true, routes, &device);
        for (attach, what, instead) in [
            (
                Attach::Tcx,
                "programs, maps, pins; attached by tcx links (Linux 6.6)",
                "programs are attached by clsact filters",
            ),
            (
                Attach::Clsact,
                "programs, maps, pins; attached by clsact filters",
                "programs are attached by tcx links; without those too, frames are led by routes",
            ),
        ] {
            let tried = attached(attach, pins, device.as_ref().map_or(1, |d| d.index));
            note(&mut found, what, false, instead, &tried);
        }
        let tap = crate::tap::open_temporary("check0");
        note(&mut found, "a tap", true, "nothing: machines have no network here", &tap);
        let rules =
            "add table ip check; add chain ip check c { type nat hook prerouting priority -100; }";
        let translation = exec::run("nft", &[rules], "");
        let instead = "nothing: no edge can be here";
        note(&mut found, "address translation (an edge)", false, instead, &translation);
        note(
            &mut found,
            "a list of tracked connections (an edge)",
            false,
            "conduit flows does not show what a conversation is outside",
            &crate::conntrack::list(),
        );
        let wireguard = ["link", "add", "check-wg", "type", "wireguard"];
        note(
            &mut found,
            "WireGuard in the kernel",
            false,
            "the overlay is encrypted by a process, or runs over a network that is trusted",
            &exec::run("ip", &wireguard, ""),
        );
        let _ = conduit_bpf::sweep(pins);
        found
    });
    Ok(found)
}

/// Whether frames can be led by BPF, given what was found.
#[must_use]
pub fn can_bpf(found: &[Finding]) -> bool {
    let programs = found.iter().any(|f| f.works && f.what.starts_with("programs"));
    programs && found.iter().all(|f| f.works || !f.needed)
}

fn note<T>(
    found: &mut Vec<Finding>,
    what: &'static str,
    needed: bool,
    instead: &'static str,
    tried: &Result<T, impl std::fmt::Display>,
) {
    let (works, detail, instead) = match tried {
        Ok(_) => (true, String::new(), ""),
        Err(error) => (false, error.to_string(), instead),
    };
    found.push(Finding { what, works, needed, detail, instead });
}

/// Loads, attaches, changes an entry, and removes it all.
fn attached(attach: Attach, pins: &Path, interface: u32) -> Result<(), conduit_bpf::Error> {
    let plane = DataPlane::open(pins, attach)?;
    let tried = plane.attach(interface, Program::Decap).and_then(|()| {
        let key = Key { net: 1, address: [10, 0, 0, 2].into() };
        let owner = [10, 0, 0, 1].into();
        let entry = Entry { epoch: 1, owner, candidate: None, place: Place::Drop, mac: [0; 6] };
        plane.change(key, &entry).map(drop)
    });
    tried.and(plane.remove())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_way_to_attach_is_enough_and_nothing_needed_may_be_missing() {
        let finding = |what, works, needed| {
            let (detail, instead) = (String::new(), "");
            Finding { what, works, needed, detail, instead }
        };
        let tunnel = |works| finding("a tunnel device", works, true);
        let tcx = |works| finding("programs by tcx", works, false);
        let clsact = |works| finding("programs by clsact", works, false);
        assert!(can_bpf(&[tunnel(true), tcx(false), clsact(true)]));
        assert!(!can_bpf(&[tunnel(true), tcx(false), clsact(false)]));
        assert!(!can_bpf(&[tunnel(false), tcx(true), clsact(true)]));
    }
}
