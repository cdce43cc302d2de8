//! What the kernel's entries say of machines that the state files do not say yet: a flip is answered
//! when the pinned map has it, and its file follows ([`crate::journal`]). Decided here, without I/O,
//! when an agent or an edge starts.
//!
//! What must hold: an epoch that the map has seen is never gone back behind; what one epoch decided
//! stays decided.

use crate::{
    book::{EdgeView, Place, Record, Wait},
    edge::ledger,
};
use std::net::Ipv4Addr;

/// A machine's entry in the kernel, in the words of agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// Its epoch.
    pub(crate) epoch: u64,
    /// The oldest epoch that may come for its address.
    pub(crate) floor: u64,
    /// Overlay address of the host that has it, if anybody knows that host.
    pub(crate) owner: Option<Ipv4Addr>,
    /// Where its frames go, if a book has a word for that.
    pub(crate) place: Option<Place>,
    /// Of a candidate: where its frames wait.
    pub(crate) wait: Wait,
}

/// A state file next to what the kernel knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Recalled<T> {
    /// The file says what there is, or something newer.
    AsWritten(T),
    /// The kernel was ahead: this is what there is.
    Ahead(T),
    /// The kernel is ahead, and leads frames to where nobody can name. It goes on doing so, and the
    /// oldest epoch that is accepted from now on is this.
    Lost {
        /// See above.
        floor: u64,
    },
}

/// The record of a machine on this host.
pub(crate) fn record(mut written: Record, known: Option<Known>) -> Recalled<Record> {
    let Some(known) = known else { return Recalled::AsWritten(written) };
    let decided = known.place != Some(Place::Candidate);
    let newer = known.epoch > written.epoch
        || (known.epoch == written.epoch && decided && written.place == Place::Candidate);
    if !newer {
        return Recalled::AsWritten(written);
    }
    let Some(place) = known.place else { return Recalled::Lost { floor: known.floor } };
    // Told again, if it was told at all.
    written.edge = match place {
        Place::Candidate => EdgeView::Unasked,
        Place::Here | Place::Away { .. } => EdgeView::Pending,
    };
    written.epoch = known.epoch;
    written.place = place;
    written.wait = known.wait;
    written.retiring = false;
    Recalled::Ahead(written)
}

/// The entry of a machine in an edge's ledger.
pub(crate) fn entry(mut written: ledger::Entry, known: Option<Known>) -> Recalled<ledger::Entry> {
    let decided = |k: &Known| k.epoch > written.epoch && k.place != Some(Place::Candidate);
    let Some(known) = known.filter(decided).filter(|_| !written.released) else {
        return Recalled::AsWritten(written);
    };
    let Some(owner) = known.owner else { return Recalled::Lost { floor: known.epoch } };
    written.epoch = known.epoch;
    written.owner = owner;
    // Whose lease that is, the lease says.
    written.holder = None;
    Recalled::Ahead(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MachineNet, book::RECORD_VERSION, edge::ledger::ENTRY_VERSION};

    const A: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
    const B: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 3);
    const AWAY: Place = Place::Away { to: B };

    fn net() -> MachineNet {
        MachineNet::new("m", Ipv4Addr::new(10, 77, 0, 5), [2, 0, 0, 0, 0, 5], 1400)
    }

    fn written(place: Place, epoch: u64) -> Record {
        let edge = EdgeView::Confirmed;
        let (version, wait) = (RECORD_VERSION, Wait::Tap);
        Record { version, net: net(), place, epoch, edge, retiring: false, wait, home: None }
    }

    fn known(epoch: u64, place: Option<Place>) -> Option<Known> {
        Some(Known { epoch, floor: epoch + 1, owner: Some(B), place, wait: Wait::Tap })
    }

    #[test]
    fn a_flip_whose_file_was_not_written_is_known_from_the_map() {
        let Recalled::Ahead(found) = record(written(Place::Here, 4), known(5, Some(AWAY))) else {
            panic!("the map is ahead")
        };
        assert_eq!((found.place, found.epoch), (AWAY, 5));
        assert_eq!(found.edge, EdgeView::Pending, "the edge is told, again perhaps");
        // A candidate has the epoch that it waits for; whoever took it decided.
        let found = record(written(Place::Candidate, 5), known(5, Some(Place::Here)));
        assert!(matches!(found, Recalled::Ahead(r) if r.place == Place::Here));
    }

    #[test]
    fn a_file_that_is_as_new_as_the_map_or_newer_stands() {
        for (file, map) in [
            (written(AWAY, 5), known(5, Some(AWAY))),
            (written(AWAY, 6), known(5, Some(Place::Here))),
            (written(Place::Candidate, 5), known(4, Some(AWAY))),
            (written(Place::Here, 5), known(5, Some(Place::Candidate))),
            (written(Place::Here, 5), None),
        ] {
            assert_eq!(record(file.clone(), map), Recalled::AsWritten(file));
        }
    }

    #[test]
    fn frames_that_go_where_nobody_can_name_go_on_and_the_epoch_is_over() {
        let lost = record(written(Place::Here, 4), known(5, None));
        assert_eq!(lost, Recalled::Lost { floor: 6 });
    }

    #[test]
    fn an_edge_recalls_the_owner_but_not_a_machine_that_is_gone() {
        let file = |released| ledger::Entry {
            version: ENTRY_VERSION,
            net: net(),
            owner: A,
            epoch: 4,
            released,
            holder: None,
            home: None,
        };
        let Recalled::Ahead(found) = entry(file(false), known(5, Some(AWAY))) else {
            panic!("the map is ahead")
        };
        assert_eq!((found.owner, found.epoch), (B, 5));
        for (file, map) in [(file(true), known(5, None)), (file(false), known(4, None))] {
            assert_eq!(entry(file.clone(), map), Recalled::AsWritten(file));
        }
        let nobody = known(5, None).map(|k| Known { owner: None, ..k });
        assert_eq!(entry(file(false), nobody), Recalled::Lost { floor: 5 });
    }
}
