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
}

/// Tries everything. Needs root.
pub fn check(pins: &Path) -> Result<Vec<Finding>, KernelError> {
    let space = Space::new()?;
    space.ip("address add 10.0.0.1/32 dev lo\n")?;
    let found = space.run(|| {
        let mut found = Vec::new();
        let device = tunnel::ensure(IpAddr::from([10, 0, 0, 1]));
        note(&mut found, "a tunnel device that is told per packet where to", true, &device);
        for (attach, what, needed) in [
            (Attach::Tcx, "programs, maps, pins; attached by tcx links (Linux 6.6)", false),
            (Attach::Clsact, "programs, maps, pins; attached by clsact filters", false),
        ] {
            let tried = attached(attach, pins, device.as_ref().map_or(1, |d| d.index));
            note(&mut found, what, needed, &tried);
        }
        let tap = crate::tap::open_temporary("check0");
        note(&mut found, "a tap", true, &tap);
        let rules =
            "add table ip check; add chain ip check c { type nat hook prerouting priority -100; }";
        note(&mut found, "address translation (an edge)", false, &exec::run("nft", &[rules], ""));
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
    tried: &Result<T, impl std::fmt::Display>,
) {
    let (works, detail) = match tried {
        Ok(_) => (true, String::new()),
        Err(error) => (false, error.to_string()),
    };
    found.push(Finding { what, works, needed, detail });
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
        let finding = |what, works, needed| Finding { what, works, needed, detail: String::new() };
        let tunnel = |works| finding("a tunnel device", works, true);
        let tcx = |works| finding("programs by tcx", works, false);
        let clsact = |works| finding("programs by clsact", works, false);
        assert!(can_bpf(&[tunnel(true), tcx(false), clsact(true)]));
        assert!(!can_bpf(&[tunnel(true), tcx(false), clsact(false)]));
        assert!(!can_bpf(&[tunnel(false), tcx(true), clsact(true)]));
    }
}
