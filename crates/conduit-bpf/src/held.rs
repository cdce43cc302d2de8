//! What the holder process sees of the data path: which machine's frames wait, and where they may
//! go. It owns nothing here: the maps are the agent's or the edge's ([`crate::DataPlane`]), whose
//! death it survives, and whose next one it finds again by the pins.
//!
//! The kernel counts the frames of each address that were put into the hold tap and have not come
//! back out. While there are any, frames that come meanwhile go behind them, whoever changes the
//! entry; the last one that comes back opens the way. So the holder only gives frames back, and says
//! which will never come ([`HeldView::lost`]).

use crate::{
    abi::{
        DROP, EPOCH_SLACK, HOLD, Key, LAYOUT, LEAVING, REMOTE, RawChange, RawEntry, RawKey,
        WIRE_STEPS, mapped,
    },
    error::{Error, whole},
    pins,
    plane::run_change,
};
use aya::{
    maps::{HashMap, Map, MapData, MapError},
    programs::SchedClassifier,
};
use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

/// What is to be done with the frames of an address that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nobody has the machine yet.
    Wait,
    /// Give them back: somebody has it.
    Open,
    /// It is gone, or was never known.
    Gone,
}

/// What an edge thinks of a frame that came before its host was known to have the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Belief {
    /// It is believed by now.
    Yes,
    /// Nothing more was heard.
    NotYet,
    /// Another host has the machine, at that epoch or a newer one, or none has.
    No,
}

/// See the module.
pub struct HeldView {
    folder: PathBuf,
    forward: HashMap<MapData, RawKey, RawEntry>,
    change: SchedClassifier,
}

impl HeldView {
    /// Opens what is pinned below `root` for the calling thread's network namespace. Maps of an older
    /// layout, or none, are an error: open again when the owner has come up.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let folder = pins::folder(root)?;
        let fail = |what: &str, e: &dyn std::fmt::Display| {
            Error::map(format!("open {what} in {}", folder.display()), e)
        };
        let maps = folder.join(format!("v{LAYOUT}"));
        let forward = MapData::from_pin(maps.join("forward"))
            .and_then(|data| HashMap::try_from(Map::HashMap(data)))
            .map_err(|e| fail("the entries", &whole(&e)))?;
        let change = SchedClassifier::from_pin(folder.join("programs").join("cd_change"))
            .map_err(|e| fail("cd_change", &whole(&e)))?;
        Ok(Self { folder, forward, change })
    }

    /// Whether the data path was removed since.
    #[must_use]
    pub fn removed(&self) -> bool {
        !self.folder.exists()
    }

    /// What is to be done with frames to an address, and how many of them the kernel has counted as
    /// waiting.
    pub fn look(&self, key: Key) -> Result<(Way, u32), Error> {
        match self.forward.get(&key.into(), 0) {
            Ok(raw) => Ok((way(&raw), raw.waiting)),
            Err(MapError::KeyNotFound) => Ok((Way::Gone, 0)),
            Err(e) => Err(Error::map(format!("read the entry of {key}"), whole(&e))),
        }
    }

    /// Whether a machine's frame from the host at `outer`, whose outer header said `wire` of its epoch, is
    /// believed: what `cd_replay` will say of it.
    pub fn believes(&self, key: Key, outer: Ipv4Addr, wire: u16) -> Result<Belief, Error> {
        match self.forward.get(&key.into(), 0) {
            Ok(raw) => Ok(judge(&raw, outer, wire)),
            Err(MapError::KeyNotFound) => Ok(Belief::No),
            Err(e) => Err(Error::map(format!("read the entry of {key}"), whole(&e))),
        }
    }

    /// Says that `frames` which were counted as waiting will never come. Returns how many still are.
    pub fn lost(&self, key: Key, frames: u32) -> Result<u32, Error> {
        let ask = RawChange {
            net: key.net,
            addr: mapped(key.address),
            waiting: frames,
            ..RawChange::default()
        };
        let fail = |e| Error::map(format!("give up {frames} frames to {key}"), e);
        Ok(run_change(&self.change, &ask).map_err(fail)?.waiting)
    }

    /// The addresses that have frames waiting, as the kernel counts. Reads all entries.
    pub fn waiting(&self) -> Result<Vec<Key>, Error> {
        let mut found = Vec::new();
        for pair in &self.forward {
            let (key, raw) = pair.map_err(|e| Error::map("list the entries", whole(&e)))?;
            if raw.waiting > 0 {
                found.push(Key::from(key));
            }
        }
        Ok(found)
    }
}

impl HeldView {
    /// Whether no address is on hold and no frame waits. Reads all entries.
    pub fn is_idle(&self) -> Result<bool, Error> {
        for pair in &self.forward {
            let (_, raw) = pair.map_err(|e| Error::map("list the entries", whole(&e)))?;
            if raw.waiting > 0 || raw.state == HOLD {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn way(raw: &RawEntry) -> Way {
    match raw.state {
        HOLD => Way::Wait,
        DROP => Way::Gone,
        // What is in its tap goes first.
        REMOTE if raw.flags & LEAVING != 0 => Way::Wait,
        _ => Way::Open,
    }
}

/// `judge_sender` in `bpf/conduit.bpf.c`.
fn judge(raw: &RawEntry, outer: Ipv4Addr, wire: u16) -> Belief {
    if raw.state == DROP {
        return Belief::No;
    }
    let outer = mapped(outer.into());
    let ours = (raw.epoch >> 16).wrapping_mul(WIRE_STEPS) + (raw.epoch & 0xffff);
    let ahead = wire.wrapping_sub(ours as u16) as i16;
    let newer = ahead > 0 && ahead < EPOCH_SLACK;
    if raw.owner == outer {
        return if ahead == 0 || newer { Belief::Yes } else { Belief::No };
    }
    match newer {
        true if raw.candidate == outer || raw.candidate == [0; 16] => Belief::Yes,
        true => Belief::NotYet,
        false => Belief::No,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_early_frame_waits_until_its_host_is_the_owner_or_announced_and_never_for_another() {
        let host = |last| Ipv4Addr::new(10, 88, 0, last);
        let entry = |epoch: u64, owner, candidate| RawEntry {
            lock: 0,
            check: 0,
            epoch,
            owner: mapped(host(owner).into()),
            candidate: mapped(host(candidate).into()),
            ifindex: 0,
            state: REMOTE,
            flags: 0,
            mac: [0; 6],
            waiting: 0,
        };
        let wire = |lease: u16, flips: u16| lease.wrapping_mul(64) + flips;
        let of_a = entry(3 << 16, 2, 2);
        assert_eq!(judge(&of_a, host(3), wire(4, 0)), Belief::NotYet);
        assert_eq!(judge(&entry(3 << 16, 2, 3), host(3), wire(4, 0)), Belief::Yes, "announced");
        assert_eq!(judge(&entry(4 << 16, 3, 3), host(3), wire(4, 0)), Belief::Yes, "the owner");
        assert_eq!(judge(&entry(4 << 16, 4, 4), host(3), wire(4, 0)), Belief::No, "another's");
        assert_eq!(judge(&entry(5 << 16, 3, 3), host(3), wire(4, 0)), Belief::No, "over");
        assert_eq!(judge(&of_a, host(3), wire(12, 0)), Belief::No, "too far ahead");
        let gone = RawEntry { state: DROP, ..of_a };
        assert_eq!(judge(&gone, host(2), wire(3, 0)), Belief::No);
        // The wire has 16 bits of it.
        let last = entry(1023 << 16, 2, 2);
        assert_eq!(judge(&last, host(3), wire(1024, 0)), Belief::NotYet);
    }
}
