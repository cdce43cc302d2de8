//! What the holder process sees of the data path: which machine's frames wait, and where they may
//! go. It owns nothing here: the maps are the agent's or the edge's ([`crate::DataPlane`]), whose
//! death it survives, and whose next one it finds again by the pins.
//!
//! The kernel counts the frames of each address that were put into the hold tap and have not come
//! back out. While there are any, frames that come meanwhile go behind them, whoever changes the
//! entry; the last one that comes back opens the way. So the holder only gives frames back, and says
//! which will never come ([`HeldView::lost`]).

use crate::{
    abi::{DROP, HOLD, Key, LAYOUT, RawChange, RawEntry, RawKey, mapped},
    error::{Error, whole},
    pins,
    plane::run_change,
};
use aya::{
    maps::{HashMap, Map, MapData, MapError},
    programs::SchedClassifier,
};
use std::path::{Path, PathBuf};

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
        _ => Way::Open,
    }
}
