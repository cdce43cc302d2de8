//! Conduit's data path in the kernel: BPF programs that lead the frames of each machine's address
//! to the host that has it, and [`DataPlane`], which loads, attaches, pins and changes them.
//!
//! Called by the `conduit` crate (host agent, edge, benchmarks). `bpf/conduit.bpf.c` says what each
//! program does; `docs/conduit.md` has the packets' ways.
//!
//! What must hold:
//!
//! - The data path outlives its owner: programs, maps and links are pinned ([`pins`]), and the
//!   next owner takes them up, with new programs and a newer layout if it brings them, without a
//!   frame lost.
//! - Whoever looks on ([`View`]) needs no owner to run, disturbs none, and changes no entry.
//! - An entry changes by compare and set of its epoch in the kernel ([`DataPlane::change`]): an
//!   older epoch is refused, and one epoch has one owner, whoever asks.

mod abi;
mod error;
mod held;
mod layout;
mod pins;
mod plane;
mod sys;
mod view;

pub use abi::{Config, Entry, Front, Key, LAYOUT, NETWORK_MARK, Place, Port, Role};
pub use error::Error;
pub use held::{Belief, HeldView, Way};
pub use pins::{ROOT, folder, sweep};
pub use plane::{Attach, Changed, DataPlane, Program};
pub use view::{At, Filter, Flow, Flows, Seen, Trace, View};

include!(concat!(env!("OUT_DIR"), "/events.rs"));

#[cfg(test)]
mod tests {
    use super::Event;

    #[test]
    fn every_event_has_a_name_of_its_own_and_words() {
        let names: std::collections::BTreeSet<_> = Event::ALL.iter().map(|e| e.name()).collect();
        assert_eq!(names.len(), Event::ALL.len());
        assert!(Event::ALL.iter().all(|e| !e.about().is_empty()));
        assert!(Event::SpoofedSource.is_drop() && !Event::ToTunnel.is_drop());
    }
}
