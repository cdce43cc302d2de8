//! Carries the entries of older layouts over, so that an upgrade loses none. One function for each
//! layout that was ever in use; a layout that is not known is refused by name.
//!
//! While an older folder is there it is the truth: its programs are attached. Carrying over may
//! therefore be interrupted and done again.

use crate::{
    abi::{LAYOUT, RawConfig, RawEntry, RawKey, RawPort, check_of},
    error::Error,
    pins::Pins,
};
use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use std::path::Path;

/// `struct cd_entry` of layout 1: no candidate.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct EntryV1 {
    lock: u32,
    pad: u32,
    epoch: u64,
    remote: [u8; 16],
    ifindex: u32,
    state: u8,
    flags: u8,
    mac: [u8; 6],
}
const _: () = assert!(size_of::<EntryV1>() == 48 && align_of::<EntryV1>() == 8);
// SAFETY: `repr(C)`, integers and byte arrays only; the fields are 44 bytes and the size is 48, so
// the last four are padding, which is only ever read from the kernel, never written to it.
unsafe impl Pod for EntryV1 {}

/// The layouts older than ours that have maps here, or an error if one is newer.
pub(crate) fn older(pins: &Pins) -> Result<Vec<u32>, Error> {
    let found = pins.layouts()?;
    if let Some(&newer) = found.iter().find(|&&l| l > LAYOUT) {
        return Err(Error::Newer { path: pins.path().into(), found: newer });
    }
    Ok(found.into_iter().filter(|&l| l < LAYOUT).collect())
}

/// Copies what the maps in `folder` (of layout `from`) say into ours.
pub(crate) fn carry(
    from: u32,
    folder: &Path,
    forward: &mut HashMap<MapData, RawKey, RawEntry>,
    ports: &mut HashMap<MapData, u32, RawPort>,
    peers: &mut HashMap<MapData, [u8; 16], u32>,
    config: &mut aya::maps::Array<MapData, RawConfig>,
) -> Result<usize, Error> {
    let fail = |what: &str, e: &dyn std::fmt::Display| {
        Error::map(format!("carry {what} over from layout {from} in {}", folder.display()), e)
    };
    if from != 1 {
        return Err(fail("entries", &"this layout was never in use"));
    }
    let mut carried = 0;
    let old = open::<RawKey, EntryV1>(&folder.join("forward")).map_err(|e| fail("entries", &e))?;
    for pair in &old {
        let (key, old) = pair.map_err(|e| fail("entries", &e))?;
        let entry = RawEntry {
            check: check_of(&key),
            epoch: old.epoch,
            owner: old.remote,
            ifindex: old.ifindex,
            state: old.state,
            flags: old.flags,
            mac: old.mac,
            ..RawEntry::default()
        };
        forward.insert(key, entry, 0).map_err(|e| fail("entries", &e))?;
        carried += 1;
    }
    // These are the same in both.
    copy(&folder.join("ports"), ports).map_err(|e| fail("ports", &e))?;
    copy(&folder.join("peers"), peers).map_err(|e| fail("peers", &e))?;
    let old = MapData::from_pin(folder.join("config"))
        .map(Map::Array)
        .and_then(|map| aya::maps::Array::<MapData, RawConfig>::try_from(map)?.get(&0, 0));
    config.set(0, old.map_err(|e| fail("settings", &e))?, 0).map_err(|e| fail("settings", &e))?;
    Ok(carried)
}

fn open<K: Pod, V: Pod>(path: &Path) -> Result<HashMap<MapData, K, V>, aya::maps::MapError> {
    HashMap::try_from(Map::HashMap(MapData::from_pin(path)?))
}

fn copy<K: Pod, V: Pod>(
    from: &Path,
    to: &mut HashMap<MapData, K, V>,
) -> Result<(), aya::maps::MapError> {
    for pair in &open::<K, V>(from)? {
        let (key, value) = pair?;
        to.insert(key, value, 0)?;
    }
    Ok(())
}
