//! What a host knows of machines' addresses: the rules of epochs, without any I/O.
//!
//! ```text
//!              prepare            resume(e)
//!   (unknown) ─────────► Candidate ─────────► Here ◄──────────┐
//!                          ▲    │ divert(e)     │ divert(e)    │ resume(e), newer
//!                  prepare │    ▼               ▼              │
//!                          └── Away{to} ◄───────┘ ─────────────┘
//!   forget(e) from anywhere; its epoch stays as the floor for whatever comes later
//! ```
//!
//! Two rules hold on every arrow: an epoch older than one seen is refused, and one epoch has one
//! owner. The same arrow with the same epoch again changes nothing and succeeds.

use crate::{
    datapath::{MachineKey, MachineNet, NetError},
    homes::Home,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::Ipv4Addr};

/// Where a machine's frames go, as this host sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "at", rename_all = "kebab-case")]
pub enum Place {
    /// It may come here: frames that reach this host over the overlay wait in its tap.
    Candidate,
    /// It runs here.
    Here,
    /// It was here; frames that still come are routed on.
    Away {
        /// Overlay address of the host that has it.
        to: Ipv4Addr,
    },
}

/// What the edge knows of our last word about a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "edge", rename_all = "kebab-case")]
pub enum EdgeView {
    /// There is nothing that it must know.
    Unasked,
    /// Not to be told yet: while what waits in the old tap is sent on, the edge's frames take the
    /// same way behind it, so that they do not overtake.
    Held,
    /// Not told yet, or no answer yet.
    Pending,
    /// It does as we said.
    Confirmed,
    /// It refused.
    Refused {
        /// Why.
        error: NetError,
    },
}

/// Where the frames of a machine that may come here wait for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wait {
    /// In its tap's queue: it reads them all at once when it runs.
    #[default]
    Tap,
    /// In the hold tap: they are given back at a pace.
    Hold,
}

impl Wait {
    fn is_tap(&self) -> bool {
        *self == Self::Tap
    }
}

/// A machine in the book. This is also its state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of the state file.
    pub version: u32,
    /// The machine.
    pub net: MachineNet,
    /// Where its frames go.
    #[serde(flatten)]
    pub place: Place,
    /// Epoch of the last change; of a candidate, the oldest that will be accepted.
    pub epoch: u64,
    /// What the edge knows.
    #[serde(flatten)]
    pub edge: EdgeView,
    /// Forgotten by its owner; the record stays until the edge has confirmed. If the machine ran
    /// here, the edge is still to be told that it is gone; if it moved on, its route still
    /// forwards frames.
    #[serde(default)]
    pub retiring: bool,
    /// Of a candidate: where its frames wait.
    #[serde(default, skip_serializing_if = "Wait::is_tap")]
    pub wait: Wait,
    /// The edge that it belongs to, where there are several and one was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<Home>,
}

impl Record {
    /// Whether the edge may still do as before this record.
    #[must_use]
    pub fn edge_is_open(&self) -> bool {
        matches!(self.edge, EdgeView::Held | EdgeView::Pending)
    }

    /// The oldest epoch that is accepted for this address after this record: what was given to
    /// another host stays given.
    #[must_use]
    pub fn floor_after(&self) -> u64 {
        match self.place {
            Place::Away { .. } => self.epoch.saturating_add(1),
            Place::Here | Place::Candidate => self.epoch,
        }
    }
}

/// Version of [`Record`] as written today.
pub const RECORD_VERSION: u32 = 2;

/// What [`Book::forget`] leaves to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgotten {
    /// Nothing was known.
    Nothing,
    /// Remove the tap and the routes; tell the edge (it ran here).
    RemoveAndRelease,
    /// Remove the tap and the routes.
    Remove,
    /// Remove the tap only: the route still forwards frames.
    KeepForwarding,
}

/// The book of one host.
#[derive(Clone, Debug, Default)]
pub struct Book {
    records: BTreeMap<MachineKey, Record>,
    floors: BTreeMap<MachineKey, u64>,
}

/// How many addresses without a machine keep their floor.
const FLOORS: usize = 65_536;

impl Book {
    /// Takes what a state file says; used at start.
    pub fn restore(&mut self, record: Record) {
        self.records.insert(record.net.key(), record);
    }

    /// Puts an address back to what it was, when a change could not be saved.
    pub(crate) fn undo(&mut self, key: MachineKey, before: Option<Record>) {
        match before {
            Some(record) => self.restore(record),
            None => drop(self.records.remove(&key)),
        }
    }

    /// Raises the floor of an address; used at start only.
    pub fn restore_floor(&mut self, key: impl Into<MachineKey>, epoch: u64) {
        self.raise_floor(key.into(), epoch);
    }

    /// The record of a machine.
    #[must_use]
    pub fn get(&self, key: impl Into<MachineKey>) -> Option<&Record> {
        self.records.get(&key.into())
    }

    /// All records, by address.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// The oldest epoch still accepted for an address.
    #[must_use]
    pub fn floor(&self, key: impl Into<MachineKey>) -> u64 {
        let key = key.into();
        let recorded = self.records.get(&key).map_or(0, |r| r.epoch);
        recorded.max(self.floors.get(&key).copied().unwrap_or(0))
    }

    /// The machine may come here. Refused while this host still forwards its frames and the edge
    /// has not confirmed: the frames that it sends here belong elsewhere.
    pub fn prepare(&mut self, net: &MachineNet, wait: Wait) -> Result<&Record, NetError> {
        let same_v6 = |r: &&Record| {
            let other = &r.net;
            let same = net.address_v6.is_some() && other.address_v6 == net.address_v6;
            same && other.network == net.network && other.key() != net.key()
        };
        if let Some(other) = self.records.values().find(same_v6) {
            let taken = format!("machine \"{}\" has its IPv6 address here", other.net.machine);
            return Err(NetError::failed(
                net,
                "prepare its network",
                format!("{taken}; choose another"),
            ));
        }
        let floor = self.floor(net.key());
        let mut place = Place::Candidate;
        let (mut epoch, mut edge) = (floor, EdgeView::Unasked);
        let home = self.records.get(&net.key()).and_then(|old| old.home);
        if let Some(old) = self.records.get(&net.key()) {
            check_same_machine(old, net)?;
            match old.place {
                Place::Away { to } if old.edge_is_open() => {
                    return Err(NetError::failed(
                        net,
                        "prepare its network",
                        format!(
                            "this host still forwards its frames to {to}, because the edge has not \
                             confirmed epoch {}; try again when the edge is back",
                            old.epoch
                        ),
                    ));
                }
                // That epoch is somebody else's for good.
                Place::Away { .. } => epoch = floor.saturating_add(1),
                Place::Candidate => {}
                Place::Here => {
                    place = Place::Here;
                    epoch = old.epoch;
                    // New ports must be told.
                    edge = if old.net == *net { old.edge.clone() } else { EdgeView::Pending };
                }
            }
            if old.retiring && place == Place::Here {
                (place, epoch, edge) = (Place::Candidate, floor, EdgeView::Unasked);
            }
        }
        let record = Record {
            version: RECORD_VERSION,
            net: net.clone(),
            place,
            epoch,
            edge,
            retiring: false,
            wait: if place == Place::Candidate { wait } else { Wait::Tap },
            home,
        };
        Ok(replace(&mut self.records, record))
    }

    /// Frames go to `to` from now on; the edge is told when [`Book::drained`] says so.
    pub fn divert(
        &mut self,
        net: &MachineNet,
        to: Ipv4Addr,
        epoch: u64,
    ) -> Result<&Record, NetError> {
        self.advance(net, Place::Away { to }, epoch)
    }

    /// What waited in the old tap has been sent on: the edge may be told. Returns the record if
    /// that is news.
    pub fn drained(&mut self, key: impl Into<MachineKey>, epoch: u64) -> Option<&Record> {
        let record = self.records.get_mut(&key.into())?;
        if record.epoch != epoch || record.edge != EdgeView::Held {
            return None;
        }
        record.edge = EdgeView::Pending;
        Some(record)
    }

    /// The machine runs here.
    pub fn resume(&mut self, net: &MachineNet, epoch: u64) -> Result<&Record, NetError> {
        self.advance(net, Place::Here, epoch)
    }

    fn advance(&mut self, net: &MachineNet, place: Place, epoch: u64) -> Result<&Record, NetError> {
        let floor = self.floor(net.key());
        let unprepared = || {
            NetError::failed(
                net,
                format!("take epoch {epoch}"),
                "this host was not prepared for it; call prepare first",
            )
        };
        let old = self.records.get(&net.key()).ok_or_else(unprepared)?;
        check_same_machine(old, net)?;
        if epoch < floor {
            return Err(NetError::StaleEpoch {
                machine: net.machine.clone(),
                asked: epoch,
                current: floor,
            });
        }
        let decided = old.place != Place::Candidate && epoch == old.epoch;
        if decided && old.place != place {
            let owner = match old.place {
                Place::Away { to } => to.to_string(),
                Place::Here | Place::Candidate => "this host".to_owned(),
            };
            return Err(NetError::EpochTaken { machine: net.machine.clone(), epoch, owner });
        }
        if old.retiring && place == Place::Here {
            return Err(unprepared());
        }
        if !decided {
            let (net, home) = (old.net.clone(), old.home);
            let record = Record {
                version: RECORD_VERSION,
                net,
                place,
                epoch,
                edge: if place == Place::Here { EdgeView::Pending } else { EdgeView::Held },
                retiring: false,
                wait: Wait::Tap,
                home,
            };
            return Ok(replace(&mut self.records, record));
        }
        Ok(&self.records[&net.key()])
    }

    /// The machine is not here any more.
    pub fn forget(&mut self, net: &MachineNet, epoch: u64) -> Result<Forgotten, NetError> {
        let floor = self.floor(net.key());
        let Some(old) = self.records.get_mut(&net.key()) else {
            return Ok(Forgotten::Nothing);
        };
        check_same_machine(old, net)?;
        if epoch < floor {
            return Err(NetError::StaleEpoch {
                machine: net.machine.clone(),
                asked: epoch,
                current: floor,
            });
        }
        match old.place {
            Place::Away { .. } if old.edge_is_open() => {
                old.retiring = true;
                old.edge = EdgeView::Pending;
                Ok(Forgotten::KeepForwarding)
            }
            Place::Away { .. } => {
                self.drop_record(net.key(), floor.saturating_add(1));
                Ok(Forgotten::Remove)
            }
            Place::Candidate => {
                self.drop_record(net.key(), floor);
                Ok(Forgotten::Remove)
            }
            Place::Here => {
                // Asked again, it is not told again.
                if !old.retiring {
                    old.retiring = true;
                    old.epoch = epoch;
                    old.edge = EdgeView::Pending;
                }
                Ok(Forgotten::RemoveAndRelease)
            }
        }
    }

    /// The edge answered for `epoch`. Returns the record if it was waiting for that; one that was
    /// [retiring](Record::retiring) is out of the book now.
    pub fn edge_answered(
        &mut self,
        key: impl Into<MachineKey>,
        epoch: u64,
        answer: Result<(), NetError>,
    ) -> Option<Record> {
        let key = key.into();
        let record = self.records.get_mut(&key)?;
        if record.epoch != epoch || record.edge != EdgeView::Pending {
            return None;
        }
        record.edge = match answer {
            Ok(()) => EdgeView::Confirmed,
            // It moved on meanwhile: the edge sends us nothing, which is what we wanted.
            Err(NetError::StaleEpoch { .. })
                if record.retiring || matches!(record.place, Place::Away { .. }) =>
            {
                EdgeView::Confirmed
            }
            Err(error) => EdgeView::Refused { error },
        };
        let record = record.clone();
        if record.retiring {
            self.drop_record(key, record.floor_after());
        }
        Some(record)
    }

    /// A home was chosen for a machine, here or elsewhere: of two the older one stands. Returns the
    /// record if that is news.
    pub fn at_home(&mut self, key: impl Into<MachineKey>, home: Home) -> Option<&Record> {
        let record = self.records.get_mut(&key.into())?;
        let stands = record.home.map_or(home, |known| known.older(home));
        if record.home == Some(stands) {
            return None;
        }
        record.home = Some(stands);
        if record.edge == EdgeView::Confirmed && record.place == Place::Here {
            record.edge = EdgeView::Pending;
        }
        Some(record)
    }

    /// The edge was lost and may have forgotten: what it confirmed must be told again.
    pub fn edge_reconnected(&mut self) {
        for record in self.records.values_mut() {
            let settled = matches!(record.edge, EdgeView::Confirmed | EdgeView::Pending);
            if settled && record.place == Place::Here && !record.retiring {
                record.edge = EdgeView::Pending;
            }
        }
    }

    fn drop_record(&mut self, key: MachineKey, floor: u64) {
        self.records.remove(&key);
        self.raise_floor(key, floor);
    }

    fn raise_floor(&mut self, key: MachineKey, floor: u64) {
        if self.floors.len() >= FLOORS && !self.floors.contains_key(&key) {
            // Bounded, at the price of the protection for one long-gone address.
            self.floors.pop_first();
        }
        let entry = self.floors.entry(key).or_default();
        *entry = (*entry).max(floor);
    }
}

fn replace(records: &mut BTreeMap<MachineKey, Record>, record: Record) -> &Record {
    let key = record.net.key();
    records.insert(key, record);
    &records[&key]
}

fn check_same_machine(old: &Record, net: &MachineNet) -> Result<(), NetError> {
    let refuse = |what: String, detail: String| Err(NetError::failed(net, what, detail));
    if old.net.machine != net.machine || old.net.mac != net.mac {
        let taken = format!("machine \"{}\" has it on this host", old.net.machine);
        return refuse(
            format!("use address {}", net.key()),
            format!("{taken}; choose another address"),
        );
    }
    if old.net.mtu != net.mtu
        || old.net.address_v6.is_some() && old.net.address_v6 != net.address_v6
    {
        return refuse(
            "change its network settings".into(),
            "its MTU and its addresses are fixed when it is made; make a new machine".into(),
        );
    }
    Ok(())
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
